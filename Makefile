# Two commands on a fresh machine with Python 3.11 to 3.13 and git: `make demo` and `make test`.

VENV := .venv
BIN := $(VENV)/bin
STORAGE ?= outputs
# The first interpreter that starts and is of a supported version.
FIND_PYTHON := for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done

.PHONY: demo test test-full check format install clean

demo: $(VENV)/.installed  ## PRISM, SRe2L and random real images on scikit-learn's digits, offline
	$(BIN)/prism-ray bench suite=digits storage=$(STORAGE)

test: $(VENV)/.installed-dev check  ## linters, types, import contracts and the tests that take seconds
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" --durations=25

test-full: $(VENV)/.installed-dev check  ## all tests, those that take minutes too
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=25

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyright

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

install: $(VENV)/.installed

$(VENV)/bin/python:
	@python=$$($(FIND_PYTHON)); test -n "$$python" || { echo "no Python 3.11 to 3.13 found; install one" >&2; exit 2; }; \
	$$python -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache *.egg-info
