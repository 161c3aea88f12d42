"""Times and memory of a distillation step, beside the plain student's step and the teacher's forward.

All arms of a benchmark run in one process, turn by turn, so that other jobs on the machine slow all
of them down alike, and ratios are taken within a round.  Weights are random: times depend on shapes.
"""

import itertools
import multiprocessing as mp
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cached_property
from statistics import median
from typing import Any, Callable, Dict, Mapping, Optional, Sequence

import torch
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.layers import FrozenBatchNorm2d
from detectron2.structures import BitMasks, Boxes, Instances
from omegaconf import DictConfig
from torch import nn
from torch.utils._pytree import tree_map

from sharedkd.config.build import construct, target_of
from sharedkd.engine.hooks.record import hardware, peak_memory_mb, versions
from sharedkd.engine.parts import amp_dtype, memory_layout, rewire
from sharedkd.engine.run import ddp
from sharedkd.engine.trainer import SharedKDTrainer
from sharedkd.errors import ConfigError
from sharedkd.lab.timing import spread, take_turns
from sharedkd.losses.base import UNLABELLED, Batch
from sharedkd.modeling.layout import keep_keypoints_contiguous
from sharedkd.modeling.meta_arch import SharedKD
from sharedkd.modeling.stages import Stage
from sharedkd.modeling.teachers import FrozenTeacher

__all__ = ["Benchmark", "circumstances", "measure", "ratio"]

OBJECTS = 8  # per image, of random places and sizes
WARM_UP = 2  # rounds that are not counted

Arm = Callable[[], object]
Seconds = Mapping[str, Sequence[float]]


class Benchmark:
    """What is timed of one pair at one input size.

    Each method returns an arm: a call that does its work once.

    Args:
        cfg: of a pair, see :func:`~sharedkd.config.load.load_config`.
        image_size: shorter side of the images in pixels; the longer one is 4/3 of it.
        batch_size: images a step.
        unlabelled: further images a step, without labels.

    Raises:
        ConfigError: not a pair.
    """

    def __init__(self, cfg: DictConfig, image_size: int, batch_size: int, unlabelled: int = 0):
        sources = [cfg.model.get(key) for key in ("teacher", "teachers", "peers")]
        if cfg.model.get("student") is None or not any(sources):
            raise ConfigError(
                "--config-file", "model", "has no student and teacher", "use a pair's config"
            )
        self.cfg, self.size = cfg.copy(), (image_size, batch_size, unlabelled)
        model = self.cfg.model
        for node in (model.get("teacher"), *(model.get("teachers") or {}).values()):
            if target_of(node) is FrozenTeacher:
                node.weights = ""
        self.device = torch.device(cfg.train.device)
        self.dtype = amp_dtype(cfg)
        torch.backends.cudnn.benchmark = cfg.train.cudnn_benchmark
        shape = image_size, 32 * round(image_size * 4 / 96)
        self.records = [_record(shape, seed) for seed in range(batch_size + unlabelled)]
        for record in self.records[batch_size:]:
            del record["instances"]
            record[UNLABELLED] = True
        if self.device.type == "cuda":  # as the data loader does
            self.records = [{**x, "image": x["image"].pin_memory()} for x in self.records]

    # --- arms -------------------------------------------------------------------------------------

    def student(self) -> Arm:
        """A step of the plain student by Detectron2's trainer."""
        student = self._new_student()
        # Detectron2's AMPTrainer is for float16 on CUDA only.
        kind = AMPTrainer if self.dtype is torch.float16 else SimpleTrainer
        trainer = kind(student, itertools.repeat(self.records), self._optimizer(student))
        mixed = kind is SimpleTrainer and self.dtype is not None

        def run() -> None:
            with torch.autocast(self.device.type, self.dtype, enabled=mixed):
                _one_step(trainer, 0)

        return run

    def teacher_eager(self) -> Arm:
        """Backbone and FPN of the teacher, as Detectron2 runs them."""
        teacher = self._new_teacher()
        _tame(teacher.to(self.device).model)
        images = teacher.preprocess(self.records, teacher.input_format, 0).tensor

        @torch.no_grad()
        def run() -> None:
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                teacher.model.backbone(images)

        return run

    def student_sharedkd(self) -> Arm:
        """A step of the plain student by this project's trainer and settings."""
        student = self._new_student().to(memory_format=memory_layout(self.cfg))
        keep_keypoints_contiguous(student)
        rewire(self.cfg, student)
        return self._step(student)  # not the pair's, whose teacher takes memory

    def teacher(self) -> Arm:
        """The teacher's maps, as a distillation step computes them."""
        teacher, taps = self.prepared, frozenset({"fpn"})
        return lambda: teacher.features(self.records, taps, teacher.input_format)

    def distill(self) -> Arm:
        """A distillation step with all stages on."""
        return self._step(self.pair)

    def measuring(self) -> Arm:
        """A distillation step that measures weights, as a run's first ones do."""
        return self._step(self._new_pair(known=False))

    def losses(self) -> Arm:
        """Forward and backward of the losses alone, down to the student's maps."""
        pair, batches = self.pair, {}
        handles = [
            loss.register_forward_pre_hook(
                lambda module, args, name=name: batches.update({name: _as_leaves(args[0])})
            )
            for name, loss in pair.losses.items()
        ]
        self._step(pair)()
        for handle in handles:
            handle.remove()

        def run() -> None:
            total = sum(
                pair.stages[name].full * term
                for name, batch in batches.items()
                for term in pair.losses[name](batch).values()
            )
            total.backward()  # type: ignore[union-attr]
            for batch in batches.values():
                for x in (x for levels in batch.student.values() for x in levels.values()):
                    x.grad = None

        return run

    # --- what they are made of --------------------------------------------------------------------

    @cached_property
    def pair(self) -> SharedKD:
        """The pair as a run trains it, with all stages on in every iteration."""
        return self._new_pair(known=True)

    def _new_pair(self, known: bool) -> SharedKD:
        """A pair whose weights are ``known``, or still to be measured."""
        node = self.cfg.model
        stages = construct(node.stages, "model.stages")
        pair = SharedKD(
            student=self._new_student(),
            teacher=self._new_teacher(),
            teachers=_group(node, "teachers"),
            stages={k: _always(x, known) for k, x in stages.items()},
            peers=_group(node, "peers"),
            input_format=node.input_format,
        )
        pair.to(self.device, memory_format=memory_layout(self.cfg)).train()
        for source in pair.sources.values():
            for each in getattr(source, "teachers", [source]):
                _tame(each.detector)
            source.prepare(self.dtype)
        for each in pair.pairs.values():
            rewire(self.cfg, each.student)
        return pair

    @property
    def prepared(self) -> Any:
        """The teacher as a distillation step runs it."""
        return self.pair.teacher

    def _new_student(self) -> nn.Module:
        torch.manual_seed(0)
        return _tame(construct(self.cfg.model.student, "model.student")).to(self.device).train()

    def _new_teacher(self) -> Any:
        torch.manual_seed(1)
        node = self.cfg.model.get("teacher")
        return None if node is None else construct(node, "model.teacher")

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        node = self.cfg.optimizer.copy()
        node.params.model = model
        optimizer = construct(node, "optimizer")
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # as much work, and random weights stay where they are
        return optimizer

    def _step(self, model: nn.Module) -> Arm:
        trainer = SharedKDTrainer(
            ddp(self.cfg, model),
            itertools.repeat(self.records),
            self._optimizer(model),
            max_iter=10**9,
            amp_dtype=self.dtype,
            clip_grad_norm=self.cfg.train.clip_grad_norm,
        )
        count = itertools.count()
        return lambda: _one_step(trainer, next(count))

    def peak_mb(self, arm: str, starts: int = 1) -> float:
        """Peak memory of an arm in MB, the median over ``starts`` new processes."""
        peaks = []
        for _ in range(starts):
            with ProcessPoolExecutor(1, mp.get_context("spawn")) as pool:
                work = torch.get_num_threads(), arm, self.cfg, *self.size
                peaks.append(pool.submit(_peak, *work).result())
        return median(peaks)


def _peak(threads: int, arm: str, cfg: DictConfig, *size: int) -> float:
    torch.set_num_threads(threads)
    run = getattr(Benchmark(cfg, *size), arm)()
    run()
    run()  # the second step also has the optimizer's state
    return peak_memory_mb()


def ratio(seconds: Seconds, over: str, *under: str, minus: str = "") -> Dict[str, float]:
    """Median, least and greatest (over - minus) / sum(under), each ratio within a round."""
    less = seconds[minus] if minus else itertools.repeat(0.0)
    sums = map(sum, zip(*(seconds[name] for name in under)))
    return spread([(a - b) / c for a, b, c in zip(seconds[over], less, sums)])


def measure(
    bench: Benchmark,
    methods: Mapping[str, Benchmark],
    variants: Mapping[str, Benchmark],
    rounds: int,
    starts: int,
) -> Dict[str, Any]:
    """Measure everything at one input size, for tools/benchmark.py.

    Args:
        bench: of the pair.
        methods, variants: name -> the same pair with another method, and with another setting.
        rounds: times of each arm.
        starts: processes per peak, see :meth:`Benchmark.peak_mb`.

    Returns:
        ``overhead``, the median of distill / (student + teacher_eager); what was measured on what;
        ``ratios`` and ``seconds`` of the arms, each with median, low and high; ``memory_mb``, the
        peak of each step.  The arms are those of ``bench``, and ``NAME`` and ``losses/NAME`` the
        distillation step and the losses of another method or setting.

    Raises:
        ConfigError: a pair without a frozen ``model.teacher``, or without a stage.
    """
    if target_of(bench.cfg.model.get("teacher")) is not FrozenTeacher:
        problem = "is no frozen teacher, whose forward is a part of the figures"
        raise ConfigError("--config-file", "model.teacher", problem, "use --schemes of its pair")
    plain = ("student", "teacher_eager", "student_sharedkd", "teacher")
    stages = construct(bench.cfg.model.stages, "model.stages").values()
    if not stages:
        problem, fix = "has no distillation loss", "add distill.method=shared_kd"
        raise ConfigError("--config-file", "model.stages", problem, fix)
    measuring = ["measuring"] if any(stage.auto for stage in stages) else []
    arms = {name: getattr(bench, name)() for name in (*plain, *measuring)}
    others = {**methods, **variants}
    for name, each in {"distill": bench, **others}.items():
        arms.update({name: each.distill(), f"losses/{name}": each.losses()})
    seconds = take_turns(arms, rounds, WARM_UP)
    ratios = {
        "overhead": ratio(seconds, "distill", "student", "teacher_eager"),
        "added": ratio(seconds, "distill", "teacher_eager", minus="student_sharedkd"),
        "over_plain": ratio(seconds, "distill", "student_sharedkd"),
        "plain": ratio(seconds, "student_sharedkd", "student"),
        "teacher": ratio(seconds, "teacher", "teacher_eager"),
        "losses": ratio(seconds, "losses/distill", "distill"),
        **{f"distill/{name}": ratio(seconds, "distill", name) for name in methods},
        **{name: ratio(seconds, name, "distill") for name in (*measuring, *variants)},
    }
    peaks = {
        name: bench.peak_mb(name, starts) for name in ("student", "student_sharedkd", "distill")
    }
    peaks.update({name: each.peak_mb("distill", starts) for name, each in others.items()})
    return {
        "overhead": ratios["overhead"]["median"],
        **circumstances(bench),
        "ratios": ratios,
        "seconds": {name: spread(each) for name, each in seconds.items()},
        "memory_mb": {name: round(peak) for name, peak in peaks.items()},
    }


def circumstances(bench: Benchmark) -> Dict[str, Any]:
    """What is measured on what: hardware, versions, images, and both precisions."""
    return {
        "device": str(bench.device),
        "hardware": hardware(bench.device),
        "versions": versions(),
        "images": [list(x["image"].shape[-2:]) for x in bench.records],
        "precision": str(bench.dtype or torch.float32)[6:],
        "teacher_precision": str(bench.prepared.dtype)[6:],
    }


def _group(node: DictConfig, key: str) -> Dict[str, Any]:
    """The objects in a group of a model's nodes, by name."""
    nodes = node.get(key) or {}
    return {x: construct(nodes[x], f"model.{key}.{x}") for x in nodes if x != "_target_"}


def _one_step(trainer: SimpleTrainer, iteration: int) -> None:
    trainer.train(iteration, iteration + 1)


def _as_leaves(batch: Batch) -> Batch:
    """The batch with the student's maps cut off from its graph, so that a gradient ends in them."""
    student = {
        tap: {s: x.detach().requires_grad_(x.requires_grad) for s, x in levels.items()}
        for tap, levels in batch.student.items()
    }
    regions, crossed = batch.regions, batch.crossed
    if regions is not None:
        own = regions.student.detach().requires_grad_()
        regions = replace(regions, student=own, crossed=_cut_off(regions.crossed))
    return replace(batch, student=student, regions=regions, crossed=_cut_off(crossed))


def _cut_off(crossed: Optional[Callable[[int], Any]]) -> Optional[Callable[[int], Any]]:
    """What the teacher's head makes of the student's, without the backward through it."""
    if crossed is None:
        return None
    return lambda left: tree_map(lambda x: x.detach().requires_grad_(), crossed(left))


def _record(shape: Sequence[int], seed: int) -> Dict[str, Any]:
    """A training record of random pixels and objects, as Detectron2's mappers return it."""
    draw = torch.Generator().manual_seed(seed)
    height, width = shape
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
    return {"image": image, "height": height, "width": width, "instances": truth}


def _always(stage: Stage, known: bool) -> Stage:
    """A stage that is on in every iteration, with a weight that is ``known`` if it sets itself."""
    weight = stage.full if known else stage.weight
    return replace(stage, weight=weight, start=0, ramp=0, decay=0, end=None)


def _tame(model: nn.Module) -> nn.Module:
    """Halve the frozen norms: with random weights, maps would grow from block to block."""
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.weight.fill_(0.5)
    return model
