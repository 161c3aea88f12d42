"""The settings that differ between runs, and their hardware, versions and commands."""

import os
from typing import Any, Dict, Iterable, List, Mapping, Optional, Tuple

from sharedkd.config.plain import leaves
from sharedkd.lab.runs import short

from .source import Source, is_distilled

__all__ = ["differences", "origin"]

_OF_EACH_ARM = ("train.output_dir", "train.seed")

Rows = List[Tuple[str, str, str]]  #: key, value of the baseline, value of the method


def differences(source: Source) -> Dict[str, Rows]:
    """Method -> differences from the baseline's config; for one run, from a plain detector's."""
    found = {method: dict(leaves(_aligned(c))) for method, c in source.configs.items()}
    base = source.record["baseline"]
    if base not in found:
        return {}
    if source.is_single:
        pair = ("model.stages.", "model.teacher")
        plain = {k: v for k, v in found[base].items() if not k.startswith(pair)}
        return {base: _rows(plain, found[base])}
    return {m: _rows(found[base], config) for m, config in found.items() if m != base}


def _rows(plain: Mapping[str, str], config: Mapping[str, str]) -> Rows:
    """The differences of two configs; a group that only one has, such as a stage, is one row."""
    rows: Dict[str, Tuple[List[str], List[str]]] = {}
    for key in dict.fromkeys([*plain, *config]):
        if plain.get(key) == config.get(key) or key.startswith(_OF_EACH_ARM):
            continue
        both = key in plain and key in config
        start = key if both else _beginning(key, config if key in plain else plain)
        rest = key[len(start) + 1 :]
        for values, side in zip((plain, config), rows.setdefault(start, ([], []))):
            if key in values:
                value = short(values[key]) if os.path.isabs(values[key]) else values[key]
                side.append(f"{rest}={value}" if rest else value)
    return [(key, ", ".join(a) or "–", ", ".join(b) or "–") for key, (a, b) in rows.items()]


def _beginning(key: str, others: Iterable[str]) -> str:
    """The shortest beginning of ``key`` that none of ``others`` has; of a stage its whole name."""
    parts = key.split(".")
    for size in range(3 if key.startswith("model.stages.") else 1, len(parts)):
        start = ".".join(parts[:size])
        if not any(f"{other}.".startswith(f"{start}.") for other in others):
            return start
    return key


def _aligned(config: Mapping[str, Any]) -> Dict[str, Any]:
    """A plain detector's config in the shape of a pair's."""
    model = config.get("model")
    if is_distilled(config):
        parts = {key: model[key] for key in ("student", "teacher", "stages") if model.get(key)}
        return {**config, "model": parts}
    return {**config, "model": {"student": model}}


def origin(source: Source) -> List[Tuple[str, str]]:
    """Hardware, versions and commands with their headings, without unknown ones."""
    record, runs = source.record, [run.record for run in source.runs]
    arms = [*runs, *record["arms"]]
    config = [record.get("config_file") or "", *(record.get("overrides") or [])]
    rows = [
        ("config", " ".join(config)),
        ("hardware", _distinct(arm.get("hardware") for arm in arms)),
        ("processes", _distinct(arm.get("processes") for arm in arms)),
        ("versions", _distinct(_versions(arm.get("versions") or {}) for arm in arms)),
        ("initial weights", _distinct(arm.get("initial_weights") for arm in arms)),
        ("command", record.get("command") or ""),
    ]
    if not record.get("command"):
        rows += [
            (f"command of {run.method}", run.record.get("command") or "") for run in source.runs
        ]
    return [(name, text) for name, text in rows if text]


def _versions(found: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(found.items()))


def _distinct(values: Iterable[Optional[Any]]) -> str:
    return "; ".join(dict.fromkeys(str(x) for x in values if x))
