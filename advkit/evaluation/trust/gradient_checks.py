"""Does the model hide its gradients? Checks with reference attacks on the victim, and of its derivatives.

The white-box runs are made on the victim whatever the case's threat model grants: they examine the model, not the
attacker.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from advkit.attacks import ATTACKS
from advkit.core.errors import AdvkitError, UsageError
from advkit.core.lanes import Lanes
from advkit.core.oracle import MeteredOracle
from advkit.core.protocols import Access, Label, Model, Outcome, Sized, Undefended
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.core.state import frozen
from advkit.evaluation.counts import was_right
from advkit.evaluation.run.batch import own_randomness
from advkit.evaluation.run.case import Case
from advkit.evaluation.trust import indicators
from advkit.evaluation.trust.context import (
    STEPS,
    STEPS_RANDOMIZED,
    Context,
    Result,
    Sweep,
    against,
    broken,
    changed,
    correct_rows,
    reference,
    rises,
    robust,
    run,
)
from advkit.evaluation.trust.diagnostics import FIRST_ROWS, black_box_beats_white_box, cheap
from advkit.evaluation.trust.findings import Finding, found, graded
from advkit.evaluation.trust.gradients import gradient_errors
from advkit.evaluation.trust.random_search import RandomSearch
from advkit.models import zoo
from advkit.threat_models.lp import L2, Linf

log = logging.getLogger("advkit")

UNSTABLE = 0.1
WEAKER = 0.02  # robust accuracy by which two losses, or one restart and ten, may differ
MISMATCH = 1e-2
MISMATCH_SINGLE = 0.1  # in float32, where a central difference is mostly round-off
SWEEP = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)


def first_look(context: Context) -> Result:
    """The cheap checks, with I1; a victim whose outputs vary counts as randomised from here on."""
    case = context.case
    first = next(iter(case.task.batches(FIRST_ROWS, n=case.n)))
    if first.labels is None:
        raise UsageError(f"the battery needs labels and the task {case.task.name} gives none")
    # The reference attack uses the victim's gradients, so they are checked whatever the case's attacker knows.
    probed = replace(case, threat=context.ball, surrogates=())
    result = Result(findings=cheap(probed, first.x.to(case.device), first.labels.to(case.device), first.ids))
    known = context.plus(result)
    return replace(
        result,
        indicators={"I1_unavailable_gradients": float(known.named("zero_gradient", "not_differentiable"))},
        case=replace(case, randomized=True) if known.named("randomized_output") else None,
    )


# Reference attacks of several kinds


def losses(context: Context) -> Result:
    """Whether the margin loss breaks more than cross-entropy."""
    runs = {"margin": run(reference(context)), "ce": run(reference(context, loss="ce"))}
    margin, ce = robust(runs["margin"]), robust(runs["ce"])
    accuracies = {"margin": context.fraction(margin), "ce": context.fraction(ce)}
    significant, difference = rises(margin, ce, context.case.n)
    findings = []
    if difference > WEAKER and not context.named("zero_gradient_ce_only", "zero_gradient", "not_differentiable"):
        evidence = (
            f"robust accuracy is {accuracies['margin']:.1%} under the margin loss and {accuracies['ce']:.1%} under "
            "cross-entropy"
        )
        severity = "warning" if significant else "info"
        findings.append(found("zero_gradient_ce_only", severity, evidence, difference, WEAKER))
    return Result(findings=findings, curves={"losses": accuracies}, white_box=runs)


def iterations(context: Context) -> Result:
    """Whether more steps break fewer rows."""
    most = STEPS_RANDOMIZED if context.case.randomized else STEPS
    runs = {1: run(reference(context, steps=1)), 10: run(reference(context, steps=10))}
    left = {steps: robust(records) for steps, records in {**runs, most: context.white_box["margin"]}.items()}
    curve = {"steps": [*left], "robust_accuracy": [context.fraction(rows) for rows in left.values()]}
    findings = []
    # The best of more noisy outputs is more often a lucky one: there more steps may look worse.
    pairs = () if context.case.randomized else ((1, 10), (10, most), (1, most))
    for few, many in pairs:
        significant, difference = rises(left[few], left[many], context.case.n)
        if significant:
            evidence = (
                f"robust accuracy is {_points(difference)} higher with {many} steps than with {few}: the gradient"
            )
            evidence += " misleads"
            findings = [found("iterative_weaker_than_single_step", "unreliable", evidence, difference, 0.0)]
            break
    white_box = {f"steps={steps}": records for steps, records in runs.items()}
    return Result(findings=findings, curves={"iterations": curve}, white_box=white_box)


def restarts(context: Context) -> Result:
    """Whether ten restarts break much more than one."""
    before = context.robust()
    result = Result(white_box={"restarts": run(reference(context, steps=20, restarts=10), before)})
    gained = (len(before) - len(context.plus(result).robust())) / context.case.n
    one = context.fraction(before)
    findings = []
    if gained >= WEAKER:
        evidence, advice = f"ten restarts break {gained:.1%} more of the samples than one", "use restarts=10 or more"
        findings.append(found("incomplete_optimization", "info", evidence, gained, WEAKER, "pgd", advice=advice))
    curve = {"restarts": [1, 10], "robust_accuracy": [one, one - gained]}
    return replace(result, findings=findings, curves={"restarts": curve})


# The radius


def eps_sweep(context: Context) -> Result:
    """Whether a larger radius leaves more rows robust."""
    sweep = _sweep(context)
    radii = [*sweep.robust]
    curve = {
        "eps": radii,
        "whole_box": sweep.whole,
        "robust_accuracy": [context.fraction(rows) for rows in sweep.robust.values()],
    }
    findings = []
    for less, more in pairwise(radii):
        significant, difference = rises(sweep.robust[less], sweep.robust[more], context.case.n)
        if significant:
            evidence = f"robust accuracy is {_points(difference)} higher at eps={more:.4g} than at eps={less:.4g}"
            findings = [found("non_monotone_in_eps", "unreliable", evidence, difference, 0.0)]
            break
    return Result(findings=findings, curves={"eps": curve}, sweep=sweep)


def _sweep(context: Context) -> Sweep:
    ball: Any = context.ball
    whole = _whole_box(context)
    radii = {ball.eps * factor for factor in SWEEP}
    if whole is not None:
        radii = {min(radius, whole) for radius in radii} | {whole}
    left = {
        radius: robust(run(reference(context, steps=20, ball=changed(ball, eps=radius))))
        if radius
        else correct_rows(context.white_box["margin"])
        for radius in sorted(radii)
    }
    if whole is not None:
        for loss in ("margin", "ce"):  # the few that are left meet a stronger attack before anything is said of them
            stronger = reference(context, restarts=5, loss=loss, ball=changed(ball, eps=whole))
            left[whole] -= broken(run(stronger, left[whole]))
    return Sweep(left, whole)


def _whole_box(context: Context) -> float | None:
    """The radius from which the ball around any row contains the whole box; None where the box has no end."""
    space = context.case.victim.space
    if not (isinstance(space, Box) and space.bounded):
        return None
    row = next(iter(context.case.task.batches(1, n=1))).x.to(context.case.device)
    low, high = space.bounds_like(row)
    return float(context.ball.distance(high.expand_as(row), low.expand_as(row)).max())


def unlimited_budget(context: Context) -> Result:
    """I6, of the reference attack: whether rows stay robust although all of the input may change."""
    sweep = context.sweep
    if sweep is None or sweep.whole is None:
        return Result()
    left, correct = len(sweep.robust[sweep.whole]), len(correct_rows(context.white_box["margin"]))
    failed = left / correct if correct else 0.0
    findings = []
    if failed and not context.named("zero_gradient", "not_differentiable", "randomized_output"):
        evidence = f"{left} of {correct} samples stay robust although a white-box attack may change all of the input"
        findings.append(found("unconstrained_attack_failure", graded(failed), evidence, failed, 0.0))
    return Result(findings=findings, indicators={"I6_unconstrained_attack_failure": failed})


# Attacks that need no gradients of the victim


def square(context: Context) -> Result:
    """Whether scores alone break rows that the gradients did not."""
    left = context.fraction(context.robust())
    if not isinstance(context.ball, Linf | L2):
        return Result(curves={"white_box": left})  # square has no patches for the other norms
    square_class: Any = ATTACKS.load("square")
    case = against(context, square_class(queries=context.queries), ball=changed(context.ball, access=Access.SCORES))
    findings, accuracy = _black_box(context, "square", case)
    measured = {"queries": context.queries, "robust_accuracy": accuracy}
    return Result(findings=findings, curves={"white_box": left, "square": measured})


def transfer(context: Context) -> Result:
    """Whether adversarial examples of an undefended model break rows that the victim's gradients did not."""
    surrogate = undefended(context.case) if context.surrogate is None else context.surrogate
    if surrogate is None:
        return Result()
    name = str(surrogate.describe().name)
    case = reference(context, steps=40)
    case = replace(case, surrogates=((name, surrogate),), label=replace(case.label, source=name))
    findings, accuracy = _black_box(context, "transfer", case)
    return Result(findings=findings, curves={"transfer": {"surrogate": name, "robust_accuracy": accuracy}})


def random_search(context: Context) -> Result:
    """Whether random points break rows that the gradients did not."""
    if context.case.randomized:
        return Result()  # of a thousand noisy outputs one is always wrong
    ball = changed(context.ball, access=Access.LABELS)
    search = RandomSearch(draws=context.draws)
    records = run(against(context, search, ball=ball, label=Label("random")), context.robust())
    lost = len(broken(records))
    measured = {"draws": context.draws, "rows": len(records), "broken": lost}
    findings = []
    if lost:
        fraction = lost / context.case.n
        evidence = f"{context.draws} random points of the ball break {lost} of {len(records)} samples called robust"
        severity = graded(fraction, 0.01)
        findings.append(found("random_search_finds_failures", severity, evidence, fraction, 0.0, "random"))
    return Result(findings=findings, curves={"random_search": measured})


def _black_box(context: Context, name: str, case: Case) -> tuple[list[Finding], float]:
    """Run a black-box attack where the white box failed; what it shows, and the robust accuracy after both."""
    left, randomized = context.robust(), context.case.randomized
    # A randomised victim's comparison needs the rows on which the black box is behind, too.
    records = run(case, None if randomized else left)
    white = [record for each in context.white_box.values() for record in each.values()]
    finding = black_box_beats_white_box(white, records.values(), name, randomized=randomized)
    return [finding] if finding else [], context.fraction(left - broken(records))


def undefended(case: Case) -> Model[Any, Any] | None:
    """The victim with its defense taken off, where that can be; else an undefended model of the task's zoo, or None."""
    if isinstance(case.victim, Undefended):
        model: Model[Any, Any] = case.victim.undefended
        return model
    own = case.victim.describe().state_sha256
    row_shape = tuple(next(iter(case.task.batches(1, n=1))).x.shape[1:])
    for card in zoo.find(case.task.name, "", "none"):
        try:
            candidate = zoo.load(card.name).to(case.device)
        except AdvkitError as error:
            log.warning("the zoo's %s can't be loaded: %s", card.name, error)
            continue
        shape = candidate.space.shape if isinstance(candidate.space, Sized) else None
        fits = shape is None or tuple(shape) == row_shape
        if fits and candidate.classes == case.task.classes and candidate.describe().state_sha256 != own:
            found: Model[Any, Any] = candidate
            return found
    return None


# Derivatives


@dataclass(frozen=True)
class _Probe:
    """Rows correct when clean, their goal under the margin loss, and their random streams."""

    x: Tensor
    goal: Any
    rng: RowRng


def _probe(context: Context, most: int) -> _Probe | None:
    """The first such rows; None where there are none."""
    case, records = context.case, context.white_box["margin"]
    ids: list[str] = []
    xs: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in case.task.batches(case.batch_size, n=case.n):
        usable = [
            i
            for i, row in enumerate(batch.ids)
            if was_right(records[row]) and records[row].outcome in (Outcome.ROBUST, Outcome.BROKEN)
        ]
        usable = usable[: most - len(ids)]
        if usable and batch.labels is not None:
            ids += [batch.ids[i] for i in usable]
            xs.append(batch.x[usable])
            labels.append(batch.labels[usable])
    if not ids:
        return None
    x, y = torch.cat(xs).to(case.device), torch.cat(labels).to(case.device)
    rng = RowRng.from_ids(case.seed, ids, device=case.device).at("diagnostics")
    clean = MeteredOracle(case.victim, len(x), Access.SCORES, lanes=Lanes.fitting(x))(x)
    return _Probe(x, case.goal(y, clean, rng.at("goal"), ids).under("margin"), rng)


def finite_differences(context: Context) -> Result:
    """Whether the gradients of eight rows agree with differences of the model's outputs."""
    if context.case.randomized or context.named("zero_gradient", "not_differentiable"):
        return Result()
    victim, space = context.case.victim, context.case.victim.space
    view = victim.attacker_view()
    with frozen(*victim.modules()), own_randomness(context.case.device, context.case.seed, "differences"):
        probe = _probe(context, 8)
        if probe is None:
            return Result()
        width = 1.0
        z = context.ball.sample(probe.x, probe.rng.at("start"))
        if isinstance(space, Box) and space.bounded:
            low, high = space.bounds_like(z)
            width = float((high - low).max())
            z = z + 0.01 * ((low + high) / 2 - z)  # off the bounds, where a model that clamps has a kink
        errors, double = gradient_errors(view, victim, z, probe.goal, probe.rng, width)
    threshold = MISMATCH if double else MISMATCH_SINGLE
    # The median: a point whose step crosses a kink of the model proves nothing.
    middle = float(errors.median())
    findings = []
    if middle > threshold:
        evidence = f"autograd and central differences disagree: median relative error {middle:.2g} of {len(errors)}"
        declared = view is not victim
        evidence += "; the model declares an attacker view, which may" if declared else ""
        severity = "info" if declared else "warning"
        findings.append(found("gradient_mismatch", severity, evidence, middle, threshold))
    measured = {"relative_error": errors.tolist(), "float64": double}
    return Result(findings=findings, curves={"gradient": measured})


def stability(context: Context) -> Result:
    """I2: how much small noise on clean inputs changes the margin."""
    case = context.case
    with frozen(*case.victim.modules()), own_randomness(case.device, case.seed, "stability"):
        probe = _probe(context, case.n)
        if probe is None:
            return Result()
        change = _relative_change(case, probe)
    change = change[torch.isfinite(change)]
    value = float(change.mean()) if len(change) else 0.0
    findings = []
    # A model that is a staircase jumps by nature, and has been called one.
    if value > UNSTABLE and not context.named("zero_gradient", "not_differentiable"):
        evidence = f"noise of at most 4/255 of the input's range changes the margin by {value:.0%} on average"
        findings.append(found("unstable_predictions", "warning", evidence, value, UNSTABLE))
    return Result(findings=findings, indicators={"I2_unstable_predictions": value})


def _relative_change(case: Case, probe: _Probe) -> Tensor:
    x, space = probe.x, case.victim.space
    bounded = isinstance(space, Box) and space.bounded
    width = space.extent[1] - space.extent[0] if bounded else 1.0
    oracle = MeteredOracle(case.victim, len(x), Access.SCORES, lanes=Lanes.fitting(x))
    repeats = case.draws if case.randomized else 1

    def loss(z: Tensor) -> Tensor:
        return torch.stack([probe.goal.loss(oracle(z)).double() for _ in range(repeats)]).mean(0)

    base = loss(x)
    perturbed = []
    for draw in range(indicators.DRAWS):
        z = x + (probe.rng.at("noise", draw).uniform(x) - 0.5) * indicators.RADIUS * width
        perturbed.append(loss(space.clamp(z) if bounded else z))
    return indicators.unstable_predictions(base, torch.stack(perturbed))


def _points(fraction: float) -> str:
    return f"{100 * fraction:.1f} percentage points"
