"""A training on disk: what its checkpoint holds besides weights, written, sealed, read and checked."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advkit.core.errors import AdvkitError, CheckpointError
from advkit.core.strict_json import read_object
from advkit.core.text import first_line
from advkit.models.torch import named_tensors, tensors_sha256

CHECKPOINT = "training.safetensors"
FORMAT = "advkit-training-1"


@dataclass(frozen=True)
class Epoch:
    """One line of the log.

    epoch:   from 1
    loss:    mean over the epoch's rows
    score:   mean of the objective's score over the validation rows, NaN where it was not measured
    clean:   accuracy on the validation rows as they are, NaN likewise
    seconds: training and scoring
    lr:      learning rate of the last step
    figures: what was measured beside them, by name: `tail_30_score`, the mean score of the weakest 30 % of the classes,
             and what the objective adds
    """

    epoch: int
    loss: float
    score: float
    clean: float
    seconds: float
    lr: float
    figures: Mapping[str, float] = field(default_factory=dict)


def log_entries(log: Sequence[Epoch]) -> list[dict[str, Any]]:
    """The log as JSON values: null for what was not measured, since JSON has no NaN."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(each) for key, each in value.items()}
        return None if isinstance(value, float) and math.isnan(value) else value

    return [plain(asdict(epoch)) for epoch in log]


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """CheckpointError where a training checkpoint does not hold the state of this training: a seal is no signature."""
    try:
        yield
    except AdvkitError:
        raise
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} holds no state of this training ({first_line(error)}): remove it and train again"
        ) from error


def progress_of(text: str, epochs: int) -> dict[str, Any]:
    """How far a training is; ValueError and its kin where the text does not say it."""
    read = read_object(text)
    found = [_entry(each) for each in read["log"]]
    if read["epochs"] != len(found) or not 1 <= len(found) <= epochs:
        raise ValueError(f"it is after {len(found)} of {epochs} epochs")
    if [each.epoch for each in found] != list(range(1, len(found) + 1)):
        raise ValueError("its epochs are not in order")
    best, score = read["best_epoch"], read["best_score"]
    if type(best) is not int or not len(found) // epochs <= best <= len(found):  # the last epoch is always scored
        raise ValueError(f"its best epoch is {best!r:.40}")
    best_score = None if score is None else _number(score)
    ranks = read.get("ranks", 1)
    if type(ranks) is not int or ranks < 1:
        raise ValueError(f"it says {ranks!r:.40} of how many processes trained")
    halted = read.get("halted", "")
    if type(halted) is not str:
        raise ValueError(f"it says {halted!r:.40} of why it ended")
    return {
        "epochs": len(found),
        "log": found,
        "best_epoch": best,
        "best_score": best_score,
        "halted": halted,
        "ranks": ranks,
    }


def _entry(written: Mapping[str, Any]) -> Epoch:
    """The inverse of `log_entries`, for one epoch; figures came later than the rest."""
    values: dict[str, Any] = {
        key: value if key == "epoch" else _number(value) for key, value in written.items() if key != "figures"
    }
    figures = {key: _number(value) for key, value in dict(written.get("figures", {})).items()}
    return Epoch(**values, figures=figures)


def _number(value: Any) -> float:
    """A number of the log; NaN for null, which is what was not measured."""
    if value is None:
        return math.nan
    if type(value) not in (int, float):
        raise ValueError(f"{value!r:.40} is no number")
    return float(value)


def seal(tensors: Mapping[str, Tensor], progress: str) -> str:
    return hashlib.sha256(f"{tensors_sha256(tensors.items())}|{progress}".encode()).hexdigest()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of every parameter as place/key; hyper-parameters come from the recipe."""
    state = optimizer.state_dict()["state"]
    return {
        f"{place}/{key}": value
        for place, values in state.items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        place, _, key = name.partition("/")
        state.setdefault(int(place), {})[key] = tensor
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    kinds = {frozenset(held) for held in state.values()}
    if not set(state) <= set(range(len(parameters))) or len(kinds) > 1:
        raise ValueError("the optimiser's state is not that of these parameters")
    for number, held in state.items():
        if any(tensor.ndim and tensor.shape != parameters[number].shape for tensor in held.values()):
            raise ValueError("the optimiser's state has other shapes than the parameters")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def check_weights(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    wanted = {name: (tensor.shape, tensor.dtype) for name, tensor in named_tensors(module).items()}
    if wanted != {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}:
        raise CheckpointError("the training checkpoint's weights are not this model's; remove it and train again")


def fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    check_weights(module, tensors)
    wanted = named_tensors(module)
    with torch.no_grad():
        for name, tensor in tensors.items():
            wanted[name].copy_(tensor)
