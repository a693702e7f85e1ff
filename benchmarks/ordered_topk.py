"""Ordered top-K attacks side by side: success rates and energies by K, budget and method, as one command.

    python benchmarks/ordered_topk.py                                     # digits, a minute or two
    python benchmarks/ordered_topk.py --task imagenet-samples --model efficientnet-lite0 --k 1 5 10 15 20 --out TABLE

Every cell is one evaluation by the harness, kept in a folder beside TABLE.json and not run again when the command is.
Success (ASR) is the share of rightly read rows whose returned input shows the wanted order when the victim is asked
again. Energies are means over successes, and once more over the rows on which all methods succeed, because a method
that only breaks the easy rows looks cheap. With several seeds the table gives their mean and the range of ASR; the JSON
file also gives the best and the worst seed with their energies. With several --lr or --coefficient every combination is
tried on the first seed, and the one of the highest 100 ASR - L2, the rule of arXiv 2312.11510, makes the table.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import time
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

import advkit
from advkit.core.protocols import Outcome, Record
from advkit.evaluation.counts import contested, was_right
from advkit.evaluation.inputs import pick_device, task_of
from advkit.evaluation.run.store import read_records
from advkit.evaluation.victims import protected

METHODS = ("quadattack", "cw_topk", "ad_topk")
NORMS = ("l1", "l2", "linf")
DIGITS = {
    "model": "mlp:hidden=64+64",
    "defense": "none:recipe=[epochs=60,lr=0.003,validation=0,select=last]",
    "n": 206,
    "k": [1, 3, 5, 7, 9],
}


@dataclass(frozen=True)
class Cell:
    """One evaluation: the rows it attacked, those that fell with their energies, and what it took."""

    method: str
    k: int
    budget: str
    seed: int
    attack: str
    attacked: int
    energies: dict[str, dict[str, float]] = field(repr=False)  # row -> norm -> value, of the rows that fell
    gradients: float
    seconds: float

    @property
    def asr(self) -> float:
        return len(self.energies) / self.attacked if self.attacked else float("nan")

    def energy(self, norm: str, rows: set[str] | None = None) -> float | None:
        values = [found[norm] for row, found in self.energies.items() if rows is None or row in rows]
        return float(np.mean(values)) if values else None

    @property
    def score(self) -> float:
        """100 ASR - mean L2: how the published tables choose learning rate and coefficient."""
        return 100 * self.asr - (self.energy("l2") or 0.0)

    def figures(self) -> dict[str, Any]:
        plain = {key: value for key, value in asdict(self).items() if key != "energies"}
        return {**plain, "asr": self.asr, **{norm: self.energy(norm) for norm in NORMS}}


def evaluated(given: argparse.Namespace, attack: str, k: int, seed: int) -> tuple[list[Record], float]:
    """The records of one evaluation, from its folder where it was run before; seconds only where it was not."""
    asked = {
        "task": given.task,
        "threat_model": "minimum-l2",
        "goal": f"ordered-topk:k={k}",
        "n": given.n,
        "seed": seed,
        **({"speed": given.speed} if given.speed else {}),
    }
    victim = given.victim.describe().state_sha256
    word = hashlib.sha256(json.dumps([attack, victim, asked], sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(given.runs) / f"{attack.partition(':')[0]}-k{k}-{word}"
    begun = time.perf_counter()
    if not (folder / "report.json").exists():
        settings = {"device": given.device, "batch_size": given.batch_size}
        advkit.evaluate(attack, model=given.victim, **asked, **settings, out=folder)
        (folder / "seconds").write_text(str(time.perf_counter() - begun), encoding="utf-8")
    timed = folder / "seconds"
    return read_records(folder / "records.jsonl"), float(timed.read_text()) if timed.exists() else float("nan")


def cell(given: argparse.Namespace, method: str, k: int, budget: str, seed: int, settings: dict[str, Any]) -> Cell:
    """One cell of the table."""
    words = [f"budget={budget}", f"k={k}", *(f"{name}={value}" for name, value in settings.items() if value != "")]
    attack = f"{method}:{','.join([*words, *given.settings])}"
    records, seconds = evaluated(given, attack, k, seed)
    # Reports count the rows that are misread untouched, too; the published tables do not.
    rows = [r for r in records if was_right(r) and contested(r) and r.outcome != Outcome.NON_FINITE]
    fell = {record.id: record.measures for record in rows if record.outcome == Outcome.BROKEN}
    cost = float(np.mean([record.backwards for record in rows])) if rows else 0.0
    return Cell(method, k, budget, seed, attack, len(rows), fell, cost, seconds)


def chosen(given: argparse.Namespace, method: str, k: int, budget: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The settings of the highest score on the first seed, and what every combination tried there scored."""
    grid = [{"lr": lr, "coefficient": c} for lr, c in product(given.lr or [""], given.coefficient or [""])]
    if len(grid) == 1:
        return grid[0], []
    tried = [(cell(given, method, k, budget, given.seeds[0], settings), settings) for settings in grid]
    best = max(tried, key=lambda pair: pair[0].score)
    return best[1], [{**settings, "asr": found.asr, "l2": found.energy("l2")} for found, settings in tried]


def mean(values: list[float | None]) -> float | None:
    held = [value for value in values if value is not None]
    return float(np.mean(held)) if held else None


def rows_of(given: argparse.Namespace, k: int, budget: str) -> list[dict[str, Any]]:
    """The rows of one K and budget, one per method, over all seeds."""
    found: dict[str, list[Cell]] = {}
    settings, tried = {}, {}
    for method in given.methods:
        settings[method], tried[method] = chosen(given, method, k, budget)
        found[method] = [cell(given, method, k, budget, seed, settings[method]) for seed in given.seeds]
    common = [set.intersection(*(set(found[m][i].energies) for m in given.methods)) for i in range(len(given.seeds))]
    rows = []
    for method in given.methods:
        cells = found[method]
        best, worst = max(cells, key=lambda c: c.asr), min(cells, key=lambda c: c.asr)
        rows.append(
            {
                "k": k,
                "budget": budget,
                "method": method,
                "settings": {**settings[method], "more": given.settings},
                "tried": tried[method],
                "attacked": [c.attacked for c in cells],
                "asr": {"mean": mean([c.asr for c in cells]), "best": best.asr, "worst": worst.asr},
                "energies": {norm: mean([c.energy(norm) for c in cells]) for norm in NORMS},
                "common": {
                    "rows": sum(map(len, common)),
                    **{norm: mean([c.energy(norm, on) for c, on in zip(cells, common, strict=True)]) for norm in NORMS},
                },
                "best": best.figures(),
                "worst": worst.figures(),
                "seeds": [c.figures() for c in cells],
                "gradients": mean([c.gradients for c in cells]),
                "seconds": mean([c.seconds for c in cells]),
            }
        )
        logging.info("%s", line(rows[-1]))
    return rows


def line(row: dict[str, Any]) -> str:
    """A row of the Markdown table."""

    def number(value: float | None, digits: int = 2) -> str:
        return "-" if value is None or value != value else f"{value:.{digits}f}"

    asr, energies, common = row["asr"], row["energies"], row["common"]
    spread = f" [{number(asr['worst'])}, {number(asr['best'])}]" if len(row["seeds"]) > 1 else ""
    columns = (
        row["k"],
        row["budget"],
        row["method"],
        number(asr["mean"], 3) + spread,
        number(energies["l1"]),
        number(energies["l2"]),
        number(energies["linf"], 3),
        f"{number(common['l2'])} ({common['rows']})",
        number(row["gradients"], 0),
        number(row["seconds"], 1),
    )
    return f"| {' | '.join(map(str, columns))} |"


def markdown(given: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    head = (
        f"Task {given.task}, model {given.model}, rows attacked {rows[0]['attacked']} (seeds {given.seeds}).\n\n"
        "| K | budget | method | ASR | L1 | L2 | Linf | L2 on common rows | gradients per row | seconds |\n"
        "|---|---|---|---|---|---|---|---|---|---|\n"
    )
    return head + "\n".join(line(row) for row in rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="digits")
    parser.add_argument("--model", default="", help=f"default on digits: {DIGITS['model']}, trained when first needed")
    parser.add_argument("--defense", default="")
    parser.add_argument("--n", type=int, default=None, help="rows (default: 206 on digits, else all)")
    parser.add_argument("--k", type=int, nargs="+", default=[])
    parser.add_argument("--budgets", nargs="+", default=["1x60", "9x60"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--lr", type=float, nargs="*", default=[])
    parser.add_argument("--coefficient", type=float, nargs="*", default=[])
    parser.add_argument("--settings", nargs="*", default=[], help="more settings of every attack, e.g. expand=true")
    parser.add_argument("--speed", default="", help="e.g. channels_last; successes are verified without")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--out", default="ordered_topk", help="writes OUT.json, OUT.md and the folder OUT-runs")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    on_digits = given.task == "digits"
    given.model = given.model or (DIGITS["model"] if on_digits else None)
    given.defense = given.defense or (DIGITS["defense"] if on_digits and given.model == DIGITS["model"] else "none")
    given.k = given.k or (DIGITS["k"] if on_digits else [1, 5, 10, 15, 20])
    given.n = given.n or (DIGITS["n"] if on_digits else None)
    given.runs = f"{given.out}-runs"
    # One victim for all seeds: they change the targets and the starts.
    given.device = pick_device(given.device)
    given.victim = protected(given.model, given.defense, task_of(given.task), device=given.device).model
    rows = [row for k in given.k for budget in given.budgets for row in rows_of(given, k, budget)]
    held = {"task": given.task, "model": given.model, "defense": given.defense, "seeds": given.seeds, "rows": rows}
    Path(f"{given.out}.json").write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    Path(f"{given.out}.md").write_text(markdown(given, rows), encoding="utf-8")
    print(markdown(given, rows))


if __name__ == "__main__":
    main()
