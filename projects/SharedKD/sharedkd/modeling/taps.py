"""Captures a detector's feature maps by hooks, without changing the detector, keyed by stride."""

from contextlib import contextmanager
from typing import Any, Callable, Dict, FrozenSet, Iterator, List, Optional, Tuple

import torch
from torch import Tensor, nn

from sharedkd.errors import ConfigError
from sharedkd.losses.base import HEAD_TAPS, TAPS, Maps, Shapes

from .heads import DenseHead

__all__ = ["FeatureTap", "pyramid_shapes", "same_pixels"]


Source = Tuple[nn.Module, FrozenSet[str], Callable[[Any], Maps]]

#: Taps that no module returns -> how to compute them from a dense head's deltas.
_DECODED = {"boxes": DenseHead.boxes, "anchors": DenseHead.anchors}


def _sources(detector: nn.Module, head: Optional[DenseHead]) -> List[Source]:
    """The modules to hook, with their taps and a function that turns an output into maps."""
    backbone = _backbone(detector)

    def pyramid(tap: str, module: nn.Module) -> Source:
        strides = {name: spec.stride for name, spec in module.output_shape().items()}
        return (
            module,
            frozenset({tap}),
            lambda output: {
                tap: {s: output[name] for name, s in strides.items() if name in output}
            },
        )

    sources = [pyramid("fpn", backbone)]
    if hasattr(backbone, "bottom_up"):
        sources.append(pyramid("backbone", backbone.bottom_up))
    if head is not None:
        sources.append((head.module, HEAD_TAPS, head.unpack))
    return sources


def _backbone(detector: nn.Module) -> nn.Module:
    backbone = getattr(detector, "backbone", None)
    if not hasattr(backbone, "output_shape"):
        raise ConfigError(
            "model",
            type(detector).__name__,
            "has no `.backbone` with an output_shape()",
            "use a detector with a Detectron2 Backbone, such as GeneralizedRCNN, RetinaNet or FCOS",
        )
    return backbone


def pyramid_shapes(detector: nn.Module) -> Shapes:
    """The channels of the maps of ``detector``: tap -> stride -> channels.

    Raises:
        ConfigError: a detector without a Detectron2 backbone.
    """
    backbone, head = _backbone(detector), DenseHead.of(detector)
    modules = {"fpn": backbone}
    if hasattr(backbone, "bottom_up"):
        modules["backbone"] = backbone.bottom_up
    shapes = {
        tap: {spec.stride: spec.channels for spec in module.output_shape().values()}
        for tap, module in modules.items()
    }
    if head is not None:
        shapes.update({tap: dict.fromkeys(head.strides, c) for tap, c in head.channels.items()})
    return shapes


class FeatureTap:
    """Captures a detector's maps while its own forward runs.

    A detector may change a map in place after its module has returned it; a loss must see the map as it
    was.  So the first capture copies each map and checks whether the detector wrote into the original.
    Later captures copy only the taps where it did; a write into a map without a copy is then an error.
    Unchanged maps are returned themselves, in the first step too: so a resumed run builds the same graph
    as an uninterrupted one.

    Args:
        detector: a module with ``.backbone``; it is not registered here.

    Attributes:
        head: the detector's dense head, or None.
    """

    def __init__(self, detector: nn.Module):
        self.head = DenseHead.of(detector)
        self._sources = _sources(detector, self.head)
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

        handles = [
            module.register_forward_hook(show(unpack))
            for module, offered, unpack in self._sources
            if offered & taps
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def capture(self, taps: FrozenSet[str]) -> Iterator[Maps]:
        """A context to run the detector's forward in; after it, the yielded dict is filled.

        Args:
            taps: which of :data:`~sharedkd.losses.base.TAPS` to take.

        Yields:
            tap -> stride -> map (N, C, H, W), attached to the detector's graph; ``boxes`` and
            ``anchors`` are not.

        Raises:
            RuntimeError: the detector began to change its maps in place after its first step.
        """
        maps: Maps = {}
        seen: Dict[str, Dict[int, Tuple[Tensor, int, Optional[Tensor]]]] = {}
        decoded = _DECODED.keys() & taps
        wanted = frozenset(taps) | ({"deltas"} if decoded else set())

        def take(tap: str, levels: Dict[int, Tensor]) -> None:
            if tap in wanted:
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
            with torch.no_grad():
                maps.update({tap: _DECODED[tap](self.head, maps["deltas"]) for tap in decoded})
            if "deltas" not in taps:
                del maps["deltas"]


def same_pixels(maps: Maps, like: Maps) -> Maps:
    """Cut ``maps`` to the part of the padded images that ``like`` shows.

    Detectron2 pads at the right and at the bottom, so that part is the top left one.

    Args:
        maps, like: tap -> stride -> (N, C, H, W); their strides need not agree.

    Returns:
        as ``maps``; a level that shows no more than ``like`` does is returned as it is.

    Raises:
        ConfigError: a level of ``maps`` shows less than the level of the same stride of ``like``.
    """
    stride, x = min(
        ((s, x) for levels in like.values() for s, x in levels.items()), key=lambda i: i[0]
    )
    height, width = stride * x.shape[-2], stride * x.shape[-1]
    cut = {
        tap: {s: x[..., : -(-height // s), : -(-width // s)] for s, x in levels.items()}
        for tap, levels in maps.items()
    }
    for tap, levels in cut.items():
        for s, x in levels.items():
            if s in like.get(tap, {}) and x.shape[-2:] != like[tap][s].shape[-2:]:
                raise ConfigError(
                    "model.teacher",
                    tuple(x.shape[-2:]),
                    f"is the size of its map of stride {s}, the student's is "
                    f"{tuple(like[tap][s].shape[-2:])}: they pad images in different ways",
                    "use backbones with the same padding",
                )
    return cut
