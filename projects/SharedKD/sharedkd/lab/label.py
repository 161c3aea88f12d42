"""Pseudo-labels: a teacher's detections on images without labels, as a COCO json to train on."""

import json
import os
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence

import pycocotools.mask as mask_util
import torch
from detectron2.config import instantiate
from detectron2.evaluation.coco_evaluation import instances_to_coco_json

from sharedkd.config import load_config
from sharedkd.config.own_data import class_names, reading_of
from sharedkd.data.coco import PSEUDO, read_classes
from sharedkd.data.faults import load
from sharedkd.data.notes import Notes
from sharedkd.data.unlabelled import images_of, read_unlabelled
from sharedkd.errors import ConfigError, Findings
from sharedkd.lab.analysis.models import trained_student
from sharedkd.lab.output import write_text
from sharedkd.modeling.classes import some_of
from sharedkd.modeling.detectors import weights_of
from sharedkd.values import check_number

__all__ = ["Labels", "label_images", "thresholds_of"]

_EVERY = 500  # images from one line of progress to the next


@dataclass
class Labels:
    """What was written."""

    images: int = 0  #: those with an object
    empty: int = 0  #: those without one are left out: whether they show one is not known
    unreadable: int = 0  #: those that cannot be loaded are left out, too
    objects: Counter = field(default_factory=Counter)  #: class name -> how many


def thresholds_of(text: str, classes: Sequence[str], default: float = 0.5) -> Dict[str, float]:
    """The least score of each class, from ``0.6``, ``cat=0.7,dog=0.4`` or ``0.6,cat=0.7``."""
    found = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.rpartition("=")
        try:
            score = float(value)
        except ValueError:
            score = float("nan")  # which is refused
        check_number("--threshold", score, least=0, most=1)
        if not equals:
            default = score
        elif name in classes:
            found[name] = score
        else:
            fix = f"use {', '.join(classes[:10])}"
            raise ConfigError("--threshold", part, "there is no such class", fix)
    return {name: found.get(name, default) for name in classes}


@torch.no_grad()
def label_images(
    teacher: str,
    images: str,
    output: str,
    threshold: str = "0.5",
    weights: Optional[str] = None,
    data_json: Optional[str] = None,
    data_images: Optional[str] = None,
    listed: Optional[str] = None,
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> Labels:
    """Write a COCO json of a teacher's detections with their ``score``, and masks if there are any.

    Args:
        teacher: a model-zoo name, a config's path or the folder of a run; it runs on images as in its own
            evaluation.
        images: their folder, to which the json's file names are relative.
        output: the json.
        threshold: see :func:`thresholds_of`.
        weights: the teacher's; None: those of a model-zoo name, or the last of a run's folder.
        data_json: the labels to train on beside them: classes are matched by name with its own, and its images
            are left out.  None: the teacher's classes.
        data_images: the folder of its images; None: ``images``.
        listed: a COCO json: label only the images that it lists.
        overrides: ``key=value`` for the teacher's config.
        say: receives a line for what is left out, and for progress.
    """
    cfg = load_config(teacher, overrides, without_data=True)
    theirs = class_names(cfg)
    if not theirs:
        fix = "name the folder of its run, or add data.classes=[...] in its order"
        raise ConfigError("--teacher", teacher, "the names of its classes are unknown", fix)
    if "data" in cfg:
        cfg.data.num_classes = len(theirs)
    ours = theirs if data_json is None else read_classes([data_json])
    if not ours:
        fix = "name a COCO json with categories"
        raise ConfigError("--data-json", data_json, "cannot be read, or has no class", fix)
    _compare(teacher, theirs, ours, data_json, say)
    least = thresholds_of(threshold, ours)
    labelled: List[str] = []
    if data_json is not None:
        notes = Notes("--data-json", data_json)
        labelled = images_of(data_json, data_images or images, notes, "--data-images")
    findings = Findings()
    reading = reading_of(cfg, "val", findings)
    findings.raise_errors()
    records, warnings = read_unlabelled(
        [images], listed, {*labelled}, (), "--images", "--list", reading
    )
    for warning in warnings:
        say(str(warning))

    model = trained_student(cfg, weights or weights_of(teacher) or "", "--teacher-weights")
    model.to(cfg.train.device)
    for module in model.modules():  # which would leave out what is less sure
        if hasattr(module, "test_score_thresh"):
            module.test_score_thresh = min(module.test_score_thresh, *least.values())
    mapper = instantiate(cfg.dataloader.test.mapper)

    ids, found = {name: i + 1 for i, name in enumerate(ours)}, Labels()
    rows: Dict[str, List[Dict[str, Any]]] = {"images": [], "annotations": []}
    for i, record in enumerate(records):
        if i and i % _EVERY == 0:
            say(f"{i} of {len(records)} images")
        sample, fault = load(mapper, dict(record))
        if fault is not None and not fault.in_image:
            fix = "correct the teacher's mapper and its augmentations"
            raise ConfigError("dataloader.test.mapper", fault.file, fault.problem, fix)
        if fault is not None:
            found.unreadable += 1
            say(f"{fault.file}: left out ({fault.problem})")
            continue
        instances = model([sample])[0]["instances"].to("cpu")
        objects = [
            x
            for x in map(partial(_object, theirs, ids), instances_to_coco_json(instances, i + 1))
            if x is not None and x["score"] >= least[ours[x["category_id"] - 1]]
        ]
        if not objects:
            found.empty += 1
            continue
        found.images += 1
        found.objects.update(ours[x["category_id"] - 1] for x in objects)
        name = os.path.relpath(record["file_name"], images)
        size = {k: record[k] for k in ("height", "width")}
        rows["images"].append({"id": i + 1, "file_name": name, **size})
        for x in objects:
            rows["annotations"].append({"id": len(rows["annotations"]) + 1, **x})
    if not found.images and found.unreadable == len(records):
        raise ConfigError("--images", images, "none of them can be loaded", "repair them")
    if not found.images:
        fix = "use a lower one, or a better teacher"
        raise ConfigError("--threshold", threshold, "no detection is as sure", fix)
    about = {PSEUDO: True, "teacher": teacher, "thresholds": least}
    categories = [{"id": i, "name": name} for name, i in ids.items()]
    document = {"info": about, **rows, "categories": categories}
    write_text(Path(output), json.dumps(document))
    return found


def _compare(
    config: str,
    theirs: Sequence[str],
    ours: Sequence[str],
    data_json: Optional[str],
    say: Callable[[str], None],
) -> None:
    """Say which classes only one side has; refuse a teacher that has none of the data's."""
    if not {*theirs} & {*ours}:
        problem = f"has none of the data's classes: {some_of(theirs)}, not {some_of(ours)}"
        fix = "name the data's classes as the teacher does, or use another teacher"
        raise ConfigError("--teacher", config, problem, fix)
    dropped, missing = ([x for x in a if x not in b] for a, b in ((theirs, ours), (ours, theirs)))
    if dropped:
        say(f"classes of the teacher that the data have not, left out: {', '.join(dropped)}")
    if missing:
        say(f"classes of {data_json} that the teacher does not know: {', '.join(missing)}")


def _object(
    theirs: Sequence[str], ids: Mapping[str, int], found: Dict[str, Any]
) -> Optional[Dict[str, Any]]:
    """An annotation of a detection; None if it is of no class of the data, or shows nothing."""
    category = ids.get(theirs[found["category_id"]])
    box = [round(x, 2) for x in found["bbox"]]
    area = box[2] * box[3]
    if "segmentation" in found:
        area = float(mask_util.area(found["segmentation"]))
    if category is None or not area > 0 or min(box[2:]) <= 0:
        return None
    row = {"image_id": found["image_id"], "category_id": category, "iscrowd": 0, "bbox": box}
    mask = {k: found[k] for k in ("segmentation",) if k in found}
    return {**row, "area": area, "score": found["score"], **mask}
