"""Certified and empirical accuracy of the embedded smoothed model: the figures of docs/certification.md.

    python benchmarks/certified_accuracy.py [--n 100] [--out docs/certification.json]

Normal noise with an attack beside it, lattice noise, and the model that was trained without noise. About ten minutes on
one core.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import advkit
from advkit.core.provenance import commit_text

RADII = "radii=0+0.25+0.5+0.75"
RUNS: dict[str, dict[str, str]] = {
    "trained under noise, gaussian": {"defense": "smoothing:sigma=0.25", "attack": "pgd:steps=40,eot=4,loss=margin"},
    "trained under noise, lattice": {"defense": "smoothing:sigma=0.25,noise=lattice"},
    "trained without noise, gaussian": {"defense": "smoothing:sigma=0.25", "model": "zoo:fashion-mnist-cnn"},
}
RATES = ("clean_accuracy", "abstention_rate", "empirical_clean_accuracy", "empirical_robust_accuracy")


def certified(name: str, n: int, draws: int) -> dict[str, Any]:
    """The figures of one report."""
    report = advkit.certify(task="fashion-mnist", threat_model=f"certified:n={draws},{RADII}", n=n, **RUNS[name])
    metrics = report.metrics
    return {
        "samples": n,
        "draws": draws,
        "settings": RUNS[name],
        "certified": {
            f"{point['radius']:g}": {
                "value": point["certified_accuracy"]["value"],
                "low": point["certified_accuracy"]["ci"]["low"],
                "high": point["certified_accuracy"]["ci"]["high"],
            }
            for point in metrics["certified_accuracy"]
        },
        "average_certified_radius": metrics["average_certified_radius"]["value"],
        "largest_certifiable_radius": metrics["largest_certifiable_radius"]["value"],
        **{rate: metrics[rate]["value"] for rate in RATES if rate in metrics},
        "flags": sorted({flag["id"] for flag in report.flags}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=100, help="images")
    parser.add_argument("--draws", type=int, default=10_000)
    parser.add_argument("--out", default="")
    given = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"command": "python benchmarks/certified_accuracy.py", "commit": commit_text("advkit")}
    result["runs"] = {}
    for name in RUNS:
        result["runs"][name] = certified(name, given.n, given.draws)
        print(name, json.dumps(result["runs"][name]), flush=True)
        if given.out:
            Path(given.out).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
