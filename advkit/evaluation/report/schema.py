"""What a report may hold: the JSON Schema, and what a schema can't say.

Shape: `evaluation_report.schema.json`. That a value is its numerator over its denominator, that an interval is the one
its method gives, that robust accuracy is clean accuracy times what the attack left, and that the section names metrics
that exist is checked here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from advkit.core.errors import ReportError
from advkit.evaluation.report.fits import Check, checker, fits
from advkit.evaluation.report.legacy import completed
from advkit.evaluation.stats import wilson

SCHEMA_VERSION = "1.1"
HERE = Path(__file__).parent
PLACEHOLDER = re.compile(r"\{([A-Za-z0-9_.-]+)\}")
OWN_PLACEHOLDERS = frozenset({"threat", "attacks"})
"""What a sentence may name beside metrics: the renderer knows them."""
_RATE_KEYS = {"value", "numerator", "denominator", "denominator_kind", "ci"}
_ROUND_OFF = 1e-9


@cache
def schema() -> dict[str, Any]:
    """The packaged JSON Schema of a report."""
    return cast("dict[str, Any]", json.loads((HERE / "evaluation_report.schema.json").read_text(encoding="utf-8")))


@cache
def _whole_schema() -> Check:
    return checker(schema(), schema())


def validate(data: Mapping[str, Any]) -> None:
    """Raise ReportError where a document does not fit the schema or does not agree with itself."""
    if not _whole_schema()(data):
        validate_part(data, schema(), "")
    try:
        moment = datetime.fromisoformat(data["created_utc"])
    except ValueError:
        raise ReportError(f"created_utc: {data['created_utc']!r} is not an ISO 8601 moment") from None
    if moment.tzinfo is None:
        raise ReportError(f"created_utc: {data['created_utc']!r} has no time zone; expected one such as +00:00")
    for where, entry in _rates(data):
        _check_rate(where, entry)
    _check_names(data)
    whole = completed(data)
    _check_accuracies(whole)
    _check_worst_case(whole)
    for name, entry in data["metrics"].items():
        if isinstance(entry, list):
            _check_certified(name, entry)


def validate_part(data: Any, part: Mapping[str, Any], where: str) -> None:
    """Raise ReportError where `data` does not fit a part of the schema; `where` leads the message."""
    root = {**part, "$defs": schema()["$defs"]}
    if fits(data, part, root):
        return
    import jsonschema

    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(root).iter_errors(data))
    if error is not None:
        path = ".".join([where, *(str(step) for step in error.absolute_path)]).strip(".")
        message = error.message if len(error.message) < 300 else error.message[:297] + "..."
        raise ReportError(f"{path or 'report'}: {message}")


def placeholders(sentence: str) -> list[str]:
    """The metrics that a section's sentence names."""
    return [name for name in PLACEHOLDER.findall(sentence) if name not in OWN_PLACEHOLDERS]


def undecided(metrics: Mapping[str, Any]) -> int:
    """Samples that ended neither robust nor broken."""
    robust, upper = metrics.get("robust_accuracy"), metrics.get("robust_accuracy_upper")
    return 0 if robust is None or upper is None else int(upper["numerator"] - robust["numerator"])


def _rates(data: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, entry in data["metrics"].items():
        if isinstance(entry, list):
            yield from ((f"metrics.{name}.{i}", point["certified_accuracy"]) for i, point in enumerate(entry))
        # The schema takes a rate that lacks its denominator's kind for a scalar; counts give it away.
        elif isinstance(entry, Mapping) and {"numerator", "denominator", "denominator_kind"} & entry.keys():
            yield f"metrics.{name}", entry
    for i, attack in enumerate(data["attacks"]):
        for name, entry in attack.items():
            if isinstance(entry, dict) and {"numerator", "denominator"} & entry.keys() and name != "params":
                yield f"attacks.{i}.{name}", entry


def _check_rate(where: str, rate: Mapping[str, Any]) -> None:
    missing = sorted(_RATE_KEYS - rate.keys())
    if missing:
        raise ReportError(f"{where}: a rate without {', '.join(missing)}; every rate names its counts and denominator")
    kinds: dict[str, Any] = {
        "value": (int, float, type(None)),
        "numerator": int,
        "denominator": int,
        "denominator_kind": str,
    }
    if not all(isinstance(rate[name], kind) for name, kind in kinds.items()) or rate["numerator"] < 0:
        # The schema takes what it can't read as a rate for a scalar, and says nothing.
        validate_part(rate, schema()["$defs"]["rate"], where)
    k, n, value, ci = rate["numerator"], rate["denominator"], rate["value"], rate["ci"]
    _check_kinds(where, rate)
    if k > n:
        raise ReportError(f"{where}: numerator {k} exceeds denominator {n}")
    if n == 0:
        if value is not None or ci is not None:
            raise ReportError(f"{where}: 0 of 0 has no value and no interval; expected null")
        return
    if value is None or abs(value - k / n) > _ROUND_OFF:
        raise ReportError(f"{where}: value {value} is not {k} / {n} = {k / n:.6g}")
    if ci is None:
        return
    if not ci["low"] - _ROUND_OFF <= value <= ci["high"] + _ROUND_OFF:
        raise ReportError(f"{where}: value {value:.6g} lies outside its interval [{ci['low']:.6g}, {ci['high']:.6g}]")
    if ci["method"] == "wilson":
        expected = wilson(k, n, ci["level"])
        if max(abs(expected.low - ci["low"]), abs(expected.high - ci["high"])) > 1e-6:
            raise ReportError(
                f"{where}: [{ci['low']:.6g}, {ci['high']:.6g}] is not the Wilson interval of {k} / {n}, "
                f"[{expected.low:.6g}, {expected.high:.6g}]"
            )


def _check_kinds(where: str, rate: Mapping[str, Any]) -> None:
    """What the schema leaves open where a metric's name is not one of its own."""
    ci = rate["ci"]
    for name, fine, expected in (
        ("numerator", _whole(rate["numerator"]), "a whole number of at least 0"),
        ("denominator", _whole(rate["denominator"]), "a whole number of at least 0"),
        ("denominator_kind", isinstance(rate["denominator_kind"], str), "a text"),
        ("value", rate["value"] is None or _number(rate["value"]), "a number or null"),
        (
            "ci",
            ci is None
            or (
                isinstance(ci, Mapping)
                and all(_number(ci.get(part)) for part in ("low", "high", "level"))
                and isinstance(ci.get("method"), str)
            ),
            "null, or low, high and level with a method",
        ),
    ):
        if not fine:
            raise ReportError(f"{where}.{name}: {str(rate[name])[:60]!r}; expected {expected}")


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _named(data: Mapping[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """(where, metric, whether a curve will do) of every metric that section and companions name."""
    section = data.get("section")
    if section is not None:
        yield "section.headline", section["headline"]["metric"], True
        for i, line in enumerate(section.get("table", ())):
            yield f"section.table.{i}", line["metric"], True
        yield from (("section.sentence", name, False) for name in placeholders(section["sentence"]))
    for i, companion in enumerate(data.get("companions", ())):
        yield f"companions.{i}", companion["metric"], False


def _check_names(data: Mapping[str, Any]) -> None:
    for where, name, curves in _named(data):
        entry = data["metrics"].get(name)
        if entry is None:
            raise ReportError(f"{where}: names the metric {name!r}, which the report does not hold")
        if isinstance(entry, list) and not curves:
            raise ReportError(f"{where}: {name!r} is a curve; expected a metric with one value")


def _same_samples(rate: Mapping[str, Any], clean: Mapping[str, Any]) -> bool:
    return bool(
        rate["denominator_kind"] == clean["denominator_kind"] == "all_samples"
        and rate["denominator"] == clean["denominator"]
    )


def _check_identity(
    where: str, clean: Mapping[str, Any], robust: Mapping[str, Any], success: Mapping[str, Any] | None, unknown: int
) -> None:
    """RA <= CA, and RA = CA (1 - ASR) in whole samples where the denominators are the default ones."""
    if not _same_samples(robust, clean):
        return
    right, left = clean["numerator"], robust["numerator"]
    if left > right:
        raise ReportError(f"{where}: {left} robust rows exceed the {right} rows right before the attack")
    if success is None or success["denominator_kind"] != "clean_correct" or success["denominator"] != right:
        return
    broken = success["numerator"]
    if left + broken + unknown != right:
        raise ReportError(
            f"{where}: {left} robust + {broken} broken + {unknown} undecided rows are not the {right} rows right "
            "before the attack; rows without a verdict count in `undecided` (attack) and robust_accuracy_upper"
        )


def _check_accuracies(data: Mapping[str, Any]) -> None:
    metrics, dataset = data["metrics"], data["dataset"]
    clean, evaluated = metrics["clean_accuracy"], dataset["n_evaluated"]
    if evaluated > dataset["n_total"]:
        raise ReportError(f"dataset: {evaluated} rows evaluated of {dataset['n_total']}")
    if clean["denominator_kind"] == "all_samples" and clean["denominator"] != evaluated:
        raise ReportError(
            f"metrics.clean_accuracy: {clean['denominator']} rows, but dataset.n_evaluated is {evaluated}"
        )
    # An attacker who moves before training leaves another model, which may be right where the clean one was wrong.
    retrained = data["threat_model"].get("phase") == "training_time"
    for i, attack in enumerate(data["attacks"]):
        unknown = attack.get("undecided", 0)
        if not isinstance(unknown, int) or unknown < 0:
            raise ReportError(f"attacks.{i}.undecided: {unknown!r}; expected a whole count")
        if attack["beside"] and data["defense"].get("is_randomized"):
            continue  # what stands beside has clean answers of its own, and a random victim's differ
        if retrained:
            continue
        where = f"attacks.{i} ({attack['name']})"
        _check_identity(where, clean, attack["robust_accuracy"], attack["attack_success_rate"], unknown)
    robust, upper = metrics.get("robust_accuracy"), metrics.get("robust_accuracy_upper")
    if robust is None:
        return
    if upper is not None and ("numerator" not in upper or upper["numerator"] < robust["numerator"]):
        raise ReportError("metrics.robust_accuracy_upper: expected a rate that is at least robust_accuracy")
    if not retrained:
        _check_identity(
            "metrics.robust_accuracy", clean, robust, metrics.get("attack_success_rate"), undecided(metrics)
        )


def _check_worst_case(data: Mapping[str, Any]) -> None:
    clean, robust = data["metrics"]["clean_accuracy"], data["metrics"].get("robust_accuracy")
    if robust is None or data["protocol"]["aggregation"] != "worst_case_per_sample" or not _same_samples(robust, clean):
        return
    for attack in data["attacks"]:
        alone = attack["robust_accuracy"]
        if attack["beside"] or not _same_samples(alone, clean) or alone["numerator"] >= robust["numerator"]:
            continue
        raise ReportError(
            f"metrics.robust_accuracy: {robust['numerator']} rows robust in the worst case, but "
            f"{attack['name']} alone leaves {alone['numerator']}; an attack outside the worst case is "
            "marked `beside`"
        )


def _check_certified(name: str, points: list[Mapping[str, Any]]) -> None:
    ordered = sorted(points, key=lambda point: point["radius"])
    for inner, outer in pairwise(ordered):
        near, far = inner["certified_accuracy"], outer["certified_accuracy"]
        if near["denominator"] == far["denominator"] and far["numerator"] > near["numerator"]:
            raise ReportError(
                f"metrics.{name}: more rows certified at radius {outer['radius']:g} than at {inner['radius']:g}"
            )
