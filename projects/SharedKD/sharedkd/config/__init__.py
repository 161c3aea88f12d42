"""LazyConfig: reading a run's config, its defaults, and a pair in a few lines."""

from .build import construct
from .classic import add_sharedkd_config
from .defaults import DATA_DEFAULTS, TRAIN_DEFAULTS
from .load import load_config, student_only
from .overrides import override
from .pair import distill
from .sequence import sequence
from .shared_kd import published_stages, shared_kd_stages

__all__ = [
    "DATA_DEFAULTS",
    "TRAIN_DEFAULTS",
    "add_sharedkd_config",
    "construct",
    "distill",
    "load_config",
    "override",
    "published_stages",
    "sequence",
    "shared_kd_stages",
    "student_only",
]
