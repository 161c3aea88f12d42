"""What torch.export needs to get through a Detectron2 detector.

Detectron2 decides in Python on values that only a run knows: is a box finite, is a list of boxes
empty, are there more candidates than are kept?  Tracing goes the way that its example went;
torch.export refuses.  While it works, the places are replaced by equals without a decision, as
``detectron2.export`` itself replaces ``len`` for tracing.
"""

from contextlib import ExitStack, contextmanager
from typing import Any, Callable, Iterator, List, Mapping, Optional, Sequence, Tuple
from unittest import mock

import torch
from detectron2.layers import Conv2d
from detectron2.modeling import poolers
from detectron2.modeling.meta_arch import dense_detector, fcos, retinanet
from detectron2.modeling.proposal_generator import proposal_utils
from detectron2.modeling.roi_heads import fast_rcnn
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn
from torch._library.fake_impl import FakeImplCtx
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torchvision.ops import nms

__all__ = ["constant_branches"]


@contextmanager
def constant_branches(model: nn.Module) -> Iterator[None]:
    """Within it, ``model``, a detector in eval mode, runs on one image and looks at no values."""

    def preprocess_image(inputs: Sequence[Mapping[str, Tensor]]) -> ImageList:
        """Detectron2 computes the padding in tensors."""
        image = (inputs[0]["image"] - model.pixel_mean) / model.pixel_std
        height, width = image.shape[-2:]
        multiple = max(model.backbone.size_divisibility, 1)
        padded = F.pad(image, (0, -width % multiple, 0, -height % multiple))
        return ImageList(padded[None], [(height, width)])

    replaced = [
        (model, "preprocess_image", preprocess_image),
        *((m, "batched_nms", _batched_nms) for m in (fcos, retinanet, proposal_utils, fast_rcnn)),
        (dense_detector, "min", torch.sym_min),
        (proposal_utils, "_is_tracing", lambda: True),  # drops empty boxes, whether there are any
        (Conv2d, "forward", _convolve),
        (poolers, "convert_boxes_to_pooler_format", _to_pooler_format),
        # torchvision would say that at least two boxes are left after non-maximum suppression.
        (FakeImplCtx, "create_unbacked_symint", lambda self: self.new_dynamic_size(min=0)),
        # Both check lengths before they store what they are given.
        (Boxes, "__init__", lambda self, tensor: setattr(self, "tensor", tensor.float())),
        (Instances, "set", lambda self, name, value: self._fields.update({name: value})),
    ]
    with ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value, create=name == "min"))
        stack.enter_context(_AllFinite())
        yield


class _AllFinite(TorchFunctionMode):
    """``if not finite.all():`` is not entered: non-finite boxes are not dropped, as after tracing."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Tuple[Any, ...] = (),
        kwargs: Optional[Mapping[str, Any]] = None,
    ) -> Any:
        return True if func is Tensor.__bool__ else func(*args, **(kwargs or {}))


def _batched_nms(boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float) -> Tensor:
    """Classes are moved apart so that their boxes do not overlap, as torchvision does when traced.

    Args:
        boxes: (N, 4); N may be 0.
        scores, classes: (N,)
    """
    largest = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).max()
    return nms(boxes + (classes.to(boxes) * (largest + 1))[:, None], scores, threshold)


def _convolve(conv: Conv2d, x: Tensor) -> Tensor:
    """Detectron2's layer asks whether its input is empty, which matters in training alone."""
    x = F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    for then in (conv.norm, conv.activation):
        x = x if then is None else then(x)
    return x


def _to_pooler_format(boxes: List[Boxes]) -> Tensor:
    """(N, 5): the index of the image, which is 0 for the only one, and the box."""
    (only,) = boxes
    return F.pad(only.tensor, (1, 0))
