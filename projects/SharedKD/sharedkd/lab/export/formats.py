"""The formats of an exported detector, written by Detectron2's and PyTorch's own tools, unpatched.

Whatever the format, a file takes an image and returns the tensors that :func:`outputs_of` names.
"""

import importlib.util
import warnings
from dataclasses import dataclass
from typing import Callable, Dict, List, Sequence, Tuple

import torch
from detectron2.export import TracingAdapter
from detectron2.modeling import GeneralizedRCNN
from torch import Tensor, nn

__all__ = ["FORMATS", "UNSUPPORTED", "Format", "NotExportable", "Runner", "detect", "outputs_of"]

#: Image -> the tensors of :func:`outputs_of`.
Runner = Callable[[Tensor], Sequence[Tensor]]


class NotExportable(Exception):
    """A detector cannot be exported; says why, and in ``fix`` what to do, each in one line."""

    def __init__(self, problem: str, fix: str = "leave it out"):
        super().__init__(problem)
        self.fix = fix


def outputs_of(model: nn.Module) -> List[str]:
    """Names of the tensors that an exported detector ``model`` returns, in their order.

    ``boxes`` (N, 4): x0, y0, x1, y1 in pixels of the input; ``classes`` (N,); ``masks`` (N, M, M):
    the probability that a cell of the box belongs to the object; ``scores`` (N,).
    """
    masks = getattr(getattr(model, "roi_heads", None), "mask_on", False)
    return ["boxes", "classes", *(["masks"] if masks else []), "scores"]


@torch.no_grad()
def detect(model: nn.Module, image: Tensor) -> List[Tensor]:
    """The eager model's detections in ``image`` (3, H, W), as an exported file returns them."""
    if not hasattr(model, "backbone") or not hasattr(model, "preprocess_image"):
        raise NotExportable(f"{type(model).__name__} is no detector of Detectron2's kind")
    if getattr(getattr(model, "roi_heads", None), "keypoint_on", False):
        raise NotExportable("keypoints are not exported")
    try:
        found = _instances(model, [{"image": image}])
    except (AttributeError, KeyError, TypeError) as e:
        raise NotExportable(f"{type(model).__name__} returns no instances") from e
    return [found[name] for name in outputs_of(model)]


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


@dataclass(frozen=True)
class Format:
    """One way to write a detector into a file."""

    suffix: str  #: of the file
    #: Takes a traceable model, an image (3, H, W) uint8 with objects in it, the names of the
    #: outputs, and the path of the file.
    write: Callable[[nn.Module, Tensor, List[str], str], None]
    load: Callable[[str], Runner]  #: takes the path
    runs_with: str  #: packages that run the file
    packages: Tuple[str, ...] = ()  #: what is needed beyond PyTorch
    otherwise: str = "leave it out"  #: what to do where it does not take a detector

    def missing(self) -> List[str]:
        """Packages that are not installed."""
        return [name for name in self.packages if importlib.util.find_spec(name) is None]

    def convert(self, model: nn.Module, image: Tensor, path: str) -> None:
        """Write ``model``, in eval mode on the CPU, as it detects in ``image``, or refuse it."""
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # they are about code that is not the user's
                traceable = TracingAdapter(model, [{"image": image}], _instances).eval()
                self.write(traceable, image, outputs_of(model), path)
        except Exception as e:  # whatever an exporter raises
            first = str(e).strip().partition("\n")[0]
            raise NotExportable(f"{type(e).__name__}: {first}", self.otherwise) from e


def _trace(model: nn.Module, image: Tensor, outputs: List[str], path: str) -> None:
    torch.jit.save(torch.jit.trace(model, (image,), check_trace=False), path)


def _onnx(model: nn.Module, image: Tensor, outputs: List[str], path: str) -> None:
    torch.onnx.export(
        model,
        (image,),
        path,
        dynamo=False,  # by tracing: torch.export does not take these models
        opset_version=17,  # RoIAlign with aligned corners needs 16
        input_names=["image"],
        output_names=outputs,
        dynamic_axes={
            "image": {1: "height", 2: "width"},
            **{name: {0: "detections"} for name in outputs},
        },
    )


def _load_torchscript(path: str) -> Runner:
    return torch.no_grad()(torch.jit.load(path))


def _load_onnx(path: str) -> Runner:
    import onnxruntime  # optional, see Format.packages

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors, not its advice on single operators
    options.intra_op_num_threads = torch.get_num_threads()  # so that latencies compare
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda image: [torch.from_numpy(x) for x in session.run(None, {"image": image.numpy()})]


#: name -> format
FORMATS: Dict[str, Format] = {
    "torchscript": Format(
        "torchscript.pt", _trace, _load_torchscript, "torch, torchvision", otherwise="use onnx"
    ),
    "onnx": Format("onnx", _onnx, _load_onnx, "onnxruntime", ("onnx", "onnxruntime")),
}
#: name -> why there is no such format, and what to use
UNSUPPORTED = {
    "torch_export": (
        "torch.export does not take Detectron2's detectors, which branch on computed values",
        "use torchscript or onnx",
    ),
    "script": ("takes fewer detectors than a trace and runs with the same", "use torchscript"),
}
