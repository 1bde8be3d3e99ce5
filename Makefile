# make setup   a .venv in this clone with everything pinned in requirements.txt
# make test    lint, types and all tests (what CI runs)
# make demo    train a small ViT on real images on the CPU, evaluate it, draw its features
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO_ARGS ?=

.PHONY: setup test lint types unit demo format clean

setup: $(READY)

$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "dinov3 needs Python >= 3.11, but $(PYTHON) is `$(PYTHON) --version 2>&1`: try make PYTHON=python3.11 ..."; exit 1; }
	@echo "setting up $(VENV) (once; a few minutes, most of it PyTorch)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $(READY)

test: lint types unit

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

unit: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

demo: setup
	$(BIN)/python -m dinov3.demo $(DEMO_ARGS)

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
