"""Times of work that takes turns, so that what slows the machine down slows all of it alike."""

import time
from statistics import median
from typing import Callable, Dict, List, Mapping, Optional, Sequence

import torch

__all__ = ["spread", "take_turns"]


def take_turns(
    arms: Mapping[str, Callable[[], object]],
    rounds: int,
    warm_up: int,
    clock: Optional[Callable[[], float]] = None,
) -> Dict[str, List[float]]:
    """Seconds of each of ``arms``, one per round; each round starts with another arm.

    An arm does its work once per call.  The ``warm_up`` rounds come first and are not counted.

    Args:
        clock: returns a time in seconds; None: that on the wall, when the GPU has done its work.
    """
    names, clock = list(arms), clock or _now
    seconds: Dict[str, List[float]] = {name: [] for name in names}
    for turn in range(-warm_up, rounds):
        first = turn % len(names)
        for name in [*names[first:], *names[:first]]:
            start = clock()
            arms[name]()
            if turn >= 0:
                seconds[name].append(clock() - start)
    return seconds


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def spread(values: Sequence[float]) -> Dict[str, float]:
    """Median, least and greatest of ``values``."""
    return {"median": median(values), "low": min(values), "high": max(values)}
