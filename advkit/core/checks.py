"""Checks of settings, with one form of message: "NAME is VALUE; expected ...".

A setting that is None is left to whoever uses it, and passes all of them but `check`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from advkit.core.errors import UsageError


def check(settings: object, name: str, fine: bool, expected: str) -> None:
    """Raise UsageError for a field that is not `fine`; `expected` says what would be, for ranges without a function."""
    if not fine:
        raise UsageError(f"{name} is {getattr(settings, name)!r}; expected {expected}")


def plain(value: Any) -> Any:
    """Python's own number for one of numpy's, or a tensor of a single one: neither specs nor JSON can write those.

    Anything else is handed back as it is.
    """
    if isinstance(value, str | bool) or type(value) in (int, float) or getattr(value, "ndim", None) != 0:
        return value
    return value.item() if callable(getattr(value, "item", None)) else value


def whole(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """A whole number as Python's own: of numpy's, or of a float that is one (1e3).

    Raises UsageError for another value.
    """
    number = plain(value)
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    fits = isinstance(number, int) and not isinstance(number, bool)
    if not fits or (least is not None and number < least) or (most is not None and number > most):
        of = "" if least is None else f" of at least {least}" if most is None else f" from {least} to {most}"
        raise UsageError(f"{name} is {value!r}; expected a whole number{of}")
    return int(number)


def at_least(settings: object, least: int, *names: str) -> None:
    """Raise UsageError where one of these whole numbers is smaller."""
    for name in names:
        value = getattr(settings, name)
        check(settings, name, value is None or value >= least, f"a whole number of at least {least}")


def at_least_one(settings: object, *names: str) -> None:
    """Raise UsageError where one of these whole numbers is below 1: steps, restarts, draws."""
    at_least(settings, 1, *names)


def positive(settings: object, *names: str, what: str = "number") -> None:
    """Raise UsageError where one of these is not above 0; `what` they are, such as "length in units of eps"."""
    for name in names:
        value = getattr(settings, name)
        check(settings, name, value is None or value > 0, f"a {what} above 0")


def not_negative(settings: object, *names: str, what: str = "number") -> None:
    """Raise UsageError where one of these is below 0."""
    for name in names:
        value = getattr(settings, name)
        check(settings, name, value is None or value >= 0, f"a {what} of at least 0")


def fraction(settings: object, *names: str, ends: str = "(]", what: str = "number") -> None:
    """Raise UsageError where one of these is not between 0 and 1; `ends` as in [0, 1), by default 1 is allowed."""
    for name in names:
        value = getattr(settings, name)
        inside = value is None or 0 < value < 1 or (value == 0 and "[" in ends) or (value == 1 and "]" in ends)
        check(settings, name, inside, f"a {what} in {ends[0]}0, 1{ends[1]}")


def one_of(settings: object, name: str, choices: Sequence[Any]) -> None:
    """Raise UsageError where a field is none of the choices."""
    check(settings, name, getattr(settings, name) in choices, f"one of {', '.join(map(str, choices))}")
