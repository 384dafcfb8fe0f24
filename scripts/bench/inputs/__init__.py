"""Inputs of the benchmarks: preference rows and models with random weights."""
