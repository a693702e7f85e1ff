"""Certificates counted from records: what scenario, verification and figures say of the same votes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from advkit.core.protocols import Outcome, Record
from advkit.core.smoothing import high_probability, radius
from advkit.evaluation.stats import bootstrap_mean, rate

LABEL = "certify"
"""The label of records that hold votes."""
ACCURACY, RADIUS, ABSTAINED = "certified_accuracy", "average_certified_radius", "abstention_rate"
LARGEST = "largest_certifiable_radius"
SEED = 0
"""Of the bootstrap; a report's interval does not depend on the run's seed."""


@dataclass(frozen=True)
class Certificate:
    """What the votes of one sample come to.

    id:      the sample's
    right:   whether the class that was certified is the label
    radius:  within which it does not change; 0 where the certificate abstains
    """

    id: str
    right: bool
    radius: float

    @property
    def abstains(self) -> bool:
        """No class was certified."""
        return self.radius == 0

    def holds(self, at: float) -> bool:
        """Whether the right class is certified at a radius; at 0, at any radius above it."""
        return self.right and self.radius > 0 and self.radius >= at


def certificates(records: Iterable[Record], alpha: float) -> list[Certificate]:
    """The certificates of records, from the counts that they hold; a sample without a vote has none."""
    found = []
    for record in records:
        told = record.measures
        if record.outcome in (Outcome.ERROR, Outcome.NON_FINITE) or not {"class", "k", "n", "sigma"} <= told.keys():
            found.append(Certificate(record.id, False, 0.0))
            continue
        proven = radius(told["k"], told["n"], told["sigma"], alpha, told.get("slack", 0.0))
        found.append(Certificate(record.id, record.label is not None and told["class"] == record.label, proven))
    return found


def curve(found: Sequence[Certificate], radii: Sequence[float], alpha: float) -> list[dict[str, Any]]:
    """Certified accuracy at every radius, as reports have it: counts, a Wilson interval over the samples.

    `high_probability` is what is left with probability 0.999 once false certificates are allowed for.
    """
    n = len(found)
    points = []
    for at in radii:
        entry = rate(sum(each.holds(at) for each in found), n, "all_samples")
        low = None if entry["value"] is None else high_probability(entry["value"], n, alpha)
        points.append({"radius": at, "certified_accuracy": entry, "high_probability": {"value": low}})
    return points


def average_radius(found: Sequence[Certificate]) -> dict[str, Any]:
    """Mean radius over all samples, 0 for those that are wrong or abstain; percentile bootstrap over the samples."""
    values = [each.radius if each.right else 0.0 for each in found]
    if not values:
        return {"value": None, "unit": "L2", "n": 0}
    return {
        "value": float(np.mean(values)),
        "unit": "L2",
        "n": len(values),
        "ci": bootstrap_mean(values, seed=SEED).to_dict(),
    }


def figures(records: Sequence[Record], radii: Sequence[float], alpha: float) -> dict[str, Any]:
    """The metrics that follow from the votes alone."""
    found = certificates(records, alpha)
    votes = [(record.measures.get("non_finite", 0), record.forwards) for record in records]
    lost, draws = (int(sum(column)) for column in zip(*votes, strict=True)) if votes else (0, 0)
    metrics: dict[str, Any] = {
        "clean_accuracy": rate(sum(each.holds(0.0) for each in found), len(found), "all_samples"),
        ACCURACY: curve(found, radii, alpha),
        RADIUS: average_radius(found),
        ABSTAINED: rate(sum(each.abstains for each in found), len(found), "all_samples"),
        "noisy_copies": {"value": int(sum(record.forwards for record in records)), "unit": "forward passes"},
    }
    if lost:
        metrics["non_finite_votes"] = rate(lost, draws, "votes")
    return metrics


def refuted(proven: Iterable[Record], attacked: Iterable[Record], alpha: float, within: float) -> list[str]:
    """Samples that are certified at a radius and got another class, no abstention, from an attack within it."""
    sure = {each.id for each in certificates(proven, alpha) if each.holds(within)}
    return sorted(
        {
            record.id
            for record in attacked
            if record.id in sure
            and record.outcome == Outcome.BROKEN
            and record.adversarial not in (None, -1, record.label)
        }
    )


def agrees(entry: Sequence[Mapping[str, Any]], records: Sequence[Record], alpha: float) -> bool:
    """Whether a report's curve is what the records say: counts, and what is left with high probability."""
    told = curve(certificates(records, alpha), [point["radius"] for point in entry], alpha)

    def figures_of(point: Mapping[str, Any]) -> tuple[Any, ...]:
        rated = point["certified_accuracy"]
        return rated.get("numerator"), rated.get("denominator"), point.get("high_probability", {}).get("value")

    return all(
        figures_of(point)[:2] == figures_of(known)[:2]
        and math.isclose(figures_of(point)[2] or 0.0, figures_of(known)[2] or 0.0, abs_tol=1e-9)
        for point, known in zip(entry, told, strict=True)
    )
