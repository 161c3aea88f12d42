"""Shared Knowledge Distillation for Detectron2: a large detector teaches a small one.

config -> pair -> student and teacher features -> losses -> stages -> trainer -> student checkpoint
"""

from .errors import ConfigError, NonFiniteLossError
from .losses import CrossLayer, DistillationLoss, IdenticalLayer
from .meta_arch import SharedKD
from .stages import Stage
from .teacher import FrozenTeacher
from .trainer import SharedKDTrainer

__all__ = [
    "ConfigError",
    "CrossLayer",
    "DistillationLoss",
    "FrozenTeacher",
    "IdenticalLayer",
    "NonFiniteLossError",
    "SharedKD",
    "SharedKDTrainer",
    "Stage",
]
