"""The EigenShield-style filter: on an image-text model, on a classifier and on a planted model.

    python benchmarks/eigenshield.py --root FOLDER [--rows NAME ...] [--out docs/eigenshield.json]

FOLDER holds the published training files, to which filters are fitted: 4,000 samples for the covariance, 400 pairs
under PGD with 10 steps, 1,000 to judge q=auto on. Accuracies are those of the harness: 1,000 embedded test images under
PGD with 10 steps, the first 300 of them under AutoAttack. Every row is written as soon as it is there; a second call
makes those that lack.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import advkit
from advkit.core.errors import UnknownName
from advkit.core.provenance import commit_text
from advkit.core.rng import RowRng
from advkit.defenses import DEFENSES
from advkit.defenses.representations.eigenshield import EigenShield
from advkit.evaluation.victims import protected
from advkit.models.projected import Projected
from advkit.models.spectral import SpectralFilter, spectrum
from advkit.tasks import TASKS
from advkit.testing.planted import Planted

EPS = 0.05
PGD, SUITE = "pgd:steps=10", "autoattack"
CALIBRATION = f"threat_model=[linf:eps={EPS}]"
DUAL: dict[str, str] = {
    "none": "",
    "q=1": "q=1",
    "q=0.75": "q=0.75",
    "q=0.5": "q=0.5",
    "q=0.25": "q=0.25",
    "auto": "",
    "q=1, bare edge": "q=1,edge=mp",
    "q=0.5, noise": "q=0.5,calibration_attack=noise",
    "q=0.5, corr": "q=0.5,rbns=corr",
    "top 9": "q=1,edge=topk,top=9",
    "top 5": "q=1,edge=topk,top=5",
}
SEEDS = range(50)
SAMPLES = (2_000, 20_000)
"""Seeds of the planted model, and its calibration samples."""


def percent(report: Any, metric: str) -> float:
    """A share of the report, as the harness counted it."""
    return round(float(report.to_dict()["metrics"][metric]["value"]), 4)


def dual(name: str, root: str) -> dict[str, Any]:
    """A filter in the image encoder of the embedded dual encoder."""
    task = TASKS.build(f"fashion-mnist-captions:root={root}")
    settings = ",".join(each for each in (DUAL[name], CALIBRATION) if each)
    spec = "none" if name == "none" else f"eigenshield:{settings}"
    model = protected(None, spec, task).model
    found: dict[str, Any] = {"defense": spec}
    if isinstance(model, Projected):
        fitted = model.fitted
        found |= {
            "eigenvalues": len(fitted.spectrum.values),
            "spikes": fitted.spectrum.spikes,
            "kept": 0 if fitted.identity else int(fitted.kept.sum()),
            "q": fitted.q,
            "drops": {f"{q:g}": round(drop, 4) for q, drop in fitted.drops.items()},
            "largest_score_at": int(np.argmax(fitted.scores)),
        }
        found["auroc"] = round(auroc(model, spec, task), 4)
    parts = {"model": model, "task": "fashion-mnist-captions", "threat_model": f"linf:eps={EPS}", "device": "cpu"}
    report = advkit.evaluate(PGD, n=1000, **parts)
    found |= {"clean": percent(report, "clean_accuracy"), "adaptive": percent(report, "robust_accuracy")}
    both = name == "none"
    found["oblivious"] = found["adaptive"] if both else percent(report, "oblivious_robust_accuracy")
    strongest = advkit.evaluate(SUITE, n=300, beside=False, **parts)
    found["suite"] = percent(strongest, "robust_accuracy")
    found["suite_clean"] = percent(strongest, "clean_accuracy")
    return found


def suite(root: str) -> dict[str, Any]:
    """AutoAttack on all embedded test images, for two rows whose figures on 300 of them differ little."""
    task = TASKS.build(f"fashion-mnist-captions:root={root}")
    found = {}
    for name in ("none", "q=0.75"):
        spec = "none" if name == "none" else f"eigenshield:{DUAL[name]},{CALIBRATION}"
        model = protected(None, spec, task).model
        threat = f"linf:eps={EPS}"
        report = advkit.evaluate(
            SUITE, model=model, task="fashion-mnist-captions", threat_model=threat, n=1000, beside=False, device="cpu"
        )
        reach = report.to_dict()["metrics"]["robust_accuracy"]["ci"]
        interval = [round(reach[side], 4) for side in ("low", "high")]
        found[name] = {"robust": percent(report, "robust_accuracy"), "interval": interval}
    return found


def auroc(model: Projected, spec: str, task: Any) -> float:
    """Of the residual, on 300 test images and the same under the calibration attack's kind on the model without it."""
    guard = DEFENSES.build(spec)
    assert isinstance(guard, EigenShield)
    batch = next(iter(task.batches(300)))
    attack = EigenShield(threat_model=guard.threat_model)
    moved = attack.attacked(model.undefended, batch.x, batch.labels, RowRng.from_ids(1, ["detector"]))
    return model.fitted.auroc(model.embeddings(batch.x), model.embeddings(moved))


def classifier() -> dict[str, Any]:
    """The embedded CNN with the embedded filter at the input of its last layer."""
    report = advkit.evaluate("pgd:steps=40,step_size=0.1", "eigenshield", "fashion-mnist", device="cpu")
    plain = advkit.evaluate("pgd:steps=40,step_size=0.1", "none", "fashion-mnist", device="cpu")
    model = protected(None, "eigenshield", TASKS.build("fashion-mnist")).model
    return {
        "clean": percent(report, "clean_accuracy"),
        "oblivious": percent(report, "oblivious_robust_accuracy"),
        "adaptive": percent(report, "robust_accuracy"),
        "clean_without": percent(plain, "clean_accuracy"),
        "robust_without": percent(plain, "robust_accuracy"),
        "eigenvalues": len(model.fitted.spectrum.values),
        "spikes": model.fitted.spectrum.spikes,
        "kept": int(model.fitted.kept.sum()),
        "q": model.fitted.q,
    }


def planted() -> dict[str, Any]:
    """Accuracies on the planted model, by the number of calibration samples."""
    return {str(samples): planted_with(samples) for samples in SAMPLES}


def planted_with(samples: int) -> dict[str, Any]:
    """Over seeds: mean, least and most."""
    settings: dict[str, SpectralFilter | None] = {
        "no filter": None,
        "q=1": SpectralFilter(q=1.0),
        "q=0.75": SpectralFilter(q=0.75),
        "q=0.5": SpectralFilter(q=0.5),
        "auto": SpectralFilter(),
    }
    found: dict[str, dict[str, list[float]]] = {name: {} for name in settings}
    for seed in SEEDS:
        world = Planted.of(seed)
        (z, y), (held, theirs), (clean, labels) = (world.draw(n, k) for k, n in enumerate((samples, 1000, 2000)))
        moved = world.attacked(z[:400], y[:400], 3)
        hit = world.attacked(clean, labels, 4)
        for name, setting in settings.items():
            apply: Callable[[Any], Any] = lambda rows: rows  # noqa: E731
            through = world.head
            if setting is not None:

                def accuracy(projection: Any, rows: Any = held, its: Any = theirs, model: Planted = world) -> float:
                    return model.accuracy(rows if projection is None else projection(rows), its)

                fitted = setting.fit(z, (z[:400], moved), accuracy)
                apply = fitted.projection
                basis = fitted.projection.basis
                through = basis @ (basis.T @ world.head)
                found[name].setdefault("spikes", []).append(fitted.spectrum.spikes)
                found[name].setdefault("q", []).append(fitted.q)
            # without a bound on its length the attack along the filtered head's own gradient always wins
            adaptive = clean - 14 * labels[:, None] * through / through.norm()
            for what, rows in (("clean", clean), ("attacked", hit), ("adaptive", adaptive)):
                found[name].setdefault(what, []).append(world.accuracy(apply(rows), labels))
    return {
        name: {
            what: {"mean": round(float(np.mean(each)), 4), "least": round(min(each), 4), "most": round(max(each), 4)}
            for what, each in values.items()
        }
        for name, values in found.items()
    }


def noise(draws: int = 2000) -> dict[str, Any]:
    """How often pure noise (200 samples of 40 dimensions) has a spike."""
    settings: dict[str, dict[str, Any]] = {
        "tw, median": {},
        "tw, iterative": {"sigma": "iterative"},
        "mp, median": {"edge": "mp"},
        "mp, iterative": {"edge": "mp", "sigma": "iterative"},
    }
    counts = dict.fromkeys(settings, 0)
    for seed in range(draws):
        rows = np.random.default_rng(seed).normal(size=(200, 40))
        for name, setting in settings.items():
            counts[name] += spectrum(rows, **setting).spikes > 0
    return {"draws": draws, **{name: count / draws for name, count in counts.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True)
    parser.add_argument("--rows", nargs="+", default=[*DUAL, "classifier", "suite_1000", "planted", "noise"])
    parser.add_argument("--out", default="")
    given = parser.parse_args()
    torch.set_num_threads(1)
    out = Path(given.out) if given.out else None
    if out is not None and out.exists():
        result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    else:
        settings = {"eps": EPS, "attack": PGD, "suite": SUITE, "n": 1000, "n_of_the_suite": 300, "seeds": len(SEEDS)}
        result = {
            "command": "python benchmarks/eigenshield.py --root FOLDER",
            "commit": commit_text("advkit"),
            **settings,
            "dual": {},
        }
    others: dict[str, Callable[[], dict[str, Any]]] = {
        "classifier": classifier,
        "suite_1000": lambda: suite(given.root),
        "planted": planted,
        "noise": noise,
    }
    for name in given.rows:
        place = result if name in others else result["dual"]
        if name in place:
            continue
        if name not in others and name not in DUAL:
            raise UnknownName(f"no row {name!r}; known: {', '.join([*DUAL, *others])}")
        began = time.perf_counter()
        place[name] = others[name]() if name in others else dual(name, given.root)
        print(name, json.dumps(place[name]), f"{time.perf_counter() - began:.0f} s", flush=True)
        if out is not None:
            out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    warnings.simplefilter("default")
    main()
