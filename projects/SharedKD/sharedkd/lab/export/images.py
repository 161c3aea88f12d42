"""Real images, as the student's evaluation gives them to it."""

import copy
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from detectron2.data import transforms as T
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.nn import functional as F

from sharedkd.config.build import construct
from sharedkd.errors import ConfigError

__all__ = ["Images", "fit", "read_images"]

MOST = 4  # of a validation set


@dataclass(frozen=True)
class Images:
    """Images after the resizing that the config's evaluation does.

    Args:
        names: file names.
        tensors: (3, H, W) uint8 each.
        input_format: channel order, ``BGR`` or ``RGB``.
        resize: ``short_edge`` and ``max_size`` in pixels, bilinear; None if nothing or something
            else is done.
        preprocessing: all that is done, in words.
        fill: value per channel that becomes 0 in the network, rounded to whole numbers.
    """

    names: List[str]
    tensors: List[Tensor]
    input_format: str
    resize: Optional[Dict[str, int]]
    preprocessing: List[str]
    fill: List[int]

    def common_size(self, multiple: int) -> Tuple[int, int]:
        """(H, W) that no image exceeds, both a multiple of ``multiple``."""
        height, width = (max(x.shape[i] for x in self.tensors) for i in (1, 2))
        return ceil(height / multiple) * multiple, ceil(width / multiple) * multiple

    def with_corner_cases(self, image: Tensor) -> "Images":
        """Also a part of ``image``, which has another size, and one that is empty."""
        _, height, width = image.shape
        part = image[:, : height * 3 // 4, : width * 5 // 6].contiguous()
        empty = fit(image[:, :0, :0], (height, width), self.fill)
        names = [*self.names, "a part of one", "an empty image"]
        return replace(self, names=names, tensors=[*self.tensors, part, empty])


def fit(image: Tensor, size: Sequence[int], fill: Sequence[int]) -> Tensor:
    """Cut and fill up at the right and at the bottom.

    Args:
        image: (3, H, W)
        size: (H', W') of the result.
        fill: value of new pixels, per channel.
    """
    height, width = size
    image = image[:, :height, :width]
    padding = (0, width - image.shape[2], 0, height - image.shape[1])
    return torch.stack([F.pad(x, padding, value=v) for x, v in zip(image, fill)])


def read_images(cfg: DictConfig, files: Sequence[str] = ()) -> Images:
    """Read images through ``dataloader.test.mapper``.

    Args:
        cfg: with a plain detector as its model.
        files: image files; none: some of ``dataloader.test.dataset``, of different sizes if it can be.

    Raises:
        ConfigError: no mapper, no images, or one that cannot be read.
    """
    key = "dataloader.test.mapper"
    node = OmegaConf.select(cfg, key)
    if node is None:
        raise ConfigError(key, None, "is not set, and says how images are resized", "set it")
    mapper = construct(node, key)
    records = [{"file_name": f} for f in files] or _validation_records(cfg)
    tensors = []
    for record in records:
        try:
            tensors.append(torch.as_tensor(mapper(copy.deepcopy(record))["image"]))
        except Exception as e:
            raise ConfigError(
                "--images", record["file_name"], f"cannot be read: {e}", "name image files"
            ) from e
    mean = OmegaConf.select(cfg, "model.pixel_mean", default=(0, 0, 0))
    steps = _steps(mapper)
    return Images(
        names=[record["file_name"] for record in records],
        tensors=tensors,
        input_format=node.get("image_format", "BGR"),
        resize=_resize(steps),
        preprocessing=[" ".join(repr(step).split()) for step in steps],
        fill=[round(x) for x in mean],
    )


def _validation_records(cfg: DictConfig) -> List[Dict[str, Any]]:
    key = "dataloader.test.dataset"
    records = construct(OmegaConf.select(cfg, key), key)
    if not records:
        raise ConfigError(key, None, "is empty", "name images with --images FILE ...")
    by_size = {(x.get("height"), x.get("width")): x for x in reversed(records)}
    chosen = list(by_size.values())[::-1][:MOST]
    return chosen + [x for x in records if x not in chosen][: MOST - len(chosen)]


def _steps(mapper: Callable[[Dict[str, Any]], Dict[str, Any]]) -> List[Any]:
    steps = getattr(mapper, "augmentations", [])
    return list(getattr(steps, "augs", steps))


def _resize(steps: Sequence[Any]) -> Optional[Dict[str, int]]:
    if len(steps) != 1 or type(steps[0]) is not T.ResizeShortestEdge:
        return None
    edges = set(steps[0].short_edge_length)
    return dict(short_edge=edges.pop(), max_size=steps[0].max_size) if len(edges) == 1 else None
