"""Metrics that belong together as grids: transfer by kind and sources, replies by what is counted and judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import digits as DIGITS
from typing import Any

from advkit.evaluation.report.text import is_fraction, percent, shorten, value_text

Data = Mapping[str, Any]
_KINDS = {
    "tapm_acc_avg": "average of the cells",
    "tapm_acc_best_attack": "strongest cell",
    "tapm_acc_per_sample": "every cell at once",
}
JUDGES = "judges"
_ALL, _GROUP = "all", "_group_"
_OF_JUDGES = {
    "asr_clean_greedy": "clean prompt, greedy reply",
    "asr_clean_at_1": "clean prompt, one reply",
    "asr_clean_any_of_": "clean prompt, any of {} replies",
    "asr_clean_mean": "clean prompt, mean of replies",
    "asr_greedy": "attacked, greedy reply",
    "asr_at_1": "attacked, one reply",
    "asr_any_of_": "attacked, any of {} replies",
    "asr_mean": "attacked, mean of replies",
    "asr_greedy_corrected": "attacked, greedy, corrected",
    "hit_at_1_corrected": "hit@1, corrected",
}
_COLUMN, _LEAST_LABEL = 12, 18


@dataclass(frozen=True)
class Grid:
    """A table of metrics.

    title:   what stands above it
    columns: their headings
    cells:   label of a row -> one text per column, "" where there is none
    metrics: names of the metrics that it holds
    """

    title: str
    columns: Sequence[str]
    cells: Mapping[str, Sequence[str]]
    metrics: frozenset[str]

    def lines(self, width: int) -> list[str]:
        """As lines of at most so many characters; in parts below one another where the columns are too many."""
        label = min(max([_LEAST_LABEL, *map(len, self.cells)]), width // 2)
        most = max(1, (width - label) // _COLUMN)
        lines = []
        for first in range(0, len(self.columns), most):
            part = slice(first, first + most)
            heads = "".join(f"{shorten(each, _COLUMN - 1):>{_COLUMN}}" for each in self.columns[part])
            lines.append(f"{shorten(self.title, label):<{label}}{heads}")
            for name, cells in self.cells.items():
                texts = "".join(f"{each:>{_COLUMN}}" for each in cells[part])
                lines.append(f"{shorten(name, label):<{label}}{texts}".rstrip())
        return lines


def of(data: Data) -> list[Grid]:
    """The grids of a completed document."""
    found = (_transfer(data["metrics"]), _judges(data["metrics"]))
    return [grid for grid in found if grid is not None]


def _transfer(metrics: Data) -> Grid | None:
    """Accuracy under transfer: kinds against all sources, those seen, those unseen, and groups."""
    ends = [name.removeprefix("tapm_acc_avg") for name in metrics if name.startswith("tapm_acc_avg")]
    if len(ends) < 2:
        return None
    order = sorted(ends, key=lambda end: (end != "", end.startswith(_GROUP), end))
    columns = [end.removeprefix(_GROUP).lstrip("_") or _ALL for end in order]
    names = {kind: [f"{kind}{end}" for end in order] for kind in _KINDS}
    cells = {_KINDS[kind]: [_cell(metrics.get(name)) for name in each] for kind, each in names.items()}
    shown = frozenset(name for each in names.values() for name in each if name in metrics)
    return Grid("TAPM accuracy", columns, cells, shown)


def _judges(metrics: Data) -> Grid | None:
    """Success by judge: what is counted against judges."""
    judges = [name.removesuffix("_asr_greedy") for name in metrics if name.endswith("_asr_greedy")]
    measures: dict[str, list[str]] = {}
    for name in metrics:
        for place, judge in enumerate(judges):
            measure = name.removeprefix(f"{judge}_")
            if name.startswith(f"{judge}_") and measure.startswith(("asr_", "hit_at_")):
                measures.setdefault(measure, [""] * len(judges))[place] = name
    if not measures:
        return None
    known = list(_OF_JUDGES)
    places = {each: known.index(each.rstrip(DIGITS)) if each.rstrip(DIGITS) in known else -1 for each in measures}
    places |= {each: known.index(each) for each in measures if each in known}
    order = sorted(measures, key=lambda each: (places[each] % (len(known) + 1), each))
    cells = {_measure(each): [_cell(metrics.get(name), share=True) for name in measures[each]] for each in order}
    return Grid(JUDGES, judges, cells, frozenset(name for each in measures.values() for name in each if name))


def _measure(name: str) -> str:
    if name in _OF_JUDGES:
        return _OF_JUDGES[name]
    bare = name.rstrip(DIGITS)
    if bare in _OF_JUDGES:
        return _OF_JUDGES[bare].format(name.removeprefix(bare))
    return name.replace("hit_at_", "hit@").replace("_", " ")


def _cell(entry: Any, share: bool = False) -> str:
    """A value with one decimal; those that are shares in percent, also where their unit does not say so."""
    if not isinstance(entry, Mapping):
        return ""
    return percent(entry["value"]) if share or is_fraction(entry) else value_text(entry)
