"""The embedded example: a plain ResNet-18 Mask R-CNN on drawn shapes, from random weights.

`tools/demo.py` draws the images, and trains this and the two configs beside it.
"""

from pathlib import Path

import torch
from detectron2.config import LazyCall as L

from sharedkd.lab.shapes import CLASSES, make_shapes
from sharedkd.modeling.hardware import has_bfloat16

from ..common.small_models import tiny_mask_rcnn
from ..custom_coco_mask_plain import data, dataloader, lr_multiplier, optimizer, train

_root = Path(__file__).resolve().parents[2]

shapes = L(make_shapes)(
    root=str(_root / "datasets/shapes"), train=1200, val=150, size=[96, 96], seed=0
)
data.update(
    train_json="${shapes.root}/train.json",
    val_json="${shapes.root}/val.json",
    train_images="${shapes.root}/train",
    val_images="${shapes.root}/val",
    name="shapes",
    num_classes=len(CLASSES),
    short_edge=[80, 96, 112],
    test_short_edge=96,
    max_size=176,
)
dataloader.train.total_batch_size = 8
model = tiny_mask_rcnn(depth=18, num_classes="${data.num_classes}")
optimizer.lr = 1e-3  # from random weights
train.update(max_iter=200, epochs=None, eval_period=0, output_dir=str(_root / "output/demo/plain"))
train.amp.enabled = torch.cuda.is_available() or has_bfloat16()
train.checkpointer.update(period=50, max_to_keep=1)
