"""One HTML file that shows what happened in a run or a comparison: tools/report.py."""

from .page import write_report

__all__ = ["write_report"]
