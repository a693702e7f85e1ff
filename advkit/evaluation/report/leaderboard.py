"""Leaderboards: every report under a folder, ranked within its task and threat model, as HTML, Markdown and JSON.

Numbers of different tasks or threat models are never ranked together, certified and empirical accuracy never share a
column, and a report that does not validate is listed with its fault.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advkit.core.errors import ReportError, UsageError
from advkit.evaluation.report.compare import same_eps, same_kind
from advkit.evaluation.report.document import REPORT_NAME, Report, write_atomic
from advkit.evaluation.report.render import environment
from advkit.evaluation.report.text import level_text, percent, spell

_TEMPLATES = Path(__file__).parent / "templates"
_WHITE_BOX, _TAPM = "White box", "Best transfer attack (TAPM)"
_MOST_PLOTS = 12
_MOST_PLOT_BYTES = 4_000_000
_IMAGE_KINDS = {".png": ("image/png", b"\x89PNG\r\n\x1a\n"), ".svg": ("image/svg+xml", b"")}


@dataclass(frozen=True)
class Entry:
    """A report on the board.

    report:    what is shown
    path:      where it was found, relative to the scanned folder
    rank:      1 for the best of its group; None where a flag says the number is unreliable or there is none
    score:     what ranks it: robust accuracy, or certified accuracy at the group's radius
    low, high: the score's interval
    adaptive:  "adaptive", "oblivious", or "undeclared"
    beside:    (label, value) of the figure no reader should miss: TAPM beside white box, white box beside transfer
    certified: (radius, value) where an empirical report also holds a certificate
    """

    report: Report
    path: str
    rank: int | None
    score: float | None
    low: float | None
    high: float | None
    adaptive: str
    beside: tuple[str, float | None] | None
    certified: tuple[float, float | None] | None

    @property
    def data(self) -> dict[str, Any]:
        """The report's document."""
        return self.report.to_dict()

    @property
    def defense(self) -> str:
        """The defense, spelled with its parameters where they are few."""
        defense = self.report.to_dict()["defense"]
        return str(defense["name"])

    @property
    def attacks(self) -> list[str]:
        """Names of the attacks behind the score, in order."""
        return [str(row.label) for row in self.report.rows(full=True) if row.section == "attack"]

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        data = self.report.to_dict()
        return {
            "rank": self.rank,
            "path": self.path,
            "title": self.report.title,
            "model": data["model"]["name"],
            "defense": spell(data["defense"]["name"], data["defense"]["params"]),
            "score": self.score,
            "low": self.low,
            "high": self.high,
            "clean_accuracy": self.report.clean_accuracy,
            "attack_success_rate": data["metrics"].get("attack_success_rate"),
            "n": data["dataset"]["n_evaluated"],
            "attacks": self.attacks,
            "adaptive": self.adaptive,
            "beside": None if self.beside is None else {"figure": self.beside[0], "value": self.beside[1]},
            "certified": None
            if self.certified is None
            else {"radius": self.certified[0], "certified_accuracy": self.certified[1]},
            "flags": [{"id": flag["id"], "severity": flag["severity"]} for flag in self.report.flags],
            "undecided": self.report.undecided,
            "created_utc": data["created_utc"],
            "config_sha256": data["reproducibility"]["config_sha256"],
        }


@dataclass(frozen=True)
class Group:
    """Reports that may be ranked together: one task, one threat model, one kind of evidence.

    evidence: "empirical" (survived attacks) or "certified" (proven at `radius`)
    transfer: the attacker holds surrogates only, so the white-box figure stands beside the score, or its absence
    """

    title: str
    task: str
    norm: str
    evidence: str
    radius: float | None
    transfer: bool
    entries: tuple[Entry, ...]

    @property
    def score_name(self) -> str:
        """Heading of the ranking column."""
        return "Robust accuracy" if self.evidence == "empirical" else f"Certified accuracy at {self.radius:g}"

    @property
    def beside_name(self) -> str:
        """Heading of the figure beside the score, "" where none is due and no entry has one."""
        if self.transfer:
            return _WHITE_BOX
        return _TAPM if any(entry.beside for entry in self.entries) else ""

    @property
    def has_certified(self) -> bool:
        """Some empirical entry also holds a certificate."""
        return any(entry.certified for entry in self.entries)


@dataclass(frozen=True)
class Board:
    """All that was found under a folder.

    groups:   ranked reports
    unranked: (path, reason) of valid reports that hold no ranking number (sweeps, comparisons)
    invalid:  (path, fault) of files that are not valid reports
    """

    groups: tuple[Group, ...]
    unranked: tuple[tuple[str, str], ...]
    invalid: tuple[tuple[str, str], ...]

    def __len__(self) -> int:
        return sum(len(group.entries) for group in self.groups)

    def to_json(self) -> str:
        """leaderboard.json."""
        document = {
            "schema_version": "1.0",
            "kind": "leaderboard",
            "groups": [
                {
                    "title": group.title,
                    "task": group.task,
                    "norm": group.norm,
                    "evidence": group.evidence,
                    "radius": group.radius,
                    "entries": [entry.to_dict() for entry in group.entries],
                }
                for group in self.groups
            ],
            "unranked": [{"path": path, "reason": reason} for path, reason in self.unranked],
            "invalid": [{"path": path, "fault": fault} for path, fault in self.invalid],
        }
        return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def to_markdown(self) -> str:
        """leaderboard.md: one table per group."""
        lines = ["# Leaderboard", ""]
        for group in self.groups:
            lines += _markdown_group(group)
        for heading, found in (("Not ranked", self.unranked), ("Invalid reports", self.invalid)):
            if found:
                lines += [f"## {heading}", ""]
                lines += [f"- {markdown(path)}: {markdown(reason)}" for path, reason in found]
                lines.append("")
        if not self.groups:
            lines += ["No report to rank.", ""]
        return "\n".join(lines)

    def to_html(self, folder: Path | None = None) -> str:
        """leaderboard.html, self-contained: plots under `folder` are embedded, nothing is requested."""
        from markupsafe import Markup

        script, style = ((_TEMPLATES / name).read_text(encoding="utf-8") for name in ("board.js", "board.css"))
        plots = {} if folder is None else {e.path: find_plots(folder / e.path) for g in self.groups for e in g.entries}
        return (
            environment()
            .get_template("leaderboard.html")
            .render(
                board=self,
                plots=plots,
                # Files of this package, not of strangers: the only text that goes in as it stands.
                script=Markup(script),
                style=Markup(style),
                script_hash=_csp_hash(script),
                style_hash=_csp_hash(style),
                tasks=sorted({group.task for group in self.groups}),
                norms=sorted({group.norm for group in self.groups}),
                level_text=level_text,
            )
        )


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def markdown(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    flat = " ".join(text.split())
    return re.sub(r"([\\`*_{}\[\]<>|#~&])", r"\\\1", flat)


def _markdown_group(group: Group) -> list[str]:
    heads = ["#", "Model", "Defense", group.score_name, "Interval", "Clean", "n", "Attacks", "Attacker", "Flags"]
    if group.has_certified:
        heads.insert(6, "Certified")
    if group.beside_name:
        heads.insert(6, group.beside_name)
    lines = [f"## {markdown(group.title)}", "", "| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for entry in group.entries:
        data = entry.report.to_dict()
        bracket = "" if entry.low is None or entry.high is None else f"{100 * entry.low:.1f} to {100 * entry.high:.1f}"
        cells = [
            "-" if entry.rank is None else str(entry.rank),
            data["model"]["name"],
            data["defense"]["name"],
            percent(entry.score),
            bracket,
            percent(entry.report.clean_accuracy),
            str(data["dataset"]["n_evaluated"]),
            ", ".join(entry.attacks),
            entry.adaptive,
            ", ".join(flag["id"] for flag in entry.report.flags if flag["severity"] != "info"),
        ]
        if group.has_certified:
            cells.insert(
                6, "" if entry.certified is None else f"{percent(entry.certified[1])} at {entry.certified[0]:g}"
            )
        if group.beside_name:
            cells.insert(6, _beside_text(group, entry))
        lines.append("| " + " | ".join(markdown(cell) for cell in cells) + " |")
    return [*lines, ""]


def _beside_text(group: Group, entry: Entry) -> str:
    if entry.beside is not None:
        return percent(entry.beside[1])
    return "not evaluated" if group.transfer else "-"


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


def _certificates(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [point for entry in data["metrics"].values() if isinstance(entry, list) for point in entry]


def _nearest(points: Sequence[Mapping[str, Any]], eps: float | None) -> Mapping[str, Any]:
    """The certificate at eps where there is one; else the smallest radius, the weakest claim."""
    for point in points:
        if same_eps(point["radius"], eps):
            return point
    return min(points, key=lambda point: float(point["radius"]))


def _key(data: Mapping[str, Any]) -> tuple[str, ...]:
    """What must agree to the letter for two reports to be ranked together; eps is compared apart."""
    threat, dataset = data["threat_model"], data["dataset"]
    empirical = data["metrics"].get("robust_accuracy") is not None
    radius = "" if empirical else f"{_nearest(_certificates(data), threat.get('eps'))['radius']:.6g}"
    parts = (
        data["task"],
        dataset["name"],
        dataset.get("version", ""),
        dataset["split"],
        threat.get("norm") or "",
        same_kind(threat["name"]),
        threat["goal"],
        threat["knowledge"],
        threat.get("query_budget"),
        threat.get("n_byzantine"),
        threat.get("phase", "test_time"),
        "empirical" if empirical else "certified",
        radius,
    )
    return tuple(str(part) for part in parts)


def scan(folder: str | os.PathLike[str]) -> Board:
    """Read every report.json under a folder; raises UsageError when there is no such folder."""
    root = Path(folder)
    if not root.is_dir():
        raise UsageError(f"{root} is no folder; expected one that holds run folders with {REPORT_NAME}")
    files = sorted(Path(top) / REPORT_NAME for top, _, names in os.walk(root) if REPORT_NAME in names)
    reports, invalid = [], []
    for file in files:
        path = file.relative_to(root).as_posix()
        try:
            reports.append((path, Report.load(file)))
        except ReportError as error:
            invalid.append((path, str(error).removeprefix(f"{file}: ")))
    return _board(reports, invalid)


def board(reports: Iterable[tuple[str, Report]]) -> Board:
    """A board of reports already in memory, each with the path it is to be listed under."""
    return _board(list(reports), [])


def _board(reports: Sequence[tuple[str, Report]], invalid: Sequence[tuple[str, str]]) -> Board:
    unranked = []
    keyed: dict[tuple[str, ...], list[tuple[str, Report, dict[str, Any]]]] = {}
    texts: dict[str, str] = {}
    for path, report in reports:
        data = report.to_dict()
        twin = texts.setdefault(report.to_json(), path)
        if twin != path:
            unranked.append((path, f"the same report as {twin}"))
        elif data["kind"] != "evaluation":
            unranked.append((path, f"a {data['kind']}, not an evaluation"))
        elif data["metrics"].get("robust_accuracy") is None and not _certificates(data):
            unranked.append((path, "holds neither robust nor certified accuracy"))
        else:
            keyed.setdefault(_key(data), []).append((path, report, data))
    everyone = [(report, data) for found in keyed.values() for _, report, data in found]
    groups = []
    for key in sorted(keyed):
        for cluster in _by_eps(keyed[key]):
            groups.append(_group(cluster, everyone))
    return Board(tuple(groups), tuple(unranked), tuple(invalid))


def _by_eps(found: list[tuple[str, Report, dict[str, Any]]]) -> list[list[tuple[str, Report, dict[str, Any]]]]:
    """Split by radius: 0.031 and 8/255 are one, everything else its own."""

    def eps(item: tuple[str, Report, dict[str, Any]]) -> float | None:
        value = item[2]["threat_model"].get("eps")
        return None if value is None else float(value)

    clusters: list[list[tuple[str, Report, dict[str, Any]]]] = []
    for item in sorted(found, key=lambda item: (eps(item) is None, eps(item) or 0.0)):
        if clusters and same_eps(eps(clusters[-1][0]), eps(item)):
            clusters[-1].append(item)
        else:
            clusters.append([item])
    return clusters


def _group(
    found: Sequence[tuple[str, Report, dict[str, Any]]], everyone: Sequence[tuple[Report, dict[str, Any]]]
) -> Group:
    data = found[0][2]
    empirical = data["metrics"].get("robust_accuracy") is not None
    dataset, threat = data["dataset"], data["threat_model"]
    name = " ".join(part for part in (dataset["name"], dataset.get("version", ""), dataset["split"]) if part)
    radius = None if empirical else float(_nearest(_certificates(data), threat.get("eps"))["radius"])
    # 0.031 and 8/255 meet in one group: it goes by the name most of its reports use.
    words = Counter(sorted(report.threat for _, report, _ in found)).most_common(1)[0][0]
    made = [_entry(path, report, data, empirical, everyone) for path, report, data in found]
    # Ties in the score are broken by clean accuracy for the order, never for the rank.
    made.sort(key=lambda e: (e.score is None, -(e.score or 0.0), -(e.report.clean_accuracy or 0.0), e.path))
    ranked: list[Entry] = []
    place, last, rank = 0, None, 0
    for entry in made:
        if entry.score is None or not entry.report.trustworthy:
            ranked.append(entry)
            continue
        place += 1
        if entry.score != last:
            rank, last = place, entry.score
        ranked.append(_with_rank(entry, rank))
    return Group(
        f"{name}: {words}" + ("" if empirical else ", certified"),
        name,
        threat.get("norm") or "none",
        "empirical" if empirical else "certified",
        radius,
        empirical and threat["knowledge"] == "transfer",
        tuple(ranked),
    )


def _with_rank(entry: Entry, rank: int) -> Entry:
    from dataclasses import replace

    return replace(entry, rank=rank)


def _entry(
    path: str,
    report: Report,
    data: Mapping[str, Any],
    empirical: bool,
    everyone: Sequence[tuple[Report, dict[str, Any]]],
) -> Entry:
    points, eps = _certificates(data), data["threat_model"].get("eps")
    certified: tuple[float, float | None] | None = None
    if empirical:
        rate = data["metrics"]["robust_accuracy"]
        if points:
            point = _nearest(points, eps)
            certified = (point["radius"], point["certified_accuracy"]["value"])
    else:
        rate = _nearest(points, eps)["certified_accuracy"]
    ci = rate["ci"]
    declared = data["threat_model"].get("adaptive")
    return Entry(
        report,
        path,
        None,
        rate["value"],
        None if ci is None else ci["low"],
        None if ci is None else ci["high"],
        "undeclared" if declared is None else "adaptive" if declared else "oblivious",
        _beside(data, everyone),
        certified,
    )


def _beside(
    data: Mapping[str, Any], everyone: Sequence[tuple[Report, dict[str, Any]]]
) -> tuple[str, float | None] | None:
    """TAPM for a white-box report that holds it; white box for a transfer report, its own or a sibling's."""
    metrics = data["metrics"]
    if data["threat_model"]["knowledge"] != "transfer":
        best = metrics.get("tapm_acc_best_attack")
        return None if best is None else (_TAPM, best["value"])
    for name, entry in metrics.items():
        if "white_box" in name and isinstance(entry, dict):
            return _WHITE_BOX, entry["value"]
    siblings = [
        report.robust_accuracy
        for report, other in everyone
        if other["model"]["state_sha256"] == data["model"]["state_sha256"]
        and other["defense"] == data["defense"]
        and other["dataset"]["sha256"] == data["dataset"]["sha256"]
        and other["threat_model"]["knowledge"] == "white_box"
        and other["threat_model"].get("norm") == data["threat_model"].get("norm")
        and same_eps(other["threat_model"].get("eps"), data["threat_model"].get("eps"))
    ]
    known = [value for value in siblings if value is not None]
    return (_WHITE_BOX, min(known)) if known else None


def write(folder: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> tuple[Board, list[Path]]:
    """Scan a folder and write leaderboard.html, .md and .json into `out` (default: the folder itself)."""
    root = Path(folder)
    found = scan(root)
    target = root if out is None else Path(out)
    made = {"html": found.to_html(root), "md": found.to_markdown(), "json": found.to_json()}
    paths = []
    for suffix, text in made.items():
        paths.append(target / f"leaderboard.{suffix}")
        write_atomic(paths[-1], text)
    return found, paths
