"""What an objective may bring beside its loss: weights of its own, a loss on trial, the tail of its score."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from advkit.core.protocols import Data, Trains
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.core.tail import weakest
from advkit.models import MODELS
from advkit.models.torch import TorchModel
from advkit.testing import check_training
from advkit.training.loop import TAIL_SCORE, Objective, Recipe, fit

RNG = RowRng.from_ids(7, ["run"])


def blobs(n: int = 120, classes: int = 4) -> Data:
    y = torch.arange(n) % classes
    x = (0.2 * y[:, None] + 0.1 * RowRng.from_ids(1, [str(i) for i in range(n)]).uniform(torch.empty(n, 2))).clamp(0, 1)
    return Data(x=x, y=y, space=Box(), classes=classes)


def small() -> TorchModel:
    return MODELS.build("mlp:hidden=8")((2,), 4, RNG.at("init"))


class Scaled(Objective):
    """Cross-entropy of logits times a learned temperature per class, plus a frozen weight of no use."""

    def __init__(self) -> None:
        self.asked = 0

    def prepare(self, model: TorchModel, data: Data, rng: Any) -> None:
        self.scale = nn.Parameter(torch.ones(1, data.classes))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def parameters(self) -> list[nn.Parameter]:
        self.asked += 1
        return [self.scale, self.frozen]

    def loss(self, model: TorchModel, x: Tensor, y: Tensor, rows: Tensor, rng: Any) -> Tensor:
        return nn.functional.cross_entropy(self.scale * model(x), y)

    def state(self) -> dict[str, Tensor]:
        return {"scale": self.scale.detach()}

    def load(self, state: dict[str, Tensor]) -> None:
        if "scale" in vars(self):
            with torch.no_grad():
                self.scale.copy_(state["scale"])


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "lars"])
def test_weights_of_the_objective_are_trained_and_survive(optimizer: str, tmp_path: Path) -> None:
    recipe = Recipe(epochs=3, batch_size=16, optimizer=optimizer, lr=0.5, weight_decay=0.1)
    whole = Scaled()
    done = fit(small(), blobs(), whole, recipe, RNG, progress=False)
    assert not torch.equal(whole.scale, torch.ones(1, 4))
    assert torch.equal(whole.frozen, torch.ones(3))
    assert whole.scale.grad is not None

    class Stopped(Scaled):
        def loss(self, *batch: Any) -> Tensor:
            if stop():
                raise KeyboardInterrupt
            return super().loss(*batch)

    calls = iter(range(10**6))

    def stop() -> bool:
        return next(calls) == 16  # in the third epoch of seven steps each

    halves = Stopped()
    with pytest.raises(KeyboardInterrupt):
        fit(small(), blobs(), halves, recipe, RNG, out=tmp_path, progress=False)
    again = Stopped()
    resumed = fit(small(), blobs(), again, recipe, RNG, out=tmp_path, progress=False)
    assert resumed.last.state_sha256() == done.last.state_sha256()
    assert torch.equal(again.scale, whole.scale)
    over = Stopped()  # a run that is over is handed out without the objective being prepared
    assert fit(small(), blobs(), over, recipe, RNG, out=tmp_path, progress=False).last.state_sha256() == (
        done.last.state_sha256()
    )
    assert "scale" not in vars(over)


class Keeper(Objective):
    """Keeps a tensor, a list, a dict, a deque and a number."""

    def __init__(self) -> None:
        self.average = torch.zeros(())
        self.seen: list[float] = []
        self.by_step: dict[int, float] = {}
        self.latest: deque[float] = deque(maxlen=2)
        self.steps = 0

    def loss(self, model: TorchModel, x: Tensor, y: Tensor, rows: Tensor, rng: Any) -> Tensor:
        loss = super().loss(model, x, y, rows, rng)
        self.average += loss.detach()  # in place: what `state` returns is copied
        self.seen.append(float(loss.detach()))
        self.by_step[self.steps] = float(loss.detach())
        self.latest.append(float(loss.detach()))
        self.steps += 1
        self.new = True
        return loss

    def state(self) -> dict[str, Tensor]:
        return {"average": self.average, "steps": torch.tensor(self.steps)}

    def load(self, state: dict[str, Tensor]) -> None:
        self.average, self.steps = state["average"], int(state["steps"])


def test_a_loss_on_trial_leaves_everything_as_it_was() -> None:
    objective, data, model = Keeper(), blobs(), small()
    batch = (model, data.x[:8], data.y[:8], torch.arange(8), RNG)
    for step in range(3):
        held = (float(objective.average), list(objective.seen), dict(objective.by_step), list(objective.latest))
        with suppress(ZeroDivisionError), objective.trial():
            objective.loss(*batch)
            assert len(objective.seen) == step + 1
            raise ZeroDivisionError
        assert held == (
            float(objective.average),
            objective.seen,
            objective.by_step,
            list(objective.latest),
        )
        assert objective.steps == step
        assert ("new" in vars(objective)) == (step > 0)
        objective.loss(*batch)


def test_the_log_has_the_score_of_the_weakest_classes() -> None:
    class Scripted(Objective):
        def score(self, model: TorchModel, x: Tensor, y: Tensor, rows: Tensor, rng: Any) -> Tensor:
            return torch.tensor([0.9, 0.2, 0.6, 0.4])[y] + 0.01 * (rows % 2)

    recipe = Recipe(epochs=3, select_every=2, validation=0.5, batch_size=16)
    done = fit(small(), blobs(), Scripted(), recipe, RNG, progress=False)
    # Four classes: the tail is two of them; row parity is the label's, so classes 1 and 3 score 0.01 more.
    assert [entry.figures.get(TAIL_SCORE) for entry in done.log] == [
        None,
        pytest.approx((0.21 + 0.41) / 2),
        pytest.approx((0.21 + 0.41) / 2),
    ]
    assert weakest({7: 0.5, 3: 0.5, 1: 0.9}) == [3]


@dataclass(frozen=True, kw_only=True)
class Faulty(Trains):
    """Trains with an objective that keeps its state to itself, or takes back another one than it gave."""

    how: str
    recipe: Recipe = field(default_factory=lambda: Recipe(epochs=2, batch_size=16))

    def objective(self) -> Objective:
        how = self.how

        class Weighted(Keeper):
            def loss(self, *batch: Any) -> Tensor:
                return super().loss(*batch) * (1 + self.average)

            def state(self) -> dict[str, Tensor]:
                return {} if how == "silent" else super().state()

            def load(self, state: dict[str, Tensor]) -> None:
                if how == "sound":
                    super().load(state)

        return Weighted()


@pytest.mark.slow
def test_the_law_of_resuming_finds_a_state_that_is_not_kept() -> None:
    check_training(Faulty(how="sound"))
    with pytest.raises(AssertionError, match="ends with other weights"):
        check_training(Faulty(how="silent"))
    with pytest.raises(AssertionError, match="law resumes_exactly"):
        check_training(Faulty(how="deaf"))
