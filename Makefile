# Each target makes the environment that it needs, in .venv, from the exact lock.
VENV := .venv
PYTHON := $(VENV)/bin/python

.PHONY: quickstart test test-all lint gpu-check

$(VENV)/installed: requirements.txt pyproject.toml
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

quickstart: $(VENV)/installed
	$(PYTHON) scripts/quickstart.py

test: $(VENV)/installed
	$(PYTHON) -m pytest -m "not slow"

test-all: $(VENV)/installed
	$(PYTHON) -m pytest

lint: $(VENV)/installed
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(VENV)/bin/lint-imports --no-logo --no-cache
	$(PYTHON) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror lit_gpt/kernels/cpp/*

# By the Python that is there: a GPU's torch is another build than the lock's.
gpu-check:
	PYTHONPATH=. python3 benchmarks/gpu_check.py
