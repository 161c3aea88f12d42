"""Whole runs: checkpoints in and out, resuming, evaluation."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import tiny
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.engine import DefaultPredictor
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import build_model
from omegaconf import OmegaConf
from same import assert_same
from tiny import arguments

from sharedkd import ConfigError, FrozenTeacher, SharedKD, SharedKDTrainer
from sharedkd.config import load_config, shared_kd_stages
from sharedkd.engine import run as engine
from sharedkd.engine.checkpoint import StudentCheckpointer
from sharedkd.engine.run import evaluate, run

pytestmark = pytest.mark.filterwarnings("ignore")

PLAIN_LOAD = """
import sys
sys.modules["sharedkd"] = None  # importing it is now an error
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
config, weights, image, out = sys.argv[1:]
model = instantiate(LazyConfig.load(config).model).eval()
DetectionCheckpointer(model).load(weights)
saved = torch.load(weights, weights_only=False)["model"]
assert saved.keys() == model.state_dict().keys()
assert all(torch.equal(saved[k], v) for k, v in model.state_dict().items())
with torch.no_grad():
    instances = model([{"image": torch.load(image)}])[0]["instances"]
torch.save([instances.pred_boxes.tensor, instances.scores, instances.pred_masks], out)
"""

KEEP_ALL = "roi_heads.box_predictor.test_score_thresh=0.0"


@pytest.fixture(scope="module")
def finished(workspace, tmp_path_factory):
    """(folder, results, detections, log) of a pair whose student inherits and whose teacher is evaluated."""
    output = tmp_path_factory.mktemp("finished") / "run"
    args = arguments(
        "custom_coco_mask.py",
        *workspace.data,
        *workspace.pair,
        f"train.output_dir={output}",
        "train.max_iter=2",
        "train.eval_teacher=True",
        "train.inherit=[neck,head]",
        f"model.student.{KEEP_ALL}",
        f"dataloader.evaluator.output_dir={output}/detections",
    )
    results = run(args)
    detections = (output / "detections/coco_instances_results.json").read_bytes()
    return output, results, detections, (output / "log.txt").read_text()


def test_checkpoint_is_the_plain_student(finished, tmp_path):
    output = finished[0]
    saved = torch.load(output / "model_final.pth", weights_only=False)
    plain = tiny.detector("mask_rcnn", num_classes=6).state_dict()
    assert {k: v.shape for k, v in saved["model"].items()} == {k: v.shape for k, v in plain.items()}
    size = sum(v.numel() * v.element_size() for v in plain.values())
    moments = 2 * sum(v.numel() * 4 for v in saved["model"].values() if v.is_floating_point())
    assert (output / "model_final.pth").stat().st_size < 1.1 * (size + moments)  # AdamW's

    # Plain Detectron2, without this package, gives the same detections.
    node = LazyConfig.load(str(output / "config.yaml")).model.student
    node.roi_heads.num_classes = 6  # stands as ${data.num_classes} in the file
    node.roi_heads.box_predictor.test_score_thresh = 0.0
    plain = OmegaConf.create({"model": node}, flags={"allow_objects": True})
    LazyConfig.save(plain, str(tmp_path / "plain.yaml"))
    image = tiny.record()["image"]
    torch.save(image, tmp_path / "image.pt")
    subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            PLAIN_LOAD,
            tmp_path / "plain.yaml",
            output / "model_final.pth",
            tmp_path / "image.pt",
            tmp_path / "out.pt",
        ],
        check=True,
        cwd=tmp_path,
    )
    ours = SharedKD(student=instantiate(node), stages={}, input_format="RGB").eval()
    DetectionCheckpointer(ours).load(str(output / "model_final.pth"))
    with torch.no_grad():
        expected = ours([{"image": image}])[0]["instances"]
    boxes, scores, masks = torch.load(tmp_path / "out.pt", weights_only=False)
    assert len(boxes) > 0
    assert torch.equal(boxes, expected.pred_boxes.tensor)
    assert torch.equal(scores, expected.scores)
    assert torch.equal(masks, expected.pred_masks)


def test_a_run_is_recorded_and_logged(finished):
    output, results, _, log = finished
    assert set(results) == {"bbox", "segm"}
    assert log.index("The teacher's results") < log.index("Starting training from iteration 0")
    assert "inherits" in log
    assert log.count("Environment info:") == log.count("Command line arguments:") == 1
    assert re.search(r"measured: \S+ s a step", log)
    record = json.loads((output / "run.json").read_text())
    assert record["iterations"] == 2 and record["parameters"]["losses"] == 0
    assert record["inherited"] > 10 and len(record["fitted"]) == 4  # laterals
    assert record["results"]["bbox"].keys() == results["bbox"].keys()
    assert record["peak_memory_mb"] > 100 and record["processes"] == 1
    assert record["config_file"].endswith("custom_coco_mask.py")
    assert "train.max_iter=2" in record["overrides"]
    assert shlex.split(record["command"])[0] == sys.executable and not record["fast_dev_run"]


@pytest.mark.parametrize(
    "config, prefix",
    [("custom_coco_mask.py", "model.student."), ("custom_coco_mask_plain.py", "model.")],
)
def test_evaluation_gives_the_runs_results_and_leaves_its_folder_alone(
    finished, workspace, tmp_path, config, prefix
):
    output, results, detections, _ = finished
    files = [p for p in output.iterdir() if p.is_file() and p.name != "log.txt"]
    before = {p: p.read_bytes() for p in files}
    assert len(json.loads(detections)) > 50
    args = arguments(
        config,
        *workspace.data,
        f"train.output_dir={output}",
        f"train.init_checkpoint={output}/model_final.pth",
        f"dataloader.evaluator.output_dir={tmp_path}",
        prefix + KEEP_ALL,
        flags=["--eval-only"],
    )
    assert repr(run(args)) == repr(results)
    assert (tmp_path / "coco_instances_results.json").read_bytes() == detections
    assert before == {p: p.read_bytes() for p in files}


def test_resume_refuses_another_teacher(finished, workspace, tmp_path):
    output, *_ = finished
    before = {p: p.read_bytes() for p in output.iterdir() if p.suffix in (".yaml", ".pth")}
    other = tmp_path / "other.pth"
    torch.save({"model": tiny.detector("mask_rcnn", num_classes=6, seed=8).state_dict()}, other)
    args = arguments(
        "custom_coco_mask.py",
        *workspace.data,
        *workspace.pair,
        f"train.output_dir={output}",
        "train.inherit=[neck,head]",
        f"model.student.{KEEP_ALL}",
        f"model.teacher.weights={other}",
        flags=["--resume"],
    )
    refused = "model.teacher.weights.*not the teacher of the run to resume"
    with pytest.raises(ConfigError, match=refused):
        run(args)
    assert before == {p: p.read_bytes() for p in before}


def test_default_predictor_reads_a_checkpoint(tmp_path):
    """A classic yaml student, distilled, then used through Detectron2's DefaultPredictor."""
    cfg = get_cfg()
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.update(DEPTH=18, RES2_OUT_CHANNELS=64, OUT_FEATURES=["res3", "res4", "res5"])
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32], [64], [128], [256]]
    cfg.MODEL.RETINANET.update(NUM_CLASSES=3, SCORE_THRESH_TEST=0.0)
    cfg.INPUT.MIN_SIZE_TEST = 64
    stages = instantiate(shared_kd_stages())
    teacher = FrozenTeacher(tiny.detector("retinanet", seed=3), "")
    model = SharedKD(student=build_model(cfg), teacher=teacher, stages=stages)
    batches = iter(lambda: tiny.batch(), None)
    trainer = SharedKDTrainer(model, batches, torch.optim.SGD(model.parameters(), 1e-3), max_iter=2)
    trainer.train(0, 2)
    StudentCheckpointer(model, str(tmp_path), trainer=trainer).save("student")

    cfg.MODEL.WEIGHTS = str(tmp_path / "student.pth")
    image = tiny.record()["image"].permute(1, 2, 0).numpy()
    with torch.no_grad():
        got = DefaultPredictor(cfg)(image)["instances"]
        predictor = DefaultPredictor(cfg)
        predictor.model = model.eval()
        expected = predictor(image)["instances"]
    assert len(got) > 0
    assert torch.equal(got.scores, expected.scores)
    assert torch.equal(got.pred_boxes.tensor, expected.pred_boxes.tensor)


@pytest.mark.parametrize("config", ["custom_coco_mask.py", "custom_coco_retinanet.py"])
def test_resume_repeats_the_uninterrupted_run(train, tmp_path, monkeypatch, config):
    """Student, optimizer, parameters of the losses, random state, a RetinaNet's running normaliser."""
    fitnets = "{_target_:sharedkd.losses.FitNets,tap:fpn}"
    opts = [
        "train.max_iter=4",
        "train.checkpointer.period=2",
        "model.stages.identical.ramp=3",
        f"model.stages.fitnets={{_target_:sharedkd.modeling.stages.Stage,loss:{fitnets}}}",
    ]
    whole, _ = train(config, *opts, output=tmp_path / "whole")

    step = SharedKDTrainer.run_step

    def interrupted(self):
        if self.iter == 3:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(SharedKDTrainer, "run_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config, *opts, output=tmp_path / "halved")
    monkeypatch.setattr(SharedKDTrainer, "run_step", step)
    assert (tmp_path / "halved/last_checkpoint").read_text() == "model_0000001.pth"
    own = str(tmp_path / "halved/config.yaml")  # which the run then writes anew
    halved, _ = train(own, *opts, output=tmp_path / "halved", flags=["--resume"])

    first, second = (
        torch.load(folder / "model_final.pth", weights_only=True) for folder in (whole, halved)
    )
    assert first["distillation"]
    assert_same(first, second)


def test_fast_dev_run(train, monkeypatch):
    evaluated = []
    original = engine.inference_on_dataset

    def inference_on_dataset(model, loader, evaluator):
        evaluated.append(len(loader))
        return original(model, loader, evaluator)

    monkeypatch.setattr(engine, "inference_on_dataset", inference_on_dataset)
    monkeypatch.setattr(engine, "DEV_RUN_IMAGES", 3)  # of 4
    output, results = train("custom_coco_plain.py", "train.fast_dev_run=True", "train.max_iter=999")
    iterations = [x["iteration"] for x in map(json.loads, open(output / "metrics.json"))]
    assert iterations[:20] == list(range(20)) and max(iterations) <= 20
    assert [p.name for p in output.glob("*.pth")] == ["model_final.pth"]
    assert "bbox" in results
    assert evaluated == [3]


def test_a_teacher_with_other_classes(train, tmp_path, sharedkd_log):
    """It teaches by its maps; its scores are not compared, cannot be evaluated, and the log says both."""
    config, weights = tmp_path / "teacher.py", tmp_path / "teacher.pth"
    config.write_text(
        f"import sys; sys.path.insert(0, {str(tiny.ROOT / 'tests')!r})\n"
        "import tiny\nmodel = tiny.node('mask_rcnn', 18, 2)\n"
    )
    torch.save({"model": tiny.detector("mask_rcnn", num_classes=2).state_dict()}, weights)
    train(
        "custom_coco_mask.py",
        f"model.teacher.config={config}",
        f"model.teacher.weights={weights}",
        "train.max_iter=1",
        "train.eval_teacher=True",
    )
    text = sharedkd_log.text
    assert "The teacher has 2 classes, the student 6: only what knows no classes is copied" in text
    assert "its head cannot be evaluated here" in text
    assert "The teacher's results" not in text


class CountingEvaluator(DatasetEvaluator):
    """The smallest evaluator there is."""

    def __init__(self, name):
        self.name = name

    def reset(self):
        self.images = self.objects = 0

    def process(self, inputs, outputs):
        self.images += len(inputs)
        self.objects += sum(len(x["instances"]) for x in outputs)

    def evaluate(self):
        return {self.name: {"images": self.images, "objects": self.objects}}


def test_any_evaluator_or_several(workspace, tmp_path):
    path = str(tiny.ROOT / "configs/custom_coco_plain.py")
    cfg = load_config(path, [*workspace.data, f"train.output_dir={tmp_path}"])
    cfg.dataloader.evaluator = [L(CountingEvaluator)(name=n) for n in "ab"]
    model = tiny.detector("faster_rcnn", num_classes=6)
    results = evaluate(cfg, model)
    assert set(results) == {"a", "b"} and results["a"]["images"] == results["b"]["images"] == 4
    cfg.dataloader.evaluator = L(CountingEvaluator)(name="one")
    assert evaluate(cfg, model)["one"]["images"] == 4


def test_without_a_teacher(train):
    output, _ = train(
        "custom_coco.py",
        "model.teacher=null",
        "model.stages.identical.weight=0",
        "model.stages.cross.weight=auto",
        "train.max_iter=2",
    )
    row = json.loads(open(output / "metrics.json").readline())
    assert row["loss_distill_cross"] > 0 and "loss_distill_identical" not in row


def test_a_coco_config_through_the_command_line(workspace, tmp_path):
    """`configs/faster_rcnn_plain.py` as shipped but for sizes, on a COCO folder of four images."""
    coco = tmp_path / "coco"
    (coco / "annotations").mkdir(parents=True)
    categories = [{"id": m["id"], "name": m["name"]} for m in COCO_CATEGORIES if m["isthing"]]
    for split, ours in (("train2017", "train"), ("val2017", "val")):
        data = json.loads((workspace.shapes / f"{ours}.json").read_text())
        data["categories"] = categories
        (coco / f"annotations/instances_{split}.json").write_text(json.dumps(data))
        (coco / split).symlink_to(workspace.shapes / ours)
    opts = [
        f"train.output_dir={tmp_path}/run",
        "train.init_checkpoint=''",
        "train.max_iter=1",
        "train.device=cpu",
        "dataloader.train.total_batch_size=2",
        "dataloader.train.num_workers=0",
        "dataloader.test.num_workers=0",
        "model.roi_heads.batch_size_per_image=16",
        "dataloader.train.mapper.augmentations.0.short_edge_length=[64]",
        "dataloader.test.mapper.augmentations.0.short_edge_length=64",
    ]
    command = tiny.command("faster_rcnn_plain.py", *opts, flags=["--num-gpus", "0"])
    env = {**os.environ, "DETECTRON2_DATASETS": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run/model_final.pth").exists()


@pytest.mark.skipif("DETECTRON2_DATASETS" in os.environ, reason="COCO may be there")
def test_a_coco_config_without_the_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where Detectron2 looks for datasets/coco
    output = f"train.output_dir={tmp_path}/run"
    with pytest.raises(ConfigError) as error:
        run(
            arguments(
                "faster_rcnn_plain.py", output, "train.device=cpu", "train.init_checkpoint=''"
            )
        )
    assert [e.key for e in error.value.errors] == [
        "dataloader.train.dataset.names",
        "dataloader.test.dataset.names",
    ]
