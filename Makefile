# make demo, make test and make style each set up .venv by themselves; make help lists the rest.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help demo measure test test-eval style demo-model clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(READY): requirements.txt requirements-dev.txt constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.11 ...')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements-dev.txt -c constraints.txt
	touch $@

demo: $(READY)  ## try drawn cloths on drawn people, and show the picture
	$(BIN)/python -m demo.try_on --output_dir runs/demo

measure: $(READY)  ## the README's figures of the demo model, on 64 held-out lines
	$(BIN)/python -m demo.measure

test: $(READY)  ## run the tests
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-eval:  ## test the metrics with torchvision's and torch-fidelity's classes, in an environment of its own (5.5 GB)
	$(PYTHON) -m venv .venv-eval
	.venv-eval/bin/python -m pip install -q -r requirements-eval.txt -r requirements-dev.txt
	.venv-eval/bin/python -m pytest -p no:xdist tests/test_evaluate.py

style: $(READY)  ## check format and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

demo-model: $(READY)  ## train demo/model again, from nothing (many hours on two cores; goes on where it stopped)
	bash demo/train_model.sh

clean:  ## remove the environment and everything under runs/
	rm -rf .venv .venv-eval runs
