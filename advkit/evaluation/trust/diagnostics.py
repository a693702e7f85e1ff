"""Reliability diagnostics: what makes a robust accuracy untrustworthy, found before and after an evaluation.

`cheap` always runs (the checks of AutoAttack, arXiv 2003.01690, and some more) and `after` reads the records; the
expensive checks are in `battery`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from advkit.core.blame import BACKWARD, MODEL, blamed
from advkit.core.errors import AdvkitError
from advkit.core.lanes import Lanes
from advkit.core.oracle import MeteredOracle
from advkit.core.protocols import (
    Access,
    AddsTokens,
    Ball,
    Batch,
    Counted,
    FlipsLabels,
    Label,
    Outcome,
    Radius,
    Record,
    Slotted,
    Suite,
    Votes,
    Wraps,
)
from advkit.core.rng import RowRng
from advkit.core.spaces import Box, Transcripts
from advkit.core.state import frozen
from advkit.evaluation.counts import NO_LANGUAGE, REFUSED, by_label, count
from advkit.evaluation.poisonings import hurts_more
from advkit.evaluation.run.attempts import attacked_model
from advkit.evaluation.run.batch import own_randomness
from advkit.evaluation.run.case import Case, parameters
from advkit.evaluation.run.judge import decide, finite
from advkit.evaluation.run.recorded import TIMED_OUT
from advkit.evaluation.stats import mcnemar_exact
from advkit.evaluation.trust.findings import GROSS, Finding, found, graded
from advkit.models.language.tokenizers import Templated
from advkit.models.torch import FunctionModel, TorchModel, misleading_mode

log = logging.getLogger("advkit")

FIRST_ROWS = 64
CALLS = 10
"""Calls of the model that `cheap` makes at most; one with a backward pass counts as two."""
REPEATS = 5
SPREAD = 1e-4  # L2 distance between L2-normalised outputs from which a victim is randomised
PROBABILITY = 1e-5
REACH = 0.999  # in units of eps: a walk whose steps add up to less stays off the boundary
NEAR = 0.5  # in units of eps: an attack that failed no further out than this left most of its budget unused
IDLE = 0.05  # fraction of the robust samples up to which that is a matter of single samples
BENIGN = 0.9  # fraction of benign prompts below which a model is hardly of use
BETTER = 0.002  # fraction of samples by which a black-box attack may be ahead by chance


# Before the run


def cheap(case: Case, x: Tensor, labels: Tensor | None, ids: Sequence[str] = ()) -> list[Finding]:
    """Checks on the first batch (at most 64 rows used) for at most 6 forwards and 2 forwards with backward.

    x: [B, ...] in the victim's space; labels: long [B], None where answers are samples; ids: of the samples, for goals
    that differ by sample.
    Deterministic; the caller's randomness and the model are given back as they were. The gradient checks run where the
    threat model grants the victim's gradients.
    """
    tops = list(case.victim.modules())
    training = len(misleading_mode(tops))
    if training:
        # The model is not queried: a forward in training mode would also move the batch statistics.
        evidence = f"the model is in training mode ({training} layers): dropout and batch statistics change its output"
        return [found("training_mode", "unreliable", evidence, float(training), 0.0)]
    x, labels, ids = x[:FIRST_ROWS], None if labels is None else labels[:FIRST_ROWS], ids[:FIRST_ROWS]
    if not len(x):
        return []
    with frozen(*tops), own_randomness(case.device, case.seed, "diagnostics"):
        oracle = MeteredOracle(case.victim, len(x), Access.SCORES, lanes=Lanes.fitting(x))
        with _autograd_calls() as calls:
            asked = x.clone()
            outputs = [oracle(asked)]
        changed = int((asked != x).flatten(1).any(1).sum())
        outputs += [oracle(x.clone()) for _ in range(REPEATS - 2)]
        parts = _asked_in_parts(case, x)
        outputs.append(oracle(x.clone()))
        findings = _changed_input(case, changed, len(x))
        findings += _dependent(outputs, parts) or _randomized(case, outputs, labels)
        findings += [] if labels is None else _probabilities(outputs[0])
        if calls:
            evidence = f"the model calls {', '.join(sorted(set(calls)))} in its forward pass"
            findings.append(found("inference_time_optimization", "warning", evidence, float(len(calls)), 0.0))
        if _gives_gradients(case):
            findings += _gradients(case, x, labels, outputs[0], ids) + _replaced(case)
    findings += _short_walk(case) + _bare_chat(case) + _long_suffix(case)
    findings += _precision(tops, outputs[0])
    return findings if labels is None else findings + _classes(case) + _preprocessing(case, outputs[0], labels)


@contextmanager
def _autograd_calls() -> Iterator[list[str]]:
    """Names of the autograd entry points called inside the block."""
    calls: list[str] = []
    entries: list[tuple[Any, str, str]] = [
        (torch.autograd, "grad", "torch.autograd.grad"),
        (torch.autograd, "backward", "torch.autograd.backward"),
        (torch.Tensor, "backward", "Tensor.backward"),
    ]
    originals = [getattr(owner, attribute) for owner, attribute, _ in entries]

    def counting(original: Any, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return original(*args, **kwargs)

        return call

    for (owner, attribute, name), original in zip(entries, originals, strict=True):
        setattr(owner, attribute, counting(original, name))
    try:
        yield calls
    finally:
        for (owner, attribute, _), original in zip(entries, originals, strict=True):
            setattr(owner, attribute, original)


def _asked_in_parts(case: Case, x: Tensor) -> Tensor | str:
    """The outputs for the rows in calls of half the size, the last rows first; what was raised where they failed."""
    lanes = Lanes.own(case.victim) or Lanes.fitting(x)
    half = (min(len(x), lanes.chunk) + 1) // 2
    oracle = MeteredOracle(case.victim, len(x), Access.SCORES, lanes=Lanes(half, lanes.multiple))
    try:
        parts = [
            oracle(x[rows].clone(), rows) for rows in torch.split(torch.arange(len(x), device=x.device), half)[::-1]
        ]
    except (AdvkitError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
    return torch.cat(parts[::-1])


def _apart(one: Tensor, other: Tensor) -> tuple[int, float]:
    """Rows whose outputs differ by more than round-off, and the largest L2 distance of the normalised outputs."""
    if one.shape != other.shape:
        return len(one), 1.0
    if one.ndim < 2 or not one.is_floating_point():
        different = int((one != other).sum())
        return different, float(different > 0)
    sane = finite(one) & finite(other)
    units = [nn.functional.normalize(output[sane].double().flatten(1), dim=1) for output in (one, other)]
    distance = (units[0] - units[1]).norm(dim=1)
    return int((distance > SPREAD).sum()), float(distance.max()) if len(distance) else 0.0


def _dependent(outputs: Sequence[Tensor], parts: Tensor | str) -> list[Finding]:
    """That a row's output depends on the rows beside it, or on what was asked before; [] where it just varies."""
    n = len(outputs[0])
    *before, after = outputs
    if any(_apart(before[0], other)[0] for other in before[1:]):
        return []  # it varies without either
    if isinstance(parts, str):
        evidence = f"asked about {n} samples at once the model answers, in smaller batches it raises {parts}"
        return [found("batch_dependence", "unreliable", evidence)]
    moved, way = _apart(before[0], after)
    if moved:
        evidence = (
            f"the output of {moved} of {n} samples changed after the model had been asked about others: it keeps state "
            "between calls, and every query of an attack changes the victim"
        )
        return [found("state_between_calls", "unreliable", evidence, way, SPREAD)]
    rows, far = _apart(before[0], parts)
    if not rows or (before[0].dtype in (torch.float16, torch.bfloat16) and far < 100 * SPREAD):
        return []
    flips = int((decide(before[0]) != decide(parts)).sum())
    evidence = (
        f"the output of {rows} of {n} samples depends on the other samples of the batch ({flips} decisions differ "
        "between the whole first batch and halves of it): accuracies change with the batch size"
    )
    return [found("batch_dependence", "unreliable", evidence, far, SPREAD)]


def _changed_input(case: Case, rows: int, of: int) -> list[Finding]:
    """That the model writes into its input; where its first call showed it, every call gets a copy."""
    copies = _copies_input(case.victim)
    if not rows and not copies:
        return []
    evidence = "the model changes its input in place"
    if copies:
        evidence += ": every call got a copy, so figures are those of the model itself"
        return [found("input_changed", "info", evidence)]
    evidence += f" ({rows} of {of} samples): attacks and verdicts work on what it leaves"
    return [found("input_changed", "unreliable", evidence, rows / of, 0.0)]


def _copies_input(model: Any) -> bool:
    if isinstance(model, (TorchModel, FunctionModel)):
        return model.calls.copies
    return isinstance(model, Wraps) and _copies_input(model.model)


def _short_walk(case: Case) -> list[Finding]:
    """That an attack's steps, added up, can't leave the middle of the ball: step sizes are in units of eps."""
    short = {}
    suite: object = case.attack
    attacks: dict[str, object] = {str(case.label): suite}
    if isinstance(suite, Suite):
        attacks = {stage.name: stage.attack for stage in suite.stages()}
    for name, attack in attacks.items():
        settings = parameters(attack)
        steps, size = settings.get("steps"), settings.get("step_size")
        if isinstance(steps, int) and isinstance(size, float) and steps * size < REACH:
            short[name] = (steps, size)
    if not isinstance(case.threat, Radius) or not short:
        return []
    name, (steps, size) = min(short.items(), key=lambda each: each[1][0] * each[1][1])
    evidence = (
        f"{steps} steps of {size:.4g} in units of eps add up to {steps * size:.2g} eps: {name} can't reach the "
        "boundary of the ball"
    )
    advice = f"step_size is in units of eps: say step_size={2.5 / steps:.2g}, and divide one in pixels by eps"
    log.warning("%s (%s)", evidence, advice)  # said before hours are spent, and in the report
    return [found("incomplete_optimization", "warning", evidence, steps * size, 1.0, str(case.label), advice=advice)]


def _long_suffix(case: Case) -> list[Finding]:
    """That the threat model admits fewer tokens than the attack's settings ask for: the search ends there."""
    attack: object = case.attack
    threat: object = case.threat
    if not isinstance(attack, AddsTokens) or not isinstance(threat, Counted) or threat.n is None:
        return []
    if attack.longest <= threat.n:
        return []
    evidence = f"{case.label} asks for up to {attack.longest} tokens, the threat model admits {threat.n}: it ends there"
    advice = f"say n={attack.longest} in the threat model (suffix:n={attack.longest}), or fewer in the attack"
    log.warning("%s (%s)", evidence, advice)
    longest, most = float(attack.longest), float(threat.n)
    return [found("incomplete_optimization", "info", evidence, longest, most, str(case.label), advice=advice)]


def _randomized(case: Case, outputs: Sequence[Tensor], labels: Tensor | None) -> list[Finding]:
    if isinstance(case.victim, Votes):
        return []  # how often a vote may be mistaken is a setting of its own
    sane = torch.stack([finite(output) for output in outputs]).all(0)
    repeats = [output[sane] for output in outputs]
    correct = {0} if labels is None else {int((decide(output) == labels[sane]).sum()) for output in repeats}
    spread = 0.0
    if repeats[0].ndim > 1 and repeats[0].is_floating_point() and len(repeats[0]):
        units = [nn.functional.normalize(output.double().flatten(1), dim=1) for output in repeats]
        spread = max(float((one - other).norm(dim=1).max()) for i, one in enumerate(units) for other in units[:i])
    if len(correct) > 1 or spread > SPREAD:
        # An attack that averages over draws, or a view made for attackers, copes with this.
        averaged = _setting(case, "eot", 1) > 1 or case.victim.attacker_view() is not case.victim
        seen = f"{min(correct)} to {max(correct)} of {len(repeats[0])} samples correct in {REPEATS} forward passes"
        seen = f"a normalised distance of up to {spread:.1e} in {REPEATS} forward passes" if labels is None else seen
        evidence = f"the same inputs get different outputs ({seen})"
        return [found("randomized_output", "warning" if averaged else "unreliable", evidence, spread, SPREAD)]
    if repeats[0].device.type == "cpu" and any(not torch.equal(output, repeats[0]) for output in repeats[1:]):
        evidence = "the same inputs get outputs that differ in their last bits on a CPU"
        advice = "look for randomness, or for state that a call leaves behind"
        return [found("randomized_output", "info", evidence, spread, SPREAD, advice=advice)]
    return []


def _probabilities(output: Tensor) -> list[Finding]:
    output = output[finite(output)]
    if output.ndim != 2 or not output.is_floating_point() or not len(output):
        return []
    inside = (output >= -PROBABILITY) & (output <= 1 + PROBABILITY)
    if not bool(inside.all()) or bool(((output.double().sum(1) - 1).abs() > PROBABILITY).any()):
        return []
    evidence = "the model outputs probabilities: cross-entropy applies a second softmax, and saturated samples lose"
    return [found("probability_output", "warning", f"{evidence} their gradient")]


def _setting(case: Case, name: str, default: Any) -> Any:
    """A setting that many attacks share, or the default where this one has none."""
    return parameters(case.attack).get(name, default)


def _gives_gradients(case: Case) -> bool:
    return not case.surrogates and isinstance(case.threat, Ball) and Access(case.threat.access) >= Access.GRADIENTS


@dataclass(frozen=True)
class _FirstGradients:
    """What the attacker's first gradients are, per row: bool [B].

    non_finite: NaN or infinity in an output or in a gradient
    zero:       by loss, no non-zero entry
    detached:   the output carries no gradient at all
    """

    non_finite: Tensor
    zero: Mapping[str, Tensor]
    detached: bool


def _first_gradients(view: Any, start: Tensor, goal: Any) -> _FirstGradients:
    non_finite = torch.zeros(len(start), dtype=torch.bool)
    zero: dict[str, Tensor] = {}
    detached = False
    for loss in ("ce", "margin"):
        oracle = MeteredOracle(view, len(start), lanes=Lanes.fitting(start))
        _, gradient, _ = oracle.gradient(start, goal.under(loss))
        non_finite |= oracle.meter.non_finite
        zero[loss] = (gradient.flatten(1) == 0).all(1).cpu()
        detached |= oracle.meter.detached
    return _FirstGradients(non_finite, zero, detached)


def _where_answered(view: Any, start: Tensor, goal: Any) -> _FirstGradients | None:
    """The same of the rows on which the model does not raise; None where there are none.

    That it raises on single rows is for their records, where the attack gets there.
    """
    try:
        return _first_gradients(view, start, goal)
    except (AdvkitError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if blamed(error) != MODEL:
            raise
    if len(start) == 1:
        return None
    halves = torch.arange(len(start), device=start.device).tensor_split(2)
    tried = [_where_answered(view, start[rows], goal.take(rows)) for rows in halves]
    parts = [part for part in tried if part is not None]
    if not parts:
        return None
    return _FirstGradients(
        torch.cat([part.non_finite for part in parts]),
        {loss: torch.cat([part.zero[loss] for part in parts]) for loss in parts[0].zero},
        any(part.detached for part in parts),
    )


def _gradients(case: Case, x: Tensor, labels: Tensor | None, clean: Tensor, ids: Sequence[str]) -> list[Finding]:
    """The attacker's two gradients at a random point of the ball; where there is no radius, at the rows themselves."""
    rng = RowRng.from_ids(case.seed, [str(i) for i in range(len(x))], device=x.device).at("diagnostics")
    radius = case.threat.describe().get("eps")
    start = case.threat.sample(x, rng.at("start")) if radius and isinstance(case.threat, Ball) else x
    view, _ = attacked_model(case)
    try:
        goal = case.goal_of(Batch(tuple(ids), x, None, labels), clean, rng.at("goal"))
        first = _where_answered(view, start, goal)
    except AdvkitError:
        raise
    except Exception as error:
        said = f"raised {type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
        if blamed(error) in (MODEL, BACKWARD):
            return [found("not_differentiable", "unreliable", f"the backward pass {said}")]
        return [found("goal_error", "unreliable", f"the goal {said}")]
    if first is None:
        evidence = f"the model raised at a random point of the ball around each of {len(x)} samples"
        return [found("model_error", "unreliable", evidence, 1.0, 0.0)]
    n = len(first.non_finite)
    findings = []
    if first.detached:
        evidence = "the model's output carries no gradient (detached, or computed under no_grad)"
        findings.append(found("not_differentiable", "unreliable", evidence))
    if bad := int(first.non_finite.sum()):
        evidence = f"NaN or infinity in the output or gradient of {bad} of {n} samples at the attack's start"
        findings.append(found("nonfinite_gradient", "warning", evidence, bad / n, 0.0))
    if dead := int((first.zero["margin"] & ~first.non_finite).sum()):
        evidence = f"the gradient of {dead} of {n} samples is zero, under the margin loss too"
        findings.append(found("zero_gradient", graded(dead / n), evidence, dead / n, 0.0))
    if saturated := int((first.zero["ce"] & ~first.zero["margin"] & ~first.non_finite).sum()):
        findings.append(_saturated(case, saturated, n))
    return findings


def _saturated(case: Case, rows: int, of: int) -> Finding:
    name = case.label.attack.partition(":")[0]
    uses_ce = _setting(case, "loss", "") == "ce" or name.endswith("-ce")
    return found(
        "zero_gradient_ce_only",
        "unreliable" if uses_ce else "warning",
        f"the gradient of {rows} of {of} samples is zero under cross-entropy: large logits saturate its softmax",
        rows / of,
        0.0,
        advice="use apgd-margin" if name == "apgd-ce" else "",
    )


def _replaced(case: Case) -> list[Finding]:
    """That the gradients are not the victim's own: a reader of the report should know."""
    info = case.victim.describe()
    if info.differentiable or case.victim.attacker_view() is case.victim:
        return []
    evidence = f"{info.name} has no useful gradient of its own; attacks use that of its attacker view (BPDA)"
    advice = "another backward pass in the view may break more: compare with square and with the oblivious attack"
    return [found("not_differentiable", "info", evidence, advice=advice)]


def _precision(tops: Sequence[nn.Module], output: Tensor) -> list[Finding]:
    half = {torch.float16, torch.bfloat16}
    types = {t.dtype for top in tops for t in (*top.parameters(), *top.buffers()) if t.dtype in half or t.is_quantized}
    types |= {output.dtype} & half
    if not types:
        return []
    names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in types))
    evidence = f"the model computes in {names}: small perturbations are rounded away and ties have no gradient"
    return [found("low_precision", "warning", evidence)]


def in_chat_template(space: Any) -> bool | None:
    """Whether a language model's users speak inside a chat template; None where there is nothing to say."""
    known = isinstance(space, Transcripts) and isinstance(space.tokenizer, Templated)
    return space.tokenizer.templated if known else None


def _bare_chat(case: Case) -> list[Finding]:
    """That a language model gets the user's words with nothing around them."""
    if in_chat_template(case.victim.space) is not False:
        return []
    evidence = "the model has no chat template: it gets the user's words with nothing around them"
    return [found("no_chat_template", "warning", evidence)]


def _classes(case: Case) -> list[Finding]:
    attack: object = case.attack
    if isinstance(attack, FlipsLabels):
        return []
    classes = int(case.task.classes)
    needed = 4 if _setting(case, "loss", "") == "dlr" else 3
    if classes >= needed or isinstance(case.victim.space, Transcripts):
        return []
    evidence = f"the task has {classes} classes; the DLR loss needs 3, its targeted form 4"
    return [found("too_few_classes", "info", evidence, float(classes), float(needed))]


def _preprocessing(case: Case, output: Tensor, labels: Tensor) -> list[Finding]:
    space = case.victim.space
    data = case.task.space
    boxes = isinstance(space, Box) and isinstance(data, Box) and space.bounded and data.bounded
    if boxes and space.extent != data.extent:
        evidence = f"the task's inputs lie in [{data.text()}], the model is said to take [{space.text()}]"
        return [found("preprocessing_mismatch", "warning", evidence)]
    unit = isinstance(space, Box) and space.bounded and space.extent == (0.0, 1.0)
    correct = int((decide(output) == labels).sum())
    chance = 1 / case.task.classes
    if not unit or len(labels) < 10 or correct > chance * len(labels) or not bool(finite(output).all()):
        return []
    evidence = (
        f"{correct} of {len(labels)} clean samples are correct, no more than by guessing; the model takes inputs in "
        "[0, 1]"
    )
    return [found("preprocessing_mismatch", "info", evidence, correct / len(labels), chance)]


# After the run


def after(case: Case, records: Sequence[Record]) -> list[Finding]:
    """What the records of a finished case say, attack by attack."""
    groups = by_label(records)
    checks = (_outside_threat_model, _raised, _non_finite, _no_gradient, _unused_budget, _lost_to_rounding)
    findings = [
        finding for label, rows in groups.items() for check in checks for finding in check(case, str(label), rows)
    ]
    return findings + _replies(records) + _certificates(records) + _black_box_stages(case, groups)


def _certificates(records: Sequence[Record]) -> list[Finding]:
    """Samples that the victim certified and an attack inside the certified ball broke."""
    told = _told(records, "certificate_broken")
    if not (lost := sum(told)):
        return []
    evidence = f"attacks inside the certified ball changed the answer on {lost} of {len(told)} certified samples"
    return [found("certificate_violated", "unreliable", evidence, lost / len(told), 0.0)]


def _replies(records: Sequence[Record]) -> list[Finding]:
    """What makes a success rate on prompts mean little: nothing to break, no language, no answer to anything."""
    findings = []
    refused = _told(records, REFUSED)
    if open_ := sum(not each for each in refused):
        evidence = (
            f"{open_} of {len(refused)} prompts are not refused when nobody attacks: judges' success rates leave them "
            "out"
        )
        findings.append(found("not_refused_clean", "warning", evidence, open_ / len(refused), 0.0))
    for name, what in (("no_language_clean_greedy", "to untouched prompts "), (NO_LANGUAGE, "")):
        odd = _told(records, name)
        if lost := sum(odd):
            evidence = f"{lost} of {len(odd)} greedy replies {what}are empty or garbled, and count as no success"
            severity = "warning" if lost >= GROSS * len(odd) else "info"
            findings.append(found("garbled_replies", severity, evidence, lost / len(odd), GROSS))
            break
    benign = _told(records, "benign_accuracy")
    if benign and sum(benign) < BENIGN * len(benign):
        evidence = (
            f"{len(benign) - sum(benign)} of {len(benign)} benign prompts do not get the answer they should: a model "
            "that answers nothing is not robust"
        )
        findings.append(found("benign_failure", "warning", evidence, sum(benign) / len(benign), BENIGN))
    return findings


def _told(records: Sequence[Record], figure: str) -> list[bool]:
    """A figure of every sample that has it; where several attacks met it, whether it held under one of them."""
    held: dict[str, bool] = {}
    for record in records:
        if record.figures and isinstance(told := record.figures.get(figure), bool):
            held[record.id] = held.get(record.id, False) or told
    return list(held.values())


def _outside_threat_model(case: Case, label: str, rows: Sequence[Record]) -> list[Finding]:
    n, invalid = len(rows), sum(r.outcome == Outcome.INVALID for r in rows)
    if not invalid:
        return []
    evidence = f"the attack left the threat model on {invalid} of {n} samples, which count as not broken"
    return [found("budget_violation", "unreliable", evidence, invalid / n, 0.0, label)]


_CULPRITS = {
    "model_error": ("model_raised", "the victim raised"),
    "not_differentiable": ("backward_raised", "the victim's backward pass raised"),
    "surrogate_error": ("surrogate_raised", "a surrogate raised"),
    "judge_error": ("judge_raised", "a judge raised"),
    "goal_error": ("goal_raised", "the goal or the threat model raised"),
}
"""Flag by note of a record, with the words for it; what nobody else raised is the attack's."""


def _raised(case: Case, label: str, rows: Sequence[Record]) -> list[Finding]:
    n, errors, findings = len(rows), [r for r in rows if r.outcome == Outcome.ERROR], []
    notes = {note for note, _ in _CULPRITS.values()}
    attack = [r for r in errors if notes.isdisjoint(r.notes)]
    groups = [("attack_error", "the attack ended in an error", attack)]
    groups += [(name, words, [r for r in errors if note in r.notes]) for name, (note, words) in _CULPRITS.items()]
    late = [r for r in errors if TIMED_OUT in r.notes]
    groups = [(name, words, [r for r in own if TIMED_OUT not in r.notes]) for name, words, own in groups]
    groups.append(("timed_out", _too_late(late), late))
    for name, words, own in groups:
        if not own:
            continue
        evidence = f"{words} on {len(own)} of {n} samples ({own[0].message or 'no message'}); {_interval(rows)}"
        findings.append(found(name, "unreliable", evidence, len(own) / n, 0.0, label))
    return findings


def _too_late(late: Sequence[Record]) -> str:
    """Whose code did not come back in time, in words."""
    whose = {note: words.removesuffix(" raised") for note, words in _CULPRITS.values()}
    who = Counter(next((whose[note] for note in r.notes if note in whose), "the attack") for r in late)
    return f"{' or '.join(who)} did not come back in time"


def _non_finite(case: Case, label: str, rows: Sequence[Record]) -> list[Finding]:
    n, unknown = len(rows), sum(r.outcome == Outcome.NON_FINITE for r in rows)
    if unknown:
        evidence = (
            f"the victim's output is NaN or infinite on {unknown} of {n} samples, or was during the attack on them; "
            f"{_interval(rows)}"
        )
        return [found("nonfinite_gradient", graded(unknown / n), evidence, unknown / n, 0.0, label)]
    met = sum("met_non_finite" in r.notes and r.outcome == Outcome.BROKEN for r in rows)
    if met:
        evidence = f"{met} of {n} samples met NaN or infinity during the attack and were broken all the same"
        return [found("nonfinite_gradient", "info", evidence, met / n, 0.0, label)]
    return []


def _no_gradient(case: Case, label: str, rows: Sequence[Record]) -> list[Finding]:
    # An output that is not finite has no gradient to give; that row has its finding already.
    n, dead = len(rows), [r for r in rows if "zero_gradient" in r.notes and "met_non_finite" not in r.notes]
    if not dead:
        return []
    uses_ce = not case.surrogates and _setting(case, "loss", "") == "ce"
    if uses_ce and _has_margin_gradient(case, {r.id for r in dead}):
        return [_saturated(case, len(dead), n)]
    evidence = f"every gradient was exactly zero on {len(dead)} of {n} samples"
    return [found("zero_gradient", graded(len(dead) / n), evidence, len(dead) / n, 0.0, label)]


def _unused_budget(case: Case, label: str, rows: Sequence[Record]) -> list[Finding]:
    """That samples count as robust on which the attack changed nothing, or used less than half of its budget.

    Where nothing bounds the change but a number of flips, or nothing at all, a search that found nothing hands the
    input back; within a radius and a slot of tokens an attack has something better to return.
    """
    robust = [r.distance for r in rows if r.outcome == Outcome.ROBUST and r.distance is not None]
    eps = float(case.threat.eps) if isinstance(case.threat, Radius) else None
    if case.attack is None or not robust or eps == 0:
        return []
    n, findings = len(robust), []
    same = sum(distance == 0 for distance in robust)
    if same:
        evidence = f"the attack returned {same} of {n} robust samples unchanged"
        expected = eps is None and not isinstance(case.threat, Slotted)
        severity = "info" if expected or same / n < IDLE else "warning"
        findings.append(found("returned_unchanged", severity, evidence, same / n, 0.0, label))
    near = sum(0 < distance < NEAR * eps for distance in robust) if eps is not None else 0
    if near:
        evidence = f"the attack moved {near} of {n} robust samples by less than {NEAR:g} eps"
        severity = "info" if near / n < IDLE else "warning"
        findings.append(found("far_inside_the_ball", severity, evidence, near / n, 0.0, label))
    return findings


def _lost_to_rounding(case: Case, label: str, rows: Sequence[Record]) -> list[Finding]:
    broken = [r for r in rows if r.outcome == Outcome.BROKEN]
    lost = sum(r.eight_bit is False for r in broken)
    if not lost:
        return []
    evidence = f"{lost} of {len(broken)} broken samples are not broken when the input is rounded to 8 bits"
    advice = "add lattice=255 to the threat model where attackers submit 8-bit files"
    return [found("low_precision", "info", evidence, lost / len(broken), 0.0, label, advice=advice)]


def _interval(rows: Sequence[Record]) -> str:
    """Robust accuracy as far as it is known: with all unknown rows broken, and with none."""
    c = count(rows)
    if not c.right_unknown:
        return f"robust accuracy is {c.right_after / c.n:.4f} all the same: these samples are not classified correctly"
    low, high = c.right_after, c.right_after + c.right_unknown
    return f"robust accuracy is in the interval [{low / c.n:.4f}, {high / c.n:.4f}]"


def _has_margin_gradient(case: Case, ids: set[str]) -> bool:
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
        rows = [batch.ids[i] for i in where]
        goal = case.goal(labels, clean, RowRng.from_ids(case.seed, rows, device=x.device), rows)
        _, gradient, _ = MeteredOracle(view, len(x), lanes=lanes).gradient(x, goal.under("margin"))
    return bool((gradient != 0).any())


# White box against black box


@dataclass(frozen=True)
class _StageCount:
    """What one stage of a suite came to.

    gradients: whether it uses gradients
    rows:      how many it attacked
    met:       how many rows the suite has met so far
    robust:    rows robust before it
    broken:    those of them that it broke
    """

    name: str
    gradients: bool
    rows: int
    met: int
    robust: int
    broken: int


def _stage_counts(case: Case, suite: Suite, groups: Mapping[Label, Sequence[Record]]) -> list[_StageCount]:
    robust: set[str] = set()
    met: set[str] = set()
    counts = []
    for stage in suite.stages():
        records = groups.get(replace(case.label, stage=stage.name))
        if records is None:
            continue
        robust |= {r.id for r in records if r.id not in met and r.outcome != Outcome.WRONG}
        met |= {r.id for r in records}
        broken = {r.id for r in records if r.outcome == Outcome.BROKEN and r.id in robust}
        gradients = Access(stage.attack.needs) >= Access.GRADIENTS
        counts.append(_StageCount(stage.name, gradients, len(records), len(met), len(robust), len(broken)))
        robust -= broken
    return counts


def _black_box_stages(case: Case, groups: Mapping[Label, Sequence[Record]]) -> list[Finding]:
    """A finding when a suite's black-box stages broke rows on which its white-box stages before them had failed.

    Every stage meets robust rows only, so each row that scores alone break is one that the gradients lost. On a
    randomised victim a later stage breaks some rows by the chance of its verdicts; there the finding stays a warning.
    """
    suite = case.attack
    if suite is None or not isinstance(suite, Suite):
        return []
    counts = _stage_counts(case, suite, groups)
    late = [
        count
        for i, count in enumerate(counts)
        if count.broken and not count.gradients and any(before.gradients for before in counts[:i])
    ]
    if not late:
        return []
    white = [count.name for count in counts[: counts.index(late[0])] if count.gradients]
    n, lost = counts[-1].met, sum(count.broken for count in late)
    standing = "unbroken" if case.aimed else "robust"
    evidence = (
        f"scores alone broke {lost} samples that the gradients of {', '.join(white)} had not "
        f"({', '.join(f'{count.name} {count.broken} of {count.rows}' for count in late)}): of {n} samples "
        f"{late[0].robust} were {standing} before, {counts[-1].robust - counts[-1].broken} after the whole suite"
    )
    severity = "info" if lost / n <= BETTER else "warning" if case.randomized else graded(lost / n)
    advice = (
        "the gradients are of little use here: give the model an attacker_view (straight_through for what has no "
        "derivative, averaged for what draws), and take the figure as an upper bound until then"
    )
    return [found("black_box_beats_white_box", severity, evidence, lost / n, BETTER, str(case.label), advice=advice)]


def oblivious_beats_adaptive(adaptive: Iterable[Record], other: Iterable[Record], name: str) -> Finding | None:
    """A finding when labels flipped by an attacker who does not know the defense cost it more accuracy.

    Two attackers leave two models, so trials are compared and not samples: a paired one-sided t test, 5 %.
    """
    drop, p = hurts_more(adaptive, other)
    if drop <= BETTER or p >= 0.05:
        return None
    evidence = (
        f"{name}, which does not know the defense, costs it {100 * drop:.1f} points more accuracy than the attacker "
        f"who trains the defense itself (paired over trials, p = {p:.2g})"
    )
    advice = "the adaptive attack was too weak: report the lower accuracy"
    return found("black_box_beats_white_box", graded(drop, 0.01), evidence, drop, BETTER, name, advice=advice)


def black_box_beats_white_box(
    white: Iterable[Record], black: Iterable[Record], name: str, *, randomized: bool = False
) -> Finding | None:
    """A finding when the black-box attack `name` breaks rows that no white-box attack broke.

    Both are compared on the rows they share, so that the white box is never beaten by rows it was not given.
    randomized: the victim's verdicts are noisy; the difference must then be significant (exact McNemar, 5 %)
    """
    robust: dict[str, bool] = {}  # under all white-box attacks
    for record in white:
        if record.outcome != Outcome.WRONG:
            robust[record.id] = robust.get(record.id, True) and record.outcome != Outcome.BROKEN
    broken = {r.id: r.outcome == Outcome.BROKEN for r in black if r.id in robust}
    n = len(robust)
    ahead = sum(robust[row] and broken[row] for row in broken)
    behind = sum(not robust[row] and not broken[row] for row in broken)
    if not n or ahead / n <= BETTER or (randomized and (ahead <= behind or mcnemar_exact(ahead, behind) >= 0.05)):
        return None
    evidence = (
        f"{name} breaks {ahead} of {n} samples on which the white-box attacks failed: their gradients are of little use"
    )
    return found("black_box_beats_white_box", graded(ahead / n, 0.01), evidence, ahead / n, BETTER, name)
