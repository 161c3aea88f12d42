"""Checks before a run that no whole run on this machine reaches."""

import pytest
import torch.distributed as dist
from detectron2.utils import comm

from sharedkd.engine.checks import check_device
from sharedkd.errors import ConfigError


def test_a_cpu_is_refused_in_a_group_of_gpus(monkeypatch):
    """The group is formed before the config is read, and a config may say cpu itself."""
    check_device("cpu")
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    check_device("cpu")
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    with pytest.raises(ConfigError, match="NCCL.*add train.device=cpu to the command"):
        check_device("cpu")
    with pytest.raises(ConfigError, match="train.device=nowhere: there is no such device"):
        check_device("nowhere")
