"""Every kind of mistake by hand, what each costs, and AP50 against pycocotools."""

import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sharedkd.lab.analysis.mistakes import KINDS, ap50, costs, match

CAT, DOG = 1, 2


def one(*detections, truth=(CAT,), crowd=None):
    """Detections (score, class, IoU with each object) of one image."""
    scores, classes, iou = zip(*detections) if detections else ((), (), ())
    return match(scores, classes, np.array(iou), truth, crowd or [False] * len(truth))


@pytest.mark.parametrize(
    "iou, label, truth, kind, missed",
    [
        ([0.5], CAT, (CAT,), "correct", 0),
        ([0.49], CAT, (CAT,), "localisation", 0),
        ([0.11], CAT, (CAT,), "localisation", 0),
        ([0.1], CAT, (CAT,), "background", 1),
        ([0.0], CAT, (CAT,), "background", 1),
        ([0.6], DOG, (CAT,), "classification", 0),
        ([0.3], DOG, (CAT,), "both", 1),
        ([0.1], DOG, (CAT,), "background", 1),
        ([], CAT, (), "background", 0),
        # Poorly on its own class comes before well on another.
        ([0.3, 0.8], CAT, (CAT, DOG), "localisation", 1),
        ([0.05, 0.8], CAT, (CAT, DOG), "classification", 1),
        ([0.05, 0.3], CAT, (CAT, DOG), "both", 2),
        ([0.6, 0.8], CAT, (CAT, CAT), "correct", 1),
    ],
)
def test_kinds(iou, label, truth, kind, missed):
    found = one((0.9, label, iou), truth=truth)
    assert found.kinds == [kind] and len(found.missed) == missed


def test_the_surer_detection_finds_the_object():
    found = one((0.2, CAT, [0.9]), (0.8, CAT, [0.6]))
    assert list(found.scores) == [0.8, 0.2]
    assert found.kinds == ["correct", "duplicate"]
    assert list(found.targets) == [0, -1] and found.iou[0] == 0.6


def test_each_takes_the_best_object_that_is_free():
    found = one((0.9, CAT, [0.7, 0.6]), (0.8, CAT, [0.9, 0.55]), truth=(CAT, CAT))
    assert found.kinds == ["correct"] * 2 and list(found.targets) == [0, 1]


def test_crowd_regions_count_neither_way():
    found = one((0.9, CAT, [0.8]), (0.7, CAT, [0.9]), (0.6, DOG, [0.9]), crowd=[True])
    assert found.kinds == ["ignored", "ignored", "background"]
    assert len(found.not_found) == len(found.missed) == 0


def test_nothing_found():
    found = one(truth=(CAT, DOG))
    assert list(found.missed) == [0, 1] and found.quality == 0
    assert one(truth=()).quality == 1 and one((0.9, CAT, []), truth=()).quality == 0


def test_quality():
    """IoU 0.8 and 0.6 found, one false alarm, one object not found: 1.4 / (2 + 1/2 + 1/2)."""
    found = one(
        (0.9, CAT, [0.8, 0, 0]), (0.8, CAT, [0, 0.6, 0]), (0.7, DOG, [0, 0, 0.3]),
        truth=(CAT, CAT, CAT),
    )  # fmt: skip
    assert found.quality == pytest.approx(1.4 / 3)


def test_costs_by_hand():
    """Two cats, both found, after a surer false alarm: precision 1/2, then 2/3, which is the better
    one at every recall, so AP is 2/3; without the alarm it is 1."""
    alarm = one((0.9, CAT, [0, 0]), (0.8, CAT, [0.7, 0]), (0.6, CAT, [0, 0.7]), truth=(CAT, CAT))
    assert ap50([alarm]) == pytest.approx(200 / 3)
    assert costs([alarm]) == pytest.approx({**dict.fromkeys(KINDS, 0), "background": 100 / 3})


def test_cost_of_what_could_be_right():
    """One of two objects badly placed: AP is 51/101 of recalls 0 to 0.5; placed well, all of them."""
    poor = one((0.9, CAT, [0.8, 0]), (0.8, CAT, [0, 0.4]), truth=(CAT, CAT))
    assert ap50([poor]) == pytest.approx(100 * 51 / 101)
    found = costs([poor])
    assert found.pop("localisation") == pytest.approx(100 * 50 / 101)
    assert set(found.values()) == {0}


def test_a_class_error_repaired_counts_for_the_right_class():
    wrong = one((0.9, DOG, [0.8, 0]), (0.8, DOG, [0, 0.8]), truth=(CAT, DOG))
    assert ap50([wrong]) == pytest.approx((0 + 50) / 2)
    assert costs([wrong])["classification"] == pytest.approx(75)


def test_an_object_is_won_once():
    twice = one((0.9, CAT, [0.4, 0]), (0.8, CAT, [0.3, 0]), truth=(CAT, CAT))
    assert ap50([twice], "localisation") == pytest.approx(100 * 51 / 101)
    assert list(twice.missed) == [1]
    assert ap50([twice], "missed") == 0  # what is left is still placed badly
    seen = one((0.9, CAT, [0.9, 0]), truth=(CAT, CAT))
    assert ap50([seen], "missed") == pytest.approx(100)


def test_ap50_is_that_of_pycocotools():
    """Random boxes, three classes, crowds, several images."""
    draw = np.random.default_rng(0)
    box = lambda: [*draw.uniform(0, 40, 2), *draw.uniform(10, 30, 2)]  # noqa: E731
    images = [{"id": i, "width": 80, "height": 80} for i in range(12)]
    notes, results = [], []
    for image in images:
        for _ in range(draw.integers(0, 7)):
            x = box()
            notes.append(
                {
                    "id": len(notes) + 1,
                    "image_id": image["id"],
                    "category_id": int(draw.integers(1, 4)),
                    "bbox": x,
                    "area": x[2] * x[3],
                    "iscrowd": int(draw.random() < 0.15),
                }
            )
            for _ in range(draw.integers(0, 3)):
                near = (np.array(x) + draw.normal(0, 3, 4)).clip(1).tolist()
                label = notes[-1]["category_id"] if draw.random() < 0.8 else 1
                results.append((image["id"], label, near))
        results += [(image["id"], int(draw.integers(1, 4)), box()) for _ in range(3)]
    results = [
        {"image_id": i, "category_id": c, "bbox": b, "score": float(s)}
        for (i, c, b), s in zip(results, draw.permutation(len(results)) / len(results))
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": images,
            "annotations": notes,
            "categories": [{"id": c, "name": str(c)} for c in (1, 2, 3)],
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    expected = 100 * evaluation.eval["precision"][0, :, :, 0, -1].mean()

    import pycocotools.mask as mask_util

    matches = []
    for image in images:
        ours = [x for x in results if x["image_id"] == image["id"]]
        there = [x for x in notes if x["image_id"] == image["id"]]
        crowd = [x["iscrowd"] for x in there]
        iou = mask_util.iou([x["bbox"] for x in ours], [x["bbox"] for x in there], crowd)
        scores, classes = ([x[k] for x in ours] for k in ("score", "category_id"))
        matches.append(
            match(scores, classes, np.array(iou), [x["category_id"] for x in there], crowd)
        )
    assert 10 < expected < 90
    assert ap50(matches) == pytest.approx(expected)
    assert {kind for each in matches for kind in each.kinds} >= {"ignored", "background", "correct"}
