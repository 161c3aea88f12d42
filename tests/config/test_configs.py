"""Shipped configs can be built and train a step, at reduced input size and without weights."""

import re
from pathlib import Path

import pytest
import tiny
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.utils.events import EventStorage

from sharedkd.config import load_config
from sharedkd.config.adopt import show_larger_images
from sharedkd.modeling.meta_arch import of_students
from sharedkd.modeling.stages import terms_of
from sharedkd.modeling.teachers import FrozenTeacher, TeacherMean

CONFIGS = sorted(
    str(p.relative_to(tiny.ROOT / "configs"))
    for p in (tiny.ROOT / "configs").rglob("*.py")
    if "common" not in p.parts
)


#: One of each family and kind; the others train their step in the nightly tests.
OFTEN = {
    "faster_rcnn_plain.py",
    "custom_coco_mask.py",
    "custom_coco_retinanet.py",
    "methods/fcos_fgd.py",
    "quickstart/sharedkd.py",
}


def load(name):
    cfg = tiny.config(name)
    if "data" in cfg:
        cfg.data.num_classes = tiny.CLASSES
    return cfg


def regions(node):
    """Fewer sampled regions: the heads of a full-size detector dominate a tiny image otherwise."""
    if "roi_heads" in node:
        node.roi_heads.batch_size_per_image = 16
        node.proposal_generator.post_nms_topk = (50, 50)


@pytest.mark.parametrize(
    "name", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.nightly) for n in CONFIGS]
)
def test_config_trains_a_step(name):
    cfg = load(name)
    model = cfg.model
    regions(model.get("student", model))
    for teacher in filter(None, [model.get("teacher"), *(model.get("teachers") or {}).values()]):
        if str(teacher.get("config")).startswith("output/"):  # to be trained by the user
            own = tiny.ROOT / f"configs/teachers/{Path(teacher.config).name}.py"
            teacher.config = str(own) if own.exists() else tiny.node("faster_rcnn", 50)
        if "config" in teacher:
            teacher.weights = ""  # as built: the real weights cannot be had in a test
    groups = {g: model[g] for g in ("teachers", "peers") if model.get(g)}
    built = {g: {name: instantiate(x) for name, x in group.items()} for g, group in groups.items()}
    model = instantiate({**model, **built}).train()
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    with EventStorage():
        weights = {name: x.full for name, x in of_students(model, "stages").items()}
        losses = model(tiny.batch("half"), weights) if weights else model(tiny.batch("half"))
    total = sum(losses.values())
    assert torch.isfinite(total)
    total.backward()
    optimizer.step()
    after = [p for p in model.parameters() if p.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(after, before))
    assert all(terms_of(losses, stage) for stage in weights)


def load_for_comparison(name):
    """The config without where its output goes."""
    cfg = tiny.config(name)
    cfg.train.output_dir = ""
    return cfg


@pytest.mark.parametrize(
    "distilled",
    [n for n in CONFIGS if n.endswith("sharedkd.py")]
    + [f"custom_coco{x}.py" for x in ("", "_mask", "_retinanet")],
)
def test_distilled_and_plain_differ_by_the_distillation_alone(distilled):
    parents = {"mask_rcnn_cascade": "mask_rcnn", "retinanet_x101": "retinanet"}
    if distilled.startswith("custom"):
        baseline = distilled.replace(".py", "_plain.py")
    elif distilled.startswith("quickstart"):
        baseline = "quickstart/plain.py"
    else:
        family = distilled.replace("_sharedkd.py", "")
        baseline = f"{parents.get(family, family)}_plain.py"
    ours, theirs = load_for_comparison(distilled), load_for_comparison(baseline)
    assert ours != theirs
    ours.model = ours.model.student
    # On own data it also starts from the teacher.
    own = distilled.startswith(("quickstart", "custom"))
    assert ours.train.inherit == (["neck", "head"] if own else [])
    ours.train.inherit = []
    assert ours == theirs


@pytest.mark.parametrize("name", [n for n in CONFIGS if n.startswith("methods/")])
def test_a_row_is_its_pair_with_another_recipe(name):
    pair = next(p for p in ("faster_rcnn", "mask_rcnn_cascade", "retinanet", "fcos") if p in name)
    method = name[len(f"methods/{pair}_") : -len(".py")]
    ours, theirs = load_for_comparison(name), load_for_comparison(f"{pair}_sharedkd.py")
    assert ours != theirs
    recipe = tiny.config(f"common/methods/{method}.py")
    assert ours.model.stages == recipe.stages[pair.replace("_cascade", "")]
    ours.model.stages = theirs.model.stages
    assert ours == theirs
    assert len((tiny.ROOT / "configs" / name).read_text().splitlines()) <= 8


def test_every_published_row_has_its_config():
    rows = set(re.findall(r"`([\w/]+\.py)`", (tiny.ROOT / "docs/reproduce.md").read_text()))
    assert rows <= set(CONFIGS)
    assert {n for n in CONFIGS if n.startswith(("methods/", "ablations/"))} <= rows


def test_published_weights_of_the_ablations():
    for weight in (2, 5, 10, 20):
        stages = tiny.config(f"ablations/retinanet_x101_weight_{weight}.py").model.stages
        assert {k: v.weight for k, v in stages.items() if k != "_target_"} == {
            "identical": weight,
            "cross": weight,
        }
    for gone, left in (("identical", "cross"), ("cross", "identical")):
        stages = tiny.config(f"ablations/faster_rcnn_without_{gone}.py").model.stages
        assert [k for k in stages if k != "_target_"] == [left]


def test_a_teacher_that_no_stage_needs_is_not_built(tmp_path):
    path = str(tiny.ROOT / "configs/faster_rcnn_sharedkd.py")
    assert load_config(path).model.teacher is not None
    idle = ["model.stages.identical.weight=0"]
    assert load_config(path, idle).model.teacher is None
    for wanted in ("train.eval_teacher=True", "train.inherit=[neck]"):
        assert load_config(path, [*idle, wanted]).model.teacher is not None
    # Only a teacher that runs is shown larger images, and of a saved config that says so, too.
    scaled = ["+model.teacher.scale=2"]
    saved = tmp_path / "saved.yaml"
    for cfg, larger in (
        (load_config(path, scaled), 2),
        (load_config(path, [*scaled, *idle]), 1),
    ):
        assert cfg.dataloader.train.mapper.get("larger", 1) == larger
    LazyConfig.save(load_config(path, scaled), str(saved))
    again = load_config(str(saved), ["model.teacher.scale=1"])
    assert again.dataloader.train.mapper.larger == 1
    several = [L(FrozenTeacher)(config="a.yaml", scale=2), L(FrozenTeacher)(config="b.yaml")]
    again.model.teacher = L(TeacherMean)(teachers=several)
    show_larger_images(again)
    assert again.dataloader.train.mapper.larger == 2


def test_fast_dev_run_takes_small_batches():
    path = str(tiny.ROOT / "configs/faster_rcnn_sharedkd.py")
    cfg = load_config(path, ["train.fast_dev_run=True"])
    assert cfg.dataloader.train.total_batch_size == 2
