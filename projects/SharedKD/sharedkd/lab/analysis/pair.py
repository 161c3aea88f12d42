"""A pair at several points of its training, and its maps of validation images."""

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from detectron2.utils.env import seed_all_rng

from sharedkd.config import construct, load_config
from sharedkd.config.build import makes, target_of
from sharedkd.engine.checkpoint import has_run
from sharedkd.engine.hooks.record import read_record
from sharedkd.engine.parts import build_parts
from sharedkd.errors import ConfigError
from sharedkd.losses.base import Maps
from sharedkd.losses.distance import Distance
from sharedkd.modeling.preparation import size_divisibility
from sharedkd.modeling.taps import FeatureTap, common_pixels, run_pyramid
from sharedkd.modeling.teachers import FrozenTeacher
from sharedkd.weights.loading import fingerprint, load_trained

__all__ = ["TAPS", "Checkpoint", "Pair", "saved_checkpoints"]

TAPS = ("fpn", "backbone")


@dataclass(frozen=True)
class Checkpoint:
    """The student at some point."""

    name: str
    file: Optional[Path] = None  #: None: the initial weights
    iteration: Optional[int] = None  #: number of finished iterations; None if unknown


class Pair:
    """Student and teacher of a config in float32, in evaluation mode, the student with any weights.

    ``config_file`` is of a pair: a config, or the config.yaml of a run.
    """

    def __init__(self, config_file: str, overrides: Sequence[str] = ()):
        self.cfg = cfg = load_config(config_file, overrides, keep_teacher=True)
        teacher = cfg.model.get("teacher")
        if not makes(teacher, FrozenTeacher):
            kind = None if teacher is None else target_of(teacher).__name__
            problem = "there is no frozen teacher to compare with"
            raise ConfigError("model.teacher", kind, problem, "use a pair's config")
        # As Detectron2 computes: speed does not matter here.
        cfg.train.amp.enabled = cfg.train.compile = cfg.train.activation_checkpointing = False
        cfg.model.teacher.precision = "float32"
        if cfg.train.seed >= 0:
            seed_all_rng(cfg.train.seed)  # as the run did: the same initial weights
        parts = build_parts(cfg)
        if parts.inherited:
            with suppress(ConfigError):  # the training data may be elsewhere
                parts.loader = construct(cfg.dataloader.train, "dataloader.train")
                parts.fit()
        self.model = parts.model.eval()
        self._tap = FeatureTap(self.model.student, self.model.pyramid)
        self._initial = {k: x.clone() for k, x in self.model.student.state_dict().items()}
        #: The folder of its run; None if it was not trained yet.
        beside = Path(config_file).name == "config.yaml"
        folder = Path(config_file).parent if beside else Path(cfg.train.output_dir)
        self.folder = folder if has_run(folder) else None
        known = read_record(self.folder).get("initial_weights") if self.folder else None
        #: Whether the run started from these initial weights; None if unknown.
        self.initial_is_the_runs = known and known == fingerprint(self.model.student)

    @property
    def normalize(self) -> str:
        """``normalize`` of the pair's first loss with a distance, or the project's default."""
        distances = (getattr(loss, "distance", None) for loss in self.model.losses.values())
        found = [x.normalize for x in distances if isinstance(x, Distance)]
        return found[0] if found else "instance"

    def load(self, checkpoint: Checkpoint) -> None:
        """Give the student the weights of ``checkpoint``; a ConfigError if they do not fit."""
        student, file, trust = self.model.student, checkpoint.file, self.cfg.train.trust_checkpoint
        if file is None:
            student.load_state_dict(self._initial)
        else:
            load_trained(student, str(file), "--checkpoint", trust)

    @torch.no_grad()
    def maps(self, record: Dict[str, Any]) -> Tuple[Maps, Maps]:
        """Student's and teacher's maps of a mapped record, tap -> stride -> (1, C, H, W)."""
        student = self.model.student
        taps = frozenset(TAPS)
        with self._tap.capture(taps) as ours:
            run_pyramid(student, [record], self.model.pyramid)
        theirs = self.model.teacher.features(
            [record], taps, self.model.input_format, size_divisibility(student)
        )
        return common_pixels(ours, theirs)


def saved_checkpoints(folder: Path, last: int) -> List[Checkpoint]:
    """The checkpoints of a run of ``last`` iterations in the order of training, each state once."""
    states = {
        int(number[1]) + 1: path
        for path in sorted(folder.glob("model_*.pth"))
        if (number := re.fullmatch(r"model_(\d+)", path.stem))
    }
    final = folder / "model_final.pth"
    if final.exists():
        states = {i: path for i, path in states.items() if i < last} | {last: final}
    return [Checkpoint(f"iteration {i}", path, i) for i, path in states.items()]
