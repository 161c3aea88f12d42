"""A trained student as one file that runs without this package: TorchScript or ONNX."""

from .agreement import Agreement
from .deploy import export_student, table
from .formats import FORMATS, Format, NotExportable

__all__ = ["FORMATS", "Agreement", "Format", "NotExportable", "export_student", "table"]
