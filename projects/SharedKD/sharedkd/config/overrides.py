"""Overrides of the command line are data: they set values, and name no code to be run."""

import inspect
import re
from typing import Any, Iterator, Tuple

from detectron2.config import LazyConfig
from detectron2.utils.registry import locate

# Hydra's own parser: Detectron2 builds without Hydra parse values in other ways, one by `eval`.
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from sharedkd.errors import ConfigError

__all__ = ["check_override", "override"]

TARGET = "_target_"
#: The packages whose classes an override may choose.
PACKAGES = (
    "detectron2.",
    "fvcore.common.param_scheduler.",
    "fvcore.transforms.",
    "sharedkd.",
    "torch.nn.",
    "torch.optim.",
)


#: A text that can only mean itself, such as a path with spaces, umlauts or a tilde.
PLAIN = re.compile(r"[^'\"()\[\]{}$=,\n]+")


def override(cfg: DictConfig, text: str, path: str) -> None:
    """Apply one ``key=value`` to a config.

    Args:
        cfg: changed in place.
        text: the ``key=value``, as on a command line.
        path: the config's, for messages.

    Raises:
        ConfigError: it cannot be applied, names code to be run, or a group that the config lacks.
    """
    known = {*cfg, "train"}
    text = check_override(text)
    try:
        LazyConfig.apply_overrides(cfg, [text])
    except Exception as e:
        raise _not_applicable(text, e) from e
    for key in sorted(set(cfg) - known):
        del cfg[key]
        raise ConfigError(
            "override", text, f"{path} has no {key}", f"use one of {', '.join(sorted(known))}"
        )


def check_override(override: str) -> str:
    """Check ``override``, one ``key=value`` of the command line.

    Returns:
        the override to apply: a plain text that Hydra's grammar does not take is quoted.

    Raises:
        ConfigError: it cannot be parsed, calls one of OmegaConf's resolvers, or names code other than
            a class of Detectron2, of this package or of PyTorch's layers and optimizers.
    """
    try:
        override, parsed = _parse(override)
        value = parsed.value()
    except Exception as e:
        raise _not_applicable(override, e) from e
    if re.search(r"\$\{[^{}]*:", override):
        raise ConfigError("override", override, "calls a resolver", "write the value itself")
    for target in _targets(parsed.key_or_group.rpartition(".")[2], value):
        if not _is_class(target):
            raise ConfigError(
                "override",
                override,
                f"names code to be run, {target}",
                "overrides may name classes of sharedkd, detectron2, torch.nn and torch.optim; write "
                "anything else into a config file",
            )
    return override


def _parse(override: str) -> Tuple[str, Any]:
    parser = OverridesParser.create()
    try:
        return override, parser.parse_override(override)
    except Exception:
        key, _, value = override.partition("=")
        if not PLAIN.fullmatch(value):
            raise
        override = f"{key}='{value}'"
        return override, parser.parse_override(override)


def _not_applicable(override: str, reason: Exception) -> ConfigError:
    """The error for ``override``, which cannot be parsed or applied because of ``reason``."""
    fix = "write key=value, and a value with special characters as key=\"'value'\""
    if "=" not in override:
        fix = f'write key=value; if this is the rest of a value with a space, quote all: "key=... {override}"'
    return ConfigError("override", override, f"cannot be applied: {reason}", fix)


def _targets(key: Any, value: Any) -> Iterator[str]:
    if str(key) == TARGET:
        yield str(value)
    if isinstance(value, dict):
        for name, child in value.items():
            yield from _targets(name, child)
    if isinstance(value, list):
        for child in value:
            yield from _targets("", child)


def _is_class(target: str) -> bool:
    if not target.startswith(PACKAGES):  # before it is imported
        return False
    try:
        found = locate(target)
    except Exception:
        return True  # there is no such class: construct reports it
    # A path through a module of ours reaches all that it imports, such as a shell.
    return inspect.isclass(found) and f"{found.__module__}.".startswith(PACKAGES)
