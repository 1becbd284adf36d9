"""A small reader of VNN-LIB 1, which shares nothing with the writer."""

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any


@dataclass
class Property:
    """A VNN-LIB text: declared names, bounds of the inputs, and the one assertion about outputs."""

    inputs: list[str]
    outputs: list[str]
    lower: dict[str, Fraction]
    upper: dict[str, Fraction]
    outside: Any

    def holds(self, image: list[Fraction], logits: list[float]) -> bool:
        """Whether this point is a counter-example."""
        named = dict(zip(self.inputs, image, strict=True))
        values = dict(zip(self.outputs, logits, strict=True))
        inside = all(self.lower[name] <= value <= self.upper[name] for name, value in named.items())
        return inside and evaluate(self.outside, values)


def expressions(text: str) -> list[Any]:
    """Nested lists of the words between parentheses."""
    words = re.findall(r"[()]|[^\s()]+", re.sub(r";[^\n]*", "", text))
    stack: list[list[Any]] = [[]]
    for word in words:
        if word == "(":
            stack.append([])
        elif word == ")":
            done = stack.pop()
            stack[-1].append(done)
        else:
            stack[-1].append(word)
    (found,) = stack
    return found


def evaluate(expression: list[Any], values: dict[str, float]) -> bool:
    operator, *operands = expression
    if operator in ("or", "and"):
        return (any if operator == "or" else all)(evaluate(each, values) for each in operands)
    left, right = (values[name] for name in operands)
    return {"<=": left <= right, ">=": left >= right}[operator]


def parse(text: str) -> Property:
    found = Property([], [], {}, {}, None)
    for operator, *operands in expressions(text):
        if operator == "declare-const":
            name, kind = operands
            assert kind == "Real"
            (found.inputs if name.startswith("X") else found.outputs).append(name)
            continue
        assert operator == "assert"
        ((relation, *sides),) = operands
        if relation == "or":
            assert found.outside is None
            found.outside = operands[0]
            continue
        name, bound = sides
        ends = {"<=": found.upper, ">=": found.lower}[relation]
        assert re.fullmatch(r"\d+\.\d+", bound)  # no exponent: not every verifier reads one
        assert name not in ends
        ends[name] = Fraction(bound)
    return found
