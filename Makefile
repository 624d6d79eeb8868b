# `make demo` and `make test` are all that a newcomer needs; both install into .venv first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
DATA ?= ../shared/data

.PHONY: help demo test lint format types docs test-slow test-zoo test-realdata benchmark benchmark-curvature zoo clean

help:
	@echo "make demo           make the bundled network more than twice as fast on handwritten digits (under 3 minutes after install)"
	@echo "make test           run the test suite (offline, 4 minutes on 2 cores)"
	@echo "make lint           check style and types"
	@echo "make format         correct style"
	@echo "make types          check types alone (mypy)"
	@echo "make docs           build the documentation strictly, into site/"
	@echo "make test-slow      the longer forms of those tests, whole runs, several processes (8 minutes on 2 cores)"
	@echo "make test-zoo       fold every network of tests/zoo.txt (a quarter of an hour)"
	@echo "make test-realdata  tests on real datasets and weights (DATA=$(DATA))"
	@echo "make zoo            cut every network of tests/zoo.txt, here and with torch-pruning; resumable, hours"
	@echo "make benchmark      every method on real data, torch-pruning's too (DATA=$(DATA)); hours, resumable"
	@echo "make benchmark-curvature  cost of curvature beside its peers (DATA=$(DATA)); resumable"

$(VENV)/.base: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[test,quality]"
	touch $@

$(VENV)/.types: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[types]"
	touch $@

$(VENV)/.docs: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[docs]"
	touch $@

demo: $(VENV)/.base
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --num_cpu_threads_per_process $(shell nproc) \
		--mixed_precision no --dynamo_backend no scripts/prune.py --target-latency 0.45 --latency-batch-size 32 --overwrite

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.test types
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(VENV)/.test
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(VENV)/.types
	$(BIN)/mypy

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test-slow: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 2 --dist worksteal

test-zoo: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m zoo -n 2 --dist worksteal

test-realdata: $(VENV)/.test
	$(BIN)/python -m pytest -m realdata

benchmark: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[benchmarks]"
	$(BIN)/python benchmarks/compare.py --data $(DATA)
	$(BIN)/python benchmarks/compare.py --data $(DATA) --job reach --polish-steps 100 --only '^merge-aware reconstruct'

zoo: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch-pruning==1.6.1
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/zoo.py

benchmark-curvature: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[benchmarks]"
	$(BIN)/python benchmarks/curvature.py --data $(DATA)

clean:
	rm -rf $(VENV) build dist site *.egg-info
