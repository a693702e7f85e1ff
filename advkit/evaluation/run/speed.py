"""The fast views of a case's models: which speed switches each of them keeps, settled once per run.

Whether another memory layout is faster is a matter of the moment; what was settled is kept in the run folder, so that
a resumed run and worker processes compute the same bits.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from advkit.core.errors import SpecError, StaleRun
from advkit.core.files import write_whole
from advkit.core.lanes import Lanes
from advkit.core.protocols import Attack, Planned, Stepped, Suite, on_streams
from advkit.core.speed import Speed
from advkit.core.state import frozen
from advkit.core.strict_json import read_object

VICTIM = "victim"
_settled: dict[tuple[object, ...], str] = {}  # what this process has measured: two runs of one case settle alike


class FastViews:
    """Views by model name, each made at its first use and kept; travels to another process without them.

    chosen: the spec of the switches that each model keeps ("fp32": none)
    """

    def __init__(self, chosen: dict[str, str], made: dict[str, Any] | None = None) -> None:
        self.chosen = chosen
        self._made = made or {}
        self._lanes: dict[str, Lanes] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return FastViews, (self.chosen,)

    @classmethod
    def settle(cls, speed: Speed, models: Iterable[tuple[str, Any, bool]], sample: Tensor, planned: float) -> Self:
        """What is worth applying to each (name, model, whether gradients are asked of it).

        Raises UsageError where a model does not run under the switches.
        """
        chosen: dict[str, str] = {}
        made: dict[str, Any] = {}
        for name, model, backward in models:
            state, threads = model.describe().state_sha256, torch.get_num_threads()
            key = (state, str(speed), planned, backward, str(sample.device), tuple(sample.shape[1:]), threads)
            if key in _settled:
                chosen[name] = _settled[key]
                continue
            with frozen(*model.modules()):
                kept, view = speed.settled(model, sample, planned, backward)
            chosen[name] = _settled[key] = str(kept)
            if view is not None:
                made[name] = view
        return cls(chosen, made)

    def of(self, name: str, model: Any, sample: Tensor) -> Any:
        """The view of a model; itself where it keeps no switch."""
        speed = Speed.parse(self.chosen[name])
        if not speed.switches:
            return model
        if name not in self._made:
            self._made[name] = speed.view(model, sample)
        return self._made[name]

    def lanes(self, name: str, model: Any, sample: Tensor, backward: bool) -> Lanes:
        """Shapes in which the view answers the same bits for a row in any batch."""
        if name not in self._lanes:
            view = self.of(name, model, sample)
            self._lanes[name] = Speed.parse(self.chosen[name]).lanes(view, sample, backward)
        return self._lanes[name]

    def answered(self, name: str, model: Any, sample: Tensor, backward: bool) -> str:
        """The `bits` of what `lanes` gives; "" where the view is compiled, which is called in one shape."""
        compiled = Speed.parse(self.chosen[name]).compile
        return "" if compiled else Lanes.answered(self.of(name, model, sample), sample, backward)

    @classmethod
    def load(cls, file: Path, asked: Speed, names: Iterable[str]) -> Self:
        """What an earlier start of the run settled of the speed asked for, for the models of these names.

        Raises StaleRun where the file says nothing sensible.
        """
        try:
            chosen = read_object(file.read_bytes())
            if set(chosen) != set(names):
                raise ValueError("it speaks of other models")
            if any(set(Speed.parse(text).switches) - set(asked.switches) for text in chosen.values()):
                raise ValueError("it speaks of another speed")
        except (OSError, ValueError, AttributeError, TypeError, SpecError) as error:
            raise StaleRun(f"{file} is damaged ({error}): name another --out, or remove the folder") from error
        return cls(chosen)

    def save(self, file: Path) -> None:
        """Written beside the target and renamed over it."""
        write_whole(file, json.dumps(self.chosen, sort_keys=True) + "\n")


def planned_passes(attack: Attack) -> float:
    """About how many times an attack, or a suite without its escalation, sends a row through the model.

    What the attack says itself (`planned`), else read off the settings that attacks share (steps, restarts, targets,
    eot, queries); one where there are none. An estimate from above: rows that are broken leave.
    """
    if isinstance(attack, Planned):
        return float(attack.planned)
    if isinstance(attack, Suite):
        return float(sum(s.share * planned_passes(s.attack) for s in attack.stages() if s.when == "always"))
    if on_streams(attack) and isinstance(attack, _WrapsAttack):
        return planned_passes(attack.attack)  # an online attack's candidates are its inner attack's
    restarts = max(1, _setting(attack, "restarts"))
    if not isinstance(attack, Stepped):
        return float(_setting(attack, "queries") * restarts)
    return float(
        max(1, attack.steps) * restarts * max(1, _setting(attack, "targets")) * max(1, _setting(attack, "eot"))
    )


@runtime_checkable
class _WrapsAttack(Protocol):
    """An attack that another one makes the points of."""

    @property
    def attack(self) -> Attack: ...


def _setting(attack: Attack, name: str) -> int:
    """A setting that many attacks share; 1 where this one has none or leaves it open."""
    value = getattr(attack, name, 1)
    return value if isinstance(value, int) else 1
