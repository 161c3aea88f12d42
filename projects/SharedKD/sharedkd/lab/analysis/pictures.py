"""Pictures of runs: detections next to the ground truth, and loss curves."""

import json
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode, Instances
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sharedkd.data.images import read_image

from .drawing import DrawnObject, draw_objects, picture_grid

__all__ = ["detector_loss", "loss_curves", "read_curves", "read_metrics", "side_by_side"]

_DISTILLATION = "distill/"


def side_by_side(
    dataset_name: str,
    models: Mapping[str, Callable[[List[Dict[str, Any]]], List[Dict[str, Any]]]],
    mapper: Callable[[Dict[str, Any]], Dict[str, Any]],
    path: str,
    images: int = 4,
    score_threshold: float = 0.5,
) -> Figure:
    """Draw a grid: one row per image, the ground truth and then each model's detections in columns.

    The images are those with the most annotated objects; of equals, the first ones of the dataset.

    Args:
        dataset_name: a registered dataset with annotations.
        models: column title to a Detectron2 model in evaluation mode.
        mapper: the test-time mapper, from a dataset dict to a model input.
        path: the PNG file to write.
        images: how many rows, fewer if the dataset has fewer images.
        score_threshold: detections with a lower score are not drawn.

    Returns:
        The figure that was written.
    """
    classes = MetadataCatalog.get(dataset_name).thing_classes
    samples = sorted(DatasetCatalog.get(dataset_name), key=lambda sample: -_object_count(sample))
    grid = []
    for sample in samples[:images]:
        image = read_image(sample["file_name"], "RGB", getattr(mapper, "image_range", None))
        row = [draw_objects(image, _annotations(sample, classes))]
        for model in models.values():
            with torch.no_grad():
                found = model([mapper(sample)])[0]["instances"].to("cpu")
            found = found[found.scores >= score_threshold]
            row.append(draw_objects(image, _detections(found, classes)))
        grid.append(row)

    return picture_grid(grid, ["ground truth", *models], path)


def loss_curves(runs: Mapping[str, str], path: str) -> Figure:
    """Draw the training curves of runs: left the detector's own loss, right the distillation terms.

    Args:
        runs: name of a run to its ``metrics.json``.
        path: the PNG file to write.

    Returns:
        The figure that was written; its two axes hold one labelled line per curve, each a moving
        average over a fiftieth of its points.

    Raises:
        FileNotFoundError: there is no such metrics file.
    """
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, metrics in runs.items():
        curves = read_curves(metrics)
        _plot(left, curves["iteration"], detector_loss(curves), name)
        for key in sorted(curves):
            if key.startswith(_DISTILLATION) and not key.endswith("/weight"):
                label = f"{name}: {key.removeprefix(_DISTILLATION)}"
                _plot(right, curves["iteration"], curves[key], label)
    left.set_title("detector's loss")
    right.set_title("distillation terms")
    for axes in (left, right):
        axes.set_xlabel("iteration")
        axes.grid(alpha=0.3)
        if axes.lines:  # beside the curves: a pair has a dozen terms
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    # The terms can differ by orders of magnitude.
    if right.lines and all((line.get_ydata() > 0).all() for line in right.lines):
        right.set_yscale("log")
    figure.savefig(path, dpi=120)
    return figure


def read_curves(path: str) -> Dict[str, np.ndarray]:
    """Read Detectron2's ``metrics.json`` at ``path``, one JSON object per line.

    Lines that a killed run left cut off are skipped.  Where a resumed run repeats an iteration, its
    later values stand.

    Returns:
        Metric name to values of shape (rows,), NaN where a row lacks the metric.  "iteration" is
        among the names, and rising.

    Raises:
        FileNotFoundError: there is no such file.
    """
    return read_metrics(path)[0]


def read_metrics(path: str) -> Tuple[Dict[str, np.ndarray], int]:
    """What :func:`read_curves` returns of ``path``, and how many lines of it cannot be read."""
    rows: Dict[int, Dict[str, float]] = {}
    broken = 0
    with open(path, errors="replace") as file:
        for line in filter(str.strip, file):
            row = _row(line)
            if row:
                rows.setdefault(int(row["iteration"]), {}).update(row)
            else:
                broken += 1
    ordered = [rows[iteration] for iteration in sorted(rows)]
    names = {"iteration"}.union(*ordered)
    curves = {name: np.array([row.get(name, np.nan) for row in ordered], float) for name in names}
    return curves, broken


def _row(line: str) -> Optional[Dict[str, float]]:
    """The numbers of one line; None if it holds anything else, or no iteration."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("iteration"), int):
        return None
    return row if all(isinstance(x, (int, float, type(None))) for x in row.values()) else None


def detector_loss(curves: Mapping[str, np.ndarray]) -> np.ndarray:
    """The sum of the loss terms other than distillation: shape (rows,), NaN where one is NaN.

    ``curves`` is what :func:`read_curves` returned; without such a term all is NaN.
    """
    terms = [
        values
        for name, values in curves.items()
        if name.startswith("loss_") and not name.startswith("loss_distill")
    ]
    return np.sum(terms, axis=0) if terms else np.full(len(curves["iteration"]), np.nan)


def _plot(axes: Axes, iterations: np.ndarray, values: np.ndarray, label: str) -> None:
    known = ~np.isnan(values)
    if known.any():
        axes.plot(iterations[known], _smooth(values[known]), label=label)


def _smooth(values: np.ndarray) -> np.ndarray:
    """A centred moving average over a fiftieth of ``values``; windows shrink at the two ends."""
    window = np.ones(max(1, len(values) // 50))
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def _object_count(sample: Mapping[str, Any]) -> int:
    return sum(not note.get("iscrowd", 0) for note in sample.get("annotations", []))


def _annotations(sample: Mapping[str, Any], classes: Sequence[str]) -> List[DrawnObject]:
    return [
        DrawnObject(
            BoxMode.convert(list(note["bbox"]), note["bbox_mode"], BoxMode.XYXY_ABS),
            note["category_id"],
            note.get("segmentation"),
            classes[note["category_id"]],
        )
        for note in sample.get("annotations", [])
    ]


def _detections(found: Instances, classes: Sequence[str]) -> List[DrawnObject]:
    masks = found.pred_masks.numpy() if found.has("pred_masks") else [None] * len(found)
    boxes, categories = found.pred_boxes.tensor.tolist(), found.pred_classes.tolist()
    return [
        DrawnObject(box, category, mask, f"{classes[category]} {score:.0%}")
        for box, category, mask, score in zip(boxes, categories, masks, found.scores.tolist())
    ]
