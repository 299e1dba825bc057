# `make demo` and `make test` set up all they need on a fresh Debian with Python 3.11 or later.

# The first interpreter that really runs and is new enough: a name on the path may be an empty shim.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint format check bench bench-policy lock clean

demo: $(VENV)/demo.ok
	$(BIN)/veklom demo

test: $(VENV)/dev.ok tests/npm/node_modules lint
	command -v curl && command -v gcore && command -v redis-server && command -v redis-cli && command -v go || { \
	  apt-get update && apt-get install -y curl gdb redis-server golang-go golang-golang-x-mod-dev; }
	$(BIN)/pytest -n auto --maxprocesses 4

lint: $(VENV)/dev.ok
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/dev.ok
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/dev.ok
	command -v wrk && command -v nginx || { apt-get update && apt-get install -y wrk nginx-light; }
	$(BIN)/python bench/run.py
	$(BIN)/python bench/audit.py

bench-policy: $(VENV)/dev.ok
	$(BIN)/python bench/policy.py

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); apt-get update && apt-get install -y python3-venv && $(PYTHON) -m venv $(VENV); }

$(VENV)/demo.ok: $(BIN)/python requirements/demo.txt pyproject.toml
	$(BIN)/python -m pip install -q --require-hashes --no-deps -r requirements/demo.txt
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/dev.ok: $(BIN)/python requirements/dev.txt pyproject.toml
	$(BIN)/python -m pip install -q --require-hashes --no-deps -r requirements/dev.txt
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	touch $@

# Node comes as a wheel, so that the third-party doubles run on any machine.
tests/npm/node_modules: $(VENV)/dev.ok tests/npm/package-lock.json
	cd tests/npm && PATH="$(CURDIR)/$(BIN):$$PATH" npm ci --no-audit --no-fund --ignore-scripts
	touch $@

COMPILE := $(BIN)/uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links --no-annotate --no-header -q
lock: $(BIN)/python
	$(BIN)/python -m pip install -q uv
	printf "hatchling\n" | $(COMPILE) - -o requirements/build.txt
	$(COMPILE) pyproject.toml -o requirements/runtime.txt
	printf "hatchling\neditables\n" | $(COMPILE) pyproject.toml - --extra demo -o requirements/demo.txt
	printf "hatchling\neditables\n" | $(COMPILE) pyproject.toml - --extra demo --group dev -o requirements/dev.txt

clean:
	rm -rf $(VENV) tests/npm/node_modules
