"""What users hand over by name or as objects: devices and tasks."""

from __future__ import annotations

from typing import Any

import torch

from advkit.core.errors import BadInput, UsageError
from advkit.tasks import TASKS


def pick_device(name: str) -> str:
    """cpu, cuda[:i] or mps; `auto` takes an accelerator when there is one. Raises UsageError for one that is absent."""
    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}: expected auto, cpu, cuda, cuda:INDEX or mps") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device {name} is not here ({torch.cuda.device_count()} CUDA devices found): try --device auto"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("device mps is not here: try --device auto")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"device {name} is not supported: expected auto, cpu, cuda, cuda:INDEX or mps")
    return name


def task_of(task: Any) -> Any:
    """A task from a spec, a task, or a pair (x, y) of tensors or arrays."""
    if _loads(task):
        raise BadInput(
            f"a task is a spec, a Task, or a pair (x, y), not a {type(task).__name__}; collect its samples first: "
            "x, y = (torch.cat(part) for part in zip(*DataLoader(dataset, batch_size=256)))"
        )
    if not isinstance(task, (tuple, list)):
        return TASKS.build(task)
    if len(task) != 2:
        raise BadInput(f"a task of {len(task)} parts; expected a spec, a Task, or a pair (x, y)")
    from advkit.tasks.arrays import Arrays

    return Arrays(*task)


def _loads(task: object) -> bool:
    """Whether this is torch's data set or data loader."""
    from torch.utils.data import DataLoader, Dataset

    return isinstance(task, (DataLoader, Dataset))
