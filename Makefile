# `make demo` and `make test` need Python 3.11 or newer and nothing else. They make .venv and keep it up to date:
# `make demo` installs what the product needs, everything else adds the development tools.
PYTHON ?= python3
BIN := .venv/bin
PRODUCT := .venv/product
DEVELOPMENT := .venv/development
# Three workers for two cores, since some tests wait for servers, with one thread each: with two threads each, even two
# workers compete for the cores and take nearly twice as long.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all check format bench clean

demo: $(PRODUCT)
	$(BIN)/amalgram simulate

test: $(DEVELOPMENT)
	$(PYTEST)

test-all: $(DEVELOPMENT)
	$(PYTEST) -m "slow or not slow"

check: $(DEVELOPMENT)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(DEVELOPMENT)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(DEVELOPMENT)
	$(BIN)/python -m benchmarks

$(PRODUCT): pyproject.toml constraints.txt
	$(PYTHON) deploy/set_up.py

$(DEVELOPMENT): pyproject.toml constraints.txt
	$(PYTHON) deploy/set_up.py --development

clean:
	rm -rf .venv demo-output build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
