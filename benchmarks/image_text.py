"""The zoo's dual encoder under attack: zero-shot accuracy, recall at k, and embeddings moved near a vector.

    python benchmarks/image_text.py [--n 1000] [--out docs/image_text.json]

Nothing is downloaded or trained. Every row is written as soon as it is there; a second call makes those that lack.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import advkit
from advkit.core.provenance import commit_text
from advkit.models import zoo
from advkit.models.image_text import ImageTextModel
from advkit.tasks import TASKS

TASK, MODEL = "fashion-mnist-captions", "zoo:fashion-mnist-dual-encoder"
PGD = "pgd:steps=40,step_size=0.1"
BAG = 8
RANKED = {
    "PGD-40": {"attack": PGD},
    "PGD-40 on the margin": {"attack": f"{PGD},loss=margin"},
    "lean": {"attack": "lean"},
    "PGD-40, targeted (next class)": {"attack": PGD, "goal": "targeted"},
    "PGD-40, caption out of the top 5": {"attack": PGD, "goal": "out-of-topk:k=5"},
    "PGD-40, eps 0.1": {"attack": PGD, "threat_model": "linf:eps=0.1"},
    "PGD-40, L2 eps 1": {"attack": PGD, "threat_model": "l2:eps=1"},
    "Square, 1,000 queries": {"attack": "square:queries=1000"},
}
RECALLS = [
    f"{prefix}recall_at_{k}_{way}"
    for prefix in ("clean_", "")
    for way in ("image_to_text", "text_to_image")
    for k in (1, 5)
]
SIMILARITY = 0.9
EPS = ("0.05", "0.1", "0.2")


def targets(folder: Path) -> dict[str, Path]:
    """Files with the vectors of the goal near."""
    model = zoo.load(MODEL.partition(":")[2])
    assert isinstance(model, ImageTextModel)
    rows = TASKS.build(TASK).rows
    first = int((rows.y == BAG).nonzero()[0])
    with torch.no_grad():
        held = {
            "the caption of a bag": model.texts()[BAG],
            "the image of a bag": model.embed(rows.x[first : first + 1])[0],
        }
    made = {}
    for name, vector in held.items():
        made[name] = folder / f"{name.replace(' ', '_')}.npy"
        np.save(made[name], vector.numpy())
    return made


def evaluated(n: int, **settings: Any) -> dict[str, Any]:
    """The metrics of one evaluation, and how long it took."""
    began = time.perf_counter()
    report = advkit.evaluate(task=TASK, model=MODEL, n=n, device="cpu", beside=False, **settings)
    flags = [flag["id"] for flag in report.to_dict()["diagnostics"]["flags"] if flag["severity"] != "info"]
    return {"metrics": report.metrics, "flags": flags, "seconds": round(time.perf_counter() - began, 1)}


def counts(entry: dict[str, Any]) -> list[int]:
    return [entry["numerator"], entry["denominator"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1000, help="test images")
    parser.add_argument("--out", default="")
    given = parser.parse_args()
    torch.set_num_threads(1)
    out = Path(given.out) if given.out else None
    result: dict[str, Any] = {
        "command": f"python benchmarks/image_text.py --n {given.n}",
        "commit": commit_text("advkit"),
        "n": given.n,
        "model": zoo.card(MODEL.partition(":")[2]).sha256,
        "ranked": {},
        "near": {},
    }
    if out is not None and out.exists():
        held = json.loads(out.read_text(encoding="utf-8"))
        if (held["model"], held["n"]) == (result["model"], result["n"]):
            result = held

    def keep() -> None:
        if out is not None:
            out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    for name, settings in RANKED.items():
        if name in result["ranked"]:
            continue
        found = evaluated(given.n, **settings)
        metrics = found.pop("metrics")
        named = ["clean_accuracy", "robust_accuracy", "attack_success_rate", *RECALLS]
        result["ranked"][name] = {**settings, **{key: counts(metrics[key]) for key in named}, **found}
        print(name, json.dumps(result["ranked"][name]), flush=True)
        keep()
    with tempfile.TemporaryDirectory() as folder:
        for target, file in targets(Path(folder)).items():
            for eps in EPS:
                name = f"{target}, eps {eps}"
                if name in result["near"]:
                    continue
                goal = f"near:file={file},similarity={SIMILARITY}"
                found = evaluated(given.n, attack=PGD, goal=goal, threat_model=f"linf:eps={eps}")
                metrics = found.pop("metrics")
                named = [
                    "attack_success_rate",
                    "class_changed",
                    "recall_at_1_image_to_text",
                    "recall_at_5_image_to_text",
                ]
                means = {key: metrics[key]["value"] for key in ("similarity_before", "similarity_after")}
                result["near"][name] = {**{key: counts(metrics[key]) for key in named}, **means, **found}
                print(name, json.dumps(result["near"][name]), flush=True)
                keep()


if __name__ == "__main__":
    main()
