"""Two runs on the same rows, compared as pairs: McNemar's exact test and Newcombe's interval.

Rows are joined by id; over several attacks a row is robust only if it survived each of them, as in the report.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advkit.core.errors import AdvkitError, ReportError, UsageError
from advkit.core.protocols import Record
from advkit.evaluation.counts import count
from advkit.evaluation.poisonings import trials_of
from advkit.evaluation.report.document import Report
from advkit.evaluation.report.text import describe_threat
from advkit.evaluation.run.store import read_records, records_path
from advkit.evaluation.stats import Interval, mcnemar_exact, newcombe_paired, rate, student_t_over_seeds
from advkit.threat_models import GOALS

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class RowVerdict:
    """One row over all attacks of a run.

    label:     class of the row, None where the task has none
    clean:     answered right before any attack
    robust:    right before and after every attack
    undecided: right before any attack; some ended without a verdict (error, NaN answer) and none broke the row
    """

    label: int | None
    clean: bool
    robust: bool
    undecided: bool


@dataclass(frozen=True)
class PairedTest:
    """A yes/no figure of two systems on the same rows.

    both, only_a, only_b, neither: the 2x2 table
    p:        exact two-sided McNemar p-value
    interval: Newcombe interval of the difference A - B
    """

    both: int
    only_a: int
    only_b: int
    neither: int
    p: float
    interval: Interval

    @property
    def n(self) -> int:
        """Rows compared."""
        return self.both + self.only_a + self.only_b + self.neither

    @property
    def a(self) -> float:
        """A's share."""
        return (self.both + self.only_a) / self.n

    @property
    def b(self) -> float:
        """B's share."""
        return (self.both + self.only_b) / self.n

    @property
    def difference(self) -> float:
        """A's share minus B's."""
        return (self.only_a - self.only_b) / self.n

    def to_dict(self) -> dict[str, Any]:
        """Counts, rates, difference, interval and p-value."""
        return {
            "n": self.n,
            "both": self.both,
            "only_a": self.only_a,
            "only_b": self.only_b,
            "neither": self.neither,
            "a": rate(self.both + self.only_a, self.n, "all_samples", self.interval.level),
            "b": rate(self.both + self.only_b, self.n, "all_samples", self.interval.level),
            "difference": self.difference,
            "ci": self.interval.to_dict(),
            "mcnemar_p": self.p,
        }


@dataclass(frozen=True)
class Comparison:
    """The outcome of `compare`.

    names:     what A and B are called
    robust:    robust accuracy, the headline
    clean:     clean accuracy
    per_class: label -> robust accuracy on that class's rows; descriptive, its p-values are not corrected
    notes:     what a reader must know (other attacks, other threat model by force, undecided rows, flags)
    headline:  what `robust` is called: of two runs of certificates, the fraction of samples with one
    """

    names: tuple[str, str]
    robust: PairedTest
    clean: PairedTest
    per_class: Mapping[int, PairedTest]
    notes: tuple[str, ...] = ()
    headline: str = "robust accuracy"

    def sentence(self) -> str:
        """The result in one sentence."""
        test, (a, b) = self.robust, self.names
        level = f"{100 * test.interval.level:g} % interval"
        facts = (
            f"{100 * test.a:.1f} % against {100 * test.b:.1f} % on the same {test.n} rows: difference "
            f"{100 * test.difference:+.1f} points, {level} [{100 * test.interval.low:+.1f}, "
            f"{100 * test.interval.high:+.1f}], McNemar p = {_p_text(test.p)}"
        )
        if test.p >= 1 - test.interval.level:
            return f"No significant difference in {self.headline} between {a} and {b} ({facts})."
        better, worse = (a, b) if test.difference > 0 else (b, a)
        if self.headline != "robust accuracy":
            return f"{better} has the higher {self.headline} ({a} {facts})."
        return f"{better} is more robust than {worse} ({a} {facts})."

    def to_dict(self) -> dict[str, Any]:
        """For machines: fractions and counts."""
        return {
            "a": self.names[0],
            "b": self.names[1],
            "sentence": self.sentence(),
            "robust_accuracy": self.robust.to_dict(),
            "clean_accuracy": self.clean.to_dict(),
            "per_class": {str(label): test.to_dict() for label, test in self.per_class.items()},
            "notes": list(self.notes),
        }

    def table(self, class_names: Sequence[str] = ()) -> Table:
        """A rich table: clean, robust, each class."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD)
        table.add_column("")
        interval = f"{100 * self.robust.interval.level:g} % interval"
        for heading in ("A", "B", "A - B", interval, "only A", "only B", "p", "rows"):
            table.add_column(heading, justify="right", no_wrap=True)
        lines = [("clean accuracy", self.clean), (self.headline, self.robust)]
        for label, test in self.per_class.items():
            name = class_names[label] if 0 <= label < len(class_names) else str(label)
            lines.append((f"robust, class {name}", test))
        for i, (name, test) in enumerate(lines):
            table.add_row(
                Text(name),
                f"{100 * test.a:.1f} %",
                f"{100 * test.b:.1f} %",
                f"{100 * test.difference:+.1f}",
                f"[{100 * test.interval.low:+.1f}, {100 * test.interval.high:+.1f}]".replace("[", r"\["),
                str(test.only_a),
                str(test.only_b),
                _p_text(test.p),
                str(test.n),
                end_section=i == 1,
            )
        return table


def _p_text(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"


def row_verdicts(records: Iterable[Record]) -> dict[str, RowVerdict]:
    """Worst case per row id over all attacks, in order of first appearance."""
    by_id: dict[str, list[Record]] = {}
    for record in records:
        by_id.setdefault(record.id, []).append(record)
    return {row: _verdict(row, group) for row, group in by_id.items()}


def _verdict(row: str, group: Sequence[Record]) -> RowVerdict:
    labels = {record.label for record in group}
    if len(labels) > 1:
        raise ReportError(f"row {row} has several labels in one run: {sorted(map(str, labels))}")
    ended = count(group)
    return RowVerdict(labels.pop(), bool(ended.correct), bool(ended.right_after), bool(ended.right_unknown))


def paired(a: Sequence[bool], b: Sequence[bool], level: float = 0.95) -> PairedTest:
    """The paired test of two equally long lists of successes; raises UsageError when they are empty or unequal."""
    if len(a) != len(b) or not a:
        raise UsageError(f"paired test of {len(a)} and {len(b)} rows: expected equally many, at least one")
    both = sum(x and y for x, y in zip(a, b, strict=True))
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    neither = len(a) - both - only_a - only_b
    interval = newcombe_paired(both, only_a, only_b, neither, level)
    return PairedTest(both, only_a, only_b, neither, mcnemar_exact(only_a, only_b), interval)


def compare_records(
    a: Iterable[Record],
    b: Iterable[Record],
    names: tuple[str, str] = ("A", "B"),
    level: float = 0.95,
    notes: Iterable[str] = (),
) -> Comparison:
    """Pair two runs by row id; raises ReportError when ids or labels differ."""
    first, second = row_verdicts(a), row_verdicts(b)
    only_first, only_second = len(first.keys() - second.keys()), len(second.keys() - first.keys())
    if only_first or only_second:
        shared = len(first.keys() & second.keys())
        raise ReportError(
            f"the runs are not on the same rows: {only_first} ids only in {names[0]}, {only_second} only in "
            f"{names[1]}, {shared} in both; run both on the same rows to compare them"
        )
    if not first:
        raise ReportError("both runs are empty: nothing to compare")
    rows = list(first)
    relabelled = sum(first[row].label != second[row].label for row in rows)
    if relabelled:
        raise ReportError(f"{relabelled} rows carry different labels in the two runs: not the same data")
    remarks = list(notes)
    for name, verdicts in zip(names, (first, second), strict=True):
        lost = sum(verdict.undecided for verdict in verdicts.values())
        if lost:
            remarks.append(f"{lost} rows of {name} have no verdict (errors, NaN answers) and count as not robust")

    def test(chosen: Sequence[str], what: str) -> PairedTest:
        return paired([getattr(first[r], what) for r in chosen], [getattr(second[r], what) for r in chosen], level)

    classes: dict[int, list[str]] = {}
    for row in rows:
        label = first[row].label
        if label is not None:
            classes.setdefault(label, []).append(row)
    per_class = {label: test(classes[label], "robust") for label in sorted(classes)}
    return Comparison(names, test(rows, "robust"), test(rows, "clean"), per_class, tuple(remarks))


def compare(a: str | Path, b: str | Path, level: float = 0.95, force: bool = False) -> Comparison:
    """Compare two runs given by folder or report.json.

    Raises ReportError when they are on different data, UsageError when their threat models or goals differ and `force`
    is off.
    """
    runs = (Report.load(a), Report.load(b))
    first, second = (run.current for run in runs)
    for key in ("name", "version", "split", "sha256"):
        one, two = first["dataset"].get(key), second["dataset"].get(key)
        if one != two:
            raise ReportError(f"the runs are on different data: dataset.{key} is {one!r} in A and {two!r} in B")
    proven = [bool(run["defense"].get("certified")) for run in (first, second)]
    if proven[0] != proven[1]:
        raise UsageError("one run holds certificates, the other what survived attacks: they are never compared")
    notes = []
    if not same_threat(first["threat_model"], second["threat_model"]):
        sides = f"A under {describe_threat(first['threat_model'])}; B under {describe_threat(second['threat_model'])}"
        if not force:
            raise UsageError(f"the runs have different threat models ({sides}); --force compares them all the same")
        notes.append(f"different threat models: {sides}")
    goals = [_goal(run) for run in (first, second)]
    if goals[0] != goals[1]:
        sides = f"A {goals[0]}; B {goals[1]}"
        if not force:
            raise UsageError(
                f"the runs have different goals ({sides}), of which one may be harder to reach: run both with the same "
                "--goal; --force compares them all the same"
            )
        notes.append(f"different goals, of which one may be harder to reach: {sides}")
    attacks = [[(x["name"], x["params"]) for x in run["attacks"]] for run in (first, second)]
    if attacks[0] != attacks[1]:
        sides = " against ".join("+".join(x["name"] for x in run["attacks"]) or "none" for run in (first, second))
        notes.append(f"the attacks differ: {sides}")
    for name, run in zip("AB", runs, strict=True):
        grave = [flag["id"] for flag in run.flags if flag["severity"] == "unreliable"]
        if grave:
            notes.append(f"{name}'s number is flagged as unreliable: {', '.join(grave)}")
    records = [read_records(records_path(run)) for run in (a, b)]
    for name, run, found in zip("AB", runs, records, strict=True):
        _check_agreement(name, run, found)
    if all(run["threat_model"].get("phase") == "training_time" for run in (first, second)):
        notes += _over_trials(records[0], records[1], level)
    made = compare_records(records[0], records[1], _names(first, second), level, notes)
    return replace(made, headline="certified accuracy at any radius") if all(proven) else made


def _goal(run: Mapping[str, Any]) -> str:
    """The goal with its parameters, as it was asked for; its kind alone where a report does not say them."""
    asked, kind = run.get("request", {}).get("goal"), str(run["threat_model"].get("goal"))
    try:  # settings in one order, those left out that have their default
        return kind if asked is None else GOALS.label(GOALS.build(str(asked)))
    except AdvkitError:  # a goal that was handed over, or of a package that is not here
        return str(asked)


def _over_trials(a: Sequence[Record], b: Sequence[Record], level: float) -> list[str]:
    """What trials say of two poisonings, whose rows share trainings."""
    found = [{each.number: each.robust for each in trials_of(records)} for records in (a, b)]
    shared = sorted(found[0].keys() & found[1].keys())
    if not shared:
        return []
    told = student_t_over_seeds([found[0][trial] - found[1][trial] for trial in shared], level)
    ci = told.interval
    interval = "" if ci is None else f", {100 * level:g} % interval [{100 * ci.low:+.1f}, {100 * ci.high:+.1f}]"
    return [
        "the rows of a trial share one training, and the intervals and p-values count rows: over "
        f"{len(shared)} paired trials robust accuracy differs by {100 * told.mean:+.1f} points{interval}"
    ]


def same_threat(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Equal up to how eps was written: 0.031 is meant where others write 8/255."""

    def rest(threat: Mapping[str, Any]) -> dict[str, Any]:
        loose = ("eps", "eps_string", "name", "details", "adaptive", "attacker", "knowledge", "granted")
        granted = {"granted": threat.get("granted", threat["knowledge"])}
        return granted | {k: v for k, v in threat.items() if k not in loose and v is not None}

    if rest(a) != rest(b) or same_kind(a["name"]) != same_kind(b["name"]):
        return False
    return same_eps(a.get("eps"), b.get("eps"))


def same_kind(name: str) -> str:
    """The registry name in front of a threat model's parameters."""
    return name.split(":", 1)[0].split(" ", 1)[0].lower()


def same_eps(a: float | None, b: float | None) -> bool:
    """Equal within 5e-4 and 2 %."""
    if a is None or b is None:
        return a is b
    return abs(a - b) <= min(5e-4, 0.02 * max(abs(a), abs(b)))


def _check_agreement(name: str, run: Report, records: Sequence[Record]) -> None:
    """The report's robust count is the records': else one of the two files was replaced."""
    entry = run.metrics.get("robust_accuracy")
    verdicts = row_verdicts(records)
    if entry is None or entry["denominator_kind"] != "all_samples":
        return
    kept = sum(verdict.robust for verdict in verdicts.values())
    if (kept, len(verdicts)) != (entry["numerator"], entry["denominator"]):
        raise ReportError(
            f"{name}: the records say {kept} of {len(verdicts)} rows robust, the report {entry['numerator']} of "
            f"{entry['denominator']}; they are not of the same finished run"
        )


def _names(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[str, str]:
    """The shortest description that tells A from B."""

    def victim(run: Mapping[str, Any]) -> str:
        return f"{run['model']['name']} ({run['defense']['name']})"

    def attacks(run: Mapping[str, Any]) -> str:
        return "+".join(x["name"] for x in run["attacks"])

    for pick in (victim, attacks):
        if pick(first) != pick(second):
            return f"A = {pick(first)}", f"B = {pick(second)}"
    return "A", "B"


def per_class_rates(records: Iterable[Record], level: float = 0.95) -> dict[int, dict[str, dict[str, Any]]]:
    """label -> {"clean": rate, "robust": rate} over that class's rows."""
    classes: dict[int, list[RowVerdict]] = {}
    for verdict in row_verdicts(records).values():
        if verdict.label is not None:
            classes.setdefault(verdict.label, []).append(verdict)
    return {
        label: {
            what: rate(sum(getattr(v, what) for v in rows), len(rows), "source_class", level)
            for what in ("clean", "robust")
        }
        for label, rows in sorted(classes.items())
    }
