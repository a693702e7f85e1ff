"""Minimum-norm attacks beside those of other packages: success, median distance, propagations and CPU time.

    python benchmarks/minimal.py [--only deepfool fmn ...] [--threat minimum-l2] [--models SPEC ...] [--rows 200]
                                 [--repeats 3] [--out docs]
    python benchmarks/minimal.py --only none --out docs     # the tables alone, from OUT/minimal.json

Each line of ROWS is one attack in one threat model, with the peers that have it under settings of as many propagations.
All run in this process on one thread, in turn, on the samples that the model gets right. What is returned is measured
here: a point counts where the model, asked again, is wrong and the point lies in the box. The median is over all
samples; one that does not fall has distance infinity. Propagations are forward and backward passes per sample. The
CPU ratio is the peer's process time over ours, each the smallest of the repeats.

Writes OUT/minimal.json and, between its marks, the tables of OUT/minimal.md; lines that were not run stay as they are.
Packages that are not installed are named and left out: foolbox, torchattacks, adversarial-robustness-toolbox, and
adv-lib (`pip install --no-deps adv-lib==0.2.8 tqdm`; the visdom that it imports is stood in for).
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import re
import sys
import time
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advkit.attacks import ATTACKS
from advkit.core.oracle import Lanes, MeteredOracle, frozen
from advkit.core.rng import RowRng
from advkit.evaluation.api import resolve
from advkit.models.torch import TorchModel
from advkit.threat_models import THREAT_MODELS
from advkit.threat_models.goals.untargeted import Untargeted

MODELS = ("zoo:fashion-mnist-cnn", "zoo:fashion-mnist-cnn-pgd_at")
PACKAGES = {"foolbox": "foolbox", "torchattacks": "torchattacks", "art": "adversarial-robustness-toolbox",
            "advlib": "adv-lib"}  # fmt: skip


@dataclass(frozen=True)
class Peer:
    """An attack of another package, as PACKAGE:NAME, and its settings there."""

    name: str
    settings: dict[str, Any]

    @property
    def package(self) -> str:
        return self.name.partition(":")[0]


def peer(name: str, **settings: Any) -> Peer:
    return Peer(name, settings)


@dataclass(frozen=True)
class Row:
    """An attack here, the threat model, and who else has it."""

    attack: str
    threat: str
    peers: tuple[Peer, ...] = ()

    @property
    def name(self) -> str:
        return self.attack.partition(":")[0]


INF = math.inf
ROWS = [
    Row("deepfool", "minimum-l2", (
        peer("foolbox:L2DeepFoolAttack"), peer("torchattacks:DeepFool"), peer("art:DeepFool"),
        peer("advlib:df", norm=2, steps=50),
    )),
    Row("deepfool", "minimum-linf", (
        peer("foolbox:LinfDeepFoolAttack"), peer("advlib:df", norm=INF, steps=50),
    )),
    Row("superdeepfool", "minimum-l2", (peer("advlib:sdf"),)),
    Row("ddn:steps=99", "minimum-l2", (
        peer("foolbox:DDNAttack", steps=100), peer("advlib:ddn", steps=100, levels=None),
    )),
    Row("fmn:steps=96", "minimum-l0", (peer("advlib:fmn", norm=0, steps=100),)),
    Row("fmn:steps=99", "minimum-l1", (
        peer("foolbox:L1FMNAttack", steps=100), peer("advlib:fmn", norm=1, steps=100),
    )),
    Row("fmn:steps=99", "minimum-l2", (
        peer("foolbox:L2FMNAttack", steps=100), peer("advlib:fmn", norm=2, steps=100),
    )),
    Row("fmn:steps=99", "minimum-linf", (
        peer("foolbox:LInfFMNAttack", steps=100), peer("advlib:fmn", norm=INF, steps=100),
    )),
    Row("alma:steps=190", "minimum-l1", (
        peer("advlib:alma", distance="l1", num_steps=200, init_lr_distance=0.5),
    )),
    Row("alma:steps=190", "minimum-l2", (
        peer("advlib:alma", distance="l2", num_steps=200, init_lr_distance=0.1),
    )),
    Row("pdpgd:steps=183", "minimum-l0", (
        peer("advlib:pdpgd", norm=0, num_steps=200, proximal_operator=23),
    )),
    Row("pdpgd:steps=189", "minimum-l1", (peer("advlib:pdpgd", norm=1, num_steps=200),)),
    Row("pdpgd:steps=189", "minimum-l2", (
        peer("advlib:pdgd", num_steps=200), peer("advlib:pdpgd", norm=2, num_steps=200),
    )),
    Row("pdpgd:steps=189", "minimum-linf", (peer("advlib:pdpgd", norm=INF, num_steps=200),)),
    Row("trust_region", "minimum-l2", (peer("advlib:tr", p=2, adaptive=True),)),
    Row("trust_region", "minimum-linf", (peer("advlib:tr", p=INF, adaptive=True),)),
    Row("cw:budget=9x40", "minimum-l2", (
        peer("foolbox:L2CarliniWagnerAttack", binary_search_steps=9, steps=100),
        peer("torchattacks:CW", c=1, steps=300),
        peer("art:CarliniL2Method", binary_search_steps=9, max_iter=100),
    )),
    Row("cw:budget=9x100", "minimum-linf", (peer("art:CarliniLInfMethod", max_iter=100),)),
    Row("cw:budget=9x100", "minimum-l0", (
        peer("art:CarliniL0Method", binary_search_steps=3, max_iter=30, learning_rate=0.1),
    )),
    Row("ead:budget=9x100", "minimum-l1", (
        peer("foolbox:EADAttack", binary_search_steps=9, steps=100, decision_rule="L1", initial_stepsize=0.05),
        peer("torchattacks:EADL1", binary_search_steps=9, max_iterations=100),
        peer("art:ElasticNet", binary_search_steps=9, max_iter=100, decision_rule="L1"),
    )),
    Row("jsma", "minimum-l0", (peer("torchattacks:JSMA"), peer("art:SaliencyMapMethod"))),
    Row("sigma_zero:steps=100", "minimum-l0", (peer("advlib:sigma_zero", num_steps=100),)),
    Row("brendel_bethge:steps=100", "minimum-l0", (peer("foolbox:L0BrendelBethgeAttack", steps=100),)),
    Row("brendel_bethge:steps=100", "minimum-l1", (peer("foolbox:L1BrendelBethgeAttack", steps=100),)),
    Row("brendel_bethge:steps=100", "minimum-l2", (peer("foolbox:L2BrendelBethgeAttack", steps=100),)),
    Row("brendel_bethge:steps=100", "minimum-linf", (peer("foolbox:LinfinityBrendelBethgeAttack", steps=100),)),
]  # fmt: skip


class Counted(nn.Module):
    """A module that counts the rows sent forward and back through it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.forwards = self.backwards = 0

    def _back(self, rows: int, gradient: Tensor) -> None:
        self.backwards += rows

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        answer: Tensor = self.module(x)
        if answer.requires_grad:
            answer.register_hook(partial(self._back, len(x)))  # type: ignore[no-untyped-call]
        return answer


class Bench:
    """A model and the first samples of its task that it gets right."""

    def __init__(self, spec: str, rows: int) -> None:
        case = resolve("pgd", "none", "fashion-mnist", spec, device="cpu")
        victim = case.victim
        assert isinstance(victim, TorchModel)
        batch = next(iter(case.task.batches(2 * rows)))
        with torch.no_grad():
            right = (victim(batch.x).argmax(1) == batch.labels).nonzero().squeeze(1)[:rows]
        self.spec, self.x, self.y = spec, batch.x[right].clone(), batch.labels[right].clone()
        self.ids = tuple(batch.ids[row] for row in right.tolist())
        self.module: nn.Module = victim.module
        for parameter in self.module.parameters():
            parameter.requires_grad_(False)
        self.counted = Counted(self.module).eval()
        self.victim = TorchModel(self.counted, victim.space, 10, name="counted")
        self.lanes = Lanes.probed(self.victim, self.x)

    def ours(self, attack: str, threat: Any) -> Callable[[], Tensor]:
        made = ATTACKS.build(attack)

        def run() -> Tensor:
            oracle = MeteredOracle(self.victim, len(self.x), lanes=self.lanes)
            with frozen(*self.victim.modules()):
                z: Tensor = made(oracle, self.x, Untargeted(self.y), threat, RowRng.from_ids(0, self.ids))
            meter = oracle.meter
            # Rows that fill up a call are work, but no propagation of a sample.
            self.counted.forwards, self.counted.backwards = int(meter.forwards.sum()), int(meter.backwards.sum())
            return z

        return run

    def measured(self, run: Callable[[], Tensor], threat: Any) -> dict[str, Any]:
        """What one run gave and took."""
        self.counted.forwards = self.counted.backwards = 0
        torch.manual_seed(0)
        begun = time.process_time()
        z = run()
        seconds = time.process_time() - begun
        passes = (self.counted.forwards + self.counted.backwards) / len(self.x)
        with torch.no_grad():
            fell = (self.module(z).argmax(1) != self.y) & threat.admits(z, self.x)
        distance = torch.where(fell, threat.distance(z, self.x), torch.inf)
        return {
            "success": float(fell.float().mean()),
            "median": float(distance.median()),
            "propagations": round(passes, 2),
            "seconds": seconds,
        }


def foolbox(bench: Bench, name: str, settings: dict[str, Any]) -> Callable[[], Tensor]:
    package = importlib.import_module("foolbox")
    attack = getattr(package.attacks, name)(**settings)
    model = package.PyTorchModel(bench.counted, bounds=(0, 1), device="cpu")
    return lambda: attack(model, bench.x, bench.y, epsilons=None)[0]


def torchattacks(bench: Bench, name: str, settings: dict[str, Any]) -> Callable[[], Tensor]:
    attack = getattr(importlib.import_module("torchattacks"), name)(bench.counted, **settings)
    return lambda: attack(bench.x, bench.y)


def art(bench: Bench, name: str, settings: dict[str, Any]) -> Callable[[], Tensor]:
    evasion = importlib.import_module("art.attacks.evasion")
    classifier = importlib.import_module("art.estimators.classification").PyTorchClassifier(
        bench.counted, nn.CrossEntropyLoss(), tuple(bench.x.shape[1:]), 10, clip_values=(0, 1), device_type="cpu"
    )
    attack = getattr(evasion, name)(classifier, **{"verbose": False, "batch_size": len(bench.x), **settings})
    x, y = bench.x.numpy(), bench.y.numpy()
    return lambda: torch.from_numpy(attack.generate(x, y)).to(bench.x)


def advlib(bench: Bench, name: str, settings: dict[str, Any]) -> Callable[[], Tensor]:
    if "visdom" not in sys.modules:
        stand_in: Any = types.ModuleType("visdom")
        stand_in.Visdom = type("Visdom", (), {})
        sys.modules["visdom"] = stand_in
    attack = getattr(importlib.import_module("adv_lib.attacks"), name, None)
    if attack is None:
        module = {"tr": "trust_region", "sdf": "superdeepfool", "df": "deepfool"}.get(name, name)
        attack = getattr(importlib.import_module(f"adv_lib.attacks.{module}"), name)
    return lambda: attack(bench.counted, bench.x, bench.y, **settings).detach()


RUNNERS: dict[str, Callable[[Bench, str, dict[str, Any]], Callable[[], Tensor]]] = {
    "foolbox": foolbox, "torchattacks": torchattacks, "art": art, "advlib": advlib,
}  # fmt: skip


def installed() -> dict[str, str]:
    """The packages that are here, and their versions."""
    found = {}
    for package, name in PACKAGES.items():
        try:
            found[package] = version(name)
        except PackageNotFoundError:
            print(f"{name} is not installed: its attacks are left out")
    return found


def contest(bench: Bench, row: Row, packages: dict[str, str], repeats: int) -> dict[str, Any]:
    """One row's line: our attack and each peer's, in turn."""
    threat = THREAT_MODELS.build(row.threat).bind(bench.victim.space)
    peers = [each for each in row.peers if each.package in packages]
    runs = [bench.ours(row.attack, threat)]
    runs += [RUNNERS[each.package](bench, each.name.partition(":")[2], each.settings) for each in peers]
    results: list[dict[str, Any]] = []
    for repeat in range(repeats):
        for place, run in enumerate(runs):
            if repeat and results[place].get("seconds", 0) > 10:  # a run this long is measured well enough by one
                continue
            found = bench.measured(run, threat)
            if not repeat:
                results.append(found)
            results[place]["seconds"] = min(results[place]["seconds"], found["seconds"])
    ours, *theirs = results
    seconds = [result.pop("seconds") for result in results]
    for each, result, took in zip(peers, theirs, seconds[1:], strict=True):
        result.update(peer=each.name, settings={k: str(v) for k, v in each.settings.items()})
        result["cpu_ratio"] = round(took / seconds[0], 2)
    return {"model": bench.spec, "attack": row.attack, "threat": row.threat, "rows": len(bench.x), **ours,
            "peers": theirs}  # fmt: skip


def key(line: dict[str, Any]) -> tuple[str, str, str]:
    return line["model"], line["attack"].partition(":")[0], line["threat"]


def ratio(line: dict[str, Any], other: dict[str, Any]) -> str:
    """Our median over another's; a dash where one is infinite, because half of its samples did not fall."""
    mine, its = line["median"], other["median"]
    return f"{mine / its:.3f}" if mine and its and math.isfinite(mine) and math.isfinite(its) else "-"


def median(result: dict[str, Any]) -> str:
    """Null in the file stands for infinity."""
    value = result["median"]
    return "infinite" if value is None or math.isinf(value) else f"{value:.4g}"


def shown(line: dict[str, Any]) -> str:
    """A line for the terminal."""
    parts = [f"{line['model'].removeprefix('zoo:')} {line['attack']} {line['threat']}: success {line['success']:.3f}, "
             f"median {median(line)}, {line['propagations']:g} propagations"]  # fmt: skip
    parts += [
        f"    {p['peer']}: success {p['success']:.3f}, median {median(p)} (ours / theirs "
        f"{ratio(line, p)}), {p['propagations']:g} propagations, CPU {p['cpu_ratio']:g}x"
        for p in line["peers"]
    ]
    return "\n".join(parts)


def table(lines: list[dict[str, Any]]) -> str:
    """The table of one attack."""
    out = ["| model | threat model | attack | success | median | ours / theirs | propagations | CPU, theirs / ours |",
           "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for line in lines:
        model = line["model"].removeprefix("zoo:fashion-mnist-")
        out.append(
            f"| {model} | {line['threat']} | **`{line['attack']}`** | {line['success']:.1%} | {median(line)} | | "
            f"{line['propagations']:.0f} | |"
        )
        out += [
            f"| {model} | {line['threat']} | `{p['peer']}` | {p['success']:.1%} | {median(p)} | "
            f"{ratio(line, p)} | {p['propagations']:.0f} | {p['cpu_ratio']:.1f} |"
            for p in line["peers"]
        ]
    return "\n".join(out)


def write(out: Path, lines: list[dict[str, Any]], packages: dict[str, str]) -> None:
    """Put the new lines beside those of before, and the tables of all into the page."""
    path = out / "minimal.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"packages": {}, "lines": []}
    known = {key(line): line for line in before["lines"]} | {key(line): line for line in lines}
    order = {(model, row.name, row.threat): (ROWS.index(row), model) for row in ROWS for model in MODELS}
    merged = sorted(known.values(), key=lambda line: order.get(key(line), (len(ROWS), line["model"])))
    document = {"packages": before["packages"] | packages, "torch": torch.__version__, "lines": merged}
    path.write_text(json.dumps(document, indent=1).replace("Infinity", "null") + "\n", encoding="utf-8")
    page = out / "minimal.md"
    if page.exists():
        text = page.read_text(encoding="utf-8")
        for name in dict.fromkeys(row.name for row in ROWS):
            mine = [line for line in merged if key(line)[1] == name]
            if mine:
                marks = re.compile(rf"(<!-- table {name} -->\n).*?(<!-- end -->)", re.S)
                text = marks.sub(lambda found, mine=mine: found[1] + table(mine) + "\n" + found[2], text)
        page.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="attacks by name")
    parser.add_argument("--threat", nargs="*", help="threat models by name")
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder to write to; nothing is written without one")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    packages = installed()
    lines = []
    for spec in given.models:
        bench = Bench(spec, given.rows)
        for row in ROWS:
            if (given.only and row.name not in given.only) or (given.threat and row.threat not in given.threat):
                continue
            if row.name not in ATTACKS.names():
                print(f"{row.attack} is not there")
                continue
            lines.append(contest(bench, row, packages, given.repeats))
            print(shown(lines[-1]), flush=True)
            if given.out:
                write(given.out, lines, packages)
    if given.out:
        write(given.out, lines, packages)


if __name__ == "__main__":
    main()
