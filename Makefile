# `make demo` and `make test` need Python ≥ 3.11, a C++17 compiler and make; everything else goes into .venv.
PYTHON ?= python3
VENV   ?= .venv
# installed only where Python has no torch yet
TORCH  ?= torch==2.13.0

BIN  := $(VENV)/bin
# --no-compile: bytecode for what is imported, when it is, instead of for all of torch
PIP  := $(BIN)/python -m pip install -q --disable-pip-version-check --no-compile
# where the machine runs other work too, spinning OpenMP threads collapse
export OMP_WAIT_POLICY ?= passive

.PHONY: build-native demo test test-oldest-triton test-slow fuzz bench docs wheel gpu gpu-test gpu-bench \
  gpu-sanitize gpu-profile lint build clean

# the extension compiles while the packages install, for this processor alone where none is there yet
demo: $(VENV)/.base
	@$(MAKE) --no-print-directory -j2 $(if $(wildcard unrolled_kernels/_C*.so),build,build-native) $(VENV)/.experiments
	$(BIN)/unrolled-kernels synthetic --preset quick --out runs/demo

# as many processes as there are processors; one that is done takes tests of another
SIDE_BY_SIDE := --numprocesses logical --maxprocesses 8 --dist worksteal

# the tests of what every backend computes
KERNEL_TESTS := momentum momentum_prox gradients stopping rnn

test: build $(VENV)/.experiments $(VENV)/.dev $(VENV)/.docs
	$(BIN)/python -m pytest python_tests $(SIDE_BY_SIDE)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(patsubst %,python_tests/test_%.py,$(KERNEL_TESTS) triton) -k triton \
	  $(SIDE_BY_SIDE)

# the kernels with the oldest Triton that is supported, instead of the one that is installed
OLDEST_TRITON := build/triton-3.6.0
test-oldest-triton: build $(VENV)/.dev
	@test -d $(OLDEST_TRITON) || $(PIP) --no-deps --target $(OLDEST_TRITON) triton==3.6.0
	PYTHONPATH=$(OLDEST_TRITON) $(BIN)/python -m pytest python_tests/test_triton.py $(SIDE_BY_SIDE)

test-slow: build $(VENV)/.experiments $(VENV)/.dev
	$(BIN)/python -m pytest python_tests -m slow

# problems that no run before has seen, as many as EXAMPLES says of each kind
fuzz: EXAMPLES ?= 4000
fuzz: build $(VENV)/.dev
	UNROLLED_KERNELS_FUZZ_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest python_tests/test_fuzz.py \
	  $(SIDE_BY_SIDE)

# this machine's results, their page under docs/speed and the README's numbers: half an hour or more, with nothing
# else running
# as a program has torch that sets nothing: where waiting threads sleep, eager loops take several times longer
BENCH := env -u OMP_WAIT_POLICY $(BIN)/python -m
bench: build $(VENV)/.experiments $(VENV)/.dev
	$(BENCH) benchmarks.momentum --record
	$(BENCH) benchmarks.rnn --record
	$(BENCH) benchmarks.training --record
	$(BENCH) benchmarks.call --record
	$(BENCH) benchmarks.gradients --record
	$(BENCH) benchmarks.scaling --record
	$(BENCH) benchmarks.shared --record --rounds 3 --structure dense --method gd,nag
	$(BENCH) benchmarks.shared --record --rounds 3 --structure spectral
	$(BENCH) benchmarks.auto
	$(BENCH) benchmarks.report

# on a machine with a GPU, with its own python3 and torch: builds in place, for that GPU alone, and installs nothing
GPU_ARCH = $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1)
gpu gpu-test gpu-bench gpu-sanitize gpu-profile: export UNROLLED_KERNELS_CUDA = 1
gpu gpu-test gpu-bench gpu-sanitize gpu-profile: export TORCH_CUDA_ARCH_LIST ?= $(GPU_ARCH)
gpu: export UNROLLED_KERNELS_EXTENSION = 1
GPU_BUILD = UNROLLED_KERNELS_EXTENSION=1 $(PYTHON) setup.py --quiet build_ext --inplace

# a measuring run of independent parts, benchmarks/gpu.py: 8 minutes up to the tests. OUT: the folder of its results
gpu:
	$(PYTHON) -m benchmarks.gpu --device cuda $(if $(PARTS),--parts $(PARTS))

# all tests that launch kernels on the GPU; side by side where pytest-xdist is there
GPU_TESTS = $(patsubst %,python_tests/test_%.py,$(KERNEL_TESTS) interoperability synthetic denoising) \
  -k "cuda or triton or gpu" $(shell $(PYTHON) -c 'import xdist' 2>/dev/null && echo --numprocesses 8)

gpu-test:
	$(GPU_BUILD)
	$(PYTHON) -m pytest $(GPU_TESTS)

# every case beside every peer: hours
gpu-bench:
	$(GPU_BUILD)
	-$(PYTHON) -m benchmarks.momentum --device cuda --modes forward,backward,forward+backward --record
	-$(PYTHON) -m benchmarks.rnn --device cuda --modes forward,backward,forward+backward --record
	-$(PYTHON) -m benchmarks.training --device cuda --record
	-$(PYTHON) -m benchmarks.scaling --device cuda --record

# memory errors, races, missing barriers and reads of what was never written, by the tool that comes with CUDA
gpu-sanitize:
	$(GPU_BUILD)
	for tool in memcheck racecheck synccheck initcheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 $(PYTHON) -m pytest -q \
	    python_tests/test_momentum.py python_tests/test_rnn.py \
	    -k "cuda and (forward_and_gradients or edges or schedule_forms)" || exit 1; \
	done

# counters of the main shapes: share of the memory and of the arithmetic roof, registers, local memory, stalls
gpu-profile:
	$(GPU_BUILD)
	mkdir -p runs/profile
	ncu --set full --clock-control none --kernel-name regex:momentum --launch-skip 4 --launch-count 4 \
	  --export runs/profile/momentum --force-overwrite $(PYTHON) -m benchmarks.momentum --device cuda --only d32-k10 --peers "" --rounds 1

# for PyPI, of this Python: pybind11 has no stable interface over Pythons. torch's libraries are torch's. setuptools packs
# what it finds in build/lib*, of earlier builds too. Checked: that no symbol is too new, and that it runs where it is
wheel: $(VENV)/.dev
	rm -rf build/wheel build/lib* dist && mkdir -p build/wheel
	UNROLLED_KERNELS_EXTENSION=1 UNROLLED_KERNELS_AUTOGRAD=0 $(BIN)/python -m pip wheel -q --no-build-isolation --no-deps --wheel-dir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist build/wheel/*.whl
	$(BIN)/auditwheel show dist/*.whl
	$(BIN)/python -m pip install -q --no-index --no-deps --target build/wheel/installed dist/*.whl
	cd build/wheel/installed && $(abspath $(BIN))/python -c "from unrolled_kernels import _backend, info; \
	  info.main(); assert 'build/wheel/installed' in _backend.__file__ and _backend.extension()"
	ls -l dist

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pre-commit validate-config
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

# the site, in build/site; `.venv/bin/mkdocs serve` shows it while it is written
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# incremental: only what changed is compiled again
build: $(VENV)/.base
	@$(BIN)/python setup.py --quiet build_ext --inplace

build-native: $(VENV)/.base
	@UNROLLED_KERNELS_NATIVE=1 $(BIN)/python setup.py --quiet build_ext --inplace

# .base is what compiling needs; .experiments and .dev are what running the experiments and the tests need besides
$(VENV)/.base:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python >= 3.11 is needed: make PYTHON=..."; exit 1; }
	@if $(PYTHON) -c 'import torch' 2>/dev/null; then \
	  test -x $(BIN)/python || $(PYTHON) -m venv --system-site-packages $(VENV); \
	else \
	  test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
	  echo "installing $(TORCH)"; $(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) "$(TORCH)"; \
	fi
	@$(PIP) "setuptools>=77" wheel ninja pybind11
	@UNROLLED_KERNELS_EXTENSION=0 $(PIP) --no-build-isolation --no-deps -e .
	@touch $@

# the requirements of the package and of an extra, without the package, whose extension may be compiling meanwhile
REQUIREMENTS := import sys, tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
  print(*p["dependencies"], *p["optional-dependencies"][sys.argv[1]], sep="\n")

$(VENV)/.experiments $(VENV)/.dev $(VENV)/.docs: $(VENV)/.%: $(VENV)/.base pyproject.toml
	@echo "installing what the extra [$*] names"
	@$(BIN)/python -c '$(REQUIREMENTS)' $* > $(VENV)/$*.txt
	@$(PIP) -r $(VENV)/$*.txt
	@touch $@

clean:
	rm -rf build dist *.egg-info $(VENV) runs unrolled_kernels/_C*.so
