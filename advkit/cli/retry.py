"""`advkit retry`: the samples of a run that ended in an error, once more, and those alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from advkit.cli.options import Json


def retry(
    run: Annotated[Path, typer.Argument(help="A run folder with its report.json.")],
    trust: Annotated[
        bool,
        typer.Option("--trust", help="Load what the report names beyond advkit's own parts (python:, hf:, path:...)."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Run a run's samples that ended in an error, or met an answer of NaN, again; all others keep their records.

    What was in the folder is put aside as records.retried.

    Exit status: 0 no sample is undecided now, 2 nothing was run, 3 some still are.
    """
    import json
    from dataclasses import replace

    from advkit.cli.rerun import refuse_objects, refuse_outside
    from advkit.core.errors import ReportError
    from advkit.core.protocols import Outcome
    from advkit.evaluation.execute import execute, preflight
    from advkit.evaluation.plan import Request, plan
    from advkit.evaluation.report import Report
    from advkit.evaluation.run.engine import open_store
    from advkit.evaluation.run.store import RECORDS_NAME, beside_files, check_folder, take_out
    from advkit.evaluation.scenarios import scenario_of

    report = Report.load(run)
    folder = run if run.is_dir() else run.parent
    data = report.to_dict()
    asked = Request.from_report(data)
    if not (folder / RECORDS_NAME).is_file():
        raise ReportError(f"{folder} has no {RECORDS_NAME}: there is no sample to run again")
    check_folder(folder)
    if not trust:
        refuse_outside(folder, asked)
    refuse_objects(folder, asked)
    beside = beside_files(folder / RECORDS_NAME)
    resolved = plan(replace(asked, beside=bool(beside)), progress=sys.stderr.isatty())
    preflight(resolved.case)
    # Opened once before anything is taken out: the records have to be of this very case.
    case = replace(resolved.case, randomized=resolved.case.randomized or data["defense"]["is_randomized"])
    open_store(case, folder, scenario=scenario_of(case)).close()
    again = sum(
        take_out(folder, file.stem, (Outcome.ERROR, Outcome.NON_FINITE)) for file in (folder / RECORDS_NAME, *beside)
    )
    new = execute(resolved, out=folder, command=str(data["reproducibility"]["command"])) if again else report
    if as_json:
        typer.echo(json.dumps({"again": again, "undecided": new.undecided}))
    else:
        typer.echo(f"{again} records were made again, {new.undecided} samples are undecided")
    if new.undecided:
        raise typer.Exit(3)
