"""Minimum-norm attacks beside those of other packages: success, median distance, propagations, CPU time, optimality.

    python benchmarks/minimal.py [--only deepfool fmn ...] [--threat minimum-l2] [--models SPEC ...] [--rows 200]
                                 [--repeats 3] [--out docs]
    python benchmarks/minimal.py --distances [--only ...] [--threat ...] [--peers advlib ...] --out docs
    python benchmarks/minimal.py --only none --out docs     # the tables alone, from OUT/minimal.json

Each line of ROWS (minimal_rows.py) is one attack in one threat model, with the peers that have it under settings of as
many propagations. All run in this process on one thread, in turn, on the samples that the model gets right; a slow peer
on the first few of them, and its ratios are of both sides on these. What is returned is measured here: a point counts
where the model, asked again, is wrong and the point lies in the box. The median is over all samples; one that does not
fall has distance infinity. Propagations are forward and backward passes per sample. The CPU ratio is the peer's process
time over ours, each the smallest of the repeats.

Optimality is that of `advkit compare --optimality`, on the first COMMON samples: every attack and peer in a threat
model on a model is part of the envelope. It is counted from the distances in OUT/minimal.json. --distances measures
these alone, for lines that are there.

Writes OUT/minimal.json and, between its marks, the tables of OUT/minimal.md; lines that were not run stay as they are.
Packages that are not installed are named and left out: foolbox, torchattacks, adversarial-robustness-toolbox, and
adv-lib (`pip install --no-deps adv-lib==0.2.8 tqdm`; the visdom that it imports is stood in for).
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import math
import re
import sys
import time
import types
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from minimal_rows import INF, ROWS, Peer, Row
from torch import Tensor, nn

from advkit.attacks import ATTACKS
from advkit.core.lanes import Lanes
from advkit.core.oracle import MeteredOracle
from advkit.core.rng import RowRng
from advkit.core.state import frozen
from advkit.evaluation.api import resolve
from advkit.evaluation.report.optimality import Envelope, median
from advkit.models.torch import TorchModel
from advkit.threat_models import THREAT_MODELS
from advkit.threat_models.goals.untargeted import Untargeted

MODELS = ("zoo:fashion-mnist-cnn", "zoo:fashion-mnist-cnn-pgd_at")
PACKAGES = {"foolbox": "foolbox", "torchattacks": "torchattacks", "art": "adversarial-robustness-toolbox",
            "advlib": "adv-lib"}  # fmt: skip


COMMON = 20
"""Samples on which optimality is counted: of all attacks the same."""

LONG = 3.0
"""Seconds from which a run is measured well enough by one."""


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
    """A model and the first samples of its task that it gets right.

    runner_up: the second best class of each, a target where an attack needs one
    """

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
        with torch.no_grad():
            scores = self.module(self.x).scatter(1, self.y[:, None], -torch.inf)
        self.runner_up = scores.argmax(1)

    def first(self, rows: int | None) -> Bench:
        """With the first samples alone; None is all."""
        part = copy.copy(self)
        part.x, part.y, part.ids = self.x[:rows], self.y[:rows], self.ids[:rows]
        part.runner_up = self.runner_up[:rows]
        return part

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
            "median": median(distance.tolist()),
            "propagations": round(passes, 2),
            "seconds": seconds,
            "distances": [float(f"{each:.5g}") for each in distance[:COMMON].tolist()],
        }


def foolbox(bench: Bench, name: str, settings: dict[str, Any]) -> Callable[[], Tensor]:
    package = importlib.import_module("foolbox")
    attack = getattr(package.attacks, name)(**settings)
    model = package.PyTorchModel(bench.counted, bounds=(0, 1), device="cpu")
    return lambda: attack(model, bench.x, bench.y, epsilons=None)[0]


def torchattacks(bench: Bench, name: str, settings: dict[str, Any]) -> Callable[[], Tensor]:
    attack = getattr(importlib.import_module("torchattacks"), name)(bench.counted, **settings)
    if name == "JSMA":  # without a target it aims at the class of the next number
        attack.set_mode_targeted_by_label(quiet=True)
    y = bench.runner_up if name == "JSMA" else bench.y
    return lambda: attack(bench.x, y)


def art(bench: Bench, name: str, settings: dict[str, Any]) -> Callable[[], Tensor]:
    evasion = importlib.import_module("art.attacks.evasion")
    classifier = importlib.import_module("art.estimators.classification").PyTorchClassifier(
        bench.counted, nn.CrossEntropyLoss(), tuple(bench.x.shape[1:]), 10, clip_values=(0, 1), device_type="cpu"
    )
    attack = getattr(evasion, name)(classifier, **{"verbose": False, "batch_size": len(bench.x), **settings})
    x, y = bench.x.numpy(), (bench.runner_up if name == "SaliencyMapMethod" else bench.y).numpy()  # it takes targets
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
    # a copy: the trust region attack detaches its inputs in place, which torch refuses for views
    return lambda: attack(bench.counted, bench.x.clone(), bench.y, **settings).detach()


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


def sides(bench: Bench, row: Row, packages: dict[str, str]) -> tuple[Any, list[Peer]]:
    """The threat model of a row on a model, and its peers that are here."""
    threat = THREAT_MODELS.build(row.threat).bind(bench.victim.space)
    return threat, [each for each in row.peers if each.package in packages]


def run_of(bench: Bench, each: Peer) -> Callable[[], Tensor]:
    return RUNNERS[each.package](bench, each.name.partition(":")[2], each.settings)


def contest(bench: Bench, row: Row, packages: dict[str, str], repeats: int) -> dict[str, Any]:
    """One row's line: our attack and each peer's, in turn. A peer on fewer samples meets ours on these."""
    threat, peers = sides(bench, row, packages)
    parts = {rows: bench.first(rows) for rows in dict.fromkeys([None, *(each.rows for each in peers)])}
    runs = [(part, part.ours(row.attack, threat)) for part in parts.values()]
    runs += [(parts[each.rows], run_of(parts[each.rows], each)) for each in peers]
    results: list[dict[str, Any]] = []
    for repeat in range(repeats):
        for place, (part, run) in enumerate(runs):
            if repeat and results[place]["seconds"] > LONG:
                continue
            found = part.measured(run, threat)
            if not repeat:
                results.append(found)
            results[place]["seconds"] = min(results[place]["seconds"], found["seconds"])
    ours, theirs = dict(zip(parts, results, strict=False)), results[len(parts) :]
    for each, result in zip(peers, theirs, strict=True):
        mine = ours[each.rows]
        result.update(peer=each.name, settings={k: str(v) for k, v in each.settings.items()})
        result["cpu_ratio"] = round(result["seconds"] / mine["seconds"], 2)
        if each.rows is not None:
            result.update(rows=each.rows, ours={name: mine[name] for name in ("median", "propagations")})
    for result in results:
        del result["seconds"]
    return {"model": bench.spec, "attack": row.attack, "threat": row.threat, "rows": len(bench.x), **ours[None],
            "peers": theirs}  # fmt: skip


def with_distances(bench: Bench, row: Row, packages: dict[str, str], line: dict[str, Any]) -> dict[str, Any]:
    """A line of before with the distances that its attacks find on the first samples, as far as they are asked for."""
    threat, peers = sides(bench, row, packages)
    line["distances"] = bench.measured(bench.ours(row.attack, threat), threat)["distances"]
    for each in peers:
        part = bench.first(each.rows)
        for result in line["peers"]:
            if (result["peer"], result["settings"]) == (each.name, {k: str(v) for k, v in each.settings.items()}):
                result["distances"] = part.measured(run_of(part, each), threat)["distances"]
    return line


def with_optimality(lines: list[dict[str, Any]]) -> None:
    """Put the local optimality of every attack of known distances into its result."""
    cases: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in lines:
        known = [result for result in (line, *line["peers"]) if "distances" in result]
        cases.setdefault((line["model"], line["threat"]), []).extend(known)
    for known in cases.values():
        if not known:
            continue
        finite = [[INF if each is None else each for each in result["distances"]] for result in known]
        envelope = Envelope.of(finite)
        for result, own in zip(known, finite, strict=True):
            value, interval = envelope.local(own)
            result.pop("optimality", None)
            if value is not None and interval is not None:
                spread = {"low": round(interval.low, 4), "high": round(interval.high, 4)}
                result["optimality"] = {"value": round(value, 4), **spread, "n": len(own)}


def key(line: dict[str, Any]) -> tuple[str, str, str]:
    return line["model"], line["attack"].partition(":")[0], line["threat"]


def ratio(line: dict[str, Any], other: dict[str, Any]) -> str:
    """Our median over another's, on its samples; a dash where one is infinite, because half of them did not fall."""
    mine, its = other.get("ours", line)["median"], other["median"]
    return f"{mine / its:.3f}" if mine and its and math.isfinite(mine) and math.isfinite(its) else "-"


def shown_median(result: dict[str, Any]) -> str:
    """Null in the file stands for infinity."""
    value = result["median"]
    return "none" if value is None or math.isinf(value) else f"{value:.4g}"


def shown_optimality(result: dict[str, Any]) -> str:
    found = result.get("optimality")
    return f"{100 * found['value']:.1f} ({100 * found['low']:.0f} to {100 * found['high']:.0f})" if found else "-"


def shown(line: dict[str, Any]) -> str:
    """A line for the terminal."""
    parts = [f"{line['model'].removeprefix('zoo:')} {line['attack']} {line['threat']}: success {line['success']:.3f}, "
             f"median {shown_median(line)}, {line['propagations']:g} propagations"]  # fmt: skip
    parts += [
        f"    {p['peer']}: success {p['success']:.3f}, median {shown_median(p)} (ours / theirs "
        f"{ratio(line, p)}), {p['propagations']:g} propagations, CPU {p['cpu_ratio']:g}x"
        for p in line["peers"]
    ]
    return "\n".join(parts)


def table(lines: list[dict[str, Any]]) -> str:
    """The table of one attack."""
    out = ["| model | threat model | attack | success | median | ours / theirs | propagations | CPU, theirs / ours "
           "| optimality, % |", "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for line in lines:
        model = line["model"].removeprefix("zoo:fashion-mnist-")
        out.append(
            f"| {model} | {line['threat']} | **`{line['attack']}`** | {line['success']:.1%} | {shown_median(line)} | | "
            f"{line['propagations']:.0f} | | {shown_optimality(line)} |"
        )
        out += [
            f"| {model} | {line['threat']} | {shown_peer(p)} | {p['success']:.1%} | {shown_median(p)} | "
            f"{ratio(line, p)} | {p['propagations']:.0f} | {p['cpu_ratio']:.1f} | {shown_optimality(p)} |"
            for p in line["peers"]
        ]
    return "\n".join(out)


def shown_peer(result: dict[str, Any]) -> str:
    few = f" ({result['rows']} samples)" if "rows" in result else ""
    return f"`{result['peer']}`{few}"


def write(out: Path, lines: list[dict[str, Any]], packages: dict[str, str]) -> None:
    """Put the new lines beside those of before, and the tables of all into the page."""
    path = out / "minimal.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"packages": {}, "lines": []}
    known = {key(line): line for line in before["lines"]} | {key(line): line for line in lines}
    order = {(model, row.name, row.threat): (ROWS.index(row), model) for row in ROWS for model in MODELS}
    merged = sorted(known.values(), key=lambda line: order.get(key(line), (len(ROWS), line["model"])))
    with_optimality(merged)
    document = {"packages": before["packages"] | packages, "torch": torch.__version__, "lines": merged}
    text = json.dumps(document, indent=1).replace("Infinity", "null")
    text = re.sub(r"\[[^\[\]{}\"]+\]", lambda found: " ".join(found[0].split()), text)  # a list of numbers is one line
    path.write_text(text + "\n", encoding="utf-8")
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
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", nargs="*", default=list(PACKAGES), choices=list(PACKAGES))
    parser.add_argument("--distances", action="store_true", help="measure the distances of lines that are there")
    parser.add_argument("--out", type=Path, help="folder to write to; nothing is written without one")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    packages = {name: version for name, version in installed().items() if name in given.peers}
    path = (given.out or Path("docs")) / "minimal.json"
    known = {key(line): line for line in json.loads(path.read_text())["lines"]} if given.distances else {}
    lines = []
    for spec in given.models:
        bench = Bench(spec, COMMON if given.distances else given.rows)
        for row in ROWS:
            if (given.only and row.name not in given.only) or (given.threat and row.threat not in given.threat):
                continue
            if not given.distances:
                lines.append(contest(bench, row, packages, given.repeats))
            elif line := known.get((spec, row.name, row.threat)):
                lines.append(with_distances(bench, row, packages, line))
            print(shown(lines[-1]), flush=True)
            if given.out:
                write(given.out, lines, packages)
    if given.out:
        write(given.out, lines, packages)


if __name__ == "__main__":
    main()
