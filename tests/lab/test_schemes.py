"""The table of schemes: each is what its page says, and is measured beside the plain student."""

from collections import Counter
from types import SimpleNamespace

import pytest
import tiny
import torch

from sharedkd import FrozenTeacher
from sharedkd.config import load_config
from sharedkd.lab.schemes import PLAIN, benches, measure_schemes

#: Scheme -> how many teachers are in memory, how often one runs in a step, and which stages learn.
STEPS = {
    "one frozen teacher": (1, 1, {"identical"}),
    "two teachers": (2, 2, {"identical", "other"}),
    "mean of two teachers": (2, 2, {"identical"}),
    "sequence of two teachers": (2, 1, {"identical_near"}),
    "average of the student": (1, 1, {"identical"}),
    "two peers": (0, 0, {"other", "peer/other/back"}),
    "self-reflection": (1, 1, {"channels", "responses", "review"}),
    "as many images without labels": (1, 2, {"identical"}),  # labelled ones, and the others
}


@pytest.fixture(scope="module")
def found():
    folder = tiny.ROOT / "configs/quickstart"
    settings = ["train.device=cpu", "train.amp.enabled=False"]
    settings += [f"model.teacher.config={folder / 'plain.py'}"]  # smaller than its own teacher
    cfg = load_config(str(folder / "sharedkd.py"), settings, without_data=True)
    return benches(cfg, image_size=64, batch_size=1)


def test_what_runs_in_a_step(found, monkeypatch):
    monkeypatch.setattr(FrozenTeacher, "prepare", lambda self, dtype: {})  # which takes long
    calls, seen = Counter(), {}
    for method in ("__init__", "features"):
        own = getattr(FrozenTeacher, method)
        monkeypatch.setattr(
            FrozenTeacher,
            method,
            lambda *args, method=method, own=own, **more: (
                calls.update([method]) or own(*args, **more)
            ),
        )
    for name, bench in found.items():
        calls.clear()
        losses = []
        bench.pair.register_forward_hook(
            lambda module, args, out, losses=losses: losses.append(out)
        )
        bench.distill()()
        terms = (x.replace("distill/", "") for x in losses[0] if "distill/" in x)
        learn = {x.rpartition("/")[0] for x in terms}
        seen[name] = calls["__init__"], calls["features"], learn
        del bench.pair  # the memory of one at a time
    assert seen == STEPS


class Fake:
    """Stands for a benchmark: a step is a number that is noted."""

    def __init__(self, name, bench, ran):
        self.name, self.ran = name, ran
        self.device, self.dtype, self.records = bench.device, bench.dtype, bench.records
        self.prepared = SimpleNamespace(dtype=torch.float32)

    def distill(self):
        return lambda: self.ran.append(self.name)

    def student_sharedkd(self):
        return lambda: self.ran.append(PLAIN)

    def peak_mb(self, arm, starts):
        return {"student_sharedkd": 100.0, "distill": 200.0 + len(self.name)}[arm]


def test_all_take_turns_with_the_plain_student(found):
    ran, bench = [], found["one frozen teacher"]
    result = measure_schemes({x: Fake(x, bench, ran) for x in ("a", "bb")}, rounds=3, starts=1)
    assert Counter(ran) == {PLAIN: 5, "a": 5, "bb": 5}  # two rounds warm up
    assert list(result["seconds"]) == [PLAIN, "a", "bb"] and list(result["ratios"]) == ["a", "bb"]
    assert result["memory_mb"] == {PLAIN: 100.0, "a": 201.0, "bb": 202.0}
    assert result["images"] == [[64, 96]]
