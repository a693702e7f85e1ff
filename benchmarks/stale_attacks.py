"""ConAdv with large batches: what old weights in the attack cost, as one JSON file.

    python benchmarks/stale_attacks.py --root FOLDER --seeds 0 1 2 --out FILE.json

Fashion-MNIST 14x14, the first 10,000 training images in batches of 2,000 (five steps per epoch), 25 epochs, a CNN
without batch normalisation, SGD with momentum 0.9, a learning rate that rises to 0.3 over the first fifth of the
steps and falls to zero linearly; one sign step of Linf 0.03, half of the weight each on clean and adversarial images.
Rows: plain training, and tau = 0 (the sequential method), 1, 2, 4. The harness evaluates the first 2,000 test images,
clean and under PGD-10 at 0.03. The cosine of old and present input gradients is measured at every step; the table has
its mean over the first sixth and the last quarter of the epochs. `--task digits` repeats it on the embedded digits:
an MLP, batches of 480 (three steps per epoch), 40 epochs, Linf 0.1, a learning rate that rises until half time.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from advkit.core.files import write_whole
from advkit.core.provenance import commit_text
from advkit.core.rng import RowRng
from advkit.defenses import DEFENSES
from advkit.evaluation.api import evaluate
from advkit.models import MODELS
from advkit.tasks import TASKS
from advkit.training.loop import fit

ROWS = ("none", "tau=0", "tau=1", "tau=2", "tau=4")


@dataclass(frozen=True)
class Protocol:
    """What is trained, and how."""

    task: str
    model: str
    batch_size: int
    epochs: int
    eps: float
    schedule: str


PROTOCOLS = {
    "fashion-mnist": Protocol(
        "fashion-mnist:size=14,train=10000,test=2000,root={root}", "cnn", 2_000, 25, 0.03, "linear,warmup=0.2"
    ),
    "digits": Protocol("digits", "mlp:hidden=64", 480, 40, 0.1, "onecycle"),
}


def played(name: str, root: str, row: str, seed: int, rate: float) -> dict[str, Any]:
    """One model, trained and evaluated."""
    asked = PROTOCOLS[name]
    task: Any = TASKS.build(asked.task.format(root=root))
    recipe = (
        f"epochs={asked.epochs},batch_size={asked.batch_size},optimizer=sgd,lr={rate},schedule={asked.schedule},"
        "validation=0,select=last"
    )
    method = "none" if row == "none" else f"conadv:eps={asked.eps},{row},watch=1"
    defense: Any = DEFENSES.build(f"{method}{',' if ':' in method else ':'}recipe=[{recipe}]")
    rng = RowRng.from_ids(seed, ["training"]).at("train")
    start = MODELS.build(asked.model)(task.shape, task.classes, rng.at("init"), space=task.space)
    done = fit(start, task.training(), defense.objective(), defense.recipe, rng, progress=False)
    report = evaluate(
        "pgd:steps=10,step_size=0.25", task=task, model=done.last, threat_model=f"linf:eps={asked.eps}", n=len(task),
        device="cpu", beside=False,
    )  # fmt: skip
    cosines = [each.figures["stale_cosine"] for each in done.log if "stale_cosine" in each.figures]
    last = cosines[-(-3 * len(cosines) // 4) :]
    first = cosines[: max(1, len(cosines) // 6)]
    metrics = report.to_dict()["metrics"]
    return {
        "row": row,
        "seed": seed,
        "commit": commit_text("advkit", "benchmarks"),
        "clean": metrics["clean_accuracy"]["value"],
        "pgd": metrics["robust_accuracy"]["value"],
        "cosine_first_sixth": sum(first) / len(first) if cosines else None,
        "cosine_last_quarter": sum(last) / len(last) if cosines else None,
    }


def main() -> None:
    """Play what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=PROTOCOLS, default="fashion-mnist")
    parser.add_argument("--root", default="", help="folder of the Fashion-MNIST files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr", type=float, default=0.3, help="peak of the learning rate")
    parser.add_argument("--rows", nargs="+", default=list(ROWS))
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    runs = json.loads(asked.out.read_text())["runs"] if asked.out.is_file() else []
    for seed in asked.seeds:
        for row in asked.rows:
            if not any((each["row"], each["seed"]) == (row, seed) for each in runs):
                runs.append(played(asked.task, asked.root, row, seed, asked.lr))
                write(asked.out, asked.task, runs, asked.lr)
    print("| | clean | PGD-10 | cosine, first sixth | cosine, last quarter |")
    print("|---|---|---|---|---|")
    for row in dict.fromkeys(each["row"] for each in runs):
        own = [each for each in runs if each["row"] == row]

        def mean(key: str, own: list[dict[str, Any]] = own) -> str:
            values = [each[key] for each in own if each[key] is not None]
            return f"{sum(values) / len(values):.3f}" if values else ""

        keys = ("clean", "pgd", "cosine_first_sixth", "cosine_last_quarter")
        print(f"| {row} | {' | '.join(map(mean, keys))} |")


def write(out: Path, task: str, runs: list[dict[str, Any]], rate: float) -> None:
    """The file, whole after every run."""
    asked = PROTOCOLS[task]
    settings = {**asdict(asked), "task": asked.task.format(root="FOLDER"), "lr": rate}
    commits = list(dict.fromkeys(each["commit"] for each in runs))
    write_whole(out, json.dumps({"commits": commits, "settings": settings, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
