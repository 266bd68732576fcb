# `make demo` and `make test` are all that a new user needs; `make help` lists the rest.
SHELL := /bin/bash
preset ?= release
build := build/$(preset)
# Another clone of the same sources finds the same compiler cache.
export CCACHE_BASEDIR := $(CURDIR)
export CCACHE_NOHASHDIR := 1
# It hashes a precompiled header, and not what went into it.
export CCACHE_SLOPPINESS := pch_defines,time_macros

# Setup, configuration and build follow one another, whatever -j says; ninja does the building in parallel.
.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help build test check-all demo bench wheel format lint clean setup-% configure

help: ## this list
	@echo "Microbatch: train with the batch size you want in the memory you have"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  An existing LibTorch is used if CMAKE_PREFIX_PATH or MICROBATCH_TORCH names one; otherwise torch is installed into .venv."
	@echo "  preset=debug or preset=sanitize builds another preset, in its own folder below build/."

demo: setup-demo configure ## install what is missing, build, train on real text and images within a memory budget, compare strategies, train in Python
	@cmake --build $(build) --target microbatch_command $(if $(filter ON,$(python)),microbatch_python)
	@scripts/demo.sh $(build)

build: setup-build configure ## install what is missing and build the command: build/release/microbatch
	@cmake --build $(build) --target microbatch_command
	@echo "built: $(build)/microbatch"

test: setup-test configure ## build and run the tests: C++, command line and Python
	@cmake --build $(build)
	@ctest --preset $(preset) -j 2 -LE long

check-all: setup-check configure ## the tests and the slow checks: fuzzing, spikes, clang-tidy
	@cmake --build $(build) --target all spike_case
	@ctest --preset $(preset) -j 2

lint: setup-check configure ## only clang-format and clang-tidy
	@ctest --preset $(preset) -R '^lint/'

wheel: setup-wheel ## build the Python package, with the command: dist/microbatch-*.whl
	@.venv/bin/python -m pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir dist \
	    $(if $(shell command -v ccache),-C cmake.define.CMAKE_CXX_COMPILER_LAUNCHER=ccache) .
	@ls -sh dist/microbatch-*.whl

# Before the configuration, which looks for Google Benchmark.
bench: setup-bench build ## compare speed with PyTorch loops, Accelerate, Lightning and the Hugging Face Trainer: docs/performance.md
	@bench/speed

format: ## format all C++ with .clang-format
	@git ls-files '*.h' '*.cpp' | xargs clang-format -i

clean: ## remove the build; keeps .venv and the compiler cache
	@rm -rf build

# The tests need packages that the command does without.
tests := OFF
test check-all lint: tests := ON
# The package is built for the torch of .venv; a LibTorch from elsewhere has no Python.
with_python := OFF
test check-all lint demo: with_python := ON
python = $(if $(wildcard .venv/bin/python),$(with_python),OFF)

setup-%:
	@scripts/setup.sh $*

configure:
	@cmake --preset $(preset) -DMICROBATCH_BUILD_TESTS=$(tests) -DMICROBATCH_BUILD_PYTHON=$(python) -DPython_EXECUTABLE=$(CURDIR)/.venv/bin/python $(if $(shell command -v ccache),-DCMAKE_CXX_COMPILER_LAUNCHER=ccache) \
	    --log-level=WARNING > /dev/null
