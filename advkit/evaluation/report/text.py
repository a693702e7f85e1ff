"""Numbers and names of a report as people read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SPOKEN = {"nll": "NLL", "asr": "ASR", "tapm": "TAPM", "acc": "accuracy", "8bit": "after rounding to 8 bits"}
_CUT = "..."
MOST_CLASSES = 100
"""More can't be told apart in a figure, nor are they named in a report."""

NO_MEDIAN = "no median: half of the samples or more withstood"
"""Of distances, infinite where a sample withstood."""


def percent(value: float | None) -> str:
    """A fraction as people read it: "84.9 %", or "-" where there is none."""
    return "-" if value is None else f"{100 * value:.1f} %"


def spell(name: str, params: Mapping[str, Any]) -> str:
    """`pgd:steps=40,restarts=2` from a name and its parameters; the name alone where it spells them already."""
    if not params or ":" in name:
        return name
    return name + ":" + ",".join(f"{key}={value}" for key, value in params.items())


_ACCESS = {
    "white_box": "white box",
    "black_box_score": "black box (scores)",
    "black_box_decision": "black box (decisions)",
    "none": "no access",
}
_OF_DEFENSE = {"known": ", defense known", "adaptive": ", adaptive", "unknown": ", oblivious"}


def access_text(access: str) -> str:
    """What an attacker may ask, in words: "white box", "black box (scores)", "transfer"."""
    return _ACCESS.get(access, access.replace("_", " "))


def attacker_text(threat: Mapping[str, Any]) -> str:
    """Who the attacker was: "white box, defense known", "black box (scores)", "transfer, oblivious".

    Of a completed document's threat model: what was asked, and what was made of the defense where there is one.
    """
    return access_text(str(threat["knowledge"])) + _OF_DEFENSE.get(threat.get("attacker", {}).get("defense", ""), "")


def describe_threat(threat: Mapping[str, Any]) -> str:
    """One line: `linf eps=8/255, untargeted, white box, defense known`."""
    name = str(threat["name"])
    words = [name]
    eps = threat.get("eps_string") or threat.get("eps")
    if eps is not None and "eps" not in name:
        # "8 tokens" names its unit and is no eps.
        words[0] += f" of {eps}" if " " in str(eps) else f" eps={eps}"
    words += [str(threat["goal"]).replace("_", " "), attacker_text(threat)]
    if threat.get("query_budget") is not None:
        words.append(f"{threat['query_budget']} queries")
    return ", ".join(words)


def shorten(text: str, width: int) -> str:
    """A text on one line of at most `width` characters; what is too long loses its middle: names differ at the ends."""
    flat = " ".join(text.split())
    if len(flat) <= width:
        return flat
    if width <= len(_CUT):
        return flat[: max(0, width)]
    rest = width - len(_CUT)
    return flat[: rest - rest // 2] + _CUT + flat[len(flat) - rest // 2 :]


def words_of(name: str) -> str:
    """A metric's name as words: `tapm_acc_avg` is "TAPM accuracy avg"."""
    return " ".join(_SPOKEN.get(word, word) for word in name.split("_"))


def is_rate(entry: Any) -> bool:
    """A metric that is k of n, not a scalar and not a curve."""
    return isinstance(entry, Mapping) and "denominator_kind" in entry


def is_fraction(entry: Any) -> bool:
    """A metric that is read in percent: a rate, or a scalar whose unit says so."""
    return is_rate(entry) or (isinstance(entry, Mapping) and entry.get("unit") == "fraction")


def value_text(entry: Mapping[str, Any]) -> str:
    """The value of a rate or a scalar: "84.9 %", "0.0271 Linf"; NO_MEDIAN where that would be infinite."""
    if entry.get("unbounded"):
        return NO_MEDIAN
    if is_fraction(entry):
        return percent(entry["value"])
    return "-" if entry["value"] is None else f"{entry['value']:.4g} {entry.get('unit', '')}".rstrip()


def interval_text(entry: Mapping[str, Any]) -> str:
    """The interval of a rate or a scalar: "[82.0, 87.4]", empty without one."""
    ci = entry.get("ci")
    if ci is None:
        return ""
    if is_fraction(entry):
        return f"[{100 * ci['low']:.1f}, {100 * ci['high']:.1f}]"
    return f"[{ci['low']:.3g}, {ci['high']:.3g}]"


def metric_text(entry: Mapping[str, Any]) -> str:
    """A value with its interval, as it stands in a sentence: "84.9 % [82.0, 87.4]"."""
    return f"{value_text(entry)} {interval_text(entry)}".rstrip()


def counts_text(entry: Mapping[str, Any]) -> str:
    """What a rate counts, or over how much a scalar was averaged: "849 / 1000 all samples", "n = 12"."""
    if is_rate(entry):
        return f"{entry['numerator']} / {entry['denominator']} {entry['denominator_kind'].replace('_', ' ')}"
    return f"n = {entry['n']}" if "n" in entry else ""


def level_text(metrics: Mapping[str, Any]) -> str:
    """Heading of a column of intervals: "95 % interval"."""
    ci = metrics["clean_accuracy"]["ci"]
    return "interval" if ci is None else f"{100 * ci['level']:g} % interval"
