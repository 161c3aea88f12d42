"""Output of other tools as HTML: Markdown with its pictures, and the gallery."""

import base64
import json
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markupsafe import Markup, escape

__all__ = ["as_html", "read_document", "read_gallery"]

_TYPES = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png"}


#: Title of an image to its pictures: the model, its score if it has one, and the picture's address.
Shots = Dict[str, List[Tuple[str, Optional[float], str]]]


def as_html(text: str, folder: Optional[Path] = None, without: str = "") -> Markup:
    """Markdown as HTML. Markup in it is text, a link is text, and a picture is in the page itself.

    Pictures outside of ``folder`` are left out (all, if it is None), and the one of the name ``without``.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table").disable(["link", "autolink"])
    parser.add_render_rule("image", _image)
    html = parser.render(text, {"folder": folder, "without": without})
    return Markup(html.replace("<h2>", "<h3>").replace("</h2>", "</h3>"))


def read_document(path: Path, without: str = "") -> Optional[List[Markup]]:
    """The Markdown file at ``path`` as HTML: what precedes its first section, and the rest.

    None if there is no such file. ``without`` is that of :func:`as_html`.
    """
    if not path.is_file():
        return None
    _, _, text = path.read_text(errors="replace").partition("\n")  # without its title
    head, mark, rest = text.partition("\n## ")
    return [as_html(part, path.parent, without) for part in (head, mark + rest)]


def read_gallery(folder: Path) -> Tuple[Sequence[str], Shots]:
    """The two models to compare, and the pictures of tools/visualize_pair.py in ``folder``.

    Both are empty if its detections.json is missing or damaged.
    """
    shots: Shots = {}
    try:
        record = json.loads((folder / "detections.json").read_text())
        for shot in record["gallery"]:
            data = {model: _data(folder, name) for model, name in shot["pictures"].items()}
            count = shot["objects"]
            title = f"{shot['file_name']}, {count} object{'s' * (count != 1)}"
            found = [(model, shot["scores"].get(model), x) for model, x in data.items() if x]
            shots.update({title: found} if found else {})
        return record["between"], shots
    except (OSError, ValueError, KeyError, TypeError):
        return [], {}


def _image(
    renderer: RendererHTML, tokens: Sequence[Any], index: int, options: Any, env: Mapping[str, Any]
) -> str:
    token = tokens[index]
    name = str(token.attrs["src"])
    data = _data(env["folder"], name) if env["folder"] and name != env["without"] else None
    if not data:
        return ""
    label = escape(token.content)
    # Wider than a phone, where it scrolls by itself, by keyboard, too.
    scroll = f'class="paper scroll" role="region" tabindex="0" aria-label="{label}"'
    return f'<span {scroll}><img src="{data}" alt="{label}" loading="lazy"></span>'


def _data(folder: Path, name: str) -> Optional[str]:
    """A picture of ``folder`` as an address; None if it is elsewhere, not there, or of another kind."""
    path = (folder / name).resolve()
    kind = _TYPES.get(path.suffix.lower())
    if not kind or not path.is_file() or not path.is_relative_to(folder.resolve()):
        return None
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
