# Each of these targets sets up .venv by itself.
PYTHON ?= python3.11
VENV ?= .venv
# Of 0.16 to 0.19; from 0.17 on with PYTHON=python3.12. Every other version is constraints.txt's.
MEGATRON ?= 0.16.1
BIN := $(VENV)/bin

# One thread per rank: several ranks share the cores of a machine.
export OMP_NUM_THREADS ?= 1
# Hundreds of processes would each compile the package and its tests.
unexport PYTHONDONTWRITEBYTECODE

# More than cores: tests wait for processes to start or to end. A fourth on two cores takes longer
# than it saves, as each worker imports everything and has ranks of its own.
WORKERS ?= 3
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: install quickstart two-teachers quickstart-sglang test test-fast users lint docs requirements clean

install: $(VENV)/.installed

# ARGS="train.steps=20 selection.selector=random" changes what a quickstart does.
quickstart: $(VENV)/.installed
	PATH="$(abspath $(BIN)):$$PATH" bash examples/quickstart.sh $(ARGS)

two-teachers: $(VENV)/.installed
	PATH="$(abspath $(BIN)):$$PATH" bash examples/two_teachers.sh $(ARGS)

quickstart-sglang: $(VENV)/.installed
	PATH="$(abspath $(BIN)):$$PATH" bash examples/quickstart_sglang.sh $(ARGS)

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTEST)

# What to run at every save: one process of ranks at most, no server, nothing that takes seconds.
test-fast: $(VENV)/.installed
	$(PYTEST) -m "not ranks and not sglang and not slow"

# What three users do, from one end to the other: scripts to be read as well as run.
users: $(VENV)/.installed
	for user in mistakes laptop cluster; do bash tests/users/$$user.sh || exit 1; done

lint: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

docs: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt '.[docs]'
	$(BIN)/mkdocs build

# requirements/cuda.txt: every package of a CUDA machine, found by a resolver that needs none. Versions
# of constraints.txt come first, then those that the file has; only what conflicts moves. The second
# run says whether the same versions serve Python 3.12, which the image has. sglang's wheels ask for
# glibc 2.34.
RESOLVE = UV_PYTHON_DOWNLOADS=never $(BIN)/uv pip compile --quiet setup.py \
	--extra sglang --extra math --extra plots --extra prometheus --extra wandb \
	--python-platform x86_64-manylinux_2_34

requirements: $(VENV)/.installed
	$(BIN)/pip install --quiet uv==0.13.9
	cat constraints.txt requirements/cuda.txt > requirements/cuda.incomplete
	$(RESOLVE) --python-version 3.11 --annotation-style line \
		--custom-compile-command 'make requirements' --output-file requirements/cuda.incomplete
	$(RESOLVE) --python-version 3.12 --constraint requirements/cuda.incomplete > /dev/null
	mv requirements/cuda.incomplete requirements/cuda.txt

# torch goes first and by its exact version: left to the resolver, another build may come.
CONSTRAINED = $(BIN)/pip install --quiet --constraint $(VENV)/constraints.txt

$(VENV)/.without-sglang: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	sed 's/^megatron-core==.*/megatron-core==$(MEGATRON)/' constraints.txt > $(VENV)/constraints.txt
	$(CONSTRAINED) torch==2.13.0 setuptools
	$(CONSTRAINED) --no-build-isolation --editable '.[dev,smollm2]'
	touch $@

$(VENV)/.installed: $(VENV)/.without-sglang requirements/sglang-cpu.txt
	$(CONSTRAINED) --no-deps --requirement requirements/sglang-cpu.txt
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
