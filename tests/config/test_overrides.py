"""Overrides are data: nothing in them is evaluated, imported or called, unless it is a class of ours."""

import os
import shlex

import pytest
import tiny
from omegaconf import OmegaConf

from sharedkd import ConfigError
from sharedkd.config import load_config
from sharedkd.config.overrides import check_override
from sharedkd.lab.demo import run_demo
from sharedkd.lab.preflight import preflight

CONFIG = str(tiny.ROOT / "configs/faster_rcnn_sharedkd.py")

REFUSED = [
    "optimizer._target_=os.system",
    "+optimizer._target_=os.system",
    "optimizer={_target_: {_target_: os.system}}",
    "dataloader.train.mapper=[{a: {_target_: builtins.eval}}]",
    "model.teacher._target_=detectron2.utils.env.setup_custom_environment",  # no class
    "model.teacher._target_=evil.Module",
    "model.teacher._target_=torch.nn.modules.module.functools.partial",
    "model.teacher._target_=${data.name}",
    "data.name=${oc.env:HOME}",
    'data.name="${oc.env:${data.x}}"',
    "optimizer[_target_]=os.system",
    "train.max_iter=__import__('os').system('touch CANARY')",
    "train.seed=choice(1,2)",
]

FINE = {
    "dataloader.train.mapper._target_=detectron2.data.transforms.HFlipTransform": (
        "dataloader.train.mapper._target_",
        "detectron2.data.transforms.HFlipTransform",
    ),
    "train.max_iter=7": ("train.max_iter", 7),
    "optimizer._target_=torch.optim.SGD": ("optimizer._target_", "torch.optim.SGD"),
    "train.output_dir=a/b": ("train.output_dir", "a/b"),
    "train.output_dir=\"'C:/x y'\"": ("train.output_dir", "'C:/x y'"),
    'train.output_dir=\'__import__("os").system("touch CANARY")\'': (
        "train.output_dir",
        '__import__("os").system("touch CANARY")',
    ),
    "train.output_dir=Größe/my runs": ("train.output_dir", "Größe/my runs"),
    "train.output_dir=/data (1)/a,b;[x]": ("train.output_dir", "/data (1)/a,b;[x]"),
    "train.output_dir=C:\\Größe\\x y\\": ("train.output_dir", "C:\\Größe\\x y\\"),
    "train.output_dir=~/runs": ("train.output_dir", os.path.expanduser("~/runs")),
    "model.stages.cross.weight=0.5": ("model.stages.cross.weight", 0.5),
    "train.eval_period=${train.max_iter}": ("train.eval_period", 180000),
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A current directory with a module that must not be imported."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("open('CANARY', 'w')\nclass Module: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    assert not (tmp_path / "CANARY").exists()


@pytest.mark.parametrize("override", REFUSED)
def test_code_is_refused(override):
    with pytest.raises(ConfigError, match="^override=") as error:
        load_config(CONFIG, [override], without_data=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("override", FINE)
def test_values_are_set(override):
    key, value = FINE[override]
    assert OmegaConf.select(load_config(CONFIG, [override], without_data=True), key) == value


OWN = str(tiny.ROOT / "configs/custom_coco_plain.py")


def test_a_list_of_paths():
    cfg = load_config(OWN, ["data.train_json=[~/ö.json, /b c.json]"], without_data=True)
    assert cfg.data.train_json == [os.path.expanduser("~/ö.json"), "/b c.json"]


@pytest.mark.parametrize("path", ["/it's/ö", "/a.json,/b.json", "/[a]'", "/$x/ö"])
def test_a_refused_text_is_shown_as_it_has_to_be_typed(path):
    with pytest.raises(ConfigError, match="and this value, if it is one text, as ") as error:
        load_config(OWN, [f"data.train_json={path}"], without_data=True)
    (words,) = shlex.split(str(error.value).rpartition(", as ")[2])
    cfg = load_config(OWN, [words], without_data=True)
    assert OmegaConf.select(cfg, "data.train_json") == path


def test_a_path_that_the_shell_has_split(tmp_path):
    (tmp_path / "my new data").mkdir()
    words = f"train.max_iter=7 data.train_images={tmp_path}/my new data data.masks=True".split()
    cfg = load_config(OWN, words, without_data=True)
    assert cfg.data.train_images == f"{tmp_path}/my new data" and cfg.data.masks
    with pytest.raises(ConfigError) as error:
        load_config(OWN, [*words[:3], "old", "data"], without_data=True)
    assert (
        f'with quotes where it has spaces: "data.train_images={tmp_path}/my new old data"'
        in str(error.value)
    )


def test_the_home_folder_of_further_teachers():
    cfg = load_config(CONFIG, ["+model.teachers={x: {config: '~/c', weights: a}}"], True, True)
    assert cfg.model.teachers.x.config == os.path.expanduser("~/c")


def test_the_demo_and_preflight_run_none_either(tmp_path):
    code = "shapes.x={_target_: subprocess.getoutput, cmd: touch CANARY}"
    with pytest.raises(ConfigError, match="^override=.*names code"):
        run_demo(tiny.ROOT, tmp_path / "demo", [code])
    code = "lr_multiplier.x={_target_: sharedkd.lab.compare.comparison.subprocess.Popen, args: [touch, CANARY]}"
    found = preflight(CONFIG, [code], measure=False)
    assert "names code" in found["errors"][0]["message"]


def test_a_class_that_there_is_not_is_said_later():
    check_override("model.stages.cross.loss._target_=sharedkd.losses.Nothing")
