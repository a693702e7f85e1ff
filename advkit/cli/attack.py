"""`advkit attack`: export adversarial examples as safetensors, with PNGs to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from advkit.cli.options import Asked, Json, takes_request


@takes_request()
def attack(
    asked: Asked,
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    png: Annotated[int, typer.Option(help="How many images to draw as PNG, too.")] = 16,
    as_json: Json = False,
) -> None:
    """Export adversarial examples as safetensors and PNG, each with the harness's own verdict.

    examples.safetensors holds `origin` and `adversarial` [n, ...] in the task's order and `broken` [n];
    records.jsonl beside it holds the verdicts.
    """
    import json

    from rich.console import Console

    from advkit.evaluation.api import resolve
    from advkit.evaluation.export import export
    from advkit.evaluation.progress import Bars
    from advkit.evaluation.run.store import check_folder

    check_folder(out)
    case = resolve(**asked)
    with Bars(False if as_json else None):
        written = export(case, out, png=png)
    if as_json:
        typer.echo(json.dumps(written, indent=2))
        return
    console = Console()
    console.print(
        f"{written['broken']} of {written['contested']} rows broken, {written['rows']} exported to {written['file']}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    if written["pictures"]:
        console.print(f"pictures: {written['pictures']}", soft_wrap=True, highlight=False, markup=False)
