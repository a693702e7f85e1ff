"""What every threat model one can walk in owes its users; each law raises AssertionError with its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from advkit.core.errors import UsageError
from advkit.core.protocols import Ball, Counted, InSpace, LeastChange, Radius, Slotted
from advkit.core.rng import RowRng
from advkit.core.spaces import REPLY, USER, Binary, Box, Transcripts
from advkit.testing.language import PieceTokenizer, transcripts
from advkit.testing.play import failure, names, require
from advkit.testing.victims import normal, uniform


def rows(shape: tuple[int, ...] = (2, 4, 4), n: int = 12) -> Tensor:
    """Rows in [0, 1], half of them with every value at an end of the box."""
    x = uniform(21, n, *shape)
    x[::2] = x[::2].round()
    return x


def _bound(threat: Any) -> Any:
    shape = (2, 4, 4)
    return threat.bind(Binary(shape) if _of_bits(threat) else Box(0.0, 1.0, shape=shape))


def _of_bits(threat: Any) -> bool:
    """Whether the rows that it speaks of are zeros and ones."""
    return isinstance(threat, InSpace) and isinstance(threat.space, Binary)


def _rows_of(threat: Any) -> Tensor:
    return rows().round() if _of_bits(threat) else rows()


def _has_radius(threat: Any) -> bool:
    """Whether one can walk in it. Where any distance is admitted there is nothing to draw from, no length of a step."""
    return isinstance(threat, Radius) or (isinstance(threat, Ball) and not isinstance(threat, LeastChange))


def _limited(threat: Any) -> bool:
    """Whether anything bounds the distance: a radius, or a number of flips."""
    return _has_radius(threat) or (isinstance(threat, Counted) and threat.n is not None)


def _inside(threat: Any, x: Tensor, seed: int) -> Tensor:
    """Admitted points: drawn in the ball, or anywhere in the box where there is none."""
    if _of_bits(threat):
        flipped: Tensor = threat.project(uniform(100 + seed, *x.shape).round(), x)
        return flipped
    if not _has_radius(threat):
        return uniform(100 + seed, *x.shape)
    drawn: Tensor = threat.sample(x, RowRng.from_ids(seed, names(len(x))))
    return drawn


def _refused(threat: Any, what: Callable[[], object]) -> None:
    try:
        what()
    except UsageError as refusal:
        require("eps" in str(refusal), f"{threat!r} refuses and does not say what else to use: {refusal}")
    else:
        raise AssertionError("a threat model without a radius took a step of its length")


def origin_is_admitted(threat: Any) -> None:
    """The untouched row is always within reach, at distance 0."""
    ball, x = _bound(threat), _rows_of(threat)
    require(bool(ball.admits(x, x).all()), "untouched rows are outside")
    require(bool((ball.distance(x, x) == 0).all()), "an untouched row has a distance")


def projection_lands_inside(threat: Any) -> None:
    """Whatever is projected is admitted, and what is admitted already stays as it is, bit by bit."""
    ball, x = _bound(threat), _rows_of(threat)
    for scale in (0.001, 0.1, 3.0):
        z = ball.project(x + scale * normal(22, *x.shape), x)
        require(bool(ball.admits(z, x).all()), f"points projected from a distance of {scale} are outside")
        require(torch.equal(ball.project(z, x), z), "projecting twice is not projecting once")


def projection_is_nearest(threat: Any) -> None:
    """No other admitted point is nearer to what was projected (tried on points sampled in the ball)."""
    ball, x = _bound(threat), _rows_of(threat)
    far = x + 0.3 * normal(23, *x.shape)
    nearest = (ball.project(far, x) - far).flatten(1).norm(dim=1)
    for draw in range(20):
        other = _inside(ball, x, draw)
        distance = (other - far).flatten(1).norm(dim=1)
        require(bool((nearest <= distance * (1 + 1e-5) + 1e-6).all()), "a sampled point is nearer than the projection")


def samples_are_admitted_and_differ(threat: Any) -> None:
    """Random starts are inside, differ from the origin, repeat with the seed and change with it."""
    ball, x = _bound(threat), _rows_of(threat)
    if not _limited(ball):
        _refused(ball, lambda: ball.sample(x, RowRng.from_ids(0, names(len(x)))))
        return
    one, again, other = (ball.sample(x, RowRng.from_ids(seed, names(len(x)))) for seed in (0, 0, 1))
    require(bool(ball.admits(one, x).all()), "sampled points are outside")
    require(bool((one != x).flatten(1).any(1).all()), "a sampled point is the origin")
    require(torch.equal(one, again), "the same seed drew another point")
    require(not torch.equal(one, other), "another seed drew the same point")


def steepest_ascends(threat: Any) -> None:
    """A projected step along the steepest direction does not descend, ascends where there is room, and is finite."""
    ball, x = _bound(threat), uniform(24, 12, 2, 4, 4)
    gradient = normal(25, *x.shape)
    if not _has_radius(ball):
        _refused(ball, lambda: ball.steepest(gradient, x))
        return
    step = ball.steepest(gradient, x)
    require(step.shape == x.shape and bool(torch.isfinite(step).all()), "the direction is not finite")
    z = ball.project(x + step, x)
    gain = ((z - x) * gradient).flatten(1).sum(1)
    require(bool((gain > 0).all()), "a step along the steepest direction does not ascend")
    require(bool(ball.admits(z, x).all()), "a step along the steepest direction ends outside")
    zero = ball.steepest(torch.zeros_like(x), x)
    require(bool((zero == 0).all()), "a zero gradient has a direction")


def outside_is_refused(threat: Any) -> None:
    """NaN, infinity, points outside the box and points beyond eps, where there is one, are not admitted."""
    ball, x = _bound(threat), _rows_of(threat)
    for value in (torch.nan, torch.inf, -0.5, 1.5):
        z = x.clone()
        z[:, 0, 0, 0] = value
        require(not bool(ball.admits(z, x).any()), f"a row holding {value} was admitted")
    far = 1.0 - x.round()
    if not _limited(ball):
        require(bool(ball.admits(far, x).all()), "a point of the box was refused though nothing bounds the distance")
        return
    require(not bool(ball.admits(far, x).any()), "the opposite corner of the box was admitted")


def zero_eps_holds_only_the_origin(threat: Any) -> None:
    """With radius 0 everything projects, samples and finishes to the origin."""
    if not isinstance(threat, Radius):
        return
    ball, x = replace(_bound(threat), eps=0), _rows_of(threat)
    require(torch.equal(ball.project(x + normal(26, *x.shape), x), x), "a point other than the origin is inside")
    require(
        torch.equal(ball.sample(x, RowRng.from_ids(0, names(len(x)))), x), "a point other than the origin was sampled"
    )


def finishing_stays_inside(threat: Any) -> None:
    """What the attacker hands in is admitted, and finishing it again changes nothing."""
    ball = _bound(threat)
    x = (_rows_of(threat) * 255).round() / 255
    for seed in range(3):
        z = _inside(ball, x, seed)
        done = ball.finish(z, x)
        require(bool(ball.admits(done, x).all()), "a finished row is outside")
        require(torch.equal(ball.finish(done, x), done), "finishing twice is not finishing once")


def rows_do_not_mix(threat: Any) -> None:
    """Projection, samples, directions and finish of a row are the same bits in every batch."""
    ball, x = _bound(threat), _rows_of(threat)
    far, gradient = x + 0.4 * normal(27, *x.shape), normal(28, *x.shape)
    rng = RowRng.from_ids(0, names(len(x)))

    def everything(chosen: Tensor) -> list[Tensor]:
        origin = x[chosen]
        inside = ball.project(far[chosen], origin)
        walked: list[Tensor] = []
        if _has_radius(ball):
            inside = ball.sample(origin, rng.take(chosen))
            walked = [inside, ball.steepest(gradient[chosen], origin)]
        return [
            *walked,
            ball.project(far[chosen], origin),
            ball.finish(inside, origin),
            ball.distance(inside, origin),
        ]

    whole = everything(torch.arange(len(x)))
    for chosen in (torch.tensor([3]), torch.arange(5), torch.arange(len(x)).flip(0)):
        for alone, together in zip(everything(chosen), whole, strict=True):
            require(torch.equal(alone, together[chosen]), "a row's result depends on the batch")


THREAT_LAWS: dict[str, Callable[[Any], None]] = {
    law.__name__: law
    for law in (
        origin_is_admitted,
        projection_lands_inside,
        projection_is_nearest,
        samples_are_admitted_and_differ,
        steepest_ascends,
        outside_is_refused,
        zero_eps_holds_only_the_origin,
        finishing_stays_inside,
        rows_do_not_mix,
    )
}


def _of_tokens(threat: Any) -> bool:
    """Whether what it speaks of are transcripts with a slot."""
    return isinstance(threat, Slotted)


def _chats(threat: Any) -> tuple[Any, Tensor, list[Tensor]]:
    """The threat model bound to a small tokenizer whose pieces grow together; rows; and candidates for each."""
    pieces = ("<s>", "<u>", "<e>", "a", "b", "c", "d", "ab", "cd", "abc")
    tokenizer = PieceTokenizer(pieces, special=pieces[:3], before="<s>", after="<u>", ends=("<e>",))
    chats = transcripts(tokenizer, [("ca", "d"), ("dcba", "ab"), ("d", "cc"), ("abca", "b")], room=4 * threat.n + 16)
    bound = threat.bind(Transcripts(tokenizer))
    usable = bound.allowed().nonzero().squeeze(1)
    lengths = sorted({1, max(1, bound.n // 2), bound.n})
    drawn = [usable[(uniform(31 + most, 6, most) * len(usable)).long()] for most in lengths]
    return bound, chats, drawn


def _each_slotted(threat: Any) -> list[tuple[Any, Tensor, Tensor]]:
    """(threat, rows with candidates, their origins)."""
    bound, chats, drawn = _chats(threat)
    return [(bound, bound.slotted(row, ids), row.expand(len(ids), -1, -1)) for row in chats for ids in drawn]


def untouched_chats_are_admitted(threat: Any) -> None:
    """A row without tokens of an attacker is within reach, at distance 0, and stays as it is when handed in."""
    bound, chats, _ = _chats(threat)
    require(bool(bound.admits(chats, chats).all()), "untouched rows are outside")
    require(bool((bound.distance(chats, chats) == 0).all()), "an untouched row has a distance")
    require(torch.equal(bound.finish(chats, chats), chats), "an untouched row is changed when handed in")


def slots_hold_what_is_put_there(threat: Any) -> None:
    """Candidates of allowed ids are admitted, at the distance of their length, and can be read out again."""
    bound, chats, drawn = _chats(threat)
    for row in chats:
        for ids in drawn:
            made = bound.slotted(row, ids)
            origins = row.expand(len(ids), -1, -1)
            require(bool(bound.admits(made, origins).all()), "a candidate of allowed ids is outside")
            require(bool((bound.distance(made, origins) == ids.shape[1]).all()), "the distance is not the length")
            read = torch.stack([bound.slot(one) for one in made])
            require(torch.equal(read, ids), "the slot holds something else")


def foreign_changes_are_refused(threat: Any) -> None:
    """One more token than n, a changed word, a changed reply and ids out of range are not admitted."""
    bound, chats, drawn = _chats(threat)
    wider = replace(bound, n=bound.n + 1)
    more = torch.cat((drawn[-1], drawn[-1][:, :1]), 1)
    for row in chats:
        origins = row.expand(len(more), -1, -1)
        require(not bool(bound.admits(wider.slotted(row, more), origins).any()), "n + 1 tokens were admitted")
        made = bound.slotted(row, drawn[0])
        for role in (USER, REPLY):
            place = int((made[0, 1] == role).nonzero()[0])
            for token in (int(made[0, 0, place]) % 4 + 3, len(bound.allowed())):
                changed = made.clone()
                changed[:, 0, place] = token
                require(not bool(bound.admits(changed, origins).any()), "a word that is not the attacker's changed")


def what_arrives_is_admitted(threat: Any) -> None:
    """A row handed in is admitted, and handing it in again changes nothing."""
    for bound, made, origins in _each_slotted(threat):
        done = bound.finish(made, origins)
        require(bool(bound.admits(done, origins).all()), "a finished row is outside")
        require(torch.equal(bound.finish(done, origins), done), "finishing twice is not finishing once")


def chats_do_not_mix(threat: Any) -> None:
    """What becomes of a row is the same in every batch."""
    for bound, made, origins in _each_slotted(threat):
        for ask in (bound.finish, bound.admits, bound.distance):
            whole = ask(made, origins)
            parts = torch.cat([ask(made[i : i + 1], origins[i : i + 1]) for i in range(len(made))])
            require(torch.equal(whole, parts), "a row's result depends on the batch")


TOKEN_LAWS: dict[str, Callable[[Any], None]] = {
    law.__name__: law
    for law in (
        untouched_chats_are_admitted,
        slots_hold_what_is_put_there,
        foreign_changes_are_refused,
        what_arrives_is_admitted,
        chats_do_not_mix,
    )
}
"""What a threat model with a slot for tokens owes its users; there is no walking in it."""


def check_threat_law(name: str, threat: Any) -> None:
    """One law; its AssertionError starts with the law's name and the threat model."""
    law = (THREAT_LAWS | TOKEN_LAWS)[name]
    try:
        law(threat)
    except Exception as broken:  # code of the user's own raises whatever it likes
        raise failure(name, law, repr(threat), broken) from broken


def check_threat_model(threat: Any) -> None:
    """Every law on a ball whose eps fits rows [2, 4, 4] in [0, 1] and does not hold their box's opposite corner.

    Threat models with a slot for tokens have laws of their own.
    """
    for name in TOKEN_LAWS if _of_tokens(threat) else THREAT_LAWS:
        check_threat_law(name, threat)
