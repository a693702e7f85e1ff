"""`advkit train`: a model under a defense, saved with all it takes to make it again."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from advkit.cli.options import Device, Json, Seed

GRACE = 3.0
"""Seconds that a process waits before it leaves without a word: torchrun ends all others when one has left, and the one
that says why must be able to."""


def train(
    out: Annotated[Path, typer.Option(help="Folder of the run; resumed when it holds the same training.")],
    defense: Annotated[
        str | None,
        typer.Option(
            help="Training defense, e.g. none, pgd_at:eps=0.1, trades, aaer, pubdef.",
            show_default="the recipe's, else none",
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="Task, e.g. fashion-mnist, digits, folder:path=DIR.", show_default="the recipe's, else digits"
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model: an architecture (cnn), timm:NAME, path:FILE, ...", show_default="the recipe's, else the task's"
        ),
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(
            help="How to train: key=value,... (epochs=30,lr=0.1), FILE.yaml or a name of `advkit list recipes`, "
            "either with ,key=value... after it."
        ),
    ] = "",
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Train a model under a defense and save the checkpoint as OUT/model.safetensors.

    Every run has a report, OUT/training.json, and its curves in OUT/plots/training.png: loss, validation score, clean
    accuracy, learning rate, and the detector of catastrophic overfitting where the defense has one.

    A recipe that is a file or a name may say defense, task and model, too; what the command line says goes first.

    Killed and started again, it goes on from the last finished epoch and ends with the same weights.

    On several processes: torchrun --nproc-per-node N -m advkit train ...
    """
    import json

    from rich.console import Console

    from advkit.core.errors import EndedElsewhere
    from advkit.evaluation.run.store import check_folder
    from advkit.evaluation.victims import train_victim
    from advkit.training.ranks import joined

    try:
        with joined() as ranks:
            with ranks.agreed():
                check_folder(out)
            done = train_victim(
                model,
                defense,
                task,
                recipe=recipe,
                seed=seed,
                device=device,
                out=out,
                progress=False if as_json else None,
            )
    except EndedElsewhere as ended:
        time.sleep(GRACE)
        raise typer.Exit(ended.exit_code) from ended
    if not ranks.first:
        return
    if as_json:
        typer.echo(json.dumps(done, indent=2))
        return
    console = Console()
    if "solved" in done:
        for line in (
            f"trained {done['model']} under {done['defense']} on {done['task']}: {done['solved']['summary']}",
            f"report: {done['report']}",
            f"checkpoint: {done['file']}",
            f"evaluate it: {done['evaluate']}",
        ):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
        return
    console.print(
        f"trained {done['model']} under {done['defense']} on {done['task']}: {done['epochs']} epochs, "
        + ("" if done["score"] is None else f"{_score(done)}, ")
        + f"weights of epoch {done['best_epoch']}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    if done["halted"]:
        console.print(f"stopped: {done['halted']}", soft_wrap=True, highlight=False, markup=False)
    if spent := done.get("queries"):
        retried = f", {spent['retried']:,} requests were sent again" if spent["retried"] else ""
        console.print(f"queries of the model: {spent['answered']:,}{retried}", soft_wrap=True, highlight=False)
    console.print(f"report: {done['report']}, {done['curves']}", soft_wrap=True, highlight=False, markup=False)
    console.print(f"checkpoint: {done['file']}", soft_wrap=True, highlight=False, markup=False)
    console.print(
        f"evaluate it: {done['evaluate']}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )


def _score(done: Mapping[str, Any]) -> str:
    """The validation score of the weights kept, as a line says it; of reconstructed samples it is no rate."""
    if done.get("scores") == "samples":
        return f"validation score {done['score']:.4f} (1 minus the root mean squared error)"
    return f"validation score {100 * done['score']:.1f} %"
