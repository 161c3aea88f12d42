"""Whatever is wrong is said before a run starts: each mistake in a line of its own, all of them at once."""

import json
import shutil

import pytest
import tiny
import torch
from detectron2.config import LazyConfig, instantiate
from misconfigurations import PAIR, PLAIN, Bad, parts

from sharedkd import ConfigError
from sharedkd.config import load_config
from sharedkd.engine.run import run
from sharedkd.lab import preflight as lab

MISSING = "/no/such/file"


def preflight(config, overrides, **options):
    """What tools/preflight.py --json writes, and as ``text`` what it prints."""
    found = lab.preflight(config, overrides, **options)
    return {**found, "text": lab.as_text(found)}


@pytest.fixture(scope="session")
def good(workspace):
    """kind -> a config with which nothing is wrong."""
    paths = {}
    for kind, name, more in (
        ("plain", "custom_coco_plain.py", []),
        ("pair", "custom_coco_mask.py", workspace.pair),
    ):
        cfg = load_config(str(tiny.ROOT / "configs" / name), [*workspace.data, *more])
        cfg.data.num_classes = None
        paths[kind] = str(workspace.root / f"{kind}.yaml")
        LazyConfig.save(cfg, paths[kind])
    return paths


def start(config, overrides):
    """What the training command runs."""
    args = tiny.arguments("custom_coco_plain.py", *overrides)
    args.config_file = config
    return run(args)


@pytest.fixture
def random_weights_unfilled(monkeypatch):
    """Filling them is half of a model's time, and nobody looks at those of a run that is refused."""
    for name in ("kaiming_uniform_", "kaiming_normal_", "uniform_", "normal_"):
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *args, **options: tensor)


def are_apart(mine, taken):
    """Whether no part of one is a part of the other; None has a part in everything."""
    if mine is None or "" in taken:
        return False
    pairs = ((f"{a}.", f"{b}.") for a in mine for b in taken)
    return not any(a.startswith(b) or b.startswith(a) for a, b in pairs)


def in_few_runs(kind, cases):
    """(kind, names of cases that do not hide each other): each in the first run that has a place."""
    runs = []
    for name, (_, key, _) in cases.items():
        mine = parts(key)
        place = next((run for run in runs if are_apart(mine, run[1])), None)
        if place is None:
            runs.append(place := ([], set()))
        place[0].append(name)
        place[1].update(mine or {""})
    return [pytest.param(kind, names, id=f"{kind}: {', '.join(names)}") for names, _ in runs]


@pytest.mark.usefixtures("random_weights_unfilled")
@pytest.mark.parametrize("kind, names", [*in_few_runs("plain", PLAIN), *in_few_runs("pair", PAIR)])
def test_one_line_for_each_that_names_key_and_fix(good, workspace, tmp_path, kind, names):
    """Several mistakes are as many errors, in any order."""
    cases = {name: {"plain": PLAIN, "pair": PAIR}[kind][name] for name in names}
    output = tmp_path / "run"
    given = [f"train.output_dir={output}"]
    for i, (overrides, _, _) in enumerate(cases.values()):
        if callable(overrides):
            folder = tmp_path / f"bad{i}"
            folder.mkdir()
            overrides = overrides(Bad(workspace.shapes, workspace.weights, folder))
        given += overrides
    with pytest.raises(ConfigError) as refused:
        start(good[kind], given)
    errors = {error.key: error for error in refused.value.errors}
    assert len(refused.value.errors) == len(cases), refused.value
    for name, (_, key, words) in cases.items():
        assert key in errors, (name, refused.value)
        error, message = errors[key], str(errors[key])
        assert error.fix and message.endswith(" ".join(error.fix.split())), name
        assert "\n" not in message and len(message) < 1000, name
        assert all(word in message for word in words), (name, message)
    assert not output.exists()


def test_a_good_run_is_ready_and_a_single_model_is_no_pair(good, tmp_path):
    said = {}
    for kind in ("plain", "pair"):
        found = preflight(good[kind], [f"train.output_dir={tmp_path}/run"], measure=False)
        assert found["ok"] and found["errors"] == []
        assert not (tmp_path / "run").exists()
        said[kind] = found["text"]
    for word in ("student:", "student's", "teacher", "made comparable", "unmasked"):
        assert word not in said["plain"] and word in said["pair"], word
    assert "model: Faster R-CNN" in said["plain"]


ALL = {
    "train.max_itr": "train.max_itr=9",
    "train.accumulate": "train.accumulate=0",
    "train.device": "train.device=gpu",
    "train.inherit": "train.inherit=[tail]",
    "data.val_json": f"data.val_json={MISSING}",
    "model.stages.identical.loss.share": "model.stages.identical.loss.share=all",
    "model.stages.cross.ramp": "model.stages.cross.ramp=-1",
    "train.init_checkpoint": f"train.init_checkpoint={MISSING}",
    "optimizer.lr": "optimizer.lr=nan",
    "dataloader.train.num_workers": "dataloader.train.num_workers=-1",
    "dataloader.train.total_batch_size": "dataloader.train.total_batch_size=0",
}


def test_all_mistakes_at_once(good, tmp_path):
    """By preflight, and word for word by training."""
    overrides = [f"train.output_dir={tmp_path}/run", *ALL.values()]
    found = preflight(good["pair"], overrides)
    assert sorted(e["key"] for e in found["errors"]) == sorted(ALL)
    for error in found["errors"]:
        assert error["message"] in found["text"] and error["message"].endswith(error["fix"])
    assert "measured" not in found
    assert f"not ready: {len(ALL)} errors" in found["text"]
    with pytest.raises(ConfigError) as error:
        start(good["pair"], overrides)
    assert [str(e) for e in error.value.errors] == [e["message"] for e in found["errors"]]
    assert not (tmp_path / "run").exists()


def test_a_failed_part_blocks_only_what_needs_it(good, tmp_path):
    """Without the teacher nobody can bind its stage; the student's own stage is still checked."""
    wrong = [
        f"model.teacher.weights={MISSING}",
        "model.stages.cross.weight=1",
        "model.stages.cross.loss.strides=[3,4]",
        "model.stages.identical.loss.strides=[3,4]",
        f"data.train_json={MISSING}",
        f"data.val_json={MISSING}",
    ]
    found = preflight(good["pair"], [f"train.output_dir={tmp_path}/run", *wrong], measure=False)
    assert [e["key"] for e in found["errors"]] == [
        "data.train_json",
        "data.val_json",
        "model.teacher.weights",
        "model.stages.cross.loss.strides",
    ]


def test_what_a_run_will_be(good, tmp_path):
    overrides = [
        f"train.output_dir={tmp_path}/run",
        "train.max_iter=10",
        "train.checkpointer.period=4",
        "train.checkpointer.max_to_keep=1",
        "model.stages.identical.start=0.5",
        "model.stages.cross.weight=auto",
        "model.stages.cross.start=20",
    ]
    found = preflight(good["pair"], overrides)
    assert found["ok"]
    for who in ("student", "teacher"):
        assert (found[who]["family"], found[who]["backbone"]) == ("Mask R-CNN", "ResNet-18")
    state = tiny.detector("mask_rcnn", 18, num_classes=6).state_dict()
    assert f"all {len(state)} tensors" in found["teacher"]["weights"]

    fpn = {x["stride"]: x for x in found["levels"] if x["tap"] == "fpn"}
    assert sorted(fpn) == [4, 8, 16, 32, 64]
    assert {x["student_channels"] for x in fpn.values()} == {128}
    height, width = fpn[4]["map_size"]
    assert min(height, width) >= 64 / 4 and fpn[32]["map_size"] == (height // 8, width // 8)
    assert "identical" in fpn[8]["aligned"] and "cross" not in fpn[8]["aligned"]

    spans = {x["stage"]: (x["start"], x["end"]) for x in found["stages"]}
    assert spans == {"identical": (5, 10), "cross": (0, 0)}
    assert any(w["key"] == "model.stages.cross.start" for w in found["warnings"])

    assert (found["data"]["train"]["images"], found["data"]["test"]["images"]) == (12, 4)
    assert found["data"]["train"]["classes"] == 6 and found["data"]["train"]["objects"] > 0

    measured = found["measured"]
    assert measured["total_seconds"] == pytest.approx(10 * measured["seconds_per_step"])
    assert measured["seconds_per_step"] > 0 and measured["peak_memory_mb"] > 50
    assert found["disk"]["kept"] == 2  # one of the two periodic ones, and the final one
    assert not (tmp_path / "run").exists()
    json.dumps(found)
    text = found["text"]
    assert "ready" in text and "never" in text and "ResNet-18" in text


def test_the_size_of_a_checkpoint_is_known_before_it_is_written(train, good, tmp_path):
    found = preflight(good["plain"], [f"train.output_dir={tmp_path}/run"], measure=False)
    output, _ = train("custom_coco_plain.py", "train.max_iter=1", output=tmp_path / "run")
    written = (output / "model_final.pth").stat().st_size / 2**20
    assert found["disk"]["checkpoint_mb"] == pytest.approx(written, rel=0.02)


def test_a_disk_that_is_too_small(good, tmp_path, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    overrides = [f"train.output_dir={tmp_path}/run", "train.max_iter=300"]
    for free_mb, says in ((100, "errors"), (400, "warnings"), (10**6, None)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, free_mb * 2**20))
        found = preflight(good["plain"], overrides, measure=False)
        for kind in ("errors", "warnings"):
            keys = [x["key"] for x in found[kind]]
            assert ("train.output_dir" in keys) == (kind == says), (free_mb, kind)


QUIET = ["train.eval_period=2", "train.checkpointer.period=2"]


@pytest.mark.parametrize(
    "there, overrides, keys",
    [
        (True, ["train.eval_period=0"], ["train.eval_period"]),
        (
            True,
            [
                "dataloader.evaluator=null",
                "optimizer.lr=0",
                "model.teacher.weights=''",
                "model.stages.cross.weight=1",
                "model.stages.cross.ramp=9",
                "model.stages.identical.decay=9",
                "train.checkpointer.period=5",
                "train.amp.enabled=True",
            ],
            [
                "dataloader.evaluator",
                "optimizer.lr",
                "model.teacher.weights",
                "model.stages.cross.ramp",
                "model.stages.identical.decay",
                "train.checkpointer.period",
            ],
        ),
        (
            False,
            ["model.stages.identical.weight=0", "train.inherit=[]", "train.amp.enabled=True"],
            ["model.teacher", "train.amp.enabled"],
        ),
        (False, ["model.teacher.precision=bfloat16"], ["model.teacher.precision"]),
    ],
)
def test_warnings_do_not_stop_a_run(good, tmp_path, monkeypatch, there, overrides, keys):
    """``there``: whether the CPU has instructions for bfloat16."""
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for kind in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{kind}_supported", lambda: there)
    overrides = [f"train.output_dir={tmp_path}/run", *QUIET, *overrides]
    found = preflight(good["pair"], overrides, measure=False)
    warned = [w["key"] for w in found["warnings"]]
    assert found["ok"] and set(keys) <= set(warned)
    for key in ("train.amp.enabled", "model.teacher.precision"):
        assert warned.count(key) == keys.count(key)


def test_no_warning_without_a_reason(good, workspace, tmp_path):
    start = [f"train.output_dir={tmp_path}/run", f"train.init_checkpoint={workspace.weights}"]
    found = preflight(good["pair"], [*start, *QUIET], measure=False)
    assert found["ok"] and found["warnings"] == []
    # It has its own FPN and heads, so that none are copied from the teacher.
    assert found["student"]["weights"].endswith("verified: 138 of 138 tensors")


@pytest.mark.parametrize("warned, more", [(False, []), (True, ["RandomSaturation"])])
def test_a_teacher_that_sees_no_larger_images_is_warned_of(good, tmp_path, warned, more):
    resize = "{_target_:detectron2.data.transforms.ResizeShortestEdge,short_edge_length:64}"
    after = [
        f"{{_target_:detectron2.data.transforms.{x},intensity_min:1,intensity_max:2}}" for x in more
    ]
    found = preflight(
        good["pair"],
        [
            f"train.output_dir={tmp_path}/run",
            f"dataloader.train.mapper.augmentations=[{','.join([resize, *after])}]",
            "model.teacher.scale=2",
        ],
        measure=False,
    )
    assert found["ok"], found["errors"]
    assert ("model.teacher.scale" in [x["key"] for x in found["warnings"]]) == warned


@pytest.mark.parametrize("kind, student", [("plain", "model"), ("pair", "model.student")])
def test_frozen_norms_of_random_weights_are_warned_of(good, tmp_path, kind, student):
    """The remedy that the warning names removes it; what a student inherits is no backbone."""
    output, key = f"train.output_dir={tmp_path}/run", f"{student}.backbone.bottom_up.stages.norm"

    def remedy(norm):
        found = preflight(good[kind], [output, f"{key}={norm}"], measure=False)
        return {x["key"]: x["fix"] for x in found["warnings"]}["train.init_checkpoint"]

    assert f"{key}=BN" in remedy("FrozenBN")
    assert key not in remedy("BN")


@pytest.mark.parametrize("method, said", [("inherit", True), ("pkd", False)])
def test_a_start_alone_is_too_little_for_random_weights(good, tmp_path, method, said):
    keys = [f"train.output_dir={tmp_path}/run", f"distill.method={method}"]
    found = preflight(good["pair"], keys, measure=False)
    fixes = [x["fix"] for x in found["warnings"] if x["key"] == "model.stages"]
    assert fixes == ["use --method shared_kd"] * said


def test_validation_on_the_training_data_is_warned_of(good, workspace, tmp_path):
    same = [
        f"data.val_{x}={workspace.shapes}/train{end}"
        for x, end in (("json", ".json"), ("images", ""))
    ]
    found = preflight(good["plain"], [f"train.output_dir={tmp_path}/run", *same], measure=False)
    assert found["ok"] and "data.val_json" in [w["key"] for w in found["warnings"]]


def test_a_teacher_below_a_finished_plain_run_is_named(good, workspace, tmp_path):
    """Of the same student, evaluated on the same data, beside this run; a distilled one may be better."""
    size = preflight(good["pair"], [f"train.output_dir={tmp_path}/run"], measure=False)
    weights = tmp_path / "teacher/model_final.pth"
    ours = size["student"]["parameters"]
    for name, parameters, stages, ap in (
        ("teacher", 1, [], 30.0),
        ("plain", ours, [], 31.5),
        ("distilled", ours, ["pkd"], 33.0),
        ("started", ours, [], 34.0),
        ("other", 2, [], 90.0),
    ):
        (tmp_path / name).mkdir()
        record = {
            "parameters": {"student": parameters, "losses": 0},
            "stages": stages,
            "inherited": 22 if name == "started" else 0,
            "results": {"bbox": {"AP": ap}},
            "validation": "val.json",
        }
        (tmp_path / name / "run.json").write_text(json.dumps(record))
    shutil.copy(workspace.weights, weights)
    overrides = [f"train.output_dir={tmp_path}/run", f"model.teacher.weights={weights}"]
    found = preflight(good["pair"], overrides, measure=False)
    (said,) = [x for x in found["warnings"] if x["key"] == "model.teacher.weights"]
    assert "plain run plain beside this one: bbox 30.0, not 31.5" in said["problem"]


def test_no_stride_in_common(good, tmp_path):
    """A teacher with one level, of stride 4, and a RetinaNet, whose levels begin at stride 8."""
    config = tmp_path / "teacher.py"
    config.write_text(
        f"import sys; sys.path.insert(0, {str(tiny.ROOT / 'tests')!r})\n"
        "import tiny\nmodel = tiny.node('faster_rcnn')\n"
        "model.backbone.update(in_features=['res2'], top_block=None)\n"
    )
    weights = tmp_path / "teacher.pth"
    torch.save({"model": instantiate(LazyConfig.load(str(config)).model).state_dict()}, weights)
    cfg = LazyConfig.load(good["pair"])
    cfg.model.student = tiny.node("retinanet", 18, "${data.num_classes}")
    path = tmp_path / "retinanet.yaml"
    LazyConfig.save(cfg, str(path))
    pair = [f"model.teacher.config={config}", f"model.teacher.weights={weights}"]
    found = preflight(str(path), [f"train.output_dir={tmp_path}/run", *pair], measure=False)
    (error,) = found["errors"]
    warned = " ".join(x["message"] for x in found["warnings"])
    assert "nothing of GeneralizedRCNN fits RetinaNet: nothing is inherited" in warned
    assert (
        error["key"] == "model.stages.identical.loss" and "no stride in common" in error["problem"]
    )
    assert "[8, 16, 32, 64, 128]" in error["problem"] and "[4]" in error["problem"]


def test_a_student_of_other_widths_than_its_teacher_inherits_little_and_is_told(good, tmp_path):
    cfg = LazyConfig.load(good["pair"])
    cfg.model.student = tiny._models().tiny_mask_rcnn(18, "${data.num_classes}", width=64)
    path = tmp_path / "narrow.yaml"
    LazyConfig.save(cfg, str(path))
    found = preflight(str(path), [f"train.output_dir={tmp_path}/run"], measure=False)
    (warned,) = [x["message"] for x in found["warnings"] if x["key"] == "train.inherit"]
    # fc2 and the two biases of the heads' predictors with their scores fit; fc1 is most of the rest.
    assert "the teacher's have other shapes: " in warned and "give the student" in warned
    fitting = preflight(good["pair"], [f"train.output_dir={tmp_path}/run"], measure=False)
    assert not [x for x in fitting["warnings"] if x["key"] == "train.inherit"]


def test_a_start_that_gives_nothing_is_refused_without_a_loss(good, workspace, tmp_path):
    """A student that is trained already keeps its parts; train.inherit=[] is no start at all."""
    keys = [*workspace.flags, f"train.output_dir={tmp_path}/run"]
    trained = tmp_path / "trained.pth"
    torch.save({"model": tiny.detector("faster_rcnn").state_dict()}, trained)

    def errors(*more):
        return {x["key"] for x in preflight(good["plain"], [*keys, *more], measure=False)["errors"]}

    alone = "distill.method=inherit"
    assert not errors(alone)
    kept, nothing = f"train.init_checkpoint={trained}", "train.inherit=[]"
    for start in ([kept], [nothing], [nothing, "train.eval_teacher=True"]):
        assert errors(alone, *start) == {"train.inherit"}
    assert not errors(kept) | errors(nothing)


# --- the command lines ----------------------------------------------------------------------------


def test_the_command_line_says_it_to_machines(good, tmp_path, capsys):
    wrong = [f"train.output_dir={tmp_path}/run", "train.accumulate=0", "optimizer.lr=nan"]
    options = ["--config-file", good["plain"], "--json"]
    assert tiny.run_tool("preflight.py", *options, "-", *wrong) == 1
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    assert [e["key"] for e in json.loads(said.out)["errors"]] == [
        "train.accumulate",
        "optimizer.lr",
    ]

    file = tmp_path / "report.json"
    assert not tiny.run_tool("preflight.py", *options, file, wrong[0])
    assert "ready: nothing is in the way" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert found["ok"] and found["measured"]["seconds_per_step"] > 0
    assert not (tmp_path / "run").exists()


def test_training_prints_all_errors_and_leaves_another_run_alone(good, tmp_path, capsys):
    output = tmp_path / "run"
    output.mkdir()
    (output / "last_checkpoint").write_text("model_0000001.pth")
    (output / "config.yaml").write_text("another run's")
    before = {p.name: p.read_bytes() for p in output.iterdir()}
    wrong = [f"train.output_dir={output}", "train.accumulate=0", f"data.val_json={MISSING}"]
    command = ["lazyconfig_train_net.py", "--config-file", good["plain"], *wrong]
    assert tiny.run_tool(*command) == 1
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err
    errors = [x for x in said.err.splitlines() if x.startswith("error: ")]
    assert [x.partition("=")[0] for x in errors] == [
        "error: train.accumulate",
        "error: data.val_json",
        "error: train.output_dir",
    ]
    assert "--resume" in errors[2]
    assert {p.name: p.read_bytes() for p in output.iterdir()} == before
