"""What a leaderboard says, before anything is drawn: victims ranked, and the attacks on each of them.

A line is a victim (weights, defense) on some samples under a threat model and a goal. Its score is the worst case per
sample over all reports that the threat model admits: a sample that one of them broke is broken. Figures of other tasks,
samples, threat models, goals or headlines are never ranked together. A report that does not agree with its records
counts for nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from advkit.core.text import printable_json
from advkit.evaluation.counts import SAYS, SAYS_CLEAN
from advkit.evaluation.report.document import Report
from advkit.evaluation.report.optimality import Standing
from advkit.evaluation.report.paired import Rows
from advkit.evaluation.report.render import SEVERITIES, attack_labels
from advkit.evaluation.report.robustbench import Claim
from advkit.evaluation.report.text import attacker_text, is_fraction, is_rate, spell, value_text, words_of
from advkit.evaluation.stats_agreement import Flip, ranking_flips

BOARD_VERSION = "2.1"
WHITE_BOX = "white_box"
LADDER = ("none", "black_box_decision", "black_box_score", WHITE_BOX)
"""What an attacker may ask of the victim; each includes those before it."""
_OF_DEFENSE = ("none", "undeclared", "unknown", "known", "adaptive")


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

    @classmethod
    def of(cls, key: str, title: str, entry: Mapping[str, Any]) -> Beside:
        """From a metric of a report."""
        return cls(key, title, entry["value"], value_text(entry))


@dataclass(frozen=True)
class Score:
    """A figure that ranks.

    value:     a number; infinite where nothing broke most of the samples; None where there is none
    text:      as it is shown
    low, high: its interval
    fraction:  it is read in percent, and can be drawn as a bar
    counts:    (numerator, denominator) where it is a rate
    """

    value: float | None
    text: str
    low: float | None = None
    high: float | None = None
    fraction: bool = False
    counts: tuple[int, int] | None = None

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Score:
        """From a metric of a report."""
        ci = entry.get("ci")
        value = math.inf if entry.get("unbounded") else entry["value"]
        low, high = (None, None) if ci is None else (ci["low"], ci["high"])
        counts = (entry["numerator"], entry["denominator"]) if is_rate(entry) else None
        return cls(value, value_text(entry), low, high, is_fraction(entry), counts)

    @property
    def interval(self) -> str:
        """Of the value, "" without one."""
        if self.low is None or self.high is None:
            return ""
        if self.fraction:
            return f"{100 * self.low:.1f} to {100 * self.high:.1f}"
        return f"{self.low:.4g} to {self.high:.4g}"

    @property
    def number(self) -> float | None:
        """The value where JSON has one."""
        return None if self.value is None or math.isinf(self.value) else self.value


@dataclass(frozen=True)
class Gap:
    """Where a victim stands among the ranked ones of its table, as far as tests tell.

    above, below: ranked victims that are better, or worse, by a real gap
    same:         places in the table of those from which no gap is shown
    neighbour:    place of the next one down the table, of the last one the one before it
    p:            of that pair, uncorrected; None where there is no test
    test:         how that pair was compared
    """

    above: int
    below: int
    same: tuple[int, ...]
    neighbour: int
    p: float | None
    test: str

    @property
    def ranks(self) -> tuple[int, int]:
        """The best and the worst rank that the tests allow."""
        return self.above + 1, self.above + 1 + len(self.same)

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        return {
            "ranks": list(self.ranks),
            "better": self.above,
            "worse": self.below,
            "no_gap_shown": list(self.same),
            "next": {"victim": self.neighbour, "p": self.p, "test": self.test},
        }


@dataclass(frozen=True)
class Attack:
    """A report on a victim: an attack, or a suite of them, and what it came to by itself.

    report, path: what is shown, and where it was found, relative to the scanned folder
    rank:         1 for the strongest on this victim and these samples; None where it does not count, or ran on others
    score:        what it came to by itself, by the victim's headline
    counts:       whether it counts for the victim's score; `why` says why not
    verified:     whether its figures and hashes are those of the records beside it: "yes", "partly: ...", "no: why" or
                  "no records"
    optimality:   how near to the least distances known it came, where other reports share its case
    """

    report: Report
    path: str
    rank: int | None
    score: Score
    counts: bool
    why: str
    verified: str
    optimality: Standing | None = None

    @property
    def data(self) -> Mapping[str, Any]:
        """The report's document, every text in it printable."""
        return self.report.view

    @property
    def name(self) -> str:
        """What was asked for: an attack or a suite by its spec."""
        return str(self.data["protocol"].get("name") or ", ".join(self.labels) or "none")

    @property
    def labels(self) -> list[str]:
        """Names of the attacks behind it, in order."""
        return attack_labels(self.data)

    @property
    def attacker(self) -> str:
        """Who attacked, in words: "white box, defense known"."""
        return attacker_text(self.data["threat_model"])

    @property
    def judges(self) -> dict[str, float | None]:
        """What each judge calls broken by this attack; empty where none reads replies."""
        return judges_of(self.data["metrics"])

    @property
    def flags(self) -> list[Mapping[str, Any]]:
        """Findings about the evaluation, the most severe first."""
        return sorted(self.data["diagnostics"]["flags"], key=lambda flag: -SEVERITIES.index(flag["severity"]))

    @property
    def n(self) -> int:
        """Samples evaluated."""
        return int(self.data["dataset"]["n_evaluated"])

    @property
    def cost(self) -> dict[str, float]:
        """Passes and seconds of its attacks, those beside it left out."""
        own = [attack["cost"] for attack in self.data["attacks"] if not attack["beside"]]
        return {key: sum(cost.get(key, 0) for cost in own) for key in ("forward", "backward", "seconds")}

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        return {
            "rank": self.rank,
            "path": self.path,
            "title": self.report.title,
            "attack": self.name,
            "attacks": self.labels,
            "score": self.score.number,
            "text": self.score.text,
            "low": self.score.low,
            "high": self.score.high,
            "attacker": {**self.data["threat_model"]["attacker"], "text": self.attacker},
            "n": self.n,
            "cost": self.cost,
            "counts": self.counts,
            "why": self.why,
            "verified": self.verified,
            "optimality": None if self.optimality is None else self.optimality.to_dict(),
            "flags": [{"id": flag["id"], "severity": flag["severity"]} for flag in self.flags],
            "undecided": self.report.undecided,
            "created_utc": self.data["created_utc"],
            "config_sha256": self.data["reproducibility"]["config_sha256"],
        }


@dataclass(frozen=True)
class Victim:
    """A line of the board: one victim under one threat model on the same samples.

    rank:      1 for the best of its group; None where no report that counts can be trusted, or none gives a number
    score:     the worst case over its reports; how: over which, and how they were put together
    clean:     what is right before any attack
    beside:    figures no reader should miss: the companions', and those that the scenario shows beside its headline
    certified: (radius, value) where an empirical report also holds a certificate
    attacks:   its reports, the strongest first
    trusted:   whether some report under the group's own terms counts and can be trusted
    judges:    where judges read replies, what each calls broken, in their order; as the score over all its reports
    why:       why it has no rank, "" where it has one
    gap:       which gaps to the others are real; None without a rank, or alone
    rows:      what became of each of its samples, for paired tests; None where the score is no count of records
    """

    rank: int | None
    score: Score
    how: str
    clean: Score
    beside: tuple[Beside, ...]
    certified: tuple[float, float | None] | None
    attacks: tuple[Attack, ...]
    trusted: bool
    judges: Mapping[str, float | None] = field(default_factory=dict)
    why: str = ""
    gap: Gap | None = None
    rows: Rows | None = field(default=None, compare=False, repr=False)

    @property
    def decisive(self) -> Attack:
        """The report that came nearest to the score by itself."""
        return self.attacks[0]

    @property
    def counted(self) -> list[Attack]:
        """The reports that the score is made of; all of them where none counts."""
        return [attack for attack in self.attacks if attack.counts] or list(self.attacks)

    @property
    def model(self) -> str:
        """Its name."""
        return str(self.decisive.data["model"]["name"])

    @property
    def defense(self) -> str:
        """Its name."""
        return str(self.decisive.data["defense"]["name"])

    @property
    def n(self) -> int:
        """Samples that the score counts."""
        return self.decisive.n

    @property
    def names(self) -> list[str]:
        """Of the attacks that count, the strongest first."""
        return list(dict.fromkeys(attack.name for attack in self.counted))

    @property
    def attacker(self) -> str:
        """The attacker who knew most."""

        def knows(attack: Attack) -> tuple[int, int]:
            who = attack.data["threat_model"]["attacker"]
            access = LADDER.index(who["access"]) if who["access"] in LADDER else -1
            return access, _OF_DEFENSE.index(who["defense"])

        return max(self.counted, key=knows).attacker

    @property
    def verified(self) -> str:
        """The least that can be said of the reports that count: "yes", "partly: ...", "no records..." or "no: ..."."""
        marks = [attack.verified for attack in self.counted]
        for word in ("no:", "no records", "partly:"):
            found = [mark for mark in marks if mark.startswith(word)]
            if found:
                of = f" ({len(found)} of {len(marks)} reports)" if len(marks) > 1 else ""
                return found[0] + of
        return "yes"

    @property
    def refuted(self) -> int:
        """How many of its reports do not agree with their records."""
        return sum(attack.verified.startswith("no:") for attack in self.attacks)

    @property
    def flags(self) -> list[Mapping[str, Any]]:
        """Of the reports that count, each id once and as grave as it came, the most severe first."""
        found: dict[str, Mapping[str, Any]] = {}
        order = SEVERITIES.index
        for attack in self.counted:
            for flag in attack.flags:
                known = found.get(flag["id"])
                if known is None or order(flag["severity"]) > order(known["severity"]):
                    found[flag["id"]] = flag
        return sorted(found.values(), key=lambda flag: -order(flag["severity"]))

    def figure(self, key: str) -> Beside | None:
        """The figure of a column, None where this victim has none."""
        return next((each for each in self.beside if each.key == key), None)

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        data = self.decisive.data
        return {
            "rank": self.rank,
            "model": self.model,
            "defense": spell(self.defense, data["defense"]["params"]),
            "state_sha256": data["model"]["state_sha256"],
            "score": self.score.number,
            "unbounded": self.score.value is not None and math.isinf(self.score.value),
            "text": self.score.text,
            "low": self.score.low,
            "high": self.score.high,
            "how": self.how,
            "clean_accuracy": self.clean.number,
            "n": self.n,
            "attacker": self.attacker,
            "beside": [{"name": each.key, "figure": each.title, "value": each.value} for each in self.beside],
            "certified": None
            if self.certified is None
            else {"radius": self.certified[0], "certified_accuracy": self.certified[1]},
            "verified": self.verified,
            "refuted": self.refuted,
            "why": self.why,
            "gap": None if self.gap is None else self.gap.to_dict(),
            "flags": [{"id": flag["id"], "severity": flag["severity"]} for flag in self.flags],
            "attacks": [attack.to_dict() for attack in self.attacks],
        }


@dataclass(frozen=True)
class Group:
    """Victims that may be ranked together: one task, the same samples, one threat model, one goal, one headline.

    scenario: the order of moves; access: what the attackers made use of at most
    samples:  in words
    headline: the metric that ranks; name: how people call it; better: "higher" or "lower"
    radius:   of certified accuracy; None where attacks were survived, not proofs made
    note:     what it is not compared with, and why; "" where nothing like it is on the board
    """

    title: str
    task: str
    scenario: str
    samples: str
    norm: str
    goal: str
    access: str
    headline: str
    name: str
    better: str
    radius: float | None
    victims: tuple[Victim, ...]
    note: str = ""

    @property
    def transfer(self) -> bool:
        """The attacker holds surrogates only, so the white-box figure stands beside the score, or its absence."""
        return self.radius is None and self.access == "transfer"

    @property
    def evidence(self) -> str:
        """ "empirical" (survived attacks) or "certified" (proven at `radius`)."""
        return "empirical" if self.radius is None else "certified"

    @property
    def score_name(self) -> str:
        """Heading of the ranking column."""
        return self.name if self.radius is None else f"{self.name} at {self.radius:g}"

    @property
    def direction(self) -> str:
        """Of the ranking, in words."""
        return f"{self.better} is safer"

    @property
    def columns(self) -> dict[str, str]:
        """Key -> heading of the figures beside the score, in order of first appearance."""
        wanted = {WHITE_BOX: heading(WHITE_BOX)} if self.transfer else {}
        for victim in self.victims:
            for each in victim.beside:
                wanted.setdefault(each.key, each.title)
        return wanted

    @property
    def flips(self) -> dict[str, list[Flip]] | None:
        """Which orders one judge reverses against another: of the ranked victims, and of the attacks on each of them.

        None where there is nothing to ask: fewer than two judges, or nothing ranked against something else.
        """
        ranked = [(f"{v.model}, defense {v.defense}", v) for v in self.victims if v.rank is not None]
        tables = {"victims": _told_apart([(name, v.judges, v.decisive.path) for name, v in ranked])}
        for name, victim in ranked:
            attacks = [(each.name, each.judges, each.path) for each in victim.attacks if each.rank is not None]
            tables[f"attacks on {name}"] = _told_apart(attacks)
        asked = {name: table for name, table in tables.items() if len(table) > 1}
        found = {}
        for name, table in asked.items():
            judges = [judge for judge in next(iter(table.values())) if all(judge in own for own in table.values())]
            if len(judges) > 1:
                found[name] = ranking_flips({j: {system: own[j] for system, own in table.items()} for j in judges})
        return found or None

    @property
    def has_certified(self) -> bool:
        """Some empirical line also holds a certificate."""
        return any(victim.certified for victim in self.victims)

    @property
    def has_optimality(self) -> bool:
        """Whether some attack is compared with the least distances known."""
        return any(attack.optimality for victim in self.victims for attack in victim.attacks)

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        return {
            "title": self.title,
            "task": self.task,
            "scenario": self.scenario,
            "samples": self.samples,
            "norm": self.norm,
            "goal": self.goal,
            "access": self.access,
            "evidence": self.evidence,
            "headline": {"metric": self.headline, "name": self.name, "better": self.better},
            "radius": self.radius,
            "note": self.note,
            "columns": [{"name": key, "figure": title} for key, title in self.columns.items()],
            "victims": [victim.to_dict() for victim in self.victims],
            **(
                {}
                if (flips := self.flips) is None
                else {"flips": {k: [f.to_dict() for f in v] for k, v in flips.items()}}
            ),
        }


@dataclass(frozen=True)
class Board:
    """All that was found under a folder.

    groups:   ranked victims
    unranked: (path, reason) of valid reports that hold no ranking number (sweeps, comparisons)
    invalid:  (path, fault) of files that are not valid reports
    claimed:  what cards of others say; never ranked
    """

    groups: tuple[Group, ...]
    unranked: tuple[tuple[str, str], ...]
    invalid: tuple[tuple[str, str], ...]
    claimed: tuple[Claim, ...] = ()

    def __len__(self) -> int:
        return sum(len(group.victims) for group in self.groups)

    @property
    def attacks(self) -> dict[str, Attack]:
        """The reports of the board, each once, by path."""
        found = (attack for group in self.groups for victim in group.victims for attack in victim.attacks)
        return {attack.path: attack for attack in found}

    def to_dict(self) -> dict[str, Any]:
        """All that the board says, as plain JSON values; every other form of it is made of the same."""
        return {
            "schema_version": BOARD_VERSION,
            "kind": "leaderboard",
            "groups": [group.to_dict() for group in self.groups],
            "unranked": [{"path": path, "reason": reason} for path, reason in self.unranked],
            "invalid": [{"path": path, "fault": fault} for path, fault in self.invalid],
            **({"claimed": [claim.to_dict() for claim in self.claimed]} if self.claimed else {}),
        }

    def to_json(self) -> str:
        """The same as text, a victim on a line."""
        whole = self.to_dict()
        groups = []
        for group in whole.pop("groups"):
            victims = ",\n".join(map(_line, group.pop("victims")))
            groups.append(f'{_line(group)[:-1]}, "victims": [\n{victims}\n]}}')
        return printable_json(f'{_line(whole)[:-1]}, "groups": [\n' + ",\n".join(groups) + "\n]}\n")


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def judges_of(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """What each judge calls broken of the greedy replies, in their order."""
    names = [name for name in metrics if name.endswith(SAYS) and not name.endswith(SAYS_CLEAN)]
    return {name.removesuffix(SAYS): metrics[name]["value"] for name in names if is_fraction(metrics[name])}


def _told_apart(
    systems: Sequence[tuple[str, Mapping[str, float | None], str]],
) -> dict[str, Mapping[str, float | None]]:
    """Name -> what the judges say; a name that several have gets their paths."""
    names = [name for name, _, _ in systems]
    return {f"{name} ({path})" if names.count(name) > 1 else name: judges for name, judges, path in systems}


def heading(name: str) -> str:
    """`white_box` is "White box", `tapm` is "TAPM"."""
    words = words_of(name)
    return words[:1].upper() + words[1:]
