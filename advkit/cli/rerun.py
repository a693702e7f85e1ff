"""`advkit rerun`: a report's evaluation again, and whether the rows agree."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from advkit.cli.options import BatchSize, Device, Json

if TYPE_CHECKING:
    from advkit.core.protocols import Record

DISAGREES = 3
BESIDE = "beside.jsonl"


def rerun(
    report: Annotated[Path, typer.Argument(help="A report.json, or the run folder it lies in.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the new run.", show_default="REPORT's folder + -rerun")
    ] = None,
    device: Device = "auto",
    batch_size: BatchSize = None,
    as_json: Json = False,
) -> None:
    """Run a report's evaluation again from its own settings and compare the two row by row.

    Exit status: 0 every row ends as it did, 3 some differ (they are listed).
    """
    import json

    from rich.console import Console

    from advkit.cli.evaluate import carry_out
    from advkit.core.errors import ReportError
    from advkit.evaluation.execute import execute
    from advkit.evaluation.plan import Request, plan
    from advkit.evaluation.report import Report
    from advkit.evaluation.run.store import check_folder

    file = report / "report.json" if report.is_dir() else report
    old = Report.load(file)
    try:
        asked = Request.from_report(old.to_dict())
    except ReportError as error:
        raise ReportError(f"{file}: {error}") from None
    home = file.absolute().parent
    records = home / old.to_dict().get("per_sample", {}).get("path", "records.jsonl")
    if not records.is_file():
        raise ReportError(f"{file} has no records beside it ({records.name}): there is nothing to compare a rerun with")
    folder = out if out is not None else home.with_name(f"{home.name}-rerun")
    check_folder(folder)
    beside = (home / BESIDE).is_file()
    resolved = plan(replace(asked, device=device, batch_size=batch_size, beside=beside))
    before, now = old.to_dict()["model"]["state_sha256"], resolved.case.victim.describe().state_sha256
    if before != now:
        raise ReportError(
            f"the model's weights are not those of the report: sha256 {before[:12]}... then, {now[:12]}... now"
        )
    new = execute(resolved, out=folder) if as_json else carry_out(resolved, folder, plots=False, as_json=False)
    then, again = _all_records(records), _all_records(folder / new.to_dict()["per_sample"]["path"])
    differ = sorted(key for key in {*then, *again} if then.get(key) != again.get(key))
    if as_json:
        typer.echo(json.dumps({"rows": len(again), "differ": [list(key[1:]) for key in differ]}, indent=2))
    else:
        console = Console()
        console.print(
            f"{len(again) - len(differ)} of {len(again)} records are identical", highlight=False, markup=False
        )
        for _, attack, row in differ[:20]:
            console.print(f"  differs: {attack} on {row}", highlight=False, markup=False)
    if differ:
        raise typer.Exit(DISAGREES)


def _all_records(file: Path) -> dict[tuple[str, str, str], Record]:
    """A run's records and those of the other side beside them, by file, attack and row."""
    from advkit.evaluation.run.store import read_records

    found = [file, *(other for other in [file.with_name(BESIDE)] if other.is_file())]
    return {
        ("beside" if each.name == BESIDE else "", str(r.made_by), r.id): r for each in found for r in read_records(each)
    }
