"""Parts that change which gradient a run follows, and how far (momentum: arXiv 1710.06081)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from advkit.attacks.base import TensorGoal, descended, lp_ball, per_row
from advkit.attacks.transfer.engine import Ask, GradientRule, Momentum, Objective, Prelude, Probe, Run, Smooth, Step
from advkit.attacks.wrappers import normalised
from advkit.core.checks import at_least_one, check, fraction, not_negative, positive
from advkit.core.errors import UsageError
from advkit.threat_models.lp import Linf


def images(x: Tensor, part: str) -> tuple[int, int]:
    """Height and width; UsageError where rows are no images."""
    if x.ndim != 4:
        raise UsageError(f"{part} works on images [B, C, H, W]; these rows have the shape {list(x.shape[1:])}")
    return int(x.shape[2]), int(x.shape[3])


@dataclass(frozen=True, kw_only=True)
class MI(Momentum):
    """Accumulate gradients, each divided by its mean absolute value (arXiv 1710.06081).

    decay:     how much of the accumulated gradient a step keeps, >= 0; 0 is no momentum
    normalise: divide by the mean absolute value first
    """

    decay: float = 1.0
    normalise: bool = True

    def __post_init__(self) -> None:
        not_negative(self, "decay")


@dataclass(frozen=True, kw_only=True)
class NI(Probe):
    """Look ahead along the accumulated gradient before asking (Nesterov; arXiv 1908.06281)."""

    momentum: ClassVar[float | None] = 1.0

    def __call__(self, z: Tensor, run: Run) -> Tensor:
        return z if run.velocity is None else z - run.alpha * run.decay * run.velocity


@dataclass(frozen=True, kw_only=True)
class EMI1(Probe):
    """Look ahead along the last gradient instead of the accumulated one (arXiv 2103.10609; PubDef's pregradient)."""

    momentum: ClassVar[float | None] = 1.0

    def __call__(self, z: Tensor, run: Run) -> Tensor:
        return z if run.raw is None else z - run.alpha * run.decay * normalised(run.raw)


@dataclass(frozen=True, kw_only=True)
class EMI(GradientRule):
    """Average the gradients at points on the line of the last gradient (arXiv 2103.10609).

    points: points on the line, >= 1
    radius: the farthest, in steps, >= 0
    """

    momentum: ClassVar[float | None] = 1.0
    points: int = 11
    radius: float = 7.0

    def __post_init__(self) -> None:
        at_least_one(self, "points")
        not_negative(self, "radius")

    def __call__(self, p: Tensor, run: Run) -> Tensor:
        way = torch.zeros_like(p) if run.raw is None else normalised(run.raw)
        places = (
            torch.linspace(-self.radius, self.radius, self.points, dtype=torch.float32).tolist()
            if self.points > 1
            else [0.0]
        )
        total = run.gradient(p - places[0] * run.alpha * way)
        for place in places[1:]:
            total = total + run.gradient(p - place * run.alpha * way)
        return total / len(places)


@dataclass(frozen=True, kw_only=True)
class VMI(GradientRule):
    """Add how the last step's neighbourhood differed from its point (variance tuning, arXiv 2103.15571).

    neighbours: points around, >= 0
    radius:     half the side of the neighbourhood, in units of eps, >= 0
    """

    momentum: ClassVar[float | None] = 1.0
    neighbours: int = 20
    radius: float = 1.5

    def __post_init__(self) -> None:
        not_negative(self, "neighbours", "radius")

    def __call__(self, p: Tensor, run: Run) -> Tensor:
        gradient = run.gradient(p)
        tuned = gradient + run.memory["variance"] if "variance" in run.memory else gradient
        if self.neighbours:
            around = torch.zeros_like(p)
            for i in range(self.neighbours):
                around = around + run.gradient(p + run.noise("vmi", i, self.radius * run.reach))
            run.memory["variance"] = around / self.neighbours - gradient
        return tuned


@dataclass(frozen=True, kw_only=True)
class GRA(GradientRule, Step):
    """Weigh a gradient and its neighbourhood's by their cosine; shorten steps where signs flip (Zhu et al., ICCV 2023).

    neighbours: points around, >= 1
    radius:     half the side of the neighbourhood, in units of eps, >= 0
    shrink:     factor on the step of a coordinate whose accumulated gradient changed sign, in (0, 1]
    """

    momentum: ClassVar[float | None] = 1.0
    neighbours: int = 20
    radius: float = 3.5
    shrink: float = 0.94

    def __post_init__(self) -> None:
        at_least_one(self, "neighbours")
        not_negative(self, "radius")
        fraction(self, "shrink", what="factor")

    def __call__(self, p: Tensor, run: Run) -> Tensor:
        gradient = run.gradient(p)
        around = torch.zeros_like(p)
        for i in range(self.neighbours):
            around = around + run.gradient(p + run.noise("gra", i, self.radius * run.reach))
        around = around / self.neighbours
        one, other = gradient.flatten(1), around.flatten(1)
        length = one.square().sum(1).sqrt() * other.square().sum(1).sqrt()
        cosine = per_row((one * other).sum(1) / torch.where(length > 0, length, 1.0), p)
        return cosine * gradient + (1 - cosine) * around

    def step(self, z: Tensor, velocity: Tensor, run: Run) -> Tensor:
        """Every coordinate has a step size of its own; the first comparison is with nothing and takes 1/shrink back."""
        size = run.memory.get("gra", torch.full_like(z, 1 / self.shrink))
        before = torch.zeros_like(z) if run.velocity is None else run.velocity
        size = torch.where(velocity.sign() == before.sign(), size, size * self.shrink)
        run.memory["gra"] = size
        return descended(run.ball, z, velocity, run.x, run.step_size * size)


@dataclass(frozen=True, kw_only=True)
class PGN(GradientRule):
    """Prefer flat regions: gradients of neighbours, balanced with those one step back from them (arXiv 2306.05225).

    neighbours: points around, >= 1
    radius:     half the side of the neighbourhood, in units of eps, >= 0
    balance:    weight of the gradients one step back, in [0, 1]; 0 asks only for the neighbours
    """

    momentum: ClassVar[float | None] = 1.0
    neighbours: int = 20
    radius: float = 3.0
    balance: float = 0.5

    def __post_init__(self) -> None:
        at_least_one(self, "neighbours")
        not_negative(self, "radius")
        fraction(self, "balance", ends="[]", what="weight")

    def __call__(self, p: Tensor, run: Run) -> Tensor:
        total = torch.zeros_like(p)
        for i in range(self.neighbours):
            near = p + run.noise("pgn", i, self.radius * run.reach)
            here = run.gradient(near)
            if self.balance:
                back = run.gradient(near + run.alpha * normalised(here))
                here = (1 - self.balance) * here + self.balance * back
            total = total + here
        return total / self.neighbours


@dataclass(frozen=True, kw_only=True)
class MEF(GradientRule):
    """Prefer regions flat and high on average: neighbours pushed by momenta of their own (MEF: Qiu et al., TIFS 2024).

    neighbours: points around, >= 1
    radius:     half the side of the neighbourhood, in units of eps, >= 0
    push:       how far a neighbour's own momentum moves it, in units of eps, >= 0
    inner:      how much of that momentum is taken back at every step, >= 0
    """

    momentum: ClassVar[float | None] = 0.5
    neighbours: int = 20
    radius: float = 2.0
    push: float = 0.15
    inner: float = 0.9

    def __post_init__(self) -> None:
        at_least_one(self, "neighbours")
        not_negative(self, "radius", "push", "inner")

    def __call__(self, p: Tensor, run: Run) -> Tensor:
        total = torch.zeros_like(p)
        for i in range(self.neighbours):
            name = f"mef {i}"
            own = run.memory.get(name, torch.zeros_like(p))
            near = p + run.noise("mef", i, self.radius * run.reach) - self.push * run.reach * own
            gradient = run.gradient(near) / self.neighbours
            run.memory[name] = normalised(gradient) - self.inner * own
            total = total + gradient
        return total


@dataclass(frozen=True, kw_only=True)
class MIG(GradientRule):
    """Integrated gradients of the probability, from black to the point (Ma et al., ICCV 2023).

    points: points on the way, >= 1
    """

    momentum: ClassVar[float | None] = 1.0
    points: int = 20

    def __post_init__(self) -> None:
        at_least_one(self, "points")

    def __call__(self, p: Tensor, run: Run) -> Tensor:
        ask = run.asking(run.oracle, Scored(run.goal, soft=True))
        total = torch.zeros_like(p)
        for i in range(1, self.points + 1):
            total = total + run.gradient(p * (i / self.points), ask)
        return p * total / self.points


@dataclass(frozen=True, kw_only=True)
class GI(Prelude):
    """Gather momentum in longer steps first, then start again with it (global momentum, arXiv 2211.11236).

    steps:  steps before the run, >= 0
    factor: their length in steps of the run, > 0
    """

    momentum: ClassVar[float | None] = 1.0
    steps: int = 5
    factor: float = 10.0

    def __post_init__(self) -> None:
        not_negative(self, "steps")
        positive(self, "factor")


@dataclass(frozen=True, kw_only=True)
class PI(Step):
    """Amplified steps whose overflow is handed on to the neighbouring pixels (patch-wise, arXiv 2007.06765).

    amplification: factor on the step, > 0
    overflow:      length of the step that hands on, in units of eps, >= 0
    kernel:        side of the neighbourhood that gets it, odd, >= 3
    """

    amplification: float = 10.0
    overflow: float = 1.0
    kernel: int = 3

    def __post_init__(self) -> None:
        not_negative(self, "overflow")
        positive(self, "amplification", what="factor")
        check(self, "kernel", self.kernel >= 3 and self.kernel % 2 == 1, "an odd side of at least 3")

    def step(self, z: Tensor, velocity: Tensor, run: Run) -> Tensor:
        images(z, "pi")
        if not isinstance(lp_ball(run.ball), Linf):
            raise UsageError("pi hands on what overflows coordinate by coordinate: it works in linf balls only")
        move = -self.amplification * run.alpha * velocity.sign()
        piled = run.memory.get("pi", torch.zeros_like(z)) + move
        cut = (piled.abs() - run.reach).clamp_min(0) * piled.sign()
        around = range(self.kernel)
        middle = self.kernel // 2
        height, width = z.shape[2:]
        padded = F.pad(cut, (middle, middle, middle, middle))
        spread = torch.zeros_like(cut)
        for i in around:
            for j in around:
                if (i, j) != (middle, middle):
                    spread = spread + padded[..., i : i + height, j : j + width]
        # What cancels leaves round-off, whose sign would be a whole step.
        handed = self.overflow * run.reach * torch.where(spread.abs() > 1e-4 * run.reach, spread, 0.0).sign()
        run.memory["pi"] = piled + handed
        return run.ball.project(z + move + handed, run.x)


@dataclass(frozen=True, kw_only=True)
class TI(Smooth):
    """Convolve gradients with a Gaussian, as if shifted images had been asked, too (arXiv 1904.02884).

    kernel: side of the kernel, odd, >= 1; the Gaussian is cut at 3 standard deviations. Papers use 15 at 299 x 299
            pixels; 1 is no smoothing
    """

    kernel: int = 5

    def __post_init__(self) -> None:
        check(self, "kernel", self.kernel >= 1 and self.kernel % 2 == 1, "an odd side of at least 1, such as 5")

    def weights(self, like: Tensor) -> Tensor:
        """One side of the kernel [k]; the kernel is its outer product."""
        places = torch.linspace(-3, 3, self.kernel, dtype=torch.float64) if self.kernel > 1 else torch.zeros(1).double()
        density = torch.exp(-places.square() / 2)
        return (density / density.sum()).to(like)

    def __call__(self, gradient: Tensor) -> Tensor:
        images(gradient, "ti")
        return gradient if self.kernel == 1 else separable(gradient, self.weights(gradient))


def separable(x: Tensor, weights: Tensor) -> Tensor:
    """x [B, C, H, W] convolved with weights along height and width, zeros outside.

    As sums of shifted images: convolution kernels choose their order of summation by the batch.
    """
    k = len(weights)
    height, width = x.shape[2:]
    factors = weights.tolist()
    padded = F.pad(x, (k // 2, k // 2))
    rows = sum(factors[i] * padded[..., i : i + width] for i in range(k))
    assert isinstance(rows, Tensor)
    padded = F.pad(rows, (0, 0, k // 2, k // 2))
    both = sum(factors[i] * padded[..., i : i + height, :] for i in range(k))
    assert isinstance(both, Tensor)
    return both


@dataclass(frozen=True, eq=False)
class Scored:
    """The goal as one number linear in the logits, or in the probabilities: the score that it wants lower.

    What a goal wants of an undecided answer is the gradient of its cross-entropy there: the true class down or the
    target up, against all others alike. So no label need be known: untargeted the score is the true class's, targeted
    minus the target's.

    soft: of the probabilities instead of the logits
    """

    goal: TensorGoal
    soft: bool = False
    kind: ClassVar[str] = "score"

    def loss(self, answer: Tensor) -> Tensor:
        """Float [B]."""
        with torch.enable_grad():
            undecided = torch.zeros_like(answer).requires_grad_()
            (pull,) = torch.autograd.grad(self.goal.under("ce").loss(undecided).sum(), undecided)
        # The classes that it treats alike get 0: a constant over all classes would move the logits, too.
        pull = pull - pull.median(1, keepdim=True).values
        return (pull * (answer.softmax(1) if self.soft else answer)).sum(1)

    def take(self, rows: Tensor) -> Scored:
        return Scored(self.goal.take(rows), self.soft)

    def reached(self, answer: Tensor) -> Tensor:
        return self.goal.reached(answer)

    def margin(self, answer: Tensor) -> Tensor:
        return self.goal.margin(answer)

    def under(self, loss: str) -> Scored:
        return self

    def to(self, device: Any) -> Scored:
        return Scored(self.goal.to(device), self.soft)


@dataclass(frozen=True, kw_only=True)
class Logit(Objective):
    """Raise the target's logit (untargeted: lower the true class's), which never saturates (arXiv 2012.11207)."""

    def begin(self, run: Run) -> Ask:
        return run.asking(run.oracle, Scored(run.goal))
