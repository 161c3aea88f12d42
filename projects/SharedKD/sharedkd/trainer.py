"""The trainer: adds the stages' losses to the detector's, and trains plain detectors all the same."""

import random
import time
from contextlib import nullcontext
from typing import Dict, Mapping, Optional

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
            NonFiniteLossError: a loss is infinite or NaN; raised on every rank, before any weight
                changes.
        """
        self.optimizer.zero_grad()
        weights = self.stage_weights()
        metrics: Dict[str, float] = {}
        for part in range(self.accumulate):
            start = time.perf_counter()
            data = next(self._data_loader_iter)
            data_time = time.perf_counter() - start
            self._reseed(part)
            last = part == self.accumulate - 1
            no_sync = getattr(self.model, "no_sync", nullcontext)
            with nullcontext() if last else no_sync():
                with torch.autocast(
                    self.device_type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None
                ), torch.jit.optimized_execution(self.device_type == "cuda"):
                    # fvcore's scripted focal loss rounds in another way once the JIT has warmed up,
                    # which a resumed run does again; on the CPU a resumed run is to be exact.
                    losses = self.model(data, weights) if self.stages else self.model(data)
                values = self._mean_over_ranks({**losses, "data_time": torch.tensor(data_time)})
                total, values = self._total(losses, values, weights)
                self.scaler.scale(total / self.accumulate).backward()
            for name, value in values.items():
                metrics[name] = metrics.get(name, 0.0) + value / self.accumulate
        if self.clip_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            metrics["grad_norm"] = nn.utils.clip_grad_norm_(
                [p for group in self.optimizer.param_groups for p in group["params"]],
                self.clip_grad_norm,
            ).item()
            # With a scaler it is an overflow, which the scaler answers by skipping the step.
            if not self.scaler.is_enabled() and not np.isfinite(metrics["grad_norm"]):
                raise NonFiniteLossError(
                    f"iteration {self.iter}: the gradient's norm is {metrics['grad_norm']}, all "
                    "losses are finite; training stops, the last checkpoint is intact"
                )
        self._log(metrics, weights)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _total(
        self,
        losses: Mapping[str, Tensor],
        values: Dict[str, float],
        weights: Mapping[str, float],
    ):
        """(tensor to differentiate, what to log)"""
        broken = [name for name, value in values.items() if not np.isfinite(value)]
        if broken:
            raise NonFiniteLossError(
                f"iteration {self.iter}: {', '.join(f'{n}={values[n]}' for n in broken)} is not "
                "finite; training stops, the last checkpoint is intact"
            )
        detector = sum(v for k, v in losses.items() if not k.startswith(DISTILL))
        detector_value = sum(
            v for k, v in values.items() if not k.startswith(DISTILL) and k != "data_time"
        )
        total, total_value = detector, detector_value
        for name, stage in self.stages.items():
            terms = [k for k in losses if k.startswith(f"{DISTILL}{name}/")]
            if not terms:
                continue
            scale = 1.0
            raw = sum(values[k] for k in terms)
            if stage.relative and raw > 0:
                scale = weights[name] * detector_value / raw
            total = total + scale * sum(losses[k] for k in terms)
            values[f"loss_distill_{name}"] = scale * raw
            total_value += scale * raw
        return total, {**values, "total_loss": total_value}

    def _mean_over_ranks(self, losses: Mapping[str, Tensor]) -> Dict[str, float]:
        """The losses as floats, with one synchronisation.  A NaN of one rank is a NaN for all."""
        device = next(self._module.parameters()).device
        names = list(losses)
        vector = torch.stack([losses[n].detach().double().to(device) for n in names])
        if comm.get_world_size() > 1:
            dist.all_reduce(vector)
            vector /= comm.get_world_size()
        return dict(zip(names, vector.tolist()))

    def _log(self, metrics: Dict[str, float], weights: Mapping[str, float]) -> None:
        """Raw values and weights of each stage beside the weighted losses that are trained on."""
        if not comm.is_main_process():
            return
        for name, weight in weights.items():
            prefix = f"{DISTILL}{name}/"
            for key in [k for k in metrics if k.startswith(prefix)]:
                metrics[key] /= weight
            self.storage.put_scalar(f"{prefix}weight", weight, smoothing_hint=False)
        self.storage.put_scalars(**metrics)

    def _reseed(self, part: int) -> None:
        words = np.random.SeedSequence(
            (self.seed, self.iter, part, comm.get_rank())
        ).generate_state(3)
        random.seed(int(words[0]))
        np.random.seed(words[1])
        torch.manual_seed(int(words[2]))

    def state_dict(self):
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
