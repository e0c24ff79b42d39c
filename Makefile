# Everything runs in an environment of the project's own, .venv, which the first target builds.
#
#   make VENV=path          another environment
#   make TORCH=torch==2.12  another torch
#   make PYTHON=python3.12  another interpreter

VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch>=2.10
BIN = $(VENV)/bin


.PHONY: help env demo test test-python test-cpp test-sanitize test-oldest-torch lint format wheel clean

help:
	@echo "make demo               train a DeiT and EViTs on real digits, compare them (about 10 minutes)"
	@echo "make test               every test, C++ and Python"
	@echo "make test-sanitize      the C++ tests with address and undefined-behaviour sanitizers"
	@echo "make test-oldest-torch  one binary, built on the newest torch, tested on the oldest supported"
	@echo "make lint | format      check | mend formatting, style and types"
	@echo "make wheel              build a wheel into dist/"
	@echo "make clean              remove builds, environments and runs"

# torch and the build tools first, so that the extension is built against the torch it runs with, once.
$(BIN)/.created:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install "$(TORCH)" "setuptools>=77" wheel ninja "pybind11>=2.13"
	touch $@

env: $(BIN)/.created
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install --no-build-isolation --editable ".[dev]"

demo: env
	$(BIN)/python -m evit_ext.demo --output runs/demo

test: env test-cpp test-python

test-python: env
	$(BIN)/pytest

test-cpp: env
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/cmake -G Ninja
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/cmake
	PATH="$(abspath $(BIN)):$$PATH" ctest --test-dir build/cmake --output-on-failure

test-sanitize: env
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/sanitize -G Ninja -DEVIT_LIBRARY=OFF \
	    -DCMAKE_BUILD_TYPE=RelWithDebInfo -DEVIT_SANITIZE=address,undefined
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/sanitize
	PATH="$(abspath $(BIN)):$$PATH" ctest --test-dir build/sanitize --output-on-failure

test-oldest-torch: env
	scripts/test-oldest-torch $(BIN)/python

lint: env
	PATH="$(abspath $(BIN)):$$PATH" scripts/lint

format: env
	PATH="$(abspath $(BIN)):$$PATH" scripts/lint --fix

wheel: env
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .

clean:
	rm -rf build dist runs .venv .venv-oldest-torch *.egg-info evit_ext/*.so
