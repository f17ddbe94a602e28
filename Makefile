# `make demo` and `make test` need Python 3.11 or newer and nothing else; .venv is made, and remade when it is stale.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/made-from-constraints
# Two workers with a thread each: with two each, they are in each other's way and take nearly twice as long.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile

.PHONY: demo test test-all check format bench clean

demo: $(STAMP)
	$(BIN)/amalgram simulate

test: $(STAMP)
	$(PYTEST)

test-all: $(STAMP)
	$(PYTEST) -m "slow or not slow"

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)
	$(BIN)/python -m benchmarks.demo_seeds
	$(BIN)/python -m benchmarks.masking
	$(BIN)/python -m benchmarks.gram --quick
	$(BIN)/python -m benchmarks.solve
	$(BIN)/python -m benchmarks.payload
	$(BIN)/python -m benchmarks.scale

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("amalgram needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch --constraint constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' --constraint constraints.txt
	touch $(STAMP)

clean:
	rm -rf .venv demo-output build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
