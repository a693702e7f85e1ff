"""Certified accuracy of a black box behind fronts that are trained with and without its gradients, on Fashion-MNIST.

    python benchmarks/zo_ae_ds.py --root FOLDER [--seeds 0 1 2] [--n 1000] [--out docs/zo_ae_ds.json]

FOLDER holds the published training files. The victim is an MLP 784-128-128-10, trained on the first 8,000 training
images, then queried alone; fronts are trained on the next 3,000 (8 epochs, batches of 64, Adam 1e-3) at sigma 0.5, and
certified on the first test images with n0=50, n=500 and alpha=0.001. Every (seed, row) is written as soon as it is
there; a second call makes those that lack.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import advkit
from advkit.core.protocols import Data
from advkit.core.provenance import commit_text
from advkit.core.rng import RowRng
from advkit.defenses import DEFENSES
from advkit.defenses.none import NoDefense
from advkit.defenses.smoothing.fronts import QUERIES, AutoEncoded
from advkit.models import MODELS
from advkit.tasks import TASKS
from advkit.training.loop import Recipe, correct, fit

SIGMA = 0.5
VICTIM, FRONT = 8_000, 3_000
RECIPE = "recipe=[epochs=8,batch_size=64,lr=1e-3,validation=0]"
ROWS: dict[str, str] = {
    "no denoiser": "smoothing",
    "FO-DS": f"fo_ds:{RECIPE}",
    "ZO-DS, RGE q=64": f"zo_ds:q=64,{RECIPE}",
    "FO-AE-DS": f"fo_ae_ds:{RECIPE}",
    "ZO-AE-DS, CGE d_z=32": f"zo_ae_ds:{RECIPE}",
    "ZO-AE-DS, RGE q=20": f"zo_ae_ds:estimator=rge,{RECIPE}",
}
THREAT = "certified:n0=50,n=500,alpha=0.001,radii=0+0.25+0.5+0.75+1"
RADII = ("0", "0.25", "0.5", "0.75", "1")
AE, NONE, ZO, FO_AE = "ZO-AE-DS, CGE d_z=32", "no denoiser", "ZO-DS, RGE q=64", "FO-AE-DS"


def victim(data: Data, seed: int) -> Any:
    """The black box."""
    blank = MODELS.build("mlp:hidden=128+128")(
        tuple(data.x.shape[1:]), 10, RowRng.from_ids(seed, ["victim"]), space=data.space
    )
    recipe = Recipe(epochs=10, batch_size=128, lr=1e-3)
    defense = NoDefense(recipe=recipe)
    return fit(blank, data, defense.objective(), recipe, RowRng.from_ids(seed, ["victim"]), progress=False).model


def measured(box: Any, data: Data, spec: str, seed: int, n: int, test: tuple[Any, Any]) -> dict[str, Any]:
    """Train a front, certify the chain."""
    defense: Any = DEFENSES.build(spec.replace(":", f":sigma={SIGMA},", 1) if ":" in spec else f"{spec}:sigma={SIGMA}")
    began = time.perf_counter()
    found: dict[str, Any] = {"defense": DEFENSES.label(defense)}
    chain = box
    if spec != "smoothing":
        rng = RowRng.from_ids(seed, ["front"])
        chain = defense.around(box, data, rng.at("front"))
        if isinstance(defense, AutoEncoded):
            with torch.no_grad():
                again = chain.front.decode(chain.front.encode(data.x))
            found["autoencoder_mse"] = float((again - data.x).square().mean())
        done = fit(chain, data, defense.objective(), defense.recipe, rng, progress=False)
        chain = done.model
        found["queries"] = int(done.log[-1].figures[QUERIES])
        found["loss"] = [round(entry.loss, 4) for entry in done.log]
        chain.queries.limit = None
    found["training_seconds"] = round(time.perf_counter() - began, 1)
    found["clean_accuracy_of_the_chain"] = float(correct(chain, *test).mean())
    began = time.perf_counter()
    smoothed = defense.deploy(chain) if spec != "smoothing" else defense.deploy(box)
    report = advkit.certify(
        defense="none",
        model=smoothed,
        task=TASKS.build("fashion-mnist"),
        threat_model=THREAT,
        n=n,
        seed=seed,
        device="cpu",
    )
    metrics = report.metrics
    points = metrics["certified_accuracy"]
    found["certified"] = {f"{point['radius']:g}": point["certified_accuracy"]["value"] for point in points}
    found["average_certified_radius"] = metrics["average_certified_radius"]["value"]
    found["abstention_rate"] = metrics["abstention_rate"]["value"]
    found["largest_certifiable_radius"] = metrics["largest_certifiable_radius"]["value"]
    found["certification_seconds"] = round(time.perf_counter() - began, 1)
    return found


def acceptance(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds that have all rows, and whether they are what was expected."""
    whole = [rows for rows in runs.values() if {AE, NONE, ZO, FO_AE} <= set(rows)]
    if not whole:
        return {}

    def at(name: str) -> float:
        return statistics.mean(100 * rows[name]["certified"]["0.75"] for rows in whole)

    clean = statistics.mean(100 * rows[AE]["clean_accuracy_of_the_chain"] for rows in whole)
    found = {
        "minus ZO-DS, points at r=0.75": (at(AE) - at(ZO), ">= 5"),
        "minus no denoiser, points at r=0.75": (at(AE) - at(NONE), ">= 15"),
        "minus FO-AE-DS, points at r=0.75": (at(AE) - at(FO_AE), ">= -4"),
        "clean accuracy of the chain, %": (clean, ">= 78"),
    }
    return {
        name: {"value": round(value, 2), "expected": line, "holds": value >= float(line.removeprefix(">= "))}
        for name, (value, line) in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--n", type=int, default=1000, help="test images")
    parser.add_argument("--out", default="")
    given = parser.parse_args()
    torch.set_num_threads(1)
    out = Path(given.out) if given.out else None
    if out is not None and out.exists():
        result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    else:
        settings = {"sigma": SIGMA, "threat_model": THREAT, "n": given.n, "victim_images": VICTIM, "images": FRONT}
        result = {"command": "python benchmarks/zo_ae_ds.py", "commit": commit_text("advkit"), **settings, "runs": {}}
    whole = TASKS.build(f"fashion-mnist:root={given.root},train={VICTIM + FRONT}").training()
    assert isinstance(whole, Data)
    first = Data(whole.x[:VICTIM], whole.y[:VICTIM], whole.space, whole.classes, whole.name)
    second = Data(whole.x[VICTIM:], whole.y[VICTIM:], whole.space, whole.classes, whole.name)
    batch = next(iter(TASKS.build("fashion-mnist").batches(1000)))
    test = (batch.x, batch.labels)
    for seed in given.seeds:
        rows = result["runs"].setdefault(str(seed), {})
        if set(given.rows) <= set(rows):
            continue
        box = victim(first, seed)
        rows["victim"] = {"clean_accuracy": float(correct(box, *test).mean())}
        for name in given.rows:
            if name in rows:
                continue
            rows[name] = measured(box, second, ROWS[name], seed, given.n, test)
            result["acceptance"] = acceptance(result["runs"])
            print(seed, name, json.dumps(rows[name]), flush=True)
            if out is not None:
                out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for line, value in result.get("acceptance", {}).items():
        print(line, value)


if __name__ == "__main__":
    main()
