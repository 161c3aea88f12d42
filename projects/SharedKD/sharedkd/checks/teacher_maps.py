"""Whether the teacher's maps can be kept on the disk, and what they will take, known before training."""

from collections import Counter
from functools import partial
from itertools import product
from math import prod
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from detectron2.data import transforms as T
from detectron2.utils import comm
from torch import nn

from ..data.loader import TrainLoader
from ..errors import ConfigError
from ..speed.teacher_cache import KEPT_BYTES, room
from .disk import check_folder, existing_folder

__all__ = ["check_teacher_maps", "keeps_maps"]

KEY = "model.teacher.cache"

Size = Tuple[int, int]  #: (height, width) in pixels


def keeps_maps(model: nn.Module) -> bool:
    """Whether ``model`` is a pair whose teacher has a cache that some stage reads."""
    cache = getattr(getattr(model, "teacher", None), "cache", None)
    return cache is not None and bool(model.taught_taps)


def check_teacher_maps(
    model: nn.Module, loader: Any, batches: Optional[int] = None
) -> Mapping[str, Any]:
    """Compare what the teacher's cache will hold with what its disk has.

    An image counts once for each of its variants (sizes, mirror images), padded as if it were alone.
    In a batch it is padded to the largest: on each such size its maps are others, and are kept, too.

    Args:
        model: a :class:`~sharedkd.meta_arch.SharedKD` whose teacher has a cache, prepared.
        loader: of the training images.
        batches: how many the run takes; None: enough for all variants of all images.

    Returns:
        ``folder``; ``images``; ``variants`` of each; ``needed_mb`` for all that are seen; ``most_mb``, if
        each meets every size of batch that there can be; ``there_mb``, already in the folder, of
        these sizes, perhaps of other images; ``free_mb``.

    Raises:
        ConfigError: the augmentation makes another image each time, or what it makes is not known; the
            folder cannot be written to, or its disk has no room.
    """
    teacher = model.teacher
    folder = teacher.cache
    check_folder(KEY, folder)
    if not isinstance(loader, TrainLoader):
        raise _not_known(folder, f"dataloader.train is a {type(loader).__name__}")
    steps = _steps(loader.mapper, folder)
    canvases = _canvases(loader.dataset, steps, folder, partial(_canvas, model))
    needed = sum(_bytes(model, canvas) * count for canvas, count in canvases.items())
    heights, widths = ({canvas[i] for canvas in canvases} for i in (0, 1))
    most = needed
    if loader.total_batch_size > comm.get_world_size():
        most = sum(
            count * _bytes(model, larger)
            for (height, width), count in canvases.items()
            for larger in product(
                (h for h in heights if h >= height), (w for w in widths if w >= width)
            )
        )
    if batches is not None:
        largest = _bytes(model, (max(heights), max(widths)))
        seen = batches * loader.total_batch_size * largest
        needed, most = min(needed, seen), min(most, seen)
    endings = [f"-{teacher.kept_setting(canvas, model.input_format)}" for canvas in canvases]
    there = sum(teacher.kept.size(tap, endings) for tap in model.taught_taps)
    free = room(existing_folder(folder))
    if free < needed - there:
        raise ConfigError(
            KEY,
            folder,
            f"the maps of {len(loader.dataset)} images will take {needed / 2**20:.0f} MB, of which "
            f"{there / 2**20:.0f} MB are there, and its disk has {max(free, 0) / 2**20:.0f} MB for them",
            f"make room, choose a folder on another disk, or use {KEY}=null",
        )
    return {
        "folder": folder,
        "images": len(loader.dataset),
        "variants": prod(len(sizes) * times for sizes, times in steps),
        "needed_mb": needed / 2**20,
        "most_mb": most / 2**20,
        "there_mb": there / 2**20,
        "free_mb": free / 2**20,
    }


def _not_known(folder: str, problem: str) -> ConfigError:
    return ConfigError(
        KEY,
        folder,
        f"{problem}: it is not known whether an image is seen again just as it was",
        f"use DatasetMapper and this project's loader, see configs/common/own_data.py, or {KEY}=null",
    )


# --- what augmentation makes of an image ----------------------------------------------------------

#: The sizes that a step may give an image, and how many images of each.
Step = Tuple[Sequence[Callable[[Size], Size]], int]


def _steps(mapper: Any, folder: str) -> List[Step]:
    augmentations = getattr(mapper, "augmentations", None)
    if augmentations is None:
        raise _not_known(folder, "dataloader.train.mapper has no augmentations")
    return [_step(each, folder) for each in getattr(augmentations, "augs", augmentations)]


def _step(augmentation: Any, folder: str) -> Step:
    kind, name = type(augmentation), type(augmentation).__name__
    if kind is T.RandomFlip:
        return [lambda size: size], 2 if 0 < augmentation.prob < 1 else 1
    if kind is T.Resize:
        return [lambda size: tuple(augmentation.shape)], 1
    if kind is T.ResizeShortestEdge:
        edges = sorted({*augmentation.short_edge_length})
        if len(edges) == 1 or not augmentation.is_range:
            return [partial(_shortest_edge, edge, augmentation.max_size) for edge in edges], 1
        name += f" to any size from {edges[0]} to {edges[-1]}"
    raise ConfigError(
        KEY,
        folder,
        f"dataloader.train.mapper makes another image each time, by its {name}",
        "use no augmentation but Resize, ResizeShortestEdge with sample_style=choice and RandomFlip, or "
        f"{KEY}=null",
    )


def _shortest_edge(edge: int, most: int, size: Size) -> Size:
    return T.ResizeShortestEdge.get_output_shape(*size, edge, most) if edge else size


def _canvases(
    dataset: Sequence[Dict[str, Any]],
    steps: Sequence[Step],
    folder: str,
    canvas: Callable[[Size], Size],
) -> Mapping[Size, int]:
    """Size of a padded image -> how many images have it, each alone in its batch."""
    found: Counter = Counter()
    for record in dataset:
        if "height" not in record or "width" not in record:
            raise _not_known(folder, "a dataset dict has no height or width")
        sizes = {(record["height"], record["width"])}
        for choices, _ in steps:
            sizes = {choice(size) for choice in choices for size in sizes}
        for size in sizes:
            found[canvas(size)] += prod(times for _, times in steps)
    return found


def _canvas(model: nn.Module, size: Size) -> Size:
    return model.teacher.canvas([size], model.student.backbone.size_divisibility)


def _bytes(model: nn.Module, canvas: Size) -> int:
    """What the maps of one image take."""
    height, width = canvas
    shapes = [model.teacher.shapes[tap] for tap in model.taught_taps]
    return KEPT_BYTES * sum(
        channels * -(-height // stride) * -(-width // stride)
        for levels in shapes
        for stride, channels in levels.items()
    )
