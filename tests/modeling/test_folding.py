"""Folding of frozen batch norms: equal maps, nothing left to fold, nothing folded that must not be."""

import families
import pytest
import tiny
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d, NaiveSyncBatchNorm
from torch import nn

from sharedkd.modeling.folding import NORMS, fold_norms


def statistics(module, seed=0):
    """Give all norms statistics, scales and shifts that change something."""
    draw = torch.Generator().manual_seed(seed)
    for norm in module.modules():
        if isinstance(norm, NORMS):
            for tensor, low, high in (
                (norm.running_mean, -1.0, 1.0),
                (norm.running_var, 0.2, 3.0),
                (norm.weight, 0.5, 2.0),
                (norm.bias, -1.0, 1.0),
            ):
                tensor.data.uniform_(low, high, generator=draw)
    return module


def wrapped(norm, bias=False):
    conv = Conv2d(3, 8, 3, bias=bias, norm=norm(8), activation=nn.functional.relu)
    return nn.Sequential(conv, Conv2d(8, 4, 1))


@pytest.mark.parametrize(
    "norm, bias, layout",
    [
        (FrozenBatchNorm2d, False, torch.channels_last),
        (nn.BatchNorm2d, True, torch.contiguous_format),
        (nn.SyncBatchNorm, True, torch.channels_last),
    ],
)
def test_maps_stay_equal(norm, bias, layout):
    model = statistics(wrapped(norm, bias)).eval().requires_grad_(False).double()
    model.to(memory_format=layout)
    x = torch.randn(2, 3, 9, 7, dtype=torch.float64)
    before = model(x)
    assert fold_norms(model) == 1 and model[0].norm is None
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    assert model[0].weight.is_contiguous(memory_format=layout)
    assert not any(p.requires_grad for p in model.parameters())
    assert fold_norms(model) == 0


def test_values_of_one_channel():
    norm = nn.BatchNorm2d(1, eps=0.0)
    norm.running_mean[:], norm.running_var[:] = 3.0, 4.0
    norm.weight.data[:], norm.bias.data[:] = 10.0, 1.0
    conv = Conv2d(1, 1, 1, norm=norm)
    conv.weight.data[:], conv.bias.data[:] = 2.0, 5.0
    fold_norms(conv.eval())
    assert conv.weight.item() == 10.0  # 2 * 10 / 2
    assert conv.bias.item() == 11.0  # (5 - 3) * 10 / 2 + 1


def test_norms_beside_their_convolutions():
    regnet = families.model_of(families.BY_NAME["RegNet"], 0).backbone.bottom_up
    model = statistics(regnet).eval().requires_grad_(False).double()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    before = model(x)
    norms = sum(isinstance(m, NORMS) for m in model.modules())
    assert fold_norms(model) == norms > 10
    assert not any(isinstance(m, NORMS) for m in model.modules())
    for name, y in model(x).items():
        torch.testing.assert_close(y, before[name], rtol=1e-10, atol=1e-10)


def test_detectors_keep_their_maps():
    backbone = statistics(tiny.detector("retinanet", 50)).eval().backbone.requires_grad_(False)
    x = torch.randn(1, 3, 64, 64)
    before = backbone(x)
    assert fold_norms(backbone) >= 50
    for name, y in backbone(x).items():
        error = (y - before[name]).square().mean().sqrt() / before[name].square().mean().sqrt()
        assert error < 1e-5, name


class NormAct(nn.BatchNorm2d):
    """A batch norm with an activation, as timm's BatchNormAct2d."""

    def forward(self, x):
        return nn.functional.relu(super().forward(x))


def test_norms_that_contain_an_activation_stay():
    """The others are folded; one that wraps a plain forward, such as Detectron2's own SyncBN, too."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        NormAct(8),
        Conv2d(8, 8, 3, norm=NormAct(8)),
        nn.Conv2d(8, 8, 1),
        NaiveSyncBatchNorm(8),
    )
    statistics(model).eval().requires_grad_(False).double()
    x = torch.randn(2, 3, 9, 7, dtype=torch.float64)
    before = model(x)
    assert fold_norms(model) == 1 and isinstance(model[4], nn.Identity)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)


def test_what_depends_on_the_input_stays():
    group = nn.Sequential(Conv2d(3, 32, 1, norm=nn.GroupNorm(4, 32)), nn.Conv2d(32, 4, 1))
    unfixed = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, track_running_stats=False))
    activated = nn.Sequential(Conv2d(3, 8, 1, activation=nn.functional.relu), nn.BatchNorm2d(8))
    apart = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.BatchNorm2d(8))
    hooked = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    hooked[1].register_forward_hook(lambda *args: None)
    for model in (group, unfixed, activated, apart, hooked):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        assert fold_norms(model.eval()) == 0
        after = model.state_dict()
        assert all(torch.equal(after[k], v) for k, v in before.items())


def test_statistics_that_still_move_are_refused():
    with pytest.raises(ValueError, match="training mode"):
        fold_norms(wrapped(nn.BatchNorm2d).train())
