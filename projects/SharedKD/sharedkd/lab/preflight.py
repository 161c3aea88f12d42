"""A run before it starts: everything that is wrong with it, what it will be, what it will cost."""

import copy
import logging
import time
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, Sequence

import torch
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig
from torch import nn

from sharedkd.config import load_config
from sharedkd.engine.hooks.cost import STEPS
from sharedkd.engine.hooks.record import peak_memory_mb
from sharedkd.engine.overview import advise, as_text, describe
from sharedkd.engine.parts import Parts, assemble, losses_of
from sharedkd.engine.run import build_trainer
from sharedkd.errors import FAILED, ConfigError, Findings, NonFiniteLossError

__all__ = ["preflight", "report"]


def preflight(
    config_file: str, overrides: Sequence[str] = (), resume: bool = False, measure: bool = True
) -> Dict[str, Any]:
    """Check a run as the training command would, and measure two of its steps.  Nothing is written.

    Args:
        config_file, overrides, resume: as the training command takes them.
        measure: False leaves out the two steps.

    Returns:
        ``ok``; ``errors`` and ``warnings``, each with ``key``, ``value``, ``problem``, ``fix`` and
        ``message``; what :func:`~sharedkd.engine.overview.describe` returns, if there is a config; and
        ``measured``: ``seconds_per_step``, ``total_seconds`` (without evaluations) and
        ``peak_memory_mb`` of this process or its GPU.
    """
    findings, found = Findings(), {}
    with _quiet():
        cfg = findings.step(load_config, config_file, overrides, findings=findings)
        parts = findings.step(assemble, cfg, False, resume, findings=findings)
        if parts is not FAILED:
            advise(cfg, parts, findings)
            found = describe(cfg, parts, findings)
        if measure and not findings.errors:
            measured = findings.step(_measure, cfg, parts)
            found.update({} if measured is FAILED else {"measured": measured})
    return {
        "ok": not findings.errors,
        "errors": [_as_dict(e) for e in findings.errors],
        "warnings": [_as_dict(w) for w in findings.warnings],
        **found,
    }


def report(found: Dict[str, Any]) -> str:
    """``found``, what :func:`preflight` returns, for people."""
    lines = [f"warning: {w['message']}" for w in found["warnings"]]
    lines += [f"error: {e['message']}" for e in found["errors"]]
    if found["ok"]:
        lines.append("ready: nothing is in the way of this run")
    else:
        count = len(found["errors"])
        lines.append(f"not ready: {count} error{'s' if count > 1 else ''}, see above")
    text = as_text(found) if "data" in found else ""
    return "\n\n".join(x for x in (text, "\n".join(lines)) if x)


def _as_dict(error: ConfigError) -> Dict[str, str]:
    return {
        "key": error.key,
        "value": str(error.value),
        "problem": error.problem,
        "fix": error.fix,
        "message": str(error),
    }


def _measure(cfg: DictConfig, parts: Parts) -> Dict[str, float]:
    """Time training steps on the first batches, all stages on; weights are then what they were."""
    model = parts.model
    with _unchanged(model):
        trainer = build_trainer(cfg, parts)
        weights = {name: stage.weight for name, stage in trainer.stages.items()}
        trainer.stage_weights = lambda: weights
        trainer.start_iter, trainer.max_iter = 0, STEPS
        model.train()
        seconds = []
        for trainer.iter in range(STEPS):
            with EventStorage(trainer.iter) as trainer.storage:
                seconds.append(_time(cfg, trainer.run_step))
        parts.optimizer.state.clear()
    return {
        "seconds_per_step": seconds[-1],
        "total_seconds": seconds[-1] * cfg.train.max_iter,
        "peak_memory_mb": peak_memory_mb(),
    }


def _time(cfg: DictConfig, step: Callable[[], None]) -> float:
    start = time.perf_counter()
    try:
        step()
        if torch.device(cfg.train.device).type == "cuda":
            torch.cuda.synchronize()
    except NonFiniteLossError as e:
        raise ConfigError(
            "train", "first steps", f"do not work: {e}", "check init_checkpoint, teacher and data"
        ) from e
    except torch.cuda.OutOfMemoryError as e:
        raise ConfigError(
            "dataloader.train.total_batch_size",
            cfg.dataloader.train.get("total_batch_size"),
            "needs more memory than the GPU has",
            "use fewer images, train.amp.enabled=True or train.activation_checkpointing=True",
        ) from e
    except Exception as e:  # of whatever a detector, a mapper or a loss is made of
        raise ConfigError(
            "train",
            "first steps",
            f"fail: {type(e).__name__}: {e}",
            "correct the model or the data loader",
        ) from e
    return time.perf_counter() - start


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Within it, the model may be trained; after it, its state and all random states are as before."""
    student = getattr(model, "student", model)
    modules = (student, losses_of(model))
    states = [copy.deepcopy(m.state_dict()) for m in modules]
    normalizer = getattr(student, "loss_normalizer", None)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            for module, state in zip(modules, states):
                module.load_state_dict(state)
            if normalizer is not None:
                student.loss_normalizer = normalizer
            model.zero_grad()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the log: what it says is in the report."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "sharedkd")]
    levels = [each.level for each in loggers]
    try:
        for each in loggers:
            each.setLevel(logging.CRITICAL)
        yield
    finally:
        for each, level in zip(loggers, levels):
            each.setLevel(level)
