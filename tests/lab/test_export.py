import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from sharedkd.config import load_config
from sharedkd.errors import ConfigError
from sharedkd.lab.export import FORMATS, NotExportable, compare, deploy, export_student, formats
from sharedkd.lab.export.formats import detect, outputs_of
from sharedkd.lab.export.images import fit, read_images
from sharedkd.lab.export.table import table

REFUSED = {("cascade_mask_rcnn", "script"), ("fcos", "script")}
CASES = [(f, x) for f in tiny.FAMILIES for x in FORMATS]


def noise(height, width, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=draw).to(torch.uint8)


def predictors(model):
    """What holds a detector's score threshold."""
    heads = getattr(model, "roi_heads", None)
    if heads is None:
        return [model]
    each = heads.box_predictor
    return list(each) if isinstance(each, torch.nn.ModuleList) else [each]


def set_threshold(model, value):
    for each in predictors(model):
        each.test_score_thresh = value


@pytest.fixture(scope="module")
def detectors():
    """family -> (detector, image with detections, one of another size, one without detections)"""
    made = {}

    def make(family):
        if family in made:
            return made[family]
        model = tiny.detector(family).eval()
        busy, blank = noise(64, 96, seed=3), torch.full((3, 64, 96), 120, dtype=torch.uint8)
        set_threshold(model, 0.0)
        scores = sorted((detect(model, x)[-1].max().item() for x in (busy, blank)))
        images = sorted((blank, busy), key=lambda x: detect(model, x)[-1].max().item())
        set_threshold(model, sum(scores) / 2)
        without, example = images
        made[family] = model, example, fit(example, (96, 75), (7, 99, 200)), without
        return made[family]

    return make


@pytest.mark.parametrize("family, name", [x for x in CASES if x not in REFUSED])
def test_exported_file_agrees_with_eager(family, name, detectors, tmp_path):
    model, example, other, without = detectors(family)
    path = str(tmp_path / "file")
    FORMATS[name].convert(model, example, path)
    run = FORMATS[name].load(path)
    names = outputs_of(model)
    assert ("masks" in names) == ("mask" in family)
    for image in (example, without) if FORMATS[name].fixed_size else (example, other, without):
        eager = detect(model, image)
        assert (len(eager[0]) == 0) == (image is without)
        found = compare(names, eager, run(image), image.shape[-2:])
        assert found.unmatched == 0 and found.empty == (image is without), found


@pytest.mark.parametrize("family, name", sorted(REFUSED))
def test_what_cannot_be_scripted_is_refused_with_its_reason(family, name, detectors, tmp_path):
    model, example, *_ = detectors(family)
    with pytest.raises(NotExportable, match="no type annotations") as e:
        FORMATS[name].convert(model, example, str(tmp_path / "file"))
    assert len(str(e.value).splitlines()) == 1
    assert e.value.__cause__ is not None  # it was tried, and TorchScript said no


@pytest.mark.parametrize("family", ["mask_rcnn", "retinanet"])
def test_detect_is_what_detectron2_finds(family, detectors):
    model, example, *_ = detectors(family)
    whole = model([{"image": example}])[0]["instances"]
    found = dict(zip(outputs_of(model), detect(model, example)))
    assert torch.equal(found["boxes"], whole.pred_boxes.tensor)
    assert torch.equal(found["scores"], whole.scores)
    assert torch.equal(found["classes"], whole.pred_classes)


def test_a_classifier_is_refused():
    with pytest.raises(NotExportable, match="Linear is no detector"):
        detect(torch.nn.Linear(1, 1), noise(8, 8))


def boxes(*rows):
    rows = torch.tensor(rows, dtype=torch.float32).view(-1, 6)
    return [rows[:, :4], rows[:, 4].long(), rows[:, 5]]


NAMES = ["boxes", "classes", "scores"]
A, B = (0, 0, 10, 10, 0, 0.9), (50, 50, 60, 60, 1, 0.8)


@pytest.mark.parametrize(
    "exported, unmatched",
    [
        ([A, B], 0),
        ([B, A], 0),  # equal scores may change places
        ([(0.005, 0, 10, 10, 0, 0.9), B], 0),
        ([(0.05, 0, 10, 10, 0, 0.9), B], 2),  # of either side one
        ([(0, 0, 10, 10, 1, 0.9), B], 2),
        ([(0, 0, 10, 10, 0, 0.901), B], 2),
        ([A], 1),
        ([A, B, B], 1),
        ([], 2),
    ],
)
def test_compare(exported, unmatched):
    found = compare(NAMES, boxes(A, B), boxes(*exported), (100, 80))
    assert (found.unmatched, found.detections, found.empty) == (unmatched, 2, 0)
    assert found.holds == (unmatched == 0)


def test_compare_adds_up():
    moved = boxes((0.004, 0, 10, 10, 0, 0.9), B)
    total = compare(NAMES, boxes(A, B), moved, (100, 80)) + compare(NAMES, boxes(), boxes(), (9, 9))
    assert (total.images, total.empty, total.detections) == (2, 1, 2)
    assert total.largest["boxes"] == pytest.approx(0.004)


def test_fit_cuts_and_fills():
    image = torch.arange(12, dtype=torch.uint8).view(3, 2, 2)
    found = fit(image, (3, 1), (100, 101, 102))
    assert found.tolist() == [[[0], [2], [100]], [[4], [6], [101]], [[8], [10], [102]]]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(config, picture, checkpoint) of a tiny Mask R-CNN with random weights."""
    folder = tmp_path_factory.mktemp("run")
    picture = folder / "picture.png"
    Image.fromarray(noise(120, 150).permute(1, 2, 0).numpy()).save(picture)
    torch.manual_seed(0)
    cfg = config()
    torch.save({"model": formats_model(cfg).state_dict()}, folder / "model.pth")
    cfg.train.init_checkpoint = str(folder / "model.pth")
    return cfg, str(picture)


def config(path="custom_coco_mask_plain.py", *overrides):
    path = str(tiny.ROOT / "configs" / path)
    keys = ["data.num_classes=3", "data.test_short_edge=64", "data.max_size=96", *overrides]
    return load_config(path, keys, keep_teacher=True, without_data=True)


def formats_model(cfg):
    return deploy.construct(deploy.student_only(cfg).model, "model").eval()


def example_of_the_documentation():
    text = (tiny.ROOT / "docs/deployment.md").read_text()
    return text.split("```python\n")[1].split("```")[0]


# Without the packages that made the file.
ALONE = """
import sys
for name in ("sharedkd", "detectron2", "fvcore"):
    sys.modules[name] = None
exec(sys.stdin.read())
bitmaps = np.stack([bitmap(i) for i in range(len(found["scores"]))])
np.savez(sys.argv[1] + ".npz", bitmaps=bitmaps, **found)
"""


def test_documented_example_runs_alone_and_finds_what_detectron2_finds(run, tmp_path):
    cfg, picture = run
    result = export_student(cfg, ["torchscript", "onnx"], str(tmp_path), [picture], rounds=1)
    assert not result.refused.errors and set(result.files) == {"torchscript", "onnx"}
    assert set(result.milliseconds) == {"student", "torchscript", "onnx"}  # it has no teacher
    image = read_images(cfg, [picture]).tensors[0]
    assert tuple(image.shape) == (3, 64, 80)
    student = deploy.load_student(cfg)
    with torch.no_grad():
        truth = student([{"image": image, "height": 120, "width": 150}])[0]["instances"]
    assert len(truth) > 10
    for found in result.files.values():
        command = [sys.executable, "-W", "ignore", "-c", ALONE, found["path"], picture]
        done = subprocess.run(
            command, input=example_of_the_documentation(), text=True, stdout=subprocess.PIPE
        )
        assert done.returncode == 0
        assert len(done.stdout.splitlines()) == len(truth)
        ours = np.load(found["path"] + ".npz")
        theirs = truth.pred_boxes.tensor, truth.pred_classes, truth.scores
        agreement = compare(NAMES, theirs, [torch.tensor(ours[x]) for x in NAMES], (120, 150))
        assert agreement.unmatched == 0  # equal scores may have changed places
        covered, ours = truth.pred_masks.numpy().sum(0), ours["bitmaps"].sum(0)
        assert covered.sum() > 1000 and abs(covered - ours).sum() < 0.01 * covered.sum()


def test_sidecar_says_what_use_needs(run, tmp_path):
    cfg, picture = run
    cfg = cfg.copy()
    export_student(cfg, ["torchscript"], str(tmp_path), [picture], rounds=0)
    about = json.loads((tmp_path / "student.torchscript.pt.json").read_text())
    image = about["inputs"]["image"]
    assert image["channels"] == "RGB" and image["resize"] == {"short_edge": 64, "max_size": 96}
    assert about["outputs"] == ["boxes", "classes", "masks", "scores"]
    assert about["in_graph"]["pixel_mean"] == pytest.approx([123.675, 116.28, 103.53])
    assert about["classes"] == ["0", "1", "2"] and about["input_size"] is None
    assert about["agreement"]["images"] == 3 and about["agreement"]["unmatched"] == 0
    assert sorted(x.name for x in tmp_path.iterdir()) == [
        "student.torchscript.pt",
        "student.torchscript.pt.json",
    ]


class Spoilt(formats.TorchScript):
    """Exports a detector that differs from the student."""

    def _convert(self, model, image, path):
        weight = next(p for n, p in model.named_parameters() if n.endswith("bbox_pred.weight"))
        before = weight.clone()
        weight.mul_(2)
        super()._convert(model, image, path)
        weight.copy_(before)


class Broken(formats.TorchScript):
    def _convert(self, model, image, path):
        with open(path, "w") as f:
            f.write("half a file")
        raise RuntimeError("first line\nand a long\ntraceback")


@pytest.mark.parametrize(
    "kind, message", [(Spoilt, "detections differ"), (Broken, "RuntimeError: first line; leave it")]
)
def test_a_file_that_fails_never_appears(kind, message, run, tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, "torchscript", kind())
    (tmp_path / "student.torchscript.pt").write_text("of before")
    result = export_student(run[0], ["torchscript"], str(tmp_path), [run[1]], rounds=0)
    assert message in str(result.refused.errors[0]) and "\n" not in str(result.refused.errors[0])
    assert [x.name for x in tmp_path.iterdir()] == ["student.torchscript.pt"]
    assert (tmp_path / "student.torchscript.pt").read_text() == "of before"


def test_mistakes_are_found_before_anything_is_written(run, tmp_path, monkeypatch):
    cfg, picture = run

    def fails(match, formats=("torchscript",), cfg=cfg, files=(picture,)):
        with pytest.raises(ConfigError, match=match):
            export_student(cfg, formats, str(tmp_path / "out"), files, rounds=0)
        assert not (tmp_path / "out").exists()

    fails("--format=caffe2: no such format; use any of torchscript", formats=["caffe2"])
    fails("--images=.*absent.png: cannot be read", files=[str(tmp_path / "absent.png")])
    untrained = cfg.copy()
    untrained.train.init_checkpoint = ""
    fails("there is nothing to export; use --weights", cfg=untrained)
    silent = cfg.copy()
    silent.model.roi_heads.box_predictor.test_score_thresh = 1.0
    fails("detects nothing", cfg=silent)
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None)
    fails("onnx and onnxruntime is not installed; pip install onnx onnxruntime", formats=["onnx"])


def test_of_a_pair_the_student_alone_is_built(run, tmp_path, monkeypatch):
    cfg = config("custom_coco_mask.py", "model.teacher.weights=absent.pth")
    cfg.train.init_checkpoint = run[0].train.init_checkpoint
    monkeypatch.setattr(
        "sharedkd.modeling.teachers.frozen.FrozenTeacher.__init__", None
    )  # building one would fail
    result = export_student(cfg, ["torchscript"], str(tmp_path), [run[1]], rounds=1)
    assert set(result.milliseconds) == {"student", "torchscript"}
    assert "absent.pth: no such file" in result.about["no_teacher"]


def test_the_table_says_what_has_no_partner():
    found = dict(path="s.onnx", detections=582, images=6, empty=1, unmatched=2, largest={})
    result = SimpleNamespace(
        files={"onnx": found},
        megabytes={"onnx": 1},
        milliseconds={},
        about={"image": (1, 2), "hardware": ""},
    )
    said = table(result)
    assert "detections without a partner" in said and "2 of 582" in said
    assert "Checked on 6 images, 1 of them without detections." in said
