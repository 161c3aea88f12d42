"""Teachers: sources of the feature maps that stages learn from."""

from .average import StudentAverage
from .base import Teacher, teacher_key
from .foundation import FoundationTeacher
from .frozen import FrozenTeacher
from .mean import TeacherMean
from .peer import Peer, StudentMaps

__all__ = [
    "FoundationTeacher",
    "FrozenTeacher",
    "Peer",
    "StudentAverage",
    "StudentMaps",
    "Teacher",
    "TeacherMean",
    "teacher_key",
]
