"""A run from its config: build, train, evaluate.  The command lines in tools/ only call this."""

import copy
import glob
import logging
import os
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from typing import Any, Dict, List, Optional

import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import default_setup, default_writers, hooks
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from omegaconf import DictConfig, OmegaConf
from torch import nn

from .backbones import compile_backbone, recompute_blocks
from .checkpoint import StudentCheckpointer, has_run, inherit, initialise, load_trained
from .config import construct, load_config, student_only
from .data.coco import check_coco
from .data.loader import TrainLoader
from .errors import ConfigError
from .folding import fold_in_training
from .meta_arch import SharedKD
from .record import RunRecord, count_parameters
from .trainer import SharedKDTrainer

__all__ = ["run", "amp_dtype", "build", "ddp", "train", "evaluate", "rewire"]

logger = logging.getLogger("detectron2.sharedkd")

DEV_RUN_IMAGES = 50  # evaluated under train.fast_dev_run


def run(args) -> Dict[str, Any]:
    """Train, or with ``--eval-only`` evaluate, what the command line names.

    Everything that can be wrong is built and checked before anything is written.

    Args:
        args: of Detectron2's ``default_argument_parser``.

    Returns:
        the last evaluation's results; empty without an evaluator.

    Raises:
        ConfigError, NonFiniteLossError
    """
    with _log_later() as log_now:
        cfg = load_config(args.config_file, args.opts)
        if args.eval_only:
            cfg = student_only(cfg)
        for key in sorted(OmegaConf.missing_keys(cfg)):
            raise ConfigError(key, "???", "is not set", f"add {key}=... to the command")
        _check_device(cfg)
        if not args.eval_only:
            _check_output(cfg.train.output_dir, args.resume)
        if comm.is_main_process():
            check_datasets(cfg, args.eval_only)
        if cfg.train.seed < 0:
            cfg.train.seed = comm.shared_random_seed()
        seed_all_rng(cfg.train.seed + comm.get_rank())
        resuming = args.resume and not args.eval_only and has_run(cfg.train.output_dir)
        model = build(cfg, trained=args.eval_only, resuming=resuming)
        if args.eval_only:
            cfg.train.output_dir = _evaluation_folder(cfg.train.output_dir)
        else:
            trainer = build_trainer(cfg, model)
        if resuming:
            last = StudentCheckpointer(model, cfg.train.output_dir).get_checkpoint_file()
            entries = load_trained(getattr(model, "student", model), last, "train.output_dir")
            trainer.check_resumable(entries["trainer"])
        default_setup(cfg, args)
        log_now()
    if args.eval_only:
        return evaluate(cfg, model)
    return train(cfg, trainer, resuming)


def build(cfg: DictConfig, trained: bool = False, resuming: bool = False) -> nn.Module:
    """The model on its device, with its initial weights.

    Args:
        trained: ``train.init_checkpoint`` is a trained student, to be evaluated.
        resuming: the weights come from the run's own checkpoint later.
    """
    model = construct(cfg.model, "model")
    student, teacher = getattr(model, "student", model), getattr(model, "teacher", None)
    if teacher is not None and num_classes(teacher.model) != num_classes(student):
        logger.info(
            f"The teacher has {num_classes(teacher.model)} classes, the student "
            f"{num_classes(student)}: the teacher's head is unused, its feature maps are what counts"
        )
    if trained:
        if not cfg.train.init_checkpoint:
            raise ConfigError(
                "train.init_checkpoint",
                "''",
                "is empty, there is nothing to evaluate",
                "set it to the trained student's checkpoint",
            )
        load_trained(student, cfg.train.init_checkpoint, "train.init_checkpoint")
    elif not resuming:
        initialise(student, cfg.train.init_checkpoint)
        if cfg.train.inherit:
            if teacher is None:
                raise ConfigError(
                    "train.inherit",
                    list(cfg.train.inherit),
                    "there is no teacher",
                    "set model.teacher or use train.inherit=[]",
                )
            inherit(student, teacher.model, cfg.train.inherit)
    logger.info(
        f"{count_parameters(student):,} parameters in the student, "
        f"{count_parameters(_losses(model)):,} in distillation losses"
    )
    layout = torch.channels_last if cfg.train.channels_last else torch.preserve_format
    model.to(cfg.train.device, memory_format=layout)
    if teacher is not None:
        teacher.prepare(amp_dtype(cfg))
    rewire(cfg, student)
    return model


def rewire(cfg: DictConfig, student: nn.Module) -> None:
    """Make the student run as ``train.fold_norms``, ``activation_checkpointing`` and ``compile`` say."""
    if cfg.train.fold_norms:
        fold_in_training(student)
    if cfg.train.activation_checkpointing and cfg.train.compile:
        raise ConfigError(
            "train.compile", True, "excludes train.activation_checkpointing=True", "use one of them"
        )
    if cfg.train.activation_checkpointing:
        logger.info(f"{recompute_blocks(student)} blocks of the student keep no activations")
    if cfg.train.compile:
        compile_backbone(student)


def _losses(model: nn.Module) -> nn.Module:
    """The distillation losses; empty for a plain detector, whose `losses` may be a method."""
    return model.losses if isinstance(model, SharedKD) else nn.ModuleDict()


def build_trainer(cfg: DictConfig, model: nn.Module) -> SharedKDTrainer:
    """Optimizer, data loader, DDP and trainer around a model."""
    cfg.optimizer.params.model = model
    optimizer = construct(cfg.optimizer, "optimizer")
    del cfg.optimizer.params.model  # so that the config can still be saved
    loader = construct(cfg.dataloader.train, "dataloader.train")
    if isinstance(loader, TrainLoader):
        loader.pin_memory = torch.device(cfg.train.device).type != "cpu"
    return SharedKDTrainer(
        ddp(cfg, model),
        loader,
        optimizer,
        max_iter=cfg.train.max_iter,
        seed=cfg.train.seed,
        amp_dtype=amp_dtype(cfg),
        clip_grad_norm=cfg.train.clip_grad_norm,
        accumulate=cfg.train.accumulate,
        log_period=cfg.train.log_period,
    )


def ddp(cfg: DictConfig, model: nn.Module) -> nn.Module:
    """The model in DistributedDataParallel as ``train.ddp`` says, if there are several processes."""
    on_cpu = torch.device(cfg.train.device).type == "cpu"
    return create_ddp_model(model, **cfg.train.ddp, **(dict(device_ids=None) if on_cpu else {}))


def train(cfg: DictConfig, trainer: SharedKDTrainer, resuming: bool = False) -> Dict[str, Any]:
    """Train to ``train.max_iter``; returns the last evaluation's results."""
    model = trainer.model
    module = getattr(model, "module", model)
    student = getattr(module, "student", module)
    extra = {"distillation": module.losses} if isinstance(module, SharedKD) else {}
    checkpointer = StudentCheckpointer(model, cfg.train.output_dir, trainer=trainer, **extra)
    results: Dict[str, Any] = {}

    def test():
        results.clear()
        results.update(evaluate(cfg, model))
        return results

    main = comm.is_main_process()
    writers = default_writers(cfg.train.output_dir, cfg.train.max_iter) if main else []
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer) if main else None,
            hooks.EvalHook(cfg.train.eval_period, test),
            hooks.PeriodicWriter(writers, period=cfg.train.log_period) if main else None,
            (
                RunRecord(cfg.train.output_dir, student, _losses(module), results, resuming)
                if main
                else None
            ),
        ]
    )
    start = 0
    if resuming:
        checkpointer.load(checkpointer.get_checkpoint_file())
        start = trainer.iter + 1
        trainer.data_loader.first_batch = start * cfg.train.accumulate
    elif cfg.train.eval_teacher:
        evaluate_teacher(cfg, module)
    trainer.train(start, cfg.train.max_iter)
    return results


def evaluate(cfg: DictConfig, model) -> Dict[str, Any]:
    """Run ``dataloader.evaluator`` (any DatasetEvaluator, or a list of them) on ``dataloader.test``.

    With ``train.fast_dev_run`` on its first images alone.
    """
    if "evaluator" not in cfg.dataloader:
        return {}
    if cfg.train.fast_dev_run and "dataset" in cfg.dataloader.test:
        cfg = copy.deepcopy(cfg)
        cfg.dataloader.test.dataset = L(first_records)(
            records=cfg.dataloader.test.dataset, count=DEV_RUN_IMAGES
        )
        logger.warning(
            f"train.fast_dev_run: evaluates {DEV_RUN_IMAGES} images; the figures mean nothing"
        )
    results = inference_on_dataset(
        model, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
    )
    if comm.is_main_process():
        print_csv_format(results)
    return dict(results or {})


def first_records(records: List[Dict[str, Any]], count: int) -> List[Dict[str, Any]]:
    """At most the first ``count`` records of a data set."""
    return records[:count]


def evaluate_teacher(cfg: DictConfig, model: nn.Module) -> Dict[str, Any]:
    """Evaluate the teacher on the student's validation data, and log its results."""
    teacher = getattr(model, "teacher", None)
    if teacher is None:
        return {}
    ours, theirs = num_classes(model.student), num_classes(teacher.model)
    if ours != theirs:
        logger.warning(
            f"train.eval_teacher: the teacher has {theirs} classes and the data {ours}: its head "
            "cannot be evaluated here"
        )
        return {}
    logger.info("The teacher's results, before the first iteration:")
    return evaluate(cfg, lambda inputs: teacher.predict(inputs, model.input_format))


def num_classes(detector: nn.Module) -> Optional[int]:
    """How many classes a Detectron2 detector tells apart; None if it does not say."""
    for module in (detector, getattr(detector, "roi_heads", None)):
        if hasattr(module, "num_classes"):
            return module.num_classes
    return None


def check_datasets(cfg: DictConfig, eval_only: bool = False) -> None:
    """Check every COCO-format data set that the config names, before anything is built.

    Raises:
        ConfigError: an unknown name, or a data set with missing or broken files.
    """
    for split in ("test",) if eval_only else ("train", "test"):
        key = f"dataloader.{split}.dataset.names"
        names = OmegaConf.select(cfg, key)
        for name in [names] if isinstance(names, str) else names or []:
            if name not in DatasetCatalog.list():
                raise ConfigError(key, name, "is not registered", "use configs/custom_coco.py")
            metadata = MetadataCatalog.get(name)
            if "data" not in cfg and metadata.get("json_file"):  # own data is checked already
                train = split == "train"
                check_coco(metadata.json_file, metadata.image_root, key, key, train=train)


def _check_device(cfg: DictConfig) -> None:
    name = cfg.train.device
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


def _check_output(output_dir: str, resume: bool) -> None:
    weights = glob.glob(os.path.join(glob.escape(output_dir), "*.pth"))
    if not has_run(output_dir):
        if not weights:
            return
        raise ConfigError(
            "train.output_dir",
            output_dir,
            f"holds {os.path.basename(weights[0])} of a run that cannot be resumed",
            "choose another folder",
        )
    if not resume:
        raise ConfigError(
            "train.output_dir",
            output_dir,
            "holds another run's checkpoint",
            "add --resume to continue that run, or choose another folder",
        )


def _evaluation_folder(output_dir: str) -> str:
    """Not a run's own folder, whose config.yaml says how it was trained."""
    return os.path.join(output_dir, "eval") if has_run(output_dir) else output_dir


def amp_dtype(cfg: DictConfig) -> Optional[torch.dtype]:
    """What a training step computes in under autocast; None: no autocast.

    Raises:
        ConfigError: an unknown type.
    """
    if not cfg.train.amp.enabled:
        return None
    cuda = torch.device(cfg.train.device).type == "cuda"
    name = cfg.train.amp.dtype or ("float16" if cuda else "bfloat16")
    if name not in ("float16", "bfloat16"):
        raise ConfigError("train.amp.dtype", name, "no such type", "use float16 or bfloat16")
    return getattr(torch, name)


@contextmanager
def _log_later():
    """Keep Detectron2's log messages until :func:`default_setup` has opened the log."""
    memory = MemoryHandler(capacity=10**6, flushLevel=logging.CRITICAL + 1)
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore")]
    for each in loggers:
        each.addHandler(memory)
        each.setLevel(logging.INFO)

    def log_now():
        for each in loggers:
            each.removeHandler(memory)
        for record in memory.buffer:
            logging.getLogger(record.name).handle(record)
        memory.buffer.clear()

    try:
        yield log_now
    finally:
        for each in loggers:
            each.removeHandler(memory)
