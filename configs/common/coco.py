"""COCO 2017, 2x schedule (24 epochs), batch 16: what all published pairs share."""

from detectron2.model_zoo import get_config

from sharedkd.data.loader import build_test_loader, build_train_loader

from .train import train

dataloader = get_config("common/data/coco.py").dataloader
# The same images and augmentations, but repeatable and resumable.
dataloader.train._target_ = build_train_loader
dataloader.train.seed = "${train.seed}"
dataloader.train.update(on_bad_image="error", max_bad_images=0.01)
dataloader.test._target_ = build_test_loader

optimizer = get_config("common/optim.py").SGD
lr_multiplier = get_config("common/coco_schedule.py").lr_multiplier_2x

train.max_iter = 180000
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
