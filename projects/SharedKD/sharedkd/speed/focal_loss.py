"""The focal loss in training on a CPU: its value and its gradient in one pass, block by block."""

from types import FunctionType
from typing import Optional, Tuple, Type

import torch
from detectron2.modeling.meta_arch import fcos, retinanet
from fvcore.nn import sigmoid_focal_loss_jit
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from ..losses.base import precise

__all__ = ["sigmoid_focal_loss", "use_one_pass"]

# Numbers that are read at a time: fewer than a distance's, as more is computed of each before the next.
BLOCK = 2**17


def use_one_pass(module: nn.Module) -> int:
    """Let Detectron2's RetinaNet and FCOS compute their focal loss by :func:`sigmoid_focal_loss`.

    Args:
        module: changed in place where it is, or has in it, such a detector; of a subclass, whose
            losses may be its own, nothing changes.

    Returns:
        how many there are.
    """
    detectors = [m for m in module.modules() if type(m) in ONE_PASS]
    for detector in detectors:
        detector.__class__ = ONE_PASS[type(detector)]
    return len(detectors)


def sigmoid_focal_loss(
    inputs: Tensor, targets: Tensor, alpha: float = -1, gamma: float = 2, reduction: str = "none"
) -> Tensor:
    """fvcore's function of this name, whose sum on a CPU keeps one map for the gradient instead of eight.

    There is no gradient for targets, and no second one.

    Focal loss (ICCV 2017), equations 4 and 5.  With z = x where the target is 0 and -x where it is 1,
    s = sigmoid(z) and a the weight of the target::

        FL = a s^gamma softplus(z)
        dFL/dz = a s^gamma (gamma (1 - s) softplus(z) + s)

    Args:
        inputs: logits of any shape.
        targets: 0 or 1 for each, in the same shape.
        alpha: weight of targets that are 1, those that are 0 have 1 - alpha; negative: all have 1.
        gamma: exponent.
        reduction: ``sum``, or ``mean`` and ``none``, which are left to fvcore as float16 is.

    Returns:
        scalar tensor, in float32 at least; with ``none`` one for each.

    Raises:
        ValueError: inputs and targets differ in shape.
    """
    if inputs.shape != targets.shape:
        raise ValueError(f"{tuple(inputs.shape)} logits, {tuple(targets.shape)} targets")
    # A gradient in float16 would be lost before a loss scale reaches it.
    if inputs.device.type != "cpu" or reduction != "sum" or inputs.dtype == torch.float16:
        return sigmoid_focal_loss_jit(inputs, targets, alpha, gamma, reduction)
    return _OnePass.apply(inputs, targets, alpha, gamma)


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, inputs: Tensor, targets: Tensor, alpha: float, gamma: float
    ) -> Tensor:
        gradient = torch.empty_like(inputs, memory_format=torch.contiguous_format)
        total = precise(inputs.new_zeros(()))
        flat = (each.reshape(-1).split(BLOCK) for each in (inputs, targets, gradient))
        for x, target, into in zip(*flat):
            x, target = precise(x), precise(target)
            sign = 1 - 2 * target
            z = x * sign
            s, softplus = z.sigmoid(), F.softplus(z)
            power = s.square() if gamma == 2 else s.pow(gamma)
            if alpha >= 0:
                power.mul_(torch.add(1 - alpha, target, alpha=2 * alpha - 1))
            slope = (1 - s).mul_(softplus).mul_(gamma).add_(s).mul_(power)
            into.copy_(slope.mul_(sign))
            total += power.mul_(softplus).sum()
            # Infinite logits of a right guess would be a loss of zero: NaN, as no network should have them.
            total += (x - x).sum()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tuple[Optional[Tensor], ...]:
        (own,) = ctx.saved_tensors
        return own * gradient, None, None, None


def _one_pass(detector: Type[nn.Module]) -> Type[nn.Module]:
    """A subclass of that name whose ``losses`` is Detectron2's own code, with our function for fvcore's."""
    theirs = detector.losses
    names = {**theirs.__globals__, "sigmoid_focal_loss_jit": sigmoid_focal_loss}
    losses = FunctionType(theirs.__code__, names, "losses", theirs.__defaults__)
    return type(detector.__name__, (detector,), {"losses": losses, "__module__": __name__})


# By their own names here, so that they can be pickled.
RetinaNet, FCOS = map(_one_pass, (retinanet.RetinaNet, fcos.FCOS))
# Detectron2's detector -> ours, where its losses call that function.
ONE_PASS = {
    ours.__base__: ours
    for ours in (RetinaNet, FCOS)
    if "sigmoid_focal_loss_jit" in ours.losses.__code__.co_names
}
