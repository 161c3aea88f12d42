"""The kinds of mistakes of a detector, and the cost of each kind in AP50.

Definitions are those of TIDE (Bolya, Foley, Hays and Hoffman, "TIDE: A General Toolbox for Identifying
Object Detection Errors", ECCV 2020), with its foreground IoU 0.5 and background IoU 0.1.  Its package
had its last release in 2020 and needs pandas and seaborn, so they are implemented here.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Dict, List, Sequence, Tuple

import numpy as np

__all__ = ["BACKGROUND", "FOREGROUND", "IN_WORDS", "KINDS", "Match", "ap50", "costs", "match"]

FOREGROUND, BACKGROUND = 0.5, 0.1  # IoU

#: Kinds of mistakes; all but the last are detections, "missed" are objects.
KINDS = {
    "localisation": "right class, but its IoU with the object is between 0.1 and 0.5",
    "classification": "IoU of at least 0.5 with an object of another class",
    "both": "IoU between 0.1 and 0.5 with an object of another class",
    "duplicate": "IoU of at least 0.5 with an object that a surer detection has found",
    "background": "IoU of at most 0.1 with every object",
    "missed": "an object not found, and not the target of a localisation or classification error",
}
#: What the kinds and their costs mean, in Markdown.
IN_WORDS = "\n\n".join(
    [
        "\n".join(f"- *{kind}*: {what}" for kind, what in KINDS.items()),
        "A cost is what AP50 would gain if all mistakes of this kind, and no others, were repaired; "
        "costs do not add up.",
    ]
)
CORRECT, IGNORED = "correct", "ignored"


@dataclass
class Match:
    """The D detections, by falling score, and the G objects of one image, matched."""

    scores: np.ndarray  #: (D,)
    classes: np.ndarray  #: (D,)
    kinds: List[str]  #: "correct", "ignored" (on a crowd region), or one of :data:`KINDS`
    targets: np.ndarray  #: (D,) the object found, or badly placed or named; -1 without one
    iou: np.ndarray  #: (D,) with that object
    truth: np.ndarray  #: (G,) classes of the objects
    crowd: np.ndarray  #: (G,) which of them are regions that count neither way

    def _targets_of(self, *kinds: str) -> np.ndarray:
        return np.array([t for t, kind in zip(self.targets, self.kinds) if kind in kinds], int)

    @property
    def not_found(self) -> np.ndarray:
        """Objects that no detection is right about, (M,) indices."""
        return np.setdiff1d(np.flatnonzero(~self.crowd), self._targets_of(CORRECT))

    @property
    def missed(self) -> np.ndarray:
        """Objects not found that no localisation or classification error is about, (M,) indices."""
        return np.setdiff1d(self.not_found, self._targets_of("localisation", "classification"))

    @property
    def quality(self) -> float:
        """The quality of the detections, from 0 to 1: ``sum of the IoU of correct detections / (correct +
        false alarms / 2 + objects not found / 2)``, which is panoptic quality (Kirillov et al., CVPR
        2019) over all classes; 1 for an image without objects and detections."""
        correct = np.array([kind == CORRECT for kind in self.kinds], bool)
        alarms = len(self.kinds) - correct.sum() - self.kinds.count(IGNORED)
        whole = correct.sum() + (alarms + len(self.not_found)) / 2
        return float(self.iou[correct].sum() / whole) if whole else 1.0


def match(
    scores: Sequence[float],
    classes: Sequence[int],
    iou: np.ndarray,
    truth: Sequence[int],
    crowd: Sequence[bool],
) -> Match:
    """Match as COCO's evaluation does at IoU 0.5, and name every mistake.

    Of the kinds that fit a detection it is the first in the order localisation, classification,
    duplicate, background; what fits none is "both".

    Args:
        scores, classes: of D detections in any order.
        iou: (D, G); with a crowd region, the share of the detection that lies on it.
        truth, crowd: class of each of G objects, and whether it is a crowd region.
    """
    confidence = np.asarray(scores, float)
    order = np.argsort(-confidence, kind="stable")
    labels = np.asarray(classes, int)[order]
    objects, crowds = np.asarray(truth, int), np.asarray(crowd, bool)
    iou = np.asarray(iou, float).reshape(len(labels), len(objects))[order]
    found = np.zeros(len(objects), bool)
    kinds, targets = [], np.full(len(labels), -1)
    for i, label in enumerate(labels):
        same = (objects == label) & ~crowds
        free = np.where(same & ~found, iou[i], -1)
        if free.size and free.max() >= FOREGROUND:
            targets[i] = free.argmax()
            found[targets[i]] = True
            kinds.append(CORRECT)
        elif (iou[i][(objects == label) & crowds] >= FOREGROUND).any():
            kinds.append(IGNORED)
        else:
            kind, targets[i] = _mistake(iou[i], same, ~same & ~crowds)
            kinds.append(kind)
    of_target = np.array([iou[i, t] if t >= 0 else 0.0 for i, t in enumerate(targets)])
    return Match(confidence[order], labels, kinds, targets, of_target, objects, crowds)


def _mistake(iou: np.ndarray, same: np.ndarray, other: np.ndarray) -> Tuple[str, int]:
    """The kind of a false alarm, and the object that it is about (-1: none)."""
    best, best_other = (np.where(which, iou, 0).max(initial=0) for which in (same, other))
    if BACKGROUND < best < FOREGROUND:
        return "localisation", int(np.where(same, iou, -1).argmax())
    if best_other >= FOREGROUND:
        return "classification", int(np.where(other, iou, -1).argmax())
    if best >= FOREGROUND:
        return "duplicate", -1
    return ("background" if best_other <= BACKGROUND else "both"), -1


def costs(matches: Sequence[Match]) -> Dict[str, float]:
    """What AP50 would gain, in points, if all mistakes of one kind were repaired, and no other.

    A localisation or classification error becomes correct, if its object is not found otherwise
    and no surer error of this kind is about it; else it is removed, like all other false alarms.
    Missed objects leave the ground truth.  ``matches`` are of all detections, however unsure.
    """
    now = ap50(matches)
    return {kind: ap50(matches, kind) - now for kind in KINDS}


def ap50(matches: Sequence[Match], repaired: str = "") -> float:
    """COCO's AP at IoU 0.5 over all sizes, as a percentage; NaN without objects.

    ``repaired`` is the one of :data:`KINDS` that is repaired as in :func:`costs`.
    """
    objects = Counter(label for each in matches for label in each.truth[~each.crowd])
    if repaired == "missed":  # and classes without any left with them
        objects -= Counter(label for each in matches for label in each.truth[each.missed])
    right: Dict[int, List[bool]] = defaultdict(list)
    outcomes = [x for each in matches for x in _outcomes(each, repaired)]
    for _, label, correct in sorted(outcomes, key=lambda x: -x[0]):
        right[label].append(correct)
    found = [_average_precision(right[label], count) for label, count in objects.items()]
    return 100 * float(np.mean(found)) if found else float("nan")


def _outcomes(each: Match, repaired: str) -> List[Tuple[float, int, bool]]:
    """(score, class, correct) of the detections that count."""
    outcomes, free = [], set(each.not_found)
    for score, label, kind, target in zip(each.scores, each.classes, each.kinds, each.targets):
        if kind == IGNORED:
            continue
        if kind != CORRECT and kind == repaired:
            if target not in free:
                continue
            free.remove(target)
            label, kind = each.truth[target], CORRECT
        outcomes.append((score, int(label), kind == CORRECT))
    return outcomes


def _average_precision(right: Sequence[bool], objects: int) -> float:
    """Precision at 101 recalls, each the best at that recall or above; the surest detection first."""
    hits = np.cumsum(np.array(right, bool))
    precision = np.maximum.accumulate((hits / np.arange(1, len(hits) + 1))[::-1])[::-1]
    at = np.searchsorted(hits / objects, np.linspace(0, 1, 101), side="left")
    return float(np.append(precision, 0)[at].mean())
