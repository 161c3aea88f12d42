"""The names of a ResNet's tensors: torchvision's, and Detectron2's."""

import re
from typing import Any, Dict, Mapping

__all__ = ["is_torchvisions_resnet", "renamed"]

_OF_TORCHVISION = "layer1.0.conv1.weight"
_RULES = (
    (r"^(?!layer)", "stem."),
    (r"^layer(\d)", lambda found: f"res{int(found[1]) + 1}"),
    (r"\bbn(\d)", r"conv\1.norm"),
    (r"\bdownsample\.0", "shortcut"),
    (r"\bdownsample\.1", "shortcut.norm"),
)


def is_torchvisions_resnet(names: Mapping[str, Any]) -> bool:
    """Whether the names are those of a ResNet of torchvision."""
    return _OF_TORCHVISION in names


def renamed(state: Mapping[str, Any]) -> Dict[str, Any]:
    """The tensors of a ResNet of torchvision under Detectron2's names.

    >>> list(renamed({"bn1.bias": 0, "layer2.0.downsample.1.weight": 0}))
    ['stem.conv1.norm.bias', 'res3.0.shortcut.norm.weight']
    """
    found = {}
    for name, tensor in state.items():
        for pattern, replacement in _RULES:
            name = re.sub(pattern, replacement, name)
        found[name] = tensor
    return found
