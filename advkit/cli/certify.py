"""`advkit certify`: certificates of a smoothed model, from names to a report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from advkit.cli.options import Asked, Format, Json, Workers, takes_request


@takes_request("attack", "defense", "threat_model", "goal", "speed", "batch_size", "budget")
def certify(
    asked: Asked,
    defense: Annotated[
        str, typer.Option(help="Defense that smooths, e.g. smoothing:sigma=0.5 or smoothing:noise=lattice.")
    ] = "smoothing",
    threat_model: Annotated[
        str, typer.Option(help="Draws, confidence and radii: certified:n0=100,n=10000,alpha=0.001,radii=0+0.25+0.5.")
    ] = "certified",
    workers: Workers = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder; resumed when it holds the same case.", show_default="runs/DIGEST"),
    ] = None,
    plots: Annotated[bool, typer.Option(help="Draw plots into the run folder.")] = True,
    form: Format = "png",
    verbose: Annotated[bool, typer.Option("--verbose", help="Print every metric and finding with advice.")] = False,
    as_json: Json = False,
) -> None:
    """Prove for every sample an L2 radius within which no attacker changes a smoothed model's answer.

    The same as `advkit evaluate --threat-model certified` without an attack; --n counts samples. `advkit evaluate` with
    an attack evaluates that beside the certificates.

    Exit status: 0 done, 2 a mistake in the request, 3 the run has errors or flags that make the number untrustworthy.
    """
    from advkit.cli.evaluate import UNTRUSTWORTHY, carry_out, untrustworthy
    from advkit.evaluation.figures import check_format
    from advkit.evaluation.plan import NO_ATTACK, Request, plan
    from advkit.evaluation.run.store import check_folder

    check_format(form)
    check_folder(out if out is not None else Path("runs"))
    request = Request(attack=NO_ATTACK, defense=defense, threat_model=threat_model, **asked)
    resolved = plan(request, progress=sys.stderr.isatty())
    folder = out if out is not None else Path("runs") / resolved.digest()[:16]
    report = carry_out(resolved, folder, plots=plots, as_json=as_json, workers=workers, verbose=verbose, form=form)
    if untrustworthy(report):
        raise typer.Exit(UNTRUSTWORTHY)
