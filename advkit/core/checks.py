"""Checks of settings, with one form of message: "NAME is VALUE; expected ..."."""

from __future__ import annotations

from typing import Any, NoReturn

from advkit.core.errors import UsageError


def refuse(name: str, value: object, expected: str) -> NoReturn:
    """Raise UsageError for a value that is out of range; `expected` completes "expected ..."."""
    raise UsageError(f"{name} is {value!r}; expected {expected}")


def check(settings: object, name: str, fine: bool, expected: str) -> None:
    """Raise UsageError for a field that is not `fine`; for ranges that have no function of their own."""
    if not fine:
        refuse(name, getattr(settings, name), expected)


def at_least(settings: object, least: int, *names: str) -> None:
    """Whole numbers from `least` up."""
    for name in names:
        check(settings, name, getattr(settings, name) >= least, f"a whole number of at least {least}")


def at_least_one(settings: object, *names: str) -> None:
    """Whole numbers from 1 up: steps, restarts, draws."""
    at_least(settings, 1, *names)


def one_of(settings: object, name: str, choices: tuple[Any, ...]) -> None:
    """One of a few values."""
    check(settings, name, getattr(settings, name) in choices, f"one of {', '.join(map(str, choices))}")


def positive(settings: object, name: str, what: str, *, none: bool = False) -> None:
    """A number above 0, `what` it is: "a length in units of eps, such as 0.1". With `none`, None is fine, too."""
    value = getattr(settings, name)
    check(settings, name, (none and value is None) or (value is not None and value > 0), f"{what} above 0")


def not_negative(settings: object, name: str, what: str) -> None:
    """A number from 0 up, `what` it is."""
    check(settings, name, getattr(settings, name) >= 0, f"{what} of at least 0")


def fraction(settings: object, name: str, what: str, *, zero: bool = False, one: bool = True) -> None:
    """A number between 0 and 1, `what` it is; `zero` and `one` say whether the ends are allowed."""
    value = getattr(settings, name)
    fine = (value >= 0 if zero else value > 0) and (value <= 1 if one else value < 1)
    low, high = "from 0" if zero else "above 0", "to 1" if one else "to below 1"
    check(settings, name, fine, f"{what} {low} {high}")
