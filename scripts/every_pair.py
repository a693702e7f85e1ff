"""The page of every pair: `python scripts/every_pair.py FOLDER... docs/every_pair.md`, a FOLDER being that of a sweep.

Attacks are rows, defenses columns, a table for each sweep. A pair has its number, or the number of the reason why there
is none.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from advkit.evaluation.sweep.api import Sweep
from advkit.evaluation.sweep.line import PROBLEMS
from advkit.evaluation.sweep.table import Row

HEAD = """# Every attack against every defense

Made by `python scripts/every_pair.py pairs/* docs/every_pair.md`; do not edit. Every table is of a sweep of its own:
[every_pair.yaml](every_pair.yaml) has all attacks and defenses. The grids in `docs/every_pair/` have the attacks that
need another task, model or threat model.

Numbers are {metrics}, on at most {n} samples, of attacks and defenses
that the grids have shortened to a few steps, queries, epochs and votes. They say that a pair fits,
and nothing of its strength. Where a pair has no number, the reason is named by its number below.

{pairs} pairs: {fitting} with a number in at least one table, {rest} with none.
{cells} cells in all: {numbers} numbers, {reasons} reasons.
"""


@dataclass(frozen=True)
class Pair:
    """A cell by the specs that were asked for: a part and another name of it are two rows of the page."""

    attack: str
    defense: str
    row: Row

    @property
    def names(self) -> tuple[str, str]:
        """The parts, whatever their settings."""
        return self.attack.partition(":")[0], self.defense.partition(":")[0]

    @property
    def number(self) -> float | None:
        """What came out; None where there is a reason."""
        return self.row.value if self.row.state == "done" and not self.row.undecided else None

    @property
    def reason(self) -> str:
        """Why there is no number, in words that all pairs of its kind share."""
        row = self.row
        if row.state in ("waiting", "running", "left off"):
            return "not run yet"
        if row.state == "excluded":
            return "excluded by the grid"
        if row.state == "done":
            return f"{row.undecided} of {row.n} samples without a verdict" if row.undecided else row.outcome
        words = (f"{row.state}: {row.reason}" if row.state in PROBLEMS else row.reason).split()
        for kind, spec in (("ATTACK", self.attack), ("DEFENSE", self.defense)):
            own = {spec, spec.partition(":")[0], str(row.parts[kind.lower()])} - {"none", "spiking"}  # words, too
            words = [kind if word.strip(",;:") in own else word for word in words]
        return " ".join(words)


def pairs_of(made: Sweep) -> list[Pair]:
    """The pairs of a sweep, in the grid's order."""
    lines = [line for line in made.lines if line.rows is None]
    asked = [(str(line.request["attack"]), str(line.request["defense"])) for line in lines]
    if len(set(asked)) != len(asked):
        raise SystemExit("the sweep has several cells for a pair: a page is of one task, model, goal and seed")
    return [Pair(*names, row) for names, row in zip(asked, made.rows, strict=True)]


def page(sweeps: Sequence[Sweep]) -> str:
    """The whole page."""
    tables = [pairs_of(made) for made in sweeps]
    every = [pair for pairs in tables for pair in pairs]
    numbers = [pair.row for pair in every if pair.number is not None]
    reasons = Counter(pair.reason for pair in every if pair.number is None).most_common()
    place = {reason: number for number, (reason, _) in enumerate(reasons, 1)}
    metrics = Counter(row.metric.replace("_", " ") for row in numbers).most_common()
    fits = {pair.names for pair in every if pair.number is not None}
    asked = {pair.names for pair in every}
    head = HEAD.format(
        metrics=" or ".join(f"{name} ({count} cells)" for name, count in metrics),
        n=max((row.n for row in numbers), default=0),
        pairs=f"{len(asked):,}",
        fitting=f"{len(fits):,}",
        rest=f"{len(asked - fits):,}",
        cells=f"{len(every):,}",
        numbers=f"{len(numbers):,}",
        reasons=f"{len(every) - len(numbers):,}",
    )
    lines = [head]
    for made, pairs in zip(sweeps, tables, strict=True):
        lines += section(made, pairs, place)
    lines += ["## Reasons", ""]
    lines += table(("", "reason", "cells"), [(f"({place[each]})", each, count) for each, count in reasons])
    return "\n".join(lines)


def section(made: Sweep, pairs: Sequence[Pair], place: Mapping[str, int]) -> list[str]:
    """The table of one sweep; `place` numbers the reasons."""
    asked = made.lines[0].request
    parts = [f"{name.replace('_', ' ')} `{asked[name]}`" for name in ("task", "model", "threat_model") if name in asked]
    attacks = list(dict.fromkeys(pair.attack for pair in pairs))
    defenses = list(dict.fromkeys(pair.defense for pair in pairs))
    told = {
        (pair.attack, pair.defense): f"({place[pair.reason]})" if pair.number is None else f"{pair.number:.2g}"
        for pair in pairs
    }
    lines = [f"## {parts[0][0].upper()}{parts[0][1:]}{''.join(f', {part}' for part in parts[1:])}", ""]
    lines += table(("", "defense"), [(f"d{number}", f"`{each}`") for number, each in enumerate(defenses, 1)])
    head = ("attack", *(f"d{number}" for number in range(1, len(defenses) + 1)))
    return lines + table(head, [(f"`{each}`", *(told[each, other] for other in defenses)) for each in attacks])


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a table, and an empty one."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return [*(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells)), ""]


if __name__ == "__main__":
    *folders, file = sys.argv[1:]
    Path(file).write_text(page([Sweep.load(folder) for folder in folders]), encoding="utf-8")
