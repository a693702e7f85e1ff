"""`advkit rerun`: a report's evaluation again, and whether the rows agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from advkit.cli.options import BatchSize, Device, Json

if TYPE_CHECKING:
    from advkit.core.protocols import Record
    from advkit.evaluation.plan import Request
    from advkit.evaluation.report import Report

DISAGREES = 3


def rerun(
    report: Annotated[Path, typer.Argument(help="A report.json, or the run folder it lies in.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the new run.", show_default="REPORT's folder + -rerun")
    ] = None,
    trust: Annotated[
        bool,
        typer.Option(
            "--trust",
            help="Load what the report names beyond advkit's own parts (python:, hf:, timm:, path:...), and run it "
            "also where it does not agree with its records.",
        ),
    ] = False,
    device: Device = "auto",
    batch_size: BatchSize = None,
    as_json: Json = False,
) -> None:
    """Run a report's evaluation again from its own settings and compare the two row by row.

    Before anything runs, the report is held against the records beside it, and what it would load is looked through.

    Exit status: 0 every row ends as it did, 2 the report was not run, 3 some rows differ (they are listed), or the
    report does not agree with its records.
    """
    import json

    from rich.console import Console

    from advkit.cli.evaluate import carry_out
    from advkit.core.errors import ReportError
    from advkit.core.text import printable
    from advkit.evaluation.execute import execute
    from advkit.evaluation.plan import Request, plan
    from advkit.evaluation.report import Report
    from advkit.evaluation.report.verify import records_file, verify
    from advkit.evaluation.run.store import beside_files, check_folder

    file = report / "report.json" if report.is_dir() else report
    old = Report.load(file)
    try:
        asked = Request.from_report(old.to_dict())
        records = records_file(old)
    except ReportError as error:
        raise ReportError(f"{file}: {error}") from None
    if records is None:
        raise ReportError(f"{file} has no records beside it: there is nothing to compare a rerun with")
    home = file.absolute().parent
    folder = out if out is not None else home.with_name(f"{home.name}-rerun")
    check_folder(folder)
    if not trust:
        refuse_outside(file, asked)
    faults = verify(old).faults
    if faults and not trust:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise ReportError(
            f"{file} does not agree with what lies beside it: {faults[0]}{more}; it was edited, damaged or belongs to "
            "another run. --trust runs it all the same"
        )
    for fault in faults:
        typer.echo(printable(f"not verified: {fault}"), err=True)
    beside = bool(beside_files(records))
    refuse_objects(file, asked)
    _check_data(asked, old)
    resolved = plan(replace(asked, device=device, batch_size=batch_size, beside=beside))
    before, now = old.to_dict()["model"]["state_sha256"], resolved.case.victim.describe().state_sha256
    if before != now:
        raise ReportError(
            f"the model's weights are not those of the report: sha256 {before[:12]}... then, {now[:12]}... now"
        )
    _check_case(records, resolved.case.config())
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
            console.print(printable(f"  differs: {attack} on {row}"), highlight=False, markup=False)
    if differ or faults:
        raise typer.Exit(DISAGREES)


def refuse_outside(file: Path, asked: Request) -> None:
    """Raise UsageError where the report names what advkit would have to load from elsewhere; nothing is imported."""
    from advkit.core.errors import UsageError
    from advkit.core.registry import outside
    from advkit.evaluation.plan import PARTS

    found = [f"{name}={each}" for name in PARTS for each in outside(getattr(asked, name))]
    if found:
        raise UsageError(
            f"{file} would load what is not advkit's own: {'; '.join(found)}. A report may come from anybody: where "
            "you trust these, run it with --trust"
        )


def refuse_objects(file: Path, asked: Request) -> None:
    """Raise ReportError where a part of the report has no name by which it can be made again."""
    from advkit.core.errors import ReportError
    from advkit.evaluation.plan import NO_ATTACK, NO_MODEL, registries

    for name, registry in registries().items():
        spec = getattr(asked, name)
        if (name, spec) in (("attack", NO_ATTACK), ("model", NO_MODEL)):
            continue
        if not registry.names_part(spec):
            raise ReportError(
                f"{file}: {name}={spec} is no name that can be run again here: an object that was handed over in "
                "Python has none (python:MODULE:NAME has), and a part of another package needs that package"
            )


def _check_data(asked: Request, old: Report) -> None:
    """Raise ReportError where the data are others than the report's, before a model is loaded or trained."""
    from advkit.core.errors import ReportError
    from advkit.core.protocols import Bindable
    from advkit.evaluation.plan import task_of_request

    task = task_of_request(asked)
    if isinstance(task, Bindable):  # its samples wait for a model's space
        return
    then, now = old.to_dict()["dataset"]["sha256"], task.digest()
    if then != now:
        raise ReportError(f"the data are not those of the report: sha256 {then[:12]}... then, {now[:12]}... now")


def _check_case(records: Path, now: Mapping[str, Any]) -> None:
    """Raise ReportError where the request resolves to another case than the one the records belong to."""
    from advkit.core.errors import ReportError
    from advkit.core.strict_json import read_object

    file = records.with_name(f"{records.stem}.case.json")
    if not file.is_file():
        return
    try:
        then = read_object(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ReportError(f"{file} is no case ({error}): remove it, and the records are compared without it") from None
    # How often a randomised victim is asked is found out during the run.
    differ = [name for name in now if name in then and name != "draws" and then[name] != now[name]]
    if differ:
        raise ReportError(
            f"the report's request is another case than its records ({', '.join(sorted(differ))} differ): it was made "
            "by another version of advkit or of its parts, or was edited"
        )


def _all_records(file: Path) -> dict[tuple[str, str, str], Record]:
    """A run's records and those of the other side beside them, by file, attack and row."""
    from advkit.evaluation.run.store import beside_files, read_records

    found = {"": file, **{each.stem: each for each in beside_files(file)}}
    return {(name, str(r.made_by), r.id): r for name, each in found.items() for r in read_records(each)}
