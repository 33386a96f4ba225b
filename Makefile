# Each of these targets sets up .venv by itself.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin

# One thread per rank: several ranks share the cores of a machine.
export OMP_NUM_THREADS ?= 1

# Twice as many as cores: half of the time a test waits for a process to start or to end.
WORKERS ?= 4
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: quickstart quickstart-sglang test test-fast lint docs clean

quickstart: $(VENV)/.installed
	PATH="$(abspath $(BIN)):$$PATH" bash examples/quickstart.sh

quickstart-sglang: $(VENV)/.installed
	PATH="$(abspath $(BIN)):$$PATH" bash examples/quickstart_sglang.sh

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTEST)

# What to run at every save: one process of ranks at most, no server, nothing that takes seconds.
test-fast: $(VENV)/.installed
	$(PYTEST) -m "not ranks and not sglang and not slow"

lint: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

docs: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt '.[docs]'
	$(BIN)/mkdocs build

# torch goes first and by its exact version: left to the resolver, another build may come.
$(VENV)/.installed: setup.py constraints.txt requirements/sglang-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0 setuptools
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev,smollm2]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps --requirement requirements/sglang-cpu.txt
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
