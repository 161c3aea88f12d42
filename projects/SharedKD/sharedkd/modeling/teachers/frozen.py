"""The frozen teacher: loads and verifies its weights, and runs up to its FPN."""

import logging
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Callable, Dict, FrozenSet, Iterator, List, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.structures import Boxes, ImageList
from omegaconf import DictConfig
from torch import Tensor, nn

from sharedkd.errors import ConfigError
from sharedkd.losses.base import HEAD_TAPS, Maps, precise
from sharedkd.modeling.backbones import compile_backbone
from sharedkd.modeling.detectors import KEY, build_detector, read_config, weights_of
from sharedkd.modeling.folding import fold_norms
from sharedkd.modeling.heads import Hidden, finish_head, finish_regions, region_predictions
from sharedkd.modeling.layout import keep_keypoints_contiguous
from sharedkd.modeling.preparation import (
    converted,
    device_of,
    guess_format,
    image_channels,
    prepare_images,
)
from sharedkd.modeling.taps import FeatureTap, run_pyramid
from sharedkd.values import check_number, check_switch
from sharedkd.weights.loading import fingerprint, load_trained

from .base import Teacher

__all__ = ["FrozenTeacher"]

logger = logging.getLogger("detectron2.sharedkd")

PRECISIONS = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# Largest relative change of the maps by folding, in float32.  Tests measure less than 1e-5; the rest
# is a margin for deeper networks and a GPU's choice of algorithms, which must not stop a run.
FOLDING_ERROR = 1e-4


class FrozenTeacher(Teacher):
    """A trained detector that only ever runs forward, always in eval mode.

    Args:
        config: a model-zoo name (``COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml``, or a LazyConfig
            ``.py``), a path to such a file, the folder of a run, a config object, a LazyConfig model
            node, or a model.  Of a distillation config, the student is taken.
        weights: ``detectron2://...``, URL, ``.pkl``, ``.pth`` or ``.safetensors``.  None: the zoo's
            weights of a zoo name, the last checkpoint of a run's folder.  An empty string leaves the
            model as built (to try things out; it is logged).
        input_format: channel order the teacher was trained with, ``BGR`` or ``RGB``.  None: as its
            config or the model says, else by its means if they are ImageNet's, else ``BGR`` (which is
            logged).
        fold: :meth:`prepare` folds its batch norms into its convolutions; equal up to rounding.
        precision: what :meth:`prepare` makes it compute in: ``float32`` (exact), ``tf32`` (on CUDA),
            ``bfloat16`` or ``float16``.  None: as the training step does.
        compile: :meth:`prepare` compiles its bottom-up network with ``torch.compile``.
        sha256: of the weights' file, verified; at least 8 hexadecimal digits.
        trust_checkpoint: let a ``.pkl`` or ``.pth`` run what it asks for while it is read.
        pyramid: the name of the module whose outputs are its pyramid, such as ``neck``; None: its
            ``backbone``.
        scale: it sees the images enlarged so many times; 2: its level of stride 16 covers the pixels of
            the student's of stride 8.

    Raises:
        ConfigError: not in the zoo and no such file; no weights, unreadable weights, weights that ask
            for more than data, or that do not fill every parameter of this model; no such precision;
            no pyramid, see :class:`~sharedkd.modeling.taps.FeatureTap`; a scale that leaves strides
            which are no whole numbers.
    """

    def __init__(
        self,
        config: Union[str, CfgNode, DictConfig, nn.Module],
        weights: Optional[str] = None,
        input_format: Optional[str] = None,
        fold: bool = True,
        precision: Optional[str] = None,
        compile: bool = False,
        sha256: Optional[str] = None,
        trust_checkpoint: bool = False,
        pyramid: Optional[str] = None,
        scale: float = 1,
    ):
        check_switch(f"{KEY}.trust_checkpoint", trust_checkpoint)
        check_number(f"{KEY}.scale", scale, above=0)
        if precision not in (None, *PRECISIONS):
            raise ConfigError(
                f"{KEY}.precision", precision, "no such type", f"use one of {', '.join(PRECISIONS)}"
            )
        self.name = config if isinstance(config, str) else type(config).__name__
        if isinstance(config, str):
            # Before the weights, so that a misspelt name is reported as one.
            config = read_config(config)
            weights = weights_of(self.name) if weights is None else weights
        if weights is None:
            raise ConfigError(
                f"{KEY}.weights",
                None,
                "this teacher is neither in the model zoo nor the folder of a run with a checkpoint",
                "set it to the teacher's .pth or .pkl file",
            )
        self.weights = weights
        self.model, configured_format = build_detector(config)
        self._tap = FeatureTap(self.model, pyramid, f"{KEY}.pyramid")
        self.pyramid, self.scale = pyramid, scale
        self.shapes = {
            tap: {self._stride(stride): channels for stride, channels in levels.items()}
            for tap, levels in self._tap.shapes.items()
        }
        self.channels = image_channels(self.model)
        stated = input_format or configured_format or getattr(self.model, "input_format", None)
        self.input_format = stated or self._assumed_format()
        if weights:
            load_trained(self.model, weights, f"{KEY}.weights", trust_checkpoint, sha256)
        elif not isinstance(config, nn.Module):  # which may be trained already
            logger.warning(f"{KEY}.weights is empty: the teacher {self.name} is not trained")
        self.tensors = len(self.model.state_dict())  # before any norm is folded
        self.model.requires_grad_(False).eval()
        self.fold, self.precision, self.compile = fold, precision, compile
        self.dtype: Optional[torch.dtype] = None  # None: as the code around it computes
        # The layout that maps are converted to; None: that of the convolutions.
        self._gives: Optional[torch.memory_format] = None

    def check_images(self, channels: int, input_format: str) -> None:
        image = torch.empty(channels, 1, 1)
        converted(image, input_format, self.channels, self.input_format, KEY)

    def _stride(self, stride: int) -> int:
        """The stride of one of its levels, in pixels of the student's images.

        Raises:
            ConfigError: it is no whole number.
        """
        seen = stride / self.scale
        if not seen.is_integer():
            raise ConfigError(
                f"{KEY}.scale",
                self.scale,
                f"makes {seen:g} of its stride {stride}, which is no whole number",
                "use 2, or 1 for the student's own size",
            )
        return int(seen)

    def _assumed_format(self) -> str:
        """The channel order of a model that does not state it; said, as it decides on what it sees."""
        if self.channels != 3:
            return "L"
        found = guess_format(self.model)
        reason = "as its pixel_mean is ImageNet's" if found else "Detectron2's default"
        logger.warning(
            f"{KEY}.input_format is not set, and {self.name} does not say its channel order: "
            f"{found or 'BGR'} is taken, {reason}"
        )
        return found or "BGR"

    @cached_property
    def fingerprint(self) -> str:
        """Identifies its weights as they were loaded, see :func:`~sharedkd.weights.loading.fingerprint`."""
        return fingerprint(self.model)

    def prepare(self, step_dtype: Optional[torch.dtype] = None) -> Dict[int, float]:
        """Apply ``fold``, ``precision`` and ``compile``, and measure how much they change its maps.

        Call it once, after the move to the student's device and memory layout, and when the weights as
        loaded are no longer needed.  On a CPU the teacher computes with channels last, which makes a forward
        faster on all of them; its maps still have the student's layout.

        Args:
            step_dtype: what the training step computes in under autocast; None: float32.

        Returns:
            stride -> relative change of its maps of a random image: the root mean square of the difference
            over that of the map.

        Raises:
            ConfigError: a precision that the device does not support, a compiler that is missing or
                fails, or folding that changes the maps by more than rounding.
        """
        self.fingerprint  # of the weights as loaded
        device = device_of(self.model)
        dtype = PRECISIONS[self.precision] if self.precision else step_dtype or torch.float32
        if device.type != "cuda" and (dtype is torch.float16 or self.precision == "tf32"):
            raise ConfigError(
                f"{KEY}.precision" if self.precision else "train.amp.dtype",
                self.precision or "float16",
                f"does not work on train.device={device.type}",
                "use bfloat16 or float32",
            )
        noise = torch.Generator().manual_seed(0)
        shape = (self.channels, 256, 256)
        image = torch.randint(0, 256, shape, generator=noise, dtype=torch.uint8)
        network = self._network
        with _tf32(device, allowed=False):  # it rounds more than folding changes
            before = self._pyramid(image)
            folded = fold_norms(network) if self.fold else 0
            error = max(_change(before, self._pyramid(image)).values()) if folded else 0.0
        if not error < FOLDING_ERROR:
            raise ConfigError(
                f"{KEY}.fold", True, f"changes its maps by {error:.1e}", f"use {KEY}.fold=False"
            )
        self.dtype = dtype
        if dtype is not torch.float32:
            network.to(dtype)
        if device.type == "cpu" and self._layout() is not torch.channels_last:
            self._gives = self._layout()
            self.model.to(memory_format=torch.channels_last)
            keep_keypoints_contiguous(self.model)
        if self.compile:
            compile_backbone(self.model, key=f"{KEY}.compile")
        try:
            after = self._pyramid(image)
        except Exception as e:
            if not self.compile:
                raise
            reason = str(e).strip().splitlines()[0]
            raise ConfigError(
                f"{KEY}.compile", True, f"fails: {reason}", f"use {KEY}.compile=False"
            ) from e
        change = _change(before, after)
        shares = ", ".join(f"stride {stride}: {100 * x:.2g} %" for stride, x in change.items())
        logger.info(
            f"The teacher: {folded} batch norms folded, {self.precision or str(dtype)[6:]}"
            f"{', compiled' if self.compile else ''}; its maps of a random image change by {shares}"
        )
        return change

    @property
    def _network(self) -> nn.Module:
        """The network that computes its maps; of several, the backbone."""
        return getattr(self.model, "backbone", None) or self.model.get_submodule(self.pyramid)

    @torch.no_grad()
    def _pyramid(self, image: Tensor) -> Dict[int, Tensor]:
        """The maps of one image, stride -> (1, C, H, W) in float32."""
        taps = frozenset({"fpn"})
        size = dict(zip(("height", "width"), image.shape[-2:]))
        inputs = [{"image": image.to(device_of(self.model)), **size}]
        with self._arithmetic(), self._tap.capture(taps) as maps:
            self._run(inputs, taps)
        return {stride: x.float() for stride, x in maps["fpn"].items()}

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """A context in which the teacher computes in its own precision, whatever the autocast outside."""
        if self.dtype is None:
            yield
            return
        exact = self.dtype is torch.float32
        device = device_of(self.model)
        allowed = {"float32": False, "tf32": True}.get(self.precision)
        with (
            _tf32(device, allowed),
            torch.autocast(device.type, None if exact else self.dtype, enabled=not exact),
        ):
            yield

    @property
    def detector(self) -> nn.Module:
        return self.model

    def to(self, device: Union[str, torch.device]) -> "FrozenTeacher":
        """Move the teacher to ``device``; returns itself."""
        self.model.to(device)
        return self

    @property
    def about(self) -> str:
        return self.name

    def apply_to_tensors(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply ``fn`` to its tensors, when the model that holds it moves to a device or type.

        The model's ``_apply`` calls it, since a teacher is no submodule.
        """
        self.model._apply(fn)
        keep_keypoints_contiguous(self.model)

    @torch.no_grad()
    def features(
        self,
        batched_inputs: List[Dict[str, Any]],
        taps: FrozenSet[str],
        input_format: str = "BGR",
        size_divisibility: int = 0,
    ) -> Maps:
        """Run backbone and FPN on the student's images, with the teacher's own normalisation.

        Its dense head runs too if its maps are asked for; nothing else does.

        Args:
            batched_inputs, taps, input_format, size_divisibility: see :meth:`Teacher.features`.

        Returns:
            tap -> stride -> (N, C, H, W), without gradient.
        """
        inputs = self._inputs(batched_inputs, input_format)
        with self._arithmetic(), self._tap.capture(taps) as maps:
            self._run(inputs, taps, size_divisibility)
        if self._gives is not None:
            for levels in maps.values():
                for stride, x in levels.items():
                    if x.is_contiguous(memory_format=torch.channels_last):  # a convolution's
                        levels[stride] = x.contiguous(memory_format=self._gives)
        return self._in_students_pixels(maps)

    def _run(
        self, inputs: List[Dict[str, Any]], taps: FrozenSet[str], size_divisibility: int = 0
    ) -> None:
        """Run the modules that return the maps of ``taps``, and nothing after them."""
        heads = taps & HEAD_TAPS
        if heads and self.pyramid is not None:
            self.model(inputs)
            return
        maps = run_pyramid(self.model, inputs, self.pyramid, size_divisibility, KEY)
        if heads:
            self._tap.head.run(maps)

    def _inputs(
        self, batched_inputs: List[Dict[str, Any]], input_format: str
    ) -> List[Dict[str, Any]]:
        """The student's records with the images as its own loader delivers them, on its device."""
        device, found = device_of(self.model), []
        for x in batched_inputs:
            size = [round(side * self.scale) for side in x["image"].shape[-2:]]
            image = x.get("larger_image", x["image"])  # which may be for a teacher of another scale
            if [*image.shape[-2:]] != size:
                image = x["image"]
            image = image.to(device, non_blocking=True)  # the copy does not wait for the GPU
            image = converted(image, input_format, self.channels, self.input_format, KEY)
            if [*image.shape[-2:]] != size:
                image = F.interpolate(image[None].float(), size, mode="bilinear")[0]
            found.append({**x, "image": image})
        return found

    def _in_students_pixels(self, maps: Maps) -> Maps:
        """Its maps by the strides that they have on the student's images; boxes in their pixels."""
        if self.scale == 1:
            return maps
        return {
            tap: {
                self._stride(stride): x / self.scale if tap in ("boxes", "anchors") else x
                for stride, x in levels.items()
            }
            for tap, levels in maps.items()
        }

    def _layout(self) -> torch.memory_format:
        """The memory format of its weights, and so of the maps that its convolutions return."""
        layout = torch.channels_last
        weights = (x for x in self._network.parameters() if x.dim() == 4)
        there = all(x.is_contiguous(memory_format=layout) for x in weights)
        return layout if there else torch.contiguous_format

    @torch.no_grad()
    def region_predictions(self, maps: Maps, boxes: List[Boxes]) -> Tuple[Tensor, Tensor]:
        """What it predicts of the student's regions, from its own maps of the FPN.

        Args:
            maps: of :meth:`features`, with the tap ``fpn``.
            boxes: the regions of each image, in pixels.
        """
        # Detectron2's RoIAlign rounds boxes to the type of the maps.
        pyramid = {round(stride * self.scale): precise(x) for stride, x in maps["fpn"].items()}
        if self.scale != 1:
            boxes = [Boxes(x.tensor * self.scale) for x in boxes]
        with self._arithmetic():
            return region_predictions(self.model, pyramid, boxes)

    def finish_regions(self, hidden: Hidden, left: int) -> Tuple[Tensor, Tensor]:
        """The student's gradient goes through it; its own parameters get none."""
        with self._arithmetic():
            return finish_regions(self.model, _precise(hidden, left), left)

    def finish_head(self, hidden: Hidden, left: int) -> Maps:
        """See :meth:`finish_regions`."""
        with self._arithmetic():
            maps = finish_head(self.model, _precise(hidden, left), left)
        return self._in_students_pixels(maps)

    @torch.no_grad()
    def predict(
        self, batched_inputs: List[Dict[str, Any]], input_format: str = "BGR"
    ) -> List[Dict[str, Any]]:
        """The teacher's own detections, as its model returns them.

        Args:
            batched_inputs: Detectron2's records; ``image`` is a (3, H, W) tensor.
            input_format: the channel order of the images.
        """
        sizes = [dict(zip(("height", "width"), x["image"].shape[-2:])) for x in batched_inputs]
        inputs = self._inputs(batched_inputs, input_format)
        inputs = [{**size, **x} for size, x in zip(sizes, inputs)]
        to_float32 = self._network.register_forward_hook(  # see region_predictions
            lambda module, args, maps: (
                {name: precise(x) for name, x in maps.items()} if isinstance(maps, dict) else None
            )
        )
        with to_float32, self._arithmetic():
            return self.model(inputs)

    def preprocess(
        self, batched_inputs: List[Dict[str, Any]], input_format: str, size_divisibility: int = 0
    ) -> ImageList:
        """Prepare the student's images as the teacher itself prepares its own.

        Args:
            batched_inputs, input_format: see :meth:`features`.
            size_divisibility: the student's, for a teacher that says nothing about its padding.

        Returns:
            (N, C, H, W) on the teacher's device.
        """
        inputs = self._inputs(batched_inputs, input_format)
        return prepare_images(self.model, inputs, size_divisibility, KEY)


@contextmanager
def _tf32(device: torch.device, allowed: Optional[bool]) -> Iterator[None]:
    """A context that allows or forbids TF32 for float32 on CUDA; None: PyTorch's setting."""
    if device.type != "cuda" or allowed is None:
        yield
        return
    switches = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = allowed
        yield
    finally:
        for switch, value in zip(switches, before):
            switch.allow_tf32 = value


def _precise(hidden: Hidden, left: int) -> Hidden:
    """What is before the last ``left`` layers, in float32."""
    return {key: [precise(x) for x in levels] for key, levels in hidden.items() if key[1] == left}


def _change(before: Dict[int, Tensor], after: Dict[int, Tensor]) -> Dict[int, float]:
    return {
        stride: ((after[stride] - x).square().mean() / x.square().mean().clamp(min=1e-30))
        .sqrt()
        .item()
        for stride, x in before.items()
    }
