#!/usr/bin/env bash
# Measure training on a GPU next to `trl dpo` and check that both compute the same: under ten minutes, no hub access.
# Results go to benchmarks/gpu.md. Arguments are passed on to scripts/bench/gpu.py.
set -euo pipefail
cd "$(dirname "$0")/../.."
if ! command -v nvidia-smi >/dev/null || ! nvidia-smi >/dev/null 2>&1; then
  echo "error: no GPU: nvidia-smi is not there or does not answer" >&2
  exit 2
fi
python=${PYTHON:-.venv/bin/python}
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "error: $python: its torch does not see the GPU; install a build with CUDA, or name another with PYTHON" >&2
  exit 2
fi
exec "$python" -m scripts.bench.gpu "$@"
