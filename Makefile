# Every target sets up .venv first where needed; see tools/setup/bootstrap.sh for PYTHON, ALIMM_TORCH, ALIMM_TORCH_INDEX.
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast lint format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## create .venv with the pinned stack (at most 12 minutes the first time, then at once)
	@tools/setup/bootstrap.sh

demo: setup ## train, test, embed and search on real data, and write a report (ARGS="..." goes to it; INT8=1: in INT8; KNN=1: with KNN softmax; INDEX=BinaryGraphIndex: search by codes)
	@.venv/bin/python tools/demo.py $(ARGS)

test: setup ## every check: lint, format, types, import contract, spelling, tests, CUDA simulator (what CI runs)
	@tools/setup/check.sh all

test-fast: setup ## the tests alone, stopping at the first failure (ARGS="..." goes to pytest)
	@.venv/bin/python -m pytest -q -x $(ARGS)

lint: setup ## the checks that run no code
	@tools/setup/check.sh lint

format: setup ## let ruff format the code and mend what it can
	@.venv/bin/ruff format . && .venv/bin/ruff check --fix .

clean: ## remove what builds and checks leave behind; keeps .venv and the cache
	@rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .setup/log
	@find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
