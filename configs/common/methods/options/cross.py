"""Shared-KD with its cross-layer part."""

from ..shared_kd import paper, stages

for _stages in stages.values():
    _stages.cross.weight = "auto"
