# `make test` and `make demo` need Python 3.11 or newer with its venv module, and do the rest themselves.
PYTHON ?= $(firstword $(shell command -v python3.11 python3))
VENV := .venv
BIN := $(VENV)/bin
CODE := longmem tests $(wildcard examples benchmarks scripts)

.PHONY: test demo lint format setup clean

test: setup lint
	$(BIN)/pytest -q

demo: setup
	$(BIN)/python examples/demo.py

lint: $(VENV)/installed
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/installed
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

# The embedded backbone, kept in the user's cache; returns at once when it is there.
setup: $(VENV)/installed
	$(BIN)/longmem setup smollm2-135m

# torch goes first and by itself, so that pip takes a CPU build where one is offered and the second step leaves it alone.
$(VENV)/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "longmem needs Python 3.11 or newer. On Debian: apt-get install python3.11 python3.11-venv" \
		"(or name another: make PYTHON=/path/to/python)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make virtual environments. On Debian: apt-get install" \
		"$$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
