"""What callers write for a keyword of `evaluate`, or an option of the command line, that there is not."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from dataclasses import fields
from typing import Final, ParamSpec, TypeVar

from advkit.core.errors import UsageError
from advkit.core.registry.grammar import nearest

P = ParamSpec("P")
R = TypeVar("R")

_MEANT: Final[dict[str, str]] = {
    **dict.fromkeys(("dataset", "data", "loader", "dataloader", "x", "inputs", "images"), "task"),
    **dict.fromkeys(("threat", "perturbation", "constraint", "ball"), "threat_model"),
    **dict.fromkeys(("num_samples", "n_samples", "samples", "limit", "n_ex", "n_examples"), "n"),
    **dict.fromkeys(("gpu", "cuda"), "device"),
    **dict.fromkeys(("output", "output_dir", "save_dir", "folder", "log_dir"), "out"),
    **dict.fromkeys(("bs", "batchsize"), "batch_size"),
    **dict.fromkeys(("attacks", "attacks_to_run"), "attack"),
    **dict.fromkeys(("net", "classifier", "victim", "checkpoint"), "model"),
    **dict.fromkeys(("num_workers", "jobs", "n_jobs", "processes"), "workers"),
    **dict.fromkeys(("epochs", "lr", "learning_rate"), "recipe"),
}


def advice(keyword: str, *, option: bool = False) -> str:
    """What to write in place of a keyword (an option of the command line) that there is not, "" where nobody knows."""
    from advkit.attacks.familiar import SETTINGS

    word = keyword.casefold().replace("-", "_")
    if word in _MEANT:
        meant = _MEANT[word]
        return f"did you mean --{meant.replace('_', '-')}?" if option else f"did you mean {meant!r}?"
    setting = SETTINGS.get(word)
    if setting is None:
        return ""
    if setting.otherwise and not setting.here:
        return setting.otherwise
    spec = f"pgd:{setting.here[0]}=..." if setting.here else ""
    return f"it is a setting of the attack: {f'--attack {spec}' if option else f'attack={spec!r}'}" if spec else ""


def explained(settings: type | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A function that names the right keyword where it is called with one that it does not have.

    settings: the dataclass whose fields a function takes as `**settings`
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        parameters = inspect.signature(function).parameters.values()
        known = [each.name for each in parameters if each.kind is not inspect.Parameter.VAR_KEYWORD]
        known += [each.name for each in fields(settings)] if settings is not None else []

        @functools.wraps(function)
        def called(*args: P.args, **kwargs: P.kwargs) -> R:
            _refuse([name for name in kwargs if name not in known], known, function.__name__)
            return function(*args, **kwargs)

        return called

    return decorate


def _refuse(unknown: Collection[str], known: Collection[str], owner: str) -> None:
    for name in unknown:
        said = advice(name)
        raise UsageError(f"{owner}() has no keyword {name!r}{f'; {said}' if said else nearest(name, known)}")
