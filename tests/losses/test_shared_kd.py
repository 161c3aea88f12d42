"""The parts of Shared-KD: teacher share, identical layer, cross layer, and how levels are matched."""

import pytest
import torch

from sharedkd.errors import ConfigError
from sharedkd.losses import Batch, CrossLayer, DistillationLoss, IdenticalLayer
from sharedkd.losses.teacher_share import shared_target

SIZE = 128  # images of 128 x 128 pixels: whole cells on every level up to stride 128
TWO_STAGE, ONE_STAGE = (4, 8, 16, 32, 64), (8, 16, 32, 64, 128)


def pyramid(strides, widths=4, seed=0, images=2):
    generator = torch.Generator().manual_seed(seed)
    widths = [widths] * len(strides) if isinstance(widths, int) else widths
    return {
        stride: torch.randn(images, width, SIZE // stride, SIZE // stride, generator=generator)
        for stride, width in zip(strides, widths)
    }


def shapes(maps, tap="fpn"):
    return {tap: {stride: x.shape[1] for stride, x in maps.items()}}


def bound(loss, student, teacher=None):
    loss.bind(
        shapes(student, loss.tap), None if teacher is None else shapes(teacher, loss.tap), "key"
    )
    return loss


def batch_of(student, teacher=None, tap="fpn", sizes=((SIZE, SIZE),) * 2):
    return Batch({tap: student}, None if teacher is None else {tap: teacher}, list(sizes))


def pooled(x, factor):
    """Block means in float64, by slices."""
    return sum(
        x[..., i::factor, j::factor].double() for i in range(factor) for j in range(factor)
    ) / (factor * factor)


def mse(a, b):
    return ((a.double() - b.double()) ** 2).mean().item()


# --- teacher share ---------------------------------------------------------------------------


def test_dense_share_is_the_mean_of_all_lower_levels():
    maps = pyramid((8, 16, 32))
    expected = (maps[32].double() + pooled(maps[16], 2) + pooled(maps[8], 4)) / 3
    assert torch.allclose(shared_target(maps, 32, "dense").double(), expected, atol=1e-6)
    expected = (maps[16].double() + pooled(maps[8], 2)) / 2
    assert torch.allclose(shared_target(maps, 16, "dense").double(), expected, atol=1e-6)


def test_adjacent_share_uses_the_next_lower_level_that_exists():
    maps = pyramid((4, 16, 32))
    expected = (maps[32].double() + pooled(maps[16], 2)) / 2
    assert torch.allclose(shared_target(maps, 32, "adjacent").double(), expected, atol=1e-6)
    expected = (maps[16].double() + pooled(maps[4], 4)) / 2
    assert torch.allclose(shared_target(maps, 16, "adjacent").double(), expected, atol=1e-6)


@pytest.mark.parametrize("share, stride", [("none", 32), ("dense", 8), ("adjacent", 8)])
def test_without_lower_levels_the_target_is_the_map_itself(share, stride):
    maps = pyramid((8, 16, 32))
    assert shared_target(maps, stride, share) is maps[stride]


def test_channels_that_a_lower_level_lacks_are_averaged_over_those_that_have_them():
    maps = {
        4: torch.full((1, 1, 4, 4), 12.0),
        8: torch.full((1, 2, 2, 2), 6.0),
        16: torch.full((1, 4, 1, 1), 3.0),
    }
    target = shared_target(maps, 16, "dense").flatten().tolist()
    assert target == [(12 + 6 + 3) / 3, (6 + 3) / 2, 3, 3]
    assert shared_target(maps, 16, "adjacent").flatten().tolist() == [4.5, 4.5, 3, 3]


def test_a_wider_lower_level_is_cropped():
    maps = {8: torch.arange(3.0).view(1, 3, 1, 1).expand(1, 3, 2, 2), 16: torch.ones(1, 2, 1, 1)}
    assert shared_target(maps, 16, "dense").flatten().tolist() == [0.5, 1.0]


@pytest.mark.parametrize("share", ["dense", "adjacent", "none"])
def test_share_leaves_the_teachers_maps_as_they_are(share):
    maps = pyramid((8, 16, 32), (2, 4, 3))
    before = {stride: x.clone() for stride, x in maps.items()}
    for stride in maps:
        shared_target(maps, stride, share)
    assert all(torch.equal(maps[stride], before[stride]) for stride in maps)


# --- identical layer -------------------------------------------------------------------------


@pytest.mark.parametrize("share", ["dense", "adjacent", "none"])
def test_identical_layer_value(share):
    strides = (8, 16, 32)
    student, teacher = pyramid(strides), pyramid(strides, seed=1)
    targets = {stride: teacher[stride].double() for stride in strides}
    if share != "none":
        targets[16] = (teacher[16].double() + pooled(teacher[8], 2)) / 2
        lower = [pooled(teacher[16], 2)] + ([pooled(teacher[8], 4)] if share == "dense" else [])
        targets[32] = (teacher[32].double() + sum(lower)) / (1 + len(lower))
    terms = bound(IdenticalLayer(share=share), student, teacher)(batch_of(student, teacher))
    assert list(terms) == ["s8", "s16", "s32"]
    for stride in strides:
        assert terms[f"s{stride}"].item() == pytest.approx(
            mse(student[stride], targets[stride]), rel=1e-5
        )


def test_identical_layer_crops_the_wider_pyramid():
    student, teacher = pyramid((8, 16), (2, 5)), pyramid((8, 16), (6, 3), seed=1)
    terms = bound(IdenticalLayer(share="none"), student, teacher)(batch_of(student, teacher))
    assert terms["s8"].item() == pytest.approx(mse(student[8], teacher[8][:, :2]), rel=1e-5)
    assert terms["s16"].item() == pytest.approx(mse(student[16][:, :3], teacher[16]), rel=1e-5)


def test_identical_layer_trains_the_student_only():
    student, teacher = pyramid((8, 16)), pyramid((8, 16), seed=1)
    for x in (*student.values(), *teacher.values()):
        x.requires_grad_()
    terms = bound(IdenticalLayer(share="none"), student, teacher)(batch_of(student, teacher))
    sum(terms.values()).backward()
    for stride in (8, 16):
        difference = (student[stride] - teacher[stride]).detach()
        assert torch.allclose(student[stride].grad, 2 * difference / difference.numel())
        assert teacher[stride].grad is None


# --- cross layer -----------------------------------------------------------------------------


def test_cross_layer_pairs():
    student = pyramid((4, 8, 16, 32))
    dense = bound(CrossLayer(pairs="dense"), student).level_pairs()
    assert dense == [(4, 8), (4, 16), (4, 32), (8, 16), (8, 32), (16, 32)]
    adjacent = bound(CrossLayer(pairs="adjacent"), student).level_pairs()
    assert adjacent == [(4, 8), (8, 16), (16, 32)]
    assert list(bound(CrossLayer(), student)(batch_of(student)))[0] == "s4_s8"


@pytest.mark.parametrize(
    "direction, times", [("deep_to_shallow", 1), ("shallow_to_deep", 1), ("mutual", 2)]
)
@pytest.mark.parametrize("pairs", ["dense", "adjacent"])
def test_cross_layer_value(pairs, direction, times):
    student = pyramid((8, 16, 32), (2, 4, 3))
    expected = {
        "s8_s16": mse(pooled(student[8], 2), student[16][:, :2]),
        "s16_s32": mse(pooled(student[16][:, :3], 2), student[32]),
    }
    if pairs == "dense":
        expected["s8_s32"] = mse(pooled(student[8], 4), student[32][:, :2])
    terms = bound(CrossLayer(pairs=pairs, direction=direction), student)(batch_of(student))
    assert set(terms) == set(expected)
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(times * value, rel=1e-5)


def cross_gradients(direction, **options):
    student = pyramid((8, 32), (2, 3))
    for x in student.values():
        x.requires_grad_()
    loss = bound(CrossLayer(direction=direction, **options), student)
    sum(loss(batch_of(student)).values()).backward()
    return student, {stride: x.grad for stride, x in student.items()}


@pytest.mark.parametrize(
    "direction, learns", [("deep_to_shallow", {8}), ("shallow_to_deep", {32}), ("mutual", {8, 32})]
)
def test_cross_layer_gradient_by_formula(direction, learns):
    student, grads = cross_gradients(direction)
    s, d = student[8].detach(), student[32].detach()
    difference = (pooled(s, 4) - d[:, :2]).float()
    by_hand = {
        # each shallow cell is a sixteenth of a pooled cell
        8: (2 * difference / difference.numel() / 16)
        .repeat_interleave(4, 2)
        .repeat_interleave(4, 3),
        32: torch.cat([-2 * difference / difference.numel(), torch.zeros_like(d[:, 2:])], 1),
    }
    for stride in (8, 32):
        if stride in learns:
            assert torch.allclose(grads[stride], by_hand[stride], atol=1e-8)
        else:
            assert grads[stride] is None


@pytest.mark.parametrize("distance", ["mse", "l1", "smooth_l1", "cosine"])
@pytest.mark.parametrize("normalize", ["none", "channel", "instance", "position"])
def test_mutual_gradient_is_that_of_both_detached_terms(distance, normalize):
    options = dict(distance=distance, normalize=normalize)
    _, mutual = cross_gradients("mutual", **options)
    _, to_shallow = cross_gradients("deep_to_shallow", **options)
    _, to_deep = cross_gradients("shallow_to_deep", **options)
    assert torch.equal(mutual[8], to_shallow[8]) and mutual[8].any()
    assert torch.equal(mutual[32], to_deep[32]) and mutual[32].any()


def test_no_parameters():
    for loss in (IdenticalLayer(), CrossLayer()):
        assert sum(p.numel() for p in loss.parameters()) == 0
        assert not loss.state_dict()


# --- padding ---------------------------------------------------------------------------------


def with_noise_beyond(maps, image, height, width):
    """Other numbers where a map of the image shows padding only."""
    changed = {stride: x.clone() for stride, x in maps.items()}
    for stride, x in changed.items():
        x[image, :, height // stride :] = 30.0
        x[image, :, :, width // stride :] = -30.0
    return changed


@pytest.mark.parametrize("normalize", ["none", "channel", "instance", "position"])
@pytest.mark.parametrize("kind", [IdenticalLayer, CrossLayer])
def test_padding_counts_only_if_asked_for(kind, normalize):
    strides, sizes = (8, 16, 32), ((SIZE, SIZE), (64, 96))  # whole cells on every level
    student, teacher = pyramid(strides), pyramid(strides, seed=1)
    noisy = [with_noise_beyond(x, 1, 64, 96) for x in (student, teacher)]
    for ignore in (True, False):
        loss = bound(kind(normalize=normalize, ignore_padding=ignore), student, teacher)
        clean = loss(batch_of(student, teacher, sizes=sizes))
        other = loss(batch_of(*noisy, sizes=sizes))
        for name in clean:
            same = other[name].item() == pytest.approx(clean[name].item(), rel=1e-5)
            assert same is ignore, name


def test_identical_layer_with_padding_by_slices():
    student, teacher = pyramid((16,)), pyramid((16,), seed=1)
    loss = bound(IdenticalLayer(), student, teacher)
    term = loss(batch_of(student, teacher, sizes=((SIZE, SIZE), (65, 96))))["s16"]
    square = (student[16].double() - teacher[16].double()) ** 2
    # 65 rows reach into the fifth row of cells; 96 columns end with the sixth
    inside = torch.cat([square[0].flatten(), square[1, :, :5, :6].flatten()])
    assert term.item() == pytest.approx(inside.mean().item(), rel=1e-5)


@pytest.mark.parametrize("stride, rows, columns", [(8, 5, 2), (16, 3, 1), (32, 2, 1), (64, 1, 1)])
def test_which_positions_lie_inside(stride, rows, columns):
    batch = batch_of({}, sizes=((SIZE, SIZE), (40, 9)))
    inside = batch.inside(torch.zeros(2, 3, SIZE // stride, SIZE // stride), stride)
    assert inside.shape == (2, 1, SIZE // stride, SIZE // stride)
    assert inside[0].all()
    expected = torch.zeros(SIZE // stride, SIZE // stride, dtype=torch.bool)
    expected[:rows, :columns] = True
    assert torch.equal(inside[1, 0], expected)


def test_without_padding_there_is_no_mask():
    assert batch_of({}).inside(torch.zeros(2, 1, 4, 4), 32) is None


# --- which levels ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "student, teacher", [(TWO_STAGE, ONE_STAGE), (ONE_STAGE, TWO_STAGE)], ids=["4..64", "8..128"]
)
def test_mixed_pyramids_meet_on_their_common_strides(student, teacher):
    student, teacher = pyramid(student), pyramid(teacher, seed=1)
    loss = bound(IdenticalLayer(share="none"), student, teacher)
    assert loss.strides == [8, 16, 32, 64]
    terms = loss(batch_of(student, teacher))
    for stride in loss.strides:  # matched by stride, not by position
        assert terms[f"s{stride}"].item() == pytest.approx(
            mse(student[stride], teacher[stride]), rel=1e-5
        )


def test_shared_target_uses_lower_levels_that_the_student_lacks():
    student, teacher = pyramid(ONE_STAGE), pyramid(TWO_STAGE, seed=1)
    term = bound(IdenticalLayer(strides=[8]), student, teacher)(batch_of(student, teacher))["s8"]
    target = (teacher[8].double() + pooled(teacher[4], 2)) / 2
    assert term.item() == pytest.approx(mse(student[8], target), rel=1e-5)


def test_strides_option():
    student, teacher = pyramid(TWO_STAGE), pyramid(ONE_STAGE)
    assert bound(IdenticalLayer(strides=[32, 8]), student, teacher).strides == [8, 32]
    assert bound(CrossLayer(strides=[64, 4, 16]), student).level_pairs() == [
        (4, 16),
        (4, 64),
        (16, 64),
    ]
    assert bound(CrossLayer(), student, teacher).strides == list(TWO_STAGE)  # reads no teacher


def test_taps():
    assert IdenticalLayer().taps == {"fpn"} and CrossLayer(tap="backbone").taps == {"backbone"}
    assert IdenticalLayer().needs == {"teacher"} and not CrossLayer().needs


FPN = {"fpn": {8: 4, 16: 4}}
BAD_BINDS = {
    "no common stride": (
        IdenticalLayer(),
        FPN,
        {"fpn": {4: 4, 32: 4}},
        "key=IdenticalLayer",
        "in common",
    ),
    "strides not there": (IdenticalLayer(strides=[8, 64]), FPN, FPN, "key.strides=[8, 64]", "[64]"),
    "stride of one only": (
        IdenticalLayer(strides=[16]),
        FPN,
        {"fpn": {8: 4}},
        "key.strides=[16]",
        "usable are [8]",
    ),
    "student lacks tap": (CrossLayer(tap="backbone"), FPN, None, "key.tap=backbone", "student"),
    "teacher lacks tap": (
        IdenticalLayer(tap="backbone"),
        {**FPN, "backbone": {8: 4}},
        FPN,
        "key.tap=backbone",
        "teacher",
    ),
    "one level": (CrossLayer(strides=[8]), FPN, None, "key.strides=[8]", "two strides"),
    "one level there": (CrossLayer(), {"fpn": {32: 4}}, None, "key.strides=[32]", "two strides"),
    "no teacher": (IdenticalLayer(), FPN, None, "key=IdenticalLayer", "model.teacher"),
}


@pytest.mark.parametrize("loss, student, teacher, start, word", BAD_BINDS.values(), ids=BAD_BINDS)
def test_pairs_that_cannot_be_bound(loss, student, teacher, start, word):
    with pytest.raises(ConfigError) as error:
        loss.bind(student, teacher, "key")
    message = str(error.value)
    assert message.startswith(start) and word in message and "\n" not in message


@pytest.mark.parametrize(
    "build, key, choices",
    [
        (lambda: IdenticalLayer(tap="neck"), "tap=neck", ("fpn", "backbone")),
        (lambda: IdenticalLayer(share="some"), "share=some", ("dense", "adjacent", "none")),
        (lambda: CrossLayer(pairs="all"), "pairs=all", ("dense", "adjacent")),
        (
            lambda: CrossLayer(direction="up"),
            "direction=up",
            ("deep_to_shallow", "shallow_to_deep", "mutual"),
        ),
    ],
)
def test_unknown_names(build, key, choices):
    with pytest.raises(ConfigError) as error:
        build()
    assert str(error.value).startswith(f"{key}:")
    assert all(choice in str(error.value) for choice in choices)


class PerChannel(DistillationLoss):
    """A loss that owns a parameter."""

    needs = frozenset()

    def bind(self, student, teacher, key):
        super().bind(student, teacher, key)
        self.scale = torch.nn.Parameter(torch.ones(student["fpn"][8]))

    def forward(self, batch):
        return {"sum": (batch.student["fpn"][8] * self.scale.view(1, -1, 1, 1)).mean()}


def test_an_own_loss_may_create_parameters_when_bound():
    loss = PerChannel()
    loss.bind(FPN, None, "key")
    assert [p.shape for p in loss.parameters()] == [(4,)]
    assert loss(batch_of({8: torch.full((1, 4, 2, 2), 3.0)}))["sum"].item() == 3
