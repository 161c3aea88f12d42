"""A frozen backbone without a detector, as a source of maps."""

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import VisionTransformer

from sharedkd import ConfigError, Stage
from sharedkd.losses import DIST, DKD, PKD, Cosine, RegionCrossKD
from sharedkd.modeling.teachers import FoundationTeacher, TeacherMean

TAPS, GREY = frozenset({"fpn"}), dict(pixel_mean=[0.0] * 3, pixel_std=[1.0] * 3)


class Patches(nn.Module):
    """Tokens that are the means of their patches, after a class token of infinity."""

    def __init__(self, patch=16):
        super().__init__()
        self.scale, self.patch = nn.Parameter(torch.ones(())), patch

    def forward(self, images):
        tokens = F.avg_pool2d(images * self.scale, self.patch).flatten(2).transpose(1, 2)
        return torch.cat([torch.full_like(tokens[:, :1], float("inf")), tokens], 1)


def source(patch=16, **options):
    return FoundationTeacher(Patches(patch), "", patch, **{**GREY, **options})


def ramp(height, width):
    """A record whose channels are 2 x, y and 5."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return {"image": torch.stack([2 * x, y, torch.full_like(x, 5)]).to(torch.uint8)}


@pytest.mark.parametrize("patch, scale", [(16, 1), (14, 1), (16, 0.5)])
def test_the_map_lies_where_the_student_sees_it(patch, scale):
    """A mean of a ramp is its middle: levels of any patch and size have the ramp of their stride."""
    size = None if scale == 1 else (48, 48)
    teacher = source(patch, size=size)
    found = teacher.features([ramp(96, 96)], TAPS, "RGB", 32)["fpn"]
    assert {s: tuple(x.shape) for s, x in found.items()} == {
        s: (1, 3, 96 // s, 96 // s) for s in (8, 16, 32)
    }
    for stride, x in found.items():
        middle = (torch.arange(96 // stride) + 0.5) * stride - 0.5
        inner = slice(32 // stride, -32 // stride) if stride < 32 else slice(1, 2)
        assert torch.allclose(x[0, 0, 0, inner], 2 * middle[inner], atol=0.6), stride
        assert torch.allclose(x[0, 1, inner, 0], middle[inner], atol=0.6), stride
        assert torch.allclose(x[0, 2], torch.tensor(5.0))


def test_colours_normalisation_and_padding():
    teacher = source(input_format="BGR", pixel_mean=[5.0, 0.0, 0.0], pixel_std=[2.0, 1.0, 1.0])
    small = {"image": torch.ones(3, 32, 32, dtype=torch.uint8)}
    found = teacher.features([ramp(64, 64), small], TAPS, "RGB", 32)["fpn"][16]
    assert found.shape == (2, 3, 4, 4) and not found.requires_grad
    assert not found[0, 0].any()  # the channel of fives comes first, less its mean of five
    assert (found[1, 1, :2, :2] == 1).all() and not found[1, :, 2:].any()


def vit():
    torch.manual_seed(0)
    return VisionTransformer(
        image_size=64, patch_size=16, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8
    )


def test_a_torchvision_vit_teaches_a_detector():
    """The student and the projections learn, the ViT does not; any loss of maps may read it."""
    teacher = FoundationTeacher(vit(), "", output="encoder", size=64)
    before = teacher.fingerprint
    stages = {"cosine": Stage(Cosine()), "pkd": Stage(PKD(strides=[16]))}
    model = tiny.pair(stages, "faster_rcnn", teacher)
    losses = tiny.step(model, tiny.batch("half"), {"cosine": 1.0, "pkd": 1.0})
    names = {f"distill/cosine/s{s}" for s in (8, 16, 32)} | {"distill/pkd/s16"}
    assert {k for k in losses if k.startswith("distill/")} == names
    sum(losses[k] for k in names).backward()
    assert all(p.grad.any() for p in model.losses["cosine"].parameters())
    assert any(p.grad is not None and p.grad.any() for p in model.student.backbone.parameters())
    assert all(p.grad is None for p in teacher.model.parameters()) and not teacher.model.training
    del teacher.fingerprint  # it is cached
    assert teacher.fingerprint == before


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("loss", [DKD, DIST, RegionCrossKD])
def test_a_loss_of_regions_is_refused_when_built(loss, mean):
    """Such a teacher has no box head; without this check the first step failed."""
    teacher = TeacherMean([source(), source()]) if mean else source()
    with pytest.raises(ConfigError) as error:
        tiny.pair({"probe": Stage(loss(1.0, 1.0))}, "faster_rcnn", teacher)
    assert str(error.value) == (
        f"model.stages.probe.loss={type(teacher).__name__}: is a teacher without a detector, and this loss "
        "reads what its box head predicts; use a two-stage detector as teacher, or a loss that compares "
        "feature maps"
    )


class Ending(Patches):
    """The same as a map whose channels come last, as a Swin's."""

    def forward(self, images):
        return F.avg_pool2d(images * self.scale, self.patch).permute(0, 2, 3, 1)


@pytest.mark.parametrize("size", [None, 64])
def test_channels_may_come_last(size):
    maps = [
        FoundationTeacher(network, "", size=size, **GREY).features([ramp(64, 96)], TAPS, "RGB", 32)
        for network in (Ending(), Patches())
    ]
    assert all(torch.equal(maps[0]["fpn"][s], x) for s, x in maps[1]["fpn"].items())


def test_weights_are_loaded_completely(tmp_path):
    trained, path = Patches(), str(tmp_path / "vit.pth")
    trained.scale.data.fill_(3.0)
    torch.save(trained.state_dict(), path)
    assert FoundationTeacher(Patches(), path).model.scale == 3
    torch.save({"other": torch.ones(())}, path)
    with pytest.raises(ConfigError, match="model.teacher.weights=.*does not fit this Patches"):
        FoundationTeacher(Patches(), path)


@pytest.mark.parametrize(
    "model, options, start, words",
    [
        (Patches, dict(weights=None), "model.teacher.weights=None: ", "empty string"),
        (Patches, dict(size=50), "model.teacher.size=50: ", "multiples of 16"),
        (Patches, dict(patch=0), "model.teacher.patch=0: ", "1 or more"),
        (vit, dict(output="neck", size=64), "model.teacher.output=neck: ", "encoder"),
        (vit, dict(size=64), "model.teacher.output=null: returns (1, 1000)", "neither a map"),
        (Patches, dict(patch=8), "model.teacher.output=null: returns (1, 2, 3)", "2x2 patches"),
    ],
)
def test_what_is_no_source_is_refused(model, options, start, words):
    with pytest.raises(ConfigError) as error:
        FoundationTeacher(model(), **{"weights": "", **options})
    assert str(error.value).startswith(start) and words in str(error.value)
