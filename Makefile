# demo · test · test-all · test-newest · test-oldest · bench · gpu · gpu-bundle · docs · lint · wheel: each sets up
# what it needs; gpu takes what is there.
PYTHON ?= python3
OLDEST_PYTHON ?= python3.10
BUNDLE_PYTHON ?= python3.12
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out
SHELL := bash
SOURCES := setup.py pyproject.toml $(shell find csrc triton_kernels -type f -not -name '*.pyc')

# A process per core, of one thread each; the files that take minutes begin first (tests/conftest.py).
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all test-newest test-oldest bench gpu gpu-bundle docs lint wheel clean

demo: $(VENV)/installed
	$(BIN)/embedfuse demo $(ARGS)

test: $(VENV)/installed lint
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(VENV)/installed lint
	$(PYTEST) $(ARGS)

# What wraps other libraries, on their newest releases; not part of CI, since these come out at any time.
test-newest: $(VENV)/installed
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install -q --disable-pip-version-check $$(grep '^torch==' requirements-dev.txt)
	.venv-newest/bin/python -m pip install -q --disable-pip-version-check -U -r requirements-newest.txt
	.venv-newest/bin/python -m pip install -q --disable-pip-version-check -U --no-deps $$(sed -n 's/^# --no-deps //p' requirements-newest.txt)
	PYTHONPATH=python .venv-newest/bin/python -m embedfuse doctor
	OMP_NUM_THREADS=1 PYTHONPATH=python .venv-newest/bin/python -m pytest -q tests/patching tests/integrations $(ARGS)

# The oldest releases that pyproject.toml declares, on the oldest Python; not part of CI: torch 2.10 comes from PyPI
# as a build for CUDA, 3 GB.
test-oldest:
	$(OLDEST_PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -q --disable-pip-version-check -r requirements-oldest.txt
	EMBEDFUSE_BUILD_CUDA=0 .venv-oldest/bin/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	.venv-oldest/bin/python -m embedfuse doctor
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -q tests/ops tests/patching/test_parity.py $(ARGS)

bench: $(VENV)/installed
	mkdir -p $(OUT)
	rm -f $(OUT)/bench.json
	$(BIN)/python -m pytest benchmarks -q -p benchmarks.harness.record --benchmark-only --results=$(OUT)/bench.json $(ARGS)
	$(BIN)/python -m benchmarks report $(OUT)/bench.json

# On a machine with a GPU, in eight minutes: everything, into OUT/results.tgz and OUT/summary.md; fetches nothing.
# PART=retry: in three minutes, what was red in the archive LAST. PART=rehearse: everything here, without a GPU.
gpu:
	$(PYTHON) -m benchmarks gpu $(PART) --out $(OUT) $(if $(LAST),--last $(LAST)) $(ARGS)

# The compiled modules for such a machine, in bundle/, which then builds nothing.
gpu-bundle:
	$(BUNDLE_PYTHON) -m venv .venv-bundle
	.venv-bundle/bin/python -m pip install -q --disable-pip-version-check $$(grep -E '^(setuptools|pybind11|ninja)==' requirements-dev.txt)
	.venv-bundle/bin/python -m benchmarks.gpu.bundle

# site/index.html, from docs/ and the docstrings; fetches nothing.
docs: $(VENV)/packages
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=python $(BIN)/python -m mkdocs build --strict $(ARGS)

lint: $(VENV)/packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/clang-format --dry-run -Werror $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# One wheel for this Python in dist/, without the CUDA kernels.
wheel: $(VENV)/packages
	EMBEDFUSE_BUILD_CUDA=0 $(BIN)/python -m build --wheel --outdir dist

$(VENV)/packages: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check $$(grep '^torch==' $<)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r $<
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps $$(sed -n 's/^# --no-deps //p' $<)
	touch $@

$(VENV)/installed: $(VENV)/packages $(SOURCES)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf $(VENV) .venv-newest .venv-oldest .venv-bundle build bundle dist out site python/embedfuse.egg-info python/embedfuse/_build.json
	find python triton_kernels -name '*.so' -delete -o -name __pycache__ -prune -exec rm -rf {} +
