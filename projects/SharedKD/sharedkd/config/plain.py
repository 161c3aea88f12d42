"""A saved config as plain values: nothing in the file is run, imported or resolved."""

from pathlib import Path
from typing import Any, Iterator, Mapping, Optional, Tuple

import yaml

__all__ = ["leaves", "read_plain"]


def read_plain(path: Path) -> Optional[Mapping[str, Any]]:
    """Read what LazyConfig.save wrote to ``path``: Python objects as text, references as written.

    Returns:
        None if there is no such file, or if it cannot be read.
    """
    try:
        found = yaml.load(Path(path).read_text(), _Loader)  # a safe loader, see below
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return found if isinstance(found, Mapping) else None


def leaves(value: Any, key: str = "") -> Iterator[Tuple[str, str]]:
    """The values of nested mappings, ``value``, as texts: (dotted key below ``key``, text).

    >>> dict(leaves({"train": {"seed": 0, "inherit": ["neck"]}, "x": {}}))
    {'train.seed': '0', 'train.inherit': "['neck']", 'x': '{}'}
    """
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from leaves(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, str(value)


class _Loader(yaml.SafeLoader):
    """A safe loader that makes text of Python objects instead of refusing them."""


def _as_text(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> str:
    if isinstance(node, yaml.SequenceNode):
        value: Any = loader.construct_sequence(node, deep=True)
    elif isinstance(node, yaml.MappingNode):
        value = loader.construct_mapping(node, deep=True)
    else:
        value = loader.construct_scalar(node)
    return f"{suffix.rpartition('.')[2]}{value}"


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", _as_text)
