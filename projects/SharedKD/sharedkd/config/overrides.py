"""Overrides of the command line are data: they set values, and name no code to be run."""

import inspect
import os
import re
import shlex
from typing import Any, Iterator, List, Sequence, Set, Tuple

from detectron2.config import LazyConfig
from detectron2.utils.registry import locate

# Hydra's own parser: Detectron2 builds without Hydra parse values in other ways, one by `eval`.
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from sharedkd.errors import ConfigError, Findings

__all__ = ["check_override", "joined", "override"]

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


#: What Hydra's grammar does not take, and can only mean itself: a text with spaces, umlauts or a tilde,
#: a path with any characters but quotes, or a list of such.
PLAIN = re.compile(r"[^'\"()\[\]{}$=,\n]+|[^'\"$\n\[{][^'\"$\n]*[/\\][^'\"$\n]*")
LIST = re.compile(r"\[([^'\"()\[\]{}$=\n]+)\]")


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
    parser, (key, _, value) = OverridesParser.create(), override.partition("=")
    try:
        parsed = parser.parse_override(override)
    except Exception:
        items = LIST.fullmatch(value)
        if items:
            value = "[" + ",".join(_quoted(x.strip()) for x in items[1].split(",")) + "]"
        elif PLAIN.fullmatch(value):
            value = _quoted(value)
        else:
            raise
        override = f"{key}={value}"
        parsed = parser.parse_override(override)
    if parsed.is_sweep_override():
        raise ValueError("a comma outside of brackets and quotes stands between alternatives")
    return override, parsed


def _quoted(text: str) -> str:
    """``text`` in Hydra's quotes, where back slashes before a quote are doubled."""
    text = re.sub(r"(\\*)'", r"\1\1\\'", text)
    return f"'{text}" + "\\" * (len(text) - len(text.rstrip("\\"))) + "'"


def _not_applicable(override: str, reason: Exception) -> ConfigError:
    """The error for ``override``, which cannot be parsed or applied because of ``reason``."""
    key, equals, value = override.partition("=")
    fix = "write key=value"
    if equals:
        text = f"{key}={_quoted(value)}"
        text = shlex.quote(text) if re.search(r'["$`\\!]', text) else f'"{text}"'
        fix = f"write key=value, a list as key=[a,b], and this value, if it is one text, as {text}"
    return ConfigError("override", override, f"cannot be applied: {reason}", fix)


def joined(overrides: Sequence[str], findings: Findings) -> List[str]:
    """The overrides, where those that a shell has split at spaces are in one piece again.

    Args:
        findings: receives an error for each whose value is then no file or folder that is there.
    """
    found: List[str] = []
    words: Set[str] = set()
    for text in overrides:
        if "=" in text or not found:
            found.append(text)
        else:
            words.discard(found[-1])
            found[-1] += f" {text}"
            words.add(found[-1])
    for text in found:
        if text in words and not os.path.exists(os.path.expanduser(text.partition("=")[2])):
            problem = "is in several words, and no file or folder has that name"
            fix = f'write each key=value as one word, with quotes where it has spaces: "{text}"'
            findings.add(ConfigError("override", text, problem, fix))
    return found


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
