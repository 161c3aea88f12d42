"""AP against latency over several students: points, their Pareto front, and what shows a capacity gap.

``records`` holds one record per student, as :mod:`sharedkd.lab.scores` describes it, each with
"deployed": what :func:`~sharedkd.lab.compare.students.measure` returns, or None.
"""

import math
from dataclasses import dataclass
from typing import Iterable, List, Mapping, Sequence

from sharedkd.lab.scores import (
    Difference,
    Record,
    costs_of,
    gains,
    is_known,
    mean_of,
    rows_of,
    scores_of,
)

__all__ = ["EAGER", "Gap", "Point", "capacity_gaps", "front", "parameters_of", "points"]

EAGER = "eager"  #: the format of a student that could not be exported
Records = Mapping[str, Record]


@dataclass(frozen=True)
class Point:
    """One student with one method."""

    student: str
    method: str
    mean: float  #: of AP over seeds; NaN if not known
    half_width: float  #: of its interval
    milliseconds: float  #: latency; NaN before it was measured
    exported: bool  #: whether the latency is that of an exported file


def points(records: Records, task: str) -> List[Point]:
    """A point per student and method, in their order."""
    found = []
    for student, record in records.items():
        deployed = record["deployed"] or {"format": EAGER, "milliseconds": {"median": math.nan}}
        latency, exported = deployed["milliseconds"]["median"], deployed["format"] != EAGER
        for row in rows_of(record, task):
            found.append(Point(student, row.method, *row.interval(), latency, exported))
    return found


def front(found: Iterable[Point]) -> List[Point]:
    """The Pareto front, fastest first: the points that have a higher AP than all that are as fast."""
    known = [p for p in found if is_known(p.mean) and is_known(p.milliseconds)]
    best: List[Point] = []
    for point in sorted(known, key=lambda p: (p.milliseconds, -p.mean)):
        if not best or point.mean > best[-1].mean:
            best.append(point)
    return best


def parameters_of(record: Record) -> float:
    """The number of the student's parameters; NaN before an arm is finished."""
    counts = [n for m in record["methods"] for n in costs_of(record, m)["student_parameters"]]
    return max(counts, default=math.nan)


@dataclass(frozen=True)
class Gap:
    """A student that gains less by a method than a larger one."""

    method: str
    student: str
    larger: str
    gains: Sequence[Difference]  #: of the two, each against its own plain student
    less: Difference  #: how much more the larger one gains; its interval excludes zero


def capacity_gaps(records: Records, task: str) -> List[Gap]:
    """The students that gain less than a larger one does, though they have more left to gain.

    A teacher that is too strong for a small student helps it less (Mirzadeh et al., AAAI 2020).  That a
    gain falls the other way, from a small student to a large one near to its teacher, is no sign of it.
    A gap is named, for each student the widest, where the 95 % interval of the difference of the gains
    excludes zero, so never with one seed.
    """
    found = []
    methods = [m for record in records.values() for m in record["methods"] if "@" not in m]
    for method in dict.fromkeys(methods):
        each = {
            student: gains(record, method, record["baseline"], task)
            for student, record in records.items()
            if method != record["baseline"]
        }
        for small, ours in each.items():
            wider = []
            for large, theirs in each.items():
                less = Difference.of([theirs[seed] - ours[seed] for seed in theirs if seed in ours])
                if less.verdict == "better" and _is_larger(records[large], records[small], task):
                    both = [Difference.of(x.values()) for x in (ours, theirs)]
                    wider.append(Gap(method, small, large, both, less))
            found += sorted(wider, key=lambda gap: gap.less.mean)[-1:]
    return found


def _is_larger(one: Record, other: Record, task: str) -> bool:
    """Whether ``one`` has more parameters, and as a plain student no lower AP."""
    plain = [mean_of(scores_of(x, x["baseline"], task).values()) for x in (one, other)]
    return parameters_of(one) > parameters_of(other) and plain[0] >= plain[1]
