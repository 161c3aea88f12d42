"""Training settings shared by all configs; sharedkd/config/defaults.py says what each key means."""

from omegaconf import OmegaConf

from sharedkd.config import TRAIN_DEFAULTS

train = OmegaConf.create(TRAIN_DEFAULTS)
