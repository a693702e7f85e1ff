"""Spiking victims: PGD under every backward rule, SDA and its parts, rescaled networks. Every cell is an evaluation.

    python benchmarks/spiking_tables.py [static] [scale] [events] [singles] [--out spiking_tables]

static:  success rate of PGD-10 (step eps / 4, random start) under each rule, under the worst case over rules, and of
         random signs, on victims trained with a wide and with a narrow surrogate
scale:   the same function with weights, biases and threshold times 16: which rules notice
events:  SDA, SDA under other rules, without its parts and with its extensions, and two baselines: flips and forwards
singles: tiny random nets: on which rows one flip suffices, by enumeration, and which variants find it

Writes OUT.json, OUT.md and the folder OUT-runs; an evaluation that has its folder there is not run again. All victims
are embedded: nothing is trained or fetched. Flips are means and medians over successes, forwards over attacked rows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import advkit
from advkit.core.oracle import MeteredOracle
from advkit.core.protocols import Access, Outcome
from advkit.core.rng import RowRng
from advkit.evaluation.run.store import read_examples, read_records
from advkit.models import MODELS, zoo
from advkit.models.spiking.neurons import Neuron
from advkit.models.torch import TorchModel

PGD = "[pgd:steps=10,step_size=0.25]"
RULES = {
    "PDSG": "pdsg",
    "ATan 2": "atan",
    "Rect 1": "rect",
    "Triangle 1": "triangle",
    "RGA": "rga",
    "BPTR": "bptr",
    "HART 1": "hart",
    "ASSG": "assg",
    "ATan 50": "[atan:alpha=50]",
    "Sigmoid 25": "[sigmoid:alpha=25]",
    "the one trained with": "own",
    "worst case over rules": "ensemble",
}
STATIC = (("digits", "linf:eps=0.1", 300), ("fashion-mnist", "linf:eps=8/255", 200))
TRAINED = {"wide": "snn", "narrow": "snn-narrow"}
SCALED = {"PDSG": "pdsg", "ATan 2": "atan", "Sigmoid 4": "sigmoid", "Rect 1": "rect", "RGA": "rga", "HART 1": "hart"}
FACTOR = 16.0
EVENTS = {
    "SDA": "sda",
    "SDA under ATan 2": "sda:surrogate=atan",
    "SDA under ATan 50": "sda:surrogate=[atan:alpha=50]",
    "SDA under Rect 0.1": "sda:surrogate=[rect:width=0.1]",
    "without reduction": "sda:reduce=false",
    "without filter": "sda:filter=false",
    "early": "sda:early=true",
    "prefix": "sda:prefix=true",
    "prune": "sda:prune=true",
    "early, prefix, prune": "sda:early=true,prefix=true,prune=true",
    "topk_grad": "topk_grad",
    "random_flips": "random_flips",
}
FILMED = ("digits-dvs", "fashion-mnist-dvs")
TINY = "snn:widths=16,down=stride,hidden=0,threshold=0.5"
TINY_SHAPE = (2, 2, 3, 3)
TINY_NETS, TINY_ROWS = 10, 16


@dataclass(frozen=True, kw_only=True)
class RandomSigns:
    """Every pixel moves by eps, up or down at random: what any attack has to beat."""

    needs: ClassVar[Access] = Access.NOTHING

    def __call__(self, oracle: Any, x: Tensor, goal: Any, ball: Any, rng: Any, /) -> Tensor:
        sign = torch.where(rng.at("sign").uniform(x) < 0.5, -1.0, 1.0).to(x.dtype)
        moved: Tensor = ball.project(x + ball.eps * sign, x)
        return moved


@dataclass(frozen=True)
class Cell:
    """One evaluation: rows attacked and broken, flips of the successes, passes per attacked row.

    asr: share broken, and its 95 % interval; within: share broken by threshold of the flips
    """

    task: str
    victim: str
    attack: str
    attacked: int
    broken: int
    asr: float
    interval: tuple[float, float]
    flips: dict[str, float]
    within: dict[str, float]
    forwards: float
    backwards: float
    folder: str

    def figures(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "folder"}


def evaluated(
    given: argparse.Namespace,
    attack: Any,
    task: str,
    model: TorchModel,
    threat: str,
    n: int,
    *,
    keep: int = 0,
    data: tuple[Tensor, Tensor] | None = None,
) -> Cell:
    """One cell; read from its folder where it was run before. data: rows and labels of a task without a name."""
    asked = {"task": task, "threat_model": threat, "n": n, "seed": given.seed, "keep": keep}
    word = json.dumps([str(attack), model.describe().state_sha256, model.architecture, asked], sort_keys=True)
    name = str(attack).partition(":")[0].partition("(")[0]
    folder = Path(f"{given.out}-runs") / f"{task}-{name}-{hashlib.sha256(word.encode()).hexdigest()[:16]}"
    if not (folder / "report.json").exists():
        settings = {"device": given.device, "batch_size": given.batch_size, "beside": False}
        advkit.evaluate(attack, model=model, **{**asked, "task": data or task}, **settings, out=folder)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    metrics = report["metrics"]
    success = metrics["attack_success_rate"]
    names = ("l0_mean", "l0_median", "l0_percent_mean", "l0_percent_median")
    within = {key: each["value"] for key, each in metrics.items() if key.startswith("attack_success_rate_l0")}
    rows = success["denominator"]
    cost = [each["cost"] for each in report["attacks"]]
    found = Cell(
        task=task,
        victim=model.name,
        attack=str(attack),
        attacked=rows,
        broken=success["numerator"],
        asr=success["value"],
        interval=(success["ci"]["low"], success["ci"]["high"]),
        flips={key: metrics[key]["value"] for key in names if key in metrics},
        within={key.removeprefix("attack_success_rate_"): value for key, value in within.items()},
        forwards=sum(each["forward"] for each in cost) / rows,
        backwards=sum(each["backward"] for each in cost) / rows,
        folder=str(folder),
    )
    logging.info("%s on %s (%s): %d of %d", found.attack, task, model.name, found.broken, found.attacked)
    return found


def rescaled(model: TorchModel, factor: float) -> TorchModel:
    """The same function: weights and biases into every neuron, its threshold and its reset, times the factor."""
    made = model.copy()
    made.name = f"{model.name} x{factor:g}"
    made.architecture = ""
    before: Any = None
    for layer in made.module.modules():
        if isinstance(layer, Neuron):
            with torch.no_grad():
                before.weight.mul_(factor)
                before.bias.mul_(factor)
            told = layer.dynamics
            reset = None if told.reset is None else told.reset * factor
            layer.dynamics = replace(told, threshold=told.threshold * factor, reset=reset)
        elif isinstance(layer, nn.BatchNorm2d | nn.Linear):
            before = layer
    return made


def static(given: argparse.Namespace) -> dict[str, Any]:
    columns = [(task, threat, n, kind) for task, threat, n in STATIC for kind in TRAINED]
    table: dict[str, list[Cell]] = {}
    for label, attack in [("random signs", None), *RULES.items()]:
        strike = RandomSigns() if attack is None else f"spiking:{PGD},surrogate={attack}"
        table[label] = [
            evaluated(given, strike, task, zoo.load(f"{task}-{TRAINED[kind]}"), threat, given.n or n)
            for task, threat, n, kind in columns
        ]
    heads = [
        f"{task}, {kind} ({cell.attacked} rows, {threat})"
        for (task, threat, _, kind), cell in zip(columns, table["PDSG"], strict=True)
    ]
    lines = {label: [f"{100 * cell.asr:.1f}" for cell in cells] for label, cells in table.items()}
    said = "Success rate of PGD-10 in per cent, by the attacker's backward rule, on victims trained wide and narrow."
    return block("static", said, "rule", heads, lines, table)


def scale(given: argparse.Namespace) -> dict[str, Any]:
    table: dict[str, list[Cell]] = {}
    lines: dict[str, list[str]] = {}
    for task, threat, n in STATIC:
        plain = zoo.load(f"{task}-snn")
        other = rescaled(plain, FACTOR)
        for label, rule in SCALED.items():
            rows = given.n or n
            attack = f"spiking:{PGD},surrogate={rule}"
            pair = [evaluated(given, attack, task, model, threat, rows, keep=rows) for model in (plain, other)]
            one, two = (read_examples(Path(cell.folder)) for cell in pair)
            assert one.keys() == two.keys()
            same = sum(torch.equal(one[key][1], two[key][1]) for key in one)
            key = f"{task}: {label}"
            table[key] = pair
            share = f"{pair[1].asr / pair[0].asr:.2f}" if pair[0].asr else "-"
            lines[key] = [*(f"{100 * cell.asr:.1f}" for cell in pair), share, f"{same} of {len(one)}"]
    heads = ["ASR %", f"ASR %, times {FACTOR:g}", "ratio", "bit-identical images"]
    said = f"The same function with weights, biases and threshold times {FACTOR:g}."
    return block("scale", said, "rule", heads, lines, table)


def events(given: argparse.Namespace) -> dict[str, Any]:
    table: dict[str, list[Cell]] = {}
    lines: dict[str, list[str]] = {}
    for task in FILMED:
        victim = zoo.load(f"{task}-snn")
        for label, attack in EVENTS.items():
            cell = evaluated(given, attack, task, victim, "flips", given.n or 100)
            flips = cell.flips
            lines[f"{task}: {label}"] = [
                f"{100 * cell.asr:.1f} ({cell.attacked})",
                number(flips.get("l0_mean"), 1),
                number(flips.get("l0_median"), 1),
                number(flips.get("l0_percent_median"), 2),
                *(f"{100 * cell.within[key]:.1f}" for key in ("l0_percent_0.25", "l0_percent_0.5", "l0_percent_1")),
                f"{cell.forwards:.0f}",
                f"{cell.backwards:.1f}",
            ]
            table[f"{task}: {label}"] = [cell]
    heads = ["ASR % (rows)", "mean L0", "median L0", "median L0 %", "ASR at 0.25 %", "at 0.5 %", "at 1 %"]
    heads += ["forwards", "gradients"]
    said = "Flips on binary events. Denominator of every ASR: all rows that the victim reads rightly."
    return block("events", said, "attack", heads, lines, table)


def singles(given: argparse.Namespace) -> dict[str, Any]:
    bits = math.prod(TINY_SHAPE)
    table: dict[str, list[Cell]] = {}
    lines: dict[str, list[str]] = {}
    nets = [tiny(seed) for seed in range(TINY_NETS)]
    enough = [decided_by_one_flip(*net) for net in nets]
    rows = sum(len(rows) for rows in enough)
    for label, attack in {
        "SDA": "sda",
        "SDA, k_init = all bits": f"sda:k_init={bits}",
        "early": "sda:early=true",
        "early, k_init = all bits": f"sda:early=true,k_init={bits}",
        "early, prefix, prune": "sda:early=true,prefix=true,prune=true",
    }.items():
        table[label], found, failed = [], 0, 0
        for (model, x, y), decided in zip(nets, enough, strict=True):
            cell = evaluated(given, attack, "tiny", model, "flips", len(x), data=(x, y))
            table[label].append(cell)
            records = read_records(Path(cell.folder) / "records.jsonl")
            ones = {i for i, r in enumerate(records) if r.outcome == Outcome.BROKEN and r.measures["l0"] == 1}
            if ones - decided:
                raise AssertionError(f"{model.name}: rows {ones - decided} fell to one flip that enumeration lacks")
            found += len(ones)
            failed += sum(records[row].outcome != Outcome.BROKEN for row in decided)
        forwards = sum(cell.forwards * cell.attacked for cell in table[label]) / sum(len(net[1]) for net in nets)
        lines[label] = [f"{found} of {rows}", str(failed), f"{forwards:.0f}"]
    said = (
        f"{TINY_NETS} random spiking nets of {bits} bits, {TINY_ROWS} random rows each: rows on which one flip changes "
        f"the answer, by enumeration ({rows}), and those on which the attack found a single flip."
    )
    return block("singles", said, "attack", ["found with L0 = 1", "not broken", "forwards"], lines, table)


def tiny(seed: int) -> tuple[TorchModel, Tensor, Tensor]:
    """An untrained net, random rows, and what it says of them."""
    model = MODELS.build(TINY)(TINY_SHAPE, 4, RowRng.from_ids(seed, ["tiny"]))
    model.name = f"tiny-{seed}"
    draw = RowRng.from_ids(seed, [f"row-{i}" for i in range(TINY_ROWS)]).at("bits")
    x = (draw.uniform(torch.empty(TINY_ROWS, *TINY_SHAPE)) < 0.3).float()
    return model, x, MeteredOracle(model, len(x), Access.SCORES)(x).argmax(1)


def decided_by_one_flip(model: TorchModel, x: Tensor, y: Tensor) -> set[int]:
    """The rows that some single flip makes misread."""
    # Through the oracle, as attacks ask: a spike can hang on a potential's last bit.
    oracle = MeteredOracle(model, len(x), Access.SCORES)
    bits = torch.arange(x[0].numel())
    found = set()
    for place in range(len(x)):
        tried = x[place].flatten().repeat(len(bits), 1)
        tried[bits, bits] = 1 - tried[bits, bits]
        answer = oracle(tried.view(-1, *x.shape[1:]), torch.full_like(bits, place))
        if bool((answer.argmax(1) != y[place]).any()):
            found.add(place)
    return found


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def block(
    name: str, said: str, first: str, heads: list[str], lines: dict[str, list[str]], table: dict[str, list[Cell]]
) -> dict[str, Any]:
    """A table as Markdown, and its cells."""
    rows = [[first, *heads], ["---"] * (len(heads) + 1), *([label, *cells] for label, cells in lines.items())]
    text = f"## {name}\n\n{said}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
    cells = {label: [cell.figures() for cell in found] for label, found in table.items()}
    return {"markdown": text, "shown": lines, "cells": cells}


PARTS = {"static": static, "scale": scale, "events": events, "singles": singles}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--n", type=int, default=None, help="rows (default: 300 digits, 200 Fashion-MNIST, 100 filmed)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--out", default="spiking_tables", help="writes OUT.json, OUT.md and the folder OUT-runs")
    given = parser.parse_args()
    if strangers := sorted(set(given.parts) - set(PARTS)):
        parser.error(f"no table {', '.join(strangers)}; known: {', '.join(PARTS)}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    found = {name: part(given) for name, part in PARTS.items() if not given.parts or name in given.parts}
    text = "\n".join(each["markdown"] for each in found.values())
    Path(f"{given.out}.md").write_text(text, encoding="utf-8")
    held = {name: {key: each[key] for key in ("shown", "cells")} for name, each in found.items()}
    Path(f"{given.out}.json").write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
