"""Round-off at the values' magnitude is no violation of a ball; a real step outside is one, whatever the scale."""

from __future__ import annotations

import pytest
import torch

from advkit.core.spaces import Box
from advkit.evaluation.api import evaluate
from advkit.models.torch import TorchModel
from advkit.tasks.arrays import Arrays
from advkit.threat_models.lp import L1, L2, Linf
from advkit.threat_models.sparse import L0

X = (torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 255).round()
BOX = Box(0, 255, (3, 8, 8))


@pytest.mark.parametrize("ball", [Linf(8.0), L2(20.0), L1(100.0), L0(10)])
def test_a_trip_through_another_scale_is_admitted(ball) -> None:
    ball = ball.bind(BOX)
    z = ball.project(X + 40 * torch.randn(X.shape, generator=torch.Generator().manual_seed(1)), X)
    there_and_back = z / 3.7 * 3.7
    assert not torch.equal(there_and_back, z)
    assert ball.admits(z, X).all()
    assert ball.admits(there_and_back.clamp(0, 255), X).all()


@pytest.mark.parametrize("scale", [1.0, 255.0, 1e6])
def test_a_step_outside_is_not(scale: float) -> None:
    x = torch.full((1, 4), 0.5 * scale)
    for ball, move in (
        (Linf(0.1 * scale), torch.full((1, 4), 0.1001 * scale)),
        (L2(0.1 * scale), torch.tensor([[0.1001 * scale, 0, 0, 0]])),
        (L1(0.1 * scale), torch.full((1, 4), 0.02503 * scale)),
        (L0(1), torch.tensor([[0.01 * scale, 0.01 * scale, 0, 0]])),
    ):
        assert not ball.bind(Box(0, scale, (4,))).admits(x + move, x).any()


def test_the_box_has_the_spacing_of_its_bounds() -> None:
    box = Box(1e6, 1e6 + 1, (1,))
    top = torch.tensor([[1e6 + 1]])
    assert box.contains(torch.nextafter(top, 2 * top)).all()
    assert not box.contains(top + 1).any()
    unit = Box()
    assert not unit.contains(torch.tensor([[1 + 2e-6]])).any()


@pytest.mark.slow
def test_bytes_and_fractions_have_the_same_figures() -> None:
    weight = torch.randn(192, 5, generator=torch.Generator().manual_seed(2))
    y = (X / 255 - 0.5).flatten(1).mm(weight).argmax(1)

    class Net(torch.nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale, self.weight = scale, torch.nn.Parameter(weight)

        def forward(self, x):
            return (x / self.scale - 0.5).flatten(1) @ self.weight

    for eps in (0.1, 2.0):
        reports = [
            evaluate(
                "pgd",
                task=Arrays(X * (scale / 255), y, space=Box(0, scale, (3, 8, 8)), classes=5),
                model=TorchModel(Net(scale).eval(), Box(0, scale, (3, 8, 8)), 5),
                threat_model=f"linf:eps={eps * scale / 255}",
            )
            for scale in (255.0, 1.0)
        ]
        assert reports[0].robust_accuracy == reports[1].robust_accuracy
        assert not [flag for flag in reports[0].to_dict()["diagnostics"]["flags"] if flag["id"] == "budget_violation"]
