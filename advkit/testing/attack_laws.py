"""What every attack owes its users, one function per law; each raises AssertionError with the law's name."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from advkit.core.errors import AccessDenied, UsageError
from advkit.core.lanes import Lanes
from advkit.core.protocols import Access, AsksQueries, Attack, SearchesPart, SeeksMinimum, Serves
from advkit.core.registry.contract import lacking_in
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.testing.image_laws import IMAGE_LAWS, check_image_law, on_images
from advkit.testing.label_laws import LABEL_LAWS, check_label_law, on_labels
from advkit.testing.play import (
    BALLS,
    BITS,
    MINIMA,
    RADII,
    BallMaker,
    accepts,
    aimed,
    failure,
    fields_of,
    legal,
    names,
    play,
    require,
    shortened,
)
from advkit.testing.text_laws import TEXT_LAWS, check_text_law, on_text
from advkit.testing.victims import (
    Quadratic,
    exhaustive,
    linear,
    nan_off,
    network,
    quantised,
    uniform,
)
from advkit.threat_models.goals.diverge import Diverge
from advkit.threat_models.goals.targeted import Targeted
from advkit.threat_models.goals.untargeted import Untargeted

WIDE = Box(-1000.0, 1000.0)


@dataclass(frozen=True)
class Subject:
    """An attack in one kind of ball.

    attack: shortened for tiny victims
    norm:   key of BALLS or MINIMA
    ball:   makes one from eps and box
    """

    attack: Any
    norm: str
    ball: BallMaker

    @property
    def eps(self) -> float:
        return RADII.get(self.norm, 0.0)

    @property
    def bounded(self) -> bool:
        """Whether a radius bounds the attack; where none does, the distance is what it has to keep small."""
        return self.norm in RADII

    @property
    def iterates(self) -> bool:
        """Whether it spends more effort when told to."""
        return bool({"steps", "queries", "budget"} & fields_of(self.attack))

    def at(self, eps: float | None = None, box: Box | None = None) -> Any:
        return self.ball(eps=self.eps if eps is None else eps, box=Box() if box is None else box)

    def rows(self, x: Tensor) -> Tensor:
        """Rows in [0, 1] as the threat model knows them."""
        return legal(x, self.norm)

    @property
    def bits(self) -> bool:
        """Whether rows are zeros and ones."""
        return self.norm in BITS

    @property
    def measure(self) -> str:
        """The norm that is to be small where no radius bounds the attack."""
        return self.norm.removeprefix("minimum-")

    @property
    def counts(self) -> bool:
        """Whether that is a number of changes."""
        return self.bits or self.measure == "l0"

    def goal(self, labels: Tensor, classes: int) -> Any:
        """Something the attack serves that rows of these classes do not fulfil."""
        return aimed(self.attack, labels, classes)


def labels_of(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        decisions: Tensor = model(x).argmax(1)
    return decisions


def _on_network(subject: Subject, rows: int = 12, **settings: Any) -> tuple[Any, Tensor, Any, Any]:
    model = network()
    x = subject.rows(uniform(1, rows, 2, 6, 6))
    scale = {"linf": 0.3, "l2": 1.0, "l1": 4.0, "l0": 3.0}.get(subject.norm, 1.0)
    ball = subject.at(subject.eps * scale if subject.norm != "l0" else 3)
    return model, x, subject.goal(labels_of(model, x), 3), ball


def _reached_already(subject: Subject, model: Any, x: Tensor) -> Any:
    """A goal of the subject's kind that the untouched rows of the network fulfil."""
    return subject.goal((labels_of(model, x) + (1 if _untargeted(subject) else -1)) % 3, 3)


def _untargeted(subject: Subject) -> bool:
    return isinstance(subject.goal(torch.zeros(1, dtype=torch.long), 2), Untargeted)


def _differ(z: Tensor, x: Tensor) -> Tensor:
    return (z != x).flatten(1).any(1)


def stays_admitted(subject: Subject) -> None:
    """Every returned row is finite, in the box and within eps, also where the origin sits in a corner of the box."""
    model = network()
    x = subject.rows(uniform(2, 16, 2, 6, 6))
    x[::2] = x[::2].round()
    goal = subject.goal(labels_of(model, x), 3)
    for eps in (subject.eps, 3 * subject.eps):
        ball = subject.at(eps)
        z = play(subject.attack, model, x, goal, ball).z
        require(z.shape == x.shape and z.dtype == x.dtype and not z.requires_grad, "shape, type or graph changed")
        require(bool(ball.admits(z, x).all()), f"rows {(~ball.admits(z, x)).nonzero().flatten().tolist()} are outside")


def one_step_moves(subject: Subject) -> None:
    """One step is enough to leave the origin and, where nothing is drawn, to lower the margin of a linear victim.

    An attack that takes no gradients searches: it may hand back the row where its first questions found nothing better.
    """
    if not subject.bounded:  # a row that falls short of the goal has no nearest point to return
        return
    attack = subject.attack
    effort = {n: v for n, v in (("steps", 1), ("queries", 60), ("restarts", 1)) if n in fields_of(attack)}
    attack = replace(attack, **effort) if effort else attack
    if "start" in fields_of(attack):
        attack = replace(attack, start="origin")
    victim = linear(space=WIDE)
    x = uniform(4, 12, 8)
    goal = subject.goal(labels_of(victim, x), 2)
    drawn: list[str] = []
    rng = _Spy(RowRng.from_ids(0, names(len(x))), drawn)
    played = play(attack, victim, x, goal, subject.at(box=WIDE), rng=rng)
    moved = _differ(played.z, x)
    searches = Access(subject.attack.needs) < Access.GRADIENTS
    untouched = (~moved).nonzero().flatten().tolist()
    require(searches or not untouched, f"rows {untouched} were returned untouched")
    if drawn:
        return
    with torch.no_grad():
        before = goal.margin(victim(x))
    lower = played.margin < before
    require(bool((lower | ~moved).all() if searches else lower.all()), "the step did not lower the margin")


def zero_eps_is_identity(subject: Subject) -> None:
    """A ball of radius 0 gives back the origin, bit by bit."""
    if not subject.bounded:
        return
    model, x, goal, _ = _on_network(subject)
    z = play(subject.attack, model, x, goal, subject.at(0)).z
    require(torch.equal(z, x), "rows moved in a ball of radius 0")


def more_restarts_never_help(subject: Subject) -> None:
    """What one restart breaks, three break too, and their loss is no higher."""
    if "restarts" not in fields_of(subject.attack):
        return
    model, x, goal, ball = _on_network(subject, 24)
    one = play(replace(subject.attack, restarts=1), model, x, goal, ball)
    three = play(replace(subject.attack, restarts=3), model, x, goal, ball)
    require(not bool((one.reached & ~three.reached).any()), "more restarts lost rows that fewer had broken")


def more_effort_never_helps(subject: Subject) -> None:
    """What few steps or queries break, more break too (on a linear victim: schedules may scale with the effort)."""
    efforts: tuple[tuple[str, Any, Any], ...] = (("steps", 3, 12), ("queries", 40, 160), ("budget", "1x9", "3x20"))
    for name, few, many in efforts:
        if name not in fields_of(subject.attack):
            continue
        victim = linear()
        x = subject.rows(uniform(5, 24, 8))
        goal = subject.goal(labels_of(victim, x), 2)
        less = play(replace(subject.attack, **{name: few}), victim, x, goal, subject.at())
        more = play(replace(subject.attack, **{name: many}), victim, x, goal, subject.at())
        require(not bool((less.reached & ~more.reached).any()), f"{many} {name} lost rows that {few} had broken")


def more_eps_never_helps(subject: Subject) -> None:
    """What a small ball holds, larger ones hold too (on a linear victim inside its box)."""
    if not subject.bounded:
        return
    victim = linear()
    x = uniform(6, 24, 8)
    goal = subject.goal(labels_of(victim, x), 2)
    before = torch.zeros(24, dtype=torch.bool)
    for eps in (1, 2, 4) if subject.norm == "l0" else (subject.eps / 3, subject.eps, 3 * subject.eps):
        reached = play(subject.attack, victim, x, goal, subject.at(eps)).reached
        require(not bool((before & ~reached).any()), f"eps {eps} lost rows that a smaller eps had broken")
        before = reached
    require(bool(before.any()), "the largest ball broke no row")


def closed_form(subject: Subject) -> None:
    """Robust accuracy on linear victims is the closed form for all eps (slack 2 %; without gradients 30 %).

    In L0 exactly with gradients. An attack that searches a part of the ball breaks nothing beyond it.
    """
    slack = 0.02 if subject.attack.needs >= Access.GRADIENTS else 0.3
    for seed in (0, 1):
        if not subject.bounded:
            victim = linear(seed=seed, space=None if subject.counts else WIDE)
            x = subject.rows(uniform(10 + seed, 24, 8))
            labels = labels_of(victim, x)
            exact = victim.distance_l0(x, labels) if subject.counts else victim.distance(x, labels, subject.measure)
            _is_nearest(subject, victim, x, labels, exact)
            continue
        if subject.norm == "l0":
            victim, radii = linear(seed=seed), (1.0, 2.0, 4.0)
        else:
            victim, radii = linear(seed=seed, space=WIDE), (0.4, 1.0, 1.6)
        x = uniform(10 + seed, 24, 8)
        labels = labels_of(victim, x)
        exact = victim.distance_l0(x, labels) if subject.norm == "l0" else victim.distance(x, labels, subject.norm)
        for factor in radii:
            eps = factor if subject.norm == "l0" else factor * float(exact.median())
            goal = subject.goal(labels, 2)
            reached = play(subject.attack, victim, x, goal, subject.at(eps, victim.space)).reached
            breakable = exact <= eps
            clear = (exact / eps - 1).abs() > slack
            if subject.norm == "l0" and subject.attack.needs >= Access.GRADIENTS:
                clear = torch.ones_like(breakable)
            beyond = exact > (eps if subject.norm == "l0" else eps * 1.0001)
            require(not bool((reached & beyond).any()), f"eps {eps:.3g}: rows broken beyond the ball")
            if isinstance(subject.attack, SearchesPart):
                continue
            wrong = ((breakable != reached) & clear).nonzero().flatten().tolist()
            require(not wrong, f"eps {eps:.4g}: rows {wrong} at distances {exact[wrong].tolist()} are misjudged")


def seeks_minimum(attack: Any) -> bool:
    """Whether the attack looks for the least distance where nothing bounds it."""
    return not isinstance(attack, SeeksMinimum) or attack.minimal


def _is_nearest(subject: Subject, victim: Any, x: Tensor, labels: Tensor, exact: Tensor) -> None:
    """Every row falls, at no more than 1.1 times its least distance and 0.02, which rows on the boundary need.

    Where changes are counted, at no more than one above the fewest.

    Attacks with a search get one: a single weight of loss against distance suits no two rows. Those that look for no
    minimum (`minimal` is False) only must not fall nearer than is possible.
    """
    ball = subject.at(box=victim.space)
    attack = replace(subject.attack, budget="9x60") if "budget" in fields_of(subject.attack) else subject.attack
    played = play(attack, victim, x, subject.goal(labels, 2), ball)
    distance = ball.distance(played.z, x)
    nearer = played.reached & (distance < exact * (1 - 1e-5) - 1e-6)
    require(not bool(nearer.any()), "rows fell nearer than the boundary is")
    if not seeks_minimum(attack):
        require(torch.equal(distance > 0, played.reached), "rows moved that did not fall")
        return
    require(bool(played.reached.all()), f"rows {(~played.reached).nonzero().flatten().tolist()} did not fall")
    most = exact + 1 if subject.counts and not subject.bits else 1.1 * exact + 0.02
    far = (distance > most).nonzero().flatten().tolist()
    require(not far, f"rows {far} fell at {distance[far].tolist()}; the boundary is at {exact[far].tolist()}")


def agrees_with_exhaustive_search(subject: Subject) -> None:
    """On a curved 2-D victim an attack that iterates breaks what a fine grid over the ball breaks, and nothing more."""
    if subject.bits:  # two bits make four points: `closed_form` searches among more
        return
    victim = Quadratic(torch.tensor([0.45, 0.55]), 0.3)
    x = uniform(8, 30, 2)
    if not subject.bounded:
        # Towards the box's corners the sphere may lie nearest outside of it: not so from inside the sphere.
        inside = x[labels_of(victim, x) == 1]
        exact = victim.distance(inside, subject.measure)
        _is_nearest(subject, victim, inside, labels_of(victim, inside), exact)
        return
    goal = subject.goal(labels_of(victim, x), 2)
    ball = subject.at(1 if subject.norm == "l0" else {"linf": 0.12, "l2": 0.14, "l1": 0.16}[subject.norm])
    lowest = exhaustive(victim, goal, ball, x)
    played = play(subject.attack, victim, x, goal, ball)
    # Between grid points the margin falls by at most its slope times half the grid's gap.
    gap = 2 * (ball.eps if subject.norm != "l0" else 1) / 100
    require(not bool((played.reached & (lowest > 2 * gap)).any()), "rows were broken that no grid point breaks")
    if subject.iterates and not isinstance(subject.attack, SearchesPart):
        needed = 0.15 if subject.attack.needs < Access.GRADIENTS or subject.norm == "l0" else 0.02
        missed = ((lowest < -needed * lowest.abs().max()) & ~played.reached).nonzero().flatten().tolist()
        require(not missed, f"rows {missed} survive, a grid breaks them with margins {lowest[missed].tolist()}")


def batch_of_one(subject: Subject) -> None:
    """A batch of one gives the row what it gets in company, bit by bit; so do other batch sizes and orders."""
    model, x, goal, ball = _on_network(subject, 21)
    ids = names(21)
    whole = play(subject.attack, model, x, goal, ball, ids=ids)

    def same(rows: Tensor) -> None:
        part = play(subject.attack, model, x[rows], goal.take(rows), ball, ids=[ids[i] for i in rows.tolist()])
        require(torch.equal(part.z, whole.z[rows]), f"rows {rows.tolist()[:5]}... differ by batch")
        require(torch.equal(part.meter.forwards, whole.meter.forwards[rows]), "the number of answers differs by batch")

    same(torch.tensor([4]))
    same(torch.arange(7))
    same(torch.randperm(21, generator=torch.Generator().manual_seed(0)))


def all_wrong_batch(subject: Subject) -> None:
    """Rows that are wrong untouched are no trouble, alone or all together."""
    model, x, _, ball = _on_network(subject)
    z = play(subject.attack, model, x, _reached_already(subject, model, x), ball).z
    require(
        z.shape == x.shape and bool(ball.admits(z, x).all()), "rows of an all-wrong batch came back outside the ball"
    )


def one_survivor(subject: Subject) -> None:
    """The one row that does not fall gets what it gets alone, though the rest leave the batch."""
    victim = linear()
    x = subject.rows(uniform(9, 9, 8))
    labels = labels_of(victim, x)
    robust = int(victim.distance(x, labels, "linf").argmax())
    labels = torch.where(torch.arange(9) == robust, labels, 1 - labels)
    ball = subject.at(1 if subject.norm == "l0" else subject.eps / 20)
    goal = subject.goal(labels, 2)
    whole = play(subject.attack, victim, x, goal, ball)
    alone = torch.tensor([robust])
    part = play(subject.attack, victim, x[alone], goal.take(alone), ball, ids=[names(9)[robust]])
    require(torch.equal(part.z, whole.z[alone]), "the survivor's result depends on the rows that fell")


def same_seed_same_bits(subject: Subject) -> None:
    """The same seed repeats every bit; another seed asks other questions, if the attack draws at all."""
    model, x, goal, ball = _on_network(subject)
    asked: list[Tensor] = []
    drawn: list[str] = []

    def listening(z: Tensor) -> Tensor:
        asked.append(z.detach().clone())
        answer: Tensor = model(z)
        return answer

    def run(seed: int) -> tuple[Tensor, Tensor]:
        asked.clear()
        rng = _Spy(RowRng.from_ids(seed, names(len(x))), drawn)
        z = play(subject.attack, listening, x, goal, ball, rng=rng, lanes=Lanes(64, 1)).z
        return z, torch.cat(asked)

    first, again, other = run(0), run(0), run(1)
    require(all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), "the same seed gave other bits")
    if drawn:
        differs = first[1].shape != other[1].shape or not torch.equal(first[1], other[1])
        require(differs, "another seed asked the same questions")


class _Spy:
    """Streams that note what is drawn."""

    def __init__(self, rng: Any, drawn: list[str]) -> None:
        self.rng, self.drawn = rng, drawn

    def at(self, *path: object) -> _Spy:
        return _Spy(self.rng.at(*path), self.drawn)

    def take(self, rows: Tensor) -> _Spy:
        return _Spy(self.rng.take(rows), self.drawn)

    def uniform(self, like: Tensor) -> Tensor:
        self.drawn.append("uniform")
        drawn: Tensor = self.rng.uniform(like)
        return drawn

    def normal(self, like: Tensor) -> Tensor:
        self.drawn.append("normal")
        drawn: Tensor = self.rng.normal(like)
        return drawn

    def integers(self, high: int, like: Tensor) -> Tensor:
        self.drawn.append("integers")
        drawn: Tensor = self.rng.integers(high, like)
        return drawn

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        self.drawn.append("generator")
        generator: torch.Generator = self.rng.generator(device)
        return generator

    def keys(self) -> Tensor:
        self.drawn.append("keys")
        keys: Tensor = self.rng.keys()
        return keys


def leaves_no_trace(subject: Subject) -> None:
    """Model, caller's tensors, global randomness and global flags are as they were, bit by bit."""
    model, x, goal, ball = _on_network(subject)
    model.module.register_forward_hook(lambda module, inputs, answer: None)
    before = _snapshot(model.module), _globals()
    classes = goal.labels if isinstance(goal, Untargeted) else goal.targets
    inputs = x.clone(), classes.clone()
    play(subject.attack, model, x, goal, ball)
    after = _snapshot(model.module), _globals()
    require(before[0] == after[0], "weights, gradients, buffers, modes, hooks or flags of the model changed")
    require(before[1] == after[1], "global random state or flags changed")
    require(torch.equal(x, inputs[0]) and torch.equal(classes, inputs[1]), "the caller's tensors changed")
    require(not x.requires_grad and x.grad is None, "the caller's tensors were made to require gradients")


def _snapshot(module: torch.nn.Module) -> list[object]:
    state: list[object] = [(n, t.detach().numpy().tobytes()) for n, t in module.state_dict().items()]
    for name, parameter in module.named_parameters():
        gradient = None if parameter.grad is None else parameter.grad.numpy().tobytes()
        state.append((name, parameter.requires_grad, gradient))
    for name, part in module.named_modules():
        hooks = [len(getattr(part, kind)) for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
        state.append((name, part.training, hooks))
    return state


def _globals() -> list[object]:
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - the legacy state is what must not change
    return [
        torch.get_rng_state().numpy().tobytes(),
        random.getstate(),
        (kind, np.asarray(keys).tobytes(), rest),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
    ]


def metered_is_counted(subject: Subject) -> None:
    """The meter's forwards are the rows that really went through the model, its backwards those that came back."""
    model, x, goal, ball = _on_network(subject)
    through = {"forward": 0, "backward": 0}

    def counting(z: Tensor) -> Tensor:
        through["forward"] += len(z)
        answer: Tensor = model(z)
        return _counting_backwards(answer, through) if answer.requires_grad else answer

    meter = play(subject.attack, counting, x, goal, ball, lanes=Lanes(chunk=5, multiple=1)).meter
    through["forward"] -= len(x)  # the kit's own question about the returned rows
    require(int(meter.forwards.sum()) == through["forward"], f"metered {int(meter.forwards.sum())}, counted {through}")
    require(
        int(meter.backwards.sum()) == through["backward"], f"metered {int(meter.backwards.sum())}, counted {through}"
    )
    require(bool((meter.queries == meter.forwards).all()), "answers asked for are not the forwards")


def _counting_backwards(answer: Tensor, through: dict[str, int]) -> Tensor:
    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            return value.view_as(value)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            through["backward"] += len(gradients[0])
            return gradients[0]

    counted: Tensor = Counted.apply(answer)
    return counted


def every_goal_accepted(subject: Subject) -> None:
    """Untargeted, targeted and diverging goals all work; a target within reach is reached.

    An attack for some goals only says which it `serves`, and refuses others in words.
    """
    model, x, _, ball = _on_network(subject)
    with torch.no_grad():
        reference = model(x)
    labels = reference.argmax(1)
    for other in (Targeted((labels + 1) % 3), Diverge(reference), Untargeted(labels, "margin")):
        try:
            z = play(subject.attack, model, x, other, ball).z
        except UsageError as refusal:
            served = subject.attack.serves if isinstance(subject.attack, Serves) else ()
            require(served, f"{type(other).__name__} was refused by an attack that names no goals: {refusal}")
            require(other.kind not in served, f"{other.kind} is served and was refused: {refusal}")
            require(all(word in str(refusal) for word in served), f"the refusal names no way out: {refusal}")
            continue
        require(bool(ball.admits(z, x).all()), f"{type(other).__name__}: rows came back outside the ball")

    victim = linear(space=None if subject.bits else WIDE)
    x = subject.rows(uniform(11, 16, 8))
    labels = labels_of(victim, x)
    if subject.norm == "l0" or not seeks_minimum(subject.attack):
        return
    if not subject.bounded:
        reached = play(subject.attack, victim, x, Targeted(1 - labels), subject.at(box=WIDE)).reached
        require(bool(reached.all()), "targets were not reached though nothing bounds the attack")
        return
    exact = victim.distance(x, labels, subject.norm)
    ball = subject.at(2 * float(exact.median()), WIDE)
    reached = play(subject.attack, victim, x, Targeted(1 - labels), ball).reached
    require(bool(reached[exact <= ball.eps / 2].all()), "targets well within reach were not reached")


def keeps_the_query_budget(subject: Subject) -> None:
    """Where answers or passes are counted, the attack ends when they do, and uses what there is.

    An attack whose step takes several answers may end at once where there are fewer.
    """
    model, x, goal, ball = _on_network(subject)
    least = subject.attack.least_queries if isinstance(subject.attack, AsksQueries) else 1
    for budget in (2, 7, 20):
        played = play(subject.attack, model, x, goal, ball, propagations=budget)
        spent = int((played.meter.forwards + played.meter.backwards).max())
        require(spent <= budget, f"{spent} propagations were spent on a row, of a budget of {budget}")
        require(spent > 0 or budget < least, "the attack gave up propagations that it could have used")
        require(bool(ball.admits(played.z, x).all()), "rows came back outside the ball")
    for budget in (1, 7, *((least,) if least > 1 else ())):
        played = play(subject.attack, model, x, goal, ball, queries=budget)
        require(int(played.meter.queries.max()) <= budget, f"more than {budget} answers were asked of a row")
        used = int(played.meter.queries.max()) > 0
        require(used or budget < least, "the attack gave up a budget it could have used")
        require(bool(ball.admits(played.z, x).all()), "rows came back outside the ball")


def refuses_without_access(subject: Subject) -> None:
    """With less access than it declares the attack is refused, and never makes do with a lesser attack in silence."""
    if subject.attack.needs == Access.NOTHING:
        return
    model, x, goal, ball = _on_network(subject, 2)
    less = Access(subject.attack.needs - 1)
    if less == Access.LABELS:
        # One-hot labels look like scores; the scenario refuses the case before any oracle is made.
        less = Access.NOTHING
    try:
        play(subject.attack, model, x, goal, ball, access=less)
    except AccessDenied:
        return
    raise AssertionError(f"the attack ran with access {less.name}, it declares {subject.attack.needs.name}")


def survives_nan(subject: Subject) -> None:
    """A victim that answers NaN off the data is met with finite rows, and the meter says whom it happened to."""
    model, x, goal, ball = _on_network(subject)
    played = play(subject.attack, nan_off(model, x), x, goal, ball)
    require(bool(torch.isfinite(played.z).all()) and bool(ball.admits(played.z, x).all()), "rows came back not finite")
    require(not bool(played.reached.any()), "a NaN answer was called a success")
    moved = _differ(played.z, x)
    require(bool(played.meter.non_finite[moved].all()) or not subject.iterates, "NaN answers went unnoticed")


def survives_zero_gradients(subject: Subject) -> None:
    """A victim without gradients is no crash, and the meter says that there were none."""
    model, x, goal, ball = _on_network(subject)
    played = play(subject.attack, quantised(model), x, goal, ball)
    require(bool(ball.admits(played.z, x).all()), "rows came back outside the ball")
    if subject.attack.needs == Access.GRADIENTS:
        asked = played.meter.backwards > 0
        require(bool(played.meter.zero_gradient[asked].all()) and bool(asked.any()), "zero gradients went unnoticed")


def survives_saturation(subject: Subject) -> None:
    """Logits times a million: the returned rows are finite and admitted."""
    victim = linear(scale=1e6)
    x = subject.rows(uniform(12, 8, 8))
    ball = subject.at()
    z = play(subject.attack, victim, x, subject.goal(labels_of(victim, x), 2), ball).z
    require(bool(torch.isfinite(z).all()) and bool(ball.admits(z, x).all()), "rows came back not finite or outside")


def does_not_stop_under_transfer(subject: Subject) -> None:
    """Where the oracle's answers are not the verdict's, rows go on after the surrogate is fooled.

    Not so for flips, of which every step makes more: what is wanted is the fewest, and the answers at hand say when.
    """
    if subject.bits:
        return
    model, x, _, ball = _on_network(subject)
    played = play(subject.attack, model, x, _reached_already(subject, model, x), ball, decides=False)
    counts = played.meter.forwards
    require(bool((counts == counts[0]).all()), f"rows stopped on a surrogate's word: answers per row {counts.tolist()}")


ATTACK_LAWS: dict[str, Callable[[Subject], None]] = {
    law.__name__: law
    for law in (
        stays_admitted,
        leaves_no_trace,
        one_step_moves,
        zero_eps_is_identity,
        more_restarts_never_help,
        more_effort_never_helps,
        more_eps_never_helps,
        closed_form,
        agrees_with_exhaustive_search,
        batch_of_one,
        all_wrong_batch,
        one_survivor,
        same_seed_same_bits,
        metered_is_counted,
        every_goal_accepted,
        keeps_the_query_budget,
        refuses_without_access,
        survives_nan,
        survives_zero_gradients,
        survives_saturation,
        does_not_stop_under_transfer,
    )
}


def subjects(attack: Any, balls: dict[str, BallMaker] | None = None) -> dict[str, Subject]:
    """The attack, shortened, in every kind of ball that it accepts."""
    kinds = BALLS | MINIMA if balls is None else balls
    accepted = {norm: ball for norm, ball in kinds.items() if accepts(attack, ball, norm) is None}
    return {norm: Subject(shortened(attack), norm, ball) for norm, ball in accepted.items()}


USUALLY: dict[str, str] = {
    "stays_admitted": "the last point was not projected (ball.project(z, x)), or came back with a graph (z.detach())",
    "leaves_no_trace": "torch.rand or torch.manual_seed in place of rng.at(...).uniform(x), or x changed in place",
    "one_step_moves": "the step goes up: descend the goal's loss (ball.steepest(-gradient, x)), or eps is not used",
    "zero_eps_is_identity": "points are clamped with a radius of the attack's own, not by ball.project",
    "more_restarts_never_help": "the best point is not kept over restarts: attacks.base.Best does it",
    "more_effort_never_helps": "the last point is returned and not the best one: attacks.base.Best does it",
    "more_eps_never_helps": "a radius or a step size is absolute; lengths are in units of eps",
    "closed_form": "the attack is too weak for a linear victim (more steps or queries), or steps beyond the ball",
    "agrees_with_exhaustive_search": "the attack is too weak: more steps or queries, or smaller steps at the end",
    "batch_of_one": "something is shared by the rows: a mean, a maximum, one draw for all, a loop that ends for all",
    "all_wrong_batch": "a mean over no rows, or an index of none",
    "one_survivor": "rows that leave the batch change what the others get: keep state by row",
    "same_seed_same_bits": "draws that do not come from rng, or rng taken without names (rng.at('start', restart))",
    "metered_is_counted": "the model was asked beside the oracle",
    "every_goal_accepted": "the attack reads labels off the goal: use goal.loss, goal.reached, or say serves = (...)",
    "keeps_the_query_budget": "BudgetExhausted is not caught: attacks.base.affords(oracle) says whether one is left",
    "refuses_without_access": "`needs` asks for more than is used, or AccessDenied is caught",
    "survives_nan": "NaN wins a comparison: take answers with torch.isfinite alone",
    "survives_zero_gradients": "a gradient is divided by its norm of 0",
    "survives_saturation": "exp or a quotient overflows",
    "does_not_stop_under_transfer": "rows stop once the oracle's answer reaches the goal: only where oracle.decides",
}
"""What breaks a law most often."""


def check_law(name: str, subject: Subject) -> None:
    """One law; its AssertionError starts with the law's name, the attack and the ball, and says what the law means."""
    try:
        ATTACK_LAWS[name](subject)
    except Exception as broken:  # an attack raises whatever it likes
        shown = f"{subject.attack!r} in {subject.norm}"
        raise failure(name, ATTACK_LAWS[name], shown, broken, USUALLY.get(name, "")) from broken


def check_attack(attack: Any, balls: dict[str, BallMaker] | None = None) -> None:
    """Every law in every ball that the attack accepts; at least one of them must be accepted.

    balls: norm -> maker of a ball from eps and box; the norms are keys of BALLS and MINIMA. Raises AssertionError at
    the first law that is broken, naming it. Attacks made for text, and those on training labels, have laws of their own
    (`TEXT_LAWS`, `LABEL_LAWS`) instead.
    """
    if isinstance(attack, type):
        raise AssertionError(f"law is_an_object: {attack.__name__} is a class; check an object: {attack.__name__}()")
    missing = lacking_in(attack, Attack)
    require(not missing, f"law has_the_members_of_an_attack: {attack!r} lacks {', '.join(missing)}")
    require(
        isinstance(attack.needs, Access),
        f"law declares_its_access: `needs` is {attack.needs!r}; expected core.protocols.Access, such as GRADIENTS",
    )
    if on_text(attack):
        for name in TEXT_LAWS:
            check_text_law(name, attack)
        return
    if on_labels(attack):
        for name in LABEL_LAWS:
            check_label_law(name, attack)
        return
    if on_images(attack):
        for name in IMAGE_LAWS:
            check_image_law(name, attack)
        return
    found = subjects(attack, balls)
    if not found:
        said = {refusal for norm, ball in (balls or BALLS | MINIMA).items() if (refusal := accepts(attack, ball, norm))}
        raise AssertionError(
            f"law accepts_a_ball: {attack!r} refuses every ball of {', '.join(balls or BALLS | MINIMA)}: "
            f"{'; '.join(sorted(said))}"
        )
    for subject in found.values():
        for name in ATTACK_LAWS:
            check_law(name, subject)
