"""The settings that differ between runs, and their hardware, versions and commands."""

import os
from typing import Any, Dict, Iterator, List, Mapping, Tuple

from sharedkd.config.plain import leaves
from sharedkd.lab.runs import short
from sharedkd.lab.scores import texts_of

from .source import Source, is_distilled

__all__ = ["differences", "origin"]

_OF_EACH_ARM = ("train.output_dir", "train.seed")
_NOTHING = "–"

Rows = List[Tuple[str, str, str]]  #: key, value of the baseline, value of the method


def differences(source: Source) -> Dict[str, Rows]:
    """Method -> differences from the baseline's config; for one run, from a plain detector's."""
    found = {method: _aligned(config) for method, config in source.configs.items()}
    base = source.record["baseline"]
    if base not in found:
        return {}
    if source.is_single:
        plain = {**found[base], "model": found[base]["model"]["student"]}
        return {base: list(_rows("", _aligned(plain), found[base]))}
    return {m: list(_rows("", found[base], config)) for m, config in found.items() if m != base}


def _rows(key: str, plain: Any, own: Any) -> Iterator[Tuple[str, str, str]]:
    """The differences of two configs; a group that only one has, such as a stage, is one row."""
    if isinstance(plain, Mapping) and isinstance(own, Mapping):
        for name in dict.fromkeys([*own, *plain]):
            inner = f"{key}.{name}" if key else str(name)
            yield from _rows(inner, plain.get(name, _NOTHING), own.get(name, _NOTHING))
    elif str(plain) != str(own) and key not in _OF_EACH_ARM:
        yield key, _text(plain), _text(own)


def _text(value: Any) -> str:
    if isinstance(value, Mapping) and value:
        return ", ".join(f"{key}={_text(inner)}" for key, inner in leaves(value))
    text = str(value)
    return short(text) if os.path.isabs(text) else text


def _aligned(config: Mapping[str, Any]) -> Dict[str, Any]:
    """A plain detector's config in the shape of a pair's."""
    model = config.get("model")
    if is_distilled(config):
        teacher = {"teacher": model["teacher"]} if model.get("teacher") else {}
        parts = {"student": model["student"], **teacher, "stages": model["stages"] or {}}
        return {**config, "model": parts}
    return {**config, "model": {"student": model, "stages": {}}}


def origin(source: Source) -> List[Tuple[str, str]]:
    """Hardware, versions and commands with their headings, without unknown ones."""
    record, runs = source.record, [run.record for run in source.runs]
    arms = [*runs, *record["arms"]]
    config = [record.get("config_file") or "", *(record.get("overrides") or [])]
    rows = [("config", " ".join(config))]
    for name in ("hardware", "processes", "versions", "initial weights"):
        rows.append((name, "; ".join(texts_of(arms, name.replace(" ", "_")))))
    rows.append(("command", record.get("command")))
    if not record.get("command"):
        rows += [(f"command of {x.method}", x.record.get("command")) for x in source.runs]
    return [(name, text) for name, text in rows if text]
