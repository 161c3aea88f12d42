"""Distillation losses, one per file."""

from .base import Batch, DistillationLoss, Regions
from .bckd import BCKD
from .cosine import Cosine
from .cross_layer import CrossLayer
from .crosskd import CrossKD, RegionCrossKD
from .cwd import CWD
from .dist import DIST, DenseDIST
from .dkd import DKD, DenseDKD
from .feature_fusion import FeatureFusion
from .fgd import FGD
from .fitnets import FitNets
from .fkd import FKD
from .frs import FRS
from .gan_kd import GanKD
from .gid import GID
from .identical_layer import IdenticalLayer
from .improved_kd import ImprovedKD
from .mgd import MGD
from .pgd import PGD
from .pkd import PKD
from .reviewkd import ReviewKD
from .semckd import SemCKD

__all__ = [
    "BCKD",
    "CWD",
    "DIST",
    "DKD",
    "FGD",
    "FKD",
    "FRS",
    "GID",
    "MGD",
    "PGD",
    "PKD",
    "Batch",
    "Cosine",
    "CrossKD",
    "CrossLayer",
    "DenseDIST",
    "DenseDKD",
    "DistillationLoss",
    "FeatureFusion",
    "FitNets",
    "GanKD",
    "IdenticalLayer",
    "ImprovedKD",
    "Regions",
    "RegionCrossKD",
    "ReviewKD",
    "SemCKD",
]
