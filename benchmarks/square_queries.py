"""Robust accuracy against queries: our Square under its scaled schedule beside the reference's under the published one.

python benchmarks/square_queries.py [--models SPEC ...] [--first 0] [--rows 300] [--seeds 2] [--eps 0.1]
"""

from __future__ import annotations

import argparse

import torch
from pyautoattack.square import SquareAttack

from advkit.attacks.query.square import Square
from advkit.core.oracle import MeteredOracle
from advkit.core.protocols import Access
from advkit.core.rng import RowRng
from advkit.core.state import frozen
from advkit.evaluation.api import resolve
from advkit.threat_models.goals.untargeted import Untargeted
from advkit.threat_models.lp import Linf

MODELS = (
    "zoo:fashion-mnist-cnn",
    "zoo:fashion-mnist-cnn-pgd_at",
    "zoo:fashion-mnist-public-cnn5",
    "zoo:fashion-mnist-public-mlp",
)
BUDGETS = (300, 1000, 1500, 2000, 5000)


class Rows:
    """The rows of a model's task that it gets right, and how many there are in all."""

    def __init__(self, spec: str, first: int, rows: int) -> None:
        case = resolve("pgd", "none", "fashion-mnist", spec, device="cpu")
        batch = next(iter(case.task.batches(first + rows)))
        part = slice(first, first + rows)
        self.model, x, labels = case.victim, batch.x[part], batch.labels[part]
        with torch.no_grad():
            right = (self.model(x).argmax(1) == labels).nonzero().squeeze(1)
        self.x, self.labels, self.total = x[right], labels[right], len(x)
        self.ids = tuple(batch.ids[first + row] for row in right.tolist())

    def standing(self, z: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.model(z).argmax(1) == self.labels


def ours(rows: Rows, eps: float, seed: int, queries: int, schedule: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries that each row took, and which rows still stand."""
    oracle = MeteredOracle(rows.model, len(rows.x), Access.SCORES)
    ball, attack = Linf(eps), Square(queries=queries, schedule=schedule)
    with frozen(*rows.model.modules()):
        z = attack(oracle, rows.x, Untargeted(rows.labels), ball, RowRng.from_ids(seed, rows.ids))
    assert ball.admits(z, rows.x).all()
    return oracle.meter.queries, rows.standing(z)


def theirs(rows: Rows, eps: float, seed: int, queries: int) -> tuple[torch.Tensor, torch.Tensor]:
    attack = SquareAttack(rows.model, norm="Linf", eps=eps, n_queries=queries, seed=seed, device="cpu")
    attack.init_hyperparam(rows.x)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        took, z = attack.attack_single_run(rows.x, rows.labels)
    return took, rows.standing(z)


def curve(rows: Rows, took: torch.Tensor, standing: torch.Tensor, budgets: list[int]) -> list[float]:
    """Robust accuracy had the run ended after each budget."""
    return [float((standing | (took > budget)).sum()) / rows.total for budget in budgets]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--budgets", nargs="+", type=int, default=BUDGETS, help="of our scaled schedule")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--published", action="store_true", help="ours under the published schedule too")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    seeds, most = range(settings.seeds), max(BUDGETS)
    print("| model | Square | " + " | ".join(f"{budget:,}" for budget in BUDGETS) + " |")
    print("|---|---|" + "---|" * len(BUDGETS), flush=True)
    for spec in settings.models:
        rows = Rows(spec, settings.first, settings.rows)
        sides = {"scaled": [curve_of_scaled(rows, settings, seed) for seed in seeds]}
        sides["reference"] = [curve(rows, *theirs(rows, settings.eps, seed, most), list(BUDGETS)) for seed in seeds]
        if settings.published:
            runs = [ours(rows, settings.eps, seed, most, "published") for seed in seeds]
            sides["published"] = [curve(rows, *run, list(BUDGETS)) for run in runs]
        for name, curves in sides.items():
            means = [sum(values) / len(values) for values in zip(*curves, strict=True)]
            cells = " | ".join("" if mean != mean else f"{mean:.4f}" for mean in means)
            print(f"| {spec} | {name} | {cells} |", flush=True)


def curve_of_scaled(rows: Rows, settings: argparse.Namespace, seed: int) -> list[float]:
    """One run per budget, because the schedule depends on it; not a number for budgets that are left out."""
    found = []
    for budget in BUDGETS:
        if budget not in settings.budgets:
            found.append(float("nan"))
            continue
        _, standing = ours(rows, settings.eps, seed, budget, "scaled")
        found.append(float(standing.sum()) / rows.total)
    return found


if __name__ == "__main__":
    main()
