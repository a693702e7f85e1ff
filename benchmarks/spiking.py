"""Spiking networks: attacks in the harness beside the bare network, the fused backward pass beside autograd's loop.

Ratios are medians of rounds in which the sides take turns in one process, in CPU seconds of one thread; bytes and rows
are counted.

python benchmarks/spiking.py [--rounds 15] [--out docs/spiking_speed.md]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advkit.attacks import ATTACKS
from advkit.attacks.events.sda import SDA
from advkit.core.oracle import MeteredOracle
from advkit.core.rng import RowRng
from advkit.core.state import frozen
from advkit.models import zoo
from advkit.models.spiking.model import SpikingModel
from advkit.models.spiking.neurons import LIF
from advkit.models.spiking.surrogates import use_surrogate
from advkit.tasks import TASKS
from advkit.threat_models.events import Flips
from advkit.threat_models.goals.untargeted import Untargeted
from advkit.threat_models.lp import Linf

FULL = 64
"""Rows in a full call of the bare network: as many as in a full call of the harness."""

Call = tuple[int, bool]  # rows, and whether with gradient
Sides = dict[str, Callable[[], object]]


def interleaved(sides: Sides, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every side, one entry per round; two rounds before them are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 2):
        for name, side in sides.items():
            start = time.process_time()
            side()
            if turn >= 2:
                seconds[name].append(time.process_time() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, base: str) -> float:
    """The median, over the rounds, of one side's seconds over another's."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


class Listening:
    """A model that notes the calls made of it."""

    def __init__(self, model: SpikingModel, calls: list[Call]) -> None:
        self.model, self.calls = model, calls
        self.space, self.classes = model.space, model.classes

    def __call__(self, x: Tensor) -> Tensor:
        self.calls.append((len(x), torch.is_grad_enabled()))
        return self.model(x)

    def with_rule(self, rule: Any) -> Listening:
        return Listening(self.model.with_rule(rule), self.calls)

    def modules(self) -> Iterator[nn.Module]:
        return iter(self.model.modules())


def bare(model: SpikingModel, x: Tensor, labels: Tensor, calls: list[Call]) -> None:
    """The network alone: so many rows forward, and forward and backward under PDSG."""
    rows = torch.arange(FULL) % len(x)
    x, labels = x[rows], labels[rows]
    for count, backward in calls:
        if not backward:
            with torch.no_grad():
                model.module(x[:count])
            continue
        leaf = x[:count].clone().requires_grad_()
        with use_surrogate("pdsg"):
            answer = model.module(leaf)
        torch.autograd.grad(nn.functional.cross_entropy(answer, labels[:count], reduction="sum"), leaf)


def full_calls(forwards: int, backwards: int) -> list[Call]:
    """That many rows without and with gradient, in calls as large as they get."""
    return [
        (min(FULL, total - start), backward)
        for total, backward in ((forwards, False), (backwards, True))
        for start in range(0, total, FULL)
    ]


def victim(name: str, rows: int) -> tuple[SpikingModel, Tensor, Tensor, tuple[str, ...]]:
    """An embedded model, rows of its task, their labels and ids."""
    model = zoo.load(name)
    if not isinstance(model, SpikingModel):
        raise TypeError(f"{name} is no spiking model")
    batch = next(iter(TASKS.build(zoo.card(name).task).batches(rows)))
    return model, batch.x, batch.labels, tuple(batch.ids)


def attack_beside_bare(name: str, attack: Any, threat: Any, rows: int, rounds: int) -> dict[str, Any]:
    """One attack on rows of a victim, beside the network alone on as many rows, and on the very calls it made."""
    model, x, labels, ids = victim(name, rows)
    goal, rng = Untargeted(labels), RowRng.from_ids(0, ids)

    def attacked(seen: Any) -> MeteredOracle:
        oracle = MeteredOracle(seen, rows)
        attack(oracle, x, goal, threat, rng)
        return oracle

    calls: list[Call] = []
    with frozen(*model.modules()):
        meter = attacked(Listening(model, calls)).meter
        forwards, backwards = int(meter.forwards.sum()), int(meter.backwards.sum())
        whole = full_calls(forwards - backwards, backwards)
        seconds = interleaved(
            {
                "attack": lambda: attacked(model),
                "calls": lambda: bare(model, x, labels, calls),
                "bare": lambda: bare(model, x, labels, whole),
            },
            rounds,
        )
    return {
        "victim": name,
        "rows": rows,
        "forwards": forwards,
        "backwards": backwards,
        "padding": sum(count for count, _ in calls) / forwards - 1,
        "per_second": forwards / statistics.median(seconds["attack"]),
        "bare_per_second": forwards / statistics.median(seconds["bare"]),
        "own": ratio(seconds, "attack", "calls") - 1,
        "whole": ratio(seconds, "attack", "bare") - 1,
    }


def kept(make: Callable[[], Tensor]) -> int:
    """Bytes of the tensors that autograd keeps for the backward pass, each storage counted once."""
    storages: dict[int, Tensor] = {}

    def noted(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(noted, lambda tensor: tensor):
        answer = make()
    total = sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
    del answer
    return total


def layer(shape: tuple[int, ...], rule: str, rounds: int) -> dict[str, float]:
    """One LIF layer forward and backward, fused and unrolled: seconds and bytes."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.3
    made = {"fused": LIF(surrogate=rule), "loop": LIF(surrogate=rule, fused=False)}

    def both(neuron: LIF) -> None:
        leaf = x.clone().requires_grad_()
        torch.autograd.grad(neuron(leaf).sum(), leaf)

    def forward() -> None:
        with torch.no_grad():
            made["fused"](x)

    sides: Sides = {name: (lambda n=neuron: both(n)) for name, neuron in made.items()}
    seconds = interleaved({**sides, "forward": forward}, rounds)
    memory = {name: kept(lambda n=neuron: n(x.clone().requires_grad_())) for name, neuron in made.items()}
    return {
        "fused_ms": 1e3 * statistics.median(seconds["fused"]),
        "loop_ms": 1e3 * statistics.median(seconds["loop"]),
        "forward_ms": 1e3 * statistics.median(seconds["forward"]),
        "time": ratio(seconds, "loop", "fused"),
        "memory": memory["loop"] / memory["fused"],
        "fused_mib": memory["fused"] / 2**20,
    }


def rules(name: str, rounds: int) -> dict[str, float]:
    """A network's gradient under several rules, over that under a Gaussian of fixed width."""
    model, x, labels, _ = victim(name, FULL)

    def gradient(seen: SpikingModel) -> None:
        leaf = x.clone().requires_grad_()
        torch.autograd.grad(nn.functional.cross_entropy(seen(leaf), labels, reduction="sum"), leaf)

    names = ("gaussian", "pdsg", "pdsg:stats=batch", "atan", "rect", "rga", "bptr", "hart", "assg")
    with frozen(*model.modules()):
        seconds = interleaved({each: (lambda m=model.with_rule(each): gradient(m)) for each in names}, rounds)
    return {each: ratio(seconds, each, "gaussian") for each in names[1:]}


def percent(value: float) -> str:
    return f"{100 * value:+.0f} %"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(each) + " |" for each in (head, ("---",) * len(head), *rows))


def report(rounds: int) -> str:
    """The page."""
    sda, pgd = SDA(), ATTACKS.build("spiking:[pgd:steps=10,step_size=0.25]")
    runs = [
        ("sda", attack_beside_bare(name, sda, Flips(), rows, rounds))
        for name, rows in (
            ("digits-dvs-snn", 1),
            ("digits-dvs-snn", 16),
            ("digits-dvs-snn", 64),
            ("fashion-mnist-dvs-snn", 16),
        )
    ]
    runs += [
        ("pgd", attack_beside_bare(name, pgd, Linf(eps=eps), rows, rounds))
        for name, eps, rows in (("digits-snn", 0.1, 64), ("fashion-mnist-snn", 8 / 255, 32))
    ]
    first = table(
        (
            "attack",
            "victim",
            "samples",
            "forward (with backward)",
            "padding",
            "forwards per second",
            "over its calls",
            "over full calls",
        ),
        [
            (
                kind,
                run["victim"],
                str(run["rows"]),
                f"{run['forwards']} ({run['backwards']})",
                percent(run["padding"]),
                f"{run['per_second']:.0f} of {run['bare_per_second']:.0f}",
                percent(run["own"]),
                percent(run["whole"]),
            )
            for kind, run in runs
        ],
    )
    shape = (10, 32, 16, 16, 16)
    layers = {rule: layer(shape, rule, rounds) for rule in ("atan", "pdsg")}
    second = table(
        (
            "rule",
            "forward alone",
            "fused",
            "loop",
            "loop / fused, time",
            "kept for the backward pass, fused",
            "loop / fused, memory",
        ),
        [
            (
                rule,
                f"{found['forward_ms']:.1f} ms",
                f"{found['fused_ms']:.1f} ms",
                f"{found['loop_ms']:.1f} ms",
                f"{found['time']:.2f}",
                f"{found['fused_mib']:.1f} MiB",
                f"{found['memory']:.2f}",
            )
            for rule, found in layers.items()
        ],
    )
    costs = rules("digits-dvs-snn", rounds)
    third = table(tuple(costs), [tuple(f"{value:.2f}" for value in costs.values())])
    return PAGE.format(
        rounds=rounds, harness=first, shape=list(shape), layer=second, rules=third, torch=torch.__version__
    )


PAGE = """# Spiking victims: what the harness costs

```console
python benchmarks/spiking.py --rounds {rounds} --out docs/spiking_speed.md
```

One CPU thread, torch {torch}. Times are CPU seconds; ratios are medians of {rounds} rounds in which the sides take
turns in one process. Samples, calls and bytes are counted. Milliseconds and samples per second depend on the machine
and its load; on a busy one, ratios near 1 differ by up to ten points from run to run.

## Attacks against the bare network

`sda` with its defaults, `pgd` with ten steps under PDSG. Candidates of all samples share batches. *Padding*: samples
added to those that the attack queries; calls have fixed shapes, so that a sample's bits never depend on its batch.
*Over its calls*: the attack over the bare network on the same calls. This is what the attack and the harness add; the
goal is at most 15 %. *Over full calls*: over the bare network on as many samples, forward and backward, in full calls
of 64. This includes what padding and small calls cost, and is large where few samples are attacked at a time.

{harness}

## One layer, forward and backward

LIF on {shape} (time, samples, channels, height, width): one fused backward pass against autograd's graph of
the loop over time.

{layer}

## Cost of a surrogate

Gradient of `digits-dvs-snn` on 64 samples, over that under a Gaussian of fixed width. A forward pass without gradient
computes no statistics, whatever the surrogate.

{rules}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="where the page is written to; printed without")
    said = parser.parse_args()
    torch.set_num_threads(1)
    page = report(said.rounds)
    if said.out:
        said.out.write_text(page, encoding="utf-8")
    else:
        print(page)


if __name__ == "__main__":
    main()
