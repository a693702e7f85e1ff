"""Attacks scaled to an equal budget: as many steps as a number of gradients per image pays for."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from advkit.attacks import ATTACKS
from advkit.core.errors import AdvkitError
from advkit.core.oracle import MeteredOracle
from advkit.core.protocols import Access, Attack, Stepped
from advkit.core.rng import RowRng
from advkit.core.state import frozen
from advkit.evaluation.matrix.participants import NamedAttack
from advkit.evaluation.matrix.plan import MatrixPlan
from advkit.evaluation.run.batch import own_randomness
from advkit.evaluation.run.case import parameters
from advkit.evaluation.sources import Participant

HOW = (
    "every attack's steps are scaled so that it asks for at most this many gradients per image, and a step's length so "
    "that the path stays as long; attacks without steps stay as they are"
)


@dataclass(frozen=True)
class Cost:
    """Gradients per image that an attack asks for once, and at each of its steps."""

    once: float
    step: float

    def of(self, steps: int) -> float:
        """What so many steps cost."""
        return self.once + self.step * steps


def scaled(plan: MatrixPlan, budget: int | str) -> tuple[int, tuple[NamedAttack, ...]]:
    """The budget ("auto": see `advkit.matrix`), and the attacks with as many steps as it pays for."""
    costs = [cost_of(plan, attack.attack) for attack in plan.attacks]
    number = _usual(plan.attacks, costs) if isinstance(budget, str) else budget
    return number, tuple(_fitted(attack, cost, number) for attack, cost in zip(plan.attacks, costs, strict=True))


def _usual(attacks: Sequence[NamedAttack], costs: Sequence[Cost | None]) -> int:
    """The median of what the attacks cost, or what one step of the dearest costs where that is more."""
    known = [(cost, _steps(attack.attack)) for attack, cost in zip(attacks, costs, strict=True) if cost is not None]
    if not known:
        return 1
    whole = statistics.median(cost.of(steps) for cost, steps in known if steps is not None)
    return round(max(whole, max(cost.of(1) for cost, _ in known)))


def _steps(attack: Attack) -> int | None:
    """How many steps an attack takes; None where it has none to count."""
    return attack.steps if isinstance(attack, Stepped) and isinstance(attack.steps, int) else None


def _fitted(named: NamedAttack, cost: Cost | None, budget: int) -> NamedAttack:
    before = _steps(named.attack)
    if before is None or cost is None:
        why = "it has no steps to scale" if before is None else "its cost could not be counted on any source"
        return replace(named, note=f"as it is: {why}")
    steps = max(1, int((budget - cost.once) / cost.step + 1e-9))
    note = f"{before} -> {steps} steps"
    if cost.of(steps) > budget + 1e-9:
        note += f"; one step costs {cost.of(1):g} gradients, more than the budget"
    change: dict[str, Any] = {"steps": steps}
    if isinstance(length := parameters(named.attack).get("step_size"), float):
        change["step_size"] = length * before / steps
    try:
        attack = _changed(named.attack, **change)
    except AdvkitError as error:
        return replace(named, note=f"as it is: {error}")
    return NamedAttack(named.name, attack, ATTACKS.label(attack, named.spec), note)


def _changed(attack: Any, **settings: Any) -> Any:
    """The attack, a frozen dataclass, with other settings."""
    return replace(attack, **settings)


def cost_of(plan: MatrixPlan, attack: Attack) -> Cost | None:
    """What an attack costs, counted on two rows of its dearest source; None without steps, or where it runs on none."""
    steps = _steps(attack)
    if steps is None:
        return None
    costs = []
    for source in plan.sources:
        try:
            few, many = (_asked(plan, source, _changed(attack, steps=n)) for n in (2, 4))
        except Exception:  # the cell itself will say what is wrong
            continue
        step = (many - few) / 2
        if step > 0:
            costs.append(Cost(few - 2 * step, step))
    return max(costs, key=lambda cost: cost.of(steps)) if costs else None


def _asked(plan: MatrixPlan, source: Participant, attack: Any) -> float:
    """Gradients of the row that asks for most."""
    case, rows = plan.case, plan.rows
    n = min(2, len(rows.ids))
    x, labels = rows.x[:n].to(case.device), rows.labels[:n].to(case.device)
    rng = RowRng.from_ids(0, rows.ids[:n], device=case.device).at("cost")
    goal = case.goal(labels, case.victim(x), rng.at("goal"), rows.ids[:n])
    model = source.model
    with frozen(*model.modules()), own_randomness(case.device, "cost"):
        oracle = MeteredOracle(model, n, Access.GRADIENTS, decides=False, data=case.data)
        attack(oracle, x, goal, case.threat, rng)
    return float(oracle.meter.backwards.max())
