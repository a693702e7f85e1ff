"""A report as an entry of RobustBench: its flat block of names and percent strings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from advkit.core.errors import ReportError
from advkit.evaluation.report.render import title
from advkit.evaluation.report.schema import schema, undecided, validate_part

STANDARD = "autoattack-standard"


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
