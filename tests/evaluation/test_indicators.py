"""The six indicators against loss curves worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from advkit.evaluation.trust import indicators

NAN = math.nan


def curves(*rows: list[float]) -> torch.Tensor:
    """[T, rows] from one list per row."""
    return torch.tensor(rows, dtype=torch.float64).T


def test_i1_is_one_when_a_row_has_no_gradient_or_the_backward_failed() -> None:
    live = torch.tensor([[0.0, 1e-30], [2.0, 0.0]])
    assert indicators.unavailable_gradients(live) == 0.0
    assert indicators.unavailable_gradients(torch.tensor([[0.0, 0.0], [2.0, 0.0]])) == 1.0
    assert indicators.unavailable_gradients(torch.zeros(0, 3)) == 0.0
    assert indicators.unavailable_gradients(None) == 1.0


def test_i2_is_the_mean_relative_change_capped_at_one() -> None:
    base = torch.tensor([2.0, 0.0, -1.0, 0.01])
    perturbed = torch.tensor([[2.2, 0.3, -1.0, 5.0], [1.6, -0.1, -1.0, -5.0]])
    # (0.1 + 0.2) / 2; a loss of 0 is divided by 1: (0.3 + 0.1) / 2; nothing moved; 500 and more is capped
    expected = torch.tensor([0.15, 0.2, 0.0, 1.0])
    torch.testing.assert_close(indicators.unstable_predictions(base, perturbed), expected)


def test_i3_names_rows_that_were_reached_and_returned_unreached() -> None:
    reached = torch.tensor([[False, True, True, False], [False, False, True, False]])
    returned = torch.tensor([False, False, True, True])
    assert indicators.silent_success(reached, returned).tolist() == [False, True, False, False]


@pytest.mark.parametrize(
    ("curve", "flag"),
    [
        ([3.0, 2.0, 1.0], True),  # three values: the whole curve is its own tail
        ([5.0] * 20, False),  # constant
        ([0.0] * 20, False),
        ([1.0] + [0.0] * 9, True),  # ten values: the fall is inside the tail
        ([1.0] + [0.0] * 10, False),  # eleven: it lies before
        ([20.0] + [0.0] * 10, False),
        ([10.0] * 12 + [9.0, 0.0], True),
        ([100.0] + [5.1] * 10 + [0.0], True),  # 0.051 left
        ([100.0] + [4.9] * 10 + [0.0], False),  # 0.049 left
        ([10.0, 0.0] + [10.0, 3.0] * 10, False),  # up and down, but never again below the minimum
        ([7.0], False),
        ([NAN] * 5, False),
    ],
)
def test_i4_rescales_takes_the_running_minimum_and_looks_at_the_last_ten(curve: list[float], flag: bool) -> None:
    assert indicators.incomplete_optimization(curves(curve)).tolist() == [flag]


def test_i4_counts_only_values_a_row_was_asked_for() -> None:
    stopped = [4.0, 3.0, 2.0] + [NAN] * 20
    long = [4.0] + [1.0] * 22
    assert indicators.incomplete_optimization(curves(stopped, long)).tolist() == [True, False]


def test_i4_does_not_depend_on_the_scale_of_the_loss() -> None:
    curve = [9.0, 4.0, 3.0, 2.5] + [2.4 - 0.01 * k for k in range(12)]
    flags = indicators.incomplete_optimization(curves(curve, [1e6 * v - 7 for v in curve], [1e-6 * v for v in curve]))
    assert len(set(flags.tolist())) == 1


def test_i5_needs_a_fooled_surrogate() -> None:
    surrogate, victim = torch.tensor([3, 3, 1, 2]), torch.tensor([3, 1, 0, 2])
    fooled = torch.tensor([True, True, False, True])
    assert indicators.transfer_failure(surrogate, victim, fooled).tolist() == [False, True, False, False]


def test_i6_is_a_share_of_the_sound_rows_without_the_silent_ones() -> None:
    sound = torch.tensor([True, True, True, True, False])
    broken = torch.tensor([True, True, False, False, False])
    assert indicators.unconstrained_attack_failure(sound, broken) == 0.5
    silent = torch.tensor([False, False, True, False, False])
    assert indicators.unconstrained_attack_failure(sound, broken, silent) == 0.25
    assert indicators.unconstrained_attack_failure(torch.zeros(3, dtype=torch.bool), broken[:3]) == 0.0
