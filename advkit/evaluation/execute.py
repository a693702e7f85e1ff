"""A plan carried out, in seven moves: resolve, check, diagnose, run and judge, record, summarize, report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from advkit.core.checks import whole
from advkit.core.errors import UsageError
from advkit.core.files import check_unclaimed
from advkit.core.limits import TimedOut, limited
from advkit.core.protocols import FlipsLabels, OfFiles, Outcome, Record, answer_shape, ids_of
from advkit.core.state import plainly
from advkit.core.watching import watcher
from advkit.evaluation.attacker import attacker_of
from advkit.evaluation.certificates import refuted
from advkit.evaluation.counts import by_label
from advkit.evaluation.document import Run, document
from advkit.evaluation.plan import Plan
from advkit.evaluation.report import Report
from advkit.evaluation.report.document import REPORT_NAME
from advkit.evaluation.report.examples import Kept
from advkit.evaluation.report.query import keep_parquet
from advkit.evaluation.run.case import Case
from advkit.evaluation.run.engine import open_store
from advkit.evaluation.run.engine import run as run_scenario
from advkit.evaluation.run.rehearsal import answered, first_rows
from advkit.evaluation.run.rehearsal import preflight as preflight_scenario
from advkit.evaluation.run.scenario import Companion
from advkit.evaluation.run.store import Store, beside_name, read_examples
from advkit.evaluation.scenarios import scenario_of
from advkit.evaluation.trust import diagnostics
from advkit.evaluation.trust.findings import Finding, found

Watch = Callable[[str, Case, list[Record], int], None]  # title, case, new records, records in all


@plainly
def preflight(case: Case) -> None:
    """Refuse what can't give a number: raises BadInput, BadModel or UsageError before anything is spent."""
    preflight_scenario(case, scenario_of(case))


def check_inputs_change(case: Case) -> None:
    """Raise UsageError for what makes no adversarial examples."""
    attack: object = case.attack
    if isinstance(attack, FlipsLabels):
        raise UsageError(
            f"{case.label} flips training labels and leaves inputs as they are: there are no adversarial examples; "
            "`advkit evaluate` measures it"
        )
    if attack is None:
        raise UsageError("without an attack there are no adversarial examples: name one, such as pgd")


@plainly
def run(
    case: Case, store: Store, progress: Callable[[list[Record], int], None] | None = None, workers: int | None = 1
) -> list[Record]:
    """Run what the store does not hold yet and return the case's records in the order of the run.

    Whoever watches (`core.watching`) is told of it, beside `progress`.
    """
    told = watcher()
    if told is not None:
        told.starts(store.name, case)

    def tell(new: list[Record], total: int) -> None:
        if told is not None:
            told.recorded(new, total)
        if progress is not None:
            progress(new, total)

    return run_scenario(case, scenario_of(case), store, tell, workers)


@plainly
def execute(
    plan: Plan,
    *,
    out: str | Path | None = None,
    watch: Watch | None = None,
    command: str = "",
    workers: int | None = 1,
) -> Report:
    """Carry out a plan and write its report; `out` None keeps nothing on disk. See `advkit.evaluate`."""
    import tempfile

    workers = None if workers is None else whole("workers", workers, 1)
    if out is not None:
        check_unclaimed(Path(out))
        report = _execute(plan, Path(out), watch, command, workers, lasting=True)
        return replace(report, path=report.save(Path(out) / REPORT_NAME))
    with tempfile.TemporaryDirectory(prefix="advkit-") as folder:
        return _execute(plan, Path(folder), watch, command, workers, lasting=False)


def _execute(
    plan: Plan, folder: Path, watch: Watch | None, command: str, workers: int | None, *, lasting: bool
) -> Report:
    asked: list[tuple[str, Case, Companion | None]] = [("records", plan.case, None)]
    run_beside = [(each, each.case) for each in plan.companions if each.case is not None]
    asked += [(beside_name(each.name, i), case, each) for i, (each, case) in enumerate(run_beside)]
    for _, case, _ in asked:
        preflight(case)
    if isinstance(plan.case.task, OfFiles):
        plan.case.task.look(plan.case.n)  # a damaged file is met now, and not after hours
    findings, randomized = first_look(plan.case)
    if randomized and plan.case.places is not None:
        raise UsageError("the victim's answers vary from call to call: leave rows out and run all of them together")
    with ExitStack() as stores:
        runs = []
        for title, case, companion in asked:
            if case.victim is plan.case.victim:
                case = replace(case, randomized=randomized)
            store = open_store(case, folder, title, scenario_of(case))
            stores.callback(store.close)
            runs.append(_run(case, companion, store, watch, workers))
        for each in runs:
            each.store.settle()
            if lasting:
                keep_parquet(each.store.path, each.store.sha256, len(each.store))
    findings += diagnostics.after(runs[0].case, runs[0].records)
    findings += [finding for each in runs if each.kept for finding in [speed_finding(each)]]
    findings += _compared(runs[0], runs[1:])
    findings += _only_oblivious(runs) + [_left_out(each) for each in plan.companions if each.case is None]
    flags = [*(finding.to_dict() for finding in findings), *map(dict, runs[0].section.flags)]
    kept = None if lasting else Kept(runs[0].records, read_examples(folder))
    return Report.from_dict(document(plan, runs, flags, command=command, lasting=lasting), kept=kept)


def first_look(case: Case) -> tuple[list[Finding], bool]:
    """The cheap diagnostics of the first rows, and whether the victim's answers vary."""
    first = first_rows(case)
    if first.labels is None and not answer_shape(case.task):
        return [], case.randomized
    first, _ = answered(case, first)
    # Long enough for any model that answers single samples in time: what is found here decides how verdicts are made.
    seconds = None if case.sample_timeout is None else case.sample_timeout * len(first.x) * diagnostics.CALLS
    try:
        with limited(seconds):
            findings = diagnostics.cheap(case, first.x, first.labels, first.ids)
    except TimedOut as error:
        evidence = (
            f"the model did not come back while it was looked at before the run ({error}): its checks are missing"
        )
        return [found("timed_out", "unreliable", evidence)], case.randomized
    varies = any(each.id == "randomized_output" and each.severity != "info" for each in findings)
    return findings, case.randomized or varies


def _run(case: Case, companion: Companion | None, store: Store, watch: Watch | None, workers: int | None) -> Run:
    """One case: run into its store, and summarized."""
    progress = None if watch is None else lambda new, total: watch(store.name, case, new, total)
    records = in_order(case, run(case, store, progress, workers))
    section = scenario_of(case).summarize(case, records)
    if section.certified:  # an attack that was named stands beside, with records of its own
        case = replace(case, attack=None)
    return Run(case, records, section, store, companion, store.kept)


def in_order(case: Case, records: Sequence[Record]) -> list[Record]:
    """Records in the task's order, whatever order a resumed run wrote them in."""
    place = {row: number for number, row in enumerate(ids_of(case.task, case.n))}
    return [record for own in by_label(records).values() for record in sorted(own, key=lambda r: place[r.id])]


def _compared(run: Run, others: Sequence[Run]) -> list[Finding]:
    """Whether a companion whose attacker knows less breaks more."""
    weaker = [other for other in others if other.companion is not None and other.companion.knows_less]
    attack: object = run.case.attack
    if isinstance(attack, FlipsLabels):
        return [
            finding
            for other in weaker
            for name in {str(record.made_by) for record in other.records}
            if (finding := diagnostics.oblivious_beats_adaptive(run.records, other.records, name)) is not None
        ]
    breaks = [
        diagnostics.black_box_beats_white_box(
            run.records, other.records, str(other.case.label), randomized=run.case.randomized
        )
        for other in weaker
    ]
    breaks += [
        _refuted(run, other, other.companion.within)
        for other in others
        if other.companion is not None and other.companion.within is not None
    ]
    return [finding for finding in breaks if finding is not None]


def _only_oblivious(runs: Sequence[Run]) -> list[Finding]:
    """That no attacker of a defended model knew of the defense."""
    own = [each for each in runs if each.case.victim is runs[0].case.victim]
    if any(attacker_of(each.case, each.records)["defense"] != "unknown" for each in own):
        return []
    evidence = (
        f"the defense {runs[0].case.specs['defense']} was evaluated only against attackers who do not know of it: no "
        "attack ever asked the defended model"
    )
    return [found("only_oblivious", "warning", evidence)]


def _refuted(run: Run, other: Run, within: float) -> Finding | None:
    """That an attack found another class for samples which are certified at its radius."""
    alpha = run.case.threat.describe()["details"]["alpha"]
    rows = refuted(run.records, other.records, alpha, within)
    if not rows:
        return None
    evidence = (
        f"{other.case.label} finds another class for {len(rows)} samples that are certified at its radius {within:g} "
        f"(the first: {rows[0]}); a certificate is false with probability {alpha:g} at most"
    )
    return found("certificate_violated", "unreliable", evidence, float(len(rows)), 0.0)


def _left_out(companion: Companion) -> Finding:
    evidence = f"{companion.title} ({companion.name}) was not evaluated beside it: {companion.without}"
    return found("companion_missing", "info", evidence)


def speed_finding(run: Run) -> Finding:
    """What the speed switches came to: which were kept, and how many rows they misled."""
    case, records = run.case, run.records
    refuted = sum(any(note.startswith("refuted_") for note in record.notes) for record in records)
    again = sum("again_in_fp32" in record.notes for record in records)
    broken = sum(record.outcome == Outcome.BROKEN for record in records)
    used = sorted(set(run.kept.values()))
    seen = f"the attack searched under speed {case.speed}"
    if used != [str(case.speed)]:
        seen += f" (kept after measuring: {', '.join(f'{text} on {name}' for name, text in sorted(run.kept.items()))})"
    if case.surrogates:
        seen += ", on surrogates; verdicts are the victim's in full precision"
    else:
        seen += f"; {refuted} rows that it took for broken were refuted in full precision and attacked again there"
        seen += f", {broken} rows were broken in full precision"
    if again:
        seen += f"; {again} rows on which it got no usable answer or gradient were attacked again, too"
    advice = "a robust row was robust to a search at that speed: --speed fp32 searches in full precision"
    name = "" if len({cell.label for cell in scenario_of(case).cells(case)} - {case.label}) else str(case.label)
    return Finding("low_precision", "info", seen, advice, float(refuted), None, name)


__all__: list[Any] = ["Watch", "execute", "in_order", "preflight", "run", "speed_finding"]
