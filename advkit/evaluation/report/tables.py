"""A report as tables for papers and notebooks: LaTeX, and data frames of pandas."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

from advkit.core.errors import MissingExtra, ReportError, UsageError
from advkit.core.protocols import Record

if TYPE_CHECKING:
    import pandas

FRAMES = ("summary", "attacks", "samples")
_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{each: f"\\{each}" for each in "&%$#_{}"},
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}
_SPECIALS = re.compile("|".join(map(re.escape, _SPECIAL)))
_NUMBERED = re.compile(r"(\d) \\%")


class Line(Protocol):
    """A row of a summary, as `render.rows` makes it."""

    @property
    def label(self) -> str: ...
    @property
    def value(self) -> str: ...
    @property
    def interval(self) -> str: ...
    @property
    def counts(self) -> str: ...
    @property
    def section(self) -> str: ...


def escaped(text: str) -> str:
    """A text that LaTeX sets as it stands; a number stays with its percent sign."""
    whole = _SPECIALS.sub(lambda match: _SPECIAL[match[0]], text)
    return _NUMBERED.sub(r"\1\,\\%", whole)


def latex(rows: Sequence[Line], *, figure: str, level: str, caption: str, label: str) -> str:
    r"""A table of booktabs: the label, value, interval and counts of each row, the headline in bold.

    figure, level: headings of the columns of values and of intervals
    caption, label: of the float; both empty give the tabular alone
    """

    def set_in(row: Line) -> str:
        cells = [escaped(each) for each in (row.label, row.value, row.interval, row.counts)]
        return " & ".join(rf"\textbf{{{each}}}" if row.section == "headline" and each else each for each in cells)

    lines = [
        r"\begin{tabular}{lrrl}",
        r"\toprule",
        f" & {escaped(figure)} & {escaped(level)} & counts \\\\",
        r"\midrule",
        *(f"{set_in(row)} \\\\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    if caption or label:
        said = [rf"\caption{{{escaped(caption)}}}"] if caption else []
        named = [rf"\label{{{label}}}"] if label else []
        lines = [r"\begin{table}", r"\centering", *said, *named, *lines, r"\end{table}"]
    return "\n".join([r"% \usepackage{booktabs}", *lines, ""])


def frame(lines: Iterable[Mapping[str, Any]]) -> pandas.DataFrame:
    """A data frame of these lines; raises MissingExtra without pandas."""
    try:
        import pandas
    except ImportError:
        raise MissingExtra("data frames need the package pandas: pip install 'advkit[pandas]'") from None
    return pandas.DataFrame(list(lines))


def summary_lines(rows: Iterable[Any]) -> list[dict[str, Any]]:
    """One line per row of a summary, numbers in place of texts."""
    return [
        {"label": row.label, "section": row.section, "value": row.share, "low": row.low, "high": row.high}
        | {"counts": row.counts}
        for row in rows
    ]


def attack_lines(attacks: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line per attack: rates with their intervals and counts, and what it cost."""
    made = []
    for attack in attacks:
        line: dict[str, Any] = {key: attack.get(key) for key in ("name", "attack", "stage", "source", "beside")}
        for name in ("robust_accuracy", "attack_success_rate"):
            rate = attack[name]
            ci = rate["ci"] or {}
            line |= {name: rate["value"], f"{name}_low": ci.get("low"), f"{name}_high": ci.get("high")}
            line |= {f"{name}_numerator": rate["numerator"], f"{name}_denominator": rate["denominator"]}
        line |= {"n_attacked": attack["n_attacked"]}
        made.append(line | {f"cost_{name}": value for name, value in attack.get("cost", {}).items()})
    return made


def sample_lines(records: Iterable[Record]) -> list[dict[str, Any]]:
    """One line per record; figures and measures have columns of their own, traces and texts are left out."""
    made = []
    for record in records:
        line = asdict(record)
        figures, measures = line.pop("figures"), line.pop("measures")
        for name in ("trace", "texts", "scores"):
            line.pop(name)
        line["outcome"], line["notes"] = str(record.outcome), ", ".join(record.notes)
        made.append({**line, **figures, **measures})
    return made


def unknown_frame(kind: str) -> UsageError:
    """What is said of a kind of frame that there is not."""
    return UsageError(f"there is no frame {kind!r}; expected {', '.join(FRAMES[:-1])} or {FRAMES[-1]}")


def no_records() -> ReportError:
    """What is said where the samples of a report are not at hand."""
    return ReportError(
        "this report is a document without its records: load it from its run folder with Report.load(folder), or run "
        "it again"
    )
