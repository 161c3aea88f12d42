"""Files of results, each complete or not at all, in folders that are made if there are none."""

import json
from pathlib import Path
from typing import Any
from uuid import uuid4

from matplotlib.figure import Figure

from sharedkd.files import replace

__all__ = ["WRITER", "write_json", "write_png", "write_text"]

WRITER = f".{uuid4().hex[:8]}"  #: of this process: several machines may write into one folder


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON that every reader takes, with null for NaN and infinity."""
    plain = json.loads(json.dumps(value), parse_constant=lambda constant: None)
    write_text(path, json.dumps(plain, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(str(path), lambda f: f.write(text.encode()), WRITER)


def write_png(path: Path, figure: Figure) -> None:
    replace(str(path), lambda f: figure.savefig(f, format="png"), WRITER)
