"""Checkpoint files from strangers: nothing in them runs, nothing they claim is believed, and real ones load."""

import io
import json
import os
import pickle
import re
import subprocess
import sys
from collections import Counter, OrderedDict

import hostile
import numpy as np
import pytest
import tiny
import torch
from safetensors import safe_open

from sharedkd import ConfigError
from sharedkd.weights.loading import _load, initialise, load_trained
from sharedkd.weights.reading import read_weights, write_safetensors

# --- hostile files -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """(name -> (outcome, message, bytes used, size), canaries of safe reading, canaries of trusted).

    One process reads them all: those that run code a second time, with trust.
    """
    folders = [tmp_path_factory.mktemp(name) for name in ("hostile", "trusted")]
    lines, results = [], {}
    for folder, table in zip(folders, ({**hostile.LIVE, **hostile.DEAD}, hostile.LIVE)):
        for i, (name, (make, _)) in enumerate(table.items()):
            path = make(str(folder / f"file{i}"), str(folder / f"canary{i}"))
            lines.append((name, path, folder is folders[1]))
    ordinary = hostile.saved(hostile.weights())(str(folders[0] / "ordinary"), "")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", hostile.__file__, ordinary],
        input="\n".join(json.dumps(x) for x in lines),
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, "the reader itself died"
    for (name, path, trusted), line in zip(lines, done.stdout.splitlines(), strict=True):
        if not trusted:
            results[name] = (*json.loads(line)[1:], os.path.getsize(path))
    canaries = [sorted(x.name for x in folder.glob("canary*")) for folder in folders]
    return results, *canaries


@pytest.mark.parametrize(
    "name, message", [(k, v[1]) for k, v in (hostile.LIVE | hostile.DEAD).items()]
)
def test_a_hostile_file_is_an_error_and_takes_no_memory(read, name, message):
    outcome, said, used, size = read[0][name]
    assert outcome not in ("read", "MemoryError")
    assert re.search(message, said)
    assert outcome != "Refused" or said.isprintable()
    # An object takes 64 bytes and at least one instruction, of which there are 2 million at most.
    assert used < 2**23 + 2 * size + 64 * min(size, 2_000_000)


def test_nothing_ran_that_runs_where_it_is_trusted(read):
    _, safely, trusted = read
    assert not safely and trusted == sorted(f"canary{i}" for i in range(len(hostile.LIVE)))


@pytest.mark.parametrize(
    "load, key, switch",
    [
        (load_trained, "model.teacher.weights", "model.teacher.trust_checkpoint=True"),
        (initialise, "train.init_checkpoint", "train.trust_checkpoint=True"),
    ],
)
def test_the_message_says_what_trusting_means(tmp_path, load, key, switch):
    path = hostile.LIVE["reduce in a zoo file"][0](str(tmp_path / "a"), str(tmp_path / "canary"))
    with pytest.raises(ConfigError) as error:
        load(tiny.detector("retinanet"), path, key)
    message = str(error.value)
    assert message.startswith(f"{key}={path}: asks for posix.system, ")
    assert "could run any program" in message and switch in message and "\n" not in message


OTHERS = {
    "mmdet.pth": ({"state_dict": {"neck.w": torch.ones(1)}, "meta": {}}, "under state_dict, as MM"),
    "a.pth": ({"model": [1]}, "holds no weights"),
    "b.pth": ([1], "no dictionary of weights"),
    "yolo.pth": ({"model": torch.nn.Linear(1, 1)}, "asks for torch.nn.modules.linear.Linear, "),
    "page.pth": (b"<!DOCTYPE html>\n<html>", "cannot be read"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_of_another_kind_is_called_what_it_is(tmp_path, name):
    data, problem = OTHERS[name]
    (tmp_path / name).write_bytes(data if isinstance(data, bytes) else torch_bytes(data))
    with pytest.raises(ConfigError, match=f"^key.x=.*{problem}") as error:
        load_trained(tiny.detector("retinanet"), str(tmp_path / name), "key.x")
    assert str(error.value).isprintable()


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


@pytest.mark.parametrize("core", [b"core", b"_core"], ids=["numpy 1", "numpy 2"])
@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
def test_arrays_of_any_numpy_and_protocol(tmp_path, protocol, core):
    rest = [1, (2, "x"), {"y": None}, 2**70, 1.5, b"z", np.float32(3), OrderedDict(a=1)]
    pickled = pickle.dumps({**ARRAYS, "again": ARRAYS["matrix"], "rest": rest}, protocol)
    if core == b"core":  # a length byte goes before the name in protocol 4 and up
        pickled = re.sub(rb"(.)numpy\._core\.(\w+)", _older, pickled, flags=re.S)
        if protocol >= 4:  # a frame is as optional as its length is wrong now
            pickled = pickled[:2] + pickled[11:]
    (tmp_path / "a.pkl").write_bytes(pickled)
    found = read_weights(str(tmp_path / "a.pkl"))["model"]
    assert found.pop("again") is found["matrix"] and found.keys() == ARRAYS.keys()
    for name, expected in ARRAYS.items():
        assert np.array_equal(found[name], expected) and found[name].shape == expected.shape, name
        assert found[name].dtype == expected.dtype.newbyteorder("="), name


def _older(match):
    before, module = match.groups()
    named = b"numpy.core." + module
    short = before == bytes([len(named) + 1])
    return (bytes([len(named)]) if short else before) + named


def test_an_array_of_python_2(tmp_path):
    """As numpy wrote it there: the bytes are a string."""
    raw = np.array([1.5, -2.0, 1e-30], np.float32).tobytes()
    (tmp_path / "a.pkl").write_bytes(
        b"\x80\x02}U\x01acnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
        b"K\x00\x85U\x01b\x87R(K\x01K\x03\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNN"
        b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x0c" + raw + b"tbs."
    )
    found = read_weights(str(tmp_path / "a.pkl"))["model"]["a"]
    assert found.tolist() == np.float32([1.5, -2.0, 1e-30]).tolist()


@pytest.fixture(scope="module")
def trained():
    """A detector's state whose every tensor differs from a fresh one's."""
    state = tiny.detector("retinanet", seed=1).state_dict()
    state.update({k: v + 1 for k, v in state.items() if v.is_floating_point()})
    return state


def as_arrays(state):
    return {k: v.numpy() for k, v in state.items() if "num_batches" not in k}


def torch_bytes(data, legacy=False):
    file = io.BytesIO()
    torch.save(data, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def trainer_state():
    """What training saves: optimizer, schedule, scaler, and what older schedulers saved."""
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return {
        "optimizer": optimizer.state_dict(),
        "grad_scaler": torch.amp.GradScaler("cpu").state_dict(),
        "milestones": Counter([3, 3]),
        "size": torch.Size([2]),
        "parameter": layer.weight,
        "device": torch.device("cpu"),
        "view": torch.arange(9.0).reshape(3, 3).t()[1:],
        "half": torch.ones(3, dtype=torch.bfloat16),
        "type": torch.float32,
        "bytes": b"\xff\x00",
    }


LAYOUTS = {
    "zoo.pkl": lambda s: pickle.dumps({"model": as_arrays(s), "__author__": "Detectron2"}),
    "zoo2.pkl": lambda s: pickle.dumps({"model": as_arrays(s), "__author__": "x"}, protocol=2),
    "run.pth": lambda s: torch_bytes({"model": s, "iteration": 7, "trainer": trainer_state()}),
    "legacy.pth": lambda s: torch_bytes({"model": s, "iteration": 7}, legacy=True),
    "bare.pt": lambda s: torch_bytes(OrderedDict(s)),
    "parallel.pth": lambda s: torch_bytes({f"module.{k}": v for k, v in s.items()}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_detector_in_any_layout(tmp_path, trained, name):
    path = tmp_path / name
    path.write_bytes(LAYOUTS[name](trained))
    model = tiny.detector("retinanet")
    rest = load_trained(model, str(path), "model.teacher.weights")
    names = as_arrays(trained) if name.endswith(".pkl") else trained
    assert all(torch.equal(model.state_dict()[k], trained[k]) for k in names)
    assert rest.get("iteration") == (7 if name in ("run.pth", "legacy.pth") else None)


def test_a_trainers_state_comes_back(tmp_path):
    state = trainer_state()
    torch.save({"model": {"a": torch.ones(2)}, "trainer": state}, tmp_path / "a.pth")
    found = read_weights(str(tmp_path / "a.pth"))["trainer"]
    for name in ("grad_scaler", "milestones", "size", "device", "type", "bytes"):
        assert found[name] == state[name]
    for name in ("view", "half", "parameter"):
        assert torch.equal(found[name], state[name])
    moments = [s["optimizer"]["state"][0]["exp_avg"] for s in (found, state)]
    assert torch.equal(*moments)


BACKBONES = {
    "bare.pth": lambda a: torch_bytes({k: torch.from_numpy(v) for k, v in a.items()}),
    "bare.safetensors": None,
    "pycls.pyth": lambda a: torch_bytes(
        {"epoch": 3, "model_state": {k: torch.from_numpy(v) for k, v in a.items()}}
    ),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_is_matched_by_its_names(tmp_path, name):
    """They are the backbone's own, without the detector's prefix."""
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
    data = {"blobs": arrays, "cfg": "MODEL:"} if blobs else arrays
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(data, protocol=2))
    model = tiny.detector("retinanet")
    _load(model, str(tmp_path / "R-50.pkl"), "key.x", False, None)
    stem = model.backbone.bottom_up.stem.conv1
    assert np.array_equal(stem.weight.detach().numpy(), first)
    assert np.array_equal(stem.norm.weight.detach().numpy(), scale)


# --- safetensors ---------------------------------------------------------------------------------


def test_safetensors_there_and_back(tmp_path, trained):
    state = {
        k: v.contiguous(memory_format=torch.channels_last) if v.dim() == 4 else v
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
