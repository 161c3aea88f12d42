"""Starting a run's processes: Detectron2's launch, or torchrun."""

import logging
import multiprocessing
import os
import sys
import time
from argparse import Namespace
from contextlib import nullcontext
from typing import Any, Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.engine import TrainerBase
from detectron2.engine import launch as detectron2_launch
from detectron2.utils import comm

from sharedkd.errors import ConfigError, DataError, SharedKDError

from .checkpoint import DISK
from .interrupt import forward_signals, interruptible

__all__ = ["launch"]

GRACE = 20  # seconds that other ranks wait for rank 0 to print the same error


def launch(main: Callable[[Namespace], Any], args: Namespace) -> None:
    """Run ``main(args)`` in as many processes as the command line asks for; never returns an error.

    Under ``torchrun`` this process joins the group it finds in the environment, over gloo on the CPU.
    Otherwise Detectron2 starts ``--num-gpus`` processes on this machine.  A SharedKDError ends the
    program with one line and exit status 1.

    Args:
        main: a function that a new process can import; its result is discarded.
        args: of Detectron2's ``default_argument_parser``.
    """
    try:
        if "LOCAL_RANK" in os.environ:
            return _join(main, args)
        found = torch.cuda.device_count()
        if args.num_gpus > max(1, found):
            fix = "ask for no more than that; CPU processes: torchrun --nproc-per-node=2 ... "
            fix += "train.device=cpu"
            raise ConfigError("--num-gpus", args.num_gpus, f"this machine has {found}", fix)
        several = args.num_gpus * args.num_machines > 1
        with forward_signals() if several else nullcontext():
            detectron2_launch(
                _guarded,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(main, args),
            )
    except mp.ProcessExitedException as e:  # the process itself has said why
        sys.exit(e.exit_code if e.exit_code >= 0 else 128 - e.exit_code)
    except SharedKDError as e:
        _say_and_exit(e)


def _guarded(main: Callable[[Namespace], Any], args: Namespace) -> None:
    if sys.platform == "linux":
        # In a spawned process data loaders would spawn their workers, too.  These take seconds to start,
        # and a signal to the process group would end them (see interrupt.py).
        multiprocessing.set_start_method("fork", force=True)
    logging.getLogger(TrainerBase.__module__).addFilter(_without_traceback)
    try:
        with interruptible("there is nothing to save yet"):
            main(args)
    except SharedKDError as e:
        _say_and_exit(e)


def _without_traceback(record: logging.LogRecord) -> bool:
    """A log filter for Detectron2's training loop: our own errors are logged without traceback."""
    error = record.exc_info and record.exc_info[1]
    full = isinstance(error, OSError) and error.errno in DISK
    if full or isinstance(error, SharedKDError):
        record.msg, record.args, record.exc_info = f"Training stops: {error}", (), None
    return True


def _say_and_exit(error: Exception) -> None:
    if not isinstance(error, DataError) and not comm.is_main_process():
        # If all ranks raise this error, rank 0 prints it and ends this process.
        time.sleep(GRACE)
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(1)


def _join(main: Callable[[Namespace], Any], args: Namespace) -> None:
    """Join the group that ``torchrun`` describes in the environment."""
    cuda = torch.cuda.is_available() and not {"train.device=cpu", "MODEL.DEVICE=cpu"} & {*args.opts}
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    _form_local_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    try:
        _guarded(main, args)
    finally:
        dist.destroy_process_group()


def _form_local_group(per_machine: int) -> None:
    """Tell Detectron2 which ranks share this machine."""
    if hasattr(comm, "create_local_process_group"):
        return comm.create_local_process_group(per_machine)
    world_size, rank = dist.get_world_size(), dist.get_rank()
    for first in range(0, world_size, per_machine):
        group = dist.new_group(list(range(first, first + per_machine)))
        if first <= rank < first + per_machine:
            comm._LOCAL_PROCESS_GROUP = group
