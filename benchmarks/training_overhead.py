"""A training of ours beside the bare passes that the method needs and beside ART's trainers, in one process.

python benchmarks/training_overhead.py [--root FOLDER] [--rows 1024] [--repetitions 5] [--out FILE]

Sides, each a training on the same rows, network, batch size, optimiser and attack (Linf eps 0.1):

    bare         the forward and backward passes of the method and the optimiser's steps, nothing else, on the inputs
                 that the network had in `fit`: no random start, no step, no shuffling. Parameters are frozen while the
                 input is differentiated
    fit          `advkit.training.loop.fit` as a user calls it, its preparations included
    madry        ART's AdversarialTrainerMadryPGD with as many steps; its attack takes a batch in pieces of 32
    madry_whole  the same, with an attack that takes the batch as one, for which the trainer has no argument
    fbf          ART's AdversarialTrainerFBFPyTorch: FGSM with a random start

ART has no AAER. Beside `aaer` stand its trainers that train on the same one step from a random start: `madry` with one
step, and `fbf`. CPU seconds on one thread. `fit` and `bare` alternate step by step, ART's trainings come after each
`fit`; a ratio is the median over the repetitions. Passes are counted on the network, with the same hooks on every side.
Without ART its sides are left out; without a folder the rows are random.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import statistics
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from advkit.benchmark import Passes, counted, environment
from advkit.benchmark.sides import one_thread
from advkit.benchmark.training import BATCH, EPS, RECIPE, art, network, ours, random_rows, recorded
from advkit.core.files import write_whole
from advkit.core.protocols import Data
from advkit.core.provenance import commit_text
from advkit.tasks import TASKS

STEPS = 5
EPOCHS = {"cnn": 5, "resnet8": 2}
"""Of each side's training, by network."""
METHODS = {"pgd_at": f"pgd_at:eps={EPS},steps={STEPS}", "aaer": f"aaer:eps={EPS}"}


def rows_of(root: str, rows: int) -> Data:
    """Fashion-MNIST averaged to 14x14, or random rows of that shape."""
    if root:
        data: Data = TASKS.build(f"fashion-mnist:size=14,train={rows},root={root}").training()
        return data
    return random_rows(rows)


def passes(count: Passes, rows: int) -> dict[str, float]:
    """Passes per row and step."""
    return {"forwards": count.forwards / rows, "backwards": count.backwards / rows}


def measured(method: str, net: str, data: Data, repetitions: int, with_art: bool) -> dict[str, Any]:
    """Passes per row and step, and ratios of CPU time, for one method on one network."""
    model, spec = network(net), METHODS[method]
    recipe = replace(RECIPE, epochs=EPOCHS[net])
    trainers = ("madry", "madry_whole") if method == "pgd_at" else ("madry", "madry_whole", "fbf")
    steps = STEPS if method == "pgd_at" else 1
    sides = {name: partial(art, name, steps, recipe.epochs, model, data) for name in trainers if with_art}
    inputs, rows = recorded(spec, recipe, model, data), len(data) * recipe.epochs
    counts, module = {}, model.copy().module
    with counted(model.module) as count, counted(module) as plain:  # which warms up, too
        ours(spec, recipe, model, data, module, inputs)
    counts["bare"], counts["fit"] = passes(plain, rows), passes(count, rows)
    for name, side in sides.items():
        with counted(model.module) as count:
            side()
        counts[name] = passes(count, rows)
    ratios: dict[str, list[float]] = {"fit_over_bare": [], **{f"{name}_over_fit": [] for name in sides}}
    for _ in range(repetitions):
        own, alone = ours(spec, recipe, model, data, model.copy().module, inputs)
        ratios["fit_over_bare"].append(own / alone)
        for name, side in sides.items():
            begin = time.process_time()
            side()
            ratios[f"{name}_over_fit"].append((time.process_time() - begin) / own)
    return {
        "method": METHODS[method],
        "network": net,
        "optimiser_steps": len(inputs),
        "passes_per_row": counts,
        "ratios": {name: round(statistics.median(values), 3) for name, values in ratios.items()},
        "quartiles": {
            name: [round(cut, 3) for cut in statistics.quantiles(values, n=4)[::2]] for name, values in ratios.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="", help="folder of Fashion-MNIST's idx files")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--networks", default=",".join(EPOCHS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    logging.getLogger("advkit").setLevel(logging.ERROR)
    with_art = importlib.util.find_spec("art") is not None
    if not with_art:
        print("adversarial-robustness-toolbox is not installed: its sides are left out")
    data = rows_of(given.root, given.rows)
    versions = environment()
    if with_art:
        versions["adversarial-robustness-toolbox"] = importlib.metadata.version("adversarial-robustness-toolbox")
    made: dict[str, Any] = {
        "commit": commit_text("advkit", "benchmarks"),
        "environment": versions,
        "data": "random rows" if not given.root else "fashion-mnist:size=14",
        "rows": len(data),
        "batch_size": BATCH,
        "repetitions": given.repetitions,
        "results": [],
    }
    with one_thread():
        for net in given.networks.split(","):
            for method in given.methods.split(","):
                found = measured(method, net, data, given.repetitions, with_art)
                made["results"].append(found)
                print(json.dumps(found), flush=True)
    if given.out:
        write_whole(given.out, json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
