"""Writes a comparison for TensorBoard: settings with results (hparams), and its pictures.

The scalars of each arm, stage by stage, are in the arms' own folders, where Detectron2's writer puts
them during training; ``tensorboard --logdir DIR`` shows both.
"""

from pathlib import Path
from typing import Any, Dict, Mapping

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from sharedkd.config.plain import leaves
from sharedkd.lab.scores import TASKS, Record, finished_arms, folder_name, is_known, score_of

__all__ = ["write_events"]

_PICTURES = (".", "features", "detections")  # folders
_SETTINGS = ("model.stages.", "optimizer.lr", "train.max_iter")  # what arms may differ in


def write_events(folder: Path, record: Record) -> None:
    """Write ``folder``/tensorboard anew: an hparams session per finished arm, and its pictures."""
    target = folder / "tensorboard"
    for old in target.glob("**/events.out.tfevents.*"):
        old.unlink()
    configs = record.get("configs") or {}
    for arm in finished_arms(record):
        metrics = _metrics(arm)
        if not metrics:
            continue
        settings = {"method": arm["method"], "seed": arm["seed"]}
        config = dict(leaves(configs.get(arm["method"]) or {}))
        settings.update({k: v for k, v in config.items() if k.startswith(_SETTINGS)})
        session = target / folder_name(arm["method"]) / f"seed{arm['seed']}"
        with SummaryWriter(str(session)) as writer:
            for part in hparams(settings, metrics):
                writer.file_writer.add_summary(part)
            for name, value in metrics.items():
                writer.add_scalar(name, value, arm.get("iterations") or 0)
    pictures = [p for place in _PICTURES for p in sorted((folder / place).glob("*.[jp][pn]g"))]
    if pictures:
        with SummaryWriter(str(target)) as writer:
            for path in pictures:
                with Image.open(path) as image:
                    pixels = np.asarray(image.convert("RGB"))
                place = path.parent.name if path.parent != folder else "comparison"
                writer.add_image(f"{place}/{path.stem}", pixels, dataformats="HWC")


def _metrics(arm: Mapping[str, Any]) -> Dict[str, float]:
    """AP and cost of a finished arm."""
    found = {f"hparam/{title}_AP": score_of(arm["results"], t) for t, title in TASKS.items()}
    for cost in ("seconds_per_step", "peak_memory_mb"):
        found[f"hparam/{cost}"] = arm.get(cost)
    return {k: float(v) for k, v in found.items() if is_known(v)}
