"""The one error that users see: a line that names the config key, what is wrong and the fix."""

from typing import Any

__all__ = ["ConfigError", "NonFiniteLossError"]


class ConfigError(Exception):
    """Something the user wrote, or points at, cannot work.  The tools print it as one line, exit status 1.

    Args:
        key: the config key at fault, for example ``"model.teacher.weights"``.
        value: what the key holds.
        problem: what is wrong with it, with the value that it conflicts with.
        fix: what to do about it.
    """

    def __init__(self, key: str, value: Any, problem: str, fix: str):
        super().__init__(" ".join(f"{key}={value}: {problem}; {fix}".split()))


class NonFiniteLossError(FloatingPointError):
    """A loss term became infinite or NaN: training stops before the weights are touched."""
