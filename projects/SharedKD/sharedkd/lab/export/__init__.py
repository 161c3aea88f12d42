"""A trained student as one file that runs without this package: TorchScript or ONNX."""

from .agreement import Agreement, compare
from .deploy import Export, export_student
from .formats import FORMATS, Format, NotExportable

__all__ = ["FORMATS", "Agreement", "Export", "Format", "NotExportable", "compare", "export_student"]
