"""Whole runs: checkpoints in and out, resuming, evaluation."""

import json
import os
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

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
from detectron2.utils.events import EventStorage
from omegaconf import OmegaConf
from same import assert_same
from tiny import arguments

from sharedkd import ConfigError, FrozenTeacher, SharedKD, SharedKDTrainer
from sharedkd.config import load_config, shared_kd_stages, student_only
from sharedkd.engine import run as engine
from sharedkd.engine.checkpoint import StudentCheckpointer
from sharedkd.engine.hooks import cost
from sharedkd.engine.parts import build
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


def test_checkpoint_is_the_plain_student(train, workspace, tmp_path):
    output, _ = train("custom_coco_mask.py", "train.max_iter=2")
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
    opts = ["train.max_iter=5", "train.checkpointer.period=2", "model.stages.identical.ramp=4"]
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
    halved, _ = train(config, *opts, output=tmp_path / "halved", flags=["--resume"])

    first, second = (
        torch.load(folder / "model_final.pth", weights_only=False) for folder in (whole, halved)
    )
    assert_same(first, second)


def test_eval_only_of_distilled_and_plain_config_agree(train, workspace, tmp_path):
    keep_all = "roi_heads.box_predictor.test_score_thresh=0.0"
    output, results = train(
        "custom_coco_mask.py",
        "train.max_iter=2",
        f"model.student.{keep_all}",
        f"dataloader.evaluator.output_dir={tmp_path}/trained",
    )
    assert set(results) == {"bbox", "segm"}
    detections = (tmp_path / "trained/coco_instances_results.json").read_bytes()
    assert len(json.loads(detections)) > 50
    for config, prefix in (
        ("custom_coco_mask.py", "model.student."),
        ("custom_coco_mask_plain.py", "model."),
    ):
        folder = tmp_path / config
        args = arguments(
            config,
            *workspace.data,
            f"train.output_dir={folder}",
            f"train.init_checkpoint={output}/model_final.pth",
            f"dataloader.evaluator.output_dir={folder}",
            prefix + keep_all,
            flags=["--eval-only"],
        )
        assert repr(run(args)) == repr(results)
        assert (folder / "coco_instances_results.json").read_bytes() == detections


def test_plain_and_distilled_students_start_equal(workspace):
    from detectron2.utils.env import seed_all_rng

    states = []
    for config, pair in (
        ("custom_coco_mask_plain.py", []),
        ("custom_coco_mask.py", workspace.pair),
    ):
        cfg = load_config(str(tiny.ROOT / "configs" / config), [*workspace.data, *pair])
        seed_all_rng(cfg.train.seed)
        states.append(build(cfg).state_dict())
    assert_same(*states)


def test_fast_dev_run(train, monkeypatch):
    evaluated = []
    original = engine.inference_on_dataset

    def inference_on_dataset(model, loader, evaluator):
        evaluated.append(len(loader))
        return original(model, loader, evaluator)

    monkeypatch.setattr(engine, "inference_on_dataset", inference_on_dataset)
    monkeypatch.setattr(engine, "DEV_RUN_IMAGES", 3)  # of 4
    output, results = train("custom_coco.py", "train.fast_dev_run=True", "train.max_iter=999")
    iterations = [x["iteration"] for x in map(json.loads, open(output / "metrics.json"))]
    assert iterations[:20] == list(range(20)) and max(iterations) <= 20
    assert [p.name for p in output.glob("*.pth")] == ["model_final.pth"]
    assert "bbox" in results
    assert evaluated == [3]


def test_the_teacher_is_evaluated_first(train, sharedkd_log):
    train(
        "custom_coco_mask.py",
        "train.max_iter=1",
        "train.eval_teacher=True",
        "train.inherit=[neck,head]",
    )
    text = sharedkd_log.text
    assert text.index("The teacher's results") < text.index("Starting training from iteration 0")
    assert "inherits" in text


def test_a_teacher_with_other_classes(train, tmp_path, sharedkd_log):
    """It teaches by its maps; its head is unused, cannot be evaluated, and the log says both."""
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
    assert "The teacher has 2 classes, the student 6: the teacher's head is unused" in text
    assert "its head cannot be evaluated here" in text
    assert "The teacher's results" not in text


def test_training_loop_is_usable_without_trainer_of_ours():
    """Detectron2's own trainers can train the pair: every stage at its full weight."""
    stages = instantiate(shared_kd_stages())
    model = SharedKD(
        student=tiny.detector("fcos"),
        teacher=FrozenTeacher(tiny.detector("fcos", seed=2), ""),
        stages=stages,
    ).train()
    with EventStorage():
        losses = model(tiny.batch())
    assert any(k.startswith("distill/identical/") for k in losses)


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


@pytest.mark.parametrize("config", ["custom_coco_plain.py", "custom_coco_retinanet_plain.py"])
def test_a_plain_detector_is_trained_and_recorded(train, config):
    output, results = train(config, "train.max_iter=2")
    record = json.loads((output / "run.json").read_text())
    assert record["iterations"] == 2 and record["parameters"]["losses"] == 0
    assert record["results"]["bbox"].keys() == results["bbox"].keys()
    assert record["peak_memory_mb"] > 100 and record["processes"] == 1
    assert record["config_file"].endswith(config) and "train.max_iter=2" in record["overrides"]
    assert shlex.split(record["command"])[0] == sys.executable and not record["fast_dev_run"]
    text = (output / "log.txt").read_text()
    assert text.count("Environment info:") == text.count("Command line arguments:") == 1


def test_the_second_step_says_what_the_run_takes(train, sharedkd_log, monkeypatch):
    """And after a resumption what the rest of it takes."""
    clock = iter([100, 107, 107.9, 120, 130, 200, 201, 201.2])  # the first step takes far longer
    monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=clock.__next__))
    output, _ = train("custom_coco_retinanet_plain.py", "train.checkpointer.period=2")
    os.remove(output / "model_final.pth")
    (output / "last_checkpoint").write_text("model_0000001.pth")
    train("custom_coco_retinanet_plain.py", "train.checkpointer.period=2", flags=["--resume"])
    said = re.findall(
        r"measured: (\S+) s a step on .*thread\(s\), about (\S+ \S+) .*; (\d+) MB",
        sharedkd_log.text,
    )
    assert [x[:2] for x in said] == [("0.9", "3.6 s"), ("0.2", "0.4 s")]  # 4 and 2 steps
    assert all(float(memory) > 100 for *_, memory in said)


def test_any_evaluator_or_several(workspace, tmp_path):
    output = tmp_path / "run"
    args = arguments("custom_coco_plain.py", *workspace.data, f"train.output_dir={output}")
    cfg = load_config(args.config_file, args.opts)
    weights = tmp_path / "w.pth"
    torch.save({"model": build(cfg).state_dict()}, weights)
    cfg.train.init_checkpoint = str(weights)
    cfg.dataloader.evaluator = [L(CountingEvaluator)(name=n) for n in "ab"]
    model = build(cfg, trained=True)
    results = evaluate(cfg, model)
    assert set(results) == {"a", "b"} and results["a"]["images"] == results["b"]["images"] == 4
    cfg.dataloader.evaluator = L(CountingEvaluator)(name="one")
    assert evaluate(cfg, model)["one"]["images"] == 4


def test_without_a_teacher(train):
    output, _ = train(
        "custom_coco.py",
        "model.teacher=null",
        "model.stages.identical.weight=0",
        "train.max_iter=2",
    )
    row = json.loads(open(output / "metrics.json").readline())
    assert row["loss_distill_cross"] > 0 and "loss_distill_identical" not in row


def test_resume_refuses_another_teacher(train, workspace, tmp_path):
    output, _ = train("custom_coco_mask.py", "train.max_iter=2", "train.checkpointer.period=1")
    before = {p.name: p.read_bytes() for p in output.iterdir() if p.suffix in (".yaml", ".pth")}
    other = tmp_path / "other.pth"
    torch.save({"model": tiny.detector("mask_rcnn", num_classes=6, seed=8).state_dict()}, other)
    with pytest.raises(
        ConfigError, match="model.teacher.weights.*not the teacher of the run to resume"
    ):
        train("custom_coco_mask.py", f"model.teacher.weights={other}", flags=["--resume"])
    assert before == {p.name: p.read_bytes() for p in output.iterdir() if p.name in before}


def test_evaluation_leaves_the_runs_config_alone(train, workspace):
    output, _ = train("custom_coco_mask.py", "train.max_iter=1")
    before = (output / "config.yaml").read_bytes()
    weights = f"train.init_checkpoint={output}/model_final.pth"
    train("custom_coco_mask.py", weights, output=output, flags=["--eval-only"])
    assert (output / "config.yaml").read_bytes() == before
    files = {p.name for p in output.parent.iterdir()}  # of the folder of this run and others
    train("custom_coco_mask.py", weights, output=output.parent, flags=["--eval-only"])
    assert {p.name for p in output.parent.iterdir()} - files == {"eval"}


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
    missing = subprocess.run(
        tiny.command(
            "faster_rcnn_plain.py",
            f"train.output_dir={tmp_path}/other",
            "train.device=cpu",
            "train.init_checkpoint=''",
        ),
        env={**env, "DETECTRON2_DATASETS": "/nowhere"},
        capture_output=True,
        text=True,
    )
    assert missing.returncode == 1
    errors = [x for x in missing.stderr.splitlines() if x.startswith("error: ")]
    keys = ("dataloader.train.dataset.names=", "dataloader.test.dataset.names=")
    assert [x.startswith(f"error: {key}") for x, key in zip(errors, keys)] == [True, True], errors
    assert len(errors) == 2


def test_a_trained_student_is_loaded_for_evaluation(workspace):
    """On own data, too, whose classes another caller may have counted."""
    opts = [f"train.init_checkpoint={workspace.weights}", "train.device=cpu", *workspace.data]
    cfg = student_only(load_config(str(tiny.ROOT / "configs/custom_coco_mask_plain.py"), opts))
    saved = torch.load(workspace.weights, weights_only=True)["model"]
    loaded = build(cfg, trained=True).state_dict()
    assert all(torch.equal(loaded[name], x) for name, x in saved.items())
