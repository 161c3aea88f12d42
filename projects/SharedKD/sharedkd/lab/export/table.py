"""The table that tools/export_student.py prints."""

from typing import Any, Mapping, Optional, Tuple

from tabulate import tabulate

from .deploy import Export

__all__ = ["table"]


def table(result: Export) -> str:
    """The ``result`` as a table of size, latency and agreement, with what they were measured on."""
    rows = []
    for name in ("student", *result.files, "teacher"):
        if name in result.megabytes:
            rows.append([name, *_cost(result, name), *_agreement(result.files.get(name))])
    header = [
        "model",
        "MB",
        "ms (least to greatest)",
        "detections without a partner",
        "largest difference",
    ]
    lines = [tabulate(rows, header, tablefmt="github", disable_numparse=True), ""]
    height, width = result.about["image"]
    lines.append(f"One image of {height} x {width}, {result.about['hardware']}.")
    for found in list(result.files.values())[:1]:  # all files are checked on the same images
        lines.append(
            f"Checked on {found['images']} images, {found['empty']} of them without detections."
        )
    if "no_teacher" in result.about:
        lines.append(f"Teacher not measured: {result.about['no_teacher']}")
    lines += [f"{found['path']} and {found['path']}.json" for found in result.files.values()]
    return "\n".join(lines)


def _cost(result: Export, name: str) -> Tuple[str, str]:
    spent = result.milliseconds.get(name)
    text = "{median:.1f} ({low:.1f} to {high:.1f})".format(**spent) if spent else "-"
    return f"{result.megabytes[name]:.1f}", text


def _agreement(found: Optional[Mapping[str, Any]]) -> Tuple[str, str]:
    if not found:
        return "-", "-"
    largest = ", ".join(
        f"{name} {value:.1e}{' px' if name == 'boxes' else ''}"
        for name, value in found["largest"].items()
    )
    return f"{found['unmatched']} of {found['detections']}", largest
