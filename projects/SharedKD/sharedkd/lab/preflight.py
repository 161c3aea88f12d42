"""Checks a run before it starts: all errors and warnings, a description, time and memory."""

import logging
import time
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, Mapping, Sequence

import torch
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig

from sharedkd.config.load import load
from sharedkd.engine import overview
from sharedkd.engine.advice import advise
from sharedkd.engine.hooks.cost import STEPS
from sharedkd.engine.hooks.record import peak_memory_mb
from sharedkd.engine.parts import Parts, assemble
from sharedkd.engine.run import build_trainer
from sharedkd.errors import FAILED, Findings, NonFiniteLossError, RunError, SharedKDError
from sharedkd.modeling.balance import held

__all__ = ["as_text", "preflight"]


def preflight(
    config_file: str, overrides: Sequence[str] = (), resume: bool = False, measure: bool = True
) -> Dict[str, Any]:
    """Check a run as the training command does, and measure two steps, without writing anything.

    Args:
        config_file, overrides, resume: as the training command takes them.
        measure: False leaves out the two steps.

    Returns:
        For JSON: ``ok``; ``errors``, which stop the run, and ``warnings`` of settings that are probably a
        mistake, each with ``key``, ``value``, ``problem``, ``fix`` and the whole ``message``; and, of a
        config that can be read, what :func:`~sharedkd.engine.overview.describe` returns, and ``measured``:
        ``seconds_per_step``, ``total_seconds`` of all steps, without evaluations, and ``peak_memory_mb``
        of this process or its GPU.
    """
    findings, described = Findings(), {}
    with _quiet():
        loaded = findings.step(load, config_file, overrides, findings=findings)
        parts = findings.step(assemble, loaded, False, resume, findings=findings)
        if parts is not FAILED:
            findings.warnings += advise(parts)
            described = overview.describe(parts)
            measured = findings.step(_measure, parts) if measure and not findings.errors else None
            if measured:
                described["measured"] = measured
    return {
        "ok": not findings.errors,
        "errors": [_as_dict(x) for x in findings.errors],
        "warnings": [_as_dict(x) for x in findings.warnings],
        **described,
    }


def as_text(found: Mapping[str, Any]) -> str:
    """What :func:`preflight` returned, for the console."""
    lines = [f"{kind}: {x['message']}" for kind in ("warning", "error") for x in found[f"{kind}s"]]
    if found["errors"]:
        count = len(found["errors"])
        lines.append(f"not ready: {count} error{'s' if count > 1 else ''}, see above")
    else:
        lines.append("ready: nothing is in the way of this run")
    blocks = [overview.as_text(found)] if "data" in found else []
    return "\n\n".join([*blocks, "\n".join(lines)])


def _as_dict(error: SharedKDError) -> Dict[str, str]:
    return {
        "key": error.key,
        "value": str(error.value),
        "problem": error.problem,
        "fix": error.fix,
        "message": str(error),
    }


def _measure(parts: Parts) -> Dict[str, float]:
    """Time training steps on the first batches, with all stages on.  The model is of no use afterwards."""
    trainer = build_trainer(parts.cfg, parts)
    weights = {name: stage.full for name, stage in trainer.stages.items()}
    trainer.stage_weights = lambda: weights
    trainer.start_iter, trainer.max_iter = 0, STEPS
    parts.model.train()
    seconds = []
    for trainer.iter in range(STEPS):
        known = trainer.auto_weights if trainer.iter else {}  # as in all but the first steps
        with EventStorage(trainer.iter) as trainer.storage, held(known):
            seconds.append(_time(parts.cfg, trainer.run_step))
    return {
        "seconds_per_step": seconds[-1],
        "total_seconds": seconds[-1] * parts.cfg.train.max_iter,
        "peak_memory_mb": peak_memory_mb(),
    }


def _time(cfg: DictConfig, step: Callable[[], None]) -> float:
    start = time.perf_counter()
    try:
        step()
        if torch.device(cfg.train.device).type == "cuda":
            torch.cuda.synchronize()
    except NonFiniteLossError as e:
        raise RunError(
            "train", "first steps", f"do not work: {e}", "check init_checkpoint, teacher and data"
        ) from e
    except torch.cuda.OutOfMemoryError as e:
        raise RunError(
            "dataloader.train.total_batch_size",
            cfg.dataloader.train.get("total_batch_size"),
            "needs more memory than the GPU has",
            "use fewer images, train.amp.enabled=True or train.activation_checkpointing=True",
        ) from e
    except Exception as e:  # a detector, a mapper or a loss may raise anything
        raise RunError(
            "train",
            "first steps",
            f"fail: {type(e).__name__}: {e}",
            "correct the model or the data loader",
        ) from e
    return time.perf_counter() - start


@contextmanager
def _quiet() -> Iterator[None]:
    """A context without log messages, which the result repeats."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "sharedkd")]
    levels = [each.level for each in loggers]
    try:
        for each in loggers:
            each.setLevel(logging.CRITICAL)
        yield
    finally:
        for each, level in zip(loggers, levels):
            each.setLevel(level)
