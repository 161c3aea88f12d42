"""Batches for training, which depend on the seed alone, and for evaluation; no fault passes in silence.

The *stream* is an infinite sequence of dataset indices, one seeded permutation per epoch.  Batches
are cut from the stream before anything is loaded, and a sample's random draws are seeded from its
position in it.  Neither the number of workers, nor the number of processes, nor an interruption can
therefore change which images form batch ``b`` or how they are augmented: a resumed run sees what it
would have seen.  What takes the place of an image that cannot be read is drawn from the position, too.

Images without labels have a stream of their own.  Each batch ends with some of them, beside the same
labelled images as without them.
"""

import contextlib
import itertools
import logging
import random
from collections import defaultdict
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from detectron2.data import DatasetFromList, build_detection_test_loader
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.utils import comm
from detectron2.utils.serialize import PicklableWrapper
from torch.utils.data import DataLoader, Dataset

from sharedkd.errors import ConfigError, Findings
from sharedkd.losses.base import UNLABELLED
from sharedkd.values import check_choice, check_number, check_switch

from .coco import PSEUDO
from .faults import POLICIES, BadImages, Loaded, WorkerDied, batches_of, load, worker_error

__all__ = ["TestLoader", "TrainLoader", "build_test_loader", "build_train_loader"]

logger = logging.getLogger("detectron2.sharedkd")

KEY, TEST_KEY = "dataloader.train", "dataloader.test"  # these loaders' places in a config
TRIES = 8  # images that may be broken before the loader itself is to blame

# Keys that keep the uses of one seed apart: the order of the images, their augmentation, and what
# takes the place of a bad image.
_ORDER, _AUGMENTATION, _REPLACEMENT = 0, 1, 2
_OTHERS = 3  # is added to them for images without labels
_MOST_DEATHS = 5  # of loading processes that are replaced


def build_train_loader(
    dataset: Sequence[Dict[str, Any]],
    *,
    mapper: Callable[[Dict[str, Any]], Any],
    total_batch_size: int,
    num_workers: int = 0,
    seed: int = 0,
    aspect_ratio_grouping: bool = True,
    on_bad_image: str = "error",
    max_bad_images: Union[int, float] = 0.01,
    repeat_threshold: float = 0.0,
    pseudo_weight: float = 1.0,
    unlabelled: Sequence[Dict[str, Any]] = (),
    unlabelled_ratio: float = 1.0,
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
        on_bad_image: what to do about an image that is missing, damaged, cut short, or of another
            size than its dataset dict says: ``error`` ends the run and names the file; ``skip`` logs it,
            and another image of its orientation takes its place.  With ``skip`` loading processes
            that die are replaced, too, up to 5 times.
        max_bad_images: how many different images each training process may skip: a whole number,
            or as a fraction the share of the data set, at least one.
        repeat_threshold: images of a class that less than this share of the images have are repeated,
            sqrt(threshold / share) times on average over epochs, as by Detectron2's
            ``RepeatFactorTrainingSampler``; 0: every epoch holds each image once.
        pseudo_weight: how often an epoch holds each image with pseudo-labels on average.  0.5 halves their
            weight in the losses, on average over epochs.
        unlabelled: dataset dicts without annotations.  Their samples come after the labelled ones of a
            batch, on top of ``total_batch_size``, and have ``unlabelled=True``.
        unlabelled_ratio: how many of them come for each labelled image of a batch.

    Raises:
        ConfigError: the dataset is empty, the seed or the number of workers is negative, or the batch
            size, or the unlabelled part of it, is not a positive multiple of the number of processes.
    """
    findings = Findings()
    findings.step(check_number, f"{KEY}.num_workers", num_workers, least=0, whole=True)
    findings.step(check_switch, f"{KEY}.aspect_ratio_grouping", aspect_ratio_grouping)
    findings.step(check_number, f"{KEY}.seed", seed, least=0, whole=True)
    findings.step(check_number, f"{KEY}.total_batch_size", total_batch_size, least=1, whole=True)
    findings.step(check_choice, f"{KEY}.on_bad_image", on_bad_image, POLICIES)
    findings.step(_check_limit, max_bad_images)
    findings.step(check_number, f"{KEY}.repeat_threshold", repeat_threshold, least=0, most=1)
    findings.step(check_number, f"{KEY}.pseudo_weight", pseudo_weight, above=0)
    findings.step(check_number, f"{KEY}.unlabelled_ratio", unlabelled_ratio, above=0)
    findings.raise_errors()
    if len(dataset) == 0:
        raise ConfigError(
            f"{KEY}.dataset",
            "[]",
            "there is no image to train on",
            "check the dataset's names, its annotation file and filter_empty",
        )
    groups, others = (
        _orientations(x) if aspect_ratio_grouping else [0] * len(x) for x in (dataset, unlabelled)
    )
    bad_images = BadImages(KEY, on_bad_image, max_bad_images, len(dataset) + len(unlabelled))
    most = bad_images.most if bad_images.skips else 0
    samples = _SeededSamples(dataset, unlabelled, mapper, seed, [groups, others], most)
    repeats = _repeat_factors(dataset, repeat_threshold) if repeat_threshold else None
    if pseudo_weight != 1:
        weights = np.array([pseudo_weight if x.get(PSEUDO) else 1.0 for x in dataset])
        repeats = weights if repeats is None else repeats * weights
    loader = TrainLoader(
        samples,
        groups,
        total_batch_size,
        num_workers,
        seed,
        bad_images,
        repeats,
        others,
        unlabelled_ratio,
    )
    loader.check_batch_size()
    return loader


def build_test_loader(
    dataset: Sequence[Dict[str, Any]], *, mapper: Callable, num_workers: int = 0, **options: Any
) -> "TestLoader":
    """Detectron2's test loader, with errors that name the image.

    It passes over no image: the AP of fewer images would be another figure.

    Args:
        dataset, mapper, num_workers, options: of ``build_detection_test_loader``.
    """
    return TestLoader(
        build_detection_test_loader(
            dataset, mapper=_Loading(mapper), num_workers=num_workers, **options
        )
    )


class TestLoader:
    """The batches of ``loader``, whose samples are :class:`Loaded`, as often as it is iterated."""

    __test__ = False  # for pytest, which takes it for a test

    def __init__(self, loader: DataLoader):
        self._loader = loader
        self._bad_images = BadImages(TEST_KEY, policy=None, most=0, size=len(loader))

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[List[Any]]:
        """Yield the batches.

        Raises:
            DataError: a sample cannot be loaded, or a loading process died.
        """
        try:
            for batch in batches_of(self._loader):
                yield self._bad_images.samples_of(batch)
        except WorkerDied as death:
            raise worker_error(TEST_KEY, self._loader.num_workers, death) from None


class _Loading:
    """A mapper that returns :class:`Loaded` and never fails."""

    def __init__(self, mapper: Callable):
        self._mapper = mapper

    def __call__(self, record: Dict[str, Any]) -> Loaded:
        sample, fault = load(self._mapper, record)
        return Loaded(sample, [fault] if fault else [])


class TrainLoader:
    """An infinite iterable of batches, each a list of ``total_batch_size / processes`` samples.

    Args:
        samples: takes an image's index in the data set and its position in the stream.
        groups: the group of each image of the data set; a batch holds images of one group.
        total_batch_size: images per iteration over all processes.
        num_workers: loading processes per training process; 0 loads in the training process.
        seed: of the order of the images.
        bad_images: decides what becomes of images that cannot be loaded.
        repeats: how often an epoch holds each image on average; None: once.
        others: the group of each image without labels; their indices in ``samples`` follow.
        unlabelled_ratio: how many of them a batch has for each labelled image.

    Attributes:
        first_batch: the index of the batch that an iteration starts with, 0 unless set.  It is read
            when the first batch is asked for, not by ``iter()``: a trainer may take the iterator
            before its checkpoint tells where to go on.  Batches before it are skipped without
            loading an image.
        pin_memory: put images where a GPU can copy them from without being waited for.
        bad_images: counts the images that were passed over.
    """

    def __init__(
        self,
        samples: "_SeededSamples",
        groups: Sequence[int],
        total_batch_size: int,
        num_workers: int,
        seed: int,
        bad_images: BadImages,
        repeats: Optional[np.ndarray] = None,
        others: Sequence[int] = (),
        unlabelled_ratio: float = 1.0,
    ):
        self.first_batch = 0
        self.pin_memory = False
        self.total_batch_size = total_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.bad_images = bad_images
        self._samples = samples
        self._groups = groups
        self.repeats = repeats
        self._others = others
        self.unlabelled_ratio = unlabelled_ratio

    @property
    def unlabelled(self) -> int:
        """How many images without labels there are."""
        return len(self._others)

    @property
    def unlabelled_batch_size(self) -> int:
        """How many of them a batch has over all processes, on top of ``total_batch_size``."""
        return round(self.unlabelled_ratio * self.total_batch_size) if self._others else 0

    @property
    def mapper(self) -> Callable[[Dict[str, Any]], Any]:
        """What makes a sample of a dataset dict."""
        return self._samples.mapper

    @property
    def dataset(self) -> Sequence[Dict[str, Any]]:
        """The dataset dicts, at the end those of images without labels."""
        return self._samples.dicts

    def first_sample(self) -> Dict[str, Any]:
        """A sample as training will get it, of the first images that can be loaded.

        Raises:
            ConfigError: none of them can be, or none of those without labels.
        """
        labelled = len(self._groups)
        if self._others:
            self._first(range(labelled, labelled + self.unlabelled))
        return self._first(range(labelled))

    def samples(self, most: int) -> Iterator[Dict[str, Any]]:
        """Samples as training will get them, of images spread over those with labels.

        Args:
            most: how many; those that cannot be loaded are left out.
        """
        count = len(self._groups)
        for i in range(min(most, count)):
            loaded = self._samples[i * count // min(most, count), i]
            if loaded.sample is not None:
                yield loaded.sample

    def _first(self, indices: range) -> Dict[str, Any]:
        faults = []
        for position, index in enumerate(indices[:TRIES]):
            loaded = self._samples[index, position]
            if loaded.sample is not None:
                return loaded.sample
            faults += loaded.faults
        raise ConfigError(
            f"{KEY}.mapper",
            "",
            f"cannot load {faults[0].file} ({faults[0].problem})",
            "correct the mapper, its augmentations or the data",
        )

    def __iter__(self) -> Iterator[List[Any]]:
        """Yield this process's batches from ``first_batch`` on.

        Raises:
            ConfigError: a batch size is not a multiple of the number of processes.
            DataError: a sample cannot be loaded, too many were passed over, or a process died.
        """
        self.check_batch_size()
        start, deaths = self.first_batch, 0
        while True:
            try:
                for batch in batches_of(self._loader(start)):
                    yield self.bad_images.samples_of(batch)
                    start += 1
            except WorkerDied as death:
                deaths += 1
                # Torch has two batches on the way for each process.
                keys = itertools.islice(self._keys(start), 2 * self.num_workers)
                files = [self._samples.name(index) for batch in keys for index, _ in batch]
                error = worker_error(KEY, self.num_workers, death, files)
                if not self.bad_images.skips or deaths > _MOST_DEATHS:
                    raise error from None
                # Batch ``start`` is what it would have been, whoever loads it.
                logger.warning(
                    f"{error.problem}: new processes take over, {deaths} of {_MOST_DEATHS} times"
                )

    def _loader(self, start: int) -> DataLoader:
        return DataLoader(
            self._samples,
            batch_sampler=self._keys(start),
            num_workers=self.num_workers,
            collate_fn=_as_list,
            pin_memory=self.pin_memory,
            # Without a generator of its own, DataLoader draws from the process's global one.
            generator=torch.Generator(),
        )

    def _keys(self, start: int) -> Iterator[List[Tuple[int, int]]]:
        """This process's part of the batches, from ``start`` on."""
        rank, processes, first = comm.get_rank(), comm.get_world_size(), len(self._groups)
        labelled = _batches(self._groups, self.total_batch_size, self.seed, self.repeats)
        others: Iterator[List[Tuple[int, int]]] = itertools.repeat([])
        if self._others:
            others = _batches(self._others, self.unlabelled_batch_size, self.seed, use=_OTHERS)
        for batch, more in itertools.islice(zip(labelled, others), start, None):
            mine = [(first + index, position) for index, position in more[rank::processes]]
            yield batch[rank::processes] + mine

    def check_batch_size(self) -> None:
        """Check that the processes can share out a batch evenly.

        Raises:
            ConfigError: they cannot share out a batch, or its images without labels.
        """
        batch, processes = self.total_batch_size, comm.get_world_size()
        if batch % processes:
            raise ConfigError(
                f"{KEY}.total_batch_size",
                batch,
                f"it cannot be split evenly over {processes} process(es)",
                f"set it to a positive multiple of {processes}",
            )
        count = self.unlabelled_batch_size
        if self._others and (count < 1 or count % processes):
            raise ConfigError(
                f"{KEY}.unlabelled_ratio",
                self.unlabelled_ratio,
                f"is {count} images without labels beside {batch} labelled ones: that cannot be split "
                f"evenly over {processes} process(es)",
                f"use {processes / batch:g} or a multiple of it",
            )


class _SeededSamples(Dataset):
    """Samples by (index in the dataset, position in the stream), which seeds the augmentation.

    Args:
        unlabelled: dataset dicts of images without labels, whose indices come after those of ``dataset``.
        groups: of each dataset dict of the two; an image is replaced by one of its group.
        most: how many bad images one position may pass over.
    """

    def __init__(
        self,
        dataset: Sequence[Dict[str, Any]],
        unlabelled: Sequence[Dict[str, Any]],
        mapper: Callable,
        seed: int,
        groups: Sequence[Sequence[int]],
        most: int,
    ):
        # One serialised buffer instead of many small objects: workers share it with their parent.
        self.dicts = DatasetFromList([*dataset, *unlabelled], copy=False, serialize=True)
        self.mapper = PicklableWrapper(mapper)
        self._seed = seed
        self._labelled = len(dataset)
        # Those of images without labels are below 0.
        self._groups = np.array([*groups[0], *(-1 - x for x in groups[1])], dtype=np.int8)
        self._most = most

    def __getitem__(self, key: Tuple[int, int]) -> Loaded:
        index, position = key
        alone, faults = index >= self._labelled, []
        for candidate in self._candidates(index, position):
            with _seeded(self._seed, position, _OTHERS * alone):
                sample, fault = load(self.mapper, self.dicts[candidate])
            if fault is None:
                return Loaded({**sample, UNLABELLED: True} if alone else sample, faults)
            faults.append(fault)
            if not fault.in_image or len(faults) > self._most:
                break
        return Loaded(None, faults)

    def _candidates(self, index: int, position: int) -> Iterator[int]:
        """The image itself, then the others of its group in an order of this position alone."""
        yield index
        use = _REPLACEMENT + _OTHERS * (index >= self._labelled)
        order = np.random.SeedSequence(self._seed, spawn_key=(use, position))
        others = np.flatnonzero(self._groups == self._groups[index])
        for other in np.random.default_rng(order).permutation(others).tolist():
            if other != index:
                yield other

    def name(self, index: int) -> str:
        """The image's file, for messages."""
        return self.dicts[index].get("file_name", f"number {index} of the dataset")


def _check_limit(most: Union[int, float]) -> None:
    limit = float("inf") if isinstance(most, int) else 1
    check_number(f"{KEY}.max_bad_images", most, least=0, most=limit)


def _orientations(dataset: Sequence[Dict[str, Any]]) -> List[int]:
    """The group of each dataset dict: 1 for landscape, 0 for portrait and square."""
    if not all("height" in sample and "width" in sample for sample in dataset):
        return [0] * len(dataset)
    return [int(sample["width"] > sample["height"]) for sample in dataset]


def _repeat_factors(dataset: Sequence[Dict[str, Any]], threshold: float) -> np.ndarray:
    """How often an epoch holds each image on average by its rarest class: at least once."""
    if not all("annotations" in sample for sample in dataset):
        raise ConfigError(
            f"{KEY}.repeat_threshold",
            threshold,
            "images have no annotations",
            "use 0 for these data",
        )
    factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency
    return factors(dataset, threshold).numpy()


def _indices(
    size: int, seed: int, repeats: Optional[np.ndarray] = None, use: int = 0
) -> Iterator[int]:
    """The stream: every epoch holds each of ``range(size)`` once, or as often as ``repeats`` says.

    A fraction is drawn anew in each epoch: 1.25 is twice in one of four.
    """
    for epoch in itertools.count():
        draw = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_ORDER + use, epoch)))
        if repeats is None:
            yield from draw.permutation(size).tolist()
        else:
            times = np.floor(repeats + draw.random(size)).astype(int)
            yield from draw.permutation(np.repeat(np.arange(size), times)).tolist()


def _batches(
    groups: Sequence[int],
    size: int,
    seed: int,
    repeats: Optional[np.ndarray] = None,
    use: int = 0,
) -> Iterator[List[Tuple[int, int]]]:
    """Lists of ``size`` (index, position) pairs of one group, in the order they fill up."""
    waiting = defaultdict(list)
    for position, index in enumerate(_indices(len(groups), seed, repeats, use)):
        batch = waiting[groups[index]]
        batch.append((index, position))
        if len(batch) == size:
            del waiting[groups[index]]
            yield batch


@contextlib.contextmanager
def _seeded(seed: int, position: int, use: int = 0) -> Iterator[None]:
    """Seed the global CPU generators for one sample, and put them back as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    key = (_AUGMENTATION + use, position)
    words = np.random.SeedSequence(seed, spawn_key=key).generate_state(3)
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
