"""What attacks made for a threat model of images owe their users, one function per law.

They turn images, move pixels, paste a patch, or change all images alike; no ball of vectors is theirs. Each raises
AssertionError with the law's name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from advkit.core.errors import AccessDenied, UsageError
from advkit.core.lanes import Lanes
from advkit.core.meter import Meter
from advkit.core.oracle import MeteredOracle
from advkit.core.protocols import Access, Data, MadeForThreatModel, Renders, one_change
from advkit.core.rendered import asked_in
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.testing.play import BALLS, RADII, failure, names, require, require_tensor, shortened
from advkit.testing.victims import network, uniform
from advkit.threat_models import GOALS, THREAT_MODELS
from advkit.threat_models.goals.untargeted import Untargeted
from advkit.threat_models.patch import Patch

SHAPE = (1, 8, 8)
CLASSES = 3


def made_for(attack: Any) -> Any:
    """The threat model that an attack is made for, where it is one of images of this module's kind; None elsewhere."""
    spec = attack.default_threat_model if isinstance(attack, MadeForThreatModel) else ""
    if not isinstance(spec, str) or not spec:  # a class may have a property there
        return None
    threat = THREAT_MODELS.build(spec)
    return threat if isinstance(threat, Renders | Patch) or one_change(threat) else None


def on_images(attack: Any) -> bool:
    """Whether the attack is made for a threat model of images alone, within which it has laws of its own."""
    return made_for(attack) is not None


@dataclass(frozen=True)
class ImageGame:
    """What an attack returned: parameters or images, the images they stand for, and what it cost."""

    x: Tensor
    start: Tensor
    z: Tensor
    images: Tensor
    threat: Any
    meter: Meter


def play_images(
    attack: Any,
    rows: Sequence[int] = range(9),
    *,
    seed: int = 0,
    threat: Any = None,
    access: Access | None = None,
    queries: int | None = None,
    goal: str = "untargeted",
    model: Any = None,
) -> ImageGame:
    """Run the attack on some of the kit's images, within the threat model that it is made for."""
    model = network(SHAPE, CLASSES) if model is None else model
    index = torch.tensor(list(rows), dtype=torch.long)
    every = uniform(41, 9, *SHAPE)
    x = every[index]
    bound = (made_for(attack) if threat is None else threat).bind(Box(shape=SHAPE))
    granted = attack.needs if access is None else access
    known = uniform(42, 40, *SHAPE)
    rule: Any = GOALS.build(goal)
    data = Data(known, model(known).argmax(1), Box(shape=SHAPE), CLASSES, rule=rule)
    oracle = MeteredOracle(model, len(x), granted, queries, lanes=Lanes.fitting(every), data=data)
    streams = RowRng.from_ids(seed, [names(9)[row] for row in rows])
    clean = model(x)
    start = bound.identity(x) if isinstance(bound, Renders) else x
    wanted = rule(clean.argmax(1), clean, streams)
    z = attack(asked_in(oracle, x, bound), start.clone(), wanted, bound, streams)
    require_tensor(z, start)
    images = bound.render(z, x) if isinstance(bound, Renders) else z
    return ImageGame(x, start, z, images, bound, oracle.meter)


def _short(attack: Any) -> Any:
    """The attack with its effort cut to what tiny victims need."""
    attack = shortened(attack, 10, 40)
    cut = {"rotations": 5, "translations": 3, "samples": 30, "batch": 10, "restarts": 2}
    return replace(attack, **{name: most for name, most in cut.items() if getattr(attack, name, 0) > most})


def images_stay_admitted(attack: Any) -> None:
    """What is returned has the shape of what was handed over, and the threat model admits it and some change."""
    game = play_images(_short(attack))
    require(game.z.shape == game.start.shape and game.z.dtype == game.start.dtype, "shape or type changed")
    require(bool(game.threat.admits(game.z, game.start).all()), "rows came back outside the threat model")
    require(bool((game.images != game.x).any()), "no image was touched")
    require(bool(Box(shape=SHAPE).contains(game.images).all()), "images are not legal")


def images_repeat(attack: Any) -> None:
    """The same seed gives the same bits, alone, in company and in another order."""
    attack = _short(attack)
    whole = play_images(attack)
    again = play_images(attack)
    require(torch.equal(whole.z, again.z), "the same seed gave other bits")
    for rows in ([4], [0, 1, 2], [8, 3, 5, 0]):
        part = play_images(attack, rows)
        require(torch.equal(part.images, whole.images[rows]), f"images {rows} depend on the batch")


def images_leave_no_trace(attack: Any) -> None:
    """Global random state and the caller's rows are as they were."""
    before = torch.get_rng_state()
    game = play_images(_short(attack))
    require(torch.equal(before, torch.get_rng_state()), "global random numbers were drawn")
    require(torch.equal(game.x, uniform(41, 9, *SHAPE)), "the caller's images changed")


def images_for_every_goal(attack: Any) -> None:
    """Untargeted, targeted and ordered goals all work."""
    for goal in ("untargeted", "targeted", "targeted:how=class,target=1", "ordered-topk:k=2"):
        game = play_images(_short(attack), goal=goal)
        require(bool(game.threat.admits(game.z, game.start).all()), f"{goal}: rows came back outside")


def images_keep_access(attack: Any) -> None:
    """With no access an attack that declares some is refused."""
    if attack.needs == Access.NOTHING:
        return
    try:
        play_images(_short(attack), access=Access.NOTHING)
    except AccessDenied:
        return
    raise AssertionError("the attack ran without access")


def balls_are_refused(attack: Any) -> None:
    """In a ball it says which threat model it is made for."""
    for norm, ball in BALLS.items():
        x = uniform(43, 2, *SHAPE)
        model = network(SHAPE, CLASSES)
        oracle = MeteredOracle(model, 2)
        rng = RowRng.from_ids(0, names(2))
        try:
            attack(oracle, x, Untargeted(model(x).argmax(1)), ball(eps=RADII[norm]), rng)
        except UsageError as refusal:
            require(norm in str(refusal), f"the refusal does not name what was asked for: {refusal}")
            require(attack.default_threat_model.partition(":")[0] in str(refusal), "nor what to ask for")
            continue
        raise AssertionError(f"it ran in a ball of {norm}")


IMAGE_LAWS: dict[str, Callable[[Any], None]] = {
    law.__name__: law
    for law in (
        images_stay_admitted,
        images_repeat,
        images_leave_no_trace,
        images_for_every_goal,
        images_keep_access,
        balls_are_refused,
    )
}


def check_image_law(name: str, attack: Any) -> None:
    """One law; its AssertionError starts with the law's name and the attack."""
    try:
        IMAGE_LAWS[name](attack)
    except Exception as broken:  # an attack raises whatever it likes
        raise failure(name, IMAGE_LAWS[name], repr(attack), broken) from broken
