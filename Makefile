# Everything a person does with this checkout. Needs only python3 with pip; all else goes into $(VENV).
#
#   make demo    find, test and picture a circuit from photographs that arrive by pip
#   make test    the test suite            make lint    ruff and the floors of the house
#   make types   mypy                      make docs    the documentation, into site/
#   make bench   how fast attribution is   make ci      lint, types, docs and tests
#   make venv    only the environment      make clean   remove it, and what tools left behind
#   make bench-fidelity   whether methods find the circuit that is the cause
#
# VENV=…         where the environment lives (.venv)
# PYTHON=…       which Python makes it (python3)
# PYTEST_ARGS=…  more arguments for pytest: `make test PYTEST_ARGS='-k circuit -n 2'`
# DEMO_ARGS=…    more arguments for `viscircuits demo`
# BENCH_ARGS=…   more arguments for benchmarks/speed.py: `make bench BENCH_ARGS='--networks resnet18'`
# FIDELITY_ARGS=…  more arguments for benchmarks/fidelity: `make bench-fidelity FIDELITY_ARGS='--methods eap'`

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory

VENV ?= .venv
PYTHON ?= python3
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
FIDELITY_ARGS ?=
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint types docs bench bench-fidelity ci clean

help:
	@sed -n 's/^#   \(make.*\)/\1/p; s/^# \([A-Z_]*=.*\)/\1/p' Makefile

venv: $(BIN)/python

demo: $(VENV)/.has-demo
	@$(BIN)/viscircuits demo $(DEMO_ARGS)

test: $(VENV)/.has-test
	@$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

lint: $(VENV)/.has-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports

types: $(VENV)/.has-dev
	@$(BIN)/mypy

docs: $(VENV)/.has-docs
	@$(BIN)/python tools/cli_reference.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "The documentation is in site/index.html"

bench: $(VENV)/.has-bench
	@$(BIN)/python benchmarks/speed.py $(BENCH_ARGS)

bench-fidelity: $(VENV)/.has-bench
	@PYTHONPATH=benchmarks $(BIN)/python -m fidelity $(FIDELITY_ARGS)

ci: lint types docs test

clean:
	@rm -rf "$(VENV)" site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

# Where Debian and Ubuntu ship venv without ensurepip, the pip that is there fills the environment.
$(BIN)/python:
	@echo "Making an environment in $(VENV)"
	@$(PYTHON) -m venv "$(VENV)" 2>/dev/null || { \
	    $(PYTHON) -m venv --clear --without-pip "$(VENV)"; \
	    $(PYTHON) -m pip --python "$(BIN)/python" install --quiet pip; }

# One stamp for each set of extras, renewed when pyproject.toml changes. Of pip's talk only what takes time is shown.
$(VENV)/.has-%: pyproject.toml | $(BIN)/python
	@echo "Installing viscircuits[$*] into $(VENV); the first time this downloads torch and takes some minutes"
	@$(BIN)/python -m pip install --progress-bar off --editable '.[$*]' 2>&1 | tee "$(VENV)/install.log" \
	    | while read -r line; do case "$$line" in \
	        *.metadata*) ;; \
	        Downloading*MB*) line="$${line/https:*\//}"; echo "  $${line/-*whl/}" ;; \
	        Installing\ collected*|ERROR*) echo "  $${line:0:100}" ;; \
	    esac; done \
	    || { tail -n 25 "$(VENV)/install.log"; echo "pip failed; its whole log is $(VENV)/install.log"; exit 1; }
	@touch "$@"
