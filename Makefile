# Each of these targets sets up .venv by itself.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin

# One thread per rank: several ranks share the cores of a machine.
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart quickstart-sglang test lint clean

quickstart: $(VENV)/.installed
	PATH="$(abspath $(BIN)):$$PATH" bash examples/quickstart.sh

quickstart-sglang: $(VENV)/.installed
	PATH="$(abspath $(BIN)):$$PATH" bash examples/quickstart_sglang.sh

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch goes first and by its exact version: left to the resolver, another build may come.
$(VENV)/.installed: setup.py constraints.txt requirements/sglang-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0 setuptools
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev,smollm2]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps --requirement requirements/sglang-cpu.txt
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
