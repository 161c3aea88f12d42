"""A device that is not there: its tensors compute on the CPU, and refuse to meet the CPU's own, as on a GPU.

Its name is ``meta``, the one device on which PyTorch's autograd runs without a driver.
"""

import contextlib
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from sharedkd.modeling.teachers import TeacherMean

DEVICE = torch.device("meta")
#: What takes tensors of both places on a GPU, too: copies between them, and indices.
MIXES = {"copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_"}
#: What a GPU's number or shape is needed for: the CPU waits until the GPU has come so far.
WAITS = {"_local_scalar_dense", "equal", "masked_select", "nonzero", "_unique2", "unique_dim"}


class Elsewhere(torch.Tensor):
    """A tensor on the device.

    Attributes:
        inside: the CPU's tensor that holds its values.
    """

    @staticmethod
    def __new__(cls, x):
        layout = dict(strides=x.stride(), storage_offset=x.storage_offset(), dtype=x.dtype)
        made = cls._make_wrapper_subclass(cls, x.shape, device=DEVICE, **layout)
        made.inside = x.detach()
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


def _run(function, args, kwargs, waits=lambda name: None):
    """Run an operation on the tensors inside; ``waits`` is told of one that a GPU makes the CPU wait for."""
    name = function._schema.name.split("::")[1]
    flat = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = [x for x in flat if isinstance(x, Elsewhere)]
    here = [x.shape for x in flat if not isinstance(x, Elsewhere) and x.dim()]
    if any(x.device == DEVICE for x in flat if not isinstance(x, Elsewhere)):
        raise NotImplementedError(f"{name} reads a tensor that was made unseen, see _Functions")
    if there and here and name not in MIXES:
        raise RuntimeError(f"{name}: tensors {here} on the CPU, others on the device")
    device = kwargs.get("device")
    place = bool(there) if device is None else torch.device(device) == DEVICE
    moves = place != bool(there) if name == "_to_copy" else name == "copy_" and there and here
    blocking = not (kwargs.get("non_blocking") or name == "copy_" and args[2:] == (True,))
    masks = name == "index" and any(x is not None and x.dtype is torch.bool for x in args[1])
    if moves and blocking or there and (name in WAITS or masks):
        waits(name)
    if device is not None:
        kwargs = {**kwargs, "device": "cpu"}
    out = function(*tree_map(_inside, args), **tree_map(_inside, kwargs))
    own = {id(x.inside): x for x in there}

    def placed(x):
        if id(x) in own:  # written in place
            return own[id(x)]
        return Elsewhere(x) if place and isinstance(x, torch.Tensor) else x

    return tree_map(placed, out)


def _inside(x):
    return x.inside if isinstance(x, Elsewhere) else x


class _Operations(TorchDispatchMode):
    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {}, self.waits)


class _Functions(TorchFunctionMode):
    """Detours round what fills, reads or reshapes a tensor where no operation is seen."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return function(*args, **kwargs).to(device)
        if function is torch.Tensor.__getitem__:
            return function(args[0], tree_map(_indices, args[1], is_leaf=_is_list))
        if function is torch.Tensor.tolist:
            return _inside(args[0].cpu()).tolist()
        if function is torch.Tensor.unsqueeze_:
            return args[0].unsqueeze(*args[1:])
        return function(*args, **kwargs)


def _is_list(x):
    return isinstance(x, list)


def _indices(x):
    """A list of numbers as a tensor, which PyTorch would make on the device."""
    return torch.tensor(x) if _is_list(x) and x and isinstance(x[0], int) else x


class _Autocast(torch.autocast):
    def __init__(self, device_type, *args, **kwargs):
        super().__init__("cpu" if device_type == DEVICE.type else device_type, *args, **kwargs)


@contextlib.contextmanager
def elsewhere(waits=lambda name: None):
    """A context to compute on the device in; ``waits`` is called with what waits for it."""
    with mock.patch("torch.autocast", _Autocast), _Functions(), _Operations(waits):
        yield


def move(model):
    """Move a pair's students, losses and teachers to the device, or any other module."""
    sources = getattr(model, "sources", {}).values()
    teachers = [y for x in sources for y in (x.teachers if isinstance(x, TeacherMean) else [x])]
    networks = [getattr(x, "model", None) for x in teachers]
    for module in (y for x in (model, *filter(None, networks)) for y in x.modules()):
        for name, p in module._parameters.items():
            if p is not None:
                moved = torch.nn.Parameter(Elsewhere(p), requires_grad=p.requires_grad)
                module._parameters[name] = moved
        for name, x in module._buffers.items():
            module._buffers[name] = None if x is None else Elsewhere(x)
    return model
