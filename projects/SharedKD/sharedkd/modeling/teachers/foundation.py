"""A foundation model as a source of maps: any frozen backbone with patch tokens or a map, without a detector."""

import logging
from functools import cached_property
from typing import Any, Callable, Dict, FrozenSet, List, Optional, Sequence, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sharedkd.errors import ConfigError
from sharedkd.losses.base import Maps, precise
from sharedkd.modeling.detectors import KEY, count_parameters
from sharedkd.modeling.preparation import converted, device_of, padded
from sharedkd.modeling.taps import pyramid_shapes, run_until
from sharedkd.values import check_number
from sharedkd.weights.conventions import RGB_MEAN, RGB_STD
from sharedkd.weights.loading import fingerprint, load_trained

from .base import Teacher

__all__ = ["FoundationTeacher"]

logger = logging.getLogger("detectron2.sharedkd")


class FoundationTeacher(Teacher):
    """A frozen network that has one map of an image, such as a ViT, shown to the student's levels.

    The student's padded images are resized to a whole number of patches, and the network's map is
    interpolated to the size of each level (bilinear; where that is coarser, over all that it covers), so
    that any loss of maps may compare them.  The network sees the padding of a batch, as grey.

    Args:
        model: the network, or a LazyConfig node of it; it takes (N, C, H, W) and returns a map
            (N, C, h, w) or (N, h, w, C), or tokens (N, L, C) whose last are those of the patches, row by row.
        weights: ``.pth``, ``.pkl`` or ``.safetensors``; an empty string: those that ``model`` was built with.
        patch: the side of a patch in pixels; of a network that returns a map, what sides have to be
            multiples of.
        output: the name of the module in ``model`` that returns the map or the tokens; None: the model.
        size: (height, width), or the side, that images are resized to, for a network that takes no other;
            None: the next whole number of patches.
        strides: of the student's levels that it teaches.
        input_format: the channel order it was trained with.
        pixel_mean, pixel_std: of its training, in 0 to 255; the default is ImageNet's.
        sha256, trust_checkpoint: see :class:`FrozenTeacher`.

    Raises:
        ConfigError: no weights, or weights that do not fill the model; no such output, or it returns neither a
            map nor a token for each patch; a size that is no multiple of the patch.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Optional[str] = None,
        patch: int = 16,
        output: Optional[str] = None,
        size: Optional[Union[int, Sequence[int]]] = None,
        strides: Sequence[int] = (8, 16, 32),
        input_format: str = "RGB",
        pixel_mean: Sequence[float] = RGB_MEAN,
        pixel_std: Sequence[float] = RGB_STD,
        sha256: Optional[str] = None,
        trust_checkpoint: bool = False,
    ):
        self.name = type(model).__name__
        check_number(f"{KEY}.patch", patch, least=1, whole=True)
        if weights is None:
            fix = "set it to their file, or to an empty string if the model was built with them"
            raise ConfigError(f"{KEY}.weights", None, f"this {self.name} has no weights", fix)
        self.model, self.weights, self.patch, self.strides = model, weights, patch, strides
        self.size = None if size is None else (size, size) if isinstance(size, int) else tuple(size)
        if self.size and any(side % patch for side in self.size):
            problem = "is no whole number of patches"
            raise ConfigError(f"{KEY}.size", size, problem, f"use multiples of {patch}")
        self.input_format = input_format
        self.mean, self.std = (torch.tensor([*x]).view(-1, 1, 1) for x in (pixel_mean, pixel_std))
        if weights:
            load_trained(model, weights, f"{KEY}.weights", trust_checkpoint, sha256)
        else:
            logger.warning(f"{KEY}.weights is empty: {self.name} keeps those it was built with")
        model.requires_grad_(False).eval()
        self.output = output
        try:
            self._source = model if output is None else model.get_submodule(output)
        except AttributeError:
            names = [name for name, _ in model.named_children()]
            raise ConfigError(
                f"{KEY}.output", output, "no such module", f"use one in {names}"
            ) from None
        side = self.size or (2 * patch, 2 * patch)
        with torch.no_grad():
            self.channels = self._map(torch.zeros(1, len(self.mean), *side)).shape[1]
        self.shapes = {"fpn": dict.fromkeys(strides, self.channels)}

    def attach(self, student: nn.Module, input_format: str, pyramid: Optional[str] = None) -> None:
        levels = pyramid_shapes(student, pyramid)["fpn"]
        self.shapes = {"fpn": {s: self.channels for s in levels if s in self.strides}}

    def check_images(self, channels: int, input_format: str) -> None:
        converted(torch.empty(channels, 1, 1), input_format, len(self.mean), self.input_format, KEY)

    @torch.no_grad()
    def features(
        self,
        batched_inputs: List[Dict[str, Any]],
        taps: FrozenSet[str],
        input_format: str = "BGR",
        size_divisibility: int = 0,
    ) -> Maps:
        images = self._images(batched_inputs, input_format, max(size_divisibility, 1))
        canvas = images.shape[-2:]
        sides = self.size or [-(-side // self.patch) * self.patch for side in canvas]
        seen = precise(self._map(_resized(images, sides)))
        levels = {s: _resized(seen, [-(-side // s) for side in canvas]) for s in self.shapes["fpn"]}
        return {"fpn": levels}

    def _images(self, inputs: List[Dict[str, Any]], given: str, divisor: int) -> Tensor:
        """The normalised images on the student's canvas, zeros beside them."""
        device = device_of(self.model)
        images = [x["image"].to(device, non_blocking=True) for x in inputs]
        images = [converted(x, given, len(self.mean), self.input_format, KEY) for x in images]
        return padded([(x.float() - self.mean) / self.std for x in images], divisor)

    def _map(self, images: Tensor) -> Tensor:
        """The network's map (N, C, h, w) of images that are a whole number of patches."""
        found = run_until(self.model, self._source, images)
        height, width = images.shape[-2:]
        rows, columns = height // self.patch, width // self.patch
        if isinstance(found, Tensor) and found.dim() == 4:
            # The sides are to each other as the image's; a Swin's come first.
            _, a, b, c = found.shape
            last = a * width == b * height and b * width != c * height
            return found.permute(0, 3, 1, 2) if last else found
        if isinstance(found, Tensor) and found.dim() == 3 and found.shape[1] >= rows * columns:
            return found[:, -rows * columns :].transpose(1, 2).unflatten(2, (rows, columns))
        returned = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ConfigError(
            f"{KEY}.output",
            self.output or "null",
            f"returns {returned}, which is neither a map nor a token for each of {rows}x{columns} patches",
            "name the module that does, and the side of its patches",
        )

    @cached_property
    def fingerprint(self) -> str:
        """Identifies its weights, see :func:`~sharedkd.weights.loading.fingerprint`."""
        return fingerprint(self.model)

    @property
    def about(self) -> str:
        return f"{self.name}, {count_parameters(self.model) / 1e6:.1f} M parameters; weights: {self.weights or 'its own'}"

    def apply_to_tensors(self, fn: Callable[[Tensor], Tensor]) -> None:
        self.model._apply(fn)
        self.mean, self.std = fn(self.mean), fn(self.std)


def _resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """A map (N, C, H, W) at another size; where that is smaller, means of what it covers."""
    if x.shape[-2:] == tuple(size):
        return x
    return F.interpolate(x, tuple(size), mode="bilinear", antialias=True)
