"""A run from its config: build, train, evaluate.  The command lines in tools/ only call this."""

import copy
import logging
import os
import shlex
from argparse import Namespace
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from logging.handlers import MemoryHandler
from types import MappingProxyType
from typing import Any, Callable, ContextManager, Dict, Iterator, List, Mapping, Optional

import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.engine import default_setup, hooks
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from sharedkd.config.classic import is_classic, student_yaml
from sharedkd.config.load import load
from sharedkd.config.own_data import class_names
from sharedkd.errors import ConfigError, Findings
from sharedkd.files import remove_unfinished, replace
from sharedkd.modeling.detectors import config_path, num_classes
from sharedkd.modeling.meta_arch import SharedKD, of_students
from sharedkd.modeling.teachers import FrozenTeacher, StudentAverage
from sharedkd.weights.loading import load_trained
from sharedkd.weights.reading import write_safetensors

from .advice import advise
from .checkpoint import POINTER, Checkpoints, StudentCheckpointer, disk_failure, latest_checkpoint
from .checks import names_of
from .folder import check_output
from .hooks.cost import Cost
from .hooks.record import FILE as RECORD
from .hooks.record import RunRecord
from .hooks.shares import Watchdog
from .hooks.writers import build_writers
from .interrupt import StopRequest, command_line
from .lock import locked
from .overview import as_text, describe
from .parts import Parts, amp_dtype, assemble
from .resume import FinishStep, config_kept
from .trainer import SharedKDTrainer

__all__ = ["run", "build_trainer", "ddp", "train", "evaluate"]

logger = logging.getLogger("detectron2.sharedkd")

DEV_RUN_IMAGES = 50  # evaluated under train.fast_dev_run
#: What a run writes in its folder, and a killed one may leave half written.
WRITTEN = (
    "*.pth",
    "peers/*.pth",
    "*.safetensors",
    "student.yaml",
    "metrics.json",
    POINTER,
    RECORD,
)


def run(args: Namespace) -> Mapping[str, Any]:
    """Train, or with ``--eval-only`` evaluate, what the command line names.

    Everything is built and checked before anything is written.

    Args:
        args: of Detectron2's ``default_argument_parser``.

    Returns:
        the last evaluation's results; empty without an evaluator.

    Raises:
        ConfigError: the config, an override, the data or a checkpoint cannot be used.
        SaveError: the disk of the output folder is full or read-only.
        NonFiniteLossError: see :meth:`SharedKDTrainer.run_step`.
        Stopped: by a signal; the state is saved.
    """
    with ExitStack() as held, _log_later() as log_opens:
        findings = Findings()
        loaded = findings.step(load, args.config_file, args.opts, findings=findings)
        parts = findings.step(assemble, loaded, args.eval_only, args.resume, findings=findings)
        findings.raise_errors()
        cfg, checkpoint = parts.cfg, None
        if args.eval_only:
            # The run's folder keeps its config.yaml, which says how it was trained.
            cfg.train.output_dir = os.path.join(cfg.train.output_dir, "eval")
        else:
            parts.fit()
            trainer = build_trainer(cfg, parts)
        if parts.resuming:
            checkpoint = latest_checkpoint(cfg.train.output_dir)
            entries = load_trained(
                trainer.detector, checkpoint, "train.output_dir", cfg.train.trust_checkpoint
            )
            trainer.check_resumable(entries["trainer"])
            _check_owned(trainer.module, entries, checkpoint)
        folder = cfg.train.output_dir
        held.enter_context(disk_failure(folder))
        owns = comm.is_main_process() and not args.eval_only
        if owns:
            held.enter_context(_own(folder, args.resume))
        with config_kept(folder) if owns else nullcontext(), log_opens():
            file = config_path(args.config_file)  # whose text Detectron2 logs
            default_setup(cfg, Namespace(**{**vars(args), "config_file": file}))
        if owns and is_classic(cfg):
            text = student_yaml(cfg, os.path.join(folder, "model_final.pth"))
            replace(os.path.join(folder, "student.yaml"), lambda f: f.write(text.encode()))
        if args.eval_only:
            return evaluate(cfg, parts.model)
        if comm.is_main_process():
            logger.info("The run:\n" + as_text(describe(parts)))
            for warning in (*findings.warnings, *advise(parts)):
                logger.warning(str(warning))
        return train(cfg, trainer, checkpoint, _started(args, parts))


def _started(args: Namespace, parts: Parts) -> Dict[str, Any]:
    """How a training run was started: the first keys of run.json."""
    keys = ("data.val_json", "dataloader.test.dataset.names")
    found = next((x for key in keys if (x := OmegaConf.select(parts.cfg, key))), None)
    there = isinstance(found, str) and os.path.exists(found)
    return {
        "validation": os.path.realpath(found) if there else str(found),
        "command": shlex.join(command_line()),
        "config_file": args.config_file,
        "overrides": list(args.opts),
        "repairs": parts.data.repairs,
        "unlabelled_images": getattr(parts.loader, "unlabelled", 0),
        "inherited": len(parts.inherited),
        "fitted": parts.fitted,
    }


@contextmanager
def _own(folder: str, resume: bool) -> Iterator[None]:
    """Lock the output folder, and remove unfinished files of a killed run."""
    with locked(folder):
        check_output(folder, resume)  # another run may have used it since the first check
        for pattern in WRITTEN:
            remove_unfinished(folder, pattern)
        yield


def build_trainer(cfg: DictConfig, parts: Parts) -> SharedKDTrainer:
    """Build the trainer by ``cfg.train``, with DDP if there are several processes."""
    return SharedKDTrainer(
        ddp(cfg, parts.model),
        parts.loader,
        parts.optimizer,
        max_iter=cfg.train.max_iter,
        seed=cfg.train.seed,
        amp_dtype=amp_dtype(cfg),
        clip_grad_norm=cfg.train.clip_grad_norm,
        accumulate=cfg.train.accumulate,
        log_period=cfg.train.log_period,
        on_nonfinite=cfg.train.on_nonfinite,
        max_skipped_steps=cfg.train.max_skipped_steps,
    )


def ddp(cfg: DictConfig, model: nn.Module) -> nn.Module:
    """Wrap ``model`` in DistributedDataParallel (``cfg.train.ddp``) if there are several processes."""
    on_cpu = torch.device(cfg.train.device).type == "cpu"
    return create_ddp_model(model, **cfg.train.ddp, **(dict(device_ids=None) if on_cpu else {}))


def train(
    cfg: DictConfig,
    trainer: SharedKDTrainer,
    checkpoint: Optional[str] = None,
    started: Mapping[str, Any] = MappingProxyType({}),
) -> Mapping[str, Any]:
    """Train to ``train.max_iter``, from the first iteration or from a checkpoint.

    Args:
        checkpoint: the file of this run to resume from; None: start at the first iteration.
        started: the first keys of run.json, see :class:`~sharedkd.engine.hooks.record.RunRecord`.

    Returns:
        the last evaluation's results; empty without an evaluator.

    Raises:
        NonFiniteLossError, Stopped, SaveError: see :func:`run`.
    """
    model, module, folder = trainer.model, trainer.module, cfg.train.output_dir
    extra = _beside(module) if isinstance(module, SharedKD) else {}
    checkpointer = StudentCheckpointer(model, folder, trainer=trainer, **extra)
    averages = {k: x for k, x in extra.items() if isinstance(x, StudentAverage)}
    final = {name: x for name, x in averages.items() if x.final}
    if len(final) > 1:
        raise ConfigError(
            "final", ", ".join(final), "only one can be the result", "set one of them"
        )
    stop = StopRequest()
    checkpoints = Checkpoints(checkpointer, stop, **cfg.train.checkpointer)

    def test() -> Mapping[str, Any]:
        with checkpoints.watching(model):
            trainer.results = evaluate(cfg, model)
        trainer.outgrown.compare(trainer.results)
        return trainer.results

    watches = trainer.stages and cfg.train.watch_period
    evaluation = hooks.EvalHook(cfg.train.eval_period, test)
    trainer.register_hooks(
        [
            Cost() if comm.is_main_process() else None,
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            Watchdog(cfg.train.watch_period, cfg.train.max_iter) if watches else None,
            *(_EndAsAverage(x, folder) for x in final.values()),
            checkpoints,
            evaluation,
            FinishStep([checkpoints, evaluation]) if checkpoint else None,
        ]
    )
    start = 0
    if checkpoint:
        checkpointer.trusted = cfg.train.trust_checkpoint
        checkpointer.load(checkpoint)
        start = trainer.iter + 1
        ended = any(x.iteration == start for x in final.values())
        if ended and start < cfg.train.max_iter:
            problem = f"is beyond iteration {start}, where the average of the student has become the student"
            fix = "train longer in another train.output_dir, with train.init_checkpoint set to model_student.pth"
            raise ConfigError("train.max_iter", cfg.train.max_iter, problem, fix)
        trainer.data_loader.first_batch = start * cfg.train.accumulate
    elif cfg.train.eval_teacher is not False:
        for name in getattr(module, "sources", {}):
            trainer.outgrown.know(name, evaluate_teacher(cfg, module, name))
    if not trainer.stages and isinstance(module, SharedKD):
        module.teacher, module.teachers = None, {}  # frees the memory of who gave the start
    if not cfg.train.fast_dev_run:
        _check_ends(trainer)
    if comm.is_main_process():
        writers = build_writers(folder, cfg.train.writers, cfg.train.max_iter, start)
        about = {**started, "fast_dev_run": cfg.train.fast_dev_run}
        trainer.register_hooks(
            [
                hooks.PeriodicWriter(writers, cfg.train.log_period),
                RunRecord(folder, trainer, about, start > 0),
            ]
        )
    # The JIT rounds scripted losses differently while it warms up, which a resumed run does once more.
    # On the CPU, where a resumed run must end in the same bytes, it is off.
    with stop, torch.jit.optimized_execution(trainer.device.type == "cuda"):
        trainer.train(start, cfg.train.max_iter)
    if comm.is_main_process():
        for name in averages.keys() - final.keys():
            average = _average_at_end(averages[name], cfg.train.max_iter)
            _save_model(os.path.join(folder, f"model_{name}.pth"), average)
        if cfg.train.safetensors:
            write_safetensors(module.state_dict(), os.path.join(folder, "model_final.safetensors"))
    return trainer.results


def _average_at_end(source: StudentAverage, max_iter: int) -> Dict[str, Any]:
    """The state of an average that has taken in the last step, too."""
    with EventStorage(max_iter):
        source.begin_step()
    return source.state_dict()["model"]


class _EndAsAverage(hooks.HookBase):
    """After the last step makes an average the student; the trained one goes to ``model_student.pth``."""

    def __init__(self, average: StudentAverage, folder: str):
        self.average, self.path = average, os.path.join(folder, "model_student.pth")

    def after_step(self) -> None:
        if self.trainer.iter + 1 == self.trainer.max_iter:
            average = _average_at_end(self.average, self.trainer.max_iter)
            if comm.is_main_process():
                _save_model(self.path, self.trainer.module.state_dict())
            self.trainer.module.load_state_dict(average)


def _save_model(path: str, state: Mapping[str, Any]) -> None:
    replace(path, partial(torch.save, {"model": dict(state)}))


def _beside(pair: SharedKD) -> Dict[str, Any]:
    """What a checkpoint holds beside the student: entry -> the object whose state it is."""
    found: Dict[str, Any] = {"distillation": pair.losses}
    if pair.auto_weights:
        found["auto_weights"] = pair.auto_weights
    for name, source in pair.sources.items():
        if isinstance(source, StudentAverage):
            found[f"average_{name or 'teacher'}"] = source
    for name, peer in pair.peers.items():
        found[f"peer_{name}"] = peer
        found.update({f"peer_{name}_{key}": x for key, x in _beside(peer).items()})
    return found


def _check_owned(module: nn.Module, entries: Mapping[str, Any], checkpoint: str) -> None:
    """Refuse to resume if the losses own other parameters now, as after ``train.force_resume``.

    The checkpoint's optimizer has a state for each parameter, in order.
    """
    beside = _beside(module) if isinstance(module, SharedKD) else {}

    def shapes(key: str, state: Mapping[str, Any]) -> Dict[str, torch.Size]:
        return {f"{key}/{name}": x.shape for name, x in state.items()}

    now, then = {}, {}
    for key in (x for x in (*beside, *entries) if x.endswith("distillation")):
        now.update(shapes(key, beside[key].state_dict()) if key in beside else {})
        then.update(shapes(key, entries.get(key, {})))
    if now != then:
        stages = ", ".join(of_students(module, "stages")) or "none"
        problem = f"its losses have other parameters than those of {checkpoint}"
        fix = "start anew in another train.output_dir, with train.init_checkpoint set to that file"
        raise ConfigError("model.stages", stages, problem, fix)


def _check_ends(trainer: SharedKDTrainer) -> None:
    """Refuse a stage that is to end where its teacher is outgrown if its teacher's AP is unknown."""
    for name, stage in trainer.stages.items():
        known = comm.all_gather(trainer.outgrown.teachers.get(stage.teacher))[0]
        if stage.end == "teacher" and not known:
            fix = "set train.eval_teacher=True and an evaluator, or use a time"
            key = f"model.stages.{name}.end"
            raise ConfigError(key, "teacher", "its teacher has not been evaluated", fix)


def evaluate(cfg: DictConfig, model: Callable[[List[Dict[str, Any]]], Any]) -> Dict[str, Any]:
    """Run ``dataloader.evaluator`` (any DatasetEvaluator, or a list of them) on ``dataloader.test``.

    With ``train.fast_dev_run`` only its first images are used.

    Args:
        model: a detector, in evaluation mode meanwhile, or a function from Detectron2's records to a
            detector's results.

    Returns:
        task -> metric -> value; empty without an evaluator, and with Detectron2's evaluators on every
        rank but 0.
    """
    if cfg.dataloader.get("evaluator") is None:
        return {}
    if cfg.train.fast_dev_run and "dataset" in cfg.dataloader.test:
        cfg, count = copy.deepcopy(cfg), DEV_RUN_IMAGES
        cfg.dataloader.test.dataset = L(first_records)(
            records=cfg.dataloader.test.dataset, count=count
        )
        logger.warning(f"train.fast_dev_run: evaluates {count} images; the figures mean nothing")
    nodes = cfg.dataloader.evaluator
    evaluators = [instantiate(x) for x in (nodes if isinstance(nodes, ListConfig) else [nodes])]
    results = inference_on_dataset(model, instantiate(cfg.dataloader.test), evaluators)
    if comm.is_main_process():
        print_csv_format(results)
    return dict(results or {})


def first_records(records: List[Dict[str, Any]], count: int) -> List[Dict[str, Any]]:
    """At most the first ``count`` records of a data set."""
    return records[:count]


def evaluate_teacher(
    cfg: DictConfig, model: nn.Module, name: Optional[str] = None
) -> Dict[str, Any]:
    """Evaluate a teacher of ``model`` on the student's validation data, and log its results.

    A plain detector has no teacher, and nothing happens.
    """
    teacher = getattr(model, "sources", {}).get(name)
    if not isinstance(teacher, FrozenTeacher):
        return {}
    problem = _other_classes(cfg, model, teacher)
    log = logger.info if cfg.train.eval_teacher is None else logger.warning
    if problem:
        log(f"train.eval_teacher: {problem}: its head cannot be evaluated here")
        return {}
    who = "teacher" if name is None else f"teacher {name}"
    logger.info(f"The {who}'s results, before the first iteration:")
    try:
        return evaluate(cfg, lambda inputs: teacher.predict(inputs, model.input_format))
    except KeyError as e:  # an evaluator of what this teacher does not predict
        if cfg.train.eval_teacher:
            raise
        problem = f"the evaluator asks for {e}, which the teacher has not: not evaluated"
        log(f"train.eval_teacher: {problem}")
        return {}


def _other_classes(cfg: DictConfig, model: nn.Module, teacher: FrozenTeacher) -> str:
    """Why a teacher's classes are not known to be those of the data; empty: they are."""
    ours, theirs = num_classes(model.student), num_classes(teacher.model)
    if ours is None or ours != theirs:
        return f"the teacher has {theirs} classes and the student {ours}"
    names, its = class_names(cfg), names_of(teacher.name)
    if names and its and list(names) != list(its):
        return "the teacher's classes have other names or another order than those of the data"
    return ""


@contextmanager
def _log_later() -> Iterator[Callable[[], ContextManager[None]]]:
    """Keep Detectron2's log messages until the run's log is open.

    Yields:
        a context to open the log in; after it, the log has the messages.
    """
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore")]
    memory = MemoryHandler(10**6, flushLevel=logging.CRITICAL + 1)
    for each in loggers:
        each.addHandler(memory)
        each.setLevel(logging.INFO)

    def forget() -> None:
        for each in loggers:
            each.removeHandler(memory)

    @contextmanager
    def opens() -> Iterator[None]:
        forget()  # the open log takes all further messages
        yield
        for record in memory.buffer:
            loggers[0].handle(record)  # both write to the same log

    try:
        yield opens
    finally:
        forget()
