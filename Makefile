# make demo, make test and make style each set up .venv by themselves; make help lists the rest.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help demo measure measure-parser test test-eval test-app page load style demo-model clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(READY): requirements.txt requirements-dev.txt constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.11 ...')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements-dev.txt -c constraints.txt
	touch $@

demo: $(READY)  ## try drawn cloths on drawn people, and show the picture
	$(BIN)/python -m demo.try_on --output_dir runs/demo

measure: $(READY)  ## the figures of the demo model in docs/measured.md, on 64 held-out lines
	$(BIN)/python -m demo.measure

HELD_OUT := $(foreach category,upper lower dress,runs/parser-held-out/$(category))

runs/parser-held-out/%: | $(READY)
	rm -rf $@.unfinished
	$(BIN)/python -m demo.make_dataset --output_dir $@.unfinished --category $* --train 0 --test 64 --height 128 --seed 22
	mv $@.unfinished $@

measure-parser: $(READY) $(HELD_OUT)  ## the IoU of the demo's human parser, on 192 people of another seed
	$(BIN)/python -m demo.train_parser --dataset_root $(HELD_OUT) --score demo/model

test: $(READY)  ## run the tests
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-eval:  ## test the metrics with torchvision's and torch-fidelity's classes, in an environment of its own (5.5 GB)
	$(PYTHON) -m venv .venv-eval
	.venv-eval/bin/python -m pip install -q -r requirements-eval.txt -r requirements-dev.txt
	.venv-eval/bin/python -m pytest -p no:xdist tests/test_evaluate.py tests/test_losses.py

APP_READY := .venv/.ready-app

$(APP_READY): $(READY) requirements-app.txt requirements-app-dev.txt constraints.txt
	$(BIN)/python -m pip install -q -r requirements-app-dev.txt -c constraints.txt
	touch $@

page: $(APP_READY)  ## serve the try-on page on http://127.0.0.1:7860
	$(BIN)/python app.py

test-app: $(APP_READY)  ## test the page in a real Chromium (apt-get install chromium)
	$(BIN)/python -m pytest --override-ini addopts="-q --durations=10" tests/test_app.py

load: $(APP_READY)  ## forty visitors at the page at once, on the demo model
	$(BIN)/python -m benchmarks.load

style: $(READY)  ## check format and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

demo-model: $(READY)  ## train demo/model again, from nothing, on a GPU (for a CPU see the head of demo/train_model.sh); goes on where it stopped
	bash demo/train_model.sh

clean:  ## remove the environments; what was trained and made, under runs/, stays
	rm -rf .venv .venv-eval
