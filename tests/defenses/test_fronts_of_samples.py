"""Fronts before a model that answers samples: exact estimates on a linear one, exact counts, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from advkit.core.errors import BadModel, UsageError
from advkit.core.protocols import Data
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.defenses.smoothing.denoised import ZOAEDS, ZODS, FirstOrderAEDS, FirstOrderDS
from advkit.defenses.smoothing.fronts import QUERIES
from advkit.models.fronts import Denoised
from advkit.models.torch import NumpyModel, TorchModel
from advkit.training.loop import Recipe, fit

SHAPE, D = (1, 3, 3), 9
SHORT = Recipe(epochs=2, batch_size=16, lr=1e-3, validation=0.25)
SMALL = {"width": 8, "recipe": SHORT, "sigma": 0.1}
PRE = Recipe(epochs=2, batch_size=16, lr=1e-3, validation=0.0)
ENCODED = {**SMALL, "d_z": 3, "hidden": 8, "pretraining": PRE}


class Map(nn.Module):
    """x -> M x + b: its squared error is quadratic in x."""

    def __init__(self):
        super().__init__()
        own = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(D, D, generator=own) / 3)
        self.shift = nn.Parameter(torch.randn(D, generator=own))

    def forward(self, x):
        return (x.flatten(1) @ self.matrix.T + self.shift).reshape(x.shape)


def images(rows=48):
    x = torch.rand(rows, *SHAPE, generator=torch.Generator().manual_seed(1))
    return Data(x, torch.zeros(rows, dtype=torch.long), Box(0.0, 1.0, SHAPE), 0, "squares", answer_shape=SHAPE)


def victim():
    return TorchModel(Map().eval(), Box(0.0, 1.0, SHAPE), answer_shape=SHAPE, name="map")


def gradients(defense, rows=20):
    """Loss and gradients of the trained parameters in one step, the denoiser away from the identity."""
    data = images()
    chain = defense.around(victim(), data, RowRng.from_ids(0, ["front"]))
    with torch.no_grad():
        own = torch.Generator().manual_seed(2)
        for each in chain.front.denoiser.parameters():
            each.add_(0.05 * torch.randn(each.shape, generator=own))
    objective = defense.objective()
    objective.prepare(chain, data, RowRng.from_ids(0, ["p"]))
    places = torch.arange(20, 20 + rows)
    rng = RowRng.from_ids(0, [str(row) for row in range(rows)])
    loss = objective.loss(chain, data.x[places], data.y[places], places, rng)
    live = [each for each in chain.front.parameters() if each.requires_grad]
    return chain, data.x[places], rng, loss, torch.autograd.grad(loss, live), live


@pytest.mark.parametrize("targets", ["model", "labels"])
def test_central_differences_give_the_exact_gradient_on_a_linear_reconstruction(targets):
    """The loss is quadratic in the denoised sample, so that the length of a step does not matter."""
    exact = gradients(FirstOrderDS(targets=targets, **SMALL))
    for mu in (0.05, 1.0):
        found = gradients(ZODS(estimator="cge", mu=mu, targets=targets, **SMALL))
        torch.testing.assert_close(found[3], exact[3])
        for one, other in zip(found[4], exact[4], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("targets", ["model", "labels"])
@pytest.mark.parametrize("kind", [FirstOrderDS, FirstOrderAEDS])
def test_first_order_is_backpropagation_of_the_reconstruction_loss(kind, targets):
    defense = kind(targets=targets, **(ENCODED if kind is FirstOrderAEDS else SMALL))
    chain, x, rng, loss, found, live = gradients(defense)
    held = x if targets == "labels" else chain.victim(x).detach()
    plain = (chain(x + 0.1 * rng.at("noise").normal(x)) - held).square().mean()
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)
    for one, other in zip(found, torch.autograd.grad(plain, live), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("defense", "each"),
    [
        (ZODS(q=3, targets="labels", **SMALL), 3 + 1),
        (ZODS(estimator="cge", **SMALL), 2 * D + 1),
        (ZOAEDS(targets="labels", **ENCODED), 2 * 3 + 1),
        (ZOAEDS(**ENCODED), 2 * 3 + 1),
        (ZOAEDS(estimator="rge", q=5, antithetic=True, **ENCODED), 2 * 5 + 1),
    ],
)
def test_a_numpy_function_is_asked_exactly_so_often(defense, each):
    """Epochs times rows times the estimator's price; an answer for every row where it is held against; validation."""
    data, asked, inside = images(), [], victim()

    def f(x):
        asked.append(len(x))
        assert type(x) is np.ndarray
        with torch.no_grad():
            return inside(torch.from_numpy(x)).numpy()

    model = NumpyModel(f, data.space, answer_shape=SHAPE, identity="counting")
    chain = defense.around(model, data, RowRng.from_ids(0, ["front"]))
    assert asked == []
    done = fit(chain, data, defense.objective(), defense.recipe, RowRng.from_ids(0, ["t"]), progress=False)
    held = 12
    expected = 2 * (48 - held) * each + (48 - held) * (defense.targets == "model") + 2 * 2 * held
    assert sum(asked) == expected == int(done.log[-1].figures[QUERIES])
    deployed = defense.deploy(done.model)
    assert isinstance(deployed, Denoised)
    assert deployed.answered == 0
    assert deployed(data.x[:4]).shape == (4, *SHAPE)


@pytest.mark.slow
def test_training_lowers_the_error_under_noise():
    data = images(200)
    noisy = data.x + 0.5 * torch.randn(data.x.shape, generator=torch.Generator().manual_seed(3))
    defense = ZOAEDS(
        targets="labels", sigma=0.5, d_z=3, hidden=16, width=16,
        recipe=Recipe(epochs=10, batch_size=32, lr=3e-3, validation=0.0),
        pretraining=replace(PRE, epochs=10, lr=3e-3),
    )  # fmt: skip
    identity = TorchModel(nn.Identity(), data.space, answer_shape=SHAPE, name="identity")
    chain = defense.protect(identity, data, RowRng.from_ids(0, ["train"]))
    with torch.no_grad():
        before, after = ((model(noisy) - data.x).square().mean().sqrt() for model in (identity, chain))
    assert float(before) == pytest.approx(0.5, abs=0.02)
    assert float(after) < 0.32  # uniform noise around its mean: 0.29


def test_what_does_not_fit_is_said():
    data = images()
    flat = NumpyModel(lambda x: x.reshape(len(x), -1), data.space, answer_shape=SHAPE)
    chain = FirstOrderDS(**SMALL).around(flat, data, RowRng.from_ids(0, ["f"]))
    with pytest.raises(BadModel, match=r"wants reconstructed samples, float \[4, 1, 3, 3\]"):
        chain(data.x[:4])
    broken = NumpyModel(lambda x: np.full_like(x, np.nan), data.space, answer_shape=SHAPE)
    chain = ZODS(q=2, **SMALL).around(broken, data, RowRng.from_ids(0, ["f"]))
    with pytest.raises(BadModel, match="NaN or infinity for 4 of 4 samples"):
        chain.ask(data.x[:4])
    augmented = ZODS(q=2, width=8, recipe=replace(SHORT, augment="crop-flip"))
    with pytest.raises(UsageError, match="targets=labels, or augment=none"):
        augmented.protect(victim(), data, RowRng.from_ids(0, ["f"]))
