"""How a backbone's images were prepared when it was trained, by the marks in its file.

A backbone of another channel order, normalisation or stride loads without an error, and computes
other features than it has learnt.
"""

from typing import Any, List, Mapping, NamedTuple, Optional, Sequence

import numpy as np
import torch
from detectron2.modeling.backbone.resnet import BottleneckBlock
from torch import Tensor, nn

__all__ = [
    "OF_DETECTOR",
    "RGB_MEAN",
    "RGB_STD",
    "Convention",
    "convention_of_file",
    "convention_of_model",
    "order_of",
]

OF_DETECTOR = "its detector's"  # the maker where a file has the numbers themselves

RGB_MEAN = (123.675, 116.28, 103.53)  #: of ImageNet: red, green, blue
RGB_STD = (58.395, 57.12, 57.375)
# Variance after the first convolution over the squares of its weights, on images: about 5 where they are
# divided by a standard deviation of about 58, and 58**2 times as much where they are not.
_NORMALISED = 5 * 58


class Convention(NamedTuple):
    """How the images of a backbone are prepared.  None: not known.

    Args:
        maker: whose convention it is, in words.
        order: ``BGR`` or ``RGB``.
        mean, std: of each channel, subtracted from pixels of 0 to 255, and what they are divided by.
        stride_in_1x1: whether bottleneck blocks have their stride in the first 1x1 convolution, not in
            the 3x3 one.
    """

    maker: str = ""
    order: Optional[str] = None
    mean: Optional[Sequence[float]] = None
    std: Optional[Sequence[float]] = None
    stride_in_1x1: Optional[bool] = None

    def differences(self, other: "Convention") -> List[str]:
        """The names of the fields that both know, and that differ.

        ``mean`` is not compared, and ``std`` differs from a factor of two on: statistics of other images
        are no other convention.
        """
        found = [
            name
            for name in ("order", "stride_in_1x1")
            if None not in (getattr(self, name), getattr(other, name))
            and getattr(self, name) != getattr(other, name)
        ]
        if self.std and other.std and not 0.5 < np.mean(self.std) / np.mean(other.std) < 2:
            found.append("std")
        return found


def convention_of_file(data: Mapping[str, Any]) -> Convention:
    """What a checkpoint says of its images.

    Args:
        data: of :func:`~.reading.read_weights`, with the names that the file has.
    """
    state, maker = data["model"], str(data.get("__author__", "")).lower()
    if "caffe2" in maker:
        # Detectron2's names for them are MSRA/R-50, FAIR/R-50-GN and FAIR/X-101-32x8d.
        inner = state.get("res2_0_branch2b_w")
        grouped = getattr(inner, "ndim", 0) == 4 and inner.shape[1] < inner.shape[0]
        std = RGB_STD[::-1] if grouped else (1.0, 1.0, 1.0)
        of_msra = not grouped and not any(name.endswith("_gn_s") for name in state)
        return Convention("Caffe2's", "BGR", RGB_MEAN[::-1], std, of_msra)
    if "torchvision" in maker:
        return Convention("torchvision's", "RGB", RGB_MEAN, RGB_STD, False)
    if "pycls" in maker:
        return Convention("pycls's", "BGR", RGB_MEAN[::-1], RGB_STD[::-1])
    if "pixel_mean" in state and "pixel_std" in state:  # of a detector
        mean, std = (_numbers(state[name]).tolist() for name in ("pixel_mean", "pixel_std"))
        return Convention(OF_DETECTOR, order_of(mean), mean, std)
    return Convention("another", std=_std_by_statistics(state))


def convention_of_model(model: nn.Module, order: Optional[str] = None) -> Convention:
    """What a detector makes of its images.

    Args:
        order: of the images that it gets; None: that of its ``input_format``.
    """
    mean, std = (
        _numbers(x).tolist() if x is not None else None
        for x in (getattr(model, name, None) for name in ("pixel_mean", "pixel_std"))
    )
    strided = [
        m.conv1.stride[0] > 1
        for m in model.modules()
        if isinstance(m, BottleneckBlock) and max(m.conv1.stride[0], m.conv2.stride[0]) > 1
    ]
    order = order or getattr(model, "input_format", None)
    return Convention("this model's", order, mean, std, strided[0] if strided else None)


def _numbers(values: Any) -> Tensor:
    return torch.as_tensor(values).double().flatten()


def order_of(mean: Sequence[float]) -> Optional[str]:
    """The order of channels by ImageNet's means, of 0 to 255 or of 0 to 1; None if they are others."""
    for order, known in (("RGB", RGB_MEAN), ("BGR", RGB_MEAN[::-1])):
        for scale in (1, 255):
            if len(mean) == 3 and np.allclose(np.multiply(mean, scale), known, atol=1):
                return order
    return None


def _std_by_statistics(state: Mapping[str, Any]) -> Optional[Sequence[float]]:
    """What images were divided by, from what came out of the first convolution; None if nothing says it."""
    for prefix in ("", "backbone.bottom_up.", "backbone."):
        names = (f"{prefix}stem.conv1.weight", f"{prefix}stem.conv1.norm.running_var")
        if all(name in state for name in names):
            weight, variance = (_numbers(state[name]) for name in names)
            if variance.max() - variance.min() > 1e-3 and weight.any():  # else no image has set it
                normalised = variance.sum() / weight.square().sum() < _NORMALISED
                return RGB_STD if normalised else (1.0, 1.0, 1.0)
    return None
