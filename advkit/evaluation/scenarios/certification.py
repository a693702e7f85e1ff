"""Certification: no attacker moves; the model's vote on noisy copies proves a radius (Cohen et al., arXiv 1902.02918).

CERTIFY with one-sided Clopper-Pearson bounds. The class is chosen on draws of its own, so the vote that bounds its
probability is a fresh one. Records keep the counts; radii are made of them wherever they are shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from typing_extensions import override

from advkit.core.blame import MODEL, code_of
from advkit.core.lanes import Lanes
from advkit.core.noise import block_size
from advkit.core.protocols import Batch, Label, Outcome, Record, answer_shape
from advkit.core.rng import RowRng
from advkit.core.smoothing import hopeless, largest_radius, linf_radius, radius
from advkit.evaluation.certificates import ABSTAINED, ACCURACY, LABEL, LARGEST, RADIUS, figures
from advkit.evaluation.run.scenario import RowsApart
from advkit.evaluation.scenarios.base import (
    BaseScenario,
    Case,
    Companion,
    Engine,
    Headline,
    Records,
    Round,
    Section,
)
from advkit.models.smoothed import LEVELS, Smoothed, Tally
from advkit.threat_models.certified import Certified

LOOKS = (0.01, 0.1, 0.5)
"""Fractions of a sample's draws after which `early` asks whether there is still a prospect of a certificate."""


def certify_rows(case: Case, batch: Batch, lanes: Lanes) -> Round:
    """CERTIFY on every row of a batch, from the row's own stream of noise."""
    smoothed, threat = _parts(case)
    smoothed.check_grid(batch.x, batch.ids)
    keys = RowRng.from_ids(case.seed, batch.ids).at("certify").keys()
    labels = [None] * len(batch.ids) if batch.labels is None else batch.labels.tolist()
    records = [
        _certified(smoothed, threat, row, key, Record(name, LABEL, Outcome.WRONG, label=label))
        for name, row, key, label in zip(batch.ids, batch.x, keys.tolist(), labels, strict=True)
    ]
    return Round(records)


def _certified(smoothed: Smoothed, threat: Certified, row: Any, key: int, record: Record) -> Record:
    with code_of(MODEL):
        chosen = smoothed.tally(row, key, threat.n0, memory=threat.memory * 2**20)
        if not chosen.votes.any():
            nothing: dict[str, float] = {"n0": threat.n0, "non_finite": threat.n0}
            return replace(
                record, outcome=Outcome.NON_FINITE, notes=("clean_non_finite",), forwards=threat.n0, measures=nothing
            )
        best = int(chosen.votes.argmax())
        tally = _estimate(smoothed, threat, row, key, best)
    k, slack = int(tally.votes[best]), smoothed.noise.slack(row.numel())
    proven = radius(k, tally.draws, smoothed.settings.sigma, threat.alpha, slack)
    answer = best if proven > 0 else -1
    lost = threat.n0 - int(chosen.votes.sum()) + tally.draws - int(tally.votes.sum())
    return replace(
        record,
        outcome=Outcome.ROBUST if answer == record.label else Outcome.WRONG,
        clean=answer,
        adversarial=answer,
        reached=answer != record.label,
        forwards=threat.n0 + tally.draws,
        measures={
            "class": best,
            "k": k,
            "n": tally.draws,
            "n0": threat.n0,
            "k0": int(chosen.votes[best]),
            "sigma": smoothed.settings.sigma,
            "slack": slack,
            **({"non_finite": lost} if lost else {}),
        },
    )


def _estimate(smoothed: Smoothed, threat: Certified, row: Any, key: int, best: int) -> Tally:
    """The second vote, on blocks of noise behind those of the first."""
    size = block_size(row.device)
    block = -(-threat.n0 // size)
    ends = sorted({max(1, round(look * threat.n / size)) * size for look in LOOKS}) if threat.early else []
    total: Tally | None = None
    for end in (*(each for each in ends if each < threat.n), threat.n):
        drawn = 0 if total is None else total.draws
        part = smoothed.tally(row, key, end - drawn, first=block + drawn // size, memory=threat.memory * 2**20)
        total = part if total is None else total + part
        if end < threat.n and hopeless(int(total.votes[best]), end, threat.alpha):
            break
    assert total is not None
    return total


def _parts(case: Case) -> tuple[Smoothed, Certified]:
    assert isinstance(case.victim, Smoothed)
    assert isinstance(case.threat, Certified)
    return case.victim, case.threat


class Certification(BaseScenario, RowsApart):
    """A smoothed model's vote proves for every clean sample a radius within which no attacker changes its answer."""

    name: ClassVar[str] = "certification"

    @override
    def rows_apart(self, case: Case) -> bool:
        return True

    def accepts(self, case: Case) -> str | None:
        """None, or why this case can't be run; raises BadInput for samples that no certificate is about."""
        if not isinstance(case.threat, Certified):
            return f"certification needs the threat model certified, and this is {case.specs.get('threat_model')}"
        if answer_shape(case.task):
            return f"a certificate speaks of classes, and answers of the task {case.task.name} are samples: evaluate it"
        if not isinstance(case.victim, Smoothed):
            return (
                "only smoothed models are certified: name a defense that smooths, e.g. --defense smoothing:sigma=0.25"
            )
        if case.rule.kind != "untargeted":
            return f"a certificate speaks of the right class; leave --goal {case.rule.kind} out"
        if low := case.victim.low_precision:
            return f"certificates are computed in full precision and the model has {low} weights: load it in float32"
        if case.speed.switches:
            return f"certificates are computed in full precision: leave --speed {case.speed} out"
        first = next(iter(case.task.batches(min(64, case.n), n=min(64, case.n))))
        case.victim.check_grid(first.x, first.ids)
        return None

    def cells(self, case: Case) -> Sequence[Case]:
        """The certificates, which need no attack."""
        return [replace(case, attack=None, label=Label(LABEL))]

    def rounds(self, case: Case, engine: Engine, records: Records) -> Iterator[Round]:
        """A sample at a time: each is a batch of noisy copies by itself, and is on record when it is done."""
        (cell,) = self.cells(case)
        yield from engine.run(certify_rows, replace(cell, batch_size=1), records)

    def companions(self, case: Case) -> Sequence[Companion]:
        """The attack, where one is named: what it does at the radius that ranks, which certificates must survive."""
        if case.attack is None:
            return ()
        smoothed, threat = _parts(case)
        ball = threat.ball(LEVELS if smoothed.noise.sound else 0)
        if ball is None:
            return [Companion("empirical", "attack", None, without="no radius above 0 is asked for")]
        spec = f"l2:eps={ball.eps!r}" + (f",lattice={ball.lattice}" if ball.lattice else "")
        other = replace(case, threat=ball, specs={**case.specs, "threat_model": spec})
        return [
            Companion(
                "empirical",
                f"robust accuracy, {case.label} in L2 {ball.eps:g}",
                other,
                ("clean_accuracy", "robust_accuracy", "robust_accuracy_upper", "attack_success_rate", "abstained"),
                "empirical_robust_accuracy",
                prefix="empirical_",
                within=ball.eps,
            )
        ]

    def summarize(self, case: Case, records: Sequence[Record]) -> Section:
        """Certified accuracy by radius, average radius and abstentions, all from the counts."""
        smoothed, threat = _parts(case)
        metrics = figures(records, threat.radii, threat.alpha)
        cap = largest_radius(threat.n, smoothed.settings.sigma, threat.alpha)
        features = next(iter(case.task.batches(1))).x[0].numel()
        metrics[LARGEST] = {"value": cap, "unit": "L2"}
        mean = metrics[RADIUS]["value"]
        if mean is not None:
            metrics[f"{RADIUS}_linf"] = {"value": linf_radius(mean, features), "unit": "Linf"}
        arithmetic = "sound in floating point" if smoothed.noise.sound else "rounding left aside"
        sentence = (
            f"Proven, not attacked ({arithmetic}): the certified radius is {{{RADIUS}}} in the mean, and "
            f"{{{ABSTAINED}}} of the samples have no certificate."
        )
        return Section(
            metrics,
            Headline(ACCURACY, "Certified accuracy"),
            table=[
                ("certified", ACCURACY),
                ("average certified radius", RADIUS),
                ("abstention rate", ABSTAINED),
            ],
            sentence=sentence,
            figures=[{"name": "certified_curve"}],
            certified=True,
            flags=list(_flags(smoothed, threat, metrics, cap)),
        )


def _flags(smoothed: Smoothed, threat: Certified, metrics: dict[str, Any], cap: float) -> Iterator[dict[str, str]]:
    if not smoothed.noise.sound:
        yield {
            "id": "unsound_arithmetic",
            "severity": "info",
            "message": "the noise is normal in float32: rounding can make a certificate false (arXiv 2207.07209)",
        }
    if "non_finite_votes" in metrics:
        lost = metrics["non_finite_votes"]
        yield {
            "id": "non_finite_votes",
            "severity": "warning",
            "message": f"{lost['numerator']} of {lost['denominator']} votes were NaN or infinite: they count for none",
        }
    beyond = [each for each in threat.radii if each > cap]
    if beyond:
        yield {
            "id": "too_few_draws",
            "severity": "info",
            "message": f"{threat.n} draws certify no radius above {cap:.4g}, and {beyond[0]:g} is asked for",
        }
