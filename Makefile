# `make demo` and `make test` do all set-up themselves: a virtual environment in .venv, the package in it, editable.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt

.PHONY: demo test bench lint types docs check soak sanitize fuzz clean
.DELETE_ON_ERROR:

$(VENV)/.base: pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing stablekern and what it needs into $(VENV) (a few minutes the first time)"
	$(PIP) -e '.[eeg,cli]'
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(PIP) -e '.[eeg,cli,test,bench,docs,types]'
	touch $@

$(VENV)/.lint: $(VENV)/.base
	$(PIP) -e '.[lint]'
	touch $@

demo: $(VENV)/.base
	$(BIN)/stablekern demo $(ARGS)

# Warnings are errors (pyproject.toml); the samples of the soaks run here, the soaks themselves in `make soak`. A group
# (`xdist_group`) shares a fixture that takes minutes, and so stays in one process.
test: $(VENV)/.test
	$(BIN)/stablekern doctor >$(VENV)/doctor.txt  # compiles all native kernels at once, before the tests ask for parts
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadgroup $(ARGS)

bench: $(VENV)/.test
	$(BIN)/python -m bench.run $(ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --diff .

types: $(VENV)/.test
	$(BIN)/python -m mypy

# Offline, warnings as errors; internal links and anchors are checked. To read it: python -m http.server -d build/site
docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

check: lint types test

soak: $(VENV)/.test
	$(BIN)/python tests/soak.py $(ARGS)
	$(BIN)/python tests/training_soak.py

sanitize: $(VENV)/.test
	$(BIN)/python tests/sanitize.py $(ARGS)

# Python 3.11, for which the coverage-guided engine has wheels.
fuzz: $(VENV)/.test
	$(PIP) -e '.[fuzz]'
	$(BIN)/python tests/fuzz_arguments.py -max_total_time=600 $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info runs
