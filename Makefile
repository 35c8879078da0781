# make demo and make test are the two commands; both prepare .venv first.
SHELL := /bin/bash
VENV := .venv
PYTHON ?= $(shell for p in python3.12 python3.13 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && { echo $$p; break; }; done)
# faiss-cpu and faiss-gpu install the same module: choose one with make install EXTRA=gpu.
EXTRA ?= cpu
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(EXTRA)

.PHONY: help install demo serve test lint format bench sbom clean

help:
	@echo "make demo    build, serve, ask and attack the digits classifier; prints a table"
	@echo "make serve   the same service, left running"
	@echo "make test    all tests      make lint    formatting, types, arrows between rooms"
	@echo "make bench   throughput     make install only prepares $(VENV)"
	@echo "make sbom    build/sbom.cdx.json, what a release consists of"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11, 3.12 or 3.13 found; name one with make PYTHON=..."; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRA),report,dev]'
	@touch $@

demo: install
	$(BIN)/mithridate demo --out build/demo

serve: install
	$(BIN)/mithridate demo --out build/demo --serve

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install
	$(BIN)/python -m benchmarks.throughput

sbom: install
	@mkdir -p build
	$(BIN)/python deploy/sbom.py --extra $(EXTRA) --out build/sbom.cdx.json

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
