# make setup   a .venv in this clone with everything pinned in requirements.txt
# make test    lint, types and all tests (what CI runs)
# make test-oldest  a core of the tests on the oldest versions that pyproject.toml allows, in a .venv-oldest
# make demo    train a small ViT on real images on the CPU, evaluate it, draw its features
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO_ARGS ?=

OLDEST_VENV := .venv-oldest
OLDEST_READY := $(OLDEST_VENV)/.ready
# NumPy 1.26 has no packages for newer Pythons than 3.12.
OLDEST_PYTHON ?= $(shell command -v python3.11 || echo $(PYTHON))
# What a user of those versions relies on: models, heads, loading, checkpoints, training on one and two processes, two evaluations, and
# most of the published numbers of backbones and training.
OLDEST_TESTS := \
  tests/layers tests/fsdp tests/checkpointer tests/distributed \
  $(addprefix tests/models/test_,convnext.py image_dtype.py summary.py vision_transformer.py) \
  $(addprefix tests/heads/test_,backbone_layers.py linear.py precision.py segmentation.py weights.py) \
  $(addprefix tests/hub/test_,backbones.py classifiers.py convert.py formats.py hubconf.py sources.py weights.py) \
  $(addprefix tests/train/test_,grad_accumulation.py multidist.py nonfinite.py resume.py ssl_meta_arch.py world_size.py) \
  $(addprefix tests/data/test_,augmentations.py samplers.py transforms.py) tests/eval/test_knn.py tests/eval/test_linear.py \
  $(addprefix tests/parity/test_,backbones_convnext.py backbones_formats.py backbones_hub.py) $(wildcard tests/parity/test_ssl_*.py)

.PHONY: setup test test-oldest lint types unit demo format clean

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

test-oldest: $(OLDEST_READY)
	PYTHONPATH=$(CURDIR) OMP_NUM_THREADS=1 $(OLDEST_VENV)/bin/python -m pytest -n 2 --dist worksteal $(OLDEST_TESTS)

$(OLDEST_READY): requirements-oldest.txt
	@echo "setting up $(OLDEST_VENV) (once; a few minutes, most of it PyTorch)"
	$(OLDEST_PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python -m pip install --quiet -r requirements-oldest.txt
	@touch $(OLDEST_READY)

demo: setup
	$(BIN)/python -m dinov3.demo $(DEMO_ARGS)

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(OLDEST_VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
