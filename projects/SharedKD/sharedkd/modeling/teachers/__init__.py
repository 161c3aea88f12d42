"""Teachers: sources of the feature maps that stages learn from."""

from .base import Teacher
from .frozen import FrozenTeacher

__all__ = ["FrozenTeacher", "Teacher"]
