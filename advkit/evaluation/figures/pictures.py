"""Pictures of a run folder, and exported adversarial examples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from advkit.core.errors import UsageError
from advkit.core.protocols import Outcome
from advkit.evaluation.report.summary import count, space_range
from advkit.evaluation.run.store import Store, read_examples, read_records

if TYPE_CHECKING:
    from advkit.evaluation.api import Plan, Watch
    from advkit.evaluation.report.document import Report
    from advkit.evaluation.run.case import Case

SHOWN = 10


def draw(resolved: Plan, folder: Path, report: Report) -> list[Path]:
    """Per-class bars, success by distance, transfer grid and a strip of broken examples into FOLDER/plots.

    As far as the run has them.
    """
    from advkit.evaluation.figures import write_plots
    from advkit.evaluation.figures.plots import save

    made = write_plots(folder, resolved.case.task.class_names())
    figure = strip(resolved.case, folder, title=f"Broken examples, {report.threat}")
    if figure is not None:
        made.append(save(figure, folder / "plots" / "examples.png"))
    return made


def strip(case: Case, folder: Path, title: str = "") -> Any:
    """Clean, adversarial and difference of the first broken rows kept in a run folder; None where there are none."""
    import torch

    from advkit.evaluation.figures.plots import example_grid

    held = read_examples(folder)
    broken = [
        r
        for r in read_records(folder / "records.jsonl")
        if r.outcome == Outcome.BROKEN and Store.key(r.attack, r.id) in held
    ][:SHOWN]
    images = [held[Store.key(r.attack, r.id)] for r in broken]
    if not images or images[0][0].ndim != 3 or images[0][0].shape[0] not in (1, 3):
        return None
    names = case.task.class_names()
    low, high = space_range(case.task.space)
    return example_grid(
        torch.stack([a for a, _ in images]),
        torch.stack([b for _, b in images]),
        clean_names=[names[r.clean] for r in broken if r.clean is not None],
        adversarial_names=[names[r.adversarial] for r in broken if r.adversarial is not None],
        low=0.0 if low is None else low,
        high=1.0 if high is None else high,
        title=title,
    )


def export(case: Case, folder: Path, *, png: int = 16, watch: Watch | None = None) -> dict[str, Any]:
    """Attack a case and write examples.safetensors, records.jsonl, and PNG files of the first broken rows.

    Returns what was written, as JSON values. Raises UsageError for a grid, whose every cell has examples of its own.
    """
    from dataclasses import replace

    import torch
    from safetensors.torch import save_file

    from advkit.evaluation.api import in_order
    from advkit.evaluation.figures.plots import save
    from advkit.evaluation.run.engine import open_store, preflight, run

    if case.attack is None:
        raise UsageError("a grid has examples for every cell: name one with --threat-model transfer:sources=zoo:NAME")
    case = replace(case, keep=case.n)
    preflight(case)
    store = open_store(case, folder)
    try:
        watcher = None if watch is None else (lambda new, total: watch("records", case, new, total))
        records = in_order(case, run(case, store, watcher))
    finally:
        store.close()
    held = read_examples(folder)
    pairs = [held[Store.key(r.attack, r.id)] for r in records]
    file = folder / "examples.safetensors"
    save_file(
        {
            "origin": torch.stack([a for a, _ in pairs]).contiguous(),
            "adversarial": torch.stack([b for _, b in pairs]).contiguous(),
            "broken": torch.tensor([r.outcome == Outcome.BROKEN for r in records]),
            "label": torch.tensor([-1 if r.label is None else r.label for r in records]),
        },
        file,
        metadata={"case": case.digest(), "attack": case.label},
    )
    pictures = _pngs(records, pairs, folder / "png", png, space_range(case.task.space)) if png else 0
    figure = strip(case, folder, title=f"Broken examples, {case.label}")
    if figure is not None:
        save(figure, folder / "examples.png")
    c = count(records)
    return {
        "file": str(file),
        "rows": len(records),
        "broken": c.broken,
        "contested": c.contested,
        "pictures": str(folder / "png") if pictures else "",
        "case_sha256": case.digest(),
    }


def _pngs(records: Any, pairs: Any, folder: Path, most: int, bounds: tuple[float | None, float | None]) -> int:
    """8-bit files of the first broken rows, as the attacker would hand them in; returns how many."""
    from torchvision.io import write_png

    low, high = bounds
    if low is None or high is None or pairs[0][0].ndim != 3 or pairs[0][0].shape[0] not in (1, 3):
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [(r, b) for r, (_, b) in zip(records, pairs, strict=True) if r.outcome == Outcome.BROKEN][:most]
    for record, image in chosen:
        levels = ((image - low) / (high - low) * 255).round().clamp(0, 255).to(dtype=_uint8())
        write_png(levels.cpu(), str(folder / f"{record.id.replace('/', '_')}.png"))
    return len(chosen)


def _uint8() -> Any:
    import torch

    return torch.uint8
