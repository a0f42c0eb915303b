# `make train` and `make test` each do all of their own set-up: a fresh clone on a fresh machine needs nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two workers fill a laptop's cores only if each keeps to one thread.
TEST_WORKERS ?= 2

.PHONY: train test lint types unit clean

train: $(VENV)/ready
	$(BIN)/python train.py configs/quickstart.yaml

test: lint types unit

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/ready
	$(BIN)/basedpyright

# Triton kernels run on a CPU only in an interpreting process, and compile for a GPU only in another: two processes.
unit: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal tests/triton_ops

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache build *.egg-info
