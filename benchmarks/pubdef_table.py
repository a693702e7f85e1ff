"""The table of PubDef against adversarial training under transfer from public models, as one command.

    python benchmarks/pubdef_table.py --root FOLDER --seeds 0 1 2 --task fashion-mnist --out FILE.json --workers 2

Three surrogates that the defender knows (two trained normally, one with PGD) and four that it does not (two of each
kind) are trained once. Every row of the table is a target trained per seed and evaluated by the harness under the grid
of seven surrogates times FGSM, PGD-20 and momentum PGD-10, and under white-box PGD-20. Every defended target, PubDef's
and adversarial training's alike, goes on from the seed's undefended one for as many epochs again (PubDef's authors
fine-tune a normally trained model); with --start scratch all begin with random weights. Finished models and evaluations
are kept in a folder beside FILE.json and skipped when the command is given again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from advkit.core.rng import RowRng
from advkit.defenses.adversarial.pgd_at import PGDAT
from advkit.defenses.adversarial.pubdef import PubDef
from advkit.defenses.none import NoDefense
from advkit.evaluation.api import evaluate
from advkit.models import MODELS
from advkit.models.checkpoint import load_checkpoint, save_checkpoint
from advkit.models.torch import TorchModel
from advkit.tasks import TASKS
from advkit.threat_models.lp import Linf
from advkit.threat_models.tapm import Tapm
from advkit.training.loop import Recipe, fit

ATTACKS = ("fgsm", "pgd:steps=20,step_size=0.25", "mifgsm:steps=10")
UNDEFENDED = "undefended"
WHITE_BOX = "pgd:steps=20,step_size=0.25"
FIGURES = {
    "clean": "clean_accuracy",
    "avg": "tapm_acc_avg",
    "best-attack": "tapm_acc_best_attack",
    "per-sample": "tapm_acc_per_sample",
    "best-attack seen": "tapm_acc_best_attack_seen",
    "best-attack unseen": "tapm_acc_best_attack_unseen",
}


@dataclass(frozen=True)
class Protocol:
    """What differs between the tasks."""

    task: str
    eps: float
    steps: int
    target: str
    normal: tuple[str, str, str, str]  # architectures: seen, seen, unseen, unseen
    robust: tuple[str, str, str]  # seen, unseen, unseen
    epochs: int
    rows: int


PROTOCOLS = {
    "fashion-mnist": Protocol(
        task="fashion-mnist:size=14,train=8000,root={root}",
        eps=0.1,
        steps=4,
        target="cnn",
        normal=("cnn", "mlp", "cnn:kernel=5", "mlp"),
        robust=("cnn", "cnn:kernel=5", "mlp"),
        epochs=10,
        rows=1_000,
    ),
    "digits": Protocol(
        task="digits",
        eps=0.2,
        steps=5,
        target="mlp:hidden=64",
        normal=("cnn", "mlp:hidden=64", "cnn:kernel=5", "mlp:hidden=128"),
        robust=("cnn", "cnn:kernel=5", "mlp:hidden=128"),
        epochs=60,
        rows=360,
    ),
}


@dataclass(frozen=True)
class Surrogate:
    """A public model: name, architecture, how it is trained, and whether the defender knows it."""

    name: str
    model: str
    group: str
    seen: bool
    seed: int


def surrogates(protocol: Protocol) -> list[Surrogate]:
    """Three seen, four unseen; each has a seed of its own, so that no two are alike."""
    normal = [(model, "normal", place < 2) for place, model in enumerate(protocol.normal)]
    robust = [(model, "linf", place < 1) for place, model in enumerate(protocol.robust)]
    return [
        Surrogate(
            name=f"{'seen' if seen else 'unseen'}-{model.replace(':', '-').replace('=', '')}-{group}",
            model=model,
            group=group,
            seen=seen,
            seed=1_000 + number,
        )
        for number, (model, group, seen) in enumerate([*normal, *robust])
    ]


class Bench:
    """One task's protocol in a working folder."""

    def __init__(self, name: str, root: str, work: Path, epochs: int | None, start: str) -> None:
        self.start = start
        self.protocol = PROTOCOLS[name]
        self.task = TASKS.build(self.protocol.task.format(root=root))
        self.work = work
        self.recipe = Recipe(epochs=epochs or self.protocol.epochs, validation=0.0, select="last")
        self.models = surrogates(self.protocol)

    def pgd_at(self) -> PGDAT:
        return PGDAT(eps=self.protocol.eps, steps=self.protocol.steps, recipe=self.recipe)

    def train(self, spec: str, defense: Any, seed: int, folder: Path, start: TorchModel | None = None) -> TorchModel:
        """The trained model, from the folder where it was trained before."""
        file = folder / "model.safetensors"
        if not file.exists():
            data = self.task.training()
            rng = RowRng.from_ids(seed, ["training"]).at("train")
            if start is None:
                start = MODELS.build(spec)(tuple(data.x.shape[1:]), data.classes, rng.at("init"), space=data.space)
            done = fit(start, data, defense.objective(), defense.recipe, rng, out=folder, progress=False)
            save_checkpoint(done.model, file)
        return load_checkpoint(file)

    def surrogate(self, number: int) -> TorchModel:
        """The public model of this place in the list."""
        one = self.models[number]
        defense = NoDefense(recipe=self.recipe) if one.group == "normal" else self.pgd_at()
        model = self.train(one.model, defense, one.seed, self.work / "surrogates" / one.name)
        model.name = one.name
        return model

    def defenses(self) -> dict[str, Callable[[], Any]]:
        """The rows of the table."""

        def pubdef(group: str = "", **more: Any) -> Callable[[], PubDef]:
            chosen = [n for n, one in enumerate(self.models) if one.seen and group in ("", one.group)]
            return lambda: PubDef(
                eps=self.protocol.eps,
                sources=tuple(self.surrogate(number) for number in chosen),  # type: ignore[misc]
                copies=2,
                recipe=self.recipe,
                cache=str(self.work / "transfer"),
                **more,
            )

        return {
            UNDEFENDED: lambda: NoDefense(recipe=self.recipe),
            f"PGD-{self.protocol.steps} adversarial training": self.pgd_at,
            "PubDef random": pubdef(),
            "PubDef all": pubdef(loss="all"),
            "PubDef top-1": pubdef(loss="topk", k=1),
            "PubDef dynamic-loss": pubdef(loss="dynamic-loss"),
            "PubDef, normal sources only": pubdef("normal"),
            "PubDef, linf source only": pubdef("linf"),
        }

    def measure(self, model: TorchModel) -> dict[str, dict[str, int]]:
        """Counts behind every figure of a row, from the harness's reports."""
        grid = Tapm(
            eps=self.protocol.eps,
            sources=tuple(self.surrogate(number) for number in range(len(self.models))),  # type: ignore[misc]
            attacks=ATTACKS,
            seen=tuple(one.name for one in self.models if one.seen),
        )
        asked = {"model": model, "task": self.task, "n": self.protocol.rows, "device": "cpu", "beside": False}
        metrics = evaluate(threat_model=grid, **asked).to_dict()["metrics"]
        direct = evaluate(WHITE_BOX, threat_model=Linf(self.protocol.eps), **asked).to_dict()["metrics"]
        found = {name: metrics[key] for name, key in FIGURES.items()} | {"white-box": direct["robust_accuracy"]}
        return {name: {key: rate[key] for key in ("numerator", "denominator")} for name, rate in found.items()}

    def folder(self, row: str, seed: int) -> Path:
        """Where a target's model and figures are kept."""
        name = row if row == UNDEFENDED or self.start == "scratch" else f"{row}, from {UNDEFENDED}"
        return self.work / f"seed{seed}" / hashlib.sha256(name.encode()).hexdigest()[:12]

    def target(self, row: str, seed: int) -> dict[str, Any]:
        """One row's counts at one seed; the seed's undefended row comes first."""
        folder = self.folder(row, seed)
        kept = folder / "figures.json"
        if not kept.exists():
            started = time.perf_counter()
            start = None
            if row != UNDEFENDED and self.start != "scratch":
                start = load_checkpoint(self.folder(UNDEFENDED, seed) / "model.safetensors")
            model = self.train(self.protocol.target, self.defenses()[row](), seed, folder, start)
            trained = time.perf_counter()
            counts = self.measure(model)
            seconds = {"training": trained - started, "evaluation": time.perf_counter() - trained}
            text = json.dumps({"row": row, "seed": seed, "counts": counts, "seconds": seconds})
            part = kept.with_suffix(".part")
            part.write_text(text, encoding="utf-8")
            os.replace(part, kept)
        found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return found


def value(counts: dict[str, int]) -> float:
    return counts["numerator"] / counts["denominator"]


def mean(values: Iterable[float]) -> float:
    held = list(values)
    return sum(held) / len(held)


def summary(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Means over the seeds, by row and figure."""
    rows = dict.fromkeys(one["row"] for one in results)
    return {
        row: {
            figure: mean(value(one["counts"][figure]) for one in results if one["row"] == row)
            for figure in (*FIGURES, "white-box")
        }
        for row in rows
    }


def acceptance(means: dict[str, dict[str, float]], trained: str) -> dict[str, dict[str, Any]]:
    """What the protocol asks of PubDef random: difference or figure, bound, and whether it holds."""
    pubdef, undefended, robust = means["PubDef random"], means[UNDEFENDED], means[trained]
    asked = {
        "clean, PubDef - PGD-AT": (pubdef["clean"] - robust["clean"], ">=", 0.05),
        "best-attack, PubDef - PGD-AT": (pubdef["best-attack"] - robust["best-attack"], ">=", 0.03),
        "clean, undefended - PubDef": (undefended["clean"] - pubdef["clean"], "<=", 0.06),
        "white-box, PubDef": (pubdef["white-box"], "<", 0.15),
    }
    holds = {">=": lambda a, b: a >= b, "<=": lambda a, b: a <= b, "<": lambda a, b: a < b}
    return {
        name: {"value": found, "asked": f"{sign} {bound}", "holds": holds[sign](found, bound)}
        for name, (found, sign, bound) in asked.items()
    }


def markdown(title: str, means: dict[str, dict[str, float]], checks: dict[str, dict[str, Any]]) -> str:
    """The table as people read it."""
    figures = [*FIGURES, "white-box"]
    lines = [f"| {title} | {' | '.join(figures)} |", "|---" * (len(figures) + 1) + "|"]
    lines += [f"| {row} | {' | '.join(f'{found[one]:.3f}' for one in figures)} |" for row, found in means.items()]
    lines += ["", "| asked on Fashion-MNIST | value | bound | holds |", "|---|---|---|---|"]
    lines += [
        f"| {k} | {c['value']:+.3f} | {c['asked']} | {'yes' if c['holds'] else 'no'} |" for k, c in checks.items()
    ]
    return "\n".join(lines)


def _surrogate(arguments: tuple[Any, ...], number: int) -> str:
    torch.set_num_threads(1)
    return Bench(*arguments).surrogate(number).name


def _target(arguments: tuple[Any, ...], row: str, seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    return Bench(*arguments).target(row, seed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=tuple(PROTOCOLS), default="fashion-mnist")
    parser.add_argument("--root", default="", help="folder with the Fashion-MNIST files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write; FILE-work keeps what was finished")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=None, help="instead of the protocol's")
    parser.add_argument("--start", choices=("undefended", "scratch"), default="undefended")
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")

    arguments = (given.task, given.root, given.out.with_name(f"{given.out.stem}-work"), given.epochs, given.start)
    bench = Bench(*arguments)
    results: list[dict[str, Any]] = []
    with ProcessPoolExecutor(given.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(_surrogate, arguments, n) for n in range(len(bench.models))]):
            print(f"surrogate {done.result()}", file=sys.stderr, flush=True)
        # Undefended targets first, the others start there; then one PubDef target, which makes the stored images.
        jobs = [(row, seed) for seed in given.seeds for row in bench.defenses()]
        stages = [
            [job for job in jobs if job[0] == UNDEFENDED],
            [("PubDef random", given.seeds[0])],
        ]
        stages.append([job for job in jobs if job not in [*stages[0], *stages[1]]])
        for stage in stages:
            for done in as_completed([pool.submit(_target, arguments, *job) for job in stage]):
                results.append(done.result())
                print(f"{results[-1]['row']}, seed {results[-1]['seed']}", file=sys.stderr, flush=True)
    order = list(bench.defenses())
    results.sort(key=lambda one: (order.index(one["row"]), one["seed"]))
    means = summary(results)
    checks = acceptance(means, order[1])
    document = {
        "task": bench.protocol.task.format(root="FOLDER"),
        "task_sha256": bench.task.digest(),
        "eps": bench.protocol.eps,
        "epochs": bench.recipe.epochs,
        "attacks": list(ATTACKS),
        "surrogates": [vars(one) for one in bench.models],
        "start": given.start,
        "seeds": given.seeds,
        "results": results,
        "mean": means,
        "acceptance": checks,
        "torch": torch.__version__,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(markdown(f"{given.task}, eps {bench.protocol.eps}, seeds {' '.join(map(str, given.seeds))}", means, checks))
    return 0


if __name__ == "__main__":
    sys.exit(main())
