"""Spiking networks: the harness beside the bare network, the fused backward pass beside autograd's loop, and rules.

Ratios of medians, the sides timed in turn in one process.

python benchmarks/spiking.py [--rounds 30] [--rows 64] [--time 4] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from advkit.core.oracle import MeteredOracle
from advkit.core.protocols import Access
from advkit.core.rng import RowRng
from advkit.models import MODELS
from advkit.models.spiking import RULES
from advkit.models.spiking.model import SpikingModel, neurons
from advkit.threat_models.goals.untargeted import Untargeted


def interleaved(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of every side."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 2):
        for name, side in sides.items():
            start = time.process_time()
            side()
            if turn >= 2:
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(each) for name, each in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--time", type=int, default=4)
    parser.add_argument("--side", type=int, default=16)
    parser.add_argument("--out", type=Path)
    said = parser.parse_args()
    torch.set_num_threads(1)

    shape = (1, said.side, said.side)
    spec = f"snn:widths=16+32,time={said.time}"
    model = MODELS.build(spec)(shape, 10, RowRng.from_ids(0, ["benchmark"]))
    x = torch.rand(said.rows, *shape, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(said.rows) % 10
    goal = Untargeted(labels)
    for parameter in model.module.parameters():
        parameter.requires_grad_(False)

    def bare() -> Tensor:
        with torch.no_grad():
            answer: Tensor = model.module(x)
        return answer

    def bare_gradient(module: torch.nn.Module) -> Tensor:
        leaf = x.clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(module(leaf), labels, reduction="sum")
        return torch.autograd.grad(loss, leaf)[0]

    oracle = MeteredOracle(model, said.rows, Access.GRADIENTS)
    forward = interleaved({"bare": bare, "oracle": lambda: oracle(x)}, said.rounds)
    backward = interleaved(
        {"bare": lambda: bare_gradient(model.module), "oracle": lambda: oracle.gradient(x, goal)}, said.rounds
    )

    unrolled = model.copy()
    for each in neurons(unrolled.module):
        each.fused = False
    loops: dict[str, float] = {}
    for rule in ("atan", "pdsg"):
        pair: dict[str, SpikingModel] = {"fused": model.with_rule(rule), "loop": unrolled.with_rule(rule)}
        took = interleaved({k: (lambda m=m: bare_gradient(_Called(m))) for k, m in pair.items()}, said.rounds)
        loops[rule] = took["loop"] / took["fused"]
    rules = interleaved(
        {name: (lambda m=model.with_rule(name): bare_gradient(_Called(m))) for name in RULES.names()}, said.rounds
    )

    found = {
        "network": spec,
        "rows": said.rows,
        "shape": shape,
        "forwards_per_second": {name: said.rows / each for name, each in forward.items()},
        "forward_overhead": forward["oracle"] / forward["bare"] - 1,
        "gradient_overhead": backward["oracle"] / backward["bare"] - 1,
        "loop_over_fused": loops,
        "gradient_over_atan": {name: each / rules["atan"] for name, each in rules.items()},
    }
    text = json.dumps(found, indent=1)
    print(text)
    if said.out:
        said.out.write_text(text + "\n", encoding="utf-8")


class _Called(torch.nn.Module):
    """A model where a module is expected."""

    def __init__(self, model: SpikingModel) -> None:
        super().__init__()
        self.held = (model,)

    def forward(self, x: Tensor) -> Tensor:
        return self.held[0](x)


if __name__ == "__main__":
    main()
