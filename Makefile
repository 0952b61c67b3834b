# Every target does its own set-up in .venv; a machine needs Python 3.11 or newer, and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
REPORT ?= report.html

.PHONY: quickstart test lint clean

$(BIN)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(BIN)/.installed-test: pyproject.toml $(BIN)/.installed
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@

quickstart: $(BIN)/.installed  ## the main job, from raw rows to evaluated models, and its report
	$(BIN)/posttrain run quickstart
	$(BIN)/posttrain report latest -o $(REPORT)

lint: $(BIN)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint  ## everything: style, types, tests
	$(BIN)/python -m pytest

clean:
	rm -rf $(VENV) $(REPORT)
