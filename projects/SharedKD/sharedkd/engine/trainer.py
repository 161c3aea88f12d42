"""The trainer: adds the stages' losses to the detector's, and trains plain detectors all the same."""

import random
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Dict, Iterable, List, Mapping, Optional, Tuple

import numpy as np
import torch
import torch.distributed as dist
from detectron2.engine import SimpleTrainer
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sharedkd.engine.hooks.nonfinite import BadSteps, find_culprits, not_finite
from sharedkd.errors import ConfigError

from .snapshot import Snapshot

__all__ = ["SharedKDTrainer", "check_amp"]

DISTILL = "distill/"  # the beginning of a distillation term's name


@dataclass
class _Step:
    """What is to be logged of one step, its values still on the device, and what repeats it.

    Attributes:
        weights: of the stages.
        batches: the data loader's records, one list per accumulated part.
        failure: what a detector said that refused its own numbers; then the step ends there.
    """

    iteration: int
    weights: Mapping[str, float]
    metrics: Dict[str, Tensor] = field(default_factory=dict)
    batches: List[List[Dict[str, Any]]] = field(default_factory=list)
    data_time: float = 0.0
    failure: str = ""


def check_amp(dtype: Optional[torch.dtype], device_type: str) -> None:
    """Raises:
    ConfigError: a ``device_type``, such as ``cuda``, that cannot train in mixed precision of this
        ``dtype``; None, which is no mixed precision, is never at fault.
    """
    if dtype is torch.float16 and device_type != "cuda":
        raise ConfigError(
            "train.amp.dtype",
            "float16",
            f"does not work on train.device={device_type}",
            "use bfloat16",
        )


class SharedKDTrainer(SimpleTrainer):
    """Detectron2's SimpleTrainer with distillation stages, AMP, clipping and accumulation.

    The same class trains the plain student, so that a baseline and a distilled run differ by the
    distillation and by nothing else.

    Every random draw of a step depends on (seed, iteration, rank) alone.  So a resumed run repeats
    the uninterrupted one, and a loss that draws random numbers does not change the detector's draws
    in later steps.

    Args:
        model: :class:`SharedKD` or a plain detector, perhaps wrapped in DDP.
        data_loader: yields lists of Detectron2's records.
        optimizer: as usual.
        max_iter: length of the run, for stage times given as fractions.
        seed: see above.
        amp_dtype: ``torch.float16``, ``torch.bfloat16`` or None (no autocast).
        clip_grad_norm: largest norm of the whole gradient; None: no clipping.
        accumulate: batches per optimizer step, each counting 1/accumulate.
        log_period: on a GPU, losses are read every so many steps, in the last one, and before a
            checkpoint: a step need not wait for the one before.  On a CPU, and if bad steps are to
            be skipped, they are read in each.
        on_nonfinite, max_skipped_steps: see :class:`~sharedkd.engine.hooks.nonfinite.BadSteps`.

    Raises:
        ConfigError: float16 on the CPU, accumulate below 1, or see BadSteps.
    """

    iter: int  # Detectron2's: the iteration that runs

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[List[Dict[str, Any]]],
        optimizer: torch.optim.Optimizer,
        *,
        max_iter: int,
        seed: int = 0,
        amp_dtype: Optional[torch.dtype] = None,
        clip_grad_norm: Optional[float] = None,
        accumulate: int = 1,
        log_period: int = 20,
        on_nonfinite: str = "stop",
        max_skipped_steps: int = 10,
    ):
        super().__init__(model, data_loader, optimizer)
        self.module = model.module if isinstance(model, DistributedDataParallel) else model
        self.stages = getattr(self.module, "stages", {})
        self.schedule_length = max_iter
        self.seed = seed
        self.device_type = next(model.parameters()).device.type
        check_amp(amp_dtype, self.device_type)
        if accumulate < 1:
            raise ConfigError("train.accumulate", accumulate, "is less than 1", "use 1 or more")
        self.amp_dtype = amp_dtype
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=amp_dtype is torch.float16)
        self.clip_grad_norm = clip_grad_norm
        self.accumulate = accumulate
        self.bad_steps = BadSteps(on_nonfinite, max_skipped_steps)
        at_once = self.device_type == "cpu" or self.bad_steps.skipping
        self.read_period = 1 if at_once else log_period
        self.batch: List[Dict[str, Any]] = []  # the last one, as the data loader made it
        self._unread: List[_Step] = []
        detector = self.detector
        if amp_dtype is not None and isinstance(detector, DenseDetector):
            # fvcore's box losses are not written for half precision.
            detector.head.register_forward_hook(_to_float32)

    @property
    def detector(self) -> nn.Module:
        """The student, or the plain detector that is trained."""
        return getattr(self.module, "student", self.module)

    def stage_weights(self) -> Dict[str, float]:
        """stage name -> weight in this iteration."""
        return {
            name: stage.weight_at(self.iter, self.schedule_length)
            for name, stage in self.stages.items()
        }

    def run_step(self) -> None:
        """One optimizer step.

        Raises:
            NonFiniteLossError: a loss or the gradient is infinite or NaN on any rank, and the step
                is not to be skipped; before any weight changes.  On a GPU, where losses are read
                later, the gradient of such a step counts as zero, and the error comes when they are
                read, by the first rank also before a checkpoint is written.
        """
        self.optimizer.zero_grad()
        step = _Step(self.iter, self.stage_weights())
        before = Snapshot(self.module, self.detector) if self.bad_steps.skipping else None
        for part in range(self.accumulate):
            start = time.perf_counter()
            self.batch = next(self._data_loader_iter)
            step.data_time += (time.perf_counter() - start) / self.accumulate
            step.batches.append(self.batch)
            if not step.failure:
                self._run_part(step, part)
        if not step.failure:
            self._finish_gradient(step)
        self._unread.append(step)
        ends = self.iter + 1 == self.schedule_length
        due = (self.iter + 1) % self.read_period == 0 or ends or step.failure
        if not due or self._read():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            before.restore()
            if self.scaler.is_enabled() and not step.failure:
                self.scaler.update(self.scaler.get_scale())  # no overflow: the scale stays

    def _run_part(self, step: _Step, part: int) -> None:
        """Forward and backward of one batch."""
        last = part == self.accumulate - 1
        no_sync = getattr(self.model, "no_sync", nullcontext)
        with nullcontext() if last else no_sync():
            try:
                losses = self._losses(self.model, self.batch, part, self.iter, step.weights)
            except FloatingPointError as e:
                step.failure = str(e)
            step.failure = self._agree_on(step.failure)
            if step.failure:
                return
            total, values = self._total(losses, self._mean_over_ranks(losses), step.weights)
            self.scaler.scale(total / self.accumulate).backward()
        for name, value in values.items():
            step.metrics[name] = step.metrics.get(name, 0.0) + value / self.accumulate

    def _agree_on(self, failure: str) -> str:
        """What any rank's detector said; where steps do not wait for the device, what this rank's said."""
        if comm.get_world_size() == 1 or self.read_period > 1:
            return failure
        failed = torch.tensor(float(bool(failure)), device=next(self.module.parameters()).device)
        dist.all_reduce(failed)
        return next(x for x in comm.all_gather(failure) if x) if failed else ""

    def _finish_gradient(self, step: _Step) -> None:
        """Measure the whole gradient, clip it, and keep it from the weights if it is not finite."""
        self.scaler.unscale_(self.optimizer)
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in params if p.grad is not None]
        if self.clip_grad_norm is not None:
            norm = nn.utils.clip_grad_norm_(params, self.clip_grad_norm)
        else:
            norm = torch.stack(torch._foreach_norm(gradients)).norm()
        step.metrics["grad_norm"] = norm
        if self.scaler.is_enabled():
            step.metrics["loss_scale"] = self.scaler.scale(torch.ones_like(norm))
        if self.read_period > 1:  # nobody looks before the weights change
            bad = ~torch.isfinite(norm + step.metrics["total_loss"])
            for gradient in gradients:
                gradient.masked_fill_(bad, 0.0)

    def _losses(
        self,
        model: nn.Module,
        batch: List[Dict[str, Any]],
        part: int,
        iteration: int,
        weights: Mapping[str, float],
    ) -> Dict[str, Tensor]:
        """The model's losses, with the random draws of that iteration and part."""
        batch = self._on_device(batch)
        self._reseed(part, iteration)
        with (
            torch.autocast(
                self.device_type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None
            ),
            torch.jit.optimized_execution(self.device_type == "cuda"),
        ):
            # fvcore's scripted focal loss, where ours does not take its place, rounds in another way once
            # the JIT has warmed up, which a resumed run does again; on the CPU that is to be exact.
            return model(batch, weights) if self.stages else model(batch)

    def repeat(
        self,
        batch: List[Dict[str, Any]],
        part: int,
        iteration: int,
        weights: Mapping[str, float],
    ) -> Tuple[Tensor, Dict[str, Tensor]]:
        """The forward of a step once more, on this rank alone.

        Args:
            batch: the data loader's records.
            part: which of the accumulated batches it is.
            iteration, weights: of the step.

        Returns:
            as from a step: the tensor to differentiate, and the losses as they count in it, name ->
            scalar attached to the graph.
        """
        losses = self._losses(self.module, batch, part, iteration, weights)
        values = {k: x.detach().double() for k, x in losses.items()}
        return (
            self._total(losses, values, weights)[0],
            self._counted(losses, values, weights),
        )

    def _on_device(self, data: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
        """Images are copied once, for student and teacher, while the GPU still computes."""
        if self.device_type != "cuda":
            return data
        device = next(self.module.parameters()).device
        return [{**x, "image": x["image"].to(device, non_blocking=True)} for x in data]

    def _total(
        self,
        losses: Mapping[str, Tensor],
        values: Dict[str, Tensor],
        weights: Mapping[str, float],
    ) -> Tuple[Tensor, Dict[str, Tensor]]:
        """(tensor to differentiate, what to log)"""
        counted = self._counted(losses, values, weights)
        counted_values = self._counted(values, values, weights)
        total = sum(v for k, v in counted.items() if not k.startswith(DISTILL))
        total_value = sum(v for k, v in counted_values.items() if not k.startswith(DISTILL))
        sums = {}
        for name in self.stages:
            terms = [k for k in losses if k.startswith(f"{DISTILL}{name}/")]
            if not terms:
                continue
            total = total + sum(counted[k] for k in terms)
            sums[f"loss_distill_{name}"] = sum(counted_values[k] for k in terms)
            total_value = total_value + sums[f"loss_distill_{name}"]
        return total, {**values, **sums, "total_loss": total_value}

    def _counted(
        self,
        losses: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
        weights: Mapping[str, float],
    ) -> Dict[str, Tensor]:
        """The losses as they count in the total: those of a relative stage are scaled."""
        counted = dict(losses)
        detector = sum(v for k, v in values.items() if not k.startswith(DISTILL))
        for name, stage in self.stages.items():
            terms = [k for k in losses if k.startswith(f"{DISTILL}{name}/")]
            if stage.relative and terms:
                raw = sum(values[k] for k in terms)
                scale = weights[name] * detector / raw
                scale = torch.where(raw > 0, scale, torch.ones_like(scale))
                counted.update({k: scale.to(losses[k].dtype) * losses[k] for k in terms})
        return counted

    def _mean_over_ranks(self, losses: Mapping[str, Tensor]) -> Dict[str, Tensor]:
        """The losses in float64, detached.  A NaN of one rank is a NaN for all."""
        device = next(self.module.parameters()).device
        vector = torch.stack([x.detach().double().to(device) for x in losses.values()])
        if comm.get_world_size() > 1:
            dist.all_reduce(vector)
            vector /= comm.get_world_size()
        return dict(zip(losses, vector.unbind()))

    def _read(self, together: bool = True) -> bool:
        """Bring the losses of the last steps to the CPU in one copy, check and log them.

        Args:
            together: all ranks do.

        Returns:
            whether the last step's gradient may change the weights.
        """
        steps, self._unread = self._unread, []
        scalars = [x.double() for step in steps for x in step.metrics.values()]
        values = iter(torch.stack(scalars).tolist() if scalars else ())
        now, fine = self.iter, True
        for step in steps:
            metrics = {name: next(values) for name in step.metrics}
            what = step.failure or not_finite(metrics)
            fine = not what
            if what:
                lone = step.failure and self.read_period > 1
                found = find_culprits(self, step, together and not lone)
                where = f" ({'; '.join(found)})" if found else ""
                self.bad_steps.bad(step.iteration, what + where)
                metrics = {}
            elif np.isfinite(metrics["grad_norm"]):
                self.bad_steps.good()
            else:
                del metrics["grad_norm"]  # an overflow: the scaler skips the step
            if comm.is_main_process():
                self.storage.iter = step.iteration
                self._log(metrics, step.weights, step.data_time)
        if steps and comm.is_main_process():
            self.storage.iter = now
        return fine

    def _log(
        self, metrics: Dict[str, float], weights: Mapping[str, float], data_time: float
    ) -> None:
        """Raw values and weights of each stage beside the weighted losses that are trained on."""
        for name, weight in weights.items():
            prefix = f"{DISTILL}{name}/"
            for key in [k for k in metrics if k.startswith(prefix)]:
                metrics[key] /= weight
            self.storage.put_scalar(f"{prefix}weight", weight, smoothing_hint=False)
        self.storage.put_scalars(data_time=data_time, **metrics)
        if self.bad_steps.skipping:
            skipped = self.bad_steps.total
            self.storage.put_scalar("skipped_steps", skipped, smoothing_hint=False)

    def _reseed(self, part: int, iteration: int) -> None:
        words = np.random.SeedSequence(
            (self.seed, iteration, part, comm.get_rank())
        ).generate_state(3)
        random.seed(int(words[0]))
        np.random.seed(words[1])
        torch.manual_seed(int(words[2]))

    def after_train(self) -> None:
        # Detectron2 counts one iteration too many where none was left to train.
        self.iter = min(self.iter, self.max_iter)
        super().after_train()

    def state_dict(self) -> Dict[str, Any]:
        """The run's state beside the model's weights.

        Raises:
            NonFiniteLossError: a step whose losses were not read yet is not finite.
        """
        self._read(together=False)  # a broken run leaves no checkpoint
        state = super().state_dict()
        fingerprints = self._teacher_fingerprints()
        state["teacher"] = fingerprints.pop(None, None)
        state["teachers"] = fingerprints  # of the named ones
        state["grad_scaler"] = self.scaler.state_dict()
        # Dense detectors keep a running mean outside of their state dict.
        state["bad_steps"] = self.bad_steps.state_dict()
        state["bad_images"] = dict(self.bad_images)
        state["loss_normalizer"] = getattr(self.detector, "loss_normalizer", None)
        return state

    def _teacher_fingerprints(self) -> Dict[Optional[str], Optional[str]]:
        sources = getattr(self.module, "sources", {})
        return {name: teacher.fingerprint for name, teacher in sources.items()}

    @property
    def bad_images(self) -> Dict[str, str]:
        """Images that the data loader passed over, name -> why."""
        loader = getattr(self.data_loader, "bad_images", None)
        return {} if loader is None else loader.files

    def check_resumable(self, state_dict: Mapping[str, Any]) -> None:
        """Raises:
        ConfigError: the run whose ``state_dict`` this is learned from another teacher.
        """
        then = {None: state_dict["teacher"], **state_dict.get("teachers", {})}
        now = self._teacher_fingerprints()
        for name in dict.fromkeys([*then, *now]):
            before, after = then.get(name), now.get(name)
            if before != after:
                raise ConfigError(
                    "model.teacher.weights" if name is None else f"model.teachers.{name}.weights",
                    after,
                    f"is not the teacher of the run to resume ({before})",
                    "resume with the same teacher, or start anew in another train.output_dir",
                )

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from ``state_dict``, which :meth:`state_dict` returned.

        Raises:
            ConfigError: see :meth:`check_resumable`.
        """
        self.check_resumable(state_dict)
        super().load_state_dict(state_dict)
        if self.scaler.is_enabled() and state_dict["grad_scaler"]:
            self.scaler.load_state_dict(state_dict["grad_scaler"])
        if "bad_steps" in state_dict:
            self.bad_steps.load_state_dict(state_dict["bad_steps"])
        self.bad_images.update(state_dict.get("bad_images", {}))
        if state_dict["loss_normalizer"] is not None:
            self.detector.loss_normalizer = state_dict["loss_normalizer"]


def _to_float32(module: nn.Module, args: Tuple[Any, ...], output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.float()
    return type(output)(_to_float32(module, args, x) for x in output)
