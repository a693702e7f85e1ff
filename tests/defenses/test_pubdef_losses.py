import pytest
import torch

from advkit.core.errors import UsageError
from advkit.defenses.adversarial.pubdef_losses import (
    base_weights,
    dynamic_weights,
    moved_average,
    random_loss,
    start_average,
    topk_loss,
    weighted_loss,
)


@pytest.fixture
def losses():
    return torch.rand(5, 7, generator=torch.Generator().manual_seed(3)) * 3


def test_base_weights_share_the_adversarial_part_evenly_and_sum_to_one():
    assert torch.allclose(base_weights((1.0, 1.0), 4), torch.tensor([0.5, 0.125, 0.125, 0.125, 0.125]))
    assert torch.allclose(base_weights((2.0, 1.0, 1.0), 2), torch.tensor([0.5, 0.25, 0.25]))
    assert torch.allclose(base_weights((0.25, 0.75), 1), torch.tensor([0.25, 0.75]))


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 1.0, 1.0), (-1.0, 2.0), (0.0, 0.0), (float("nan"), 1.0)])
def test_unusable_weights_are_refused(weights):
    with pytest.raises(UsageError):
        base_weights(weights, 3)


def test_random_equals_all_with_one_source(losses):
    two = losses[:2]
    weights = base_weights((0.3, 0.7), 1)
    assert torch.equal(random_loss(two, weights), weighted_loss(two, weights))


def test_random_equals_all_in_expectation_over_the_drawn_source(losses):
    weights = base_weights((0.5, 0.5), 4)
    one_each = [random_loss(torch.stack([losses[0], losses[k]]), weights) for k in range(1, 5)]
    # The draw is uniform and independent per sample; the loss is linear in each sample's draw.
    assert torch.allclose(torch.stack(one_each).mean(), weighted_loss(losses, weights))


def test_topk_with_every_source_equals_all(losses):
    weights = base_weights((3.0, 1.0, 2.0, 1.5, 0.5), 4)
    assert torch.allclose(topk_loss(losses, weights, 4), weighted_loss(losses, weights))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_topk_is_per_sample_and_agrees_with_a_loop(losses, k):
    weights = base_weights((3.0, 1.0, 2.0, 1.5, 0.5), 4)
    expected, hardest = [], []
    for b in range(losses.shape[1]):
        order = sorted(range(1, 5), key=lambda j: -float(losses[j, b]))[:k]
        top = weights[0] * losses[0, b] + sum(weights[j] * losses[j, b] for j in order)
        expected.append(top / (weights[0] + sum(weights[j] for j in order)))
        hardest.append(float(sum(losses[j, b] for j in order) / k) >= float(losses[1:, b].mean()))
    assert torch.allclose(topk_loss(losses, weights, k), torch.stack(expected).mean())
    assert all(hardest)


def test_topk_gradient_reaches_the_selected_streams_alone():
    losses = torch.tensor([[1.0, 1.0], [2.0, 0.5], [0.1, 4.0]], requires_grad=True)
    topk_loss(losses, base_weights((0.5, 0.5), 2), 1).backward()
    assert torch.equal(losses.grad != 0, torch.tensor([[True, True], [True, False], [False, True]]))


@pytest.mark.parametrize("k", [0, 5])
def test_k_outside_the_sources_is_refused(losses, k):
    with pytest.raises(UsageError):
        topk_loss(losses, base_weights((0.5, 0.5), 4), k)


@pytest.mark.parametrize("include_clean", [False, True])
def test_dynamic_weights_sum_to_one(include_clean):
    average = torch.tensor([0.7, 0.1, 2.0, 0.4])
    assert torch.allclose(dynamic_weights(average, base_weights((0.4, 0.6), 3), include_clean).sum(), torch.tensor(1.0))


def test_clean_weight_stays_put_unless_it_is_included():
    average, weights = torch.tensor([9.0, 0.1, 2.0]), base_weights((0.4, 0.6), 2)
    assert dynamic_weights(average, weights)[0] == weights[0]
    assert dynamic_weights(average, weights, include_clean=True)[0] > weights[0]


def test_larger_loss_larger_weight_and_proportional_at_rate_one():
    weights = base_weights((0.5, 0.5), 3)
    current = torch.tensor([1.0, 0.2, 0.8, 3.0])
    average = moved_average(start_average(4), current, 1.0)
    moved = dynamic_weights(average, weights)
    assert moved[1] < moved[2] < moved[3]
    assert torch.allclose(moved[1:] / moved[1], current[1:] / current[1])
    both = dynamic_weights(average, weights, include_clean=True)
    assert torch.allclose(both, current * weights / (current * weights).sum())


def test_constant_losses_converge_instead_of_compounding():
    weights = base_weights((0.5, 0.5), 3)
    kept = weights.clone()
    current, average = torch.tensor([0.3, 0.5, 1.0, 2.0]), start_average(4)
    for _ in range(300):
        average = moved_average(average, current, 0.1)
        moved = dynamic_weights(average, weights)
    assert torch.allclose(average, current, atol=1e-5)
    assert torch.allclose(moved[1:], 0.5 * current[1:] / current[1:].sum(), atol=1e-5)
    assert torch.equal(weights, kept)


def test_all_zero_averages_leave_the_base_weights():
    weights = base_weights((0.5, 0.5), 2)
    for include_clean in (False, True):
        assert torch.equal(dynamic_weights(torch.zeros(3), weights, include_clean), weights)


def test_weights_are_detached(losses):
    live = losses.clone().requires_grad_()
    moved = dynamic_weights(moved_average(start_average(5), live.mean(1), 0.5), base_weights((0.5, 0.5), 4))
    assert not moved.requires_grad
