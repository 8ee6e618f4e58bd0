PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LIBRARIES := $(VENV)/.libraries

.PHONY: help setup lint check test docs resume faults demo gpu grid figures clean

help:
	@echo "make setup    create $(VENV) with everything in it"
	@echo "make demo     train a small GPT without a budget, under two, killed and resumed (runs/demo)"
	@echo "make check    lint, types and the first case of every quick test, in three minutes"
	@echo "make test     lint, types and tests (installs the libraries that they meet)"
	@echo "make docs     the pages of docs/ as a site, in build/site; a warning is an error"
	@echo "make resume   every model killed and resumed under a tight plan (slow)"
	@echo "make gpu      the CUDA tests, then five models at real sizes, in 9 minutes (no setup)"
	@echo "make lint     ruff and mypy"
	@echo "make faults   every fault and damage that checkpoints must stand (slow)"
	@echo "make grid     every model x policy x budget, measured (slow)"
	@echo "make figures  the README's tables and plots (slow)"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "actckpt needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

$(LIBRARIES): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,docs,libraries]'
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint $(LIBRARIES)
	$(BIN)/python -m pytest -q --quick -n logical --maxprocesses 4 --no-loadscope-reorder

test: lint $(LIBRARIES)
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --no-loadscope-reorder

# NO_MKDOCS_2_WARNING: an advertisement for another generator, printed on every run
docs: setup
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

faults: setup
	$(BIN)/python -m tests.faults --whole
	$(BIN)/python -m tests.faults.ranks --whole --jobs 4
	$(BIN)/python -m tests.faults.ranks --whole --jobs 4 --world 3
	$(BIN)/python -m tests.faults.reading
	ACTCKPT_FAULTS=whole $(BIN)/python -m pytest tests/test_checkpoint_corruption.py \
		tests/test_checkpoint_damage.py tests/test_drawn_meshes.py tests/test_ranks_disk.py \
		tests/test_ranks_turned.py

resume: setup
	ACTCKPT_RESUME=1 $(BIN)/python -m pytest tests/test_resume.py

demo: setup
	$(BIN)/actckpt demo

# with the Python at hand: a machine with a GPU may have no network
gpu:
	$(PYTHON) -m experiments.gpu_campaign --minutes 9

grid: setup
	$(BIN)/python -m experiments.grid

figures: setup
	$(BIN)/python -m experiments.chain
	$(BIN)/python -m experiments.peers
	$(BIN)/python -m experiments.optimality
	$(BIN)/python -m experiments.prediction
	$(BIN)/python -m experiments.plan_time
	$(BIN)/python -m experiments.absent_devices

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
