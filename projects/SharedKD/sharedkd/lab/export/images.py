"""Real images, prepared as in the student's evaluation."""

import copy
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence

import torch
from detectron2.data import transforms as T
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.nn import functional as F

from sharedkd.config.build import construct
from sharedkd.errors import ConfigError
from sharedkd.lab.analysis.models import validation_records

__all__ = ["Images", "fit", "read_images"]

MOST = 4  # of a validation set


@dataclass
class Images:
    """Images after the resizing that the config's evaluation does."""

    names: List[str]  #: of the files
    tensors: List[Tensor]  #: (3, H, W) uint8 each
    #: How they were prepared: ``channels`` (``BGR`` or ``RGB``), ``resize`` (``short_edge`` and
    #: ``max_size`` in pixels, bilinear; None if nothing or something else is done) and
    #: ``preprocessing``, all that is done, in words.
    about: Dict[str, Any]
    fill: List[int]  #: value per channel that becomes 0 in the network, rounded to whole numbers

    def corner_cases(self, image: Tensor) -> List[Tensor]:
        """A crop of ``image``, for another size, and an image without objects."""
        _, height, width = image.shape
        part = image[:, : height * 3 // 4, : width * 5 // 6].contiguous()
        return [part, fit(image[:, :0, :0], (height, width), self.fill)]


def fit(image: Tensor, size: Sequence[int], fill: Sequence[int]) -> Tensor:
    """Crop or pad ``image`` (3, H, W) to ``size`` at the right and at the bottom, with ``fill`` per channel."""
    height, width = size
    image = image[:, :height, :width]
    padding = (0, width - image.shape[2], 0, height - image.shape[1])
    return torch.stack([F.pad(x, padding, value=v) for x, v in zip(image, fill)])


def read_images(cfg: DictConfig, files: Sequence[str] = ()) -> Images:
    """Read images through ``dataloader.test.mapper`` of ``cfg``, whose model is a plain detector.

    Without ``files`` they are some of ``dataloader.test.dataset``, evenly spread over it.
    """
    key = "dataloader.test.mapper"
    node = OmegaConf.select(cfg, key)
    if node is None:
        raise ConfigError(key, None, "is not set, and says how images are resized", "set it")
    mapper = construct(node, key)
    records = [{"file_name": f} for f in files] or validation_records(cfg, MOST)
    tensors = []
    for record in records:
        try:
            tensors.append(torch.as_tensor(mapper(copy.deepcopy(record))["image"]))
        except Exception as e:
            problem = f"cannot be read: {e}"
            raise ConfigError("--images", record["file_name"], problem, "name image files") from e
    steps = getattr(mapper, "augmentations", [])
    steps = list(getattr(steps, "augs", steps))
    about = {
        "channels": node.get("image_format", "BGR"),
        "resize": _resize(steps),
        "preprocessing": [" ".join(repr(step).split()) for step in steps],
    }
    keys = ("model.pixel_mean", "MODEL.PIXEL_MEAN")  # the latter of a classic yaml
    mean = next((x for x in (OmegaConf.select(cfg, key) for key in keys) if x), (0, 0, 0))
    names = [record["file_name"] for record in records]
    return Images(names, tensors, about, [round(x) for x in mean])


def _resize(steps: Sequence[Any]) -> Optional[Dict[str, int]]:
    if len(steps) != 1 or type(steps[0]) is not T.ResizeShortestEdge:
        return None
    edges = set(steps[0].short_edge_length)
    return dict(short_edge=edges.pop(), max_size=steps[0].max_size) if len(edges) == 1 else None
