# Any Python from 3.11 on. A Detectron2 that it can import already is used as it is.
PYTHON ?= $(shell python3.11 -V >/dev/null 2>&1 && echo python3.11 || echo python3)

.PHONY: setup demo test nightly lint docs linkcheck benchmark gpu wheels clean

setup: .venv/.ready

demo: .venv/.ready
	.venv/bin/python tools/demo.py

# Idle OpenMP threads that spin would slow down tests that train in several processes.
test nightly: export OMP_WAIT_POLICY := PASSIVE
# Tiny models gain nothing from a second thread; files of tests run side by side instead.
test nightly: export OMP_NUM_THREADS := 1
PYTEST = .venv/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
test: .venv/.ready
	$(PYTEST)

# Kills runs, trains for longer, reads broken annotations, opens a browser, builds the site: docs/reliability.md.
nightly: export KILLS ?= 10
nightly: .venv/.ready
	$(PYTEST) -m nightly

lint: .venv/.ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

# A broken link or reference is an error. Always whole: the API is read from the code.
docs: .venv/.ready
	.venv/bin/python -W ignore -m sphinx -b html -q -aE -W --keep-going -c docs . output/site
	@echo output/site/index.html

# Needs a network. Its list of broken links is output/linkcheck/output.txt.
linkcheck: .venv/.ready
	.venv/bin/python -W ignore -m sphinx -b linkcheck -q -aE -c docs . output/linkcheck

# Fills docs/results/performance and docs/performance.md. On a GPU: make benchmark DEVICE=cuda SIZE=800 BATCH=8
DEVICE ?= cpu
SIZE ?= 320
BATCH ?= 2
ROUNDS ?= 7
RECORDS = docs/results/performance
MEASURE = .venv/bin/python tools/benchmark.py --device $(DEVICE) --image-size $(SIZE) --batch-size $(BATCH) \
	--rounds $(ROUNDS) --json $(RECORDS)/$(DEVICE)_$(SIZE)x$(BATCH)_$(1).json --config-file configs/$(2) $(AMP)
AMP = $(if $(filter cuda,$(DEVICE)),train.amp.enabled=True)
TEACHER = model.teacher.config=COCO-

benchmark: .venv/.ready
	$(call MEASURE,faster_rcnn_r50_r18,custom_coco.py) $(TEACHER)Detection/faster_rcnn_R_50_FPN_3x.yaml \
		--methods semckd,fgd,mgd,reviewkd,dkd,dist,pgd,foundation
	$(call MEASURE,mask_rcnn_r50_r18,custom_coco_mask.py) $(TEACHER)InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml
	$(call MEASURE,retinanet_r50_r18,custom_coco_retinanet.py) $(TEACHER)Detection/retinanet_R_50_FPN_3x.yaml
	$(call MEASURE,faster_rcnn_r101_r50,faster_rcnn_sharedkd.py)
	$(call MEASURE,mask_rcnn_r101_r50,mask_rcnn_sharedkd.py) $(TEACHER)InstanceSegmentation/mask_rcnn_R_101_FPN_3x.yaml
	$(call MEASURE,retinanet_r101_r50,retinanet_sharedkd.py) --methods bckd,crosskd
	.venv/bin/python docs/generate.py

# Tests and the benchmark of two pairs on an NVIDIA GPU. Without a network: make wheels WHEELS=FOLDER on
# another machine, then make gpu WHEELS=FOLDER on that one.
gpu:
	@packaging/gpu.sh

# For the Python and the kind of machine that it runs on. A machine without torch needs those of requirements.txt, too.
wheels:
	$(PYTHON) -m pip wheel --no-deps --wheel-dir $(WHEELS) --constraint requirements.txt --requirement packaging/gpu.txt

# `*.*` leaves out __pycache__, which an installation touches.
.venv/.ready: requirements.txt setup.py packaging/setup_env.py $(wildcard packaging/detectron2/*.*)
	$(PYTHON) packaging/setup_env.py
	@touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build projects/SharedKD/*.egg-info
	find packaging projects tests tools -name __pycache__ -prune -exec rm -rf {} +
