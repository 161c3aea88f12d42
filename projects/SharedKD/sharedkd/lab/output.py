"""Files of results, each complete or not at all, in folders that are made if there are none.

``writer`` is that of :func:`~sharedkd.files.replace`.
"""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sharedkd.files import replace

__all__ = ["write_json", "write_png", "write_text"]


def write_json(path: Path, value: Any, writer: str = "") -> None:
    """Write ``value`` as JSON that every reader takes, with null for NaN and infinity."""
    plain = json.loads(json.dumps(value), parse_constant=lambda constant: None)
    write_text(path, json.dumps(plain, indent=2) + "\n", writer)


def write_text(path: Path, text: str, writer: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(str(path), lambda f: f.write(text.encode()), writer)


def write_png(path: Path, figure: Figure, writer: str = "") -> None:
    replace(str(path), lambda f: figure.savefig(f, format="png"), writer)
