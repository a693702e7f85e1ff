"""The page of every pair: `python scripts/every_pair.py FOLDER docs/every_pair.md`, FOLDER being that of a sweep.

Attacks are rows, defenses columns. A pair has its number, or the number of the reason why there is none.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from advkit.evaluation.sweep.api import Sweep
from advkit.evaluation.sweep.table import Row

HEAD = """# Every attack against every defense

Made by `python scripts/every_pair.py pairs docs/every_pair.md`; do not edit. The folder `pairs` is that of
`advkit sweep docs/every_pair.yaml --out pairs`.

Numbers are {metrics}, on {n} samples of `{task}`, of attacks and defenses
that the [grid](every_pair.yaml) has shortened to a few steps, queries, epochs and votes. They say that a pair fits,
and nothing of its strength. Where a pair has no number, the reason is named by its number below.
"""


def reason_of(row: Row) -> str:
    """Why a pair has no number, in words that all pairs of its kind share."""
    reason = f"{row.state}: {row.reason}" if row.state != "refused" else row.reason
    if row.state == "done":
        return f"{row.undecided} of {row.n} samples without a verdict" if row.undecided else f"no {row.metric}"
    for kind in ("attack", "defense"):
        spec = str(row.parts[kind])
        for text in (spec, spec.partition(":")[0]):
            reason = " ".join(kind.upper() if word.strip(",;") == text else word for word in reason.split())
    return reason


def page(rows: Sequence[Row]) -> str:
    """The whole page."""
    attacks = list(dict.fromkeys(str(row.parts["attack"]) for row in rows))
    defenses = list(dict.fromkeys(str(row.parts["defense"]) for row in rows))
    numbers = [row for row in rows if row.state == "done" and row.value is not None and not row.undecided]
    reasons = Counter(reason_of(row) for row in rows if row not in numbers)
    known = {reason: place for place, (reason, _) in enumerate(reasons.most_common(), 1)}
    held = {(str(row.parts["attack"]), str(row.parts["defense"])): row for row in rows}
    if len(held) != len(rows):
        raise SystemExit("the sweep has several cells for a pair: a page is of one task, model and seed")

    def cell(attack: str, defense: str) -> str:
        row = held[attack, defense]
        if row in numbers:
            assert row.value is not None
            return f"{row.value:.2g}"
        return f"({known[reason_of(row)]})"

    metrics = Counter(row.metric.replace("_", " ") for row in numbers)
    lines = [HEAD.format(
        metrics=" or ".join(f"{name} ({count} pairs)" for name, count in metrics.most_common()),
        n=max((row.n for row in numbers), default=0), task=rows[0].parts["task"],
    )]  # fmt: skip
    lines += [f"{len(rows)} pairs: {len(numbers)} numbers, {len(rows) - len(numbers)} reasons.", ""]
    lines += ["| | reason | pairs |", "|---|---|---|"]
    lines += [
        f"| ({known[each]}) | {each.replace('|', chr(92) + '|')} | {count} |" for each, count in reasons.most_common()
    ]
    lines += ["", "| | defense |", "|---|---|"]
    lines += [f"| d{place} | `{defense}` |" for place, defense in enumerate(defenses, 1)]
    lines += ["", f"| attack | {' | '.join(f'd{place}' for place in range(1, len(defenses) + 1))} |"]
    lines += [f"|{'---|' * (len(defenses) + 1)}"]
    lines += [f"| `{attack}` | {' | '.join(cell(attack, each) for each in defenses)} |" for attack in attacks]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    folder, file = sys.argv[1:]
    Path(file).write_text(page(Sweep.load(folder).rows), encoding="utf-8")
