"""Whether a report is what its records say: every figure that records alone give is counted again, and every hash.

A report lies beside the records it was made of (`records.jsonl`), those of its companions (`beside.jsonl`,
`beside-NAME.jsonl`) and the case that they belong to (`records.case.json`). Whoever edits one of them is
found out here, without a model or a data set. Whoever forges all of them alike is not: only a rerun tells.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from advkit.core.errors import ReportError, UsageError
from advkit.core.protocols import Outcome, Record
from advkit.core.smoothing import largest_radius, linf_radius
from advkit.core.strict_json import read_object
from advkit.core.text import printable
from advkit.evaluation import poisonings
from advkit.evaluation.certificates import ABSTAINED, ACCURACY, LARGEST, RADIUS, agrees
from advkit.evaluation.certificates import figures as certified_figures
from advkit.evaluation.counts import (
    ALL_JUDGES,
    ANY_JUDGE,
    QUERIES_TO_BREAK,
    REFUSED_WHEN_CLEAN,
    STRICTEST_JUDGE,
    by_class,
    by_judges,
    by_label,
    count,
    judge_rates,
    least_change,
    least_name,
    measured,
    queries_to_break,
    recalls,
    tail_accuracy,
    weakest_classes,
    worst_figures,
)
from advkit.evaluation.replies import reply_figures
from advkit.evaluation.report.document import Report
from advkit.evaluation.report.examples import records_beside
from advkit.evaluation.run.store import beside_files, beside_name, read_records
from advkit.evaluation.stats import graded_entry

_LESS_THAN_GRADIENTS = frozenset({"black_box_score", "black_box_decision", "none"})
COUNTED = frozenset({"certification", "evasion", "grid", "poisoning", "stream"})
"""Scenarios of advkit's own whose accuracies are counts of records; what others compute is theirs."""
CERTIFICATION, EVASION, POISONING = "certification", "evasion", "poisoning"
APART = frozenset({"baseline"})
"""Companions of another victim: their attacks are no entries of the report's list."""
_ROUND_OFF = 1e-9
_LEAST = re.compile(re.escape(least_name("*")).replace(re.escape("*"), "(.+)"))
_OF_JUDGES = frozenset({STRICTEST_JUDGE, ANY_JUDGE, ALL_JUDGES, f"{ALL_JUDGES}_upper"})
_CLASS = "robust_accuracy_class_"
_KNOWN_OF_THREAT = ("name", "phase", "norm", "eps", "eps_string", "knowledge", "query_budget")
Figure = tuple[int, int] | float


@dataclass(frozen=True)
class Verification:
    """What came of it.

    faults:    what does not agree, one line each
    unchecked: figures and hashes that nothing beside the report can confirm
    records:   whether there are records at all; without them nothing is confirmed
    headline:  whether the figure that ranks the report is among those confirmed
    """

    faults: tuple[str, ...]
    unchecked: tuple[str, ...] = ()
    records: bool = True
    headline: bool = True

    @property
    def mark(self) -> str:
        """One word for a board, and why where it is not yes."""
        if self.faults:
            more = f" (+{len(self.faults) - 1} more)" if len(self.faults) > 1 else ""
            return f"no: {self.faults[0]}{more}"
        if not self.records:
            return "no records"
        if not self.headline:
            return "partly: the score can't be counted from records"
        return f"partly: all but {len(self.unchecked)} figures" if self.unchecked else "yes"


def records_file(report: Report) -> Path | None:
    """The records beside a report, None where there are none; ReportError where it names a file elsewhere."""
    return records_beside(report.path, report.view)


def verify(report: Report) -> Verification:
    """Count a report again from what lies beside it."""
    return verified(report)[0]


def verified(report: Report) -> tuple[Verification, list[Record]]:
    """The same, with the records that lie beside it; none where there are none or they can't be read."""
    try:
        file = records_file(report)
        if file is None:
            return Verification((), tuple(report.view["metrics"]), records=False, headline=False), []
        records = read_records(file)
        beside = {each.stem: read_records(each) for each in beside_files(file)}
    except ReportError as error:
        return Verification((printable(str(error)),)), []
    data = report.view
    apart = {beside_name(each["name"], place) for place, each in enumerate(data["companions"]) if each["name"] in APART}
    others = [record for name, each in beside.items() if name not in apart for record in each]
    faults = [*_samples(data, file, records), *_attacks(data, records, others), *_attacker(report, data, records)]
    config, unread = _config(file)
    faults += unread
    if config is not None:
        faults += _of_case(data, config)
    faults += _of_request(data)
    confirmed, wrong = _metrics(data, records, beside)
    unchecked = [name for name in data["metrics"] if name not in confirmed]
    unchecked += [] if config is not None or unread else ["reproducibility.config_sha256"]
    headline = data["section"]["headline"]
    found = Verification(
        tuple(dict.fromkeys([*faults, *wrong])),
        tuple(unchecked),
        headline=headline is None or headline["metric"] in confirmed,
    )
    return found, records


# Samples, records, hashes


def _samples(data: Mapping[str, Any], file: Path, records: Sequence[Record]) -> Iterator[str]:
    block = data.get("per_sample", {})
    if "sha256" in block and block["sha256"] != hashlib.sha256(file.read_bytes()).hexdigest():
        yield f"{file.name} is not the file whose sha256 the report has"
    ids = sorted({record.id for record in records})
    dataset = data["dataset"]
    if dataset["n_evaluated"] != len(ids):
        yield f"dataset.n_evaluated is {dataset['n_evaluated']}, the records are of {len(ids)} samples"
    told = dataset["selection"].get("ids_sha256")
    if told is not None and told != hashlib.sha256("\n".join(ids).encode()).hexdigest():
        yield "dataset.selection.ids_sha256 is not that of the records' samples"


def _config(file: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The case beside the records, None where there is none; and what is wrong with it."""
    case = file.with_name(f"{file.stem}.case.json")
    if not case.is_file():
        return None, []
    try:
        return read_object(case.read_bytes()), []
    except (OSError, ValueError):
        return None, [f"{case.name} is no case"]


def _of_case(data: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[str]:
    """What the report says of its case, against the case that the records belong to."""
    from advkit.evaluation.run.case import digest_of  # brings torch, which reading a report does without

    if digest_of(config) != data["reproducibility"]["config_sha256"]:
        yield "reproducibility.config_sha256 is not that of the case beside the records"
    specs, model = _mapping(config.get("specs")), data["model"]
    pairs = [
        ("dataset.sha256", data["dataset"]["sha256"], config.get("data")),
        ("dataset.n_evaluated", data["dataset"]["n_evaluated"], _rows_of(config)),
        ("model.state_sha256", model["state_sha256"], config.get("victim")),
        ("model.architecture", model.get("architecture") or model["name"], specs.get("model")),
        ("reproducibility.seed", data["reproducibility"]["seed"], config.get("seed")),
        ("defense.name", data["defense"]["name"], _head(specs.get("defense"))),
        ("protocol.name", data["protocol"].get("name"), specs.get("attack")),
    ]
    request = data.get("request", {})
    pairs += [(f"request.{key}", request[key], specs.get(key)) for key in specs if key in request and key != "model"]
    threat, told = _mapping(config.get("threat")), data["threat_model"]
    told = {**told, "knowledge": told.get("granted", told["knowledge"])}
    pairs += [(f"threat_model.{key}", told.get(key), threat[key]) for key in _KNOWN_OF_THREAT if key in threat]
    details = _mapping(told.get("details"))
    other = {**threat, **_mapping(threat.get("details"))}
    pairs += [(f"threat_model.details.{key}", details[key], other[key]) for key in details if key in other]
    for where, here, there in pairs:
        if there is not None and here != there:
            yield f"{where} is {_short(here)}, the records were made under {_short(there)}"


def _rows_of(config: Mapping[str, Any]) -> Any:
    """How many rows a case evaluates: a shard those at its places."""
    places = config.get("places")
    if isinstance(places, list) and len(places) == 2 and all(isinstance(each, int) for each in places):
        return places[1] - places[0]
    return config.get("n")


def _of_request(data: Mapping[str, Any]) -> Iterator[str]:
    """The title repeats the request; a report whose two differ was edited."""
    request = data.get("request")
    if request is None:
        return
    for part in str(data.get("title", "")).split(" | "):
        key, equals, spec = part.partition("=")
        if equals and isinstance(request.get(key), str) and request[key] != spec:
            yield f"the title says {key}={_short(spec)}, the request {_short(request[key])}"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _head(spec: Any) -> Any:
    return spec.partition(":")[0] if isinstance(spec, str) else spec


def _short(value: Any) -> str:
    text = printable(str(value))
    return text if len(text) <= 40 else f"{text[:18]}...{text[-18:]}"


# Figures


def _metrics(
    data: Mapping[str, Any], records: Sequence[Record], beside: Mapping[str, Sequence[Record]]
) -> tuple[set[str], list[str]]:
    """Names of the metrics that were counted again, and what does not agree."""
    metrics, confirmed, wrong = data["metrics"], set[str](), list[str]()
    if data["section"]["scenario"] not in COUNTED:
        return confirmed, wrong
    counted = {name: (name, records) for name in metrics}
    for place, companion in enumerate(data["companions"]):
        prefix = f"{companion['name']}_"
        of_it = beside.get(beside_name(companion["name"], place), ())
        own = {name: (name.removeprefix(prefix), of_it) for name in metrics if name.startswith(prefix)}
        # `white_box_...` of a report that has no companion of that name is its own.
        counted |= own
    of_scenario = poisoned_figures if data["section"]["scenario"] == POISONING else figures_of
    tables = {id(of): of_scenario(of) for _, of in counted.values()} | {id(records): of_scenario(records)}
    if data["section"]["scenario"] == CERTIFICATION:
        confirmed, wrong = _certificates(data, records)
    for name, (base, of) in counted.items():
        entry, known = metrics[name], tables[id(of)]
        figure = known.get(base, _of_measure(base, of))
        if figure is None or not isinstance(entry, Mapping):
            continue
        if base in _OF_JUDGES and entry.get("denominator_kind") != REFUSED_WHEN_CLEAN:
            continue  # earlier versions counted all prompts
        confirmed.add(name)
        if not _agrees(entry, figure):
            wrong.append(f"{name} is {_said(entry)}, the records say {_counted(figure)}")
    told, wrong_replies = _of_replies(data, counted)
    confirmed, wrong = confirmed | told, wrong + wrong_replies
    if data["section"]["scenario"] == EVASION:
        headline = (data["section"]["headline"] or {}).get("metric")
        for name, (base, of) in counted.items():
            if not isinstance(metrics[name], Mapping) or not {"value", "n"} <= metrics[name].keys():
                continue
            if values := worst_figures(of, base):
                confirmed.add(name)
                wrong += _of_mean(name, metrics[name], values, name == headline)
    classes = {name: entry for name, entry in metrics.items() if name.startswith(_CLASS)}
    if classes:
        confirmed |= classes.keys()
        # Classes have names in the report and numbers in the records: both come in the order of the numbers.
        found = [_pair(entry) if isinstance(entry, Mapping) else (None, None) for entry in classes.values()]
        if found != per_class_of(records):
            wrong.append("robust accuracy by class is not what the records say")
    upper = metrics.get("robust_accuracy_upper")
    if upper is None and "robust_accuracy" in metrics and (unknown := count(records).right_unknown):
        wrong.append(f"robust_accuracy_upper is missing, though {unknown} samples are undecided")
    return confirmed, wrong


def _certificates(data: Mapping[str, Any], records: Sequence[Record]) -> tuple[set[str], list[str]]:
    """The same for what follows from the votes of certificates: curve, radius and rates."""
    metrics, details = data["metrics"], _mapping(data["threat_model"].get("details"))
    alpha, radii = details.get("alpha"), details.get("radii")
    if not isinstance(alpha, float) or not 0 < alpha < 1 or not isinstance(radii, list):
        return set(), ["threat_model.details has no alpha and radii, by which votes become certificates"]
    try:
        told = certified_figures(records, radii, alpha)
    except UsageError as error:
        return set(), [f"the records' votes are none: {error}"]
    sigmas = {record.measures["sigma"] for record in records if "sigma" in record.measures}
    sigma = _mapping(data["defense"].get("params")).get("sigma")
    draws, shape = details.get("n"), data["dataset"].get("input_shape")
    if isinstance(draws, int) and draws > 0 and len(sigmas) == 1:
        told[LARGEST] = {"value": largest_radius(draws, min(sigmas), alpha)}
    if shape and told[RADIUS]["value"] is not None:
        told[f"{RADIUS}_linf"] = {"value": linf_radius(told[RADIUS]["value"], math.prod(shape))}
    wrong = []
    for name in told.keys() | {ACCURACY, RADIUS, ABSTAINED} if records else ():
        entry, known = metrics.get(name), told.get(name)
        if entry is None or known is None:
            wrong.append(f"{name} is {'missing' if entry is None else 'nowhere in the records'}")
        elif isinstance(entry, list) != isinstance(known, list):
            wrong.append(f"{name} is no curve")
        elif isinstance(known, list):
            if [point["radius"] for point in entry] != radii or not agrees(entry, records, alpha):
                wrong.append(f"{name} is not what the votes come to")
        elif not _agrees(entry, _pair(known) if "numerator" in known else known["value"]):
            wrong.append(f"{name} is {_said(entry)}, the records say {_said(known)}")
    votes = [record.measures for record in records if "n" in record.measures]
    asked = (details.get("n"), details.get("n0"))
    early = bool(details.get("early"))
    if isinstance(draws, int) and any(
        each.get("n0") != asked[1] or each["n"] > draws or (each["n"] < draws and not early) for each in votes
    ):
        seen = sorted({(each["n"], each.get("n0")) for each in votes})
        wrong.append(f"the threat model has n and n0 of {_short(asked)}, the votes {_short(seen)}")
    noise = _mapping(data["defense"].get("params")).get("noise")
    slacks = {each.get("slack", 0.0) for each in votes}
    if any(slack < 0 or (slack != 0 and noise == "gaussian") for slack in slacks) or (
        noise == "lattice" and 0 in slacks
    ):
        wrong.append(f"the votes have a slack of {_short(sorted(slacks))}, which is not that of {noise} noise")
    if sigma is not None and sigmas - {sigma}:
        wrong.append(f"defense.params.sigma is {_short(sigma)}, the votes were taken under {_short(sorted(sigmas))}")
    return set(told), wrong


def _of_replies(
    data: Mapping[str, Any], counted: Mapping[str, tuple[str, Sequence[Record]]]
) -> tuple[set[str], list[str]]:
    """The same for what judges say of several replies: values, and the intervals, which are seeded."""
    cards = [card for card in data["protocol"].get("judges", ()) if isinstance(card, Mapping)]
    tables = {id(of): reply_figures(of, cards) for _, of in counted.values()}
    confirmed, wrong = set[str](), list[str]()
    for name, (base, of) in counted.items():
        entry, made = data["metrics"][name], tables[id(of)].get(base)
        if made is None or not isinstance(entry, Mapping):
            continue
        confirmed.add(name)
        if entry.get("n") != made["n"] or not _same(entry, made):
            wrong.append(f"{name} is {_said(entry)}, the records and cards say {_said(made)}")
        elif any(not _same(_mapping(entry.get("ci")), _mapping(made["ci"]), key) for key in ("low", "high")):
            wrong.append(f"the interval of {name} is not what the records and cards come to")
    return confirmed, wrong


def _same(one: Mapping[str, Any], two: Mapping[str, Any], key: str = "value") -> bool:
    """Whether two blocks have the same number, or none."""
    here, there = one.get(key), two.get(key)
    if not isinstance(here, (int, float)) or not isinstance(there, (int, float)):
        return here is there
    return math.isclose(here, there, rel_tol=1e-6, abs_tol=_ROUND_OFF)


def _of_mean(name: str, entry: Mapping[str, Any], values: Sequence[float], headline: bool) -> Iterator[str]:
    """What does not agree of a mean over samples: its value, how many they are, and the seeded interval.

    headline: it ranks the report, and so has an interval
    """
    made = graded_entry(values)
    if not _agrees(entry, made["value"]):
        yield f"{name} is {_said(entry)}, the records say {_counted(made['value'])}"
    if entry["n"] != made["n"]:
        yield f"{name} is over n = {entry['n']} samples, the records say {made['n']}"
    ci = entry.get("ci")
    if ci is None and not headline:
        return
    told = ci if isinstance(ci, Mapping) else {}
    limits = [(told.get(key), made["ci"][key]) for key in ("low", "high")]
    if any(not isinstance(one, (int, float)) or not math.isclose(one, two, rel_tol=1e-6) for one, two in limits):
        shown = "none" if not told else f"[{told.get('low')}, {told.get('high')}]"
        yield f"the interval of {name} is {shown}, the records say [{made['ci']['low']}, {made['ci']['high']}]"
    elif any(told.get(key) != made["ci"][key] for key in ("level", "method")):
        yield f"the interval of {name} is said to be another than the one that its figures are of"


def worst_case(name: str, records: Sequence[Record]) -> Figure | None:
    """A metric that counts every sample by the worst that was done to it, over all records; None for another."""
    return _worst_cases(records).get(name, _of_measure(name, records))


def _worst_cases(records: Sequence[Record]) -> dict[str, Figure]:
    c, judged = count(records), by_judges(records)
    return {
        "clean_accuracy": (c.correct, c.n),
        "robust_accuracy": (c.right_after, c.n),
        "attack_success_rate": (c.broken, c.attackable),
        "robust_accuracy_upper": (c.right_after + c.right_unknown, c.n),
        **({} if judged is None else judge_rates(judged) | judged.each),
    }


def figures_of(records: Sequence[Record]) -> dict[str, Figure]:
    """The metrics that follow from records alone, rates as (numerator, denominator)."""
    c, figures = count(records), _worst_cases(records)
    if c.eight_bit is not None:
        figures["robust_accuracy_8bit"] = (c.eight_bit, c.n)
    if classes := by_class(records):
        worst = classes[weakest_classes(classes)[0]]
        figures["tail_30_accuracy"] = tail_accuracy(classes)
        figures["worst_class_accuracy"] = (worst.right_after, worst.n)
    figures |= {name: (each.found, each.queries) for name, each in recalls(records).items()}
    if len(by_label(records)) != 1:
        return figures
    values: dict[str, list[float | bool]] = defaultdict(list)
    for record in records:
        for name, value in record.figures.items():
            values[name].append(value)
    for name, found in values.items():
        truths = all(isinstance(value, bool) for value in found)
        figures[name] = (sum(map(bool, found)), len(found)) if truths else float(np.mean(found))
    if took := queries_to_break(records):
        figures[QUERIES_TO_BREAK] = float(np.median(took))
    for name, block in measured(records).items():
        figures |= {f"{name}_{kind}": block[kind] for kind in ("mean", "median")}
    return figures


def poisoned_figures(records: Sequence[Record]) -> dict[str, Figure]:
    """The metrics of a poisoning, as `figures_of` has them."""
    if not records:
        return {}
    told = poisonings.figures(records)
    return {
        name: (entry["numerator"], entry["denominator"]) if "numerator" in entry else entry["value"]
        for name, entry in told.items()
    }


def per_class_of(records: Sequence[Record]) -> list[tuple[int, int]]:
    """Robust samples and samples of every class, in the order of their numbers."""
    return [(c.right_after, c.n) for c in by_class(records).values()]


def _of_measure(name: str, records: Sequence[Record]) -> Figure | None:
    """Figures of what the threat model measures, whose names hold the measure's."""
    least = _LEAST.fullmatch(name)
    return _within(name, records) if least is None else least_change(records, least[1])


def _within(name: str, records: Sequence[Record]) -> tuple[int, int] | None:
    """`attack_success_rate_MEASURE_LEVEL`: samples broken within a threshold of what the threat model measures."""
    prefix, rest = "attack_success_rate_", name.removeprefix("attack_success_rate_")
    measure, _, level = rest.rpartition("_")
    known = {each for record in records for each in record.measures}
    if not name.startswith(prefix) or measure not in known:
        return None
    try:
        most = float(level)
    except ValueError:
        return None
    least: dict[str, float] = {}
    for record in records:
        if record.outcome == Outcome.BROKEN and measure in record.measures:
            least[record.id] = min(record.measures[measure], least.get(record.id, math.inf))
    return sum(value <= most for value in least.values()), count(records).attackable


def _pair(entry: Any) -> tuple[Any, Any]:
    return entry.get("numerator"), entry.get("denominator")


def _agrees(entry: Mapping[str, Any], figure: Figure) -> bool:
    if isinstance(figure, tuple):
        return _pair(entry) == figure
    value = math.inf if entry.get("unbounded") else entry.get("value")
    return isinstance(value, (int, float)) and math.isclose(value, figure, rel_tol=_ROUND_OFF, abs_tol=_ROUND_OFF)


def _said(entry: Mapping[str, Any]) -> str:
    return f"{entry['numerator']} / {entry['denominator']}" if "numerator" in entry else str(entry.get("value"))


def _counted(figure: Figure) -> str:
    return f"{figure[0]} / {figure[1]}" if isinstance(figure, tuple) else f"{figure:.6g}"


# Attacks


def _attacker(report: Report, data: Mapping[str, Any], records: Sequence[Record]) -> Iterator[str]:
    """What the attacks made use of, against what their oracles counted; earlier reports do not say."""
    if "attacker" not in report.to_dict()["threat_model"]:
        return
    threat = data["threat_model"]
    access, granted = threat["attacker"]["access"], threat.get("granted")
    if granted is None:
        yield "threat_model.attacker is there, threat_model.granted is missing"
    elif threat["knowledge"] not in (access, granted):
        yield f"threat_model.knowledge is {_short(threat['knowledge'])}, the attacker's access {_short(access)}"
    told = [("threat_model.attacker.access", access, records)]
    groups = {str(label): own for label, own in by_label(records).items()}
    told += [
        (f"{_short(entry['name'])}: access", entry["access"], groups.get(entry["name"], ()))
        for entry in data["attacks"]
        if "access" in entry and not entry["beside"]
    ]
    for where, word, of in told:
        took = any(record.backwards for record in of)
        if took and not any(record.source for record in of) and word in _LESS_THAN_GRADIENTS:
            yield f"{where} is {word}, the records say that gradients were taken"
        if word == "white_box" and not took and any(record.forwards for record in of):
            yield f"{where} is {word}, the records say that no gradient was taken"


def _attacks(data: Mapping[str, Any], records: Sequence[Record], beside: Sequence[Record]) -> Iterator[str]:
    """Every entry of the list, against the records of its label."""
    if data["section"]["scenario"] not in COUNTED:
        return
    certified = data["section"]["scenario"] == CERTIFICATION  # votes are no attack
    for entries, of in (
        ([entry for entry in data["attacks"] if not entry["beside"]], () if certified else records),
        ([entry for entry in data["attacks"] if entry["beside"]], beside),
    ):
        if entries and not of:
            yield f"the attacks {_names(entries)} have no records"
            continue
        groups = {str(label): own for label, own in by_label(of).items()}
        named = [entry["name"] for entry in entries]
        if of and (sorted(named) != sorted(groups)):
            other = sorted(set(named) ^ set(groups)) or named
            yield f"the report's attacks and those of the records differ: {_short(', '.join(other))}"
            continue
        for entry in entries:
            yield from _attack(entry, groups[entry["name"]])


def _attack(entry: Mapping[str, Any], records: Sequence[Record]) -> Iterator[str]:
    c = count(records)
    attacked = [r for r in records if r.forwards or r.outcome in (Outcome.BROKEN, Outcome.INVALID, Outcome.ERROR)]
    pairs: list[tuple[str, Any, Any]] = [
        ("robust_accuracy", _pair(entry["robust_accuracy"]), (c.right_after, c.n)),
        ("attack_success_rate", _pair(entry["attack_success_rate"]), (c.broken, c.attackable)),
        ("undecided", entry.get("undecided", 0), c.unknown),
        ("n_attacked", entry["n_attacked"], len(attacked)),
        ("cost.forward", entry["cost"].get("forward"), sum(r.forwards for r in records)),
        ("cost.backward", entry["cost"].get("backward"), sum(r.backwards for r in records)),
    ]
    distances = [r.distance for r in attacked if r.distance is not None]
    far = _mapping(entry.get("perturbation"))
    if distances and far:
        for key, value in (("max", max(distances)), ("mean", np.mean(distances)), ("median", np.median(distances))):
            if not _agrees({"value": far.get(key)}, float(value)):
                said = f"{far.get(key)}, the records say {float(value):.6g}"
                yield f"{_short(entry['name'])}: perturbation.{key} is {said}"
        outside = sum(r.outcome == Outcome.INVALID for r in records)
        pairs.append(("perturbation.n_outside_budget", far.get("n_outside_budget"), outside))
    for key, here, there in pairs:
        if here is not None and here != there:
            yield f"{_short(entry['name'])}: {key} is {here}, the records say {there}"


def _names(entries: Sequence[Mapping[str, Any]]) -> str:
    return _short(", ".join(str(entry["name"]) for entry in entries))
