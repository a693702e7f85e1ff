"""Transfer attacks as sums of parts: probe + transforms + gradient rule + smoothing + momentum + step.

The run is that of the iterative method (arXiv 1607.02533) with momentum (arXiv 1710.06081); every part changes one of
its lines. Gradients are of the goal's loss, which is descended: signs are the opposite of papers that ascend.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Protocol, TypeVar, cast

import torch
from torch import Tensor
from typing_extensions import override

from advkit.attacks import ATTACKS
from advkit.attacks.base import Best, TensorGoal, TensorOracle, descended, lp_ball
from advkit.attacks.gradient.pgd import Start, starting_point
from advkit.attacks.transfer import PARTS
from advkit.attacks.wrappers import accumulated, normalised
from advkit.core.checks import at_least_one, one_of, positive
from advkit.core.errors import BudgetExhausted, SpecError, UnknownName, UsageError
from advkit.core.protocols import Access, Ball, MadeOf, Rng, Stepped, WantsData
from advkit.core.spaces import Box
from advkit.threat_models.lp import L1, L2, Linf

# Copies that go through the transforms at a time. A constant, so that neither draws nor sums depend on the batch.
TOGETHER = 5


class Ask(Protocol):
    """Points [copies * rows, ...], copy after copy, each holding every row -> gradients of the same shape."""

    def __call__(self, points: Tensor, copies: int = 1) -> Tensor: ...


@dataclass(frozen=True)
class Draw:
    """Random numbers of copies that go together: copy after copy, each holding every row, `copies * rows` in all."""

    rng: Rng
    rows: Tensor
    copies: int

    def _drawn(self, kind: str, name: str, shape: tuple[int, ...]) -> Tensor:
        like = self.rows.new_empty(len(self.rows), self.copies, *shape)
        drawn: Tensor = getattr(self.rng.at(name), kind)(like)
        return drawn.transpose(0, 1).reshape(-1, *shape)

    def uniform(self, name: str, *shape: int) -> Tensor:
        """Uniform in [0, 1), [copies * rows, *shape]."""
        return self._drawn("uniform", name, shape)

    def normal(self, name: str, *shape: int) -> Tensor:
        """Standard normal, [copies * rows, *shape]."""
        return self._drawn("normal", name, shape)


class Part(ABC):  # noqa: B024
    """One term of a composition; its class says which line of the run it changes.

    momentum:   the decay that it is published with; None: published on plain gradients. A part `mi` overrules it
    wants_data: it needs labelled data of the attacker's own
    """

    momentum: ClassVar[float | None] = None
    wants_data: ClassVar[bool] = False


class Probe(Part):
    """Where gradients are asked for instead of at z."""

    @abstractmethod
    def __call__(self, z: Tensor, run: Run) -> Tensor: ...


class Transform(Part):
    """What happens to the candidates before the model sees them, differentiably; gradients are averaged over copies."""

    copies: int = 1

    @abstractmethod
    def __call__(self, x: Tensor, copy: Tensor, draw: Draw, run: Run) -> Tensor:
        """x [n, ...] -> [n, ...]; copy: which of the part's copies each is, long [n]."""


class GradientRule(Part):
    """How a step's gradient is made of the gradients at one or many points."""

    @abstractmethod
    def __call__(self, p: Tensor, run: Run) -> Tensor: ...


class Smooth(Part):
    """What happens to a step's gradient before it is accumulated."""

    @abstractmethod
    def __call__(self, gradient: Tensor) -> Tensor: ...


class Step(Part):
    """From z along the accumulated gradient to the next z."""

    @abstractmethod
    def step(self, z: Tensor, velocity: Tensor, run: Run) -> Tensor: ...


class Prelude(Part):
    """Steps before the run that leave nothing but their momentum."""

    steps: int
    factor: float


class View(Part):
    """The model seen differently: another backward rule."""

    @abstractmethod
    def through(self, oracle: TensorOracle, x: Tensor) -> TensorOracle: ...


class Objective(Part):
    """What is descended instead of the goal's loss."""

    @abstractmethod
    def begin(self, run: Run) -> Ask: ...


P = TypeVar("P", bound=Part)
ROLES: tuple[tuple[type[Part], str], ...] = (
    (Probe, "probes"),
    (GradientRule, "gradient rules"),
    (Smooth, "smoothings"),
    (Step, "steps"),
    (Prelude, "preludes"),
    (Objective, "objectives"),
    (View, "backward rules"),
)


@dataclass
class Run:
    """What the parts of a composition know during a run.

    alpha:    length of a step, per coordinate, in units of the inputs
    reach:    eps per coordinate: eps in Linf; in L2 and L1 the change of every coordinate when all change alike
    velocity: accumulated gradient; None before the first step
    raw:      the last step's gradient before it was accumulated; None before the first step
    memory:   tensors per row that a part keeps between steps, by name
    notes:    what else a part keeps, by name
    """

    oracle: TensorOracle
    x: Tensor
    goal: TensorGoal
    ball: Ball[Tensor]
    rng: Rng
    steps: int
    step_size: float
    reach: float
    decay: float
    transforms: tuple[Transform, ...] = ()
    step: int = 0
    velocity: Tensor | None = None
    raw: Tensor | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    ask: Ask = field(init=False)
    calls: int = 0

    def __post_init__(self) -> None:
        self.ask = self.asking(self.oracle, self.goal)

    @property
    def alpha(self) -> float:
        return self.step_size * self.reach

    @property
    def box(self) -> Box:
        """The legal inputs."""
        box: Box = lp_ball(self.ball).box
        return box

    def asking(self, oracle: TensorOracle, goal: TensorGoal) -> Ask:
        """Gradients of a goal's loss through an oracle."""
        # Taken oracles, not `of`: their meter notices gradients that are zero.
        taken = {1: (oracle, goal)}

        def ask(points: Tensor, copies: int = 1) -> Tensor:
            if copies not in taken:
                rows = torch.arange(len(self.x), device=self.x.device).repeat(copies)
                taken[copies] = oracle.take(rows), goal.take(rows)
            view, aim = taken[copies]
            return view.gradient(points, aim)[1]

        return ask

    def gradient(self, p: Tensor, ask: Ask | None = None) -> Tensor:
        """The gradient at p [rows, ...], averaged over the copies that the transforms make; every call draws anew."""
        ask = self.ask if ask is None else ask
        if not self.transforms:
            return ask(p)
        self.calls += 1
        rng = self.rng.at("transform", self.step, self.calls)
        copies = math.prod(each.copies for each in self.transforms)
        total = torch.zeros_like(p)
        for first in range(0, copies, TOGETHER):
            group = torch.arange(first, min(first + TOGETHER, copies), device=p.device)
            with torch.enable_grad():
                leaf = p.detach().repeat(len(group), *(1 for _ in p.shape[1:])).requires_grad_()
                seen, copy = leaf, group.repeat_interleave(len(p))
                for place, each in enumerate(self.transforms):
                    draw = Draw(rng.at(place, first), p, len(group))
                    seen = each(seen, copy % each.copies, draw, self)
                    copy = copy // each.copies
            upstream = ask(seen.detach(), len(group))
            (back,) = torch.autograd.grad(seen, leaf, upstream)
            for one in torch.split(back, len(p)):
                total = total + one
        return total / copies

    def noise(self, name: str, number: int, radius: float) -> Tensor:
        """Uniform in [-radius, radius], shaped like the rows; drawn anew at every step."""
        return (2 * self.rng.at(name, self.step, number).uniform(self.x) - 1) * radius


def reach_of(ball: Ball[Tensor], x: Tensor) -> float:
    """eps per coordinate; UsageError for balls in which a step with momentum has no natural length."""
    inner = lp_ball(ball)
    if not isinstance(inner, Linf | L2 | L1):
        norm = getattr(inner, "norm", type(inner).__name__)
        raise UsageError(
            f"transfer attacks work in linf, l2 and l1 balls, not in {norm} ({type(inner).__name__.lower()}); "
            "choose one of these threat models, or another attack such as `pgd`"
        )
    power = {Linf: 0.0, L2: 0.5, L1: 1.0}[type(inner)]
    spread: float = max(1, x[0].numel() if len(x) else 1) ** power
    return float(inner.eps) / spread


@dataclass(frozen=True, kw_only=True)
class Composed(Stepped, WantsData, MadeOf):
    """Transfer attack from parts: iterative FGSM on a surrogate with any parts, such as transfer:mi+di+ti.

    Nothing is kept but the last point and no row stops early: the surrogate's verdict says little about the victim.
    Draws are per row, step and copy. Costs one gradient per step, times what the parts say.

    parts:     names joined by +, each with settings in brackets: ni+si+ti+[di:p=0.5,copies=3]. One's own are
               [python:MODULE:NAME], or objects in Python: parts=("mi", MyTransform()). Transforms apply in the
               order given, the order of the others does not matter. The parts: mi (momentum); ni, emi1 (probes); emi,
               vmi, gra, pgn, mef, mig, svre, cwa (gradient rules); di, si, admix, ssa, sia, bsr (transforms of the
               input); ti (smoothing); gi, pi (steps); naa, fia, bfa, ila, ilpd, logit, lgv (objectives); sgm, linbp,
               bpa (backward rules); ens. `bim` is no part at all
    steps:     gradient steps, >= 1
    step_size: length of one step in units of eps, > 0; None is `path` / steps
    start:     "origin", "random" in the ball, or "gaussian": the origin plus 0.001 N(0, 1)
    restarts:  >= 1; more than one need a start that is drawn, and keep per row the point of lowest loss, for one answer
               each
    path:      length of the whole path in units of eps, > 0, where step_size is none
    loss:      surrogate loss: "ce", "margin" or "dlr", where the goal has them

    Look-aheads and neighbourhoods are published for Linf; in L2 and L1 balls their radii are those of a change spread
    evenly over the coordinates. Raises UsageError for values out of range, parts that exclude one another, balls other
    than linf, l2, l1, and whatever a part needs and does not get.
    """

    needs: ClassVar[Access] = Access.GRADIENTS
    parts: tuple[str, ...] = ()
    steps: int = 10
    step_size: float | None = None
    start: Start = "origin"
    restarts: int = 1
    path: float = 1.0
    loss: str = "ce"

    def __post_init__(self) -> None:
        at_least_one(self, "steps", "restarts")
        positive(self, "step_size", "path", what="length in units of eps")
        one_of(self, "start", ("random", "origin", "gaussian"))
        if self.restarts > 1 and self.start == "origin":
            raise UsageError(f"{self.restarts} restarts from the origin repeat one another; use start=random")
        given: Any = self.parts
        names = _split(given) if isinstance(given, str) else [_bare(each) for each in given]
        built = [PARTS.build(each) for each in names if each != "bim"]
        asked = [each for each in names if each != "bim"]
        object.__setattr__(self, "parts", tuple(map(_kept, built, asked)))
        self._check(built)

    @property
    def wants_data(self) -> bool:
        """Whether a part mixes in images of the attacker's own."""
        return any(part.wants_data for part in self.built)

    @property
    @override
    def made_of(self) -> str:
        """What a preset is as a composition: `ti` is transfer:ti,start=random,path=2.5 and not transfer:ti."""
        if type(self) is Composed:
            return ""
        plain = Composed(**{each.name: getattr(self, each.name) for each in fields(Composed)})
        spec = ATTACKS.label(plain) if self.parts else ATTACKS.label(plain).replace("transfer:[]", "transfer:bim")
        return "" if spec == f"transfer:{ATTACKS.label(self)}" else spec

    @property
    def built(self) -> tuple[Part, ...]:
        """The parts themselves."""
        return tuple(PARTS.build(each) for each in self.parts)

    def _check(self, built: list[Part]) -> None:
        names = [_name(each) for each in built]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UsageError(f"{'+'.join(names)} names {', '.join(twice)} more than once; once is enough")
        for role, plural in ROLES:
            rivals = [name for name, each in zip(names, built, strict=True) if isinstance(each, role)]
            if len(rivals) > 1:
                raise UsageError(
                    f"{'+'.join(names)}: {' and '.join(rivals)} are both {plural}, and a run has one; leave one out"
                )

    def __call__(self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, ball: Ball[Tensor], rng: Rng, /) -> Tensor:
        goal = goal.under(self.loss)
        if self.restarts == 1:
            return self.one_run(oracle, x, goal, ball, rng.at("restart", 0))
        best = Best(x, goal)
        for restart in range(self.restarts):
            z = self.one_run(oracle, x, goal, ball, rng.at("restart", restart))
            if oracle.left == 0:
                break
            best.offer(z, oracle(z))
        return best.x

    def one_run(self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, ball: Ball[Tensor], rng: Rng) -> Tensor:
        """One run under the goal's loss as it is."""
        reach = reach_of(ball, x)
        if not len(x):
            return x.clone()
        parts = self.built
        momentum = _one(parts, Momentum)
        published = [part.momentum for part in parts if part.momentum is not None]
        decay = momentum.decay if momentum is not None else (min(published) if published else 0.0)
        view, objective = _one(parts, View), _one(parts, Objective)
        probe, rule, smooth = _one(parts, Probe), _one(parts, GradientRule), _one(parts, Smooth)
        stepper, prelude = _one(parts, Step), _one(parts, Prelude)

        run = Run(
            oracle if view is None else view.through(oracle, x),
            x,
            goal,
            ball,
            rng,
            self.steps,
            self.path / self.steps if self.step_size is None else self.step_size,
            reach,
            decay,
            tuple(part for part in parts if isinstance(part, Transform)),
            notes={"data": oracle.data},
        )
        start = starting_point(self.start, x, ball, rng.at("start"))
        z = start
        try:
            if objective is not None:
                run.ask = objective.begin(run)
            phases = [(self.steps, run.step_size)]
            if prelude is not None:
                phases.insert(0, (prelude.steps, run.step_size * prelude.factor))
            for steps, run.step_size in phases:
                z = start
                for _ in range(steps):
                    p = z if probe is None else probe(z, run)
                    gradient = run.gradient(p) if rule is None else rule(p, run)
                    gradient = gradient if smooth is None else smooth(gradient)
                    scaled = gradient if momentum is not None and not momentum.normalise else normalised(gradient)
                    run.raw, velocity = gradient, accumulated(run.velocity, scaled, decay)
                    if stepper is None:
                        z = descended(ball, z, velocity, x, run.step_size)
                    else:
                        z = stepper.step(z, velocity, run)
                    run.velocity, run.step = velocity, run.step + 1
        except BudgetExhausted:
            return z  # as far as the answers went
        return z


class Momentum(Part):
    """How gradients are accumulated."""

    decay: float
    normalise: bool


def _one(parts: tuple[Part, ...], role: Callable[..., P]) -> P | None:
    # roles are abstract, and no abstract class is a type[P]
    found = [part for part in parts if isinstance(part, cast(type[Part], role))]
    return cast(P, found[0]) if found else None


def _kept(part: Part, asked: Any) -> Any:
    """A part as a composition keeps it: its canonical spec, or the object itself where it has none."""
    if isinstance(asked, str):
        return PARTS.label(part, asked)
    try:
        return PARTS.spec(part)
    except (SpecError, UnknownName):
        return part


def _name(part: Part) -> str:
    try:
        return PARTS.name_of(part)
    except UnknownName:
        return type(part).__name__


def _split(text: str) -> list[str]:
    """A composition written as one text, as in Python: `ni+si`; brackets keep together."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "[") - (character == "]")
        if character == "+" and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [_bare(part) for part in parts]


def _bare(part: Any) -> Any:
    """A part's text without the brackets around it; what is no text as it is."""
    text = part.strip() if isinstance(part, str) else part
    return text[1:-1] if isinstance(text, str) and text.startswith("[") and text.endswith("]") else text
