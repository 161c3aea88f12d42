"""Builds what a run needs from its config, step by step, and reports all errors together."""

import logging
import re
from dataclasses import dataclass, field
from typing import Any, Callable, Collection, Dict, List, Mapping, Optional, Tuple

import torch
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from omegaconf import DictConfig, OmegaConf
from torch import nn

from sharedkd.config.build import construct, missing_keys, not_set
from sharedkd.config.load import Loaded, student_only
from sharedkd.data.loader import TrainLoader
from sharedkd.errors import FAILED, ConfigError, ConfigErrors, Findings, SharedKDError, collecting
from sharedkd.modeling.backbones import compile_backbone, recompute_blocks
from sharedkd.modeling.checks import check_image_format
from sharedkd.modeling.detectors import count_parameters
from sharedkd.modeling.hardware import trains_channels_last
from sharedkd.modeling.laterals import fit_laterals
from sharedkd.modeling.layout import keep_keypoints_contiguous
from sharedkd.modeling.meta_arch import SharedKD, losses_of, of_students
from sharedkd.modeling.stages import Stage
from sharedkd.modeling.teachers import FrozenTeacher, Peer, Teacher, teacher_key
from sharedkd.values import check_number
from sharedkd.weights.loading import Initial, inherit, initialise, load_trained, of_parts, parts_of

from .checkpoint import has_run
from .checks import (
    DataSets,
    check_class_order,
    check_classes,
    check_datasets,
    check_device,
    check_ends,
    check_evaluation,
    check_sample,
    check_scheduler,
    check_unlabelled,
)
from .folder import check_disk, check_output
from .lock import check_free
from .resume import check_settings, check_unlabelled_count, saved_seed
from .trainer import check_amp

__all__ = [
    "Parts",
    "amp_dtype",
    "assemble",
    "build_parts",
    "check_start",
    "memory_layout",
    "rewire",
]

logger = logging.getLogger("detectron2.sharedkd")

OPTIMIZER_NUMBERS = ("lr", "weight_decay", "momentum")
LEAST_INHERITED = 0.5  # of the weights of the parts to inherit; less is warned of


@dataclass
class Parts:
    """All that a run needs.  A field is FAILED if it could not be built.

    Args:
        cfg: its config; in an evaluation without the teacher.
        resuming: the weights are loaded from the run's own checkpoint later.
        data: summaries of its data sets.
        model: on its device, with its initial weights: a pair or a plain detector.
        student: the student of ``model``; a plain detector is its own student.
        teachers: name -> source of maps; None is the name of ``model.teacher``.
        peers: the further students that train with it, by name.
        loaded: what its initial weights have done to the student; None: not loaded here.
        inherited: the student's tensors that are copies of the teacher's.
        fitted: of :meth:`fit`.
        optimizer, loader, scheduler: for training; None in an evaluation.
        sample: the first training image as the loader delivers it; None if that cannot be known.
        disk: see :func:`~sharedkd.engine.folder.check_disk`.
    """

    cfg: DictConfig
    resuming: bool = False
    data: DataSets = field(default_factory=DataSets)
    model: nn.Module = FAILED
    student: nn.Module = FAILED
    teachers: Mapping[Optional[str], Teacher] = field(default_factory=dict)
    peers: Mapping[str, Peer] = field(default_factory=dict)
    loaded: Optional[Initial] = None
    inherited: List[str] = field(default_factory=list)
    fitted: Dict[str, float] = field(default_factory=dict)
    optimizer: Optional[torch.optim.Optimizer] = None
    loader: Any = None
    scheduler: Any = None
    sample: Optional[Dict[str, Any]] = field(default=None, repr=False)
    disk: Optional[Mapping[str, float]] = None

    @property
    def students(self) -> Dict[str, nn.Module]:
        """The student and its peers' students, by their places in the config."""
        peers = {f"model.peers.{name}": peer.student for name, peer in self.peers.items()}
        return {"model": self.student, **peers}

    def fit(self) -> None:
        """Fit the laterals of an inherited FPN, see :func:`~sharedkd.modeling.laterals.fit_laterals`.

        Before the model is wrapped for several processes, which then get the weights of the first.
        """
        images = self.cfg.train.inherit_images
        if images and "neck" in parts_of(self.inherited) and isinstance(self.loader, TrainLoader):
            logger.info("Fits the laterals of the student's FPN to the teacher's")
            self.fitted = fit_laterals(self.model, self.loader.samples(images))
            for name, share in self.fitted.items():
                logger.info(f"{name} gives {share:.0%} of what varies in its teacher's output")
            if not self.fitted:
                logger.info("No lateral is fitted: both need an FPN of one width, without norms")


@collecting
def assemble(
    loaded: Loaded, eval_only: bool = False, resume: bool = False, *, findings: Findings
) -> Parts:
    """Build and check all that a run needs, without writing anything.

    Args:
        loaded: its config.  If it has no seed, one is drawn and stored in it.
        eval_only: ``train.init_checkpoint`` is a trained student, to be evaluated.
        resume: the output folder may hold a run to resume.
    """
    cfg = student_only(loaded.cfg) if eval_only else loaded.cfg
    step = findings.step
    for key in missing_keys(cfg):
        findings.add(not_set(key))
    if step(check_device, cfg.train.device) is FAILED:
        cfg.train.device = "cpu"  # so that the other checks can run
    folder = None
    if not eval_only:
        step(check_free, cfg.train.output_dir)
        folder = step(check_output, cfg.train.output_dir, resume)
    data = check_datasets(cfg, loaded.data, eval_only, findings)
    resuming = resume and not eval_only and has_run(cfg.train.output_dir)
    _seed(cfg, resuming)
    if resuming:
        step(check_settings, cfg)

    parts = Parts(cfg, resuming, data)
    usable = [*data.usable("train"), *data.usable("test")]
    _build(parts, eval_only, not loaded.data or bool(usable), findings)
    for summary in usable[:1]:
        for key, student in parts.students.items():
            step(check_classes, cfg, student, summary, key)
        if parts.model is not FAILED:
            check_class_order(
                cfg, parts.model, parts.inherited, summary.classes, eval_only, findings
            )
    if comm.is_main_process():
        check_evaluation(cfg, data, findings)
    if eval_only:
        return parts

    step(check_start, parts)
    if not resuming:  # whose teachers' APs are in the checkpoint
        step(check_ends, cfg)
    parts.scheduler = step(construct, cfg.lr_multiplier, "lr_multiplier")
    step(check_scheduler, parts.scheduler)
    trained = parts.student if parts.model is FAILED else parts.model
    parts.optimizer = step(_optimizer, cfg, trained, parts.peers)
    if FAILED not in (parts.model, folder):
        parts.disk = step(check_disk, cfg, parts.model, parts.optimizer) or None
    loader = cfg.dataloader.train if data.complete("train") else FAILED
    parts.loader = step(construct, loader, "dataloader.train")
    if isinstance(parts.loader, TrainLoader):
        parts.loader.pin_memory = torch.device(cfg.train.device).type != "cpu"
        sample = step(parts.loader.first_sample)
        for student in parts.students.values():
            step(check_sample, student, sample)
        if isinstance(parts.model, SharedKD):
            for pair in parts.model.pairs.values():
                step(pair.check_record, sample)
        if resuming:
            step(check_unlabelled_count, cfg.train.output_dir, parts.loader.unlabelled)
        if parts.loader.unlabelled and parts.model is not FAILED:
            step(check_unlabelled, cfg, parts.model)
        parts.sample = sample or None
    return parts


def _seed(cfg: DictConfig, resuming: bool) -> None:
    """Draw a seed for ``cfg`` if it has none, and seed all generators."""
    if cfg.train.seed < 0 and resuming:
        cfg.train.seed = saved_seed(cfg.train.output_dir)
    if cfg.train.seed < 0:
        cfg.train.seed = comm.shared_random_seed()
    seed_all_rng(cfg.train.seed + comm.get_rank())


# --- the model ----------------------------------------------------------------------------------


@collecting
def build_parts(cfg: DictConfig, *, findings: Findings) -> Parts:
    """Build the model of ``cfg`` on its device, with its initial weights, and nothing else."""
    parts = Parts(cfg)
    _build(parts, eval_only=False, classes_known=True, findings=findings)
    return parts


def _build(parts: Parts, eval_only: bool, classes_known: bool, findings: Findings) -> None:
    """Build the model; weights of a trained student are loaded only if its classes are known."""
    cfg, step = parts.cfg, findings.step
    dtype = step(amp_dtype, cfg)
    _construct(parts, classes_known, findings)
    model, student = parts.model, parts.student
    image_format = OmegaConf.select(cfg, "dataloader.train.mapper.image_format")
    if not eval_only and image_format is not None:
        step(check_image_format, student, image_format)
    if eval_only:
        step(_load_student, cfg, student if classes_known else FAILED)
    elif not parts.resuming:
        parts.loaded = step(initialise, student, cfg.train.init_checkpoint, *_source(cfg))
        if cfg.train.inherit:
            teacher, trained = parts.teachers.get(None), parts.loaded.names if parts.loaded else ()
            parts.inherited = step(_inherit, cfg, student, teacher, trained, findings) or []
        for name, x in parts.peers.items():
            key = f"model.peers.{name}.init_checkpoint"
            step(initialise, x.student, x.init_checkpoint, key, x.trust_checkpoint, x.sha256)
    if model is not FAILED:
        logger.info(
            f"{count_parameters(student):,} parameters in the student, "
            f"{count_parameters(losses_of(model)):,} in distillation losses"
        )
    placed = step(_place, cfg, model)  # a pair takes its teachers to its device
    for name, teacher in parts.teachers.items():
        if FAILED not in (placed, teacher):
            step(_of_teacher, name, teacher.prepare, dtype)
    for each in parts.students.values():
        step(rewire, cfg, each)


def _construct(parts: Parts, classes_known: bool, findings: Findings) -> None:
    """Construct the model; if a node of a pair fails, the others are still checked together."""
    node, step = parts.cfg.model, findings.step
    if node.get("student") is None:
        parts.model = step(construct, node, "model")
        parts.student = getattr(parts.model, "student", parts.model)
        return
    errors = len(findings.errors)
    parts.student = step(construct, node.student, "model.student")
    first = node.get("teacher")
    nodes: Dict[Optional[str], Any] = {} if first is None else {None: first}
    nodes.update(_group(node, "teachers", "dict(NAME=L(FrozenTeacher)(...))", findings))
    losses = _group(node, "stages", "L(stage_dict)(NAME=...)", findings)
    if parts.resuming and not (losses or node.get("peers")):
        nodes = {}  # they have given the start
    parts.teachers = {
        name: step(_of_teacher, name, construct, x, teacher_key(name)) for name, x in nodes.items()
    }
    stages = {}
    for name, stage in losses.items():
        if isinstance(stage, DictConfig) and "_target_" in stage:
            stage = step(construct, stage, f"model.stages.{name}")
        needs = getattr(stage.loss, "needs", ()) if isinstance(stage, Stage) else ()
        waits = "teacher" in needs and parts.teachers.get(stage.teacher) is FAILED
        if stage is not FAILED and not waits and (classes_known or "regions" not in needs):
            stages[name] = stage
    peers = {
        name: step(construct, peer, f"model.peers.{name}")
        for name, peer in _group(node, "peers", "dict(NAME=L(Peer)(...))", findings).items()
    }
    built = ("student", "teacher", "teachers", "stages", "peers")
    pair = {k: node[k] for k in node if k not in built}
    teachers = {name: x for name, x in parts.teachers.items() if x is not FAILED}
    pair.update(student=parts.student, teacher=teachers.pop(None, None), stages=stages)
    pair.update({"teachers": teachers} if "teachers" in node else {})
    pair.update({"peers": peers} if peers else {})
    broken = FAILED in (parts.student, *peers.values())
    model = step(construct, FAILED if broken else pair, "model")
    if len(findings.errors) == errors:
        parts.model, parts.peers = model, peers


def _group(node: DictConfig, key: str, example: str, findings: Findings) -> Dict[str, Any]:
    """The nodes in the group ``key``, by name."""
    group = node.get(key) or {}
    if not isinstance(group, Mapping):
        problem = "is no group of nodes"
        findings.add(ConfigError(f"model.{key}", group, problem, f"use {example}"))
        return {}
    return {name: group[name] for name in group if name != "_target_"}


def _of_teacher(name: Optional[str], function: Callable, *args: Any) -> Any:
    """Call ``function``; its errors and log lines name the key of this teacher, not ``model.teacher``."""

    def here(text: str) -> str:
        return re.sub(r"\bmodel\.teacher(?=\.|$)", teacher_key(name), text)

    def rename(record: logging.LogRecord) -> bool:
        who = "The teacher" if name is None else f"The teacher {name}"
        record.msg = here(str(record.msg)).replace("The teacher:", f"{who}:")
        return True

    logger.addFilter(rename)
    try:
        return function(*args)
    except SharedKDError as e:
        raise ConfigErrors(
            type(x)(here(x.key), x.value, here(x.problem), here(x.fix)) for x in e.errors
        ) from e
    finally:
        logger.removeFilter(rename)


def _load_student(cfg: DictConfig, student: nn.Module) -> None:
    if not cfg.train.init_checkpoint:
        problem = "is empty, there is nothing to evaluate"
        fix = "set it to the trained student's checkpoint"
        raise ConfigError("train.init_checkpoint", "''", problem, fix)
    load_trained(student, cfg.train.init_checkpoint, *_source(cfg))


def _source(cfg: DictConfig) -> Tuple[str, bool, str]:
    """Key, trust and SHA-256 of the student's checkpoint, the arguments of :func:`load_trained`."""
    return "train.init_checkpoint", cfg.train.trust_checkpoint, cfg.train.init_sha256


def _inherit(
    cfg: DictConfig,
    student: nn.Module,
    teacher: Any,
    trained: Collection[str],
    findings: Findings,
) -> List[str]:
    """Copy what ``cfg.train.inherit`` names, but for the parts of tensors that are ``trained`` already."""
    if cfg.model.get("student") is None:
        fix = "add --teacher, or use train.inherit=[]"
        raise ConfigError("train.inherit", list(cfg.train.inherit), "there is no teacher", fix)
    kept = [part for part in parts_of(trained) if part in cfg.train.inherit]
    if kept:
        logger.info(f"train.init_checkpoint has the student's {' and '.join(kept)}: not inherited")
    parts = [part for part in cfg.train.inherit if part not in kept]
    copied, fix = [], "use train.inherit=[]"
    if isinstance(teacher, FrozenTeacher):
        copied = inherit(student, teacher.model, parts, teacher.scale)
        problem = f"nothing of {type(teacher.model).__name__} fits {type(student).__name__}"
    else:
        kind = type(teacher).__name__
        problem = "there is no teacher" if teacher is None else f"a {kind} is no trained detector"
    if parts and not copied:
        findings.warn("train.inherit", parts, f"{problem}: nothing is inherited", fix)
    elif copied:
        size = {name: tensor.numel() for name, tensor in student.state_dict().items()}
        share = sum(size[x] for x in copied) / sum(size[x] for x in of_parts(size, parts))
        if share < LEAST_INHERITED:
            problem = f"the teacher's have other shapes: {share:.0%} of these weights are inherited"
            fix = f"give the student an FPN and heads of its widths, or {fix}"
            findings.warn("train.inherit", parts, problem, fix)
    return copied


def check_start(parts: Parts) -> None:
    """Check that the student of a new run gets something of its teacher.

    Raises:
        ConfigError: there is a teacher, no distillation loss, and nothing is inherited.
    """
    learns = parts.inherited or of_students(parts.model, "stages")
    unknown = FAILED in (parts.model, *parts.teachers.values())
    if learns or unknown or parts.resuming or not parts.teachers:
        return
    wanted = list(parts.cfg.train.inherit)
    kept = [x for x in parts_of(parts.loaded.names if parts.loaded else ()) if x in wanted]
    why = f", whose {' and '.join(kept)} train.init_checkpoint has already" if kept else ""
    problem = f"gives the student nothing of the teacher{why}, and there is no distillation loss"
    fix = "use a loss, as --method shared_kd has, or train without the teacher"
    raise ConfigError("train.inherit", wanted, problem, fix)


def _place(cfg: DictConfig, model: nn.Module) -> nn.Module:
    model.to(cfg.train.device, memory_format=memory_layout(cfg))
    keep_keypoints_contiguous(model)
    return model


def memory_layout(cfg: DictConfig) -> torch.memory_format:
    """The memory format of the student's weights and of all maps, by ``cfg.train.channels_last``."""
    wanted = cfg.train.channels_last
    if wanted is None:
        wanted = torch.device(cfg.train.device).type != "cpu" or trains_channels_last()
    return torch.channels_last if wanted else torch.preserve_format


def rewire(cfg: DictConfig, student: nn.Module) -> None:
    """Apply ``activation_checkpointing`` or ``compile`` of ``cfg.train`` to ``student``."""
    if cfg.train.activation_checkpointing and cfg.train.compile:
        problem = "excludes train.activation_checkpointing=True"
        raise ConfigError("train.compile", True, problem, "use one of them")
    if cfg.train.activation_checkpointing:
        logger.info(f"{recompute_blocks(student)} blocks of the student keep no activations")
    if cfg.train.compile:
        compile_backbone(student)


def amp_dtype(cfg: DictConfig) -> Optional[torch.dtype]:
    """The autocast type of a training step by ``cfg.train``; None: no autocast; see :func:`.trainer.check_amp`."""
    if not cfg.train.amp.enabled:
        return None
    device = torch.device(cfg.train.device).type
    dtype = getattr(torch, cfg.train.amp.dtype or ("float16" if device == "cuda" else "bfloat16"))
    check_amp(dtype, device)
    return dtype


def _optimizer(
    cfg: DictConfig, model: nn.Module, peers: Mapping[str, Peer]
) -> torch.optim.Optimizer:
    node, findings = cfg.optimizer, Findings()
    if not isinstance(node.get("params"), DictConfig):
        problem = "does not say which parameters to train"
        fix = "use L(get_default_optimizer_params)()"
        raise ConfigError("optimizer.params", node.get("params"), problem, fix)
    for name in OPTIMIZER_NUMBERS:
        if name in node:
            findings.step(check_number, f"optimizer.{name}", node[name], least=0)
    findings.raise_errors()
    try:
        node.params.model = _trained(model) if peers else model
        optimizer = construct(node, "optimizer")
        for name, peer in peers.items():
            node.params.model = _trained(model.peers[name])
            for group in construct(node.params, "optimizer.params"):
                lr = group.get("lr", optimizer.defaults["lr"])
                optimizer.add_param_group({**group, "lr": lr * peer.lr_factor})
    finally:
        del node.params.model  # so that the config can still be saved
    if not isinstance(optimizer, torch.optim.Optimizer):
        kind = type(optimizer).__name__
        raise ConfigError("optimizer", kind, "is no optimizer", "use one of torch.optim")
    return optimizer


def _trained(pair: SharedKD) -> nn.Module:
    """What one student of several trains: itself, and what its losses own."""
    return nn.ModuleDict({"student": pair.student, "losses": pair.losses})
