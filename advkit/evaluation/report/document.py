"""The report: one immutable JSON document, checked before it is believed; how it is kept and what it holds."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from advkit.core.errors import ReportError
from advkit.core.files import why, write_whole
from advkit.core.strict_json import read_object
from advkit.core.text import all_printable, printable_json, printable_values
from advkit.evaluation.report import one_page, render, tables, terminal
from advkit.evaluation.report.examples import Examples, Kept, examples_of, kept_beside, records_beside
from advkit.evaluation.report.legacy import completed
from advkit.evaluation.report.render import SEVERITIES, Finding, Row
from advkit.evaluation.report.repeat import python_call
from advkit.evaluation.report.robustbench import robustbench_block
from advkit.evaluation.report.schema import undecided, validate
from advkit.evaluation.report.text import describe_threat, level_text
from advkit.evaluation.run.store import read_records
from advkit.evaluation.stats import Interval

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure
    from rich.table import Table

    from advkit.core.protocols import Record

REPORT_NAME = "report.json"


@dataclass(frozen=True)
class Report:
    """A validated, immutable evaluation report; build it with `from_dict` or `load`.

    text: canonical JSON of the document
    path: the file it came from, None for one made in memory; its folder may hold records.jsonl and plots/
    kept: records and examples of a run that left nothing on disk; None elsewhere
    Raises ReportError when the document does not validate or does not agree with itself.
    """

    text: str
    path: Path | None = field(default=None, compare=False, repr=False)
    kept: Kept | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        validate(self._data)

    @cached_property
    def _data(self) -> dict[str, Any]:
        try:
            return read_object(self.text)
        except ValueError as error:
            raise ReportError(f"not a report's JSON document: {error}") from None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], path: Path | None = None, kept: Kept | None = None) -> Report:
        """Check a document and wrap it; raises ReportError."""
        try:
            text = json.dumps(data, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ReportError(
                f"report can't be written as JSON ({error}); expected plain finite numbers, texts, lists and mappings"
            ) from None
        return cls(text, path, kept)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """Read report.json, or the report.json of a run folder; raises ReportError."""
        file = Path(path)
        if file.is_dir():
            file = file / REPORT_NAME
        try:
            text = file.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ReportError(f"no report at {file}; expected a report.json or the folder of a finished run") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ReportError(f"{file} can't be read: {error}") from None
        try:
            return cls(text, file)
        except ReportError as error:
            raise ReportError(f"{file}: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the report in one move, so that a reader never meets half of it."""
        target = Path(path)
        write_atomic(target, self.to_json() + "\n")
        return target

    def to_dict(self) -> dict[str, Any]:
        """A fresh copy of the document."""
        return cast("dict[str, Any]", json.loads(self.text))

    def to_json(self) -> str:
        """The document, indented; the same report gives the same bytes, and none that a terminal would obey."""
        return printable_json(json.dumps(self._data, indent=2, allow_nan=False, ensure_ascii=False))

    @cached_property
    def _whole(self) -> dict[str, Any]:
        """What is shown: every text in it printable, for reports come from strangers."""
        whole = completed(self._data)
        return whole if all_printable(self.text) else cast("dict[str, Any]", printable_values(whole))

    def _rate(self, name: str) -> Mapping[str, Any] | None:
        return cast("Mapping[str, Any] | None", self._data["metrics"].get(name))

    def _value(self, name: str) -> float | None:
        entry = self._rate(name)
        return None if entry is None else entry["value"]

    @property
    def current(self) -> dict[str, Any]:
        """A copy to be shown: printable, and as today's readers ask for it.

        An old document has section, companions and parts of labels added.
        """
        return copy.deepcopy(self._whole)

    @property
    def view(self) -> Mapping[str, Any]:
        """What `current` copies, to be read and never changed: for readers of thousands of reports."""
        return self._whole

    @property
    def clean_accuracy(self) -> float | None:
        """Fraction of rows answered right before any attack; None for no rows."""
        return self._value("clean_accuracy")

    @property
    def robust_accuracy(self) -> float | None:
        """Fraction of rows right before and after every attack; None where no attack was run."""
        return self._value("robust_accuracy")

    @property
    def attack_success_rate(self) -> float | None:
        """Broken rows over the denominator that `metrics` names; None where no attack was run."""
        return self._value("attack_success_rate")

    def interval(self, metric: str = "robust_accuracy") -> Interval | None:
        """The confidence interval of a metric, None where the report gives none."""
        entry = self._rate(metric)
        if not isinstance(entry, Mapping) or entry.get("ci") is None:
            return None
        return Interval(**entry["ci"])

    @property
    def metrics(self) -> dict[str, Any]:
        """Every metric by name: rates with counts, scalars, certified curves."""
        return cast("dict[str, Any]", self.to_dict()["metrics"])

    @property
    def attacks(self) -> list[dict[str, Any]]:
        """One entry per attack, in the order they ran, with the parts of its label."""
        return cast("list[dict[str, Any]]", copy.deepcopy(self._whole["attacks"]))

    @property
    def flags(self) -> list[dict[str, Any]]:
        """Findings about the evaluation itself, the most severe first."""
        flags = cast("list[dict[str, Any]]", copy.deepcopy(self._whole["diagnostics"]["flags"]))
        return sorted(flags, key=lambda flag: -SEVERITIES.index(flag["severity"]))

    @property
    def trustworthy(self) -> bool:
        """No finding says that the number is unreliable, and every sample was decided."""
        return not any(flag["severity"] == "unreliable" for flag in self.flags) and self.undecided == 0

    @property
    def undecided(self) -> int:
        """Samples right before the attack that ended neither robust nor broken (errors, NaN answers)."""
        return undecided(self._data["metrics"])

    def adversarial(self, attack: str | None = None) -> Examples:
        """The adversarial examples that were kept, one per sample, with ids, labels and verdicts.

        An evaluation keeps those of its first `keep` samples: with the report, or in its run folder, where a report
        that was loaded finds them. Of a suite or a grid each sample's example is the one that broke it, else the one
        that came nearest; of a stream, every item's, submitted or not.

        attack: label of one attack, as in `attacks`; None takes the best of all

        Raises ReportError where nothing was kept, and says what there is.
        """
        return examples_of(self.kept or kept_beside(self.path, self._data), attack)

    @property
    def title(self) -> str:
        """The report's title, or model, defense and data."""
        return render.title(self._whole)

    @property
    def threat(self) -> str:
        """The threat model in one line."""
        return describe_threat(self._whole["threat_model"])

    def rows(self, full: bool = False) -> list[Row]:
        """The summary as data: what decides, or with `full` every attack, metric and class."""
        return render.rows(self._whole, full)

    def findings(self) -> list[Finding]:
        """(severity, id, message, advice) of every flag, the most severe first; "" where the message has the advice."""
        return render.findings(self._whole)

    def verdict(self) -> str:
        """What the number says and whether it can be believed, in a few plain sentences."""
        return render.verdict(self._whole)

    def brief(self, width: int = 80) -> list[tuple[str, str]]:
        """(line, style of rich) of a page of at most 13 lines: what `str` and `advkit evaluate` show."""
        return terminal.brief(self._whole, width)

    def full(self, width: int = 80) -> list[tuple[str, str]]:
        """(line, style of rich) of everything: what `advkit show RUN` and `advkit evaluate --verbose` show."""
        return terminal.full(self._whole, width)

    def summary_table(self, full: bool = False) -> Table:
        """A rich table: rows, findings with advice, verdict; with `full` every attack, metric and class."""
        return render.table(self._whole, full)

    def __repr__(self) -> str:
        return f"Report({self.title}: {self.verdict()})"

    def __str__(self) -> str:
        return "\n".join(line for line, _ in self.brief())

    def _repr_html_(self) -> str:
        return render.html(self._whole)

    def to_html(self) -> str:
        """One self-contained page for somebody who decides: verdict, three figures, five examples, limits.

        What `advkit report RUN` writes. Examples are those that were kept, plots those beside the report; without
        either the page says so.
        """
        try:
            examples: Examples | ReportError = self.adversarial()
        except ReportError as error:
            examples = error
        return one_page.html_of(self._whole, examples, self.path, python=self.python_call)

    @property
    def python_call(self) -> str:
        """The call of `advkit.evaluate` that makes the same run; "" where the report does not hold its request."""
        kept, request = self._data["reproducibility"].get("python_call"), self._data.get("request")
        return str(kept) if kept else python_call(request, {}) if request else ""

    @property
    def command(self) -> str:
        """What was typed, or the command for the same run; "" where no command can say it (objects)."""
        return str(self._data["reproducibility"]["command"])

    def records(self) -> Sequence[Record]:
        """One record per sample and attack, of the run in memory or of the folder that the report lies in.

        Raises ReportError where they are not at hand.
        """
        if self.kept is not None:
            return self.kept.records
        file = records_beside(self.path, self._data)
        if file is None:
            raise tables.no_records()
        return read_records(file)

    def plot(self, kind: str | None = None) -> Figure:
        """A figure of the run, as matplotlib's Figure: what `advkit plot` writes.

        kind: a name of `plots()`; None takes the first

        Raises ReportError for a kind that this run does not have, and names those it has.
        """
        return cast("Figure", figures().plot(self, kind))

    def plots(self) -> list[str]:
        """The kinds of figures that this run has."""
        return cast("list[str]", figures().kinds(self))

    def to_latex(self, full: bool = False, *, caption: str = "", label: str = "") -> str:
        """The summary as a table for LaTeX (booktabs), the headline in bold.

        full:           every attack, metric and class
        caption, label: of a float around it; without both it is the tabular alone
        """
        return tables.latex(
            self.rows(full),
            figure=self._whole["section"]["wording"]["figure"],
            level=level_text(self._whole["metrics"]),
            caption=caption,
            label=label,
        )

    def to_frame(self, kind: str = "summary") -> pandas.DataFrame:
        """The run as a data frame of pandas (extra `pandas`).

        kind: summary (one line per figure, as `rows(full=True)`), attacks (one per attack, with counts, intervals and
              cost) or samples (one per sample and attack: outcome, answers, distance, margin, passes)

        Rates are fractions. Raises UsageError for another kind, MissingExtra without pandas, and ReportError for
        samples where the records are not at hand.
        """
        if kind == "summary":
            return tables.frame(tables.summary_lines(self.rows(full=True)))
        if kind == "attacks":
            return tables.frame(tables.attack_lines(self.attacks))
        if kind == "samples":
            return tables.frame(tables.sample_lines(self.records()))
        raise tables.unknown_frame(kind)

    def robustbench(self, dataset: str | None = None, **fields: str | bool | int | None) -> dict[str, Any]:
        """RobustBench's flat block, numbers as percent strings with two decimals.

        `autoattack_acc` is filled only by the protocol autoattack-standard; any other robust accuracy goes to
        `reported`, for a weaker attack must not pass for AutoAttack. `fields` add or override
        (link, authors, venue...).
        """
        return robustbench_block(self._whole, dataset, fields)


def figures() -> Any:
    """The functions that draw, found when they are called for: figures are made of reports, not reports of figures."""
    return import_module("advkit.evaluation.figures")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write beside the target and rename over it; raises ReportError when it can't be written."""
    try:
        write_whole(path, content)
    except OSError as error:
        raise ReportError(f"{path} can't be written ({why(error)}); choose a folder that can") from None
