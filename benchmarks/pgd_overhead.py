"""PGD-40 through the harness against the bare forward and backward passes that it consists of.

    python benchmarks/pgd_overhead.py [--repetitions 5] [--n 1000] [--batch-size 256]

Both run in one process, interleaved; the figure is the ratio of medians of CPU time. The bare loop makes the same
number of passes at the same shapes, on the same model and images, and does nothing else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from advkit.core.oracle import Lanes, frozen
from advkit.evaluation.api import resolve
from advkit.evaluation.harness import open_store, run

STEPS = 40


def bare(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, chunk: int, extra_forwards: int) -> None:
    """STEPS forwards and backwards of every row, and the forwards that the harness adds to judge."""
    with frozen(model):
        for start in range(0, len(x), chunk):
            rows, labels = x[start : start + chunk], y[start : start + chunk]
            for _ in range(STEPS):
                leaf = rows.clone().requires_grad_()
                torch.autograd.grad(cross_entropy(model(leaf), labels, reduction="sum"), leaf)
            with torch.inference_mode():
                for _ in range(extra_forwards):
                    model(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--defense", default="pgd_at")
    given = parser.parse_args()
    torch.set_num_threads(1)
    attack = f"pgd:steps={STEPS},stop=false"
    case = resolve(attack, given.defense, n=given.n, batch_size=given.batch_size, device="cpu")
    rows = next(iter(case.task.batches(given.n, n=given.n)))
    module = case.victim.modules()[0]
    ours, theirs, counts = [], [], {}
    for _ in range(given.repetitions):
        with tempfile.TemporaryDirectory() as folder:
            store = open_store(case, Path(folder))
            begin = time.process_time()
            records = run(case, store)
            ours.append(time.process_time() - begin)
            store.close()
        attacked = [r for r in records if r.forwards]
        counts = {
            "rows attacked": len(attacked),
            "forwards per row": sorted({r.forwards for r in attacked}),
            "backwards per row": sorted({r.backwards for r in attacked}),
        }
        keep = torch.tensor([bool(r.forwards) for r in records])
        begin = time.process_time()
        bare(module, rows.x[keep], rows.labels[keep], Lanes().chunk, extra_forwards=1)
        theirs.append(time.process_time() - begin)
    ratio = statistics.median(ours) / statistics.median(theirs)
    print(json.dumps({"ratio of medians": round(ratio, 3), **counts, "repetitions": given.repetitions}))


if __name__ == "__main__":
    main()
