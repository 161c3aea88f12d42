"""Builds objects from their config nodes, and reports all errors together."""

from typing import Any, Dict, List, Mapping

from detectron2.config import instantiate
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf

from sharedkd.errors import ConfigError, Findings

from .plain import leaves

__all__ = [
    "builds_the_same",
    "construct",
    "makes",
    "missing_keys",
    "not_set",
    "target_of",
    "value_of",
]


def not_set(key: str) -> ConfigError:
    """The error for ``key``, which has to be set on the command line."""
    return ConfigError(key, "???", "is not set", f"add {key}=... to the command")


def missing_keys(node: DictConfig) -> List[str]:
    """The keys below ``node`` that have to be set on the command line; nothing is resolved."""
    return sorted(key for key, text in leaves(OmegaConf.to_container(node)) if text == "???")


def target_of(node: Any) -> Any:
    """What a config node builds, as an object; None of what is no node.

    Raises:
        ImportError: there is no such object.
    """
    target = node.get("_target_") if isinstance(node, DictConfig) else None
    return locate(target) if isinstance(target, str) else target


def makes(node: Any, kind: type) -> bool:
    """Whether a config node builds an object of a class, or of one derived from it."""
    try:
        target = target_of(node)
    except ImportError:  # reported where the node is built
        return False
    return isinstance(target, type) and issubclass(target, kind)


def builds_the_same(a: Any, b: Any) -> bool:
    """Whether two config nodes build the same; one may be read from a file, where a class is a text."""
    if not (isinstance(a, DictConfig) and isinstance(b, DictConfig)):
        return a == b
    same = a.keys() == b.keys() and target_of(a) == target_of(b)
    return same and all(builds_the_same(a[k], b[k]) for k in a if k != "_target_")


def construct(node: DictConfig, key: str) -> Any:
    """Build an object as Detectron2's ``instantiate`` does, and report why each node fails.

    Args:
        node: a LazyConfig node.
        key: its place in the config.

    Raises:
        ConfigError: an unknown class, an unknown or missing option, or any error of a class; the errors
            of all nodes below ``node`` together.
    """
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise ConfigError(key, node, "is no config node", "use L(CLASS)(OPTION=...)")
    findings = Findings()
    findings.step(_check_target, node, key)
    parts: Dict[str, Any] = {}
    for name in node:  # in this order: they may draw random weights
        child = findings.step(value_of, node, name, f"{key}.{name}")
        recursive = isinstance(child, DictConfig) and "_target_" in child
        parts[name] = findings.step(construct, child, f"{key}.{name}") if recursive else child
    findings.raise_errors()
    try:
        return instantiate(parts)
    except ConfigError as e:
        for each in e.errors:
            # Classes know their options, but not where they are in the config.
            findings.add(each.at(f"{key}.{each.key}") if each.key in parts else each)
    except Exception as e:
        reason = f"cannot be built: {str(e) or type(e).__name__}"
        target = node.get("_target_")
        target = target if isinstance(target, str) else getattr(target, "__name__", target)
        findings.add(ConfigError(key, target, reason, "correct this part of the config"))
    findings.raise_errors()


def _check_target(node: Mapping, key: str) -> None:
    target = node["_target_"]
    if not isinstance(target, str):
        return
    try:
        found = locate(target)
    except Exception:
        found = None
    if found is None:
        raise ConfigError(f"{key}._target_", target, "there is no such class", "correct its name")


def value_of(node: Mapping, name: str, key: str) -> Any:
    """The value of ``name`` in ``node``, references resolved; ``key`` is its place in the config.

    Raises:
        ConfigError: it is not set, or refers to nothing.
    """
    if isinstance(node, DictConfig) and OmegaConf.is_missing(node, name):
        raise not_set(key)
    try:
        return node[name]
    except Exception as e:  # a reference that leads nowhere
        reason = str(e).splitlines()[0]
        raise ConfigError(key, "", f"cannot be read: {reason}", "correct this key") from e
