"""What a step of each scheme of docs/schemes.md takes, in time and memory, beside the plain student's step."""

import time
from typing import Any, Dict, Mapping

from detectron2.config import LazyCall as L
from omegaconf import DictConfig

from sharedkd.config.methods import with_method
from sharedkd.config.sequence import sequence
from sharedkd.lab.benchmark import WARM_UP, Benchmark, circumstances, ratio
from sharedkd.lab.timing import spread, take_turns
from sharedkd.losses import PKD
from sharedkd.modeling.stages import Stage, stage_dict
from sharedkd.modeling.teachers import Peer, StudentAverage, TeacherMean

__all__ = ["PLAIN", "benches", "measure_schemes"]

PLAIN = "plain student"


def benches(cfg: DictConfig, image_size: int, batch_size: int) -> Dict[str, Benchmark]:
    """Make a pair's benchmark with each scheme: the same student, and its teacher as often as is needed.

    Args:
        cfg: of the pair; its stages are those of one frozen teacher.
        image_size, batch_size: see :class:`~sharedkd.lab.benchmark.Benchmark`.

    Returns:
        scheme -> benchmark; of a sequence, the step of its first teacher.
    """
    frozen, own = {**cfg.model.teacher, "weights": ""}, cfg.model.stages
    stages = {name: own[name] for name in own if name != "_target_"}
    always = {name: {**x, "start": 0, "ramp": 0, "end": None} for name, x in stages.items()}
    turns = sequence(DictConfig(always, flags={"allow_objects": True}), ["near", "far"])
    later = {name: {**x, "weight": 0.0} for name, x in turns.items() if name.endswith("_far")}
    learn = L(Stage)(loss=L(PKD)(), weight=10.0)
    other = {"other": {**learn, "teacher": "other"}}
    peer = L(Peer)(student=cfg.model.student, stages=L(stage_dict)(back=learn))
    models: Dict[str, Dict[str, Any]] = {
        "one frozen teacher": {},
        "two teachers": {"teachers": {"other": frozen}, "stages": {**own, **other}},
        "mean of two teachers": {"teacher": L(TeacherMean)(teachers=[frozen, frozen])},
        "sequence of two teachers": {
            "teacher": None,
            "teachers": {"near": frozen, "far": frozen},
            "stages": {**turns, **later},
        },
        "average of the student": {"teacher": L(StudentAverage)()},
        "two peers": {
            "teacher": None,
            "stages": L(stage_dict)(**other),
            "peers": {"other": peer},
        },
    }
    configs = {name: cfg.copy() for name in models}
    for name, model in models.items():
        configs[name].model.update(model)
    configs["self-reflection"] = with_method(cfg, "self_reflection")
    found = {name: Benchmark(x, image_size, batch_size) for name, x in configs.items()}
    found["as many images without labels"] = Benchmark(cfg, image_size, batch_size, batch_size)
    return found


def measure_schemes(found: Mapping[str, Benchmark], rounds: int, starts: int) -> Dict[str, Any]:
    """Measure a step of each scheme, turn by turn, and its memory in a process of its own.

    On a CPU, seconds are those that all threads have computed, which other work on the machine hardly
    changes; on a GPU those on the wall.

    Args:
        found: of :func:`benches`.
        rounds: times of each.
        starts: processes per peak, see :meth:`~sharedkd.lab.benchmark.Benchmark.peak_mb`.

    Returns:
        as :func:`~sharedkd.lab.benchmark.measure`; ``ratios`` are those to the plain student's step.
    """
    first = next(iter(found.values()))
    clock = time.process_time if first.device.type == "cpu" else None
    arms = {PLAIN: first.student_sharedkd(), **{name: x.distill() for name, x in found.items()}}
    seconds = take_turns(arms, rounds, WARM_UP, clock)
    peaks = {PLAIN: first.peak_mb("student_sharedkd", starts)}
    peaks.update({name: x.peak_mb("distill", starts) for name, x in found.items()})
    return {
        **circumstances(first),
        "ratios": {name: ratio(seconds, name, PLAIN) for name in found},
        "seconds": {name: spread(x) for name, x in seconds.items()},
        "memory_mb": {name: round(peak) for name, peak in peaks.items()},
    }
