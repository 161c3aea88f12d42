import json

import numpy as np
import pytest

from sharedkd.lab.metrics import detector_loss, read_curves


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
