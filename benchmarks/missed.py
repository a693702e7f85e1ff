"""Samples that AutoAttack's reference breaks and a suite does not, seed by seed; the reference's flags are kept.

python benchmarks/missed.py --models zoo:fashion-mnist-public-mlp-at --threat-models linf:eps=0.1 --cache FOLDER
    [--suites thorough] [--n 400] [--seeds 0,1,2] [--stages apgd-ce,apgd-t,fab-t,square] [--task fashion-mnist]

A run of the reference costs 20 times what a suite costs, so each is done once and its flags stand in FOLDER. With
fewer --stages only the reference's first attacks run: what the others break is then not known, and the table says so.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from advkit.benchmark import STAGES, our_run, reference_run
from advkit.benchmark.sides import one_thread
from advkit.evaluation.api import resolve


def flags(folder: Path, stages: tuple[str, ...], **asked: Any) -> dict[str, Any]:
    """Which samples the reference breaks, by which attack, and what it cost."""
    words = [asked["model"].partition(":")[2], asked["threat_model"], str(asked["n"]), str(asked["seed"]), *stages]
    file = folder / ("_".join(words).replace(":", "-").replace("/", "-").replace(",", "-") + ".json")
    if not file.exists():
        run = reference_run(resolve("pgd", "none", device="cpu", **asked), stages=stages)
        folder.mkdir(parents=True, exist_ok=True)
        kept = {**run.to_dict(), "wrong": sorted(run.wrong), "broken": dict(run.broken)}
        file.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def main() -> None:
    """Run what is not kept yet, then the suites, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("suites", "thorough"),
        ("seeds", "0"),
        ("stages", ",".join(STAGES)),
        ("task", "fashion-mnist"),
    ):
        parser.add_argument(f"--{name}", default=default)
    for name in ("models", "threat-models", "cache"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--n", type=int, default=400)
    asked = parser.parse_args()
    stages = tuple(asked.stages.split(","))
    seeds = [int(seed) for seed in asked.seeds.split(",")]
    print(f"reference: {', '.join(stages)}\n")
    print("| model | threat model | suite | robust | reference, by seed | missed | gained | forwards k | backwards k |")
    print("|---|---|---|---|---|---|---|---|---|")
    with one_thread():
        for threat in asked.threat_models.split(","):
            for model in asked.models.split(","):
                of = {"task": asked.task, "model": model, "threat_model": threat, "n": asked.n}
                known = [flags(Path(asked.cache), stages, seed=seed, **of) for seed in seeds]
                broken = {row for each in known for row in each["broken"]}
                robust = ", ".join(str(asked.n - len(each["wrong"]) - len(each["broken"])) for each in known)
                for suite in asked.suites.split(","):
                    ours = our_run(resolve(suite, "none", device="cpu", **of))
                    missed = sorted(broken - set(ours.broken))
                    print(
                        f"| {model} | {threat} | {suite} | {round(ours.robust_accuracy * asked.n)} | {robust} "
                        f"| {len(missed)} {' '.join(missed)} | {len(set(ours.broken) - broken)} "
                        f"| {ours.forwards / 1e3:.0f} | {ours.backwards / 1e3:.0f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
