"""One attack on one victim, with everything a law wants to look at."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from advkit.attacks.suites import Stage, Suite
from advkit.core.errors import UsageError
from advkit.core.lanes import Lanes
from advkit.core.meter import Meter
from advkit.core.oracle import MeteredOracle
from advkit.core.protocols import Access, Serves
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.testing.victims import linear, uniform
from advkit.threat_models.events import Flips
from advkit.threat_models.goals.targeted import Targeted
from advkit.threat_models.goals.untargeted import Untargeted
from advkit.threat_models.lp import L1, L2, Linf
from advkit.threat_models.minimum import Minimum, MinimumL0, MinimumL1, MinimumL2, MinimumLinf
from advkit.threat_models.sparse import L0

BallMaker = Callable[..., Any]  # eps=..., box=... -> a ball
BALLS: dict[str, BallMaker] = {"linf": Linf, "l2": L2, "l1": L1, "l0": L0}


def _anywhere(threat: type[Minimum]) -> BallMaker:
    """Threat models without a radius take any."""

    def make(*, eps: float = 0.0, box: Box | None = None) -> Minimum:
        return threat(box=Box() if box is None else box)

    return make


def _fewest(*, eps: float = 0.0, box: Box | None = None) -> Flips:
    """Flips, as few as possible; the victim's box is [0, 1] and the rows are its corners."""
    return Flips()


MINIMA: dict[str, BallMaker] = {
    "minimum-l0": _anywhere(MinimumL0),
    "minimum-l1": _anywhere(MinimumL1),
    "minimum-l2": _anywhere(MinimumL2),
    "minimum-linf": _anywhere(MinimumLinf),
    "flips": _fewest,
}
BITS = frozenset({"flips"})  # threat models whose rows are zeros and ones

DECISIONS = 5
"""How many times as many queries attacks get that see decisions alone."""

# Radii that break some rows of the kit's victims on [0, 1]^8 and leave others.
RADII = {"linf": 0.1, "l2": 0.25, "l1": 0.5, "l0": 2}


@dataclass(frozen=True)
class Played:
    """What an attack returned and what the victim says of it, asked again."""

    z: Tensor
    reached: Tensor
    margin: Tensor
    meter: Meter


def require(holds: Any, otherwise: str) -> None:
    """Raise AssertionError unless the condition holds; a statement would vanish under `python -O`."""
    if not holds:
        raise AssertionError(otherwise)


def require_tensor(z: object, x: Tensor) -> None:
    """Raise AssertionError unless an attack gave a tensor, with a row for each of x."""
    if not isinstance(z, Tensor):
        raise AssertionError(f"it returned {type(z).__name__}; expected a tensor of the shape of x")
    require(len(z) == len(x), f"it returned {len(z)} rows for {len(x)}")


def failure(
    name: str, law: Callable[..., None], shown: str, broken: BaseException, usually: str = ""
) -> AssertionError:
    """What to raise where a law does not hold: its name, what was seen, what the law says, and the usual cause."""
    seen = str(broken) if isinstance(broken, AssertionError) else f"{type(broken).__name__}: {broken}"
    says = " ".join((inspect.getdoc(law) or "").split("\n\n", 1)[0].split())
    return AssertionError(
        f"law {name}: {shown}: {seen}\nThe law: {says}" + (f"\nUsually: {usually}" if usually else "")
    )


def legal(x: Tensor, norm: str) -> Tensor:
    """Rows in [0, 1] as such a threat model knows them: the nearest corner of the box where rows are bits."""
    return x.round() if norm in BITS else x


def names(rows: int) -> tuple[str, ...]:
    return tuple(f"row-{i}" for i in range(rows))


def play(
    attack: Any,
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    goal: Any,
    ball: Any,
    *,
    seed: int = 0,
    ids: Sequence[str] | None = None,
    access: Access | None = None,
    queries: int | None = None,
    decides: bool = True,
    lanes: Lanes | None = None,
    rng: Any = None,
    propagations: int | None = None,
) -> Played:
    """Run the attack through a metered oracle that grants just what it needs, and ask the victim again."""
    granted = attack.needs if access is None else access
    oracle = MeteredOracle(
        model, len(x), granted, queries, decides, lanes or Lanes.fitting(x), propagations=propagations
    )
    streams = RowRng.from_ids(seed, names(len(x)) if ids is None else ids) if rng is None else rng
    z = attack(oracle, x, goal, ball, streams)
    require_tensor(z, x)
    with torch.no_grad():
        answer = model(z)
    return Played(z, goal.reached(answer), goal.margin(answer), oracle.meter)


def aimed(attack: Any, labels: Tensor, classes: int) -> Any:
    """A goal for rows of these classes that the attack serves: untargeted, or else the next class."""
    if isinstance(attack, Serves) and "untargeted" not in attack.serves:
        return Targeted((labels + 1) % classes)
    return Untargeted(labels)


def fields_of(attack: Any) -> set[str]:
    """The settings that can be changed in a copy; none where the part is no dataclass."""
    return {each.name for each in fields(attack)} if is_dataclass(attack) else set()


@dataclass(frozen=True)
class ShortSuite(Suite):
    """A suite with every stage shortened."""

    suite: Suite
    steps: int
    queries: int

    def stages(self) -> tuple[Stage, ...]:
        """The suite's stages in its order."""
        return tuple(
            replace(stage, attack=shortened(stage.attack, self.steps, self.queries)) for stage in self.suite.stages()
        )


def shortened(attack: Any, steps: int = 40, queries: int = 200) -> Any:
    """The attack with its effort cut to what tiny victims need; settings below the cut stay.

    An attack that sees decisions alone gets DECISIONS times as many queries: a decision is worth a bit at the most.
    """
    if isinstance(attack, Suite):
        return ShortSuite(attack, steps, queries)
    have = fields_of(attack)
    queries *= DECISIONS if attack.needs == Access.LABELS else 1
    most = {"steps": steps, "queries": queries}
    changes = {name: n for name, n in most.items() if name in have and getattr(attack, name) > n}
    return replace(attack, **changes) if changes else attack


def accepts(attack: Any, ball: BallMaker, norm: str) -> str | None:
    """None where the attack works in this kind of ball, else the UsageError's message."""
    victim = linear()
    x = legal(uniform(3, 2, 8), norm)
    try:
        goal = aimed(attack, victim(x).argmax(1), 2)
        play(shortened(attack, 2, 2), _AskedBriefly(victim), x, goal, ball(eps=RADII.get(norm, 0.0)))
    except UsageError as refusal:
        return str(refusal)
    except (_Underway, AssertionError):  # what is wrong with its answer, the laws say
        pass
    return None


class _Underway(BaseException):
    """An attack has asked its victim so often that it no longer refuses the ball."""


class _AskedBriefly:
    """A victim that ends the attack after so many calls."""

    def __init__(self, victim: Callable[[Tensor], Tensor], calls: int = 30) -> None:
        self.victim, self.calls = victim, calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self.victim, name)

    def __call__(self, x: Tensor) -> Tensor:
        self.calls -= 1
        if self.calls < 0:
            raise _Underway
        return self.victim(x)
