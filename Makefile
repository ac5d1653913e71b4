# One door: make demo shows what bnify does, make test runs everything the CI runs.
# Each creates .venv when it is absent; PYTHON chooses the interpreter.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install -qq --constraint constraints.txt
PYTEST_ARGS ?= -n 2
# The tests bring a stub with which torchvision imports beside a torch it was not built for.
STUB := PYTHONPATH=tests/stub
ONE_THREAD := OMP_NUM_THREADS=1
# Seeds per property under make fuzz.
FUZZ ?= 500
SOURCES := bnify tests examples benchmarks docs

.PHONY: help demo test check pytest examples wheel bench compare fuzz docs format clean

help:
	@echo "make demo    install what the demo needs and run it: insert, train, export, verify"
	@echo "make test    check, tests, examples, and the wheel alone: what the CI runs"
	@echo "make check   formatting, lint, types, import directions, generated docs"
	@echo "make bench   start-up, capture over the zoo, scale, folding beside other tools, audits, comparisons"
	@echo "make compare the usual claims on norms, measured anew: about an hour on two cores"
	@echo "make fuzz    long property tests on random networks (20,000 of them for folding)"
	@echo "make docs    write the generated parts of the documentation"
	@echo "make clean   remove environments and build output"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# A full installation serves the demo too.
$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	@test $(VENV)/.test -nt pyproject.toml || $(PIP) --editable '.[demo]'
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[test,dev]'
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

check: $(VENV)/.test
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check

pytest: $(VENV)/.test
	$(ONE_THREAD) $(BIN)/pytest $(PYTEST_ARGS)

examples: $(VENV)/.test
	$(ONE_THREAD) $(BIN)/python examples/demo.py --epochs 1 --out build/demo
	$(ONE_THREAD) $(BIN)/python examples/train_digits.py --epochs 1 --out build/digits
	rm -rf build/torchrun
	$(ONE_THREAD) $(BIN)/torchrun --nproc_per_node 2 examples/torchrun_digits.py --epochs 1 \
		--out build/torchrun
	rm -rf build/compare
	$(ONE_THREAD) $(BIN)/python examples/compare_digits/compare.py --quick \
		--runs build/compare/runs --keep build/compare/kept

# The wheel alone, with nothing but its own dependencies and away from this folder.
wheel: $(VENV)/.test
	rm -rf build/wheel && mkdir -p build/wheel
	$(BIN)/pip --disable-pip-version-check wheel -qq --no-deps --wheel-dir build/wheel .
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/pip --disable-pip-version-check install -qq \
		--constraint constraints.txt build/wheel/*.whl
	cd build/wheel && venv/bin/bnify --help > help.txt && venv/bin/bnify --version
	cd build/wheel && cp ../../examples/mlp.py . && \
		venv/bin/bnify insert mlp.py:MyNetwork --input 32,784 --dry-run > plan.txt
	rm -rf build/wheel/venv

test: check pytest examples wheel
	@echo "all passed"

bench: $(VENV)/.test
	$(BIN)/python benchmarks/startup.py
	$(ONE_THREAD) $(BIN)/python benchmarks/scale.py
	$(STUB) $(ONE_THREAD) $(BIN)/python benchmarks/capture_zoo.py
	$(STUB) $(ONE_THREAD) $(BIN)/python benchmarks/fold_zoo.py
	$(STUB) $(ONE_THREAD) $(BIN)/python benchmarks/fold_speed.py
	$(STUB) $(ONE_THREAD) $(BIN)/python benchmarks/audit.py
	$(ONE_THREAD) $(BIN)/python benchmarks/compare_power.py
	$(BIN)/python benchmarks/compare_budget.py
	$(ONE_THREAD) $(BIN)/python benchmarks/calibrate.py
	$(ONE_THREAD) $(BIN)/python benchmarks/watch.py

compare: $(VENV)/.test
	$(ONE_THREAD) $(BIN)/python examples/compare_digits/compare.py
	$(BIN)/python docs/generate.py

fuzz: $(VENV)/.test
	BNIFY_FUZZ=$(FUZZ) $(ONE_THREAD) $(BIN)/pytest $(PYTEST_ARGS) -k random

docs: $(VENV)/.test
	$(BIN)/python docs/generate.py

format: $(VENV)/.test
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

clean:
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache \
		.import_linter_cache .hypothesis .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
