# Everything a developer or newcomer runs. All targets use the environment .venv in this folder.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PEERS := .venv-peers
DEMO_DIR ?= demo
NATIVE_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name 'CMakeLists.txt') CMakeLists.txt setup.py

.PHONY: help dev native demo test test-all check format bench bench-peers asan doctor clean

help:
	@echo "make demo         train small models, merge them with every method, print the table"
	@echo "make test         set up what is needed and run the tests"
	@echo "make test-all     the slow tests too"
	@echo "make dev          set up .venv with an editable install"
	@echo "make native       rebuild the extension"
	@echo "make check        ruff, clang-format, mypy"
	@echo "make format       apply ruff and clang-format"
	@echo "make bench        kernel benchmarks (OP=name for one)"
	@echo "make bench-peers  install mergekit into an environment of its own, for bench and parity tests"
	@echo "make asan         fuzz and kernel tests under AddressSanitizer"
	@echo "make doctor       what is available on this machine"

dev: $(VENV)/.installed $(VENV)/.built

# The environment: made again when the dependency lists change.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "pymerge needs Python 3.10 or newer, this is " + sys.version'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -r requirements-dev.txt -c constraints.txt
	touch $@

# The editable install: made again when the native sources change.
$(VENV)/.built: $(VENV)/.installed $(NATIVE_SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install -q --no-build-isolation --no-deps -e .
	touch $@

native: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install -q --no-build-isolation --no-deps -e .
	touch $(VENV)/.built

demo: dev
	$(BIN)/pymerge demo --out $(DEMO_DIR)

test: dev
	$(BIN)/python -m pytest -q -m "not slow"

test-all: dev
	$(BIN)/python -m pytest -q

check: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.cpp' -o -name '*.h')
	$(BIN)/mypy

format: dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -name '*.cpp' -o -name '*.h')

bench: dev
	$(BIN)/python bench/run.py $(OP)

bench-peers: $(PEERS)/.installed

$(PEERS)/.installed: bench/requirements-peers.txt constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip --disable-pip-version-check install -q -r bench/requirements-peers.txt -c constraints.txt
	touch $@

doctor: dev
	$(BIN)/pymerge doctor

clean:
	rm -rf build demo *.egg-info pymerge/_C*.so
