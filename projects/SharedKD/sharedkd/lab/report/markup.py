"""HTML from values: whatever is not :class:`Markup` already is text, and is escaped."""

import base64
import re
from html import escape
from pathlib import Path
from typing import Any, Iterable, Sequence, Union

__all__ = [
    "Markup",
    "join",
    "markdown",
    "missing",
    "picture",
    "scrolling",
    "section",
    "table",
    "tag",
]

_EMPTY = {"br", "circle", "img", "input", "line", "meta", "path", "polygon", "rect"}
_TYPES = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png"}


class Markup(str):
    """A string that is HTML."""


def tag(name: str, *children: Any, **attributes: Any) -> Markup:
    """An element.

    Args:
        name: of the element.
        children: texts, numbers and :class:`Markup`.
        attributes: ``class_`` and ``data_key`` become ``class`` and ``data-key``; None and False are
            left out, True has no value.

    >>> tag("td", "a < b", class_="name", data_seed=0)
    '<td class="name" data-seed="0">a &lt; b</td>'
    """
    text = "".join(
        f" {key.rstrip('_').replace('_', '-')}"
        + ("" if value is True else f'="{escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _EMPTY:
        return Markup(f"<{name}{text}/>")  # within SVG the slash counts
    return Markup(f"<{name}{text}>{join(children)}</{name}>")


def join(parts: Iterable[Any]) -> Markup:
    """``parts`` one after the other, texts escaped."""
    return Markup(
        "".join(part if isinstance(part, Markup) else escape(str(part)) for part in parts)
    )


def section(key: str, title: str, *children: Any) -> Markup:
    """A section of the page: the heading ``title``, then ``children``; ``key`` is its address."""
    heading = tag("h2", title, id=f"{key}-title")
    return tag("section", heading, *children, id=key, aria_labelledby=f"{key}-title")


def scrolling(label: str, child: Markup) -> Markup:
    """``child``, which may be wider than a phone, scrolls by itself, by keyboard, too.

    ``label`` says what it is to those who cannot see it.
    """
    return tag("div", child, class_="scroll", role="region", aria_label=label, tabindex=0)


def table(headers: Sequence[Any], rows: Iterable[Sequence[Any]], label: str) -> Markup:
    """A plain table whose first column names the rows.

    Args:
        headers: of the columns.
        rows: as many cells each: texts, numbers and :class:`Markup`.
        label: what it shows, for those who cannot see it.
    """
    head = tag("tr", *(tag("th", x, scope="col") for x in headers))
    body = [tag("tr", tag("th", r[0], scope="row"), *(tag("td", x) for x in r[1:])) for r in rows]
    return scrolling(label, tag("table", tag("thead", head), tag("tbody", *body)))


def missing(what: str, command: str) -> Markup:
    """The sentence ``what`` about what is not there, and the ``command`` that makes it."""
    return tag("p", f"{what} ", tag("code", command), class_="missing")


def picture(path: Path, text: str, **attributes: Any) -> Markup:
    """An image that is in the page itself.

    Args:
        path: a JPEG or PNG file.
        text: what stands for it where it cannot be seen.
        attributes: more of the element's, see :func:`tag`.
    """
    data = base64.b64encode(path.read_bytes()).decode()
    return tag(
        "img", src=f"data:{_TYPES[path.suffix.lower()]};base64,{data}", alt=text, **attributes
    )


def markdown(text: str) -> Markup:
    """``text`` in the Markdown that our reports use, as HTML.

    That is paragraphs, headings, one-level lists, `code`, **strong** and *emphasis*.
    """
    blocks = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = block.split("\n")
        if lines[0].startswith("- "):
            items = re.split(r"(?:^|\n)- ", block)[1:]
            blocks.append(tag("ul", *(tag("li", _inline(" ".join(x.split()))) for x in items)))
        elif lines[0].startswith("#"):
            blocks.append(tag("h3", _inline(lines[0].lstrip("# "))))
        else:
            blocks.append(tag("p", _inline(" ".join(block.split()))))
    return join(blocks)


def _inline(text: str) -> Markup:
    pieces: "list[Union[str, Markup]]" = []
    for i, piece in enumerate(text.split("`")):
        if i % 2:
            pieces.append(tag("code", piece))
        else:
            html = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escape(piece))
            pieces.append(Markup(re.sub(r"\*(\w.*?)\*", r"<em>\1</em>", html)))
    return join(pieces)
