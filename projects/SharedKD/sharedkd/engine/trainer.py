"""The trainer: adds the stages' losses to the detector's; it trains plain detectors, too."""

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

from sharedkd.engine.hooks.outgrown import Outgrown
from sharedkd.engine.hooks.step_log import StepLog
from sharedkd.errors import ConfigError
from sharedkd.modeling.balance import held
from sharedkd.modeling.meta_arch import factors_of, of_students, pairs_of
from sharedkd.modeling.snapshot import NORMALIZER
from sharedkd.modeling.stages import owner_of, terms_of, under
from sharedkd.modeling.teachers import teacher_key
from sharedkd.values import check_number

__all__ = ["SharedKDTrainer", "Step", "check_amp"]


@dataclass
class Step:
    """One optimizer step, as hooks see it.

    Attributes:
        iteration: its number.
        weights: stage name -> weight.
        metrics: name -> scalar on the device: the losses, their sums, ``grad_norm``, ``loss_scale``.
        batches: the data loader's records, one list per accumulated batch.
        data_time: seconds spent waiting for a batch, their mean.
        failure: the detector's error if it found its own numbers not finite; the step ends there.
        refused: the weights must not change; a hook's ``after_backward`` may set it.
    """

    iteration: int
    weights: Mapping[str, float]
    metrics: Dict[str, Tensor] = field(default_factory=dict)
    batches: List[List[Dict[str, Any]]] = field(default_factory=list)
    data_time: float = 0.0
    failure: str = ""
    refused: bool = False


def check_amp(dtype: Optional[torch.dtype], device_type: str) -> None:
    """Check that a device can train under autocast to ``dtype``; None: without autocast.

    Raises:
        ConfigError: it cannot.
    """
    if dtype is torch.float16 and device_type != "cuda":
        problem = f"does not work on train.device={device_type}"
        raise ConfigError("train.amp.dtype", "float16", problem, "use bfloat16")


class SharedKDTrainer(SimpleTrainer):
    """Detectron2's SimpleTrainer with distillation stages, AMP, clipping and accumulation.

    The same class trains the plain student, so that a baseline and a distilled run differ only by the
    distillation.

    Hooks may have a method ``after_backward``, called when the gradient is complete and the weights
    have not changed; ``trainer.step`` is the :class:`Step`.  The first hook is a
    :class:`~sharedkd.engine.hooks.step_log.StepLog`, which logs and checks the losses.

    Args:
        model: :class:`SharedKD` or a plain detector, perhaps wrapped in DDP.
        max_iter: length of the run, for stage times given as fractions.
        seed: every random draw of a step depends only on (seed, iteration, rank).  So a resumed run
            repeats the uninterrupted one, and a loss that draws random numbers does not change the
            detector's draws in later steps.  None: the generators are left alone.
        amp_dtype: ``torch.float16``, ``torch.bfloat16`` or None (no autocast).
        clip_grad_norm: largest norm of a student's gradient, over all its parameters; None: no clipping.
        accumulate: batches per optimizer step, each counting 1/accumulate.
        log_period: on a GPU, losses are read every ``log_period`` steps, in the last step and before a
            checkpoint, so that a step does not wait for the one before.  On a CPU, and if steps may
            be skipped, they are read in every step.
        on_nonfinite, max_skipped_steps: see StepLog.

    Raises:
        ConfigError: float16 on the CPU, accumulate below 1, or see StepLog.
    """

    iter: int  # Detectron2's: the iteration that runs
    step: Step  #: the current or latest one
    results: Mapping[str, Any]  #: of the latest evaluation

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[List[Dict[str, Any]]],
        optimizer: torch.optim.Optimizer,
        *,
        max_iter: int,
        seed: Optional[int] = None,
        amp_dtype: Optional[torch.dtype] = None,
        clip_grad_norm: Optional[float] = None,
        accumulate: int = 1,
        log_period: int = 20,
        on_nonfinite: str = "stop",
        max_skipped_steps: int = 10,
    ):
        super().__init__(model, data_loader, optimizer)
        self.module = model.module if isinstance(model, DistributedDataParallel) else model
        #: All students with their stages; a plain detector is alone and has none.
        self.pairs = pairs_of(self.module)
        self.stages = of_students(self.module, "stages")
        self.auto_weights = of_students(self.module, "auto_weights")
        self.schedule_length = max_iter
        self.results = {}
        self.seed = seed
        self.device = next(model.parameters()).device
        check_amp(amp_dtype, self.device.type)
        check_number("train.accumulate", accumulate, least=1, whole=True)
        self.amp_dtype = amp_dtype
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp_dtype is torch.float16)
        self.clip_grad_norm = clip_grad_norm
        self.accumulate = accumulate
        period = log_period if self.device.type == "cuda" else 1
        self.log = StepLog(period, on_nonfinite, max_skipped_steps)
        self.outgrown = Outgrown()
        self.register_hooks([self.log, self.outgrown])
        # fvcore's box losses are not written for half precision.
        self._casts = [
            detector.head.register_forward_hook(_to_float32)
            for detector in self.detectors.values()
            if amp_dtype is not None and isinstance(detector, DenseDetector)
        ]

    @property
    def detector(self) -> nn.Module:
        """The student, or the plain detector that is trained."""
        return self.detectors[""]

    @property
    def detectors(self) -> Dict[str, nn.Module]:
        """The student and its peers, by what the names of their losses begin with."""
        return {owner: getattr(pair, "student", pair) for owner, pair in self.pairs.items()}

    def stage_weights(self) -> Dict[str, float]:
        """stage name -> weight in this iteration."""
        return {
            name: 0.0
            if stage.end == "teacher" and stage.teacher in self.outgrown.iterations
            else stage.weight_at(self.iter, self.schedule_length)
            for name, stage in self.stages.items()
        }

    def run_step(self) -> None:
        """One optimizer step, or a NonFiniteLossError of :class:`~.hooks.step_log.StepLog`."""
        self.optimizer.zero_grad()
        step = self.step = Step(self.iter, self.stage_weights())
        for part in range(self.accumulate):
            start = time.perf_counter()
            step.batches.append(next(self._data_loader_iter))
            step.data_time += (time.perf_counter() - start) / self.accumulate
            last = part == self.accumulate - 1
            with nullcontext() if last else getattr(self.model, "no_sync", nullcontext)():
                if not step.failure:
                    self._forward_backward(step, part)
        if not step.failure:
            self._finish_gradient(step)
        for hook in self._hooks:
            getattr(hook, "after_backward", lambda: None)()
        if not step.refused:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif self.scaler.is_enabled() and not step.failure:
            self.scaler.update(self.scaler.get_scale())  # no overflow: the scale stays

    def _forward_backward(self, step: Step, part: int) -> None:
        """Add the gradient of one accumulated batch, and its losses to the step's metrics."""
        try:
            losses = self._losses(self.model, step.batches[part], part, step)
        except FloatingPointError as e:
            step.failure = str(e)
        step.failure = self._agree_on(step.failure)
        if step.failure:
            return
        values = self._mean_over_ranks(losses)
        self.scaler.scale(sum(losses.values()) / self.accumulate).backward()
        for name, value in {**values, **self._sums(values)}.items():
            step.metrics[name] = step.metrics.get(name, 0.0) + value / self.accumulate
        step.metrics.update(factors_of(self.module, step.weights))

    def _losses(
        self, model: nn.Module, batch: List[Dict[str, Any]], part: int, step: Step
    ) -> Dict[str, Tensor]:
        """The model's losses, with the random draws of this iteration and accumulated batch."""
        if self.device.type == "cuda":
            # Images are copied once, for student and teacher, while the GPU still computes.
            batch = [{**x, "image": x["image"].to(self.device, non_blocking=True)} for x in batch]
        self._reseed(part, step.iteration)
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            return model(batch, step.weights) if self.stages else model(batch)

    def repeat(self, step: Step, batch: List[Dict[str, Any]], part: int = 0) -> Dict[str, Tensor]:
        """Run a forward with a step's iteration and weights once more, on this rank only.

        Returns:
            the losses, name -> scalar attached to the graph.
        """
        with held(self.auto_weights):
            return self._losses(self.module, batch, part, step)

    def _sums(self, values: Mapping[str, Tensor]) -> Dict[str, Tensor]:
        """``total_loss`` of each student, and ``loss_distill_<stage>`` of each stage that has terms."""
        sums = {}
        for name in self.stages:
            terms = terms_of(values, name)
            if terms:
                sums[under("loss_distill_", name)] = sum(values[k] for k in terms)
        for owner in self.pairs:
            sums[f"{owner}total_loss"] = sum(x for k, x in values.items() if owner_of(k) == owner)
        return sums

    def _agree_on(self, failure: str) -> str:
        """The error of any rank's detector; of this rank's if steps do not wait for the device."""
        if comm.get_world_size() == 1 or self.log.period > 1:
            return failure
        failed = torch.tensor(float(bool(failure)), device=self.device)
        dist.all_reduce(failed)
        return next(x for x in comm.all_gather(failure) if x) if failed else ""

    def _mean_over_ranks(self, losses: Mapping[str, Tensor]) -> Dict[str, Tensor]:
        """The losses in float64, detached.  A NaN of one rank is a NaN for all."""
        vector = torch.stack([x.detach().double().to(self.device) for x in losses.values()])
        if comm.get_world_size() > 1:
            dist.all_reduce(vector)
            vector /= comm.get_world_size()
        return dict(zip(losses, vector.unbind()))

    def _finish_gradient(self, step: Step) -> None:
        """Unscale, measure and clip the gradient of each student, over all its parameters."""
        self.scaler.unscale_(self.optimizer)
        everything = [p for group in self.optimizer.param_groups for p in group["params"]]
        peers = [{*pair.parameters()} for owner, pair in self.pairs.items() if owner]
        norms = [self._clip([p for p in everything if p in peer]) for peer in peers]
        norms.append(self._clip([p for p in everything if not any(p in peer for peer in peers)]))
        norm = torch.stack(norms).norm() if peers else norms[0]
        step.metrics["grad_norm"] = norm
        if self.scaler.is_enabled():
            step.metrics["loss_scale"] = self.scaler.scale(torch.ones_like(norm))

    def _clip(self, params: List[Tensor]) -> Tensor:
        """The norm of a gradient, which is clipped if there is a limit."""
        if self.clip_grad_norm is not None:
            return nn.utils.clip_grad_norm_(params, self.clip_grad_norm)
        return nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])

    def _reseed(self, part: int, iteration: int) -> None:
        if self.seed is None:
            return
        entropy = (self.seed, iteration, part, comm.get_rank())
        words = np.random.SeedSequence(entropy).generate_state(3)
        random.seed(int(words[0]))
        np.random.seed(words[1])
        torch.manual_seed(int(words[2]))

    def after_train(self) -> None:
        for cast in self._casts:
            cast.remove()
        # Detectron2 counts one iteration too many if none was left to train.
        self.iter = min(self.iter, self.max_iter)
        super().after_train()

    def state_dict(self) -> Dict[str, Any]:
        """The run's state beside the model's weights.

        Raises:
            NonFiniteLossError: a step whose losses were not read yet is not finite.
        """
        state = super().state_dict()
        state["teachers"] = self._teacher_fingerprints()
        state["grad_scaler"] = self.scaler.state_dict()
        state["bad_images"] = dict(self.bad_images)
        state["loss_normalizers"] = {
            owner: getattr(x, NORMALIZER, None) for owner, x in self.detectors.items()
        }
        return state

    def _teacher_fingerprints(self) -> Dict[Optional[str], Optional[str]]:
        sources = getattr(self.module, "sources", {})
        return {name: teacher.fingerprint for name, teacher in sources.items()}

    @property
    def bad_images(self) -> Dict[str, str]:
        """The images that the data loader skipped, name -> reason."""
        loader = getattr(self.data_loader, "bad_images", None)
        return {} if loader is None else loader.files

    def check_resumable(self, state_dict: Mapping[str, Any]) -> None:
        """Refuse a state, from :meth:`state_dict`, of a run that learned from another teacher.

        Raises:
            ConfigError: it did.
        """
        # A run of another trainer stores none; one without a loss needs none any more.
        then, now = state_dict.get("teachers", {}), self._teacher_fingerprints()
        for name in dict.fromkeys([*then, *now]) if self.stages else ():
            before, after = then.get(name), now.get(name)
            if before != after:
                problem = f"is not the teacher of the run to resume ({before})"
                fix = "resume with the same teacher, or start anew in another train.output_dir"
                raise ConfigError(f"{teacher_key(name)}.weights", after, problem, fix)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume from a state that :meth:`check_resumable` lets pass."""
        self.check_resumable(state_dict)
        super().load_state_dict(state_dict)
        if self.scaler.is_enabled() and state_dict["grad_scaler"]:
            self.scaler.load_state_dict(state_dict["grad_scaler"])
        self.bad_images.update(state_dict.get("bad_images", {}))
        for owner, normalizer in state_dict.get("loss_normalizers", {}).items():
            if normalizer is not None:
                setattr(self.detectors[owner], NORMALIZER, normalizer)


def _to_float32(module: nn.Module, args: Tuple[Any, ...], output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.float()
    return type(output)(_to_float32(module, args, x) for x in output)
