"""What every defense owes its users; each law raises AssertionError with its name."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from advkit.core.protocols import Data, ModelInfo, Trains, TrainsFront
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.models.torch import TorchModel, is_model
from advkit.testing.play import failure, require
from advkit.testing.victims import network, normal, uniform
from advkit.training.loop import fit


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
        except Exception as broken:  # code of the user's own raises whatever it likes
            raise failure(name, law, repr(defense), broken) from broken


class _CutOff(Exception):
    """Stands for a kill -9."""


def forgetful(shape: tuple[int, ...] = (2, 6, 6), classes: int = 3) -> TorchModel:
    """A small net with all that a resumed run must bring back: running statistics, a counter, dropout."""
    inputs = 1
    for length in shape:
        inputs *= length
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = (nn.Flatten(), nn.Linear(inputs, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2))
        module = nn.Sequential(*layers, nn.Linear(12, classes)).eval()
    return TorchModel(module, Box(0.0, 1.0, shape), classes)


def check_training(defense: Any, model: TorchModel | None = None, data: Data | None = None) -> None:
    """The laws of a defense that trains, on `model` (default: a small net with batch statistics and dropout).

    A run that is cut off in the middle of its last epoch, and taken up by a fresh objective, ends with the same weights
    and the same log, to the bit; a loss inside `Objective.trial()` leaves no trace. Give it a recipe of a few epochs of
    a few steps each. Raises AssertionError naming the law that is broken.
    """
    require(isinstance(defense, Trains), f"{defense!r} is no defense that trains")
    data = stripes() if data is None else data
    model = forgetful(tuple(data.x.shape[1:]), data.classes) if model is None else model
    rng = RowRng.from_ids(0, ["kit"])
    if isinstance(defense, TrainsFront):
        model = defense.around(model, data, rng.at("front"))
    asked = [0]

    def counted(stop_at: int = -1) -> Any:
        objective = defense.objective()
        loss = objective.loss
        asked[0] = 0

        def one(*batch: Any) -> Tensor:
            asked[0] += 1
            if asked[0] == stop_at:
                raise _CutOff
            found: Tensor = loss(*batch)
            return found

        objective.loss = one
        return objective

    def run(objective: Any, out: str | None = None) -> tuple[str, str]:
        done = fit(model, data, objective, defense.recipe, rng, out=out, progress=False)
        log = [(each.loss, each.score, each.clean, sorted(each.figures.items())) for each in done.log]
        return done.last.state_sha256() + done.model.state_sha256(), repr(log)

    whole = run(counted())
    steps = asked[0]
    with tempfile.TemporaryDirectory() as folder:
        try:
            run(counted(steps), folder)
        except _CutOff:
            pass
        else:
            raise AssertionError(f"law resumes_exactly: {defense!r}: the loop asks the objective for another loss")
        resumed = run(counted(), folder)
    again = asked[0]
    require(
        1 < again < steps, f"law resumes_exactly: {defense!r}: {again} of {steps} steps were made anew; expected some"
    )
    for part, one, other in zip(("weights", "figures in its log"), whole, resumed, strict=True):
        require(one == other, f"law resumes_exactly: {defense!r}: a resumed run ends with other {part}")
    _trial_leaves_no_trace(defense, model.copy(), data, rng)


def _trial_leaves_no_trace(defense: Any, model: TorchModel, data: Data, rng: RowRng) -> None:
    objective = defense.objective()
    objective.prepare(model, data, rng.at("prepare"))
    rows = torch.arange(min(32, len(data)))
    x, y = data.x[rows], data.y[rows]
    model.module.train()
    for step in range(3):
        before = {name: tensor.clone() for name, tensor in objective.state().items()}
        own = RowRng.from_ids(0, [str(row) for row in rows.tolist()]).at("trial", step)
        with objective.trial():
            objective.loss(model, x, y, rows, own)
        after = objective.state()
        require(
            before.keys() == after.keys()
            and all(
                torch.equal(held, after[name].to(held)) or _both_nan(held, after[name]) for name, held in before.items()
            ),
            f"law trial_leaves_no_trace: {defense!r}: its state moved",
        )
        objective.loss(model, x, y, rows, own).backward()
        objective.stepped(model)


def _both_nan(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(torch.isclose(one, other.to(one), rtol=0, atol=0, equal_nan=True).all())
