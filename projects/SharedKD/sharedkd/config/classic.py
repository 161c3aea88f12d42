"""Detectron2's classic yaml configs: this package's keys in them, and runs that are made of them.

A classic config becomes a LazyConfig with all keys of the yaml, in capitals, beside the groups that
every run has.  Their nodes refer to the yaml's keys, so that overrides of both kinds hold, and build
what Detectron2's own builders make of the yaml.
"""

from typing import Any, Callable, Dict, List, Mapping, Sequence, Tuple

from detectron2.config import CfgNode, get_cfg
from detectron2.config import LazyCall as L
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    get_detection_dataset_dicts,
)
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from detectron2.solver import build_lr_scheduler
from detectron2.solver import build_optimizer as build_classic_optimizer
from fvcore.common.param_scheduler import ParamScheduler
from omegaconf import DictConfig, OmegaConf
from torch import nn, optim

from sharedkd.data.images import ImageMapper
from sharedkd.data.loader import TrainLoader, build_test_loader, build_train_loader
from sharedkd.errors import ConfigError
from sharedkd.modeling import detectors
from sharedkd.weights.loading import PARTS

from .defaults import TRAIN_DEFAULTS

__all__ = [
    "add_sharedkd_config",
    "check_classic",
    "expanded",
    "from_classic",
    "is_classic",
    "student_yaml",
]

#: Keys of the yaml that are other names of keys of `train`, to which they refer.
ALIASES = {
    "OUTPUT_DIR": "train.output_dir",
    "SEED": "train.seed",
    "CUDNN_BENCHMARK": "train.cudnn_benchmark",
    "MODEL.WEIGHTS": "train.init_checkpoint",
    "MODEL.DEVICE": "train.device",
    "SOLVER.AMP.ENABLED": "train.amp.enabled",
    "SOLVER.CHECKPOINT_PERIOD": "train.checkpointer.period",
    "TEST.EVAL_PERIOD": "train.eval_period",
}


def add_sharedkd_config(cfg: CfgNode) -> None:
    """Add ``MODEL.SHAREDKD`` to ``cfg``, a classic config, whose META_ARCHITECTURE is then ``SharedKD``.

    Keys:

    * ``STUDENT``: the plain detector's META_ARCHITECTURE.
    * ``TEACHER``: CONFIG, WEIGHTS, PRECISION, SHA256 and TRUST_CHECKPOINT as :class:`FrozenTeacher` takes
      them; an empty CONFIG: no teacher, for a method that needs none.
    * ``INHERIT``: what the student starts with of the teacher, ``neck`` and ``head``, where shapes agree and
      ``MODEL.WEIGHTS``, which are loaded later, have none.
    * ``METHOD``: as :func:`~sharedkd.modeling.recipes.stages_of` takes it.
    * ``WEIGHT``: multiplies the weights of the method's stages, or the shares of those that are ``auto``.
    * ``START``, ``RAMP``, ``DECAY``, ``END``: see :class:`~sharedkd.modeling.stages.Stage`, for all of them.
    """
    cfg.MODEL.SHAREDKD = CfgNode(
        dict(
            STUDENT="GeneralizedRCNN",
            TEACHER=dict(
                CONFIG="", WEIGHTS=None, PRECISION=None, SHA256=None, TRUST_CHECKPOINT=False
            ),
            INHERIT=[*PARTS],
            METHOD="shared_kd",
            WEIGHT=1.0,
            START=None,
            RAMP=None,
            DECAY=None,
            END=None,
        )
    )


def is_classic(cfg: Mapping[str, Any]) -> bool:
    """Whether a run's config was made of a classic one."""
    return "MODEL" in cfg and "SOLVER" in cfg


def from_classic(classic: CfgNode) -> DictConfig:
    """The config of a run that trains the plain detector of a classic config.

    Args:
        classic: with all of Detectron2's keys.
    """
    tree = _plain(classic)
    if tree["MODEL"]["DEVICE"] == "cuda":  # Detectron2's default
        tree["MODEL"]["DEVICE"] = TRAIN_DEFAULTS["device"]
    train = OmegaConf.create({"max_iter": tree["SOLVER"]["MAX_ITER"]})
    values = OmegaConf.create(tree)
    for key, other in ALIASES.items():
        OmegaConf.update(
            train, other.removeprefix("train."), OmegaConf.select(values, key), force_add=True
        )
        OmegaConf.update(values, key, f"${{{other}}}")
    tree = OmegaConf.to_container(values, resolve=False)
    yaml = {key: f"${{{key}}}" for key in tree}

    def mapper(is_train: bool) -> DictConfig:
        return L(YamlMapper)(
            yaml=yaml, is_train=is_train, image_format="${INPUT.FORMAT}", image_range=None
        )

    return OmegaConf.create(
        {
            **tree,
            "model": L(build_detector)(yaml=yaml),
            "dataloader": dict(
                train=L(build_loader)(
                    yaml=yaml,
                    dataset=L(training_records)(names="${DATASETS.TRAIN}", yaml=yaml),
                    mapper=mapper(is_train=True),
                    total_batch_size="${SOLVER.IMS_PER_BATCH}",
                    num_workers="${DATALOADER.NUM_WORKERS}",
                    aspect_ratio_grouping="${DATALOADER.ASPECT_RATIO_GROUPING}",
                    seed="${train.seed}",
                    on_bad_image="error",
                    max_bad_images=0.01,
                ),
                test=L(build_test_loader)(
                    dataset=L(test_records)(names="${DATASETS.TEST}", yaml=yaml),
                    mapper=mapper(is_train=False),
                    num_workers="${DATALOADER.NUM_WORKERS}",
                ),
                evaluator=L(build_evaluator)(
                    dataset_name="${DATASETS.TEST[0]}",
                    yaml=yaml,
                    output_dir="${train.output_dir}/inference",
                ),
            ),
            "optimizer": L(build_optimizer)(
                params=L(trained_model)(), yaml=yaml, lr="${SOLVER.BASE_LR}"
            ),
            "lr_multiplier": L(build_multiplier)(yaml=yaml),
            "train": train,
        },
        flags={"allow_objects": True},
    )


def expanded(cfg: DictConfig, override: str) -> List[str]:
    """The overrides that one ``key=value`` stands for: a yaml's key may mean one of `train`, or both.

    ``SOLVER.MAX_ITER`` is the length of the run and of the yaml's schedule.
    """
    if not is_classic(cfg):
        return [override]
    key, equals, value = override.partition("=")
    if key == "SOLVER.MAX_ITER":
        return [override, f"train.max_iter={value}"]
    return [f"{ALIASES.get(key, key)}{equals}{value}"]


def student_yaml(cfg: DictConfig, weights: str) -> str:
    """The classic config of the detector that a run trains, for plain Detectron2, as text.

    Args:
        cfg: the run's, made of a classic config.
        weights: the detector's, for MODEL.WEIGHTS.
    """
    classic = _cfg_node(cfg.model.get("student", cfg.model).yaml)
    classic.MODEL.WEIGHTS = weights
    return str(classic.dump())


def check_classic(cfg: DictConfig) -> None:
    """Check the yaml's keys of a run's config after its overrides; without test data, evaluate nothing.

    Raises:
        ConfigError: Detectron2 has no such key, or a value of another type; several test sets; a part
            of Detectron2's trainer that runs here lack.
    """
    try:
        classic = _cfg_node({key: cfg[key] for key in cfg if key.isupper()})
    except Exception as e:
        fix = "correct that key; a project's own keys need the project's own train_net.py"
        raise ConfigError("--config-file", "the yaml", str(e).strip("'\""), fix) from e
    tests = list(classic.DATASETS.TEST)
    if not tests:
        cfg.dataloader.evaluator = None
    if len(tests) > 1:
        fix = f"use DATASETS.TEST=[{tests[0]}], and --eval-only for the others"
        raise ConfigError("DATASETS.TEST", tests, "a run evaluates on one data set", fix)
    lacking = {
        "TEST.AUG.ENABLED": False,
        "TEST.PRECISE_BN.ENABLED": False,
        "SOLVER.REFERENCE_WORLD_SIZE": 0,
    }
    for key, without in lacking.items():
        value = OmegaConf.select(cfg, key)
        if value:
            raise ConfigError(key, value, "is not available here", f"use {key}={without}")
    if tests and tests[0] in DatasetCatalog.list():  # own data are registered later
        _kind(tests[0])


# --- what the nodes build -------------------------------------------------------------------------

Yaml = Mapping[str, Any]  #: all keys of the yaml


def build_detector(yaml: Yaml) -> nn.Module:
    """Build the detector without weights, on PyTorch's default device."""
    return detectors.build_detector(_cfg_node(yaml))[0]


def training_records(names: Sequence[str], yaml: Yaml) -> List[Dict[str, Any]]:
    """Dataset dicts to train on, filtered as the yaml says."""
    cfg = _cfg_node(yaml)
    return get_detection_dataset_dicts(
        list(names),
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=(
            cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
        ),
        proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
    )


def test_records(names: Sequence[str], yaml: Yaml) -> List[Dict[str, Any]]:
    """Dataset dicts to evaluate on."""
    cfg = _cfg_node(yaml)
    proposals = cfg.DATASETS.PROPOSAL_FILES_TEST if cfg.MODEL.LOAD_PROPOSALS else None
    return get_detection_dataset_dicts(list(names), filter_empty=False, proposal_files=proposals)


class YamlMapper(ImageMapper):
    """Detectron2's mapper with the yaml's own augmentations, for images of any depth.

    Args:
        yaml, is_train: as Detectron2's DatasetMapper takes them.
        image_format, options: of :class:`~sharedkd.data.images.ImageMapper`.
    """

    def __init__(self, yaml: Yaml, is_train: bool, image_format: str, **options: Any):
        theirs = DatasetMapper.from_config(_cfg_node(yaml), is_train)
        super().__init__(**{**theirs, "image_format": image_format, **options})


def build_loader(yaml: Yaml, dataset: List[Dict[str, Any]], **options: Any) -> TrainLoader:
    """The reproducible loader, with the yaml's sampler.

    Args:
        options: of :func:`~sharedkd.data.loader.build_train_loader`.

    Raises:
        ConfigError: a sampler that this loader does not have.
    """
    cfg = _cfg_node(yaml).DATALOADER
    samplers = dict(TrainingSampler=0.0, RepeatFactorTrainingSampler=cfg.REPEAT_THRESHOLD)
    if cfg.SAMPLER_TRAIN not in samplers:
        fix = f"use one of {', '.join(samplers)}"
        raise ConfigError(
            "DATALOADER.SAMPLER_TRAIN", cfg.SAMPLER_TRAIN, "is not available here", fix
        )
    options.setdefault("repeat_threshold", samplers[cfg.SAMPLER_TRAIN])
    return build_train_loader(dataset, **options)


def trained_model(model: nn.Module) -> nn.Module:
    """Return ``model``, which the run sets: a config node needs a function to call."""
    return model


def build_optimizer(params: nn.Module, yaml: Yaml, lr: float) -> optim.Optimizer:
    """Detectron2's SGD by the yaml, which clips gradients if the yaml says so.

    Args:
        params: the model to train.
        lr: base learning rate.
    """
    cfg = _cfg_node(yaml)
    cfg.SOLVER.BASE_LR = float(lr)
    return build_classic_optimizer(cfg, params)


def build_multiplier(yaml: Yaml) -> ParamScheduler:
    """The yaml's schedule as a multiplier of the learning rate, a function of the run's progress."""
    nothing = optim.SGD([nn.Parameter()], lr=1.0)
    return build_lr_scheduler(_cfg_node(yaml), nothing)._multiplier  # it has no public name


def build_evaluator(dataset_name: str, yaml: Yaml, output_dir: str) -> DatasetEvaluator:
    """Detectron2's evaluator for the type of a registered data set, as its own train_net.py chooses it.

    Raises:
        ConfigError: the data set's metadata name no type, or an unknown one.
    """
    cfg = _cfg_node(yaml)
    found = [build(dataset_name, cfg, output_dir) for build in EVALUATORS[_kind(dataset_name)]]
    return found[0] if len(found) == 1 else DatasetEvaluators(found)


def _kind(dataset_name: str) -> str:
    """The type in a data set's metadata, one of :data:`EVALUATORS`."""
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind not in EVALUATORS:
        fix = f"set MetadataCatalog.get({dataset_name!r}).evaluator_type to one of {', '.join(EVALUATORS)}"
        raise ConfigError(
            "DATASETS.TEST", dataset_name, f"is evaluated by {kind}, which is unknown", fix
        )
    return kind


Build = Callable[[str, CfgNode, str], DatasetEvaluator]


def _coco(name: str, cfg: CfgNode, folder: str) -> DatasetEvaluator:
    return COCOEvaluator(name, output_dir=folder, kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS)


def _sem_seg(name: str, cfg: CfgNode, folder: str) -> DatasetEvaluator:
    return SemSegEvaluator(name, distributed=True, output_dir=folder)


#: Type in a data set's metadata -> its evaluators.
EVALUATORS: Dict[str, Tuple[Build, ...]] = {
    "coco": (_coco,),
    "sem_seg": (_sem_seg,),
    "coco_panoptic_seg": (
        _coco,
        _sem_seg,
        lambda name, cfg, folder: COCOPanopticEvaluator(name, folder),
    ),
    "cityscapes_instance": (lambda name, cfg, folder: CityscapesInstanceEvaluator(name),),
    "cityscapes_sem_seg": (lambda name, cfg, folder: CityscapesSemSegEvaluator(name),),
    "lvis": (lambda name, cfg, folder: LVISEvaluator(name, output_dir=folder),),
    "pascal_voc": (lambda name, cfg, folder: PascalVOCDetectionEvaluator(name),),
}


def _cfg_node(yaml: Yaml) -> CfgNode:
    """The classic config whose keys are those of ``yaml``.

    Raises:
        KeyError: Detectron2 has no such key.
        ValueError: a value of another type than Detectron2's.
    """
    keys = {
        key: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        for key, value in yaml.items()
    }
    cfg = get_cfg()
    cfg.merge_from_other_cfg(CfgNode(keys))
    return cfg


def _plain(value: Any) -> Any:
    """A classic config in what OmegaConf can hold: lists in place of tuples."""
    if isinstance(value, Mapping):
        return {key: _plain(child) for key, child in value.items()}
    return [_plain(x) for x in value] if isinstance(value, (list, tuple)) else value
