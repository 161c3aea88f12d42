"""hparams and pictures of a comparison, read back from the events."""

from io import BytesIO

import numpy as np
import pytest
import report_folders as folders
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from sharedkd.lab.compare.events import write_events
from sharedkd.lab.scores import read_comparison


def events(folder):
    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def session(found):
    metadata = found.summary_metadata["_hparams_/session_start_info"]
    data = HParamsPluginData.FromString(metadata.plugin_data.content)
    return {k: v.string_value or v.number_value for k, v in data.session_start_info.hparams.items()}


@pytest.fixture
def written(tmp_path):
    folder = folders.comparison(tmp_path / "cmp", {"none": [30.0, 31.0], "a": [32.5, None]})
    Image.new("RGB", (8, 4), (0, 128, 255)).save(folder / "cost.png")
    folders.features(folder / "features")
    record = read_comparison(folder, "--tensorboard")
    for _ in range(2):  # the second replaces the first
        write_events(folder, record)
    return folder / "tensorboard"


def test_an_arm_is_a_session_with_settings_and_results(written):
    found = events(written / "a/seed0")
    settings = session(found)
    assert (settings["method"], settings["seed"]) == ("a", 0)
    assert settings["model.stages.identical.weight"] == "2.0"
    (value,) = found.Scalars("hparam/box_AP")
    assert (value.step, value.value) == (200, 32.5)
    assert found.Scalars("hparam/peak_memory_mb")[0].value == 1250
    assert "model.stages.identical.weight" not in session(events(written / "none/seed1"))


def test_only_finished_arms_and_one_file_each(written):
    files = sorted(p.parent.relative_to(written).as_posix() for p in written.glob("**/events*"))
    assert files == [".", "a/seed0", "none/seed0", "none/seed1"]


def test_pictures(written):
    found = events(written)
    tags = {"comparison/cost", "comparison/secret", "features/maps_fpn_0"}
    assert set(found.Tags()["images"]) == tags  # secret.png is a picture of the folder, too
    image = found.Images("comparison/cost")[0]
    assert (image.width, image.height) == (8, 4)
    pixels = np.asarray(Image.open(BytesIO(image.encoded_image_string)))
    assert pixels[0, 0].tolist() == [0, 128, 255]
