# Every target sets up .venv by itself. `make help` lists them.
PYTHON ?= $(shell command -v python3.11 || command -v python3 || command -v python)
VENV := .venv
BIN := $(VENV)/bin
BENCH := .bench-venv
NOTEBOOKS := $(wildcard *.ipynb)

.DEFAULT_GOAL := help
.PHONY: help run test render slides explore lab bench lint clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /  make \1\t/' | expand -t 16

$(VENV)/.run: requirements.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14) and "Python 3.11 to 3.14 is needed: make PYTHON=/path/to/one")'
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.run requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

run: $(VENV)/.run  ## train from scratch and execute student.ipynb into build/, progress on the terminal
	INFLUENCE_RETRAIN=1 INFLUENCE_OUT=build $(BIN)/python tools/execute.py student.ipynb --to build --html

test: $(VENV)/.dev  ## run every test, and every notebook in fast mode
	INFLUENCE_FAST=1 INFLUENCE_OUT=build/fast $(BIN)/python -m pytest --nbmake --nbmake-timeout=900 tests $(NOTEBOOKS)

render: $(VENV)/.run  ## execute every committed notebook in place, in full, with all figures and results
	$(BIN)/python tools/execute.py $(NOTEBOOKS)

slides: $(VENV)/.dev  ## build presentation.pdf from images/ and data/results.json
	$(BIN)/python tools/slides.py

explore: $(VENV)/.run  ## build the explorer, docs/index.html, from ten trainings: about four minutes
	$(BIN)/python tools/explore.py

lab: $(VENV)/.run  ## open JupyterLab
	$(BIN)/python -m jupyter lab

$(BENCH)/.run: requirements-bench.txt
	test -x $(BENCH)/bin/python || "$(PYTHON)" -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-bench.txt
	@touch $@

bench: $(VENV)/.run $(BENCH)/.run  ## measure speed, and quality against the libraries one would pick instead
	$(BIN)/python benchmarks/speed.py
	$(BENCH)/bin/python benchmarks/quality.py
	$(BENCH)/bin/python benchmarks/quality.py --model ResNet-8

lint: $(VENV)/.dev  ## ruff over modules and notebooks, mypy over package and module
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ruff format --check --line-length 100 $(NOTEBOOKS)
	$(BIN)/mypy influence_functions explorer notebook_support.py tools benchmarks

clean:  ## remove what `make run` and `make test` wrote (not .venv, not data/)
	rm -rf build
