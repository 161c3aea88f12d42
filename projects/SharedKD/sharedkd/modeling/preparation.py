"""What a detector does to its images: channels, normalisation and padding, as in its own training."""

import logging
from typing import Any, Dict, List, Optional, Sequence

import torch
import torch.nn.functional as F
from detectron2.structures import ImageList
from detectron2.utils.logger import log_first_n
from torch import Tensor, nn

from sharedkd.errors import ConfigError
from sharedkd.weights.conventions import order_of

__all__ = [
    "COLOURS",
    "converted",
    "device_of",
    "guess_format",
    "image_channels",
    "prepare_images",
    "size_divisibility",
]

COLOURS = {"BGR", "RGB"}


def device_of(detector: nn.Module) -> torch.device:
    """The device of a detector's parameters; some detectors have no ``.device``, or a string."""
    return next(detector.parameters()).device


def size_divisibility(detector: nn.Module) -> int:
    """The number that the sides of a detector's padded images are multiples of; 0: none."""
    own = getattr(detector, "size_divisibility", 0)
    backbone = getattr(detector, "backbone", None)
    return max(own or getattr(backbone, "size_divisibility", 0), 0)


def image_channels(detector: nn.Module) -> int:
    """How many channels a detector's images have."""
    mean = getattr(detector, "pixel_mean", None)
    if isinstance(mean, Tensor) and mean.numel() > 1:
        return mean.numel()
    backbone = getattr(detector, "backbone", detector)
    for module in getattr(backbone, "bottom_up", backbone).modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    return 3


def guess_format(detector: nn.Module) -> Optional[str]:
    """The channel order of a detector that normalises by ImageNet's means; None: it does not."""
    mean = getattr(detector, "pixel_mean", None)
    return order_of(mean.flatten().tolist()) if isinstance(mean, Tensor) else None


def converted(image: Tensor, given: str, channels: int, wanted: str, key: str) -> Tensor:
    """An image of the data loader with the channels of a teacher.

    An equal number of channels stays as it is, three are flipped between BGR and RGB, and one becomes
    three.

    Args:
        image: (C, H, W)
        given, wanted: the formats of the loader and of the teacher.
        channels: of the teacher.
        key: the teacher's place in the config, for messages.

    Raises:
        ConfigError: there is no such conversion.
    """
    count = len(image)
    if count == channels and (count != 3 or given == wanted):
        return image
    if count == channels and {given, wanted} == COLOURS:
        return image.flip(0)
    if count == 1 and channels == 3:
        return image.expand(3, -1, -1)
    raise ConfigError(
        f"{key}.input_format",
        wanted,
        f"is that of a teacher for images of {channels} channels, and the data loader's have {count} "
        f"({given}): there is no conversion",
        f"use a teacher for images of {count} channels",
    )


def prepare_images(
    detector: nn.Module, inputs: Sequence[Dict[str, Any]], divisor: int = 0, key: str = "model"
) -> ImageList:
    """Normalise, pad and batch images as ``detector`` itself does.

    By its own ``preprocess_image``.  A detector without one normalises by ``pixel_mean`` and
    ``pixel_std`` or a function ``normalizer``, and pads as its backbone's ``padding_constraints`` (or
    ``square_pad``) and ``size_divisibility`` say.

    Args:
        detector: on its device.
        inputs: Detectron2's records, with the detector's channels.
        divisor: what sides are multiples of where the detector does not say.
        key: the detector's place in the config, for messages.

    Raises:
        ConfigError: it says nowhere how it normalises.
    """
    prepare = _own if _prepares_itself(detector) else _by_attributes
    largest = max(max(x["image"].shape[-2:]) for x in inputs)
    square = _padding(detector)[0]
    try:
        images = prepare(detector, inputs, divisor, key)
    except RuntimeError:  # Detectron2's way to refuse an image that is larger than its square
        if not 0 < square < largest:
            raise
        cut = [{**x, "image": x["image"][..., :square, :square]} for x in inputs]
        images = prepare(detector, cut, divisor, key)
    height, width = images.shape[-2:]
    sizes = [tuple(x["image"].shape[-2:]) for x in inputs]
    if any(h > height or w > width for h, w in sizes):
        log_first_n(
            logging.WARNING,
            f"{key}: {type(detector).__name__} crops images that are larger than {height}x{width}; what it "
            "does not see is not distilled, so use smaller images",
            name="detectron2.sharedkd",
            key="message",
        )
    return ImageList(images.to(device_of(detector)), sizes)


def _prepares_itself(detector: nn.Module) -> bool:
    """Whether its ``preprocess_image`` has what it needs: Detectron2's reads ``pixel_mean``."""
    own = getattr(detector, "preprocess_image", None)
    if own is None:
        return False
    inherited = getattr(own, "__module__", "").startswith("detectron2.")
    return hasattr(detector, "pixel_mean") or not inherited


def _own(detector: nn.Module, inputs: Sequence[Dict[str, Any]], divisor: int, key: str) -> Tensor:
    images = detector.preprocess_image(inputs)
    if isinstance(images, (tuple, list)):  # some return more, such as the images' sizes
        images = images[0]
    return getattr(images, "tensor", images)


def _by_attributes(
    detector: nn.Module, inputs: Sequence[Dict[str, Any]], divisor: int, key: str
) -> Tensor:
    images = [_normalised(detector, x["image"].to(device_of(detector)), key) for x in inputs]
    square, multiple = _padding(detector)
    multiple = max(multiple or divisor, 1)
    return padded(images, multiple, square)


def padded(images: Sequence[Tensor], multiple: int = 1, square: int = 0) -> Tensor:
    """A batch of images (C, H, W) with zeros at their right and bottom, (N, C, H, W).

    Args:
        multiple: of what the sides are multiples.
        square: their side, whatever the images'; 0: the smallest that holds all of them.
    """
    height, width = (
        square or -(-max(x.shape[axis] for x in images) // multiple) * multiple for axis in (-2, -1)
    )
    return torch.stack(
        [F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2])) for x in images]
    )


def _normalised(detector: nn.Module, image: Tensor, key: str) -> Tensor:
    if hasattr(detector, "pixel_mean") and hasattr(detector, "pixel_std"):
        mean, std = (_column(x, image) for x in (detector.pixel_mean, detector.pixel_std))
        return (image - mean) / std
    if callable(getattr(detector, "normalizer", None)):
        return detector.normalizer(image)
    raise ConfigError(
        key,
        type(detector).__name__,
        "does not say how it normalises its images: it has neither preprocess_image(inputs), nor "
        "pixel_mean and pixel_std, nor normalizer(image)",
        "give it one of them",
    )


def _column(values: Any, image: Tensor) -> Tensor:
    """A number per channel, in a tensor of any shape or a list, as (C, 1, 1) beside ``image``."""
    values = values if isinstance(values, Tensor) else torch.tensor(list(values))
    return values.to(image.device).view(-1, 1, 1)


def _padding(detector: nn.Module) -> List[int]:
    """The side of the square that a detector pads to, and what sides are multiples of; 0: neither."""
    backbone = getattr(detector, "backbone", None)
    constraints = getattr(backbone, "padding_constraints", None) or {}
    square = constraints.get("square_size", 0) or getattr(backbone, "square_pad", 0)
    return [
        int(square or 0),
        constraints.get("size_divisibility", 0) or size_divisibility(detector),
    ]
