"""Leaderboards as people read them: one HTML page, Markdown, JSON. What they say is in `board`; here it is drawn."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from advkit.core.text import printable
from advkit.evaluation.report.board import Attack, Beside, Board, Group, Score, Victim
from advkit.evaluation.report.document import write_atomic
from advkit.evaluation.report.ranking import board
from advkit.evaluation.report.ranking import scan as ranked
from advkit.evaluation.report.render import environment, page
from advkit.evaluation.report.robustbench import CLAIMED, FIGURES, Claim, read_cards
from advkit.evaluation.report.text import level_text, percent

_TEMPLATES = Path(__file__).parent / "templates"
_MOST_PLOTS = 12
_MOST_PLOT_BYTES = 4_000_000
_IMAGE_KINDS = {".png": ("image/png", b"\x89PNG\r\n\x1a\n"), ".svg": ("image/svg+xml", b"")}


def write(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    claims: str | os.PathLike[str] | None = None,
) -> tuple[Board, list[Path]]:
    """Scan a folder and write leaderboard.html, .md and .json into `out` (default: the folder itself)."""
    root = Path(folder)
    found = scan(root, claims)
    target = root if out is None else Path(out)
    made = {"html": html_of(found, root), "md": markdown_of(found), "json": found.to_json()}
    paths = []
    for suffix, text in made.items():
        paths.append(target / f"leaderboard.{suffix}")
        write_atomic(paths[-1], text)
    return found, paths


def scan(folder: str | os.PathLike[str], claims: str | os.PathLike[str] | None = None) -> Board:
    """The board of every report under a folder; one that can't be shown is listed as invalid. Raises UsageError.

    claims: a folder of RobustBench cards; what they claim is listed apart, and never ranked
    """
    found = ranked(folder, lambda found: (html_of(found), markdown_of(found)))
    if claims is None:
        return found
    told, faults = read_cards(claims)
    return replace(found, claimed=tuple(told), invalid=(*found.invalid, *faults))


# Cells, the same in every form


def flags_text(flags: list[dict[str, str]]) -> str:
    """Ids of the flags that are more than a note."""
    return ", ".join(flag["id"] for flag in flags if flag["severity"] != "info")


def victim_heads(group: Group) -> list[str]:
    """The columns of a group."""
    certified = ["Certified"] if group.has_certified else []
    score = f"{group.score_name} ({group.direction})"
    first = ["#", "Model", "Defense", score, "Interval", "Clean", *group.columns.values(), *certified]
    return [*first, "n", "Attacks", "Attacker", "Counted", "Verified", "Flags"]


def victim_cells(group: Group, victim: Victim) -> list[str]:
    """A line of a group, as texts."""
    point = victim.certified
    proof = [] if not group.has_certified else ["" if point is None else f"{percent(point[1])} at {point[0]:g}"]
    return [
        "-" if victim.rank is None else str(victim.rank),
        victim.model,
        victim.defense,
        victim.score.text,
        victim.score.interval,
        victim.clean.text,
        *(beside_text(group, victim, key) for key in group.columns),
        *proof,
        str(victim.n),
        ", ".join(victim.names),
        victim.attacker,
        victim.how,
        verified_text(victim),
        flags_text(victim.flags),
    ]


def verified_text(victim: Victim) -> str:
    """What can be said of its reports, those that do not count among them."""
    rest = victim.refuted if victim.trusted or not victim.verified.startswith("no:") else 0
    if not rest:
        return victim.verified
    return f"{victim.verified}; {rest} {'report' if rest == 1 else 'reports'} not verified, not counted"


def beside_text(group: Group, victim: Victim, key: str) -> str:
    """The figure of a column."""
    figure = victim.figure(key)
    if figure is not None:
        return figure.text
    return "not evaluated" if group.transfer and key == "white_box" else "-"


def claim_heads() -> list[str]:
    """The columns of what cards claim."""
    return ["Model", "Data set", "Threat", "eps", *FIGURES.values(), "Venue", "Remark"]


def claim_cells(claim: Claim) -> list[str]:
    """A line of what cards claim, as texts."""
    figures = [percent(claim.figures.get(key)) for key in FIGURES]
    remark = "called unreliable by its card" if claim.card.get("unreliable") else ""
    told = [claim.model, claim.dataset, claim.threat, str(claim.card["eps"] or "-")]
    return [*told, *figures, str(claim.card.get("venue", "")), remark]


def attack_heads(group: Group) -> list[str]:
    """The columns of the attacks on one victim."""
    nearest = ["Optimality"] if group.has_optimality else []
    last = ["n", "Attacker", "Forward", "Backward", "Verified", "Flags", "Report"]
    return ["#", "Attack", group.score_name, *nearest, *last]


def attack_cells(group: Group, attack: Attack) -> list[str]:
    """A line of the attacks on one victim, as texts."""
    cost = attack.cost
    nearest = ["-" if attack.optimality is None else attack.optimality.text] if group.has_optimality else []
    return [
        "-" if attack.rank is None else str(attack.rank),
        attack.name,
        attack.score.text,
        *nearest,
        str(attack.n),
        attack.attacker,
        str(int(cost["forward"])),
        str(int(cost["backward"])),
        attack.verified if attack.counts else f"{attack.verified} (not counted)",
        flags_text(attack.report.flags),
        attack.path,
    ]


def flips_text(group: Group) -> list[str]:
    """Whether the judges agree on who is ahead: one sentence per ranking that several of them can make."""
    said = []
    for what, flips in (group.flips or {}).items():
        if flips:
            said.append(f"The order of {what} depends on the judge. {'; '.join(map(str, flips))}.")
        else:
            said.append(f"No judge reverses the order of {what}.")
    return said


# Markdown


def markdown_of(found: Board) -> str:
    """leaderboard.md: one table per group, and one of the attacks on every victim that has more to say of them."""
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


# HTML


def html_of(found: Board, folder: Path | None = None) -> str:
    """leaderboard.html, self-contained: plots under `folder` are embedded, nothing is requested."""
    from markupsafe import Markup

    script, style = ((_TEMPLATES / name).read_text(encoding="utf-8") for name in ("board.js", "board.css"))
    plots = {} if folder is None else {path: find_plots(folder / path) for path in found.attacks}
    return (
        environment()
        .get_template("leaderboard.html")
        .render(
            board=found,
            plots=plots,
            # Files of this package, not of strangers: the only text that goes in as it stands.
            script=Markup(script),
            style=Markup(style),
            script_hash=_csp_hash(script),
            style_hash=_csp_hash(style),
            tasks=sorted({group.task for group in found.groups}),
            norms=sorted({group.norm for group in found.groups}),
            level_text=level_text,
            page=page,
            beside_text=beside_text,
            flips_text=flips_text,
            claim_heads=claim_heads,
            claim_cells=claim_cells,
            claimed=CLAIMED,
            verified_text=verified_text,
            attack_heads=attack_heads,
            attack_cells=attack_cells,
        )
    )


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def find_plots(report_path: Path) -> list[tuple[str, str]]:
    """(name, data URI) of plots/*.png and *.svg beside a report; links and oversized files are passed over."""
    folder = report_path.parent / "plots"
    found: list[tuple[str, str]] = []
    if folder.is_dir() and not folder.is_symlink():
        for file in sorted(folder.iterdir()):
            kind = _IMAGE_KINDS.get(file.suffix.lower())
            if kind is None or file.is_symlink() or not file.is_file() or file.stat().st_size > _MOST_PLOT_BYTES:
                continue
            raw = file.read_bytes()
            # As an image an SVG runs no script and loads nothing, whatever it holds.
            if raw.startswith(kind[1]) and len(found) < _MOST_PLOTS:
                uri = f"data:{kind[0]};base64,{base64.b64encode(raw).decode()}"
                found.append((file.stem.replace("_", " "), uri))
    return found


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
    "write",
]
