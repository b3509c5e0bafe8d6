# make demo, test, lint, bench, bench-report or clean. The virtual environment is .venv, created when first needed. VENV sets
# another path: VENV=$VIRTUAL_ENV uses your active environment and its torch.
VENV ?= .venv
PYTHON ?= python3
# Installed if the environment has no torch. A CPU build is enough for the tests. PyPI's Linux wheel is a CUDA build;
# TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu" installs the smaller CPU build.
TORCH ?= torch==2.13.0
RUFF := ruff==0.17.6

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
BUILD_FILES := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*/*)

.PHONY: demo test lint bench bench-report clean

demo: $(VENV)/.demo
	$(BIN)/dcae-fast reconstruct --out outputs/demo
	@echo "The picture is in outputs/demo."

test: $(VENV)/.test
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.demo
	$(BIN)/python -m benchmarks

bench-report: $(VENV)/.bench
	$(BIN)/python -m benchmarks.report

clean:
	rm -rf .venv build dist outputs *.egg-info dcae_fast/_C*.so

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: PACKAGE := .
$(VENV)/.test: PACKAGE := .[test]
$(VENV)/.bench: PACKAGE := .[bench]
$(VENV)/.demo $(VENV)/.test $(VENV)/.bench: $(BUILD_FILES) | $(BIN)/python
	$(BIN)/python -c "import torch" 2> /dev/null || $(PIP) $(TORCH)
	$(PIP) --editable "$(PACKAGE)"
	touch $@

$(VENV)/.lint: Makefile | $(BIN)/python
	$(PIP) $(RUFF)
	touch $@
