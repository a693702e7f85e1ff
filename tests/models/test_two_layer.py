"""Certificates of two-layer ReLU networks: a bound that points of the ball never pass, whatever the network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from advkit.core.errors import BadModel
from advkit.core.protocols import Evidence
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.models.mlp import MLP
from advkit.models.torch import TorchModel
from advkit.models.two_layer import Layers, Norm, P, TwoLayer

ANY: Any = None


def network(classes: int = 3, units: int = 12, seed: int = 0) -> TorchModel:
    return MLP(hidden=(units,))((1, 2, 3), classes, RowRng.from_ids(seed, ["net"]))


def samples(n: int = 40) -> Tensor:
    return torch.rand(n, 1, 2, 3, generator=torch.Generator().manual_seed(1))


def around(x: Tensor, norm: Norm, eps: float, points: int = 400) -> Tensor:
    """Points on the border of every sample's ball, and inside it, [n, points, ...]."""
    drawn = torch.Generator().manual_seed(2)
    step = torch.randn(len(x), points, x[0].numel(), generator=drawn, dtype=torch.float64)
    step[:, ::2] = step[:, ::2].sign() * (torch.rand(step[:, ::2].shape, generator=drawn) < 0.7)
    step = step / torch.linalg.vector_norm(step, P[norm], dim=2, keepdim=True).clamp_min(1e-12)
    size = torch.rand(len(x), points, 1, generator=drawn, dtype=torch.float64) ** 0.2
    return (x.flatten(1)[:, None] + eps * size * step).reshape(len(x), points, *x.shape[1:])


@pytest.mark.parametrize("norm", list(P))
@pytest.mark.parametrize("eps", [0.01, 0.1, 0.4])
def test_no_point_of_the_ball_is_below_the_margin(norm: Norm, eps: float) -> None:
    for classes, seed in ((2, 0), (3, 1), (5, 2)):
        model = TwoLayer.around(network(classes, seed=seed), norm, eps)
        x = samples()
        y = model(x).argmax(1)
        margins = model.margins(x, y)
        points = around(x, norm, eps)
        logits = model(points.flatten(0, 1).float()).view(len(x), -1, classes).double()
        lead = logits.gather(2, y[:, None, None].expand(-1, logits.shape[1], 1)) - logits
        lead = lead.masked_fill(nn.functional.one_hot(y, classes)[:, None].bool(), torch.inf).amin(2)
        assert bool((lead.amin(1) >= margins).all())
        if eps == 0.01:  # few units change sign there: the bound is nearly what the points reach
            assert bool((margins > 0).float().mean() > 0.5)


def test_the_bound_is_exact_where_the_network_is_affine() -> None:
    model = network(2, units=3)
    with torch.no_grad():
        linear = [layer for layer in model.module if isinstance(layer, nn.Linear)]
        linear[0].bias.copy_(torch.tensor([5.0, 5.0, -5.0]))  # active, active and inactive on the whole box
    x, eps = samples(5), 0.1
    y = model(x).argmax(1)
    margins = TwoLayer.around(model, "linf", eps).margins(x, y)
    weights = linear[0].weight.double()[:2]
    lead = (linear[1].weight[y] - linear[1].weight[1 - y]).double()[:, :2]
    slope = lead @ weights
    value = (model(x)[range(5), y] - model(x)[range(5), 1 - y]).double()
    assert torch.allclose(margins, value - eps * slope.abs().sum(1), atol=1e-4)


def test_float32_is_allowed_for() -> None:
    """Sums of large terms that cancel have no certificate in float32, and one in float64."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        module[1].weight.copy_(torch.tensor([[1e7, 0.0], [1e7, 0.0]]))
        module[1].bias.copy_(torch.tensor([1.0, 0.0]))
        module[3].weight.copy_(torch.tensor([[0.0, 0.0], [1.0, -1.0]]))
        module[3].bias.zero_()
    x, y = torch.tensor([[0.9, 0.5]]), torch.tensor([1])
    margins = [Layers.of(module.to(kind)).margins(x, y, "linf", 1e-4) for kind in (torch.float32, torch.float64)]
    assert float(margins[0]) < 0 < float(margins[1])
    assert float(margins[1]) == pytest.approx(1.0, abs=1e-6)


def test_it_is_the_same_network_when_copied_or_moved() -> None:
    plain = network()
    model = TwoLayer.around(plain, "l2", 0.2)
    for other in (model.copy(), model.to("cpu"), model.attacker_view()):
        assert isinstance(other, TwoLayer)
        assert (other.norm, other.eps) == ("l2", 0.2)
        assert other.describe() == plain.describe()
        assert torch.equal(other(samples()), plain(samples()))


def evidence(model: TwoLayer, x: Tensor, handed: Tensor) -> Evidence:
    return Evidence(model, model, x, handed, handed, model(x), model(handed), None, RowRng.from_ids(0, ["e"]))


def test_what_it_says_of_an_attack() -> None:
    model = TwoLayer.around(network(2), "linf", 0.01)
    x = samples()
    decided = model(x).argmax(1)
    far = samples(80)[40:]
    said = model.examine(evidence(model, x, far))
    assert said["certified"] == (model.margins(x, decided) > 0).tolist()
    # points outside the ball contradict nothing
    assert set(said["certificate_broken"]) == {False, None}
    assert [each is None for each in said["certificate_broken"]] == [not held for held in said["certified"]]

    class Liar(TwoLayer):
        def margins(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.ones(len(x))

    liar = Liar.around(network(2), "linf", 1.0)
    said = liar.examine(evidence(liar, x, far))
    assert said["certificate_broken"] == (model(far).argmax(1) != decided).tolist()
    assert any(said["certificate_broken"])


def test_other_networks_are_refused() -> None:
    deep = MLP(hidden=(4, 4))((3,), 2, RowRng.from_ids(0, ["net"]))
    with pytest.raises(BadModel, match=r"for a two-layer ReLU network .*; this one has 3 linear layers"):
        TwoLayer.around(deep, "linf", 0.1)
    bent = TorchModel(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), Box(shape=(3,)), 2)
    with pytest.raises(BadModel, match="2 linear layers and Tanh"):
        TwoLayer.around(bent, "linf", 0.1)
    scaled = TorchModel(network().module, Box(shape=(1, 2, 3)), 3, (0.5,), (0.5,))
    with pytest.raises(BadModel, match="normalises them outside"):
        TwoLayer.around(scaled, "linf", 0.1)
