"""Tools for developing dpo_runner: generated files, benchmarks (`bench`), stress tests (`torture`)."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
"""The checkout."""
