"""A report that can be ranked: under what terms it was made, on which samples, of which victim, with what score."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from advkit.core.protocols import Record
from advkit.evaluation.counts import rows_broken, rows_robust, worst_figures
from advkit.evaluation.report.board import LADDER, WHITE_BOX, Score
from advkit.evaluation.report.compare import same_eps, same_kind
from advkit.evaluation.report.document import Report
from advkit.evaluation.report.paired import Rows
from advkit.evaluation.report.verify import EVASION, Verification, worst_case

_OF_ATTACKER = frozenset({"sources", "seen", "attacks", "attacks_all"})
"""Details of a threat model that say what the attacker did, not what he may do."""
Key = tuple[str, str, str]


@dataclass(frozen=True)
class Samples:
    """Which samples of a data set were evaluated, as far as a report says.

    kind: "first" (the first n of a fixed order) or "ids"
    name: of the selection where ids were chosen
    """

    kind: str
    n: int
    name: str = ""

    @classmethod
    def of(cls, data: Mapping[str, Any], path: str, ids: Iterable[str]) -> Samples:
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
class Terms:
    """Under what a report was made: what must agree for two to be ranked together.

    data:     task, data set and its hash, which is left out where a model's tokenizer is part of it
    headline: metric and direction; certificates of any metric are one
    counted:  what a rate is counted over, "" for other figures: versions differ in it
    kind:     of threat model, by its registry name
    eps:      the radius that stands for its like: 0.031 and 8/255 are one
    access:   what the attack made use of
    budget:   queries granted, None for any number
    lattice:  steps across the box of what may be submitted, 0 for any value
    rest:     everything else that the threat model says of itself
    """

    data: tuple[str, ...]
    headline: tuple[str, ...]
    counted: str
    goal: str
    kind: str
    norm: str
    eps: float | None
    access: str
    budget: int | None
    lattice: int
    rest: tuple[tuple[str, str], ...]

    def admits(self, other: Terms) -> bool:
        """Whether what was done under the other terms was allowed under these, too."""
        same = ("data", "headline", "counted", "goal", "norm", "eps")
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
        counted = {"counted over": self.counted.replace("_", " ")} if self.counted else {}
        return {**counted, "goal": self.goal, "lattice": str(self.lattice), **budget, **rest, "data": self.data[-1][:8]}

    def _rest(self, *names: str) -> list[tuple[str, str]]:
        return [(name, value) for name, value in self.rest if name in names]


def _affords(granted: int | None, used: int | None) -> bool:
    return granted is None or (used is not None and used <= granted)


@dataclass(frozen=True, eq=False)
class Item:
    """A report that can be ranked, with its completed document and what lies beside it."""

    path: str
    report: Report
    data: Mapping[str, Any]
    eps: float | None
    samples: Samples
    found: Verification
    records: Sequence[Record] = field(repr=False)
    rows: Rows | None = field(default=None, repr=False)

    @cached_property
    def victim(self) -> Key:
        return victim_of(self.data)

    @cached_property
    def metric(self) -> Mapping[str, Any]:
        """What ranks it."""
        return score_of(self.data)[0]

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
    def suite(self) -> tuple[str, int]:
        """What was asked for, and its revision: stages of a suite change from one to the next."""
        protocol = self.data["protocol"]
        return str(protocol.get("name", "")), int(protocol.get("revision", 1))

    @property
    def trains(self) -> bool:
        """Whether the attacker moved before training."""
        return bool(self.data["threat_model"].get("phase") == "training_time")

    @cached_property
    def ids(self) -> frozenset[str]:
        return frozenset(record.id for record in self.records)

    @cached_property
    def terms(self) -> Terms:
        data = self.data
        threat, dataset, headline = data["threat_model"], data["dataset"], data["section"]["headline"]
        details = {key: each for key, each in threat.get("details", {}).items() if key not in _OF_ATTACKER}
        lattice = details.pop("lattice", 0)
        _, radius = score_of(data)
        rest = {"phase": threat.get("phase", "test_time"), "n_byzantine": threat.get("n_byzantine"), **details}
        return Terms(
            data=(
                data["task"],
                dataset["name"],
                dataset.get("version", ""),
                dataset["split"],
                "" if data["task"] == "text_generation" else dataset["sha256"],
            ),
            # Curves of certificates are one kind of evidence, whatever their metric is called.
            headline=(headline["metric"] if radius is None else f"certified {radius:.6g}", headline["better"]),
            counted=str(self.metric.get("denominator_kind", "")),
            goal=str(data.get("request", {}).get("goal") or threat["goal"]),
            kind=same_kind(threat["name"]),
            norm=threat.get("norm") or "",
            eps=self.eps,
            access=threat["knowledge"],
            budget=threat.get("query_budget"),
            lattice=lattice if isinstance(lattice, int) else 0,
            rest=tuple(sorted((key, json.dumps(value, sort_keys=True)) for key, value in rest.items())),
        )


def certificates(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [point for entry in data["metrics"].values() if isinstance(entry, list) for point in entry]


def nearest(points: Sequence[Mapping[str, Any]], eps: float | None) -> Mapping[str, Any]:
    """The certificate at eps where there is one; else the smallest radius, the weakest claim."""
    for point in points:
        if same_eps(point["radius"], eps):
            return point
    return min(points, key=lambda point: float(point["radius"]))


def score_of(data: Mapping[str, Any]) -> tuple[Mapping[str, Any], float | None]:
    """The metric that ranks a report, and the radius where it is a point of a certified curve."""
    entry = data["metrics"][data["section"]["headline"]["metric"]]
    if not isinstance(entry, list):
        return entry, None
    point = nearest(entry, data["threat_model"].get("eps"))
    return point["certified_accuracy"], float(point["radius"])


def rows_of(name: str, records: Sequence[Record]) -> Rows | None:
    """The samples that a rate counts, by the worst that was done to each; None for other figures."""
    ways = {"robust_accuracy": rows_robust, "attack_success_rate": rows_broken}
    return Rows.of(ways[name](records)) if records and name in ways else None


def lean(record: Record) -> Record:
    """Without what no score is made of."""
    more = record.texts or record.trace or record.scores
    return replace(record, texts={}, trace=(), scores={}) if more else record


def victim_of(data: Mapping[str, Any]) -> Key:
    """Weights, defense and its settings."""
    model, defense = data["model"], data["defense"]
    return model["state_sha256"], defense["name"], json.dumps(defense["params"], sort_keys=True)
