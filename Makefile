# From nothing to an answer: `make up`. Everything lives in .venv; stamps make the second time quick.
PYTHON ?= python3
VENV ?= .venv
# On a machine with GPUs, or with torch already in VENV, say what you want: make up TORCH=torch
TORCH ?= torch==2.13.0
ARGS ?=
BIN := $(VENV)/bin
WORKERS ?= 2
# Its tests wait for peers more than they compute: one worker more than the two cores that it is meant for.
QUICK_WORKERS ?= 3
# Bytecode is kept whatever the environment says: a run starts hundreds of processes, which compiled all again.
PYTEST = PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -n $(WORKERS) --dist worksteal

.PHONY: up quick test heavy check fmt bench exactness simulate mutations chaos swaps soak extras hooks clean

up: $(VENV)/installed
	$(BIN)/microserve up $(ARGS)

# State and wire, in less than a minute: before every commit. QUICK_WORKERS=0 for a debugger.
quick: $(VENV)/installed
	$(PYTEST) -n $(QUICK_WORKERS) -m quick $(ARGS)

# All but the endurance of `make heavy`, in less than nine minutes.
test: $(VENV)/installed
	$(PYTEST) -m "not heavy" $(ARGS)

# The long ones: exactness of the demo model, freezes, chaos, hostile strategies, days of virtual time.
heavy: $(VENV)/installed
	$(PYTEST) -m heavy $(ARGS)

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tests examples tooling
	$(BIN)/lint-imports
	$(BIN)/python tooling/file_length.py

fmt: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# ARGS="--requests 20 --strategies auto" for a cut of it.
exactness: $(VENV)/installed
	$(BIN)/python tests/support/process/exactness.py --model "$$($(BIN)/microserve model fetch)" $(ARGS)

# A thousand simulated worlds full of faults; ARGS="--seeds 20000", or ARGS="--replay 17" for one of them.
simulate: $(VENV)/installed
	$(BIN)/python -m microserve.services.simulation.faults.campaign $(ARGS)

# Bugs planted on purpose, and how many worlds it takes to catch each.
mutations: $(VENV)/installed
	$(BIN)/python tests/simulation/mutations.py $(ARGS)

# Real processes killed, frozen and drained at random: make chaos ARGS="--seconds 1800 --seed 1"
chaos: $(VENV)/installed
	$(BIN)/python tests/chaos/chaos.py $(ARGS)

# Strategies swapped on a live mesh under load: ARGS="--seconds 60 --swaps 1000 --rate 50"
swaps: $(VENV)/installed
	$(BIN)/python tests/support/router/swaps.py $(ARGS)

# Memory under a steady load, nothing killed: ARGS="--seconds 1200 --rate 12"
soak: $(VENV)/installed
	$(BIN)/python tests/support/process/soak.py $(ARGS)

# What a machine with a GPU would install, resolved and not installed.
extras: $(VENV)/installed
	$(BIN)/pip install --quiet --dry-run '.[cuda12]'
	$(BIN)/pip install --quiet --dry-run '.[cuda13]'

# Every commit in this checkout: ruff, mypy on what changed, no file over 400 lines.
hooks: $(VENV)/installed
	$(BIN)/pre-commit install

bench: $(VENV)/installed
	@for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python "$$file" $(ARGS) || exit 1; done

clean:
	rm -rf $(VENV) .microserve .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/torch:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	@touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[engine,demo,dev]'
	@touch $@
