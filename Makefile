# Needs Python >= 3.11 and make. uv goes into .tools/ when the machine has none.
PYTHON ?= python3
UV := $(or $(shell command -v uv 2>/dev/null),.tools/uv/bin/uv)
BIN := .venv/bin
TORCH := $(shell sed -n '/^name = "torch"$$/{n;s/version = "\(.*\)"/\1/p;}' uv.lock)

.PHONY: demo test browser fast lint types setup clean
demo: setup  ## convert the embedded teacher, distill it, compare with the controls
	$(BIN)/tiny-onn demo

# Each worker runs its tests on one thread. Two workers are what a laptop's memory surely has room for.
WORKERS ?= 2
test: lint types  ## everything CI runs
	JAXTYPING_DISABLE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "compiled and not slow" tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not compiled and not slow" --jaxtyping-packages=tiny_onn,beartype.beartype tests

browser: setup  ## the report in a Chromium, which the machine must have
	$(UV) pip install --quiet --python $(BIN)/python --group browser
	$(BIN)/python -m pytest -m browser tests/report/test_report_browser.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/pyright

setup: .venv/.ready

.tools/uv/bin/uv:
	$(PYTHON) -c 'import sys; sys.exit("Tiny-ONN needs Python >= 3.11, this is " + sys.version.split()[0] + "; run make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .tools/uv
	.tools/uv/bin/python -m pip install --quiet --disable-pip-version-check uv

# torch goes in through pip first: pip's configured index decides between CPU and CUDA builds.
# Everything else comes from the lock.
.venv/.ready: $(UV) pyproject.toml uv.lock
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH)
	$(UV) export --quiet --frozen --no-emit-project --prune torch --output-file .venv/locked.txt
	$(UV) pip install --quiet --python $(BIN)/python --requirement .venv/locked.txt
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

clean:
	rm -rf .venv .tools .pytest_cache .ruff_cache
