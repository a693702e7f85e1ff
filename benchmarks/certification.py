"""What certification costs beside bare forward passes and `torch.randn`, and what a random number costs, in one run.

    python benchmarks/certification.py [--seconds 4] [--rounds 7] [--device cpu] [--out docs/certification_speed.json]

Every figure is the median over rounds in which all rivals run by turns on one thread; on a CPU its own time counts, not
that of whatever else runs there. The bare loop draws a batch of 64
by `torch.randn`, adds it to the image and calls the network: no seeds, no votes, no bounds. Overhead is how much longer
`Smoothed.tally` takes for the same number of copies.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from advkit.core.noise import block_size, lattice_normal, normal_block
from advkit.core.provenance import commit_text
from advkit.core.rng import RowRng
from advkit.models import MODELS
from advkit.models.smoothed import Smoothed, Smoothing

NETWORKS = {"small CNN, 1x28x28": ("cnn", (1, 28, 28)), "ResNet-18, 3x32x32": ("resnet18", (3, 32, 32))}
ROW = (3, 32, 32)


def by_turns(rivals: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each; a round runs every rival once, the first of the last round last."""
    clock = time.perf_counter if torch.cuda.is_available() else time.thread_time
    for run in rivals.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    names = list(rivals)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = clock()
            rivals[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(clock() - start)
    return {name: statistics.median(each) for name, each in seconds.items()}


def numbers(rounds: int, device: str) -> dict[str, Any]:
    """Nanoseconds of one random number, for rows of 3x32x32 and 64 draws of each."""
    size = 64
    row, like = torch.zeros(ROW, device=device), torch.zeros((size, *ROW), device=device)
    philox = RowRng.from_ids(0, [str(i) for i in range(size)], device=device)
    whole = lattice_normal(0.25)
    repeats = 8
    rivals: dict[str, Callable[[], object]] = {
        "torch.randn": lambda: [torch.randn_like(like) for _ in range(repeats)],
        "core.rng (Philox per row)": lambda: [philox.normal(like) for _ in range(repeats)],
        "core.noise (block per row)": lambda: [normal_block(7, i, size, row) for i in range(repeats)],
        "core.noise, lattice": lambda: [whole.block(7, i, size, row) for i in range(repeats)],
    }
    taken = by_turns(rivals, rounds)
    each = {name: 1e9 * seconds / (repeats * like.numel()) for name, seconds in taken.items()}
    old, new = each["core.rng (Philox per row)"], each["core.noise (block per row)"]
    return {
        "nanoseconds": each,
        "new stream faster than core.rng": old / new,
        "new stream over torch.randn": new / each["torch.randn"],
    }


def bare(model: Any, row: Tensor, copies: int, size: int, sigma: float) -> Callable[[], object]:
    def loop() -> None:
        with torch.no_grad():
            for _ in range(copies // size):
                model(row + sigma * torch.randn((size, *row.shape), device=row.device))

    return loop


def networks(seconds: float, rounds: int, device: str) -> dict[str, Any]:
    """Noisy images per second of a certificate and of the bare loop, per network and noise."""
    found: dict[str, Any] = {}
    size = block_size(device)
    for name, (spec, shape) in NETWORKS.items():
        model = MODELS.build(spec)(shape, 10, RowRng.from_ids(0, ["benchmark"])).to(device)
        row = (torch.rand(shape) * 255).round().to(device) / 255
        start = time.thread_time()
        bare(model, row, 2 * size, size, 0.25)()
        copies = 2 * size * max(1, round(seconds / max(1e-6, time.thread_time() - start)))
        gaussian, lattice = (
            Smoothed(model, Smoothing(sigma=0.25, noise=noise))  # type: ignore[arg-type]
            for noise in ("gaussian", "lattice")
        )
        taken = by_turns(
            {
                "bare": bare(model, row, copies, size, 0.25),
                "gaussian": partial(gaussian.tally, row, 3, copies),
                "lattice": partial(lattice.tally, row, 3, copies),
            },
            rounds,
        )
        found[name] = {
            "copies": copies,
            "images per second": {rival: copies / each for rival, each in taken.items()},
            "overhead": {rival: taken[rival] / taken["bare"] - 1 for rival in ("gaussian", "lattice")},
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="of one loop of a network, about")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default="")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    result = {
        "command": "python benchmarks/certification.py"
        + (f" --device {given.device}" if given.device != "cpu" else ""),
        "commit": commit_text("advkit", "benchmarks"),
        "torch": torch.__version__,
        "device": given.device if given.device == "cpu" else torch.cuda.get_device_name(),
        "numbers": numbers(given.rounds, given.device),
        "networks": networks(given.seconds, given.rounds, given.device),
    }
    text = json.dumps(result, indent=2) + "\n"
    if given.out:
        Path(given.out).write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
