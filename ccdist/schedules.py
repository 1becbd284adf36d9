"""Epsilon and learning rate as functions of the step."""

import math
from collections.abc import Sequence


def smoothed_epsilon(step: int, *, start: int, length: int, epsilon_max: float) -> float:
    """The ramp of epsilon: zero, then quartic for a quarter of the ramp, then linear, then constant.

        S = start, E = start + length, M = S + int(length / 4)
        a = epsilon_max / ((E - M) * 4 * (M - S)^3 + (M - S)^4)
        k <= S: 0;   S < k < M: a (k - S)^4;   M <= k < E: linear from a (M - S)^4 to epsilon_max;   then epsilon_max

    The slope is continuous at M, where epsilon is epsilon_max / 13 when length is a multiple of 4. For length
    < 4 the ramp is linear; for length = 0 epsilon is epsilon_max right after S.

    Args:
        step: 0-based optimiser step k.
        start, length: in steps, >= 0.
        epsilon_max: epsilon at the end, pixels in [0, 1].

    Returns:
        Epsilon at this step, in pixel units.

    Raises:
        ValueError: start or length is negative.

    Source: auto_LiRPA's smoothed schedule.
    """
    if start < 0 or length < 0:
        raise ValueError(f"the ramp has start {start} and length {length}; expected both >= 0")
    if step <= start:
        return 0.0
    end, middle = start + length, start + length // 4
    if step >= end:
        return epsilon_max
    quartic = middle - start
    scale = epsilon_max / ((end - middle) * 4 * quartic**3 + quartic**4) if quartic else 0.0
    if step < middle:
        return scale * (step - start) ** 4
    at_middle = scale * quartic**4
    return min(epsilon_max, at_middle + (epsilon_max - at_middle) * (step - middle) / (end - middle))


def multi_step_learning_rate(epoch: int, *, initial: float, decay: float, drops: Sequence[int]) -> float:
    """initial * decay^(number of drops at or before this 0-based epoch)."""
    return initial * decay ** sum(epoch >= drop for drop in drops)


def cyclic_learning_rate(step: int, *, num_steps: int, peak: float, floor: float = 0.0) -> float:
    """A triangle: up from floor to peak over the first half of num_steps, down again over the second.

    Source: the N-FGSM recipe.
    """
    half = num_steps / 2
    return floor + (peak - floor) * max(0.0, 1 - abs(step - half) / half)


def cosine_learning_rate(step: int, *, num_steps: int, initial: float, final: float = 0.0) -> float:
    """Half a cosine: final + (initial - final) * (1 + cos(pi * step / num_steps)) / 2.

    Source: Loshchilov and Hutter, "SGDR", ICLR 2017, without restarts.
    """
    return final + (initial - final) * (1 + math.cos(math.pi * step / num_steps)) / 2
