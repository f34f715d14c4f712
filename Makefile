# demo · test · bench · gpu · lint: each sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out
SHELL := bash
BENCH = $(PYTHON) -m pytest benchmarks -q --benchmark-only --benchmark-json=$(OUT)/bench.json $(ARGS)
SOURCES := setup.py pyproject.toml $(shell find csrc triton_kernels -type f -not -name '*.pyc')

.PHONY: demo test bench gpu lint clean

demo: $(VENV)/installed
	$(BIN)/embedfuse demo $(ARGS)

test: $(VENV)/installed lint
	$(BIN)/python -m pytest -q $(ARGS)

bench: PYTHON := $(BIN)/python
bench: $(VENV)/installed
	mkdir -p $(OUT)
	$(BENCH)
	$(PYTHON) -m embedfuse bench report $(OUT)/bench.json

# On a machine with a GPU: builds into the Python that is there, fetches nothing.
gpu:
	mkdir -p $(OUT)
	EMBEDFUSE_BUILD_CUDA=1 $(PYTHON) -m pip install -q --no-index --no-deps --no-build-isolation -e .
	$(PYTHON) -m embedfuse doctor --json > $(OUT)/doctor.json
	set -o pipefail; failed=0; \
	  $(PYTHON) -m pytest -q -m gpu tests 2>&1 | tee $(OUT)/tests.txt || failed=1; \
	  $(BENCH) 2>&1 | tee $(OUT)/bench.txt || failed=1; \
	  $(PYTHON) -m embedfuse bench report $(OUT)/bench.json || failed=1; exit $$failed

lint: $(VENV)/packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

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
	rm -rf $(VENV) build dist out python/embedfuse.egg-info python/embedfuse/_build.json
	find python triton_kernels -name '*.so' -delete -o -name __pycache__ -prune -exec rm -rf {} +
