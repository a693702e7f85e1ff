"""Krippendorff's alpha against published examples, closed forms and invariants; rankings that a judge reverses."""

from __future__ import annotations

import numpy as np
import pytest

from advkit.core.errors import UsageError
from advkit.evaluation.stats_agreement import alpha_entry, krippendorff_alpha, ranking_flips

PUBLISHED = (  # Krippendorff (2011), Computing Krippendorff's Alpha-Reliability: four observers, twelve units
    "1 2 3 3 2 1 4 1 2 . . .",
    "1 2 3 3 2 2 4 1 2 5 . 3",
    ". 3 3 3 2 3 4 2 2 5 1 .",
    "1 2 3 3 2 4 4 1 2 5 1 .",
)
TWO = ("0 1 0 0 0 0 0 0 1 0", "1 1 1 0 0 1 0 0 0 0")  # the same paper's binary example of two observers


def units(rows: tuple[str, ...]) -> list[list[str | None]]:
    told = [row.split() for row in rows]
    return [[None if word == "." else word for word in column] for column in zip(*told, strict=True)]


def test_the_published_examples() -> None:
    assert krippendorff_alpha(units(PUBLISHED)) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(units(TWO)) == pytest.approx(0.095, abs=5e-4)


def test_the_same_as_the_package_krippendorff() -> None:
    package = pytest.importorskip("krippendorff")
    rng = np.random.default_rng(0)
    for _ in range(60):
        table = rng.integers(0, 3, (int(rng.integers(2, 5)), 20)).astype(float)
        table[rng.random(table.shape) < 0.2] = np.nan
        ours = krippendorff_alpha([[None if np.isnan(v) else int(v) for v in column] for column in table.T])
        assert ours == pytest.approx(package.alpha(reliability_data=table, level_of_measurement="nominal"), abs=1e-12)


def test_the_ends_of_the_scale() -> None:
    assert krippendorff_alpha([[1, 1], [0, 0], [1, 1]]) == 1.0
    n = 1000
    opposed = krippendorff_alpha([[i % 2, 1 - i % 2] for i in range(n)])
    assert opposed == pytest.approx(-1 + 1 / n, abs=1e-12)  # in the limit -1
    assert krippendorff_alpha([[1, 1], [1, 1]]) is None  # one verdict alone
    assert krippendorff_alpha([[1, None], [None, 0]]) is None
    assert krippendorff_alpha([]) is None
    with pytest.raises(UsageError, match="one per judge"):
        krippendorff_alpha([[1, 1], [1, 1, 1]])


def test_neither_names_nor_order_of_judges_and_replies_matter() -> None:
    rows = units(PUBLISHED)
    alpha = krippendorff_alpha(rows)
    assert krippendorff_alpha([row[::-1] for row in rows][::-1]) == pytest.approx(alpha)
    assert krippendorff_alpha([[each and f"verdict {each}" for each in row] for row in rows]) == pytest.approx(alpha)
    assert krippendorff_alpha([*rows, ["9", None, None, None]]) == pytest.approx(alpha)  # one verdict is no pair


def test_the_interval_draws_prompts_not_replies() -> None:
    rng = np.random.default_rng(0)
    prompts = [[[int(rng.random() < 0.5)] * 2 if agree else [0, 1]] * 10 for agree in rng.random(40) < 0.7]
    clustered = alpha_entry(prompts)
    apart = alpha_entry([[reply] for replies in prompts for reply in replies])
    assert clustered["value"] == pytest.approx(apart["value"])
    widths = [entry["ci"]["high"] - entry["ci"]["low"] for entry in (clustered, apart)]
    assert widths[0] > 2 * widths[1]  # ten equal replies are one
    assert clustered["ci"]["low"] < clustered["value"] < clustered["ci"]["high"]
    assert (clustered["n"], clustered["prompts"]) == (400, 40)
    assert alpha_entry([[[0, 1], [1, 1]]])["ci"] is None


def test_flips_are_reversals_and_ties_are_none() -> None:
    figures = {"refusal": {"a": 0.2, "b": 0.5, "c": 0.5}, "exact": {"a": 0.4, "b": 0.1, "c": 0.4}}
    (flip,) = ranking_flips(figures)
    assert (flip.first, flip.second, flip.judges, flip.figures) == (
        "a",
        "b",
        ("refusal", "exact"),
        (0.2, 0.5, 0.4, 0.1),
    )
    assert str(flip) == "a and b: 20.0 % and 50.0 % by refusal, 40.0 % and 10.0 % by exact"
    assert ranking_flips({"refusal": figures["refusal"]}) == []
    assert ranking_flips({"one": {"a": 0.1, "b": None}, "two": {"a": 0.3, "b": 0.2}}) == []
    with pytest.raises(UsageError, match="same systems"):
        ranking_flips({"one": {"a": 0.1}, "two": {"b": 0.1}})
