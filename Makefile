# demo · test · bench · gpu · lint: each sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out
SHELL := bash
SOURCES := setup.py pyproject.toml $(shell find csrc triton_kernels -type f -not -name '*.pyc')

.PHONY: demo test bench gpu lint clean

demo: $(VENV)/installed
	$(BIN)/embedfuse demo $(ARGS)

test: $(VENV)/installed lint
	$(BIN)/python -m pytest -q $(ARGS)

bench: $(VENV)/installed
	mkdir -p $(OUT)
	rm -f $(OUT)/bench.json
	$(BIN)/python -m pytest benchmarks -q -p benchmarks.ledger --benchmark-only --results=$(OUT)/bench.json $(ARGS)
	$(BIN)/embedfuse bench report $(OUT)/bench.json

# On a machine with a GPU: builds into the Python that is there, fetches nothing.
# PART: tests, sanitizer, models, kernels or tune, each in eight minutes; default the first four in this order.
gpu:
	EMBEDFUSE_BUILD_CUDA=1 $(PYTHON) -m pip install -q --no-index --no-deps --no-build-isolation -e .
	$(PYTHON) -m benchmarks.gpu --out $(OUT) $(PART)

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
