"""Stress tests: killed runs, generated configurations and rows, and many runs in one process."""
