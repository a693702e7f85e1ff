"""Which classes are the weakest: the tail that instance reweighting is judged by (RA-Tail-30, arXiv 2308.00311)."""

from __future__ import annotations

from collections.abc import Mapping


def weakest(rates: Mapping[int, float]) -> list[int]:
    """The 30 % of the classes, rounded up, of lowest rate, the lowest first; of equals the first by number.

    rates: class number -> its own accuracy or score
    """
    order = sorted(rates, key=lambda label: (rates[label], label))
    return order[: (3 * len(order) + 9) // 10]
