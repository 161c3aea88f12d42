"""tools/analyze_features.py and tools/visualize_pair.py from end to end, on a handful of tiny images."""

import json

import numpy as np
import pytest
import tiny
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from PIL import Image
from tiny import arguments

from sharedkd import ConfigError
from sharedkd.engine.run import run
from sharedkd.lab.analysis.detections import Truth, average_precision, detect, mistakes
from sharedkd.lab.analysis.features import named_checkpoints
from sharedkd.lab.analysis.models import Detector, Source, _has_teacher, sources
from sharedkd.lab.analysis.pair import Pair, saved_checkpoints


@pytest.fixture(scope="module")
def runs(workspace, tmp_path_factory):
    """A folder with a plain and a distilled student of two iterations, each with both states saved."""
    root = tmp_path_factory.mktemp("runs")
    for name, config, pair in (
        ("plain", "custom_coco_mask_plain.py", []),
        ("sharedkd", "custom_coco_mask.py", workspace.pair),
    ):
        short = [
            f"train.output_dir={root / name}",
            "train.max_iter=2",
            "train.checkpointer.period=1",
        ]
        run(arguments(config, *workspace.data, *pair, *short))
    return root


def test_features(runs, workspace, tmp_path, capsys):
    config = tiny.ROOT / "configs/custom_coco_mask.py"
    output = tmp_path / "features"
    options = [*workspace.data, *workspace.pair, f"train.output_dir={runs}/sharedkd"]
    options += ["train.max_iter=2", "--images", 4, "--pictures", 1, "--output", output]
    assert tiny.run_tool("analyze_features.py", "--config-file", config, *options) is None
    said = capsys.readouterr().out
    assert "Are the student's inner cross-layer gaps smaller" in said
    record = json.loads((output / "features.json").read_text())
    states = record["checkpoints"]
    assert [s["name"] for s in states] == ["initial", "iteration 1", "iteration 2"]
    assert record["initial_is_the_runs"] is True and record["images"] == 4
    assert record["normalize"] == "instance"
    fpn = states[2]["taps"]["fpn"]["matrices"]
    assert fpn["student-teacher"]["mse"]["rows"] == [4, 8, 16, 32, 64]
    changed = [
        np.array(s["taps"]["backbone"]["matrices"]["student-student"]["mse"]["mean"])
        for s in states
    ]
    assert (changed[0] != changed[2]).any()  # two iterations of warm-up change little
    teachers = [s["taps"]["fpn"]["matrices"]["teacher-teacher"] for s in states]
    assert teachers[0] == teachers[2]  # the same images, positions and weights
    text = (output / "features.md").read_text()
    for picture in record["pictures"]:
        assert f"({picture})" in text
        with Image.open(output / picture) as image:
            assert image.width > 300
    assert {"gaps_fpn.png", "training_backbone.png", "maps_fpn_0.jpg"} <= set(record["pictures"])


@pytest.mark.nightly
def test_features_of_named_states(runs, tmp_path):
    """The plain student may be put beside the distilled one; equal weights have equal gaps."""
    final = runs / "sharedkd/model_final.pth"
    states = f"plain={runs}/plain/model_final.pth,a={final},b={final}"
    options = ["--images", 4, "--pictures", 0, "--checkpoint", states, "--output", tmp_path]
    config = runs / "sharedkd/config.yaml"
    assert tiny.run_tool("analyze_features.py", "--config-file", config, *options) is None
    record = json.loads((tmp_path / "features.json").read_text())
    plain, a, b = record["checkpoints"][1:]
    assert a["taps"] == b["taps"] != plain["taps"]


def test_features_refuse_what_they_cannot_measure(runs, workspace, tmp_path):
    config = runs / "sharedkd/config.yaml"

    def refused(config, *options):
        return tiny.run_tool(
            "analyze_features.py", "--config-file", config, "--output", tmp_path, *options
        )

    assert "model.teacher=None" in refused(runs / "plain/config.yaml")
    average = tiny.ROOT / "configs/schemes/average.py"
    assert "model.teacher=StudentAverage" in refused(average, *workspace.data)
    assert not _has_teacher(average) and _has_teacher(config)
    assert "no such file" in refused(config, "--checkpoint", "nothing.pth")
    twice = f"a={runs}/plain/model_final.pth,a={runs}/sharedkd/model_final.pth"
    assert "the name of two states" in refused(config, "--checkpoint", twice)
    assert "--images=0" in refused(config, "--images", "0")
    assert list(tmp_path.iterdir()) == []


def test_initial_weights_of_another_seed_are_called_that(runs):
    pair = Pair(str(runs / "sharedkd/config.yaml"), ["train.seed=5"])
    assert pair.initial_is_the_runs is False and pair.folder == runs / "sharedkd"


def test_saved_checkpoints_name_each_state_once(tmp_path):
    for name in ("model_0000009", "model_0000019", "model_final", "model_best"):
        (tmp_path / f"{name}.pth").touch()
    found = [(x.iteration, x.file.stem) for x in saved_checkpoints(tmp_path, 20)]
    assert found == [(10, "model_0000009"), (20, "model_final")]
    assert [(x.name, str(x.file)) for x in named_checkpoints("a/b.pth,c=d=e/f.pth")] == [
        ("b", "a/b.pth"),
        ("c=d", "e/f.pth"),
    ]


def test_visualize(runs, workspace, tmp_path, capsys):
    output = tmp_path / "pictures"
    options = ["--pictures", 2, "--score-threshold", 0.05, "--output", output]
    assert tiny.run_tool("visualize_pair.py", runs, *options) is None
    assert "sharedkd minus plain" in capsys.readouterr().out
    record = json.loads((output / "detections.json").read_text())
    assert list(record["models"]) == ["plain", "sharedkd", "teacher"]
    assert len(record["per_image"]) == 4 and len(record["gallery"]) == 2
    for name in ("side_by_side.jpg", "ap_bars.png", "mistakes.png", "detections.md"):
        assert (output / name).stat().st_size > 1000
    shown = record["gallery"][0]
    assert list(shown["pictures"]) == ["ground truth", "plain", "sharedkd", "teacher"]
    differences = [abs(x["scores"]["plain"] - x["scores"]["sharedkd"]) for x in record["per_image"]]
    of_shown = abs(shown["scores"]["plain"] - shown["scores"]["sharedkd"])
    assert of_shown == max(differences)
    for path in shown["pictures"].values():
        with Image.open(output / path) as image:
            assert image.width == 640


def test_a_run_is_compared_with_the_models_beside_it(runs):
    beside = f"plain={runs}/plain/model_final.pth"
    found = sources(runs / "sharedkd", None, [beside])
    assert [x.name for x in found] == ["plain", "sharedkd", "teacher"]
    found = sources(runs, None, [f"other={runs}/plain/model_final.pth"])
    assert [x.name for x in found] == ["other", "plain", "sharedkd", "teacher"]


def test_where_nothing_is_found_it_says_so(runs, tmp_path, capsys):
    (tmp_path / "side_by_side.jpg").touch()
    options = ["--models", f"plain={runs}/plain/model_final.pth", "--score-threshold", 1.01]
    assert tiny.run_tool("visualize_pair.py", *options, "--output", tmp_path) is None
    said = capsys.readouterr().out
    assert "No detection reaches 1.01: lower --score-threshold." in said
    assert "ahead" not in said
    text = (tmp_path / "detections.md").read_text()
    assert "No detection reaches 1.01" in text and "side_by_side" not in text
    assert json.loads((tmp_path / "detections.json").read_text())["gallery"] == []


def test_trained_weights_are_what_is_shown(runs, train, workspace, tmp_path):
    """AP is that of Detectron2's own evaluation of the same file."""
    weights = workspace.weights  # the teacher's, which is a Mask R-CNN of the student's kind
    options = ["--models", f"it={weights}", "--config-file", runs / "plain/config.yaml"]
    assert (
        tiny.run_tool("visualize_pair.py", *options, "--pictures", 1, "--output", tmp_path / "v")
        is None
    )
    found = json.loads((tmp_path / "v/detections.json").read_text())["models"]["it"]["bbox"]
    _, results = train(
        "custom_coco_mask_plain.py", f"train.init_checkpoint={weights}", flags=["--eval-only"]
    )
    for metric in ("AP", "AP50", "APs", "APm"):
        expected = results["bbox"][metric]
        assert (found[metric] or 0) == pytest.approx(np.nan_to_num(expected), abs=1e-6)


def test_sources_of_a_comparison(tmp_path):
    arms = []
    for method, ap, seeds in (
        ("none", 1, (0, 1)),
        ("shared_kd", 2, (1,)),
        ("x", 3, (1,)),
        ("y", 4, (1,)),
    ):
        for seed in seeds:
            folder = tmp_path / method / f"seed{seed}"
            folder.mkdir(parents=True)
            (folder / "model_final.pth").touch()
            (folder / "config.yaml").write_text(
                "{model: {}, dataloader: {}, optimizer: {}, lr_multiplier: {}}"
            )
            results = {"bbox": {"AP": ap}}
            config = f"elsewhere/configs/{method}.yaml"
            arms.append(
                dict(method=method, seed=seed, status="finished", config=config, results=results)
            )
    arms.append(dict(method="z", seed=1, status="failed", config="elsewhere/configs/z.yaml"))
    record = {"methods": ["none", "shared_kd", "x", "y", "z"], "baseline": "none", "arms": arms}
    (tmp_path / "results.json").write_text(json.dumps(record))
    found = sources(tmp_path, None, [])
    assert [x.name for x in found] == ["none", "shared_kd", "y"]
    assert {x.checkpoint.parent.name for x in found} == {"seed1"}
    assert [x.name for x in sources(tmp_path, None, ["x", "none"])] == ["x", "none"]
    for options in (["z"], 1), (["x", "none"], 0):
        with pytest.raises(ConfigError):
            sources(tmp_path, None, *options)


def test_visualize_refuses_what_it_cannot_show(runs, tmp_path):
    def refused(*options):
        return tiny.run_tool("visualize_pair.py", "--output", tmp_path, *options)

    assert "there is no model" in refused()
    assert "is no name=CHECKPOINT" in refused("--models", "plain")
    assert "two of the models" in refused(runs, "--between", "plain,nothing")
    assert list(tmp_path.iterdir()) == []


class Oracle:
    """Finds what a list of (box, class, score) says, in every image."""

    def __init__(self, found):
        self.found = found

    def __call__(self, inputs):
        instances = Instances((inputs[0]["height"], inputs[0]["width"]))
        boxes, classes, scores = zip(*self.found[inputs[0]["image_id"]])
        instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
        instances.pred_classes, instances.scores = torch.tensor(classes), torch.tensor(scores)
        return [{"instances": instances}]


def test_ap_per_class_and_size_is_that_of_detectron2(runs, tmp_path):
    """Perturbed copies of the objects, some of a wrong class."""
    name, draw = "own_val", np.random.default_rng(0)
    coco = json.loads(open(MetadataCatalog.get(name).json_file).read())
    records = [{"image_id": i["id"], "height": 64, "width": 64} for i in coco["images"]]
    truth = Truth(name, records)
    found = {i: [([0, 0, 5, 5], 0, 0.01)] for i in truth.image_ids}
    for note in coco["annotations"]:
        x, y, w, h = note["bbox"] + draw.normal(0, 1.5, 4)
        label = truth.category_ids.index(note["category_id"])
        label = label if draw.random() < 0.8 else (label + 1) % len(truth.classes)
        found[note["image_id"]].append(([x, y, x + w, y + h], label, draw.uniform(0.1, 1)))
    oracle = Oracle(found)
    detector = Detector(Source("oracle", None, None), dict, oracle)
    results = detect([detector], records, truth)[0]["oracle"]
    ours = average_precision(truth, results, "bbox")

    evaluator = COCOEvaluator(name, tasks=("bbox",), distributed=False)
    evaluator.reset()
    for record in records:
        evaluator.process([record], oracle([record]))
    theirs = evaluator.evaluate()["bbox"]
    assert 20 < ours["AP"] < 95
    for metric in ("AP", "AP50", "AP75", "APs", "APm", "APl"):
        assert ours[metric] == pytest.approx(theirs[metric], nan_ok=True)
    for label, ap in ours["classes"].items():
        assert ap == pytest.approx(theirs[f"AP-{label}"], nan_ok=True)
    assert mistakes(truth, results, "bbox", 0.5)["AP50"] == pytest.approx(ours["AP50"])

    nothing = average_precision(truth, {i: [] for i in truth.image_ids}, "bbox")
    assert nothing["AP"] == 0 and np.isnan(nothing["APl"])
