"""Shards of one evaluation, put together again."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from advkit.core.errors import ReportError
from advkit.evaluation.counts import RECALL_AT
from advkit.evaluation.report.document import Report
from advkit.evaluation.report.render import SEVERITIES
from advkit.evaluation.report.schema import placeholders
from advkit.evaluation.run.store import read_records, records_path
from advkit.evaluation.stats import clopper_pearson, wilson

log = logging.getLogger("advkit")
_ADDITIVE = (
    "clean_accuracy",
    "robust_accuracy",
    "attack_success_rate",
    "abstention_rate",
    "robust_accuracy_upper",
    "over_threshold",
    *(f"{prefix}recall_at_{k}_image_to_text" for prefix in ("clean_", "") for k in RECALL_AT),
)
"""Metrics whose counts are per sample, so that those of two shards add up."""
_MEANS = ("average_certified_radius", "rmse", "clean_rmse", "oblivious_rmse")
"""Means over all samples, so that those of two shards weigh by their samples."""
_CASE = ("kind", "task", "dataset", "model", "defense", "threat_model", "protocol", "attacks", "seed", "section")
_SAME = ("name", "attack", "stage", "source", "params", "order", "conditional", "beside")


def merge(a: Report, b: Report, additive: Iterable[str] = ()) -> Report:
    """The report of the union of two disjoint shards of one evaluation: counts add, intervals are made anew.

    additive: further metrics whose counts are per row and so may be added. Metrics that can't be derived from two
    summaries (the strongest cell of a grid, medians, scalars) are left out and named in a log warning; recompute
    those from the records. Raises ReportError when the two are not shards of one evaluation or share rows, and for
    shards that were asked for by `rows` where they are not next to one another: nothing would say which rows are there.
    """
    first, second = a.to_dict(), b.to_dict()
    _check_shards(a, b, first, second)
    rows = _joined_rows(first, second)
    merged = first
    merged["created_utc"] = max(first["created_utc"], second["created_utc"], key=datetime.fromisoformat)
    data = merged["dataset"]
    data["n_evaluated"] += second["dataset"]["n_evaluated"]
    if data["n_evaluated"] > data["n_total"]:
        raise ReportError(
            f"{data['n_evaluated']} rows in both shards, but the data set has {data['n_total']}: they overlap"
        )
    data["selection"] = {"kind": "all" if data["n_evaluated"] == data["n_total"] else "explicit_ids"}
    merged["attacks"] = [_merge_attacks(x, y) for x, y in zip(first["attacks"], second["attacks"], strict=True)]
    known = {*_ADDITIVE, *additive}
    merged["metrics"] = _merge_metrics(first["metrics"], second["metrics"], known)
    _keep_named(merged, second, rows)
    merged["diagnostics"] = {"flags": _merge_flags(first, second)}
    one, two = first["diagnostics"], second["diagnostics"]
    if "indicators" in one and one["indicators"] == two.get("indicators"):
        merged["diagnostics"]["indicators"] = one["indicators"]
    merged.pop("per_sample", None)
    merged.pop("robustbench", None)
    hashes = sorted({r["reproducibility"]["config_sha256"] for r in (first, second)})
    if len(hashes) > 1:
        merged["reproducibility"]["config_sha256"] = hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    commands = [r["reproducibility"]["command"] for r in (first, second)]
    merged["reproducibility"]["command"] = " && ".join(dict.fromkeys(each for each in commands if each))
    if rows is not None and "python_call" in merged["reproducibility"]:
        named = f", rows={rows!r}" if "rows" in merged["request"] else ""
        call = re.sub(r", rows='[0-9:]+'", named, merged["reproducibility"]["python_call"])
        merged["reproducibility"]["python_call"] = call
    return Report.from_dict(merged)


def _joined_rows(first: Mapping[str, Any], second: Mapping[str, Any]) -> str | None:
    """The rows of two shards as START:STOP, None where the reports do not say theirs; ReportError where they overlap.

    So do a shard and all n rows.
    """
    asked = [data.get("request", {}) for data in (first, second)]
    if not any("rows" in each for each in asked):
        return None
    n = asked[0].get("n")
    if n != asked[1].get("n"):
        raise ReportError(f"these are not shards of one evaluation: n is {n} and {asked[1].get('n')}")
    (start, stop), (begin, end) = sorted(
        tuple(int(place) for place in str(each.get("rows", f"0:{n}")).split(":")) for each in asked
    )
    if begin < stop:
        raise ReportError(f"the shards share rows {begin}:{min(stop, end)}; only disjoint shards can be merged")
    if begin > stop:
        raise ReportError(
            f"the shards have rows {start}:{stop} and {begin}:{end}: merge those next to one another first"
        )
    return f"{start}:{end}"


def _keep_named(merged: dict[str, Any], second: Mapping[str, Any], rows: str | None) -> None:
    """Section, companions and request as far as the metrics that are left carry them."""
    metrics, section = merged["metrics"], merged.get("section")
    if rows is not None:
        merged["request"]["rows"] = rows
        if rows == f"0:{merged['request']['n']}":
            del merged["request"]["rows"]
    elif "request" in merged:
        merged["request"]["n"] += second.get("request", {}).get("n", 0)
    if "companions" in merged:
        merged["companions"] = [each for each in merged["companions"] if each["metric"] in metrics]
    if section is None:
        return
    named = {section["headline"]["metric"], *placeholders(section["sentence"])}
    if named <= metrics.keys():
        section["table"] = [line for line in section.get("table", ()) if line["metric"] in metrics]
    else:
        lost = ", ".join(sorted(named - metrics.keys()))
        log.warning("merge leaves out the section, which names %s", lost)
        del merged["section"]


def _check_shards(a: Report, b: Report, first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    def part(data: Mapping[str, Any], key: str) -> Any:
        if key == "dataset":
            return {k: v for k, v in data[key].items() if k not in ("n_evaluated", "selection")}
        if key == "attacks":
            return [(x["name"], x["params"], x.get("order")) for x in data[key]]
        if key == "protocol":
            return {k: v for k, v in data[key].items() if k != "batch_size"}
        if key == "seed":
            return data["reproducibility"]["seed"]
        return data.get(key)

    for key in (
        "kind",
        "task",
        "dataset",
        "model",
        "defense",
        "threat_model",
        "protocol",
        "attacks",
        "seed",
        "section",
    ):
        if part(first, key) != part(second, key):
            raise ReportError(f"these are not shards of one evaluation: {key} differs")
    ids = [data["dataset"]["selection"].get("ids_sha256") for data in (first, second)]
    if a == b or (ids[0] is not None and ids[0] == ids[1]):
        raise ReportError("both reports are of the same rows; only disjoint shards can be merged")
    if a.path is not None and b.path is not None:
        files = [records_path(path) for path in (a.path, b.path)]
        if all(file.exists() for file in files):
            shared = {r.id for r in read_records(files[0])} & {r.id for r in read_records(files[1])}
            if shared:
                raise ReportError(f"the shards share {len(shared)} rows; only disjoint shards can be merged")


def _merge_rates(x: Mapping[str, Any], y: Mapping[str, Any]) -> dict[str, Any]:
    if x["denominator_kind"] != y["denominator_kind"]:
        raise ReportError(f"denominators {x['denominator_kind']} and {y['denominator_kind']} can't be added")
    k, n = x["numerator"] + y["numerator"], x["denominator"] + y["denominator"]
    given = x["ci"] or y["ci"]
    ci: dict[str, Any] | None = None
    if n and given is not None:
        # A bootstrap needs the rows again; two summaries can't give it.
        made = {"wilson": wilson, "clopper_pearson": clopper_pearson}.get(given["method"])
        ci = None if made is None else made(k, n, given["level"]).to_dict()
    kind = x["denominator_kind"]
    return {"value": k / n if n else None, "numerator": k, "denominator": n, "denominator_kind": kind, "ci": ci}


def _merge_attacks(x: Mapping[str, Any], y: Mapping[str, Any]) -> dict[str, Any]:
    merged = {key: x[key] for key in _SAME if key in x}
    merged["n_attacked"] = x["n_attacked"] + y["n_attacked"]
    for key in ("robust_accuracy", "attack_success_rate", "cumulative_robust_accuracy"):
        if key in x and key in y:
            merged[key] = _merge_rates(x[key], y[key])
    if "undecided" in x or "undecided" in y:
        merged["undecided"] = x.get("undecided", 0) + y.get("undecided", 0)
    if "perturbation" in x and "perturbation" in y:
        merged["perturbation"] = _merge_perturbations(x, y)
    cost: dict[str, Any] = {}
    for key in ("seconds", "forward", "backward"):
        if key in x["cost"] and key in y["cost"]:
            cost[key] = x["cost"][key] + y["cost"][key]
    if "queries_max" in x["cost"] and "queries_max" in y["cost"]:
        cost["queries_max"] = max(x["cost"]["queries_max"], y["cost"]["queries_max"])
    merged["cost"] = cost
    return merged


def _merge_perturbations(x: Mapping[str, Any], y: Mapping[str, Any]) -> dict[str, Any]:
    one, two = x["perturbation"], y["perturbation"]
    merged: dict[str, Any] = {}
    if one.get("norm") == two.get("norm") and "norm" in one:
        merged["norm"] = one["norm"]
    if "max" in one and "max" in two:
        merged["max"] = max(one["max"], two["max"])
    for key in ("n_outside_budget", "n_outside_box", "n_nonfinite"):
        if key in one and key in two:
            merged[key] = one[key] + two[key]
    return merged


def _merge_metrics(x: Mapping[str, Any], y: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    left_out = sorted(set(x) ^ set(y))
    for name in (key for key in x if key in y):
        one, two = x[name], y[name]
        if isinstance(one, list) and isinstance(two, list) and [p["radius"] for p in one] == [p["radius"] for p in two]:
            merged[name] = [
                {
                    "radius": p["radius"],
                    "certified_accuracy": _merge_rates(p["certified_accuracy"], q["certified_accuracy"]),
                }
                for p, q in zip(one, two, strict=True)
            ]
        elif name in _MEANS and one["value"] is not None and two["value"] is not None:
            n = one["n"] + two["n"]
            mean = (one["value"] * one["n"] + two["value"] * two["n"]) / n
            merged[name] = {**one, "value": mean, "n": n, "ci": None}  # a bootstrap needs the samples again
        elif name in known and "numerator" in one and "numerator" in two:
            merged[name] = _merge_rates(one, two)
        else:
            left_out.append(name)
    if left_out:
        log.warning("merge leaves out %s: not derivable from two summaries", ", ".join(left_out))
    return merged


def _merge_flags(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[dict[str, Any]]:
    worst: dict[tuple[str, str], dict[str, Any]] = {}
    for flag in [*first["diagnostics"]["flags"], *second["diagnostics"]["flags"]]:
        key = (flag["id"], flag.get("attack", ""))
        seen = worst.get(key)
        if seen is None or SEVERITIES.index(flag["severity"]) > SEVERITIES.index(seen["severity"]):
            worst[key] = flag
    return list(worst.values())
