"""Adversarial examples of a case as files: safetensors with the harness's verdicts, and PNGs to look at."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from advkit.core.errors import UsageError
from advkit.core.protocols import OfFiles, Outcome
from advkit.core.state import plainly
from advkit.evaluation.counts import count
from advkit.evaluation.execute import Watch, check_inputs_change, in_order, preflight, run
from advkit.evaluation.figures.pictures import strip
from advkit.evaluation.figures.plots import save as save_figure
from advkit.evaluation.report import write_atomic
from advkit.evaluation.run.case import Case, space_range
from advkit.evaluation.run.engine import open_store
from advkit.evaluation.run.examples import all_examples
from advkit.evaluation.run.store import Store
from advkit.evaluation.scenarios import scenario_of


@plainly
def export(case: Case, folder: Path, *, png: int = 16, watch: Watch | None = None) -> dict[str, Any]:
    """Attack a case and write examples.safetensors, records.jsonl, and PNG files of the first broken rows.

    Returns what was written, as JSON values. Raises UsageError for a grid, whose every cell has examples of its own,
    and for flips of labels, which leave inputs as they are.
    """
    check_inputs_change(case)
    if len(scenario_of(case).cells(case)) != 1:
        raise UsageError("a grid has examples for every cell: name one with --threat-model transfer:sources=zoo:NAME")
    case = replace(case, keep=case.n)
    preflight(case)
    if isinstance(case.task, OfFiles):
        case.task.look(case.n)
    store = open_store(case, folder)
    try:
        watcher = None if watch is None else (lambda new, total: watch("records", case, new, total))
        records = in_order(case, run(case, store, watcher))
        store.settle()
    finally:
        store.close()
    held = all_examples(folder, records)
    pairs = [held[Store.key(r.made_by, r.id)] for r in records]
    file = folder / "examples.safetensors"
    content = save(
        {
            "origin": torch.stack([a for a, _ in pairs]).contiguous(),
            "adversarial": torch.stack([b for _, b in pairs]).contiguous(),
            "broken": torch.tensor([r.outcome == Outcome.BROKEN for r in records]),
            "label": torch.tensor([-1 if r.label is None else r.label for r in records]),
        },
        metadata={"case": case.digest(), "attack": str(case.label)},
    )
    write_atomic(file, content)
    pictures = _pngs(records, pairs, folder / "png", png, space_range(case.task.space)) if png else 0
    figure = strip(case, folder, title=f"Examples, {case.label}")
    if figure is not None:
        save_figure(figure, folder / "examples.png")
    c = count(records)
    return {
        "file": str(file),
        "rows": len(records),
        "broken": c.broken,
        "contested": c.attackable,
        "pictures": str(folder / "png") if pictures else "",
        "case_sha256": case.digest(),
    }


def _pngs(records: Any, pairs: Any, folder: Path, most: int, bounds: tuple[float | None, float | None]) -> int:
    """8-bit files of the first broken rows, as the attacker would hand them in; returns how many."""
    from torchvision.io import encode_png

    low, high = bounds
    if low is None or high is None or pairs[0][0].ndim != 3 or pairs[0][0].shape[0] not in (1, 3):
        return 0
    chosen = [(r, b) for r, (_, b) in zip(records, pairs, strict=True) if r.outcome == Outcome.BROKEN][:most]
    for record, image in chosen:
        levels = ((image - low) / (high - low) * 255).round().clamp(0, 255).to(dtype=torch.uint8)
        png = bytes(encode_png(levels.cpu()).numpy())
        write_atomic(folder / f"{record.id.replace('/', '_')}.png", png)
    return len(chosen)
