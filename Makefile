# make run                            the five stages on drawn faces, at CPU size, in runs/synthetic
# make run DATA=path/UTKFace.tar.gz   the same on UTKFace, in runs/utkface
# make best DATA=path/UTKFace.tar.gz  the best recipe at a size for two CPU cores, in runs/best-cpu; hours
#                                     SIZE=gpu: at the size of configs/gpu.yaml, in runs/best-gpu
#                                     FLAGS='--seed 1' goes to both trainings; where another one lies in the
#                                     folder, FLAGS='--seed 1 --overwrite'
# make table DATA=path/UTKFace.tar.gz trains and compares every setting of tools/table.py, in runs/utkface;
#                                     wants a GPU
# make test                           the test suite
# make soak                           the suite's kills, 24 of them
# Each makes its own .venv first. PYTHON=python3.12 picks another interpreter, for the first time. What was
# stopped goes on where it stood when the same line is given again.

PYTHON ?= python3
BIN := .venv/bin
SIZE ?= cpu
RESUME := $(if $(findstring --overwrite,$(FLAGS)),,--resume)
RUN_DIR := runs/$(if $(DATA),utkface,synthetic)
# Every folder of a run is two below this one, and no path but DATA is absolute: either may hold spaces.
SCRIPT = cd $(RUN_DIR) && ../../$(BIN)/python ../..
CONFIG := --config configs/quickstart.yaml
INPUT := $(if $(DATA),--input "$(if $(filter /%,$(firstword $(DATA))),,../../)$(DATA)")

.PHONY: data run best table test soak

data: .venv/run-installed
	mkdir -p $(RUN_DIR)
	$(if $(DATA),,$(SCRIPT)/tools/synthesize.py $(CONFIG))
	$(SCRIPT)/masks.py $(CONFIG) $(INPUT)
	$(SCRIPT)/split.py $(CONFIG)

run: data
	$(SCRIPT)/pretrain.py $(CONFIG) --resume
	$(SCRIPT)/finetune.py $(CONFIG) --resume
	$(SCRIPT)/evaluate.py $(CONFIG)
	@echo "Look at $(RUN_DIR): dataset/processed/preview.png, contrastive.png, model.png, results/*.png"

best: CONFIG := --config configs/$(SIZE).yaml
best: RUN_DIR := runs/best-$(SIZE)$(if $(DATA),,-synthetic)
best: data
	$(SCRIPT)/pretrain.py $(CONFIG) $(RESUME) $(FLAGS)
	$(SCRIPT)/finetune.py $(CONFIG) --multitask --lr-strategy differentiated --init contrastive.pt $(RESUME) $(FLAGS)
	$(SCRIPT)/evaluate.py

table: data
	$(SCRIPT)/tools/table.py $(FLAGS)

test: .venv/test-installed
	$(BIN)/python -m pytest -q tests

soak: .venv/test-installed
	KILLS=8 $(BIN)/python -m pytest -q tests/test_faults.py -k killed

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: PYTHON=python3.12")'
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/run-installed: requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@

.venv/test-installed: requirements-dev.txt .venv/run-installed
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	touch $@
