"""Training settings shared by all configs; projects/SharedKD/sharedkd/config.py explains the keys."""

from omegaconf import OmegaConf

from sharedkd.config import TRAIN_DEFAULTS

train = OmegaConf.create(TRAIN_DEFAULTS)
