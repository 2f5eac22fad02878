# Everything a developer or newcomer runs. All targets use the environment .venv in this folder.
# PYTHON names the interpreter that makes it, CXX the C++ compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
PEERS := .venv-peers
FUSIONBENCH := .venv-fusionbench
FUSIONBENCH_VERSION := 0.2.33
MERGEKIT_VERSION := 0.1.5
MERGEKIT_TESTS := .peers/mergekit-$(MERGEKIT_VERSION)
DEMO_DIR ?= demo
# Processes that the tests are shared among.
JOBS ?= 2
ASAN := build/asan
NATIVE_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name 'CMakeLists.txt') \
                  CMakeLists.txt setup.py
CPP_SOURCES := $(filter %.cpp %.h %.cu,$(NATIVE_SOURCES))

.PHONY: help dev native demo test test-all check format docs bench bench-peers asan doctor clean distclean

# Two targets at once would run pip twice in one environment. Compilation is parallel all the same.
.NOTPARALLEL:

help:
	@echo "make demo         train small models, merge them with every method, print the table"
	@echo "make test         set up what is needed and run the tests (JOBS=4 for more processes than 2)"
	@echo "make test-all     the slow tests too"
	@echo "make dev          set up .venv with an editable install (PYTHON=python3.12 for another Python)"
	@echo "make native       rebuild the extension"
	@echo "make check        ruff, clang-format, mypy"
	@echo "make format       apply ruff and clang-format"
	@echo "make docs         write the generated pages of docs/ anew"
	@echo "make bench        kernel benchmarks (OP=name for one)"
	@echo "make bench-peers  install mergekit and FusionBench into environments of their own, for bench and parity tests"
	@echo "make asan         kernel, I/O and header tests under AddressSanitizer"
	@echo "make doctor       what is available on this machine"
	@echo "make clean        remove what was built and the demo; distclean: the environments too"

dev: $(VENV)/.built

# The environment: brought up to date when the dependency lists change. The mark is set last, so that an
# attempt that failed is made again; an environment that broke half-way is made anew.
$(VENV)/.installed: requirements-dev.txt constraints.txt
	@$(PYTHON) .ci/preflight.py
	@echo "installing the dependencies into $(VENV); the first time this downloads PyTorch"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) install -q -r requirements-dev.txt -c constraints.txt
	@touch $@

# The editable install: made again when the native sources or the package's metadata change.
$(VENV)/.built: $(VENV)/.installed pyproject.toml $(NATIVE_SOURCES)
	@echo "building the extension"
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install -q --no-build-isolation --no-deps -e .
	@touch $@

native:
	rm -f $(VENV)/.built
	$(MAKE) dev

demo: dev
	$(BIN)/pymerge demo --out $(DEMO_DIR)

# The script, not python -m pytest: that would put this folder on sys.path, where ./kernels is importable.
test: dev
	$(BIN)/pytest -q -n $(JOBS) -m "not slow"

test-all: dev
	$(BIN)/pytest -q -n $(JOBS)

check: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP_SOURCES)
	$(BIN)/mypy

format: dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_SOURCES)

docs: dev
	$(BIN)/python docs/make_methods.py
	$(BIN)/python docs/make_kernels.py

bench: dev
	$(BIN)/python bench/run.py $(OP)

bench-peers: $(PEERS)/.pymerge $(MERGEKIT_TESTS)/.unpacked $(FUSIONBENCH)/.pymerge

$(PEERS)/.installed: bench/requirements-peers.txt constraints.txt
	@$(PEERS)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(PEERS)
	$(PEERS)/bin/python -m pip --disable-pip-version-check --no-input install -q \
	    -r bench/requirements-peers.txt -c constraints.txt
	@touch $@

# pymerge beside mergekit, for `pymerge run` and the parity tests.
$(PEERS)/.pymerge: $(VENV)/.built $(PEERS)/.installed bench/install_in_peers.py
	$(BIN)/python bench/install_in_peers.py $(PEERS)
	@touch $@

# mergekit's own tests are in its source distribution alone.
$(MERGEKIT_TESTS)/.unpacked: $(PEERS)/.installed
	@mkdir -p .peers
	$(PEERS)/bin/python -m pip --disable-pip-version-check --no-input download -q --no-deps \
	    --no-build-isolation --no-binary :all: -d .peers mergekit==$(MERGEKIT_VERSION)
	tar -xzf .peers/mergekit-$(MERGEKIT_VERSION).tar.gz -C .peers mergekit-$(MERGEKIT_VERSION)/tests
	@touch $@

# FusionBench asks for far more than the functions that we compare with import.
$(FUSIONBENCH)/.installed-$(FUSIONBENCH_VERSION): bench/requirements-fusionbench.txt constraints.txt
	@$(FUSIONBENCH)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(FUSIONBENCH)
	$(FUSIONBENCH)/bin/python -m pip --disable-pip-version-check --no-input install -q \
	    -r bench/requirements-fusionbench.txt -c constraints.txt
	$(FUSIONBENCH)/bin/python -m pip --disable-pip-version-check --no-input install -q \
	    --no-deps fusion-bench==$(FUSIONBENCH_VERSION)
	@touch $@

# pymerge beside FusionBench, whose configurations name its classes.
$(FUSIONBENCH)/.pymerge: $(VENV)/.built $(FUSIONBENCH)/.installed-$(FUSIONBENCH_VERSION) bench/install_in_peers.py
	$(BIN)/python bench/install_in_peers.py $(FUSIONBENCH)
	@touch $@

# A second build with AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the package of its own:
# Python itself is not instrumented, so the sanitizer's runtime is preloaded, with libstdc++ for it to find
# __cxa_throw in.
asan: dev
	rm -rf $(ASAN)/site && mkdir -p $(ASAN)/site
	cp -r pymerge $(ASAN)/site/pymerge && rm -f $(ASAN)/site/pymerge/_C*.so $(ASAN)/site/pymerge/_cuda*.so
	$(BIN)/cmake -S . -B $(ASAN)/cmake -G Ninja -DCMAKE_MAKE_PROGRAM="$(CURDIR)/$(BIN)/ninja" \
	    -DCMAKE_BUILD_TYPE=RelWithDebInfo -DPYMERGE_SANITIZE=ON -DPYMERGE_OUTPUT_DIR="$(CURDIR)/$(ASAN)/site/pymerge" \
	    -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)"
	$(BIN)/cmake --build $(ASAN)/cmake
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	    PYTHONPATH="$(CURDIR)/$(ASAN)/site" $(BIN)/pytest -q tests/ops tests/io tests/checkpoint/test_header_fuzz.py \
	    --ignore tests/io/test_doctor.py

doctor: dev
	$(BIN)/pymerge doctor

clean:
	rm -rf build demo *.egg-info pymerge/_C*.so pymerge/_cuda*.so $(VENV)/.built

distclean: clean
	rm -rf $(VENV) $(PEERS) $(FUSIONBENCH) .peers
