.DEFAULT_GOAL := help
.PHONY: setup demo test test-slow test-gpu gpu-report test-faults lint check bench docs help clean

VENV := .venv
PYTHON ?= python3.11
BIN := $(VENV)/bin
# Two threads by default. If there are more threads than cores, OpenMP's spinning threads slow each other down.
export OMP_NUM_THREADS ?= 2

setup: $(VENV)/.ready ## make .venv with the pinned packages (3 to 5 minutes the first time)

$(VENV)/.base: pyproject.toml constraints.txt tools/setup.sh
	PYTHON=$(PYTHON) bash tools/setup.sh $(VENV) base
	@touch $@

$(VENV)/.ready: $(VENV)/.base
	bash tools/setup.sh $(VENV) all
	@touch $@

demo: $(VENV)/.base ## train RSA and BYOL on generated images, and compare them (3 minutes on two cores)
	$(BIN)/python -m tools.demo --out runs/demo

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

test: setup ## run the complete fast suite
	$(PYTEST)

test-slow: setup ## run the slow tests, as CI also does, for example that RSA still learns
	$(PYTEST) -m slow

test-gpu: setup ## run the tests that need a GPU; without a GPU, print one line
	@if $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; \
	then OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/rsa_fast/test_gpu.py tests/rsa_fast/test_checkpoint.py -k "test_gpu or cuda"; \
	else echo "torch finds no GPU: nothing was tested (rsa-fast doctor shows why)"; fi

gpu-report: setup ## measure on one GPU in 9 minutes; write runs/gpu.json, and runs/gpu.md for docs/results.md
	$(BIN)/python -m tools.gpu_report --out runs/gpu.json

test-faults: setup ## inject faults: kills, signals, full disks, silent ranks (under 10 minutes)
	$(PYTEST) --dist worksteal tests/faults

lint: setup ## check style, format and types (mypy, strict)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test ## run lint and test, which must pass before a commit and in CI

bench: setup ## measure the speed of the views and of the training step, as ratios
	$(BIN)/python -m tools.bench views
	$(BIN)/python -m tools.bench step

docs: setup ## write the generated pages of docs/, and build the site in site/
	$(BIN)/python -m tools.docs docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

help: ## print this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' | expand -t 16

clean: ## remove runs, generated data and caches, but not .venv
	rm -rf runs data site .pytest_cache .ruff_cache .mypy_cache *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
