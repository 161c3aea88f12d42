"""The parts of a run, built from its config in steps: whatever is wrong with any of them is found at once."""

import glob
import logging
import os
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Tuple

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from sharedkd.config.build import construct, not_set
from sharedkd.data.coco import CocoSummary, read_registered
from sharedkd.data.loader import TrainLoader
from sharedkd.errors import FAILED, ConfigError, Findings, collecting
from sharedkd.modeling.backbones import compile_backbone, recompute_blocks
from sharedkd.modeling.detectors import count_parameters, num_classes
from sharedkd.modeling.hardware import trains_channels_last
from sharedkd.modeling.meta_arch import SharedKD, check_image_format
from sharedkd.modeling.stages import Stage
from sharedkd.values import check_number
from sharedkd.weights.loading import inherit, initialise, load_trained

from .checkpoint import has_run
from .disk import check_disk, check_folder
from .lock import check_free
from .resume import check_settings, saved_seed
from .trainer import check_amp

__all__ = [
    "Parts",
    "amp_dtype",
    "assemble",
    "build",
    "check_output",
    "losses_of",
    "memory_layout",
    "rewire",
]

logger = logging.getLogger("detectron2.sharedkd")

OPTIMIZER_NUMBERS = ("lr", "weight_decay", "momentum")


@dataclass
class Parts:
    """What a run is made of; FAILED in place of what could not be built.

    Args:
        model: on its device, with its initial weights.
        resuming: the weights come from the run's own checkpoint later.
        optimizer, loader, scheduler: for training; None in an evaluation.
        sample: the first training image as the loader delivers it; None if that cannot be known.
    """

    model: nn.Module
    resuming: bool
    optimizer: Optional[torch.optim.Optimizer] = None
    loader: Any = None
    scheduler: Any = None
    sample: Optional[Dict[str, Any]] = field(default=None, repr=False)


@collecting
def assemble(
    cfg: DictConfig, eval_only: bool = False, resume: bool = False, *, findings: Findings
) -> Parts:
    """Build and check all that a run needs.  Nothing is written.

    Args:
        cfg: of :func:`~sharedkd.config.load.load_config`; of an evaluation without a teacher.  A seed is
            drawn into it if it has none.
        eval_only: ``train.init_checkpoint`` is a trained student, to be evaluated.
        resume: the output folder may hold a run, which then goes on.
        findings: takes every error; without it, they are raised.  Of its facts, ``data`` becomes,
            for ``train`` and ``test``, a list of the summaries of COCO-format data, ``disk`` what
            :func:`check_disk` returns, ``student_tensors`` and ``inherited`` what filled the student.
    """
    step = findings.step
    for key in sorted(OmegaConf.missing_keys(cfg)):
        findings.add(not_set(key))
    if step(_check_device, cfg.train.device) is FAILED:
        cfg.train.device = "cpu"  # stands in for it
    if not eval_only:
        step(check_free, cfg.train.output_dir)
        folder = step(check_output, cfg.train.output_dir, resume)
    check_datasets(cfg, eval_only, findings)
    resuming = resume and not eval_only and has_run(cfg.train.output_dir)
    if cfg.train.seed < 0 and resuming:
        cfg.train.seed = saved_seed(cfg.train.output_dir)
    if cfg.train.seed < 0:
        cfg.train.seed = comm.shared_random_seed()
    seed_all_rng(cfg.train.seed + comm.get_rank())
    if resuming:
        step(check_settings, cfg)
    parts = Parts(build(cfg, eval_only, resuming, findings=findings), resuming)
    student = findings.facts["student"]
    splits = ("test",) if eval_only else ("train", "test")
    for summary in [x for split in splits for x in _summaries(findings, split)][:1]:
        step(_check_classes, cfg, student, summary)
    if comm.is_main_process():
        step(_check_evaluation, cfg, findings)
    if eval_only:
        return parts
    parts.scheduler = step(construct, cfg.lr_multiplier, "lr_multiplier")
    step(_check_scheduler, parts.scheduler)
    parts.optimizer = step(_optimizer, cfg, student if parts.model is FAILED else parts.model)
    if FAILED not in (parts.model, folder):
        findings.facts["disk"] = step(check_disk, cfg, parts.model, parts.optimizer)
    if FAILED in _summaries(findings, "train"):
        parts.loader = FAILED
    else:
        parts.loader = step(construct, cfg.dataloader.train, "dataloader.train")
    if isinstance(parts.loader, TrainLoader):
        parts.loader.pin_memory = torch.device(cfg.train.device).type != "cpu"
        parts.sample = step(parts.loader.first_sample)
        step(_check_sample, student, parts.sample)
    return parts


# --- the model ----------------------------------------------------------------------------------


@collecting
def build(
    cfg: DictConfig, trained: bool = False, resuming: bool = False, *, findings: Findings
) -> nn.Module:
    """The model on its device, with its initial weights.

    Args:
        cfg: of :func:`~sharedkd.config.load.load_config`.
        trained: ``train.init_checkpoint`` is a trained student, to be evaluated.
        resuming: the weights come from the run's own checkpoint later.
        findings: takes the errors, and FAILED may be returned; without it, they are raised.
    """
    step = findings.step
    dtype = step(amp_dtype, cfg)
    student, teacher, model = _construct(cfg, findings)
    findings.facts["student"] = student
    image_format = OmegaConf.select(cfg, "dataloader.train.mapper.image_format")
    if not trained and image_format is not None:
        step(check_image_format, student, image_format)
    if trained:
        # Without data nobody knows how many classes the checkpoint should have.
        step(_load_student, cfg, FAILED if _classes_unknown(cfg, findings) else student)
    elif not resuming:
        loaded = step(initialise, student, cfg.train.init_checkpoint, *_source(cfg))
        findings.facts["student_tensors"] = loaded
        if cfg.train.inherit:
            findings.facts["inherited"] = step(_inherit, cfg, student, teacher)
    if model is not FAILED:
        logger.info(
            f"{count_parameters(student):,} parameters in the student, "
            f"{count_parameters(losses_of(model)):,} in distillation losses"
        )
    placed = step(_place, cfg, model)
    if teacher:
        step(_prepare, teacher, dtype, placed)
    step(rewire, cfg, student)
    return model


def _construct(cfg: DictConfig, findings: Findings) -> Tuple[Any, Any, Any]:
    """(student, teacher or None, model).

    Where a part of a pair fails, the rest is still put together, to see whether that would fit; the
    model is then FAILED.
    """
    node = cfg.model
    if node.get("student") is None:
        model = findings.step(construct, node, "model")
        return getattr(model, "student", model), None, model
    errors = len(findings.errors)
    student = findings.step(construct, node.student, "model.student")
    teacher = node.get("teacher")
    if teacher is not None:
        teacher = findings.step(construct, teacher, "model.teacher")
    stages = node.get("stages") or {}
    if not isinstance(stages, Mapping):
        findings.add(
            ConfigError("model.stages", stages, "is no group of stages", "use L(stage_dict)")
        )
        stages = {}
    built = {}
    for name, stage in stages.items():
        if isinstance(stage, DictConfig) and "_target_" in stage:
            stage = findings.step(construct, stage, f"model.stages.{name}")
        if name != "_target_" and stage is not FAILED:
            built[name] = stage
    needs = {
        n: getattr(s.loss, "needs", ()) if isinstance(s, Stage) else () for n, s in built.items()
    }
    if teacher is FAILED:
        built = {n: s for n, s in built.items() if "teacher" not in needs[n]}
    if _classes_unknown(cfg, findings):
        built = {n: s for n, s in built.items() if "regions" not in needs[n]}
    others = {k: node[k] for k in node if k not in ("student", "teacher", "stages")}
    whole = {**others, "student": student, "teacher": teacher or None, "stages": built}
    model = findings.step(construct, FAILED if student is FAILED else whole, "model")
    return student, teacher, FAILED if len(findings.errors) > errors else model


def _load_student(cfg: DictConfig, student: nn.Module) -> None:
    if not cfg.train.init_checkpoint:
        raise ConfigError(
            "train.init_checkpoint",
            "''",
            "is empty, there is nothing to evaluate",
            "set it to the trained student's checkpoint",
        )
    load_trained(student, cfg.train.init_checkpoint, *_source(cfg))


def _source(cfg: DictConfig) -> Tuple[str, bool, str]:
    """What is said of the student's checkpoint, as :func:`load_trained` takes it."""
    return "train.init_checkpoint", cfg.train.trust_checkpoint, cfg.train.init_sha256


def _inherit(cfg: DictConfig, student: nn.Module, teacher: Any) -> List[str]:
    if teacher is None:
        raise ConfigError(
            "train.inherit",
            list(cfg.train.inherit),
            "there is no teacher",
            "set model.teacher or use train.inherit=[]",
        )
    return inherit(student, teacher.model, cfg.train.inherit)


def _place(cfg: DictConfig, model: nn.Module) -> nn.Module:
    return model.to(cfg.train.device, memory_format=memory_layout(cfg))


def memory_layout(cfg: DictConfig) -> torch.memory_format:
    """Of the student's weights and of all maps that losses read, as ``cfg.train.channels_last`` says."""
    wanted = cfg.train.channels_last
    if wanted is None:
        wanted = torch.device(cfg.train.device).type != "cpu" or trains_channels_last()
    return torch.channels_last if wanted else torch.preserve_format


def _prepare(teacher: Any, dtype: Optional[torch.dtype], placed: nn.Module) -> None:
    teacher.prepare(dtype)


def rewire(cfg: DictConfig, student: nn.Module) -> None:
    """Make ``student`` run as ``cfg.train`` says.

    By its ``activation_checkpointing`` and ``compile``.

    Raises:
        ConfigError: the last two exclude each other; see also
            :func:`~sharedkd.modeling.backbones.recompute_blocks`.
    """
    if cfg.train.activation_checkpointing and cfg.train.compile:
        raise ConfigError(
            "train.compile", True, "excludes train.activation_checkpointing=True", "use one of them"
        )
    if cfg.train.activation_checkpointing:
        logger.info(f"{recompute_blocks(student)} blocks of the student keep no activations")
    if cfg.train.compile:
        compile_backbone(student)


def losses_of(model: nn.Module) -> nn.Module:
    """The distillation losses of ``model``.

    Empty for a plain detector, whose `losses` may be a method.
    """
    return model.losses if isinstance(model, SharedKD) else nn.ModuleDict()


# --- the data -----------------------------------------------------------------------------------


def check_datasets(cfg: DictConfig, eval_only: bool, findings: Findings) -> None:
    """Check every COCO-format data set that the config names.

    Args:
        findings: takes unknown names and what is wrong with files, and as its fact ``data`` what
            there is.
    """
    data = findings.facts.setdefault("data", {})
    own = {}
    if "data" in cfg:
        own = {f"{cfg.data.name}_train": data.get("train"), f"{cfg.data.name}_val": data.get("test")}
    for split in ("test",) if eval_only else ("train", "test"):
        key = f"dataloader.{split}.dataset.names"
        names, found = OmegaConf.select(cfg, key), []
        for name in [names] if isinstance(names, str) else names or []:
            if own.get(name):  # read already
                found += own[name]
            else:
                summary = findings.step(_check_dataset, name, key, split == "train", findings)
                found += [] if summary is None else [summary]
        data[split] = found or data.get(split, [])
    files = findings.facts.setdefault("files", {})
    for split, found in data.items():
        if FAILED not in found:
            files[split] = found


def _check_dataset(name: str, key: str, train: bool, findings: Findings) -> Optional[CocoSummary]:
    if name not in DatasetCatalog.list():
        raise ConfigError(key, name, "is not registered", "use configs/custom_coco.py")
    data = read_registered(name, key, train=train)
    if data is None:
        return None
    for error in data.errors:
        findings.add(error)
    findings.warnings += data.warnings
    return FAILED if data.errors else data.files[0]


def _summaries(findings: Findings, split: str) -> List[Any]:
    return findings.facts.get("data", {}).get(split, [])


def _classes_unknown(cfg: DictConfig, findings: Findings) -> bool:
    """Whether classes should have been counted, and no file can be read."""
    found = [x for split in ("train", "test") for x in _summaries(findings, split)]
    return "data" in cfg and bool(found) and all(x is FAILED for x in found)


def _check_classes(cfg: DictConfig, student: nn.Module, summary: CocoSummary) -> None:
    count = num_classes(student)
    if count not in (None, len(summary.classes)):
        raise ConfigError(
            _key_of_classes(cfg.model),
            count,
            f"is how many classes the student has; {summary.key}={summary.json_file} has "
            f"{len(summary.classes)}",
            "set both to the same number; own data's is ${data.num_classes}",
        )


def _key_of_classes(model: DictConfig) -> str:
    name = "model" if model.get("student") is None else "model.student"
    waiting = [(name, model.get("student", model))]
    for key, node in waiting:
        if "num_classes" in node:
            return f"{key}.num_classes"
        waiting += [(f"{key}.{k}", v) for k, v in node.items() if isinstance(v, DictConfig)]
    return name


def _check_sample(student: nn.Module, sample: Mapping[str, Any]) -> None:
    heads = getattr(student, "roi_heads", None)
    if getattr(heads, "mask_on", False) and not sample["instances"].has("gt_masks"):
        raise ConfigError(
            "dataloader.train.mapper.use_instance_mask",
            False,
            "the student has a mask head, which cannot be trained without masks",
            "use data.masks=True and data with segmentations, or a student without masks",
        )


def _check_evaluation(cfg: DictConfig, findings: Findings) -> None:
    """An evaluator that cannot be built would be found out after hours of training."""
    nodes = cfg.dataloader.get("evaluator")
    if nodes is None or FAILED in _summaries(findings, "test"):
        return
    if "test" not in cfg.dataloader:
        raise ConfigError(
            "dataloader.test",
            None,
            "is not there to evaluate on",
            "set it, or leave out the evaluator",
        )
    findings.step(construct, cfg.dataloader.test, "dataloader.test")
    for i, node in enumerate(nodes if isinstance(nodes, ListConfig) else [nodes]):
        key = f"dataloader.evaluator{f'[{i}]' if isinstance(nodes, ListConfig) else ''}"
        name = node.get("dataset_name") if isinstance(node, Mapping) else None
        if name is not None and name not in DatasetCatalog.list():
            findings.add(
                ConfigError(f"{key}.dataset_name", name, "is not registered", "name the test data")
            )
        elif name is None or MetadataCatalog.get(name).get("json_file"):
            findings.step(_check_evaluator, findings.step(construct, node, key), key)
        # else it may write the annotations into a json file as soon as it is built


def _check_evaluator(evaluator: Any, key: str) -> None:
    if not isinstance(evaluator, DatasetEvaluator):
        raise ConfigError(
            key,
            type(evaluator).__name__,
            "is no evaluator",
            "use a subclass of detectron2.evaluation.DatasetEvaluator",
        )


# --- optimizer, schedule, device, output folder ---------------------------------------------------


def _optimizer(cfg: DictConfig, model: nn.Module) -> torch.optim.Optimizer:
    node, findings = cfg.optimizer, Findings()
    if not isinstance(node.get("params"), DictConfig):
        raise ConfigError(
            "optimizer.params",
            node.get("params"),
            "does not say which parameters to train",
            "use L(get_default_optimizer_params)()",
        )
    for name in OPTIMIZER_NUMBERS:
        if name in node:
            findings.step(check_number, f"optimizer.{name}", node[name], least=0)
    findings.raise_errors()
    node.params.model = model
    try:
        optimizer = construct(node, "optimizer")
    finally:
        del node.params.model  # so that the config can still be saved
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            "optimizer", type(optimizer).__name__, "is no optimizer", "use one of torch.optim"
        )
    return optimizer


def _check_scheduler(scheduler: Any) -> None:
    """A multiplier of the learning rate: a function of the share of the run that is over."""
    for where in (0.0, 0.5, 1 - 1e-6):
        try:
            value = scheduler(where)
        except Exception as e:
            raise ConfigError(
                "lr_multiplier",
                type(scheduler).__name__,
                f"cannot be evaluated at {where:g} of the run: {e}",
                "use a ParamScheduler of fvcore",
            ) from e
        check_number(f"lr_multiplier at {where:g} of the run", value, least=0)


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
        there = device.type == "cpu" or (
            device.type == "cuda" and torch.empty(1, device=device).is_cuda
        )
    except Exception:
        there = False
    if not there:
        raise ConfigError(
            "train.device", name, "there is no such device here", "use train.device=cpu"
        )


def check_output(output_dir: str, resume: bool) -> None:
    """Check a run's output folder.

    Args:
        output_dir: need not exist.
        resume: it may hold a run, which then goes on.

    Raises:
        ConfigError: it cannot be written to, or holds what a run must not overwrite.
    """
    key = "train.output_dir"
    check_folder(key, output_dir)
    weights = glob.glob(os.path.join(glob.escape(output_dir), "*.pth"))
    if not has_run(output_dir):
        if not weights:
            return
        raise ConfigError(
            key,
            output_dir,
            f"holds {os.path.basename(weights[0])} of a run that cannot be resumed",
            "choose another folder",
        )
    if not resume:
        raise ConfigError(
            key,
            output_dir,
            "holds another run's checkpoint",
            "add --resume to continue that run, or choose another folder",
        )


def amp_dtype(cfg: DictConfig) -> Optional[torch.dtype]:
    """What a training step computes in under autocast by ``cfg.train``; None: no autocast.

    Raises:
        ConfigError: a type that the device does not offer.
    """
    if not cfg.train.amp.enabled:
        return None
    device = torch.device(cfg.train.device).type
    dtype = getattr(torch, cfg.train.amp.dtype or ("float16" if device == "cuda" else "bfloat16"))
    check_amp(dtype, device)
    return dtype
