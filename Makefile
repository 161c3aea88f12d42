# Any Python from 3.11 on. A Detectron2 that it can import already is used as it is.
PYTHON ?= $(shell python3.11 -V >/dev/null 2>&1 && echo python3.11 || echo python3)

.PHONY: setup demo test nightly lint docs linkcheck benchmark clean

setup: .venv/.ready

demo: .venv/.ready
	.venv/bin/python tools/demo.py

# Idle OpenMP threads that spin would slow down tests that train in several processes.
test nightly: export OMP_WAIT_POLICY := PASSIVE
# Tiny models gain nothing from a second thread; files of tests run side by side instead.
test nightly: export OMP_NUM_THREADS := 1
PYTEST = .venv/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile
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

# A broken link or reference is an error. Always whole: tables are made from the code.
docs: .venv/.ready
	.venv/bin/python -W ignore -m sphinx -b html -q -aE -W --keep-going -c docs . output/site
	@echo output/site/index.html

# Needs a network. Its list of broken links is output/linkcheck/output.txt.
linkcheck: .venv/.ready
	.venv/bin/python -W ignore -m sphinx -b linkcheck -q -aE -c docs . output/linkcheck

# Fills docs/results/performance and docs/performance.md: make benchmark DEVICE=cuda SIZE=800 BATCH=8, then BATCH=16
DEVICE ?= cpu
SIZE ?= 320
BATCH ?= 2
ROUNDS ?= 5
MEASURE = .venv/bin/python tools/benchmark.py --device $(DEVICE) --image-size $(SIZE) \
	--batch-size $(BATCH) --rounds $(ROUNDS) --json output/benchmark/$(DEVICE)_$(SIZE)x$(BATCH)_$(1).json --config-file configs/$(2)
RIVALS = --methods semckd,fgd,mgd,reviewkd
VARIANTS = $(addprefix --variant ,train.channels_last=False train.channels_last=True \
	model.teacher.fold=False $(BF16) optimizer.fused=True \
	$(if $(HAS_BF16),train.amp.enabled=$(if $(AMP),False,True)) train.activation_checkpointing=True model.teacher.compile=True train.compile=True)
BF16 = model.teacher.precision=bfloat16
AMP = $(if $(filter cuda,$(DEVICE)),train.amp.enabled=True)
# A CPU without instructions for bfloat16 gains nothing by it. Asked once.
HAS_BF16 = $(eval HAS_BF16 := $(if $(filter cpu,$(DEVICE)),$(shell .venv/bin/python -W ignore -c "from sharedkd.modeling.hardware import has_bfloat16; print('yes' if has_bfloat16() else '')"),yes))$(HAS_BF16)
MASK_R50_R18 = custom_coco_mask.py model.teacher.config=COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml
MASK = mask_rcnn_sharedkd.py model.teacher.config=COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_3x.yaml
RETINANET_R50_R18 = custom_coco_retinanet.py model.teacher.config=COCO-Detection/retinanet_R_50_FPN_3x.yaml
R50_R18 = custom_coco.py model.teacher.config=COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml

# Name, config, and flags of the first run; the second one, with the teacher in bfloat16, only where that is fast.
define BOTH
$(call MEASURE,$(1),$(2)) $(AMP) $(3)
$(if $(HAS_BF16),$(call MEASURE,$(1)_bf16,$(2)) $(AMP) $(BF16))
endef

benchmark: .venv/.ready
	rm -rf output/benchmark
	$(call BOTH,faster_rcnn_r50_r18,$(R50_R18),$(RIVALS) $(VARIANTS) --growth --processes 2)
	$(call BOTH,mask_rcnn_r50_r18,$(MASK_R50_R18))
	$(call BOTH,retinanet_r50_r18,$(RETINANET_R50_R18))
	$(call BOTH,faster_rcnn_r101_r50,faster_rcnn_sharedkd.py)
	$(call BOTH,mask_rcnn_r101_r50,$(MASK))
	$(call BOTH,retinanet_r101_r50,retinanet_sharedkd.py,--rounds 9)
	.venv/bin/python tools/benchmark_tables.py output/benchmark docs/results/performance docs/performance.md

# `*.*` leaves out __pycache__, which an installation touches.
.venv/.ready: requirements.txt setup.py packaging/setup_env.py $(wildcard packaging/detectron2/*.*)
	$(PYTHON) packaging/setup_env.py
	@touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build projects/SharedKD/*.egg-info
	find packaging projects tests tools -name __pycache__ -prune -exec rm -rf {} +
