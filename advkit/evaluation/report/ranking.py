"""From reports to a leaderboard: what may be ranked together, which reports are of one victim, and what it scores."""

from __future__ import annotations

import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from advkit.core.errors import ReportError, UsageError
from advkit.core.protocols import Record
from advkit.evaluation.counts import SAYS, by_judges, contested, count, was_right, worst_figures
from advkit.evaluation.replies import of_replies
from advkit.evaluation.report.board import (
    LADDER,
    WHITE_BOX,
    Attack,
    Beside,
    Board,
    Group,
    Score,
    Victim,
    heading,
    judges_of,
)
from advkit.evaluation.report.compare import same_eps, same_kind
from advkit.evaluation.report.document import REPORT_NAME, Report
from advkit.evaluation.report.optimality import Standing, standings
from advkit.evaluation.report.render import lines_of
from advkit.evaluation.report.text import describe_threat
from advkit.evaluation.report.verify import EVASION, Verification, verified, worst_case
from advkit.evaluation.stats import graded_entry, rate

_OF_ATTACKER = frozenset({"sources", "seen", "attacks", "attacks_all"})
"""Details of a threat model that say what the attacker did, not what he may do."""
_APART = frozenset({"clean_accuracy", "attack_success_rate"})
"""Figures that have a place of their own, or repeat the score."""
_Key = tuple[str, str, str]


# What is compared with what


@dataclass(frozen=True)
class _Samples:
    """Which samples of a data set were evaluated, as far as a report says.

    kind: "first" (the first n of a fixed order) or "ids"
    name: of the selection where ids were chosen
    """

    kind: str
    n: int
    name: str = ""

    @classmethod
    def of(cls, data: Mapping[str, Any], path: str, ids: Iterable[str]) -> _Samples:
        """Those of a report; `ids` are its records', and `path` stands for them where neither says which."""
        dataset = data["dataset"]
        n, selection = int(dataset["n_evaluated"]), dataset["selection"]
        if selection["kind"] in ("all", "first_n"):
            return cls("first", n)
        return cls("ids", n, selection.get("ids_sha256") or " ".join(sorted(ids)) or path)

    @property
    def words(self) -> str:
        """As it stands in a title."""
        return f"{'first ' if self.kind == 'first' else ''}{self.n}{' chosen' if self.kind == 'ids' else ''} samples"


@dataclass(frozen=True)
class _Terms:
    """Under what a report was made: what must agree for two to be ranked together.

    data:     task, data set and its hash, which is left out where a model's tokenizer is part of it
    headline: metric and direction; certificates of any metric are one
    kind:     of threat model, by its registry name
    eps:      the radius that stands for its like: 0.031 and 8/255 are one
    access:   what the attack made use of
    budget:   queries granted, None for any number
    lattice:  steps across the box of what may be submitted, 0 for any value
    rest:     everything else that the threat model says of itself
    """

    data: tuple[str, ...]
    headline: tuple[str, ...]
    goal: str
    kind: str
    norm: str
    eps: float | None
    access: str
    budget: int | None
    lattice: int
    rest: tuple[tuple[str, str], ...]

    def admits(self, other: _Terms) -> bool:
        """Whether what was done under the other terms was allowed under these, too."""
        same = ("data", "headline", "goal", "norm", "eps")
        if any(getattr(self, name) != getattr(other, name) for name in same):
            return False
        if self.lattice not in (0, other.lattice) or not _affords(self.budget, other.budget):
            return False
        if self.access == WHITE_BOX and other.access == "transfer":
            # Who has the victim can do without it; threat models of surrogates have names of their own.
            return self.kind == self.norm.lower() and self._rest("box", "phase") == other._rest("box", "phase")
        if self.kind != other.kind or self.rest != other.rest:
            return False
        if self.access in LADDER and other.access in LADDER:
            return LADDER.index(self.access) >= LADDER.index(other.access)
        return self.access == other.access

    @property
    def words(self) -> dict[str, str]:
        """What a title does not say."""
        budget = {} if self.budget is None else {"queries": str(self.budget)}
        rest = {name.replace("_", " "): value.strip('"') for name, value in self.rest}
        return {"goal": self.goal, "lattice": str(self.lattice), **budget, **rest, "data": self.data[-1][:8]}

    def _rest(self, *names: str) -> list[tuple[str, str]]:
        return [(name, value) for name, value in self.rest if name in names]


def _affords(granted: int | None, used: int | None) -> bool:
    return granted is None or (used is not None and used <= granted)


@dataclass(frozen=True, eq=False)
class _Item:
    """A report that can be ranked, with its completed document and what lies beside it."""

    path: str
    report: Report
    data: Mapping[str, Any]
    eps: float | None
    samples: _Samples
    found: Verification
    records: Sequence[Record] = field(repr=False)

    @cached_property
    def victim(self) -> _Key:
        return _victim_of(self.data)

    @cached_property
    def metric(self) -> Mapping[str, Any]:
        """What ranks it."""
        return _score(self.data)[0]

    @cached_property
    def score(self) -> Score:
        return Score.of(self.metric)

    @property
    def refuted(self) -> bool:
        return bool(self.found.faults)

    @property
    def name(self) -> str:
        """The headline's metric."""
        return str(self.data["section"]["headline"]["metric"])

    @cached_property
    def counted(self) -> bool:
        """Whether the score is a count of samples that the records give, and so can be taken sample by sample.

        Not where the attacker moves before training: each attack then leaves another model, and no attacker can have
        what one of them breaks and what another does.
        """
        return (
            not self.trains
            and self.found.headline
            and not self.refuted
            and (self.graded or worst_case(self.name, self.records) is not None)
        )

    @property
    def graded(self) -> bool:
        """Whether the score is the mean of a figure that every sample has, larger for worse."""
        ci = self.metric.get("ci") or {}
        of_samples = ci.get("method") == "bootstrap_percentile" and self.data["section"]["scenario"] == EVASION
        return of_samples and bool(worst_figures(self.records, self.name))

    @property
    def trains(self) -> bool:
        """Whether the attacker moved before training."""
        return bool(self.data["threat_model"].get("phase") == "training_time")

    @cached_property
    def ids(self) -> frozenset[str]:
        return frozenset(record.id for record in self.records)

    @cached_property
    def terms(self) -> _Terms:
        data = self.data
        threat, dataset, headline = data["threat_model"], data["dataset"], data["section"]["headline"]
        details = {key: each for key, each in threat.get("details", {}).items() if key not in _OF_ATTACKER}
        lattice = details.pop("lattice", 0)
        _, radius = _score(data)
        rest = {"phase": threat.get("phase", "test_time"), "n_byzantine": threat.get("n_byzantine"), **details}
        return _Terms(
            data=(
                data["task"],
                dataset["name"],
                dataset.get("version", ""),
                dataset["split"],
                "" if data["task"] == "text_generation" else dataset["sha256"],
            ),
            # Curves of certificates are one kind of evidence, whatever their metric is called.
            headline=(headline["metric"] if radius is None else f"certified {radius:.6g}", headline["better"]),
            goal=str(data.get("request", {}).get("goal") or threat["goal"]),
            kind=same_kind(threat["name"]),
            norm=threat.get("norm") or "",
            eps=self.eps,
            access=threat["knowledge"],
            budget=threat.get("query_budget"),
            lattice=lattice if isinstance(lattice, int) else 0,
            rest=tuple(sorted((key, json.dumps(value, sort_keys=True)) for key, value in rest.items())),
        )


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


# From reports to a board


def scan(folder: str | os.PathLike[str], draw: Callable[[Board], object] | None = None) -> Board:
    """Read every report.json under a folder; raises UsageError when there is no such folder.

    draw: what will be made of the board; a report of which it can't be made is listed as invalid
    """
    root = Path(folder)
    if not root.is_dir():
        raise UsageError(f"{root} is no folder; expected one that holds run folders with {REPORT_NAME}")
    files = sorted(Path(top) / REPORT_NAME for top, _, names in os.walk(root) if REPORT_NAME in names)
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


def _drawn(
    reports: Sequence[tuple[str, Report]],
    invalid: Sequence[tuple[str, str]],
    draw: Callable[[Board], object] | None,
) -> Board:
    made = _board(reports, invalid)
    made.to_json()
    if draw is not None:
        draw(made)
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
            ranked.append((path, report, data))
    items = list(_items(ranked))
    tables: dict[tuple[_Terms, _Samples], list[_Item]] = {}
    for item in items:
        tables.setdefault((item.terms, item.samples), []).append(item)
    of_victim: dict[_Key, list[_Item]] = defaultdict(list)
    for item in items:
        of_victim[item.victim].append(item)
    found = standings((item.path, item.data, item.records) for item in items if not item.refuted)
    groups = [
        (terms, _with_optimality(_group(terms, samples, own, of_victim), found))
        for (terms, samples), own in tables.items()
    ]
    told = sorted(_told_apart(groups), key=lambda made: (made.title, made.headline))
    return Board(tuple(told), tuple(unranked), tuple(invalid))


def _items(ranked: Sequence[tuple[str, Report, dict[str, Any]]]) -> Iterator[_Item]:
    """The reports with what is known of them; records are kept where a victim has several."""
    radii = _radii(data["threat_model"].get("eps") for _, _, data in ranked)
    reports = Counter(_victim_of(data) for _, _, data in ranked)
    for path, report, data in ranked:
        found, records = verified(report)
        kept = [_lean(record) for record in records] if reports[_victim_of(data)] > 1 else []
        samples = _Samples.of(data, path, {record.id for record in records})
        yield _Item(path, report, data, radii.get(data["threat_model"].get("eps")), samples, found, kept)


def _with_optimality(group: Group, found: Mapping[str, Standing]) -> Group:
    """The same with what is known of the optimality of its attacks, by path."""

    def told(victim: Victim) -> Victim:
        attacks = (replace(attack, optimality=found.get(attack.path)) for attack in victim.attacks)
        return replace(victim, attacks=tuple(attacks))

    return replace(group, victims=tuple(map(told, group.victims)))


def _lean(record: Record) -> Record:
    """Without what no score is made of."""
    more = record.texts or record.trace or record.scores
    return replace(record, texts={}, trace=(), scores={}) if more else record


def _victim_of(data: Mapping[str, Any]) -> _Key:
    """Weights, defense and its settings."""
    model, defense = data["model"], data["defense"]
    return model["state_sha256"], defense["name"], json.dumps(defense["params"], sort_keys=True)


def _radii(values: Iterable[float | None]) -> dict[float | None, float | None]:
    """Radius -> the one that stands for it: 0.031 and 8/255 are one, everything else its own."""
    found: dict[float | None, float | None] = {}
    first: float | None = None
    for value in sorted({float(value) for value in values if value is not None}):
        first = first if same_eps(first, value) else value
        found[value] = first
    return found


def _group(terms: _Terms, samples: _Samples, own: Sequence[_Item], of_victim: Mapping[_Key, Sequence[_Item]]) -> Group:
    data = own[0].data
    dataset, threat, headline = data["dataset"], data["threat_model"], data["section"]["headline"]
    task = " ".join(part for part in (dataset["name"], dataset.get("version", ""), dataset["split"]) if part)
    _, radius = _score(data)
    # 0.031 and 8/255 meet in one group: it goes by the name most of its reports use.
    words = Counter(sorted(_threat_words(item.data["threat_model"]) for item in own)).most_common(1)[0][0]
    if radius is not None:
        words += ", certified"
    elif headline["metric"] != "robust_accuracy":
        words += f", by {headline['name'][:1].lower()}{headline['name'][1:]}"
    by_victim: dict[_Key, list[_Item]] = defaultdict(list)
    for item in own:
        by_victim[item.victim].append(item)
    lines = []
    for key, found in by_victim.items():
        mine = {item.path for item in found}
        others = [item for item in of_victim[key] if item.path not in mine and terms.admits(item.terms)]
        lines.append(_victim(found, others, samples, of_victim[key]))
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
        victims=_ranked(lines, headline["better"]),
    )


def _threat_words(threat: Mapping[str, Any]) -> str:
    """The threat model in words, without what single attackers made of the defense."""
    words = describe_threat({**threat, "attacker": {}})
    norm = threat.get("norm")
    return words if not norm or norm.lower() in words.lower() else f"{norm} {words}"


def _told_apart(groups: Sequence[tuple[_Terms, Group]]) -> Iterator[Group]:
    """Titles that several groups share get what tells them apart."""
    titled: dict[str, list[dict[str, str]]] = defaultdict(list)
    for terms, group in groups:
        titled[group.title].append(terms.words)
    for terms, group in groups:
        twins = titled[group.title]
        more = [f"{name} {text}" for name, text in terms.words.items() if any(text != each.get(name) for each in twins)]
        yield replace(group, title=", ".join([group.title, *more]))


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


def _victim(own: Sequence[_Item], others: Sequence[_Item], samples: _Samples, everyone: Sequence[_Item]) -> Victim:
    """The line of a victim.

    own:    its reports under the group's very terms, on its samples
    others: those that the terms admit all the same: of attackers with less access, or on other samples
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
    trusted = any(not item.refuted and item.report.trustworthy for item in own)
    counted = by_judges(pool) if pool else None
    judges = (
        judges_of(first.data["metrics"])
        if counted is None
        else {name.removesuffix(SAYS): k / n if n else None for name, (k, n) in counted.each.items()}
    )
    return Victim(None, score, how, clean, beside, _certified(first), attacks, trusted, judges)


def _agreed(items: Sequence[_Item]) -> frozenset[str]:
    """The ids of the samples that all of them are of; none where they differ."""
    found = {item.ids for item in items}
    return found.pop() if len(found) == 1 else frozenset()


def _sign(better: str) -> int:
    return 1 if better == "higher" else -1


def _worse(scores: Iterable[Score], better: str) -> Score:
    """The worst for the defender; a score without a value only where there is no other."""
    return min(scores, key=lambda one: (one.value is None, _sign(better) * (one.value or 0.0)))


def _worst(
    by_sample: Sequence[_Item], rest: Sequence[_Item], pool: Sequence[Record], better: str
) -> tuple[Score, Score]:
    """Score and clean accuracy of a line: counted over the pool where there is one, else those of single reports."""
    items = [*by_sample, *rest]
    scores = [item.score for item in (rest if pool else items)]
    clean = min(items, key=lambda item: _rank_key(item, better)).data["metrics"]["clean_accuracy"]
    if pool:
        scores.append(_counted(by_sample[0], pool))
        clean = _rate(worst_case("clean_accuracy", pool), clean)
    return _worse(scores, better), Score.of(clean)


def _how(by_sample: Sequence[_Item], elsewhere: Sequence[_Item], rest: Sequence[_Item]) -> str:
    """How the score was made, for readers."""
    if len(by_sample) + len(elsewhere) + len(rest) == 1:
        return "one report"
    if not rest:
        more = f", {len(elsewhere)} of them on other samples" if elsewhere else ""
        return f"worst case per sample over {len(by_sample) + len(elsewhere)} reports{more}"
    if any(_score(item.data)[1] is not None for item in rest):
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


def _rank_key(item: _Item, better: str) -> tuple[bool, float, str]:
    value = item.score.value
    return value is None, _sign(better) * (value or 0.0), item.path


def _counted(item: _Item, pool: Sequence[Record]) -> Score:
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


def _pool(items: Sequence[_Item], ids: frozenset[str]) -> list[Record]:
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


def _attacks(items: Sequence[_Item], counts: set[str], samples: _Samples, better: str) -> tuple[Attack, ...]:
    """The reports on a victim, the strongest first; those that count before those that do not."""

    def order(item: _Item) -> tuple[bool, bool, tuple[bool, float, str]]:
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


def _certified(item: _Item) -> tuple[float, float | None] | None:
    points = _certificates(item.data)
    if _score(item.data)[1] is not None or not points:
        return None
    point = _nearest(points, item.data["threat_model"].get("eps"))
    return point["radius"], point["certified_accuracy"]["value"]


def _beside(items: Sequence[_Item], everyone: Sequence[_Item], pool: Sequence[Record]) -> Iterator[Beside]:
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


def _beside_one(item: _Item, everyone: Sequence[_Item]) -> Iterator[Beside]:
    data, metrics = item.data, item.data["metrics"]
    companions = {each["name"]: metrics[each["metric"]] for each in data["companions"]}
    if data["threat_model"]["knowledge"] == "transfer":
        known = [*_siblings(item, everyone), *(companions[name] for name in (WHITE_BOX,) if name in companions)]
        if known := [entry for entry in known if entry["value"] is not None]:
            companions[WHITE_BOX] = min(known, key=lambda entry: float(entry["value"]))
    for name, entry in companions.items():
        yield Beside.of(name, heading(name), entry)
    apart = {*_APART, item.name}
    for label, name in lines_of(data):
        if name not in apart and not of_replies(name) and not isinstance(metrics[name], list):
            yield Beside.of(name, label, metrics[name])


def _siblings(item: _Item, everyone: Sequence[_Item]) -> list[Mapping[str, Any]]:
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
