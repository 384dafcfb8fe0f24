"""Benchmarks of training, GPU training, data preparation and memory, and the modules that they share."""
