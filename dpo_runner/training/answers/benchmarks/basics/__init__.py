"""Bundled tasks in the format of lm-evaluation-harness; scripts/make_benchmarks.py makes the rows."""
