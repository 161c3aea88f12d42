"""Fills the template of the report, with style and script inside."""

import base64
import hashlib
import json
import math
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Optional

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sharedkd.errors import ConfigError
from sharedkd.lab.compare.plots import PALETTE
from sharedkd.lab.compare.student_summary import STUDENTS
from sharedkd.lab.compare.summary import notes
from sharedkd.lab.output import write_text
from sharedkd.lab.runs import short
from sharedkd.lab.scores import MORE_METRICS, TASKS, Difference, Row, is_known, measured, score_of
from sharedkd.lab.tables import number, with_bounds

from . import documents, settings, summary, training
from .figures import DASHES
from .source import Source, read_source

__all__ = ["as_html", "write_report"]


def write_report(
    folder: Path,
    output: Optional[Path] = None,
    features: Optional[Path] = None,
    detections: Optional[Path] = None,
) -> Path:
    """Write the report of a run, a comparison, or a folder of runs.

    Args:
        folder: its output folder.
        output: the HTML file, which is returned; default: report.html in that folder.
        features, detections: where tools/analyze_features.py and tools/visualize_pair.py wrote;
            default: ``features`` and ``detections`` in that folder.
    """
    text = as_html(folder, features, detections)
    output = output or folder / "report.html"
    write_text(output, text)
    return output


def as_html(
    folder: Path, features: Optional[Path] = None, detections: Optional[Path] = None
) -> str:
    """The report as one HTML document, the same bytes for the same files."""
    page = Environment(
        loader=PackageLoader(__package__),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    if (folder / STUDENTS).is_file():
        students = _students(folder / STUDENTS)
        head, rest = documents.read_document(folder / "report.md") or ("", "")
        return page.get_template("students.html").render(
            title=f"Students: {folder.resolve().name}", head=head, rest=rest, students=students
        )
    source = read_source(folder)
    features, detections = features or folder / "features", detections or folder / "detections"
    between, shots = documents.read_gallery(detections)
    without = "side_by_side.jpg" if shots else ""  # the same pictures in one
    page.filters.update(
        gained=partial(with_bounds, unknown="–"),
        number=partial(number, unknown="–"),
        score=summary.score,
        short=short,
    )
    script = page.get_template("script.js").render()
    return page.get_template("report.html").render(
        title=f"{source.kind.capitalize()}: {folder.resolve().name}",
        source=source,
        record=source.record,
        summary=summary.summary(source),
        warnings=summary.warnings(source),
        repairs=summary.repairs(source),
        results={f"{TASKS[task]} AP": rows for task, rows in measured(source.record).items()},
        teacher={f"{title} AP": _teacher(source, task) for task, title in TASKS.items()},
        bars=training.bars(source),
        notes=documents.as_html("\n\n".join(notes(source.record))),
        curves=training.curves(source),
        gradients=training.gradients(source),
        step_time=training.step_time(source),
        commands=summary.commands(source, features, detections),
        terms=training.terms(source),
        between=between,
        shots=shots,
        detections=documents.read_document(detections / "detections.md", without),
        features=documents.read_document(features / "features.md"),
        differences=settings.differences(source),
        origin=settings.origin(source),
        metrics=MORE_METRICS,
        colors=len(PALETTE),
        dashes=DASHES,
        script=Markup(script),
        # The browser runs this script and no other, and loads nothing from anywhere.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _students(path: Path) -> List[Dict[str, Any]]:
    try:
        return json.loads(path.read_text())["students"]
    except (OSError, ValueError, TypeError, KeyError) as e:
        fix = "run tools/compare_methods.py again"
        raise ConfigError("DIR", path, f"is damaged ({e})", fix) from e


def _teacher(source: Source, task: str) -> Optional[Row]:
    """The teacher as a row of the results; None if its AP is not known."""
    results = source.record.get("teacher")
    scores = {m: [score_of(results, task, m)] for m in ("AP", *MORE_METRICS)}
    nothing = Difference(math.nan, math.nan, 0)
    return Row("teacher", scores, nothing) if is_known(scores["AP"][0]) else None
