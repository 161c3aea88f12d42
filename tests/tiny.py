"""Real detectors and records small enough for a CPU test."""

import contextlib
import copy
import functools
import importlib.util
import io
import runpy
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import default_argument_parser
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from sharedkd import FrozenTeacher, SharedKD, SharedKDTrainer
from sharedkd.config import shared_kd_stages
from sharedkd.engine.run import run

ROOT = Path(__file__).resolve().parent.parent
CLASSES = 3


def _models():
    path = ROOT / "configs/common/small_models.py"
    spec = importlib.util.spec_from_file_location("small_models", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FAMILIES = ("faster_rcnn", "mask_rcnn", "cascade_mask_rcnn", "retinanet", "fcos")


def node(family, depth=18, num_classes=CLASSES):
    """LazyConfig node of a small detector."""
    return getattr(_models(), f"small_{family}")(depth, num_classes)


def detector(family, depth=18, num_classes=CLASSES, seed=0):
    """A small detector with random weights that depend on the seed alone."""
    model, draws = _built(family, depth, num_classes, seed)
    torch.set_rng_state(draws)
    return copy.deepcopy(model)


@functools.lru_cache(maxsize=4)
def _built(family, depth, num_classes, seed):
    """Drawing millions of weights takes longer than copying them."""
    torch.manual_seed(seed)
    return instantiate(node(family, depth, num_classes)), torch.get_rng_state()


def shared_kd():
    """Shared-KD's two parts, both on, at fixed weights."""
    stages = shared_kd_stages(weight=2.0)
    stages.cross.weight = 0.1
    return instantiate(stages)


def record(height=64, width=96, boxes=((8, 8, 40, 40), (30, 20, 80, 60)), seed=0):
    """One training record: a random image with boxes and masks."""
    image = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed))
    instances = Instances((height, width))
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    instances.gt_boxes = Boxes(boxes)
    instances.gt_classes = torch.arange(len(boxes)) % CLASSES
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist()):
        mask[y0:y1, x0:x1] = True
    instances.gt_masks = BitMasks(masks)
    return {
        "image": image.to(torch.uint8),
        "height": height,
        "width": width,
        "instances": instances,
    }


def batch(ground_truth="full"):
    """Two records; ground truth ``full``, ``half`` (one image is empty) or ``empty``."""
    boxes = ((8, 8, 40, 40), (30, 20, 80, 60))
    first = () if ground_truth == "empty" else boxes
    second = boxes if ground_truth == "full" else ()
    return [record(boxes=first, seed=1), record(height=72, width=64, boxes=second, seed=2)]


def frozen(family="retinanet", depth=18, seed=1, **options):
    """A frozen teacher with random weights."""
    return FrozenTeacher(detector(family, depth, seed=seed), "", "RGB", **options)


def pair(stages, student="retinanet", teacher="", **options):
    """A pair; the teacher: a family, a source, None, or one of the student's family where it is not given.

    The student may be a detector in place of a family.
    """
    teacher = student if teacher == "" else teacher
    return SharedKD(
        student=detector(student) if isinstance(student, str) else student,
        teacher=frozen(teacher) if isinstance(teacher, str) else teacher,
        stages=stages,
        **{"input_format": "RGB", **options},
    )


def step(model, records=None, *weights):
    """The losses of a step on these records, or on batch()."""
    torch.manual_seed(0)
    with EventStorage(0):
        return model(batch() if records is None else records, *weights)


class Toy(nn.Module):
    """A detector with one weight; its loss is weight * mean(image), so that the gradient is mean(image)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, inputs):
        return {"loss_toy": self.weight * torch.stack([x["image"] for x in inputs]).mean()}


def toy(values, **options):
    """A trainer of Toy whose batches have the given means; learning rate 1."""
    batches = [[{"image": torch.tensor([float(v)])}] for v in values]
    model = Toy()
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    return SharedKDTrainer(model, batches, sgd, max_iter=100, **options)


def config(path):
    """A shipped config, by its path below configs/."""
    return LazyConfig.load(str(ROOT / "configs" / path))


def arguments(config, *opts, flags=()):
    """The command line's arguments, with a config below configs/."""
    path = str(ROOT / "configs" / config)
    return default_argument_parser().parse_args(["--config-file", path, *flags, *map(str, opts)])


def command(config, *opts, flags=()):
    """The same as a command for subprocess."""
    tool = str(ROOT / "tools/lazyconfig_train_net.py")
    path = str(ROOT / "configs" / config)
    return [sys.executable, "-W", "ignore", tool, "--config-file", path, *flags, *map(str, opts)]


def train_here(self, root, iterations, say):
    """Stands for sharedkd.lab.runs.Run.train: trains in this process, as starting another takes seconds.

    As there, what the run prints does not reach the console.
    """
    flags = ["--resume"] if self.started else []
    with contextlib.redirect_stdout(io.StringIO()):
        run(arguments(self.config, *self.overrides, flags=flags))


def run_tool(name, *arguments):
    """Run a tool in this process as its command line does; returns what it exits with, None if all is well.

    What tools/prologue.py changes is of a process of its own, and this one's path stays as it is.
    """
    path, before = str(ROOT / "tools" / name), sys.modules.get("prologue")
    sys.modules["prologue"] = ModuleType("prologue")
    try:
        with mock.patch("sys.argv", [path, *map(str, arguments)]):
            with mock.patch("sys.path", [*sys.path]):
                runpy.run_path(path, run_name="__main__")
    except SystemExit as e:
        return e.code
    finally:
        del sys.modules["prologue"]
        if before is not None:
            sys.modules["prologue"] = before
