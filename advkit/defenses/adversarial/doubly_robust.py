"""Doubly robust instance-reweighted adversarial training (Sow et al., ICLR 2024, arXiv 2308.00311)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from scipy.optimize import brentq
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from advkit.attacks.gradient.pgd import PGD, Start
from advkit.core.checks import check, fraction, not_negative, one_of, positive
from advkit.core.errors import BadModel, UsageError
from advkit.core.protocols import Data, Rng
from advkit.defenses.adversarial.barrier import BarrierAttack, Walls, give
from advkit.defenses.adversarial.base import AdversarialTraining, OnExamples, RobustObjective, attacked
from advkit.defenses.adversarial.trades import diverging
from advkit.threat_models.goals.untargeted import Untargeted
from advkit.threat_models.lp import wide
from advkit.training.loop import Epoch, Objective, Review
from advkit.training.ranks import gathered

Outer = Literal["ce", "trades", "alp"]
BETA = {"trades": 6.0, "alp": 0.5}
FIGURES = ("effective_sample_size", "weight_kl", "clipped_weights", "price")
_FARTHEST = 1e12  # of r from the spread of the losses, either way, in the search for it
_LEAST = 1e-9


def weights(losses: Tensor, r: float) -> Tensor:
    """The worst reweighting of samples with these losses [n], at price r of leaving uniform weights, in nats.

    The p of the simplex that maximises sum p_i l_i - r sum p_i log(n p_i): softmax(losses / r), constant. r = inf gives
    1/n each; r = 0, its limit, shares all weight among the largest losses. Raises UsageError for r < 0.
    """
    if not r >= 0:
        raise UsageError(f"the price r is {r}; expected a number above 0, or inf for uniform weights")
    held = losses.detach()
    if math.isinf(r):
        return torch.full_like(held, 1 / max(1, len(held)))
    below = held - held.amax()
    if r == 0:
        largest = (below == 0).to(held.dtype)
        return largest / largest.sum()
    return (below / r).softmax(0)


def value(losses: Tensor, r: float) -> Tensor:
    """What the reweighting makes of the losses [n]: r log mean exp(losses / r), between their mean and maximum.

    Its gradient with respect to the losses is `weights(losses, r)`.
    """
    if math.isinf(r):
        return losses.mean()
    if r == 0:
        return losses.amax()
    top = losses.detach().amax()
    return top + r * (((losses - top) / r).logsumexp(0) - math.log(len(losses)))


def kl(p: Tensor) -> Tensor:
    """KL(p || uniform) of weights [n] that sum to 1, in nats: 0 to log n."""
    return torch.xlogy(p, p * len(p)).sum()


def ball(losses: Tensor, rho: float) -> float:
    """The price r at which the weights of these losses [n] are exactly KL(p || uniform) = rho from uniform, in nats.

    inf for rho = 0 and for losses that are all equal; 0 where rho is log(n / number of largest losses) or more: then
    all weight is on the largest. The value at this price, plus r * rho, is the most that weights within the KL ball
    make of the losses. Raises UsageError for rho < 0.
    """
    if not rho >= 0:
        raise UsageError(f"the radius rho is {rho}; expected a number of at least 0, in nats")
    held = losses.detach().double().cpu()
    spread = float(held.amax() - held.amin())
    if rho == 0 or spread == 0 or not math.isfinite(spread):
        return math.inf
    if rho >= math.log(len(held) / int((held == held.amax()).sum())) - 1e-12:
        return 0.0

    def beyond(log_r: float) -> float:
        return float(kl(weights(held, math.exp(log_r)))) - rho

    middle, farthest = math.log(spread), math.log(_FARTHEST)
    low, high = middle - 1, middle + 1
    while beyond(low) < 0:
        low -= 2
        if low < middle - farthest:  # losses that float64 hardly tells apart
            return 0.0
    while beyond(high) > 0:
        high += 2
        if high > middle + farthest:
            return math.inf
    return math.exp(brentq(beyond, low, high, xtol=1e-12, rtol=1e-14))


def tracked(log_u: Tensor, losses: Tensor, r: float, rate: float) -> Tensor:
    """log of (1 - rate) u + rate mean exp(losses / r), from log u; in logarithms throughout. rate in (0, 1]."""
    current = (losses.detach() / r).logsumexp(0) - math.log(len(losses))
    if rate >= 1:
        return current
    return torch.logaddexp(log_u + math.log1p(-rate), current + math.log(rate))


@dataclass(frozen=True, kw_only=True)
class DoublyRobust(AdversarialTraining):
    """Doubly robust training: PGD adversarial training under the worst reweighting of the samples at a KL price.

    The weights have a closed form, the softmax of the adversarial losses over the price. The defaults are the minimal
    version: PGD inside, softmax weights within the batch, no implicit term. The full version of the paper is
    `eta=0.1,barrier=0.001,implicit=true`. Judge it by `tail_30_accuracy`: it lifts weak and rare classes, and there
    is little to gain on balanced data.

    r:        price of leaving uniform weights, in nats, > 0; inf is the method without weights (pgd_at, trades); small
              values look at the worst sample alone. 1 where rho is not given
    rho:      in place of r: radius of a KL ball around uniform weights within each batch, >= 0 in nats; r is solved for
    eta:      rate of the moving average that normalises the weights, in (0, 1]; 1 normalises within the batch, which
              biases the gradient of the whole set's objective
    barrier:  weight of a log barrier in the inner problem, in units of the loss, >= 0; 0 is PGD. Linf alone
    implicit: add the gradient through the solution of the inner problem; needs a barrier and a model that can be
              differentiated twice
    outer:    ce: cross-entropy; trades: clean cross-entropy plus beta times the weighted divergence, with the inner
              attack of TRADES; alp: cross-entropy plus beta times the mean squared difference of clean and adversarial
              logits
    beta:     weight of the second term, >= 0; by default 6 for trades, 0.5 for alp
    q_max:    most that one sample weighs in a batch, in units of the uniform weight; none for no limit
    weight_clean: let the weights act on the clean term of trades, too

    Weights are those of the losses that are differentiated (training mode), and constant for the gradient. The implicit
    term takes the network as locally linear (arXiv 2112.12376). The box of legal inputs counts among the inequalities
    of the barrier; of ball and box the nearer wall alone does. With rho and eta < 1, log r moves
    at rate eta, too, and the average is carried over from one price to the next as r log u. The log has the means over
    the epoch's steps of `effective_sample_size`, 1 / (n sum p^2), 1 for uniform weights; `weight_kl`, KL(p || uniform);
    `clipped_weights`, the share that q_max held back; and `price`, r (null where it is inf).
    """

    r: float | None = None
    rho: float | None = None
    eta: float = 1.0
    barrier: float = 0.0
    implicit: bool = False
    outer: Outer = "ce"
    beta: float | None = None
    q_max: float | None = 10.0
    weight_clean: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "r", what="price in nats")
        not_negative(self, "rho", what="radius in nats")
        not_negative(self, "barrier", "beta", what="weight")
        fraction(self, "eta", what="rate")
        one_of(self, "outer", ("ce", "trades", "alp"))
        check(self, "q_max", self.q_max is None or self.q_max >= 1, "at least 1, the uniform weight, or none")
        check(self, "barrier", math.isfinite(self.barrier), "a finite weight")
        if self.r is not None and self.rho is not None:
            raise UsageError(f"r={self.r:g} and rho={self.rho:g} both set the price; give one of them")
        if self.barrier and self.norm != "linf":
            raise UsageError(f"barrier={self.barrier:g} with norm={self.norm}: the barrier is written for linf alone")
        if self.implicit and not self.barrier:
            raise UsageError("implicit=true differentiates the solution under a barrier: say barrier=0.001")
        if self.beta is not None and self.outer == "ce":
            raise UsageError(
                f"beta={self.beta:g} weighs the second term of outer=trades and outer=alp; outer=ce has none"
            )

    @property
    @override
    def attack(self) -> PGD:
        walk = super().attack
        start: Start = "gaussian" if self.outer == "trades" else "random"
        return PGD(steps=walk.steps, step_size=walk.step_size, start=start, keep="last", stop=False)

    @property
    def inner(self) -> Any:
        """What makes the examples: PGD, or ascent under the barrier."""
        if not self.barrier:
            return self.attack
        return BarrierAttack(steps=self.steps, size=min(1.0, self.attack.step_size), c=self.barrier)

    @override
    def objective(self) -> Objective:
        return DoublyRobustObjective(self)


class DoublyRobustObjective(OnExamples, RobustObjective):
    """Weighted losses, and the moving averages behind the weights."""

    def __init__(self, defense: DoublyRobust) -> None:
        super().__init__(defense)
        self.settings = defense
        self.beta = BETA.get(defense.outer, 0.0) if defense.beta is None else defense.beta
        if defense.implicit:
            self.eager = "implicit=true differentiates the network twice, which a compiled one can't be"
        self.steps = 0
        self.value = torch.zeros((), dtype=torch.float64)  # r log u
        self.log_price = torch.full((), math.nan, dtype=torch.float64)
        self.sums = torch.zeros(len(FIGURES), dtype=torch.float64)
        self.summed = 0

    @override
    def prepare(self, model: Any, data: Data, rng: Rng) -> None:
        """Raises BadModel for a model that can't be differentiated twice where that is needed."""
        if self.settings.implicit:
            check_twice_differentiable(model, data.x[:2].to(model.device))

    @override
    def examples(self, model: Any, x: Tensor, y: Tensor, rows: Tensor, rng: Rng) -> Tensor:
        inner = self.settings.inner
        if self.settings.outer == "trades":
            return x if self.beta == 0 else diverging(model, self.settings, x, rng, inner)
        space = self.defense.ball(model.space)
        return attacked(model, inner, x, Untargeted(y), space, rng.at("attack"), self.defense.mode)

    @override
    def loss_on(self, made: Tensor, model: Any, x: Tensor, y: Tensor, rows: Tensor, rng: Rng) -> Tensor:
        settings = self.settings
        clean = None if settings.outer == "ce" else model(x)
        plain = (
            None if settings.outer != "trades" else functional.cross_entropy(cast(Tensor, clean), y, reduction="none")
        )
        if plain is not None and self.beta == 0:
            return plain.mean()
        z = made.detach().requires_grad_(settings.implicit)
        answer = model(z)
        lower = (
            functional.cross_entropy(answer, y, reduction="none")
            if settings.outer != "trades"
            else divergences(cast(Tensor, clean), answer)
        )
        losses = lower
        if settings.outer == "alp":
            losses = lower + self.beta * (cast(Tensor, clean) - answer).square().mean(1)
        whole = gathered(losses)  # the weights are those of the batch, whichever process has the rows
        q = self.shares(whole.detach())
        total = _weighted(whole, q)
        if settings.implicit:
            each = implicit_term(lower, losses, z, x, self.defense.ball(model.space), settings.barrier)
            term = _weighted(gathered(each), q)
            total = total + (term - term.detach())  # a gradient, no part of the loss
        if plain is None:
            return total
        return _weighted(gathered(plain), q if settings.weight_clean else None) + self.beta * total

    def shares(self, losses: Tensor) -> Tensor | None:
        """Weights [n] of these losses [n], a step of the moving averages; None for exactly uniform ones."""
        n = len(losses)
        self.steps += 1
        rate = max(self.settings.eta, 1 / self.steps)
        held = losses.to(wide(losses))
        r = self._price(held, rate)
        if math.isinf(r):
            self.value = held.mean()
            self._note(torch.full_like(held, 1 / n), torch.zeros_like(held[0]), r)
            return None
        log_u = tracked(self.value.to(held) / r, held, r, rate)
        self.value = r * log_u
        q = torch.exp(held / r - log_u) / n
        clipped = torch.zeros_like(q[0])
        if self.settings.q_max is not None:
            most = self.settings.q_max / n
            clipped = (q > most).to(q.dtype).mean()
            q = q.clamp(max=most)
        self._note(q / q.sum(), clipped, r)
        return q.to(losses.dtype)

    def _price(self, losses: Tensor, rate: float) -> float:
        """r at this step; inf for uniform weights."""
        settings = self.settings
        if settings.rho is None:
            return 1.0 if settings.r is None else settings.r
        solved = ball(losses, settings.rho)
        known = float(self.log_price)
        if math.isinf(solved):  # equal losses say nothing of the price
            return solved if settings.rho == 0 or math.isnan(known) else math.exp(known)
        # All weight on the largest loss is a price so small that the softmax is that, to the last bit.
        log_r = math.log(solved or _LEAST * float(losses.amax() - losses.amin()))
        if settings.eta < 1 and not math.isnan(known):
            log_r = (1 - rate) * known + rate * log_r
        self.log_price = torch.tensor(log_r, dtype=torch.float64)
        return math.exp(log_r)

    def _note(self, p: Tensor, clipped: Tensor, r: float) -> None:
        """Add a step to the epoch's figures."""
        size = 1 / (len(p) * p.square().sum())
        price = math.nan if math.isinf(r) else r  # a log is JSON, which has no infinity
        now = torch.stack((size, kl(p), clipped, torch.full_like(size, price)))
        self.sums = self.sums.to(now) + now
        self.summed += 1

    @override
    def review(self, entry: Epoch, log: Sequence[Epoch]) -> Review:
        """Means over the epoch's steps of what the weights are like."""
        further = super().review(entry, log)
        if not self.summed:
            return further
        means = (self.sums / self.summed).tolist()
        self.sums, self.summed = torch.zeros_like(self.sums), 0
        return Review({**further.figures, **dict(zip(FIGURES, means, strict=True))}, further.halt)

    @override
    def state(self) -> dict[str, Tensor]:
        """The moving averages and the figures of an epoch that is not over."""
        counts = torch.tensor([self.steps, self.summed])
        return {"value": self.value, "log_price": self.log_price, "sums": self.sums, "counts": counts}

    @override
    def load(self, state: dict[str, Tensor]) -> None:
        self.value, self.log_price, self.sums = state["value"], state["log_price"], state["sums"]
        self.steps, self.summed = (int(count) for count in state["counts"].tolist())


def divergences(clean: Tensor, adversarial: Tensor) -> Tensor:
    """KL(softmax(clean) || softmax(adversarial)) per row [B], of logits [B, classes]; gradients flow through both."""
    p = clean.log_softmax(1)
    return functional.kl_div(adversarial.log_softmax(1), p, reduction="none", log_target=True).sum(1)


def _weighted(losses: Tensor, q: Tensor | None) -> Tensor:
    """sum q_i l_i; the mean, to the bit, where weights are uniform."""
    return losses.mean() if q is None else (q * losses).sum()


def implicit_term(lower: Tensor, upper: Tensor, z: Tensor, x: Tensor, around: Any, c: float) -> Tensor:
    """A quantity per row [B] whose gradient is what the solution z of the inner problem adds to that of `upper`.

    lower:  the attacker's loss [B] at z, maximised under the barrier
    upper:  the loss [B] at z that is trained on
    z, x:   solutions and clean rows [B, ...]; z requires a gradient, and both losses were computed from it
    around: the Linf ball, bound to its box
    c:      weight of the barrier

    <grad_z lower, v> with v = H^-1 grad_z upper constant, H the barrier's second derivative at z: the loss's own second
    derivative in z is left out, which is exact for losses that are linear in z.
    """
    (push,) = torch.autograd.grad(lower.sum(), z, create_graph=True)
    pull = push.detach() if upper is lower else torch.autograd.grad(upper.sum(), z, retain_graph=True)[0]
    walls = Walls.around(x, around)
    v = give(z.detach() - walls.middle, walls.half, c) * pull
    return (push * v).flatten(1).sum(1)


def check_twice_differentiable(model: Any, x: Tensor) -> None:
    """Raise BadModel where the gradient of an input gradient can't be had on these rows; leaves no gradients.

    A whole backward pass: asked for some weights' gradients alone, torch leaves out what it can't differentiate twice
    and says nothing.
    """
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        try:
            (push,) = torch.autograd.grad(model(leaf).logsumexp(1).sum(), leaf, create_graph=True)
            push.sum().backward()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise BadModel(
                f"implicit=true differentiates the model twice, and {model.name} can't be ({error}); leave implicit out"
            ) from error
        finally:
            for top in model.modules():
                top.zero_grad(set_to_none=True)
