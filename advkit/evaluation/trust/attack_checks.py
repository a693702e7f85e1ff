"""Does the attack do its job? Checks of the case's own attack, traced on its way through the engine."""

from __future__ import annotations

from dataclasses import replace

import torch

from advkit.core.protocols import Outcome
from advkit.evaluation.run.case import Case
from advkit.evaluation.trust import indicators
from advkit.evaluation.trust.context import Context, Result, changed, correct_rows, reference, run
from advkit.evaluation.trust.diagnostics import after
from advkit.evaluation.trust.findings import GROSS, found
from advkit.evaluation.trust.tracing import TracedRun, traced

UNFINISHED = 0.25  # fraction of robust rows whose loss was still falling
NOT_TRANSFERRED = 0.1


def own_case(context: Context) -> Case:
    """The case with its own attack; with the reference attack where it has none."""
    return context.case if context.case.attack is not None else reference(context, steps=40)


def own_run(context: Context) -> Result:
    """What the records of the case's own attack say; faults that the model was found to have are not repeated."""
    case = own_case(context)
    own = traced(case)
    label = str(case.label)
    return Result(
        findings=[finding for finding in after(case, [*own.records.values()]) if not context.named(finding.id)],
        curves={"loss": {"attack": label, "mean_margin": own.mean_margin()}},
        white_box={} if case.surrogates else {"own": own.records},
        own=own,
    )


def silent_success(context: Context) -> Result:
    """I3: whether the attack lost points that reached its goal."""
    own = _traced(context)
    silent = sum(own.silent.values())
    fraction = silent / len(own.silent) if own.silent else 0.0
    measured = {"I3_silent_success": fraction}
    if not silent:
        return Result(indicators=measured)
    evidence = f"on {silent} samples the attack queried a point that reached its goal and returned another"
    finding = found("silent_success", "warning", evidence, fraction, 0.0, str(own_case(context).label))
    return Result(findings=[finding], indicators=measured)


def incomplete_optimization(context: Context) -> Result:
    """I4: whether the attack ended while its loss was still falling."""
    own = _traced(context)
    flags = [flag for row, flag in own.unfinished.items() if own.records[row].outcome == Outcome.ROBUST]
    unfinished = sum(flags) / len(flags) if flags else 0.0
    measured = {"I4_incomplete_optimization": unfinished}
    # The best of noisy outputs never stops falling, and without a gradient nothing falls.
    if unfinished <= UNFINISHED or context.case.randomized or context.named("zero_gradient"):
        return Result(indicators=measured)
    evidence = f"the loss was still falling on {sum(flags)} of {len(flags)} unbroken samples when the attack ended"
    label = str(own_case(context).label)
    finding = found("incomplete_optimization", "warning", evidence, unfinished, UNFINISHED, label)
    return Result(findings=[finding], indicators=measured)


def transfer_failure(context: Context) -> Result:
    """I5: whether points that reach the goal on the model that the attack queries do not on the victim."""
    own, case = _traced(context), own_case(context)
    if not own.not_transferred:
        return Result()
    failed = sum(own.not_transferred.values())
    fraction = failed / own.reached_at_source if own.reached_at_source else 0.0
    measured = {"I5_transfer_failure": fraction}
    if fraction <= NOT_TRANSFERRED:
        return Result(indicators=measured)
    # That foreign surrogates transfer badly is a result; that a view of the victim does is a fault.
    foreign = bool(case.surrogates)
    evidence = (
        f"the model classifies {failed} of {own.reached_at_source} points that fool "
        f"{'the surrogate' if foreign else 'the attacker view'} differently"
    )
    severity = "info" if foreign else "warning"
    finding = found("transfer_failure", severity, evidence, fraction, NOT_TRANSFERRED, str(case.label))
    return Result(findings=[finding], indicators=measured)


def nondeterministic_rerun(context: Context) -> Result:
    """Whether the same run gives the same records again."""
    first, case = _traced(context).records, own_case(context)
    again = run(case)
    differ = [row for row, record in first.items() if again.get(row) != record]
    if not differ:
        return Result()
    outcomes = sum(row not in again or again[row].outcome != first[row].outcome for row in differ)
    evidence = f"two identical runs differ on {len(differ)} of {case.n} samples, {outcomes} of them in the outcome"
    severity, fraction = "warning" if outcomes else "info", len(differ) / case.n
    return Result(findings=[found("nondeterministic_rerun", severity, evidence, fraction, 0.0, str(case.label))])


def unlimited_budget(context: Context) -> Result:
    """I6, of the case's own attack: whether it fails although it may change all of the input."""
    case, sweep = own_case(context), context.sweep
    if sweep is None or sweep.whole is None or case.surrogates or case.threat.describe().get("eps") is None:
        return Result()
    unlimited = traced(replace(case, threat=changed(case.threat, eps=sweep.whole)))
    rows = [unlimited.records[row] for row in sorted(correct_rows(unlimited.records))]
    fraction = indicators.unconstrained_attack_failure(
        torch.ones(len(rows), dtype=torch.bool),
        torch.tensor([record.outcome == Outcome.BROKEN for record in rows], dtype=torch.bool),
        torch.tensor([unlimited.silent.get(record.id, False) for record in rows], dtype=torch.bool),
    )
    measured = {"I6_unconstrained_attack_failure": fraction}
    explained = bool(sweep.robust[sweep.whole]) or context.named(
        "zero_gradient",
        "not_differentiable",
        "randomized_output",
        "incomplete_optimization",
        "attack_error",
        "model_error",
        "goal_error",
        "timed_out",
        "zero_gradient_ce_only",
        "budget_violation",
    )
    if fraction <= GROSS or explained:
        return Result(indicators=measured)
    evidence = f"the attack fails on {fraction:.1%} of the samples although it may change all of the input"
    finding = found("unconstrained_attack_failure", "warning", evidence, fraction, GROSS, str(case.label))
    return Result(findings=[finding], indicators=measured)


def _traced(context: Context) -> TracedRun:
    assert context.own is not None, "own_run comes first"
    return context.own
