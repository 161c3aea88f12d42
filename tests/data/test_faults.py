"""Images that cannot be read and loading processes that die: named, or passed over and counted."""

import itertools
import logging
import os
import signal

import loaders
import numpy as np
import pytest
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.utils import comm
from loaders import take
from PIL import Image
from tiny import arguments
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from sharedkd.data.faults import WorkerDied, batches_of, load
from sharedkd.data.images import ImageMapper
from sharedkd.data.loader import build_test_loader
from sharedkd.engine.launch import launch
from sharedkd.engine.run import run
from sharedkd.errors import ConfigError, DataError
from sharedkd.lab.shapes import make_shapes

COUNT, HEIGHT, WIDTH = 12, 24, 40


@pytest.fixture
def dicts(tmp_path):
    sizes = [(HEIGHT, WIDTH) if i % 3 else (WIDTH, HEIGHT) for i in range(COUNT)]
    return loaders.pictures(tmp_path, sizes)


def mapper():
    return DatasetMapper(is_train=False, augmentations=[T.RandomFlip()], image_format="RGB")


def draws(record):
    """The image has been read before."""
    mapper()(record)
    return loaders.draws(record)


@pytest.fixture
def quick(monkeypatch):
    """Torch looks for dead workers every 5 seconds."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.3,))


def warnings(log):
    # A record that also reaches the root logger is caught twice.
    records = dict.fromkeys(r for r in log.records if r.levelno == logging.WARNING)
    return [r.message for r in records]


def loader_of(dicts, **options):
    return loaders.loader_of(dicts, **{"mapper": mapper(), **options})


def cut(path, share=0.6):
    data = open(path, "rb").read()
    open(path, "wb").write(data[: int(share * len(data))])


def gone(path):
    os.remove(path)


def of_another_size(path):
    Image.new("RGB", (WIDTH + 1, HEIGHT)).save(path)


def text(path):
    open(path, "w").write("no image")


def empty(path):
    open(path, "w").close()


FAULTS = {
    cut: "OSError: image file is truncated",
    gone: "FileNotFoundError",
    of_another_size: "SizeMismatchError: Mismatched image shape",
    text: "UnidentifiedImageError",
    empty: "UnidentifiedImageError",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_bad_image_is_named(dicts, fault):
    for record in dicts:
        fault(record["file_name"])
    first = next(iter(loader_of(dicts, mapper=lambda r: r)))[0]["file_name"]
    with pytest.raises(DataError, match=FAULTS[fault]) as caught:
        take(loader_of(dicts), 1)
    message = str(caught.value)
    assert message.startswith(f"dataloader.train.dataset={first}: cannot be loaded (")
    assert "on_bad_image=skip" in message and "--resume" in message
    assert "\n" not in message and "Traceback" not in message


@pytest.mark.parametrize("progressive", [False, True])
def test_no_image_is_half_grey_wherever_it_is_cut(dicts, progressive):
    record = dicts[1]
    smooth = np.linspace(0, 255, HEIGHT * WIDTH * 3).reshape(HEIGHT, WIDTH, 3).astype(np.uint8)
    Image.fromarray(smooth).save(record["file_name"], progressive=progressive)
    whole = open(record["file_name"], "rb").read()
    assert load(mapper(), record)[1] is None
    for length in [*range(0, len(whole) - 9, 7), *range(len(whole) - 9, len(whole))]:
        open(record["file_name"], "wb").write(whole[:length])
        sample, fault = load(mapper(), record)
        assert sample is None and fault.in_image


def test_a_deep_image_of_unknown_range_is_at_fault_itself(tmp_path):
    path = tmp_path / "a.tif"
    Image.fromarray(np.full((HEIGHT, WIDTH), 500, np.int32)).save(path)
    options = dict(is_train=False, augmentations=[], image_format="RGB")
    record = dict(file_name=str(path), height=HEIGHT, width=WIDTH)
    sample, fault = load(ImageMapper(**options), record)
    assert sample is None and fault.in_image and "set data.image_range" in fault.problem
    assert load(ImageMapper(image_range=(0, 999), **options), record)[1] is None


def test_the_run_stops_where_the_bad_image_is_due_not_where_it_is_prefetched(dicts):
    order = [
        r["image_id"] for batch in take(loader_of(dicts, mapper=lambda r: r), 6) for r in batch
    ]
    cut(dicts[order[7]]["file_name"])
    iterator = iter(loader_of(dicts, num_workers=2))
    assert [[s["image_id"] for s in next(iterator)] for _ in range(3)] == [
        order[0:2],
        order[2:4],
        order[4:6],
    ]
    with pytest.raises(DataError, match=dicts[order[7]]["file_name"]):
        next(iterator)


def skipping(dicts, **options):
    return loader_of(dicts, **{"on_bad_image": "skip", "max_bad_images": 4, **options})


def test_another_image_takes_the_place_and_nothing_else_moves(dicts):
    before = take(loader_of(dicts, mapper=draws), 18)
    bad = {2, 7}
    for index in bad:
        cut(dicts[index]["file_name"])
    after = take(skipping(dicts, mapper=draws), 18)
    replaced = 0
    for old, new in zip(itertools.chain(*before), itertools.chain(*after)):
        assert old[1:] == new[1:]  # the draws belong to the position
        if old[0] in bad:
            replaced += 1
            assert new[0] not in bad
            assert (new[0] % 3 == 0) == (old[0] % 3 == 0)  # the same orientation
        else:
            assert new[0] == old[0]
    assert replaced == 6  # two images in three epochs
    taken = [n[0] for o, n in zip(itertools.chain(*before), itertools.chain(*after)) if o[0] in bad]
    assert len(set(taken)) > 1  # not always the same one


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_run_skips_alike(dicts, num_workers):
    for index in (2, 7):
        cut(dicts[index]["file_name"])
    whole = take(skipping(dicts, mapper=draws), 14)
    resumed = skipping(dicts, mapper=draws, num_workers=num_workers)
    resumed.first_batch = 9
    assert take(resumed, 5) == whole[9:]


def test_ranks_stay_in_step(dicts, monkeypatch):
    for index in (2, 7):
        cut(dicts[index]["file_name"])
    whole = take(skipping(dicts, mapper=draws, total_batch_size=4), 8)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda: rank)
        parts.append(take(skipping(dicts, mapper=draws, total_batch_size=4), 8))
    for batch, first, second in zip(whole, *parts):
        assert (batch[0::2], batch[1::2]) == (first, second)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skips_are_counted_and_logged_once(dicts, num_workers, sharedkd_log):
    for index in (2, 7):
        cut(dicts[index]["file_name"])
    loader = skipping(dicts, num_workers=num_workers)
    take(loader, 30)  # five epochs
    assert set(loader.bad_images.files) == {dicts[2]["file_name"], dicts[7]["file_name"]}
    lines = warnings(sharedkd_log)
    assert len(lines) == 2 and all("on_bad_image" in line for line in lines)
    assert sum(dicts[2]["file_name"] in line for line in lines) == 1
    assert "2 passed over so far, 4 at most" in lines[1] and "is truncated" in lines[1]


@pytest.mark.parametrize("limit, allowed", [(0, 0), (0.25, 3), (0.01, 1)])
def test_the_limit_counts_images_or_is_a_share(dicts, limit, allowed):
    for record in dicts[:allowed]:
        cut(record["file_name"])
    options = dict(max_bad_images=limit, aspect_ratio_grouping=False)
    loader = skipping(dicts, **options)
    take(loader, 12)
    assert len(loader.bad_images.files) == allowed
    cut(dicts[allowed]["file_name"])
    with pytest.raises(DataError) as caught:
        take(skipping(dicts, **options), 12)
    message = str(caught.value)
    assert message.startswith(f"dataloader.train.max_bad_images={allowed}: {allowed + 1} images")
    assert "raise the limit" in message and "the last was /" in message


def test_no_image_left(dicts):
    for record in dicts:
        cut(record["file_name"])
    with pytest.raises(DataError, match="no other image can take its place"):
        take(skipping(dicts, max_bad_images=1.0), 1)


def test_what_is_not_the_images_fault_is_never_skipped(dicts):
    def broken(record):
        return record["nothing"]

    with pytest.raises(DataError, match="KeyError: 'nothing'.*correct its annotations"):
        take(skipping(dicts, mapper=broken), 1)
    with pytest.raises(DataError, match="the mapper returned None"):
        take(skipping(dicts, mapper=lambda record: None), 1)


@pytest.mark.parametrize(
    "options", [{"on_bad_image": "ignore"}, {"max_bad_images": -1}, {"max_bad_images": 1.5}]
)
def test_bad_options(dicts, options):
    (name,) = options
    with pytest.raises(ConfigError, match=f"dataloader.train.{name}="):
        loader_of(dicts, **options)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_evaluation_passes_over_no_image(dicts, num_workers):
    loader = build_test_loader(dicts, mapper=mapper(), num_workers=num_workers)
    assert len(loader) == len(list(loader)) == COUNT
    cut(dicts[5]["file_name"])
    with pytest.raises(DataError) as caught:
        list(loader)
    message = str(caught.value)
    assert message.startswith(f"dataloader.test.dataset={dicts[5]['file_name']}: cannot be loaded")
    assert "evaluation passes over none" in message and "skip" not in message


class Deadly:
    """Ends its process at one image: always, or the first time."""

    def __init__(self, image_id, how, flag=None):
        self.image_id, self.how, self.flag = image_id, how, flag

    def __call__(self, record):
        if record["image_id"] == self.image_id and not (self.flag and os.path.exists(self.flag)):
            if self.flag:
                open(self.flag, "w").close()
            self.how()
        return record["image_id"]


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def leave():
    os._exit(3)


def test_a_killed_worker_is_named_with_what_it_was_asked_for(dicts, quick):
    loader = loader_of(dicts, mapper=Deadly(5, kill), num_workers=1)
    with pytest.raises(DataError) as caught:
        take(loader, 6)
    message = str(caught.value)
    assert message.startswith("dataloader.train.num_workers=1: loading process ")
    assert "SIGKILL, as the system does when memory runs out" in message
    assert dicts[5]["file_name"] in message
    assert "use fewer workers" in message and "--shm-size" in message and "--resume" in message
    assert "\n" not in message


def test_dead_workers_are_replaced_and_the_stream_goes_on(dicts, quick, tmp_path, sharedkd_log):
    expected = take(loader_of(dicts, mapper=lambda r: r["image_id"]), 8)
    deadly = Deadly(5, leave, str(tmp_path / "flag"))
    assert take(skipping(dicts, mapper=deadly, num_workers=1), 8) == expected
    (line,) = warnings(sharedkd_log)
    assert "ended with status 3" in line and "1 of 5 times" in line


def test_an_image_that_always_kills_its_worker_ends_the_run(dicts, quick, monkeypatch):
    monkeypatch.setattr("sharedkd.data.loader._MOST_DEATHS", 1)
    with pytest.raises(DataError, match=f"while these were loaded: .*{dicts[5]['file_name']}"):
        take(skipping(dicts, mapper=Deadly(5, kill), num_workers=1), 8)


def test_a_death_interrupts_nothing_but_the_loader(dicts, quick):
    """Torch's own signal handler would raise in the middle of whatever the process does."""
    loader = loader_of(dicts, mapper=Deadly(99, kill), num_workers=1)
    iterator = batches_of(loader._loader(0))
    next(iterator)
    worker = iterator.gi_frame.f_locals["iterator"]._workers[0]
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    assert sum(range(100_000)) == 4999950000  # would raise here
    with pytest.raises(WorkerDied, match="SIGKILL"):
        list(itertools.islice(iterator, 50))


def test_evaluation_names_a_dead_worker(dicts, quick):
    loader = build_test_loader(dicts, mapper=Deadly(5, kill), num_workers=1)
    with pytest.raises(DataError, match="dataloader.test.num_workers=1: loading process .*SIGKILL"):
        list(loader)


def test_a_run_ends_with_one_line_and_status_1(tmp_path, capfd, sharedkd_log):
    shapes = make_shapes(tmp_path / "shapes", train=4, val=1, size=(64, 64))
    for path in (shapes / "train").iterdir():
        cut(path, 0.8)  # the header is whole
    args = arguments(
        "custom_coco_plain.py",
        f"data.train_json={shapes}/train.json",
        f"data.val_json={shapes}/val.json",
        f"data.train_images={shapes}/train",
        f"data.val_images={shapes}/val",
        "data.short_edge=[64]",
        "train.device=cpu",
        "train.max_iter=2",
        f"train.output_dir={tmp_path}/run",
        *("dataloader.train.on_bad_image=skip", "dataloader.train.max_bad_images=2"),
    )
    with pytest.raises(SystemExit) as end:
        launch(run, args)
    assert end.value.code == 1
    out, err = capfd.readouterr()
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: dataloader.train.") and "image file is truncated" in last
    assert "Traceback" not in out + err + sharedkd_log.text
