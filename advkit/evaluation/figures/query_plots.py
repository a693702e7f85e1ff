"""Success against queries, for attackers with scores or labels."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from advkit.core.errors import UsageError
from advkit.core.protocols import Record
from advkit.evaluation.counts import by_label, count, queries_to_break
from advkit.evaluation.figures.plots import SERIES, new_axes, plain
from advkit.evaluation.report import Report
from advkit.evaluation.stats import wilson

_LEVEL = 0.95


@dataclass(frozen=True)
class Curve:
    """Queries that broke samples, ascending, how many samples were attacked, and the most that one was asked."""

    queries: Sequence[int]
    attacked: int
    most: int

    def broken_within(self, budget: float) -> int:
        """How many samples a run with this budget of queries would have broken."""
        return bisect_right(self.queries, budget)


def curves_of(records: Sequence[Record]) -> dict[str, Curve]:
    """The curve of each attack that took no gradient, by its name."""
    curves = {}
    for label, own in by_label(records).items():
        asked = [record for record in own if record.queries]
        attacked = count(own).attackable
        if asked and attacked and not any(record.backwards for record in own):
            curves[str(label)] = Curve(queries_to_break(own), attacked, max(record.queries for record in asked))
    return curves


def success_by_queries(
    curves: Mapping[str, Curve], *, robust: Mapping[str, tuple[int, int]] | None = None, title: str = ""
) -> Figure:
    """Share of the attacked samples broken within a number of queries, with Wilson intervals of 95 % as bands.

    curves: by the name of the attack
    robust: of each curve, the number of samples in all and of those that are right when clean: its robust accuracy is
            drawn as a dashed line
    """
    if not curves or any(not 0 < curve.attacked >= len(curve.queries) for curve in curves.values()):
        raise UsageError(
            "success_by_queries: expected curves of at least one sample, and no more successes than samples"
        )
    figure, axes = new_axes(6.0, 3.8)
    most = max(curve.most for curve in curves.values())
    for (name, curve), (color, _) in zip(curves.items(), SERIES * len(curves), strict=False):
        reach = [1, *sorted(set(curve.queries) - {1}), most]
        ends = [wilson(curve.broken_within(budget), curve.attacked, _LEVEL) for budget in reach]
        share = [curve.broken_within(budget) / curve.attacked for budget in reach]
        axes.step(reach, share, where="post", color=color, label=plain(name) or None)
        low, high = [each.low for each in ends], [each.high for each in ends]
        axes.fill_between(reach, low, high, step="post", color=color, alpha=0.18, linewidth=0)
        if robust and name in robust:
            total, right = robust[name]
            left = [(right - curve.broken_within(budget)) / total for budget in reach]
            axes.step(reach, left, where="post", color=color, linestyle="--", label=plain(f"{name}, robust accuracy"))
    axes.set_xscale("log")
    axes.set_xlim(1, max(2, most))
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_xlabel("queries allowed for each sample")
    axes.set_ylabel("attack success rate")
    axes.legend(frameon=False, fontsize=8)
    if title:
        axes.set_title(plain(title), loc="left", fontsize=11)
    return figure


def success_by_queries_of(report: Report, records: Sequence[Record]) -> Figure | None:
    """The curves of a run, with robust accuracy where the goal is a wrong answer; None where gradients were taken."""
    curves = curves_of(records)
    if not curves:
        return None
    robust = {}
    if report.to_dict()["threat_model"]["goal"] == "untargeted":
        for label, own in by_label(records).items():
            c = count(own)
            # What was never decided is in neither count: then there is no one curve of robust accuracy.
            if str(label) in curves and not c.unknown and c.correct == c.attackable:
                robust[str(label)] = (c.n, c.correct)
    return success_by_queries(curves, robust=robust, title=f"Success within a number of queries, {report.threat}")


__all__ = ["Curve", "curves_of", "success_by_queries", "success_by_queries_of"]
