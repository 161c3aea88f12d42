"""Any detector, one argument: the commands of docs/distil.md, and projects with DefaultTrainer."""

import re
import shlex
from pathlib import Path

import pytest
import tiny
import torch
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultPredictor, DefaultTrainer
from detectron2.modeling import build_model
from PIL import Image
from tiny import arguments

from sharedkd import ConfigError, FrozenTeacher
from sharedkd.config import add_sharedkd_config
from sharedkd.engine.run import run
from sharedkd.weights.loading import fingerprint

pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = {
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 8,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50,
    "MODEL.WEIGHTS": "''",
    "MODEL.DEVICE": "cpu",
    "INPUT.MIN_SIZE_TRAIN": "[64]",
    "INPUT.MIN_SIZE_TEST": 64,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.BASE_LR": 0.0001,
    "DATALOADER.NUM_WORKERS": 0,
}
YAML = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"


def test_the_commands_of_the_page(workspace, tmp_path, monkeypatch):
    """From another folder, with the model zoo's Faster R-CNN made small."""
    page = (tiny.ROOT / "docs/distil.md").read_text()
    block = re.search(r"```bash\n(.*?)```", page, re.S)[1].replace("\\\n", " ")
    distilled, plain, report = map(shlex.split, block.strip().splitlines())
    small = [f"{key}={value}" for key, value in SMALL.items()]
    small += [*workspace.data[:4], "SOLVER.MAX_ITER=3"]
    distilled[distilled.index("--teacher") + 1] = "output/plain"  # a run's folder
    monkeypatch.chdir(tmp_path)
    for _, tool, *options in ([*plain, *small], [*distilled, *small], report):
        assert tiny.run_tool(tool.removeprefix("tools/"), *options) is None
    log = (tmp_path / "output/distilled/log.txt").read_text()
    assert "The student inherits" in log and "loss_distill_identical" in log
    keys = [
        torch.load(tmp_path / f"output/{x}/model_final.pth", weights_only=False)["model"].keys()
        for x in ("distilled", "plain")
    ]
    assert keys[0] == keys[1]
    assert (tmp_path / "output/report.html").stat().st_size > 10_000

    # Plain Detectron2 builds the student by the yaml of the run.
    cfg = get_cfg()
    cfg.merge_from_file(str(tmp_path / "output/distilled/student.yaml"))
    student = DefaultPredictor(cfg).model
    saved = torch.load(cfg.MODEL.WEIGHTS, weights_only=False)["model"]
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 6 and cfg.MODEL.RESNETS.DEPTH == 18
    assert all(torch.equal(x, saved[name]) for name, x in student.state_dict().items())

    # The saved config repeats the run, and the folder is a teacher for the next one.
    again, config = tmp_path / "again", tmp_path / "output/distilled/config.yaml"
    run(arguments(config, f"train.output_dir={again}"))
    first, second = (
        torch.load(x / "model_final.pth", weights_only=False)["model"]
        for x in (tmp_path / "output/distilled", again)
    )
    assert all(torch.equal(first[k], second[k]) for k in first)

    # It can be resumed with other keys that do not decide what is trained, and evaluated.
    keys = ["TEST.EVAL_PERIOD=5", "DATALOADER.NUM_WORKERS=0", f"OUTPUT_DIR={again}"]
    run(arguments(config, *keys, "SOLVER.MAX_ITER=4", flags=["--resume"]))
    weights = f"MODEL.WEIGHTS={again}/model_final.pth"
    assert "bbox" in run(arguments(config, weights, *keys, flags=["--eval-only"]))


def test_a_lazy_config_of_the_model_zoo(workspace, tmp_path):
    name = tmp_path / "retinanet.py"
    name.write_text(
        "from detectron2.model_zoo import get_config\n"
        "cfg = get_config('COCO-Detection/retinanet_R_50_FPN_1x.py')\n"
        "dataloader, lr_multiplier, optimizer, train = cfg.dataloader, cfg.lr_multiplier, cfg.optimizer, cfg.train\n"
        f"import sys; sys.path.insert(0, {str(tiny.ROOT / 'tests')!r})\n"
        "import tiny\nmodel = tiny.node('retinanet', 18, 80)\n"
        "dataloader.train.mapper.image_format = dataloader.test.mapper.image_format = 'RGB'\n"
    )
    results = run(
        arguments(
            name,
            *workspace.flags,
            "distill.method=shared_kd+pkd",
            *workspace.data[:4],
            *(
                "train.device=cpu",
                "train.init_checkpoint=''",
                "train.max_iter=2",
                "train.log_period=1",
            ),
            *("dataloader.train.total_batch_size=2", "dataloader.train.num_workers=0"),
            "dataloader.test.num_workers=0",
            "dataloader.train.mapper.augmentations.0.short_edge_length=[64]",
            "dataloader.test.mapper.augmentations.0.short_edge_length=64",
            f"train.output_dir={tmp_path / 'run'}",
        )
    )
    assert "bbox" in results
    log = (tmp_path / "run/log.txt").read_text()
    assert "distill_pkd" in log and "distill_identical" in log


# --- DefaultTrainer -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A function that makes the config of a yaml project; 4 iterations on four images."""
    folder = tmp_path_factory.mktemp("project")
    records = []
    for i in range(4):
        path = folder / f"{i}.png"
        Image.fromarray(tiny.record(64, 96, seed=i)["image"].permute(1, 2, 0).numpy()).save(path)
        box = dict(bbox=[10, 10, 50, 50], bbox_mode=0, category_id=0, iscrowd=0)
        records.append(
            dict(file_name=str(path), height=64, width=96, image_id=i, annotations=[box])
        )
    DatasetCatalog.register("project_train", lambda: records)
    MetadataCatalog.get("project_train").thing_classes = ["a", "b", "c"]

    def plain(classes=3):
        cfg = get_cfg()
        cfg.merge_from_file(model_zoo.get_config_file(YAML))
        cfg.merge_from_list([x for item in SMALL.items() for x in map(str, item)])
        cfg.MODEL.WEIGHTS = ""
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = classes
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("project_train",), ()
        cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.CHECKPOINT_PERIOD = 4, (), 2
        cfg.SEED = 1
        return cfg

    torch.manual_seed(0)
    (folder / "teacher.yaml").write_text(plain().dump())
    torch.save({"model": build_model(plain()).state_dict()}, folder / "teacher.pth")
    torch.save({"model": build_model(plain(5)).state_dict()}, folder / "five.pth")

    def pair(output, **keys):
        cfg = plain()
        add_sharedkd_config(cfg)
        cfg.MODEL.META_ARCHITECTURE = "SharedKD"
        kd = cfg.MODEL.SHAREDKD
        kd.TEACHER.CONFIG = str(folder / "teacher.yaml")
        kd.TEACHER.WEIGHTS = str(folder / "teacher.pth")
        for key, value in keys.items():
            setattr(kd, key, value)
        cfg.OUTPUT_DIR = str(output)
        output.mkdir(exist_ok=True)
        return cfg

    return pair


class Watched(DefaultTrainer):
    """Notes which stages are active in each iteration."""

    def train(self):
        self.active, forward = {}, self.model.forward

        def watch(*args):
            losses = forward(*args)
            names = {name.split("/")[1] for name in losses if name.startswith("distill/")}
            self.active[self.iter] = sorted(names)
            return losses

        self.model.forward = watch
        return super().train()


def test_a_schedule_holds_in_default_trainer_and_after_a_resume(project, tmp_path):
    cfg = project(tmp_path / "run", START=1, END=0.75, WEIGHT=2.0)
    trainer = Watched(cfg)
    assert {k: stage.share for k, stage in trainer.model.stages.items() if stage.full} == {
        "identical": 2.0
    }
    trainer.resume_or_load(resume=False)
    trainer.train()
    on = ["identical"]
    assert trainer.active == {0: [], 1: on, 2: on, 3: []}
    assert any(name.startswith("factor/identical/s") for name in trainer.storage.histories())
    with pytest.raises(ConfigError, match="MODEL.SHAREDKD.END=teacher: is known to this package's"):
        build_model(project(tmp_path / "end", END="teacher"))
    saved = torch.load(tmp_path / "run/model_final.pth", weights_only=False)["model"]
    assert saved.keys() == trainer.model.student.state_dict().keys()
    (tmp_path / "run/config.yaml").write_text(cfg.dump())  # as default_setup does
    teacher = FrozenTeacher(str(tmp_path / "run")).model.state_dict()
    assert all(torch.equal(saved[name], x) for name, x in teacher.items())

    (tmp_path / "run/last_checkpoint").write_text("model_0000001.pth")
    again = Watched(cfg)
    again.resume_or_load(resume=True)
    again.train()
    assert again.active == {2: on, 3: []}


class InBfloat16(Watched):
    """Detectron2's AMPTrainer needs a GPU; this is its step on a CPU."""

    def run_step(self):
        with torch.autocast("cpu", torch.bfloat16):
            super().run_step()


def test_mixed_precision_in_default_trainer(project, tmp_path):
    trainer = InBfloat16(project(tmp_path / "run", START=1, METHOD="shared_kd+pkd"))
    before = fingerprint(trainer.model.teacher.model)
    trainer.train()
    stages = ["identical", "pkd"]
    assert trainer.active == {0: [], **dict.fromkeys((1, 2, 3), stages)}
    losses = trainer.storage.latest()
    assert len(losses) > 10 and all(value == value for value, _ in losses.values()), losses
    assert fingerprint(trainer.model.teacher.model) == before


def test_the_head_of_other_classes_is_skipped_as_in_plain_detectron2(project, tmp_path, caplog):
    cfg = project(tmp_path / "run", METHOD="pkd")
    model = build_model(cfg)
    assert model.roi_heads is model.student.roi_heads and model.device.type == "cpu"
    five = cfg.MODEL.SHAREDKD.TEACHER.WEIGHTS.replace("teacher.pth", "five.pth")
    before = model.roi_heads.box_predictor.cls_score.weight.clone()
    DetectionCheckpointer(model).load(five)
    assert torch.equal(before, model.roi_heads.box_predictor.cls_score.weight)
    assert "roi_heads.box_predictor.cls_score.weight" in caplog.text
    loaded = torch.load(five, weights_only=False)["model"]["backbone.bottom_up.stem.conv1.weight"]
    assert torch.equal(loaded, model.backbone.bottom_up.stem.conv1.weight)


def test_a_start_without_a_loss(project, tmp_path):
    cfg = project(tmp_path / "run", METHOD="inherit")
    kd = cfg.MODEL.SHAREDKD.TEACHER
    model, teacher = build_model(cfg), FrozenTeacher(kd.CONFIG, kd.WEIGHTS)
    assert model.teacher is None and not model.stages
    head = teacher.model.roi_heads.box_predictor.cls_score.weight
    assert torch.equal(model.roi_heads.box_predictor.cls_score.weight.cpu(), head)
    kd.CONFIG = ""
    with pytest.raises(ConfigError, match="there is no teacher"):
        build_model(cfg)
    cfg = project(tmp_path / "run", METHOD="inherit", INHERIT=[])
    with pytest.raises(ConfigError, match="nothing of the teacher.*use MODEL.SHAREDKD.METHOD"):
        build_model(cfg)


def test_a_teacher_of_other_classes_is_refused_where_its_scores_are_used(
    project, tmp_path, request
):
    request.addfinalizer(lambda: MetadataCatalog.remove("other_train"))
    cfg = project(tmp_path / "run", METHOD="shared_kd")
    path = tmp_path / "teacher.yaml"
    teacher = Path(cfg.MODEL.SHAREDKD.TEACHER.CONFIG).read_text()
    path.write_text(teacher.replace("project_train", "other_train"))
    cfg.MODEL.SHAREDKD.TEACHER.CONFIG = str(path)
    build_model(cfg)  # nothing is known of its data
    MetadataCatalog.get("other_train").thing_classes = ["b", "a", "c"]
    for method, parts, order in (
        ("shared_kd", ["neck", "head"], "b, a, c, the data have a, b, c: in another order"),
        ("dkd", ["neck"], "in another order; .* or use MODEL.SHAREDKD.INHERIT"),
    ):
        cfg.MODEL.SHAREDKD.METHOD, cfg.MODEL.SHAREDKD.INHERIT = method, parts
        with pytest.raises(ConfigError, match=f"^MODEL.SHAREDKD.TEACHER.CONFIG=.*{order}"):
            build_model(cfg)
    cfg.MODEL.SHAREDKD.METHOD = "shared_kd"
    build_model(cfg)


def test_a_method_without_a_teacher_and_one_in_lower_precision(project, tmp_path):
    cfg = project(tmp_path / "run", METHOD="self_distillation")
    cfg.MODEL.SHAREDKD.TEACHER.CONFIG = ""
    trainer = Watched(cfg)
    trainer.train()
    assert all(trainer.active[i] for i in range(4)) and trainer.model.teacher is None
    cfg = project(tmp_path / "lower")
    cfg.MODEL.SHAREDKD.TEACHER.PRECISION = "bfloat16"
    assert build_model(cfg).teacher.dtype is torch.bfloat16
