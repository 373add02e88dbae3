# Everything a person does with this repository. `make help` lists it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA_DIR ?= var/demo

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format typecheck protos breaking bench docs constraints clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.complete ## create .venv with everything the project needs

$(VENV)/.complete: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; this is %d.%d. Name another: make PYTHON=python3.12 …" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV) || { echo "The venv module is missing: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: setup ## run the whole stack here with simulated devices; DURATION=20 DEVICES=200 to end by itself
	@$(BIN)/atlasco demo --data-dir $(DATA_DIR) \
		$(if $(DURATION),--duration $(DURATION)) $(if $(DEVICES),--devices $(DEVICES)) $(if $(RATE),--rate $(RATE))

test: setup node_modules lint typecheck ## check and test everything; PYTEST='tests/gateway -k lanes' for a part
	$(BIN)/pytest $(if $(PYTEST),$(PYTEST),--numprocesses 2 --dist loadfile)

lint: setup ## style and protocol
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup ## rewrite to the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: setup ## static types
	$(BIN)/mypy

# The protocol's linter comes as a Node package; without npm its test is skipped, in CI it fails.
node_modules: package.json
	@if command -v npm >/dev/null; then npm install --silent --no-audit --no-fund && touch $@; \
	else echo "npm is missing: the protocol will not be linted (apt-get install npm)"; fi

protos: setup ## generate the Python modules of the protocol
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python protos/generate.py

docs: setup ## generate the reference pages that come from code
	$(BIN)/python docs/generate.py

breaking: node_modules ## compare the protocol with the last commit
	npx --no-install buf breaking --against '.git#branch=main'

bench: setup ## measure; one JSON line per measure. QUICK=1 for about five minutes
	@$(BIN)/python -m bench $(if $(QUICK),--quick)

constraints: setup ## write down the versions that are installed now
	$(BIN)/python -m pip freeze --exclude-editable | grep -v ' @ ' > constraints.txt

clean: ## remove what the other targets made
	rm -rf $(VENV) .venv-checkov node_modules var .mypy_cache .ruff_cache .pytest_cache .hypothesis
