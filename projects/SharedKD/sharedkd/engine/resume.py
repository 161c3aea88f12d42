"""Resuming a run: the comparison of settings, and the interrupted iteration."""

import logging
import os
import re
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Iterator, List, Optional, Sequence, Tuple, Union

from detectron2.config import LazyConfig
from detectron2.engine import hooks
from omegaconf import DictConfig, OmegaConf

from sharedkd.errors import ConfigError
from sharedkd.files import replace

from .hooks.record import read_record

__all__ = [
    "FinishStep",
    "changes",
    "check_settings",
    "check_unlabelled_count",
    "config_kept",
    "differences",
    "saved_config",
    "saved_seed",
]

logger = logging.getLogger("detectron2.sharedkd")

#: Settings that must not change on resuming: the model and its teachers, the optimizer (its saved
#: values would replace those of the config), and what decides the order of the data.
FIXED = (
    "model",
    "optimizer",
    "train.seed",
    "train.accumulate",
    "dataloader.train.total_batch_size",
    "dataloader.train.repeat_threshold",
    "dataloader.train.pseudo_weight",
    "dataloader.train.dataset.filter_empty",
    "dataloader.train.unlabelled_ratio",  # not set without such images
    # of a classic yaml:
    "MODEL",
    "INPUT",
    "SOLVER.BASE_LR",
    "SOLVER.MOMENTUM",
    "SOLVER.WEIGHT_DECAY",
    "SOLVER.CLIP_GRADIENTS",
    "DATALOADER.SAMPLER_TRAIN",
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS",
    "DATALOADER.REPEAT_THRESHOLD",
)
#: Settings that may change: a teacher is compared by the fingerprint of its weights.
FREE = (
    "model.teacher.weights",
    "model.teacher.sha256",
    "model.teacher.trust_checkpoint",
    "model.teacher.compile",
    "model.peer.init_checkpoint",
    "model.peer.sha256",
    "model.peer.trust_checkpoint",
    "train.output_dir",
    "train.force_resume",
    "OUTPUT_DIR",
    "MODEL.WEIGHTS",
    "MODEL.DEVICE",
)
#: The same holds for each of the named teachers and peers, and of those that have a mean.
NAMED = re.compile(r"^(model\.(?:teacher|peer))(?:s\.[^.]+)?(?:\.teachers\.\d+)?(?=\.)")

BEFORE = "config.before.yaml"  # the config that is being replaced


def saved_config(folder: Union[str, Path]) -> str:
    """Path of the config that the run in ``folder`` was started with; there may be no such file."""
    before = os.path.join(folder, BEFORE)
    return before if os.path.isfile(before) else os.path.join(folder, "config.yaml")


@contextmanager
def config_kept(folder: str) -> Iterator[None]:
    """A context for writing a new config.yaml into ``folder``, which Detectron2 does in place.

    A copy of the old file stays under another name until the new one is complete.
    """
    before, path = os.path.join(folder, BEFORE), Path(folder, "config.yaml")
    if path.is_file() and not os.path.isfile(before):
        replace(before, lambda f: f.write(path.read_bytes()))
    yield
    with suppress(FileNotFoundError):
        os.remove(before)


def saved_seed(folder: str) -> int:
    """The seed of the run in ``folder``, set or drawn; -1 if it is unknown."""
    try:
        return int(LazyConfig.load(saved_config(folder)).train.seed)
    except Exception:
        return -1  # check_settings reports the damaged file


Change = Tuple[str, Any, Any]  # key, value then, value now


def changes(folder: Union[str, Path], cfg: DictConfig) -> List[Change]:
    """The differences between the config of the run in ``folder`` and ``cfg``, without :data:`FREE`.

    Raises:
        ConfigError: the run's config is missing or cannot be read, or ``cfg`` cannot be saved as YAML.
    """
    then = _plain(saved_config(folder), folder, "its config.yaml")
    with tempfile.TemporaryDirectory() as temporary:
        path = os.path.join(temporary, "config.yaml")
        LazyConfig.save(cfg, path)  # which does not raise where it cannot
        now = _plain(path, folder, "the config to go on with, written as yaml,")
    found = _differences("", then, now)
    return [change for change in found if not _below(NAMED.sub(r"\1", change[0]), FREE)]


def differences(then: str, now: str) -> List[Change]:
    """The differences between the saved configs ``then`` and ``now``, with references resolved.

    Raises:
        ConfigError: one of them cannot be read.
    """
    plain = [_plain(path, os.path.dirname(path), os.path.basename(path)) for path in (then, now)]
    return list(_differences("", *plain))


def _plain(path: str, folder: Union[str, Path], what: str) -> Any:
    try:
        return OmegaConf.to_container(LazyConfig.load(path), resolve=True)
    except Exception as e:
        # An unreadable config may differ in anything.  YAML errors have several lines.
        reason = " ".join(str(e).split()) if os.path.isfile(path) else "there is none"
        problem = f"{what} cannot be read ({reason})"
        fix = "add train.force_resume=True to resume without comparing settings"
        raise ConfigError("train.output_dir", folder, problem, fix) from e


def _differences(key: str, then: Any, now: Any) -> Iterator[Change]:
    if isinstance(then, dict) and isinstance(now, dict):
        # The key `yaml` refers to the keys of a classic yaml, which are compared themselves.
        for name in dict.fromkeys(x for x in (*then, *now) if x != "yaml"):
            inner = f"{key}.{name}" if key else str(name)
            yield from _differences(inner, then.get(name, "not set"), now.get(name, "not set"))
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        for i, (a, b) in enumerate(zip(then, now)):
            yield from _differences(f"{key}.{i}", a, b)
    elif then != now and not (then != then and now != now):  # NaN is no change
        yield key, then, now


def _below(key: str, groups: Sequence[str]) -> bool:
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def check_settings(cfg: DictConfig) -> None:
    """Compare ``cfg`` with the config of the run in its output folder, and log allowed changes.

    Raises:
        ConfigError: the model, a teacher, a stage, the optimizer or the order of the data differs,
            and ``train.force_resume`` is false.
    """
    folder = cfg.train.output_dir
    try:
        found = changes(folder, cfg)
    except ConfigError as e:
        if not cfg.train.force_resume:
            raise
        logger.warning(f"train.force_resume: {e}")
        return
    fixed = [change for change in found if _below(change[0], FIXED)]
    if fixed and not cfg.train.force_resume:
        key, then, now = fixed[0]
        others = f" (and so {', '.join(x[0] for x in fixed[1:])})" if fixed[1:] else ""
        problem = f"was {_short(then)} in the run to resume{others}"
        fix = "resume with the same settings, start anew in another train.output_dir, or add "
        raise ConfigError(key, _short(now), problem, f"{fix}train.force_resume=True")
    for key, then, now in found:
        logger.warning(f"resumes with {key}={_short(now)}, which was {_short(then)}")


def check_unlabelled_count(folder: str, count: int) -> None:
    """Log if there are other images without labels than when the run in ``folder`` began."""
    try:
        then = read_record(folder).get("unlabelled_images", count)
    except ConfigError:  # a damaged file is no reason to end here
        return
    if then != count:
        logger.warning(
            f"resumes with {count} images without labels, which were {then}: they come in another order"
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class FinishStep(hooks.HookBase):
    """Runs the hooks that the interrupted iteration had not run after its checkpoint.

    Args:
        others: the hook that saves and those after it, in their order, registered before this one.
    """

    def __init__(self, others: Sequence[Optional[hooks.HookBase]]):
        self.others = others

    def before_train(self) -> None:
        trainer, start = self.trainer, self.trainer.start_iter
        trainer.iter = trainer.storage.iter = start - 1
        for hook in self.others:
            hook.after_step()
        trainer.iter = trainer.storage.iter = start
