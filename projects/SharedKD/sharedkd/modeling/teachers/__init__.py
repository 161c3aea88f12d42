"""Teachers: sources of the feature maps that stages learn from."""

from .average import StudentAverage
from .base import Teacher
from .frozen import FrozenTeacher
from .mean import TeacherMean
from .peer import Peer, StudentMaps

__all__ = ["FrozenTeacher", "Peer", "StudentAverage", "StudentMaps", "Teacher", "TeacherMean"]
