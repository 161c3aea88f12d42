"""Images without labels: which they are, and how batches hold them."""

import itertools
import json

import loaders
import numpy as np
import pytest
from detectron2.utils import comm
from PIL import Image

from sharedkd.data.notes import Reading
from sharedkd.data.unlabelled import read_unlabelled
from sharedkd.errors import ConfigError

SIZES = [(24, 40), (40, 24), (32, 30), (20, 48), (24, 36)]  # height, width


def records(prefix, count):
    return [
        dict(file_name=f"{prefix}{i}", image_id=f"{prefix}{i}", height=h, width=w)
        for i, (h, w) in zip(range(count), itertools.cycle(SIZES))
    ]


def draws(sample):
    """A mapper that loads nothing and shows what its three generators give."""
    return {**sample, "drawn": loaders.drawn()}


def loader_of(unlabelled=7, **options):
    options = {"mapper": draws, "total_batch_size": 4, **options}
    return loaders.loader_of(records("a", 5), unlabelled=records("b", unlabelled), **options)


def take(loader, count=9):
    return loaders.take(loader, count)


def labelled(batches):
    return [[x for x in batch if "unlabelled" not in x] for batch in batches]


def others(batches):
    return [[x for x in batch if x.get("unlabelled")] for batch in batches]


def test_they_come_on_top_and_leave_the_labelled_ones_as_they_are():
    batches = take(loader_of(unlabelled_ratio=0.5))
    assert labelled(batches) == take(loader_of(unlabelled=0))
    assert [len(batch) for batch in others(batches)] == [2] * 9
    names = {x["file_name"][0] for batch in others(batches) for x in batch}
    assert names == {"b"} and all("unlabelled" in x for batch in batches for x in batch[4:])


def test_their_stream_is_seeded_and_depends_on_no_worker_process_or_interruption(monkeypatch):
    whole = take(loader_of())
    assert take(loader_of(num_workers=2)) == whole != take(loader_of(seed=4))
    resumed = loader_of()
    resumed.first_batch = 5
    assert take(resumed, 4) == whole[5:]
    parts = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda: rank)
        monkeypatch.setattr(comm, "get_world_size", lambda: 2)
        parts.append(take(loader_of()))
    for batch, *pieces in zip(whole, *parts):
        assert [(len(labelled([x])[0]), len(x)) for x in pieces] == [(2, 4)] * 2
        for part in (labelled, others):
            shared = [x["file_name"] for piece in part(pieces) for x in piece]
            assert sorted(shared) == sorted(x["file_name"] for x in part([batch])[0])
    monkeypatch.undo()
    # An epoch holds each of them once, and no draw is that of a labelled image.
    first = [
        x["file_name"] for batch in take(loader_of(aspect_ratio_grouping=False)) for x in batch
    ]
    alone = [x for x in first if x[0] == "b"][:7]
    assert sorted(alone) == [f"b{i}" for i in range(7)]
    found = [x["drawn"] for batch in whole for x in batch]
    assert len(set(found)) == len(found)


def test_a_batch_part_has_one_orientation_and_a_bad_image_is_replaced_by_one_without_labels():
    def breaks(sample):
        if sample["file_name"] == "b1":
            raise OSError("damaged")
        return draws(sample)

    batches = take(loader_of(mapper=breaks, on_bad_image="skip", max_bad_images=1), 12)
    assert all(
        len({x["width"] > x["height"] for x in part}) == 1
        for part in labelled(batches) + others(batches)
    )
    assert {x["file_name"][0] for batch in others(batches) for x in batch} == {"b"}
    assert labelled(batches) == take(loader_of(unlabelled=0), 12)


def test_a_part_that_cannot_be_shared_out_is_refused(monkeypatch):
    with pytest.raises(
        ConfigError, match=r"unlabelled_ratio=0.1: is 0 images .* use 0.25 or a mul"
    ):
        loader_of(unlabelled_ratio=0.1)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    with pytest.raises(
        ConfigError, match=r"unlabelled_ratio=0.25: is 1 images .* use 0.5 or a mul"
    ):
        loader_of(unlabelled_ratio=0.25)


# --- which they are -------------------------------------------------------------------------------


def read(folder, json_file=None, labelled=(), held_out=(), **reading):
    folders = [str(x) for x in (folder if isinstance(folder, list) else [folder])]
    names = [{str(x) for x in group} for group in (labelled, held_out)]
    return read_unlabelled(
        folders, json_file and str(json_file), *names, "images", "json", Reading(**reading)
    )


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    for name in ("a.png", "sub/b.JPG", "c.jpg", "d.bmp", ".hidden.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 40)).save(root / name)
    (root / "notes.txt").write_text("no image")
    return root


def test_a_folder_without_the_labelled_the_held_out_and_the_broken(folder):
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (60, 40)).save(folder / "e.jpg", exif=turned)
    (folder / "f.png").write_bytes(b"no image")
    Image.new("RGB", (4000, 1)).save(folder / "thin.png")
    found, warnings = read(folder, None, [folder / "a.png"], [folder / "d.bmp"], max_size=480)
    assert [(x["file_name"], x["height"], x["width"]) for x in found] == [
        (str(folder / "c.jpg"), 40, 60),
        (str(folder / "e.jpg"), 60, 40),  # upright, as it is read
        (str(folder / "sub/b.JPG"), 40, 60),
    ]
    assert len({x["image_id"] for x in found}) == 3 and not any("annotations" in x for x in found)
    said = "\n".join(map(str, warnings))
    assert len(warnings) == 3
    assert "1 of 7 images are trained on with their labels" in said
    assert "1 of 7 images are evaluated on" in said and "2 of 7 images cannot be used" in said
    with pytest.raises(ConfigError, match="f.png: cannot be read.* data.repair=True"):
        read(folder, repair=False)


def test_a_json_says_which(folder, tmp_path):
    path = tmp_path / "rest.json"
    rows = [{"id": 1, "file_name": "images/sub/b.JPG"}, {"id": 2, "file_name": "c.jpg"}]
    path.write_text(json.dumps({"images": rows}))
    assert [x["file_name"] for x in read(folder, path)[0]] == [
        str(folder / "c.jpg"),
        str(folder / "sub/b.JPG"),
    ]
    path.write_text(json.dumps({"images": [{"id": 1, "file_name": "gone.png"}]}))
    with pytest.raises(ConfigError, match="no image file 'gone.png'"):
        read(folder, path)
    path.write_text(json.dumps({"images": rows}), encoding="utf-16")
    records, warnings = read(folder, path)
    assert len(records) == 2 and any("not in plain UTF-8" in str(x) for x in warnings)
    path.write_text("[]")
    with pytest.raises(ConfigError, match="json=.*holds a list"):
        read(folder, path)


def test_nothing_to_learn_from_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="images=.*: no such folder"):
        read(tmp_path / "gone")
    every = [x for x in folder.rglob("*") if x.is_file()]
    with pytest.raises(ConfigError, match=r"no image without labels \(4 are trained on"):
        read(folder, None, every)


def test_values_of_unknown_range_are_refused_and_known_ones_said(folder):
    Image.fromarray(np.full((8, 8), 300, np.int32)).save(folder / "deep.tif")
    with pytest.raises(ConfigError, match="deep.tif.*data.image_range"):
        read(folder)
    assert "become 0 to 255" in str(read(folder, image_range=[0, 400])[1][0])
