# `make demo` and `make test` make the environment first if there is none.
PYTHON ?= python3
BIN := .venv/bin
DEMO_OUTPUT ?= runs/demo
CORE_LATEST ?= 0.19.2
# Two processes, each with whole files of tests, the long ones in tests/distributed first.
IN_PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder
# More threads than cores slow small tensors down; torchrun ranks set their own.
export OMP_NUM_THREADS ?= 1

.PHONY: help env launch-env demo bench layouts lint docs test test-slow test-core-latest clean

help:
	@echo "make env        the environment: .venv over a cache keyed by the requirements"
	@echo "make launch-env  .venv-launch, with nemo-run, to send jobs to Slurm (docs/slurm.md)"
	@echo "make demo       digits from scratch on a CPU, with a report in $(DEMO_OUTPUT)"
	@echo "make bench      what the second pass costs, and sync and step beside others' (docs/bench.md)"
	@echo "make layouts    how far every layout is from one process (docs/scaling.md)"
	@echo "make test       ruff, mypy, the guides and the tests that are not slow"
	@echo "make docs       the guides as web pages, in docs/_build"
	@echo "make test-slow  the slow tests, the demo's claims among them"
	@echo "make test-core-latest  parity and distributed tests on megatron-core $(CORE_LATEST)"
	@echo "make clean      removes caches of tools; runs/ and .venv stay"

env: $(BIN)/megatron-sr1

$(BIN)/megatron-sr1: setup.py tools/make_env.py
	$(PYTHON) tools/make_env.py

launch-env:
	$(PYTHON) tools/make_launch_env.py

demo: env
	$(BIN)/megatron-sr1 demo --output $(DEMO_OUTPUT)

bench: env
	$(BIN)/python tools/bench.py --demo $(DEMO_OUTPUT)

layouts: env
	$(BIN)/python tools/layouts.py

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

docs: env
	$(BIN)/python -m sphinx -n -W --keep-going -q docs docs/_build

test: lint docs
	$(BIN)/python -m pytest $(IN_PARALLEL)
	@if ls /dev/nvidia[0-9]* > /dev/null 2>&1; then $(BIN)/python -m pytest tests/gpu; fi

test-slow: env
	$(BIN)/python -m pytest -m slow

test-core-latest: env
	PYTHONPATH=$$($(PYTHON) tools/make_env.py --core $(CORE_LATEST)) \
		$(BIN)/python -m pytest $(IN_PARALLEL) tests/parity tests/distributed

clean:
	rm -rf .mypy_cache .ruff_cache .pytest_cache
	find megatron_sr1 tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
