import inspect
import itertools
import random

import loaders
import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from detectron2.utils import comm
from loaders import draws, take

from sharedkd.errors import ConfigError, DataError

SIZES = [(24, 40), (40, 24), (32, 32), (20, 48), (24, 36), (48, 30), (26, 40)]  # height, width


@pytest.fixture
def dicts(tmp_path):
    records = loaders.pictures(tmp_path, SIZES)
    for record in records:
        box = {"bbox": [2, 3, 15, 17], "bbox_mode": BoxMode.XYXY_ABS}
        record["annotations"] = [{**box, "category_id": record["image_id"] % 3}]
    return records


def image_mapper():
    return DatasetMapper(
        is_train=True,
        augmentations=[
            T.ResizeShortestEdge([16, 20, 24, 28, 32], max_size=64, sample_style="choice"),
            T.RandomFlip(),
        ],
        image_format="BGR",
    )


def loader_of(dicts, **options):
    return loaders.loader_of(dicts, **{"mapper": image_mapper(), **options})


def ids(batches):
    return [[sample["image_id"] for sample in batch] for batch in batches]


def assert_same(batches, others):
    assert ids(batches) == ids(others)
    for sample, other in zip(itertools.chain(*batches), itertools.chain(*others)):
        assert torch.equal(sample["image"], other["image"])
        boxes, other_boxes = sample["instances"].gt_boxes, other["instances"].gt_boxes
        assert torch.equal(boxes.tensor, other_boxes.tensor)


def in_world(monkeypatch, rank, size):
    monkeypatch.setattr(comm, "get_rank", lambda: rank)
    monkeypatch.setattr(comm, "get_world_size", lambda: size)


def test_workers_do_not_change_the_stream(dicts):
    expected = take(loader_of(dicts, num_workers=0), 8)
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    assert_same(take(loader_of(dicts, num_workers=2), 8), expected)
    # The stream is worth comparing only if the augmentation varies.
    assert len({sample["image"].shape for batch in expected for sample in batch}) > 4


def test_seed_changes_order_and_augmentation(dicts):
    streams = [take(loader_of(dicts, mapper=draws, seed=seed), 20) for seed in (0, 1)]
    assert [[s[0] for s in batch] for batch in streams[0]] != [
        [s[0] for s in batch] for batch in streams[1]
    ]
    values = [value for stream in streams for batch in stream for s in batch for value in s[1:]]
    assert len(set(values)) == len(values)


def test_the_order_is_one_seeded_permutation_per_epoch(dicts):
    batches = take(loader_of(dicts, mapper=draws, total_batch_size=1), 2 * len(dicts))
    expected = []
    for epoch in range(2):
        seeds = np.random.SeedSequence(3, spawn_key=(0, epoch))
        expected += np.random.default_rng(seeds).permutation(len(dicts)).tolist()
    assert [sample[0] for batch in batches for sample in batch] == expected


RARE = dict(mapper=draws, repeat_threshold=0.9, aspect_ratio_grouping=False)


def test_images_of_rare_classes_are_repeated(dicts):
    """Class 0 has 3 of 7 images, 1 and 2 have 2: sqrt(0.9 / (3 / 7)) = 1.449, sqrt(0.9 / (2 / 7)) = 1.775."""
    loader = loader_of(dicts, **RARE, total_batch_size=1)
    expected = [1.4491 if i % 3 == 0 else 1.7748 for i in range(7)]
    np.testing.assert_allclose(loader.repeats, expected, rtol=1e-4)
    order = [batch[0][0] for batch in take(loader, 12_000)]
    counts = np.bincount(order, minlength=7)
    np.testing.assert_allclose(
        counts / counts.sum(), loader.repeats / loader.repeats.sum(), atol=0.006
    )


def test_repeats_depend_on_the_seed_alone_and_resume(dicts, monkeypatch):
    whole = take(loader_of(dicts, **RARE), 12)
    resumed = loader_of(dicts, **RARE, num_workers=1)
    resumed.first_batch = 5
    assert take(resumed, 7) == whole[5:]
    assert take(loader_of(dicts, **{**RARE, "seed": 4}), 12) != whole
    parts = []
    for rank in range(2):
        in_world(monkeypatch, rank, 2)
        parts.append(take(loader_of(dicts, **RARE), 12))
    assert [a + b for a, b in zip(*parts)] == whole


def test_a_threshold_that_no_class_is_below_changes_nothing(dicts):
    """1.0 at most: each image once, though in another order than without."""
    order = [
        b[0][0]
        for b in take(loader_of(dicts, **{**RARE, "repeat_threshold": 0.2}, total_batch_size=1), 14)
    ]
    assert sorted(order[:7]) == sorted(order[7:]) == list(range(7))
    with pytest.raises(ConfigError, match="dataloader.train.repeat_threshold=2"):
        loader_of(dicts, repeat_threshold=2)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_resume_is_the_tail_of_the_stream(dicts, num_workers):
    whole = take(loader_of(dicts), 9)
    resumed = loader_of(dicts, num_workers=num_workers)
    iterator = iter(resumed)  # as a trainer does before it reads the checkpoint
    resumed.first_batch = 5
    assert_same(take(iterator, 4), whole[5:])


def test_skipped_batches_load_nothing(dicts):
    loaded = []
    loader = loader_of(dicts, mapper=lambda sample: loaded.append(sample["image_id"]) or sample)
    loader.first_batch = 1000
    iterator = iter(loader)
    assert inspect.isgenerator(iterator) and loaded == []
    batch = next(iterator)
    assert loaded == [sample["image_id"] for sample in batch]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_global_generators_are_left_alone(dicts, num_workers):
    def state():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = state()
    take(loader_of(dicts, num_workers=num_workers), 3)
    assert state() == before


def test_generators_are_restored_after_a_failure(dicts):
    before = torch.get_rng_state()
    with pytest.raises(DataError, match="TypeError.*the image itself can be read"):
        take(loader_of(dicts, mapper=lambda sample: torch.rand(()) / None), 1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("grouping", [True, False])
def test_processes_share_out_the_batches_of_one(dicts, monkeypatch, grouping):
    options = {"mapper": draws, "total_batch_size": 4, "aspect_ratio_grouping": grouping}
    whole = take(loader_of(dicts, **options), 10)
    parts = []
    for rank in range(2):
        in_world(monkeypatch, rank, 2)
        parts.append(take(loader_of(dicts, **options), 10))
    for batch, *pieces in zip(whole, *parts):
        assert [len(piece) for piece in pieces] == [2, 2]
        assert sorted(pieces[0] + pieces[1]) == sorted(batch)


def test_batches_hold_one_orientation(dicts):
    batches = take(loader_of(dicts, total_batch_size=3), 12)
    landscape = [{s["width"] > s["height"] for s in batch} for batch in batches]
    assert all(len(kinds) == 1 for kinds in landscape)
    assert {True} in landscape and {False} in landscape


def test_grouping_can_be_off_or_impossible(dicts):
    ungrouped = take(loader_of(dicts, mapper=draws, aspect_ratio_grouping=False), 10)
    for sample in dicts:
        del sample["height"]
    assert take(loader_of(dicts, mapper=draws), 10) == ungrouped


def test_batch_size_must_divide_over_processes(dicts, monkeypatch):
    loader = loader_of(dicts, total_batch_size=3)
    in_world(monkeypatch, 0, 2)
    for fail in (lambda: next(iter(loader)), lambda: loader_of(dicts, total_batch_size=3)):
        with pytest.raises(
            ConfigError, match=r"^dataloader.train.total_batch_size=3: .*"
        ) as caught:
            fail()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{"total_batch_size": 0}, {"seed": -1}])
def test_impossible_options_are_config_errors(dicts, options):
    (name,) = options
    with pytest.raises(ConfigError, match=f"dataloader.train.{name}="):
        loader_of(dicts, **options)


def test_empty_dataset_is_a_config_error():
    with pytest.raises(ConfigError, match="dataloader.train.dataset="):
        loader_of([])
