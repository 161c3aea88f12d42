"""FitNets: values by loops, gradients, parameters, padding, errors."""

import pytest
import torch
from losses.harness import batch, bound, check_gradients, check_who_learns, maps, parameters, total

from sharedkd.errors import ConfigError
from sharedkd.losses.fitnets import FitNets

SIZES = [(64, 96), (40, 33)]  # of two images on a canvas of 64 x 96 pixels


def reference(s, t, stride, conv=None, sizes=None):
    """The mean of squared differences, position by position; ``conv``: weight and bias."""
    total, count = 0.0, 0
    n, _, height, width = s.shape
    for i in range(n):
        for y in range(height):
            for x in range(width):
                if sizes and (y * stride >= sizes[i][0] or x * stride >= sizes[i][1]):
                    continue
                for c in range(t.shape[1]):
                    if conv is None:
                        value = s[i, c, y, x].item()
                    else:
                        weight, value = conv[0], conv[1][c].item()
                        half = weight.shape[-1] // 2
                        for k in range(s.shape[1]):
                            for dy in range(-half, half + 1):
                                for dx in range(-half, half + 1):
                                    if 0 <= y + dy < height and 0 <= x + dx < width:
                                        value += (
                                            weight[c, k, dy + half, dx + half]
                                            * s[i, k, y + dy, x + dx]
                                        ).item()
                    total += (value - t[i, c, y, x].item()) ** 2
                    count += 1
    return total / count


CASES = {
    "random": dict(strides=(16, 32)),
    "one image": dict(strides=(32,), images=1),
    "one pixel": dict(strides=(64,), images=1, padded=(64, 64)),
    "zeros": dict(strides=(32,), fill=0.0),
    "constant": dict(strides=(32,), fill=-3.0),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize(
    "adapter, widths", [(0, (3, 3)), (None, (3, 3)), (None, (2, 3)), (1, (3, 3)), (3, (2, 3))]
)
def test_value(case, adapter, widths):
    student = {"fpn": maps(channels=widths[0], **case)}
    teacher = {"fpn": maps(channels=widths[1], seed=1, **{**case, "fill": None})}
    loss = bound(FitNets(adapter=adapter), student, teacher)
    terms = loss(batch(student, teacher))
    assert list(terms) == [f"s{stride}" for stride in case["strides"]]
    for stride, s in student["fpn"].items():
        module = loss.adapters[str(stride)]
        conv = (module.weight, module.bias) if list(module.parameters()) else None
        expected = reference(s, teacher["fpn"][stride], stride, conv)
        assert terms[f"s{stride}"].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("adapter", [0, 3])
def test_padding_counts_unless_ignored(adapter):
    student, teacher = {"fpn": maps((16,), 2)}, {"fpn": maps((16,), 2, seed=1)}
    for ignore in (False, True):
        loss = bound(FitNets(adapter=adapter, ignore_padding=ignore), student, teacher)
        term = loss(batch(student, teacher, sizes=SIZES))["s16"].item()
        conv = loss.adapters["16"]
        conv = (conv.weight, conv.bias) if adapter else None
        expected = reference(
            student["fpn"][16], teacher["fpn"][16], 16, conv, SIZES if ignore else None
        )
        assert term == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("adapter", [0, 1, 3])
def test_gradients(adapter):
    student, teacher = {"fpn": maps((16, 32), 2)}, {"fpn": maps((16, 32), 2, seed=1)}
    loss = bound(FitNets(adapter=adapter, ignore_padding=True), student, teacher)
    check_gradients(loss, student, teacher, sizes=SIZES)
    check_who_learns(loss, student, teacher, sizes=SIZES)


def test_default_learns_a_pointwise_convolution():
    pyramid = {"fpn": maps((32,), 2)}
    assert parameters(bound(FitNets(), pyramid, pyramid)) == 2 * 2 + 2


@pytest.mark.parametrize(
    "adapter, widths, expected",
    [
        (1, (256, 256), 65_792),
        (3, (256, 256), 590_080),
        (0, (256, 256), 0),
        (None, (256, 256), 0),
        (None, (5, 7), 5 * 7 + 7),
        (3, (5, 7), 9 * 5 * 7 + 7),
    ],
)
def test_parameters(adapter, widths, expected):
    loss = FitNets(adapter=adapter)
    shapes = [{"fpn": dict.fromkeys((4, 8, 16, 32, 64), width)} for width in widths]
    loss.bind(*shapes, "key")
    assert parameters(loss) == 5 * expected


@pytest.mark.parametrize("adapter", [0, 3])
def test_lower_precision(adapter):
    student, teacher = {"fpn": maps((8, 16))}, {"fpn": maps((8, 16), seed=1)}
    loss = bound(FitNets(adapter=adapter), student, teacher)
    expected = loss(batch(student, teacher))

    def lower(dtype):
        given = [{"fpn": {k: x.to(dtype) for k, x in p["fpn"].items()}} for p in (student, teacher)]
        return loss.float()(batch(*given))

    for name, term in lower(torch.float32).items():
        assert term.item() == pytest.approx(expected[name].item(), rel=1e-4)
    assert all(x.dtype == torch.float32 and x.isfinite() for x in lower(torch.bfloat16).values())


def test_equal_maps_cost_nothing_without_an_adapter():
    pyramid = {"fpn": maps((16, 32))}
    loss = bound(FitNets(adapter=0), pyramid, pyramid)
    assert total(loss(batch(pyramid, pyramid))).item() == 0


def test_errors():
    shapes = {"fpn": {8: 4}}, {"fpn": {8: 6}}
    with pytest.raises(ConfigError, match=r"^key\.adapter=0: .* 4 channels, the teacher's 6"):
        FitNets(adapter=0).bind(*shapes, "key")
    with pytest.raises(ConfigError, match=r"^key\.adapter=2: .*odd"):
        FitNets(adapter=2).bind(*shapes, "key")
    with pytest.raises(ConfigError, match="^key=FitNets: .*model.teacher"):
        FitNets().bind(shapes[0], None, "key")
