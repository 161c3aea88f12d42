"""The teacher's maps on disk: the right ones, rounded once, and no run depends on what was there before."""

import copy
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from detectron2.config import LazyCall as L
from detectron2.data import build_detection_train_loader
from detectron2.data import transforms as T
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from disks import FAULTS, mounted, unmount
from tiny import arguments

from sharedkd import ConfigError, FrozenTeacher, IdenticalLayer, SharedKD, Stage
from sharedkd.analysis.pair import Pair
from sharedkd.checks import teacher_maps
from sharedkd.checks.preflight import preflight, report
from sharedkd.checks.teacher_maps import check_teacher_maps
from sharedkd.config import load_config
from sharedkd.data.loader import build_train_loader
from sharedkd.data.shapes import CLASSES, make_shapes
from sharedkd.engine import run
from sharedkd.parts import assemble
from sharedkd.speed.benchmark import Benchmark
from sharedkd.speed.teacher_cache import DIGEST, TeacherCache, image_digest, room

pytestmark = pytest.mark.filterwarnings("ignore")

FPN = frozenset({"fpn"})
BOTH = FPN | {"backbone"}
STRIDES = (4, 8, 16, 32, 64)
A, B = tiny.record(seed=1), tiny.record(seed=2)  # both 64 x 96


@pytest.fixture(scope="module")
def detector():
    return tiny.detector("faster_rcnn", seed=4)


@pytest.fixture
def teacher(detector, tmp_path):
    """Makes a teacher, of a changed model if need be, with a cache unless told otherwise."""

    def make(change=lambda model: None, prepare=False, input_format="RGB", **options):
        model = copy.deepcopy(detector)
        change(model)
        options = {"cache": str(tmp_path / "maps"), **options}
        made = FrozenTeacher(model, "", input_format, **options)
        if prepare:
            made.prepare()
        made.runs = []
        model.backbone.register_forward_pre_hook(lambda _, args: made.runs.append(len(args[0])))
        return made

    return make


def entries(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*.safetensors"))


def error(found, expected):
    """Relative, of the worst map."""
    assert found.keys() == expected.keys()
    pairs = [(found[tap][s], x) for tap, levels in expected.items() for s, x in levels.items()]
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs)
    return max(((a - b).float().norm() / b.float().norm()).item() for a, b in pairs)


def same(a, b):
    return all(torch.equal(a[tap][s], x) for tap, levels in b.items() for s, x in levels.items())


# --- maps -------------------------------------------------------------------------------------


def test_maps_are_the_teachers_but_for_rounding(teacher, tmp_path):
    plain = teacher(cache=None, prepare=True).features([A, B], BOTH, "RGB", 32)
    cached = teacher(prepare=True)
    first = cached.features([A, B], BOTH, "RGB", 32)
    assert 1e-5 < error(first, plain) < 5e-4  # half of float16's last bit is 2^-12
    assert set(first["fpn"]) == set(STRIDES) and first["fpn"][4].dtype is torch.float32
    assert len(entries(tmp_path / "maps")) == 4  # two images, two taps


def test_what_was_seen_is_read_and_the_teacher_does_not_run(teacher):
    cached = teacher()
    first = cached.features([A, B], BOTH, "RGB")
    assert cached.runs == [1, 1]
    assert same(cached.features([A, B], BOTH, "RGB"), first)
    assert same(
        cached.features([B], FPN, "RGB"), {"fpn": {s: x[1:] for s, x in first["fpn"].items()}}
    )
    assert cached.runs == [1, 1]
    other = teacher()  # another process
    assert same(other.features([A, B], BOTH, "RGB"), first) and other.runs == []


def test_only_what_is_missing_is_computed(teacher):
    cached = teacher()
    alone = cached.features([A], FPN, "RGB")["fpn"]
    both = cached.features([A, B], FPN, "RGB")["fpn"]
    assert cached.runs == [1, 1]
    assert all(torch.equal(x[:1], alone[s]) for s, x in both.items())
    cached.features([A, B], BOTH, "RGB")
    assert cached.runs == [1, 1, 1, 1]  # for the backbone's


def test_an_entry_does_not_depend_on_the_other_images_of_its_batch(teacher, tmp_path):
    whole = teacher(cache=str(tmp_path / "1")).features([A, B], FPN, "RGB")
    lone = teacher(cache=str(tmp_path / "2"))
    lone.features([B], FPN, "RGB")
    assert same(lone.features([A, B], FPN, "RGB"), whole)
    # as they would, computed together
    plain = teacher(cache=None)
    together, apart = (plain.features(x, FPN, "RGB")["fpn"][4][:1] for x in ([A, B], [A]))
    assert not torch.equal(together, apart)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_memory_layout_is_that_of_the_teachers_own_maps(teacher, layout, prepared):
    cached, plain = teacher(), teacher(cache=None)
    for each in (cached, plain):
        each.model.to(memory_format=layout)
        if prepared:
            each.prepare()
    found, expected = (each.features([A, B], FPN, "RGB")["fpn"] for each in (cached, plain))
    assert [x.stride() for x in found.values()] == [x.stride() for x in expected.values()]
    assert all(x.is_contiguous(memory_format=layout) for x in found.values())


def test_another_canvas_is_another_entry(teacher, tmp_path):
    cached, plain = teacher(), teacher(cache=None)
    larger = tiny.record(height=96, width=64, seed=3)
    for batch in ([A], [A, larger], [larger, A]):
        found, expected = (each.features(batch, FPN, "RGB") for each in (cached, plain))
        assert error(found, expected) < 5e-4
    assert len(entries(tmp_path / "maps")) == 3  # A, and both on 96 x 96
    assert cached.canvas([(64, 96), (96, 64)], 32) == (96, 96)
    found, expected = (each.features([A], FPN, "RGB", 128) for each in (cached, plain))
    assert found["fpn"][4].shape[-2:] == (32, 32) and error(found, expected) < 5e-4


@pytest.mark.parametrize(
    "other",
    [
        {**A, "image": A["image"].flip(2)},
        {**A, "image": A["image"].flip(1)},
        {**A, "image": A["image"].float()},
        {**A, "image": A["image"].view(3, 96, 64)},  # on another canvas, with the same bytes
        {**A, "image": torch.cat([A["image"], A["image"][:, :1]], 1)},
    ],
)
def test_other_pixels_are_another_entry(teacher, tmp_path, other):
    cached, plain = teacher(), teacher(cache=None)
    assert image_digest(other["image"]) != image_digest(A["image"])
    for record in (A, other):
        found, expected = (each.features([record], FPN, "RGB") for each in (cached, plain))
        assert error(found, expected) < 5e-4
    assert len(entries(tmp_path / "maps")) == 2


def test_the_order_of_channels_is_a_part_of_the_key(teacher, tmp_path):
    cached, plain = teacher(), teacher(cache=None)
    for order in ("RGB", "BGR"):
        found, expected = (each.features([A], FPN, order) for each in (cached, plain))
        assert error(found, expected) < 5e-4
    assert len(entries(tmp_path / "maps")) == 2


def other_weights(model):
    model.backbone.fpn_lateral2.bias.data += 1e-3


def other_mean(model):
    model.pixel_mean += 1


def other_network(model):
    """The same weights, that mean something else."""
    model.backbone.bottom_up.stages[0][0].conv1.dilation = (2, 2)
    model.backbone.bottom_up.stages[0][0].conv1.padding = (2, 2)


def other_sums(model):
    model.backbone._fuse_type = "avg"


@pytest.mark.parametrize(
    "change, options",
    [
        *((change, {}) for change in (other_weights, other_mean, other_network, other_sums)),
        (lambda model: None, {"precision": "float32", "prepare": True}),
        (lambda model: None, {"fold": False}),
        (lambda model: None, {"input_format": "BGR"}),
    ],
)
def test_another_teacher_does_not_read_these_maps(teacher, tmp_path, change, options):
    teacher().features([A], FPN, "RGB")
    other = teacher(change, **options)
    expected = teacher(change, **{**options, "cache": None}).features([A], FPN, "RGB")
    assert error(other.features([A], FPN, "RGB"), expected) < 5e-4
    assert other.runs == [1] and len(list((tmp_path / "maps").iterdir())) == 2


def test_a_step_of_another_precision_does_not_read_these_maps(teacher, tmp_path):
    exact, half = teacher(), teacher(cache=None)
    half.cache, half.dtype = exact.cache, None  # as code that prepares nothing would use it
    exact.features([A], FPN, "RGB")
    with torch.autocast("cpu", torch.bfloat16):
        found = half.features([A], FPN, "RGB")
    assert found["fpn"][4].dtype is torch.bfloat16 and half.runs == [1]


@pytest.mark.parametrize("dtype, kept", [(torch.bfloat16, True), (torch.float32, False)])
def test_bfloat16_is_kept_as_it_is(tmp_path, dtype, kept):
    x = torch.randn(1, 8, 5, 7).to(dtype)
    for compute in (lambda *_: {"fpn": {4: x}}, None):  # the second time it is read
        (maps,) = TeacherCache(str(tmp_path)).maps(["ab"], {"fpn": [4]}, compute)
        assert torch.equal(maps["fpn"][4].permute(2, 0, 1).to(dtype), x[0]) is kept


def test_maps_beyond_float16_are_kept_in_bfloat16(teacher):
    def large(model):
        model.backbone.fpn_output2.weight.data *= 1e6

    cached, plain = teacher(large), teacher(large, cache=None)
    expected = plain.features([A], FPN, "RGB")
    assert expected["fpn"][4].abs().max() > 65504
    for _ in range(2):
        found = cached.features([A], FPN, "RGB")
        assert error(found, expected) < 4e-3 and cached.runs == [1]  # bfloat16's 2^-8
        del found["fpn"][4]
        assert error(found, {"fpn": {s: expected["fpn"][s] for s in STRIDES[1:]}}) < 5e-4


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:5],
        lambda data: data[:100],
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: bytes(len(data)),
        lambda data: b"\xff" * len(data),
        lambda data: data.replace(b'"16"', b'"15"'),
    ],
)
def test_a_damaged_entry_is_made_anew(teacher, tmp_path, sharedkd_log, damage):
    expected = teacher().features([A], FPN, "RGB")
    (path,) = (tmp_path / "maps").rglob("*.safetensors")
    whole = path.read_bytes()
    assert damage(whole) != whole
    path.write_bytes(damage(whole))
    again = teacher()
    sharedkd_log.clear()
    assert same(again.features([A], FPN, "RGB"), expected)
    assert again.runs == [1] and path.read_bytes() == whole
    assert len(sharedkd_log.messages) == 1 and "the teacher computes it again" in sharedkd_log.text


def test_two_may_write_the_same_entry_at_the_same_time(tmp_path, monkeypatch, sharedkd_log):
    levels = {"fpn": {4: torch.randn(1, 8, 64, 64)}}
    fsync, others = os.fsync, [TeacherCache(str(tmp_path))]

    def keep(cache):
        return cache.maps(["ab"], {"fpn": [4]}, lambda *_: levels)[0]["fpn"][4]

    def while_another_writes(descriptor):
        if others:
            keep(others.pop())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", while_another_writes)
    found = keep(TeacherCache(str(tmp_path)))
    assert torch.equal(keep(TeacherCache(str(tmp_path))), found)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["ab.safetensors"]
    assert not others and not sharedkd_log.messages


@pytest.mark.parametrize("fault", FAULTS)
def test_a_disk_that_takes_no_more(teacher, tmp_path, sharedkd_log, fault):
    breaks, reason = FAULTS[fault]
    if not mounted(tmp_path / "disk", "8m"):
        pytest.skip("may not mount a disk")
    try:
        expected = teacher(cache=None).features([B], FPN, "RGB")
        cached = teacher(cache=str(tmp_path / "disk"))
        seen = cached.features([A], FPN, "RGB")
        there = entries(tmp_path / "disk")
        with breaks(tmp_path / "disk"):
            sharedkd_log.clear()
            for _ in range(2):
                assert error(cached.features([B], FPN, "RGB"), expected) < 5e-4
                assert same(cached.features([A], FPN, "RGB"), seen)
            assert cached.runs == [1, 1, 1]
            assert len(there) == 1 and entries(tmp_path / "disk") == there
        said = sharedkd_log.messages
        assert len(said) == 1 and "model.teacher.cache" in said[0] and reason in said[0]
    finally:
        unmount(tmp_path / "disk")


def test_some_of_the_disk_is_left_to_checkpoints(monkeypatch, tmp_path, teacher):
    disk = SimpleNamespace(total=10**9, free=5 * 10**7 + 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: disk)
    assert room(str(tmp_path)) == 1000
    teacher().features([A], FPN, "RGB")
    assert entries(tmp_path / "maps") == []


# --- in a step ----------------------------------------------------------------------------------


def pair(student, teacher, stage):
    model = SharedKD(
        student=student, teacher=teacher, stages={"s": Stage(stage)}, input_format="RGB"
    )
    return model.train()


def test_losses_of_a_step_are_the_same_but_for_rounding(teacher):
    found = []
    for options in ({"cache": None}, {}, {}):
        model = pair(tiny.detector("faster_rcnn"), teacher(**options), IdenticalLayer())
        torch.manual_seed(0)
        with EventStorage(0):
            found.append({k: x.item() for k, x in model(tiny.batch()).items()})
    plain, cold, warm = found
    assert cold == warm and cold != plain
    assert cold == pytest.approx(plain, rel=1e-3)


def test_logits_of_regions_come_from_kept_maps(teacher):
    boxes = [Boxes(torch.tensor([[8.0, 8.0, 40.0, 40.0], [30.0, 20.0, 80.0, 60.0]]))]
    plain, _, cached = teacher(cache=None), teacher().features([A], FPN, "RGB"), teacher()
    found, expected = (t.region_logits(t.features([A], FPN, "RGB"), boxes) for t in (cached, plain))
    assert cached.runs == []
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)


def test_maps_of_heads_are_refused(tmp_path):
    student, model = tiny.detector("retinanet"), tiny.detector("retinanet", seed=1)
    cached = FrozenTeacher(model, "", "RGB", cache=str(tmp_path))
    with pytest.raises(ConfigError, match=r"^model\.teacher\.cache=.*logits; use .*cache=null$"):
        pair(student, cached, IdenticalLayer(tap="logits"))
    with pytest.raises(ConfigError, match=r"^model\.teacher\.cache=.*deltas"):
        cached.features([A], FPN | {"deltas"}, "RGB")
    idle = {"s": Stage(IdenticalLayer(tap="logits"), weight=0)}
    SharedKD(student=student, teacher=cached, stages=idle, input_format="RGB")


@pytest.mark.parametrize("value", [5, "", True])
def test_a_cache_is_a_folders_name(detector, value):
    with pytest.raises(ConfigError, match=r"^model\.teacher\.cache="):
        FrozenTeacher(detector, "", cache=value)


def test_a_record_may_bring_its_digest(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("sharedkd.teacher.image_digest", None)  # nobody may call it
    teacher().features([{**A, DIGEST: "ab" * 16}], FPN, "RGB")
    (path,) = (tmp_path / "maps").rglob("*.safetensors")
    assert (
        path.parent.name == "ab" and path.name == f"{'ab' * 16}-RGB-64x96-float32-cpu.safetensors"
    )


# --- data ---------------------------------------------------------------------------------------


def mapper(augmentations):
    def load(record):
        image = np.full((record["height"], record["width"], 3), record["image_id"], np.uint8)
        given = T.AugInput(image)
        load.augmentations(given)
        return {"image": torch.as_tensor(given.image.transpose(2, 0, 1).copy())}

    load.augmentations = T.AugmentationList(augmentations)
    return load


def loader(sizes, augmentations, batch=2, **options):
    dataset = [{"height": h, "width": w, "image_id": i} for i, (h, w) in enumerate(sizes)]
    return build_train_loader(
        dataset, mapper=mapper(augmentations), total_batch_size=batch, **options
    )


def edges(*lengths, most=1000):
    return T.ResizeShortestEdge(list(lengths), most, "choice")


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_adds_digests_if_it_is_asked_to(workers):
    for asked in (True, False):
        made = loader([(64, 64)] * 3, [T.RandomFlip()], num_workers=workers)
        made.digests = asked
        batches = iter(made)
        records = next(batches) + next(batches)
        batches.close()
        digests = [x.get(DIGEST) for x in records]
        assert digests == [image_digest(x["image"]) if asked else None for x in records]


@pytest.fixture
def model(teacher):
    return pair(tiny.detector("faster_rcnn"), teacher(), IdenticalLayer())


def map_bytes(height, width):
    """By hand: 128 channels at each stride, two bytes for a number."""
    return 2 * 128 * sum(-(-height // s) * -(-width // s) for s in STRIDES)


def payload(folder):
    """Bytes of the maps alone, without the files' heads."""
    paths = list(folder.rglob("*.safetensors"))
    heads = [8 + int.from_bytes(path.read_bytes()[:8], "little") for path in paths]
    return sum(path.stat().st_size for path in paths) - sum(heads)


@pytest.mark.parametrize(
    "lengths, batch, variants", [((64,), 2, 2), ((40, 64), 1, 4)], ids=["one size", "two sizes"]
)
def test_the_estimate_is_what_is_written(model, tmp_path, lengths, batch, variants):
    def gradient(record):  # which its mirror image is not
        image = np.zeros((48, 48, 3), np.uint8)
        image[:, :, 0] = np.arange(48) + record["image_id"]
        given = T.AugInput(image)
        gradient.augmentations(given)
        return {"image": torch.as_tensor(given.image.transpose(2, 0, 1).copy())}

    gradient.augmentations = T.AugmentationList([edges(*lengths), T.RandomFlip()])
    dataset = [{"height": 48, "width": 48, "image_id": i} for i in range(3)]
    made = build_train_loader(dataset, mapper=gradient, total_batch_size=batch)
    found = check_teacher_maps(model, made)
    assert (found["images"], found["variants"], found["there_mb"]) == (3, variants, 0)
    assert found["most_mb"] == found["needed_mb"]
    for _, records in zip(range(150), made):
        model.teacher.features(records, model.taught_taps, "RGB", 32)
    assert len(entries(tmp_path / "maps")) == 3 * variants
    assert payload(tmp_path / "maps") == found["needed_mb"] * 2**20
    there = check_teacher_maps(model, made)["there_mb"]
    assert found["needed_mb"] < there < 1.02 * found["needed_mb"]  # with the files' heads


def test_variants_and_sizes_are_counted(model):
    steps = [T.Resize((64, 80)), edges(32, 64, 128, most=128), T.RandomFlip(0.3), T.RandomFlip(1.0)]
    found = check_teacher_maps(model, loader([(10, 10), (30, 20)], steps))
    # 32 x 40, 64 x 80, and 128 x 160 that is made 102 x 128, on multiples of 32
    sizes = [(32, 64), (64, 96), (128, 128)]
    assert found["variants"] == 6
    assert found["needed_mb"] == 2 * 2 * sum(map_bytes(*x) for x in sizes) / 2**20
    larger = [
        (h, w) for a, b in sizes for h in (32, 64, 128) for w in (64, 96, 128) if h >= a and w >= b
    ]
    assert len(larger) == 9 + 4 + 1
    assert found["most_mb"] == 2 * 2 * sum(map_bytes(*x) for x in larger) / 2**20


class AnotherFlip(T.RandomFlip):
    """It might do anything."""


@pytest.mark.parametrize(
    "augmentation, word",
    [
        (T.ResizeShortestEdge((64, 80), 100), "ResizeShortestEdge to any size from 64 to 80"),
        (T.RandomBrightness(0.9, 1.1), "RandomBrightness"),
        (T.RandomCrop("relative", (0.5, 0.5)), "RandomCrop"),
        (T.RandomApply(T.Resize(64), 0.5), "RandomApply"),
        (AnotherFlip(), "AnotherFlip"),
    ],
)
def test_what_makes_another_image_each_time_is_refused(model, augmentation, word):
    made = loader([(64, 64)], [T.RandomFlip(), augmentation])
    with pytest.raises(ConfigError, match=rf"^model\.teacher\.cache=.*{word};.*cache=null$"):
        check_teacher_maps(model, made)
    check_teacher_maps(model, loader([(64, 64)], [T.ResizeShortestEdge((64, 64), 100)]))


def without_sizes():
    return build_train_loader([{"image_id": 0}], mapper=mapper([]), total_batch_size=1)


def without_augmentations():
    return build_train_loader([{}], mapper=lambda record: record, total_batch_size=1)


def detectron2s():
    return build_detection_train_loader([{}], mapper=lambda x: x, total_batch_size=1)


@pytest.mark.parametrize("make", [without_sizes, without_augmentations, detectron2s])
def test_what_is_not_known_is_refused(model, make):
    with pytest.raises(ConfigError, match=r"^model\.teacher\.cache=.*not known.*cache=null$"):
        check_teacher_maps(model, make())


def test_a_disk_without_room_is_refused_unless_the_maps_are_there(model, monkeypatch):
    made = loader([(64, 96)], [])
    needed = map_bytes(64, 96)
    monkeypatch.setattr(teacher_maps, "room", lambda folder: needed - 1)
    with pytest.raises(ConfigError, match=r"^model\.teacher\.cache=.*make room"):
        check_teacher_maps(model, made)
    model.teacher.features([{**A, "image": A["image"][:, :32]}], FPN, "RGB", 32)
    with pytest.raises(ConfigError, match=r"^model\.teacher\.cache=.*make room"):
        check_teacher_maps(model, made)  # what is there is of another size
    model.teacher.features([A], FPN, "RGB", 32)
    check_teacher_maps(model, made)


def test_a_short_run_needs_no_more_than_it_sees(model, monkeypatch):
    made = loader([(64, 96)] * 5, [T.RandomFlip()])
    needed = map_bytes(64, 96)
    every = check_teacher_maps(model, made)
    assert every["needed_mb"] * 2**20 == pytest.approx(10 * needed)
    monkeypatch.setattr(teacher_maps, "room", lambda folder: 10 * needed - 1)
    with pytest.raises(ConfigError, match="make room"):
        check_teacher_maps(model, made, batches=100)
    found = check_teacher_maps(model, made, batches=3)
    assert found["needed_mb"] * 2**20 == pytest.approx(3 * made.total_batch_size * needed)


# --- whole runs ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Overrides that make a pair of Faster R-CNNs tiny, all but the two folders."""
    root = tmp_path_factory.mktemp("workspace")
    shapes = make_shapes(root / "shapes", train=4, val=1, size=(64, 64))
    weights = tiny.detector("faster_rcnn", num_classes=len(CLASSES), seed=7).state_dict()
    torch.save({"model": weights}, root / "teacher.pth")
    (root / "teacher.py").write_text(
        f"import sys; sys.path.insert(0, {str(tiny.ROOT / 'tests')!r})\n"
        f"import tiny\nmodel = tiny.node('faster_rcnn', 18, {len(CLASSES)})\n"
    )
    return [
        *(f"data.{x}_json={shapes}/{x}.json" for x in ("train", "val")),
        *(f"data.{x}_images={shapes}/{x}" for x in ("train", "val")),
        *("data.short_edge=[64]", "data.test_short_edge=64", "dataloader.evaluator=null"),
        *("dataloader.train.num_workers=0", "dataloader.train.total_batch_size=2"),
        *("train.device=cpu", "train.max_iter=4", "train.eval_period=0"),
        f"model.teacher.config={root / 'teacher.py'}",
        f"model.teacher.weights={root / 'teacher.pth'}",
    ]


@pytest.fixture
def forwards(monkeypatch):
    """Counts the teacher's."""
    calls, run = [], FrozenTeacher._run

    def counting(self, images, taps):
        calls.append(len(images))
        return run(self, images, taps)

    monkeypatch.setattr(FrozenTeacher, "_run", counting)
    return calls


def test_a_run_does_not_depend_on_what_the_cache_holds(workspace, tmp_path, forwards):
    def train(name, cache, *flags, period=100):
        forwards.clear()
        opts = [f"train.output_dir={tmp_path / name}", f"model.teacher.cache={cache}"]
        opts += [f"train.checkpointer.period={period}"]
        run(arguments("custom_coco.py", *workspace, *opts, flags=flags))
        return torch.load(tmp_path / name / "model_final.pth", weights_only=False)["model"]

    def equal(student):
        return all(torch.equal(student[name], x) for name, x in cold.items())

    maps = tmp_path / "maps"
    cold = train("cold", maps, period=2)
    files = list(maps.rglob("*.safetensors"))
    assert forwards == [1] * len(files) and 4 <= len(files) < 8  # of the 8 images that are seen
    log = (tmp_path / "cold/log.txt").read_text()
    assert f"the teacher's maps: up to 1.0 MB in {maps} (4 images x 2 variants)" in log

    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:1000])
    assert equal(train("warm", maps)) and forwards == [1, 1]  # for these two

    # interrupted in the middle, and resumed with an empty cache elsewhere
    shutil.copytree(tmp_path / "cold", tmp_path / "resumed")
    (tmp_path / "resumed/model_final.pth").unlink()
    (tmp_path / "resumed/model_0000003.pth").unlink()
    (tmp_path / "resumed/last_checkpoint").write_text("model_0000001.pth")
    halfway = torch.load(tmp_path / "resumed/model_0000001.pth", weights_only=False)["model"]
    assert not equal(halfway)
    assert equal(train("resumed", tmp_path / "elsewhere", "--resume")) and forwards


def test_preflight_shows_what_maps_take_and_keeps_none(workspace, tmp_path):
    maps = tmp_path / "maps"
    opts = [f"train.output_dir={tmp_path}/run", f"model.teacher.cache={maps}"]
    config = str(tiny.ROOT / "configs/custom_coco.py")
    found = preflight(config, [*workspace, *opts])
    assert found["ok"] and "measured" in found and not maps.exists()
    # upright images, 64 pixels wide and up to 96 high
    assert found["teacher_maps"]["needed_mb"] * 2**20 == 8 * map_bytes(96, 64)
    assert f"the teacher's maps: up to 1.0 MB in {maps} (4 images x 2 variants)" in report(found)
    assert "model.teacher.cache" not in json.dumps(found["warnings"])

    opts += ["data.short_edge=[32,64]", "train.max_iter=100"]  # long enough to meet all sizes
    found = preflight(config, [*workspace, *opts], measure=False)
    (warning,) = (x for x in found["warnings"] if x["key"] == "model.teacher.cache")
    # those of 64 x 32 on these and on 64 x 64, 96 x 32 and 96 x 64, too
    most = 16 * map_bytes(96, 64) + 8 * sum(map_bytes(*x) for x in ((64, 32), (64, 64), (96, 32)))
    assert f"up to {most / 2**20:.1f} MB of maps" in warning["message"]


def test_a_config_that_cannot_use_it_is_refused_before_training(workspace, tmp_path):
    opts = [f"train.output_dir={tmp_path}/run", f"model.teacher.cache={tmp_path}/maps"]
    cfg = load_config(str(tiny.ROOT / "configs/custom_coco.py"), [*workspace, *opts])
    cfg.dataloader.train.mapper.augmentations.append(
        L(T.RandomContrast)(intensity_min=0.9, intensity_max=1.1)
    )
    with pytest.raises(ConfigError, match=r"^model\.teacher\.cache=.*RandomContrast"):
        assemble(cfg)
    assert not (tmp_path / "maps").exists()


def test_analysis_reads_no_kept_maps(workspace, tmp_path):
    config = str(tiny.ROOT / "configs/custom_coco.py")
    assert Pair(config, [*workspace, f"model.teacher.cache={tmp_path}"]).model.teacher.cache is None


def test_a_benchmark_reads_kept_maps_once_they_are_there(tmp_path, forwards):
    config = str(tiny.ROOT / "configs/quickstart/sharedkd.py")
    settings = ["train.device=cpu", f"model.teacher.cache={tmp_path}"]
    cfg = load_config(config, settings, without_data=True)
    plain = load_config(config, settings[:1], without_data=True)
    step = Benchmark(plain, {}, 64, 2, {"cached": cfg}).arm("cached")
    step()
    assert forwards == [1, 1] and len(entries(tmp_path)) == 2
    step()
    assert forwards == [1, 1]
