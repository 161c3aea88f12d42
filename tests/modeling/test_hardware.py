"""What a CPU is good at decides how a step is computed, unless the config does."""

import pytest
import tiny
import torch

from sharedkd.config import load_config
from sharedkd.engine.parts import build_parts, memory_layout
from sharedkd.modeling import hardware as cpu

QUICKSTART = str(tiny.ROOT / "configs/quickstart/plain.py")


def config(*overrides):
    return load_config(QUICKSTART, ["train.device=cpu", *overrides], without_data=True)


@pytest.mark.parametrize("capability, expected", [("AVX2", False), ("AVX512", True)])
def test_the_layout_is_the_faster_one_of_this_cpu(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    layouts = {False: torch.preserve_format, True: torch.channels_last}
    assert memory_layout(config()) == layouts[expected]
    for said in (False, True):
        assert memory_layout(config(f"train.channels_last={said}")) == layouts[said]
    on_gpu = config()
    on_gpu.train.device = "cuda"
    assert memory_layout(on_gpu) == torch.channels_last


@pytest.mark.parametrize("said", [False, True])
def test_a_model_has_the_layout(said):
    model = build_parts(config(f"train.channels_last={said}")).model
    weights = [p for p in model.parameters() if p.dim() == 4 and min(p.shape[1:]) > 1]
    assert len(weights) > 20
    assert all(p.is_contiguous(memory_format=torch.channels_last) == said for p in weights)


@pytest.mark.parametrize("there", ["avx512_bf16", "amx_tile", None])
def test_bfloat16_takes_instructions_for_it(monkeypatch, there):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for kind in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{kind}_supported", lambda kind=kind: kind == there)
    assert cpu.has_bfloat16() is (there is not None)


@pytest.mark.parametrize("there", [True, False])
def test_bfloat16_on_other_processors_is_what_pytorch_says(monkeypatch, there):
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: there)
    assert cpu.has_bfloat16() is there


def test_bfloat16_where_pytorch_cannot_tell(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert cpu.has_bfloat16() is True
