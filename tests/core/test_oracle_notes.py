"""What attacks tell of their steps, the shapes a model wants, and tokens that models count."""

from __future__ import annotations

import pytest
import torch

from advkit.attacks.wrappers import averaged, momentum
from advkit.core.errors import AccessDenied
from advkit.core.lanes import Lanes
from advkit.core.oracle import MeteredOracle
from advkit.core.protocols import Access


class Counting:
    """Answers [n, 2], remembers the sizes of its calls and counts three tokens a row."""

    def __init__(self, lanes=None):
        self.tokens = 0
        self.calls = []
        if lanes is not None:
            self.lanes = lanes

    def __call__(self, x):
        self.calls.append(len(x))
        self.tokens += 3 * len(x)
        return x[:, :2] * 1.0

    def half(self):
        return lambda x: x[:, :1] * 1.0


def test_notes_belong_to_the_rows_of_the_meter():
    oracle = MeteredOracle(Counting(), 4)
    oracle.note(1, {"step": 0})
    oracle.take(torch.tensor([3, 1])).note(1, {"step": 1})
    oracle.take(torch.tensor([3, 1])).take(torch.tensor([0])).note(0, {"step": 2})
    averaged(momentum(oracle.take(torch.tensor([2]))), 2).note(0, {"step": 3})
    told = [oracle.meter.noted(row) for row in range(4)]
    assert told == [(), ({"step": 0}, {"step": 1}), ({"step": 3},), ({"step": 2},)]
    for row in (-1, 4):
        with pytest.raises(ValueError, match="serves 4"):
            oracle.note(row, {})


def test_notes_are_json_that_reads_back_the_same():
    oracle = MeteredOracle(Counting(), 1)
    oracle.note(0, {"a": torch.tensor(1.5), "b": (1, float("nan")), "c": {2: True}, "d": None, "e": torch.arange(2)})
    (note,) = oracle.meter.noted(0)
    assert note == {"a": 1.5, "b": [1, None], "c": {"2": True}, "d": None, "e": [0, 1]}


def test_a_model_that_names_its_lanes_is_called_in_them():
    x = torch.zeros(100, 3)
    usual, own = Counting(), Counting(Lanes(chunk=2**30, multiple=1))
    for model in (usual, own):
        MeteredOracle(model, 100, lanes=Lanes(64, 16))(x)
    assert usual.calls == [64, 48]
    assert own.calls == [100]
    assert Lanes.probed(own, x) == own.lanes
    seen = MeteredOracle(own, 100, lanes=Lanes(64, 16)).seen_as(lambda model: model.half())
    assert seen.lanes == own.lanes


def test_tokens_are_counted_once_whoever_asked():
    model = Counting()
    oracle = MeteredOracle(model, 5, lanes=Lanes(64, 1))
    oracle(torch.zeros(5, 3))
    oracle.take(torch.tensor([0]))(torch.zeros(1, 3))
    model(torch.zeros(7, 3))  # somebody else
    oracle.seen_as(lambda model: model)(torch.zeros(5, 3))
    assert oracle.meter.tokens == 3 * 11
    assert model.tokens == 3 * 18


def test_a_view_of_scores_needs_no_more_than_scores():
    class Scores:
        needs = Access.SCORES

        def __call__(self, model):
            return model.half()

    for access, fine in ((Access.GRADIENTS, True), (Access.SCORES, True), (Access.LABELS, False)):
        oracle = MeteredOracle(Counting(), 2, access)
        if fine:
            assert oracle.seen_as(Scores())(torch.ones(2, 3)).shape == (2, 1)
        else:
            with pytest.raises(AccessDenied, match="scores"):
                oracle.seen_as(Scores())
    with pytest.raises(AccessDenied, match="inside"):
        MeteredOracle(Counting(), 2, Access.SCORES).seen_as(lambda model: model.half())
