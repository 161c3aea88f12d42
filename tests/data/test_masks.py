"""Which segmentations are let through to pycocotools' native code."""

import numpy as np
import pycocotools.mask as mask_util
import pytest

from sharedkd.data.masks import MOST_PIXELS, fault

HEIGHT, WIDTH = 20, 30


def compressed(runs, height=HEIGHT, width=WIDTH):
    rle = mask_util.frPyObjects({"size": [height, width], "counts": runs}, height, width)
    return {"size": [height, width], "counts": rle["counts"].decode()}


def random_runs(generator, most=40):
    """Run lengths that fill the image, some of them zero."""
    cuts = np.sort(generator.integers(0, HEIGHT * WIDTH + 1, generator.integers(0, most)))
    return np.diff([0, *cuts, HEIGHT * WIDTH]).tolist()


def test_run_lengths_that_fill_the_image_pass_in_both_forms_and_others_do_not():
    generator = np.random.default_rng(0)
    for _ in range(200):
        runs = random_runs(generator)
        assert fault({"size": [HEIGHT, WIDTH], "counts": runs}, HEIGHT, WIDTH) == ""
        assert fault(compressed(runs), HEIGHT, WIDTH) == ""
        runs[generator.integers(len(runs))] += 1
        assert "do not fill" in fault({"size": [HEIGHT, WIDTH], "counts": runs}, HEIGHT, WIDTH)
        assert "do not fill" in fault(compressed(runs), HEIGHT, WIDTH)


def test_what_passes_after_a_random_change_decodes_to_as_many_pixels():
    generator = np.random.default_rng(1)
    passed = 0
    for _ in range(3000):
        rle = compressed(random_runs(generator, most=4))
        codes = list(rle["counts"])
        for place in generator.integers(len(codes), size=2):
            codes[place] = chr(ord(codes[place]) ^ 1)
        rle["counts"] = "".join(codes)
        if not fault(rle, HEIGHT, WIDTH):
            passed += 1
            assert mask_util.decode(rle).sum() == mask_util.area(rle)
    assert passed > 5


def test_leading_zeros_pass_up_to_the_six_characters_of_a_number():
    for counts in ("hb0", "hbPPP0"):
        assert fault({"size": [HEIGHT, WIDTH], "counts": counts}, HEIGHT, WIDTH) == ""


def test_the_largest_mask_passes():
    runs = [0, MOST_PIXELS // 2, MOST_PIXELS // 2]
    rle = compressed(runs, MOST_PIXELS // 2, 2)
    assert fault(rle, MOST_PIXELS // 2, 2) == ""
    assert mask_util.area(rle) == MOST_PIXELS // 2


@pytest.mark.parametrize(
    "counts",
    [
        "",
        "o",
        "oooooo0",
        "PPPPPPP0",
        "hbPPPP0",
        "0\0",
        "é",
        "\ud800",
        "p0",
        "/0",
        b"0",
        600,
        None,
        [600.0],
        [True],
    ]
    + [[-1, 601], [2**32 + 600], [10**400], ["600"], [[600]], []],
)
def test_counts_that_are_none(counts):
    assert fault({"size": [HEIGHT, WIDTH], "counts": counts}, HEIGHT, WIDTH)


@pytest.mark.parametrize(
    "size", [[30, 20], [20.0, 30], [20], [20, 30, 1], None, "20", {"0": 20}, [600, 1], [-20, -30]]
)
def test_size_of_another_image(size):
    assert "has RLE of size" in fault({"size": size, "counts": [600]}, HEIGHT, WIDTH)
    assert "has RLE of size" in fault({"size": [True, True], "counts": [1]}, 1, 1)


@pytest.mark.parametrize(
    "polygon, what",
    [
        ([1, 1, 5, 1, 5, 5], ""),
        ([-30, -20, 60, -20, 60, 40], ""),
        ([0, 0, 30, 0, 30, 20] * 3, ""),
        ([-31, 0, 5, 1, 5, 5], "by more than its size"),
        ([0, 0, 61, 1, 5, 5], "by more than its size"),
        ([0, 0, 5, 41, 5, 5], "by more than its size"),
        ([0, 0, 1e8, 1, 5, 5], "by more than its size"),
        ([30, 0, 40, 0, 40, 5], "outside"),
        ([0, 0, 30, 20] * 500, "outline is longer than 3200 px"),
        ([0, 0, 5, 5], "4 numbers"),
        ([0, 0, 5, 5, True, 5], "finite"),
        ([0, 0, 5, 5, None, 5], "finite"),
        ([0, 0, 5, 5, 10**400, 5], "finite"),
    ],
)
def test_polygons(polygon, what):
    found = fault([polygon], HEIGHT, WIDTH)
    assert what in found and bool(found) == bool(what)


def test_the_outline_is_what_is_bounded_not_the_number_of_points():
    angles = np.linspace(0, 2 * np.pi, 20_000)
    circle = np.stack([15 + 9 * np.cos(angles), 10 + 9 * np.sin(angles)], axis=1)
    assert fault([circle.reshape(-1).tolist()], HEIGHT, WIDTH) == ""
