"""What every attack on training labels owes its users; each law raises AssertionError with its name."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from advkit.core.errors import UsageError
from advkit.core.learners import Floats, Ints
from advkit.core.protocols import Access, FlipsLabels, Learns
from advkit.core.retraining import Retraining
from advkit.core.rng import RowRng
from advkit.defenses import DEFENSES
from advkit.testing.play import BALLS, RADII, failure, require
from advkit.threat_models.labels import LabelFlips

BUDGETS = (1, 5, 12)


def on_labels(attack: object) -> bool:
    """Whether it flips training labels."""
    return isinstance(attack, FlipsLabels)


def clusters(n: int = 40, classes: int = 2) -> tuple[Floats, Ints]:
    """Samples [n, 3] of overlapping Gaussian clusters around different corners, and their classes."""
    draws = np.random.default_rng(7)
    y = np.arange(n) % classes
    return draws.normal(size=(n, 3)) + 1.5 * np.eye(3)[y % 3], y.astype(np.int64)


@dataclass(frozen=True)
class Flipped:
    """One attack on one set of labels."""

    labels: Ints
    trainings: int


def play_labels(attack: Any, budget: int, classes: int = 2, seed: int = 0) -> Flipped:
    """Run the attack on small clusters with its own surrogate (svm where it has none)."""
    x, y = clusters(classes=classes)
    defense: Any = DEFENSES.build(attack.surrogate or "svm")
    oracle = Retraining(x, y, classes, defense.learner, seed)
    stream = RowRng.from_ids(seed, ["labels"]).at("attack")
    out = attack(oracle, torch.from_numpy(y.copy()), None, LabelFlips(k=budget), stream)
    require(isinstance(out, torch.Tensor), f"it returned {type(out).__name__}; expected a tensor")
    require(out.shape == (len(y),) and out.dtype == torch.long, f"it returned {out.dtype} {list(out.shape)}")
    return Flipped(out.numpy(), oracle.trainings)


def _classes(attack: Any) -> list[int]:
    """Numbers of classes that the attack is defined for; a refusal names two."""
    try:
        play_labels(attack, 1, classes=3)
    except UsageError as refusal:
        require("two classes" in str(refusal), f"three classes were refused, not for being more than two: {refusal}")
        return [2]
    return [2, 3]


def flips_exactly_the_budget(attack: Any) -> None:
    """As many labels are changed as the budget says, no more and no fewer, and all are classes of the task."""
    for classes in _classes(attack):
        y = clusters(classes=classes)[1]
        for budget in BUDGETS:
            labels = play_labels(attack, budget, classes).labels
            flips = int((labels != y).sum())
            require(flips == budget, f"{flips} labels of {len(y)} were flipped under a budget of {budget}")
            require(labels.min() >= 0 and labels.max() < classes, f"labels from {labels.min()} to {labels.max()}")


def same_seed_same_labels(attack: Any) -> None:
    """The same seed flips the same labels."""
    one, other = (play_labels(attack, 5, seed=3).labels for _ in range(2))
    require((one == other).all(), "the same seed flipped other labels")


def leaves_nothing_behind(attack: Any) -> None:
    """The caller's labels, the oracle's arrays and global randomness are as they were."""
    x, y = clusters()
    defense: Any = DEFENSES.build(attack.surrogate or "svm")
    oracle = Retraining(x, y, 2, defense.learner, 0)
    given, held = torch.from_numpy(y.copy()), (oracle.x.copy(), oracle.y.copy(), x.copy())
    before = torch.get_rng_state(), random.getstate(), _of_numpy()
    attack(oracle, given, None, LabelFlips(k=5), RowRng.from_ids(0, ["labels"]).at("attack"))
    after = torch.get_rng_state(), random.getstate(), _of_numpy()
    require(torch.equal(before[0], after[0]) and before[1:] == after[1:], "global random numbers were drawn")
    require(bool((given.numpy() == y).all()), "the caller's labels were changed in place")
    same = all(np.array_equal(a, b) for a, b in zip(held, (oracle.x, oracle.y, x), strict=True))
    require(same, "the training samples or clean labels were changed")


def _of_numpy() -> bytes:
    _, keys, *_ = np.random.get_state()  # noqa: NPY002 - the legacy state is what must not change
    return np.asarray(keys).tobytes()


def trains_what_it_says(attack: Any) -> None:
    """An attack that needs nothing trains nothing; any other names a surrogate that learns from labels, and trains."""
    trainings = play_labels(attack, 5).trainings
    if attack.needs == Access.NOTHING:
        require(not attack.surrogate and not trainings, f"it needs nothing and trained {trainings} times")
        return
    require(isinstance(DEFENSES.build(attack.surrogate), Learns), f"{attack.surrogate!r} does not learn from labels")
    require(trainings > 0, "it declares that it reads models and trained none")


def refuses_what_has_no_labels(attack: Any) -> None:
    """In a ball of inputs it says that it flips labels."""
    try:
        attack(object(), torch.zeros(2, 4), None, BALLS["linf"](eps=RADII["linf"]), RowRng.from_ids(0, ["a", "b"]))
    except UsageError as refusal:
        require("label" in str(refusal), f"the refusal does not speak of labels: {refusal}")
        return
    raise AssertionError("it ran in a ball of inputs")


LABEL_LAWS: dict[str, Callable[[Any], None]] = {
    law.__name__: law
    for law in (
        flips_exactly_the_budget,
        same_seed_same_labels,
        leaves_nothing_behind,
        trains_what_it_says,
        refuses_what_has_no_labels,
    )
}


def check_label_law(name: str, attack: Any) -> None:
    """One law; its AssertionError starts with the law's name and the attack."""
    try:
        LABEL_LAWS[name](attack)
    except Exception as broken:  # an attack raises whatever it likes
        raise failure(name, LABEL_LAWS[name], repr(attack), broken) from broken
