"""The trainer: adds the stages' losses to the detector's, and trains plain detectors all the same."""

import random
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional, Tuple

import numpy as np
import torch
import torch.distributed as dist
from detectron2.engine import SimpleTrainer
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .errors import ConfigError, NonFiniteLossError

__all__ = ["SharedKDTrainer"]

DISTILL = "distill/"  # the beginning of a distillation term's name


@dataclass
class _Step:
    """What is to be logged of one step, its values still on the device."""

    iteration: int
    metrics: Dict[str, Tensor]
    weights: Mapping[str, float]
    data_time: float


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
            checkpoint: a step need not wait for the one before.  On a CPU they are read in each.

    Raises:
        ConfigError: float16 on the CPU, or accumulate below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader,
        optimizer: torch.optim.Optimizer,
        *,
        max_iter: int,
        seed: int = 0,
        amp_dtype: Optional[torch.dtype] = None,
        clip_grad_norm: Optional[float] = None,
        accumulate: int = 1,
        log_period: int = 20,
    ):
        super().__init__(model, data_loader, optimizer)
        self._module = model.module if isinstance(model, DistributedDataParallel) else model
        self.stages = getattr(self._module, "stages", {})
        self.schedule_length = max_iter
        self.seed = seed
        self.device_type = next(model.parameters()).device.type
        if amp_dtype is torch.float16 and self.device_type != "cuda":
            raise ConfigError(
                "train.amp.dtype",
                "float16",
                f"does not work on train.device={self.device_type}",
                "use bfloat16",
            )
        if accumulate < 1:
            raise ConfigError("train.accumulate", accumulate, "is less than 1", "use 1 or more")
        self.amp_dtype = amp_dtype
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=amp_dtype is torch.float16)
        self.clip_grad_norm = clip_grad_norm
        self.accumulate = accumulate
        self.read_period = 1 if self.device_type == "cpu" else log_period
        self._unread: List[_Step] = []
        detector = self._detector
        if amp_dtype is not None and isinstance(detector, DenseDetector):
            # fvcore's box losses are not written for half precision.
            detector.head.register_forward_hook(_to_float32)

    @property
    def _detector(self) -> nn.Module:
        return getattr(self._module, "student", self._module)

    def stage_weights(self) -> Dict[str, float]:
        """stage name -> weight in this iteration."""
        return {
            name: stage.weight_at(self.iter, self.schedule_length)
            for name, stage in self.stages.items()
        }

    def run_step(self) -> None:
        """One optimizer step.

        Raises:
            NonFiniteLossError: a loss is infinite or NaN on any rank; on a CPU before any weight
                changes, on a GPU when the losses are read, by the first rank also before a
                checkpoint is written.
        """
        self.optimizer.zero_grad()
        weights = self.stage_weights()
        metrics: Dict[str, Tensor] = {}
        data_time = 0.0
        for part in range(self.accumulate):
            start = time.perf_counter()
            data = next(self._data_loader_iter)
            data_time += (time.perf_counter() - start) / self.accumulate
            data = self._on_device(data)
            self._reseed(part)
            last = part == self.accumulate - 1
            no_sync = getattr(self.model, "no_sync", nullcontext)
            with nullcontext() if last else no_sync():
                with torch.autocast(
                    self.device_type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None
                ), torch.jit.optimized_execution(self.device_type == "cuda"):
                    # fvcore's scripted focal loss rounds in another way once the JIT has warmed up,
                    # which a resumed run does again; on the CPU a resumed run is to be exact.
                    losses = self._losses(data, weights)
                total, values = self._total(losses, self._mean_over_ranks(losses), weights)
                self.scaler.scale(total / self.accumulate).backward()
            for name, value in values.items():
                metrics[name] = metrics.get(name, 0.0) + value / self.accumulate
        if self.clip_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            metrics["grad_norm"] = nn.utils.clip_grad_norm_(
                [p for group in self.optimizer.param_groups for p in group["params"]],
                self.clip_grad_norm,
            )
        self._unread.append(_Step(self.iter, metrics, weights, data_time))
        ends = self.iter + 1 == self.schedule_length
        if (self.iter + 1) % self.read_period == 0 or ends:
            self._read()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _losses(self, data: List[Dict[str, Any]], weights: Mapping[str, float]):
        try:
            return self.model(data, weights) if self.stages else self.model(data)
        except FloatingPointError:
            self._read()  # an earlier loss may have broken the weights: then that is to be said
            raise

    def _on_device(self, data: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
        """Images are copied once, for student and teacher, while the GPU still computes."""
        if self.device_type != "cuda":
            return data
        device = next(self._module.parameters()).device
        return [{**x, "image": x["image"].to(device, non_blocking=True)} for x in data]

    def _total(
        self,
        losses: Mapping[str, Tensor],
        values: Dict[str, Tensor],
        weights: Mapping[str, float],
    ) -> Tuple[Tensor, Dict[str, Tensor]]:
        """(tensor to differentiate, what to log)"""
        total = sum(v for k, v in losses.items() if not k.startswith(DISTILL))
        detector_value = sum(v for k, v in values.items() if not k.startswith(DISTILL))
        total_value, sums = detector_value, {}
        for name, stage in self.stages.items():
            terms = [k for k in losses if k.startswith(f"{DISTILL}{name}/")]
            if not terms:
                continue
            distilled, raw = sum(losses[k] for k in terms), sum(values[k] for k in terms)
            if stage.relative:
                scale = weights[name] * detector_value / raw
                scale = torch.where(raw > 0, scale, torch.ones_like(scale))
                distilled, raw = scale.to(distilled.dtype) * distilled, scale * raw
            total = total + distilled
            total_value = total_value + raw
            sums[f"loss_distill_{name}"] = raw
        return total, {**values, **sums, "total_loss": total_value}

    def _mean_over_ranks(self, losses: Mapping[str, Tensor]) -> Dict[str, Tensor]:
        """The losses in float64, detached.  A NaN of one rank is a NaN for all."""
        device = next(self._module.parameters()).device
        vector = torch.stack([x.detach().double().to(device) for x in losses.values()])
        if comm.get_world_size() > 1:
            dist.all_reduce(vector)
            vector /= comm.get_world_size()
        return dict(zip(losses, vector.unbind()))

    def _read(self) -> None:
        """Bring the losses of the last steps to the CPU in one copy, check and log them."""
        steps, self._unread = self._unread, []
        if not steps:
            return
        values = iter(torch.stack([x.double() for s in steps for x in s.metrics.values()]).tolist())
        now = self.iter
        for step in steps:
            metrics = {name: next(values) for name in step.metrics}
            self._check_finite(step.iteration, metrics)
            if comm.is_main_process():
                self.storage.iter = step.iteration
                self._log(metrics, step.weights, step.data_time)
        if comm.is_main_process():
            self.storage.iter = now

    def _check_finite(self, iteration: int, metrics: Mapping[str, float]) -> None:
        broken = {name: x for name, x in metrics.items() if not np.isfinite(x)}
        norm = broken.pop("grad_norm", None)
        terms = {
            k: x for k, x in broken.items() if not k.startswith(("total_loss", "loss_distill_"))
        }
        if broken:
            names = ", ".join(f"{k}={x}" for k, x in (terms or broken).items())
            what = f"{names} is not finite"
        elif norm is not None and not self.scaler.is_enabled():
            # With a scaler it is an overflow, which the scaler answers by skipping the step.
            what = f"the gradient's norm is {norm}, all losses are finite"
        else:
            return
        raise NonFiniteLossError(
            f"iteration {iteration}: {what}; training stops, the last checkpoint is intact"
        )

    def _log(self, metrics: Dict[str, float], weights: Mapping[str, float], data_time) -> None:
        """Raw values and weights of each stage beside the weighted losses that are trained on."""
        for name, weight in weights.items():
            prefix = f"{DISTILL}{name}/"
            for key in [k for k in metrics if k.startswith(prefix)]:
                metrics[key] /= weight
            self.storage.put_scalar(f"{prefix}weight", weight, smoothing_hint=False)
        self.storage.put_scalars(data_time=data_time, **metrics)

    def _reseed(self, part: int) -> None:
        words = np.random.SeedSequence(
            (self.seed, self.iter, part, comm.get_rank())
        ).generate_state(3)
        random.seed(int(words[0]))
        np.random.seed(words[1])
        torch.manual_seed(int(words[2]))

    def state_dict(self):
        self._read()  # a checkpoint must not have weights that a broken loss has changed
        state = super().state_dict()
        state["teacher"] = self._teacher_fingerprint()
        state["grad_scaler"] = self.scaler.state_dict()
        # Dense detectors keep a running mean outside of their state dict.
        state["loss_normalizer"] = getattr(self._detector, "loss_normalizer", None)
        return state

    def _teacher_fingerprint(self) -> Optional[str]:
        teacher = getattr(self._module, "teacher", None)
        return teacher and teacher.fingerprint

    def check_resumable(self, state_dict) -> None:
        """Raises:
        ConfigError: the run of this state learned from another teacher.
        """
        before, now = state_dict["teacher"], self._teacher_fingerprint()
        if before != now:
            raise ConfigError(
                "model.teacher.weights",
                now,
                f"is not the teacher of the run to resume ({before})",
                "resume with the same teacher, or start anew in another train.output_dir",
            )

    def load_state_dict(self, state_dict):
        self.check_resumable(state_dict)
        super().load_state_dict(state_dict)
        if self.scaler.is_enabled() and state_dict["grad_scaler"]:
            self.scaler.load_state_dict(state_dict["grad_scaler"])
        if state_dict["loss_normalizer"] is not None:
            self._detector.loss_normalizer = state_dict["loss_normalizer"]


def _to_float32(module, args, output):
    if isinstance(output, Tensor):
        return output.float()
    return type(output)(_to_float32(module, args, x) for x in output)
