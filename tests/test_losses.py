"""The losses: hand numbers, both ends of alpha, the orderings, and the two forms of the distillation term."""

import itertools
import math

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import tensors
from torch import Tensor

from ccdist.bounds import logit_differences
from ccdist.interval import Interval
from ccdist.losses import (
    ad_cert_loss,
    cc_dist_loss,
    cc_ibp_loss,
    cross_entropy_of_differences,
    distillation_loss,
    exp_ibp_loss,
    ibp_loss,
    mtl_ibp_loss,
    small_box,
    soft_label_divergence,
)

# float64 sums of some ten terms of order 1 to 100, reached along two routes.
ROUNDING = 1e-12
B, J, D = 4, 3, 6
alphas = st.floats(0, 1)


def ce0(diffs: Tensor) -> float:
    """CE0 from its definition."""
    rows = [math.log1p(sum(math.exp(-d) for d in row)) for row in diffs.tolist()]
    return sum(rows) / len(rows)


def value(loss: Tensor) -> float:
    assert loss.shape == ()
    return float(loss)


def not_above(small: float, large: float) -> bool:
    return small <= large + ROUNDING * (1 + abs(large))


@given(logits=tensors(5, 4), seed=st.integers(0, 100))
def test_ce0_of_differences_is_the_cross_entropy(logits: Tensor, seed: int) -> None:
    labels = torch.randint(4, (5,), generator=torch.Generator().manual_seed(seed))
    loss = value(cross_entropy_of_differences(logit_differences(logits, labels)))
    assert loss == pytest.approx(oracles.cross_entropy(logits, labels), rel=ROUNDING)


@given(diffs=tensors(B, J))
def test_ce0_is_its_definition(diffs: Tensor) -> None:
    assert value(cross_entropy_of_differences(diffs)) == pytest.approx(ce0(diffs), rel=ROUNDING)


def test_ce0_of_large_differences_neither_overflows_nor_vanishes() -> None:
    diffs = torch.tensor([[-1e4, 0.0]], dtype=torch.float64)
    assert value(cross_entropy_of_differences(diffs)) == 1e4
    assert value(cross_entropy_of_differences(-diffs * 10)) == pytest.approx(math.log(2))


def test_hand_numbers() -> None:
    # two classes, one image: adversarial difference log 3 -> loss log(1 + 1/3) = log(4/3);
    # lower difference -log 3 -> loss log(1 + 3) = log 4; alpha = 1/2 mixes them to 0 -> log 2
    adv, lower = torch.tensor([[math.log(3)]], dtype=torch.float64), torch.tensor([[-math.log(3)]], dtype=torch.float64)
    assert value(cc_ibp_loss(adv, lower, alpha=0.5)) == pytest.approx(math.log(2))
    assert value(mtl_ibp_loss(adv, lower, alpha=0.5)) == pytest.approx((math.log(4) + math.log(4 / 3)) / 2)
    assert value(exp_ibp_loss(adv, lower, alpha=0.5)) == pytest.approx(math.sqrt(math.log(4) * math.log(4 / 3)))
    # features a = 1, 2 in [0, 2], [2, 4]; teacher t = 0, 3; alpha = 1/2: intervals [0.5, 1.5], [2, 3]
    #   worst squares: 1.5^2 = 2.25 and 1 -> D = 3.25, and beta / d = 4 / 2
    features, teacher = torch.tensor([[1.0, 2.0]]).double(), torch.tensor([[0.0, 3.0]]).double()
    box = Interval(torch.tensor([[0.0, 2.0]]).double(), torch.tensor([[2.0, 4.0]]).double())
    assert value(distillation_loss(features, box, teacher, alpha=0.5)) == pytest.approx(3.25)
    loss = cc_dist_loss(adv, lower, features, box, teacher, alpha=0.5, beta=4.0)
    assert value(loss) == pytest.approx(math.log(2) + 2 * 3.25)
    # alpha_dist = 0: squared error at the attacked point, 1 + 1; alpha_dist = 1: [0, 2], [2, 4] -> 4 + 1
    zero = cc_dist_loss(adv, lower, features, box, teacher, alpha=0.5, beta=4.0, alpha_dist=0.0)
    one = cc_dist_loss(adv, lower, features, box, teacher, alpha=0.5, beta=4.0, alpha_dist=1.0)
    assert value(zero) == pytest.approx(math.log(2) + 2 * 2)
    assert value(one) == pytest.approx(math.log(2) + 2 * 5)


@pytest.mark.parametrize("loss", [cc_ibp_loss, mtl_ibp_loss, exp_ibp_loss])
@given(adv=tensors(B, J), lower=tensors(B, J))
def test_the_ends_of_alpha(loss: object, adv: Tensor, lower: Tensor) -> None:
    assert callable(loss)
    assert value(loss(adv, lower, alpha=0.0)) == pytest.approx(ce0(adv), rel=ROUNDING)
    assert value(loss(adv, lower, alpha=1.0)) == pytest.approx(ce0(lower), rel=ROUNDING)


@given(adv=tensors(B, J), lower=tensors(B, J), alpha=alphas)
def test_cc_and_exp_are_never_above_mtl(adv: Tensor, lower: Tensor, alpha: float) -> None:
    """For any differences: CE0 is convex, and a geometric mean is at most the arithmetic one."""
    mtl = value(mtl_ibp_loss(adv, lower, alpha=alpha))
    assert not_above(value(cc_ibp_loss(adv, lower, alpha=alpha)), mtl)
    assert not_above(value(exp_ibp_loss(adv, lower, alpha=alpha)), mtl)


@given(adv=tensors(B, J), gap=tensors(B, J), alpha=alphas, other=alphas)
def test_the_order_where_the_bounds_are_below_the_attack(adv: Tensor, gap: Tensor, alpha: float, other: float) -> None:
    lower = adv - gap.abs()
    small, large = sorted((alpha, other))
    adversarial, ibp = ce0(adv), ce0(lower)
    for loss in (cc_ibp_loss, mtl_ibp_loss, exp_ibp_loss):
        below, above = value(loss(adv, lower, alpha=small)), value(loss(adv, lower, alpha=large))
        assert not_above(adversarial, below)
        assert not_above(below, above)
        assert not_above(above, ibp)


@given(adv=tensors(B, D), ends=tensors(2, B, D), teacher=tensors(B, D), alpha=alphas)
def test_the_two_forms_of_the_distillation_term(adv: Tensor, ends: Tensor, teacher: Tensor, alpha: float) -> None:
    """Also for attacked features outside the box, which a larger attack radius can give."""
    lower, upper = ends.amin(0), ends.amax(0)
    expected = oracles.distillation(adv, lower, upper, teacher, alpha)
    actual = value(distillation_loss(adv, Interval(lower, upper), teacher, alpha=alpha))
    assert actual == pytest.approx(expected, rel=ROUNDING)


@given(adv=tensors(B, D), below=tensors(B, D), above=tensors(B, D), teacher=tensors(B, D), alpha=alphas, other=alphas)
def test_distillation_never_falls_with_alpha(
    adv: Tensor, below: Tensor, above: Tensor, teacher: Tensor, alpha: float, other: float
) -> None:
    box = Interval(adv - below.abs(), adv + above.abs())
    small, large = sorted((alpha, other))
    terms = [value(distillation_loss(adv, box, teacher, alpha=a)) for a in (0.0, small, large, 1.0)]
    assert terms[0] == pytest.approx(float((adv - teacher).square().sum(1).mean()), rel=ROUNDING)
    assert all(not_above(a, b) for a, b in itertools.pairwise(terms))


@given(adv=tensors(B, D), ends=tensors(2, B, D), teacher=tensors(B, D), seed=st.integers(0, 1000))
def test_d1_bounds_the_squared_error_of_every_point_of_the_box(
    adv: Tensor, ends: Tensor, teacher: Tensor, seed: int
) -> None:
    box = Interval(ends.amin(0), ends.amax(0))
    bound = value(distillation_loss(adv, box, teacher, alpha=1.0))
    for features in oracles.sample_box(box, 20, torch.Generator().manual_seed(seed)):
        assert not_above(float((features - teacher).square().sum(1).mean()), bound)


DIST = {"adv": tensors(B, J), "lower": tensors(B, J), "features": tensors(B, D), "ends": tensors(2, B, D)}


@given(**DIST, teacher=tensors(B, D), alpha=alphas, beta=st.floats(0, 50), alpha_dist=st.none() | alphas)
def test_cc_dist_is_cc_ibp_plus_the_distillation_term(
    adv: Tensor,
    lower: Tensor,
    features: Tensor,
    ends: Tensor,
    teacher: Tensor,
    alpha: float,
    beta: float,
    alpha_dist: float | None,
) -> None:
    box = Interval(ends.amin(0), ends.amax(0))
    loss = cc_dist_loss(adv, lower, features, box, teacher, alpha=alpha, beta=beta, alpha_dist=alpha_dist)
    used = alpha if alpha_dist is None else alpha_dist
    term = oracles.distillation(features, box.lower, box.upper, teacher, used)
    expected = ce0(alpha * lower + (1 - alpha) * adv) + beta / D * term
    assert value(loss) == pytest.approx(expected, rel=ROUNDING)


@given(**DIST, teacher=tensors(B, D), alpha=alphas)
def test_without_beta_the_teacher_is_gone(
    adv: Tensor, lower: Tensor, features: Tensor, ends: Tensor, teacher: Tensor, alpha: float
) -> None:
    box = Interval(ends.amin(0), ends.amax(0))
    loss = cc_dist_loss(adv, lower, features, box, teacher, alpha=alpha, beta=0.0)
    assert torch.equal(loss, cc_ibp_loss(adv, lower, alpha=alpha))


def test_alpha_dist_0_is_not_none() -> None:
    zeros, ones = torch.zeros(1, 1), torch.ones(1, 1)
    box = Interval(-ones, ones)
    none = cc_dist_loss(zeros, zeros, zeros, box, zeros, alpha=1.0, beta=1.0)
    zero = cc_dist_loss(zeros, zeros, zeros, box, zeros, alpha=1.0, beta=1.0, alpha_dist=0.0)
    assert value(none) == pytest.approx(math.log(2) + 1)
    assert value(zero) == pytest.approx(math.log(2))


@given(adv=tensors(B, D), ends=tensors(2, B, D), teacher=tensors(B, D))
def test_the_distillation_term_does_not_depend_on_copies_of_a_feature(
    adv: Tensor, ends: Tensor, teacher: Tensor
) -> None:
    """beta / D makes the term a mean over features: writing each of them twice changes nothing."""
    diffs = torch.zeros(B, J, dtype=torch.float64)

    def loss(copies: int) -> float:
        box = Interval(ends.amin(0).repeat(1, copies), ends.amax(0).repeat(1, copies))
        features, target = adv.repeat(1, copies), teacher.repeat(1, copies)
        return value(cc_dist_loss(diffs, diffs, features, box, target, alpha=0.3, beta=5.0))

    assert loss(2) == pytest.approx(loss(1), rel=ROUNDING)


@given(**DIST, teacher=tensors(B, D), alpha=st.floats(0.01, 0.99))
def test_gradients_are_right(
    adv: Tensor, lower: Tensor, features: Tensor, ends: Tensor, teacher: Tensor, alpha: float
) -> None:
    inputs = [x.clone().requires_grad_() for x in (adv, lower, features, ends.amin(0), ends.amax(0))]

    def loss(adv: Tensor, lower: Tensor, features: Tensor, low: Tensor, up: Tensor) -> Tensor:
        return cc_dist_loss(adv, lower, features, Interval(low, up), teacher, alpha=alpha, beta=2.0)

    center = alpha * (ends.amin(0) + ends.amax(0)) / 2 + (1 - alpha) * features
    if (center - teacher).abs().min() > 1e-3:  # numbers next to the kink have no numeric gradient
        assert torch.autograd.gradcheck(loss, inputs)
    for before, after in zip((adv, lower, features), inputs, strict=False):
        assert torch.equal(before, after.detach())


@pytest.mark.parametrize("alpha", [-0.01, 1.01, float("nan")])
def test_weights_outside_their_range_are_refused(alpha: float) -> None:
    x = torch.zeros(1, 1)
    for loss in (cc_ibp_loss, mtl_ibp_loss, exp_ibp_loss):
        with pytest.raises(ValueError, match=r"alpha is .*\[0, 1\]"):
            loss(x, x, alpha=alpha)
    with pytest.raises(ValueError, match="alpha is"):
        distillation_loss(x, Interval(x, x), x, alpha=alpha)
    with pytest.raises(ValueError, match="alpha is"):
        cc_dist_loss(x, x, x, Interval(x, x), x, alpha=0.5, beta=1.0, alpha_dist=alpha)


@pytest.mark.parametrize("beta", [-1.0, float("nan")])
def test_a_negative_beta_is_refused(beta: float) -> None:
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="beta is"):
        cc_dist_loss(x, x, x, Interval(x, x), x, alpha=0.5, beta=beta)


# -- IBP and SABR


@given(lower=tensors(B, J))
def test_ibp_is_the_cross_entropy_of_the_bounds(lower: Tensor) -> None:
    assert value(ibp_loss(lower)) == pytest.approx(ce0(lower), rel=ROUNDING)


@given(adv=tensors(B, J), gap=tensors(B, J), alpha=alphas)
def test_the_published_order_of_the_losses(adv: Tensor, gap: Tensor, alpha: float) -> None:
    """L_adv <= L_CC, L_Exp <= L_MTL <= L_IBP."""
    lower = adv - gap.abs()
    mtl = value(mtl_ibp_loss(adv, lower, alpha=alpha))
    for between in (cc_ibp_loss, exp_ibp_loss):
        loss = value(between(adv, lower, alpha=alpha))
        assert not_above(ce0(adv), loss)
        assert not_above(loss, mtl)
    assert not_above(mtl, value(ibp_loss(lower)))


@given(ends=tensors(2, B, D), seed=st.integers(0, 1000), subbox=st.floats(0, 1, exclude_min=True))
def test_the_small_box_lies_in_the_attack_s_box_around_the_point(ends: Tensor, seed: int, subbox: float) -> None:
    box = Interval(ends.amin(0), ends.amax(0))
    for attacked in oracles.sample_box(box, 6, torch.Generator().manual_seed(seed)):
        small = small_box(attacked, box, subbox=subbox)
        assert (small.lower >= box.lower).all()
        assert (small.upper <= box.upper).all()
        tolerance = ROUNDING * (1 + box.radius)
        assert (small.lower <= attacked + tolerance).all()
        assert (attacked <= small.upper + tolerance).all()
        assert ((small.radius - subbox * box.radius).abs() <= tolerance).all()
        # as near to the point as the box allows: moved only where it would stand out
        free = (attacked - subbox * box.radius >= box.lower) & (attacked + subbox * box.radius <= box.upper)
        assert ((small.center - attacked).abs() <= tolerance)[free].all()


def test_the_small_box_by_hand() -> None:
    # box [0, 1] and [0, 0.4], lambda 1/2: tau 0.25 and 0.1; the points 0.9 and 0.2 -> centres 0.75 and 0.2
    box = Interval(torch.tensor([[0.0, 0.0]]).double(), torch.tensor([[1.0, 0.4]]).double())
    small = small_box(torch.tensor([[0.9, 0.2]]).double(), box, subbox=0.5)
    assert small.lower.flatten().tolist() == pytest.approx([0.5, 0.1])
    assert small.upper.flatten().tolist() == pytest.approx([1.0, 0.3])
    whole = small_box(torch.tensor([[0.9, 0.2]]).double(), box, subbox=1.0)
    assert torch.allclose(whole.lower, box.lower)
    assert torch.allclose(whole.upper, box.upper)


@pytest.mark.parametrize("subbox", [0.0, -0.1, 1.01, float("nan")])
def test_a_subbox_outside_its_range_is_refused(subbox: float) -> None:
    box = Interval(torch.zeros(1, 2), torch.ones(1, 2))
    with pytest.raises(ValueError, match="subbox is"):
        small_box(torch.zeros(1, 2), box, subbox=subbox)


# -- AD-CERT


def kl(teacher: Tensor, student: Tensor) -> list[float]:
    """sum of p_T log(p_T / p_S) for each image, in Python floats."""
    found = []
    for rows in zip(teacher.tolist(), student.tolist(), strict=True):
        log_t, log_s = ([z - max(row) for z in row] for row in rows)
        log_t, log_s = ([z - math.log(sum(map(math.exp, row))) for z in row] for row in (log_t, log_s))
        found.append(sum(math.exp(t) * (t - s) for t, s in zip(log_t, log_s, strict=True)))
    return found


@given(student=tensors(B, 4), teacher=tensors(B, 4))
def test_the_divergence_is_its_definition(student: Tensor, teacher: Tensor) -> None:
    divergence = soft_label_divergence(student, teacher)
    assert divergence.shape == (B,)
    assert divergence.tolist() == pytest.approx(kl(teacher, student), rel=ROUNDING, abs=ROUNDING)


def test_the_divergence_by_hand_and_its_direction() -> None:
    # p_T = 1/2, 1/2 and p_S = 3/4, 1/4: 1/2 log(2/3) + 1/2 log 2; the other way 3/4 log(3/2) + 1/4 log(1/2)
    even, odd = torch.zeros(1, 2).double(), torch.tensor([[math.log(3), 0.0]]).double()
    assert soft_label_divergence(odd, even).item() == pytest.approx(0.5 * math.log(4 / 3))
    assert soft_label_divergence(even, odd).item() == pytest.approx(0.75 * math.log(1.5) - 0.25 * math.log(2))


@given(student=tensors(B, 4), teacher=tensors(B, 4), shift=st.floats(-50, 50))
def test_the_divergence_is_0_for_equal_probabilities_only(student: Tensor, teacher: Tensor, shift: float) -> None:
    different = (student != teacher).any(1)  # the same seed may have been drawn for both
    assert (soft_label_divergence(student, teacher)[different] > 0).all()
    # the same probabilities: logits that differ by a constant; a float64 sum of four terms
    assert (soft_label_divergence(student + shift, student).abs() <= ROUNDING).all()


@given(lower=tensors(B, J), divergence=tensors(B), alpha=alphas)
def test_ad_cert_is_its_formula(lower: Tensor, divergence: Tensor, alpha: float) -> None:
    loss = value(ad_cert_loss(lower, divergence, alpha=alpha))
    assert loss == pytest.approx(
        alpha * ce0(lower) + (1 - alpha) * float(divergence.mean()), rel=ROUNDING, abs=ROUNDING
    )


@given(lower=tensors(B, J), divergence=tensors(B))
def test_the_ends_of_ad_cert(lower: Tensor, divergence: Tensor) -> None:
    """A term without weight may be left out, and is not read where it is given."""
    nothing = torch.full((B,), torch.nan, dtype=torch.float64)
    assert value(ad_cert_loss(lower, None, alpha=1.0)) == value(ibp_loss(lower))
    assert value(ad_cert_loss(lower, nothing, alpha=1.0)) == value(ibp_loss(lower))
    assert value(ad_cert_loss(None, divergence, alpha=0.0)) == float(divergence.mean())
    assert value(ad_cert_loss(lower * torch.nan, divergence, alpha=0.0)) == float(divergence.mean())


def test_ad_cert_refuses_a_missing_term_and_an_alpha_outside_its_range() -> None:
    lower, divergence = torch.zeros(B, J), torch.zeros(B)
    for terms, alpha in (((None, divergence), 0.5), ((lower, None), 0.5), ((None, None), 0.0), ((None, None), 1.0)):
        with pytest.raises(ValueError, match=f"alpha {alpha} needs"):
            ad_cert_loss(*terms, alpha=alpha)
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="alpha is"):
            ad_cert_loss(lower, divergence, alpha=alpha)
