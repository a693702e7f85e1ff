"""What every defense owes its users; each law raises AssertionError with its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from advkit.core.protocols import Data, ModelInfo
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.models.torch import TorchModel, is_model
from advkit.testing.play import require
from advkit.testing.victims import network, normal, uniform


def stripes(rows: int = 96, shape: tuple[int, ...] = (2, 6, 6), classes: int = 3) -> Data:
    """A toy training set that a small net learns in seconds: class k is bright in its own columns."""
    y = torch.arange(rows) % classes
    x = 0.4 * uniform(31, rows, *shape)
    for k in range(classes):
        x[y == k, ..., k::classes] += 0.5
    return Data(x.clamp(0, 1), y, Box(shape=shape), classes, name="stripes")


@dataclass(frozen=True)
class Protected:
    """A defense applied twice with the same seed to copies of a model."""

    defense: Any
    model: TorchModel
    before: str
    first: Any
    second: Any
    data: Data


def protect_twice(defense: Any, model: TorchModel | None = None, data: Data | None = None) -> Protected:
    """Apply the defense; by default to the kit's network and toy data (data only where the defense needs it)."""
    model = network() if model is None else model
    data = stripes() if data is None else data
    before = model.state_sha256()
    given = data if defense.needs_data else None
    one, two = (defense.protect(model, given, RowRng.from_ids(0, ["kit"])) for _ in range(2))
    return Protected(defense, model, before, one, two, data)


def is_a_model(case: Protected) -> None:
    """What comes back answers as a model does: space, view, modules, description."""
    require(is_model(case.first), f"{type(case.first).__name__} lacks members of a model")
    require(isinstance(case.first.describe(), ModelInfo), "describe() gives no ModelInfo")
    with torch.no_grad():
        answer = case.first(case.data.x[:5])
    require(len(answer) == 5, f"5 rows got {len(answer)} answers")
    require(bool(torch.isfinite(answer).all()), "answers on the data are not finite")
    require(case.first.space.complaint(case.data.x[:5]) is None, "the data is no longer legal")
    require(isinstance(case.defense.claims, str), "`claims` is no text")
    for module in case.first.modules():
        require(not any(part.training for part in module.modules()), "the protected model is in training mode")


def leaves_the_model_alone(case: Protected) -> None:
    """The model that was handed in keeps its weights, and has no gradients."""
    require(case.model.state_sha256() == case.before, "the caller's model changed")
    require(
        all(p.grad is None for m in case.model.modules() for p in m.parameters()), "gradients were left on the model"
    )


def same_seed_same_model(case: Protected) -> None:
    """The same seed gives the same weights."""
    first, second = (one.describe().state_sha256 for one in (case.first, case.second))
    require(first == second, "the same seed gave another model")


def honest_view(case: Protected) -> None:
    """A model whose answers vary or whose gradients are zero hands the attacker another view, and one that helps."""
    model, view = case.first, case.first.attacker_view()
    require(is_model(view), "attacker_view() gives no model")
    x = (case.data.x[:8] + 0.02 * normal(32, *case.data.x[:8].shape)).clamp(0, 1)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        one, two = model(x), model(x)
    random = not torch.equal(one, two)
    if random:
        require(view is not model, "answers vary from call to call and the attacker's view is the same model")
    if not one.is_floating_point() or one.ndim != 2 or _gradient(model, x) == 0:
        require(view is not model, "the model has no gradient and the attacker's view is the same model")
    require(_gradient(view, x) > 0, "the attacker's view has no gradient either")


def _gradient(model: Any, x: Tensor) -> float:
    """The largest input gradient of the answers' spread; 0 where there is none."""
    leaf = x.detach().clone().requires_grad_()
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        answer = model(leaf)
        if not answer.requires_grad:
            return 0.0
        spread = (answer - answer.mean(-1, keepdim=True)).square().sum()
        gradient = torch.autograd.grad(spread, leaf, allow_unused=True)[0]
    return 0.0 if gradient is None else float(gradient.abs().max())


DEFENSE_LAWS: dict[str, Callable[[Protected], None]] = {
    law.__name__: law for law in (is_a_model, leaves_the_model_alone, same_seed_same_model, honest_view)
}


def check_defense(defense: Any, model: TorchModel | None = None, data: Data | None = None) -> None:
    """Every law on the defense, applied twice to `model` (default: the kit's small network, on toy images [2, 6, 6]).

    Give training defenses a short recipe first. Raises AssertionError at the first law that is broken, naming it.
    """
    random_before = torch.get_rng_state()
    case = protect_twice(defense, model, data)
    require(
        torch.equal(torch.get_rng_state(), random_before),
        f"law no_side_effects: {defense!r} drew global random numbers",
    )
    for name, law in DEFENSE_LAWS.items():
        try:
            law(case)
        except AssertionError as broken:
            raise AssertionError(f"law {name}: {defense!r}: {broken}") from broken
