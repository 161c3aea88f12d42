"""Checks a config group against a dataclass: types, limits, choices and unknown keys."""

from copy import deepcopy
from dataclasses import field, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, Dict, Mapping, Sequence, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ValidationError

from sharedkd.errors import FAILED, ConfigError, Findings
from sharedkd.values import check_choice, check_list, check_number, check_switch, check_text

from .build import value_of

__all__ = ["defaults_of", "limited", "settle"]


def limited(default: Any, **limits: Any) -> Any:
    """A dataclass field with limits beyond its type.

    Args:
        default: its default.
        limits: ``least``, ``above`` and ``most`` for a number or the items of a list, see
            :func:`~sharedkd.values.check_number`; ``choices`` or ``empty=False`` for a text; ``check``, a
            function of key and value that raises a ConfigError.
    """
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=limits)
    return field(default=default, metadata=limits)


def defaults_of(structure: type) -> Dict[str, Any]:
    """The defaults of a dataclass as nested dicts."""
    return OmegaConf.to_container(OmegaConf.structured(structure))


def settle(structure: type, given: Any, key: str, findings: Findings) -> Dict[str, Any]:
    """The values of ``given`` with the types of ``structure``, and its defaults for the others.

    A value of another type that has one meaning is converted: ``"10"`` and ``1e1`` to 10, ``neck`` to
    ``[neck]``.

    Args:
        structure: a dataclass.  If its ``OTHERS`` is true, keys that it does not name are passed on.
        given: a group of a config.
        key: the place of that group.
        findings: receives an error for each unknown key and each value that cannot be used; the default
            replaces the value.
    """
    if not isinstance(given, DictConfig):
        findings.add(ConfigError(key, given, "is no group of keys", f"use {key}.NAME=VALUE"))
        given = OmegaConf.create({})
    settled, types = OmegaConf.structured(structure), get_type_hints(structure)
    others: Dict[str, Any] = {}
    for name in given:
        place = f"{key}.{name}"
        value = findings.step(value_of, given, name, place)
        if name not in types:
            if getattr(structure, "OTHERS", False):
                others[name] = value
            else:
                findings.add(_unknown(place, value, list(settled)))
        elif is_dataclass(types[name]):
            if value is not FAILED:
                others[name] = settle(types[name], value, place, findings)
        else:
            findings.step(_set, settled, name, types[name], place, value)
    return {**OmegaConf.to_container(settled), **others}


def _unknown(key: str, value: Any, known: list) -> ConfigError:
    similar = get_close_matches(key.rpartition(".")[2], known, n=1)
    fix = f"did you mean {similar[0]}?" if similar else f"use one of {', '.join(known)}"
    return ConfigError(key, value, "no such key", fix)


def _set(settled: DictConfig, name: str, type_: Any, key: str, value: Any) -> None:
    """Set a value of a structured config, converted to its type.

    Raises:
        ConfigError: it is of another type, or not within its limits.
    """
    default = deepcopy(settled[name])  # a list is changed in place
    optional = type(None) in get_args(type_)
    kind = get_args(type_)[0] if optional else type_
    try:
        settled[name] = value if value is None else _converted(value, kind)
        value = settled[name]
    except (ValidationError, ValueError):
        pass  # _check reports it with a remedy
    structure = OmegaConf.get_type(settled)
    limits = next(f.metadata for f in fields(structure) if f.name == name)
    if value is None and optional:
        return
    try:
        _check(key, value, kind, limits, optional)
    except ConfigError:
        settled[name] = default
        raise


def _converted(value: Any, kind: Any) -> Any:
    """Convert ``value`` to ``kind`` if it has one meaning.

    Raises:
        ValueError: it has none, though OmegaConf would convert it.
    """
    if get_origin(kind) is list:
        items = [value] if isinstance(value, (str, int, float)) else value
        if not isinstance(items, Sequence):
            raise ValueError(value)
        return [_converted(x, get_args(kind)[0]) for x in items]
    if kind is int and isinstance(value, (str, float)) and float(value).is_integer():
        return int(float(value))
    if kind is str and isinstance(value, (bool, float)):  # 1e3 may have been the name 1e3
        raise ValueError(value)
    if kind is bool and isinstance(value, int) and value not in (0, 1):
        raise ValueError(value)
    return value


def _check(
    key: str, value: Any, kind: Any, limits: Mapping[str, Any], optional: bool = False
) -> None:
    """Check the type and limits of a value.

    Raises:
        ConfigError: ``value`` is not of this ``kind``, or not within its ``limits``, see :func:`limited`.
    """
    limits = dict(limits)
    check = limits.pop("check", None)
    if kind in (int, float):
        check_number(key, value, whole=kind is int, or_null=optional, **limits)
    elif kind is bool:
        check_switch(key, value)
    elif get_origin(kind) is list:
        check_list(key, value)
        for item in value:
            _check(key, item, get_args(kind)[0], limits)
    elif "choices" in limits:
        check_choice(key, value, limits["choices"])
    elif kind is str:
        check_text(key, value, **limits)
    if check is not None:
        check(key, value)
