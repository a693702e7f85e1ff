"""From reports to a leaderboard: what may be ranked together, which reports are of one victim, and what it scores."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from advkit.core.errors import ReportError, UsageError
from advkit.core.protocols import Record
from advkit.evaluation.counts import SAYS, by_judges, contested, count, was_right, worst_figures
from advkit.evaluation.replies import of_replies
from advkit.evaluation.report.board import WHITE_BOX, Attack, Beside, Board, Group, Score, Victim, heading, judges_of
from advkit.evaluation.report.compare import same_eps
from advkit.evaluation.report.document import REPORT_NAME, Report
from advkit.evaluation.report.gaps import with_gaps
from advkit.evaluation.report.items import (
    Item,
    Key,
    Samples,
    Terms,
    certificates,
    lean,
    nearest,
    rows_of,
    score_of,
    victim_of,
)
from advkit.evaluation.report.optimality import Standing, standings
from advkit.evaluation.report.render import lines_of
from advkit.evaluation.report.text import describe_threat
from advkit.evaluation.report.verify import verified, worst_case
from advkit.evaluation.stats import graded_entry, rate

_APART = frozenset({"clean_accuracy", "attack_success_rate"})
"""Figures that have a place of their own, or repeat the score."""


# From reports to a board


def scan(folder: str | os.PathLike[str], draw: Callable[[Board], object] | None = None) -> Board:
    """Read every report.json under a folder; raises UsageError when there is no such folder.

    draw: what will be made of the board; a report of which it can't be made is listed as invalid
    """
    root = Path(folder)
    if not root.is_dir():
        raise UsageError(f"{root} is no folder; expected one that holds run folders with {REPORT_NAME}")
    with _uncollected():
        return _scanned(root, draw)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's cycle collector: it walks again and again over thousands of documents, which hold no cycle."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def _scanned(root: Path, draw: Callable[[Board], object] | None) -> Board:
    files = sorted(_files(root))
    reports, invalid = [], []
    for file in files:
        path = file.relative_to(root).as_posix()
        try:
            if not file.is_file():
                raise ReportError("no regular file")
            reports.append((path, Report.load(file)))
        except ReportError as error:
            invalid.append((path, str(error).removeprefix(f"{file}: ")))
    try:
        return _drawn(reports, invalid, draw)
    except Exception:
        # Reports come from other tools and from strangers: one that no check foresaw must not take the others with it.
        alone = [(path, report, _odd(path, report, draw)) for path, report in reports]
        odd = [(path, why) for path, _, why in alone if why]
        if not odd:
            raise
        return _drawn([(path, report) for path, report, why in alone if not why], sorted(invalid + odd), draw)


def _files(root: Path) -> Iterator[Path]:
    for top, folders, names in os.walk(root):
        # Copies that lie beside a page are no further reports.
        folders[:] = [each for each in folders if each != "leaderboard_files"]
        if REPORT_NAME in names:
            yield Path(top) / REPORT_NAME


def _drawn(
    reports: Sequence[tuple[str, Report]],
    invalid: Sequence[tuple[str, str]],
    draw: Callable[[Board], object] | None,
) -> Board:
    made = _board(reports, invalid)
    (made.to_json if draw is None else lambda: draw(made))()
    return made


def _odd(path: str, report: Report, draw: Callable[[Board], object] | None) -> str:
    """Why no board of this report alone can be made, "" where one can."""
    try:
        _drawn([(path, report)], [], draw)
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        return f"it can't be shown ({type(error).__name__}: {first[:120]})"
    return ""


def board(reports: Iterable[tuple[str, Report]]) -> Board:
    """A board of reports already in memory, each with the path it is to be listed under."""
    return _board(list(reports), [])


def _board(reports: Sequence[tuple[str, Report]], invalid: Sequence[tuple[str, str]]) -> Board:
    unranked, ranked = [], []
    texts: dict[bytes, str] = {}
    for path, report in reports:
        data = report.view
        first = texts.setdefault(_digest(data), path)
        headline = data["section"]["headline"]
        if first != path:
            unranked.append((path, f"the same report as {first}"))
        elif data["kind"] != "evaluation":
            unranked.append((path, f"a {data['kind']}, not an evaluation"))
        elif headline is None or not data["metrics"][headline["metric"]]:
            unranked.append((path, "holds neither robust nor certified accuracy"))
        else:
            ranked.append((path, report, data))
    items = list(_items(ranked))
    tables: dict[tuple[Terms, Samples], list[Item]] = {}
    for item in items:
        tables.setdefault((item.terms, item.samples), []).append(item)
    of_victim: dict[Key, list[Item]] = defaultdict(list)
    for item in items:
        of_victim[item.victim].append(item)
    found = standings((item.path, item.data, item.records) for item in items if not item.refuted)
    groups = [
        (terms, _with_optimality(_group(terms, samples, own, of_victim), found))
        for (terms, samples), own in tables.items()
    ]
    told = sorted(_told_apart(groups), key=lambda made: (made.title, made.headline))
    return Board(tuple(told), tuple(unranked), tuple(invalid))


def _digest(data: Mapping[str, Any]) -> bytes:
    return hashlib.sha256(json.dumps(data).encode()).digest()


def _items(ranked: Sequence[tuple[str, Report, Mapping[str, Any]]]) -> Iterator[Item]:
    """The reports with what is known of them; records are kept where a victim has several."""
    radii = _radii(data["threat_model"].get("eps") for _, _, data in ranked)
    reports = Counter(victim_of(data) for _, _, data in ranked)
    for path, report, data in ranked:
        found, records = verified(report)
        kept = [lean(record) for record in records] if reports[victim_of(data)] > 1 else []
        samples = Samples.of(data, path, {record.id for record in records})
        eps = radii.get(data["threat_model"].get("eps"))
        countable = found.headline and not found.faults
        rows = rows_of(data["section"]["headline"]["metric"], records) if countable else None
        yield Item(path, report, data, eps, samples, found, kept, rows)


def _with_optimality(group: Group, found: Mapping[str, Standing]) -> Group:
    """The same with what is known of the optimality of its attacks, by path."""

    def told(victim: Victim) -> Victim:
        attacks = (replace(attack, optimality=found.get(attack.path)) for attack in victim.attacks)
        return replace(victim, attacks=tuple(attacks))

    return replace(group, victims=tuple(map(told, group.victims)))


def _radii(values: Iterable[float | None]) -> dict[float | None, float | None]:
    """Radius -> the one that stands for it: 0.031 and 8/255 are one, everything else its own."""
    found: dict[float | None, float | None] = {}
    first: float | None = None
    for value in sorted({float(value) for value in values if value is not None}):
        first = first if same_eps(first, value) else value
        found[value] = first
    return found


def _group(terms: Terms, samples: Samples, own: Sequence[Item], of_victim: Mapping[Key, Sequence[Item]]) -> Group:
    data = own[0].data
    dataset, threat, headline = data["dataset"], data["threat_model"], data["section"]["headline"]
    version = f" (version {dataset['version']})" if dataset.get("version") else ""
    task = f"{dataset['name']} {dataset['split']}{version}"
    _, radius = score_of(data)
    # 0.031 and 8/255 meet in one group: it goes by the name most of its reports use.
    words = Counter(sorted(_threat_words(item.data["threat_model"]) for item in own)).most_common(1)[0][0]
    if radius is not None:
        words += ", certified"
    elif headline["metric"] != "robust_accuracy":
        words += f", by {headline['name'][:1].lower()}{headline['name'][1:]}"
    by_victim: dict[Key, list[Item]] = defaultdict(list)
    for item in own:
        by_victim[item.victim].append(item)
    newest: dict[str, int] = {}
    for name, revision in (item.suite for item in own):
        newest[name] = max(revision, newest.get(name, 1))
    lines = []
    for key, found in by_victim.items():
        mine = {item.path for item in found}
        others = [item for item in of_victim[key] if item.path not in mine and terms.admits(item.terms)]
        lines.append(_victim(found, others, samples, of_victim[key], newest))
    return Group(
        title=f"{task}, {samples.words}: {words}",
        task=task,
        scenario=str(data["section"]["scenario"]),
        samples=samples.words,
        norm=threat.get("norm") or "none",
        goal=terms.goal,
        access=terms.access,
        headline=headline["metric"],
        name=headline["name"],
        better=headline["better"],
        radius=radius,
        victims=with_gaps(_ranked(lines, headline["better"])),
    )


def _threat_words(threat: Mapping[str, Any]) -> str:
    """The threat model in words, without what single attackers made of the defense."""
    words = describe_threat({**threat, "attacker": {}})
    norm = threat.get("norm")
    return words if not norm or norm.lower() in words.lower() else f"{norm} {words}"


def _told_apart(groups: Sequence[tuple[Terms, Group]]) -> Iterator[Group]:
    """Titles that several groups share get what tells them apart."""
    titled: dict[str, list[dict[str, str]]] = defaultdict(list)
    for terms, group in groups:
        titled[group.title].append(terms.words)
    for terms, group in groups:
        twins = titled[group.title]
        more = [f"{name} {text}" for name, text in terms.words.items() if any(text != each.get(name) for each in twins)]
        yield replace(group, title=", ".join([group.title, *more]), note=_apart_from(terms, group, groups))


def _apart_from(terms: Terms, group: Group, groups: Sequence[tuple[Terms, Group]]) -> str:
    """The table that versions of reports keep apart from this one, in a sentence; "" where there is none."""
    for other, twin in groups:
        if other.counted != terms.counted and replace(other, counted=terms.counted) == terms:
            if twin.samples != group.samples:
                continue
            here, there = (
                f"{each.counted.replace('_', ' ')} ({', '.join(_versions(of))})"
                for each, of in ((terms, group), (other, twin))
            )
            return f"Not ranked with the table that counts over {there}: this one counts over {here}."
    return ""


def _versions(group: Group) -> list[str]:
    found = {str(attack.data["schema_version"]) for victim in group.victims for attack in victim.attacks}
    return [f"reports of version {each}" for each in sorted(found)]


def _ranked(lines: list[Victim], better: str) -> tuple[Victim, ...]:
    """In order, with ranks; ties in the score are broken by clean accuracy for the order, never for the rank."""
    sign = -1 if better == "higher" else 1

    def order(line: Victim) -> tuple[bool, float, float, str]:
        value = line.score.value
        return value is None, sign * (value or 0.0), -(line.clean.value or 0.0), line.decisive.path

    ranked: list[Victim] = []
    place, last, rank = 0, None, 0
    for line in sorted(lines, key=order):
        if line.score.value is None or not line.trusted:
            ranked.append(line)
            continue
        place += 1
        if line.score.value != last:
            rank, last = place, line.score.value
        ranked.append(replace(line, rank=rank))
    return tuple(ranked)


# One victim


def _victim(
    own: Sequence[Item],
    others: Sequence[Item],
    samples: Samples,
    everyone: Sequence[Item],
    newest: Mapping[str, int],
) -> Victim:
    """The line of a victim.

    own:    its reports under the group's very terms, on its samples
    others: those that the terms admit all the same: of attackers with less access, or on other samples
    newest: revisions of suites in the table
    """
    if all(item.refuted for item in own):
        others = []  # attackers with less access do not stand in for what does not verify
    same = [*own, *(item for item in others if item.samples == samples)]
    sound = [item for item in same if not item.refuted]
    alone = len(own) + len(others) == 1  # then there is nothing to count again
    ids = frozenset() if alone else _agreed([item for item in sound if item.counted])
    elsewhere = [item for item in others if item.samples != samples and item.counted and ids & item.ids]
    better = own[0].data["section"]["headline"]["better"]
    by_sample = [item for item in sound if item.counted] if ids else []
    pooled = [*by_sample, *elsewhere]
    pool = _pool(pooled, ids) if len(pooled) > 1 else []
    rest = [item for item in sound or same if item not in by_sample]
    score, clean = _worst(by_sample, rest, pool, better)
    how = _how(by_sample, elsewhere, rest)
    counts = {item.path for item in (*sound, *elsewhere)}
    attacks = _attacks([*same, *elsewhere], counts, samples, better)
    first = next(item for item in (*same, *elsewhere) if item.path == attacks[0].path)
    # Of attackers with less access the score takes what they broke, not the figures beside theirs.
    mine = sorted((item for item in own if not item.refuted), key=lambda item: _rank_key(item, better))
    beside = tuple(_beside(mine or own, everyone, pool))
    why = _without_rank(own, score, newest)
    rows = rows_of(own[0].name, pool) if pool else own[0].rows if len(by_sample) == 1 or alone else None
    if rows is not None and score.counts != (int(rows.bits.sum()), len(rows.ids)):
        rows = None  # the score is that of another report
    counted = by_judges(pool) if pool else None
    judges = (
        judges_of(first.data["metrics"])
        if counted is None
        else {name.removesuffix(SAYS): k / n if n else None for name, (k, n) in counted.each.items()}
    )
    return Victim(None, score, how, clean, beside, _certified(first), attacks, not why, judges, why, rows=rows)


def _without_rank(own: Sequence[Item], score: Score, newest: Mapping[str, int]) -> str:
    """Why a line has no rank, "" where it has one."""
    sound = [item for item in own if not item.refuted]
    trusted = [item for item in sound if item.report.trustworthy]
    if not sound:
        return "its reports do not agree with their records"
    if not trusted:
        return "every report is flagged as unreliable or left samples undecided"
    if all(item.suite[1] < newest[item.suite[0]] for item in trusted):
        name, revision = trusted[0].suite
        return (
            f"made with revision {revision} of {name}, other lines with revision {newest[name]}: their figures are not "
            "comparable; run it again"
        )
    return "" if score.value is not None else "the score has no value"


def _agreed(items: Sequence[Item]) -> frozenset[str]:
    """The ids of the samples that all of them are of; none where they differ."""
    found = {item.ids for item in items}
    return found.pop() if len(found) == 1 else frozenset()


def _sign(better: str) -> int:
    return 1 if better == "higher" else -1


def _worse(scores: Iterable[Score], better: str) -> Score:
    """The worst for the defender; a score without a value only where there is no other."""
    return min(scores, key=lambda one: (one.value is None, _sign(better) * (one.value or 0.0)))


def _worst(by_sample: Sequence[Item], rest: Sequence[Item], pool: Sequence[Record], better: str) -> tuple[Score, Score]:
    """Score and clean accuracy of a line: counted over the pool where there is one, else those of single reports."""
    items = [*by_sample, *rest]
    scores = [item.score for item in (rest if pool else items)]
    clean = min(items, key=lambda item: _rank_key(item, better)).data["metrics"]["clean_accuracy"]
    if pool:
        scores.append(_counted(by_sample[0], pool))
        clean = _rate(worst_case("clean_accuracy", pool), clean)
    return _worse(scores, better), Score.of(clean)


def _how(by_sample: Sequence[Item], elsewhere: Sequence[Item], rest: Sequence[Item]) -> str:
    """How the score was made, for readers."""
    if len(by_sample) + len(elsewhere) + len(rest) == 1:
        return "one report"
    if not rest:
        more = f", {len(elsewhere)} of them on other samples" if elsewhere else ""
        return f"worst case per sample over {len(by_sample) + len(elsewhere)} reports{more}"
    if any(score_of(item.data)[1] is not None for item in rest):
        why = "certificates of several runs are not put together"
    elif any(item.trains for item in rest):
        why = "each attack trained another model"
    elif all(item.found.records and item.found.headline for item in rest):
        why = "their samples differ"
    elif all(item.found.records for item in rest):
        why = "the score is no count of samples"
    else:
        why = f"no records beside {', '.join(item.path for item in rest if not item.found.records)}"
    return f"worst of {len(by_sample) + len(rest)} reports: {why}"


def _rank_key(item: Item, better: str) -> tuple[bool, float, str]:
    value = item.score.value
    return value is None, _sign(better) * (value or 0.0), item.path


def _counted(item: Item, pool: Sequence[Record]) -> Score:
    """The headline of a report, counted over other records."""
    if item.graded:
        return Score.of(graded_entry(worst_figures(pool, item.name)))
    figure = worst_case(item.name, pool)
    if isinstance(figure, tuple):
        return Score.of(_rate(figure, item.metric))
    entry: dict[str, Any] = {**item.metric, "value": figure}
    entry.pop("unbounded", None)
    if figure is not None and math.isinf(figure):
        entry |= {"value": None, "unbounded": True}
    return Score.of(entry)


def _rate(figure: Any, like: Mapping[str, Any]) -> dict[str, Any]:
    ci = like.get("ci")
    numerator, denominator = figure
    return rate(numerator, denominator, like["denominator_kind"], 0.95 if ci is None else ci["level"])


def _pool(items: Sequence[Item], ids: frozenset[str]) -> list[Record]:
    """The records of several reports on the samples of a line, ready to be counted by the worst case.

    Where one report decided a sample, another's error or NaN says nothing more of it. What one found wrong when clean
    is wrong.
    """
    by_id: dict[str, list[list[Record]]] = defaultdict(list)
    for item in items:
        own: dict[str, list[Record]] = defaultdict(list)
        for record in item.records:
            if record.id in ids:
                own[record.id].append(record)
        for row, records in own.items():
            by_id[row].append(records)
    pool: list[Record] = []
    for groups in by_id.values():
        decided = groups
        if len(groups) > 1:
            decided = [records for records in groups if not count(records).unknown] or groups
        # The first record says how the sample was when clean.
        found = [record for records in decided for record in records]
        pool += sorted(found, key=lambda record: (was_right(record), not contested(record)))
    return pool


def _attacks(items: Sequence[Item], counts: set[str], samples: Samples, better: str) -> tuple[Attack, ...]:
    """The reports on a victim, the strongest first; those that count before those that do not."""

    def order(item: Item) -> tuple[bool, bool, tuple[bool, float, str]]:
        return item.path not in counts, item.samples != samples, _rank_key(item, better)

    ordered = sorted(items, key=order)
    made: list[Attack] = []
    place, last, rank = 0, None, 0
    for item in ordered:
        counted = item.path in counts
        why = "" if counted else "it does not agree with its records"
        attack = Attack(item.report, item.path, None, item.score, counted, why, item.found.mark)
        if counted and item.samples == samples and item.score.value is not None:
            place += 1
            if item.score.value != last:
                rank, last = place, item.score.value
            attack = replace(attack, rank=rank)
        made.append(attack)
    return tuple(made)


def _certified(item: Item) -> tuple[float, float | None] | None:
    points = certificates(item.data)
    if score_of(item.data)[1] is not None or not points:
        return None
    point = nearest(points, item.data["threat_model"].get("eps"))
    return point["radius"], point["certified_accuracy"]["value"]


def _beside(items: Sequence[Item], everyone: Sequence[Item], pool: Sequence[Record]) -> Iterator[Beside]:
    """Companions' figures, then what the scenario shows beside its headline; the least white box under transfer.

    Those of the first report, and of the others what it lacks; where the score was counted per sample, so are they.
    """
    seen = set[str]()
    for item in items:
        for each in _beside_one(item, everyone):
            if each.key not in seen:
                seen.add(each.key)
                figure = worst_case(each.key, pool) if pool and each.key in item.data["metrics"] else None
                entry = item.data["metrics"].get(each.key, {})
                again = isinstance(figure, tuple) and "denominator_kind" in entry
                yield Beside.of(each.key, each.title, _rate(figure, entry)) if again else each


def _beside_one(item: Item, everyone: Sequence[Item]) -> Iterator[Beside]:
    data, metrics = item.data, item.data["metrics"]
    companions = {each["name"]: metrics[each["metric"]] for each in data["companions"]}
    if data["threat_model"]["knowledge"] == "transfer":
        known = [*_siblings(item, everyone), *(companions[name] for name in (WHITE_BOX,) if name in companions)]
        if known := [entry for entry in known if entry["value"] is not None]:
            companions[WHITE_BOX] = min(known, key=lambda entry: float(entry["value"]))
    for name, entry in companions.items():
        yield Beside.of(name, heading(name), entry)
    if "oblivious" not in companions and (weaker := _oblivious(item, everyone)) is not None:
        yield Beside.of("oblivious", heading("oblivious"), weaker.metric)
    apart = {*_APART, item.name}
    for label, name in lines_of(data):
        if name not in apart and not of_replies(name) and not isinstance(metrics[name], list):
            yield Beside.of(name, label, metrics[name])


def _oblivious(item: Item, everyone: Sequence[Item]) -> Item | None:
    """The strongest report on the same victim and samples by an attacker who did not know the defense."""

    def knows(each: Item) -> bool:
        return str(each.data["threat_model"]["attacker"]["defense"]) in ("known", "adaptive")

    if not knows(item):
        return None
    better = item.data["section"]["headline"]["better"]
    others = [
        each
        for each in everyone
        if not each.refuted and not knows(each) and each.terms == item.terms and each.samples == item.samples
    ]
    return min(others, key=lambda each: _rank_key(each, better), default=None)


def _siblings(item: Item, everyone: Sequence[Item]) -> list[Mapping[str, Any]]:
    """White-box robust accuracies of the same victim on the same data, from other reports that count."""
    threat = item.data["threat_model"]
    return [
        other.data["metrics"]["robust_accuracy"]
        for other in everyone
        if other.victim == item.victim
        and not other.refuted
        and other.data["dataset"]["sha256"] == item.data["dataset"]["sha256"]
        and other.data["threat_model"]["knowledge"] == WHITE_BOX
        and other.data["threat_model"].get("norm") == threat.get("norm")
        and other.eps == item.eps
        and other.data["metrics"].get("robust_accuracy") is not None
    ]
