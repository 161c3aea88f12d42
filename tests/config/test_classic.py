"""Classic yaml configs as runs: what is built is what Detectron2's own builders make of the yaml."""

import copy
import random

import numpy as np
import pytest
import tiny
import torch
from detectron2 import model_zoo
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from PIL import Image

from sharedkd import ConfigError
from sharedkd.config import construct, load_config
from sharedkd.config.adopt import show_larger_images, use_own_data
from sharedkd.config.classic import build_evaluator, from_classic
from sharedkd.data.loader import TrainLoader

NAME = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
SMALL = {
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "SOLVER.STEPS": (30, 60),
    "SOLVER.MAX_ITER": 90,
    "SOLVER.WARMUP_ITERS": 9,
    "SOLVER.BIAS_LR_FACTOR": 2.0,
    "INPUT.MIN_SIZE_TRAIN": (64,),
    "DATASETS.TRAIN": ("classic_records",),
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
}


@pytest.fixture(scope="module")
def classic():
    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file(NAME))
    cfg.merge_from_list([x for item in SMALL.items() for x in item])
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    return cfg


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "1.png"
    pixels = np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    box = dict(bbox=[10, 10, 50, 60], bbox_mode=0, category_id=1, iscrowd=0)
    found = dict(file_name=str(path), height=80, width=100, image_id=1, annotations=[box])
    DatasetCatalog.register("classic_records", lambda: [copy.deepcopy(found) for _ in range(4)])
    MetadataCatalog.get("classic_records").set(evaluator_type="coco", thing_classes=["a", "b"])
    return found


def test_model_optimizer_and_schedule_are_detectron2s(classic):
    cfg = from_classic(classic)
    torch.manual_seed(0)
    theirs = build_model(classic)
    torch.manual_seed(0)
    ours = construct(cfg.model, "model")
    assert type(ours) is type(theirs)
    states = ours.state_dict(), theirs.state_dict()
    assert all(torch.equal(states[0][k], x) for k, x in states[1].items())

    cfg.optimizer.params.model = ours
    groups = construct(cfg.optimizer, "optimizer").param_groups
    expected = build_optimizer(classic, theirs)
    assert len(groups) == len(expected.param_groups)
    for one, other in zip(groups, expected.param_groups):
        assert {k: v for k, v in one.items() if k != "params"} == {
            k: v for k, v in other.items() if k != "params"
        }
    multiplier = construct(cfg.lr_multiplier, "lr_multiplier")
    scheduler = build_lr_scheduler(classic, expected)
    for iteration in range(0, 90):
        lr = expected.param_groups[-1]["lr"]
        base = expected.param_groups[-1]["initial_lr"]
        assert multiplier(iteration / 90) * base == pytest.approx(lr), iteration
        scheduler.step()


def test_a_sample_is_that_of_detectron2s_mapper(classic, record):
    cfg = from_classic(classic)
    samples = []
    for mapper in (DatasetMapper(classic, True), construct(cfg.dataloader.train.mapper, "mapper")):
        random.seed(1), np.random.seed(1)
        samples.append(mapper(record))
    theirs, ours = samples
    assert torch.equal(theirs["image"], ours["image"])
    assert torch.equal(
        theirs["instances"].gt_boxes.tensor, ours["instances"].gt_boxes.tensor
    ) and torch.equal(theirs["instances"].gt_classes, ours["instances"].gt_classes)


def test_a_teacher_with_a_scale_sees_the_files_own_pixels(classic, record):
    cfg = from_classic(classic)
    cfg.model = dict(student=cfg.model, teacher=dict(_target_="sharedkd.FrozenTeacher", scale=2))
    show_larger_images(cfg)
    for split in ("train", "test"):
        sample = construct(cfg.dataloader[split].mapper, "mapper")(record)
        height, width = sample["image"].shape[1:]
        assert sample["larger_image"].shape[1:] == (2 * height, 2 * width)


def test_the_loader_has_the_sampler_of_the_yaml(classic, record):
    cfg = from_classic(classic)
    cfg.train.seed = 0
    loader = construct(cfg.dataloader.train, "dataloader.train")
    assert isinstance(loader, TrainLoader) and loader.total_batch_size == 2
    assert loader.repeats is None and len(loader.dataset) == 4
    cfg.DATALOADER.update(SAMPLER_TRAIN="RepeatFactorTrainingSampler", REPEAT_THRESHOLD=0.5)
    assert construct(cfg.dataloader.train, "dataloader.train").repeats is not None
    cfg.DATALOADER.SAMPLER_TRAIN = "Nonsense"
    with pytest.raises(ConfigError, match="SAMPLER_TRAIN"):
        construct(cfg.dataloader.train, "dataloader.train")


def test_evaluators_follow_the_data_sets_metadata(classic, record, tmp_path):
    cfg, folder = from_classic(classic), str(tmp_path)
    yaml = {key: cfg[key] for key in cfg if key.isupper()}
    assert isinstance(build_evaluator("classic_records", yaml, folder), COCOEvaluator)
    assert isinstance(build_evaluator("voc_2007_test", yaml, folder), PascalVOCDetectionEvaluator)
    MetadataCatalog.get("classic_unknown").thing_classes = ["a"]
    with pytest.raises(ConfigError, match="evaluator_type"):
        build_evaluator("classic_unknown", yaml, folder)


OWN = ["data.train_json=t.json", "data.val_json=v.json", "data.train_images=t", "data.val_images=v"]


def test_overrides_reach_both_kinds_of_keys_and_the_saved_config_repeats_them(tmp_path):
    keys = ["SOLVER.BASE_LR=0.5", "train.log_period=7", "SOLVER.MAX_ITER=70", "MODEL.DEVICE=cpu"]
    cfg = load_config(NAME, [*keys, "MODEL.RESNETS.DEPTH=18", "MODEL.RESNETS.RES2_OUT_CHANNELS=64"])
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    for found in (cfg, load_config(str(tmp_path / "config.yaml"))):
        assert (found.optimizer.lr, found.train.log_period, found.train.max_iter) == (0.5, 7, 70)
        assert found.train.device == "cpu" and found.train.init_checkpoint.endswith("R-50.pkl")
        assert found.train.eval_period == 0 and found.train.seed == -1
        model = instantiate(found.model)
        assert len(model.backbone.bottom_up.res4) == 2  # of R18
    assert load_config(NAME, ["optimizer.lr=0.25"]).optimizer.lr == 0.25
    again = load_config(str(tmp_path / "config.yaml"), ["SOLVER.MAX_ITER=9", "MODEL.WEIGHTS=x"])
    assert (again.train.max_iter, again.SOLVER.MAX_ITER) == (9, 9)
    assert again.train.init_checkpoint == again.MODEL.WEIGHTS == "x"


@pytest.mark.parametrize(
    "override, words",
    [
        ("SOLVER.BASE_LRR=1.0", "SOLVER.BASE_LRR"),
        ("SOLVER.BASE_LR=fast", "Type mismatch"),
        ("DATASETS.TEST=[a,b]", "DATASETS.TEST=.*one data set"),
        ("TEST.AUG.ENABLED=True", "TEST.AUG.ENABLED"),
        ("data.short_edge=[64]", "data.short_edge.*is not read by this config"),
    ],
)
def test_what_a_yaml_cannot_mean(override, words):
    with pytest.raises(ConfigError, match=words):
        load_config(NAME, [override])


def test_a_pair_for_a_train_net_of_its_own_is_refused(tmp_path):
    (tmp_path / "pair.yaml").write_text("MODEL: {SHAREDKD: {METHOD: fgd}}\n")
    with pytest.raises(ConfigError, match="has MODEL.SHAREDKD.*--teacher and --method"):
        load_config(str(tmp_path / "pair.yaml"))


def test_own_data_keep_images_without_objects_unless_told_otherwise():
    key = "DATALOADER.FILTER_EMPTY_ANNOTATIONS"
    kept, dropped = (
        load_config(NAME, [*OWN, *more], without_data=True) for more in ([], [f"{key}=True"])
    )
    assert not kept.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    assert dropped.DATALOADER.FILTER_EMPTY_ANNOTATIONS


def test_own_data_set_the_classes_in_lists():
    """A cascade has several heads, which a project may write without a reference."""
    zoo = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py")
    zoo.model.roi_heads.box_predictor = [{"num_classes": 80}] * 3
    use_own_data(zoo, OWN)
    zoo.data.num_classes = 5
    assert [head.num_classes for head in zoo.model.roi_heads.box_predictor] == [5, 5, 5]


def test_own_data_set_data_sets_and_number_of_classes():
    cfg = load_config(NAME, OWN, without_data=True)
    cfg.data.num_classes = 5
    assert list(cfg.DATASETS.TRAIN) == ["own_train"] and list(cfg.DATASETS.TEST) == ["own_val"]
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == cfg.MODEL.RETINANET.NUM_CLASSES == 5
    assert cfg.dataloader.evaluator.dataset_name == "own_val" and not cfg.data.masks
    lazy = load_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py", OWN, without_data=True)
    lazy.data.num_classes = 5
    assert lazy.model.roi_heads.num_classes == lazy.model.roi_heads.mask_head.num_classes == 5
    assert lazy.dataloader.train.dataset.names == "own_train" and lazy.data.masks
    assert lazy.data.max_size == 1333
    assert (
        not cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
        and not lazy.dataloader.train.dataset.filter_empty
    )
    assert "build_train_loader" in str(lazy.dataloader.train._target_)


@pytest.mark.parametrize("name", [NAME, "COCO-Detection/retinanet_R_50_FPN_1x.py"])
def test_own_data_are_read_as_its_keys_say(name):
    keys = ["data.image_range=[0,9]", "data.strong_augmentation=True"]
    loaders = load_config(name, [*OWN, *keys], without_data=True).dataloader
    assert list(loaders.train.mapper.image_range) == list(loaders.test.mapper.image_range) == [0, 9]
    assert (
        loaders.train.mapper.strong_augmentation
        and "strong_augmentation" not in loaders.test.mapper
    )


def test_a_mapper_of_ones_own_does_not_read_them(tmp_path):
    (tmp_path / "own.py").write_text(
        "from detectron2.model_zoo import get_config\n"
        "cfg = get_config('COCO-Detection/retinanet_R_50_FPN_1x.py')\n"
        "globals().update({k: cfg[k] for k in cfg})\n"
        "dataloader.train.mapper._target_ = 'builtins.dict'\n"
    )
    load_config(str(tmp_path / "own.py"), OWN, without_data=True)
    with_data = tmp_path / "with_data.py"
    custom = tiny.ROOT / "configs/custom_coco_plain.py"
    with_data.write_text(
        "from detectron2.config import LazyConfig\n"
        f"cfg = LazyConfig.load({str(custom)!r})\n"
        "globals().update({k: cfg[k] for k in cfg})\n"
        "dataloader.train.mapper = dict(_target_='builtins.dict')\n"
    )
    for key in ("data.strong_augmentation=True", "data.image_range=[0,9]"):
        for path in (tmp_path / "own.py", with_data):
            with pytest.raises(ConfigError, match=f"{key[:8]}.* is not read by dataloader.train"):
                load_config(str(path), [*OWN, key], without_data=True)
