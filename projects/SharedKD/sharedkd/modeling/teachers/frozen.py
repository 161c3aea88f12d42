"""The frozen teacher: loads and verifies its weights, and runs up to its FPN."""

import logging
from contextlib import contextmanager
from functools import cached_property
from math import lcm
from typing import Any, Callable, Dict, FrozenSet, Iterator, List, Optional, Union

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, ImageList
from omegaconf import DictConfig
from torch import Tensor, nn

from sharedkd.errors import ConfigError
from sharedkd.losses.base import HEAD_TAPS, Maps, precise
from sharedkd.modeling.backbones import compile_backbone
from sharedkd.modeling.detectors import KEY, build_detector, read_config, zoo_weights
from sharedkd.modeling.folding import fold_norms
from sharedkd.modeling.heads import region_logits
from sharedkd.modeling.taps import FeatureTap, pyramid_shapes
from sharedkd.values import check_switch
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
            ``.py``), a path to such a file (a run's saved ``config.yaml`` too), a config object, a
            LazyConfig model node, or a model.  Of a distillation config, the student is taken.
        weights: ``detectron2://...``, URL, ``.pkl``, ``.pth`` or ``.safetensors``.  None: the zoo's
            weights of a zoo name.  An empty string leaves the model as built (to try things out; it
            is logged).
        input_format: channel order the teacher was trained with, ``BGR`` or ``RGB``.  None: as its
            config says.
        fold: :meth:`prepare` folds its batch norms into its convolutions; equal up to rounding.
        precision: what :meth:`prepare` makes it compute in: ``float32`` (exact), ``tf32`` (on CUDA),
            ``bfloat16`` or ``float16``.  None: as the training step does.
        compile: :meth:`prepare` compiles its bottom-up network with ``torch.compile``.
        sha256: of the weights' file, verified; at least 8 hexadecimal digits.
        trust_checkpoint: let a ``.pkl`` or ``.pth`` run what it asks for while it is read.

    Raises:
        ConfigError: not in the zoo and no such file; no weights, unreadable weights, weights that ask
            for more than data, or that do not fill every parameter of this model; no such precision.
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
    ):
        check_switch(f"{KEY}.trust_checkpoint", trust_checkpoint)
        if precision not in (None, *PRECISIONS):
            raise ConfigError(
                f"{KEY}.precision", precision, "no such type", f"use one of {', '.join(PRECISIONS)}"
            )
        self.name = config if isinstance(config, str) else type(config).__name__
        if isinstance(config, str):
            # Before the weights, so that a misspelt name is reported as one.
            config = read_config(config)
            weights = zoo_weights(self.name) if weights is None else weights
        if weights is None:
            raise ConfigError(
                f"{KEY}.weights",
                None,
                "this teacher is not in the model zoo, so it has no weights",
                "set it to the teacher's .pth or .pkl file",
            )
        self.weights = weights
        self.model, configured_format = build_detector(config)
        self.input_format = (
            input_format or configured_format or getattr(self.model, "input_format", None) or "BGR"
        )
        if weights:
            load_trained(self.model, weights, f"{KEY}.weights", trust_checkpoint, sha256)
        else:
            logger.warning(f"{KEY}.weights is empty: the teacher {self.name} is not trained")
        self.tensors = len(self.model.state_dict())  # before any norm is folded
        self.model.requires_grad_(False).eval()
        self.shapes = pyramid_shapes(self.model)
        self.fold, self.precision, self.compile = fold, precision, compile
        self._tap = FeatureTap(self.model)
        self.dtype: Optional[torch.dtype] = None  # None: as the code around it computes
        # The layout that maps are converted to; None: that of the convolutions.
        self._gives: Optional[torch.memory_format] = None

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
        device = self.model.pixel_mean.device
        dtype = PRECISIONS[self.precision] if self.precision else step_dtype or torch.float32
        if device.type != "cuda" and (dtype is torch.float16 or self.precision == "tf32"):
            raise ConfigError(
                f"{KEY}.precision" if self.precision else "train.amp.dtype",
                self.precision or "float16",
                f"does not work on train.device={device.type}",
                "use bfloat16 or float32",
            )
        noise = torch.Generator().manual_seed(0)
        image = torch.randint(0, 256, (3, 256, 256), generator=noise, dtype=torch.uint8)
        with _tf32(device, allowed=False):  # it rounds more than folding changes
            before = self._pyramid(image)
            folded = fold_norms(self.model.backbone) if self.fold else 0
            error = max(_change(before, self._pyramid(image)).values()) if folded else 0.0
        if not error < FOLDING_ERROR:
            raise ConfigError(
                f"{KEY}.fold", True, f"changes its maps by {error:.1e}", f"use {KEY}.fold=False"
            )
        self.dtype = dtype
        if dtype is not torch.float32:
            self.model.backbone.to(dtype)
        if device.type == "cpu" and self._layout() is not torch.channels_last:
            self._gives = self._layout()
            self.model.to(memory_format=torch.channels_last)
        if self.compile:
            compile_backbone(self.model)
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

    @torch.no_grad()
    def _pyramid(self, image: Tensor) -> Dict[int, Tensor]:
        """The maps of one image, stride -> (1, C, H, W) in float32."""
        backbone = self.model.backbone
        images = self.preprocess([{"image": image}], self.input_format, 0)
        with self._arithmetic():
            maps = backbone(images.tensor)
        shapes = backbone.output_shape()
        return {shapes[name].stride: x.float() for name, x in maps.items() if name in shapes}

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """A context in which the teacher computes in its own precision, whatever the autocast outside."""
        if self.dtype is None:
            yield
            return
        exact = self.dtype is torch.float32
        device = self.model.pixel_mean.device
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

    def apply_to_tensors(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply ``fn`` to its tensors, when the model that holds it moves to a device or type.

        The model's ``_apply`` calls it, since a teacher is no submodule.
        """
        self.model._apply(fn)

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
        images = self.preprocess(batched_inputs, input_format, size_divisibility)
        with self._arithmetic(), self._tap.capture(taps) as maps:
            pyramid = self.model.backbone(images.tensor)
            if taps & HEAD_TAPS:
                self._tap.head.run(pyramid)
        if self._gives is not None:
            for levels in maps.values():
                for stride, x in levels.items():
                    if x.is_contiguous(memory_format=torch.channels_last):  # a convolution's
                        levels[stride] = x.contiguous(memory_format=self._gives)
        return maps

    def _layout(self) -> torch.memory_format:
        """The memory format of its weights, and so of the maps that its convolutions return."""
        layout = torch.channels_last
        weights = (x for x in self.model.backbone.parameters() if x.dim() == 4)
        there = all(x.is_contiguous(memory_format=layout) for x in weights)
        return layout if there else torch.contiguous_format

    def _divisor(self, size_divisibility: int) -> int:
        return lcm(max(self.model.backbone.size_divisibility, 1), max(size_divisibility, 1))

    @torch.no_grad()
    def region_logits(self, maps: Maps, boxes: List[Boxes]) -> Tensor:
        """Its class logits of the student's regions, (R, K + 1), from its own maps of the FPN.

        Args:
            maps: of :meth:`features`, with the tap ``fpn``.
            boxes: the regions of each image, in pixels.
        """
        # Detectron2's RoIAlign rounds boxes to the type of the maps.
        pyramid = {stride: precise(x) for stride, x in maps["fpn"].items()}
        with self._arithmetic():
            return region_logits(self.model, pyramid, boxes)

    @torch.no_grad()
    def predict(
        self, batched_inputs: List[Dict[str, Any]], input_format: str = "BGR"
    ) -> List[Dict[str, Any]]:
        """The teacher's own detections, as its model returns them.

        Args:
            batched_inputs: Detectron2's records; ``image`` is a (3, H, W) tensor.
            input_format: the channel order of the images.
        """
        if input_format != self.input_format:
            batched_inputs = [{**x, "image": x["image"].flip(0)} for x in batched_inputs]
        to_float32 = self.model.backbone.register_forward_hook(  # see region_logits
            lambda module, args, maps: {name: precise(x) for name, x in maps.items()}
        )
        try:
            with self._arithmetic():
                return self.model(batched_inputs)
        finally:
            to_float32.remove()

    def preprocess(
        self, batched_inputs: List[Dict[str, Any]], input_format: str, size_divisibility: int
    ) -> ImageList:
        """Prepare the student's images: channel order first, then mean and std, then padding.

        Args:
            batched_inputs, input_format, size_divisibility: see :meth:`features`.

        Returns:
            (N, 3, H, W) on the teacher's device; H and W are multiples of ``size_divisibility`` and
            of its own backbone's.
        """
        model = self.model
        device = model.pixel_mean.device  # the copy does not wait for the GPU
        images = [x["image"].to(device, non_blocking=True) for x in batched_inputs]
        if input_format != self.input_format:
            images = [x.flip(0) for x in images]
        images = [(x - model.pixel_mean) / model.pixel_std for x in images]
        return ImageList.from_tensors(images, self._divisor(size_divisibility))


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


def _change(before: Dict[int, Tensor], after: Dict[int, Tensor]) -> Dict[int, float]:
    return {
        stride: ((after[stride] - x).square().mean() / x.square().mean().clamp(min=1e-30))
        .sqrt()
        .item()
        for stride, x in before.items()
    }
