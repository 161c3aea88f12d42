"""Distillation losses, one per file."""

from .base import Batch, DistillationLoss
from .cross_layer import CrossLayer
from .identical_layer import IdenticalLayer

__all__ = ["Batch", "CrossLayer", "DistillationLoss", "IdenticalLayer"]
