"""A further teacher beside `model.teacher`: built, verified, prepared, told, and fixed for the run."""

import json
import shutil

import pytest
import tiny
import torch

from sharedkd import ConfigError

SECOND = "{_target_:sharedkd.modeling.teachers.FrozenTeacher,config:%s,weights:%s}"
OPTIONS = ["train.max_iter=2", "model.stages.identical.teacher=large"]


@pytest.fixture
def second(workspace, tmp_path):
    """Overrides that add one with other weights."""
    torch.save(
        {"model": tiny.detector("mask_rcnn", 18, 6, seed=8).state_dict()}, tmp_path / "2.pth"
    )
    node = SECOND % (workspace.root / "teacher.py", tmp_path / "2.pth")
    return [f"model.teachers.large={node}", *OPTIONS]


def test_a_stage_learns_from_the_teacher_that_it_names(train, second, tmp_path):
    output, _ = train("custom_coco_mask.py", *second, "train.eval_teacher=True")
    log = (output / "log.txt").read_text()
    assert "teacher large: Mask R-CNN, ResNet-18" in log and f"{tmp_path}/2.pth, verified" in log
    assert "model.teachers.large.weights=" in log and "The teacher large: " in log
    assert "The teacher large's results, before the first iteration" in log
    assert "large's" in log.partition("student's channels")[2].splitlines()[0]

    state = torch.load(output / "model_final.pth", weights_only=False)["trainer"]
    assert set(state["teachers"]) == {None, "large"}
    assert state["teachers"]["large"] not in (None, state["teachers"][None])

    # Under another name of its file it is the same teacher; with other weights it is not.
    (tmp_path / "2.pth").rename(tmp_path / "moved.pth")
    moved = [x.replace("2.pth", "moved.pth") for x in [*second, "train.eval_teacher=True"]]
    longer = [x.replace("max_iter=2", "max_iter=3") for x in moved]
    train("custom_coco_mask.py", *longer, output=output, flags=["--resume"])
    loss = "{_target_:sharedkd.losses.FitNets,strides:[16]}"
    fit = f"+model.stages.fit={{_target_:sharedkd.Stage,loss:{loss}}}"
    with pytest.raises(ConfigError, match="^model.stages=.*fit: its losses have other parameters"):
        forced = [*longer, fit, "train.force_resume=True"]
        train("custom_coco_mask.py", *forced, output=output, flags=["--resume"])
    other = tiny.detector("mask_rcnn", 18, 6, seed=9)
    torch.save({"model": other.state_dict()}, tmp_path / "moved.pth")
    with pytest.raises(ConfigError, match="^model.teachers.large.weights=.*not the teacher of the"):
        train("custom_coco_mask.py", *longer, output=output, flags=["--resume"])


def test_one_that_no_stage_names_is_not_loaded(train, second):
    idle = [x for x in second if "identical" not in x]
    broken = [x.replace("2.pth", "none.pth") for x in idle]
    output, _ = train("custom_coco_mask.py", *broken)
    assert "model.teachers.large" in (output / "log.txt").read_text()


def test_a_start_without_a_loss_needs_its_teacher_once(train, workspace, tmp_path):
    """The run is resumed without the teacher's file, and ends in the same bytes."""
    config, weights = workspace.root / "teacher.py", tmp_path / "teacher.pth"
    shutil.copy(workspace.weights, weights)
    options = [f"distill.teacher={config}", f"distill.weights={weights}", "distill.method=inherit"]
    options += ["train.max_iter=3", "train.checkpointer.period=2", "train.eval_teacher=True"]
    output, _ = train("custom_coco_mask_plain.py", *options)
    whole = torch.load(output / "model_final.pth", weights_only=False)
    assert "before the first iteration" in (output / "log.txt").read_text()
    assert not whole["trainer"]["teachers"]
    (output / "model_final.pth").unlink()
    (output / "last_checkpoint").write_text("model_0000001.pth")
    weights.unlink()
    train("custom_coco_mask_plain.py", *options, flags=["--resume"])
    again = torch.load(output / "model_final.pth", weights_only=False)["model"]
    assert all(torch.equal(whole["model"][name], x) for name, x in again.items())


def test_its_errors_name_it(train, second):
    half = [*second, "model.teachers.large.precision=float16"]
    with pytest.raises(ConfigError, match="^model.teachers.large.precision=float16: does not work"):
        train("custom_coco_mask.py", *half)


def test_the_average_of_the_student_is_saved_and_resumed(train, tmp_path):
    average = "{_target_:sharedkd.modeling.teachers.StudentAverage,decay:0.5}"
    options = [f"model.teachers.mean={average}", "model.stages.identical.teacher=mean"]
    options += ["train.checkpointer.period=2", "optimizer.lr=0.01"]
    whole, _ = train("custom_coco_mask.py", *options, output=tmp_path / "whole")
    shutil.copytree(whole, tmp_path / "part")
    for name in ("model_final.pth", "model_average_mean.pth"):
        (tmp_path / "part" / name).unlink()
    (tmp_path / "part/last_checkpoint").write_text("model_0000001.pth")
    part, _ = train("custom_coco_mask.py", *options, output=tmp_path / "part", flags=["--resume"])
    saved = {}
    for name in ("model_final.pth", "model_average_mean.pth"):
        one, other = (torch.load(x / name, weights_only=False)["model"] for x in (whole, part))
        assert all(torch.equal(one[k], x) for k, x in other.items()), name
        saved[name] = one
    student, mean = saved.values()
    assert student.keys() == mean.keys()
    assert any(not torch.equal(student[k], x) for k, x in mean.items())


def test_the_average_may_be_the_result(train):
    average = "{_target_:sharedkd.modeling.teachers.StudentAverage,decay:0.5,final:true}"
    options = [f"model.teachers.mean={average}", "model.stages.identical.teacher=mean"]
    output, _ = train("custom_coco_mask.py", *options, "optimizer.lr=0.01")
    final = torch.load(output / "model_final.pth", weights_only=False)
    student = torch.load(output / "model_student.pth", weights_only=True)["model"]
    mean = final["average_mean"]["model"]
    assert all(torch.equal(final["model"][k], x) for k, x in mean.items())
    assert any(not torch.equal(student[k], x) for k, x in mean.items())
    assert not (output / "model_average_mean.pth").exists()
    assert "teacher mean: the average of the student, decay 0.5" in (output / "log.txt").read_text()


def test_a_mean_of_teachers(train, second, workspace):
    other = next(x for x in second if x.startswith("model.teachers.large=")).partition("=")[2]
    mean = f"{{_target_:sharedkd.modeling.teachers.TeacherMean,teachers:[{other}]}}"
    options = [f"model.teachers.mean={mean}", "model.stages.identical.teacher=mean"]
    output, _ = train("custom_coco_mask.py", *options)
    assert (
        f"teacher mean: the mean of ({workspace.root}/teacher.py)"
        in (output / "log.txt").read_text()
    )


FOUNDATION = """
from detectron2.config import LazyCall as L, LazyConfig
from torchvision.models import VisionTransformer

from sharedkd import Stage
from sharedkd.losses import Cosine
from sharedkd.modeling.stages import stage_dict
from sharedkd.modeling.teachers import FoundationTeacher

globals().update(LazyConfig.load("{base}"))
vit = L(VisionTransformer)(
    image_size=64, patch_size=16, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8
)
model.teacher = L(FoundationTeacher)(model=vit, weights="", output="encoder", size=64)
model.stages = L(stage_dict)(cosine=L(Stage)(loss=L(Cosine)(), weight=1.0))
"""


def test_a_vit_without_a_detector_teaches_by_a_config(train, tmp_path):
    """Its file is read again from what the run has saved; the checkpoint is a plain student's."""
    config = tmp_path / "foundation_teacher.py"
    config.write_text(FOUNDATION.format(base=tiny.ROOT / "configs/custom_coco.py"))
    output = tmp_path / "teacher_run"  # no other teacher is added
    train(str(config), "train.max_iter=2", output=output)
    lines = [json.loads(x) for x in (output / "metrics.json").read_text().splitlines()]
    assert {"distill/cosine/s8", "distill/cosine/s16", "distill/cosine/s32"} <= set(lines[0])
    saved = torch.load(output / "model_final.pth", weights_only=True)["model"]
    assert not any("vit" in name or "encoder" in name or "adapters" in name for name in saved)
    assert (
        "a FoundationTeacher is no trained detector: nothing is inh"
        in (output / "log.txt").read_text()
    )
    again = shutil.copy(output / "config.yaml", tmp_path / "saved_teacher.yaml")
    train(str(again), "train.max_iter=3", output=output, flags=("--resume",))
