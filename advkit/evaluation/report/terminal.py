"""A report on a terminal: a page that fits 80 columns and 15 lines, or everything; the verdict comes first."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from advkit.evaluation.report import grids
from advkit.evaluation.report.render import (
    STYLES,
    Finding,
    Row,
    findings,
    names_threat,
    remarks,
    rows,
    sentence,
    title,
    verdict,
)
from advkit.evaluation.report.text import describe_threat, level_text, shorten

Data = Mapping[str, Any]
ATTACK = "attack"
_MOST_LINES = 13  # of the fifteen of a page; two say where the rest is
_MOST_FLAGS = 3
_LEAST_ROWS = 5
_VALUE, _INTERVAL, _COUNTS = 8, 15, 25  # columns of the page; labels take the rest
_TIE = "\u00a0"  # a space at which no line breaks
_TIED = re.compile(r"\d %|\[[^\[\]\s]+, [^\[\]\s]+\]")


def brief(data: Data, width: int = 80) -> list[tuple[str, str]]:
    """(line, style) of a page of at most 13 lines of `width` characters: the verdict, then what it stands on."""
    found = findings(data)
    verdict = _folded(f"{sentence(data)} {remarks(data)[0]}", width, most=4)
    lines = [(shorten(_brief_title(data), width), "bold")]
    if not names_threat(data):
        lines.append((shorten(f"under {describe_threat(data['threat_model'])}", width), ""))
    lines += [(line, _style(found)) for line in verdict]
    lines.append((level_text(data["metrics"]).rjust(width - _COUNTS - 2), ""))
    spared = _spared(data, width)
    room = _MOST_LINES - len(lines) - bool(spared)
    flags = _flag_lines(found, min(_MOST_FLAGS, len(found), room - _LEAST_ROWS), width)
    for row in _brief_rows(data, room - len(flags)):
        lines.append((_columns(row, width), "bold" if row.section == "headline" else ""))
    return [*lines, *([(spared, "dim")] if spared else []), *flags]


def _spared(data: Data, width: int) -> str:
    """The stages that were not needed, as many as fit into a line; "" for none."""
    names = list(data["protocol"].get("not_needed") or ())
    for shown in range(len(names), -1, -1):
        more = [f"{len(names) - shown} more"] if shown < len(names) else []
        line = f"stages that were not needed: {', '.join([*map(str, names[:shown]), *more])}"
        if len(line) <= width:
            return line if names else ""
    return ""


def _style(found: Sequence[Finding]) -> str:
    """Of the verdict: that of the gravest finding, where it speaks against the number."""
    return STYLES[found[0].severity] if found and found[0].severity != "info" else "bold"


def _brief_title(data: Data) -> str:
    asked = data.get("request")
    if asked is None:
        return title(data)
    attack = asked["threat_model"] if asked["attack"] in ("", "none") else asked["attack"]
    n = data["dataset"]["n_evaluated"]
    return f"{attack}, defense {asked['defense']}, on {asked['task']}, model {asked['model']}, {n} samples"


def _brief_rows(data: Data, room: int) -> list[Row]:
    """As many rows as there is room for, in their usual order; of the scenario's lines the last ones go first."""
    found = rows(data)
    spare = [i for i, row in enumerate(found) if row.section == "table"][2:]
    rest = [i for i in range(len(found)) if i not in spare]
    dropped = [*rest, *spare][room:]
    return [row for i, row in enumerate(found) if i not in dropped]


def _label_room(width: int) -> int:
    return width - _VALUE - _INTERVAL - _COUNTS - 2


def _columns(row: Row, width: int) -> str:
    room = _label_room(width)
    numbers = f"{row.value:>{_VALUE}}{row.interval:>{_INTERVAL}}"
    if len(row.value) > _VALUE or len(row.interval) >= _INTERVAL:  # scalars, which have units or many digits
        numbers = shorten(f"{row.value} {row.interval}", _VALUE + _INTERVAL).rjust(_VALUE + _INTERVAL)
    return f"{shorten(row.label, room):<{room}}{numbers}  {shorten(row.counts, _COUNTS)}".rstrip()


def _flag_lines(found: Sequence[Finding], most: int, width: int) -> list[tuple[str, str]]:
    lines = []
    for i, finding in enumerate(found[:most]):
        more = f" (+{len(found) - most} more)" if i + 1 == most and len(found) > most else ""
        line = " ".join(f"{finding.severity}: {finding.id}: {finding.message}".split())
        room = width - len(more)
        # A message is a sentence and begins with what matters: it loses its end, not its middle.
        line = line if len(line) <= room else line[: room - 3].rstrip() + "..."
        lines.append((line + more, STYLES[finding.severity]))
    return lines


def full(data: Data, width: int = 80) -> list[tuple[str, str]]:
    """(line, style) of everything: the verdict first, then blocks of rows, grids, the cost, findings with advice."""
    found = findings(data)
    lines = [(line, "bold") for line in _folded(_brief_title(data), width)]
    lines += [(line, _style(found)) for line in _folded(verdict(data), width)]
    lines += [("", ""), (level_text(data["metrics"]).rjust(width - _COUNTS - 2), "")]
    tables = grids.of(data)
    gridded = {name for table in tables for name in table.metrics}
    shown = [row for row in rows(data, full=True) if row.metric not in gridded]
    if any(table.title == grids.JUDGES for table in tables):
        shown = [_of_attack(row) for row in shown]
    lines += _blocks([row for row in shown if row.section != "cost"], width)
    for table in tables:
        lines += [("", ""), *((line, "") for line in table.lines(width))]
    if cost := [row for row in shown if row.section == "cost"]:
        lines += [("", ""), ("cost", "bold"), *_blocks(cost, width)]
    if found:
        lines.append(("", ""))
    for finding in found:
        message = f"{finding.severity}: {finding.id}: {finding.message}"
        lines += [(line, STYLES[finding.severity]) for line in _folded(message, width)]
        lines += [(f"    {line}", "dim") for line in _folded(finding.advice, width - 4)]
    return lines


def _of_attack(row: Row) -> Row:
    """A row of the block of what the attack came to, beside the judges'; scalars have three decimals."""
    if row.section not in (ATTACK, "metric"):
        return row
    plain = row.share is not None and not row.value.endswith("%") and not row.share.is_integer()
    unit = row.value.partition(" ")[2]
    return replace(row, section=ATTACK, value=f"{row.share:.3f} {unit}".rstrip() if plain else row.value)


def _blocks(shown: Sequence[Row], width: int) -> list[tuple[str, str]]:
    """Rows with an empty line between two sections; a name too long for its column has a line of its own."""
    lines: list[tuple[str, str]] = []
    before = ""
    for row in shown:
        block = "" if row.section in ("headline", "table", "companion") else row.section
        lines += [("", "")] if before != block and lines else []
        lines += [(ATTACK, "bold")] if before != block == ATTACK else []
        before = block
        label = " ".join(row.label.split())
        if len(label) > _label_room(width):
            lines.append((shorten(label, width), ""))
            row = replace(row, label="")
        lines.append((_columns(row, width), "bold" if row.section == "headline" else ""))
    return lines


def _folded(text: str, width: int, most: int | None = None) -> list[str]:
    """Lines of a text; a number stays with its unit, and an interval in one piece."""
    tied = _TIED.sub(lambda match: match[0].replace(" ", _TIE), text)
    lines = textwrap.wrap(tied, width, max_lines=most, placeholder=" ...", break_on_hyphens=False)
    return [line.replace(_TIE, " ") for line in lines]
