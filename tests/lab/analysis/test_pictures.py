import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from sharedkd.data.images import ImageMapper
from sharedkd.lab.analysis.pictures import detector_loss, loss_curves, read_curves, side_by_side

HEIGHT, WIDTH = 40, 60
NAME = "sharedkd_test_pictures"


@pytest.fixture
def dataset(tmp_path):
    """Grey images with 1, 3, 0 and 2 objects."""
    dicts = []
    for index, count in enumerate([1, 3, 0, 2]):
        file_name = str(tmp_path / f"{index}.png")
        Image.new("RGB", (WIDTH, HEIGHT), (128, 128, 128)).save(file_name)
        notes = [
            {
                "bbox": [4 + 16 * k, 8, 12, 24],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": k,
                "segmentation": [[4 + 16 * k, 8, 16 + 16 * k, 8, 4 + 16 * k, 32]],
            }
            for k in range(count)
        ]
        dicts.append(
            {
                "file_name": file_name,
                "image_id": index,
                "height": HEIGHT,
                "width": WIDTH,
                "annotations": notes,
            }
        )
    DatasetCatalog.register(NAME, lambda: dicts)
    MetadataCatalog.get(NAME).thing_classes = ["circle", "square", "triangle"]
    yield NAME
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


class Detector:
    """Finds one object of class 0, with the given score, in every image, and notes the images."""

    def __init__(self, score, masks=False):
        self.score, self.masks, self.seen = score, masks, []

    def __call__(self, inputs):
        assert not torch.is_grad_enabled()
        (sample,) = inputs
        self.seen.append(sample["image_id"])
        found = Instances((sample["height"], sample["width"]))
        found.pred_boxes = Boxes(torch.tensor([[10.0, 10.0, 50.0, 30.0]]))
        found.scores = torch.tensor([self.score])
        found.pred_classes = torch.tensor([0])
        if self.masks:
            found.pred_masks = torch.zeros(1, HEIGHT, WIDTH, dtype=torch.bool)
            found.pred_masks[:, 12:28, 12:48] = True
        return [{"instances": found}]


def draw(path, models, **options):
    mapper = DatasetMapper(is_train=False, augmentations=[], image_format="BGR")
    figure = side_by_side(NAME, models, mapper, str(path), **options)
    columns = 1 + len(models)
    pictures = [axes.images[0].get_array() for axes in figure.axes]
    return figure, [pictures[i : i + columns] for i in range(0, len(pictures), columns)]


def is_grey(picture):
    """Whether nothing is drawn: the pixels of the plain image survive Matplotlib within a step."""
    return np.abs(np.asarray(picture, dtype=int) - 128).max() <= 1


def test_grid_shows_the_fullest_images_and_what_is_above_the_threshold(dataset, tmp_path):
    sure, unsure = Detector(0.9, masks=True), Detector(0.3)
    figure, grid = draw(tmp_path / "grid.png", {"sure": sure, "unsure": unsure}, images=4)
    assert sure.seen == unsure.seen == [1, 3, 0, 2]
    assert [axes.get_title() for axes in figure.axes[:3]] == ["ground truth", "sure", "unsure"]
    drawn = [[not is_grey(picture) for picture in row] for row in grid]
    assert drawn == [[True, True, False]] * 3 + [[False, True, False]]
    draw(tmp_path / "again.png", {"sure": sure, "unsure": unsure}, images=4)
    assert (tmp_path / "grid.png").read_bytes() == (tmp_path / "again.png").read_bytes()


def test_deep_images_are_drawn_as_the_mapper_reads_them(dataset, tmp_path):
    """Values of 0 to 1000, of which 128 / 255 is 502: Detectron2's reader would draw white."""
    for index in range(4):
        grey = np.full((HEIGHT, WIDTH), 502, np.uint16)
        Image.fromarray(grey).save(tmp_path / f"{index}.png")
    options = dict(is_train=False, augmentations=[], image_format="BGR")
    mapper = ImageMapper(image_range=(0, 1000), **options)
    figure = side_by_side(
        NAME, {"unsure": Detector(0.3)}, mapper, str(tmp_path / "grid.png"), images=1
    )
    assert is_grey(figure.axes[1].images[0].get_array())


def write_metrics(path, rows, tail=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return str(path)


@pytest.fixture
def distilled(tmp_path):
    rows = [
        {
            "iteration": i,
            "lr": 0.1,
            "loss_cls": 2.0 - i / 100,
            "loss_box_reg": 1.0,
            "loss_distill": 7.0,
            "total_loss": 10.0,
            "distill/fpn/cross": 5.0 + i,
            "distill/fpn/identical": 0.1,
            "distill/fpn/weight": 0.0,
        }
        for i in (19, 39, 59)
    ]
    return write_metrics(tmp_path / "distilled.json", rows, tail='{"iteration": 79, "loss_c')


def test_read_curves(distilled):
    curves = read_curves(distilled)
    assert curves["iteration"].tolist() == [19, 39, 59]
    assert curves["distill/fpn/cross"].tolist() == [24, 44, 64]
    assert detector_loss(curves) == pytest.approx([2.81, 2.61, 2.41])


def test_resumed_run_overrides_and_gaps_are_nan(tmp_path):
    rows = [
        {"iteration": 19, "loss_cls": 3.0},
        {"iteration": 39, "loss_cls": 9.0},
        {"iteration": 29, "bbox/AP": 30.0},
        {"iteration": 39, "loss_cls": 2.0},
    ]
    curves = read_curves(write_metrics(tmp_path / "metrics.json", rows))
    assert curves["iteration"].tolist() == [19, 29, 39]
    np.testing.assert_array_equal(curves["loss_cls"], [3, np.nan, 2])
    np.testing.assert_array_equal(curves["bbox/AP"], [np.nan, 30, np.nan])


def test_empty_metrics(tmp_path):
    curves = read_curves(write_metrics(tmp_path / "metrics.json", []))
    assert curves["iteration"].shape == detector_loss(curves).shape == (0,)


def test_loss_curves(distilled, tmp_path):
    rows = [{"iteration": 19, "loss_cls": 3.0}, {"iteration": 29, "bbox/AP": 30.0}]
    plain = write_metrics(tmp_path / "plain.json", rows)
    figure = loss_curves({"plain": plain, "ours": distilled}, str(tmp_path / "curves.png"))
    left, right = figure.axes
    assert [line.get_label() for line in left.lines] == ["plain", "ours"]
    assert left.lines[0].get_xydata().tolist() == [[19, 3]]
    assert left.lines[1].get_ydata() == pytest.approx([2.81, 2.61, 2.41])
    assert right.get_yscale() == "log"
    assert [line.get_label() for line in right.lines] == ["ours: fpn/cross", "ours: fpn/identical"]


def test_smoothing_keeps_constants_and_averages_noise(tmp_path):
    noise = np.random.default_rng(0).normal(size=400)
    rows = [
        {"iteration": i, "loss_cls": 3.0, "distill/noise": value} for i, value in enumerate(noise)
    ]
    metrics = write_metrics(tmp_path / "metrics.json", rows)
    left, right = loss_curves({"run": metrics}, str(tmp_path / "curves.png")).axes
    np.testing.assert_allclose(left.lines[0].get_ydata(), 3.0)
    assert right.lines[0].get_ydata().std() < noise.std() / 2
