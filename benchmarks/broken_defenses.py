"""What plain PGD, AutoAttack's reference and advkit say of defenses that are known to be broken.

    python benchmarks/broken_defenses.py [--n 100] [--model zoo:fashion-mnist-cnn-pgd_at] [--out FILE.md]

Every wrapper of `advkit.testing.broken` goes around the same adversarially trained model, whose own robust accuracy is
the yardstick: an evaluation that reports much more was fooled. Reference: the package pyautoattack, standard version.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

from advkit.evaluation.api import evaluate
from advkit.evaluation.inputs import task_of
from advkit.evaluation.victims import ready
from advkit.models.torch import TorchModel
from advkit.testing.broken import BROKEN


def reference(module: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, eps: float) -> float | None:
    """Robust accuracy by the reference, judged by the argmax of one forward; None where it breaks down."""
    from pyautoattack import AutoAttack

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            adversary = AutoAttack(module, norm="Linf", eps=eps, version="standard", seed=0)
            found, _ = adversary.run_standard_evaluation(x, y, batch_size=len(x))
        except (RuntimeError, ValueError, IndexError, AssertionError) as error:
            logging.warning("the reference broke down: %s", error)
            return None
        with torch.no_grad():
            return float(((module(found).argmax(1) == y) & (module(x).argmax(1) == y)).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--model", default="zoo:fashion-mnist-cnn-pgd_at")
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--victims", nargs="*", default=[], help="some of the victims (default: all)")
    parser.add_argument("--out", default="")
    given = parser.parse_args()
    torch.set_num_threads(1)
    task = task_of("fashion-mnist")
    inner = ready(given.model, task).module
    batch = next(iter(task.batches(given.n, n=given.n)))
    lines = [
        "| victim | clean | PGD-20 | reference | advkit `thorough` | at most | flags |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, wrap in {"(none)": lambda module: module, **BROKEN}.items():
        if given.victims and name not in given.victims:
            continue
        module = wrap(inner).eval()
        model = TorchModel(module, space=task.space, classes=task.classes, name=name)
        common = {"task": task, "model": model, "threat_model": f"linf:eps={given.eps}", "n": given.n, "device": "cpu"}
        plain = evaluate("pgd:steps=20", **common)
        ours = evaluate("thorough", **common)
        upper = ours.metrics.get("robust_accuracy_upper", ours.metrics["robust_accuracy"])["value"]
        flags = sorted({flag["id"] for flag in ours.flags if flag["severity"] != "info"})
        theirs = reference(module, batch.x, batch.labels, given.eps)
        lines.append(
            f"| {name} | {ours.clean_accuracy:.3f} | {plain.robust_accuracy:.3f} | "
            f"{'breaks down' if theirs is None else f'{theirs:.3f}'} | {ours.robust_accuracy:.3f} | {upper:.3f} | "
            f"{', '.join(flags) or 'none'} |"
        )
        print(lines[-1], flush=True)
    table = "\n".join(lines)
    if given.out:
        Path(given.out).write_text(table + "\n", encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
