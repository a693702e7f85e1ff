"""The first call of a model of the user's: one door for modules, functions, factories and checkpoints.

What can't give a number is refused here, in one line that names what was seen. What merely wants to be called in
another way (one sample at a time, with a copy of its input) is called that way from here on.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from advkit.core.errors import AdvkitError, BadModel
from advkit.core.limits import limited
from advkit.core.protocols import Task, answer_shape
from advkit.core.state import frozen
from advkit.evaluation.run.batch import own_randomness
from advkit.models.torch import Calls, FunctionModel, TorchModel, check_mode, checked_logits

ROWS = 4  # a model that takes one sample at a time shows it here; few, since a row may be large


def introduced(model: Any, task: Task, *, wrapped: bool, sample_timeout: float | None = None) -> Any:
    """The model as it has to be called, with its own number of classes; BadModel where it gives no logits.

    wrapped: its number of classes is not its own word but the task's
    sample_timeout: seconds that it may take per sample; None sets no limit
    """
    if not isinstance(model, (TorchModel, FunctionModel)) or task.space is None:
        return model
    x = next(iter(task.batches(ROWS))).x
    if not x.is_floating_point():
        return model
    x = torch.cat([x, x[-1:].expand(ROWS - len(x), *x.shape[1:])]).contiguous()
    check_mode(model)
    if isinstance(model, TorchModel):
        x = x.to(model.device)
    calls = model.calls
    with frozen(*model.modules()), own_randomness(str(x.device), "first call"), torch.no_grad():
        given = x.clone()
        answer, calls = _answered(model, given, calls, task, sample_timeout)
        if not torch.equal(given, x):
            calls = Calls(copies=True, alone=calls.alone)
            answer, _ = _answered(_calling(model, calls), x.clone(), calls, task, sample_timeout)
    if answer.ndim < 2 or answer_shape(task):
        return _calling(model, calls)
    made = _calling(model, _masked(answer, calls))
    if not wrapped and model.classes not in (None, answer.shape[1]):
        raise BadModel(f"{model.name} is said to have {model.classes} classes and returns {answer.shape[1]} logits")
    made.classes = int(answer.shape[1])
    return made


def _calling(model: Any, calls: Calls) -> Any:
    """The same model, called that way; the caller's object stays as it is."""
    made = copy.copy(model)  # shares module and weights
    made.calls = calls
    return made


def _answered(model: Any, x: Tensor, calls: Calls, task: Task, sample_timeout: float | None) -> tuple[Tensor, Calls]:
    """The logits of the rows, and how they were got: together, or one by one where the model takes no more."""
    shape = answer_shape(task)

    def ask(rows: Tensor) -> Any:
        with limited(None if sample_timeout is None else sample_timeout * len(rows)):
            return model(rows)

    try:
        answer = ask(x)
        if not isinstance(answer, Tensor) or answer.ndim == 0 or len(answer) == len(x):
            return checked_logits(answer, len(x), shape), calls
        problem: Exception | None = None
    except (AdvkitError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        problem = error
    parts: dict[int, Tensor] = {}
    last: Exception | None = None
    for row in range(len(x)):
        try:
            parts[row] = checked_logits(ask(x[row : row + 1].clone()), 1, shape)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            last = error
    if problem is None and last is not None:
        return checked_logits(answer, len(x), shape), calls
    if not parts:
        assert problem is not None
        raise BadModel(_refusal(x, problem, task)) from last
    if len(parts) < len(x):  # it raises on single samples, which is for their records; the others may go together
        try:
            rows = list(parts)
            return checked_logits(ask(x[rows]), len(rows), shape), calls
        except torch.OutOfMemoryError:
            raise
        except Exception:
            pass
    alone = Calls(copies=calls.copies, alone=True, masked=calls.masked, floor=calls.floor)
    return torch.cat(list(parts.values())), alone


def _refusal(x: Tensor, error: Exception, task: Task) -> str:
    first = (str(error).strip().splitlines() or ["no message"])[0][:200]
    hint = ""
    if x.ndim == 4 and x.shape[3] in (1, 3, 4) and x.shape[3] < x.shape[1]:
        hint = "; the samples look like images whose channels come last: permute them to [B, C, H, W]"
    elif x.ndim == 3:
        hint = "; a network for images wants a dimension of channels: x[:, None]"
    return (
        f"the model can't take inputs of shape {list(x.shape[1:])} of task {task.name}, a tensor {list(x.shape)} as "
        f"its only argument ({type(error).__name__}: {first}){hint}"
    )


def _masked(answer: Tensor, calls: Calls) -> Calls:
    """With the classes that are masked: minus infinity for every row, where nothing else is not finite."""
    low = answer == -torch.inf
    column = low.all(0)
    rest = answer[:, ~column]
    if not bool(column.any()) or rest.shape[1] < 2 or not bool(torch.isfinite(rest).all()):
        return calls
    floor = min(calls.floor, 2 * float(rest.min()))
    masked = tuple(column.nonzero().squeeze(1).tolist())
    return Calls(copies=calls.copies, alone=calls.alone, masked=masked, floor=floor)
