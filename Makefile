# Each target sets up what it needs; you need Python 3.11 or newer and a C++ compiler.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NOTEBOOKS := $(wildcard notebooks/*.ipynb)

.DEFAULT_GOAL := help
N ?= 50
MINUTES ?= 5
# Tests without engines mostly wait, so they run in two processes; those with engines would disturb each other.
WITHOUT_ENGINES := -m "not engine and not ollama and not lab" -n 2 --dist loadfile

.PHONY: help demo test chaos lasting soak lowest lab lint bench engine ollama ollama-for-ci clean

help:
	@echo "make demo   run the quickstart notebook headless and print its output"
	@echo "make lab    open JupyterLab on the notebooks; ARGS='--allow-root --port 58000' are options of jupyter lab"
	@echo "make test   run all tests, on real engines, and the notebooks"
	@echo "make chaos  N=200: interrupt answers of two models at random moments, and compare them with undisturbed ones"
	@echo "make lasting interrupt conversations, loads and answers in every way, and count what is lost or done again"
	@echo "make soak   MINUTES=5: 500 clients stream answers from a gateway at the same time; no text is lost, memory stays flat"
	@echo "make lowest run the tests that need no engine with the lowest versions that pyproject.toml allows"
	@echo "make lint   ruff and mypy"
	@echo "make bench  run the benchmarks (under 25 minutes) and write benchmarks/RESULTS.md, the source of the README's figures"
	@echo "make ollama build the two Ollamas that the tests use"

# One stamp for each set of extras; pip runs again when pyproject.toml has changed.
$(VENV)/stamp-%: pyproject.toml
	@test -x $(BIN)/python || { $(PYTHON) -m venv $(VENV); \
		echo "setting up, once: about 600 MB of packages, then llama.cpp is built; 5 to 15 minutes in all"; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

engine: $(VENV)/stamp-build
	@$(BIN)/sollol-nb install

demo: $(VENV)/stamp-lab engine
	@$(BIN)/python tools/run_notebook.py notebooks/01_quickstart.ipynb

lab: $(VENV)/stamp-lab,gateway engine
	$(BIN)/jupyter lab --notebook-dir notebooks $(ARGS)

ollama: $(VENV)/stamp-build
	@$(BIN)/python tools/build_ollama.py

# Ollama is optional for contributors and required in CI.
ollama-for-ci: $(VENV)/stamp-build
	@test -z "$$CI" || $(MAKE) --no-print-directory ollama

test: $(VENV)/stamp-dev,mcp engine ollama-for-ci
	$(BIN)/python -m pytest $(WITHOUT_ENGINES)
	$(BIN)/python -m pytest -m "engine or ollama or lab"
	$(BIN)/python -m pytest --nbval $(NOTEBOOKS)

chaos: $(VENV)/stamp-dev engine
	$(BIN)/python -m tests.chaos --n $(N)
	$(BIN)/python -m tests.chaos --n $(N) --model smollm2 --recovery fast
	$(BIN)/python -m tests.chaos --n $(N) --model smollm2 --recovery exact

lasting: $(VENV)/stamp-dev engine
	for name in $$($(BIN)/python -m tests.lasting); do $(BIN)/python -m tests.lasting $$name || exit 1; done

soak: $(VENV)/stamp-dev engine
	$(BIN)/python -m tests.gateway.soak --minutes $(MINUTES)

# The lower bounds of pyproject.toml must be what works. The extra mcp needs later versions of some than the others do.
lowest: $(VENV)/stamp-dev
	$(BIN)/uv venv --quiet --clear --seed --python $(BIN)/python $(VENV)-lowest
	$(BIN)/uv pip install --quiet --python $(VENV)-lowest/bin/python --resolution lowest-direct --editable '.[dev]'
	$(VENV)-lowest/bin/python -m pytest $(WITHOUT_ENGINES) --ignore tests/test_mcp_tools.py

lint: $(VENV)/stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/stamp-dev engine
	$(BIN)/python benchmarks/run_all.py $(ARGS)

clean:
	rm -rf $(VENV) $(VENV)-lowest .pytest_cache .mypy_cache .ruff_cache
