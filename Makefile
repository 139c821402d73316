# A fresh machine needs Python >= 3.10 and make; every target sets up .venv by itself.
#
#   make figures                      another interpreter:  make figures PYTHON=python3.12
#
# On Linux, PyPI's torch brings several gigabytes of CUDA libraries. Without a GPU, take the CPU
# build of the same version; it is preferred as soon as pip is shown the index that has it:
#
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make figures

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
READY  := $(VENV)/.installed
BROWSER := $(VENV)/.browser
STEPS  ?= --fast # of the targets of `make real`
PIP    := $(PY) -m pip install --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help figures paper real model-tables test test-all coverage test-browser docs bench bench-gpu gpu lint lab notebooks review models clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

figures: $(READY) ## the main job on the bundled models: figures and tables in figures/out
	$(PY) figures/figures.py

paper: $(READY) ## all methods, ablations and loads (an hour; goes on where it stopped)
	$(PY) figures/paper.py

real: $(READY) ## the study on the real models that are fetched: figures/results/real, up to 3 hours; goes on (OPTIONS='--texts FILE', or STEPS= for published ones)
	$(PIP) -e '.[gguf]'
	$(PY) figures/real_study.py --record $(STEPS) $(OPTIONS)

model-tables: $(READY) ## every method on each model that is here, step by step (bundled 5 minutes each, real ones over half an hour; goes on)
	$(PY) figures/model_tables.py

test: lint ## lint, tests and notebooks on few facts, without a network
	$(OFFLINE) $(ONE) $(PY) -m pytest -n 2 --dist loadfile -m "not slow" $(COVER)
	$(PY) tests/shorten.py build/short
	$(OFFLINE) $(ONE) $(PY) -m pytest -n 2 --nbmake --nbmake-timeout=600 build/short/notebooks

coverage: ## `make test`, and the branches of pmet_lens that its tests take (explorer left out)
	$(MAKE) test COVER="--cov --cov-report=term:skip-covered"

test-all: lint ## every test, with checked shapes, and the notebooks at full size
	$(OFFLINE) $(ONE) PMET_LENS_SHAPES=1 $(PY) -m pytest -n 2 --dist loadfile
	$(OFFLINE) $(ONE) $(PY) -m pytest -n 2 --nbmake --nbmake-timeout=600 notebooks

docs: $(VENV)/.docs ## API reference, paper and code, notebooks: docs/_build/html/index.html (half a minute)
	$(OFFLINE) $(PY) -m sphinx -E -W --keep-going -q -c docs -d docs/_build/doctrees . docs/_build/html

test-browser: $(BROWSER) ## notebooks and explorer in JupyterLab, Notebook 7 and Chromium (5 minutes)
	$(OFFLINE) $(ONE) $(PY) -m pytest --confcutdir=tests/browser tests/browser

bench: $(READY) ## speed against the procedure written plainly, and of a real model against before
	$(OFFLINE) $(BENCH) tests/benchmarks

bench-gpu: $(READY) ## the same on a GPU, and the shapes of GPT-J-6B
	$(OFFLINE) $(BENCH) tests/benchmarks --device=cuda
	$(OFFLINE) $(PY) tests/benchmarks/gptj_shapes.py

gpu: $(READY) ## ten minutes of a GPU: tests, 10,000 edits, GPT-J's shapes, benchmarks (FACTS= and TEXTS= name files)
	$(PIP) -e '.[gguf]'
	$(VENV)/bin/pmet-lens models --fetch smollm2-135m
	$(PY) figures/gpu.py --facts '$(FACTS)' --texts '$(TEXTS)'

lint: $(READY) ## ruff and pyright
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(OFFLINE) $(PY) -m pyright --pythonpath $(PY)

lab: $(READY) ## JupyterLab on notebooks/
	$(PY) -m jupyter lab --notebook-dir=notebooks

notebooks: $(READY) ## run the notebooks again and keep their outputs, and their review copies
	$(OFFLINE) $(INLINE) TQDM_DISABLE=1 $(PY) -m pytest --nbmake --nbmake-timeout=600 --overwrite notebooks
	$(MAKE) review

review: $(READY) ## the review copies of the notebooks alone: notebooks/review
	$(PY) -m jupytext -q --opt notebook_metadata_filter=-all --opt cell_metadata_filter=tags,-all \
	  --to review//py:percent notebooks/*.ipynb
	$(PY) -m ruff format -q notebooks/review

models: $(READY) ## train the bundled models (45 CPU-minutes each) and MEND editors (15) again
	$(PY) figures/train_world.py world
	$(PY) figures/train_world.py world-sequential
	$(PY) figures/train_world.py world-unmasked
	$(PY) figures/train_mend.py world
	$(PY) figures/train_mend.py world-sequential

clean: ## remove what commands made: figures/out, docs/_build, tests/*/out, caches, .venv
	rm -rf $(VENV) figures/out docs/_build tests/benchmarks/out tests/browser/out .pytest_cache .ruff_cache .coverage *.egg-info build dist
	find . -type d \
	  \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

# Nothing below a test may reach the network; pyright would ask PyPI for a newer pyright.
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 WANDB_MODE=disabled \
  TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg PYRIGHT_PYTHON_IGNORE_WARNINGS=1

# Figures into the notebook, not into the void that tests draw on.
INLINE := MPLBACKEND=module://matplotlib_inline.backend_inline

# Two processes of one thread each do more than one of two.
ONE := OMP_NUM_THREADS=1

# Without tests/conftest.py, which is for tests.
BENCH := $(PY) -m pytest -q --confcutdir=tests/benchmarks -o python_files='bench_*.py'

TOO_OLD := pmet_lens needs Python 3.10 or newer. Name one that you have: make PYTHON=python3.11
NO_VENV := This Python cannot make virtual environments. \
  On Debian or Ubuntu: sudo apt-get install python3-venv. Or name another: make PYTHON=python3.11
NO_PYTHON := $(PYTHON) is not on this machine. Install Python 3.10 or newer, or name it: make PYTHON=python3.11

# torch comes first: its wheel is the long download, and a failure there is seen at once.
$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(NO_PYTHON)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "$(TOO_OLD)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(NO_VENV)" >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) torch
	$(PIP) -e '.[notebook,dev]'
	@touch $@

# Sphinx and what it brings are wanted by `make docs` alone.
$(VENV)/.docs: $(READY)
	$(PIP) -e '.[docs]'
	@touch $@

NO_CHROMIUM := make test-browser needs Chromium, and only root can install it here: \
  sudo apt-get install chromium, or CHROMIUM=/path/to/chrome make test-browser

# Chromium of the system: the one that playwright would download is not needed.
$(BROWSER): $(READY)
	$(PIP) -e '.[notebook,dev,browser]'
	@for name in "$$CHROMIUM" chromium chromium-browser google-chrome; do \
	  [ -n "$$name" ] && command -v "$$name" >/dev/null && exit 0; done; \
	  [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update && \
	  apt-get install -y --no-install-recommends chromium && exit 0; \
	  echo "$(NO_CHROMIUM)" >&2; exit 1
	@touch $@
