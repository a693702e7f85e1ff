"""Attacks by queries beside the same attacks of other packages: success, distance, queries and CPU time, at a budget.

python benchmarks/query_attacks.py [--only TEXT ...] [--rows 48] [--out docs]

Writes OUT/query_attacks.json and the tables of OUT/query_attacks.md between its marks. A line is one attack in one
threat model with one budget; --only measures the lines whose model, attack or threat model contains one of these texts
again, and the other lines of the file stay. Ours and peers take turns, by scores in two parts of the samples, so that
their CPU times see the same machine. Packages that are not installed are named and left out.

By scores every attack runs through the same oracle, which counts the queries of each sample, and what it returns is
judged on the same victim. By decisions alone peers do not know a budget: a `Tape` counts their questions, keeps the
nearest misclassified point that they asked about, and stops them. They have their default settings (GeoDA of ART plans
for the budget, and for no fewer than 500). Of the samples those are left out that uniform noise lands on: some peers
have no other start.

To add an attack, add a `Line`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from advkit.attacks import ATTACKS
from advkit.attacks.peers import foreign_randomness
from advkit.core.errors import AdvkitError, MissingExtra
from advkit.core.lanes import Lanes
from advkit.core.oracle import MeteredOracle
from advkit.core.protocols import Access
from advkit.core.rng import RowRng
from advkit.core.state import frozen
from advkit.evaluation.api import resolve
from advkit.evaluation.stats import wilson
from advkit.threat_models import THREAT_MODELS
from advkit.threat_models.goals.untargeted import Untargeted

PACKAGES = {
    "torchattacks": "torchattacks",
    "art": "adversarial-robustness-toolbox",
    "foolbox": "foolbox",
}
PARTS = {"scores": 2, "labels": 1}
MARKS = {
    "scores": ("<!-- tables: made by benchmarks/query_attacks.py -->", "<!-- end of the tables -->"),
    "labels": ("<!-- by decisions: made by benchmarks/query_attacks.py -->", "<!-- end of those by decisions -->"),
}


@dataclass(frozen=True)
class Line:
    """One attack in one threat model, and the same attack of other packages with settings that spend the same queries.

    model:   of the zoo; no setting of these attacks was chosen on its weights
    first:   of its task's samples, the first that is attacked
    threat:  without access and budget
    peers:   specs of adapters by scores, which leave a sample, or not, as they do by themselves; PACKAGE:CLASS by
             decisions alone
    queries: answers that a sample may be asked; peers keep to them by their settings, by decisions the tape stops them
    rows:    of the task, of which the wrong ones are left out
    """

    model: str
    first: int
    attack: str
    threat: str
    peers: tuple[str, ...] = ()
    access: str = "scores"
    queries: int = 1000
    rows: int = 48


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


DECIDED = (
    ("boundary", "minimum-l2", ("foolbox:BoundaryAttack", "art:BoundaryAttack")),
    ("hopskipjump", "minimum-l2", ("foolbox:HopSkipJumpAttack", "art:HopSkipJump")),
    ("hopskipjump", "minimum-linf", ("foolbox:HopSkipJumpAttack", "art:HopSkipJump")),
    ("sign_opt", "minimum-l2", ("art:SignOPTAttack",)),
    ("sign_opt", "minimum-linf", ()),
    ("geoda", "minimum-l2", ("art:GeoDA",)),
    ("geoda", "minimum-linf", ("art:GeoDA",)),
    ("geoda", "minimum-l1", ("art:GeoDA",)),
)
BUDGETS = (1000, 5000)


def decided(model: str, first: int, rows: int) -> tuple[Line, ...]:
    """The attacks by decisions alone on one model, with each budget."""
    return tuple(
        Line(model, first, attack, threat, peers, "labels", queries, rows)
        for attack, threat, peers in DECIDED
        for queries in BUDGETS
    )


LINES = (
    *scored("zoo:fashion-mnist-public-cnn5", 500, linf=0.05, l2=1.5, l1=12, l0=10),
    *scored("zoo:digits-mlp-pgd_at", 200, linf=0.15, l2=1.0, l1=4, l0=3),
    *decided("zoo:fashion-mnist-public-cnn5", 500, rows=16),
    *decided("zoo:digits-mlp-pgd_at", 200, rows=24),
)


class Rows:
    """The rows of a model's task that it gets right.

    apart: of them those that it does not put into the class of uniform noise, long
    """

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
        noise = torch.rand(16, *x.shape[1:], generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            landed = self.model(noise).argmax(1).mode().values
        self.apart = (self.labels != landed).nonzero().squeeze(1)


@dataclass
class Measured:
    """What one attack came to: of every row whether it is broken, its distance and its queries; CPU seconds in all."""

    broken: list[bool]
    distance: list[float]
    queries: list[int]
    seconds: float = 0.0
    outside: int = 0

    def summary(self, least: bool) -> dict[str, Any]:
        """For the file; least: the median distance is that over all rows, infinite (None) where most withstood."""
        broken, distance, queries = np.array(self.broken), np.array(self.distance), np.array(self.queries)
        ci = wilson(int(broken.sum()), len(broken))
        over = np.where(broken, distance, math.inf) if least else distance[broken]
        median = float(np.median(over)) if len(over) else math.inf
        return {
            "samples": len(broken),
            "broken": int(broken.sum()),
            "success": round(float(broken.mean()), 4),
            "success_ci": [round(ci.low, 4), round(ci.high, 4)],
            "distance_median": round(median, 4) if math.isfinite(median) else None,
            "queries_median_broken": float(np.median(queries[broken])) if broken.any() else None,
            "queries_mean": round(float(queries.mean()), 1),
            "queries_max": int(queries.max()),
            "outside_the_ball": self.outside,
        }


def attacked(spec: str, line: Line, rows: Rows, part: Tensor, into: Measured, budgeted: bool) -> None:
    """One attack on some of the rows."""
    budget = f",queries={line.queries}" if budgeted else ""
    first = "," if ":" in line.threat else ":"
    ball: Any = THREAT_MODELS.build(f"{line.threat}{first}access={line.access}{budget}").bind(rows.model.space)
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


class Spent(Exception):
    """A peer has asked as often as it may."""


class Tape(nn.Module):
    """A model that counts the questions of every row and keeps its nearest misclassified point's distance."""

    def __init__(self, model: Any, x: Tensor, labels: Tensor, threat: Any, budget: int) -> None:
        super().__init__()
        self.model, self.x, self.labels, self.threat, self.budget = model, x, labels, threat, budget
        self.row: int | None = None
        """Which row is attacked; None where the rows are asked about together, in order."""
        self.wound_back()

    def wound_back(self) -> None:
        """Forget what was asked."""
        self.queries = [0] * len(self.x)
        self.best = [math.inf] * len(self.x)

    def forward(self, z: Tensor) -> Tensor:
        with torch.no_grad():
            answer: Tensor = self.model(z)
        of = torch.arange(len(z)) if self.row is None else torch.full((len(z),), self.row)
        away = self.threat.distance(z, self.x[of]).float()
        away = torch.where(answer.argmax(1) != self.labels[of], away, torch.inf)
        for row, value in zip(of.tolist(), away.tolist(), strict=True):
            if self.queries[row] < self.budget:
                self.queries[row] += 1
                self.best[row] = min(self.best[row], value)
        if all(self.queries[row] >= self.budget for row in set(of.tolist())):
            raise Spent
        return answer


def taped(peer: str, line: Line, rows: Rows, part: Tensor, into: Measured) -> None:
    """One attack of another package, by decisions alone, on some of the rows."""
    package, _, kind = peer.partition(":")
    threat: Any = THREAT_MODELS.build(f"{line.threat}:access={line.access}").bind(rows.model.space)
    tape = Tape(rows.model, rows.x[part], rows.labels[part], threat, line.queries)
    start = time.process_time()
    with foreign_randomness(0), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (with_foolbox if package == "foolbox" else with_art)(kind, line.threat.removeprefix("minimum-"), tape)
    into.seconds += time.process_time() - start
    into.broken += [value < math.inf for value in tape.best]
    into.distance += tape.best
    into.queries += tape.queries


def with_foolbox(kind: str, norm: str, tape: Tape) -> None:
    """All rows of the tape at once."""
    try:
        import foolbox
    except ImportError as error:
        raise MissingExtra(str(error)) from None
    model = foolbox.PyTorchModel(tape.eval(), bounds=(0, 1), device="cpu")
    tape.wound_back()  # its look at the model
    attack = getattr(foolbox.attacks, kind)(**({"constraint": norm} if kind == "HopSkipJumpAttack" else {}))
    with contextlib.suppress(Spent):
        attack(model, tape.x, foolbox.criteria.Misclassification(tape.labels), epsilons=None)


def with_art(kind: str, norm: str, tape: Tape) -> None:
    """The rows of the tape one by one."""
    if not hasattr(np, "mat"):  # its GeoDA was written before NumPy 2
        np.mat = np.asmatrix  # noqa: NPY201
    try:
        from art.attacks import evasion
        from art.estimators.classification import PyTorchClassifier
    except ImportError as error:
        raise MissingExtra(str(error)) from None
    size: Any = {"l1": 1, "l2": 2, "linf": np.inf}[norm]
    own: dict[str, Any] = {
        "BoundaryAttack": {"targeted": False},
        "HopSkipJump": {"targeted": False, "norm": size, "max_iter": 1000},
        "SignOPTAttack": {"targeted": False, "query_limit": 10**9},
        "GeoDA": {"norm": size, "max_iter": max(500, tape.budget)},
    }[kind]
    wrapped = PyTorchClassifier(
        tape.eval(), nn.CrossEntropyLoss(), tuple(tape.x.shape[1:]), 10, clip_values=(0, 1), device_type="cpu"
    )
    attack = getattr(evasion, kind)(wrapped, verbose=False, **own)
    for row in range(len(tape.x)):
        tape.row = row
        with contextlib.suppress(Spent):
            attack.generate(tape.x[row : row + 1].numpy(), y=tape.labels[row : row + 1].numpy())


def measured(line: Line, rows: Rows) -> dict[str, Any]:
    """The figures of a line: ours, and of each peer those and the ratio of CPU times."""
    by_decisions = line.access == "labels"
    found = {spec: Measured([], [], []) for spec in (line.attack, *line.peers)}
    missing: dict[str, str] = {}
    for part in (rows.apart if by_decisions else torch.arange(len(rows.x))).tensor_split(PARTS[line.access]):
        for spec in found:
            if spec in missing:
                continue
            try:
                if spec == line.attack:
                    attacked(spec, line, rows, part, found[spec], budgeted=True)
                elif by_decisions:
                    taped(spec, line, rows, part, found[spec])
                else:
                    attacked(f"{spec},access={line.access}", line, rows, part, found[spec], budgeted=False)
            except MissingExtra:
                missing[spec] = "not installed"
            except (AdvkitError, ValueError) as error:
                missing[spec] = str(error).splitlines()[0][:160]
    ours = found[line.attack]
    entry = {"attack": line.attack, "threat": line.threat, "access": line.access, "budget": line.queries}
    entry |= {"ours": ours.summary(by_decisions), "peers": []}
    per_query = ours.seconds / max(1, sum(ours.queries))
    for peer in line.peers:
        if peer in missing:
            entry["peers"].append({"name": peer, "left_out": missing[peer]})
            continue
        theirs = found[peer]
        entry["peers"].append(
            {
                "name": peer,
                **theirs.summary(by_decisions),
                "cpu_ratio": round(theirs.seconds / ours.seconds, 2),
                "cpu_ratio_per_query": round(theirs.seconds / max(1, sum(theirs.queries)) / per_query, 2),
            }
        )
    return entry


HEADS = {
    "scores": (
        "threat model",
        "attack",
        "success",
        "median distance",
        "queries to break, median",
        "queries, mean",
        "CPU",
    ),
    "labels": ("threat model", "budget", "attack", "success", "median distance", "of ours", "queries, mean", "CPU"),
}


def tables(lines: Sequence[dict[str, Any]], access: str) -> str:
    """The tables of the page for attackers with this access, one for each model."""
    out = []
    lines = [line for line in lines if line["access"] == access]
    for model in dict.fromkeys(line["model"] for line in lines):
        out += [f"### `{model}`" + ("" if access == "scores" else ", by decisions"), ""]
        out += [_cells(HEADS[access]), "|---" * len(HEADS[access]) + "|"]
        for line in (line for line in lines if line["model"] == model):
            out.append(_row(line, f"`{line['attack']}`", line["ours"]))
            for peer in line["peers"]:
                package, _, rest = peer["name"].partition(":")
                name = f"{package}: {rest.partition(',')[0]}" + (" (dct)" if "attack=dct" in rest else "")
                out.append(_row(line, name, peer))
        out.append("")
    return "\n".join(out)


def _row(line: dict[str, Any], name: str, figures: dict[str, Any]) -> str:
    by_decisions = line["access"] == "labels"
    first = [line["threat"], *([f"{line['budget']:,}"] if by_decisions else []), name]
    if "left_out" in figures:
        return _cells([*first, figures["left_out"], *[""] * (len(HEADS[line["access"]]) - len(first) - 1)])
    low, high = figures["success_ci"]
    success = f"{100 * figures['success']:.0f} % ({100 * low:.0f}-{100 * high:.0f})"
    if figures["outside_the_ball"]:
        success += f", {figures['outside_the_ball']} outside the ball"
    distance, broke, ours = (
        figures["distance_median"],
        figures["queries_median_broken"],
        line["ours"]["distance_median"],
    )
    if not by_decisions:
        compared = "-" if broke is None else f"{broke:.0f}"
    elif figures is line["ours"]:
        compared = ""
    else:
        compared = "-" if distance is None or ours is None else f"{distance / ours:.3f}"
    ratio = ""
    if "cpu_ratio" in figures:
        ratio = f"{figures['cpu_ratio']:g}x, {figures['cpu_ratio_per_query']:g}x per query"
    shown = "-" if distance is None else f"{distance:.{4 if by_decisions else 3}g}"
    return _cells([*first, success, shown, compared, f"{figures['queries_mean']:.0f}", ratio])


def _cells(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


def written(out: Path, document: dict[str, Any]) -> None:
    """Keep the document and put its tables into the page."""
    (out / "query_attacks.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    page = out / "query_attacks.md"
    if page.exists():
        text = page.read_text(encoding="utf-8")
        for access, (first, last) in MARKS.items():
            before, _, rest = text.partition(first)
            _, _, after = rest.partition(last)
            text = f"{before}{first}\n\n{tables(document['lines'], access)}\n{last}{after}"
        page.write_text(text, encoding="utf-8")


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
    parser.add_argument("--rows", type=int, default=48, help="of each task, at most")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    settings = parser.parse_args()
    torch.set_num_threads(1)
    file = settings.out / "query_attacks.json"
    held = json.loads(file.read_text(encoding="utf-8"))["lines"] if file.exists() else []
    known = {_key(line): line for line in held}
    order = [(each.model, each.attack, each.threat, each.queries) for each in LINES]
    rows: dict[tuple[str, int], Rows] = {}
    for line in LINES:
        if settings.only and not any(text in f"{line.model} {line.attack} {line.threat}" for text in settings.only):
            continue
        many = min(line.rows, settings.rows)
        if (line.model, many) not in rows:
            rows[line.model, many] = Rows(line.model, line.first, many)
        entry = {"model": line.model, "first": line.first, **measured(line, rows[line.model, many])}
        known[_key(entry)] = entry
        print(tables([entry], line.access), flush=True)
        lines = [known[key] for key in (*order, *(key for key in known if key not in order)) if key in known]
        written(settings.out, {"versions": versions(), "lines": lines})


def _key(entry: dict[str, Any]) -> tuple[str, str, str, int]:
    return entry["model"], entry["attack"], entry["threat"], entry["budget"]


if __name__ == "__main__":
    main()
