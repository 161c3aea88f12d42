import functools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from detectron2.config import instantiate
from PIL import Image

from sharedkd.config import load_config
from sharedkd.errors import ConfigError
from sharedkd.lab.analysis.models import trained_student
from sharedkd.lab.export import FORMATS, Agreement, NotExportable, export_student, formats, table
from sharedkd.lab.export.formats import detect, outputs_of
from sharedkd.lab.export.images import fit, read_images

FAST = [("mask_rcnn", "torchscript"), ("mask_rcnn", "onnx")]
NEVER = ("cascade_mask_rcnn", "torchscript")
SLOW = [(f, x) for f in tiny.FAMILIES for x in FORMATS if (f, x) not in {NEVER, *FAST}]


def noise(height, width, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=draw).to(torch.uint8)


def set_threshold(model, value):
    heads = getattr(model, "roi_heads", None)
    each = model if heads is None else heads.box_predictor
    for predictor in each if isinstance(each, torch.nn.ModuleList) else [each]:
        predictor.test_score_thresh = value


@pytest.fixture(scope="module")
def detectors():
    """family -> (detector, image with detections, one of another size, one without detections)"""
    made = {}

    def make(family):
        if family not in made:
            model = tiny.detector(family).eval()
            busy, blank = noise(64, 96, seed=3), torch.full((3, 64, 96), 120, dtype=torch.uint8)
            set_threshold(model, 0.0)
            best = lambda x: detect(model, x)[-1].max().item()  # noqa: E731
            without, example = sorted((blank, busy), key=best)
            set_threshold(model, (best(blank) + best(busy)) / 2)
            made[family] = model, example, fit(example, (96, 75), (7, 99, 200)), without
        return made[family]

    return make


@pytest.mark.parametrize(
    "family, name", [*FAST, *(pytest.param(*x, marks=pytest.mark.nightly) for x in SLOW)]
)
def test_exported_file_agrees_with_eager_on_every_size(family, name, detectors, tmp_path):
    model, example, other, without = detectors(family)
    path = str(tmp_path / "file")
    FORMATS[name].convert(model, example, path)
    run = FORMATS[name].load(path)
    names = outputs_of(model)
    assert ("masks" in names) == ("mask" in family)
    for image in (example, other, without):
        eager = detect(model, image)
        assert (len(eager[0]) == 0) == (image is without)
        found = Agreement().add(names, eager, run(image), image.shape[-2:])
        assert found.unmatched == 0 and found.empty == (image is without), found


def test_what_a_format_does_not_take_is_refused_with_what_to_use(detectors, tmp_path):
    family, name = NEVER
    model, example, *_ = detectors(family)
    with pytest.raises(NotExportable, match="Could not export Python function") as e:
        FORMATS[name].convert(model, example, str(tmp_path / "file"))
    assert e.value.fix == "use onnx" and "\n" not in str(e.value)
    assert e.value.__cause__ is not None  # it was tried


@pytest.mark.parametrize("family", ["mask_rcnn", "retinanet"])
def test_detect_is_what_detectron2_finds(family, detectors):
    model, example, *_ = detectors(family)
    full = model([{"image": example}])[0]["instances"]
    found = dict(zip(outputs_of(model), detect(model, example)))
    assert torch.equal(found["boxes"], full.pred_boxes.tensor)
    assert torch.equal(found["scores"], full.scores)
    assert torch.equal(found["classes"], full.pred_classes)


def test_models_whose_output_would_be_lost_are_refused():
    with pytest.raises(NotExportable, match="Linear is no detector"):
        detect(torch.nn.Linear(1, 1), noise(8, 8))
    heads = SimpleNamespace(keypoint_on=True)
    points = SimpleNamespace(backbone=None, preprocess_image=None, roi_heads=heads)
    with pytest.raises(NotExportable, match="keypoints are not exported"):
        detect(points, noise(8, 8))


def boxes(*rows):
    rows = torch.tensor(rows, dtype=torch.float32).view(-1, 6)
    return [rows[:, :4], rows[:, 4].long(), rows[:, 5]]


NAMES = ["boxes", "classes", "scores"]
A, B = (0, 0, 10, 10, 0, 0.9), (50, 50, 60, 60, 1, 0.8)


@pytest.mark.parametrize(
    "exported, unmatched",
    [
        ([B, A], 0),  # equal scores may change places
        ([(0.005, 0, 10, 10, 0, 0.9), B], 0),
        ([(0.05, 0, 10, 10, 0, 0.9), B], 2),  # of either side one
        ([(0, 0, 10, 10, 1, 0.9), B], 2),
        ([(0, 0, 10, 10, 0, 0.901), B], 2),
        ([A, B, B], 1),
        ([], 2),
    ],
)
def test_agreement(exported, unmatched):
    found = Agreement().add(NAMES, boxes(A, B), boxes(*exported), (100, 80))
    assert (found.unmatched, found.detections, found.empty) == (unmatched, 2, 0)
    assert found.holds == (unmatched == 0)


def test_agreement_adds_up():
    moved = boxes((0.004, 0, 10, 10, 0, 0.9), B)
    total = Agreement().add(NAMES, boxes(A, B), moved, (100, 80))
    total.add(NAMES, boxes(), boxes(), (9, 9))
    assert (total.images, total.empty, total.detections) == (2, 1, 2)
    assert total.largest["boxes"] == pytest.approx(0.004)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(config, picture) of a tiny Mask R-CNN with random weights."""
    folder = tmp_path_factory.mktemp("run")
    picture = folder / "picture.png"
    Image.fromarray(noise(120, 150).permute(1, 2, 0).numpy()).save(picture)
    torch.manual_seed(0)
    cfg = config()
    model = instantiate(cfg.model)
    torch.save({"model": model.state_dict()}, folder / "model.pth")
    cfg.train.init_checkpoint = str(folder / "model.pth")
    return cfg, str(picture)


def config(path="custom_coco_mask_plain.py", *overrides):
    path = str(tiny.ROOT / "configs" / path)
    keys = ["data.num_classes=3", "data.test_short_edge=64", "data.max_size=96", *overrides]
    return load_config(path, keys, keep_teacher=True, without_data=True)


# Without the packages that made the file.
ALONE = """
import sys
for name in ("sharedkd", "detectron2", "fvcore"):
    sys.modules[name] = None
exec(sys.stdin.read())
bitmaps = np.stack([bitmap(i) for i in range(len(found["scores"]))])
np.savez(sys.argv[1] + ".npz", bitmaps=bitmaps, **found)
"""


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """format -> the student of a pair, exported, timed once at 32 x 64; the teacher's file is absent."""
    cfg = config("custom_coco_mask.py", "model.teacher.weights=absent.pth")
    cfg.train.init_checkpoint = run[0].train.init_checkpoint

    @functools.cache
    def make(name):
        folder = tmp_path_factory.mktemp(name)
        with pytest.MonkeyPatch.context() as patch:  # building a teacher would fail
            patch.setattr("sharedkd.modeling.teachers.frozen.FrozenTeacher.__init__", None)
            return export_student(cfg, [name], str(folder), [run[1]], (32, 64), rounds=1)

    return make


@pytest.mark.parametrize("name", ["onnx", pytest.param("torchscript", marks=pytest.mark.nightly)])
def test_documented_example_runs_alone_and_finds_what_detectron2_finds(name, run, exported):
    cfg, picture = run
    image = read_images(cfg, [picture]).tensors[0]
    assert tuple(image.shape) == (3, 64, 80)
    with torch.no_grad():
        inputs = [{"image": image, "height": 120, "width": 150}]
        truth = trained_student(cfg, cfg.train.init_checkpoint, "")(inputs)[0]["instances"]
    assert len(truth) > 10
    example = (tiny.ROOT / "docs/deployment.md").read_text().split("```python\n")[1].split("```")[0]
    path = exported(name)["models"][name]["path"]
    command = [sys.executable, "-W", "ignore", "-c", ALONE, path, picture]
    done = subprocess.run(command, input=example, text=True, stdout=subprocess.PIPE, check=True)
    assert len(done.stdout.splitlines()) == len(truth)
    ours = np.load(path + ".npz")
    theirs = truth.pred_boxes.tensor, truth.pred_classes, truth.scores
    agreement = Agreement().add(NAMES, theirs, [torch.tensor(ours[x]) for x in NAMES], (120, 150))
    assert agreement.unmatched == 0  # equal scores may have changed places
    covered, ours = truth.pred_masks.numpy().sum(0), ours["bitmaps"].sum(0)
    assert covered.sum() > 1000 and abs(covered - ours).sum() < 0.01 * covered.sum()


def test_of_a_pair_the_student_is_exported_with_what_its_use_needs(exported):
    result = exported("onnx")
    assert result["refused"] == [] and result["models"].keys() == {"student", "onnx"}
    assert all(x["milliseconds"]["low"] > 0 for x in result["models"].values())
    assert result["image"] == [32, 64]
    assert "absent.pth: no such file" in result["no_teacher"]
    said = table(result)
    onnx = result["models"]["onnx"]
    assert "detections without a partner" in said and f"0 of {onnx['detections']}" in said
    assert f"Checked on 3 images, {onnx['empty']} of them without detections." in said
    path = Path(result["models"]["onnx"]["path"])
    assert path.name == "student.onnx" and not list(path.parent.glob(".*"))  # nothing unfinished
    about = json.loads(Path(f"{path}.json").read_text())
    image = about["inputs"]["image"]
    assert image["channels"] == "RGB" and image["resize"] == {"short_edge": 64, "max_size": 96}
    assert about["outputs"] == ["boxes", "classes", "masks", "scores"]
    assert about["in_graph"]["pixel_mean"] == pytest.approx([123.675, 116.28, 103.53])
    assert about["classes"] == ["0", "1", "2"]
    assert about["agreement"]["images"] == 3 and about["agreement"]["unmatched"] == 0


def spoilt(traceable, image, outputs, path):
    """Exports a detector that differs from the student."""
    weight = traceable.model.roi_heads.box_predictor.bbox_pred.weight
    before = weight.clone()
    weight.mul_(2)
    formats._trace(traceable, image, outputs, path)
    weight.copy_(before)


def broken(traceable, image, outputs, path):
    with open(path, "w") as f:
        f.write("half a file")
    raise RuntimeError("first line\nand a long\ntraceback")


@pytest.mark.parametrize(
    "write, message",
    [(spoilt, "detections differ"), (broken, "RuntimeError: first line; use onnx")],
)
def test_a_file_that_fails_never_appears(write, message, run, tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, "torchscript", replace(FORMATS["torchscript"], write=write))
    (tmp_path / "student.torchscript.pt").write_text("of before")
    result = export_student(run[0], ["torchscript"], str(tmp_path), [run[1]], rounds=0)
    (error,) = result["refused"]
    assert message in error and "\n" not in error
    assert [x.name for x in tmp_path.iterdir()] == ["student.torchscript.pt"]
    assert (tmp_path / "student.torchscript.pt").read_text() == "of before"


def test_mistakes_are_found_before_anything_is_written(run, tmp_path, monkeypatch):
    cfg, picture = run

    def fails(match, formats=("torchscript",), cfg=cfg, files=(picture,)):
        with pytest.raises(ConfigError, match=match):
            export_student(cfg, formats, str(tmp_path / "out"), files, rounds=0)
        assert not (tmp_path / "out").exists()

    fails("--format=caffe2: no such format; use any of torchscript", formats=["caffe2"])
    fails("--format=torch_export: .*; use torchscript or onnx", formats=["torch_export"])
    fails("--images=.*absent.png: cannot be read", files=[str(tmp_path / "absent.png")])
    untrained = cfg.copy()
    untrained.train.init_checkpoint = ""
    fails("there is nothing to export; use --weights", cfg=untrained)
    silent = cfg.copy()
    silent.model.roi_heads.box_predictor.test_score_thresh = 1.0
    fails("detects nothing", cfg=silent)
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None)
    fails("onnx and onnxruntime is not installed; pip install onnx onnxruntime", formats=["onnx"])
