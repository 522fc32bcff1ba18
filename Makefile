# `make demo` and `make test` need Python 3.11 or newer and nothing else; the rest is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: venv demo docs test test-crash test-long coverage lint wheel bench bench-train clean

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: venv
	$(BIN)/migrator demo --dir demo --yes

# Two workers, each with whole files, whose fixtures it then makes once, in the order of the folders: the longest come
# first, the unit tests last. But for those on the Milvus server, of which there is one a machine.
TEST := -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: venv
	$(BIN)/python $(TEST) -m 'not long and not milvus_server'
	$(BIN)/python -m pytest -m 'not long and milvus_server'

test-crash: venv
	$(BIN)/python $(TEST) tests/crash

# The long forms: hours.
test-long: venv
	$(BIN)/python -m pytest -n 2 -m 'long and not milvus_server'
	$(BIN)/python -m pytest -m 'long and milvus_server'

# Branch coverage of the three packages by what `make test` runs, processes started by tests included; HTML in
# build/coverage.
coverage: venv
	$(BIN)/python -m pytest -n 2 -m 'not long and not milvus_server' --cov --cov-report=
	$(BIN)/python -m pytest -m 'not long and milvus_server' --cov --cov-append --cov-report=term:skip-covered --cov-report=html

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# Installs the wheel beside the packages of PyPI that are called `adapters` and `trainer`, and starts the demo there.
wheel: venv
	.ci/wheel

# The site, in build/site. A link that leads nowhere stops it.
docs: venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: venv
	$(BIN)/python -m bench

# Two data sets are built first, by npm and from Debian's dataset-fashion-mnist. Runs that are done are not done again.
bench-train: venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m bench train
	$(BIN)/python -m bench train-speed

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
