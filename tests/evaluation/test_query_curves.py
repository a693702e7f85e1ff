"""Curves of success against queries: counts, intervals, and when there is none."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from typing import Any

import pytest
from matplotlib.figure import Figure

import advkit
from advkit.core.errors import UsageError
from advkit.core.protocols import Outcome, Record
from advkit.evaluation.counts import QUERIES_TO_BREAK, queries_to_break
from advkit.evaluation.figures import write_plots
from advkit.evaluation.figures.query_plots import (
    Curve,
    curves_of,
    distance_by_queries,
    distance_by_queries_of,
    distance_curves,
    success_by_queries,
)
from advkit.evaluation.report.document import Report
from advkit.evaluation.report.verify import figures_of
from advkit.evaluation.run.store import read_records, records_path
from advkit.evaluation.stats import wilson

B, R, W = Outcome.BROKEN, Outcome.ROBUST, Outcome.WRONG


def records(*rows: tuple[Outcome, int], backwards: int = 0, attack: str = "square") -> list[Record]:
    return [
        Record(f"row-{i}", attack, outcome, 1, 2 if outcome == W else 1, forwards=queries, queries=queries,
               backwards=backwards)
        for i, (outcome, queries) in enumerate(rows)
    ]  # fmt: skip


HELD = records((B, 30), (B, 7), (R, 100), (W, 0), (B, 30))


def test_the_curve_counts_what_was_broken_within_a_budget() -> None:
    ((name, curve),) = curves_of(HELD).items()
    assert (name, curve) == ("square", Curve([7, 30, 30], 4, 100))
    assert [curve.broken_within(budget) for budget in (1, 6, 7, 29, 30, 1000)] == [0, 0, 1, 1, 3, 3]
    assert queries_to_break(HELD) == [7, 30, 30]
    assert figures_of(HELD)[QUERIES_TO_BREAK] == 30


def test_attacks_with_gradients_have_no_curve() -> None:
    assert curves_of(records((B, 30), (R, 9), backwards=3)) == {}
    assert queries_to_break(records((B, 30), backwards=3)) == []
    both = [*HELD, *records((B, 5), (R, 10), backwards=4, attack="pgd")]
    assert list(curves_of(both)) == ["square"]


def lines_of(figure: Figure) -> dict[str, tuple[list[float], list[float]]]:
    (axes,) = figure.axes
    return {str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}  # type: ignore[arg-type]


def test_the_figure_steps_up_where_samples_fall_inside_wilson_intervals() -> None:
    figure = success_by_queries({"a$b": Curve([7, 30, 30], 4, 100)}, robust={"a$b": (5, 4)}, title="t")
    lines = lines_of(figure)
    assert lines[r"a\$b"] == ([1, 7, 30, 100], [0, 0.25, 0.75, 0.75])
    assert lines[r"a\$b, robust accuracy"] == ([1, 7, 30, 100], [0.8, 0.6, 0.2, 0.2])
    (band,) = figure.axes[0].collections
    edge = band.get_paths()[0].vertices
    for k in (0, 1, 3):
        ci = wilson(k, 4)
        assert abs(edge[:, 1] - ci.low).min() < 1e-9
        assert abs(edge[:, 1] - ci.high).min() < 1e-9
    for wrong in ({}, {"a": Curve([], 0, 3)}, {"a": Curve([1, 2], 1, 3)}):
        with pytest.raises(UsageError, match="success_by_queries"):
            success_by_queries(wrong)


def ran(tmp_path: Any, attack: str, threat: str) -> tuple[dict[str, Any], list[Record], Any]:
    folder = tmp_path / attack.partition(":")[0]
    report = advkit.evaluate(attack, "none", "digits", "zoo:digits-mlp", threat, n=40, device="cpu", out=folder)
    return report.to_dict(), read_records(records_path(folder)), folder


@pytest.mark.slow
def test_a_run_by_scores_has_the_median_and_the_curve(tmp_path: Any) -> None:
    data, held, folder = ran(tmp_path, "simba", "l2:eps=0.7,access=scores,queries=200")
    took = [record.queries for record in held if record.outcome == B]
    assert took
    assert max(record.queries for record in held) == 200
    entry = data["metrics"][QUERIES_TO_BREAK]
    assert (entry["value"], entry["n"], entry["unit"]) == (statistics.median(took), len(took), "queries")
    assert data["attacks"][0]["cost"]["queries_median_broken"] == statistics.median(took)
    assert QUERIES_TO_BREAK in json.dumps(data["section"]["table"])
    assert "success_by_queries.png" in [path.name for path in write_plots(folder)]


@pytest.mark.parametrize(
    ("attack", "threat"),
    [("pgd:steps=5", "linf:eps=0.1"), ("square:queries=60", "linf:eps=0.1,access=scores,lattice=255")],
)
def test_where_samples_do_not_stop_at_success_there_is_neither(tmp_path: Any, attack: str, threat: str) -> None:
    data, _, folder = ran(tmp_path, attack, threat)
    assert QUERIES_TO_BREAK not in data["metrics"]
    assert "success_by_queries.png" not in [path.name for path in write_plots(folder)]


def nearer(*courses: list[tuple[int, float]], outcome: Outcome = B) -> list[Record]:
    return [
        Record(f"row-{i}", "geoda", outcome, 1, 1, forwards=9, queries=9,
               trace=tuple({"queries": queries, "distance": distance} for queries, distance in course))
        for i, course in enumerate(courses)
    ]  # fmt: skip


def test_the_median_distance_counts_samples_that_are_not_broken_as_infinite() -> None:
    held = nearer([(2, 4.0), (5, 1.0)], [(2, 6.0), (9, 2.0)], [(5, 3.0)]) + records((W, 0), attack="geoda")
    ((name, curve),) = distance_curves(held).items()
    assert (name, list(curve.queries), list(curve.median)) == ("geoda", [2, 5, 9], [6.0, 3.0, 2.0])
    assert (curve.low, curve.high) == ([0.0] * 3, [math.inf] * 3)  # no interval of three
    more = [*held, *records((R, 9), (R, 9), attack="geoda")]
    assert list(distance_curves(more)["geoda"].median) == [math.inf, 6.0, 3.0]
    many = nearer(*[[(2, float(k))] for k in range(1, 11)])
    assert (distance_curves(many)["geoda"].low, distance_curves(many)["geoda"].high) == ([2.0], [9.0])


def test_the_figure_draws_the_median_and_its_band_where_they_are_finite() -> None:
    curves = distance_curves(nearer(*[[(5, k + 1.0), (50, 1.0)] for k in range(10)], [(50, 9.0)]))
    figure = distance_by_queries(curves, norm="L2", title="t")
    assert lines_of(figure)["geoda"] == ([5, 50], [6.0, 1.0])
    assert len(figure.axes[0].collections) == 1
    with pytest.raises(UsageError, match="broke half"):
        distance_by_queries(distance_curves(nearer([(2, 1.0)], []) + nearer([], outcome=R)))


@pytest.mark.slow
def test_a_run_by_decisions_has_the_curve(tmp_path: Any) -> None:
    data, held, folder = ran(tmp_path, "geoda", "minimum-l2:access=labels,queries=60")
    assert "distance_by_queries.png" in [path.name for path in write_plots(folder)]
    curve = distance_curves(held)["geoda"]
    assert curve.queries[-1] == 60
    away = [record.distance for record in held if record.outcome == B]
    assert curve.median[-1] == pytest.approx(statistics.median(away), rel=1e-5)
    assert sum(len(json.dumps(record.trace)) for record in held) < 1000 * len(held)
    assert "success_by_queries" not in json.dumps(data["section"]["figures"])
    assert distance_by_queries_of(Report.load(folder), [replace(record, trace=()) for record in held]) is None
