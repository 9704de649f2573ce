# make demo   a tour in a few minutes            make test   the test suite
# make check  format, lint, types and tests      make slow   the tests that take minutes
# make site   the documentation, into build/site

PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test slow check lint site clean

demo: .venv/installed
	$(BIN)/vimoe demo

test: .venv/installed
	$(BIN)/python -m pytest -q -n 2 --dist loadfile  # a file's tests share fixtures

slow: .venv/installed
	$(BIN)/python -m pytest -q -m slow

check: lint test

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

site: .venv/installed
	$(BIN)/python -m sphinx --fail-on-warning -q -c docs . build/site

clean:
	rm -rf .venv build *.egg-info
