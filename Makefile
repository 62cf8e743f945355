# `make demo` and `make test` do all the set-up they need; everything lands in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TESTS ?= tests

.PHONY: demo test native emulator lint bench gpu clean

$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.installed  ## train a small model on synthetic images and write an HTML report
	$(BIN)/segvit demo

native: $(VENV)/.installed  ## C++ kernels for the CPU, and CUDA C++ kernels where nvcc is; needs a C++ compiler
	$(BIN)/python csrc/build.py

emulator: $(VENV)/.installed  ## the CUDA C++ kernels built to run on the CPU, for tests
	$(BIN)/python csrc/build.py --emulate --out build/native

test: $(VENV)/.installed  ## lint and test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist worksteal $(TESTS)

lint: $(VENV)/.installed  ## mend what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed  ## measure the CPU paths on this machine
	$(BIN)/python -m bench cpu

# Needs torch and Triton with a GPU, nothing installed: runs from the source tree with the machine's own Python.
gpu:  ## correctness, then timings, on this machine's GPU
	PYTHONPATH=. $(PYTHON) -m bench gpu

clean:
	rm -rf $(VENV) build dist *.egg-info segvit_kernels/libsegvit_*
