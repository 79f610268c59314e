.DEFAULT_GOAL := help
.PHONY: setup demo test test-faults check bench help clean

VENV := .venv
PYTHON ?= python3.11
BIN := $(VENV)/bin
# two threads unless the caller says otherwise: OpenMP's spinning threads slow each other down beyond the cores
export OMP_NUM_THREADS ?= 2

setup: $(VENV)/.ready ## make .venv with the pinned packages (about 3 minutes the first time)

$(VENV)/.ready: pyproject.toml constraints.txt tools/setup.sh
	PYTHON=$(PYTHON) bash tools/setup.sh $(VENV)
	@touch $@

demo: setup ## train RSA and BYOL on generated images, evaluate both, draw curves and views (under 8 minutes)
	$(BIN)/python -m tools.demo --out runs/demo

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

test: setup ## the whole fast suite
	$(PYTEST)

test-faults: setup ## inject faults: kills, signals, full disks, silent ranks (under 10 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults

check: setup ## lint, format check and the tests: what must pass before a commit
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTEST)

bench: setup ## speed of the views and of the training step, as ratios
	$(BIN)/python -m tools.bench views
	$(BIN)/python -m tools.bench step

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' | expand -t 16

clean: ## remove runs, generated data and caches, not .venv
	rm -rf runs data .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
