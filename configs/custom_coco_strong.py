"""Own COCO-format data: custom_coco.py with strong augmentation, for long runs."""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L

from .custom_coco import data, dataloader, lr_multiplier, model, optimizer, train

data.short_edge = [176, 208, 240, 272, 304]
_mapper = dataloader["train"].mapper
_mapper.augmentations = [
    L(T.RandomApply)(
        tfm_or_aug=L(T.RandomCrop)(crop_type="relative_range", crop_size=[0.6, 0.6]), prob=0.5
    ),
    L(T.RandomBrightness)(intensity_min=0.6, intensity_max=1.4),
    L(T.RandomContrast)(intensity_min=0.6, intensity_max=1.4),
    L(T.RandomSaturation)(intensity_min=0.6, intensity_max=1.4),
    # The last, so that a teacher with a scale sees the file's own pixels.
    *_mapper.augmentations,
]
