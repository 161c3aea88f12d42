"""Checks of single values of a config."""

import math
from typing import Any, Collection, Sequence

from sharedkd.errors import ConfigError

__all__ = ["check_choice", "check_list", "check_number", "check_switch", "check_text"]


def check_number(
    key: str,
    value: Any,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    whole: bool = False,
    or_null: bool = False,
) -> None:
    """Check that a value is a finite number within bounds; a string or a boolean is none.

    Args:
        key: the config key that holds ``value``, for the message.
        least, most: inclusive bounds.
        above: exclusive lower bound.
        whole: only 3, not 3.0.
        or_null: None will do, too.

    Raises:
        ConfigError: it is none, or out of bounds.
    """
    if value is None and or_null:
        return
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        problem = "is no whole number" if whole else "is no number"
    elif not math.isfinite(value):
        problem = "is not finite"
    elif value < least or value <= above:
        problem = "is negative" if value < 0 and max(least, above) >= 0 else "is too small"
    elif value > most:
        problem = "is too large"
    else:
        return
    words = ["a whole number" if whole else "a number"]
    words += [f"of {least:g} or more"] if least > -math.inf else []
    words += [f"above {above:g}"] if above > -math.inf else []
    words += [f"of {most:g} at most"] if most < math.inf else []
    raise ConfigError(
        key, repr(value), problem, f"use {' '.join(words)}{', or null' if or_null else ''}"
    )


def check_switch(key: str, value: Any) -> None:
    """Check that ``value``, that of ``key``, is a boolean.

    Raises:
        ConfigError: it is neither True nor False.
    """
    if not isinstance(value, bool):
        raise ConfigError(key, repr(value), "is neither true nor false", "use True or False")


def check_text(key: str, value: Any, empty: bool = True) -> None:
    """Check that ``value``, that of ``key``, is a string.

    Raises:
        ConfigError: it is none, or it is blank and ``empty`` is False.
    """
    if not isinstance(value, str) or not (value.strip() or empty):
        raise ConfigError(key, repr(value), "is not a name or path", "write it as text")


def check_list(key: str, value: Any) -> None:
    """Check that ``value``, that of ``key``, is a list.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ConfigError(key, repr(value), "is no list", "use [], [A] or [A,B]")


def check_choice(key: str, value: Any, known: Collection[str]) -> None:
    """Check that ``value``, that of ``key``, is one of the ``known`` names.

    Raises:
        ConfigError: it is none of them.
    """
    if not isinstance(value, str) or value not in known:
        raise ConfigError(key, value, "no such name", f"use one of {', '.join(known)}")
