#!/bin/sh
# `make gpu`: the tests marked cuda, then the benchmark of two pairs, within 8 minutes on an NVIDIA GPU.
# WHEELS=FOLDER: nothing is downloaded. What the folder holds is installed beside the packages of
# $PYTHON, into output/gpu. Without it, the environment of `make setup` is used.
set -e
cd "$(dirname "$0")/.."
stop() { echo "make gpu: $*" >&2; exit 1; }
[ -e /dev/nvidiactl ] || [ -e /dev/dxg ] || nvidia-smi -L >/dev/null 2>&1 || stop "there is no NVIDIA GPU here"

python=.venv/bin/python
if [ -n "$WHEELS" ]; then
    ls "$WHEELS"/*.whl >/dev/null 2>&1 || stop "WHEELS=$WHEELS holds no *.whl, fill it with: make wheels WHEELS=$WHEELS"
    python=${PYTHON:-python3}
    "$python" -m pip install --quiet --no-index --no-deps --upgrade --target output/gpu "$WHEELS"/*.whl
    export PYTHONPATH="$PWD/projects/SharedKD:$PWD/output/gpu"
else
    make .venv/.ready
fi
"$python" -c "import torch; torch.empty(1, device='cuda')" 2>/dev/null || stop "$python has no torch that can use this GPU"

records=docs/results/performance
mkdir -p $records
"$python" -m pytest -q tests/gpu -m cuda -rA >$records/gpu_tests.txt 2>&1 || { cat $records/gpu_tests.txt; stop "tests fail"; }
tail -n 1 $records/gpu_tests.txt

measure() {
    name=$1
    shift
    "$python" tools/benchmark.py --device cuda --image-size 800 --batch-size 8 --rounds 7 --starts 1 \
        --json "$records/cuda_800x8_$name.json" --config-file "$@" train.amp.enabled=True
}
measure faster_rcnn_r50_r18 configs/custom_coco.py model.teacher.config=COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml
measure retinanet_r101_r50 configs/retinanet_sharedkd.py
echo "make gpu: commit $records, and docs/performance.md once .venv/bin/python docs/generate.py has filled it"
