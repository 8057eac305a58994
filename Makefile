# Two commands do everything on a fresh machine with Python 3.11 or newer: `make demo` and `make test`.
# While you write: `make quick`. Before a release: `make test-all`, `make oldest`, `make newest`.

PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
NEWEST ?= .venv-newest
TRL112 ?= .venv-trl112
WORKERS ?= 2
BIN := $(VENV)/bin

# Tests need no hub and send nothing.
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

# The core: rules of the house, bad rows, the penalty against autograd, SFT and DPO with and without it, resume.
TRAINER := tests/trainer
QUICK := tests/test_house.py tests/data/test_check.py tests/ewc/test_callback.py \
	'$(TRAINER)/test_trainer.py::test_a_run_without_a_penalty_equals_plain_trainers[none-full]' \
	'$(TRAINER)/test_ewc.py::test_a_run_equals_plain_trainers_with_the_penalty_in_their_loss[lora]' \
	$(TRAINER)/test_resume.py::test_a_run_can_be_cut_off_again_and_again
# Tests of one file share trained runs, so one process takes them all; in order, as the longest files come early.
PYTEST := python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: demo demo-ppo quick quick-tests test test-all check oldest newest support docs benchmarks benchmarks-gpu benchmarks-ppo evidence evidence-smoke faults clean

demo: $(VENV)/.installed
	$(BIN)/hbat demo

demo-ppo: $(VENV)/.installed
	$(BIN)/hbat demo --preference ppo

# Types and tests side by side.
quick: $(VENV)/.installed
	$(MAKE) --jobs 2 check quick-tests

quick-tests: $(VENV)/.installed
	$(BIN)/$(PYTEST) $(QUICK)

test: check
	$(BIN)/$(PYTEST)

# With the slow ones, and those of DeepSpeed and lm-eval.
test-all: check
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[deepspeed,eval]"
	$(BIN)/$(PYTEST) -m ""

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The oldest versions that are supported, in an environment of their own.
oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/$(PYTEST)

# The newest versions of TRL, transformers, PEFT, accelerate and datasets that go together, in an environment of their own.
newest: $(NEWEST)/.installed
	$(NEWEST)/bin/$(PYTEST)

# The page of what runs with what, from the table that the checks use.
support: $(VENV)/.installed
	$(BIN)/python docs/support_page.py docs/support.md

# The site of docs/, in docs/_build/html.
docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	$(BIN)/python -m sphinx -q -W --keep-going -n docs docs/_build/html

benchmarks: $(VENV)/.installed
	$(BIN)/python benchmarks/stages.py
	$(BIN)/torchrun --standalone --nproc_per_node 2 benchmarks/stages.py
	$(BIN)/python benchmarks/penalty.py
	$(BIN)/python benchmarks/startup.py

# A model of 7B parameters (random weights); without a GPU at toy size.
benchmarks-gpu: $(VENV)/.installed
	$(BIN)/python benchmarks/gpu/penalty.py
	$(BIN)/python benchmarks/gpu/stages.py

# Beside the last TRL that has a PPOTrainer, in an environment of its own.
benchmarks-ppo: $(VENV)/.installed $(TRL112)/.installed
	$(BIN)/python benchmarks/ppo.py --trl-python $(TRL112)/bin/python
	$(BIN)/python benchmarks/ppo.py --trl-python $(TRL112)/bin/python --lengths uneven

# HBAT against its alternatives on generated tasks: hours on two cores; continues where it was cut off.
evidence: $(VENV)/.installed
	$(BIN)/python benchmarks/alignment/run.py
	$(BIN)/python benchmarks/alignment/report.py

# Every step of it, too small to learn anything, in a new folder.
evidence-smoke: $(VENV)/.installed
	rm -rf benchmarks/results/alignment-smoke
	$(BIN)/python benchmarks/alignment/run.py --smoke --output benchmarks/results/alignment-smoke
	$(BIN)/python benchmarks/alignment/report.py --output benchmarks/results/alignment-smoke

# Runs that are killed at random moments, and other faults: minutes on two cores. Its tables are those of docs/faults.md.
faults: $(VENV)/.installed
	$(BIN)/python benchmarks/fault_campaign.py --runs 50

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

# Anew whenever a version is out: `rm -r .venv-newest`.
$(NEWEST)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(NEWEST)/bin/python -m pip install --quiet --editable ".[dev]"
	touch $@

$(TRL112)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(TRL112)
	$(TRL112)/bin/python -m pip install --quiet --constraint constraints.txt torch
	grep -v '^trl==' constraints.txt > $(TRL112)/constraints.txt
	$(TRL112)/bin/python -m pip install --quiet --constraint $(TRL112)/constraints.txt --editable ".[dev]" trl==1.12.0
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(TRL112) demo-output docs/_build .mypy_cache .pytest_cache .ruff_cache
