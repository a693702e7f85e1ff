"""Cards of RobustBench (`model_info/DATASET/THREAT/MODEL.json`): a report as one, and cards as claims.

What a card says was measured by others. It stands beside reports as claimed, and is never ranked with them.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advkit.core.errors import ReportError, UsageError
from advkit.core.strict_json import read_object
from advkit.core.text import printable
from advkit.evaluation.report.render import title
from advkit.evaluation.report.schema import schema, undecided, validate_part

STANDARD = "autoattack-standard"
CLAIMED = "claimed, not measured"
THREATS = ("Linf", "L2", "corruptions")
FIGURES = {
    "clean_acc": "clean accuracy",
    "autoattack_acc": "robust accuracy, AutoAttack",
    "external": "robust accuracy, best known evaluation",
    "reported": "robust accuracy, by its authors",
    "corruptions_acc": "accuracy under corruptions",
    "corruptions_acc_3d": "accuracy under 3D corruptions",
    "corruptions_mce": "mean corruption error",
    "corruptions_mce_3d": "mean corruption error, 3D",
}
"""The numbers of a card, percent as text, in words."""
_PERCENT = re.compile(r"\d{1,3}(\.\d+)?")
_EPS = re.compile(r"(\d+(?:\.\d+)?)(?:/(\d+))?")


@dataclass(frozen=True)
class Claim:
    """A card: what others say of a model. None of it was measured here.

    model:  its name, that of the file
    threat: Linf, L2 or corruptions, by the folder; "" where that says nothing
    card:   the card as it was read
    """

    model: str
    threat: str
    card: Mapping[str, Any]

    @property
    def dataset(self) -> str:
        """cifar10, cifar100 or imagenet."""
        return str(self.card["dataset"])

    @property
    def eps(self) -> float | None:
        """The radius as a number, None without one."""
        told = self.card["eps"]
        if not told:
            return None
        found = _EPS.fullmatch(told)
        assert found is not None  # read_card has looked
        return float(found[1]) / float(found[2] or 1)

    @property
    def figures(self) -> dict[str, float]:
        """Key of the card -> fraction; mean corruption errors may exceed 1."""
        return {key: float(self.card[key]) / 100 for key in FIGURES if self.card.get(key)}

    def to_card(self) -> dict[str, Any]:
        """The card, as it was read."""
        return dict(self.card)

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        known = ("architecture", "venue", "link", "additional_data", "unreliable", "footnote")
        return {
            "model": self.model,
            "dataset": self.dataset,
            "threat": self.threat,
            "eps": self.card["eps"],
            "status": CLAIMED,
            "figures": self.figures,
            **{key: self.card[key] for key in known if key in self.card},
        }


def read_card(source: str | os.PathLike[str] | Mapping[str, Any], *, model: str = "", threat: str = "") -> Claim:
    """The claim of a `model_info` card: a file, or the card itself.

    model, threat: what a file's name and its folder say otherwise

    Raises ReportError, in one line, for a file that can't be read and for what is no card: an unknown key, percent that
    are not written as text ("59.53"), another data set.
    """
    card: Mapping[str, Any]
    if isinstance(source, Mapping):
        card, where = source, model or "the card"
    else:
        file = Path(source)
        where = printable(str(file))
        model = model or file.stem
        threat = threat or (file.parent.name if file.parent.name in THREATS else "")
        try:
            card = read_object(file.read_bytes())
        except (OSError, ValueError) as error:
            raise ReportError(f"{where} is no RobustBench card: {getattr(error, 'strerror', None) or error}") from error
    part = schema()["properties"]["robustbench"]
    for key in card:
        if key not in part["properties"]:
            near = difflib.get_close_matches(str(key), part["properties"], n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(part['properties'])}"
            raise ReportError(f"{where} is no RobustBench card: it has the key {printable(str(key))[:60]!r}{hint}")
    validate_part(card, part, where)
    for key in FIGURES:
        told = card.get(key)
        limit = None if "mce" in key else 100
        if told and (not _PERCENT.fullmatch(told) or (limit and float(told) > limit)):
            raise ReportError(f"{where}: {key} is {printable(told)[:40]!r}; expected percent as text, such as '59.53'")
    if card["eps"] and (not (found := _EPS.fullmatch(card["eps"])) or found[2] == "0" * len(found[2] or "-")):
        raise ReportError(
            f"{where}: eps is {printable(card['eps'])[:40]!r}; expected a radius such as '8/255' or '0.5'"
        )
    return Claim(model or str(card.get("name", "")), threat, dict(card))


def read_cards(folder: str | os.PathLike[str]) -> tuple[list[Claim], list[tuple[str, str]]]:
    """The claims of all cards (*.json) under a folder, and (path, fault) of files that are none.

    Raises UsageError where there is no such folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UsageError(f"{root} is no folder; expected one that holds RobustBench cards, such as model_info")
    claims, invalid = [], []
    for file in sorted(root.rglob("*.json")):
        try:
            claims.append(read_card(file))
        except ReportError as error:
            invalid.append(
                (file.relative_to(root).as_posix(), str(error).removeprefix(f"{file} ").removeprefix(f"{file}: "))
            )
    return claims, invalid


def robustbench_block(
    data: Mapping[str, Any], dataset: str | None, fields: Mapping[str, str | bool | int | None]
) -> dict[str, Any]:
    """The block of a document; raises ReportError for data sets that RobustBench does not have."""
    part = schema()["properties"]["robustbench"]
    name = (dataset or data["dataset"]["name"]).replace("-", "").replace("_", "").lower()
    allowed = part["properties"]["dataset"]["enum"]
    if name not in allowed:
        raise ReportError(f"RobustBench has no data set {name!r}; expected one of {', '.join(allowed)}")
    threat, model, metrics, flags = data["threat_model"], data["model"], data["metrics"], data["diagnostics"]["flags"]
    eps = threat.get("eps_string") or (None if threat.get("eps") is None else f"{threat['eps']:.6g}")
    block: dict[str, Any] = {"name": title(data), "dataset": name, "eps": eps}
    block["clean_acc"] = _percent_string(metrics["clean_accuracy"], "clean_accuracy")
    robust = metrics.get("robust_accuracy")
    if robust is not None:
        key = "autoattack_acc" if data["protocol"].get("name") == STANDARD else "reported"
        block[key] = _percent_string(robust, "robust_accuracy")
    block |= {key: model[key] for key in ("architecture", "additional_data", "number_forward_passes") if key in model}
    block["unreliable"] = any(flag["severity"] == "unreliable" for flag in flags) or undecided(metrics) > 0
    notes = sorted({flag["id"] for flag in flags if flag["severity"] != "info"})
    block["footnote"] = "flags: " + ", ".join(notes) if notes else None
    block.update(fields)
    validate_part(block, part, "robustbench")
    return block


def _percent_string(rate: Mapping[str, Any], name: str) -> str:
    if rate["value"] is None:
        raise ReportError(f"{name} has no value; RobustBench's block needs one")
    return f"{100 * rate['value']:.2f}"
