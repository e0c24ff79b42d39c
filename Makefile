# Everything runs in an environment of the project's own, .venv, which the first target builds.
#
#   make VENV=.venv-other TORCH=torch==2.12 PYTHON=python3.12 test
#
# uses another environment, with another torch and interpreter; both are chosen when it is first made.

VENV ?= .venv
DEVICE ?= cpu
PYTHON ?= python3
TORCH ?= torch>=2.10
BIN = $(VENV)/bin
# Where other processes want the cores too, torch's threads otherwise burn them while they wait for each other.
export OMP_WAIT_POLICY ?= PASSIVE


.PHONY: help env demo study study-page bench bench-engines real-weights test test-quick test-all test-python \
    test-faults test-cpp test-cuda-on-host test-sanitize test-threads fuzz test-oldest-torch lint format docs wheels \
    gpu-check clean

help:
	@echo "make demo               train a DeiT and EViTs on real digits, compare them (about 10 minutes)"
	@echo "make study              the paper's questions: runs that have no result yet (hours; ARGS=\"--minutes 60\";"
	@echo "                        DEVICE=cuda: with DeiT-S at 224 pixels, on a GPU, not run yet)"
	@echo "make study-page         write docs/study.md from the results"
	@echo "make test               the tests, C++ and Python (about 12 minutes on two cores)"
	@echo "make test-quick         those of the operators and the method (about 2 minutes)"
	@echo "make test-all           what takes longer, too: builds, compilers, processes, CUDA kernels on the CPU"
	@echo "make test-faults        kill a hundred training runs at random moments; none must be lost"
	@echo "make test-sanitize      the C++ tests with address and undefined-behaviour sanitizers"
	@echo "make test-threads       the C++ tests of the CPU kernels with the thread sanitizer"
	@echo "make fuzz MINUTES=10    images, checkpoints, configurations and operators that nobody means"
	@echo "make test-oldest-torch  one binary, built on the newest torch, tested on the oldest supported"
	@echo "make bench              DeiT-S next to what people would use instead; its growth with the image"
	@echo "make real-weights       rules on weights and pictures that it downloads, by nearest neighbours (half an hour)"
	@echo "make bench-engines      DeiT-S in PyTorch, torch.compile, ONNX Runtime and OpenVINO, on the CPU"
	@echo "make gpu-check          tests and benchmarks on a GPU, with the installed Python and without a network"
	@echo "make lint | format      check | mend formatting, style and types"
	@echo "make wheels             sdist and wheels for the Pythons there are, CPU and CUDA, audited and tried, into dist/"
	@echo "make docs               build the documentation's site into build/site"
	@echo "make clean              remove builds, environments and runs"

# torch and the build tools first, so that the extension is built against the torch it runs with, once.
$(BIN)/.created:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install "$(TORCH)" numpy "setuptools>=77" wheel ninja "pybind11>=2.13"
	touch $@

# Built and installed with an extra, and again when a source was changed since: that takes minutes.
SOURCES = pyproject.toml setup.py $(shell find csrc -type f)
$(BIN)/.installed-%: $(BIN)/.created $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install --no-build-isolation --editable ".[$*]"
	touch $@

env: $(BIN)/.installed-dev

# ARGS="--difficulty hard --epochs 40", for example; `.venv/bin/python -m evit_ext.demo --help` lists them.
demo: $(BIN)/.installed-demo
	$(BIN)/python -m evit_ext.demo --output runs/demo $(ARGS)

# ARGS="--arms dense evit-0.7 --minutes 60", for example; `.venv/bin/python -m study run --help` lists them.
# DEVICE=cuda trains DeiT-S at 224 pixels instead, one run at a time, on a GPU.
ifeq ($(DEVICE),cpu)
STUDY = plan
STUDY_RUN = --jobs $(WORKERS)
else
STUDY = deit-small
STUDY_RUN = --device $(DEVICE) --precision bfloat16 --workers $(WORKERS)
endif
study: $(BIN)/.installed-study
	$(BIN)/python -m study --plan study/$(STUDY).yaml run $(STUDY_RUN) $(ARGS)

study-page: $(BIN)/.installed-study
	$(BIN)/python -m study --plan study/$(STUDY).yaml page

# As many tests at a time as there are cores, each with one thread.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)

test: env test-cpp test-python

test-quick: env
	$(PYTEST) python_tests/ops python_tests/tokens python_tests/patching --ignore python_tests/patching/families \
	    python_tests/models/test_golden.py python_tests/tools/test_house.py

# What takes longer, too: what python_tests/thorough.py lists, and the CUDA kernels under the Python tests.
# These one at a time: some measure, and some have processes of their own.
test-all: test test-cuda-on-host
	$(BIN)/pytest -m thorough

test-python: env
	$(PYTEST)

test-faults: env
	$(BIN)/pytest -m faults -s python_tests/training

test-cpp: env
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/cmake -G Ninja
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/cmake
	PATH="$(abspath $(BIN)):$$PATH" ctest --test-dir build/cmake --output-on-failure

# The tests of operators and models once more, with the CUDA kernels, which the CPU executes.
test-cuda-on-host: test-cpp
	$(PYTEST) python_tests/ops python_tests/models python_tests/patching/test_block.py \
	    python_tests/patching/test_block_at_once.py \
	    --cuda-on-host build/cmake/libevit_cuda_on_host.so

test-sanitize: env
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/sanitize -G Ninja -DEVIT_LIBRARY=OFF \
	    -DCMAKE_BUILD_TYPE=RelWithDebInfo -DEVIT_SANITIZE=address,undefined
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/sanitize
	PATH="$(abspath $(BIN)):$$PATH" ctest --test-dir build/sanitize --output-on-failure

# The kernels of the CPU only: the execution of CUDA code on the host switches stacks, which confuses it.
test-threads: env
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/thread -G Ninja -DEVIT_LIBRARY=OFF \
	    -DCMAKE_BUILD_TYPE=RelWithDebInfo -DEVIT_SANITIZE=thread
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/thread --target evit_tests
	PATH="$(abspath $(BIN)):$$PATH" ctest --test-dir build/thread --output-on-failure -R ^kernels_

MINUTES ?= 10
fuzz: env
	PATH="$(abspath $(BIN)):$$PATH" scripts/fuzz $(MINUTES)

test-oldest-torch: env
	scripts/test-oldest-torch $(BIN)/python

# With the Python that is there: a GPU machine often has no network, and brings a torch that fits its driver.
# ARGS="--minutes 7", for example; scripts/gpu-check.py --help lists them.
gpu-check:
	$(PYTHON) scripts/gpu-check.py $(ARGS)

# DEVICE=cuda on a machine with a GPU and network (else gpu-check); ARGS="--quick", "--model tiny" or "--seconds 5", for example: what both know.
# RESULTS is the folder of the results, those of the repository by default.
RESULTS ?= benchmarks/results
bench: $(BIN)/.installed-bench
	env -u OMP_WAIT_POLICY $(BIN)/python benchmarks/end_to_end.py --device $(DEVICE) --output $(RESULTS)/end-to-end-$(DEVICE) $(ARGS)
	env -u OMP_WAIT_POLICY $(BIN)/python benchmarks/growth.py --device $(DEVICE) --output $(RESULTS)/growth-$(DEVICE) $(ARGS)

# Exit status 77, which make reports as an error, says that something could not be downloaded.
real-weights: $(BIN)/.installed-retrieval
	$(BIN)/python benchmarks/real_weights.py --output $(RESULTS)/real-weights-cpu $(ARGS)

# ARGS="--precision float32" or "--model deit_tiny", for example; benchmarks/engines.py --help lists them.
bench-engines: $(BIN)/.installed-bench
	env -u OMP_WAIT_POLICY $(BIN)/python benchmarks/engines.py --output $(RESULTS)/engines-cpu $(ARGS)

lint: env
	PATH="$(abspath $(BIN)):$$PATH" scripts/lint

format: env
	PATH="$(abspath $(BIN)):$$PATH" scripts/lint --fix

# -W: a warning, such as a link that leads nowhere, is an error. -E: also of pages that did not change.
docs: env
	$(BIN)/python -m sphinx -EW --keep-going -c docs -d build/doctrees . build/site

# ARGS="--python python3.12 --variant cpu", for example; scripts/build-wheels.py --help lists them.
wheels: $(BIN)/.installed-wheels
	$(BIN)/python scripts/build-wheels.py $(ARGS)

clean:
	rm -rf build dist runs .venv .venv-oldest-torch *.egg-info evit_ext/*.so
