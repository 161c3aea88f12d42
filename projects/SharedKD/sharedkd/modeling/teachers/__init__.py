"""Teachers: sources of the feature maps that stages learn from."""

from .average import StudentAverage
from .base import Teacher
from .frozen import FrozenTeacher
from .mean import TeacherMean

__all__ = ["FrozenTeacher", "StudentAverage", "Teacher", "TeacherMean"]
