"""Captures a detector's feature maps by hooks, without changing the detector, keyed by stride."""

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Callable, Dict, FrozenSet, Iterator, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from sharedkd.errors import ConfigError
from sharedkd.losses.base import HEAD_TAPS, TAPS, Maps, Shapes

from .heads import DenseHead
from .preparation import device_of, image_channels, prepare_images

__all__ = ["FeatureTap", "common_pixels", "pyramid_shapes", "run_pyramid", "top_left"]

Source = Tuple[nn.Module, FrozenSet[str], Callable[[Any], Maps]]

#: Taps that no module returns -> how to compute them from a dense head's deltas.
_DECODED = {"boxes": DenseHead.boxes, "anchors": DenseHead.anchors}


@dataclass(frozen=True)
class Pyramid:
    """A module whose outputs are maps of several strides.

    Args:
        module: called once in a step.
        levels: name of an output -> its stride and channels.
    """

    module: nn.Module
    levels: Dict[str, Tuple[int, int]]

    @classmethod
    def of(cls, module: nn.Module) -> "Pyramid":
        """The pyramid of a module with Detectron2's ``output_shape()``."""
        return cls(module, {k: (x.stride, x.channels) for k, x in module.output_shape().items()})

    @property
    def shapes(self) -> Dict[int, int]:
        """Stride -> channels."""
        return dict(self.levels.values())

    @property
    def fault(self) -> Optional[str]:
        """Why its maps cannot be told apart by their strides; None if they can."""
        strides = [stride for stride, _ in self.levels.values()]
        if None in strides or not strides:
            return "does not say the strides of its outputs"
        for stride in strides:
            names = [name for name, (s, _) in self.levels.items() if s == stride]
            if len(names) > 1:
                return f"has several outputs of stride {stride} ({', '.join(names)})"
        return None

    def unpack(self, output: Any) -> Dict[int, Tensor]:
        """The maps of an output of the module, by stride."""
        if not isinstance(output, dict) or not self.levels.keys() & output.keys():
            output = _flat(output)
        return {s: output[name] for name, (s, _) in self.levels.items() if name in output}


def _flat(output: Any, name: str = "") -> Dict[str, Tensor]:
    """The maps (N, C, H, W) in nested dicts and lists, by their place: ``0``, ``p2``, ``2.p2``."""
    if isinstance(output, Tensor):
        return {name: output} if output.dim() == 4 else {}
    if isinstance(output, (list, tuple)):
        output = dict(enumerate(output))
    pairs = output.items() if isinstance(output, dict) else ()
    found: Dict[str, Tensor] = {}
    for key, value in pairs:
        found.update(_flat(value, f"{name}.{key}" if name else str(key)))
    return found


class _Enough(Exception):
    """Ends a forward whose rest is of no interest."""


def run_until(detector: nn.Module, module: nn.Module, inputs: Any) -> Any:
    """Run a detector's own forward until one of its modules has returned.

    Args:
        detector: in evaluation mode.
        module: one of its modules.
        inputs: Detectron2's records.

    Returns:
        what the module returns; None if it is not called.
    """
    found = []

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output)
        raise _Enough

    with module.register_forward_hook(stop):
        try:
            detector(inputs)
        except _Enough:
            return found[0]
    return None


def run_pyramid(
    detector: nn.Module,
    inputs: Sequence[Dict[str, Any]],
    pyramid: Optional[str] = None,
    divisor: int = 0,
    key: str = "model",
) -> Any:
    """Run a detector up to its pyramid, on images that it prepares itself; returns the module's output.

    Args:
        detector: in evaluation mode.
        inputs: Detectron2's records.
        pyramid: see :class:`FeatureTap`.
        divisor, key: see :func:`~sharedkd.modeling.preparation.prepare_images`.
    """
    if pyramid is not None:
        return run_until(detector, detector.get_submodule(pyramid), inputs)
    return detector.backbone(prepare_images(detector, inputs, divisor, key).tensor)


def _measure(detector: nn.Module, module: nn.Module, where: str, key: str) -> Pyramid:
    """The pyramid of a module without ``output_shape()``, by the maps of an image of 256x256."""
    image = torch.zeros(image_channels(detector), 256, 256, device=device_of(detector))
    seen: List[Tensor] = []

    def see(module: nn.Module, args: Tuple[Any, ...]) -> None:
        first = getattr(args[0], "tensors", args[0]) if args else None
        if isinstance(first, Tensor) and first.dim() == 4:
            seen.append(first)

    entries = (getattr(detector, "backbone", None), module)  # the first to run sees the images
    modes = {x: x.training for x in detector.modules()}
    try:
        with ExitStack() as hooks, torch.no_grad(), torch.random.fork_rng(devices=[]):
            for x in entries:
                if x is not None:
                    hooks.enter_context(x.register_forward_pre_hook(see))
            output = run_until(
                detector.eval(), module, [{"image": image, "height": 256, "width": 256}]
            )
    except Exception as e:
        raise ConfigError(
            key, where, f"its detector fails on an image of 256x256: {e}", "name another module"
        ) from e
    finally:
        for x, training in modes.items():
            x.training = training
    maps = _flat(output)
    if not maps:
        raise ConfigError(
            key,
            where,
            "is not called in a forward" if output is None else "returns no maps (N, C, H, W)",
            "name a module that returns the feature maps of a pyramid",
        )
    height, width = (seen[0] if seen else image).shape[-2:]
    levels = {}
    for name, x in maps.items():
        stride = round(height / x.shape[-2])
        same = stride == round(width / x.shape[-1])
        levels[name] = (stride if same else None, x.shape[1])
    return Pyramid(module, levels)


def _pyramid(detector: nn.Module, where: Optional[str], key: str) -> Pyramid:
    """The pyramid that stages compare: the backbone's outputs, or those of the module ``where``.

    Raises:
        ConfigError: there is no such module, or its outputs are no pyramid.
    """
    if where is None:
        backbone = getattr(detector, "backbone", None)
        if not hasattr(backbone, "output_shape"):
            raise ConfigError(
                key,
                "null",
                f"{type(detector).__name__} has no feature pyramid: no `.backbone` with an output_shape()",
                "name the module that returns its pyramid, such as neck, or use a detector with one",
            )
        found = Pyramid.of(backbone)
    else:
        try:
            module = detector.get_submodule(where)
        except AttributeError:
            module = None
        if module is None or not where:
            names = [name for name, _ in detector.named_children()]
            raise ConfigError(
                key, where, f"{type(detector).__name__} has no such module", f"use one in {names}"
            )
        own = hasattr(module, "output_shape")
        found = Pyramid.of(module) if own else _measure(detector, module, where, key)
    if found.fault:
        raise ConfigError(
            key,
            where or "null",
            f"{type(found.module).__name__} {found.fault}: it is not known which to compare",
            "let it return one map a stride, or name another module",
        )
    return found


def pyramid_shapes(detector: nn.Module, pyramid: Optional[str] = None) -> Shapes:
    """The channels of the maps of ``detector``: tap -> stride -> channels.

    Args:
        detector, pyramid: see :class:`FeatureTap`.

    Raises:
        ConfigError: see :class:`FeatureTap`.
    """
    return FeatureTap(detector, pyramid).shapes


class FeatureTap:
    """Captures a detector's maps while its own forward runs.

    A detector may change a map in place after its module has returned it; a loss must see the map as it
    was.  So the first capture copies each map and checks whether the detector wrote into the original.
    Later captures copy only the taps where it did; a write into a map without a copy is then an error.
    Unchanged maps are returned themselves, in the first step too: so a resumed run builds the same graph
    as an uninterrupted one.

    Args:
        detector: a module with ``.backbone``; it is not registered here.
        pyramid: the name of the module whose outputs are the tap ``fpn``; None: ``backbone``.
        key: the place of that name in the config, for messages.

    Attributes:
        head: the detector's dense head, or None.
        shapes: tap -> stride -> channels.

    Raises:
        ConfigError: there is no such module, or its outputs cannot be told apart by their strides.
    """

    def __init__(
        self, detector: nn.Module, pyramid: Optional[str] = None, key: str = "model.pyramid"
    ):
        self.head = DenseHead.of(detector)
        self._key, self._where = key, pyramid or "null"
        pyramids = {"fpn": _pyramid(detector, pyramid, key)}
        backbone = getattr(detector, "backbone", None)
        # Without a network above it, the bottom-up network is the backbone itself.
        stages = getattr(backbone, "bottom_up", backbone)
        if hasattr(stages, "output_shape"):
            bottom_up = Pyramid.of(stages)
            if not bottom_up.fault:
                pyramids["backbone"] = bottom_up
        self.shapes: Shapes = {tap: x.shapes for tap, x in pyramids.items()}
        self._sources: List[Source] = [_source(tap, x) for tap, x in pyramids.items()]
        if self.head is not None:
            self._sources.append((self.head.module, HEAD_TAPS, self.head.unpack))
            widths = self.head.channels.items()
            self.shapes.update({tap: dict.fromkeys(self.head.strides, c) for tap, c in widths})
        self._writes: Dict[str, bool] = {}  # whether the detector writes into a tap's maps

    @contextmanager
    def each(
        self,
        see: Callable[[str, Dict[int, Tensor]], None],
        taps: FrozenSet[str] = frozenset(TAPS),
    ) -> Iterator[None]:
        """A context in which ``see`` is called with maps as soon as the detector has computed them.

        Args:
            see: called with a tap and its maps by stride, (N, C, H, W).
            taps: the modules that offer none of these are left alone.
        """

        def show(
            unpack: Callable[[Any], Maps],
        ) -> Callable[[nn.Module, Tuple[Any, ...], Any], None]:
            def hook(module: nn.Module, args: Tuple[Any, ...], output: Any) -> None:
                for tap, levels in unpack(output).items():
                    see(tap, levels)

            return hook

        with ExitStack() as hooks:
            for module, offered, unpack in self._sources:
                if offered & taps:
                    hooks.enter_context(module.register_forward_hook(show(unpack)))
            yield

    @contextmanager
    def capture(self, taps: FrozenSet[str]) -> Iterator[Maps]:
        """A context to run the detector's forward in; after it, the yielded dict is filled.

        Args:
            taps: which of :data:`~sharedkd.losses.base.TAPS` to take.

        Yields:
            tap -> stride -> map (N, C, H, W), attached to the detector's graph; ``anchors`` are not.

        Raises:
            RuntimeError: the detector began to change its maps in place after its first step.
            ConfigError: a module that is hooked runs more than once.
        """
        maps: Maps = {}
        seen: Dict[str, Dict[int, Tuple[Tensor, int, Optional[Tensor]]]] = {}
        decoded = _DECODED.keys() & taps
        wanted = frozenset(taps) | ({"deltas"} if decoded else set())

        def take(tap: str, levels: Dict[int, Tensor]) -> None:
            if tap in wanted:
                if tap in seen:
                    raise ConfigError(
                        self._key,
                        self._where,
                        f"the detector computes its {tap} maps more than once in a step: it is not known "
                        "which to compare",
                        "name a module that runs once",
                    )
                copying = self._writes.get(tap, True)
                seen[tap] = {
                    stride: (x, x._version, x.clone() if copying else None)
                    for stride, x in levels.items()
                }

        with self.each(take, wanted):
            yield maps
        for tap, levels in seen.items():
            written = any(x._version != version for x, version, _ in levels.values())
            if written and not self._writes.setdefault(tap, written):
                raise RuntimeError(
                    f"the detector changed its {tap} feature maps in place, which it did not do in "
                    "its first step: a distillation loss would see wrong values"
                )
            self._writes.setdefault(tap, written)
            maps[tap] = {stride: copy if written else x for stride, (x, _, copy) in levels.items()}
        if decoded:
            maps.update({tap: _DECODED[tap](self.head, maps["deltas"]) for tap in decoded})
            if "deltas" not in taps:
                del maps["deltas"]


def _source(tap: str, pyramid: Pyramid) -> Source:
    return pyramid.module, frozenset({tap}), lambda output: {tap: pyramid.unpack(output)}


def common_pixels(student: Maps, teacher: Maps, key: str = "model.teacher") -> Tuple[Maps, Maps]:
    """Cut the maps of both detectors to the part of their padded images that both show.

    Detectron2 pads at the right and at the bottom, so that part is the top left one.

    Args:
        student, teacher: tap -> stride -> (N, C, H, W); their strides need not agree.
        key: the teacher's place in the config, for messages.

    Returns:
        both; a map of which nothing is cut is returned as it is.

    Raises:
        ConfigError: maps of the same stride differ by more than a rounding of their sizes.
    """
    canvases = _canvas(student), _canvas(teacher)
    if canvases[0] == canvases[1] and all(
        x.shape[-2:] == student[tap][s].shape[-2:]
        for tap, levels in teacher.items()
        if tap in student
        for s, x in levels.items()
        if s in student[tap]
    ):
        return student, teacher  # almost always
    common = tuple(map(min, *canvases))
    sizes: Dict[Tuple[str, int], List[Tuple[int, ...]]] = {}
    shares: Dict[Tuple[str, int], List[Tuple[float, ...]]] = {}
    for maps, canvas in zip((student, teacher), canvases):
        for tap, levels in maps.items():
            for s, x in levels.items():
                own = list(zip(x.shape[-2:], canvas, common))
                cut = tuple(n if whole == part else min(n, -(-part // s)) for n, whole, part in own)
                sizes.setdefault((tap, s), []).append(cut)
                share = tuple(n * part / whole for n, whole, part in own)
                shares.setdefault((tap, s), []).append(share)
    for (_, s), both in shares.items():
        if any(abs(a - b) > 1 for a, b in zip(both[0], both[-1])):
            ours, theirs = ("x".join(f"{n:.3g}" for n in x) for x in both)
            raise ConfigError(
                key,
                theirs,
                f"positions has its map of stride {s} on the pixels that both detectors show, and the "
                f"student's has {ours}: a backbone's output_shape() tells a wrong stride",
                "correct it",
            )

    def cut_all(maps: Maps) -> Maps:
        return {
            tap: {s: top_left(x, tuple(map(min, zip(*sizes[tap, s])))) for s, x in levels.items()}
            for tap, levels in maps.items()
        }

    return cut_all(student), cut_all(teacher)


def _canvas(maps: Maps) -> Tuple[int, int]:
    """Height and width in pixels of what the finest of ``maps`` shows."""
    stride, x = min(
        ((s, x) for levels in maps.values() for s, x in levels.items()), key=lambda i: i[0]
    )
    return stride * x.shape[-2], stride * x.shape[-1]


def top_left(x: Tensor, size: Tuple[int, ...]) -> Tensor:
    """The top left part of ``size`` = (h, w) of a map (..., H, W); the map itself if it has that size."""
    return x if x.shape[-2:] == size else x[..., : size[0], : size[1]]
