# `make demo` and `make test` do everything on a fresh machine; python3 >= 3.11 is all they need.
PYTHON ?= python3
BIN := .venv/bin
# The one place that pins torch: this version's wheel here is the CPU build, an unpinned one may pull CUDA.
TORCH := torch==2.13.0
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test docs report

demo: .venv/.core
	$(BIN)/haechi answer --input examples/queries.txt

test: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

report: .venv/.dev
	$(BIN)/haechi report results/haechi-mini results/robustness

docs: .venv/.dev
	$(BIN)/python docs/make_cli.py

.venv/.core: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) --editable .
	touch $@

.venv/.dev: .venv/.core
	$(PIP) $(TORCH)
	$(PIP) --editable '.[dev]'
	# Tests of pages want a browser; Debian's is installed where we may.
	command -v chromium || command -v google-chrome || { apt-get -qq update && apt-get -qq install -y chromium; } \
		|| echo 'no Chromium: the tests of pages are skipped'
	touch $@
