"""A check that losses on the outputs of the dense head share."""

from typing import Iterable

from sharedkd.errors import ConfigError

from .base import Shapes

__all__ = ["check_same_head"]


def check_same_head(
    student: Shapes, teacher: Shapes, tap: str, strides: Iterable[int], key: str, name: str
) -> None:
    """Check that the dense heads of both detectors have the same channels: anchors and classes.

    Args:
        student, teacher: what the loss is bound to.
        tap: ``logits`` or ``deltas``.
        strides: the levels in use.
        key, name: the loss's place in the config and its class, for messages.

    Raises:
        ConfigError: the channels differ on a level.
    """
    for stride in strides:
        ours, theirs = student[tap][stride], teacher[tap][stride]
        if ours != theirs:
            raise ConfigError(
                key,
                name,
                f"the student's {tap} of stride {stride} have {ours} channels, the teacher's {theirs}: "
                "other classes, other anchors or another kind of detector",
                "use a teacher of the student's family, trained for the same classes",
            )
