"""Shared-KD with its cross-layer part, the levels learning from each other in both directions."""

from ..shared_kd import paper, stages

for _stages in stages.values():
    _stages.cross.weight = "auto"
    _stages.cross.loss.direction = "mutual"
