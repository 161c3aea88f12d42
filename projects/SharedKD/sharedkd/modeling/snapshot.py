"""Saves and restores what a step changes besides the parameters."""

import random
from contextlib import contextmanager, suppress
from typing import Iterator

import numpy as np
import torch
from detectron2.utils.events import EventStorage, get_event_storage
from torch import nn

__all__ = ["NORMALIZER", "Snapshot", "without_trace"]

#: A running mean that dense detectors keep outside of their state dict.
NORMALIZER = "loss_normalizer"


class Snapshot:
    """A copy of a model's running statistics: its buffers, and the running means of its detectors' losses."""

    def __init__(self, model: nn.Module):
        self._buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        self._normalizers = [(vars(x), vars(x).get(NORMALIZER)) for x in model.modules()]

    @torch.no_grad()
    def restore(self) -> None:
        for buffer, before in self._buffers:
            buffer.copy_(before)
        for attributes, before in self._normalizers:
            if before is not None:
                attributes[NORMALIZER] = before
            else:
                attributes.pop(NORMALIZER, None)


@contextmanager
def without_trace(model: nn.Module) -> Iterator[None]:
    """A context for a forward in training mode that changes no statistics, random state or log."""
    snapshot, now = Snapshot(model), 0
    with suppress(AssertionError):  # outside of a training there is none
        now = get_event_storage().iter  # by which an average of the student knows its steps
    states = random.getstate(), np.random.get_state()
    devices = {p.device for p in model.parameters() if p.is_cuda}
    try:
        # The detectors log from their forward.
        with torch.random.fork_rng(devices), EventStorage(now):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        snapshot.restore()
