# make test      environment, build, linters, every test
# make demo      environment, build, a trained translator with its score, some translations and a picture
# make sanitize  the CPU kernels under ASan with UBSan, and under TSan
# make gpu-check builds for the card at hand with $(PYTHON) as it is, runs the GPU tests and a benchmark
PYTHON ?= python3
BIN := .venv/bin
BUILD_INPUTS := setup.py pyproject.toml $(shell find csrc -type f)
PIP := $(BIN)/pip install -q --disable-pip-version-check
READY := .venv/.built .venv/.installed
CPP := $(shell find csrc tests benchmarks -name "*.cpp" -o -name "*.h" -o -name "*.cu")

# one core downloads and checks types while the others compile
MAKEFLAGS += -j2
# and ninja takes all cores, not its share of two jobs
unexport MAKEFLAGS

.PHONY: test demo lint wheel sanitize gpu-check clean

# a process for each core: one that needs more threads must not spin while they wait for each other
test: $(READY) lint
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n auto tests

demo: $(READY)
	$(BIN)/lstm-fast demo

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

build/cpu_asan: SANITIZER := address,undefined
build/cpu_tsan: SANITIZER := thread
build/cpu_asan build/cpu_tsan: tests/cpu_sanitizers.cpp $(wildcard csrc/*.h csrc/cpu/*)
	mkdir -p build
	$(CXX) -std=c++17 -O1 -g1 -pthread -fno-math-errno -fno-trapping-math -fno-sanitize-recover=all -Wall -Wextra \
		-Wno-unknown-pragmas -Wno-psabi -fsanitize=$(SANITIZER) -o $@ $<

sanitize: build/cpu_asan build/cpu_tsan
	build/cpu_asan
	build/cpu_tsan

wheel: $(READY)
	$(BIN)/python -m build

# The architecture of the card at hand, Hopper's with the suffix that its code needs; nothing, for all, without a card.
CARD := import torch; print(("%d%d" % torch.cuda.get_device_capability()).replace("90", "90a") \
	if torch.cuda.is_available() else "")

gpu-check:
	LSTM_FAST_CUDA_ARCHS="$${LSTM_FAST_CUDA_ARCHS:-$$($(PYTHON) -c '$(CARD)')}" $(PYTHON) setup.py build_ext --inplace
	$(PYTHON) -m benchmarks.gpu_check $(ARGS)

.venv/.tools: requirements.txt
	$(PYTHON) -m venv .venv
	$(PIP) -c requirements.txt setuptools pybind11 ninja
	touch $@

.venv/.installed: .venv/.tools
	$(PIP) --no-compile -r requirements.txt
	touch $@

.venv/.built: .venv/.tools $(BUILD_INPUTS)
	$(PIP) --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf .venv build dist demo lstm_fast/*.so *.egg-info
