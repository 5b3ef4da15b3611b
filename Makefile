# Each environment stamp is older than what it was installed from when it must be made again.
# Running needs less than testing (no torch, which takes longest): hence two stamps.
PYTHON ?= python3
MODEL ?= 270m

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

quickstart_270m := runs/quickstart.gin
quickstart_tiny := runs/quickstart_tiny.gin

.PHONY: help venv quickstart known-model test test-long clean

help:
	@echo 'make quickstart             the whole path on Gemma 3 270M and four domains, to runs/quickstart'
	@echo 'make quickstart MODEL=tiny  the same with a small random model, to runs/quickstart_tiny'
	@echo 'make venv                   only the environment: .venv, from PYTHON=$(PYTHON) (make clean to change it)'
	@echo 'make test                   ruff and the tests'
	@echo 'make test-long              the tests that take longer'
	@echo 'make clean                  removes .venv, builds and caches; keeps runs/'

venv: .venv/.test

# Huge pages: taking fresh memory page by page slows a training step on CPU.
quickstart: known-model .venv/.run
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/optimer pipeline --gin_file=$(quickstart_$(MODEL))

known-model:
	@$(if $(quickstart_$(MODEL)),:,$(error MODEL is 270m or tiny, not '$(MODEL)'))

# Most of the tests’ time is compilation: without LLVM’s slower passes they take two thirds of it.
quick_compiles := --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true
quick_compiles += --xla_cpu_use_fusion_emitters=false

test: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	XLA_FLAGS='$(quick_compiles)' $(BIN)/python -m pytest -q -rs -n 2 --dist loadfile tests --ignore=tests/long

test-long: .venv/.test
	$(BIN)/python -m pytest -q tests/long

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.made:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || { \
	  echo "optimer_jax needs Python 3.11, 3.12 or 3.13, and '$(PYTHON)' is none of them:" \
	    "name one, as in make $(or $(MAKECMDGOALS),venv) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

.venv/.run: .venv/.made setup.py constraints.txt
	$(PIP) --editable '.[gemma270m]'
	touch $@

.venv/.test: .venv/.run
	$(PIP) --editable '.[test,gemma270m]'
	touch $@
