"""The base of every configuration, its identity, and fields that hold exact fractions."""

import hashlib
import json
import re
from fractions import Fraction
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer


class Config(BaseModel):
    """Base of every configuration: nothing unknown, nothing changed later, defaults checked too."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


def fingerprint(value: BaseModel | dict[str, Any]) -> str:
    """Hash of the canonical JSON: the identity of a configuration."""
    data = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def exact_fraction(value: Any) -> Fraction:
    """A number or text such as "2/255" or 0.1 as the fraction that its decimal digits spell."""
    if isinstance(value, bool) or not isinstance(value, int | float | str | Fraction):
        raise ValueError(f"expected a number or a fraction like 2/255, got {value!r}")
    text = str(value).replace(" ", "")
    try:
        # Fraction writes out what an exponent stands for: 1e300000000 would take for ever.
        exponent = re.search(r"[eE]([+-]?\d+)$", text)
        if len(text) > 1000 or (exponent is not None and abs(int(exponent[1])) > 400):
            raise ValueError
        return Fraction(text)
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ValueError(f"expected a number or a fraction like 2/255, got {text[:40]}") from None


def _share(value: Any) -> Fraction:
    share = exact_fraction(value)
    if not 0 <= share <= 1:
        raise ValueError(f"{value} is not in [0, 1]; expected a fraction of all epochs, such as 0.5 or 1/160")
    return share


as_text = PlainSerializer(str, return_type=str)
Share = Annotated[Fraction, BeforeValidator(_share), as_text]
