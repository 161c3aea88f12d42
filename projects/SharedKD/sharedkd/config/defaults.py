"""The keys of `train` and `data`: type, default, limits and meaning of each; and the keys that are gone."""

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, List, Optional

import torch

from sharedkd.errors import ConfigError

from .structure import defaults_of, limited

__all__ = [
    "DATA_DEFAULTS",
    "NONFINITE_POLICIES",
    "TRAIN_DEFAULTS",
    "WRITERS",
    "Data",
    "Train",
]

NONFINITE_POLICIES = ("stop", "skip_step")
WRITERS = ("wandb", "mlflow")  #: packages that `train.writers` may name


def _check_installed(key: str, names: List[str]) -> None:
    for name in names:
        found = find_spec(name)
        if found is None or found.origin is None:  # a folder of that name is no package
            raise ConfigError(key, name, "is not installed", f"pip install {name}, or {key}=[]")


# docs/config.md shows each key below with its default and its comment.
@dataclass
class Amp:
    """Mixed precision."""

    enabled: bool = False  # mixed precision
    # None: float16 on CUDA, else bfloat16
    dtype: Optional[str] = limited(None, choices=("float16", "bfloat16"))


@dataclass
class DDP:
    """Options of DistributedDataParallel; its other options may be set, too."""

    OTHERS = True

    broadcast_buffers: bool = False  # the first process's BatchNorm statistics to all, in each step
    find_unused_parameters: bool = False  # look for parameters that a step does not use
    fp16_compression: bool = False  # send gradients in float16


@dataclass
class Checkpointer:
    """When checkpoints are saved and deleted."""

    # iterations between checkpoints; None: a tenth of the run, at least 100
    period: Optional[int] = limited(5000, least=1)
    max_to_keep: Optional[int] = limited(100, least=1)  # older ones are deleted; None: keep all


@dataclass
class Train:
    """The group `train`, of plain and of distilled runs alike; some keys are Detectron2's own."""

    # folder of the run: log, metrics, checkpoints, config.yaml, run.json
    output_dir: str = limited("./output", empty=False)
    # the student's initial weights: ImageNet backbone or detector
    init_checkpoint: Optional[str] = ""
    init_sha256: str = ""  # of that file, verified; at least 8 hexadecimal digits
    trust_checkpoint: bool = False  # let that file, or the one to resume from, run what it asks for
    safetensors: bool = False  # write model_final.safetensors beside model_final.pth
    # what the student copies from the teacher at the start, unless init_checkpoint has it: neck, head
    inherit: List[str] = limited([])
    # images of the training data by which the laterals of the student's FPN are fitted to those of the
    # teacher, if its FPN is inherited; 0: they are not
    inherit_images: int = limited(128, least=0)
    # evaluate the teacher before the first iteration, and say when the student is level with it;
    # None: if its classes are as many as the data's
    eval_teacher: Optional[bool] = None
    # length in optimizer steps; the schedule scales with it
    max_iter: Optional[int] = limited(90000, least=1)
    # length in passes over own data, in place of max_iter, which is None then
    epochs: Optional[float] = limited(None, above=0)
    amp: Amp = field(default_factory=Amp)
    # memory layout of student and maps, equal up to rounding; None: the faster one
    channels_last: Optional[bool] = None
    # compute activations of the student's blocks again: less memory, more time
    activation_checkpointing: bool = False
    compile: bool = False  # torch.compile for the student's bottom-up network
    # largest norm of the gradient of all parameters together; None: it is not clipped
    clip_grad_norm: Optional[float] = limited(None, above=0)
    accumulate: int = limited(1, least=1)  # batches per optimizer step
    # what an infinite or NaN loss or gradient does: stop, skip_step
    on_nonfinite: str = limited("stop", choices=NONFINITE_POLICIES)
    max_skipped_steps: int = limited(10, least=0)  # in a row; one more stops the run
    # iterations between measurements of each term's gradient share, a fourth of the run at most; 0: never
    watch_period: int = limited(1000, least=0)
    cudnn_benchmark: bool = False  # cuDNN tries its algorithms: faster for images of one size
    seed: int = limited(0, most=2**32 - 1)  # negative: draw one, and write it into the saved config
    fast_dev_run: bool = False  # 20 iterations, one evaluation of 50 images, one checkpoint
    ddp: DDP = field(default_factory=DDP)
    checkpointer: Checkpointer = field(default_factory=Checkpointer)
    force_resume: bool = False  # resume although the model, its teacher or its stages have changed
    # iterations between evaluations; 0: only at the end; None: a tenth of the run, at least 100
    eval_period: Optional[int] = limited(5000, least=0)
    log_period: int = limited(20, least=1)  # iterations between log lines
    # what else gets the logged values, if it is installed: wandb, mlflow
    writers: List[str] = limited([], choices=WRITERS, check=_check_installed)
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cuda where there is one


@dataclass
class Data:
    """The group `data`: own data in COCO format.  The first four keys have to be given."""

    train_json: Any = None  # COCO-format annotations to train on, one file or a list
    val_json: Any = None  # those to evaluate on
    train_images: Any = None  # folder of the images that train_json names, or one for each file
    val_images: Any = None  # folder of those of val_json; it may be the same one
    # the data set's name in Detectron2's catalog: own_train, own_val
    name: str = limited("own", empty=False)
    # how often an epoch holds each image of a json by tools/label_images.py, on average: 0.5 halves its weight
    pseudo_weight: float = limited(1.0, above=0)
    # folder of images without labels, one or a list: losses of maps learn from them, the detector's own
    # losses do not; what train_json and val_json name is left out
    unlabelled_images: Any = None
    unlabelled_json: Optional[str] = (
        None  # which of that folder: the images that this COCO json lists
    )
    # how many of them come for each labelled image of a batch, on top of total_batch_size
    unlabelled_ratio: float = limited(1.0, above=0)
    num_classes: Optional[int] = limited(None, least=1)  # counted in the json
    classes: Optional[List[str]] = None  # their names, from the json
    masks: bool = False  # load instance masks
    repair: bool = True  # what has one meaning is repaired in memory, and said; False: refused
    # [lo, hi] of images beyond 8 bits that become 0 and 255; None: by their type
    image_range: Optional[List[float]] = None
    # also crops, and changes of brightness, contrast and saturation: for long runs
    strong_augmentation: bool = False
    # training sizes in pixels, one drawn per image
    short_edge: List[int] = limited([224, 240, 256], least=1)
    test_short_edge: int = limited(240, least=1)  # size in evaluation
    max_size: int = limited(480, least=1)  # of the longer edge


TRAIN_DEFAULTS = defaults_of(Train)  #: The defaults of `train`.
DATA_DEFAULTS = defaults_of(Data)  #: The defaults of `data`.
