"""Grid: every attack on every surrogate, each returned image shown to the victim (TAPM, arXiv 2310.17645).

The victim is asked only for verdicts. All rows are attacked, also those it gets wrong when clean, because the grid's
accuracies count every image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from typing_extensions import override

from advkit.attacks import ATTACKS
from advkit.core.protocols import BringsAttacks, Label
from advkit.evaluation.run.scenario import RowsApart
from advkit.evaluation.scenarios.base import (
    BaseScenario,
    Case,
    Companion,
    Engine,
    Record,
    Records,
    Round,
    Section,
    accuracy_section,
    parameters,
    rate,
)
from advkit.evaluation.sources import (
    cell_of,
    grid_of,
    participants_of,
    surrogates_of,
    weights_of,
    with_public_sources,
)
from advkit.threat_models import GOALS, THREAT_MODELS

KINDS = ("acc_avg", "acc_best_attack", "acc_per_sample")


class Grid(BaseScenario, RowsApart):
    """Every attack on every surrogate, each returned image shown to the victim (arXiv 2310.17645)."""

    name: ClassVar[str] = "grid"

    def accepts(self, case: Case) -> str | None:
        """None, or why this case can't be run."""
        if not case.surrogates:
            return f"no public surrogates for task {case.task.name}: name them with sources=..., e.g. zoo:NAME"
        own = weights_of(case.victim)
        if all(source.holds(own) for source in participants_of(case.surrogates)):
            names = ", ".join(name for name, _ in case.surrogates)
            return (
                f"every source ({names}) has the victim's own weights, so nothing would be a transfer attack: "
                "add a source with other weights, or attack the victim itself, e.g. --attack pgd"
            )
        return None

    @override
    def rows_apart(self, case: Case) -> bool:
        """Not where an attack takes all rows at once, nor where the victim's answers vary."""
        return not case.randomized and not any(cell.together for cell in self.cells(case))

    def cells(self, case: Case) -> list[Case]:
        """One evasion case per (surrogate, attack)."""
        threat = _brings(case)
        return [
            cell_of(case, attack, Label(name, source=source), [(source, model)], threat.cell(source))
            for source, model in case.surrogates
            for name, attack in threat.algorithms(ATTACKS.build)
        ]

    def expected(self, case: Case, records: Records) -> int:
        """How many records a finished case has."""
        return case.size * len(self.cells(case))

    def rounds(self, case: Case, engine: Engine, records: Records) -> Iterator[Round]:
        """Cell by cell."""
        for each in self.cells(case):
            yield from engine.attack(each, records)

    def companions(self, case: Case) -> list[Companion]:
        """The attack on the victim itself, in the same ball."""
        base = case.threat.describe()
        ball: Any = THREAT_MODELS.build(f"{str(base['norm']).lower()}:eps={base['eps']!r}")
        other = replace(
            case,
            threat=ball.bind(case.victim.space),
            label=Label(case.specs["attack"]),
            surrogates=(),
            specs={**case.specs, "threat_model": THREAT_MODELS.spec(ball)},
        )
        title = f"white box, {other.label}"
        return [Companion("white_box", title, other, prefix="white_box_", metric="white_box_robust_accuracy")]

    def summarize(self, case: Case, records: Sequence[Record]) -> Section:
        """Accuracies over the cells: average, best attack and per sample; sources seen and unseen apart."""
        section = accuracy_section(case, records)
        metrics = {**section.metrics, **grid_metrics(case, records)}
        words = section.wording
        table = [
            (words.clean, "clean_accuracy"),
            ("accuracy, average of the cells", "tapm_acc_avg"),
            ("accuracy, strongest cell", "tapm_acc_best_attack"),
            ("accuracy, every cell at once", "robust_accuracy"),
        ]
        threat = _brings(case)
        settings = {
            each.label: {
                **parameters(each.attack),
                "source": each.label.source,
                "seen": each.label.source in threat.seen,
            }
            for each in self.cells(case)
        }
        return replace(
            section,
            metrics=metrics,
            table=table,
            figures=[{"name": "transfer_grid"}, *section.figures],
            settings=settings,
        )


def claimed(case: Case, claim: str, defense: str) -> Case:
    """The case of a threat model that a defense was designed against, at the same eps and norm.

    Raises UsageError where it asks for public models and there are none.
    """
    base = case.threat.describe()
    norm = str(base.get("norm") or "Linf").lower()
    named: Any = THREAT_MODELS.build(claim)
    threat: Any = replace(named, eps=base.get("eps") or named.eps, norm=norm)
    threat = with_public_sources(threat, case.task, defense)
    return replace(
        case,
        threat=threat.bind(case.victim.space),
        rule=GOALS.build("untargeted"),
        label=Label(claim),
        surrogates=surrogates_of(threat, case.task, case.device),
        specs={**case.specs, "attack": "all", "threat_model": THREAT_MODELS.spec(threat)},
    )


def _brings(case: Case) -> BringsAttacks:
    assert isinstance(case.threat, BringsAttacks)
    return case.threat


def errors_of(case: Case, records: Sequence[Record]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[sources, attacks, rows]: 1 where the victim is wrong on what the cell made, NaN where there is no record."""
    names = [name for name, _ in case.surrogates]
    attacks = list(_brings(case).attack_names)
    place: dict[str, int] = {}
    for record in records:
        place.setdefault(record.id, len(place))
    errors = np.full((len(names), len(attacks), len(place)), np.nan)
    for record in records:
        wrong = record.adversarial != record.label
        errors[names.index(record.source), attacks.index(record.attack), place[record.id]] = wrong
    return errors


def grid_metrics(case: Case, records: Sequence[Record]) -> dict[str, Any]:
    """TAPM accuracies from the grid's records: average, best attack and per sample; seen and unseen sources apart."""
    threat = _brings(case)
    grid = grid_of(participants_of(case.surrogates), threat.attack_names, threat.seen, weights_of(case.victim))
    accuracies = grid.accuracies(errors_of(case, records))
    blocks = {"": accuracies["overall"], "_seen": accuracies["seen"], "_unseen": accuracies["unseen"]}
    blocks |= {f"_group_{name}": block for name, block in accuracies["by_group"].items()}
    metrics: dict[str, Any] = {}
    for suffix, block in blocks.items():
        for kind in KINDS if block is not None else ():
            value = rate(block[kind]["numerator"], block[kind]["denominator"], "all_samples")
            if kind == "acc_avg":
                # The same images stand in every cell: no binomial interval holds for their average.
                value["ci"] = None
            metrics[f"tapm_{kind}{suffix}"] = value
    return metrics
