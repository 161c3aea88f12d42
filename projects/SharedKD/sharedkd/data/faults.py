"""Loading that fails: images that cannot be read, and loading processes that die.

Nothing is raised inside a loading process, which would cut an error into pieces: what it could not
load it hands over as :class:`Loaded`, and the training process says so when that sample's turn comes.
"""

import logging
import math
import os
import signal
from multiprocessing.process import BaseProcess
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Union,
)

from detectron2.data.detection_utils import check_image_size
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from sharedkd.errors import DataError

from .images import read_image

if TYPE_CHECKING:
    from torch.utils.data.dataloader import _BaseDataLoaderIter

__all__ = ["POLICIES", "BadImages", "Fault", "Loaded", "WorkerDied", "batches_of", "load"]

logger = logging.getLogger("detectron2.sharedkd")

POLICIES = ("error", "skip")
AGAIN = "then go on with --resume"

_MOST_LOGGED = 20  # bad images that are named in the log
_MOST_NAMED = 16  # files in one message
_CAUSES = {
    signal.SIGKILL: ", as the system does when memory runs out",
    signal.SIGBUS: ", as happens when shared memory is full",
    signal.SIGSEGV: ", a crash in native code, perhaps by one of these images",
}


class Fault(NamedTuple):
    """Why a sample could not be loaded.

    Args:
        file: the image, or what else the sample is known by.
        problem: what was raised, in words.
        in_image: whether the image itself is at fault, not what is done with it.
    """

    file: str
    problem: str
    in_image: bool


class Loaded(NamedTuple):
    """A ``sample``, None if there is none, and the ``faults`` of the images tried before it."""

    sample: Any
    faults: Sequence[Fault]


class WorkerDied(Exception):
    """A loading process ended on its own; the message says how."""


def load(
    mapper: Callable[[Dict[str, Any]], Any], record: Dict[str, Any]
) -> Tuple[Any, Optional[Fault]]:
    """(what ``mapper`` makes of the dataset dict ``record``, why it could not); one is None."""
    name = str(record.get("file_name", record.get("image_id", "without file_name")))
    try:
        sample = mapper(record)
    except Exception as e:
        return None, Fault(name, f"{type(e).__name__}: {e}", _is_unreadable(record, mapper))
    if sample is None:
        return None, Fault(name, "the mapper returned None", False)
    return sample, None


def _is_unreadable(record: Dict[str, Any], mapper: Callable) -> bool:
    """Whether the image alone, without the mapper, is missing, damaged or of another size."""
    known = {k: record[k] for k in ("file_name", "width", "height") if k in record}
    if "file_name" not in known:
        return False
    try:
        image_range = getattr(mapper, "image_range", None)
        check_image_size(known, read_image(known["file_name"], "RGB", image_range))
    except Exception:
        return True
    return False


class BadImages:
    """What to do with bad images: keeps count of them, and says when there are too many.

    Args:
        key: the loader's place in the config.
        policy: ``error``, or ``skip``: pass over them; None: an error that cannot be chosen away.
        most: how many different images may be passed over: a whole number, or as a fraction the
            share of the data set, at least one.
        size: of the data set.
    """

    def __init__(self, key: str, policy: Optional[str], most: Union[int, float], size: int):
        self.key, self.policy = key, policy
        self.most = most if isinstance(most, int) else max(1, math.ceil(most * size))
        self.files: Dict[str, str] = {}

    @property
    def skips(self) -> bool:
        return self.policy == "skip"

    def samples_of(self, batch: Sequence[Loaded]) -> List[Any]:
        """The samples of a ``batch``; images that were passed over for them are counted.

        Raises:
            DataError: one could not be loaded and may not be passed over, or there were too many.
        """
        for loaded in batch:
            for fault in loaded.faults:
                self._note(fault)
            if loaded.sample is None:
                last = loaded.faults[-1]
                raise DataError(
                    f"{self.key}.dataset",
                    last.file,
                    f"cannot be loaded ({last.problem})",
                    f"{self._fix(last)}; {AGAIN}",
                )
        return [loaded.sample for loaded in batch]

    def _fix(self, fault: Fault) -> str:
        if not fault.in_image:
            return "the image itself can be read: correct its annotations or the mapper"
        if self.policy is None:
            return "repair or replace the image: evaluation passes over none"
        if self.skips:
            return "no other image can take its place: repair the data"
        return f"repair or replace the image, or use {self.key}.on_bad_image=skip"

    def _note(self, fault: Fault) -> None:
        if not (self.skips and fault.in_image) or fault.file in self.files:
            return
        self.files[fault.file] = fault.problem
        count = len(self.files)
        if count > self.most:
            raise DataError(
                f"{self.key}.max_bad_images",
                self.most,
                f"{count} images could not be loaded, the last was {fault.file} ({fault.problem})",
                f"repair them, or raise the limit; {AGAIN}",
            )
        if count <= _MOST_LOGGED:
            logger.warning(
                f"{self.key}.on_bad_image=skip: another image takes the place of {fault.file} "
                f"({fault.problem}); {count} passed over so far, {self.most} at most"
            )
        if count == _MOST_LOGGED:
            logger.warning(f"{self.key}.on_bad_image=skip: further ones are only counted")


def batches_of(loader: DataLoader) -> Iterator[Any]:
    """The batches of one pass over ``loader``.

    Raises:
        WorkerDied: one of its processes died.
    """
    iterator = iter(loader)
    _watch_here_only(iterator)
    try:
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except Exception as e:
                ends = [_end_of(w) for w in getattr(iterator, "_workers", ()) if w.exitcode]
                if not ends:
                    raise
                raise WorkerDied(" and ".join(ends)) from e
            yield batch
    finally:
        getattr(iterator, "_shutdown_workers", lambda: None)()


def _watch_here_only(iterator: "_BaseDataLoaderIter") -> None:
    """Let a worker's death be found where a batch is waited for.

    Torch also raises it from a signal handler, anywhere in the training process: in the middle of a
    step, which could then neither be finished nor repeated.
    """
    if getattr(iterator, "_worker_pids_set", False):
        signal_handling._remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False


def _end_of(worker: BaseProcess) -> str:
    if worker.exitcode > 0:
        return f"loading process {worker.pid} ended with status {worker.exitcode}"
    try:
        number = signal.Signals(-worker.exitcode)
        return f"loading process {worker.pid} was ended by {number.name}{_CAUSES.get(number, '')}"
    except ValueError:
        return f"loading process {worker.pid} was ended by signal {-worker.exitcode}"


def worker_error(key: str, workers: int, death: Exception, files: Sequence[str] = ()) -> DataError:
    """The error for a death of one of ``workers`` processes while they loaded ``files``."""
    names = ", ".join(map(os.fspath, files[:_MOST_NAMED])) + (", ..." * (len(files) > _MOST_NAMED))
    return DataError(
        f"{key}.num_workers",
        workers,
        f"{death}" + (f", while these were loaded: {names}" if files else ""),
        f"use fewer workers or smaller batches, or allow for more memory and shared memory "
        f"(of a container: docker run --shm-size); {AGAIN}",
    )
