"""Checkpoints: which a folder holds, when a run saves and deletes them, and a full disk."""

import errno
import glob
import logging
import os
import re
import zipfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Iterator, List, Optional, Union

import torch
from detectron2.engine import hooks
from detectron2.utils import comm
from torch import nn

from sharedkd.errors import ConfigError, RunError
from sharedkd.files import replace
from sharedkd.modeling.meta_arch import SharedKD
from sharedkd.weights.loading import DataCheckpointer

from .hooks.record import FILE as RECORD
from .interrupt import Stopped, StopRequest, resume_command

__all__ = [
    "Checkpoints",
    "SaveError",
    "StudentCheckpointer",
    "check_complete",
    "disk_failure",
    "has_run",
    "latest_checkpoint",
]

logger = logging.getLogger("detectron2.sharedkd")

FINAL = "model_final"

NUMBERED = re.compile(r"model_\d{7}\.pth")

POINTER = "last_checkpoint"  # Detectron2's file with the name of the newest


class StudentCheckpointer(DataCheckpointer):
    """Saves checkpoints so that a run killed while saving leaves the previous one intact.

    The ``model`` entry of a file is the plain student's state, whatever model is saved (see
    :meth:`SharedKD.state_dict`); trainer state, parameters owned by losses and peers are other entries.
    Each peer is also saved alone, as ``peers/<its name>.pth``.  Arguments are Detectron2's.
    """

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``name``.pth under a temporary name, read it again, rename it, then point to it.

        ``kwargs`` are further entries of the file.

        Raises:
            OSError: the file cannot be written; earlier checkpoints are still there.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        peers = self.model.peers if isinstance(self.model, SharedKD) else {}
        for peer, pair in peers.items():  # before the file that they must not be older than
            path = os.path.join(self.save_dir, "peers", f"{peer}.pth")
            os.makedirs(os.path.dirname(path), exist_ok=True)
            replace(path, partial(torch.save, {"model": pair.state_dict()}), verify=check_complete)
        states = {key: obj.state_dict() for key, obj in self.checkpointables.items()}
        data = {"model": self.model.state_dict(), **states, **kwargs}
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        replace(path, lambda f: torch.save(data, f), verify=check_complete)
        self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        path = os.path.join(self.save_dir, POINTER)
        replace(path, lambda f: f.write(last_filename_basename.encode()))


def check_complete(path: str) -> None:
    """Verify the checksums of the checkpoint ``path``, which costs little compared with writing it.

    Raises:
        OSError, zipfile.BadZipFile: a byte is wrong or missing.
    """
    with zipfile.ZipFile(path) as f:
        broken = f.testzip()
    if broken:
        raise OSError(f"{path}: {broken} has another checksum than when it was written")


def has_run(folder: Union[str, Path]) -> bool:
    """Whether ``folder``, which need not exist, holds a run's checkpoint."""
    if os.path.isfile(os.path.join(folder, POINTER)):
        return True
    # A run that was killed between its first checkpoint and the file that points to it.
    ours = glob.glob(os.path.join(glob.escape(str(folder)), "model_*.pth"))
    recorded = os.path.isfile(os.path.join(folder, RECORD))
    return recorded and any(zipfile.is_zipfile(path) for path in ours)


def latest_checkpoint(folder: str) -> str:
    """The path of the newest complete checkpoint in ``folder``; logs if later ones are damaged.

    Raises:
        ConfigError: there is none.
    """
    ours = [os.path.join(folder, name) for name in [*_numbered(folder), f"{FINAL}.pth"]]
    newest_first = sorted(
        filter(os.path.exists, ours), key=lambda p: (os.stat(p).st_mtime_ns, p), reverse=True
    )
    last = _last(folder)
    if last:
        newest_first = list(dict.fromkeys([os.path.join(folder, last), *newest_first]))
    problems = []
    for path in newest_first:
        name = os.path.basename(path)
        try:
            check_complete(path)
        except Exception as e:
            # A truncated file may make its reader raise anything.
            reason = "no such file" if not os.path.isfile(path) else f"cannot be read ({e})"
            problems.append(f"{name}: {reason}")
            continue
        if problems:
            logger.warning(
                f"{'; '.join(problems)}: goes on from {name} instead, the newest checkpoint that is "
                "complete"
            )
        return path
    problem = f"has no complete checkpoint ({'; '.join(problems)})"
    raise ConfigError("train.output_dir", folder, problem, "start anew in another folder")


def _numbered(folder: str) -> List[str]:
    """The numbered checkpoints of a folder, oldest first."""
    return sorted(name for name in os.listdir(folder) if NUMBERED.fullmatch(name))


def _last(folder: str) -> str:
    """The name of the checkpoint that was saved last; empty if there is none."""
    try:
        return Path(folder, POINTER).read_text().strip()
    except OSError:
        return ""


def _newest(folder: str) -> str:
    last = _last(folder)
    return f"{last} is intact" if last else "there is no checkpoint yet"


class SaveError(RunError):
    """The output folder cannot be written any more."""


#: Error numbers of a disk that is full or has become read-only.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


@contextmanager
def disk_failure(folder: str) -> Iterator[None]:
    """A context in which a full or read-only disk ends the run in ``folder`` with one line.

    Raises:
        SaveError: the disk refused a write.
    """
    try:
        yield
    except OSError as e:
        if e.errno not in DISK:
            raise
        raise SaveError(
            "train.output_dir",
            folder,
            f"cannot be written to ({e}); {_newest(folder)}",
            f"make room, then: {resume_command()}",
        ) from None


class Checkpoints(hooks.HookBase):
    """Saves every ``period`` iterations, after the last one, and when the run is asked to stop.

    A file is deleted only after a newer one is on the disk and has been read again.  In a run of
    several processes each has this hook; rank 0 writes.

    Args:
        checkpointer: saves the model and the trainer.
        stop: tells whether the run is asked to stop.
        period: iterations between two checkpoints.
        max_to_keep: how many numbered checkpoints the folder holds at most; None: all.
    """

    def __init__(
        self,
        checkpointer: StudentCheckpointer,
        stop: StopRequest,
        period: int,
        max_to_keep: Optional[int] = None,
    ):
        self.checkpointer, self.stop = checkpointer, stop
        self.period, self.max_to_keep = period, max_to_keep

    def before_train(self) -> None:
        self.saved = self.trainer.start_iter - 1  # the last iteration that is on the disk
        last = os.path.basename(self.checkpointer.get_checkpoint_file())
        self.final = self.trainer.start_iter == self.trainer.max_iter and last == f"{FINAL}.pth"

    def after_step(self) -> None:
        now, ends = self.trainer.iter + 1, self.trainer.iter + 1 == self.trainer.max_iter
        if now % self.period == 0 and self.saved < self.trainer.iter:
            self._save(f"model_{self.trainer.iter:07d}")
        if ends:
            if not self.final:
                self._save(FINAL)
        # Several processes agree where losses are read: on a GPU they wait for each other there.
        elif comm.get_world_size() == 1 or now % self.trainer.log.period == 0:
            number = self.stop.agreed(self.trainer.device)
            if number:
                self.leave(number)

    def leave(self, number: int) -> None:
        """Save the run if it has trained since the last checkpoint, log how to resume, and exit.

        Raises:
            Stopped: always; the exit code is 128 + ``number``, the signal.
            OSError: the checkpoint cannot be written.
        """
        done = min(self.trainer.iter, self.trainer.max_iter - 1)
        if self.saved < done:
            self._save(f"model_{done:07d}")
        logger.warning(
            f"Stopped after iteration {done}; {_newest(self.checkpointer.save_dir)}.  To go on: "
            f"{resume_command()}"
        )
        raise Stopped(128 + number)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """A context for an evaluation of ``model``, which a signal ends at the next batch.

        Several processes have to stop together, so their evaluation runs to its end.
        """
        if comm.get_world_size() > 1:
            yield
            return

        def leave(*unused: object) -> None:
            if self.stop.signal:
                self.leave(self.stop.signal)

        with model.register_forward_pre_hook(leave):
            yield

    def _save(self, name: str) -> None:
        saver = self.checkpointer
        saver.save(name, iteration=self.trainer.iter)
        self.saved, self.final = self.trainer.iter, name == FINAL
        if self.max_to_keep is not None and saver.save_to_disk:
            for old in _numbered(saver.save_dir)[: -self.max_to_keep]:
                os.remove(os.path.join(saver.save_dir, old))
