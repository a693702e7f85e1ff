"""What attacks on words look like: how searches went, and what was sent and answered."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from advkit.core.errors import UsageError
from advkit.core.protocols import Record
from advkit.evaluation.figures.axes import SERIES, new_axes, plain, wrapped
from advkit.evaluation.report import Report

SCORE = "NLL of the wanted reply (nats per token)"
_ROWS = (
    ("wanted", "wanted reply"),
    ("prompt", "prompt"),
    ("sent", "sent"),
    ("suffix", "of it the attacker's"),
    ("reply_before", "reply to the prompt"),
    ("reply", "reply to what was sent"),
)


def searched(records: Iterable[Record]) -> list[Record]:
    """Those whose trace tells a best score per number of evaluations."""
    return [r for r in records if len(_course(r)) > 1]


def search_figure(records: Sequence[Record], *, title: str = "", score: str = SCORE) -> Figure:
    """Best score so far of every row against the evaluations it took, and the median row of each attack in bold.

    records: with traces of text attacks
    score:   what was minimised; under `says` the mean negative log-likelihood of the wanted reply

    Raises UsageError where no record has such a trace.
    """
    held = searched(records)
    if not held:
        raise UsageError("no record holds the trace of a search; search_figure draws runs of beast, gcg and their like")
    figure, axes = new_axes(6.0, 3.6)
    for (attack, rows), (color, _) in zip(_by_attack(held).items(), SERIES * len(held), strict=False):
        courses = [_course(record) for record in rows]
        for course in courses:
            axes.step(course[:, 0], course[:, 1], where="post", color=color, alpha=0.25, linewidth=0.8)
        grid = np.unique(np.concatenate([course[:, 0] for course in courses]))
        best = np.array([[_at(course, each) for each in grid] for course in courses])
        axes.step(grid, np.median(best, 0), where="post", color=color, linewidth=2.2, label=plain(attack))
    axes.set_xscale("log")
    axes.set_xlabel("evaluations (candidates scored; a gradient counts as two)")
    axes.set_ylabel(wrapped(f"{score}, best so far", 30))
    axes.set_title(wrapped(title, 66), loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    figure.supxlabel("thin: one prompt each   bold: the median prompt   lower is better for the attacker", fontsize=8)
    return figure


def _score(report: Report) -> str:
    """What the searches of a run minimised, in words; the losses of an attack's own objective are named by it."""
    attacks = report.view["attacks"]
    settings: Mapping[str, Any] = attacks[0]["params"] if attacks else {}
    objective, loss = settings.get("objective", "targeted"), settings.get("loss", "ce")
    if objective != "targeted":
        return {"mia": "perplexity of prompt and suffix"}.get(objective, "minus the perplexity of the own reply")
    if loss != "ce":
        return f"{loss} loss of the target's tokens"
    return SCORE if report.view["threat_model"]["goal"] == "targeted" else "loss of the goal"


def searches_of(report: Report, records: Sequence[Record]) -> Figure | None:
    """The searches of a run; None where no record holds the trace of one."""
    if not searched(records):
        return None
    return search_figure(records, title=f"Searches, {report.threat}", score=_score(report))


def transcripts_of(report: Report, records: Sequence[Record]) -> str | None:
    """The transcripts of a run as Markdown; None where nothing was said."""
    return transcripts_page(records, title=f"Transcripts, {report.threat}") or None


def _by_attack(records: Iterable[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(str(record.made_by), []).append(record)
    return groups


def _course(record: Record) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(evaluations, best score) [n, 2] of a record's trace; steps before anything was scored are left out."""
    told = [(step.get("evaluations"), step.get("best")) for step in record.trace]
    return np.array([pair for pair in told if None not in pair], dtype=np.float64).reshape(-1, 2)


def _at(course: np.ndarray[Any, np.dtype[np.float64]], evaluations: float) -> float:
    """The best score by then; the first one before any."""
    return float(course[max(0, int(np.searchsorted(course[:, 0], evaluations, side="right")) - 1), 1])


def transcripts_page(records: Iterable[Record], *, title: str = "") -> str:
    """What was sent to a language model and what it answered, row by row, as Markdown; empty where nothing was told."""
    parts = [_transcript(record) for record in records if record.texts.get("sent")]
    if not parts:
        return ""
    head = (
        f"# {title or 'Transcripts'}\n\nWhat the victim read and what it answered with the likeliest token throughout; "
        "judges may err, so look for yourself."
    )
    return "\n\n".join((head, *parts)) + "\n"


def _transcript(record: Record) -> str:
    rows = [(label, record.texts[name]) for name, label in _ROWS if record.texts.get(name)]
    before, after = record.figures.get("target_nll_before"), record.figures.get("target_nll_after")
    if before is not None and after is not None:
        rows.append(("its negative log-likelihood", f"{before:.3f}, then {after:.3f}"))
    rows += [
        (f"judge {name.removesuffix('_asr_greedy')}", "gave in" if told else "held back")
        for name, told in record.figures.items()
        if name.endswith("_asr_greedy") and isinstance(told, bool)
    ]
    lines = [f"| {label} | {_cell(text)} |" for label, text in rows]
    return "\n".join(
        (
            f"## {_cell(record.id)}: {record.outcome.value} ({_cell(str(record.made_by))})",
            "",
            "| | |",
            "|---|---|",
            *lines,
        )
    )


def _cell(text: str) -> str:
    """Text that Markdown shows as it stands, on one line."""
    shown = html.escape(text, quote=False).replace("\\", "\\\\")
    for mark in "`*_[]|#":
        shown = shown.replace(mark, f"\\{mark}")
    return "<br>".join(shown.splitlines())
