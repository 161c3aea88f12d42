"""Shared Knowledge Distillation for Detectron2: a large detector teaches a small one.

config -> pair -> student and teacher features -> losses -> stages -> trainer -> student checkpoint
"""

from sharedkd.engine.trainer import SharedKDTrainer
from sharedkd.errors import ConfigError, NonFiniteLossError, RunError, SharedKDError
from sharedkd.losses import CrossLayer, DistillationLoss, IdenticalLayer
from sharedkd.modeling.meta_arch import SharedKD
from sharedkd.modeling.stages import Stage
from sharedkd.modeling.teachers.frozen import FrozenTeacher

__all__ = [
    "ConfigError",
    "CrossLayer",
    "DistillationLoss",
    "FrozenTeacher",
    "IdenticalLayer",
    "NonFiniteLossError",
    "RunError",
    "SharedKD",
    "SharedKDError",
    "SharedKDTrainer",
    "Stage",
]
