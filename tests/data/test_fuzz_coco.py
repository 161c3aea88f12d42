"""COCO json that is wrong in any way is refused in one line, or works in training and evaluation.

Every input is tried in a process of its own, as what pycocotools does with the wrong one is a crash.
`make nightly` runs it with FUZZ_EXAMPLES random inputs.
"""

import copy
import gc
import json
import os
import resource
import signal
import tempfile
import traceback
from collections import Counter
from functools import partial

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from coco_files import metrics
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sharedkd.data.coco import read_coco
from sharedkd.data.images import ImageMapper

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 300))
MEMORY = 2**30  # bytes that one input may take beyond what the process has
SECONDS = 30
LONGEST_MESSAGE = 1500

effort = settings(
    max_examples=EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

# id, width, height; the last one is a single pixel
IMAGES = [(3, 40, 24), (1, 24, 40), (8, 1, 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz")
    (root / "images").mkdir()
    for id, width, height in IMAGES:
        Image.new("RGB", (width, height)).save(root / "images" / f"{id}.png")
    gc.collect()
    gc.freeze()  # so that forked processes share what is there
    yield root
    gc.unfreeze()


# What an input goes through, in a process of its own.


def tried(folder, text, use):
    """("refused", message) or ("used", ""); whatever else happens is an AssertionError."""
    path = folder / "fuzzed.json"
    path.write_bytes(text)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        gc.disable()
        status = 1
        try:
            with open("/proc/self/statm") as f:
                taken = int(f.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY,) * 2)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.alarm(SECONDS)
            tempfile.tempdir = str(folder)  # what is written there outlives this process
            said = use(str(path), str(folder / "images"))
            status = 0
        except BaseException:
            said = traceback.format_exc()
        finally:
            os.write(writer, said.encode("utf-8", "backslashreplace")[:60_000])
            os._exit(status)
    os.close(writer)
    with open(reader, "rb") as pipe:
        said = pipe.read().decode()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, f"status {status} for {text[:3000]!r}: {said}"
    if said:
        for line in said.splitlines():  # one for each kind of fault
            line = line.removeprefix("error: ")
            assert line.startswith("data.") and "; " in line and len(line) < LONGEST_MESSAGE
    return ("refused", said) if said else ("used", "")


def read(json_file, images, **options):
    return read_coco([json_file], [images], "data.json", "data.images", **options)


def train_and_evaluate(json_file, images):
    """What a run does with the file; returns why it is refused."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for train in (True, False):
        data = read(json_file, images, train=train)
        if data.errors:
            return "\nerror: ".join(map(str, data.errors))
        (summary,) = data.files
        data.register(f"fuzzed_{train}")
    records = DatasetCatalog.get("fuzzed_True")
    assert len(records) == summary.images
    mapper = ImageMapper(
        is_train=True,
        augmentations=[T.RandomFlip(), T.ResizeShortestEdge(50, max_size=100)],
        image_format="RGB",
        use_instance_mask=summary.has_masks,
        instance_mask_format="bitmask",
    )
    for record in records:
        found = mapper(record)["instances"]
        assert len(found) <= len(record["annotations"])
        assert torch.isfinite(found.gt_boxes.tensor).all()
        assert all(0 <= c < len(summary.classes) for c in found.gt_classes)
    for values in metrics("fuzzed_False", summary.has_masks).values():
        assert all(x == -1 or 0 <= x <= 100 for x in values.values())
    # Repairing twice changes nothing.
    again = read(MetadataCatalog.get("fuzzed_True").json_file, images)
    assert not again.errors and not again.files[0].repairs
    return ""


# What is fed: a file as it should be, then a few places of it changed.

nested = "[" * 60 + "]" * 60
odd_numbers = [0, -1, 1, 2, 0.5, -0.0, 1e-320, 1e9, -1e9, 1e308, 2**31 - 1, 2**31, 2**32 + 1]
odd_numbers += [2**53 + 1, 2**63 - 1, 2**63, -(2**63), 10**30, 10**400, float("nan")]
odd_numbers += [float("inf"), -float("inf"), 13_377, 178_956_970, 10**5]
odd_words = [
    "",
    " ",
    "0",
    "cat",
    "\0",
    "\ud800",
    "ünï",
    "../3.png",
    "/etc/passwd",
    "images/../3.png",
]
odd_words += ["./3.png", "1.png", "o" * 50, "0" * 50, "PPPPo0", "\n", "x" * 5000]
odd_lists = [[], {}, [[]], [{}], [None], {"size": [24, 40]}, json.loads(nested), [1] * 5, [[1] * 5]]
odd_values = st.one_of(
    st.sampled_from(odd_numbers),
    st.sampled_from(odd_words),
    st.sampled_from(odd_lists),
    st.sampled_from([None, True, False]),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
).map(copy.deepcopy)
coordinates = st.floats(-5, 45) | st.integers(-2, 42) | st.sampled_from(odd_numbers)
polygons = st.lists(st.lists(coordinates, max_size=12), max_size=3)
sane_polygons = st.lists(
    st.lists(st.floats(0.5, 23), min_size=6, max_size=12).filter(lambda p: len(p) % 2 == 0),
    min_size=1,
    max_size=2,
)
sides = st.sampled_from([24, 40, 1, 0, -1, 24.0, True, 10**9, 2**16, 13_000, 2**31])
counts = st.one_of(
    st.lists(st.integers(0, 400) | st.sampled_from(odd_numbers), max_size=8),
    st.text(st.characters(min_codepoint=47, max_codepoint=112), max_size=12),
    odd_values,
)
run_lengths = st.fixed_dictionaries(
    {"size": st.tuples(sides, sides).map(list), "counts": counts}
) | st.builds(lambda c: {"size": [24, 40], "counts": c}, counts)


@st.composite
def true_run_lengths(draw, height, width):
    """RLE of the image's size, as a list or a string."""
    mask = np.zeros(height * width, np.uint8)
    for start in draw(st.lists(st.integers(0, height * width - 1), max_size=4)):
        mask[start : start + draw(st.integers(1, 50))] = 1
    encoded = mask_util.encode(np.asfortranarray(mask.reshape(height, width, order="F")))
    if draw(st.booleans()):
        return {"size": [height, width], "counts": encoded["counts"].decode()}
    edges = np.flatnonzero(np.diff(mask, prepend=0, append=1 - mask[-1]))
    return {"size": [height, width], "counts": np.diff(edges, prepend=0).tolist()}


@st.composite
def annotations(draw, number):
    image, width, height = draw(st.sampled_from(IMAGES))
    x, y = draw(st.floats(0, width - 1)), draw(st.floats(0, height - 1))
    least = min(0.01 if image == 8 else 1.5, width - x, height - y)  # no shares of an image
    box = [x, y, draw(st.floats(least, width - x)), draw(st.floats(least, height - y))]
    shape = draw(
        st.one_of(
            sane_polygons if image != 8 else st.none(),
            true_run_lengths(height, width),
            st.just([[0, 0, width, 0, width, height]]),
        )
    )
    return {
        "id": number,
        "image_id": image,
        "category_id": draw(st.sampled_from([2, 5])),
        "bbox": box,
        "area": box[2] * box[3],
        "iscrowd": draw(st.sampled_from([0, 0, 0, 1])),
        "segmentation": shape,
    }


@st.composite
def documents(draw):
    """A file as it should be."""
    images = [{"id": i, "file_name": f"{i}.png", "width": w, "height": h} for i, w, h in IMAGES]
    objects = [draw(annotations(i + 1)) for i in range(draw(st.integers(1, 4)))]
    for a in objects:  # a class of crowd regions alone is refused
        a["iscrowd"] *= any(
            b["category_id"] == a["category_id"] and not b["iscrowd"] for b in objects
        )
    categories = [{"id": 5, "name": "cat"}, {"id": 2, "name": "ünï"}]
    return {"info": {}, "images": images, "annotations": objects, "categories": categories}


def places(node, path=()):
    """The paths of all that a document holds."""
    for key in node if isinstance(node, dict) else range(len(node)):
        yield (*path, key)
        if isinstance(node[key], (dict, list)):
            yield from places(node[key], (*path, key))


def change(draw, document):
    path = draw(st.sampled_from(list(places(document))))
    *parents, key = path
    parent = document
    for step in parents:
        parent = parent[step]
    how = draw(st.sampled_from(["odd", "odd", "delete", "repeat", "copy", "add", "shape", "shape"]))
    if how == "odd":
        parent[key] = draw(odd_values)
    elif how == "delete":
        del parent[key]
    elif how == "repeat" and isinstance(parent, list):
        parent.insert(key, copy.deepcopy(parent[key]))
    elif how == "copy":
        other = document
        for step in draw(st.sampled_from(list(places(document)))):
            other = other[step]
        parent[key] = copy.deepcopy(other)
    elif how == "add" and isinstance(parent, dict):
        names = ["keypoints", "ignore", "iscrowd", "area", "segmentation", "num_keypoints", "x"]
        parent[draw(st.sampled_from(names))] = draw(odd_values)
    elif how == "shape":
        objects = document.get("annotations")
        objects = [a for a in objects if isinstance(a, dict)] if isinstance(objects, list) else []
        if objects:
            target = draw(st.sampled_from(objects))
            target["segmentation"] = draw(polygons | run_lengths)


@st.composite
def files(draw):
    """The bytes of a file with up to three changes to what it holds, or one to how it is written."""
    document = draw(documents())
    for _ in range(draw(st.integers(0, 3))):
        if document:
            change(draw, document)
    text = json.dumps(document)
    return draw(st.sampled_from([str.encode] * 12 + [partial(garbled, draw)]))(text)


def garbled(draw, text):
    how = draw(st.integers(0, 5))
    at = draw(st.integers(0, len(text)))
    if how == 0:
        return text[:at].encode()
    if how == 1:
        return text.encode(draw(st.sampled_from(["utf-16", "utf-8-sig", "utf-32"])))
    if how == 2:
        return text[:at].encode() + draw(st.binary(max_size=4)) + text[at:].encode()
    if how == 3:
        return text.replace("24", draw(st.sampled_from(["1e400", "9" * 5000, "NaN", "-0", "024"])))
    if how == 4:
        opening, closing = draw(st.sampled_from(["[]", "{}"]))
        return (opening * 100_000 + closing).encode()
    twice = draw(st.sampled_from(['"images": [], ', '"id": 1, ', '"x": 1, ' * 1000]))
    return text.replace("{", "{" + twice).encode()


def as_bytes(text):
    return text.encode() if isinstance(text, str) else text


@pytest.mark.nightly
def test_refused_or_used(folder):
    outcomes = Counter()

    @effort
    @given(files())
    def every_file(text):
        outcomes[tried(folder, as_bytes(text), train_and_evaluate)[0]] += 1

    every_file()
    # Fuzzing that meets one outcome only would show nothing.
    assert min(outcomes["used"], outcomes["refused"]) > sum(outcomes.values()) / 10


@pytest.mark.nightly
@settings(effort, max_examples=EXAMPLES // 3)
@given(documents())
def test_files_as_they_should_be_are_used(folder, document):
    assert tried(folder, json.dumps(document).encode(), train_and_evaluate) == ("used", "")


# What has crashed pycocotools, or would take memory or time beyond any measure.


def one_object(width=40, height=24, **fields):
    document = {
        "images": [{"id": 3, "file_name": "3.png", "width": width, "height": height}],
        "annotations": [
            {"id": 1, "image_id": 3, "category_id": 1, "bbox": [1, 1, 5, 5], "area": 25}
            | {"iscrowd": 0}
            | fields
        ],
        "categories": [{"id": 1, "name": "cat"}],
    }
    return json.dumps(document)


def rle(height, width, counts):
    return {"size": [height, width], "counts": counts}


good = one_object(segmentation=rle(24, 40, [100, 860]))
HOSTILE = {
    "RLE of a huge image": one_object(10**9, 10**9, segmentation=rle(10**9, 10**9, "PPPPo0")),
    "RLE of a large image": one_object(200_000, 200_000, segmentation=rle(200_000, 200_000, "0")),
    "RLE list of a huge image": one_object(2**30, 4, segmentation=rle(4, 2**30, [2**32])),
    "RLE that goes on": one_object(segmentation=rle(24, 40, "oooo")),
    "RLE of long numbers": one_object(segmentation=rle(24, 40, "o" * 1000 + "0")),
    "RLE of negative runs": one_object(segmentation=rle(24, 40, [1000, -40])),
    "polygon far out": one_object(segmentation=[[0, 0, 1e8, 0, 1e8, 9]]),
    "polygon beyond int": one_object(segmentation=[[0, 0, 1e10, 0, 1e10, 9]]),
    "polygon to and fro": one_object(segmentation=[[0, 0, 40, 24] * 50_000]),
    "polygon across a huge image": one_object(10**5, 1000, segmentation=[[0, 0, 10**5, 9] * 5000]),
    "keys, a million times": "{" + '"x": 1, ' * 10**6 + good[1:-1] + ', "images": 5}',
    "lists, a million deep": "[" * 10**6,
    "objects, a million deep": '{"x":' * 10**6,
    "digits": good.replace("860", "9" * 100_000),
    "keypoints of words": one_object(keypoints=["x", 1, 2]),
    "half a character": good.replace("cat", "\\ud800"),
    "image elsewhere": good.replace("3.png", "../images/../../3.png"),
    "image by absolute path": good.replace("3.png", os.path.abspath(__file__)),
}


USED = {
    "the file that they are made of": good,
    "an area without end": good.replace("25", "1e400"),
    "utf-16": good.encode("utf-16"),
    "a byte order mark": good.encode("utf-8-sig"),
    "up and down again": good.replace("3.png", "../images/3.png"),
}


@pytest.mark.parametrize("name", [*HOSTILE, *USED])
def test_hostile(folder, name):
    text = {**HOSTILE, **USED}[name]
    expected = "refused" if name in HOSTILE else "used"
    assert tried(folder, as_bytes(text), train_and_evaluate)[0] == expected
