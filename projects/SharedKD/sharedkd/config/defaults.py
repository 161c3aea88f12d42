"""The keys of `train`: their defaults, what they may be, and those that are gone."""

from functools import partial
from importlib.util import find_spec
from typing import Any, Callable, Dict

import torch

from sharedkd.errors import ConfigError
from sharedkd.values import check_choice, check_names, check_number, check_switch, check_text

__all__ = [
    "GONE",
    "NONFINITE_POLICIES",
    "TRAIN_DEFAULTS",
    "TRAIN_RULES",
    "TYPE_RULES",
    "WRITERS",
    "check_writers",
]

NONFINITE_POLICIES = ("stop", "skip_step")
WRITERS = ("wandb", "mlflow")  #: packages that `train.writers` may name

_SPEED = "leave it out: it changed the speed alone"
#: Keys of earlier versions -> what to do instead.
GONE = {
    "train.fold_norms": _SPEED,
    "train.fast_roi_align": _SPEED,
    "train.fast_focal_loss": _SPEED,
    "train.keep_memory": _SPEED,
    "dataloader.train.sampler": "the loader draws its own order; for rare classes set "
    "dataloader.train.repeat_threshold, such as 0.01",
    "model.teacher.cache": "leave it out: the teacher runs in every step",
}


def check_writers(key: str, names: Any) -> None:
    """Raises:
    ConfigError: ``names``, the value of ``key``, is no list of names, or holds an unknown writer or
        one whose package is not installed.
    """
    check_names(key, names)
    for name in names:
        check_choice(key, name, WRITERS)
        found = find_spec(name)
        if found is None or found.origin is None:  # a folder of that name is no package
            raise ConfigError(key, name, "is not installed", f"pip install {name}, or {key}=[]")


#: What `train` may hold beyond Detectron2's own keys.  They apply to plain and distilled runs alike.
TRAIN_DEFAULTS = dict(
    output_dir="./output",  # folder of the run: log, metrics, checkpoints, config.yaml, run.json
    init_checkpoint="",  # the student's initial weights: ImageNet backbone or detector
    init_sha256="",  # of that file, verified; at least 8 hexadecimal digits
    trust_checkpoint=False,  # let that file, or the one to resume from, run what it asks for
    safetensors=False,  # write model_final.safetensors beside model_final.pth
    inherit=[],  # parts that the student copies from the teacher at the start: neck, head
    eval_teacher=False,  # evaluate the teacher before the first iteration
    max_iter=90000,  # length of the run in optimizer steps; the schedule scales with it
    amp=dict(
        enabled=False,  # mixed precision
        dtype=None,  # float16 or bfloat16; None: float16 on CUDA, else bfloat16
    ),
    channels_last=None,  # memory layout of student and maps, equal up to rounding; None: the faster one
    activation_checkpointing=False,  # keep no activations of the student's blocks: less memory, more time
    compile=False,  # torch.compile for the student's bottom-up network
    clip_grad_norm=None,  # largest norm of the whole gradient; None: it is not clipped
    accumulate=1,  # batches per optimizer step
    on_nonfinite="stop",  # what an infinite or NaN loss or gradient does: stop, skip_step
    max_skipped_steps=10,  # in a row; one more stops the run
    watch_period=1000,  # iterations, or a fourth of the run, between looks at each term's share of the gradient; 0: never
    cudnn_benchmark=False,  # cuDNN tries its algorithms: faster for images of one size
    seed=0,  # negative: draw one, and write it into the saved config
    fast_dev_run=False,  # 20 iterations, one evaluation of 50 images, one checkpoint
    ddp=dict(
        broadcast_buffers=False,  # the first process's BatchNorm statistics to all, in each step
        find_unused_parameters=False,  # look for parameters that a step does not use
        fp16_compression=False,  # gradients travel in float16
    ),
    checkpointer=dict(
        period=5000,  # iterations between checkpoints
        max_to_keep=100,  # older ones are removed; None: all are kept
    ),
    on_save_error="stop",  # what a full disk or read-only folder does: stop, continue
    force_resume=False,  # resume although the model, its teacher or its stages have changed
    eval_period=5000,  # iterations between evaluations; 0: at the end alone
    log_period=20,  # iterations between log lines
    writers=[],  # what else gets the logged values, if it is installed: wandb, mlflow
    device="cuda" if torch.cuda.is_available() else "cpu",  # cuda where there is one
)

#: What values of `train` may be, where their type does not say it.
TRAIN_RULES: Dict[str, Callable[..., Any]] = {
    "output_dir": lambda key, x: check_text(key, x, empty=False),
    "init_checkpoint": lambda key, x: x is None or check_text(key, x),
    "max_iter": partial(check_number, least=1, whole=True),
    "channels_last": lambda key, x: x is None or check_switch(key, x),
    "amp.dtype": lambda key, x: x is None or check_choice(key, x, ("float16", "bfloat16")),
    "clip_grad_norm": partial(check_number, above=0, or_null=True),
    "accumulate": partial(check_number, least=1, whole=True),
    "on_nonfinite": lambda key, x: check_choice(key, x, NONFINITE_POLICIES),
    "on_save_error": lambda key, x: check_choice(key, x, ("stop", "continue")),
    "seed": partial(check_number, most=2**32 - 1, whole=True),
    "checkpointer.period": partial(check_number, least=1, whole=True),
    "checkpointer.max_to_keep": partial(check_number, least=1, whole=True, or_null=True),
    "log_period": partial(check_number, least=1, whole=True),
    "writers": check_writers,
}
#: What they may be otherwise, by the type of their default.
TYPE_RULES: Dict[type, Callable[..., Any]] = {
    bool: check_switch,
    int: partial(check_number, least=0, whole=True),
    float: partial(check_number, least=0),
    str: check_text,
    list: check_names,
}
