"""The board's page: its data as compact JSON, what an entry opens compressed, drawn by the page's own script.

The page stands alone: it loads nothing, and its content policy lets no other script or style run. Small pictures of
plots are inside; the plots themselves, and the reports, lie beside it and are linked.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import compress
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from advkit import __version__
from advkit.core.text import all_printable, printable_values
from advkit.evaluation.report.board import Attack, Board, Group, Victim
from advkit.evaluation.report.cells import (
    attack_cells,
    attack_heads,
    beside_text,
    claim_cells,
    claim_heads,
    flips_text,
    verified_text,
)
from advkit.evaluation.report.previews import csp_hash, find_plots, preview
from advkit.evaluation.report.render import environment, page
from advkit.evaluation.report.robustbench import CLAIMED
from advkit.evaluation.report.text import level_text, percent, spell, words_of

_TEMPLATES = Path(__file__).parent / "templates"
_PREVIEW_BYTES = 300_000
"""Of all small pictures in a page together; plots beyond that are links."""
_FIRST_PLOTS = ("examples", "per class")
_PREVIEWS = 2
FILTERS = (
    ("task", "Task"),
    ("norm", "Norm"),
    ("goal", "Goal"),
    ("access", "Access"),
    ("defense", "Defense"),
    ("attack", "Attack"),
    ("n", "Samples"),
)


def html_of(found: Board, folder: Path | None = None, links: str = ".") -> str:
    """leaderboard.html.

    folder: that holds the runs; plots below it get small pictures
    links:  what leads from the page to the runs
    """
    from markupsafe import Markup

    reports = {path: i for i, path in enumerate(found.attacks)}
    style = _text("base.css") + _text("board.css")
    script = _text("board.js") + _text("board_details.js")
    victims = [(group, victim) for group in found.groups for victim in group.victims]
    ids = {id(victim): i for i, (_, victim) in enumerate(victims)}
    more = {
        "victims": [_more(group, victim, reports, links) for group, victim in victims],
        "reports": list(_reports(found, folder, links)),
    }
    return (
        environment()
        .get_template("board.html")
        .render(
            # Files of this package, not of strangers, and JSON that can't end its element: what goes in as it stands.
            script=Markup(script),
            style=Markup(style),
            data=Markup(_json({"tabs": [_tab(groups, ids) for groups in _tabs(found.groups)]})),
            details=Markup(_packed(more)),
            script_hash=csp_hash(script),
            style_hash=csp_hash(style),
            filters=FILTERS,
            summary=_summary(found),
            claimed=CLAIMED,
            claims=_claims(found),
            lists=(("Not ranked", found.unranked), ("Invalid reports", found.invalid)),
            version=__version__,
        )
    )


def _text(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _json(value: Any) -> str:
    text = _dumped(value)
    text = text if all_printable(text) else _dumped(printable_values(value))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _packed(value: Any) -> str:
    return base64.b64encode(gzip.compress(_json(value).encode(), 6, mtime=0)).decode()


def _summary(found: Board) -> str:
    if not found.groups:
        return "No report to rank."
    counts = ((len(found), "victim"), (len(found.groups), "table"), (len(found.attacks), "report"))
    lines, tables, reports = (f"{count} {word}{'' if count == 1 else 's'}" for count, word in counts)
    return f"{lines} in {tables}, from {reports}."


def _claims(found: Board) -> list[list[str]]:
    """Heads and lines of what cards claim, without the columns that stand empty in all of them."""
    lines = [claim_cells(claim) for claim in found.claimed]
    filled = [any(line[i] not in ("", "-") for line in lines) for i in range(len(claim_heads()))]
    return [list(compress(line, filled)) for line in [claim_heads(), *lines]] if lines else []


# What is filtered, sorted and shown in lines


def _tabs(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups of one scenario that are ranked by one figure, those with most victims first."""
    found: dict[tuple[str, str, str], list[Group]] = defaultdict(list)
    for group in groups:
        found[group.scenario, group.name, group.better].append(group)
    return sorted(found.values(), key=lambda own: -sum(len(group.victims) for group in own))


def _tab(groups: Sequence[Group], ids: Mapping[int, int]) -> dict[str, Any]:
    first = groups[0]
    figures = {"clean": "Clean"}
    for group in groups:
        figures |= {key: title for key, title in group.columns.items() if key not in figures}
        figures |= {"certified": "Certified"} if group.has_certified else {}
    # Who did not know the defense stands right beside who did.
    order = sorted(figures, key=lambda key: (key != "oblivious", key != "clean"))
    scenario = words_of(first.scenario)
    return {
        "id": f"{first.scenario}-{first.headline}".replace("_", "-"),
        "scenario": scenario[:1].upper() + scenario[1:],
        "headline": first.headline,
        "score": first.name,
        "direction": first.direction,
        "figures": [[key, figures[key][:1].upper() + figures[key][1:]] for key in order],
        "groups": [_group(group, ids, order) for group in groups],
    }


def _group(group: Group, ids: Mapping[int, int], figures: Sequence[str]) -> dict[str, Any]:
    usual = level_text(group.victims[0].decisive.data["metrics"])
    return {
        "title": group.title,
        "task": group.task,
        "norm": group.norm,
        "goal": group.goal,
        "access": group.access.replace("_", " "),
        "score": group.score_name,
        "direction": group.direction,
        "note": " ".join(filter(None, [group.note, *flips_text(group)])),
        "level": usual,
        "victims": [_victim(group, victim, ids[id(victim)], figures, usual) for victim in group.victims],
    }


def _victim(group: Group, victim: Victim, number: int, figures: Sequence[str], usual: str) -> dict[str, Any]:
    """A line; what is missing is left out, and the words for its interval where they are the usual ones."""
    score = victim.score
    defense = victim.decisive.data["defense"]
    level = level_text(victim.decisive.data["metrics"])
    found = {
        "id": number,
        "rank": victim.rank,
        "ranks": None if victim.gap is None else list(victim.gap.ranks),
        "model": victim.model,
        "defense": victim.defense if defense["params"].get("recipe") else spell(victim.defense, defense["params"]),
        "score": score.text,
        "value": _short(score.number),
        "unbounded": score.value is not None and math.isinf(score.value),
        "low": _short(score.low),
        "high": _short(score.high),
        "fraction": score.fraction,
        "interval": score.interval,
        "level": level if score.interval and level != usual else "",
        "n": victim.n,
        "attacker": victim.attacker,
        "verified": victim.verified.partition(":")[0],
        "refuted": victim.refuted,
        "undecided": sum(attack.report.undecided for attack in victim.counted),
        "why": victim.why,
    }
    made: dict[str, Any] = {key: each for key, each in found.items() if each not in (None, "", False) or key == "id"}
    made["value"] = found["value"]
    made["figures"] = {key: cell for key in figures if (cell := _figure(group, victim, key)) is not None}
    made["attacks"] = victim.names
    made["flags"] = [[flag["id"], flag["severity"]] for flag in victim.flags]
    return {key: each for key, each in made.items() if each is not None}


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _figure(group: Group, victim: Victim, key: str) -> list[Any] | None:
    """[text, number] of a column, None where the victim has none."""
    if key == "clean":
        return [victim.clean.text, _short(victim.clean.number)]
    if key == "certified":
        point = victim.certified
        return None if point is None else [f"{percent(point[1])} at {point[0]:g}", _short(point[1])]
    figure, text = victim.figure(key), beside_text(group, victim, key) if key in group.columns else "-"
    return None if text == "-" else [text, None if figure is None else _short(figure.value)]


# What an entry opens


def _more(group: Group, victim: Victim, reports: Mapping[str, int], links: str) -> dict[str, Any]:
    gap = victim.gap
    return {
        "how": victim.how,
        "verified": verified_text(victim),
        "gap": None
        if gap is None
        else {
            "above": gap.above,
            "below": gap.below,
            "same": gap.same,
            "neighbour": gap.neighbour,
            "p": gap.p,
            "test": gap.test,
        },
        "heads": attack_heads(group),
        "attacks": [attack_cells(group, attack) for attack in victim.attacks],
        "links": [_href(links, attack.path) for attack in victim.attacks],
        "reports": [reports[attack.path] for attack in victim.attacks],
    }


def _href(links: str, path: str) -> str:
    """A relative address; every character that has a meaning in one is spelled out."""
    return quote("./" + PurePosixPath(links, path).as_posix())


def _reports(found: Board, folder: Path | None, links: str) -> Iterator[dict[str, Any]]:
    """Every report as it is shown; small pictures until the page holds enough of them."""
    left = _PREVIEW_BYTES
    for path, attack in found.attacks.items():
        data = page(attack.data, True)
        plots: list[list[str | None]] = []
        for name, file in [] if folder is None else _by_use(find_plots(folder / path)):
            small = preview(file) if left > 0 and len(plots) < _PREVIEWS else None
            left -= len(small or "")
            plots.append([name, _href(links, str(PurePosixPath(path).parent / "plots" / file.name)), small])
        yield {
            "title": data["title"],
            "verdict": data["verdict"],
            "level": data["level"],
            "rows": [
                [row.label, row.value, row.interval, row.success, row.counts, row.section] for row in data["rows"]
            ],
            "findings": [list(each) for each in data["findings"]],
            "facts": list(facts(attack)),
            "plots": plots,
        }


def _by_use(plots: Sequence[tuple[str, Path]]) -> list[tuple[str, Path]]:
    return sorted(plots, key=lambda plot: _FIRST_PLOTS.index(plot[0]) if plot[0] in _FIRST_PLOTS else len(_FIRST_PLOTS))


def facts(attack: Attack) -> Iterator[tuple[str, str]]:
    """What a reader needs to repeat a report."""
    data = attack.data
    dataset, model, defense, made = data["dataset"], data["model"], data["defense"], data["reproducibility"]
    chosen = str(dataset["selection"]["kind"]).replace("_", " ")
    architecture = f", {model['architecture']}" if model.get("architecture") else ""
    packages = "".join(f", {name} {version}" for name, version in sorted(made["packages"].items()))
    yield "Command", str(made["command"])
    yield "Data", f"{dataset['n_evaluated']} of {dataset['n_total']} samples, {chosen}; sha256 {dataset['sha256'][:16]}"
    weights = f"{model['n_parameters']:,} parameters; weights sha256 {model['state_sha256'][:16]}"
    yield "Model", f"{model['name']}{architecture}, {weights}"
    yield "Defense", spell(defense["name"], {k: v for k, v in defense["params"].items() if k != "recipe"})
    yield "Seed", str(made["seed"])
    software = f"advkit {data['advkit_version']}, Python {made['python']}{packages}; {made['device']}"
    yield "Software", software
    yield "Verified", attack.verified + ("" if attack.counts else " (does not count)")
    yield "Made", str(data["created_utc"])
