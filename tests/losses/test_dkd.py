"""DKD for softmax heads and its binary form for sigmoid heads."""

import math

import numpy as np
import pytest
import torch
from losses.harness import batch, bound, maps, same, sigmoid

from sharedkd.losses.base import Regions
from sharedkd.losses.dkd import DKD, DenseDKD, bernoulli_kl, decoupled_kl

FPN = {"fpn": maps((8,), 2)}  # what DKD never looks at


def regions(rows=6, columns=5, seed=0, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    s, t = torch.randn(2, rows, columns, generator=generator, dtype=torch.float64) * scale
    labels = torch.randint(columns, (rows,), generator=generator)
    return Regions(labels, s.to(dtype), t.to(dtype))


def dkd(given, alpha=1.0, beta=1.0, temperature=1.0):
    return bound(DKD(alpha, beta, temperature), FPN, FPN)(batch(FPN, FPN, regions=given))


def softmax(z):
    top = max(z)
    e = [math.exp(x - top) for x in z]
    return [x / math.fsum(e) for x in e]


def kl(p, q):
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q) if a > 0)


def dkd_by_hand(given, alpha, beta, temperature):
    """From probabilities."""
    target, nontarget, rows = [], [], given.labels.tolist()
    for i, c in enumerate(rows):
        zs = [x / temperature for x in given.student[i].tolist()]
        zt = [x / temperature for x in given.teacher[i].tolist()]
        ps, pt = softmax(zs)[c], softmax(zt)[c]
        target.append(kl([pt, 1 - pt], [ps, 1 - ps]))
        nontarget.append(kl(softmax(zt[:c] + zt[c + 1 :]), softmax(zs[:c] + zs[c + 1 :])))
    scale = temperature**2 / len(rows)
    return {
        "target": alpha * scale * math.fsum(target),
        "nontarget": beta * scale * math.fsum(nontarget),
    }


# --- two-stage: softmax ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows, columns, alpha, beta, temperature",
    [(6, 5, 1.0, 0.25, 1.0), (1, 2, 0.5, 3.0, 4.0), (9, 3, 0, 1, 2)],
)
def test_dkd_value(rows, columns, alpha, beta, temperature):
    given = regions(rows, columns, seed=rows)
    expected = dkd_by_hand(given, alpha, beta, temperature)
    same(dkd(given, alpha, beta, temperature), expected)


def test_dkd_parts_add_up_to_the_kl_divergence():
    """KL = TCKD + (1 - p_t^T) NCKD (equation 7 of the paper)."""
    given = regions(20, 7)
    target, nontarget = decoupled_kl(given.student, given.teacher, given.labels)
    for i, label in enumerate(given.labels.tolist()):
        ps, pt = softmax(given.student[i].tolist()), softmax(given.teacher[i].tolist())
        whole = target[i] + (1 - pt[label]) * nontarget[i]
        assert whole.item() == pytest.approx(kl(pt, ps), rel=1e-9)


def test_dkd_of_confident_logits():
    """Logits whose probabilities round to 0 and 1: the values are still the exact ones."""
    s = torch.tensor([[200.0, 0.0, 1.0], [0.0, 300.0, 2.0]])
    t = torch.tensor([[0.0, 200.0, 3.0], [900.0, 0.0, 2.0]])
    given = Regions(torch.tensor([1, 0]), s.requires_grad_(), t)
    terms = dkd(given)
    # row 0: p_t 1 for the teacher, exp(-200) for the student; row 1: 1 and exp(-300)
    assert terms["target"].item() == pytest.approx((200 + 300) / 2, rel=1e-6)
    # row 0: of classes 0 and 2 the teacher says sigmoid(3) for 2, the student exp(-199); row 1: of
    # classes 1 and 2 the teacher says sigmoid(2) for 2, the student exp(-298)
    p0, p2, q1, q2 = softmax([0.0, 3.0]) + softmax([0.0, 2.0])
    entropy = sum(p * math.log(p) for p in (p0, p2, q1, q2))
    assert terms["nontarget"].item() == pytest.approx((p2 * 199 + q2 * 298 + entropy) / 2, rel=1e-6)
    sum(terms.values()).backward()
    assert torch.isfinite(s.grad).all()


def test_dkd_gradients():
    given = regions(4, 4)

    def value(s, which):
        return dkd(Regions(given.labels, s, given.teacher), 1.0, 0.25, 2.0)[which]

    for which in ("target", "nontarget"):
        s = given.student.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda s: value(s, which), (s,))
    s, t = given.student.clone().requires_grad_(), given.teacher.clone().requires_grad_()
    sum(dkd(Regions(given.labels, s, t)).values()).backward()
    assert s.grad.any() and t.grad is None


# --- one-stage: sigmoids ---------------------------------------------------------------------


def anchors(strides=(8, 16), a=2, k=3, seed=0, padded=(16, 24), images=2, scale=2.0, **more):
    """Student's and teacher's logits and labels with all kinds of anchors."""
    s = maps(strides, a * k, padded, images, seed, **more)
    t = maps(strides, a * k, padded, images, seed + 50, **more)
    generator = torch.Generator().manual_seed(seed + 7)
    labels = {
        stride: torch.randint(-1, k + 1, (images, a, *x.shape[-2:]), generator=generator)
        for stride, x in s.items()
    }
    s, t = ({stride: scale * x for stride, x in levels.items()} for levels in (s, t))
    return {"logits": s}, {"logits": t}, labels


def dense(student, teacher, labels, alpha=1.0, beta=1.0, **options):
    loss = bound(DenseDKD(alpha, beta, **options), student, teacher)
    return loss(batch(student, teacher, labels=labels))


def dense_by_hand(student, teacher, labels, alpha, beta, gamma):
    k = next(student["logits"][s].shape[1] // labels[s].shape[1] for s in labels)
    foreground = sum(((x >= 0) & (x < k)).sum().item() for x in labels.values())
    terms = {}
    for stride, each in labels.items():
        zs, zt = (
            m["logits"][stride].detach().unflatten(1, (-1, k)).numpy() for m in (student, teacher)
        )
        apart = sum(
            sigmoid(sign * zt) * np.log(sigmoid(sign * zt) / sigmoid(sign * zs)) for sign in (1, -1)
        )
        label = each[:, :, None].numpy()
        own = label == np.arange(k).reshape(k, 1, 1)
        focal = np.where(label == k, abs(sigmoid(zt) - sigmoid(zs)) ** gamma, 1)
        target = apart[own].sum()
        nontarget = (focal * apart)[(label >= 0) & ~own].sum()
        terms[f"s{stride}_target"] = alpha * target / max(foreground, 1)
        terms[f"s{stride}_nontarget"] = beta * nontarget / max(foreground, 1)
    return terms


def check_dense(student, teacher, labels, alpha=1.0, beta=0.25, gamma=2.0):
    terms = dense(student, teacher, labels, alpha, beta, gamma=gamma)
    same(terms, dense_by_hand(student, teacher, labels, alpha, beta, gamma))
    return terms


@pytest.mark.parametrize("alpha, beta, gamma", [(1.0, 0.25, 2.0), (3.0, 0.5, 0), (0.7, 1.0, 1)])
def test_dense_value(alpha, beta, gamma):
    check_dense(*anchors(), alpha, beta, gamma)


@pytest.mark.parametrize(
    "options",
    [
        dict(a=1, k=1),
        dict(a=1, k=4, images=1, padded=(8, 40)),
        dict(a=3, k=2, strides=(8, 128), padded=(16, 8)),  # one pixel
        dict(scale=100.0),  # p of 0 and 1
    ],
)
def test_dense_value_of_odd_sizes_and_maps(options):
    check_dense(*anchors(**options))


@pytest.mark.parametrize("label", [-1, 3])
def test_dense_value_without_foreground(label):
    """What is ignored has no loss; the sum over background is divided by 1."""
    student, teacher, labels = anchors()
    check_dense(student, teacher, {s: torch.full_like(x, label) for s, x in labels.items()})


def test_dense_foreground_counts_on_all_levels():
    student, teacher, labels = anchors()
    every = dense(student, teacher, labels)
    one = dense(student, teacher, labels, strides=[16])
    assert list(one) == ["s16_target", "s16_nontarget"]
    assert all(torch.equal(one[name], every[name]) for name in one)


def test_bernoulli_kl_of_confident_logits():
    s = torch.tensor([-200.0, 200.0, 0.0], requires_grad=True)
    t = torch.tensor([200.0, -150.0, 1e4])
    value = bernoulli_kl(s, t)
    assert value.tolist() == pytest.approx([200, 200, math.log(2)])
    value.sum().backward()
    assert s.grad.tolist() == pytest.approx([-1, 1, -0.5])
