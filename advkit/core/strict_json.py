"""JSON of strangers: numbers that a computer has, nesting that a program can follow, one kind of error."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

MOST = 2**63


def read_json(text: str | bytes) -> Any:
    """The value of a JSON document.

    Raises ValueError where the text is none, is no UTF-8, is nested beyond reason, or holds numbers that JSON does not
    have (NaN, infinity) or that 64 bits do not hold.
    """
    try:
        return json.loads(text, parse_constant=_refused, parse_float=_real, parse_int=_whole)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_object(text: str | bytes) -> dict[str, Any]:
    """The same of a document that is one object."""
    value = read_json(text)
    if not isinstance(value, dict):
        raise ValueError(f"it is a {type(value).__name__}, not an object of names and values")
    return value


def _refused(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number; unknown values are null")


def _real(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is beyond all numbers")
    return value


def _whole(text: str) -> int:
    if len(text) > 20 or abs(int(text)) >= MOST:
        raise ValueError(f"{text[:40]} is beyond 64 bits")
    return int(text)
