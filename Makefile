# `make help` says what there is. Settings: PYTHON (3.11 or newer), VENV (where the environment goes), NAMES (chapters).
PYTHON ?= python3
VENV   ?= .venv
NAMES  ?=

BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip --disable-pip-version-check -qq
DEMO := runs/demo
HTML := _build/html

# A cell that takes longer than this on two cores fails; chapters run two at a time.
NBVAL := --nbval-lax --nbval-current-env --nbval-sanitize-with=book/_tools/nbval.cfg --nbval-cell-timeout=300

# Chapters that train the same model share what was compiled for it.
CACHE := JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.pytest_cache/jax JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test lint book notebooks clean

help:
	@echo "make demo       set up $(VENV), then train, evaluate and sample on the embedded phantom (no download of data)"
	@echo "make test       set up $(VENV), then check the style, run all tests and all chapters, and check the built book"
	@echo "make book       set up $(VENV), then build the book's pages and check them"
	@echo "make notebooks  execute the chapters anew and store their outputs; some of them with NAMES='forward bound'"
	@echo "make setup      set up $(VENV) only, with what the tests and the book need"
	@echo "make lint       check the style only"
	@echo "make clean      remove $(VENV), $(DEMO) and everything that was built; other runs stay"
	@echo "Settings: make demo PYTHON=python3.12 VENV=/somewhere/else"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	    { echo "error: '$(PYTHON)' is not Python 3.11 or newer; name one with 'make PYTHON=...'" >&2; exit 2; }
	@echo "Creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# What is installed is recorded in two stamps, so nothing is installed twice.
$(VENV)/.stamp: pyproject.toml .ci/constraints.txt | $(BIN)/python
	@echo "Installing medvdm in $(VENV), in the tested versions (the first time takes a minute or more)"
	@$(PIP) install --constraint .ci/constraints.txt --editable .
	@touch $@

$(VENV)/.stamp-dev: pyproject.toml .ci/constraints.txt | $(BIN)/python
	@echo "Installing medvdm and what its tests and book need in $(VENV), in the tested versions (the first time takes minutes)"
	@$(PIP) install --constraint .ci/constraints.txt --editable '.[dev]'
	@touch $(VENV)/.stamp $@

setup: $(VENV)/.stamp-dev
	@echo "Ready: $(BIN)/medvdm"

demo: $(VENV)/.stamp
	@rm -rf $(DEMO)
	@echo "1/3 Training a small model on generated chest X-rays"
	@$(BIN)/medvdm train --preset demo --out $(DEMO)
	@echo "2/3 Drawing 32 synthetic X-rays"
	@$(BIN)/medvdm sample $(DEMO) --num 32 --steps 250 --out $(DEMO)/samples.png
	@echo "3/3 Evaluating on test patients that the model has not seen"
	@$(BIN)/medvdm evaluate $(DEMO) --split test
	@echo "Picture of the synthetic X-rays: $(DEMO)/samples.png"

lint: $(VENV)/.stamp-dev
	@echo "Checking the style"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || \
	    { echo "error: these files are not formatted:" >&2; $(BIN)/ruff format --check . >&2; exit 1; }

test: lint
	@echo "1/2 Testing the library and the built book, two tests at a time"
	@$(BIN)/python -m pytest -n 2 --dist loadgroup --cov=medvdm --cov-fail-under=95
	@echo "2/2 Running all chapters and comparing their outputs, two at a time"
	@env -u MEDVDM_DATA_DIR -u MEDVDM_BOOK $(CACHE) $(BIN)/python -m pytest -n 2 --dist loadfile $(NBVAL) book

book: $(VENV)/.stamp-dev
	@rm -rf _build
	@echo "Building the book from its stored outputs"
	@$(BIN)/jupyter-book build . -W -n --keep-going -q
	@$(BIN)/python book/_tools/check_html.py $(HTML)
	@echo "The book: $(HTML)/index.html"

notebooks: $(VENV)/.stamp-dev
	@echo "Executing chapters (all of them take minutes)"
	@$(BIN)/python book/_tools/notebooks.py run $(NAMES)

clean:
	@rm -rf $(VENV) $(DEMO) build dist htmlcov _build *.egg-info .coverage .coverage.* .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "Removed $(VENV), $(DEMO) and what was built"
