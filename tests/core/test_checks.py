"""Checks of settings: what is refused, and in which words."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from advkit.core import checks
from advkit.core.errors import UsageError

NAN = float("nan")


def message(check: Any, value: Any, *rest: Any, **settings: Any) -> str:
    """What is said of the value; empty where it is accepted."""
    try:
        check(SimpleNamespace(size=value), *rest, "size", **settings)
    except UsageError as refusal:
        return str(refusal)
    return ""


@pytest.mark.parametrize(
    ("check", "settings", "fine", "refused", "expected"),
    [
        (checks.at_least_one, {}, (1, 7, None), (0, -3), "a whole number of at least 1"),
        (checks.positive, {}, (1e-9, 3, None), (0, -1.0, NAN), "a number above 0"),
        (checks.positive, {"what": "length"}, (0.1,), (0.0,), "a length above 0"),
        (checks.not_negative, {}, (0, 0.5, None), (-1e-9, NAN), "a number of at least 0"),
        (checks.fraction, {}, (1e-9, 0.5, 1, None), (0, 1.1, -1, NAN), "a number in (0, 1]"),
        (checks.fraction, {"ends": "[]"}, (0, 0.5, 1), (1.1, -0.1, NAN), "a number in [0, 1]"),
        (checks.fraction, {"ends": "()"}, (0.5,), (0, 1, NAN), "a number in (0, 1)"),
        (checks.fraction, {"ends": "[)", "what": "share"}, (0, 0.5), (1, -1), "a share in [0, 1)"),
    ],
)
def test_ranges(
    check: Any, settings: dict[str, Any], fine: tuple[Any, ...], refused: tuple[Any, ...], expected: str
) -> None:
    assert [message(check, value, **settings) for value in fine] == [""] * len(fine)
    for value in refused:
        assert message(check, value, **settings) == f"size is {value!r}; expected {expected}"


def test_the_least_number_is_named() -> None:
    assert message(checks.at_least, 2, 2) == ""
    assert message(checks.at_least, 1, 2) == "size is 1; expected a whole number of at least 2"


def test_the_first_field_out_of_range_is_named() -> None:
    settings = SimpleNamespace(steps=3, restarts=0, eot=-1)
    with pytest.raises(UsageError, match=r"^restarts is 0; expected a whole number of at least 1$"):
        checks.at_least_one(settings, "steps", "restarts", "eot")


def test_choices_are_listed() -> None:
    settings = SimpleNamespace(start="corner", k=3)
    with pytest.raises(UsageError, match=r"^start is 'corner'; expected one of random, origin$"):
        checks.one_of(settings, "start", ("random", "origin"))
    with pytest.raises(UsageError, match=r"^k is 3; expected one of 1, 2$"):
        checks.one_of(settings, "k", (1, 2))
    checks.one_of(settings, "k", (3, 4))
    with pytest.raises(UsageError, match=r"^k is 3; expected an even number$"):
        checks.check(settings, "k", settings.k % 2 == 0, "an even number")
