# demo · test · bench · gpu · lint: each sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out
SOURCES := setup.py pyproject.toml $(shell find csrc triton_kernels -type f)

.PHONY: demo test bench gpu lint clean

demo: $(VENV)/installed
	$(BIN)/embedfuse demo $(ARGS)

test: $(VENV)/installed lint
	$(BIN)/python -m pytest -q $(ARGS)

bench: $(VENV)/installed
	mkdir -p $(OUT)
	$(BIN)/python -m pytest benchmarks -q --benchmark-only --benchmark-json=$(OUT)/bench.json $(ARGS)
	$(BIN)/python -m benchmarks.report $(OUT)/bench.json

# On a machine with a GPU: builds into the Python that is there, fetches nothing.
gpu:
	PYTHON=$(PYTHON) OUT=$(OUT) bash benchmarks/gpu.sh

lint: $(VENV)/packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

$(VENV)/packages: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check $$(grep '^torch==' $<)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r $<
	touch $@

$(VENV)/installed: $(VENV)/packages $(SOURCES)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf $(VENV) build dist out python/embedfuse.egg-info python/embedfuse/_build.json
	find python triton_kernels -name '*.so' -delete -o -name __pycache__ -prune -exec rm -rf {} +
