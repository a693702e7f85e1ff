"""Error of a reconstruction network behind fronts trained with and without its gradients, under L2 attack.

    python benchmarks/zo_reconstruction.py --root FOLDER [--sigma 0.25] [--seeds 0 1 2] [--n 250]
        [--out docs/zo_reconstruction.json]

The second task of ZO-AE-DS (arXiv 2203.14195) on Fashion-MNIST in place of MNIST. FOLDER holds the published training
files. The victim measures an image by a fixed random linear map to 196 numbers and recovers it by an MLP
196-256-256-784, trained on the first 8,000 training images, then queried alone; fronts are trained on the next 3,000 (8
epochs, batches of 64, Adam 1e-3) under noise of sigma 0.25, by the mean squared error to the clean image. Then 40 steps
of PGD change the first test images within L2 balls of radius 2 and 4, by an attacker who differentiates the whole chain
and by one who knows the victim alone. Every (sigma, seed, row) is written as soon as it is there; a second call makes
those that lack.
"""

from __future__ import annotations

import argparse
import itertools
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
from advkit.training.loop import Recipe, fit

SIGMAS = (0.25,)
VICTIM, FRONT = 8_000, 3_000
MODEL = "reconstructor:measurements=196,hidden=256+256"
VICTIM_RECIPE = Recipe(epochs=30, batch_size=128, lr=1e-3)
RECIPE = "targets=labels,recipe=[epochs=8,batch_size=64,lr=1e-3,validation=0]"
ROWS: dict[str, str] = {
    "standard": "none",
    "FO-DS": f"fo_ds:{RECIPE}",
    "ZO-DS, RGE q=64": f"zo_ds:q=64,{RECIPE}",
    "FO-AE-DS": f"fo_ae_ds:{RECIPE}",
    "ZO-AE-DS, CGE d_z=32": f"zo_ae_ds:{RECIPE}",
}
ATTACK, GOAL, RADII = "pgd:steps=40", "reconstruction:rmse=0.25", (2, 4)


def part(data: Data, start: int, stop: int) -> Data:
    """Some of the training images."""
    return Data(
        data.x[start:stop], data.y[start:stop], data.space, data.classes, data.name, answer_shape=data.answer_shape
    )


def victim(data: Data, seed: int) -> Any:
    """The black box."""
    rng = RowRng.from_ids(seed, ["victim"])
    blank = MODELS.build(MODEL)(tuple(data.x.shape[1:]), data.classes, rng, space=data.space)
    defense = NoDefense(recipe=VICTIM_RECIPE)
    return fit(blank, data, defense.objective(), defense.recipe, rng, progress=False).model


def trained(box: Any, data: Data, spec: str, sigma: float, seed: int) -> tuple[Any, dict[str, Any]]:
    """The victim behind a front, as it is deployed, and what training took."""
    defense: Any = DEFENSES.build(spec.replace(":", f":sigma={sigma},", 1))
    began = time.perf_counter()
    rng = RowRng.from_ids(seed, ["front"])
    chain = defense.around(box, data, rng.at("front"))
    found: dict[str, Any] = {"defense": DEFENSES.label(defense)}
    if isinstance(defense, AutoEncoded):
        with torch.no_grad():
            again = chain.front.decode(chain.front.encode(data.x))
        found["autoencoder_mse"] = float((again - data.x).square().mean())
    done = fit(chain, data, defense.objective(), defense.recipe, rng, progress=False)
    found["queries"] = int(done.log[-1].figures[QUERIES])
    found["loss"] = [round(entry.loss, 5) for entry in done.log]
    found["training_seconds"] = round(time.perf_counter() - began, 1)
    return defense.deploy(done.model), found


def measured(model: Any, n: int, seed: int) -> dict[str, Any]:
    """Errors at every radius by both attackers, with the harness's intervals."""
    found: dict[str, Any] = {"rmse": {}, "over_threshold": {}, "oblivious_rmse": {}, "flags": {}}
    for eps in RADII:
        report = advkit.evaluate(
            attack=ATTACK,
            model=model,
            task=TASKS.build("fashion-mnist-reconstruction"),
            threat_model=f"l2:eps={eps}",
            goal=GOAL,
            n=n,
            seed=seed,
            device="cpu",
        )
        metrics = report.metrics
        told = {"0": metrics["clean_rmse"], str(eps): metrics["rmse"]}
        for radius, entry in told.items():
            found["rmse"][radius] = {"value": entry["value"], "ci": [entry["ci"]["low"], entry["ci"]["high"]]}
        found["over_threshold"][str(eps)] = metrics["over_threshold"]["value"]
        if "oblivious_rmse" in metrics:
            found["oblivious_rmse"][str(eps)] = metrics["oblivious_rmse"]["value"]
        found["flags"][str(eps)] = [flag["id"] for flag in report.to_dict()["diagnostics"]["flags"]]
    return found


def means(runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean errors over the seeds of one sigma, by row and radius."""
    return {
        name: {
            radius: statistics.mean(rows[name]["rmse"][radius]["value"] for rows in runs.values() if name in rows)
            for radius in ("0", *map(str, RADII))
        }
        for name in ROWS
        if any(name in rows for rows in runs.values())
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True)
    parser.add_argument("--sigma", type=float, nargs="+", default=SIGMAS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--n", type=int, default=250, help="test images")
    parser.add_argument("--out", default="")
    given = parser.parse_args()
    torch.set_num_threads(1)
    out = Path(given.out) if given.out else None
    if out is not None and out.exists():
        result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    else:
        settings = {"model": MODEL, "attack": ATTACK, "goal": GOAL, "n": given.n}
        sizes = {"victim_images": VICTIM, "images": FRONT}
        command = "python benchmarks/zo_reconstruction.py"
        result = {"command": command, "commit": commit_text("advkit"), **settings, **sizes, "runs": {}, "means": {}}
    whole = TASKS.build(f"fashion-mnist-reconstruction:root={given.root},train={VICTIM + FRONT}").training()
    assert isinstance(whole, Data)
    first, second = part(whole, 0, VICTIM), part(whole, VICTIM, VICTIM + FRONT)
    for sigma, seed in itertools.product(given.sigma, given.seeds):
        of_sigma = result["runs"].setdefault(f"{sigma:g}", {})
        rows = of_sigma.setdefault(str(seed), {})
        if set(given.rows) <= set(rows):
            continue
        box = victim(first, seed)
        for name in given.rows:
            if name in rows:
                continue
            model, told = (box, {}) if name == "standard" else trained(box, second, ROWS[name], sigma, seed)
            began = time.perf_counter()
            rows[name] = {**told, **measured(model, given.n, seed)}
            rows[name]["evaluation_seconds"] = round(time.perf_counter() - began, 1)
            result["means"][f"{sigma:g}"] = means(of_sigma)
            print(sigma, seed, name, json.dumps(rows[name]), flush=True)
            if out is not None:
                out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
