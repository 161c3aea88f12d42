"""A small COCO data set to spoil, and what a run sees of it."""

import copy
import json

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from sharedkd.data.coco import read_coco
from sharedkd.errors import ConfigErrors

HEIGHT, WIDTH = 40, 60
NAME = "own_of_test"


def rle(height, width):
    mask = np.zeros((height, width), np.uint8, order="F")
    mask[5:15, 5:25] = 1
    return {"size": [height, width], "counts": mask_util.encode(mask)["counts"].decode()}


def annotation(id, image_id, category_id, bbox, **more):
    fields = dict(id=id, image_id=image_id, category_id=category_id, bbox=bbox)
    return {**fields, "area": bbox[2] * bbox[3], "iscrowd": 0, **more}


def image(id, file_name):
    return {"id": id, "file_name": file_name, "width": WIDTH, "height": HEIGHT}


GOOD = {
    "images": [
        image(7, "a.png"),
        image(3, "sub/ünï 図.jpg"),
        image(9, "many.png"),
        image(11, "empty.png"),
    ],
    "annotations": [
        annotation(1, 7, 5, [5, 5, 20, 10], segmentation=[[5, 5, 25, 5, 25, 15, 5, 15]]),
        annotation(2, 7, 90, [5.5, 5, 20, 10], segmentation=rle(HEIGHT, WIDTH)),
        # Sticks out by less than a pixel, as some of COCO's own boxes do.
        annotation(4, 3, 5, [-0.4, 30, 60.8, 10.9], segmentation=[[0, 30, 60, 30, 60, 40, 0, 40]]),
        annotation(
            8, 3, 5, [0, 0, 60, 40], iscrowd=1, segmentation=dict(size=[40, 60], counts=[400, 2000])
        ),
        *(
            annotation(20 + i, 9, 90, [5 * i, 9, 4, 8], segmentation=[[5 * i, 9, 5 * i + 4, 9, 5 * i + 4, 17, 5 * i, 17]])
            for i in range(8)
        ),
    ],
    # Ids with a gap and out of order.
    "categories": [{"id": 90, "name": "straße"}, {"id": 5, "name": "cat"}],
}  # fmt: skip


class Folder:
    """Writes GOOD, or a change of it, beside its images.

    Args:
        path: an empty folder.
    """

    def __init__(self, path):
        self.path, self.images = path, path / "images"
        for row in GOOD["images"]:
            self.picture(row["file_name"])

    def picture(self, name, size=(WIDTH, HEIGHT), mode="RGB", **options):
        path = self.images / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, size).save(path, **options)

    def write(self, change=None, name="own.json"):
        """The path of a json; ``change`` alters GOOD in place, or returns text or bytes instead."""
        data = copy.deepcopy(GOOD)
        data = (change and change(data)) or data
        if not isinstance(data, (str, bytes)):
            data = json.dumps(data, ensure_ascii=False)
        (self.path / name).write_bytes(data.encode() if isinstance(data, str) else data)
        return str(self.path / name)


def setter(part, index, **fields):
    """A change of one item: ... deletes a field."""

    def change(data):
        item = data[part][index]
        for field, value in fields.items():
            if value is ...:
                del item[field]
            else:
                item[field] = value

    return change


def extend(part, item):
    return lambda data: data[part].append(item)


def all_of(*changes):
    def change(data):
        for each in changes:
            each(data)

    return change


def raise_errors(data):
    """The errors of :class:`CocoData`, as a run raises them."""
    if data.errors:
        raise ConfigErrors(data.errors)


def reading_of(json_file, image_root, **options):
    """What :func:`read_coco` makes of a file that it can use; raises its errors otherwise."""
    keys = ("data.train_json", "data.train_images")
    data = read_coco([str(json_file)], [str(image_root)], *keys, **options)
    raise_errors(data)
    return data


def seen(name=NAME):
    """What Detectron2 loads: file name -> [(class, box as x, y, w, h, is a crowd, has a mask)]."""
    classes = MetadataCatalog.get(name).thing_classes
    root = MetadataCatalog.get(name).image_root
    return {
        record["file_name"].removeprefix(f"{root}/"): [
            (
                classes[o["category_id"]],
                [round(x, 4) for x in o["bbox"]],
                bool(o["iscrowd"]),
                "segmentation" in o,
            )
            for o in record["annotations"]
        ]
        for record in DatasetCatalog.get(name)
    }


def metrics(name=NAME, masks=True):
    """COCO's metrics of predictions that depend on the images and boxes alone, good ones and bad ones."""
    evaluator = COCOEvaluator(name, distributed=False, max_dets_per_image=100)
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        size, objects = (record["height"], record["width"]), record["annotations"]
        found = Instances(size)
        boxes = [BoxMode.convert(o["bbox"], o["bbox_mode"], BoxMode.XYXY_ABS) for o in objects]
        moved = torch.tensor(boxes, dtype=torch.float64).view(-1, 4)
        moved[::3] += 2
        found.pred_boxes = Boxes(moved)
        found.scores = 1 - torch.arange(len(objects)) / 20
        found.pred_classes = torch.tensor([o["category_id"] for o in objects], dtype=torch.int64)
        if masks:
            decoded = [decode(o["segmentation"], *size) for o in objects]
            found.pred_masks = torch.tensor(np.array(decoded).reshape(-1, *size))
        evaluator.process([record], [{"instances": found}])
    return {  # nan equals nothing
        task: {k: -1.0 if np.isnan(x) else x for k, x in values.items()}
        for task, values in evaluator.evaluate().items()
    }


def decode(segmentation, height, width):
    if isinstance(segmentation, list):
        segmentation = mask_util.merge(mask_util.frPyObjects(segmentation, height, width))
    return mask_util.decode(segmentation).astype(bool)
