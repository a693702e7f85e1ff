"""Reliability diagnostics: what makes a robust accuracy untrustworthy, found before, after and beside an evaluation.

`cheap` runs always (the checks of AutoAttack, arXiv 2003.01690, and some more), `after` reads the records; what is
expensive stands in `battery`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from advkit.core.errors import AdvkitError
from advkit.core.oracle import Lanes, MeteredOracle, frozen
from advkit.core.protocols import Access, Label, Outcome, Record, Rng, Stage, Suite
from advkit.core.rng import RowRng
from advkit.core.spaces import Box, Transcripts
from advkit.evaluation.report.counts import by_label
from advkit.evaluation.run.batch import attacked_model, own_randomness
from advkit.evaluation.run.case import Case, parameters
from advkit.evaluation.run.judge import decide, finite
from advkit.evaluation.stats import mcnemar_exact
from advkit.evaluation.trust.advice import ADVICE

SEVERITIES = ("info", "warning", "unreliable")
FIRST_ROWS = 64
REPEATS = 5
SPREAD = 1e-4  # L2 distance between L2-normalised answers from which a victim is randomised
PROBABILITY = 1e-5
BETTER = 0.002  # share of rows by which a black-box attack may be ahead by chance
GROSS = 0.05  # share of rows from which a fault is no longer a matter of single rows

Progress = Callable[[str, int, int], None]  # what runs now, steps done, steps in all


@dataclass(frozen=True)
class Finding:
    """Something that bears on whether a number can be trusted.

    id:        one of the report schema's flag ids
    severity:  "info", "warning" or "unreliable"
    message:   what was seen
    advice:    what to do about it
    value:     the figure measured; None where there is none
    threshold: what it was held against
    attack:    the attack it belongs to; empty where it is the model's
    """

    id: str
    severity: str
    message: str
    advice: str = ""
    value: float | None = None
    threshold: float | None = None
    attack: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The report's flag; the advice ends the message."""
        flag: dict[str, Any] = {
            "id": self.id,
            "severity": self.severity,
            "message": f"{self.message} ({self.advice})" if self.advice else self.message,
        }
        for name in ("value", "threshold"):
            number = getattr(self, name)
            if number is not None and math.isfinite(number):
                flag[name] = float(number)
        if self.attack:
            flag["attack"] = self.attack
        return flag


def found(
    id: str,
    severity: str,
    message: str,
    value: float | None = None,
    threshold: float | None = None,
    attack: str = "",
    advice: str = "",
) -> Finding:
    """A finding with its id's usual advice where none is said."""
    return Finding(id, severity, message, advice or ADVICE[id], value, threshold, attack)


def graded(share: float, gross: float = GROSS) -> str:
    """A fault of single rows is a warning; a share of `gross` and more makes the number unreliable."""
    return "unreliable" if share >= gross else "warning"


def merge(findings: Iterable[Finding]) -> list[Finding]:
    """One finding per id and attack, the gravest, in the order of first appearance."""
    kept: dict[tuple[str, str], Finding] = {}
    for finding in findings:
        key = (finding.id, finding.attack)
        if key not in kept or SEVERITIES.index(finding.severity) > SEVERITIES.index(kept[key].severity):
            kept[key] = finding
    return list(kept.values())


# Before the run


def cheap(case: Case, x: Tensor, labels: Tensor) -> list[Finding]:
    """Checks on the first batch (at most 64 rows used) for at most 5 forwards and 2 forwards with backward.

    x: [B, ...] in the victim's space; labels: long [B]. Deterministic; the caller's randomness and the model are given
    back as they were. The gradient checks run where the threat model grants the victim's gradients.
    """
    tops = list(case.victim.modules())
    layers = sum(module.training for top in tops for module in top.modules())
    if layers:
        # Nothing else is asked: a forward in training mode would also move the batch statistics.
        seen = f"the model is in training mode ({layers} modules): dropout and batch statistics answer"
        return [found("training_mode", "unreliable", seen, float(layers), 0.0)]
    x, labels = x[:FIRST_ROWS], labels[:FIRST_ROWS]
    if not len(x):
        return []
    with frozen(*tops), own_randomness(case.device, case.seed, "diagnostics"):
        oracle = MeteredOracle(case.victim, len(x), Access.SCORES, lanes=Lanes.fitting(x))
        with _autograd_calls() as calls:
            answers = [oracle(x)]
        answers += [oracle(x) for _ in range(REPEATS - 1)]
        findings = _randomized(case, answers, labels) + _probabilities(answers[0])
        if calls:
            seen = f"the model calls {', '.join(sorted(set(calls)))} while it answers"
            findings.append(found("inference_time_optimization", "warning", seen, float(len(calls)), 0.0))
        if _gives_gradients(case):
            findings += _gradients(case, x, labels, answers[0]) + _replaced(case)
    return findings + _precision(tops, answers[0]) + _classes(case) + _preprocessing(case, answers[0], labels)


@contextmanager
def _autograd_calls() -> Iterator[list[str]]:
    """Names of the autograd entry points called inside the block."""
    calls: list[str] = []
    places: list[tuple[Any, str, str]] = [
        (torch.autograd, "grad", "torch.autograd.grad"),
        (torch.autograd, "backward", "torch.autograd.backward"),
        (torch.Tensor, "backward", "Tensor.backward"),
    ]
    originals = [getattr(owner, attribute) for owner, attribute, _ in places]

    def counting(original: Any, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return original(*args, **kwargs)

        return call

    for (owner, attribute, name), original in zip(places, originals, strict=True):
        setattr(owner, attribute, counting(original, name))
    try:
        yield calls
    finally:
        for (owner, attribute, _), original in zip(places, originals, strict=True):
            setattr(owner, attribute, original)


def _randomized(case: Case, answers: Sequence[Tensor], labels: Tensor) -> list[Finding]:
    sane = torch.stack([finite(answer) for answer in answers]).all(0)
    rows = [answer[sane] for answer in answers]
    correct = {int((decide(answer) == labels[sane]).sum()) for answer in rows}
    spread = 0.0
    if rows[0].ndim > 1 and rows[0].is_floating_point() and len(rows[0]):
        units = [nn.functional.normalize(answer.double().flatten(1), dim=1) for answer in rows]
        spread = max(float((one - other).norm(dim=1).max()) for i, one in enumerate(units) for other in units[:i])
    if len(correct) > 1 or spread > SPREAD:
        # An attack that averages over draws, or a view made for attackers, has an answer to this.
        averaged = _setting(case, "eot", 1) > 1 or case.victim.attacker_view() is not case.victim
        few, many = min(correct), max(correct)
        seen = f"the same inputs get different answers ({few} to {many} of {len(rows[0])} right in {REPEATS} forwards)"
        return [found("randomized_output", "warning" if averaged else "unreliable", seen, spread, SPREAD)]
    if labels.device.type == "cpu" and any(not torch.equal(answer, rows[0]) for answer in rows[1:]):
        seen = "the same inputs get answers that differ in their last bits on a CPU"
        advice = "look for randomness, or for state that a call leaves behind"
        return [found("randomized_output", "info", seen, spread, SPREAD, advice=advice)]
    return []


def _probabilities(answer: Tensor) -> list[Finding]:
    answer = answer[finite(answer)]
    if answer.ndim != 2 or not answer.is_floating_point() or not len(answer):
        return []
    inside = (answer >= -PROBABILITY) & (answer <= 1 + PROBABILITY)
    if not bool(inside.all()) or bool(((answer.double().sum(1) - 1).abs() > PROBABILITY).any()):
        return []
    seen = "the model answers probabilities: saturated rows lose their gradient, cross-entropy adds a second softmax"
    return [found("probability_output", "warning", seen)]


def _setting(case: Case, name: str, default: Any) -> Any:
    """A setting that many attacks share, or the default where this one has none."""
    return parameters(case.attack).get(name, default)


@runtime_checkable
class Samples(Protocol):
    """A threat model that can draw a point."""

    def sample(self, origin: Tensor, rng: Rng) -> Tensor: ...


def _gives_gradients(case: Case) -> bool:
    return not case.surrogates and isinstance(case.threat, Samples) and Access(case.threat.access) >= Access.GRADIENTS


def _gradients(case: Case, x: Tensor, labels: Tensor, clean: Tensor) -> list[Finding]:
    """The attacker's two gradients at a random point of the ball; where there is no radius, at the rows themselves."""
    rng = RowRng.from_ids(case.seed, [str(i) for i in range(len(x))], device=x.device).at("diagnostics")
    radius = case.threat.describe().get("eps")
    start = case.threat.sample(x, rng.at("start")) if radius and isinstance(case.threat, Samples) else x
    view, _ = attacked_model(case)
    zero: dict[str, Tensor] = {}
    bad = torch.zeros(len(x), dtype=torch.bool)
    detached = False
    try:
        goal = case.rule(labels, clean, rng.at("goal"))
        for loss in ("ce", "margin"):
            oracle = MeteredOracle(view, len(x), lanes=Lanes.fitting(x))
            _, gradient, _ = oracle.gradient(start, goal.under(loss))
            bad |= oracle.meter.non_finite
            zero[loss] = (gradient.flatten(1) == 0).all(1).cpu()
            detached |= oracle.meter.detached
    except AdvkitError:
        raise
    except Exception as error:
        seen = f"the backward pass raised {type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
        return [found("not_differentiable", "unreliable", seen)]
    findings = []
    if detached:
        seen = "the model's answer carries no gradient (detached, or computed under no_grad)"
        findings.append(found("not_differentiable", "unreliable", seen))
    if bool(bad.any()):
        share = int(bad.sum()) / len(x)
        seen = f"{int(bad.sum())} of {len(x)} rows get a NaN or infinite answer or gradient at the attack's start"
        findings.append(found("nonfinite_gradient", "warning", seen, share, 0.0))
    dead = zero["margin"] & ~bad
    if bool(dead.any()):
        share = int(dead.sum()) / len(x)
        seen = f"{int(dead.sum())} of {len(x)} rows have no gradient at all, under the margin loss either"
        findings.append(found("zero_gradient", graded(share), seen, share, 0.0))
    saturated = zero["ce"] & ~zero["margin"] & ~bad
    if bool(saturated.any()):
        findings.append(_saturated(case, int(saturated.sum()), len(x)))
    return findings


def _saturated(case: Case, rows: int, of: int) -> Finding:
    name = case.label.attack.partition(":")[0]
    walks = _setting(case, "loss", "") == "ce" or name.endswith("-ce")
    seen = f"{rows} of {of} rows have no gradient under the cross-entropy, whose softmax large logits saturate"
    return found(
        "zero_gradient_ce_only",
        "unreliable" if walks else "warning",
        seen,
        rows / of,
        0.0,
        advice="use apgd-margin" if name == "apgd-ce" else "",
    )


def _replaced(case: Case) -> list[Finding]:
    """That the gradients are not the victim's own: a reader of the report should know."""
    info = case.victim.describe()
    if info.differentiable or case.victim.attacker_view() is case.victim:
        return []
    seen = f"{info.name} has no useful gradient of its own; attacks walk along its attacker view's (BPDA)"
    advice = "another backward pass in the view may break more: compare with square and with the oblivious attack"
    return [found("not_differentiable", "info", seen, advice=advice)]


def _precision(tops: Sequence[nn.Module], answer: Tensor) -> list[Finding]:
    half = {torch.float16, torch.bfloat16}
    seen = {t.dtype for top in tops for t in (*top.parameters(), *top.buffers()) if t.dtype in half or t.is_quantized}
    seen |= {answer.dtype} & half
    if not seen:
        return []
    names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in seen))
    message = f"the model computes in {names}: small perturbations round away and ties stop gradients"
    return [found("low_precision", "warning", message)]


def _classes(case: Case) -> list[Finding]:
    classes = int(case.task.classes)
    needed = 4 if _setting(case, "loss", "") == "dlr" else 3
    if classes >= needed or isinstance(case.victim.space, Transcripts):
        return []
    seen = f"the task has {classes} classes; the DLR loss needs 3, its targeted form 4"
    return [found("too_few_classes", "info", seen, float(classes), float(needed))]


def _preprocessing(case: Case, answer: Tensor, labels: Tensor) -> list[Finding]:
    space = case.victim.space
    unit = isinstance(space, Box) and space.bounded and space.extent == (0.0, 1.0)
    right = int((decide(answer) == labels).sum())
    chance = 1 / case.task.classes
    if not unit or len(labels) < 10 or right > chance * len(labels) or not bool(finite(answer).all()):
        return []
    seen = f"{right} of {len(labels)} rows right without an attack is no better than guessing; the model takes [0, 1]"
    return [found("preprocessing_mismatch", "info", seen, right / len(labels), chance)]


# After the run


def after(case: Case, records: Sequence[Record]) -> list[Finding]:
    """What the records of a finished case say, attack by attack."""
    groups = by_label(records)
    findings = [finding for label, rows in groups.items() for finding in _after(case, str(label), rows)]
    ahead = _black_box_stages(case, case.attack.stages(), groups) if isinstance(case.attack, Suite) else None
    return [*findings, ahead] if ahead else findings


def _black_box_stages(case: Case, stages: Sequence[Stage], groups: dict[Label, list[Record]]) -> Finding | None:
    """A finding when a suite's black-box stages broke rows that its white-box stages before them had left standing.

    Every stage meets survivors only, so each row that falls to scores alone is one that the gradients lost. On a
    randomised victim a later stage breaks some rows by the chance of its verdicts; there the finding stays a warning.
    """
    standing: set[str] = set()
    met: set[str] = set()
    white: list[str] = []  # stages that walked along gradients so far
    told: list[str] = []
    walked, before, lost = "", 0, 0
    for stage in stages:
        records = groups.get(replace(case.label, stage=stage.name))
        if records is None:
            continue
        standing |= {r.id for r in records if r.id not in met and r.outcome != Outcome.WRONG}
        met |= {r.id for r in records}
        fell = {r.id for r in records if r.outcome == Outcome.BROKEN and r.id in standing}
        if Access(stage.attack.needs) >= Access.GRADIENTS:
            white.append(stage.name)
        elif white and fell:
            if not told:
                walked, before = ", ".join(white), len(standing)
            lost += len(fell)
            told.append(f"{stage.name} {len(fell)} of {len(records)}")
        standing -= fell
    if not told:
        return None
    n = len(met)
    share = lost / n
    seen = (
        f"scores alone broke {lost} rows that the gradients of {walked} had left ({', '.join(told)}): of {n} rows "
        f"{before} stood before, {len(standing)} after the whole suite"
    )
    severity = "info" if share <= BETTER else "warning" if case.randomized else graded(share)
    advice = (
        "the gradients are of little use here: give the model an attacker_view (straight_through for what has no "
        "derivative, averaged for what draws), and take the figure as an upper bound until then"
    )
    return found("black_box_beats_white_box", severity, seen, share, BETTER, str(case.label), advice=advice)


def _after(case: Case, label: str, rows: Sequence[Record]) -> list[Finding]:
    n = len(rows)
    outcomes = [r.outcome for r in rows]
    findings = []
    # A row whose untouched answer was NaN is wrong whatever comes, so the interval does not hold it.
    unknown = sum(r.outcome in (Outcome.NON_FINITE, Outcome.ERROR) and "clean_non_finite" not in r.notes for r in rows)
    robust = outcomes.count(Outcome.ROBUST) + outcomes.count(Outcome.INVALID)
    interval = f"robust accuracy is the interval [{robust / n:.4f}, {(robust + unknown) / n:.4f}]"

    if invalid := outcomes.count(Outcome.INVALID):
        seen = f"the attack left the threat model on {invalid} of {n} rows; there it counts as failed"
        findings.append(found("budget_violation", "unreliable", seen, invalid / n, 0.0, label))
    if errors := [r for r in rows if r.outcome == Outcome.ERROR]:
        seen = f"the attack raised on {len(errors)} of {n} rows ({errors[0].message or 'no message'}); {interval}"
        advice = "fix what raised and run the same command again"
        findings.append(
            found("incomplete_optimization", "unreliable", seen, len(errors) / n, 0.0, label, advice=advice)
        )
    nan = outcomes.count(Outcome.NON_FINITE)
    if nan:
        seen = f"the victim answered NaN or infinity on {nan} of {n} rows, or on the attack's way there; {interval}"
        findings.append(found("nonfinite_gradient", graded(nan / n), seen, nan / n, 0.0, label))
    met = sum("met_non_finite" in r.notes and r.outcome == Outcome.BROKEN for r in rows)
    if met and not nan:
        seen = f"{met} of {n} rows met NaN or infinity on the way and were broken all the same"
        findings.append(found("nonfinite_gradient", "info", seen, met / n, 0.0, label))
    # An answer that is not finite has no gradient to give; that row has its finding already.
    if dead := [r for r in rows if "zero_gradient" in r.notes and "met_non_finite" not in r.notes]:
        findings.append(_no_gradient(case, label, dead, n))
    if lost := sum(r.outcome == Outcome.BROKEN and r.eight_bit is False for r in rows):
        broken = outcomes.count(Outcome.BROKEN)
        seen = f"{lost} of {broken} broken rows hold again when the input is rounded to 8 bits"
        advice = "add lattice=255 to the threat model where attackers hand in 8-bit files"
        findings.append(found("low_precision", "info", seen, lost / broken, 0.0, label, advice=advice))
    return findings


def _no_gradient(case: Case, label: str, dead: Sequence[Record], n: int) -> Finding:
    if not case.surrogates and getattr(case.attack, "loss", "") == "ce" and _margin_lives(case, {r.id for r in dead}):
        return _saturated(case, len(dead), n)
    share = len(dead) / n
    seen = f"every gradient was exactly zero on {len(dead)} of {n} rows"
    return found("zero_gradient", graded(share), seen, share, 0.0, label)


def _margin_lives(case: Case, ids: set[str]) -> bool:
    """Whether some of these rows, whose cross-entropy had no gradient, have one under the margin loss."""
    batch = next((b for b in case.task.batches(case.batch_size, n=case.n) if ids & set(b.ids)), None)
    if batch is None or batch.labels is None:
        return False
    where = [i for i, row in enumerate(batch.ids) if row in ids][:FIRST_ROWS]
    x, labels = batch.x[where].to(case.device), batch.labels[where].to(case.device)
    view, _ = attacked_model(case)
    lanes = Lanes.fitting(x)
    with frozen(*case.victim.modules()), own_randomness(case.device, case.seed, "diagnostics"):
        clean = MeteredOracle(case.victim, len(x), Access.SCORES, lanes=lanes)(x)
        goal = case.rule(labels, clean, RowRng.from_ids(case.seed, [batch.ids[i] for i in where], device=x.device))
        _, gradient, _ = MeteredOracle(view, len(x), lanes=lanes).gradient(x, goal.under("margin"))
    return bool((gradient != 0).any())


def black_box_beats_white_box(
    white: Iterable[Record], black: Iterable[Record], name: str, *, randomized: bool = False
) -> Finding | None:
    """A finding when the black-box attack `name` breaks rows that every white-box attack left standing.

    Both are compared on the rows they share, so that the white box is never beaten by rows it was not given.
    randomized: the victim's verdicts are noisy; the difference must then be significant (exact McNemar, 5 %)
    """
    stands: dict[str, bool] = {}
    for record in white:
        if record.outcome != Outcome.WRONG:
            stands[record.id] = stands.get(record.id, True) and record.outcome != Outcome.BROKEN
    fell = {r.id: r.outcome == Outcome.BROKEN for r in black if r.id in stands}
    n = len(stands)
    ahead = sum(stands[row] and fell[row] for row in fell)
    behind = sum(not stands[row] and not fell[row] for row in fell)
    if not n or ahead / n <= BETTER or (randomized and (ahead <= behind or mcnemar_exact(ahead, behind) >= 0.05)):
        return None
    seen = f"{name} breaks {ahead} of {n} rows on which the white-box attacks failed: their gradients are of little use"
    return found("black_box_beats_white_box", graded(ahead / n, 0.01), seen, ahead / n, BETTER, name)
