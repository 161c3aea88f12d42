"""Runs detectors on a validation set: AP per class and size, mistakes, matches of each image."""

import copy
import time
from collections import Counter, defaultdict
from contextlib import redirect_stdout
from io import StringIO
from statistics import median
from typing import Any, Dict, List, Mapping, Sequence, Tuple, Union

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sharedkd.errors import ConfigError

from .mistakes import CORRECT, KINDS, Match, ap50, costs, match
from .models import Detector

__all__ = ["Found", "Truth", "average_precision", "detect", "match_images", "mistakes"]

Found = Dict[int, List[Dict[str, Any]]]  #: image id -> detections as in COCO's result files

_SIZES = {"APs": 1, "APm": 2, "APl": 3}  # COCO's areas; 0 is all of them


class Truth:
    """The registered validation set ``dataset``, of which the images of ``records`` count."""

    def __init__(self, dataset: str, records: Sequence[Mapping[str, Any]]):
        metadata = MetadataCatalog.get(dataset)
        if not metadata.get("json_file"):
            key, fix = "dataloader.test.dataset.names", "use COCO-format data"
            raise ConfigError(key, dataset, "has no COCO json", fix)
        with redirect_stdout(StringIO()):  # pycocotools prints
            self.coco = COCO(metadata.json_file)
        self.image_ids = [record["image_id"] for record in records]
        to_model = metadata.get("thing_dataset_id_to_contiguous_id")
        self.category_ids = sorted(to_model, key=to_model.get)
        #: Names, by category id, in the order of the model's classes.
        self.classes = dict(zip(self.category_ids, metadata.thing_classes))

    @property
    def has_masks(self) -> bool:
        notes = [note for i in self.image_ids for note in self.coco.imgToAnns[i]]
        return all(note.get("segmentation") for note in notes)

    def objects(self, image_id: int) -> List[Dict[str, Any]]:
        """The annotations of the image whose id is ``image_id``, crowd regions too."""
        return self.coco.imgToAnns[image_id]

    def geometry(self, note: Mapping[str, Any], task: str) -> Union[List[float], Dict[str, Any]]:
        """The box (x, y, width, height) of an annotation or detection, or for "segm" its RLE."""
        return note["bbox"] if task == "bbox" else self.coco.annToRLE(note)


@torch.no_grad()
def detect(
    detectors: Sequence[Detector], records: Sequence[Mapping[str, Any]], truth: Truth
) -> Tuple[Dict[str, Found], Dict[str, float]]:
    """Run detectors over the images; categories are those of the dataset.

    They take turns, so that whatever else the machine does hits them alike.

    Returns:
        name -> detections, and name -> the median time of an image in seconds.
    """
    found: Dict[str, Found] = {detector.source.name: {} for detector in detectors}
    seconds: Dict[str, List[float]] = defaultdict(list)
    for record in records:
        for detector in detectors:
            name, mapped = detector.source.name, detector.mapper(copy.deepcopy(dict(record)))
            start = time.perf_counter()
            instances = detector.model([mapped])[0]["instances"].to("cpu")
            seconds[name].append(time.perf_counter() - start)
            results = instances_to_coco_json(instances, record["image_id"])
            for result in results:
                result["category_id"] = truth.category_ids[result["category_id"]]
            found[name][record["image_id"]] = results
    return found, {name: median(times) for name, times in seconds.items()}


def average_precision(truth: Truth, found: Found, task: str, most: int = 100) -> Dict[str, Any]:
    """COCO's metrics, computed by pycocotools, of at most ``most`` detections per image and class.

    Returns:
        "AP", "AP50", "AP75", "APs", "APm", "APl" and "classes" (name -> AP) as percentages; NaN
        where there are no objects.
    """
    other = "bbox" if task == "segm" else "segmentation"  # sizes would be those of the other
    detections = [x for i in truth.image_ids for x in found[i]]
    results = [{key: x[key] for key in x if key != other} for x in detections]
    with redirect_stdout(StringIO()):
        evaluation = COCOeval(truth.coco, _loaded(truth.coco, results), task)
        evaluation.params.imgIds = sorted(truth.image_ids)
        evaluation.params.maxDets = [1, 10, most]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., -1]  # IoU, recall, class, area
    means = {"AP": precision[..., 0], "AP50": precision[0, ..., 0], "AP75": precision[5, ..., 0]}
    means.update({name: precision[..., area] for name, area in _SIZES.items()})
    by_id = {i: precision[:, :, k, 0] for k, i in enumerate(evaluation.params.catIds)}
    return {
        **{name: _percentage(values) for name, values in means.items()},
        "classes": {name: _percentage(by_id[i]) for i, name in truth.classes.items()},
    }


def _loaded(coco: COCO, results: List[Dict[str, Any]]) -> COCO:
    if results:
        return coco.loadRes(results)
    nothing = COCO()  # which loadRes cannot read
    nothing.dataset = {**coco.dataset, "annotations": []}
    nothing.createIndex()
    return nothing


def _percentage(values: np.ndarray) -> float:
    known = values[values > -1]
    return 100 * float(known.mean()) if known.size else float("nan")


def match_images(
    truth: Truth, found: Found, task: str, score_threshold: float = 0.0
) -> Dict[int, Match]:
    """Match each image's detections of at least that score to its objects."""
    matches = {}
    for image_id in truth.image_ids:
        sure = [x for x in found[image_id] if x["score"] >= score_threshold]
        objects = truth.objects(image_id)
        crowd = [note.get("iscrowd", 0) for note in objects]
        iou = np.zeros((len(sure), len(objects)))
        if iou.size:
            ours = [truth.geometry(x, task) for x in sure]
            iou = mask_util.iou(ours, [truth.geometry(note, task) for note in objects], crowd)
        matches[image_id] = match(
            [x["score"] for x in sure],
            [x["category_id"] for x in sure],
            iou,
            [note["category_id"] for note in objects],
            crowd,
        )
    return matches


def mistakes(truth: Truth, found: Found, task: str, score_threshold: float) -> Dict[str, Any]:
    """Count a model's mistakes, and compute their costs.

    Returns:
        "counts": correct detections and each kind of mistake among the detections that are at least
        as sure as the threshold; "costs": kind -> points of AP50, over all detections; "AP50".
    """
    every = list(match_images(truth, found, task).values())
    shown = match_images(truth, found, task, score_threshold).values()
    counts = Counter(kind for each in shown for kind in each.kinds)
    counts["missed"] = sum(len(each.missed) for each in shown)
    return {
        "AP50": ap50(every),
        "counts": {kind: counts[kind] for kind in (CORRECT, *KINDS)},
        "costs": costs(every),
    }
