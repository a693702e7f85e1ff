"""White box beyond a gradient: other views of the model through the same meter, and its last layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from advkit.core.errors import AccessDenied
from advkit.core.lanes import Lanes
from advkit.core.oracle import MeteredOracle
from advkit.core.protocols import Access
from advkit.models.torch import TorchModel
from advkit.threat_models.goals.untargeted import Untargeted


@pytest.fixture
def model() -> TorchModel:
    torch.manual_seed(0)
    return TorchModel(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).eval(), classes=3)


def features(model: TorchModel) -> TorchModel:
    return TorchModel(model.module[:2], classes=6)  # type: ignore[index]


def test_a_view_answers_for_another_model_and_pays_into_the_same_meter(model: TorchModel) -> None:
    x = torch.rand(5, 4)
    oracle = MeteredOracle(model, 5)
    inside = oracle.seen_as(features)
    assert torch.allclose(inside(x), model.module[:2](x), atol=1e-6)  # type: ignore[index]
    assert not inside.decides
    assert oracle.seen_as(features, decides=True).decides
    inside.take(torch.tensor([1, 3])).gradient(x[[1, 3]], Untargeted(torch.tensor([0, 1])))
    assert oracle.meter.forwards.tolist() == [1, 2, 1, 2, 1]
    assert oracle.meter.backwards.tolist() == [0, 1, 0, 1, 0]


def test_the_last_layer_is_shown_in_white_box_only(model: TorchModel) -> None:
    head = MeteredOracle(model, 1).head()
    assert head is not None
    assert torch.equal(head, model.module[2].weight)
    assert MeteredOracle(lambda x: x, 1).head() is None
    for access in (Access.NOTHING, Access.LABELS, Access.SCORES):
        oracle = MeteredOracle(model, 1, access)
        with pytest.raises(AccessDenied):
            oracle.head()
        with pytest.raises(AccessDenied):
            oracle.seen_as(features)


def test_large_rows_are_called_four_at_a_time_and_keep_their_bits() -> None:
    torch.manual_seed(1)
    network = nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    model = TorchModel(nn.Sequential(*network, nn.Linear(32, 5)).eval(), classes=5)
    x, labels = torch.rand(7, 3, 128, 128), torch.tensor([0, 1, 2, 3, 4, 0, 1])
    lanes = Lanes.fitting(x)
    assert (lanes.chunk, lanes.multiple) == (4, 4)
    assert (Lanes.fitting(x[:, :, :64]).chunk, Lanes.fitting(x[:0]).multiple) == (64, 16)
    _, whole, answer = MeteredOracle(model, 7, lanes=lanes).gradient(x, Untargeted(labels))
    for row in range(7):
        _, alone, one = MeteredOracle(model, 1, lanes=lanes).gradient(
            x[row : row + 1], Untargeted(labels[row : row + 1])
        )
        assert torch.equal(alone[0], whole[row])
        assert torch.equal(one[0], answer[row])
