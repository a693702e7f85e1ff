"""What users hand over by name or as objects: devices and tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from advkit.core.errors import UsageError
from advkit.core.protocols import PerSample, Rule, Task
from advkit.tasks import TASKS


def pick_device(name: str | torch.device) -> str:
    """cpu, cuda[:i] or mps; `auto` takes an accelerator when there is one. Raises UsageError for one that is absent."""
    name = str(name)
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


def task_of(task: Any) -> Task:
    """A task from a spec, a task, or a pair (x, y) of tensors or arrays."""
    return TASKS.build(task)


def rule_over(rule: Rule, ids: Sequence[str]) -> Rule:
    """The rule for these samples, in their order; UsageError where it does not have an entry for each."""
    return rule.over(ids) if isinstance(rule, PerSample) else rule
