"""Finds where in a step numbers became infinite or NaN."""

from collections import defaultdict
from contextlib import ExitStack
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple

import torch
from detectron2.utils import comm
from torch import Tensor, nn

from sharedkd.modeling.snapshot import without_trace
from sharedkd.modeling.taps import FeatureTap

__all__ = ["find_culprits"]


def find_culprits(trainer: Any, step: Any, together: bool) -> List[str]:
    """Find where a step broke: run it once more and check every map.

    Its random draws depend on seed and iteration, so it breaks in the same place again.  On a GPU,
    where losses are read later, good steps may have changed the weights since; bad steps change none.

    Args:
        trainer: a :class:`~sharedkd.engine.trainer.SharedKDTrainer`.
        step: its :class:`~sharedkd.engine.trainer.Step`.
        together: all ranks call this for the same step; False: only this rank does.

    Returns:
        as text, the first values that were not finite: weights; else images and ground truth, else
        the first maps of each detector, by tap and stride; else gradients.  With several ranks each line
        begins with its rank; students with SyncBatchNorm are then not looked at.
    """
    if comm.get_world_size() == 1:
        return _culprits(trainer, step)
    if any("SyncBatchNorm" in type(m).__name__ for m in trainer.module.modules()):
        return []  # its forward waits for the other ranks, which may have broken elsewhere
    found = _culprits(trainer, step)
    ranks = enumerate(comm.all_gather(found)) if together else [(comm.get_rank(), found)]
    return [f"rank {rank}: {x}" for rank, each in ranks for x in each]


def _culprits(trainer: Any, step: Any) -> List[str]:
    bad = _bad_names(trainer.module.named_parameters())
    if bad:
        return [f"weights: {_range(bad)}"]
    bad = [x for batch in step.batches for record in batch for x in _bad_parts(record)]
    if bad:
        return bad
    maps: Dict[Tuple[str, str], Dict[int, None]] = defaultdict(dict)
    with without_trace(trainer.module):
        for part, batch in enumerate(step.batches):
            with _looked_at(trainer, maps):
                try:
                    total = sum(trainer.repeat(step, batch, part).values())
                except FloatingPointError:
                    continue
            if not maps and torch.isfinite(total):
                params = {k: p for k, p in trainer.module.named_parameters() if p.requires_grad}
                grads = torch.autograd.grad(total, [*params.values()], allow_unused=True)
                bad += _bad_names(zip(params, grads))
    first: Dict[str, str] = {}  # all maps after the first bad one are bad, too
    for (who, tap), strides in maps.items():
        first.setdefault(who, f"{who}'s {tap} map of stride {', '.join(map(str, strides))}")
    if first or not bad:
        return list(first.values())
    return [f"gradient of {_range(list(dict.fromkeys(bad)))}"]


def _bad_names(tensors: Iterable[Tuple[str, Tensor]]) -> List[str]:
    return [name for name, x in tensors if x is not None and not torch.isfinite(x).all()]


def _range(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)} parameters)"


def _bad_parts(record: Mapping[str, Any]) -> Iterator[str]:
    """Name the image and the boxes of a data loader's record if they are not finite."""
    name = record.get("file_name", "without a file name")
    if not torch.isfinite(record["image"]).all():
        yield f"image {name}"
    truth = record.get("instances")
    if hasattr(truth, "gt_boxes") and not torch.isfinite(truth.gt_boxes.tensor).all():
        yield f"ground-truth boxes of image {name}"


def _looked_at(trainer: Any, maps: Dict[Tuple[str, str], Dict[int, None]]) -> ExitStack:
    """A context that records maps that are not finite: (detector, tap) -> strides."""
    stack = ExitStack()
    pyramid = getattr(trainer.module, "pyramid", None)
    detectors: Dict[str, Tuple[nn.Module, Optional[str]]] = {"student": (trainer.detector, pyramid)}
    for name, source in getattr(trainer.module, "sources", {}).items():
        if source.detector is not None:
            pyramid = getattr(source, "pyramid", None)
            detectors[f"teacher {name}" if name else "teacher"] = (source.detector, pyramid)
    for who, (detector, pyramid) in detectors.items():

        def look(tap: str, levels: Dict[int, Tensor], who: str = who) -> None:
            for stride, x in levels.items():
                if not torch.isfinite(x).all():
                    maps[who, tap][stride] = None

        if pyramid or hasattr(getattr(detector, "backbone", None), "output_shape"):
            stack.enter_context(FeatureTap(detector, pyramid).each(look))
    return stack
