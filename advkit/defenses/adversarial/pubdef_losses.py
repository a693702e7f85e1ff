"""Losses over one clean and S transfer streams, and how they are weighted (PubDef, arXiv 2310.17645).

Throughout, l[k, b] is the cross-entropy of sample b in stream k: stream 0 is the clean image, stream k >= 1 the stored
image made on source k from the same sample; w [S + 1] are the streams' base weights and sum to 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from advkit.core.errors import UsageError


def base_weights(weights: Sequence[float], sources: int) -> Tensor:
    """Base weights [S + 1] that sum to 1, from (clean, adversarial) or from one number per stream.

    With two numbers the second is shared evenly by the sources. Raises UsageError on another length, on a negative
    number and where clean or all sources together get nothing to normalise.
    """
    values = torch.tensor(tuple(weights), dtype=torch.float32)
    if len(values) == 2:
        values = torch.cat([values[:1], values[1:].expand(sources) / sources])
    if len(values) != sources + 1:
        raise UsageError(
            f"{len(weights)} weights for {sources} sources; expected 2 (clean, adversarial) or {sources + 1} "
            "(clean, then one per source)"
        )
    if not bool(torch.isfinite(values).all()) or bool((values < 0).any()) or float(values.sum()) == 0:
        raise UsageError(f"weights {tuple(weights)}; expected numbers >= 0 that are not all zero")
    return values / values.sum()


def random_loss(losses: Tensor, weights: Tensor) -> Tensor:
    """w_0 mean l_0 + (w_1 + ... + w_S) mean l_1, where losses [2, B] hold the clean stream and one drawn per sample."""
    shares = torch.stack([weights[0], weights[1:].sum()])
    return weighted_loss(losses, shares)


def weighted_loss(losses: Tensor, weights: Tensor) -> Tensor:
    """sum_k w_k mean_b l[k, b] over losses [S + 1, B]."""
    return (weights * losses.mean(1)).sum()


def topk_loss(losses: Tensor, weights: Tensor, k: int) -> Tensor:
    """Mean over samples of the clean and the sample's own k hardest streams, their weights renormalised.

    The ranking is per sample over the same sample's losses; the released code ranks streams that were shuffled apart.
    Ties go to the source that comes first. Raises UsageError unless 1 <= k <= S.
    """
    sources = len(losses) - 1
    if not 1 <= k <= sources:
        raise UsageError(f"k={k}; expected 1 to {sources}, the number of sources")
    order = losses[1:].detach().sort(dim=0, descending=True, stable=True).indices[:k]
    chosen = losses[1:].gather(0, order)
    share = weights[1:][order]
    total = weights[0] * losses[0] + (share * chosen).sum(0)
    return (total / (weights[0] + share.sum(0))).mean()


def start_average(streams: int) -> Tensor:
    """The moving average before the first step: 1 / (S + 1) for every stream."""
    return torch.full((streams,), 1.0 / streams, dtype=torch.float32)


def moved_average(average: Tensor, current: Tensor, rate: float) -> Tensor:
    """(1 - a) average + a current, as a tensor of its own.

    The released code lets average and weights share memory on the CPU, where they then compound at every step.
    """
    return (1.0 - rate) * average + rate * current.detach().to(average)


def dynamic_weights(average: Tensor, weights: Tensor, include_clean: bool = False) -> Tensor:
    """Weights [S + 1] in proportion to average x base weight; they sum to 1.

    The clean weight stays at w_0 and the sources share 1 - w_0, unless include_clean lets the clean stream compete too.
    Where every competing average is zero the base weights are returned unchanged.
    """
    product = average.detach() * weights
    if include_clean:
        total = product.sum()
        moved = product / total
    else:
        total = product[1:].sum()
        moved = torch.cat([weights[:1], (1.0 - weights[0]) * product[1:] / total])
    return torch.where(total > 0, moved, weights)
