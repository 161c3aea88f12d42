"""What a pair is checked for before its first step: its teachers, peers, stages and images."""

from typing import Any, Mapping, Optional

from torch import nn

from sharedkd.errors import ConfigError

from .heads import check_crossed, check_labels, check_regions
from .preparation import COLOURS, image_channels
from .stages import TIMES, Stage
from .teachers import Peer, StudentMaps, Teacher, teacher_key

__all__ = [
    "check_channels",
    "check_image_format",
    "check_needs",
    "check_peers",
    "check_stage",
    "check_teachers",
    "check_times",
]


def check_teachers(teacher: Any, teachers: Mapping[str, Any]) -> None:
    """Refuse what is no source of maps; see :class:`~sharedkd.modeling.meta_arch.SharedKD`."""
    for name, source in {None: teacher, **teachers}.items():
        if source is not None and not isinstance(source, Teacher):
            fix = "use a FrozenTeacher; several are model.teachers={NAME: ...} and a stage's teacher=NAME"
            fix += ", or a TeacherMean"
            raise ConfigError(teacher_key(name), type(source).__name__, "is no source of maps", fix)


def check_peers(peers: Mapping[str, Any], teachers: Mapping[str, Any]) -> None:
    """Refuse what is no peer, and a name that is no word or means two sources."""
    for name, peer in peers.items():
        key = f"model.peers.{name}"
        if not isinstance(peer, Peer):
            fix = "use L(Peer)(student=..., stages=...)"
            raise ConfigError(key, type(peer).__name__, "is no Peer", fix)
        if name in teachers:
            raise ConfigError(key, name, "is the name of a teacher, too", "give it another name")
        if not str(name).isidentifier():
            fix = "use letters, digits and underscores"
            raise ConfigError(key, name, "is no name of a peer", fix)


def check_image_format(student: nn.Module, image_format: str) -> None:
    """Compare the channel order of the data loader with that of the student.

    Args:
        student: the plain detector.
        image_format: the order that the data loader delivers, ``BGR`` or ``RGB``.

    Raises:
        ConfigError: the student expects another order.
    """
    expected = getattr(student, "input_format", None) or image_format
    # The orders of colours mean nothing for other than three channels.
    colours = {expected, image_format} == COLOURS
    if expected != image_format and not (colours and image_channels(student) != 3):
        raise ConfigError(
            "dataloader.train.mapper.image_format",
            image_format,
            f"contradicts the student's input_format={expected}",
            "set both to the same order",
        )


def check_channels(teacher: Teacher, student: nn.Module, input_format: str) -> None:
    """Check that a teacher can be shown the student's images."""
    if input_format == "L":
        teacher.check_images(1, input_format)
    elif hasattr(student, "pixel_mean"):
        teacher.check_images(image_channels(student), input_format)


def check_stage(key: str, stage: Any, teachers: Mapping[str, Teacher]) -> None:
    """Check a stage alone, and that its source of maps is there.

    Args:
        key: its place in the config.
        teachers: the sources that a stage may name.

    Raises:
        ConfigError: no Stage, a time or weight that is none, or a source that is not there.
    """
    if not isinstance(stage, Stage):
        fix = "add the --method that has it, such as shared_kd, or use L(Stage)(loss=...)"
        raise ConfigError(key, stage, "is not a Stage", fix)
    stage.check(key)
    if stage.weight and stage.teacher is not None and stage.teacher not in teachers:
        fix = f"use null, or one of model.teachers: {', '.join(teachers) or 'there is none'}"
        problem = "is no source of maps of this model"
        raise ConfigError(f"{key}.teacher", stage.teacher, problem, fix)


def check_needs(key: str, stage: Stage, student: nn.Module, teacher: Optional[Teacher]) -> None:
    """Check that student and teacher have what a stage's loss reads of their heads.

    Args:
        key: the stage's place in the config.

    Raises:
        ConfigError: see the checks of :mod:`~sharedkd.modeling.heads`; a head that would learn from the loss.
    """
    needs, detector = stage.loss.needs, teacher and teacher.detector
    if "regions" in needs:
        check_regions(student, detector, type(teacher).__name__, f"{key}.loss")
    if "labels" in needs:
        check_labels(student, f"{key}.loss")
    if "crossed" in needs:
        if isinstance(teacher, StudentMaps):
            problem = "is a student that trains too: its head would learn from this loss"
            fix = "use a frozen teacher, or another loss"
            raise ConfigError(f"{key}.teacher", stage.teacher, problem, fix)
        check_crossed(student, detector, stage.loss.left, f"{key}.loss")


def check_times(key: str, stage: Stage, max_iter: Optional[int]) -> None:
    """Refuse a time that only this package's trainer knows."""
    if stage.end == "teacher":
        problem, fix = "is known to this package's trainer only", "use a time or null"
        raise ConfigError(f"{key}.end", "teacher", problem, fix)
    for time in TIMES if max_iter is None else ():
        value = getattr(stage, time)
        if isinstance(value, float) or time == "decay" and value and stage.end is None:
            problem = "is a part of the run, whose length is unknown"
            fix = "set model.max_iter to its iterations"
            raise ConfigError(f"{key}.{time}", value, problem, fix)
