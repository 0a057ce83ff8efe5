# From nothing to an answer: `make up`. Everything lives in .venv; stamps make the second time quick.
PYTHON ?= python3
VENV ?= .venv
# The CPU build, or a CUDA build where there is a GPU. Another one: make up TORCH=torch==2.14.1, or a wheel's path
TORCH ?=
TORCH_FLAGS = $(if $(TORCH),--torch '$(TORCH)')
PREFIX ?= /opt/microserve
ARGS ?=
DTYPE ?= bfloat16
BIN := $(VENV)/bin
# Tests wait for peers more than they compute: more workers than the two cores that they are meant for.
WORKERS ?= 3
QUICK_WORKERS ?= 4
# Bytecode is kept whatever the environment says: a run starts hundreds of processes, which compiled all again.
PYTEST = PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -n $(WORKERS) --dist worksteal

# Compiles the CPU's kernels if that is not done yet, and says so; where it cannot, engines do without.
KERNELS = $(BIN)/python -P -m microserve.kernels.cpu.build --ahead && $(BIN)/python -P -m $(INDEX) --ahead \
	&& $(BIN)/python -P -m $(CODEC) --ahead
INDEX = microserve.kvcache.prefix.build
CODEC = microserve.kernels.codec.build

ASK_PYTHON = $(PYTHON) -c 'import sys; sys.exit("Error: Python 3.11 or newer is needed, and $(PYTHON) is %d.%d: \
make ... PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
# An environment knows its own place: one that was moved with its checkout is made anew.
MOVED := $(if $(TORCH),moved,$(shell [ ! -e '$(VENV)/installed' ] || [ "$$(cat '$(VENV)/installed')" = "$$(pwd -P)" ] || \
	echo moved))

.PHONY: help
.PHONY: moved install up vllm quick test heavy clients peers hosts page boards test-vllm check fmt bench bench-quick exactness conformance simulate mutations chaos hurt swaps soak extras wheel hooks clean

# A whole mesh on this machine, and a first answer: all that it needs is made first.
up: $(VENV)/installed
	@$(KERNELS)
	$(BIN)/microserve up $(ARGS)

# These targets, a sentence each.
help:
	@$(PYTHON) tooling/targets.py

# The same with two engines of vLLM's, in an environment of their own that is made once (docs/engines.md).
VLLM ?= .vllm
vllm: $(VENV)/installed
	@$(KERNELS)
	@$(BIN)/python tooling/vllm_environment.py --venv '$(VLLM)'
	$(BIN)/microserve up --strategy balanced --set engine.backend=vllm --set 'vllm.python=$(abspath $(VLLM))/bin/python' \
		--set kvcache.block_size=32 --set vllm.kv_cache_mb=512 --set vllm.enforce_eager=true --set mesh.ready_timeout_s=600 $(ARGS)

# State and wire, in less than a minute: before every commit. QUICK_WORKERS=0 for a debugger.
quick: $(VENV)/dev
	$(PYTEST) -n $(QUICK_WORKERS) -m quick $(ARGS)

# All but the endurance of `make heavy`, in less than nine minutes.
test: $(VENV)/dev
	@$(KERNELS)
	$(PYTEST) -m "not heavy and not clients and not peers and not hosts and not vllm and not page and not boards" $(ARGS)

# The long tests: exactness of the demo model, freezes, chaos, hostile strategies, days of virtual time.
heavy: $(VENV)/dev
	@$(KERNELS)
	$(PYTEST) -m "heavy and not page and not boards" $(ARGS)

# Other people's clients, unmodified, each in an environment of its own that is made once: docs/clients.md.
# CLIENT=litellm for one of them.
clients: $(VENV)/dev
	@$(KERNELS)
	PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -m clients --durations=0 '$(ONE_CLIENT)' $(ARGS)
ONE_CLIENT = tests/clients$(if $(CLIENT),/test_clients.py::test_client[$(CLIENT)])

# Other people's indexers and routers on our KV events and our gateway, likewise: docs/engines.md.
peers: $(VENV)/dev
	@$(KERNELS)
	PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -m "peers and not vllm" --durations=0 tests/peers $(ARGS)

# The page in a real browser: Debian's chromium, where there is one. MICROSERVE_PAGE_SOAK_S=600 for its endurance.
page: $(VENV)/dev
	PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -m page --durations=5 tests/page $(ARGS)

# Boards and alerts on a real mesh by a real Prometheus: the one that is installed, or Debian's, unpacked below .venv where apt is.
boards: $(VENV)/dev
	@$(KERNELS)
	@$(BIN)/python tooling/prometheus.py --into '$(VENV)/prometheus'
	PATH="$$PATH:$(abspath $(VENV))/prometheus/usr/bin" PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -m boards --durations=5 tests/boards $(ARGS)

# vLLM's own engines: what needs its environment. ARGS="tests/services/engine/vllm" for a part of it,
# ARGS='-m "vllm and not slow and not heavy"' without the tests that start engines again and again.
test-vllm: $(VENV)/dev
	@$(KERNELS)
	@$(BIN)/python tooling/vllm_environment.py --venv '$(VLLM)'
	MICROSERVE_TEST_VLLM_PYTHON='$(abspath $(VLLM))/bin/python' PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -m vllm --durations=10 $(ARGS)

# A mesh between hosts, which are namespaces of this machine, with cables that are slow, cut and deaf: as root.
# ARGS='-m "hosts and not slow"' for a short form of it, with a sample of the engines' conformance suite, and that by nixl between two hosts alone.
# Nothing that it makes has a name, or outlives it.
hosts: $(VENV)/dev $(VENV)/nixl
	@$(BIN)/python -m tests.support.hosts.namespaces
	@$(KERNELS)
	PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -n 2 --dist worksteal -m hosts --durations=5 tests/hosts tests/engine_conformance $(ARGS)

# One of NIXL's two builds, and none of what both want for GPUs; its tests say that they are left out where it cannot be had.
$(VENV)/nixl: $(VENV)/dev
	@if $(BIN)/pip install --quiet --no-deps 'nixl>=1.5.1,<1.6' 'nixl-cu12>=1.5.1,<1.6'; then touch $@; \
		else echo 'SKIPPED: what goes by NIXL: it cannot be installed here'; fi

# Types, style, floors and lengths of files: what every commit must pass.
check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tests examples tooling
	$(BIN)/lint-imports
	$(BIN)/python tooling/file_length.py

# Puts imports and lines in order.
fmt: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Bits of tokens and log-probabilities, killed engines too. DTYPE=float32: and the tokens of transformers.
# ARGS="--requests 20 --strategies auto" for a cut of it.
exactness: $(VENV)/dev
	$(BIN)/python tests/support/process/exactness.py --model "$$($(BIN)/microserve model fetch)" --dtype $(DTYPE) $(ARGS)

# JSON schemas of a checkout of MaskBench or the JSON Schema test suite (tests/conformance/corpora.py) through the gateway's
# check and the engine's matcher: make conformance CORPUS=DIR ARGS="--strict --every 10"; chat templates of a directory beside
# transformers': TEMPLATES=DIR. Recorded tool calls always.
CORPUS ?=
TEMPLATES ?=
conformance: $(VENV)/dev
	$(BIN)/pytest -q -s -n 0 tests/gateway/parsing/test_recorded.py
	@[ -z '$(CORPUS)' ] || $(BIN)/python tests/conformance/conformance.py '$(CORPUS)' $(ARGS)
	@[ -z '$(TEMPLATES)' ] || $(BIN)/python tests/conformance/templates.py '$(TEMPLATES)'

# A thousand simulated worlds full of faults; ARGS="--seeds 20000", or ARGS="--replay 17" for one of them.
simulate: $(VENV)/dev
	$(BIN)/python -m microserve.services.simulation.faults.campaign $(ARGS)

# Bugs planted on purpose, and how many worlds it takes to catch each.
mutations: $(VENV)/dev
	$(BIN)/python tests/simulation/mutation/mutations.py $(ARGS)

# Real processes killed, frozen and drained at random: make chaos ARGS="--seconds 1800 --seed 1"
chaos: $(VENV)/dev
	$(BIN)/python tests/chaos/chaos.py $(ARGS)

# A full disk, no descriptors, floods and a crash loop, while it serves; as root: make hurt ARGS="--seconds 600"
hurt: $(VENV)/installed
	$(BIN)/python tests/chaos/hurt.py $(ARGS)

# Strategies swapped on a live mesh under load: ARGS="--seconds 60 --swaps 1000 --rate 50"
swaps: $(VENV)/dev
	$(BIN)/python tests/support/router/swaps.py $(ARGS)

# Memory under a steady load, nothing killed: ARGS="--seconds 1200 --rate 12"
soak: $(VENV)/dev
	$(BIN)/python tests/support/process/soak.py $(ARGS)

# What a machine with a GPU would install, resolved and not installed.
extras: $(VENV)/dev
	$(BIN)/pip install --quiet --dry-run '.[cuda12]'
	$(BIN)/pip install --quiet --dry-run '.[cuda13]'

# Hooks for every commit in this checkout: ruff, mypy on what changed, no file over 400 lines, no folder over a dozen.
hooks: $(VENV)/dev
	$(BIN)/pre-commit install

# A wheel with the CPU's kernels for any x86-64 Linux from glibc 2.28 on, in dist/.
wheel: $(VENV)/dev
	$(BIN)/pip install --quiet --editable '.[compiler]'
	$(BIN)/python -P -m microserve.kernels.cpu.build --zig --into dist/prebuilt
	$(BIN)/python -P -m $(INDEX) --zig --into dist/prebuilt
	$(BIN)/python -P -m $(CODEC) --zig --into dist/prebuilt
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

BENCHMARKS = $(filter-out %/__init__.py benchmarks/results/%,$(wildcard benchmarks/*.py benchmarks/*/*.py))
# Every benchmark, one after the other; hours.
bench: $(VENV)/dev
	@for file in $(BENCHMARKS); do echo "== $$file"; $(BIN)/python "$$file" $(ARGS) || exit 1; done

# A short form of each that needs no GPU, kept (benchmarks/results) and drawn (docs/benchmarks.md), in less than
# ten minutes on two free cores: to see that all of them run and nothing is far off, and not for claims.
bench-quick: $(VENV)/dev
	@for line in "engine_step --quick" "engine_neighbour --quick" "engine_mesh --quick" \
		"engine_http --quick --peers openvino,transformers"; do \
		echo "== $$line"; $(BIN)/python benchmarks/results/record.py $$line || exit 1; done
	$(BIN)/python benchmarks/results/tables.py
	@for line in "mesh/control_plane.py --rounds 1 --scale 0.2" "index/prefix_index_peer.py --requests 1000" \
		"mesh/start_and_rest.py --rounds 1 --idle-s 5" "heap_put.py --rounds 5" "mesh/locked.py --rounds 1 --tokens 16" \
		"strategies.py --requests 100"; do \
		echo "== $$line"; $(BIN)/python benchmarks/$$line || exit 1; done

# Removes all that was made here, and stops a mesh that runs here first: without its directory nothing would find it any more.
clean:
	[ ! -e .microserve/mesh.pid ] || $(BIN)/microserve down
	rm -rf $(VENV) $(VLLM) .microserve .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist
	find . -name __pycache__ -prune -exec rm -rf {} +

# --- what they need ---------------------------------------------------------------------------------

# A server's own copy (deploy/systemd, deploy/supervisord.conf), which this checkout may leave: PREFIX says where.
install:
	@$(ASK_PYTHON)
	$(PYTHON) tooling/install.py --venv '$(PREFIX)' --extras engine --no-editable $(TORCH_FLAGS)
	@'$(PREFIX)/bin/python' -P -m microserve.kernels.cpu.build --ahead --package
	@'$(PREFIX)/bin/python' -P -m $(INDEX) --ahead --package
	@'$(PREFIX)/bin/python' -P -m $(CODEC) --ahead --package

# One resolution each, and the torch that is there stays: tooling/install.py says which, its size and the time.
$(VENV)/installed: pyproject.toml tooling/install.py $(MOVED)
	@$(ASK_PYTHON)
	$(PYTHON) tooling/install.py --venv '$(VENV)' --extras engine,demo,simulation $(TORCH_FLAGS)
	@$(KERNELS)
	@printf %s "$$(pwd -P)" > '$@'

$(VENV)/dev: pyproject.toml tooling/install.py $(MOVED)
	@$(ASK_PYTHON)
	$(PYTHON) tooling/install.py --venv '$(VENV)' --extras engine,demo,simulation,dev $(TORCH_FLAGS)
	@$(KERNELS)
	@printf %s "$$(pwd -P)" > '$(VENV)/installed'
	@touch '$@'

moved:
