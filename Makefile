# Every target makes .venv on its first call and uses it again until pyproject.toml or constraints.txt changes.
# Another Python: make test PYTHON=python3.12        More arguments for pytest: make test PYTEST_ARGS="-k vocab"

PYTHON ?= python3
PYTEST_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Some batch systems start jobs without HOME; caches then go beside the packages.
ifeq ($(strip $(HOME)),)
export HOME := $(CURDIR)/$(VENV)
endif
# A PYTHONPATH or an activated environment of the caller must not leak into ours; and without compiled files, each process
# of tests compiles all of them, and each subprocess the package.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV PYTHONDONTWRITEBYTECODE

# Two test processes on two cores: one thread each, or they fight.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 NUMBA_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

# What the site and its notebooks need, once.
INSTALL_DOCS := $(BIN)/python -c 'import myst_nb, sphinx_book_theme' 2>/dev/null || $(BIN)/python -m pip install -q \
	--disable-pip-version-check --no-input -c $(VENV)/constraints.txt -e '.[docs]'

.DEFAULT_GOAL := help
.PHONY: help install demo test faults fuzz robustness soak test-avx2 gpu docs notebooks check-notebooks lint type format clean

help:
	@echo "make demo     prepare, train, evaluate and predict on the cells inside scanpy (minutes, CPU is enough)"
	@echo "make test     run the tests"
	@echo "make faults   kill, fill up and disturb commands at many moments (minutes)"
	@echo "make soak     stream, train on and ask a million cells; does anything grow? (long; make soak LOADS=L3 SCALE=0.1)"
	@echo "make fuzz     read hundreds of damaged files with every command (long)"
	@echo "make robustness  write docs/robustness.md from the tests"
	@echo "make test-avx2  run the tests of bfloat16 as on a CPU without AVX-512"
	@echo "make gpu      check and measure everything on a GPU, in eight minutes (benchmarks/gpu.py)"
	@echo "make docs     build the site of docs in docs/_build/html (links checked, no network after the install)"
	@echo "make notebooks  run the notebooks of docs/notebooks and keep what they show (two minutes)"
	@echo "make check-notebooks  run them and leave the files as they are"
	@echo "make lint     check style"
	@echo "make type     check types"
	@echo "make format   rewrite the code in our style"
	@echo "make clean    remove caches and build products (keeps .venv)"

install: $(STAMP)

demo: $(STAMP)
	@$(BIN)/python -m perturbgene.demo

test: $(STAMP)
	@$(ONE_THREAD) $(BIN)/python -m pytest -q -n 2 --dist worksteal $(PYTEST_ARGS)

faults: $(STAMP)
	@$(ONE_THREAD) $(BIN)/python -m pytest -q -n 2 --dist worksteal -m faults tests/test_faults.py tests/test_repeatable.py $(PYTEST_ARGS)

soak: $(STAMP)
	@$(BIN)/python -m benchmarks.soak $(LOADS) --scale $(or $(SCALE),1)

fuzz: $(STAMP)
	@$(ONE_THREAD) $(BIN)/python -m pytest -q -n 2 --dist worksteal -m fuzz tests/test_fuzz.py $(PYTEST_ARGS)

robustness: $(STAMP)
	@$(BIN)/python -m tests.test_robustness

test-avx2: $(STAMP)
	@ONEDNN_MAX_CPU_ISA=AVX2 $(ONE_THREAD) $(BIN)/python -m pytest -q -m bf16 tests/model tests/cli/test_configs.py tests/perturbation tests/test_devices.py tests/test_benchmark_flops.py

gpu: $(STAMP)
	@$(BIN)/python -m benchmarks.gpu

docs: $(STAMP)
	@$(INSTALL_DOCS)
	@$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo "Open docs/_build/html/index.html"

notebooks: $(STAMP)
	@$(INSTALL_DOCS)
	@$(ONE_THREAD) $(BIN)/python docs/run_notebooks.py

check-notebooks: $(STAMP)
	@$(INSTALL_DOCS)
	@$(ONE_THREAD) $(BIN)/python docs/run_notebooks.py --check

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

type: $(STAMP)
	@$(BIN)/mypy

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	@rm -rf build dist docs/_build docs/reference *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

# With a torch in the base Python (GPU images) the environment sees it, and our pin of torch is left out. A torch inside
# another virtual environment does not count: --system-site-packages reaches the base Python only.
$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || \
	  { echo "$(PYTHON) is not there. Install Python 3.11 or newer, or name one: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, but $(PYTHON) is `$(PYTHON) -V 2>&1`. Name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Making $(VENV) and installing, once (a few minutes)."
	@if $(PYTHON) -c 'import importlib.util as u, sys; sys.exit(sys.prefix != sys.base_prefix or not u.find_spec("torch"))'; \
	  then $(PYTHON) -m venv --system-site-packages $(VENV); \
	  else $(PYTHON) -m venv $(VENV); fi || { rm -rf $(VENV); exit 1; }

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@if grep -q 'include-system-site-packages = true' $(VENV)/pyvenv.cfg; \
	  then grep -v '^torch==' constraints.txt; else cat constraints.txt; fi > $(VENV)/constraints.txt
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-input -c $(VENV)/constraints.txt -e '.[dev]'
	@touch $@
