"""Measurements of processes, GPU memory, floating-point operations and profiles."""
