"""Attacks by decisions alone beside foolbox and ART: the median least distance after so many queries, and CPU time.

python benchmarks/decision_attacks.py [--models SPEC ...] [--only TEXT ...] [--rows 50] [--budgets 1000 5000]

Every question of an attack is counted for the row that it is about, and the nearest point that was misclassified so far
is kept, for ours and for peers alike: no package's own word counts. Peers have their default settings and are stopped
at the budget (ART's GeoDA plans for it, and takes no fewer than 500). Rows are those that the model gets right and that
uniform noise does not land on: some peers have no other start. Parts of the rows are attacked in turn by ours and by
the peer, so that CPU times see the same machine.
"""

from __future__ import annotations

import argparse
import contextlib
import time
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from advkit.attacks import ATTACKS
from advkit.attacks.peers import foreign_randomness
from advkit.core.oracle import Lanes, MeteredOracle, frozen
from advkit.core.protocols import Access
from advkit.core.rng import RowRng
from advkit.evaluation.api import resolve
from advkit.threat_models import THREAT_MODELS
from advkit.threat_models.goals.untargeted import Untargeted

MODELS = ("zoo:fashion-mnist-cnn", "zoo:fashion-mnist-cnn-pgd_at")
PARTS = 2
LINES = (
    ("boundary", "minimum-l2", ("foolbox:BoundaryAttack", "art:BoundaryAttack")),
    ("hopskipjump", "minimum-l2", ("foolbox:HopSkipJumpAttack", "art:HopSkipJump")),
    ("hopskipjump", "minimum-linf", ("foolbox:HopSkipJumpAttack", "art:HopSkipJump")),
    ("sign_opt", "minimum-l2", ("art:SignOPTAttack",)),
    ("sign_opt", "minimum-linf", ()),
    ("geoda", "minimum-l2", ("art:GeoDA",)),
    ("geoda", "minimum-linf", ("art:GeoDA",)),
    ("geoda", "minimum-l1", ("art:GeoDA",)),
)


class Spent(Exception):
    """A peer has asked as often as it may."""


class Tape(nn.Module):
    """A model that counts the questions of every row and keeps its nearest misclassified point's distance."""

    def __init__(self, model: Any, x: Tensor, labels: Tensor, threat: Any, budget: int) -> None:
        super().__init__()
        self.model, self.x, self.labels, self.threat, self.budget = model, x, labels, threat, budget
        self.row: int | None = None
        self.queries = [0] * len(x)
        self.best = torch.full((len(x),), torch.inf)

    def forward(self, z: Tensor) -> Tensor:
        with torch.no_grad():
            answer: Tensor = self.model(z)
        of = torch.arange(len(z)) if self.row is None else torch.full((len(z),), self.row)
        away = self.threat.distance(z, self.x[of]).float()
        away = torch.where(answer.argmax(1) != self.labels[of], away, torch.inf)
        for row, value in zip(of.tolist(), away.tolist(), strict=True):
            if self.queries[row] < self.budget:
                self.queries[row] += 1
                self.best[row] = min(float(self.best[row]), value)
        if all(self.queries[row] >= self.budget for row in set(of.tolist())):
            raise Spent
        return answer


def right_rows(spec: str, rows: int) -> tuple[Any, Tensor, Tensor, list[str]]:
    case = resolve("pgd", "none", "fashion-mnist", spec, device="cpu")
    batch = next(iter(case.task.batches(2 * rows)))
    noise = torch.rand(16, *batch.x.shape[1:], generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        landed = case.victim(noise).argmax(1).mode().values
        fine = (case.victim(batch.x).argmax(1) == batch.labels) & (batch.labels != landed)
    kept = fine.nonzero().squeeze(1)[:rows]
    return case.victim, batch.x[kept], batch.labels[kept], [batch.ids[row] for row in kept.tolist()]


def ours(name: str, threat: Any, model: Any, x: Tensor, labels: Tensor, ids: list[str], budget: int) -> Tensor:
    oracle = MeteredOracle(model, len(x), Access.LABELS, budget, lanes=Lanes.fitting(x))
    with frozen(*model.modules()):
        z = ATTACKS.build(name)(oracle, x, Untargeted(labels), threat, RowRng.from_ids(0, ids))
        assert int(oracle.meter.queries.max()) <= budget
        with torch.no_grad():
            fooled = model(z).argmax(1) != labels
    return torch.where(fooled, threat.distance(z, x).float(), torch.inf)


def theirs(name: str, norm: str, tape: Tape) -> Tensor:
    package, _, kind = name.partition(":")
    x, labels = tape.x, tape.labels
    with foreign_randomness(0), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if package == "foolbox":
            import foolbox

            own = {"constraint": norm} if kind == "HopSkipJumpAttack" else {}
            model = foolbox.PyTorchModel(tape.eval(), bounds=(0, 1), device="cpu")
            tape.queries, tape.best = [0] * len(x), torch.full_like(tape.best, torch.inf)  # its look at the model
            with contextlib.suppress(Spent):
                getattr(foolbox.attacks, kind)(**own)(
                    model, x, foolbox.criteria.Misclassification(labels), epsilons=None
                )
            return tape.best
        if not hasattr(np, "mat"):  # ART's GeoDA was written before NumPy 2
            np.asmatrix = np.asmatrix
        from art.attacks import evasion
        from art.estimators.classification import PyTorchClassifier

        size: Any = {"l1": 1, "l2": 2, "linf": np.inf}[norm]
        own = {
            "BoundaryAttack": {"targeted": False},
            "HopSkipJump": {"targeted": False, "norm": size, "max_iter": 1000},
            "SignOPTAttack": {"targeted": False, "query_limit": 10**9},
            "GeoDA": {"norm": size, "max_iter": tape.budget},
        }[kind]
        wrapped = PyTorchClassifier(
            tape.eval(), nn.CrossEntropyLoss(), tuple(x.shape[1:]), 10, clip_values=(0, 1), device_type="cpu"
        )
        attack = getattr(evasion, kind)(wrapped, verbose=False, **own)
        for row in range(len(x)):
            tape.row = row
            with contextlib.suppress(Spent):
                attack.generate(x[row : row + 1].numpy(), y=labels[row : row + 1].numpy())
    return tape.best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--only", nargs="*", default=[], help="parts of the names of attacks and threat models")
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--budgets", nargs="*", type=int, default=[1000, 5000])
    settings = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | threat model | attack | queries | median distance | of ours | CPU of ours |")
    print("|---|---|---|---|---|---|---|")
    for spec in settings.models:
        model, x, labels, ids = right_rows(spec, settings.rows)
        parts = torch.arange(len(x)).tensor_split(PARTS)
        for name, threat_name, peers in LINES:
            if settings.only and not any(text in f"{name} {threat_name}" for text in settings.only):
                continue
            for budget in settings.budgets:
                threat: Any = THREAT_MODELS.build(f"{threat_name},access=labels".replace(",", ":", 1)).bind(model.space)
                found: dict[str, list[Tensor]] = {each: [] for each in (name, *peers)}
                spent = dict.fromkeys(found, 0.0)
                for part in parts:
                    for each in found:
                        start = time.process_time()
                        if each == name:
                            own = [ids[row] for row in part.tolist()]
                            away = ours(name, threat, model, x[part], labels[part], own, budget)
                        else:
                            tape = Tape(model, x[part], labels[part], threat, budget)
                            away = theirs(each, threat_name.removeprefix("minimum-"), tape)
                        spent[each] += time.process_time() - start
                        found[each].append(away)
                median = {each: float(torch.cat(away).median()) for each, away in found.items()}
                for each in found:
                    print(
                        f"| {spec} | {threat_name} | {each} | {budget} | {median[each]:.4f} | "
                        f"{median[each] / median[name]:.3f} | {spent[each] / spent[name]:.2f}x |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
