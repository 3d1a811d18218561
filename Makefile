# Everything runs in .venv, which is made from the pinned requirements and made anew when they change.
# pip's own configuration decides where packages come from, and which build of torch (README.md).
#
#   make quickstart   train, convert and sample a small Eso-LM
#   make test         the test suite; make test PYTEST="tests/unit -k rows" a part of it
#   make quick        the tests without ranks, launchers, Slurm or simulator; under two minutes
#   make lint         format, lint and types, as CI checks them
#   make soak, bench  the long fault tests, the benchmarks

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.ONESHELL:

# The first of these that is a supported Python.
PYTHON ?= $(shell for name in python3.11 python3.12 python3; do \
	$$name -c 'import sys; sys.exit(sys.version_info[:2] not in {(3, 11), (3, 12)})' 2> /dev/null \
	&& echo $$name && break; done)
PYTEST ?= tests

BIN := .venv/bin
KEY := $(shell cat setup.py requirements/*.txt | cksum | cut -d ' ' -f 1)
BASE := .venv/base-$(KEY)
DEV := .venv/dev-$(KEY)
INTEROP := .venv-interop/$(shell cksum < requirements/interop.txt | cut -d ' ' -f 1)
PIP := $(BIN)/python -m pip install --disable-pip-version-check

.PHONY: help quickstart test quick lint soak bench

help:
	@sed -n 's/^#   //p' Makefile

quickstart: $(BASE)
	@$(BIN)/python -m pretrain.quickstart
	@echo "run: $$SECONDS s"

# The whole suite runs in three processes: one computes, two start launchers and Slurm and mostly wait
# for them. The output of the first two is printed at the end. The second one also gets the folders
# that make their times about equal.
EVEN := tests/unit/data tests/unit/data_tools
test: $(DEV) $(INTEROP)
	@export OMP_NUM_THREADS=1
	if [[ "$(PYTEST)" != tests ]]; then
		$(BIN)/python -m pytest $(PYTEST)
	else
		logs=$$(mktemp -d)
		$(BIN)/python -m pytest tests/unit tests/parallel $(EVEN:%=--ignore=%) \
			&> "$$logs/computing" &
		computing=$$!
		{
			failed=0
			$(BIN)/python -m pytest tests --ignore=tests/unit --ignore=tests/parallel \
				--ignore=tests/slurm || failed=1
			$(BIN)/python -m pytest $(EVEN) || failed=1
			(( ! failed ))
		} &> "$$logs/launching" &
		launching=$$!
		failed=0
		$(BIN)/python -m pytest tests/slurm || failed=1
		wait $$launching || failed=1
		cat "$$logs/launching"
		wait $$computing || failed=1
		cat "$$logs/computing"
		rm -r "$$logs"
		(( ! failed ))
	fi
	echo "run: $$SECONDS s"

quick: $(DEV) $(INTEROP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit -n 2
	@echo "run: $$SECONDS s"

lint: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

soak: $(DEV) $(INTEROP)
	$(BIN)/python -m pytest -m soak

bench: $(DEV) $(INTEROP)
	$(BIN)/python -m pytest -m bench --capture=no

$(BASE):
	@test -n "$(PYTHON)" || { echo "error: needs Python 3.11 or 3.12: make PYTHON=path" >&2; exit 2; }
	@echo "installing into .venv, some minutes at the first time ..."
	@rm -rf .venv
	@$(PYTHON) -m venv .venv
	@$(PIP) --requirement requirements/base.txt &> .venv/install.log \
		&& $(PIP) --no-deps --no-build-isolation --editable . &>> .venv/install.log \
		|| { tail -n 20 .venv/install.log >&2; exit 1; }
	@touch $@
	@echo "installation: $$SECONDS s"

$(DEV): $(BASE)
	@echo "installing what the tests need ..."
	@$(PIP) --requirement requirements/dev.txt &>> .venv/install.log \
		|| { tail -n 20 .venv/install.log >&2; exit 1; }
	@touch $@
	@echo "installation for the tests: $$SECONDS s"

$(INTEROP):
	@echo "installing the readers and servers that the tests hold the data part to ..."
	@rm -rf .venv-interop
	@$(PYTHON) -m venv .venv-interop
	@.venv-interop/bin/python -m pip install --disable-pip-version-check \
		--requirement requirements/interop.txt &> .venv-interop/install.log \
		|| { tail -n 20 .venv-interop/install.log >&2; exit 1; }
	@touch $@
	@echo "installation of the readers and servers: $$SECONDS s"
