"""The written VNN-LIB, read back by an independent parser: box, property, and what satisfies it."""

import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vnnlib_reader import parse

from ccdist.bounds import logit_differences
from ccdist.networks import build_network
from ccdist.vnnlib import PLACES, exact_pixels, robustness_property, written_bounds

EPSILON = Fraction(2, 255)


def test_the_text_of_a_tiny_case() -> None:
    image = torch.tensor([[[0.0, 1.0]]])
    text = robustness_property(image, 1, epsilon=Fraction(1, 10), num_classes=3, title="first\nsecond")
    assert text.splitlines() == [
        "; first",
        "; second",
        "(declare-const X_0 Real)",
        "(declare-const X_1 Real)",
        "(declare-const Y_0 Real)",
        "(declare-const Y_1 Real)",
        "(declare-const Y_2 Real)",
        "(assert (>= X_0 0.0))",
        "(assert (<= X_0 0.1))",
        "(assert (>= X_1 0.9))",
        "(assert (<= X_1 1.0))",
        "(assert (or (and (>= Y_0 Y_1)) (and (>= Y_2 Y_1))))",
    ]


def test_every_stored_pixel_is_exact() -> None:
    stored = torch.arange(256, dtype=torch.uint8)
    assert exact_pixels((stored.float() / 255).view(1, 16, 16)) == [Fraction(k, 255) for k in range(256)]


def test_any_other_pixel_stands_for_itself() -> None:
    assert exact_pixels(torch.tensor([[[0.3, 0.1]]])) == [Fraction(float(np.float32(v))) for v in (0.3, 0.1)]


@given(
    pixel=st.integers(0, 255).map(lambda k: Fraction(k, 255)),
    epsilon=st.fractions(Fraction(1, 10**9), Fraction(1, 2)),
)
def test_the_written_box_contains_the_exact_one_and_hardly_more(pixel: Fraction, epsilon: Fraction) -> None:
    lower, upper = (Fraction(end) for end in written_bounds(pixel, epsilon))
    unit = Fraction(1, 10**PLACES)
    assert 0 <= max(pixel - epsilon, 0) - lower < unit
    assert 0 <= upper - min(pixel + epsilon, 1) < unit
    assert 0 <= lower <= upper <= 1


def test_box_and_property_are_read_back() -> None:
    stored = torch.randint(0, 256, (2, 3, 4), generator=torch.Generator().manual_seed(0))
    image = stored.float() / 255
    found = parse(robustness_property(image, 4, epsilon=EPSILON, num_classes=11, title="x"))
    assert found.inputs == [f"X_{index}" for index in range(24)]
    assert found.outputs == [f"Y_{index}" for index in range(11)]
    for name, k in zip(found.inputs, stored.flatten().tolist(), strict=True):  # row-major order of [C, H, W]
        assert math.isclose(found.lower[name], max(k - 2, 0) / 255)
        assert math.isclose(found.upper[name], min(k + 2, 255) / 255)
    assert found.outside == ["or", *(["and", [">=", f"Y_{j}", "Y_4"]] for j in range(11) if j != 4)]


def test_a_point_satisfies_the_property_when_it_is_misclassified() -> None:
    generator = torch.Generator().manual_seed(1)
    network = build_network("mlp", input_shape=(1, 3, 3), num_classes=4, width=8, initialization="default", seed=4)
    image = torch.randint(0, 256, (1, 3, 3), generator=generator).float() / 255
    epsilon = Fraction(1, 2)
    label = int(network(image[None]).argmax())
    found = parse(robustness_property(image, label, epsilon=epsilon, num_classes=4, title="x"))
    # Half of them inside by more than float32 rounds away, the others mostly outside.
    moves = (torch.rand((300, 1, 3, 3), generator=generator) * 2 - 1) * 0.499
    points = (image + moves).clamp(0, 1)
    points[150:] += 0.1
    inside = ((points - image).abs().amax((1, 2, 3)) <= 0.4999) & (points.amax((1, 2, 3)) <= 1)
    with torch.no_grad():
        logits = network(points)
    wrong = logit_differences(logits, torch.full((300,), label)).amin(1) <= 0
    expected = (inside & wrong).tolist()
    got = [
        found.holds([Fraction(value) for value in point.flatten().tolist()], row)
        for point, row in zip(points, logits.tolist(), strict=True)
    ]
    assert got == expected
    assert 0 < sum(expected) < int(inside.sum())  # both happen, or the test shows nothing


def test_a_tie_is_a_counter_example() -> None:
    found = parse(robustness_property(torch.zeros(1, 1, 1), 0, epsilon=EPSILON, num_classes=3, title="x"))
    assert found.holds([Fraction(0)], [1.0, 0.0, 1.0])
    assert not found.holds([Fraction(0)], [1.0, 0.0, 0.5])
    assert not found.holds([Fraction(1)], [1.0, 2.0, 0.5])


@pytest.mark.parametrize(
    ("image", "label", "num_classes", "expected"),
    [
        (torch.zeros(1, 1, 1), 3, 3, "label 3 of 3 classes"),
        (torch.zeros(1, 1, 1), -1, 3, "label -1 of 3 classes"),
        (torch.zeros(1, 1, 1), 0, 1, "label 0 of 1 classes"),
        (torch.full((1, 1, 1), 1.5), 0, 3, "outside [0, 1]"),
        (torch.full((1, 1, 1), math.nan), 0, 3, "outside [0, 1]"),
    ],
)
def test_bad_input_is_refused(image: torch.Tensor, label: int, num_classes: int, expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)):
        robustness_property(image, label, epsilon=EPSILON, num_classes=num_classes, title="x")
