# Every target sets up what it needs, from a bare clone: the first one called creates $(VENV) and installs into it.
#
#   make test                                  the pinned environment in .venv
#   make test PYTHON=python3.12                another interpreter creates .venv
#   make test VENV=~/envs/cuda                 an environment of yours; a torch of the pinned version stays, whatever its build
#   make test VENV=~/envs/cuda TORCH=torch CONSTRAINTS=      ... and any torch and packages that satisfy pyproject.toml stay
#   make test PYTEST_ARGS="-k solve -x"        more options for pytest
#   make perf PERF_ARGS="--suite quick"        more options for gka-perf run
#
# pip's own settings apply (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, ...). On Linux the default index serves a CUDA build of
# torch of several gigabytes; point PIP_EXTRA_INDEX_URL at PyTorch's CPU wheels to get the small one.

VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
CONSTRAINTS ?= constraints.txt
EXTRAS ?= gpu,transformers,demo,perf,dev
WORKERS ?= 2
PYTEST_ARGS ?=
PERF_ARGS ?=
SHARDS ?=

RUN := $(VENV)/bin/python
PIP_INSTALL := $(RUN) -m pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
STAMP := $(VENV)/.gka-ops-installed

.DEFAULT_GOAL := help
.PHONY: help demo recall test lint format perf bars sanitize

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

demo: $(STAMP) ## train a small language model with and without the solve, and report what was measured
	$(RUN) -m examples.stdlib_lm

recall: $(STAMP) ## train and evaluate the CPU preset of the recall study (docs/recall.md)
	OMP_NUM_THREADS=2 $(RUN) -m examples.recall --preset cpu --device cpu

test: $(STAMP) ## run the tests (those for a GPU are skipped, with a reason, where there is none)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

lint: $(STAMP) ## check style, formatting and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) tools/typecheck.py

format: $(STAMP) ## apply the formatter and the safe fixes
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

perf: $(STAMP) ## measure the performance suite: on a card every case, without one ratios and counts
	OMP_NUM_THREADS=1 $(RUN) -m gka_ops_perf.cli run $(PERF_ARGS)

bars: $(STAMP) ## measure the figures to beat on a CUDA card (see docs/performance.md)
	$(RUN) -m gka_ops_perf.bars --json build/perf/bars.json

sanitize: $(STAMP) ## look for races and accesses out of bounds in every kernel (CUDA card; see CONTRIBUTING.md)
	SHARDS=$(SHARDS) tools/sanitize.sh $(RUN)

# torch comes first and by its exact version, so that no later requirement makes pip choose another build of it. The package
# is built with the pinned setuptools (no build isolation).
$(STAMP): pyproject.toml $(CONSTRAINTS)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) $(TORCH)
	$(PIP_INSTALL) "setuptools>=77" wheel
	$(PIP_INSTALL) --no-build-isolation --editable ".[$(EXTRAS)]"
	touch $@
