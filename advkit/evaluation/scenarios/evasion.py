"""Evasion: the attacker changes inputs of a finished model; one attack or a suite, judged row by row.

A suite is a schedule of stages, and one attack is a suite of one.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from typing_extensions import override

from advkit.attacks import ATTACKS
from advkit.core.errors import UsageError
from advkit.core.protocols import (
    Attack,
    BringsAttacks,
    Compared,
    Graded,
    Label,
    Outcome,
    Record,
    SeeksNearest,
    Stage,
    Suite,
    Trains,
    TrainsApart,
    TrainsFront,
    Undefended,
    on_streams,
)
from advkit.defenses import DEFENSES
from advkit.evaluation.run.scenario import RowsApart, ended_by_stage
from advkit.evaluation.run.store import Store
from advkit.evaluation.scenarios.base import (
    BaseScenario,
    Case,
    Companion,
    Engine,
    Records,
    Round,
    Section,
    accuracy_section,
    lacks_access,
)
from advkit.evaluation.scenarios.grid import claimed
from advkit.evaluation.victims import training_rng
from advkit.threat_models import THREAT_MODELS

BASELINE = "baseline"
OBLIVIOUS = ("robust_accuracy", "robust_accuracy_upper", "attack_success_rate", "target_nll_after", "rejected")
"""What is taken over from the attacker who does not know of the defense, beside the figure of a rule that grades."""


_End = tuple[Outcome, float | None]
"""How a row ended under a stage, and its closeness."""


@dataclass(frozen=True)
class _Alone:
    """The schedule of a single attack."""

    attack: Attack
    name: str = ""
    share: float = 1.0
    by: str = "nearest"
    above: float = 0.0
    sentinel: bool = False
    when: str = "always"

    def takes(self, robust: int, /) -> int:
        return robust

    def alarmed(self, felled: Sequence[float], rows: int, /) -> bool:
        return False


def schedule(attack: Attack | None) -> Sequence[Stage]:
    """The stages of a suite; one stage without a name for any other attack."""
    if attack is None:
        return ()
    return attack.stages() if isinstance(attack, Suite) else (_Alone(attack),)


def labelled(case: Case, stage: Stage) -> Label:
    """The label of a stage's records."""
    return replace(case.label, stage=stage.name or case.label.stage)


def stages_ahead(case: Case, ended: Mapping[tuple[str, Outcome], int]) -> Iterator[tuple[Stage, int]]:
    """The stages that run, as far as these records tell, and how many rows each has in the end.

    ended: how many records of a stage ended how, as `ended_by_stage` counts them
    """
    met: Counter[str] = Counter()
    for (name, _), number in ended.items():
        met[name] += number
    stages = schedule(case.attack)
    escalated = any(labelled(case, stage).stage in met for stage in stages if stage.when == "escalated")
    robust = case.size
    for stage in stages:
        name = labelled(case, stage).stage
        own = met[name]
        if own or ((stage.when == "always" or escalated) and robust > stage.above * case.size):
            yield stage, max(own, stage.takes(robust))
        robust -= ended.get((name, Outcome.WRONG), 0) + ended.get((name, Outcome.BROKEN), 0)


class Evasion(BaseScenario, RowsApart):
    """The attacker changes inputs of a finished model; one attack or a suite of them, judged row by row."""

    name: ClassVar[str] = "evasion"

    def accepts(self, case: Case) -> str | None:
        """None, or why this case can't be run."""
        if case.attack is None:
            return "this threat model needs an attack: name one with --attack"
        if on_streams(case.attack):
            return f"{case.label} is an attack on streams; give it one with --threat-model online"
        if isinstance(case.attack, Suite) and isinstance(case.rule, Graded):
            return (
                f"the suite {case.label} leaves samples that are broken alone, and the goal {case.rule.kind} wants the "
                "worst answer on every sample: name one of its attacks, such as pgd"
            )
        if isinstance(case.rule, Graded) and case.speed.precision != "fp32":
            return (
                f"speed {case.speed.precision} finds smaller errors than fp32, and the goal {case.rule.kind} "
                "reports the error of the worst answer found: use fp32"
            )
        if isinstance(case.rule, Graded) and isinstance(case.attack, SeeksNearest):
            return (
                f"{case.label.attack} looks for the nearest point that reaches the goal and stops there, and the goal "
                f"{case.rule.kind} wants the worst answer within the budget: use another attack, such as pgd or apgd-ce"
            )
        if isinstance(case.attack, Suite) and case.surrogates and not lacks_access(case):
            return (
                f"the suite {case.label} follows rows by the victim's verdicts; under transfer name one of its attacks"
            )
        return lacks_access(case)

    @override
    def rows_apart(self, case: Case) -> bool:
        """Not where a suite's stages take some of the rows that are left, nor where calls are shared."""
        return not isinstance(case.attack, Suite) and not case.randomized and not case.together

    def expected(self, case: Case, records: Records) -> int:
        """How many records the finished case has: a suite's stages take what the last ones left.

        An escalation counts from its first record on.
        """
        return sum(rows for _, rows in stages_ahead(case, ended_by_stage(records)))

    def rounds(self, case: Case, engine: Engine, records: Records) -> Iterator[Round]:
        """Stage by stage over all rows; a stage takes rows that were robust after every stage before it.

        Which rows a stage takes follows from the records alone, so a resumed run takes the same.
        """
        order = case.ids()
        closeness = dict.fromkeys(order, math.inf)  # of the rows that are still robust
        escalated = False
        stages = schedule(case.attack)
        for number, stage in enumerate(stages, 1):
            if (stage.when == "escalated" and not escalated) or len(closeness) <= stage.above * len(order):
                continue
            taken = taken_by(stage, closeness, case.seed)
            # The search of a fast view is blind where its precision ends: those rows it is spared.
            blind = case.speed.resolution
            exact = frozenset(row for row in taken if closeness[row] <= blind) if blind else frozenset()
            cell = replace(case, attack=stage.attack, label=labelled(case, stage), exact=exact)
            rounds = engine.attack(cell, records, None if len(taken) == len(order) else taken)
            if number == len(stages):  # nobody asks what it left
                yield from rounds
                return
            ends: dict[str, _End] = {}
            for each in rounds:
                ends |= {record.id: (record.outcome, record.closeness) for record in each.records}
                yield each
            for row in taken - ends.keys():
                record = records[Store.key(cell.label, row)]
                ends[row] = record.outcome, record.closeness
            before = len(closeness)
            broken = _left_behind(closeness, {row: ends[row] for row in taken})
            escalated |= stage.alarmed(broken, before if stage.by == "nearest" else len(taken))

    def companions(self, case: Case) -> Sequence[Companion]:
        """The attacker who does not know of the defense, where it can be taken off, and the simpler defense that it is
        compared with; else what the defense claims.
        """
        if isinstance(case.victim, Undefended) and case.victim.undefended is not None and not case.surrogates:
            return [_oblivious(case, case.victim.undefended), *_baseline(case, case.victim.undefended)]
        claim = case.defense.claims if case.defense is not None else ""
        if not claim or not isinstance(THREAT_MODELS.build(claim), BringsAttacks):
            return ()
        name = DEFENSES.label(case.defense).partition(":")[0]
        try:
            other = claimed(case, claim, name)
            return [Companion("tapm", "best transfer attack (TAPM)", other, ("tapm_*",), "tapm_acc_best_attack")]
        except UsageError as error:
            return [Companion("tapm", claim, None, without=str(error))]

    def summarize(self, case: Case, records: Sequence[Record]) -> Section:
        """Accuracies and success rate, worst case over the attacks."""
        return accuracy_section(case, records)


def taken_by(stage: Stage, closeness: Mapping[str, float], seed: int) -> frozenset[str]:
    """The rows that a stage takes of the robust ones: all, the fraction nearest to the boundary, or a sample."""
    if stage.share >= 1:
        return frozenset(closeness)
    most = stage.takes(len(closeness))

    def rank(row: str) -> tuple[float, str]:
        word = hashlib.sha256(f"{seed}|{stage.name}|{row}".encode()).hexdigest()
        return (closeness[row] if stage.by == "nearest" else 0.0, word)

    return frozenset(sorted(closeness, key=rank)[:most])


def _left_behind(closeness: dict[str, float], ends: Mapping[str, _End]) -> list[float]:
    """Take the rows that a stage broke out of the robust ones, and note how near it came to the others.

    Returns the closeness at which the broken ones were before.
    """
    broken = []
    for row, (outcome, near) in ends.items():
        if outcome in (Outcome.WRONG, Outcome.BROKEN):
            before = closeness.pop(row)
            if outcome == Outcome.BROKEN:
                broken.append(before)
        elif near is not None:
            closeness[row] = min(closeness[row], near)
    return broken


def _oblivious(case: Case, undefended: Any) -> Companion:
    """The attack made on the model without its defense, by the same rules, and shown to the defended one.

    A suite follows rows by the verdicts of the model it attacks, so what stands in for it takes its place.
    """
    attack = case.attack.stand_in if isinstance(case.attack, Suite) else case.attack
    label = ATTACKS.label(attack) if isinstance(case.attack, Suite) else case.label.attack
    other = replace(
        case,
        attack=attack,
        label=Label(label, source="undefended"),
        surrogates=(("undefended", undefended),),
        specs={**case.specs, "attack": label},
    )
    title = "oblivious (defense unknown)"
    grade = case.rule.grades[:1] if isinstance(case.rule, Graded) else ()
    shown = f"oblivious_{grade[0] if grade else 'robust_accuracy'}"
    return Companion("oblivious", title, other, (*OBLIVIOUS, *grade), shown, prefix="oblivious_", knows_less=True)


def _baseline(case: Case, undefended: Any) -> list[Companion]:
    """The same attack on the model behind the simpler defense that a defense is compared with, where it names one."""
    defense: Any = case.defense
    if not isinstance(defense, Compared) or not defense.baseline:
        return []
    simpler: Any = DEFENSES.build(defense.baseline)
    spec = DEFENSES.label(simpler)
    if simpler.needs_data or isinstance(simpler, Trains | TrainsApart | TrainsFront):
        raise UsageError(f"baseline is {spec}, which trains; expected a defense that trains nothing, such as blur")
    victim = simpler.protect(undefended, None, training_rng(case.seed))
    other = replace(
        case,
        victim=victim,
        defense=simpler,
        specs={**case.specs, "defense": spec},
        randomized=victim.describe().randomized,
    )
    metrics = ("clean_accuracy", "robust_accuracy", "robust_accuracy_upper")
    title = f"baseline {spec}, defense known"
    return [Companion(BASELINE, title, other, metrics, f"{BASELINE}_robust_accuracy", prefix=f"{BASELINE}_")]
