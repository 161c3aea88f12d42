"""Checkpoint files from strangers: nothing in them runs, nothing they claim is believed, and real ones load."""

import io
import json
import os
import pickle
import re
import subprocess
import sys
from collections import Counter, OrderedDict
from pathlib import Path

import hostile
import numpy as np
import pytest
import tiny
import torch
from safetensors import safe_open

from sharedkd import ConfigError
from sharedkd.weights.loading import _load, initialise, load_trained
from sharedkd.weights.reading import read_weights, write_safetensors
from sharedkd.weights.unpickler import ArrayUnpickler

PROGRAM = Path(hostile.__file__)


# --- hostile files -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """(folder of files read safely, name -> (outcome, message, bytes, size), folder of files trusted).

    One process reads them all: those that run code a second time, with trust.
    """
    folders = [tmp_path_factory.mktemp(name) for name in ("hostile", "trusted")]
    tables = [{**hostile.LIVE, **hostile.REFUSED, **hostile.BROKEN}, hostile.LIVE]
    lines = []
    for folder, table, trusted in zip(folders, tables, (False, True)):
        for i, (name, (make, _)) in enumerate(table.items()):
            path = make(str(folder / f"file{i}"), str(folder / f"canary{i}"))
            lines.append((name, path, trusted))
    ordinary = hostile.saved(hostile.weights())(str(folders[0] / "ordinary"), "")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(PROGRAM), ordinary],
        input="\n".join(json.dumps(x) for x in lines),
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, "the reader itself died"
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, *_ in found] == [name for name, *_ in lines]
    sizes = [os.path.getsize(path) for _, path, _ in lines]
    results = {n: (*rest, size) for (n, *rest), size in list(zip(found, sizes))[: len(tables[0])]}
    return folders[0], results, folders[1]


def check_memory(found):
    _, _, used, size = found
    # An object takes 64 bytes and at least one instruction, of which there are 2 million at most.
    assert used < 2**23 + 2 * size + 64 * min(size, 2_000_000)


@pytest.mark.parametrize("name", [*hostile.LIVE, *hostile.REFUSED])
def test_what_asks_for_more_than_data_is_refused(read, name):
    outcome, message, *_ = read[1][name]
    assert outcome == "Refused"
    assert re.search({**hostile.LIVE, **hostile.REFUSED}[name][1], message)
    assert message.isprintable()
    check_memory(read[1][name])


@pytest.mark.parametrize("name", hostile.BROKEN)
def test_what_lies_or_is_broken_is_an_error(read, name):
    outcome, message, *_ = read[1][name]
    assert outcome not in ("read", "MemoryError")
    assert re.search(hostile.BROKEN[name][1], message)
    check_memory(read[1][name])


def test_nothing_ran(read):
    assert not list(read[0].glob("canary*"))


def test_those_payloads_are_live(read):
    """With trust they do what they are made for: the other tests could fail."""
    ran = {int(p.name.removeprefix("canary")) for p in read[2].glob("canary*")}
    assert ran == set(range(len(hostile.LIVE)))


@pytest.fixture
def payload(tmp_path):
    make, _ = hostile.LIVE["reduce in a zoo file"]
    return make(str(tmp_path / "evil"), str(tmp_path / "canary")), tmp_path / "canary"


@pytest.mark.parametrize(
    "load, key, switch",
    [
        (load_trained, "model.teacher.weights", "model.teacher.trust_checkpoint=True"),
        (load_trained, "train.output_dir", "train.trust_checkpoint=True"),
        (initialise, "train.init_checkpoint", "train.trust_checkpoint=True"),
    ],
)
def test_the_message_says_what_trusting_means(payload, load, key, switch):
    path, canary = payload
    with pytest.raises(ConfigError) as error:
        load(tiny.detector("retinanet"), path, key)
    message = str(error.value)
    assert message.startswith(f"{key}={path}: asks for posix.system, ")
    assert "could run any program" in message and switch in message and "\n" not in message
    assert not canary.exists()


# --- genuine files -------------------------------------------------------------------------------

ARRAYS = {
    "matrix": np.arange(6.0).reshape(2, 3),
    "columns": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    "whole": np.array([1, -2], np.int64),
    "half": np.array([1.5], np.float16),
    "truth": np.array([True, False]),
    "empty": np.zeros((0, 3), np.float32),
    "scalar": np.array(5.0),
    "strided": np.arange(10)[::3],
    "swapped": np.arange(3, dtype=">i4"),
}


@pytest.mark.parametrize("numpy", ["1", "2"])
@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_any_numpy_and_protocol(protocol, numpy):
    data = {**ARRAYS, "number": np.float32(3), "more": [1, (2, "x"), {"y": None}, 2**70, 1.5, b"z"]}
    data["again"] = data["matrix"]
    pickled = pickle.dumps(data, protocol)
    if numpy == "1":  # the name that it had then; a length byte goes before it in protocol 4 and up
        pickled = pickled.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
        pickled = pickled.replace(b"\x8c\x16numpy.core.mul", b"\x8c\x15numpy.core.mul")
        pickled = pickled.replace(b"numpy._core.numeric", b"numpy.core.numeric")
        pickled = pickled.replace(b"\x8c\x13numpy.core.num", b"\x8c\x12numpy.core.num")
        if protocol >= 4:  # frames became shorter by as much
            pickled = unframed(pickled)
    found = ArrayUnpickler(io.BytesIO(pickled), len(pickled)).load()
    expected = pickle.loads(pickle.dumps(data, protocol))
    assert found.keys() == expected.keys() and found["more"] == expected["more"]
    assert found["again"] is found["matrix"]
    for name in [*ARRAYS, "number"]:
        assert np.array_equal(found[name], expected[name]), name
        assert found[name].dtype == expected[name].dtype, name
        assert np.shape(found[name]) == np.shape(expected[name]), name


def unframed(pickled):
    """The same pickle without its frame, which protocol 4 allows."""
    assert pickled[2:3] == b"\x95"
    return pickled[:2] + pickled[11:]


def test_an_array_of_python_2():
    """As numpy wrote it there: the bytes are a string."""
    raw = np.array([1.5, -2.0, 1e-30], np.float32).tobytes()
    pickled = (
        b"\x80\x02}U\x01aU\x05firstqScnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
        b"K\x00\x85U\x01b\x87R(K\x01K\x03\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNN"
        b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x0c" + raw + b"tb\x86s."
    )
    text, array = ArrayUnpickler(io.BytesIO(pickled), len(pickled)).load()["a"]
    assert (
        text == "first"
        and array.tolist() == pickle.loads(pickled, encoding="latin1")["a"][1].tolist()
    )
    assert array[0] == 1.5


@pytest.fixture(scope="module")
def trained():
    """A detector's state whose every tensor differs from a fresh one's."""
    state = tiny.detector("retinanet", seed=1).state_dict()
    state.update({k: v + 1 for k, v in state.items() if v.is_floating_point()})
    return state


def as_arrays(state):
    return {k: v.numpy() for k, v in state.items() if "num_batches" not in k}


LAYOUTS = {
    "zoo.pkl": lambda s: pickle.dumps(
        {"model": as_arrays(s), "__author__": "Detectron2 Model Zoo"}
    ),
    "zoo2.pkl": lambda s: pickle.dumps({"model": as_arrays(s), "__author__": "x"}, protocol=2),
    "run.pth": lambda s: torch_bytes({"model": s, "iteration": 7, "trainer": trainer_state()}),
    "legacy.pth": lambda s: torch_bytes({"model": s, "iteration": 7}, legacy=True),
    "bare.pt": lambda s: torch_bytes(OrderedDict(s)),
    "parallel.pth": lambda s: torch_bytes({f"module.{k}": v for k, v in s.items()}),
}


def torch_bytes(data, legacy=False):
    file = io.BytesIO()
    torch.save(data, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def trainer_state():
    """What training keeps: optimizer, schedule, scaler, and what older schedulers kept."""
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu").state_dict()
    return {
        "optimizer": optimizer.state_dict(),
        "grad_scaler": scaler,
        "milestones": Counter([3, 3]),
        "size": torch.Size([2]),
        "parameter": layer.weight,
        "device": torch.device("cpu"),
        "view": torch.arange(9.0).reshape(3, 3).t()[1:],
        "half": torch.ones(3, dtype=torch.bfloat16),
        "nothing": torch.zeros(0, 3),
        "type": torch.float32,
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_detector_in_any_layout(tmp_path, trained, name):
    path = tmp_path / name
    path.write_bytes(LAYOUTS[name](trained))
    model = tiny.detector("retinanet")
    rest = load_trained(model, str(path), "model.teacher.weights")
    names = [k for k in trained if name != "zoo.pkl" or "num_batches" not in k]
    counters = [k for k in names if "num_batches" in k and name.endswith(".pkl")]
    assert all(torch.equal(model.state_dict()[k], trained[k]) for k in set(names) - set(counters))
    assert rest.get("iteration") == (7 if name in ("run.pth", "legacy.pth") else None)


def test_a_trainers_state_comes_back(tmp_path):
    state = trainer_state()
    torch.save({"model": {"a": torch.ones(2)}, "trainer": state}, tmp_path / "a.pth")
    found = read_weights(str(tmp_path / "a.pth"))["trainer"]
    assert found["grad_scaler"] == state["grad_scaler"] and found["milestones"] == {3: 2}
    assert torch.equal(found["view"], state["view"]) and torch.equal(found["half"], state["half"])
    moments = [s["optimizer"]["state"][0]["exp_avg"] for s in (found, state)]
    assert torch.equal(*moments)


BACKBONES = {
    # The backbone's own names, without the detector's prefix
    "torchvision.pkl": lambda a: pickle.dumps(
        {"model": a, "__author__": "torchvision", "matching_heuristics": True}
    ),
    "bare.pth": lambda a: torch_bytes({k: torch.from_numpy(v) for k, v in a.items()}),
    "bare.safetensors": None,
    "pycls.pyth": lambda a: torch_bytes(
        {"epoch": 3, "model_state": {k: torch.from_numpy(v) for k, v in a.items()}}
    ),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_is_matched_by_its_names(tmp_path, name):
    bottom_up = tiny.detector("retinanet", seed=4).backbone.bottom_up
    arrays = as_arrays(bottom_up.state_dict())
    path = tmp_path / name
    if name.endswith(".safetensors"):
        write_safetensors({k: torch.from_numpy(v) for k, v in arrays.items()}, str(path))
    else:
        path.write_bytes(BACKBONES[name](arrays))
    model = tiny.detector("retinanet")
    initialise(model, str(path))
    state = model.backbone.bottom_up.state_dict()
    assert all(torch.equal(state[k], torch.from_numpy(v)) for k, v in arrays.items())


@pytest.mark.parametrize("blobs", [True, False], ids=["a detector", "ImageNet"])
def test_caffe2_names_are_converted(tmp_path, blobs):
    generator = np.random.default_rng(0)
    first = generator.normal(size=(64, 3, 7, 7)).astype(np.float32)
    scale = generator.normal(size=64).astype(np.float32)
    arrays = {
        "conv1_w": first,
        "res_conv1_bn_s": scale,
        "conv1_w_momentum": first + 1,
        "lr": np.float32(0.1),
        "weight_order": ["conv1_w"],
    }
    path = tmp_path / "R-50.pkl"
    path.write_bytes(
        pickle.dumps({"blobs": arrays, "cfg": "MODEL:"} if blobs else arrays, protocol=2)
    )
    found = read_weights(str(path))
    assert found["__author__"] == "Caffe2" and set(found["model"]) == {"conv1_w", "res_conv1_bn_s"}
    model = tiny.detector("retinanet")
    _load(model, str(path), "key.x", False, None)
    stem = model.backbone.bottom_up.stem.conv1
    assert np.array_equal(stem.weight.detach().numpy(), first)
    assert np.array_equal(stem.norm.weight.detach().numpy(), scale)


# --- safetensors ---------------------------------------------------------------------------------


def test_safetensors_there_and_back(tmp_path, trained):
    state = {
        k: v.to(memory_format=torch.channels_last) if v.dim() == 4 else v
        for k, v in trained.items()
    }
    path = tmp_path / "a.safetensors"
    write_safetensors(state, str(path))
    assert os.listdir(tmp_path) == ["a.safetensors"]
    with safe_open(path, "pt") as f:  # another reader
        assert all(torch.equal(f.get_tensor(k), v) for k, v in trained.items())
        assert set(f.keys()) == set(trained)
    model = tiny.detector("retinanet")
    load_trained(model, str(path), "train.init_checkpoint")
    assert all(torch.equal(v, trained[k]) for k, v in model.state_dict().items())


def test_tensors_that_share_memory_are_written(tmp_path):
    x = torch.arange(6.0)
    write_safetensors({"a": x, "b": x[2:], "c": x}, str(tmp_path / "a.safetensors"))
    found = read_weights(str(tmp_path / "a.safetensors"))["model"]
    assert torch.equal(found["b"], x[2:]) and torch.equal(found["a"], found["c"])
