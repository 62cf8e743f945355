# `make demo` and `make test` do all the set-up they need; everything lands in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TESTS ?= tests
FUZZ_RUNS ?= 2000
FUZZ_INPUTS ?= 1000000
FUZZ_SEED ?= 1
OLD := $(VENV)-triton-3.6
# The operators' batteries, each of all backends.
STEMS := $(patsubst segvit_kernels/ops/%.py,%,$(wildcard segvit_kernels/ops/[a-z]*.py))
BATTERIES := $(wildcard $(STEMS:%=tests/kernels/test_%*.py) $(STEMS:%=tests/kernels/launches/test_%_triton.py))

# Every process of the tests would compile PyTorch's modules anew, at several times their import.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo kernels test ptx fuzz fuzz-parsers matrix gate gate-3.6 kill-test native emulator tiles sanitize wheels hub lint docs bench report tune gpu precompile clean

# LOCKED=1: nothing but the files of .ci/requirements.txt, by hash; for the platform and Python that it names.
# torch first: all that the native library needs, with what packs this one. Bytecode is left to the first import
# of what is imported.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile $(if $(LOCKED),,-c constraints.txt)
$(VENV)/.torch: constraints.txt $(if $(LOCKED),.ci/requirements.txt)
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(LOCKED),--require-hashes --no-deps -r .ci/requirements.txt,torch numpy 'setuptools>=77')
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py
	$(PIP) --no-build-isolation $(if $(LOCKED),--no-deps) -e '.[dev]'
	touch $@

demo: $(VENV)/.installed  ## train a small model on synthetic images and write an HTML report
	$(BIN)/segvit demo

# While torch is being installed, which has the right of way.
kernels:  ## the sources of the native library that compile without torch
	nice $(PYTHON) csrc/build.py --kernels

native: kernels $(VENV)/.torch  ## C++ kernels for the CPU, and CUDA C++ kernels where nvcc is; needs a C++ compiler
	$(BIN)/python csrc/build.py

emulator: $(VENV)/.torch  ## the CUDA C++ kernels built to run on the CPU, for tests
	$(BIN)/python csrc/build.py --emulate --out build/native

wheels: $(VENV)/.installed  ## every wheel into dist/: pure, and for Linux with the native library (CUDA where nvcc is, for ARCHS)
	$(BIN)/python csrc/wheels.py $(if $(ARCHS),--archs "$(ARCHS)")

hub: $(VENV)/.installed  ## the package in the form of the Kernel Hub, into build/hub
	$(BIN)/python csrc/hub.py $(if $(ARCHS),--archs "$(ARCHS)")

tiles: $(VENV)/.installed  ## the AMX kernels' tests on a CPU without AMX but with AVX512-FP16: tiles as ordinary code
	$(BIN)/python csrc/build.py --cpu-only --emulate-tiles --out build/tiles
	SEGVIT_KERNELS_LIBRARY=build/tiles/libsegvit_native.so SEGVIT_KERNELS_ISA=amx \
	$(BIN)/python -m pytest -q -p no:cacheprovider -k "cpu or native or int8" $(BATTERIES) tests/kernels/test_linear_native.py

# Leaks are torch's own; the battery of the CPU kernels, sanitizers in place of speed.
sanitize: $(VENV)/.installed  ## the CPU kernels' tests under AddressSanitizer and UBSan
	$(BIN)/python csrc/build.py --cpu-only --sanitize address,undefined --out build/sanitized
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	SEGVIT_KERNELS_LIBRARY=build/sanitized/libsegvit_native.so \
	$(BIN)/python -m pytest -q -p no:cacheprovider -k "cpu or fuzz" tests/kernels/test_fuzz.py $(BATTERIES) tests/csrc/test_native.py

# Types beside the tests: mypy has one process, which would leave a processor without work.
test: $(VENV)/.installed  ## lint and test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy & types=$$!; $(BIN)/python -m pytest -n 2 --dist worksteal $(TESTS); tests=$$?; \
	wait $$types && exit $$tests

kill-test: $(VENV)/.installed  ## training and bulk prediction, killed at random moments and at every operation on files, go on bitwise
	$(BIN)/python tests/segvit/kill.py --kills 200 --points 1 --nodes 4
	$(BIN)/python tests/segvit/kill_predict.py --kills 100

# All launches that are pinned for all architectures; SEGVIT_GATE=quick: one of each kernel, on sm_90 and in turn
# on one of the others. GATE: options for pytest, such as '-k sm_90'.
GATE_TEST := -m pytest -q -n 2 --dist worksteal $(GATE) tests/kernels/launches/test_triton_compiles.py
gate gate-3.6: export SEGVIT_GATE ?= all

gate: $(VENV)/.installed  ## the compile gate: machine code of every Triton kernel for seven GPUs
	$(BIN)/python $(GATE_TEST)

# The same packages with an older Triton in front of them.
$(OLD)/.installed: $(VENV)/.installed
	$(BIN)/python -m venv --without-pip $(OLD)
	$(BIN)/python -m pip --python $(OLD)/bin/python install --quiet --disable-pip-version-check --no-compile \
		--no-deps triton==3.6.0
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(OLD)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/newer.pth"
	touch $@

gate-3.6: $(OLD)/.installed  ## the compile gate with Triton 3.6, which comes with torch 2.11
	$(OLD)/bin/python $(GATE_TEST)

# Full sizes (vit, cityscapes) take the machine too long; large tiles are for the interpreter.
# One dtype of each case in turn; PTX_DTYPES=all: every dtype of each. The table at the end says what was executed.
PTX_DTYPES := turns
PTX_TABLE := build/ptx.jsonl
ptx: emulator  ## compiled kernels executed without a GPU: the batteries of Triton and CUDA C++ on sm_80 and sm_90
	rm -f $(PTX_TABLE)
	export SEGVIT_PTX_COVERAGE=$(PTX_TABLE) SEGVIT_PTX_DTYPES=$(PTX_DTYPES); \
	for arch in sm_80 sm_90; do \
		$(BIN)/python tests/kernels/ptx/ptx_operators.py $$arch && \
		SEGVIT_PTX=$$arch $(BIN)/python -m pytest -q -n 2 --dist worksteal \
			-k "triton and not vit and not cityscapes and not architectures" \
			$(BATTERIES) tests/kernels/test_key_padding.py && \
		$(BIN)/python tests/kernels/ptx/ptx_native.py $$arch || exit; done
	$(BIN)/python tests/kernels/ptx/ptx_faults.py
	$(BIN)/python tests/kernels/ptx/ptx_coverage.py $(PTX_TABLE) sm_80 sm_90

fuzz: $(VENV)/.installed  ## the whole command line with drawn options and odd files: FUZZ_RUNS runs, SEGVIT_FUZZ_SEED
	SEGVIT_FUZZ_RUNS=$(FUZZ_RUNS) $(BIN)/python -m pytest -q tests/segvit/commands/test_fuzz_cli.py

fuzz-parsers: $(VENV)/.installed  ## every parser on damaged files: FUZZ_INPUTS inputs in all, FUZZ_SEED
	PYTHONPATH=. $(BIN)/python tests/fuzz_parsers.py --inputs $(FUZZ_INPUTS) --seed $(FUZZ_SEED)

matrix: $(VENV)/.installed  ## a part of the suite with the oldest and the newest torch, in environments of their own
	$(BIN)/python tests/matrix.py

lint: $(VENV)/.installed  ## mend what the linter can; types
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

docs: $(VENV)/.installed  ## the site of docs/ into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

bench: $(VENV)/.installed  ## the small form of every benchmark on this machine, then tables and figures
	$(BIN)/python -m bench all

report: $(VENV)/.installed  ## tables and figures of README.md and docs/ from bench/results
	$(BIN)/python -m bench report

# Needs a GPU; as the next target, nothing installed but torch with Triton.
tune:  ## launch parameters of the Triton kernels, timed on this machine's GPU and pinned
	for operator in atm query_attention mask_loss semantic_argmax panoptic_argmax mask_iou subsample_norm; do \
		PYTHONPATH=. $(PYTHON) -m bench tune $$operator || exit; done

# Needs torch and Triton with a GPU, nothing installed: runs from the source tree with the machine's own Python.
GPU_OUT ?= build/gpu
gpu:  ## all that one GPU can show, in nine minutes, into the folder GPU_OUT (CACHE=: an archive of precompile)
	PYTHONPATH=. $(PYTHON) -m bench gpu --out $(GPU_OUT) $(if $(CACHE),--cache $(CACHE))

# Triton's wheel and Python's minor version are parts of the keys: for a GPU machine with Python 3.12,
# make precompile PYTHON=python3.12 VENV=.venv-3.12
CACHE_OUT ?= build/sm_90.tar.gz
precompile: $(OLD)/.installed  ## the Triton kernels of `make gpu` for sm_90, compiled with Triton 3.6 and no GPU, into CACHE_OUT
	mkdir -p $(dir $(CACHE_OUT))
	PYTHONPATH=. $(OLD)/bin/python -m bench precompile --out $(CACHE_OUT)

clean:
	rm -rf $(VENV) $(OLD) build dist *.egg-info segvit_kernels/libsegvit_*
