"""Attacks by queries beside the same attacks of other packages: success, distance, queries and CPU time, at one budget.

python benchmarks/query_attacks.py [--only TEXT ...] [--rows 48] [--out docs]

Writes OUT/query_attacks.json and the tables of OUT/query_attacks.md between its marks. A line is one attack in one
threat model; --only measures the lines whose model, attack or threat model contains one of these texts again, and the
other lines of the file stay. Every attack runs through the same oracle, which counts the queries of each sample, and
what it returns is judged on the same victim. Parts of the samples are attacked in turn by all attacks of a line, so
that their CPU times see the same machine. Packages that are not installed are named and left out.

To add an attack, add a `Line`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from advkit.attacks import ATTACKS
from advkit.core.errors import AdvkitError, MissingExtra
from advkit.core.oracle import Lanes, MeteredOracle, frozen
from advkit.core.protocols import Access
from advkit.core.rng import RowRng
from advkit.evaluation.api import resolve
from advkit.evaluation.stats import wilson
from advkit.threat_models import THREAT_MODELS
from advkit.threat_models.goals.untargeted import Untargeted

PACKAGES = {
    "torchattacks": "torchattacks",
    "art": "adversarial-robustness-toolbox",
    "foolbox": "foolbox",
}
PARTS = 2
MARKS = ("<!-- tables: made by benchmarks/query_attacks.py -->", "<!-- end of the tables -->")


@dataclass(frozen=True)
class Line:
    """One attack in one threat model, and the same attack of other packages with settings that spend the same queries.

    model:   of the zoo; no setting of these attacks was chosen on its weights
    first:   of its task's samples, the first that is attacked
    threat:  without access and budget
    peers:   specs of adapters; they leave a sample, or not, as they do by themselves
    queries: answers that a sample may be asked; peers keep to them by their settings
    """

    model: str
    first: int
    attack: str
    threat: str
    peers: tuple[str, ...] = ()
    access: str = "scores"
    queries: int = 1000


def scored(model: str, first: int, *, linf: float, l2: float, l1: float, l0: int) -> tuple[Line, ...]:
    """The attacks by scores on one model, in balls of these radii, with 1,000 queries."""
    balls = {"linf": f"linf:eps={linf:g}", "l2": f"l2:eps={l2:g}", "l1": f"l1:eps={l1:g}", "l0": f"l0:eps={l0}"}
    step = f"epsilon={0.2 * l2:g},max_iter=500"
    # Of peers: scipy's population is a multiple of three numbers for each pixel; a patch has at most eps pixels.
    population = 3 * l0
    patch = "x_dimensions=5,y_dimensions=2" if l0 == 10 else f"x_dimensions={l0},y_dimensions=1"
    given: tuple[tuple[str, str, tuple[str, ...]], ...] = (
        ("nes", "linf", ()),
        ("nes", "l2", ()),
        ("nes", "l1", ()),
        ("spsa", "linf", (f"torchattacks:SPSA,settings=[nb_iter=10,nb_sample=50,lr={0.25 * linf:g}]",)),
        ("spsa", "l2", ()),
        ("simba", "linf", ()),
        ("simba", "l2", (f"art:SimBA,settings=[attack=px,{step}]",)),
        ("simba:basis=dct", "l2", (f"art:SimBA,settings=[attack=dct,{step}]",)),
        (
            "square",
            "linf",
            ("torchattacks:Square,settings=[n_queries=1000]", "art:SquareAttack,settings=[max_iter=499]"),
        ),
        ("square", "l2", ("torchattacks:Square,settings=[n_queries=1000]",)),
        ("square", "l1", ()),
        (
            "one_pixel",
            "l0",
            (
                f"torchattacks:OnePixel,settings=[pixels={l0},steps={1000 // (population + 1) - 1}]",
                f"art:PixelAttack,settings=[th={l0},es=1,max_iter=2]",
            ),
        ),
        ("pixle", "l0", (f"torchattacks:Pixle,settings=[{patch},restarts=50,max_iterations=10]",)),
    )
    return tuple(Line(model, first, attack, balls[norm], peers) for attack, norm, peers in given)


LINES = (
    *scored("zoo:fashion-mnist-public-cnn5", 500, linf=0.05, l2=1.5, l1=12, l0=10),
    *scored("zoo:digits-mlp-pgd_at", 200, linf=0.15, l2=1.0, l1=4, l0=3),
)


class Rows:
    """The rows of a model's task that it gets right."""

    def __init__(self, spec: str, first: int, rows: int) -> None:
        task = spec.removeprefix("zoo:").rsplit("-", 1)[0]
        task = next(name for name in ("fashion-mnist", "digits") if task.startswith(name))
        case = resolve("pgd", "none", task, spec, device="cpu")
        batch = next(iter(case.task.batches(first + rows, n=first + rows)))
        x, labels = batch.x[first:], batch.labels[first:]
        self.model: Any = case.victim
        with torch.no_grad():
            right = (self.model(x).argmax(1) == labels).nonzero().squeeze(1)
        self.x, self.labels = x[right], labels[right]
        self.ids = [batch.ids[first + row] for row in right.tolist()]


@dataclass
class Measured:
    """What one attack came to: of every row whether it is broken, its distance and its queries; CPU seconds in all."""

    broken: list[bool]
    distance: list[float]
    queries: list[int]
    seconds: float = 0.0
    outside: int = 0

    def summary(self) -> dict[str, Any]:
        broken, distance, queries = np.array(self.broken), np.array(self.distance), np.array(self.queries)
        ci = wilson(int(broken.sum()), len(broken))
        return {
            "samples": len(broken),
            "broken": int(broken.sum()),
            "success": round(float(broken.mean()), 4),
            "success_ci": [round(ci.low, 4), round(ci.high, 4)],
            "distance_median": round(float(np.median(distance[broken])), 4) if broken.any() else None,
            "queries_median_broken": float(np.median(queries[broken])) if broken.any() else None,
            "queries_mean": round(float(queries.mean()), 1),
            "queries_max": int(queries.max()),
            "outside_the_ball": self.outside,
        }


def attacked(spec: str, line: Line, rows: Rows, part: Tensor, into: Measured, budgeted: bool) -> None:
    """One attack on some of the rows."""
    budget = f",queries={line.queries}" if budgeted else ""
    ball: Any = THREAT_MODELS.build(f"{line.threat},access={line.access}{budget}").bind(rows.model.space)
    x, labels = rows.x[part], rows.labels[part]
    attack: Any = ATTACKS.build(spec)
    oracle = MeteredOracle(rows.model, len(x), Access[line.access.upper()], ball.queries, lanes=Lanes.fitting(x))
    rng = RowRng.from_ids(0, [rows.ids[row] for row in part.tolist()])
    start = time.process_time()
    with frozen(*rows.model.modules()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        z = attack(oracle, x, Untargeted(labels), ball, rng)
    into.seconds += time.process_time() - start
    admitted = ball.admits(z, x)
    with torch.no_grad():
        reached = rows.model(torch.where(admitted.view(-1, *[1] * (x.ndim - 1)), z, x)).argmax(1) != labels
    into.broken += (reached & admitted).tolist()
    into.distance += ball.distance(z, x).tolist()
    into.queries += oracle.meter.queries.tolist()
    into.outside += int((~admitted).sum())


def measured(line: Line, rows: Rows) -> dict[str, Any]:
    """The figures of a line: ours, and of each peer those and the ratio of CPU times."""
    specs = (line.attack, *(f"{peer},access={line.access}" for peer in line.peers))
    found = {spec: Measured([], [], []) for spec in specs}
    missing: dict[str, str] = {}
    for part in torch.arange(len(rows.x)).tensor_split(PARTS):
        for spec in specs:
            if spec in missing:
                continue
            try:
                attacked(spec, line, rows, part, found[spec], budgeted=spec == line.attack)
            except MissingExtra:
                missing[spec] = "not installed"
            except AdvkitError as error:
                missing[spec] = str(error).splitlines()[0][:160]
    ours = found[line.attack]
    entry = {"attack": line.attack, "threat": line.threat, "access": line.access, "budget": line.queries}
    entry |= {"ours": ours.summary(), "peers": []}
    per_query = ours.seconds / max(1, sum(ours.queries))
    for peer, spec in zip(line.peers, specs[1:], strict=True):
        if spec in missing:
            entry["peers"].append({"name": peer, "left_out": missing[spec]})
            continue
        theirs = found[spec]
        entry["peers"].append(
            {
                "name": peer,
                **theirs.summary(),
                "cpu_ratio": round(theirs.seconds / ours.seconds, 2),
                "cpu_ratio_per_query": round(theirs.seconds / max(1, sum(theirs.queries)) / per_query, 2),
            }
        )
    return entry


def tables(lines: Sequence[dict[str, Any]]) -> str:
    """The tables of the page, one for each model."""
    out = []
    for model in dict.fromkeys(line["model"] for line in lines):
        out += [f"### `{model}`", ""]
        out += [
            "| threat model | attack | success | median distance | queries to break, median | queries, mean | CPU |"
        ]
        out += ["|---|---|---|---|---|---|---|"]
        for line in (line for line in lines if line["model"] == model):
            out.append(_row(line["threat"], f"`{line['attack']}`", line["ours"], ""))
            for peer in line["peers"]:
                package, _, rest = peer["name"].partition(":")
                name = f"{package}: {rest.partition(',')[0]}" + (" (dct)" if "attack=dct" in rest else "")
                if "left_out" in peer:
                    out.append(f"| {line['threat']} | {name} | {peer['left_out']} | | | | |")
                    continue
                ratio = f"{peer['cpu_ratio']:g}x, {peer['cpu_ratio_per_query']:g}x per query"
                out.append(_row(line["threat"], name, peer, ratio))
        out.append("")
    return "\n".join(out)


def _row(threat: str, name: str, figures: dict[str, Any], ratio: str) -> str:
    low, high = figures["success_ci"]
    success = f"{100 * figures['success']:.0f} % ({100 * low:.0f}-{100 * high:.0f})"
    if figures["outside_the_ball"]:
        success += f", {figures['outside_the_ball']} outside the ball"
    distance, broke = figures["distance_median"], figures["queries_median_broken"]
    shown = ("-" if distance is None else f"{distance:.3g}", "-" if broke is None else f"{broke:.0f}")
    return f"| {threat} | {name} | {success} | {shown[0]} | {shown[1]} | {figures['queries_mean']:.0f} | {ratio} |"


def written(out: Path, document: dict[str, Any]) -> None:
    """Keep the document and put its tables into the page."""
    (out / "query_attacks.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    page = out / "query_attacks.md"
    if page.exists():
        text = page.read_text(encoding="utf-8")
        before, _, rest = text.partition(MARKS[0])
        _, _, after = rest.partition(MARKS[1])
        page.write_text(f"{before}{MARKS[0]}\n\n{tables(document['lines'])}\n{MARKS[1]}{after}", encoding="utf-8")


def versions() -> dict[str, str]:
    found = {"torch": torch.__version__.partition("+")[0]}
    for package, distribution in PACKAGES.items():
        try:
            found[package] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="parts of the names of models, attacks, threat models")
    parser.add_argument("--rows", type=int, default=48, help="of each task, the wrong ones are left out")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    settings = parser.parse_args()
    torch.set_num_threads(1)
    file = settings.out / "query_attacks.json"
    held = json.loads(file.read_text(encoding="utf-8"))["lines"] if file.exists() else []
    known = {(line["model"], line["attack"], line["threat"]): line for line in held}
    rows: dict[str, Rows] = {}
    for line in LINES:
        if settings.only and not any(text in f"{line.model} {line.attack} {line.threat}" for text in settings.only):
            continue
        if line.model not in rows:
            rows[line.model] = Rows(line.model, line.first, settings.rows)
        entry = {"model": line.model, "first": line.first, **measured(line, rows[line.model])}
        known[line.model, line.attack, line.threat] = entry
        print(tables([entry]), flush=True)
        order = [(each.model, each.attack, each.threat) for each in LINES]
        lines = [known[key] for key in (*order, *(key for key in known if key not in order)) if key in known]
        written(settings.out, {"versions": versions(), "lines": lines})


if __name__ == "__main__":
    main()
