"""What `scripts/bench_training.py` and `scripts/bench_gpu.py` share: rows, commands, measured runs, tables."""
