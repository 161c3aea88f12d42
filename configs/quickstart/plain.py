"""The embedded example: a plain ResNet-18 Mask R-CNN on drawn shapes, from random weights.

`tools/demo.py` draws the images, and trains this and the two configs beside it.
"""

from pathlib import Path

import torch
from detectron2.config import LazyCall as L

from sharedkd.data.shapes import CLASSES, make_shapes

from ..custom_coco_mask_plain import data, dataloader, lr_multiplier, model, optimizer, train

_root = Path(__file__).resolve().parents[2]

shapes = L(make_shapes)(
    root=str(_root / "datasets/shapes"), train=600, val=150, size=[128, 128], seed=0
)
data.update(
    train_json="${shapes.root}/train.json",
    val_json="${shapes.root}/val.json",
    train_images="${shapes.root}/train",
    val_images="${shapes.root}/val",
    name="shapes",
    num_classes=len(CLASSES),
    short_edge=[112, 128, 144],
    test_short_edge=128,
    max_size=176,
)
train.update(max_iter=250, eval_period=0, output_dir=str(_root / "output/demo/plain"))
# bfloat16 pays on CPUs that have it in hardware.
train.amp.enabled = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
train.checkpointer.update(period=50, max_to_keep=1)
