"""Shared-KD, the next lower level of the teacher alone shared."""

from ..shared_kd import paper, stages

for _stages in stages.values():
    _stages.identical.loss.share = "adjacent"
