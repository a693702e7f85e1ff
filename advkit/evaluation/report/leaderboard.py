"""Leaderboards as people read them: one HTML page, Markdown, JSON. What they say is in `board`; here it is written."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from advkit.core.errors import ReportError
from advkit.core.files import why
from advkit.core.text import printable
from advkit.evaluation.report.board import Attack, Beside, Board, Group, Score, Victim
from advkit.evaluation.report.board_page import html_of
from advkit.evaluation.report.cells import (
    attack_cells,
    attack_heads,
    claim_cells,
    claim_heads,
    flips_text,
    victim_cells,
    victim_heads,
)
from advkit.evaluation.report.document import REPORT_NAME, write_atomic
from advkit.evaluation.report.previews import find_plots
from advkit.evaluation.report.ranking import board
from advkit.evaluation.report.ranking import scan as ranked
from advkit.evaluation.report.robustbench import CLAIMED, Claim, read_cards

FILES = "leaderboard_files"
"""Folder beside a page that lies elsewhere than the runs: copies of the reports and plots that it links to."""


def write(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    claims: str | os.PathLike[str] | None = None,
) -> tuple[Board, list[Path]]:
    """Scan a folder and write leaderboard.html, .md and .json into `out` (default: the folder itself).

    The page links to the reports and to their plots. Where `out` does not hold the runs, they are copied beside it.
    """
    root = Path(folder)
    target = root if out is None else Path(out)
    made: dict[str, str] = {}

    cards = _cards(claims)

    def draw(found: Board) -> None:
        found = _with_claims(found, cards)
        made["html"] = html_of(found, root, _links(root, target))
        made["md"], made["json"] = markdown_of(found), found.to_json()

    found = _with_claims(ranked(root, draw), cards)
    if target.resolve() not in (root.resolve(), *root.resolve().parents):
        for path in found.attacks:
            _copy(root, target / FILES, path)
    paths = []
    for suffix, text in made.items():
        paths.append(target / f"leaderboard.{suffix}")
        write_atomic(paths[-1], text)
    return found, paths


def scan(folder: str | os.PathLike[str], claims: str | os.PathLike[str] | None = None) -> Board:
    """The board of every report under a folder; one that can't be shown is listed as invalid. Raises UsageError.

    claims: a folder of RobustBench cards; what they claim is listed apart, and never ranked
    """
    found = ranked(folder, lambda found: (html_of(found), markdown_of(found), found.to_json()))
    return _with_claims(found, _cards(claims))


def _cards(claims: str | os.PathLike[str] | None) -> tuple[list[Claim], list[tuple[str, str]]]:
    """What cards claim, and those that can't be read with the reason."""
    return ([], []) if claims is None else read_cards(claims)


def _with_claims(found: Board, cards: tuple[list[Claim], list[tuple[str, str]]]) -> Board:
    claimed, faults = cards
    return replace(found, claimed=tuple(claimed), invalid=(*found.invalid, *faults))


def watch(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    claims: str | os.PathLike[str] | None = None,
    *,
    seconds: float = 2.0,
    told: Callable[[Board, list[Path]], object] = lambda board, paths: None,
) -> None:
    """Write the board, and again whenever a report under the folder is new, gone or changed; until interrupted.

    seconds: between two looks
    told:    called with board and files after every writing

    Raises UsageError where there is no such folder.
    """
    before: object = None
    while True:
        seen = _state(Path(folder))
        if seen != before:
            told(*write(folder, out, claims))
            before = seen
        time.sleep(seconds)


def _state(root: Path) -> list[tuple[str, int, int]]:
    """Name, time and size of every report and of the records beside it."""
    found = []
    for top, folders, names in os.walk(root):
        folders[:] = [each for each in folders if each != FILES]
        if REPORT_NAME in names:
            for name in sorted(names):
                file = Path(top) / name
                if name.endswith((".json", ".jsonl")) and not name.startswith("leaderboard.") and file.exists():
                    told = file.stat()
                    found.append((str(file), told.st_mtime_ns, told.st_size))
    return sorted(found)


def _links(root: Path, target: Path) -> str:
    """What leads from the page to the runs."""
    here, there = target.resolve(), root.resolve()
    if here in (there, *there.parents):
        return there.relative_to(here).as_posix()
    return FILES


def _copy(root: Path, files: Path, path: str) -> None:
    """A report and its plots, where they are new or changed."""
    for file in (root / path, *(plot for _, plot in find_plots(root / path))):
        copy = files / file.relative_to(root)
        told = file.stat()
        if copy.is_file() and (copy.stat().st_mtime_ns, copy.stat().st_size) == (told.st_mtime_ns, told.st_size):
            continue
        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, copy)
        except OSError as error:
            raise ReportError(f"{copy} can't be written ({why(error)}); choose a folder that can") from None


# Markdown


def markdown_of(found: Board) -> str:
    """leaderboard.md: one table per group, and one of the attacks on every victim that met several."""
    lines = ["# Leaderboard", ""]
    for group in found.groups:
        lines += [f"## {markdown(group.title)}", ""]
        lines += _table(victim_heads(group), [victim_cells(group, victim) for victim in group.victims])
        lines += [line for said in flips_text(group) for line in (markdown(said), "")]
        for victim in group.victims:
            if len(victim.attacks) > 1 or victim.decisive.optimality is not None:
                lines += [f"### Attacks on {markdown(victim.model)}, defense {markdown(victim.defense)}", ""]
                lines += _table(attack_heads(group), [attack_cells(group, attack) for attack in victim.attacks])
    if found.claimed:
        lines += [f"## {CLAIMED.capitalize()}", ""]
        lines += _table(claim_heads(), [claim_cells(claim) for claim in found.claimed])
    for title, listed in (("Not ranked", found.unranked), ("Invalid reports", found.invalid)):
        if listed:
            lines += [f"## {title}", ""]
            lines += [f"- {markdown(path)}: {markdown(reason)}" for path, reason in listed]
            lines.append("")
    if not found.groups:
        lines += ["No report to rank.", ""]
    return "\n".join(lines)


def _table(heads: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield "| " + " | ".join(map(markdown, heads)) + " |"
    yield "|" + " --- |" * len(heads)
    for row in rows:
        yield "| " + " | ".join(map(markdown, row)) + " |"
    yield ""


def markdown(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    flat = " ".join(printable(text).split())
    return re.sub(r"([\\`*_{}\[\]<>|#~&])", r"\\\1", flat)


__all__ = [
    "Attack",
    "Beside",
    "Board",
    "Group",
    "Score",
    "Victim",
    "board",
    "find_plots",
    "html_of",
    "markdown",
    "markdown_of",
    "scan",
    "watch",
    "write",
]
