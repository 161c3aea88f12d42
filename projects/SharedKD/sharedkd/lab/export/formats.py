"""The formats a detector is exported to, through Detectron2's own tools (``detectron2.export``).

Whatever the format, a file takes an image and gives the tensors that :func:`outputs_of` names.
"""

import contextlib
import importlib.util
import io
import logging
from typing import Callable, Dict, Iterator, List, Sequence, Tuple
from unittest import mock

import torch
from detectron2.export import TracingAdapter, scripting_with_instances
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.roi_heads import CascadeROIHeads, cascade_rcnn
from detectron2.structures import Boxes
from omegaconf import ListConfig
from torch import Tensor, nn

from .constant_branches import constant_branches

__all__ = ["FORMATS", "Format", "NotExportable", "Runner", "detect", "outputs_of"]

#: Image -> the tensors of :func:`outputs_of`.
Runner = Callable[[Tensor], Sequence[Tensor]]


class NotExportable(Exception):
    """A detector does not go into a format; the message says why, in one line."""


def outputs_of(model: nn.Module) -> List[str]:
    """Names of the tensors that the exported file of a detector, ``model``, gives, in their order.

    ``boxes`` (N, 4): x0, y0, x1, y1 in pixels of the input; ``classes`` (N,); ``masks`` (N, M, M):
    the probability that a cell of the box belongs to the object; ``scores`` (N,).
    """
    heads = getattr(model, "roi_heads", None)
    masks = ["masks"] if getattr(heads, "mask_on", False) else []
    return ["boxes", "classes", *masks, "scores"]


def _instances(model: nn.Module, inputs: List[Dict[str, Tensor]]) -> Dict[str, Tensor]:
    if isinstance(model, GeneralizedRCNN):  # whose masks would become bitmaps of the whole image
        found = model.inference(inputs, do_postprocess=False)[0]
        found = found[found.pred_boxes.nonempty()]
    else:
        found = model(inputs)[0]["instances"]
    result = {"boxes": found.pred_boxes.tensor, "classes": found.pred_classes}
    if found.has("pred_masks"):
        result["masks"] = found.pred_masks[:, 0]
    return {**result, "scores": found.scores}


@torch.no_grad()
def detect(model: nn.Module, image: Tensor) -> List[Tensor]:
    """What the eager ``model`` finds in ``image`` (3, H, W), as an exported file gives it.

    Raises:
        NotExportable: the model is no detector of instances.
    """
    if not hasattr(model, "backbone") or not hasattr(model, "preprocess_image"):
        raise NotExportable(f"{type(model).__name__} is no detector of Detectron2's kind")
    try:
        found = _instances(model, [{"image": image}])
    except (AttributeError, KeyError, TypeError) as e:
        raise NotExportable(f"{type(model).__name__} returns no instances") from e
    return [found[name] for name in outputs_of(model)]


class Format:
    """One way to write a detector into a file.

    Attributes:
        name: on the command line.
        suffix: of the file.
        packages: what is needed beyond this project's requirements.
        runs_with: what is needed to run the file.
        fixed_size: whether the file takes images of one size alone.
    """

    name: str
    suffix: str
    packages: Tuple[str, ...] = ()
    runs_with: str
    fixed_size = False

    def missing(self) -> List[str]:
        """Packages that are not installed."""
        return [name for name in self.packages if importlib.util.find_spec(name) is None]

    def convert(self, model: nn.Module, image: Tensor, path: str) -> None:
        """Write the file.

        Args:
            model: in eval mode, on the CPU.
            image: (3, H, W) uint8 with objects in it, which is followed through the model.
            path: of the file, in a folder that exists.

        Raises:
            NotExportable: the model does not go into this format.
        """
        with _quiet():
            try:
                with torch.no_grad():
                    self._convert(model, image, path)
            except Exception as e:  # whatever an exporter raises, to the user it is one thing
                raise NotExportable(self._reason(model, e)) from e

    def _convert(self, model: nn.Module, image: Tensor, path: str) -> None:
        raise NotImplementedError

    def _reason(self, model: nn.Module, error: Exception) -> str:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

    def load(self, path: str) -> Runner:
        """A function that runs the file at ``path``, one that :meth:`convert` wrote."""
        raise NotImplementedError


class _NoGradient:
    @staticmethod
    def apply(x: Tensor, scale: float) -> Tensor:
        return x


def _adapter(model: nn.Module, image: Tensor) -> TracingAdapter:
    def inference(model: nn.Module, inputs: List[Dict[str, Tensor]]) -> Dict[str, Tensor]:
        # Cascade R-CNN scales gradients by a Python function, which a file cannot hold.
        with mock.patch.object(cascade_rcnn, "_ScaleGradient", _NoGradient):
            return _instances(model, inputs)

    return TracingAdapter(model, [{"image": image}], inference).eval()


class TorchScript(Format):
    """Traced."""

    name, suffix, runs_with = "torchscript", "torchscript.pt", "torch, torchvision"

    def _convert(self, model: nn.Module, image: Tensor, path: str) -> None:
        adapter = _adapter(model, image)
        torch.jit.save(torch.jit.trace(adapter, (image,), check_trace=False), path)

    def load(self, path: str) -> Runner:
        return torch.no_grad()(torch.jit.load(path))


class Script(TorchScript):
    """Scripted: Python's control flow is kept, which tracing replaces by one way through it."""

    name, suffix = "script", "script.pt"

    #: Detectron2's classes that ``torch.jit.script`` does not take.
    REFUSED = {
        CascadeROIHeads: "its forward for inference has no type annotations",
        FCOS: "its head's forward has no type annotations",
    }

    def _convert(self, model: nn.Module, image: Tensor, path: str) -> None:
        _plain_lists(model)
        fields = dict(
            proposal_boxes=Boxes,
            objectness_logits=Tensor,
            pred_boxes=Boxes,
            scores=Tensor,
            pred_classes=Tensor,
            pred_masks=Tensor,
        )
        adapter = (_ScriptedRCNN if isinstance(model, GeneralizedRCNN) else _ScriptedDense)(model)
        torch.jit.save(scripting_with_instances(adapter.eval(), fields), path)

    def _reason(self, model: nn.Module, error: Exception) -> str:
        for part in model.modules():
            for kind, reason in self.REFUSED.items():
                if isinstance(part, kind):
                    return (
                        f"Detectron2's {kind.__name__} cannot be scripted: {reason}; "
                        f"{TorchScript.name}, which traces, takes it"
                    )
        return super()._reason(model, error)


def _plain_lists(model: nn.Module) -> None:
    """LazyConfigs leave omegaconf's lists in a model, which TorchScript does not know."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, ListConfig):
                setattr(module, name, list(value))


def _finish(fields: Dict[str, Tensor], image: Tensor) -> List[Tensor]:
    """Scripted detectors leave out what Detectron2's post-processing does: clip, drop empty boxes."""
    height, width = image.shape[-2], image.shape[-1]
    x0, y0, x1, y1 = fields["pred_boxes"].unbind(1)
    x0, x1 = x0.clamp(0, width), x1.clamp(0, width)
    y0, y1 = y0.clamp(0, height), y1.clamp(0, height)
    keep = (x1 > x0) & (y1 > y0)
    found = [torch.stack([x0, y0, x1, y1], 1)[keep], fields["pred_classes"][keep]]
    if "pred_masks" in fields:
        found.append(fields["pred_masks"][:, 0][keep])
    found.append(fields["scores"][keep])
    return found


class _ScriptedRCNN(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> List[Tensor]:
        found = self.model.inference([{"image": image}], do_postprocess=False)[0]
        return _finish(found.get_fields(), image)


class _ScriptedDense(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> List[Tensor]:
        return _finish(self.model([{"image": image}])[0].get_fields(), image)


class Onnx(Format):
    """Traced, and translated operator by operator."""

    name, suffix, packages, runs_with = "onnx", "onnx", ("onnx", "onnxruntime"), "onnxruntime"
    opset = 17  # RoIAlign with aligned corners needs 16

    def _convert(self, model: nn.Module, image: Tensor, path: str) -> None:
        outputs = outputs_of(model)
        torch.onnx.export(
            _adapter(model, image),
            (image,),
            path,
            dynamo=False,  # which would want images of one size, and onnxscript
            opset_version=self.opset,
            input_names=["image"],
            output_names=outputs,
            dynamic_axes={
                "image": {1: "height", 2: "width"},
                **{name: {0: "detections"} for name in outputs},
            },
        )

    def load(self, path: str) -> Runner:
        import onnxruntime

        onnxruntime.set_default_logger_severity(3)  # not its advice on single operators
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()  # so that latencies compare
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda image: [
            torch.from_numpy(x) for x in session.run(None, {"image": image.numpy()})
        ]


class TorchExport(Format):
    """A graph of ATen operators for images of one size."""

    name, suffix, runs_with, fixed_size = "torch_export", "pt2", "torch, torchvision", True

    def _convert(self, model: nn.Module, image: Tensor, path: str) -> None:
        adapter = _adapter(model, image)
        with constant_branches(model):
            program = torch.export.export(adapter, (image,), strict=False)
        torch.export.save(program, path)

    def load(self, path: str) -> Runner:
        with _quiet():
            return torch.no_grad()(torch.export.load(path).module())


#: name -> format
FORMATS: Dict[str, Format] = {
    each.name: each for each in (TorchScript(), Script(), Onnx(), TorchExport())
}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters print graphs and advice about code that is not the user's."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
