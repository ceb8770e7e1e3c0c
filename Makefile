# `make help` says what there is. Settings: PYTHON (3.11 or newer), VENV (where the environment goes), NAMES (chapters),
# FRESH (anything: run also what has passed on this very tree).
PYTHON ?= python3
VENV   ?= .venv
NAMES  ?=
export FRESH ?=

BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip --disable-pip-version-check -qq
DEMO := runs/demo
HTML := _build/html

# A cell that takes longer than this on two cores fails; chapters run two at a time.
NBVAL := --nbval-lax --nbval-current-env --nbval-sanitize-with=book/_tools/nbval.cfg --nbval-cell-timeout=300

# Two tests at a time, those of one file in one process, so what a file's tests share is made once.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile
# Chapters share what was compiled for the same model. On CPUs most of their time is compiling, and nearly half of it is
# saved without the fusion emitters and with few optimisations, which changes rounding only. They see neither real
# images nor the long form.
CACHE    := JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.pytest_cache/jax JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 \
            JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=0 \
            XLA_FLAGS="--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=1"
CHAPTERS := env -u MEDVDM_DATA_DIR -u MEDVDM_BOOK $(CACHE)
# The book from its stored outputs, in an empty folder: a second build does not repeat the warnings of the first.
PAGES := rm -rf _build && $(BIN)/jupyter-book build . -W -n --keep-going -q && $(BIN)/python book/_tools/check_html.py $(HTML)
# Skips what has passed on this very tree, and says so.
ONCE := $(BIN)/python .ci/once.py

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-all lint book notebooks clean

help:
	@echo "make demo       set up $(VENV), then train, evaluate and sample on the embedded phantom (no download of data)"
	@echo "make test       set up $(VENV), then check the style, the library, the built book, and the chapters that have changed"
	@echo "make test-all   make test, then what is slow: processes, kills, recorded runs, a browser, and all other chapters"
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
	@$(BIN)/medvdm train --preset pixel-large --data phantom --stages 2 --image-size 64 --crop 32 --batch-size 8 --steps 1000 --out $(DEMO)
	@echo "2/3 Drawing 16 synthetic X-rays"
	@$(BIN)/medvdm sample $(DEMO) --ema --num 16 --steps 128 --out $(DEMO)/samples.png
	@echo "3/3 Evaluating on test patients that the model has not seen"
	@$(BIN)/medvdm evaluate $(DEMO) --ema --split test --draws 4
	@echo "Picture of the synthetic X-rays: $(DEMO)/samples.png"

lint: $(VENV)/.stamp-dev
	@echo "Checking the style"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || \
	    { echo "error: these files are not formatted:" >&2; $(BIN)/ruff format --check . >&2; exit 1; }

test: lint
	@echo "1/3 Testing the library"
	@$(ONCE) library --needs .coverage -- $(PYTEST) -m "not slow" --cov=medvdm --cov-fail-under=90
	@echo "2/3 Building the book and checking its links"
	@$(ONCE) book --needs $(HTML)/index.html -- sh -c '$(PAGES)'
	@echo "3/3 Running the chapters that are older than the library, and the quickest"
	@$(ONCE) chapters -- $(CHAPTERS) $(PYTEST) $(NBVAL) $$($(BIN)/python book/_tools/notebooks.py due)

test-all: test
	@echo "1/2 Testing what is slow: processes, kills, recorded runs, a browser"
	@MEDVDM_HTML=$(CURDIR)/$(HTML) $(PYTEST) -m slow --cov=medvdm --cov-append --cov-fail-under=95
	@echo "2/2 Running all other chapters"
	@others=$$($(BIN)/python book/_tools/notebooks.py others) && [ -z "$$others" ] || $(CHAPTERS) $(PYTEST) $(NBVAL) $$others

book: $(VENV)/.stamp-dev
	@echo "Building the book from its stored outputs"
	@$(PAGES)
	@echo "The book: $(HTML)/index.html"

notebooks: $(VENV)/.stamp-dev
	@echo "Executing chapters, two at a time (all of them take minutes)"
	@$(CACHE) $(BIN)/python book/_tools/notebooks.py run $(NAMES)

clean:
	@rm -rf $(VENV) $(DEMO) build dist htmlcov _build *.egg-info .coverage .coverage.* .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "Removed $(VENV), $(DEMO) and what was built"
