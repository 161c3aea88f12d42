"""Training batches that depend on the seed alone: a resumed run sees what it would have seen.

The *stream* is an infinite sequence of dataset indices, one seeded permutation per epoch.  Batches
are cut from the stream before anything is loaded, and a sample's random draws are seeded from its
position in it.  Neither the number of workers, nor the number of processes, nor an interruption can
therefore change which images form batch ``b`` or how they are augmented.
"""

import contextlib
import itertools
import random
from collections import defaultdict
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple

import numpy as np
import torch
from detectron2.data import DatasetFromList
from detectron2.utils import comm
from detectron2.utils.serialize import PicklableWrapper
from torch.utils.data import DataLoader, Dataset

from sharedkd.errors import ConfigError

__all__ = ["TrainLoader", "build_train_loader"]

# Keys that keep the two uses of one seed apart: the order of the images, and their augmentation.
_ORDER, _AUGMENTATION = 0, 1


def build_train_loader(
    dataset: Sequence[Dict[str, Any]],
    *,
    mapper: Callable[[Dict[str, Any]], Any],
    total_batch_size: int,
    num_workers: int = 0,
    seed: int = 0,
    aspect_ratio_grouping: bool = True,
) -> "TrainLoader":
    """Build the reproducible counterpart of Detectron2's training loader.

    Args:
        dataset: dataset dicts in Detectron2's format.
        mapper: turns a dataset dict into a sample.  It may draw from the global CPU generators of
            Python, NumPy and Torch, and must keep no state from one call to the next.
        total_batch_size: images per iteration over all processes.
        num_workers: loading processes per training process; 0 loads in the training process.
        seed: non-negative seed of the order and the augmentation.
        aspect_ratio_grouping: keep landscape images apart from the others, which saves padding.
            Ignored where a dataset dict has no "height" or "width".

    Raises:
        ConfigError: the dataset is empty, the seed is negative, or the batch size is not a positive
            multiple of the number of processes.
    """
    if len(dataset) == 0:
        raise ConfigError(
            "dataloader.train.dataset",
            "[]",
            "there is no image to train on",
            "check the dataset's names, its annotation file and filter_empty",
        )
    if seed < 0:
        raise ConfigError("dataloader.train.seed", seed, "it is negative", "set it to 0 or more")
    _check_batch_size(total_batch_size)
    groups = _orientations(dataset) if aspect_ratio_grouping else [0] * len(dataset)
    samples = _SeededSamples(dataset, mapper, seed)
    return TrainLoader(samples, groups, total_batch_size, num_workers, seed)


class TrainLoader:
    """An infinite iterable of batches, each a list of ``total_batch_size / processes`` samples.

    Attributes:
        first_batch: the index of the batch that an iteration starts with, 0 unless set.  It is read
            when the first batch is asked for, not by ``iter()``: a trainer may take the iterator
            before its checkpoint tells where to go on.  Batches before it are skipped without
            loading an image.
        pin_memory: put images where a GPU can copy them from without being waited for.
    """

    def __init__(
        self,
        samples: "_SeededSamples",
        groups: Sequence[int],
        total_batch_size: int,
        num_workers: int,
        seed: int,
    ):
        self.first_batch = 0
        self.pin_memory = False
        self.total_batch_size = total_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self._samples = samples
        self._groups = groups

    def __iter__(self) -> Iterator[List[Any]]:
        """Yield this process's batches from ``first_batch`` on.

        Raises:
            ConfigError: the batch size is not a multiple of the number of processes.
            RuntimeError: a sample cannot be loaded; the message names its file.
        """
        _check_batch_size(self.total_batch_size)
        batches = itertools.islice(
            _batches(self._groups, self.total_batch_size, self.seed), self.first_batch, None
        )
        rank, processes = comm.get_rank(), comm.get_world_size()
        yield from DataLoader(
            self._samples,
            batch_sampler=(batch[rank::processes] for batch in batches),
            num_workers=self.num_workers,
            collate_fn=_as_list,
            pin_memory=self.pin_memory,
            # Without a generator of its own, DataLoader draws from the process's global one.
            generator=torch.Generator(),
        )


class _SeededSamples(Dataset):
    """Samples by (index in the dataset, position in the stream), which seeds the augmentation."""

    def __init__(self, dataset: Sequence[Dict[str, Any]], mapper: Callable, seed: int):
        # One serialised buffer instead of many small objects: workers share it with their parent.
        self._dicts = DatasetFromList(list(dataset), copy=False, serialize=True)
        self._mapper = PicklableWrapper(mapper)
        self._seed = seed

    def __getitem__(self, key: Tuple[int, int]) -> Any:
        index, position = key
        sample = self._dicts[index]
        name = sample.get("file_name", f"number {index} of the dataset")
        with _seeded(self._seed, position):
            try:
                mapped = self._mapper(sample)
            except Exception as error:
                raise RuntimeError(
                    f"cannot load sample {name}: {type(error).__name__}: {error}"
                ) from error
        if mapped is None:
            raise RuntimeError(f"cannot load sample {name}: the mapper returned None")
        return mapped


def _check_batch_size(total_batch_size: int) -> None:
    processes = comm.get_world_size()
    if total_batch_size <= 0 or total_batch_size % processes:
        raise ConfigError(
            "dataloader.train.total_batch_size",
            total_batch_size,
            f"it cannot be split evenly over {processes} process(es)",
            f"set it to a positive multiple of {processes}",
        )


def _orientations(dataset: Sequence[Dict[str, Any]]) -> List[int]:
    """The group of each dataset dict: 1 for landscape, 0 for portrait and square."""
    if not all("height" in sample and "width" in sample for sample in dataset):
        return [0] * len(dataset)
    return [int(sample["width"] > sample["height"]) for sample in dataset]


def _indices(size: int, seed: int) -> Iterator[int]:
    """The stream: every epoch holds each of ``range(size)`` once."""
    for epoch in itertools.count():
        order = np.random.SeedSequence(seed, spawn_key=(_ORDER, epoch))
        yield from np.random.default_rng(order).permutation(size).tolist()


def _batches(groups: Sequence[int], size: int, seed: int) -> Iterator[List[Tuple[int, int]]]:
    """Lists of ``size`` (index, position) pairs of one group, in the order they fill up."""
    waiting = defaultdict(list)
    for position, index in enumerate(_indices(len(groups), seed)):
        batch = waiting[groups[index]]
        batch.append((index, position))
        if len(batch) == size:
            del waiting[groups[index]]
            yield batch


@contextlib.contextmanager
def _seeded(seed: int, position: int) -> Iterator[None]:
    """Seed the global CPU generators for one sample, and put them back as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence(seed, spawn_key=(_AUGMENTATION, position)).generate_state(3)
    try:
        random.seed(int(words[0]))
        np.random.seed(int(words[1]))
        # torch.manual_seed would also reseed the GPU, where the training process draws.
        torch.default_generator.manual_seed(int(words[2]))
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _as_list(samples: List[Any]) -> List[Any]:
    return samples
