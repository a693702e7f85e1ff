"""Reports of schema version 1.0: what they lack is made from what they hold, here and nowhere else.

Version 1.1 writes down what a scenario says of its run (`section`), the cases beside it (`companions`) and the parts
of every attack's label. Version 1.0 left all that to its readers, who knew every scenario, goal and modality by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from advkit.core.protocols import Label

WORDING = {
    "clean": "clean accuracy",
    "robust": "robust accuracy",
    "success": "attack success rate",
    "figure": "accuracy",
}
_TEXT_WORDING = {
    "clean": "target not said, clean prompt",
    "robust": "target not said",
    "success": "exact target rate (greedy)",
    "figure": "target not said",
}
_JUDGED = "_asr_greedy"


def completed(data: Mapping[str, Any]) -> dict[str, Any]:
    """The document with all that today's readers ask for; one that holds it already is left as it is.

    Every attack has `attack`, `stage`, `source` and `beside`; `companions` is there; the threat model says who the
    `attacker` was; `section` has `table`, `figures` and `wording`, and its `headline` is None where an old document
    holds no number to rank by.
    """
    whole = {**data, "attacks": [_attack(attack, data) for attack in data["attacks"]]}
    if "section" not in data:
        whole["metrics"] = {name: _metric(name, entry) for name, entry in data["metrics"].items()}
    whole["threat_model"] = _attacked_by(data)
    section = data.get("section") or _section(whole)
    whole["section"] = {"table": [], "figures": [], **section, "wording": {**WORDING, **section.get("wording", {})}}
    whole["companions"] = data.get("companions", [] if "section" in data else list(_companions(data)))
    return whole


def _attacked_by(data: Mapping[str, Any]) -> dict[str, Any]:
    """The threat model with who the attacker was.

    Earlier reports give what was granted, and call every attacker adaptive who was not oblivious: these knew the
    defense, and no more was declared. Where no attack took a gradient, scores were enough.
    """
    threat = dict(data["threat_model"])
    if "attacker" in threat:
        return threat
    threat["granted"] = threat["knowledge"]
    costs = [attack["cost"] for attack in data["attacks"] if not attack.get("beside")]
    asked = costs and all({"forward", "backward"} <= cost.keys() for cost in costs)
    took = asked and any(cost["backward"] for cost in costs)
    if threat["knowledge"] == "white_box" and asked and not took and any(cost["forward"] for cost in costs):
        threat["knowledge"] = "black_box_score"
    told = threat.get("adaptive")
    defense = "undeclared" if told is None else "known" if told else "unknown"
    if data["defense"]["name"] == "none":
        defense = "none"
    threat["attacker"] = {"access": threat["knowledge"], "defense": defense}
    return {**threat, "adaptive": False}


def _attack(attack: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    if "attack" in attack:
        return {"stage": "", "source": "", "beside": False, **attack}
    label = Label.parse(attack["name"])
    source = str(attack["params"].get("source", label.source))
    # A cell of a transfer grid in a report under another threat model never belonged to the headline.
    beside = bool(attack.get("beside")) or ("source" in attack["params"] and not _of_transfer(data))
    return {**attack, "attack": label.attack, "stage": label.stage, "source": source, "beside": beside}


def _metric(name: str, entry: Any) -> Any:
    """The fool rates of streams are fractions that did not say so."""
    plain = name.endswith("fool_rate") and "denominator_kind" not in entry and "unit" not in entry
    return {**entry, "unit": "fraction"} if plain else entry


def _of_transfer(data: Mapping[str, Any]) -> bool:
    return bool(data["threat_model"]["knowledge"] == "transfer")


def _writes_text(data: Mapping[str, Any]) -> bool:
    return bool(data["task"] == "text_generation")


def _wants_more(data: Mapping[str, Any]) -> bool:
    return bool(data["threat_model"]["goal"] != "untargeted")


def _section(data: Mapping[str, Any]) -> dict[str, Any]:
    wording = dict(WORDING)
    if _writes_text(data):
        wording = _TEXT_WORDING
    elif _wants_more(data):
        wording["robust"] = "correct, goal not reached"
    return {
        "scenario": _scenario(data),
        "headline": _headline(data, wording),
        "table": [{"label": label, "metric": name} for label, name in _table(data, wording) if name in data["metrics"]],
        "sentence": _sentence(data),
        "figures": [{"name": name} for name in _figures(data)],
        "wording": wording,
    }


def _scenario(data: Mapping[str, Any]) -> str:
    if "stream_fool_rate" in data["metrics"]:
        return "stream"
    return "grid" if _of_transfer(data) and any("source" in x["params"] for x in data["attacks"]) else "evasion"


def _headline(data: Mapping[str, Any], wording: Mapping[str, str]) -> dict[str, str] | None:
    metrics = data["metrics"]
    if "stream_fool_rate" in metrics:
        return {"metric": "stream_fool_rate", "name": "Fool rate of submissions", "better": "lower"}
    if metrics.get("robust_accuracy") is not None:
        return {"metric": "robust_accuracy", "name": wording["robust"].capitalize(), "better": "higher"}
    curves = [name for name, entry in metrics.items() if isinstance(entry, list) and entry]
    return {"metric": curves[0], "name": "Certified accuracy", "better": "higher"} if curves else None


def _table(data: Mapping[str, Any], wording: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    yield wording["clean"], "clean_accuracy"
    yield wording["robust"], "robust_accuracy"
    yield wording["success"], "attack_success_rate"
    yield "fool rate of submissions", "stream_fool_rate"
    yield "competitive ratio", "stream_competitive_ratio"
    if _of_transfer(data):
        yield "accuracy, average of the cells", "tapm_acc_avg"
        yield "accuracy, strongest cell", "tapm_acc_best_attack"
    for name in data["metrics"]:
        if name.endswith(_JUDGED):
            yield f"{name.removesuffix(_JUDGED)} judge says broken", name


def _companions(data: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    metrics = data["metrics"]
    if not _of_transfer(data) and "tapm_acc_best_attack" in metrics:
        yield {"name": "tapm", "title": "best transfer attack (TAPM)", "metric": "tapm_acc_best_attack"}
    bare = (name for name, entry in metrics.items() if "white_box" in name and isinstance(entry, Mapping))
    for name in [*bare][:1]:
        yield {"name": "white_box", "title": "white box", "metric": name}
    if "oblivious_robust_accuracy" in metrics:
        yield {"name": "oblivious", "title": "oblivious (defense unknown)", "metric": "oblivious_robust_accuracy"}


def _sentence(data: Mapping[str, Any]) -> str:
    metrics = data["metrics"]
    if metrics.get("robust_accuracy") is None:
        if data["defense"].get("certified"):
            return "Certified under {threat}: proven, not attacked."
        return "No attack was run under {threat}."
    if "stream_fool_rate" in metrics:
        return (
            "{stream_fool_rate} of what is submitted fools the model under {threat}, in the mean of "
            f"{metrics['stream_fool_rate'].get('n', 'all')} orders. "
            "Were every item submitted, robust accuracy would be {robust_accuracy}."
        )
    success = metrics.get("attack_success_rate")
    if not _wants_more(data) or success is None or success["value"] is None:
        return "Robust accuracy {robust_accuracy} under {threat}; {attacks}."
    name = "Exact target rate (greedy)" if _writes_text(data) else "Attack success rate"
    words = f"{name} {{attack_success_rate}} under {{threat}}; {{attacks}}."
    norm = str(data["threat_model"].get("norm"))
    distance = metrics.get(f"{norm.lower()}_mean")
    if isinstance(distance, Mapping) and distance.get("value") is not None:
        words += f" Successes lie {{{norm.lower()}_mean}} ({norm}) from their clean inputs in the mean."
    return words


def _figures(data: Mapping[str, Any]) -> Iterator[str]:
    """What was drawn of such a report: what of it there is to draw, the figures find out themselves."""
    if not _wants_more(data):
        yield "per_class"
    if data["threat_model"].get("eps") is None and data["threat_model"].get("norm"):
        yield "success_by_distance"
    yield from ("searches", "transcripts")
    if sum(bool(attack["source"]) for attack in data["attacks"]) > 1:
        yield "transfer_grid"
