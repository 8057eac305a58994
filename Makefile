# Two commands do everything on a fresh machine with Python 3.11 or newer: `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
WORKERS ?= 2
BIN := $(VENV)/bin

# Tests need no hub and send nothing.
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-all check oldest benchmarks clean

demo: $(VENV)/.installed
	$(BIN)/hbat demo

test: check
	$(BIN)/python -m pytest -n $(WORKERS)

test-all: check
	$(BIN)/python -m pytest -n $(WORKERS) -m ""

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The oldest host that is supported, in an environment of its own.
oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -n $(WORKERS)

benchmarks: $(VENV)/.installed
	$(BIN)/python benchmarks/stages.py
	$(BIN)/python benchmarks/penalty.py
	$(BIN)/python benchmarks/startup.py

# torch first and through the constraints, so that no other build of it comes along with the rest.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

$(OLDEST)/.installed: pyproject.toml constraints.txt constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) demo-output .mypy_cache .pytest_cache .ruff_cache
