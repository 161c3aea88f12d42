"""Distillation methods by name: what code outside of this package imports."""

from sharedkd.config.methods import DEFAULT, OWN, PLAIN, START, with_method
from sharedkd.modeling.recipes import FAMILIES, Method, known_methods, stages_of

__all__ = [
    "DEFAULT",
    "FAMILIES",
    "OWN",
    "PLAIN",
    "START",
    "Method",
    "known_methods",
    "stages_of",
    "with_method",
]
