"""The meta-architecture: student and teacher side by side in training, the student alone in inference."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Callable, Dict, FrozenSet, Iterable, List, Mapping, Optional, Tuple, Union

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from sharedkd.errors import ConfigError, Findings, RunError
from sharedkd.losses.base import HEAD_TAPS, UNLABELLED, Batch, Maps, Regions

from .balance import AutoWeight, AutoWeights, held
from .checks import (
    check_channels,
    check_image_format,
    check_needs,
    check_peers,
    check_stage,
    check_teachers,
    check_times,
)
from .classic import arguments_of
from .heads import HeadTap, Hidden, RegionTap, anchor_labels
from .layout import keep_keypoints_contiguous
from .preparation import device_of, size_divisibility
from .stages import DISTILL, PEER, Stage, under
from .taps import FeatureTap, common_pixels, run_pyramid, top_left
from .teachers import Peer, StudentMaps, Teacher, teacher_key

__all__ = [
    "SharedKD",
    "factors_of",
    "losses_of",
    "of_students",
    "pairs_of",
]

#: What a loss needs -> the taps that this takes.
NEEDED_TAPS = {"regions": {"fpn"}, "labels": {"logits"}}


@dataclass
class Seen:
    """What one run of a student on a batch gave.

    Args:
        losses: the detector's own.
        maps: its maps at the taps of the active stages.
        inputs: the data loader's records.
        labels: see :class:`Batch`.
        boxes: per image the regions that it sampled; None when no active stage needs them.
        regions: their labels and its logits of them.
        hidden: what the layers of its head read.
    """

    losses: Dict[str, Tensor]
    maps: Maps
    inputs: List[Dict[str, Any]]
    labels: Optional[Dict[int, Tensor]] = None
    boxes: Optional[List[Boxes]] = None
    regions: Optional[Regions] = None
    hidden: Optional[Hidden] = None

    def batch(self) -> Batch:
        """What a loss may read of it; without a teacher."""
        sizes = [tuple(x["image"].shape[-2:]) for x in self.inputs]
        return Batch(self.maps, None, sizes, self.inputs, labels=self.labels)


@META_ARCH_REGISTRY.register()
class SharedKD(nn.Module):
    """An unmodified Detectron2 detector that learns from a frozen one.

    In training the student's own forward runs; forward hooks take its feature maps, the teacher
    runs up to its FPN on the same pixels, and the stages' losses compare the two.  In inference, and
    in every checkpoint, there is only the student.

    Args:
        student: any detector with ``.backbone`` (GeneralizedRCNN, RetinaNet, FCOS, ...).
        teacher: the source of maps of every stage that names no other; None for teacher-free
            (cross-layer only) distillation.
        teachers: name -> a further source of maps, for the stages that name it.  A teacher runs once a
            step, and only if an active stage needs it.
        stages: name -> :class:`Stage`; those of weight zero are left out.
        peers: name -> :class:`~sharedkd.modeling.teachers.peer.Peer`, a further student that trains in the
            same step; a stage may name it as its teacher.  Inference and :meth:`state_dict` are the first
            student's alone.
        input_format: channel order of the images that the data loader delivers.
        max_iter: the run's iterations, for stages whose times are fractions of it, under a trainer other
            than :class:`SharedKDTrainer`, which knows it.
        pyramid: the name of the student's module whose outputs are its pyramid, such as ``neck``; None:
            its ``backbone``.
        key: its place in the config, for messages.

    Raises:
        ConfigError: the student has no pyramid, see :class:`~sharedkd.modeling.taps.FeatureTap`; no stage has
            anything to compare; or see :mod:`~sharedkd.modeling.checks`.
    """

    @configurable
    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: Optional[Teacher] = None,
        teachers: Optional[Mapping[str, Teacher]] = None,
        stages: Optional[Mapping[str, Stage]] = None,
        peers: Optional[Mapping[str, Peer]] = None,
        input_format: str = "BGR",
        max_iter: Optional[int] = None,
        pyramid: Optional[str] = None,
        key: str = "model",
    ):
        super().__init__()
        self.key = key
        if isinstance(student, SharedKD):
            fix = "give the plain student, and further teachers by model.teachers"
            raise ConfigError(f"{key}.student", "SharedKD", "is a pair itself", fix)
        check_teachers(teacher, teachers or {})
        check_peers(peers or {}, teachers or {})
        check_image_format(student, input_format)
        self._tap = FeatureTap(student, pyramid, f"{key}.pyramid")
        self.student = student
        self.teacher = teacher
        lent = {name: _maps_of(name, peer) for name, peer in (peers or {}).items()}
        self.teachers: Dict[str, Teacher] = {**(teachers or {}), **lent}
        self.stages: Dict[str, Stage] = {}
        self.input_format = input_format
        self.max_iter = max_iter
        self._trains_on_boxes = hasattr(student, "proposal_generator") or isinstance(
            student, DenseDetector
        )
        self.pyramid = pyramid

        findings = Findings()
        for source in self.sources.values():
            source.attach(student, input_format, pyramid)
            findings.step(check_channels, source, student, input_format)
        for name, stage in (stages or {}).items():
            findings.step(self._add, name, stage)
        self.lends = StudentMaps(student, self._tap, pyramid)  # to its peers
        self.peers = nn.ModuleDict()
        for name, peer in (peers or {}).items():
            findings.step(self._join, name, peer, lent)
        findings.raise_errors()
        idle = [name for name, x in (stages or {}).items() if x.weight and name not in self.stages]
        if idle and not self.stages:
            raise ConfigError(
                f"{key}.stages",
                ", ".join(idle),
                "none of them has anything to compare in this pair",
                "use a loss that compares the maps of both detectors, such as that of pkd",
            )
        # Registered for DDP, the optimizer and device moves; most losses have no parameters.
        self.losses = nn.ModuleDict({name: stage.loss for name, stage in self.stages.items()})
        self.auto_weights = AutoWeights(
            {
                name: AutoWeight(
                    f"{key}.stages.{name}.weight", x.share, x.every, x.balance is not None
                )
                for name, x in self.stages.items()
                if x.auto
            }
        )

    def _add(self, name: str, stage: Stage) -> None:
        """Check a stage, and bind its loss to this pair."""
        key = f"{self.key}.stages.{name}"
        check_stage(key, stage, self.teachers)
        if stage.weight == 0:  # what is switched off need not fit
            return
        teacher = self.sources.get(stage.teacher)
        shapes = teacher.shapes if teacher else None
        stage.loss.bind(self._tap.shapes, shapes, f"{key}.loss")
        check_needs(key, stage, self.student, teacher)
        if not stage.loss.idle:
            self.stages[name] = stage

    def _join(self, name: str, peer: Peer, lent: Mapping[str, StudentMaps]) -> None:
        """Add a peer, which learns from this student and from the maps that the other peers lend."""
        for stage_name, stage in peer.stages.items():
            if getattr(stage, "end", None) == "teacher":
                key = f"model.peers.{name}.stages.{stage_name}.end"
                raise ConfigError(key, "teacher", "a peer is not evaluated", "use a time or null")
        pair = SharedKD(
            student=peer.student,
            teacher=self.lends,
            teachers={other: maps for other, maps in lent.items() if other != name},
            stages=peer.stages,
            input_format=self.input_format,
            pyramid=peer.pyramid,
            key=f"model.peers.{name}",
        )
        pair.lends = lent[name]
        self.peers[name] = pair

    @property
    def pairs(self) -> Dict[str, "SharedKD"]:
        """All students with their stages, by the prefix of their losses' names; the first one's is ``""``."""
        return {"": self, **{f"{PEER}{name}/": pair for name, pair in self.peers.items()}}

    def check_record(self, record: Dict[str, Any]) -> None:
        """Check that a training record has what the stages read.

        Raises:
            ConfigError: it has not, see :meth:`DistillationLoss.check_record`.
        """
        for name, stage in self.stages.items():
            stage.loss.check_record(record, f"{self.key}.stages.{name}.loss")

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Dict[str, Any]:
        """The arguments from ``cfg``, a classic yaml config.

        Its keys are added by :func:`sharedkd.config.classic.add_sharedkd_config`.
        """
        return arguments_of(cfg)

    @property
    def device(self) -> torch.device:
        return device_of(self.student)

    def __getattr__(self, name: str) -> Any:
        """The student's attribute, such as ``roi_heads``: hooks and checkpointers ask for them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name == "student" or hasattr(type(self), name):
                raise  # of a property, the error inside it
            return getattr(self.student, name)

    def forward(
        self, batched_inputs: List[Dict[str, Any]], weights: Optional[Mapping[str, float]] = None
    ) -> Union[Dict[str, Tensor], List[Dict[str, Any]]]:
        """Compute the losses of a training step, or in inference the student's detections.

        Args:
            batched_inputs: Detectron2's records, as for the student.  Those with ``unlabelled=True`` are
                seen by losses of maps alone: each of these terms is the mean over all images, the
                detector's losses are those of the others.  A batch norm sees the labelled images first,
                then the others.
            weights: stage name -> weight in this step, in training; a stage that is left out or
                weighs zero is not computed.  A peer's stage is named ``peer/<peer>/<stage>``.  None: by
                the stages' schedules and the iteration of Detectron2's EventStorage.

        Returns:
            In training: the student's own losses, and ``distill/<stage>/<term>`` for each term of
            each active stage, times its weight; the same of each peer under ``peer/<peer>/``.  In
            inference: what the student returns.
        """
        if not self.training:
            return self.student(batched_inputs)
        labelled = [x for x in batched_inputs if not x.get(UNLABELLED)]
        alone = weights is None  # in a trainer that knows nothing of stages
        if weights is None:
            weights = self._weights_now()
        pairs = self.pairs
        for source in self.sources.values():
            source.begin_step()
        active = {owner: pair._active(owner, weights) for owner, pair in pairs.items()}
        for owner, pair in pairs.items():
            pair._check_inputs(active[owner], labelled)
        # Before the students: the teachers' temporaries are gone when their graphs are built.
        maps = {owner: pair._teacher_maps(active[owner], labelled) for owner, pair in pairs.items()}
        seen = self._run_students(active, labelled)
        terms = {o: pair._terms(active[o], seen[o], maps[o]) for o, pair in pairs.items()}
        others = [x for x in batched_inputs if x.get(UNLABELLED)]
        more = self._see_unlabelled(active, seen, others) if others else {}
        share, losses = len(others) / len(batched_inputs), {}
        for owner, pair in pairs.items():
            own, theirs = terms[owner], more.get(owner, {})
            own.update({k: (1 - share) * own[k] + share * x for k, x in theirs.items()})
            found = pair._with_idle_parameters({**seen[owner].losses, **own})
            losses.update({f"{owner}{name}": x for name, x in found.items()})
        if alone:
            get_event_storage().put_scalars(**factors_of(self, weights))
        return losses

    def _active(self, owner: str, weights: Mapping[str, float]) -> Dict[str, float]:
        """The stages with a weight in this step; ``weights`` has the names of all students' stages."""
        found = {name: weights.get(f"{owner}{name}", 0.0) for name in self.stages}
        return {name: weight for name, weight in found.items() if weight}

    def sees_unlabelled(self, name: str) -> bool:
        """Whether a stage learns from images without labels, too: its loss reads maps alone."""
        stage = self.stages[name]
        source = self.sources.get(stage.teacher)
        pyramids = [self.pyramid, source.pyramid if isinstance(source, StudentMaps) else None]
        # Taps of the head take the detector's full forward.
        heads = any(pyramids) and stage.loss.taps & HEAD_TAPS
        return stage.loss.needs <= {"teacher"} and not heads

    @property
    def unlabelled_stages(self) -> List[str]:
        """The stages of all students that learn from images without labels, too."""
        return [
            f"{owner}{name}"
            for owner, pair in self.pairs.items()
            for name in pair.stages
            if pair.sees_unlabelled(name)
        ]

    def _check_inputs(self, active: Iterable[str], batched_inputs: List[Dict[str, Any]]) -> None:
        """Check that records have what the active stages and the student read."""
        labelled = ["instances" in x for x in batched_inputs]
        if "boxes" in self._needs(active) and not any(labelled):
            self.check_record(batched_inputs[0])
        if self._trains_on_boxes and not all(labelled):
            fix = "leave it out, or give it no objects: then it is trained on as background"
            raise ConfigError("dataloader.train", "", "has an image without labels", fix)

    def _run_students(
        self, active: Mapping[str, Mapping[str, float]], batched_inputs: List[Dict[str, Any]]
    ) -> Dict[str, Seen]:
        """Run each student, with the random draws that it would have alone."""
        devices = [self.device] if self.device.type == "cuda" else []
        seen = {}
        for owner, pair in reversed(self.pairs.items()):
            with torch.random.fork_rng(devices) if owner else nullcontext():
                seen[owner] = pair._run_student(active[owner], batched_inputs)
        return seen

    def _run_student(self, active: Iterable[str], batched_inputs: List[Dict[str, Any]]) -> Seen:
        """Run the student, and take what the active stages and its peers read of it."""
        needs, taps = self._needs(active), self._taps(active)
        regions = RegionTap(self.student) if "regions" in needs else None
        head = HeadTap(self.student) if "crossed" in needs else None
        with (
            self._tap.capture(taps | self.lends.wanted) as maps,
            regions.capture() if regions else nullcontext() as sampled,
            head.capture() if head else nullcontext() as hidden,
        ):
            losses = self.student(batched_inputs)
        self.lends.give(maps)
        own = {tap: maps[tap] for tap in maps if tap in taps}
        seen = Seen(losses, own, batched_inputs, hidden=hidden)
        if "labels" in needs:
            seen.labels = anchor_labels(self.student, batched_inputs, maps["logits"])
        if regions:
            truth = [x["instances"] for x in batched_inputs]
            seen.boxes = sampled["boxes"]
            seen.regions = Regions(regions.labels(seen.boxes, truth), sampled["logits"])
        return seen

    def _see_unlabelled(
        self,
        active: Mapping[str, Mapping[str, float]],
        seen: Mapping[str, Seen],
        batched_inputs: List[Dict[str, Any]],
    ) -> Dict[str, Dict[str, Tensor]]:
        """Run teachers and students on images without labels, up to the maps that stages read.

        Runs after the students' own forward, from which peers take the maps of the labelled images, and
        after their terms, which set the automatic weights.

        Returns:
            the terms of each student's stages that see these images.
        """
        pairs = self.pairs
        also = {
            owner: {name: w for name, w in active[owner].items() if pair.sees_unlabelled(name)}
            for owner, pair in pairs.items()
        }
        maps = {o: pair._teacher_maps(also[o], batched_inputs) for o, pair in pairs.items()}
        more = {
            o: pair._run_pyramid(also[o], batched_inputs, seen[o].losses)
            for o, pair in pairs.items()
        }
        terms = {}
        for owner, pair in pairs.items():
            with held(pair.auto_weights):
                terms[owner] = pair._terms(also[owner], more[owner], maps[owner])
        return terms

    def _run_pyramid(
        self,
        active: Iterable[str],
        batched_inputs: List[Dict[str, Any]],
        losses: Dict[str, Tensor],
    ) -> Seen:
        """Run the student up to the maps that the active stages and its peers read; not at all without any.

        Args:
            losses: of the student on the labelled images.
        """
        taps = self._taps(active)
        wanted = taps | self.lends.wanted
        with self._tap.capture(wanted) as maps:
            if wanted:
                found = run_pyramid(self.student, batched_inputs, self.pyramid, key="model.student")
            if wanted & HEAD_TAPS:
                self._tap.head.run(found)
        self.lends.give(maps)
        return Seen(losses, {tap: maps[tap] for tap in maps if tap in taps}, batched_inputs)

    def _terms(
        self,
        active: Mapping[str, float],
        seen: Seen,
        teacher_maps: Mapping[Optional[str], Maps],
    ) -> Dict[str, Tensor]:
        """The terms of the active stages, times their weights.

        Args:
            active: stage -> weight, above zero.
            seen: of this step's student.
            teacher_maps: of :meth:`_teacher_maps`.
        """
        batches = {
            source: self._batch(source, names, seen, teacher_maps.get(source))
            for source, names in self._by_source(active).items()
        }
        found = {}
        with torch.autocast(self.device.type, enabled=False):
            detector = sum(seen.losses.values()) if self.auto_weights else None
            for name, weight in active.items():
                terms = self.losses[name](batches[self.stages[name].teacher])
                if not terms:
                    loss = type(self.losses[name]).__name__
                    fix = "let it return its terms in every step, zeros where there is nothing to compare"
                    place = f"{self.key}.stages.{name}.loss"
                    raise RunError(place, loss, "has returned no term", fix)
                if name in self.auto_weights:
                    terms = self.auto_weights[name](terms, detector, self._read(name, seen.maps))
                for term, value in terms.items():
                    found[f"{DISTILL}{name}/{term}"] = weight * value
        return found

    def _batch(
        self, source: Optional[str], names: Iterable[str], seen: Seen, theirs: Optional[Maps]
    ) -> Batch:
        """What the stages ``names``, which learn from one source, read in this step.

        Maps and labels are those of the pixels that student and source both show.
        """
        batch = seen.batch()
        if theirs is not None:
            key = teacher_key(source, self.key)
            batch.student, batch.teacher = common_pixels(seen.maps, theirs, key)
            if seen.labels is not None:
                batch.labels = {
                    stride: top_left(x, batch.student["logits"][stride].shape[-2:])
                    for stride, x in seen.labels.items()
                }
        needs = self._needs(names)
        if "regions" in needs:
            teacher = self.sources[source]
            logits, deltas = teacher.region_predictions(theirs, seen.boxes)
            crossed = partial(teacher.finish_regions, seen.hidden) if "crossed" in needs else None
            batch.regions = replace(seen.regions, teacher=logits, deltas=deltas, crossed=crossed)
        elif "crossed" in needs:
            batch.crossed = partial(self._crossed, source, seen, batch.student["logits"])
        return batch

    def _crossed(
        self, source: Optional[str], seen: Seen, shown: Mapping[int, Tensor], left: int
    ) -> Maps:
        """See :class:`Batch`; ``shown``: maps of the pixels that student and source both show."""
        found = self.sources[source].finish_head(seen.hidden, left)
        return {
            tap: {stride: top_left(x, shown[stride].shape[-2:]) for stride, x in levels.items()}
            for tap, levels in found.items()
        }

    def _weights_now(self) -> Dict[str, float]:
        """The weights of all students' stages in the iteration of the EventStorage."""
        iteration = get_event_storage().iter
        for pair in self.pairs.values():
            for name, stage in pair.stages.items():
                check_times(f"{pair.key}.stages.{name}", stage, self.max_iter)
        stages = of_students(self, "stages")
        return {name: x.weight_at(iteration, self.max_iter) for name, x in stages.items()}

    def _teacher_maps(
        self, active: Iterable[str], batched_inputs: List[Dict[str, Any]]
    ) -> Dict[Optional[str], Maps]:
        """The maps of each source that some of the active stages read."""
        found = {}
        for source, names in self._by_source(active).items():
            readers = [x for x in names if "teacher" in self.stages[x].loss.needs]
            if readers:
                found[source] = self.sources[source].features(
                    batched_inputs,
                    self._taps(readers),
                    self.input_format,
                    size_divisibility(self.student),
                )
        return found

    def _read(self, name: str, maps: Maps) -> List[Tensor]:
        """The student's maps that a stage learns through."""
        taps, strides = self._taps([name]) - self.losses[name].guides, self.losses[name].strides
        levels = [(s, x) for tap in sorted(taps) for s, x in maps[tap].items() if x.requires_grad]
        return [x for s, x in levels if not strides or s in strides]

    def _with_idle_parameters(self, losses: Dict[str, Tensor]) -> Dict[str, Tensor]:
        """Add zero gradients for losses that are off: DDP waits for a gradient of every parameter."""
        owned = list(self.losses.parameters())
        if owned:
            first = next(iter(losses))
            losses[first] = losses[first] + 0.0 * sum(p.sum() for p in owned)
        return losses

    def _by_source(self, names: Iterable[str]) -> Dict[Optional[str], List[str]]:
        """The stages by the source of maps that they learn from."""
        found: Dict[Optional[str], List[str]] = {}
        for name in names:
            found.setdefault(self.stages[name].teacher, []).append(name)
        return found

    def _needs(self, names: Iterable[str]) -> FrozenSet[str]:
        return frozenset().union(*(self.stages[name].loss.needs for name in names))

    def _taps(self, names: Iterable[str]) -> FrozenSet[str]:
        needed = self._needs(names) & NEEDED_TAPS.keys()
        taps = (self.stages[name].loss.taps for name in names)
        return frozenset().union(*taps, *(NEEDED_TAPS[need] for need in needed))

    @property
    def sources(self) -> Dict[Optional[str], Teacher]:
        """All sources of maps, by the name that a stage uses; None is ``teacher``."""
        return {**({} if self.teacher is None else {None: self.teacher}), **self.teachers}

    # Teachers are no submodules, but move with the model.
    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> "SharedKD":
        for teacher in self.sources.values():
            teacher.apply_to_tensors(fn)
        super()._apply(fn, *args, **kwargs)
        keep_keypoints_contiguous(self.student)
        return self

    # A checkpoint of this model is a checkpoint of the student, with plain Detectron2's names.
    # What losses own rides beside it (see sharedkd.engine.run).
    def state_dict(self, *args: Any, **kwargs: Any) -> Dict[str, Tensor]:
        """The student's state, to which ``args`` and ``kwargs`` are passed."""
        return self.student.state_dict(*args, **kwargs)

    def load_state_dict(
        self, state_dict: Mapping[str, Tensor], *args: Any, **kwargs: Any
    ) -> Tuple[List[str], List[str]]:
        """Load ``state_dict`` into the student, to which ``args`` and ``kwargs`` are passed.

        Returns:
            the missing and the unexpected keys.
        """
        return self.student.load_state_dict(state_dict, *args, **kwargs)


def losses_of(model: nn.Module) -> nn.Module:
    """The distillation losses of ``model``.

    Empty for a plain detector, whose `losses` may be a method.
    """
    return model.losses if isinstance(model, SharedKD) else nn.ModuleDict()


def pairs_of(model: nn.Module) -> Dict[str, nn.Module]:
    """All students of ``model`` with their stages, see :attr:`SharedKD.pairs`; a plain detector is alone."""
    return model.pairs if isinstance(model, SharedKD) else {"": model}


def of_students(model: nn.Module, group: str) -> Dict[str, Any]:
    """What all students of ``model`` have for their stages, by the names that weights have.

    Args:
        group: ``stages``, ``losses`` or ``auto_weights``; a plain detector has none.
    """
    pairs = model.pairs if isinstance(model, SharedKD) else {}
    return {
        f"{o}{name}": x for o, pair in pairs.items() for name, x in getattr(pair, group).items()
    }


def factors_of(model: nn.Module, weights: Mapping[str, float]) -> Dict[str, Tensor]:
    """The factors of the stages of ``model`` that set themselves and are on, as they are logged."""
    found = {}
    for stage, auto in of_students(model, "auto_weights").items():
        for term, factor in auto.factors.items() if weights[stage] else ():
            found["/".join(filter(None, (under("factor/", stage), term)))] = factor
    return found


def _maps_of(name: str, peer: Peer) -> StudentMaps:
    tap = FeatureTap(peer.student, peer.pyramid, f"model.peers.{name}.pyramid")
    return StudentMaps(peer.student, tap, peer.pyramid)
