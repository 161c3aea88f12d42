"""Two processes that train together, forked from one that has imported what they need: an import takes seconds."""

import multiprocessing

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

multiprocessing.set_forkserver_preload(["sharedkd.engine.run", "sharedkd.methods"])


def _member(rank, function, folder, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", world_size=2, rank=rank)
    torch.save(function(*args), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def in_two(function, folder, *args):
    """What ``function(*args)`` returns in each of two processes of one group."""
    mp.start_processes(_member, (function, str(folder), args), 2, start_method="forkserver")
    return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in (0, 1)]
