# Needs a Python of at least 3.10 with pip and venv; everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test clean

install: .venv/installed

# Installed again only where the dependencies changed; the code itself is used in place.
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: install
	$(BIN)/trajshift demo

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy trajshift benchmarks studies
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# Leaves runs/, which holds results.
clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find trajshift benchmarks studies tests -name __pycache__ -type d -prune -exec rm -rf {} +
