"""Own COCO-format data: data.train_json, val_json, train_images and val_images come from the command line."""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.data import get_detection_dataset_dicts
from detectron2.evaluation import COCOEvaluator
from omegaconf import OmegaConf

from sharedkd.config import DATA_DEFAULTS
from sharedkd.data.images import ImageMapper
from sharedkd.data.loader import build_test_loader, build_train_loader

data = OmegaConf.create(DATA_DEFAULTS)  # sharedkd/config/defaults.py says what each key means

dataloader = dict(
    train=L(build_train_loader)(
        dataset=L(get_detection_dataset_dicts)(names="${data.name}_train", filter_empty=False),
        mapper=L(ImageMapper)(
            is_train=True,
            augmentations=[
                L(T.ResizeShortestEdge)(
                    short_edge_length="${data.short_edge}",
                    sample_style="choice",
                    max_size="${data.max_size}",
                ),
                L(T.RandomFlip)(horizontal=True),
            ],
            image_format="RGB",
            image_range="${data.image_range}",
            strong_augmentation="${data.strong_augmentation}",
            use_instance_mask="${data.masks}",
            instance_mask_format="bitmask",
        ),
        total_batch_size=4,
        num_workers=2,
        seed="${train.seed}",
        repeat_threshold=0.0,  # images of classes in a smaller share of them are repeated; 0: none
        on_bad_image="error",  # or "skip": log it, and train on another in its place
        max_bad_images=0.01,  # that may be skipped: share of the data set, or a whole number
    ),
    test=L(build_test_loader)(
        dataset=L(get_detection_dataset_dicts)(names="${data.name}_val", filter_empty=False),
        mapper=L(ImageMapper)(
            is_train=False,
            augmentations=[
                L(T.ResizeShortestEdge)(
                    short_edge_length="${data.test_short_edge}", max_size="${data.max_size}"
                ),
            ],
            image_format="${dataloader.train.mapper.image_format}",
            image_range="${data.image_range}",
        ),
        num_workers=2,
    ),
    evaluator=L(COCOEvaluator)(dataset_name="${data.name}_val", max_dets_per_image=100),
)
