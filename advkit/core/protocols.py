"""The signatures everything plugs into: seven nouns, no implementation.

A **Task** hands out rows with a **Goal**; an **Attack** shapes them through an **Oracle** within a **ThreatModel**
against a **Model** under a **Defense**; the threat model's **Scenario** says who moves when, and every row ends as one
**Record**. X is what the attacker shapes, Y what the model answers; both are tensors with rows first unless an adapter
says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:
    from typing import Self

    import torch
    from torch import Tensor, nn

X = TypeVar("X")
Y = TypeVar("Y")
X_contra = TypeVar("X_contra", contravariant=True)
Y_co = TypeVar("Y_co", covariant=True)
Y_contra = TypeVar("Y_contra", contravariant=True)


class Access(IntEnum):
    """What an attacker may ask of the oracle; each level contains those before it."""

    NOTHING = 0
    LABELS = 1
    SCORES = 2
    GRADIENTS = 3


class Outcome(StrEnum):
    """How a row ended, as the harness judged it on the protected victim."""

    WRONG = "wrong"  # the untouched answer was already wrong
    ROBUST = "robust"  # the attack failed
    BROKEN = "broken"  # the goal was reached inside the threat model
    INVALID = "invalid"  # the attack left the threat model: never a win, always reported
    NON_FINITE = "non_finite"  # the victim answered NaN or infinity: robust accuracy becomes an interval
    ERROR = "error"  # the row raised; the message is in the record


class Space(Protocol[X_contra]):
    """A set of legal inputs."""

    def contains(self, x: X_contra) -> Tensor:
        """Bool [B]: which rows are legal (finite, right shape, in range)."""
        ...

    def complaint(self, x: X_contra) -> str | None:
        """None when every row is legal, else what was seen, what was expected and the likely cause."""
        ...


class Rng(Protocol):
    """Randomness by name and by row: what a row draws depends on the seed, its id and the names, on nothing else."""

    def at(self, *names: object) -> Rng:
        """The stream below this one that the names single out."""
        ...

    def take(self, rows: Tensor) -> Rng:
        """The streams of a subset of the rows (long or bool [B])."""
        ...

    def uniform(self, like: Tensor) -> Tensor:
        """Uniform in [0, 1), same shape, dtype and device as `like` (rows first)."""
        ...

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal, same shape, dtype and device as `like`."""
        ...

    def integers(self, high: int, like: Tensor) -> Tensor:
        """Long integers in [0, high), same shape and device as `like`."""
        ...

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """A torch generator for what is not per row (shuffling, initial weights)."""
        ...


class Model(Protocol[X_contra, Y_co]):
    """Speaks the attacker's space; normalising, encoding and state resets happen inside.

    One whose answers do not depend on the batch by its own means says in which shapes it wants to be called: `lanes`
    (`core.oracle.Lanes`). One that counts the tokens it sends through its network holds the running total in `tokens`.
    """

    @property
    def space(self) -> Any:
        """The Space of legal inputs."""
        ...

    def __call__(self, x: X_contra) -> Y_co: ...

    def attacker_view(self) -> Model[X_contra, Y_co]:
        """What an adaptive attacker differentiates (BPDA, EOT); the model itself where it is honest already."""
        ...

    def modules(self) -> Sequence[nn.Module]:
        """The torch modules inside: frozen while attacked and given back bit-identical. May be empty."""
        ...

    def describe(self) -> ModelInfo:
        """Name, size and weight hash for the report."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """The same model on a device."""
        ...


@dataclass(frozen=True)
class ModelInfo:
    """What a report says of a model."""

    name: str
    architecture: str
    state_sha256: str
    n_parameters: int
    classes: int | None = None
    source: str = ""
    license: str = ""
    randomized: bool = False
    differentiable: bool = True
    abstains: bool = False


Figure = float | bool | str | None
"""What can be said of a row; a text is kept with the row and never averaged."""


@dataclass(frozen=True)
class Evidence:
    """What a finished attack on a batch leaves to look at, on the victim's side of the wall.

    victim:   the protected model
    ask:      its answers to rows, apart from the attack's meter
    origin:   untouched rows
    returned: what the attack returned, the origin where that is outside the threat model
    handed:   what the victim got to see of it (see `ThreatModel.finish`)
    clean, answer: the victim's answers to `origin` and `handed`
    twins:    the rows that belong beside the origins and are never attacked; None where the task has none
    rng:      streams of the rows, for what is drawn while looking
    """

    victim: Any
    ask: Callable[[Any], Any]
    origin: Any
    returned: Any
    handed: Any
    clean: Any
    answer: Any
    twins: Any
    rng: Rng


class Goal(Protocol[Y_contra]):
    """What the attacker wants, per row. Owns the loss: no attack ever sees a label.

    One that has more to say of an attack than whether it was reached also has `examine(evidence)`: named sequences of a
    number, a truth value, a text or None per row. Texts stand in the records as `texts`, the others as `figures`, which
    are averaged over all rows, those included on which the attack failed; truth values become rates. Threat models may
    have it, too, and so may victims that do more than answer, such as a filter. A rule that makes goals may refuse
    models: `misfit(model)` says why, or None.
    """

    kind: ClassVar[str]  # the report's word: untargeted, targeted, topk_ordered...

    def reached(self, answer: Y_contra) -> Tensor:
        """Bool [B]."""
        ...

    def loss(self, answer: Y_contra) -> Tensor:
        """Float [B], smaller is better for the attacker."""
        ...

    def margin(self, answer: Y_contra) -> Tensor:
        """Float [B], the distance to the goal in answer units: negative exactly where the goal is reached strictly."""
        ...

    def under(self, loss: str) -> Self:
        """The same goal with another surrogate loss ("ce", "margin", "dlr"); itself where it has only its own."""
        ...

    def take(self, rows: Tensor) -> Self:
        """The goal of a subset of the rows (long or bool index)."""
        ...

    def to(self, device: torch.device | str) -> Self: ...


class Oracle(Protocol[X, Y]):
    """All an attack sees of the victim: meters, refuses what was not granted, guards against NaN."""

    access: Access
    decides: bool  # its answers are the verdict's: a row that reached its goal here may stop. False under transfer
    data: Data | None  # labelled data that the attacker holds; handed to attacks that say `wants_data`

    def __call__(self, x: X, of: Tensor | None = None) -> Y:
        """Answers without gradient; `of` says which row each candidate belongs to (default: the rows in order)."""
        ...

    def gradient(self, x: X, goal: Goal[Y], of: Tensor | None = None) -> tuple[Tensor, X, Y]:
        """Loss [B], gradient of each row's loss w.r.t. that row, answer: one forward and one backward."""
        ...

    def note(self, row: int, figures: Mapping[str, Any]) -> None:
        """Keep what a step of the attack wants to tell of a row of this oracle; it ends in the record's `trace`."""
        ...

    def take(self, rows: Tensor) -> Oracle[X, Y]:
        """The oracle of a subset of the rows."""
        ...

    def seen_as(self, view: Callable[[Any], Any], decides: bool = False) -> Oracle[X, Any]:
        """The same rows and meter, asked of `view(model)`: features, another backward rule, one of several models."""
        ...

    def head(self) -> Tensor | None:
        """Weight [classes, features] of the model's last linear layer, where it has one."""
        ...

    @property
    def left(self) -> int | None:
        """Queries that every row still has; None when unlimited."""
        ...


class ThreatModel(Protocol[X]):
    """Capability, knowledge (access), budget and timing (scenario) of the attacker.

    One that has more to say of a change than its distance also has `measures(x, origin)`, named figures per row
    (float [B] each): they stand in every record, and reports average them over the rows that fell. Where the budget is
    such a figure and one run serves many budgets, `levels()` names thresholds per measure: reports then give the share
    of the attacked rows broken within each. What it has to say of every row, fallen or not, it says in `examine`, as
    goals do.
    """

    scenario: ClassVar[str]  # registry name of the scenario that plays it

    @property
    def access(self) -> Access: ...
    @property
    def queries(self) -> int | None: ...

    def bind(self, space: Any) -> Self:
        """The same threat model inside a model's space; raises UsageError when they do not fit."""
        ...

    def distance(self, x: X, origin: X) -> Tensor:
        """Float [B]."""
        ...

    def admits(self, x: X, origin: X) -> Tensor:
        """Bool [B]: finite, in the space, within the budget."""
        ...

    def finish(self, x: X, origin: X) -> X:
        """What the attacker can really hand in (8-bit files, re-encoded text); the identity where anything goes."""
        ...


class Ball(ThreatModel[X], Protocol[X]):
    """A threat model one can walk in."""

    def project(self, x: X, origin: X) -> X:
        """The nearest admitted point, exactly."""
        ...

    def sample(self, origin: X, rng: Rng) -> X:
        """A random admitted start."""
        ...

    def steepest(self, gradient: X, at: X) -> X:
        """The eps-long direction of steepest ascent that the space leaves open at `at`."""
        ...


class Attack(Protocol):
    """Anything with a declared need of access.

    An attack that is made for one goal or threat model names it in `default_goal` and `default_threat_model` (specs):
    what a command that does not say otherwise gets. One with a true `wants_data` finds the task's training data at
    `oracle.data`. One with a true `together` gets all rows of the evaluation in one batch, for what it makes of a row
    depends on the others (one suffix for many prompts).
    """

    needs: ClassVar[Access]


@runtime_checkable
class Perturb(Protocol[X, Y]):
    """Evasion (x: inputs) and poisoning (x: training data)."""

    needs: ClassVar[Access]

    def __call__(self, oracle: Oracle[X, Y], x: X, goal: Goal[Y], threat: Any, rng: Rng, /) -> X: ...


class Selector(Protocol):
    """Decides on the items of one stream, one by one."""

    def select(self, value: float, t: int) -> bool:
        """Whether to submit item t (0-based), knowing the values up to here. Asked once per item; irrevocable."""
        ...


@runtime_checkable
class OnlineAttack(Perturb[X, Y], Protocol[X, Y]):
    """Streams: shapes every item as any attack does, and decides which `budget` of `length` items to hand in."""

    def start(self, length: int, budget: int, rng: Rng | None = None) -> Selector:
        """A selector for one stream; rng (one row) is for those that draw."""
        ...


@dataclass(frozen=True)
class Batch:
    """Rows handed out by a task. `goal` is what an untargeted attacker wants of them.

    `twins` are rows that belong beside these and are never attacked, such as a harmless prompt beside a forbidden one.
    """

    ids: tuple[str, ...]
    x: Any
    goal: Any
    labels: Tensor | None = None
    twins: Any = None


@dataclass(frozen=True)
class Data:
    """A training set: x [N, ...] in `space`, y long [N]."""

    x: Tensor
    y: Tensor
    space: Any
    classes: int
    name: str = ""

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class TaskDefaults:
    """What a command that does not say otherwise gets."""

    model: str
    threat_model: str
    n: int | None = None  # rows evaluated
    baseline: str = "none"
    goal: str = "untargeted"


class Task(Protocol):
    """Hands out rows; has a name, a version and a hash of its ids and bytes.

    One whose rows depend on the model (token ids) also has `bind(space)`, the same task in a model's space: its rows
    are asked for only after that, and until then its own `space` is None.
    """

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def split(self) -> str: ...
    @property
    def classes(self) -> int: ...
    @property
    def defaults(self) -> TaskDefaults: ...
    @property
    def space(self) -> Any: ...

    def __len__(self) -> int: ...

    def batches(self, size: int, skip: Container[str] = (), n: int | None = None) -> Iterator[Batch]:
        """The first n rows (all by default) in a fixed order, without those in skip."""
        ...

    def training(self) -> Data | None:
        """The training set, or None where the task has none at hand."""
        ...

    def digest(self) -> str:
        """sha256 over x bytes then y bytes then ids."""
        ...

    def class_names(self) -> tuple[str, ...]: ...


class Defense(Protocol):
    """Training, filtering, smoothing, rejecting: model -> model."""

    needs_data: ClassVar[bool]
    claims: ClassVar[
        str
    ]  # spec of the threat model it was designed against, reported beside the one asked for; "" = none

    def protect(self, model: Any, data: Data | None, rng: Rng) -> Any: ...


class Scenario(Protocol):
    """The order of moves."""

    name: ClassVar[str]

    def accepts(self, case: Any) -> str | None:
        """None, or the reason why not."""
        ...

    def play(self, case: Any, done: Container[str] = ()) -> Iterator[Record]: ...


@dataclass(frozen=True)
class Record:
    """How one row ended under one attack; what a report says is computed from these alone.

    `margin` is the goal's margin of the victim's answer on the returned input and `closeness` that margin over the
    spread of the scores; `eight_bit` says whether the goal is still reached after rounding to 8 bits (None where that
    has no meaning). `measures` are what the threat model measures of the change beside its distance. `figures` are what
    goal and threat model say of the row whether it fell or not; `trace` is what the attack noted step by step, evidence
    of how it went and of nothing else; `texts` are what was said of the row in words. The last three stand in a file
    only where there are any.
    """

    id: str
    attack: str
    outcome: Outcome
    label: int | None = None
    clean: int | None = None  # the victim's decision on the untouched row
    adversarial: int | None = None  # and on the returned one
    reached: bool = False  # the goal holds on the returned row (also where the clean row was already wrong)
    distance: float | None = None
    margin: float | None = None
    closeness: float | None = None
    eight_bit: bool | None = None
    forwards: int = 0
    backwards: int = 0
    queries: int = 0
    notes: tuple[str, ...] = field(default=())  # findings of this row: "non_finite", "zero_gradient"...
    message: str = ""
    measures: dict[str, float] = field(default_factory=dict, hash=False)
    figures: dict[str, float | bool] = field(default_factory=dict, hash=False)
    trace: tuple[dict[str, Any], ...] = field(default=(), hash=False)
    texts: dict[str, str] = field(default_factory=dict, hash=False)
