"""Weights that set themselves: a stage's gradient becomes a share of the detector's own."""

import logging
from contextlib import contextmanager
from typing import Any, Dict, FrozenSet, Iterator, List, Mapping, Sequence, Tuple

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor, nn

from sharedkd.errors import RunError

__all__ = ["AutoWeight", "AutoWeights", "held"]

logger = logging.getLogger("detectron2.sharedkd")

WINDOW = 50  #: steps that a measurement is the median of
DOMINANT = 0.99  #: of a stage's gradient, from which a term is reported
_SCALE = 1024.0  # of losses before their gradients are taken: those of float16 maps do not vanish


class AutoWeight(nn.Module):
    """The factor of a stage whose weight is ``auto``.

    The stage's losses are multiplied so that the norm of their gradient at the student's maps is
    ``share`` times the norm of the gradient of the detector's own losses there::

        factor = share * median over steps of |d detector / d maps| / |d stage / d maps|

    The median is that of the first :data:`WINDOW` steps with the stage on, of those so far while there
    are fewer.  Then the factor is constant, until ``every`` steps have passed and it is measured again.
    A measured step takes one more backward to the maps, of the detector's losses and of the stage's; with
    ``by_term`` one of each term.  With ``train.accumulate`` each batch counts as a step.  All ranks have
    the same factor.

    Args:
        key: the stage's place in the config, for messages.
        share: of the detector's gradient.
        every: steps from one measurement to the next; 0: only once.
        by_term: every term, which is one level of most losses, gets a factor of its own, so that all
            have the same share and together the stage's.
    """

    def __init__(self, key: str, share: float, every: int = 0, by_term: bool = False):
        super().__init__()
        self.key, self.share, self.every, self.by_term = key, share, every, by_term
        self.steps = 0  # with the stage on
        self.held = False
        self.factors: Dict[str, Tensor] = {}  # term -> factor; "" of all terms together
        self.apart: FrozenSet[str] = frozenset()  # terms that train only what the loss owns
        self._ratios: Dict[str, List[Tensor]] = {}
        self._names: FrozenSet[str] = frozenset()  # of the terms

    def forward(
        self, terms: Mapping[str, Tensor], detector: Tensor, maps: Sequence[Tensor]
    ) -> Dict[str, Tensor]:
        """Multiply a stage's terms by its factors.

        Args:
            terms: name -> scalar, attached to ``maps``.
            detector: sum of the detector's own losses, attached to ``maps``.
            maps: the student's maps that the stage reads.

        Raises:
            RunError: the stage had no gradient in any of the measured steps, or, with ``by_term``, has other
                terms than in the step before.
        """
        if self.by_term and self._names not in (frozenset(), terms.keys()):
            now, then = (", ".join(sorted(x)) for x in (terms, self._names))
            problem = f"its terms are {now}, and were {then} in the step before"
            fix = "let the loss return the same terms in every step, or leave balance out"
            raise RunError(self.key, "auto", problem, fix)
        self._names = frozenset(terms)
        if self.factors:
            self._move(detector.device)  # a resumed run's are on the CPU
        if not (self.held and self.factors) and torch.is_grad_enabled():
            self._step(terms, detector, maps)
        return {
            k: x if k in self.apart else self.factors[k if self.by_term else ""] * x
            for k, x in terms.items()
        }

    def _step(self, terms: Mapping[str, Tensor], detector: Tensor, maps: Sequence[Tensor]) -> None:
        place = self.steps % self.every if self.every else self.steps
        if place < WINDOW or not self.factors:
            if place == 0:
                self._ratios = {}
            if self.steps < WINDOW:
                suspects = self.apart if self.steps else terms
                self.apart = frozenset(k for k in suspects if not _depends(terms[k], maps))
            counted = {k: x for k, x in terms.items() if k not in self.apart}
            together = sum(counted.values()) if counted else torch.zeros_like(detector)
            self._measure(counted if self.by_term else {"": together}, detector, maps)
            if self.steps < WINDOW or place == WINDOW - 1:
                medians = {k: torch.stack(x).nanmedian() for k, x in self._ratios.items()}
                self.factors = {k: x.nan_to_num(nan=0.0) for k, x in medians.items()}
            if place == WINDOW - 1:
                # The only time that the device is waited for.
                self._report_dominant(terms, maps)
                if not any(bool(x) for x in self.factors.values()):
                    raise self._without(
                        f"has had no finite gradient above zero at the student's maps for {WINDOW} steps, "
                        "or the detector's losses have had none there"
                    )
        self.steps += 1

    def _report_dominant(self, terms: Mapping[str, Tensor], maps: Sequence[Tensor]) -> None:
        """Log if one of several terms has nearly all of the gradient that the factor is measured by."""
        if self.by_term or len(terms) < 2:
            return
        norms = torch.stack([_squared_norm(x, maps) for x in terms.values()])
        if comm.get_world_size() > 1:
            dist.all_reduce(norms)
        largest = int(norms.argmax())
        share = (norms[largest] / norms.sum()).sqrt().item()
        if share > DOMINANT:
            stage = self.key.removesuffix(".weight")
            logger.warning(
                f"{self.key}=auto is set by term {[*terms][largest]}, which has {share:.0%} of the stage's "
                f"gradient at the student's maps; {stage}.balance=levels gives each term a share of its own"
            )

    def _without(self, problem: str) -> RunError:
        return RunError(self.key, "auto", problem, "use a number, or leave this stage out")

    def _measure(
        self, parts: Mapping[str, Tensor], detector: Tensor, maps: Sequence[Tensor]
    ) -> None:
        if not parts:
            return
        norms = torch.stack([_squared_norm(x, maps) for x in (detector, *parts.values())])
        if comm.get_world_size() > 1:
            dist.all_reduce(norms)
        norms = norms.sqrt()
        # Terms at different maps are orthogonal: each has its part of the squared norm.
        share = self.share / len(parts) ** 0.5
        ratios = share * norms[0] / norms[1:]
        ratios = torch.where(torch.isfinite(ratios) & (ratios > 0), ratios, torch.nan)
        for name, ratio in zip(parts, ratios.unbind()):
            self._ratios.setdefault(name, []).append(ratio)

    def get_extra_state(self) -> Dict[str, Any]:
        """What a resumed run continues with."""
        return {
            "settings": self._settings,
            "steps": self.steps,
            "apart": sorted(self.apart),
            "factors": {k: x.cpu() for k, x in self.factors.items()},
            "ratios": {k: torch.stack(x).cpu() for k, x in self._ratios.items()},
        }

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Continue with ``state``, of :meth:`get_extra_state`; its tensors move at the next step.

        A state of other settings is left: the factors are measured anew.
        """
        if state.get("settings", self._settings) != self._settings:
            return
        self.steps, self.apart = state["steps"], frozenset(state["apart"])
        self.factors = dict(state["factors"])
        self._ratios = {k: [*x.unbind()] for k, x in state["ratios"].items()}

    @property
    def _settings(self) -> Tuple[float, int, bool]:
        return self.share, self.every, self.by_term

    def _move(self, device: torch.device) -> None:
        if any(x.device != device for x in self.factors.values()):
            self.factors = {k: x.to(device) for k, x in self.factors.items()}
            self._ratios = {k: [r.to(device) for r in x] for k, x in self._ratios.items()}


class AutoWeights(nn.ModuleDict):
    """The :class:`AutoWeight` of each stage that has one; a stage that is new in a resumed run begins anew."""

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().load_state_dict(state_dict, strict=False)


@contextmanager
def held(weights: Mapping[str, AutoWeight]) -> Iterator[None]:
    """A context in which factors stay as they are, for a forward that is no step of the training."""
    before = {each: each.held for each in weights.values()}
    for each in before:
        each.held = True
    try:
        yield
    finally:
        for each, was in before.items():
            each.held = was


def _depends(loss: Tensor, maps: Sequence[Tensor]) -> bool:
    """Whether a loss has a gradient at any of ``maps``."""
    if not (loss.requires_grad and maps):
        return False
    found = torch.autograd.grad(loss, [*maps], retain_graph=True, allow_unused=True)
    return any(x is not None for x in found)


def _squared_norm(loss: Tensor, maps: Sequence[Tensor]) -> Tensor:
    """The squared norm of a loss's gradient at ``maps``, in float32."""
    if not loss.requires_grad:
        return loss.new_zeros(())
    found = torch.autograd.grad(_SCALE * loss, [*maps], retain_graph=True, allow_unused=True)
    there = [(x.float() / _SCALE).square().sum() for x in found if x is not None]
    return torch.stack(there).sum() if there else loss.new_zeros(())
