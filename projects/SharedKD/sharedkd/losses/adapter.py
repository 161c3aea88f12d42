"""Convolutions that bring the student's maps to the teacher's width."""

from typing import Dict, Iterable, Optional

from torch import nn

from sharedkd.errors import ConfigError

__all__ = ["adapters"]


def adapters(
    kernel: Optional[int],
    student: Dict[int, int],
    teacher: Dict[int, int],
    strides: Iterable[int],
    key: str,
) -> nn.ModuleDict:
    """Make one module per level that brings the student's map to the teacher's width.

    Args:
        kernel: size of a convolution on every level (odd); 1 has C_s * C_t + C_t parameters, 3 has
            9 * C_s * C_t + C_t.  0: no convolution; the widths have to be equal.  None: a 1x1
            convolution where they differ, else none.
        student, teacher: stride -> channels.
        strides: the levels in use.
        key: the config key of ``kernel``, for messages.

    Returns:
        str(stride) -> module, (N, C_s, H, W) -> (N, C_t, H, W).

    Raises:
        ConfigError: an even or negative kernel, or 0 where widths differ.
    """
    if kernel is not None and (kernel < 0 or (kernel and kernel % 2 == 0)):
        raise ConfigError(key, kernel, "is no odd number", "use 0, 1, 3 or null")
    modules = nn.ModuleDict()
    for stride in strides:
        ours, theirs = student[stride], teacher[stride]
        if kernel == 0 and ours != theirs:
            raise ConfigError(
                key,
                kernel,
                f"the student's level of stride {stride} has {ours} channels, the teacher's {theirs}",
                "use null: a learned 1x1 convolution where widths differ",
            )
        size = 1 if kernel is None and ours != theirs else kernel
        modules[str(stride)] = (
            nn.Conv2d(ours, theirs, size, padding=size // 2) if size else nn.Identity()
        )
    return modules
