# Everything sets itself up: `make serve` on a fresh clone makes the virtual environment, installs
# what is needed and starts. The second run finds its stamps and needs no network.

VENV        ?= .venv
PY          := $(VENV)/bin/python
PIP_INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
INSTALLED   := $(VENV)/.stamp-run
INSTALLED_DEV := $(VENV)/.stamp-dev
INSTALLED_BENCH := $(VENV)/.stamp-bench

MODEL   ?= toy
PORT    ?= 8000
# Further flags: make serve ARGS="--max-model-len 4096"
ARGS    ?=
# Processes that tests are spread over.
WORKERS ?= auto
PYTEST  := $(PY) -m pytest -n $(WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help serve chat test test-all check format bench compare train-toy install install-dev clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  PORT=9000 MODEL=/path/to/checkpoint make serve"

serve: $(INSTALLED) ## serve MODEL (the carried toy model by default) on PORT
	@$(VENV)/bin/penstock serve $(MODEL) --port $(PORT) $(ARGS)

chat: $(INSTALLED) ## talk to MODEL in the terminal
	@$(VENV)/bin/penstock chat $(MODEL) $(ARGS)

test: $(INSTALLED_DEV) ## unit, contract, numerics, integration and simulated tests
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(INSTALLED_DEV) ## the same with slow sweeps and soaks
	$(PYTEST) $(ARGS)

check: $(INSTALLED_DEV) ## style, types, and who may import whom
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: $(INSTALLED_DEV) ## let ruff put the style right
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(INSTALLED_DEV) ## the benchmarks of benchmarks/, ratios in one run
	$(PY) -m benchmarks $(ARGS)

compare: $(INSTALLED_BENCH) ## us and installed rivals on one checkpoint (docs/benchmarks.md)
	$(PY) -m benchmarks.compare $(ARGS)

train-toy: $(INSTALLED_DEV) ## train the carried model anew (CORPUS=books.jsonl.gz; an hour or two)
	@test -n "$(CORPUS)" || { echo "Say where the books are: make train-toy CORPUS=books.jsonl.gz"; exit 1; }
	$(PY) -m tools.train_toy --corpus $(CORPUS) $(ARGS)

install: $(INSTALLED) ## what `make serve` needs
install-dev: $(INSTALLED_DEV) ## what tests and checks need

# Build tools first, so that an editable install needs no isolated build and works offline; torch
# before what depends on it, so that no looser range ever chooses its build. The CPU kernels are
# compiled now rather than at the first start; without a compiler it says so and goes on.
$(INSTALLED): pyproject.toml constraints.txt | $(PY)
	@echo "Installing into $(VENV) (once)..."
	@$(PIP_INSTALL) setuptools
	@$(PIP_INSTALL) torch
	@$(PIP_INSTALL) --no-build-isolation -e .
	@$(PY) -m penstock.engine.platforms.cpu.kernels || true
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	@$(PIP_INSTALL) --no-build-isolation -e '.[dev]'
	@touch $@

$(INSTALLED_BENCH): $(INSTALLED_DEV)
	@$(PIP_INSTALL) --no-build-isolation -e '.[bench]'
	@touch $@

$(PY):
	@for candidate in python3 python3.13 python3.12 python3.11 python3.14 python; do \
		if $$candidate -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "Making $(VENV) with $$($$candidate --version)"; \
			exec $$candidate -m venv $(VENV); \
		fi; \
	done; \
	echo "Penstock needs Python 3.11 or later with the venv module, and found none." >&2; exit 1

clean: ## remove the environment, caches and builds
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache \
		.hypothesis .import_linter_cache
	find src tests tools benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
