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
from sharedkd.lab.scores import TASKS, folder_name

__all__ = ["write_events"]

FOLDER = "tensorboard"
_PICTURES = (".", "features", "detections")  # folders
_SETTINGS = ("model.stages.", "optimizer.lr", "train.max_iter")  # what arms may differ in


def write_events(folder: Path, record: Mapping[str, Any]) -> None:
    """Write DIR/tensorboard anew: an hparams session per finished arm, and all pictures of DIR.

    Args:
        folder: of the comparison.
        record: as :mod:`sharedkd.lab.scores` describes it.
    """
    target = folder / FOLDER
    for old in target.glob("**/events.out.tfevents.*"):
        old.unlink()
    configs = record.get("configs") or {}
    for arm in record["arms"]:
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
    if arm["status"] != "finished":
        return {}
    found = {f"hparam/{TASKS[t]}_AP": (arm["results"].get(t) or {}).get("AP") for t in TASKS}
    found["hparam/seconds_per_step"] = arm.get("seconds_per_step")
    found["hparam/peak_memory_mb"] = arm.get("peak_memory_mb")
    return {k: float(v) for k, v in found.items() if v is not None and np.isfinite(v)}
