"""VNN-LIB, the text in which verifiers read a specification, and the words in which they answer.

A property describes what must not exist: an input of the box whose label another class reaches. So `sat` is a
counter-example and `unsat` a proof.

Shapes: `C H W` image.
"""

from fractions import Fraction
from functools import lru_cache

from jaxtyping import Float
from torch import Tensor

# Decimal places of a bound. Written in full, k/255 would never end; a unit of the last place is far below what
# float32 (6e-8 at 1) or float64 (1e-16 at 1) tell apart from the exact number.
PLACES = 18


def exact_pixels(image: Float[Tensor, "C H W"]) -> list[Fraction]:
    """The pixels of an image as exact numbers, in row-major order.

    A float32 pixel that is the nearest to some k/255 stands for k/255, as it was stored; any other for itself.
    """
    values = image.flatten()
    numerators = (values.double() * 255).round()
    is_stored = (numerators / 255).to(values.dtype) == values
    return [
        Fraction(int(numerator), 255) if stored else Fraction(value)
        for value, numerator, stored in zip(values.tolist(), numerators.tolist(), is_stored.tolist(), strict=True)
    ]


@lru_cache(maxsize=4096)  # 256 grey values, but thousands of pixels
def written_bounds(pixel: Fraction, epsilon: Fraction) -> tuple[str, str]:
    """[max(x - epsilon, 0), min(x + epsilon, 1)] in decimals, the lower end rounded down and the upper end up."""
    scale = 10**PLACES
    lower, upper = max(pixel - epsilon, Fraction(0)), min(pixel + epsilon, Fraction(1))
    return _decimals(lower * scale // 1), _decimals(-(-upper * scale // 1))


def _decimals(units: int) -> str:
    whole, rest = divmod(units, 10**PLACES)
    return f"{whole}.{rest:0{PLACES}d}".rstrip("0").ljust(3, "0")


def robustness_property(
    image: Float[Tensor, "C H W"], label: int, *, epsilon: Fraction, num_classes: int, title: str
) -> str:
    """The VNN-LIB 1 text that asks for a point of the epsilon box where some class is not below the label.

        exists X:  max(x_i - epsilon, 0) <= X_i <= min(x_i + epsilon, 1)  and  (or over j != y of  Y_j >= Y_y)

    X_i are the pixels in row-major order of [C, H, W], Y_j the logits. The box contains the exact one and exceeds it
    by less than 10^-PLACES. A tie counts as a counter-example, as everywhere in `ccdist.verification`.

    Args:
        image: pixels in [0, 1].
        epsilon: radius in pixel units.
        title: what the first lines say, as comments.

    Raises:
        ValueError: the label is none of the classes, or there is no other class or pixel outside [0, 1].
    """
    if not 0 <= label < num_classes or num_classes < 2:
        raise ValueError(f"label {label} of {num_classes} classes; expected one of at least two, counted from 0")
    if not bool(((image >= 0) & (image <= 1)).all()):
        raise ValueError("the image has pixels outside [0, 1]")
    pixels = exact_pixels(image)
    lines = [f"; {line}" for line in title.splitlines()]
    lines += [f"(declare-const X_{index} Real)" for index in range(len(pixels))]
    lines += [f"(declare-const Y_{index} Real)" for index in range(num_classes)]
    for index, pixel in enumerate(pixels):
        lower, upper = written_bounds(pixel, epsilon)
        lines += [f"(assert (>= X_{index} {lower}))", f"(assert (<= X_{index} {upper}))"]
    others = " ".join(f"(and (>= Y_{other} Y_{label}))" for other in range(num_classes) if other != label)
    return "\n".join([*lines, f"(assert (or {others}))", ""])
