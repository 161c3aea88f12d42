"""What a picture shows, and where: by its pixels."""

import numpy as np
import pytest

from sharedkd.lab.analysis.detection_plots import draw_mistakes
from sharedkd.lab.analysis.drawing import (
    FALSE_ALARM,
    MISSED,
    DrawnObject,
    class_color,
    draw_objects,
)
from sharedkd.lab.analysis.mistakes import KINDS

GREY = np.full((100, 160, 3), 128, np.uint8)
SCALE = 4  # to 640 pixels
BOX = (40, 20, 100, 80)


def near(picture, color, tolerance=60):
    return (np.abs(picture.astype(int) - 255 * np.array(color)).max(-1) < tolerance).astype(bool)


def along_the_top(picture):
    """The pixels around the upper edge of the box."""
    return picture[20 * SCALE - 4 : 20 * SCALE + 4, 44 * SCALE : 96 * SCALE]


def changed(picture):
    return (np.abs(picture.astype(int) - 128).max(-1) > 12).nonzero()


def test_a_found_object_has_a_solid_box_in_its_class_s_colour():
    assert np.abs(np.subtract(class_color(0), class_color(3))).max() > 0.2
    for category in (0, 3):
        picture = draw_objects(GREY, [DrawnObject(BOX, category)])
        assert picture.shape == (400, 640, 3)  # enlarged
        edge = near(along_the_top(picture), class_color(category)).any(0)
        assert edge.mean() > 0.97
        rows, columns = changed(picture)
        assert abs(rows.min() - 80) < 6 and abs(rows.max() - 320) < 6
        assert abs(columns.min() - 160) < 6 and abs(columns.max() - 400) < 6
        assert not near(picture[150:250, 200:360], class_color(category)).any()


def test_a_missed_object_is_marked_at_its_place_in_black_and_white():
    picture = draw_objects(GREY, [DrawnObject(BOX, 0, mark=MISSED)])
    top = along_the_top(picture)
    for color in ((1, 1, 1), (0, 0, 0)):
        assert 0.2 < near(top, color).any(0).mean() < 0.9
    rows, columns = changed(picture)
    assert abs(rows.min() - 80) < 6 and abs(columns.max() - 400) < 6
    assert not near(picture, class_color(0)).any()


def test_a_false_alarm_is_dashed_and_crossed_out():
    color = class_color(2)
    picture = draw_objects(GREY, [DrawnObject(BOX, 2, mark=FALSE_ALARM)])
    assert 0.3 < near(along_the_top(picture), color).any(0).mean() < 0.9
    assert near(picture[196:204, 276:284], color).any()  # the centre of the box
    assert near(picture[136:144, 216:224], color).any()  # a quarter down its diagonal
    assert not near(picture[190:210, 180:190], color).any()


def test_a_mask_fills_its_pixels_alone():
    mask = np.zeros(GREY.shape[:2], bool)
    mask[30:40, 50:60] = True
    picture = draw_objects(GREY, [DrawnObject(BOX, 1, mask)])
    inside, outside = picture[140, 220].astype(int), picture[240, 220]
    assert inside == pytest.approx(0.6 * 128 + 0.4 * 255 * np.array(class_color(1)), abs=6)
    assert (np.abs(outside.astype(int) - 128) < 3).all()


def test_a_label_is_complete_in_a_corner():
    """As many pixels of letters as in the middle of the picture."""

    def letters(box):
        bare, labelled = (
            draw_objects(GREY, [DrawnObject(box, 0, label=x)]) for x in ("", "square 98%")
        )
        return (
            near(labelled, class_color(0, lightness=0.8), 40) & (bare != labelled).any(-1)
        ).sum()

    assert letters(BOX) > 50
    # The box shines through.
    assert letters((152, 1, 159, 9)) == pytest.approx(letters(BOX), rel=0.25)


def test_bars_tell_costs_below_a_point():
    counts = {kind: 3 for kind in ("correct", *KINDS)}
    models = {
        name: {"bbox": {"mistakes": {"counts": counts, "costs": dict.fromkeys(KINDS, cost)}}}
        for name, cost in (("plain", 0.44), ("ours", None))
    }
    figure = draw_mistakes({"tasks": ["bbox"], "score_threshold": 0.5, "models": models})
    costs, numbers = ([text.get_text() for text in axes.texts] for axes in figure.axes)
    assert costs == ["0.4"] * len(KINDS) + ["-"] * len(KINDS)
    assert numbers == ["3"] * 2 * (1 + len(KINDS))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["plain", "ours"]
