"""Shared-KD, the student's levels learning from each other in both directions."""

from ..shared_kd import paper, stages

for _stages in stages.values():
    _stages.cross.loss.direction = "mutual"
