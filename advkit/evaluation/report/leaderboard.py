"""Leaderboards: every report under a folder, ranked within its task and threat model, as HTML, Markdown and JSON.

What ranks a report is the headline that its scenario named. Numbers of different tasks, threat models or headlines are
never ranked together, certified and empirical accuracy never share a column, and a report that does not validate is
listed with its fault.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from advkit.core.errors import ReportError, UsageError
from advkit.core.text import printable, printable_json
from advkit.evaluation.report.compare import same_eps, same_kind
from advkit.evaluation.report.document import REPORT_NAME, Report, write_atomic
from advkit.evaluation.report.render import environment, lines_of, page
from advkit.evaluation.report.text import is_fraction, level_text, percent, spell, value_text, words_of
from advkit.evaluation.report.verify import verify

_TEMPLATES = Path(__file__).parent / "templates"
_WHITE_BOX = "white_box"
_MOST_PLOTS = 12
_MOST_PLOT_BYTES = 4_000_000
_IMAGE_KINDS = {".png": ("image/png", b"\x89PNG\r\n\x1a\n"), ".svg": ("image/svg+xml", b"")}


@dataclass(frozen=True)
class Beside:
    """A figure beside the score: of a companion, or one that the scenario shows beside its headline.

    key:   what its column is known by: the companion's name, or the metric
    title: its heading
    value: as a number, None where it has none
    text:  as it is shown
    """

    key: str
    title: str
    value: float | None
    text: str


@dataclass(frozen=True)
class Entry:
    """A report on the board.

    report:    what is shown
    path:      where it was found, relative to the scanned folder
    rank:      1 for the best of its group; None where a flag says the number is unreliable or there is none
    score:     what ranks it: the headline's value, or certified accuracy at the group's radius
    text:      the score as it is shown
    fraction:  the score is a fraction, and can be drawn as a bar
    low, high: the score's interval
    adaptive:  "adaptive", "oblivious", or "undeclared"
    beside:    figures no reader should miss: the companions', and those that the scenario shows beside its headline
    certified: (radius, value) where an empirical report also holds a certificate
    verified:  whether its figures and hashes are those of the records beside it: "yes", "partly: ...", "no: why" or
               "no records"
    """

    report: Report
    path: str
    rank: int | None
    score: float | None
    text: str
    fraction: bool
    low: float | None
    high: float | None
    adaptive: str
    beside: tuple[Beside, ...]
    certified: tuple[float, float | None] | None
    verified: str

    @property
    def data(self) -> dict[str, Any]:
        """The report's document, every text in it printable."""
        return self.report.current

    @property
    def page(self) -> dict[str, Any]:
        """All of the report, for the template."""
        return page(self.report.current, full=True)

    @property
    def attacks(self) -> list[str]:
        """Names of the attacks behind the score, in order."""
        return [str(row.label) for row in self.report.rows(full=True) if row.section == "attack"]

    @property
    def interval(self) -> str:
        """The score's interval, "" without one."""
        if self.low is None or self.high is None:
            return ""
        if self.fraction:
            return f"{100 * self.low:.1f} to {100 * self.high:.1f}"
        return f"{self.low:.4g} to {self.high:.4g}"

    def figure(self, key: str) -> Beside | None:
        """The figure of a column, None where this report has none."""
        return next((each for each in self.beside if each.key == key), None)

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        data = self.report.current
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
            "beside": [{"name": each.key, "figure": each.title, "value": each.value} for each in self.beside],
            "certified": None
            if self.certified is None
            else {"radius": self.certified[0], "certified_accuracy": self.certified[1]},
            "flags": [{"id": flag["id"], "severity": flag["severity"]} for flag in self.report.flags],
            "undecided": self.report.undecided,
            "verified": self.verified,
            "created_utc": data["created_utc"],
            "config_sha256": data["reproducibility"]["config_sha256"],
        }


@dataclass(frozen=True)
class Group:
    """Reports that may be ranked together: one task, one threat model, one headline.

    headline: the metric that ranks; name: how people call it; better: "higher" or "lower"
    radius:   of certified accuracy; None where attacks were survived, not proofs made
    transfer: the attacker holds surrogates only, so the white-box figure stands beside the score, or its absence
    """

    title: str
    task: str
    norm: str
    headline: str
    name: str
    better: str
    radius: float | None
    transfer: bool
    entries: tuple[Entry, ...]

    @property
    def evidence(self) -> str:
        """ "empirical" (survived attacks) or "certified" (proven at `radius`)."""
        return "empirical" if self.radius is None else "certified"

    @property
    def score_name(self) -> str:
        """Heading of the ranking column."""
        return self.name if self.radius is None else f"{self.name} at {self.radius:g}"

    @property
    def columns(self) -> dict[str, str]:
        """Key -> heading of the figures beside the score, in order of first appearance."""
        wanted = {_WHITE_BOX: _heading(_WHITE_BOX)} if self.transfer else {}
        for entry in self.entries:
            for each in entry.beside:
                wanted.setdefault(each.key, each.title)
        return wanted

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
            "schema_version": "1.1",
            "kind": "leaderboard",
            "groups": [
                {
                    "title": group.title,
                    "task": group.task,
                    "norm": group.norm,
                    "evidence": group.evidence,
                    "headline": {"metric": group.headline, "name": group.name, "better": group.better},
                    "radius": group.radius,
                    "entries": [entry.to_dict() for entry in group.entries],
                }
                for group in self.groups
            ],
            "unranked": [{"path": path, "reason": reason} for path, reason in self.unranked],
            "invalid": [{"path": path, "fault": fault} for path, fault in self.invalid],
        }
        return printable_json(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)) + "\n"

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
    flat = " ".join(printable(text).split())
    return re.sub(r"([\\`*_{}\[\]<>|#~&])", r"\\\1", flat)


def _markdown_group(group: Group) -> list[str]:
    certified = ["Certified"] if group.has_certified else []
    first = ["#", "Model", "Defense", group.score_name, "Interval", "Clean"]
    heads = [*first, *group.columns.values(), *certified, "n", "Attacks", "Attacker", "Verified", "Flags"]
    lines = [f"## {markdown(group.title)}", "", "| " + " | ".join(map(markdown, heads)) + " |"]
    lines.append("|" + " --- |" * len(heads))
    lines += ["| " + " | ".join(markdown(cell) for cell in _cells(group, entry)) + " |" for entry in group.entries]
    return [*lines, ""]


def _cells(group: Group, entry: Entry) -> list[str]:
    data = entry.data
    point = entry.certified
    proof = [] if not group.has_certified else ["" if point is None else f"{percent(point[1])} at {point[0]:g}"]
    return [
        "-" if entry.rank is None else str(entry.rank),
        data["model"]["name"],
        data["defense"]["name"],
        entry.text,
        entry.interval,
        percent(entry.report.clean_accuracy),
        *(_beside_text(group, entry, key) for key in group.columns),
        *proof,
        str(data["dataset"]["n_evaluated"]),
        ", ".join(entry.attacks),
        entry.adaptive,
        entry.verified,
        ", ".join(flag["id"] for flag in entry.report.flags if flag["severity"] != "info"),
    ]


def _beside_text(group: Group, entry: Entry, key: str) -> str:
    figure = entry.figure(key)
    if figure is not None:
        return figure.text
    return "not evaluated" if group.transfer and key == _WHITE_BOX else "-"


def _heading(name: str) -> str:
    """`white_box` is "White box", `tapm` is "TAPM"."""
    words = words_of(name)
    return words[:1].upper() + words[1:]


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


def _score(data: Mapping[str, Any]) -> tuple[Mapping[str, Any], float | None]:
    """The metric that ranks a report, and the radius where it is a point of a certified curve."""
    entry = data["metrics"][data["section"]["headline"]["metric"]]
    if not isinstance(entry, list):
        return entry, None
    point = _nearest(entry, data["threat_model"].get("eps"))
    return point["certified_accuracy"], float(point["radius"])


def _key(data: Mapping[str, Any]) -> tuple[str, ...]:
    """What must agree to the letter for two reports to be ranked together; eps is compared apart."""
    threat, dataset, headline = data["threat_model"], data["dataset"], data["section"]["headline"]
    _, radius = _score(data)
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
        # Curves of certificates are one kind of evidence, whatever their metric is called.
        "certified" if radius is not None else f"empirical {headline['metric']}",
        headline["better"],
        "" if radius is None else f"{radius:.6g}",
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
            reports.append((path, _shown(file)))
        except ReportError as error:
            invalid.append((path, str(error).removeprefix(f"{file}: ")))
    return _board(reports, invalid)


def _shown(file: Path) -> Report:
    """The report of a file, once a board of it alone could be made; ReportError where it could not.

    Reports come from other tools and from strangers: one that no check foresaw must not take the others with it.
    """
    if not file.is_file():
        raise ReportError("no regular file")
    report = Report.load(file)
    try:
        alone = _board([(REPORT_NAME, report)], [])
        _ = alone.to_html(), alone.to_markdown(), alone.to_json()
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise ReportError(f"it can't be shown ({type(error).__name__}: {first[:120]})") from error
    return report


def board(reports: Iterable[tuple[str, Report]]) -> Board:
    """A board of reports already in memory, each with the path it is to be listed under."""
    return _board(list(reports), [])


def _board(reports: Sequence[tuple[str, Report]], invalid: Sequence[tuple[str, str]]) -> Board:
    unranked = []
    keyed: dict[tuple[str, ...], list[_Item]] = {}
    texts: dict[str, str] = {}
    for path, report in reports:
        data = report.current
        first = texts.setdefault(report.to_json(), path)
        headline = data["section"]["headline"]
        if first != path:
            unranked.append((path, f"the same report as {first}"))
        elif data["kind"] != "evaluation":
            unranked.append((path, f"a {data['kind']}, not an evaluation"))
        elif headline is None or not data["metrics"][headline["metric"]]:
            unranked.append((path, "holds neither robust nor certified accuracy"))
        else:
            keyed.setdefault(_key(data), []).append(_Item(path, report, data))
    everyone = [item for found in keyed.values() for item in found]
    groups = [_group(cluster, everyone) for key in sorted(keyed) for cluster in _by_eps(keyed[key])]
    return Board(tuple(groups), tuple(unranked), tuple(invalid))


@dataclass(frozen=True)
class _Item:
    """A report that can be ranked, with its completed document."""

    path: str
    report: Report
    data: Mapping[str, Any]

    @property
    def eps(self) -> float | None:
        value = self.data["threat_model"].get("eps")
        return None if value is None else float(value)


def _by_eps(found: Sequence[_Item]) -> list[list[_Item]]:
    """Split by radius: 0.031 and 8/255 are one, everything else its own."""
    clusters: list[list[_Item]] = []
    for item in sorted(found, key=lambda item: (item.eps is None, item.eps or 0.0)):
        if clusters and same_eps(clusters[-1][0].eps, item.eps):
            clusters[-1].append(item)
        else:
            clusters.append([item])
    return clusters


def _group(found: Sequence[_Item], everyone: Sequence[_Item]) -> Group:
    data = found[0].data
    dataset, threat, headline = data["dataset"], data["threat_model"], data["section"]["headline"]
    task = " ".join(part for part in (dataset["name"], dataset.get("version", ""), dataset["split"]) if part)
    _, radius = _score(data)
    # 0.031 and 8/255 meet in one group: it goes by the name most of its reports use.
    words = Counter(sorted(item.report.threat for item in found)).most_common(1)[0][0]
    if radius is not None:
        words += ", certified"
    elif headline["metric"] != "robust_accuracy":
        words += f", by {headline['name'][:1].lower()}{headline['name'][1:]}"
    return Group(
        title=f"{task}: {words}",
        task=task,
        norm=threat.get("norm") or "none",
        headline=headline["metric"],
        name=headline["name"],
        better=headline["better"],
        radius=radius,
        transfer=radius is None and threat["knowledge"] == "transfer",
        entries=_ranked([_entry(item, everyone) for item in found], headline["better"]),
    )


def _ranked(entries: list[Entry], better: str) -> tuple[Entry, ...]:
    """In order, with ranks; ties in the score are broken by clean accuracy for the order, never for the rank."""
    sign = -1 if better == "higher" else 1
    entries.sort(key=lambda e: (e.score is None, sign * (e.score or 0.0), -(e.report.clean_accuracy or 0.0), e.path))
    ranked: list[Entry] = []
    place, last, rank = 0, None, 0
    for entry in entries:
        if entry.score is None or not entry.report.trustworthy:
            ranked.append(entry)
            continue
        place += 1
        if entry.score != last:
            rank, last = place, entry.score
        ranked.append(replace(entry, rank=rank))
    return tuple(ranked)


def _entry(item: _Item, everyone: Sequence[_Item]) -> Entry:
    data, points = item.data, _certificates(item.data)
    score, radius = _score(data)
    certified: tuple[float, float | None] | None = None
    if radius is None and points:
        point = _nearest(points, item.eps)
        certified = (point["radius"], point["certified_accuracy"]["value"])
    ci, declared = score.get("ci"), data["threat_model"].get("adaptive")
    return Entry(
        report=item.report,
        path=item.path,
        rank=None,
        score=score["value"],
        text=value_text(score),
        fraction=is_fraction(score),
        low=None if ci is None else ci["low"],
        high=None if ci is None else ci["high"],
        adaptive="undeclared" if declared is None else "adaptive" if declared else "oblivious",
        beside=tuple(_beside(item, everyone)),
        certified=certified,
        verified=verify(item.report).mark,
    )


def _beside(item: _Item, everyone: Sequence[_Item]) -> Iterator[Beside]:
    """Companions' figures, then what the scenario shows beside its headline; a sibling's white box under transfer."""
    data, metrics = item.data, item.data["metrics"]
    for each in data["companions"]:
        entry = metrics[each["metric"]]
        yield Beside(each["name"], _heading(each["name"]), entry["value"], value_text(entry))
    if data["threat_model"]["knowledge"] == "transfer" and all(c["name"] != _WHITE_BOX for c in data["companions"]):
        least = _sibling(item, everyone)
        if least is not None:
            yield Beside(_WHITE_BOX, _heading(_WHITE_BOX), least, percent(least))
    apart = {"clean_accuracy", "attack_success_rate", data["section"]["headline"]["metric"]}
    for label, name in lines_of(data):
        if name not in apart and not isinstance(metrics[name], list):
            yield Beside(name, label, metrics[name]["value"], value_text(metrics[name]))


def _sibling(item: _Item, everyone: Sequence[_Item]) -> float | None:
    """The least white-box robust accuracy of the same victim on the same data, from another report."""
    data = item.data
    known = [
        other.report.robust_accuracy
        for other in everyone
        if other.data["model"]["state_sha256"] == data["model"]["state_sha256"]
        and other.data["defense"] == data["defense"]
        and other.data["dataset"]["sha256"] == data["dataset"]["sha256"]
        and other.data["threat_model"]["knowledge"] == "white_box"
        and other.data["threat_model"].get("norm") == data["threat_model"].get("norm")
        and same_eps(other.eps, item.eps)
    ]
    return min((value for value in known if value is not None), default=None)


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
