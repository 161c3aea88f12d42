"""Teachers: sources of the feature maps that stages learn from."""

from .average import StudentAverage
from .base import Teacher
from .foundation import FoundationTeacher
from .frozen import FrozenTeacher
from .mean import TeacherMean

__all__ = ["FoundationTeacher", "FrozenTeacher", "StudentAverage", "Teacher", "TeacherMean"]
