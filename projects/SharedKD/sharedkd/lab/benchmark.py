"""What a distillation step costs, measured beside its lower bound: the student's step plus the teacher.

All arms of a benchmark run in one process, turn by turn, so that what slows the machine down for a
while slows all of them down.  Ratios are taken within a round.  Weights are random: times depend on
shapes.
"""

import itertools
import json
import os
import tempfile
import time
from collections import defaultdict
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from multiprocessing.connection import Connection
from statistics import median
from types import MappingProxyType
from typing import Any, Callable, Dict, Iterator, List, Mapping, Sequence, Tuple, Union

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.layers import FrozenBatchNorm2d
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from sharedkd.config.build import construct
from sharedkd.engine.disk import tensor_bytes
from sharedkd.engine.hooks.record import hardware, peak_memory_mb, versions
from sharedkd.engine.parts import amp_dtype, memory_layout, rewire
from sharedkd.engine.run import ddp
from sharedkd.engine.trainer import SharedKDTrainer
from sharedkd.errors import ConfigError
from sharedkd.losses.base import Batch, Maps
from sharedkd.modeling.meta_arch import SharedKD
from sharedkd.modeling.taps import pyramid_shapes
from sharedkd.modeling.teachers.frozen import FrozenTeacher

__all__ = ["Benchmark", "efficiency", "growth", "measure"]

OBJECTS = 8  # an image, of random places and sizes
WARM_UP = 2  # rounds that are not counted
# Kinds of operations by what is in their names; the first that fits counts.
OPERATIONS = {
    "gradients of convolutions": ("convolution_backward",),
    "convolutions": ("convolution", "conv2d"),
    "RoIAlign": ("roi_align",),
    "matrix products": ("::mm", "::addmm", "::bmm", "::baddbmm"),
    "all else": ("",),
}
LARGEST = 8  # operations of the losses that are named
DETECTRON2 = ("student", "teacher_eager")  # arms that run as they do without this project


class Benchmark:
    """One pair at one input size.

    Arms, each a call that does the work once:

    * ``student``: a training step of the plain student, as Detectron2 runs it;
    * ``student_sharedkd``: the same by this project's trainer and settings;
    * ``teacher_eager``: backbone and FPN of the teacher, as Detectron2 runs them;
    * ``teacher``: the same as a distillation step runs them;
    * ``distill``: a distillation step with the config's own stages;
    * a method's name: a distillation step with that method;
    * a variant's name: a distillation step of that config, with models of its own;
    * ``losses/distill``, ``losses/<method>``: forward and backward of the losses alone;
    * ``copies``: the student's maps copied once, which no loss with a gradient for each can go below.

    Args:
        cfg: of a pair, see :func:`~sharedkd.config.load.load_config`.
        methods: name -> config of the same pair with another method.
        image_size: shorter side of the images in pixels; the longer one is 4/3 of it.
        batch_size: images a step.
        variants: name -> config of the same pair that computes in another way.

    Raises:
        ConfigError: not a pair.
    """

    def __init__(
        self,
        cfg: DictConfig,
        methods: Mapping[str, DictConfig],
        image_size: int,
        batch_size: int,
        variants: Mapping[str, DictConfig] = MappingProxyType({}),
    ):
        if cfg.model.get("student") is None or cfg.model.get("teacher") is None:
            raise ConfigError(
                "--config-file", "model", "has no student and teacher", "use a pair's config"
            )
        self.cfg, self.methods, self.variants = cfg, {"distill": cfg, **methods}, variants
        self.device = torch.device(cfg.train.device)
        self.dtype = amp_dtype(cfg)
        torch.backends.cudnn.benchmark = cfg.train.cudnn_benchmark
        self.image_size = image_size
        size = (image_size, 32 * round(image_size * 4 / 96))
        self.records = [_record(size, seed) for seed in range(batch_size)]
        self._iteration = 0

    # --- what arms share, built when it is needed ---------------------------------------------

    @cached_property
    def student(self) -> nn.Module:
        student = self._build_student().to(memory_format=self._layout)
        rewire(self.cfg, student)
        return student

    def _build_student(self) -> nn.Module:
        torch.manual_seed(0)
        return _tame(construct(self.cfg.model.student, "model.student")).to(self.device).train()

    @property
    def _layout(self) -> torch.memory_format:
        return memory_layout(self.cfg)

    @cached_property
    def _eager(self) -> FrozenTeacher:
        """As Detectron2 runs it."""
        return self._build_teacher().to(self.device)

    @cached_property
    def teacher(self) -> FrozenTeacher:
        """The same network as a distillation step runs it."""
        teacher = self._build_teacher().to(self.device)
        teacher.model.to(memory_format=self._layout)
        self.deviation = teacher.prepare(self.dtype)
        return teacher

    def _build_teacher(self) -> FrozenTeacher:
        node = self.cfg.model.teacher.copy()
        node.weights = ""
        torch.manual_seed(1)
        teacher = construct(node, "model.teacher")
        _tame(teacher.model)
        return teacher

    def _pair(self, method: str) -> SharedKD:
        pair = SharedKD(
            student=self.student,
            teacher=self.teacher,
            stages=construct(self.methods[method].model.stages, "model.stages"),
            input_format=self.cfg.model.input_format,
        )
        return pair.to(self.device).train()

    def _with(self, cfg: DictConfig) -> "Benchmark":
        """Another config of the same pair, alone, at the same size."""
        return Benchmark(cfg, {}, self.image_size, len(self.records))

    # --- arms -----------------------------------------------------------------------------------

    def arms(self) -> List[str]:
        steps = [*DETECTRON2, "student_sharedkd", "teacher", *self.methods]
        losses = [f"losses/{method}" for method in self.methods]
        return [*steps, *losses, "copies", *self.variants]

    def arm(self, name: str) -> Callable[[], None]:
        """What the arm ``name`` does, ready to be called in this process."""
        if name in ("teacher_eager", "teacher"):
            return self._teacher_arm(name)
        if name == "student":
            return self._step_of(self._detectron2_trainer())
        if name == "student_sharedkd":
            return self._step_of(self._trainer(self.student))
        if name in self.variants:
            return self._with(self.variants[name]).arm("distill")
        if name.startswith("losses/"):
            return self._losses_arm(name.partition("/")[2])
        if name == "copies":
            return self._copies_arm()
        return self._step_of(self._trainer(self._pair(name)))

    def _teacher_arm(self, name: str) -> Callable[[], None]:
        if name == "teacher":
            return lambda: self.teacher.features(
                self.records, frozenset({"fpn"}), self._eager.input_format
            )
        eager = self._eager
        images = eager.preprocess(self.records, eager.input_format, 0).tensor

        @torch.no_grad()
        def run() -> None:
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                eager.model.backbone(images)

        return run

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        node = self.cfg.optimizer.copy()
        node.params.model = model
        optimizer = construct(node, "optimizer")
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # as much work, and random weights stay where they are
        return optimizer

    def _trainer(self, model: nn.Module) -> SharedKDTrainer:
        train = self.cfg.train
        trainer = SharedKDTrainer(
            ddp(self.cfg, model),
            itertools.repeat(self.records),
            self._optimizer(model),
            max_iter=10**9,
            amp_dtype=self.dtype,
            clip_grad_norm=train.clip_grad_norm,
            accumulate=1,
            log_period=train.log_period,
        )
        # Whatever their schedules, all stages are on.
        weights = {name: stage.weight for name, stage in trainer.stages.items()}
        trainer.stage_weights = lambda: weights
        return trainer

    def _detectron2_trainer(self) -> SimpleTrainer:
        student = self._build_student()
        trainer = AMPTrainer if self.dtype is torch.float16 else SimpleTrainer
        return trainer(student, itertools.repeat(self.records), self._optimizer(student))

    def _step_of(self, trainer: SimpleTrainer) -> Callable[[], None]:
        trainer.max_iter = 10**9
        # Detectron2's AMPTrainer is for float16 on CUDA only.
        mixed = type(trainer) is SimpleTrainer and self.dtype is not None

        def run() -> None:
            with EventStorage(self._iteration) as trainer.storage:
                trainer.iter = self._iteration = self._iteration + 1
                with torch.autocast(self.device.type, self.dtype, enabled=mixed):
                    trainer.run_step()

        run.trainer = trainer  # type: ignore[attr-defined]
        return run

    def _losses_arm(self, method: str) -> Callable[[], None]:
        pair = self._pair(method)
        leaves = self._read_by(pair)

        def run() -> None:
            total: Any = 0.0  # a tensor from the first term on
            for name, batch in leaves.items():
                terms = pair.losses[name](batch)
                total = total + pair.stages[name].weight * sum(terms.values())
            if total.requires_grad:
                total.backward()
            for batch in leaves.values():
                for levels in batch.student.values():
                    for x in levels.values():
                        x.grad = None

        return run

    def _copies_arm(self) -> Callable[[], None]:
        maps = [x.detach() for x in self._read_maps(self._pair("distill"))]

        def run() -> None:
            for x in maps:
                x.clone()

        return run

    def _read_maps(self, pair: SharedKD) -> List[Tensor]:
        """The student's maps that losses read, each once."""
        maps = {
            (tap, stride): x
            for batch in self._read_by(pair).values()
            for tap, levels in batch.student.items()
            for stride, x in levels.items()
        }
        return list(maps.values())

    def _read_by(self, pair: SharedKD) -> Dict[str, Batch]:
        """Stage -> what its loss is given in a step, with maps that are leaves."""
        taken: Dict[str, Batch] = {}
        handles = [
            loss.register_forward_pre_hook(
                lambda module, args, name=name: taken.update({name: args[0]})
            )
            for name, loss in pair.losses.items()
        ]
        self._step_of(self._trainer(pair))()
        for handle in handles:
            handle.remove()
        return {name: _as_leaves(batch) for name, batch in taken.items()}

    # --- measuring ------------------------------------------------------------------------------

    def times(self, names: Sequence[str], rounds: int) -> Dict[str, List[float]]:
        """Seconds of each arm in ``names`` in each of ``rounds`` rounds, arms in turn."""
        seconds: Dict[str, List[float]] = {name: [] for name in names}
        arms = {name: self.arm(name) for name in names}
        for turn in range(-WARM_UP, rounds):
            order = list(arms)[turn % len(arms) :] + list(arms)[: turn % len(arms)]
            for name in order:
                start = self._now()
                arms[name]()
                elapsed = self._now() - start
                if turn >= 0:
                    seconds[name].append(elapsed)
        return seconds

    def _apart(self, name: str) -> AbstractContextManager[Callable[[], float]]:
        """A step's or teacher's arm in a process of its own; a call gives that process's peak in MB."""
        own = {**self.methods, **self.variants}
        work = own.get(name, self.cfg), self.image_size, len(self.records)
        return _in_child(*work, "distill" if name in own else name)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def parts(self, rounds: int) -> Dict[str, float]:
        """Seconds of the parts of a distillation step, and of the ``whole``, in the median step.

        Args:
            rounds: steps that are timed.
        """
        run = self.arm("distill")
        trainer: SharedKDTrainer = run.trainer  # type: ignore[attr-defined]
        for _ in range(WARM_UP):
            run()
        steps: List[Dict[str, float]] = []
        for _ in range(rounds):
            with _marks(trainer, self._now) as marks:
                start = self._now()
                run()
                whole = self._now() - start
            spent = dict(
                teacher=marks["teacher"],
                student_forward=marks["student"],
                losses=marks["losses"],
                backward=marks["optimizer_start"] - marks["forward_end"],
                optimizer=whole + start - marks["optimizer_start"],
                data=marks["forward_start"] - start,
            )
            spent["rest"] = whole - sum(spent.values())  # joins terms, takes maps
            steps.append({**spent, "whole": whole})
        return sorted(steps, key=lambda step: step["whole"])[len(steps) // 2]

    def operations(self) -> Dict[str, float]:
        """Share of each kind of :data:`OPERATIONS` in a distillation step, of one that is profiled."""
        spent = dict.fromkeys(OPERATIONS, 0.0)
        for name, (_, seconds) in self._profiled("distill").items():
            kind = next(k for k, names in OPERATIONS.items() if any(n in name for n in names))
            spent[kind] += seconds
        return {kind: time / sum(spent.values()) for kind, time in spent.items()}

    def loss_operations(self) -> Dict[str, Any]:
        """What the losses of a step are made of, forward and backward, of one that is profiled.

        Returns:
            ``calls`` of operations, and ``shares``: of their time, the operation's name to its share,
            the greatest first.
        """
        found = self._profiled("losses/distill")
        whole = sum(seconds for _, seconds in found.values())
        shares = {name: seconds / whole for name, (_, seconds) in found.items()}
        return {
            "calls": sum(calls for calls, _ in found.values()),
            "shares": dict(sorted(shares.items(), key=lambda item: -item[1])[:LARGEST]),
        }

    def _profiled(self, arm: str) -> Dict[str, Tuple[int, float]]:
        """Operation -> how often an arm calls it, and seconds in it alone (on CUDA, of its kernels)."""
        run = self.arm(arm)
        for _ in range(WARM_UP):
            run()
        kinds = {"cpu": ProfilerActivity.CPU, "cuda": ProfilerActivity.CUDA}
        with profile(activities=[*{ProfilerActivity.CPU, kinds[self.device.type]}]) as seen:
            run()
        time = f"self_{'device' if self.device.type == 'cuda' else 'cpu'}_time_total"
        return {
            each.key: (each.count, getattr(each, time) / 1e6)
            for each in seen.key_averages()
            if each.device_type == DeviceType.CPU  # not a kernel, which counts as its operation's
        }

    def peaks(self, name: str, starts: int) -> List[float]:
        """Peak memory in MB of an arm, in processes of its own.

        Args:
            name: of a step's arm.
            starts: how many processes, one after the other.
        """
        found = []
        for _ in range(starts):
            with self._apart(name) as run:
                run()
                found.append(run())  # from the second step on there is what the optimizer keeps
        return found

    def kept_mb(self) -> Dict[str, float]:
        """What distillation has to hold in memory: the teacher's weights, its maps of a batch, and the
        gradients that the losses give the student's.
        """
        pair = self._pair("distill")
        maps = self.teacher.features(
            self.records,
            pair.taught_taps,
            self.cfg.model.get("input_format", "BGR"),
        )
        return {
            "teacher_weights_mb": tensor_bytes(self._eager.model.state_dict().values()) / 2**20,
            "teacher_maps_mb": tensor_bytes(x for levels in maps.values() for x in levels.values())
            / 2**20,
            "gradients_mb": tensor_bytes(x for x in self._read_maps(pair) if x.requires_grad)
            / 2**20,
        }

    def describe(self) -> Dict[str, Any]:
        """What was measured, on what."""
        return {
            "device": str(self.device),
            "hardware": hardware(self.device),
            "versions": versions(),
            "images": [list(x["image"].shape[-2:]) for x in self.records],
            "precision": str(self.dtype or torch.float32)[6:],
            "teacher_precision": str(self.teacher.dtype)[6:],
            "teacher_deviation": self.deviation,
        }


def ratio(seconds: Mapping[str, Sequence[float]], over: str, *under: str) -> Dict[str, float]:
    """Median, least and greatest ratio within a round of an arm to the sum of others."""
    each = [a / sum(b) for a, *b in zip(seconds[over], *(seconds[name] for name in under))]
    return {"median": median(each), "low": min(each), "high": max(each)}


def measure(bench: Benchmark, rounds: int, starts: int = 3) -> Dict[str, Any]:
    """Everything of one input size, as tools/benchmark.py writes it.

    Args:
        bench: of that size.
        rounds: see :meth:`Benchmark.times` and :meth:`Benchmark.parts`.
        starts: processes of which the median peak counts, for the plain steps and the distilled one:
            memory varies from start to start.

    Returns:
        ``overhead``, the median of distill / (student + teacher_eager); ``ratios``, among them
        ``floor``, what a teacher and losses that cost nothing would leave of it; ``seconds`` (arm to
        median, low, high); ``parts``; ``operations``; ``loss_operations``; ``memory`` in MB, over this
        project's step of the plain student, and ``starts_mb`` of each start.
    """
    seconds = bench.times(bench.arms(), rounds)
    rivals = [name for name in bench.methods if name != "distill"]
    ratios = {
        "overhead": ratio(seconds, "distill", "student", "teacher_eager"),
        "floor": ratio(seconds, "student_sharedkd", "student", "teacher_eager"),
        "plain": ratio(seconds, "student_sharedkd", "student"),
        "over_plain": ratio(seconds, "distill", "student_sharedkd"),
        "teacher": ratio(seconds, "teacher", "teacher_eager"),
        "losses": ratio(seconds, "losses/distill", "distill"),
        "copies": ratio(seconds, "copies", "distill"),
        **{f"distill/{name}": ratio(seconds, "distill", name) for name in rivals},
        **{name: ratio(seconds, name, "distill") for name in bench.variants},
    }
    steps = ("student", "student_sharedkd", *bench.methods, *bench.variants)
    plain = ("student", "student_sharedkd", "distill")
    each = {name: bench.peaks(name, starts if name in plain else 1) for name in steps}
    peaks = {name: median(mb) for name, mb in each.items()}
    return {
        "overhead": ratios["overhead"]["median"],
        **bench.describe(),
        "ratios": ratios,
        "seconds": {
            name: {"median": median(x), "low": min(x), "high": max(x), "all": x}
            for name, x in seconds.items()
        },
        "parts": bench.parts(rounds),
        "operations": bench.operations(),
        "loss_operations": bench.loss_operations(),
        "memory": {
            **bench.kept_mb(),
            "peak_mb": peaks,
            "starts_mb": {name: each[name] for name in plain},
            "over_student_mb": {
                name: peaks[name] - peaks["student_sharedkd"] for name in steps[2:]
            },
        },
    }


def growth(bench: Benchmark, rounds: int) -> List[Dict[str, Any]]:
    """What distillation adds with twice the images, twice the pixels, and with fewer levels.

    Args:
        bench: of the first case; its rivals and variants are left out.
        rounds: of each case.

    Returns:
        of each case ``batch_size``, ``image_size``, ``levels``, ``overhead``, the median ``seconds``
        of both steps, both of Detectron2's arms and the losses, and the MB that a distillation step
        has ``over_student_mb``.
    """
    size, count = bench.image_size, len(bench.records)
    cases = [(size, count), (size, 2 * count), (round(size * 2**0.5 / 32) * 32, count)]
    strides = sorted(pyramid_shapes(bench.student)["fpn"])
    found = []
    for size, count in cases:
        found.append(_case(Benchmark(bench.cfg, {}, size, count), strides, rounds))
    for levels in range(2, len(strides)):
        cfg = bench.cfg.copy()
        for stage in cfg.model.stages.values():
            if isinstance(stage, DictConfig) and "strides" in stage.loss:
                stage.loss.strides = strides[:levels]
        found.append(_case(Benchmark(cfg, {}, *cases[0]), strides[:levels], rounds))
    return found


def _case(bench: Benchmark, strides: Sequence[int], rounds: int) -> Dict[str, Any]:
    arms = [*DETECTRON2, "student_sharedkd", "distill", "losses/distill"]
    seconds = bench.times(arms, rounds)
    plain, distilled = (bench.peaks(x, 1)[0] for x in ("student_sharedkd", "distill"))
    return dict(
        batch_size=len(bench.records),
        image_size=bench.image_size,
        levels=len(strides),
        overhead=ratio(seconds, "distill", "student", "teacher_eager")["median"],
        seconds={name: median(x) for name, x in seconds.items()},
        over_student_mb=distilled - plain,
    )


def efficiency(
    cfg: DictConfig, image_size: int, batch_size: int, processes: int, rounds: int
) -> Dict[str, float]:
    """A step of one process over a step of several, which each have as many images.

    CPU processes over gloo, with one thread each.  1: a gradient's reduction costs nothing.

    Args:
        cfg, image_size, batch_size: see :class:`Benchmark`; each process has its own.
        processes: how many are several.
        rounds: steps of each arm that are timed.

    Returns:
        arm (student_sharedkd, distill) to the ratio of the medians.
    """
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for world in (1, processes):
            path = os.path.join(folder, f"{world}.json")
            arguments = (world, f"{path}.store", path, cfg, image_size, batch_size, rounds)
            mp.start_processes(_in_group, arguments, nprocs=world, start_method="forkserver")
            with open(path) as f:
                seconds.append({name: median(x) for name, x in json.load(f).items()})
    return {name: seconds[0][name] / seconds[1][name] for name in seconds[0]}


def _in_group(
    rank: int,
    world: int,
    store: str,
    path: str,
    cfg: DictConfig,
    image_size: int,
    batch_size: int,
    rounds: int,
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", world_size=world, rank=rank)
    seconds = {
        name: Benchmark(cfg, {}, image_size, batch_size).times([name], rounds)[name]
        for name in ("student_sharedkd", "distill")
    }
    if rank == 0:
        with open(path, "w") as f:
            json.dump(seconds, f)
    dist.destroy_process_group()


@contextmanager
def _in_child(*work: Union[DictConfig, int, str]) -> Iterator[Callable[[], float]]:
    """An arm in a process of its own, which works only while this one waits for it.

    A call gives the most MB that the process had so far.
    """
    context = mp.get_context("forkserver")
    ours, theirs = context.Pipe()
    child = context.Process(
        target=_serve, args=(theirs, torch.get_num_threads(), *work), daemon=True
    )
    child.start()
    theirs.close()

    def run() -> float:
        ours.send(True)
        return ours.recv()

    try:
        ours.recv()  # it is ready
        yield run
    finally:
        ours.close()
        child.join()


def _serve(
    pipe: Connection, threads: int, cfg: DictConfig, image_size: int, batch_size: int, name: str
) -> None:
    torch.set_num_threads(threads)
    run = Benchmark(cfg, {}, image_size, batch_size).arm(name)
    with suppress(EOFError):  # nobody asks any more
        while True:
            pipe.send(peak_memory_mb())
            pipe.recv()
            run()


@contextmanager
def _marks(trainer: SharedKDTrainer, now: Callable[[], float]) -> Iterator[Dict[str, float]]:
    """Seconds within teacher, student and losses, and when the forward and the backward end."""
    model: SharedKD = trainer.model
    marks: Dict[str, float] = defaultdict(float)
    features = model.teacher.features

    def timed_features(*args: Any, **kwargs: Any) -> Maps:
        start = now()
        try:
            return features(*args, **kwargs)
        finally:
            marks["teacher"] += now() - start

    def before(name: str) -> Callable[..., None]:
        return lambda *_: marks.__setitem__(f"{name}_start", now())

    def after(name: str) -> Callable[..., None]:
        return lambda *_: marks.__setitem__(name, marks[name] + now() - marks[f"{name}_start"])

    def end_forward(*_: object) -> None:
        marks["forward_end"] = now()

    handles = [
        model.register_forward_pre_hook(before("forward")),
        model.register_forward_hook(end_forward),
        model.student.register_forward_pre_hook(before("student")),
        model.student.register_forward_hook(after("student")),
        trainer.optimizer.register_step_pre_hook(before("optimizer")),
    ]
    for loss in model.losses.values():
        handles.append(loss.register_forward_pre_hook(before("losses")))
        handles.append(loss.register_forward_hook(after("losses")))
    model.teacher.features = timed_features
    try:
        yield marks
    finally:
        del model.teacher.features
        for handle in handles:
            handle.remove()


def _as_leaves(batch: Batch) -> Batch:
    """The batch with the student's maps cut off from its graph, so that a gradient ends in them."""
    student = {
        tap: {s: x.detach().clone().requires_grad_(x.requires_grad) for s, x in levels.items()}
        for tap, levels in batch.student.items()
    }
    regions = batch.regions
    if regions is not None:
        regions = replace(regions, student=regions.student.detach().requires_grad_())
    return replace(batch, student=student, regions=regions)


def _record(size: Sequence[int], seed: int) -> Dict[str, Any]:
    """A training record of random pixels and objects, as Detectron2's mappers give it."""
    draw = torch.Generator().manual_seed(seed)
    height, width = size
    sides = torch.tensor([width, height, width, height])
    corner = torch.rand(OBJECTS, 2, generator=draw) * 0.7
    extent = 0.05 + torch.rand(OBJECTS, 2, generator=draw) * 0.25
    boxes = torch.cat([corner, corner + extent], 1) * sides
    masks = torch.zeros(OBJECTS, height, width, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist()):
        mask[y0:y1, x0:x1] = True
    truth = Instances((height, width))
    truth.gt_boxes, truth.gt_masks = Boxes(boxes), BitMasks(masks)
    truth.gt_classes = torch.zeros(OBJECTS, dtype=torch.int64)
    image = torch.randint(0, 256, (3, height, width), generator=draw, dtype=torch.uint8)
    return {
        "image": image,
        "height": height,
        "width": width,
        "instances": truth,
    }


def _tame(model: nn.Module) -> nn.Module:
    """Random weights without statistics would let maps grow from block to block beyond all bounds."""
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.weight.fill_(0.5)
    return model
