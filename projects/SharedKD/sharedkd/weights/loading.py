"""Loads weights: a trained detector completely, a student's initial weights as far as they fit."""

import hashlib
import logging
import math
import os
import re
from typing import (
    TYPE_CHECKING,
    Any,
    Collection,
    Dict,
    FrozenSet,
    Iterable,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from sharedkd.errors import ConfigError

from .conventions import OF_DETECTOR, Convention, convention_of_file, convention_of_model
from .download import fetch
from .pickles import Refused, plain_name
from .reading import read_weights

if TYPE_CHECKING:
    from fvcore.common.checkpoint import _IncompatibleKeys

__all__ = [
    "PARTS",
    "DataCheckpointer",
    "Initial",
    "at_scale",
    "fingerprint",
    "inherit",
    "initialise",
    "load_trained",
    "of_parts",
    "parts_of",
]

logger = logging.getLogger("detectron2.sharedkd")

#: Names that a file may lack or have beyond the model: constants from the config, and counters.
HARMLESS = ("pixel_mean", "pixel_std", "cell_anchors", "num_batches_tracked")

#: Names of torchvision's ResNets -> Detectron2's.
_RULES = (
    (r"^(?!layer)", "stem."),
    (r"^layer(\d)", lambda found: f"res{int(found[1]) + 1}"),
    (r"\bbn(\d)", r"conv\1.norm"),
    (r"\bdownsample\.0", "shortcut"),
    (r"\bdownsample\.1", "shortcut.norm"),
)


class DataCheckpointer(DetectionCheckpointer):
    """Reads files as data, and finds the names of a bare backbone in the detector.

    Args:
        model, save_dir, save_to_disk, checkpointables: Detectron2's.

    Attributes:
        trusted: let files run code while they are read.
        incompatible: what did not match when a file was loaded, which Detectron2 only logs.
        convention: how the file's images were prepared.
    """

    trusted = False
    incompatible: "_IncompatibleKeys"
    convention: Convention

    def _load_file(self, filename: str) -> Dict[str, Any]:
        data = read_weights(filename, self.trusted)
        ours = self.model.state_dict()
        state = {name.removeprefix("module."): x for name, x in data["model"].items()}
        if "layer1.0.conv1.weight" in state and not any("layer1." in name for name in ours):
            data.update(model=_renamed(state), __author__="torchvision")
        self.convention = convention_of_file(data)
        if state.keys().isdisjoint(ours):
            data["matching_heuristics"] = True
        return data

    def _load_model(self, checkpoint: Dict[str, Any]) -> "_IncompatibleKeys":
        self.incompatible = super()._load_model(checkpoint)
        return self.incompatible


def _renamed(state: Mapping[str, Any]) -> Dict[str, Any]:
    """The tensors of a ResNet of torchvision under Detectron2's names.

    >>> list(_renamed({"bn1.bias": 0, "layer2.0.downsample.1.weight": 0}))
    ['stem.conv1.norm.bias', 'res3.0.shortcut.norm.weight']
    """
    found = {}
    for name, tensor in state.items():
        for pattern, replacement in _RULES:
            name = re.sub(pattern, replacement, name)
        found[name] = tensor
    return found


def fingerprint(model: nn.Module) -> str:
    """The first 16 digits of the SHA-256 over the names and bytes of the weights of ``model``."""
    digest = hashlib.sha256()
    for name, x in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _load(
    model: nn.Module, path: str, key: str, trusted: bool, sha256: Optional[str]
) -> Tuple[DataCheckpointer, Dict[str, Any]]:
    """Load what matches; arguments as those of :func:`load_trained`.

    Returns:
        what has loaded it, and the file's other entries.
    """
    checkpointer = DataCheckpointer(model, save_to_disk=False)
    checkpointer.trusted = trusted
    group = key.rpartition(".")[0]
    sha256_key = f"{group}.init_sha256" if group == "train" else f"{group}.sha256"
    local = path
    try:
        local = fetch(path, sha256, sha256_key)
        if not os.path.isfile(local):
            raise FileNotFoundError(local)
        rest = checkpointer.load(local)
    except ConfigError:
        raise
    except Refused as e:
        raise ConfigError(
            key,
            path,
            f"asks for {e.asked}, and not for weights alone: reading it could run any program here",
            f"get it as .safetensors, or add {group}.trust_checkpoint=True to let it run, if you trust "
            "its maker as you trust those whose programs you install",
        ) from e
    except Exception as e:
        # A reader may raise anything; the user gets one kind of error.
        said = plain_name(" ".join(str(e).split()), 300)
        missing = isinstance(e, FileNotFoundError)
        reason = "no such file" if missing else f"cannot be read ({type(e).__name__}: {said})"
        reason += f"; its copy is {local}" if local != path else ""
        raise ConfigError(
            key, path, reason, "point it at a Detectron2 .pth, .pkl or .safetensors checkpoint"
        ) from e
    return checkpointer, rest


def _shortened(names: Sequence[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _mistakes(found: "_IncompatibleKeys") -> List[str]:
    """Describe the tensors that are missing, unknown, or of another shape."""

    def relevant(name: str) -> bool:
        return not any(x in name for x in HARMLESS)

    reshaped = {k for k, _, _ in found.incorrect_shapes}  # fvcore reports these as missing as well
    wrong = {
        "missing in the file": [k for k in found.missing_keys if relevant(k) and k not in reshaped],
        "unknown to the model": [k for k in found.unexpected_keys if relevant(k)],
        "of another shape": [
            f"{k} {a} against {b}" for k, a, b in found.incorrect_shapes if relevant(k)
        ],
    }
    return [f"{len(names)} {what}: {_shortened(names)}" for what, names in wrong.items() if names]


def load_trained(
    model: nn.Module, path: str, key: str, trusted: bool = False, sha256: Optional[str] = None
) -> Dict[str, Any]:
    """Load a trained detector completely, or not at all.

    Args:
        model: plain Detectron2 model.
        path: ``detectron2://``, URL, ``.pkl``, ``.pth`` or ``.safetensors``.
        key: the config key that holds the path, for messages.
        trusted: read the file with loaders that run what it asks for, see :mod:`.reading`.
        sha256: of the file, see :func:`.download.fetch`.

    Returns:
        the file's other entries, such as the trainer's state.

    Raises:
        ConfigError: the file is missing, unreadable, not the one of that SHA-256, or asks for more
            than data; or it does not fill the model exactly.
    """
    checkpointer, rest = _load(model, path, key, trusted, sha256)
    mistakes = _mistakes(checkpointer.incompatible)
    theirs, ours = checkpointer.convention, convention_of_model(model)
    for name in ("mean", "std"):
        a, b = getattr(theirs, name), getattr(ours, name)
        if theirs.maker == OF_DETECTOR and b and (len(a) != len(b) or not np.allclose(a, b, 0.01)):
            numbers = ([round(x, 3) for x in y] for y in (a, b))
            mistakes.append("pixel_{} {} against {}".format(name, *numbers))
    if mistakes:
        raise ConfigError(
            key,
            path,
            f"does not fit this {type(model).__name__} ({'; '.join(mistakes)})",
            "use the weights of this very model, or the config of these weights",
        )
    logger.info(f"{key}={path}: all {len(model.state_dict())} tensors loaded")
    return rest


class Initial(NamedTuple):
    """What initial weights have done.

    Args:
        names: the model's tensors that the file filled.
        convention: how the images were prepared that the file was trained on.
    """

    names: FrozenSet[str]
    convention: Convention


def initialise(
    model: nn.Module,
    path: str,
    key: str = "train.init_checkpoint",
    trusted: bool = False,
    sha256: Optional[str] = None,
) -> Initial:
    """Load a student's initial weights: an ImageNet backbone, or a detector, perhaps of other classes.

    Tensors outside the bottom-up network may be missing or differ in shape; they then keep their own
    initialisation, and the log names them.

    Args:
        model, path, key, trusted, sha256: see :func:`load_trained`; an empty path does nothing.

    Raises:
        ConfigError: see :func:`load_trained`; or it was made for another bottom-up network.
    """
    if not path:
        return Initial(frozenset(), Convention())
    checkpointer, _ = _load(model, path, key, trusted, sha256)
    found = checkpointer.incompatible
    backbone = getattr(model, "backbone", model)
    bottom_up = "backbone.bottom_up." if hasattr(backbone, "bottom_up") else "backbone."
    # An ImageNet file has no prefix; what it holds beyond the model keeps its own name.
    stages = tuple(f"{n}." for n, _ in getattr(backbone, "bottom_up", backbone).named_children())

    def is_convolution(name: str) -> bool:
        return name.endswith(".weight") and not any(x in name for x in (".norm", "fc", "offset"))

    missing = [k for k in found.missing_keys if k.startswith(bottom_up) and is_convolution(k)]
    reshaped = [x[0] for x in found.incorrect_shapes if x[0].startswith(bottom_up)]
    surplus = [
        k for k in found.unexpected_keys if k.startswith((bottom_up, *stages)) and is_convolution(k)
    ]
    if missing or reshaped or surplus:
        raise ConfigError(
            key,
            path,
            f"was made for another backbone ({len(missing)} of its convolutions missing, "
            f"{len(reshaped)} of another shape, {len(surplus)} too many: "
            f"{_shortened([*missing, *reshaped, *surplus])})",
            "use weights of the student's backbone, or an empty string to start from scratch",
        )
    unfilled = {*found.missing_keys, *(x[0] for x in found.incorrect_shapes)}
    return Initial(frozenset(model.state_dict()) - unfilled, checkpointer.convention)


#: The convolutions of an FPN's level, by its number.
_LEVEL = re.compile(r"(backbone\.fpn_(?:lateral|output))(\d+)")

#: What can be inherited: part -> the beginnings of its parameters' names.
PARTS: Dict[str, Tuple[str, ...]] = {
    "neck": ("backbone.",),
    "head": ("head.", "proposal_generator.", "roi_heads."),
}


def parts_of(names: Collection[str]) -> List[str]:
    """The parts that some of a detector's tensors belong to."""
    return [part for part in PARTS if any(_is_of(part, name) for name in names)]


def of_parts(names: Iterable[str], parts: Sequence[str]) -> List[str]:
    """The tensors among ``names``, of a detector, that belong to one of ``parts``."""
    return [name for name in names if any(_is_of(part, name) for part in parts)]


def inherit(
    student: nn.Module,
    teacher: nn.Module,
    parts: Sequence[str],
    scale: float = 1,
    key: str = "train.inherit",
) -> List[str]:
    """Copy the layers of the teacher's neck and head into the student where names and shapes agree.

    A layer with a tensor of another shape is not copied at all.

    Args:
        student, teacher: plain detectors.
        parts: any of ``neck`` (the FPN's own convolutions) and ``head``.
        scale: the teacher sees the images enlarged so many times; 2: an object that the student finds on
            its level 2 is one of the teacher's level 3, so that the student's ``fpn_output2`` is a copy
            of ``fpn_output3``.
        key: the config key that holds the parts, for messages.

    Returns:
        the names of the tensors copied, which are also logged.

    Raises:
        ConfigError: an unknown part.
    """
    unknown = [p for p in parts if p not in PARTS]
    if unknown:
        raise ConfigError(key, unknown, "no such part", f"use any of {list(PARTS)}")
    source, target = teacher.state_dict(), student.state_dict()
    names = {name: at_scale(name, scale) for name in of_parts(target, parts)}
    fits = {
        name: theirs in source and source[theirs].shape == target[name].shape
        for name, theirs in names.items()
    }
    others = {_layer(name) for name in names if not fits[name]}
    copied = [name for name in names if _layer(name) not in others]
    with torch.no_grad():
        for name in copied:
            target[name].copy_(source[names[name]])
    if copied:
        listed = ", ".join(copied)
        logger.info(f"The student inherits {len(copied)} tensors from the teacher: {listed}")
    return copied


def _layer(name: str) -> str:
    """The layer of a tensor; a norm belongs to the convolution that applies it."""
    return name.rpartition(".")[0].removesuffix(".norm")


def _is_of(part: str, name: str) -> bool:
    return name.startswith(PARTS[part]) and not name.startswith("backbone.bottom_up.")


def at_scale(name: str, scale: float) -> Optional[str]:
    """The teacher's name of the student's tensor ``name``; None: it has no such tensor."""
    if scale == 1 or not name.startswith("backbone."):
        return name
    level = _LEVEL.match(name)
    if level is None:  # levels above the bottom-up network's are made of other levels
        return None
    return f"{level[1]}{int(level[2]) + round(math.log2(scale))}{name[level.end() :]}"
