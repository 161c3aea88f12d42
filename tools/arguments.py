"""What the tools share: the flags for a run's config, lists of names, errors in one line."""

import argparse
import re
import sys
from contextlib import contextmanager
from typing import Iterator, List

from sharedkd.errors import SharedKDError

FLAGS = {
    "--teacher": "teacher",
    "--teacher-weights": "weights",
    "--method": "method",
    "--depth": "depth",
}


def add_config_arguments(
    parser: argparse.ArgumentParser, method: bool = True, depth: bool = True
) -> None:
    """Add ``--teacher``, ``--teacher-weights`` and, unless they are False, ``--method`` and ``--depth``."""
    group = parser.add_argument_group("distillation of a plain detector's config")
    add_teacher_arguments(group)
    if depth:
        group.add_argument(
            "--depth",
            metavar="18|34|50|101|152",
            help="of its ResNet, from torchvision's ImageNet weights; default: the config's",
        )
    if method:
        group.add_argument(
            "--method",
            metavar="NAME",
            help="see compare_methods.py --list; default for a plain detector: shared_kd",
        )


def add_teacher_arguments(group: argparse._ActionsContainer, required: bool = False) -> None:
    """Add ``--teacher``, which may be ``required``, and ``--teacher-weights`` to a parser or group."""
    group.add_argument(
        "--teacher",
        required=required,
        metavar="NAME|PATH",
        help="a name in Detectron2's model zoo, a config, or the folder of a run",
    )
    group.add_argument(
        "--teacher-weights", metavar="FILE|URL", help="default: the zoo's, the run's"
    )


def overrides_of(args: argparse.Namespace, given: List[str]) -> List[str]:
    """The overrides of a command: those that its flags stand for, then those ``given``."""
    values = {key: getattr(args, flag[2:].replace("-", "_"), None) for flag, key in FLAGS.items()}
    return [f"distill.{key}={value}" for key, value in values.items() if value is not None] + given


def names(text: str) -> List[str]:
    """The names in ``text``, which commas separate; not one inside brackets, as in ``[neck,head]``."""
    return [name for name in re.split(r",(?![^\[]*\])", text) if name]


@contextmanager
def errors_in_words() -> Iterator[None]:
    """A context in which a mistake of the user ends the tool: one line on stderr, and status 1."""
    try:
        yield
    except SharedKDError as e:
        sys.exit(f"error: {e}")
