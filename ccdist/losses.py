"""The losses of certified training: pure functions of logit differences and features.

Differences are z[y] - z[j], j != y: `adv_diffs` at an attacked input, `lower_diffs` bounded from below over
the epsilon box. CE0(d) = mean over B of log(1 + sum over J of exp(-d)) is the cross-entropy, since softmax
does not change when z[y] is subtracted from every logit.

Shapes: `B` batch, `J = K - 1` other classes, `D` features.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ccdist.interval import Interval


def _check_alpha(alpha: float, name: str = "alpha") -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"{name} is {alpha}; expected a weight in [0, 1]")


def cross_entropy_of_differences(diffs: Float[Tensor, "B J"]) -> Float[Tensor, ""]:
    """CE0: mean over B of log(1 + sum over J of exp(-diffs)), in nats."""
    return torch.logsumexp(F.pad(-diffs, (1, 0)), dim=1).mean()


def cc_ibp_loss(
    adv_diffs: Float[Tensor, "B J"], lower_diffs: Float[Tensor, "B J"], *, alpha: float
) -> Float[Tensor, ""]:
    """Cross-entropy of logit differences mixed between an attack and interval bounds.

        CE0(alpha * lower_diffs + (1 - alpha) * adv_diffs)

    alpha = 0 is the adversarial loss, alpha = 1 the IBP loss. Where lower_diffs <= adv_diffs it never falls
    as alpha rises.

    Args:
        alpha: weight of the bounds, in [0, 1].

    Returns:
        Nats, mean over the batch.

    Raises:
        ValueError: alpha is outside [0, 1].

    Source: CC-IBP, De Palma et al., ICLR 2024.
    """
    _check_alpha(alpha)
    return cross_entropy_of_differences(alpha * lower_diffs + (1 - alpha) * adv_diffs)


def mtl_ibp_loss(
    adv_diffs: Float[Tensor, "B J"], lower_diffs: Float[Tensor, "B J"], *, alpha: float
) -> Float[Tensor, ""]:
    """Weighted sum of the IBP and the adversarial loss.

        alpha * CE0(lower_diffs) + (1 - alpha) * CE0(adv_diffs)

    Never below `cc_ibp_loss` with the same arguments, since CE0 is convex. Arguments, result and errors as there.

    Source: MTL-IBP, De Palma et al., ICLR 2024.
    """
    _check_alpha(alpha)
    lower = cross_entropy_of_differences(lower_diffs)
    return alpha * lower + (1 - alpha) * cross_entropy_of_differences(adv_diffs)


def exp_ibp_loss(
    adv_diffs: Float[Tensor, "B J"], lower_diffs: Float[Tensor, "B J"], *, alpha: float
) -> Float[Tensor, ""]:
    """Geometric mean of the IBP and the adversarial loss, each a batch mean.

        CE0(lower_diffs)^alpha * CE0(adv_diffs)^(1 - alpha)

    Never above `mtl_ibp_loss`. Its gradient grows without bound as a loss goes to 0.
    Arguments, result and errors as `cc_ibp_loss`.

    Source: Exp-IBP, De Palma et al., ICLR 2024.
    """
    _check_alpha(alpha)
    # A loss of exactly 0 has no finite gradient under a power below 1.
    tiny = torch.finfo(adv_diffs.dtype).tiny
    lower = cross_entropy_of_differences(lower_diffs).clamp(min=tiny)
    adversarial = cross_entropy_of_differences(adv_diffs).clamp(min=tiny)
    return lower**alpha * adversarial ** (1 - alpha)


def distillation_loss(
    student_adv_features: Float[Tensor, "B D"],
    student_feature_box: Interval,
    teacher_features: Float[Tensor, "B D"],
    *,
    alpha: float,
) -> Float[Tensor, ""]:
    """Worst squared distance of the teacher's features to an interval of student features.

        [l, u] = (1 - alpha) * a + alpha * [lower, upper],  a = student_adv_features
        D_alpha = mean over B of sum over D of max((l - t)^2, (u - t)^2) = mean, sum of (|c - t| + r)^2

    The square is convex, so its maximum over an interval is at an end. D_0 is the squared error at the attacked
    input; D_1 bounds the squared error over the whole epsilon box. Where lower <= a <= upper the intervals are
    nested and D never falls as alpha rises.

    Args:
        student_adv_features: features at the attacked input.
        student_feature_box: bounds of the features over the epsilon box.
        teacher_features: t, the frozen teacher's features at the clean input.
        alpha: weight of the bounds, in [0, 1].

    Returns:
        Squared feature units; mean over the batch, sum over features.

    Raises:
        ValueError: alpha is outside [0, 1].

    Source: CC-Dist, De Palma, arXiv 2602.02626.
    """
    _check_alpha(alpha)
    center = torch.lerp(student_adv_features, student_feature_box.center, alpha)
    radius = alpha * student_feature_box.radius
    return ((center - teacher_features).abs() + radius).square().sum(1).mean()


def cc_dist_loss(
    adv_diffs: Float[Tensor, "B J"],
    lower_diffs: Float[Tensor, "B J"],
    student_adv_features: Float[Tensor, "B D"],
    student_feature_box: Interval,
    teacher_features: Float[Tensor, "B D"],
    *,
    alpha: float,
    beta: float,
    alpha_dist: float | None = None,
) -> Float[Tensor, ""]:
    """CC-IBP plus feature distillation from an adversarially trained teacher.

        CE0(alpha * lower_diffs + (1 - alpha) * adv_diffs) + (beta / D) * D_{alpha_dist}

    beta / D makes the second term beta times a mean over features, whatever the width; beta = 0 is CC-IBP.

    Args:
        alpha: weight of the bounds in the classification term, in [0, 1].
        beta: distillation weight, >= 0.
        alpha_dist: weight of the bounds in the distillation term, in [0, 1]; None: alpha. 0 is not None.
        The rest as in `cc_ibp_loss` and `distillation_loss`.

    Returns:
        Mean over the batch.

    Raises:
        ValueError: a weight is outside its range.

    Source: CC-Dist, De Palma, arXiv 2602.02626.
    """
    if not beta >= 0:
        raise ValueError(f"beta is {beta}; expected a distillation weight >= 0")
    classification = cc_ibp_loss(adv_diffs, lower_diffs, alpha=alpha)
    distillation = distillation_loss(
        student_adv_features,
        student_feature_box,
        teacher_features,
        alpha=alpha if alpha_dist is None else alpha_dist,
    )
    return classification + beta / teacher_features.shape[1] * distillation


def ibp_loss(lower_diffs: Float[Tensor, "B J"]) -> Float[Tensor, ""]:
    """Cross-entropy of the lower bounds: CE0(lower_diffs), in nats; mean over the batch.

    Source: Gowal et al., 2018.
    """
    return cross_entropy_of_differences(lower_diffs)


def small_box(attacked: Float[Tensor, "B ..."], attack_box: Interval, *, subbox: float) -> Interval:
    """SABR's box: a small one around the attacked point, moved so that it lies inside the attack's box.

        tau = subbox * (upper - lower) / 2 element-wise,  centre = clamp(attacked, lower + tau, upper - tau)
        [centre - tau, centre + tau]

    subbox = 1 gives the attack's box itself. SABR's loss is `ibp_loss` of the bounds over it.

    Args:
        attacked: points of the attack's box, pixels in [0, 1].
        subbox: SABR's lambda, in (0, 1].

    Raises:
        ValueError: subbox is outside (0, 1].

    Source: SABR, Mueller et al., ICLR 2023; the element-wise radius as in CTBench.
    """
    if not 0 < subbox <= 1:
        raise ValueError(f"subbox is {subbox}; expected SABR's lambda, a share in (0, 1]")
    tau = subbox * attack_box.radius
    center = torch.clamp(attacked, attack_box.lower + tau, attack_box.upper - tau)
    return Interval(
        torch.maximum(center - tau, attack_box.lower),
        torch.minimum(center + tau, attack_box.upper),
    )


def soft_label_divergence(
    student_logits: Float[Tensor, "B K"], teacher_logits: Float[Tensor, "B K"]
) -> Float[Tensor, " B"]:
    """KL(p_T || p_S) of each image, in nats: sum over K of p_T (log p_T - log p_S), softmax at temperature 1.

    Not averaged: an attack wants it for each image. No gradient through the teacher is stopped here.
    """
    log_student, log_teacher = F.log_softmax(student_logits, 1), F.log_softmax(teacher_logits, 1)
    return (log_teacher.exp() * (log_teacher - log_student)).sum(1)


def ad_cert_loss(
    lower_diffs: Float[Tensor, "B J"] | None, divergence: Float[Tensor, " B"] | None, *, alpha: float
) -> Float[Tensor, ""]:
    """IBP and distillation of the teacher's probabilities.

        alpha * CE0(lower_diffs) + (1 - alpha) * mean(divergence)

    divergence is `soft_label_divergence` where the variant reads it: AD-CERT at the attacked point; "clean" at the
    image; RSLAD 1/6 at the image and 5/6 at the attacked point. No hard label but in the first term.

    Args:
        lower_diffs: may be None for alpha = 0.
        divergence: may be None for alpha = 1.
        alpha: weight of the bounds, in [0, 1].

    Returns:
        Nats, mean over the batch.

    Raises:
        ValueError: alpha is outside [0, 1], or a term with weight is None.

    Source: AD-CERT, arXiv 2606.31653.
    """
    _check_alpha(alpha)
    if (lower_diffs is None and alpha > 0) or (divergence is None and alpha < 1):
        raise ValueError(f"alpha {alpha} needs lower_diffs (unless 0) and a divergence (unless 1)")
    total = torch.zeros(())
    if lower_diffs is not None and alpha > 0:
        total = alpha * cross_entropy_of_differences(lower_diffs)
    if divergence is not None and alpha < 1:
        total = total + (1 - alpha) * divergence.mean()
    return total
