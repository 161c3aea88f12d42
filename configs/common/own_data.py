"""Own COCO-format data: set the first four keys on the command line; the rest has defaults."""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.data import get_detection_dataset_dicts
from detectron2.evaluation import COCOEvaluator

from sharedkd.data.images import ImageMapper
from sharedkd.data.loader import build_test_loader, build_train_loader

data = dict(
    train_json=None,  # COCO-format annotations to train on, one file or a list
    val_json=None,  # those to evaluate on
    train_images=None,  # folder of the images that train_json names
    val_images=None,  # folder of those of val_json; it may be the same one
    name="own",  # the data set's name in Detectron2's catalog: own_train, own_val
    num_classes=None,  # counted in the json
    classes=None,  # their names, from the json
    masks=False,  # load instance masks
    repair=True,  # what has one meaning is repaired in memory, and said; False: refused
    image_range=None,  # [lo, hi] of images beyond 8 bits that become 0 and 255; None: by their type
    short_edge=[224, 240, 256],  # training sizes in pixels, one drawn per image
    test_short_edge=240,  # size in evaluation
    max_size=480,  # of the longer edge
)

# Where the command of custom_coco_teacher.py in docs/own_data.md puts the teacher.
trained_teacher = dict(
    teacher="output/teacher/config.yaml", weights="output/teacher/model_final.pth"
)

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
