"""The frozen teacher's maps on disk: of an image that was seen before, the teacher does not run."""

import errno
import logging
import os
import shutil
import uuid
from hashlib import blake2b
from typing import Callable, Dict, FrozenSet, List, Mapping, Optional, Sequence

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checkpoints.files import replace
from ..losses.base import Maps

__all__ = ["DIGEST", "KEPT_BYTES", "TeacherCache", "image_digest", "room"]

logger = logging.getLogger("detectron2.sharedkd")

DIGEST = "image_digest"  # the key of a record that has its image's digest
KEPT_BYTES = 2  # of each number: float16 or bfloat16
KEPT_FREE = 0.05  # of the disk, so that checkpoints can still be written


def image_digest(image: Tensor) -> str:
    """32 hexadecimal digits that tell an image from all others.

    Args:
        image: (C, H, W) of any type, as a mapper makes it; a GPU that holds it is waited for.
    """
    x = image.detach().cpu().contiguous()
    digest = blake2b(f"{x.dtype} {tuple(x.shape)} ".encode(), digest_size=16)
    digest.update(x.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def room(folder: str) -> int:
    """Bytes that maps may still take on the disk of ``folder``, which exists."""
    disk = shutil.disk_usage(folder)
    return int(disk.free - KEPT_FREE * disk.total)


class TeacherCache:
    """Maps by the image that they are of, one file for each image and tap.

    A file appears complete or not at all, and what is in it depends on its name and on the teacher
    alone: several processes and runs may share a folder.  One that cannot be read is made anew.  Where
    nothing can be written, because the disk is full or for any other reason, that is logged once, and
    what is there is still read.

    Numbers are rounded to float16, those of bfloat16 are kept as they are; a map with numbers beyond
    float16's range, 65504, is kept in bfloat16.

    Args:
        folder: of the maps of one teacher in one precision; it need not exist.
    """

    def __init__(self, folder: str):
        self.folder = folder
        self._writes = True

    def path(self, tap: str, name: str) -> str:
        """The file of an image's maps: ``<folder>/<tap>/<two digits>/<name>.safetensors``.

        Args:
            tap: where they are taken.
            name: of the image, beginning with its digest.
        """
        return os.path.join(self.folder, tap, name[:2], f"{name}.safetensors")

    def size(self, tap: str, endings: Sequence[str]) -> int:
        """Bytes of the files of ``tap`` that belong to names with one of these ``endings``."""
        files = tuple(f"{ending}.safetensors" for ending in endings)
        return sum(
            os.stat(os.path.join(folder, name)).st_size
            for folder, _, names in os.walk(os.path.join(self.folder, tap))
            for name in names
            if name.endswith(files)
        )

    def maps(
        self,
        names: Sequence[str],
        strides: Mapping[str, Sequence[int]],
        compute: Callable[[int, FrozenSet[str]], Maps],
    ) -> List[Maps]:
        """The maps of a batch, read where they are there, else computed, rounded and written.

        They are the rounded ones in either case: what a run learns from does not depend on what was
        there before.

        Args:
            names: of the images, see :meth:`path`.
            strides: tap -> the strides of its maps.
            compute: gives the maps (1, C, H, W) of an image, by its place in the batch, at some taps.

        Returns:
            for each image, tap -> stride -> (H, W, C), in float16 or bfloat16; what was read is on the
            CPU, mapped into memory.
        """
        found = []
        for i, name in enumerate(names):
            maps = {tap: self._read(self.path(tap, name), strides[tap]) for tap in strides}
            missing = frozenset(tap for tap, levels in maps.items() if levels is None)
            if missing:
                for tap, levels in compute(i, missing).items():
                    maps[tap] = {stride: _rounded(x) for stride, x in levels.items()}
                    self._write(self.path(tap, name), maps[tap])
            found.append(maps)
        return found

    def _read(self, path: str, strides: Sequence[int]) -> Optional[Dict[int, Tensor]]:
        """None if there is no such file, or none that can be read."""
        try:
            with safe_open(path, framework="pt") as f:
                return {stride: f.get_tensor(str(stride)) for stride in strides}
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError) as e:
            reason = " ".join(str(e).split())
            logger.warning(f"{path} cannot be read ({reason}): the teacher computes it again")
            return None

    def _write(self, path: str, maps: Dict[int, Tensor]) -> None:
        if not self._writes:
            return
        data = safetensors.torch.save({str(stride): x.cpu() for stride, x in maps.items()})
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            if room(self.folder) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            # Locks do not reach across all file systems: each writer has a file of its own.
            replace(path, lambda f: f.write(data), f".{uuid.uuid4().hex}")
        except OSError as e:
            self._writes = False
            logger.warning(
                f"model.teacher.cache: {self.folder} takes no more maps ({e.strerror or e}); training goes "
                "on, and the teacher runs where they are missing"
            )


def _rounded(x: Tensor) -> Tensor:
    """(1, C, H, W) in any precision to (H, W, C) in half of it, which is how convolutions write it."""
    x = x[0].permute(1, 2, 0)
    half = x if x.dtype is torch.bfloat16 else x.half()
    return (half if half.isfinite().all() else x.bfloat16()).contiguous()
