"""The page: its sections in order, in the template, with style and script inside."""

import base64
import hashlib
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Optional

from sharedkd.files import replace

from . import evidence, overview, training
from .markup import Markup, join, tag
from .source import read_source

__all__ = ["as_html", "write_report"]

_TITLES = {
    "summary": "Summary",
    "results": "Results",
    "cost": "Cost",
    "curves": "Loss curves",
    "gradients": "Gradient shares",
    "features": "Feature gaps",
    "detections": "Detections",
    "configs": "Settings",
    "about": "Versions",
}
_KINDS = {"comparison": "Comparison", "runs": "Runs", "run": "Run"}


def write_report(
    folder: Path,
    output: Optional[Path] = None,
    features: Optional[Path] = None,
    detections: Optional[Path] = None,
) -> Path:
    """Write the report of a run, a comparison, or a folder of runs.

    Args:
        folder: its output folder.
        output: the HTML file; default: report.html in that folder.
        features, detections: where tools/analyze_features.py and tools/visualize_pair.py wrote;
            default: ``features`` and ``detections`` in that folder.

    Returns:
        the HTML file.

    Raises:
        ConfigError: there is nothing to report in the folder.
    """
    text = as_html(folder, features, detections)
    output = output or folder / "report.html"
    output.parent.mkdir(parents=True, exist_ok=True)
    replace(str(output), lambda f: f.write(text.encode()))
    return output


def as_html(
    folder: Path, features: Optional[Path] = None, detections: Optional[Path] = None
) -> str:
    """The report as one HTML document, the same bytes for the same files.

    ``folder``, ``features`` and ``detections`` are those of :func:`write_report`.

    Raises:
        ConfigError: there is nothing to report in the folder.
    """
    source = read_source(folder)
    sections = {
        "summary": overview.summary(source),
        "results": overview.results(source),
        "cost": overview.cost(source),
        "curves": training.curves(source),
        "gradients": training.gradients(source),
        "features": evidence.features(source, features or folder / "features"),
        "detections": evidence.detections(source, detections or folder / "detections"),
        "configs": overview.configs(source),
        "about": overview.about(source),
    }
    links = [tag("a", _TITLES[key], href=f"#{key}") for key, text in sections.items() if text]
    here = files(__package__)
    style, script, template = (
        here.joinpath(name).read_text("utf-8")
        for name in ("style.css", "script.js", "template.html")
    )
    title = f"{_KINDS[source.kind]}: {folder.resolve().name}"
    return Template(template).substitute(
        title=join([title]),
        style=Markup(style),
        script=Markup(script),
        # The browser runs this script and no other, and loads nothing from anywhere.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        links=join(links),
        sections=join(sections.values()),
    )
