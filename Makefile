# Every target makes what it needs, from nothing but a Python 3.11 or newer:
#   make demo        train on real text for minutes, evaluate, write a sample
#   make test        the whole CPU suite
#   make parity      live comparison with torch and transformers; Triton kernels
#                    in Triton's interpreter
#   make notebooks   execute the notebooks
#   make lint        style, imports; `make format` mends the style
#   make test-gpu    the tests that need a GPU
# Another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
VENV ?= .venv
PARITY_VENV ?= .venv-parity
GPU_VENV ?= .venv-gpu
WORKERS ?= 2
WORKDIR ?= runs/demo
PYTEST_ARGS ?=

# The workers share the cores; without this each would start a thread per core
# in every numerical library.
export OMP_NUM_THREADS ?= 1
export OPENBLAS_NUM_THREADS ?= 1
PYTEST = -m pytest -p no:cacheprovider
COMMA := ,
# What users run; the other tests compile with as little effort as possible.
OPTIMISED = --xla_backend_optimization_level=3 $(XLA_FLAGS)

.DEFAULT_GOAL := help
.PHONY: help demo test parity notebooks lint format test-gpu clean

help:
	@sed -n 's/^#   //p' Makefile

# $(call install,VENV,EXTRAS): makes the environment unless it is there.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  2>/dev/null || { found=$$($(PYTHON) -V 2>&1) || found="not there"; \
	  echo "multihead needs Python 3.11 or newer; '$(PYTHON)' is $$found;" \
	    "name another: make PYTHON=python3.11 ..." >&2; exit 2; }
	@test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	@echo "installing multihead$(2) into $(1)"
	@$(1)/bin/python -m pip install -qq --disable-pip-version-check \
	  --editable '.$(2)'
	@touch $@
endef

# One stamp per set of extras; a changed setup.py installs anew.
$(VENV)/.core: setup.py
	$(call install,$(VENV),)
$(VENV)/.test: setup.py
	$(call install,$(VENV),[test])
$(VENV)/.dev: setup.py
	$(call install,$(VENV),[dev])
$(PARITY_VENV)/.parity: setup.py
	$(call install,$(PARITY_VENV),[test$(COMMA)parity])
$(GPU_VENV)/.gpu: setup.py
	$(call install,$(GPU_VENV),[test$(COMMA)gpu])

demo: $(VENV)/.core
	$(VENV)/bin/python -m experiments.train \
	  --config=configs/falcon_h1.py:demo --workdir=$(WORKDIR)
	$(VENV)/bin/python -m experiments.evaluate --workdir=$(WORKDIR)
	$(VENV)/bin/python -m experiments.generate --workdir=$(WORKDIR) \
	  --prompt="The function returns"
	@echo "The report, with figures: $(WORKDIR)/report.md"

test: $(VENV)/.test
	$(VENV)/bin/python $(PYTEST) -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

parity: $(PARITY_VENV)/.parity
	XLA_FLAGS="$(OPTIMISED)" $(PARITY_VENV)/bin/python $(PYTEST) -m "not gpu" \
	  tests/parity $(PYTEST_ARGS)
	$(PARITY_VENV)/bin/python $(PYTEST) -m "not gpu" -n $(WORKERS) \
	  --dist worksteal tests/ops/test_*_triton.py $(PYTEST_ARGS)

notebooks: $(VENV)/.dev
	$(VENV)/bin/python $(PYTEST) --nbmake notebooks $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

test-gpu: $(GPU_VENV)/.gpu
	XLA_FLAGS="$(OPTIMISED)" JAX_PLATFORMS=cuda,cpu \
	  $(GPU_VENV)/bin/python $(PYTEST) -m gpu $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) $(PARITY_VENV) $(GPU_VENV) build *.egg-info \
	  .pytest_cache .ruff_cache .hypothesis .import_linter_cache
