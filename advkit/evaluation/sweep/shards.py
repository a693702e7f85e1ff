"""Large cells cut by samples, and put together again.

The records of all shards go, in their order, into the store of the whole: its report is then made of records, like that
of any run, and holds what `Report.merge`, which has two summaries alone, must leave out.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import replace
from itertools import groupby, pairwise
from math import ceil
from pathlib import Path

from advkit.core.errors import RunInUse, StaleRun
from advkit.core.files import check_unclaimed
from advkit.evaluation.execute import first_look, preflight
from advkit.evaluation.plan import Plan, Request, plan
from advkit.evaluation.report.document import REPORT_NAME
from advkit.evaluation.run.engine import open_store
from advkit.evaluation.run.scenario import RowsApart

MOST_PASSES = 1e6
"""Of a line; a cell that costs more is cut where its rows do not depend on one another."""
LEAST_ROWS = 64


def cut(n: int, passes: float, rows: int | None = None) -> list[str]:
    """START:STOP of the shards of n rows that cost so many passes together; fewer than two: not cut.

    rows: of a shard; None takes as many as cost `MOST_PASSES`, 64 at least
    """
    each = rows if rows is not None else max(LEAST_ROWS, int(MOST_PASSES * n / max(passes, 1.0)))
    if each >= n:
        return []
    parts = ceil(n / each)
    places = [round(part * n / parts) for part in range(parts + 1)]
    return [f"{first}:{last}" for first, last in pairwise(places)]


def apart(request: Request) -> bool:
    """Whether each row of an evaluation ends as it does whatever the others are; finds or trains its victim."""
    resolved = plan(replace(request, beside=False))
    case, scenario = resolved.case, resolved.scenario
    if not isinstance(scenario, RowsApart) or not scenario.rows_apart(case):
        return False
    preflight(case)
    return scenario.rows_apart(replace(case, randomized=first_look(case)[1]))


def folder_of(rows: str) -> str:
    """Of a shard, within the run folder of the whole."""
    return f"rows-{rows.replace(':', '-')}"


def remove_shards(folder: Path) -> None:
    """Remove the shards in the run folder of a finished whole, also those that another cut has left there.

    The whole has their records: who counted both would count samples twice.
    """
    for place in folder.glob("rows-*-*"):
        with suppress(RunInUse):  # a task of an earlier sweep that is still at it
            check_unclaimed(place)
            shutil.rmtree(place, ignore_errors=True)


def take_over(resolved: Plan, folder: Path, shards: Sequence[tuple[Path, str | None]]) -> None:
    """Put the records of finished shards into a run's folder, in their order.

    Raises StaleRun where a shard is of another case.
    """
    if not shards:
        return
    case, scenario = resolved.case, resolved.scenario
    with closing(open_store(case, folder, scenario=scenario)) as whole:
        for place, rows in shards:
            if not (place / REPORT_NAME).exists():
                raise StaleRun(f"the shard {place} is not finished: run its line first")
            part = replace(case, places=Request(rows=rows).places)
            with closing(open_store(part, place, scenario=scenario)) as store:
                seconds, tokens = store.seconds(), store.tokens()
                for label, group in groupby(store, key=lambda record: record.made_by):
                    records = [each for each in group if whole.key(label, each.id) not in whole]
                    if records:
                        name = str(label)
                        whole.append(records, seconds.pop(name, 0.0), tokens=tokens.pop(name, 0))
            examples = place / f"{whole.name}.examples"
            if examples.is_dir():
                shutil.copytree(examples, folder / examples.name, dirs_exist_ok=True)
