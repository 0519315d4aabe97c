# `make run` serves the app, `make test` runs every test. Both make an environment in .venv first. `make bench` compares
# with other programs, one of which is compiled for that: it takes minutes the first time.
PORT ?= 8501
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: run test soak bench lint clean

run: $(VENV)/.installed
	$(BIN)/taleloom app --port $(PORT)

test: $(VENV)/.with-tests
	$(BIN)/python -m pytest

soak: $(VENV)/.with-tests
	$(BIN)/python -m pytest -m soak

bench: $(VENV)/.with-peers
	$(BIN)/taleloom bench --peers

lint: $(VENV)/.with-tests
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# On Linux the registry's torch is the CUDA build. TORCH_INDEX names another package index to take torch from.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep -o 'torch==[0-9.]*' pyproject.toml)"
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.with-tests: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

$(VENV)/.with-peers: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	touch $@

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
