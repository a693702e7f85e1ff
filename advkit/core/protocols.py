"""The signatures everything plugs into: nouns, abilities and plain values, no implementation.

A **Task** hands out rows with a **Goal**, which a **Rule** made; an **Attack** shapes them through an **Oracle** within
a **ThreatModel** against a **Model** under a **Defense**; the threat model's **Scenario** (`evaluation.run.scenario`)
says who moves when; every row ends as one **Record**. X is what the attacker shapes, Y what the model answers; both are
tensors with rows first unless an adapter says otherwise.

What a noun declares, every part of that kind has. What only some have is an **ability**: a small protocol below its
noun, asked for with `isinstance(part, Ability)`. A part of advkit's own inherits from the abilities it has, so that a
misspelt one is an error of the type checker and of the first instance; a part of another package needs the members
alone. From Python 3.12 on `isinstance` does not run code of the part: a property that raises AttributeError counts as a
member, what `__getattr__` passes on does not. So a part that has an ability under some of its settings alone needs two
classes, and a wrapper declares what it passes on.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from typing_extensions import TypeIs

from advkit.core.records import Label as Label
from advkit.core.records import Outcome as Outcome
from advkit.core.records import Record as Record

if TYPE_CHECKING:
    from typing import Self, runtime_checkable  # the type checker knows it by this name

    import torch
    from torch import Tensor, nn

    from advkit.core.speed import Speed
else:
    from advkit.core.structural import runtime_checkable

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


class Space(Protocol[X_contra]):
    """A set of legal inputs."""

    def contains(self, x: X_contra) -> Tensor:
        """Bool [B]: which rows are legal (finite, right shape, in range)."""
        ...

    def complaint(self, x: X_contra) -> str | None:
        """None when every row is legal, else what was seen, what was expected and the likely cause."""
        ...


@runtime_checkable
class Boxed(Protocol):
    """A space whose values lie between two bounds."""

    @property
    @abstractmethod
    def low(self) -> float | Tensor:
        """Smallest legal value, one for all or one per feature."""

    @property
    @abstractmethod
    def high(self) -> float | Tensor:
        """Largest legal value."""


@runtime_checkable
class Sized(Protocol):
    """A space that may know the shape of its rows."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...] | None:
        """Of one row; None accepts any."""


@runtime_checkable
class Quantizes(Protocol):
    """A space of which files hold only some values."""

    @abstractmethod
    def quantize(self, x: Tensor) -> Tensor:
        """The rows with every value rounded to the nearest that a file holds."""


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

    def keys(self) -> Tensor:
        """A 64-bit number per row, int64 [B] on the CPU, for generators that fill whole blocks (`core.noise`)."""
        ...


@runtime_checkable
class Model(Protocol[X_contra, Y_co]):
    """Speaks the attacker's space; normalising, encoding and state resets happen inside."""

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


class ModelBuilder(Protocol):
    """What a name of `--model` stands for: an architecture to train, or a way to load a model."""

    def __call__(self, shape: tuple[int, ...], classes: int, rng: Rng, /, *, space: Any = None) -> Any:
        """The model, in evaluation mode and on the CPU.

        shape: of one row
        space: of the task; None stands for the box [0, 1]
        """
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


@runtime_checkable
class Modular(Protocol):
    """What has torch modules inside: a model, or one way to query it."""

    @abstractmethod
    def modules(self) -> Iterable[nn.Module]:
        """The modules, those inside them included or not."""


@runtime_checkable
class Shaped(Protocol):
    """A model that says in which shapes it wants to be called, where its answers do not depend on the batch."""

    @property
    @abstractmethod
    def lanes(self) -> Any:
        """The shapes (`core.lanes.Lanes`); None leaves them to whoever calls."""


@runtime_checkable
class Batched(Protocol):
    """A model that says how many rows are worth having in flight at once."""

    @property
    @abstractmethod
    def batch(self) -> int:
        """Rows, >= 1."""


@runtime_checkable
class CountsTokens(Protocol):
    """A model that counts the tokens it sends through its network."""

    @property
    @abstractmethod
    def tokens(self) -> int:
        """The running total, padding included."""


@runtime_checkable
class CountsQueries(Protocol):
    """A model of which every answer may have a price, and which counts them: a web service, what stands before one."""

    @property
    @abstractmethod
    def answered(self) -> int:
        """Samples that were answered so far; each counts once, however often it was sent."""

    @property
    @abstractmethod
    def retried(self) -> int:
        """Requests that had to be sent again."""


@runtime_checkable
class Averages(Protocol):
    """A model whose answer is a mean of several calls of the deployed one (EOT)."""

    @property
    @abstractmethod
    def passes(self) -> int:
        """Calls of the deployed model that one call of this one costs, >= 1."""


@runtime_checkable
class DrawsByRow(Protocol):
    """A random model whose draws may come from streams of the rows, so that they do not depend on the batch.

    Called like any other model it draws its keys from torch's generators.
    """

    @property
    @abstractmethod
    def base(self) -> Any:
        """The model that it calls once for every draw."""

    @property
    @abstractmethod
    def stream(self) -> str:
        """What a report calls the stream of its draws."""

    @abstractmethod
    def drawing(self, x: Any, keys: Tensor) -> Any:
        """Its answers to rows x [B, ...]; the draws follow from `keys`, int64 [B] on the CPU, one for each row."""


@runtime_checkable
class Votes(Protocol):
    """A random model whose answer is a vote over many draws of its own: one answer is the verdict.

    To abstain counts as a wrong answer: it is right for no sample, and no success where a certain answer is wanted.
    """

    @abstractmethod
    def abstained(self, answer: Any) -> Tensor:
        """Bool [B]: the answers that decide for no class."""


@runtime_checkable
class Undefended(Protocol):
    """A model whose defense can be taken off: transformed inputs, filtered prompts."""

    @property
    @abstractmethod
    def undefended(self) -> Any:
        """The model without its defense: what an attacker who does not know of the defense attacks."""


@runtime_checkable
class TakesStandIn(Protocol):
    """A model behind an input transformation whose derivative an attacker may replace (BPDA)."""

    @abstractmethod
    def with_identity(self) -> Any:
        """The same answers, with the derivative of the identity in place of the transformation's."""


@runtime_checkable
class UnderSpeed(Protocol):
    """A model that says itself what it is under speed switches, because it is queried in more ways than one."""

    @abstractmethod
    def under_speed(self, speed: Speed) -> Any:
        """The model that the attack's oracle queries in place of this one."""


@runtime_checkable
class KnowsClasses(Protocol):
    """A model or a task that says how many classes there are, without a look at the weights."""

    @property
    @abstractmethod
    def classes(self) -> int | None:
        """None where unknown."""


@runtime_checkable
class AnswersSamples(Protocol):
    """A model, a task or training data whose right answer to a sample is that sample, as far as it can be recovered."""

    @property
    @abstractmethod
    def answer_shape(self) -> tuple[int, ...]:
        """Of one answer; empty where answers are classes."""


def answer_shape(part: object) -> tuple[int, ...]:
    """The shape of one answer where answers are samples; empty where they are classes."""
    return tuple(part.answer_shape) if isinstance(part, AnswersSamples) else ()


@runtime_checkable
class Headed(Protocol):
    """A model that knows its last linear layer."""

    @abstractmethod
    def head(self) -> Tensor | None:
        """Weight [classes, features]; None where there is no such layer."""


@runtime_checkable
class TakesRule(Protocol):
    """A spiking model that can be seen under another backward rule."""

    @abstractmethod
    def with_rule(self, rule: Any) -> Any:
        """The same weights and answers under the rule (an object or a spec); None: the rule it was trained with."""


@runtime_checkable
class Copies(Protocol):
    """A model that can be copied with weights of its own."""

    @abstractmethod
    def copy(self) -> Any:
        """The copy."""


@runtime_checkable
class Embeds(Protocol):
    """A model that makes vectors of its inputs, and classes of these."""

    @property
    def embeds(self) -> bool:
        """Whether it does; not where it stands around a model that has no embeddings."""
        return True

    @abstractmethod
    def toward(self, vector: Tensor) -> Any:
        """The same model with scores [B, C] whose mean over the classes is the cosine of embedding and vector [d].

        A number is added to all scores of a row: classes, probabilities and margins stay as they are. None where what
        is inside has no embedding; BadInput for a vector of another length.
        """


@runtime_checkable
class TakesCaptions(Protocol):
    """A model whose classes are texts, and which answers others as well (zero-shot)."""

    @abstractmethod
    def with_captions(self, captions: tuple[tuple[str, ...], ...] | None, names: tuple[str, ...]) -> Any:
        """The same model with texts for these classes; itself where they are its own.

        captions: of every class, as many for each; None where a task has none, and the model makes them of the names
        """


@runtime_checkable
class Likelihood(Protocol):
    """A language model that tells how likely a text is."""

    @abstractmethod
    def likelihood(self) -> Callable[[Tensor], Tensor]:
        """x [B, 2, W] -> [B, W]: log-probability of every token of the user's turn; 0 elsewhere."""


@runtime_checkable
class Generates(Protocol):
    """A language model that writes replies."""

    @abstractmethod
    def generate(self, x: Tensor, samples: int, rng: Rng, **settings: Any) -> list[list[str]]:
        """`samples` replies to every row of x [B, 2, W]; settings as in `LanguageModel.generate_ids`."""


@runtime_checkable
class Wraps(Protocol):
    """A model around another one."""

    @property
    @abstractmethod
    def model(self) -> Any:
        """The model inside."""


@runtime_checkable
class Composite(Protocol):
    """A model made of several."""

    @property
    @abstractmethod
    def models(self) -> Sequence[Any]:
        """The members."""


@runtime_checkable
class Describes(Protocol):
    """A model or a threat model, as what has a description."""

    @abstractmethod
    def describe(self) -> Any:
        """ModelInfo of a model, plain JSON values of a threat model."""


Figure = float | bool | str | Sequence[float] | None
"""What can be said of a row; texts and sequences of numbers are kept with the row and never averaged."""


@dataclass(frozen=True)
class Evidence:
    """What a finished attack on a batch leaves to look at, on the victim's side of the wall.

    victim:   the protected model
    ask:      its answers to rows, apart from the attack's meter
    origin:   clean rows
    returned: what the attack returned, the origin where that is outside the threat model
    handed:   what the victim got to see of it (see `ThreatModel.finish`)
    clean, answer: the victim's answers to `origin` and `handed`
    twins:    the rows that belong beside the origins and are never attacked; None where the task has none
    rng:      streams of the rows, for what is drawn while looking
    labels:   true classes, long [B]; None where the task has none
    shifted:  a number that means nothing for classes was added to all scores of a row (`ThroughView`), so that rows
              can't be ranked against each other by a score
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
    labels: Tensor | None = None
    shifted: bool = False


class Goal(Protocol[Y_contra]):
    """What the attacker wants, per row. Owns the loss: no attack ever sees a label."""

    @property
    def kind(self) -> str:
        """The report's word: untargeted, targeted, topk_ordered..."""
        ...

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


@functools.lru_cache(maxsize=1024)
def _conforms(kind: type, protocol: type) -> bool:
    return issubclass(kind, protocol)


def conforms(value: object, protocol: Any) -> bool:
    """`isinstance` for protocols of methods alone, in the loops where it would cost as much as an operation."""
    kind: Any = type(value)
    return _conforms(kind, protocol)


@runtime_checkable
class NoneReached(Protocol):
    """A goal that sees more cheaply than `reached` that no row reaches it: most steps of an attack end with that."""

    @abstractmethod
    def none_reached(self, answer: Any) -> bool:
        """Whether it is plain that no row reaches it; False in doubt."""


@runtime_checkable
class Sloped(Protocol):
    """A goal that knows the derivative of its loss, so that autograd needs to go through the model alone."""

    @abstractmethod
    def sloped(self, answer: Any) -> tuple[Any, Any] | None:
        """Its loss [B], and the derivative of each row's by its answer [B, ...]; None where autograd has to find it."""


class Rule(Protocol):
    """Makes goals: what the attacker wants, before there are rows. What `--goal` names."""

    @property
    def kind(self) -> str:
        """That of the goals it makes."""
        ...

    def __call__(self, labels: Tensor, clean: Tensor, rng: Rng, /) -> Any:
        """The Goal of a batch with true classes `labels`, long [B], and clean answers `clean`."""
        ...


@runtime_checkable
class AboutSamples(Protocol):
    """A rule whose goals are about the clean samples themselves, where there are no labels."""

    @abstractmethod
    def about(self, x: Any) -> Any:
        """The Goal of a batch of clean samples x."""


@runtime_checkable
class Graded(Protocol):
    """A rule by which every sample has a figure that the attacker drives on after the goal is reached.

    So no sample stops early, and those that meet the goal when clean are attacked as well.
    """

    @property
    @abstractmethod
    def grades(self) -> Sequence[str]:
        """Names of the figures (`Examines`) whose means are reported with intervals; larger is better for the attacker.

        The first is the one that decides.
        """


@runtime_checkable
class PerSample(Protocol):
    """A rule with something of its own for every sample of a task, such as a class to reach."""

    @abstractmethod
    def over(self, ids: Sequence[str]) -> Self:
        """The same rule, once it knows the samples that are evaluated, in their order.

        Raises UsageError where it has not one entry for each.
        """

    @abstractmethod
    def of(self, ids: Sequence[str]) -> Rule:
        """The rule of a batch of these samples; only after `over`."""


@dataclass(frozen=True, kw_only=True)
class Wording:
    """What a report calls a goal's figures: column headings and names of rows.

    clean:   the clean samples on which the goal does not hold
    robust:  the samples on which the attack failed
    success: the fraction of the attackable samples that are broken
    figure:  the axis of a plot, and the column of a table of such figures
    """

    clean: str = "clean accuracy"
    robust: str = "robust accuracy"
    success: str = "attack success rate"
    figure: str = "accuracy"


NOT_REACHED = Wording(robust="correct, goal not reached", figure="goal not reached")
"""Of goals that ask for more than a wrong answer: a sample on which they fail may be misclassified all the same."""


@runtime_checkable
class Worded(Protocol):
    """A rule whose figures have names of their own; others have the defaults of `Wording`."""

    @property
    @abstractmethod
    def wording(self) -> Wording: ...


@runtime_checkable
class Examines(Protocol):
    """A goal, threat model, victim or task's examiner that says more of an attack than whether it succeeded."""

    @abstractmethod
    def examine(self, evidence: Evidence) -> Mapping[str, Sequence[Figure]]:
        """Named sequences of a number, a truth value, a text, numbers or None per row.

        Texts stand in the records as `texts`, rows of numbers as `scores`, the others as `figures`, which are averaged
        over all rows, those included on which the attack failed; truth values become rates.
        """


@runtime_checkable
class Examined(Protocol):
    """A task whose rows are looked at after an attack."""

    @property
    @abstractmethod
    def examiner(self) -> Examines:
        """What looks at them. It holds no rows: worker processes get it, and not the task."""


@runtime_checkable
class Refuses(Protocol):
    """A rule whose goals do not suit every model."""

    @abstractmethod
    def misfit(self, model: Any) -> str | None:
        """Why a model can't be attacked with this goal, or None."""


@runtime_checkable
class ThroughView(Protocol):
    """A rule whose goals read more than classes of an answer, and which says of which view of the victim."""

    @abstractmethod
    def view(self, model: Any) -> Any:
        """The model whose answers the goals read; its classes are the model's. BadModel where there is none."""


@runtime_checkable
class FromFile(Protocol):
    """A rule that takes what is wanted from a file: its spec does not tell two contents apart."""

    @property
    @abstractmethod
    def content_sha256(self) -> str:
        """Of what was taken, 16 hexadecimal digits."""


@runtime_checkable
class MetByTruth(Protocol):
    """A goal that says itself which rows meet it by being right; of others a right answer is asked whether it does."""

    @abstractmethod
    def met_by_truth(self) -> Tensor:
        """Bool [B]."""


@runtime_checkable
class Judged(Protocol):
    """A rule whose replies are read by judges, which err."""

    @property
    @abstractmethod
    def search(self) -> str:
        """What the attack optimises, as opposed to what the judges say; one phrase of the report."""

    @abstractmethod
    def cards(self) -> list[dict[str, Any]]:
        """A calibration card per judge, plain JSON values; empty where no judge was named."""

    @property
    @abstractmethod
    def broken_by(self) -> Sequence[str]:
        """Names of the figures (truth values) by which a judge each says that the row is broken, `NAME_asr_greedy`.

        Rows that the model does not refuse when they are clean have none; the figure `clean_refusal` says which do.
        """


@runtime_checkable
class CountsOver(Protocol):
    """A rule whose rates are counted over something else than all samples."""

    @property
    @abstractmethod
    def denominator(self) -> str:
        """The report's word for it, such as "prompts"."""


@runtime_checkable
class CountsPart(Protocol):
    """A rule of which some figures are counted over a part of the rows alone; they are None elsewhere."""

    @abstractmethod
    def counts_over(self, figure: str) -> str:
        """The report's word for what a figure is counted over."""


@runtime_checkable
class NeedsAccess(Protocol):
    """A view of a model (`Oracle.seen_as`) that says which access it takes; others take all."""

    @property
    @abstractmethod
    def needs(self) -> Access: ...


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

    def gradients(self, x: X, goals: Sequence[Goal[Y]]) -> tuple[Tensor, X, Y]:
        """Losses [K, B] of several goals, their gradients [K, B, ...], answer: one forward and K backwards."""
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
    """Capability, knowledge (access), budget and timing (scenario) of the attacker."""

    @property
    def scenario(self) -> str:
        """Registry name of the scenario that evaluates it."""
        ...

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
        """What the attacker can really submit (8-bit files, re-encoded text); the identity where anything goes."""
        ...

    def describe(self) -> dict[str, Any]:
        """The report's threat_model block without the goal: name, norm, eps, knowledge... as plain JSON values."""
        ...


@runtime_checkable
class Measures(Protocol):
    """A threat model that measures more of a change than its distance."""

    @abstractmethod
    def measures(self, x: Any, origin: Any) -> dict[str, Tensor]:
        """Float [B] by name. They stand in every record; reports average them over the rows that were broken."""


@runtime_checkable
class Levels(Protocol):
    """A threat model of which one run serves many budgets, each a threshold of a measure."""

    @abstractmethod
    def levels(self) -> Mapping[str, Sequence[float]]:
        """Thresholds by measure: reports give the fraction of the attacked rows broken within each."""


@runtime_checkable
class LeastChange(Protocol):
    """A threat model that may bound nothing: a model is then as robust as the least changes that break it are large."""

    @property
    @abstractmethod
    def least(self) -> str:
        """The measure that is to be small; empty where the attacker has a budget."""

    @property
    @abstractmethod
    def unit(self) -> str:
        """Of that measure, as it stands behind a number."""


@runtime_checkable
class Lattice(Protocol):
    """A threat model whose rows are submitted as files of few levels."""

    @property
    @abstractmethod
    def lattice(self) -> int:
        """Steps across the box, such as 255; 0 leaves values as they are."""


@runtime_checkable
class Radius(Protocol):
    """A threat model with a radius. Some balls have none and say so when they are asked for a step of its length."""

    @property
    @abstractmethod
    def eps(self) -> float:
        """In units of the norm and of the model's space."""


@runtime_checkable
class Counted(Protocol):
    """A threat model whose budget is a number of changes."""

    @property
    @abstractmethod
    def n(self) -> int | None:
        """The most; None admits any number."""


@runtime_checkable
class InSpace(Protocol):
    """A threat model that speaks of one kind of space, and holds the one that it is bound to."""

    @property
    @abstractmethod
    def space(self) -> Any: ...


@runtime_checkable
class Slotted(Protocol):
    """A threat model of token ids, in which the attacker has a slot in every row."""

    @abstractmethod
    def slotted(self, row: Tensor, ids: Tensor) -> Tensor:
        """The row [2, W] with each of the candidates [N, l] in its slot, [N, 2, W]."""


@runtime_checkable
class Descends(Protocol):
    """A ball that knows a shorter way to take a step than `project(z + size * steepest(-gradient, z), origin)`."""

    @abstractmethod
    def descend(self, z: Tensor, gradient: Tensor, origin: Tensor, size: float | Tensor) -> Tensor:
        """z after a step against the gradient, `size` eps long, back in the ball; `size` broadcasts against z."""


@runtime_checkable
class Renders(Protocol):
    """A threat model whose attacker sets parameters, of which it renders the input itself: a rotation, a flow field.

    Attacks then see parameters in place of inputs: the clean row is `identity`, the oracle answers to what the
    parameters render, and distances, projections and what is admitted are of parameters. The harness renders what it
    judges. So whether an image can be reached within the limits is not a question: nobody hands one in.
    """

    @abstractmethod
    def identity(self, origin: Tensor) -> Tensor:
        """The parameters [B, ...] that give back these inputs, to the bit."""

    @abstractmethod
    def render(self, z: Tensor, origin: Tensor) -> Tensor:
        """The inputs [B, ...] that parameters make of clean ones, differentiable; a function of the two, row by row."""


@runtime_checkable
class OneChange(Protocol):
    """A threat model that may want one and the same change for all rows of the evaluation.

    Ask `one_change(threat)`. All rows then are one batch, those that are misclassified when clean are attacked too, and
    `admits` compares the rows that were changed.
    """

    @property
    @abstractmethod
    def one_change(self) -> bool: ...


def one_change(threat: object) -> bool:
    """Whether all rows of the evaluation have to be changed alike."""
    return isinstance(threat, OneChange) and threat.one_change is True


@runtime_checkable
class WrapsBall(Protocol):
    """A threat model whose rows are bounded by another one."""

    @property
    @abstractmethod
    def ball(self) -> Any:
        """The threat model inside."""


@runtime_checkable
class Surrogates(Protocol):
    """A threat model whose attacker may own models: the oracle speaks for them in place of the victim."""

    @property
    @abstractmethod
    def sources(self) -> Sequence[Any]:
        """What was asked for: model specs, models, or `public` for all public surrogates of the task."""

    @property
    @abstractmethod
    def surrogates(self) -> Sequence[Any]:
        """Specs or models; empty where the attacker queries the victim itself."""

    @abstractmethod
    def with_sources(self, sources: Iterable[Any], seen: Iterable[str] = ()) -> Self:
        """The same threat model with these sources, `public` replaced.

        seen: those of them that the defense was trained on; a threat model that names its own keeps them
        """


@runtime_checkable
class BringsAttacks(Protocol):
    """A threat model that names its attacks itself: every one of them on every surrogate."""

    @property
    @abstractmethod
    def seen(self) -> Sequence[str]:
        """Names of the surrogates that the defense was trained on."""

    @property
    @abstractmethod
    def attack_names(self) -> Sequence[str]:
        """Names of the attacks, as records have them."""

    @abstractmethod
    def algorithms(self, build: Callable[[Any], Any] | None = None) -> Sequence[tuple[str, Any]]:
        """(name, attack) pairs; `build` makes an attack of a spec, for attacks lie above threat models."""

    @abstractmethod
    def cell(self, source: Any = None) -> Any:
        """The threat model of one surrogate; of all together where none is named."""


@runtime_checkable
class Submissions(Protocol):
    """A threat model of streams: of all items only some may be submitted."""

    @property
    @abstractmethod
    def k(self) -> int | None:
        """Submissions granted; None leaves it to the attack."""

    @property
    @abstractmethod
    def permutations(self) -> int:
        """Random orders of the stream that figures are averaged over."""

    @abstractmethod
    def agreed(self, k: int | None) -> Self:
        """The same with the attack's budget; UsageError where both name one and they differ."""


@runtime_checkable
class Ball(ThreatModel[X], Protocol[X]):
    """A threat model with a radius, in which an attack can take steps."""

    def project(self, x: X, origin: X) -> X:
        """The nearest admitted point, exactly."""
        ...

    def sample(self, origin: X, rng: Rng) -> X:
        """A random admitted start."""
        ...

    def steepest(self, gradient: X, at: X) -> X:
        """The eps-long direction of steepest ascent that the space leaves open at `at`."""
        ...


@runtime_checkable
class Attack(Protocol):
    """Shapes rows: inputs (evasion) or training data (poisoning). Its need of access is declared."""

    @property
    def needs(self) -> Access:
        """The least access that will do."""
        ...

    def __call__(self, oracle: Any, x: Any, goal: Any, threat: Any, rng: Rng, /) -> Any:
        """The rows that the attacker would submit, in the order and shape of x.

        oracle: an Oracle; all that the attack sees of a model
        goal:   a Goal, of these rows
        threat: a ThreatModel, bound to the model's space
        """
        ...


Perturb = Attack
"""The same under its earlier name."""


class Stage(Protocol):
    """One attack of a suite and the rows it takes of those still robust; see `attacks.suites.Stage`."""

    @property
    def name(self) -> str:
        """Of its records and its random streams; unique in the suite."""
        ...

    @property
    def attack(self) -> Any: ...

    @property
    def share(self) -> float:
        """Fraction of the robust rows that it takes, in (0, 1]."""
        ...

    @property
    def by(self) -> str:
        """Which ones: "nearest" to the boundary, or a "sample"."""
        ...

    @property
    def above(self) -> float:
        """Left out unless more than this fraction of the suite's rows are still robust."""
        ...

    @property
    def sentinel(self) -> bool:
        """Whether it watches for masked gradients."""
        ...

    @property
    def when(self) -> str:
        """ "always", or only after a sentinel's alarm ("escalated")."""
        ...

    def takes(self, robust: int, /) -> int:
        """How many of so many robust rows it takes; all where the share is 1."""
        ...

    def alarmed(self, felled: Sequence[float], rows: int, /) -> bool:
        """Whether the rows that this sentinel broke say that gradients are masked.

        felled: the closeness to the boundary at which they stood before
        rows:   for how many they speak
        """
        ...


@runtime_checkable
class Suite(Protocol):
    """Several attacks, one after the other on the rows that are still robust."""

    @property
    @abstractmethod
    def stand_in(self) -> Any:
        """One attack for its place where no verdicts tell which rows are robust (transfer)."""

    @abstractmethod
    def stages(self) -> Sequence[Stage]:
        """The stages in order; those of an escalation last."""


@runtime_checkable
class Revised(Protocol):
    """An attack whose results may change from one revision to the next while its spec stays, such as a suite."""

    @property
    @abstractmethod
    def revision(self) -> int: ...


@runtime_checkable
class SeeksNearest(Protocol):
    """An attack that looks for the nearest point that reaches the goal, and for nothing worse (minimum norm)."""

    @property
    @abstractmethod
    def seeks_nearest(self) -> bool: ...


@runtime_checkable
class WholeBatch(Protocol):
    """An attack that wants all rows of the evaluation at once: what it makes of one depends on the others.

    Ask `whole_batch(attack)`: an attack may have the member and say False, or have a number of that name.
    """

    @property
    @abstractmethod
    def together(self) -> bool: ...


def whole_batch(attack: object) -> bool:
    """Whether the attack gets all rows of the evaluation in one batch, such as one suffix for many prompts."""
    return isinstance(attack, WholeBatch) and attack.together is True


@runtime_checkable
class WantsData(Protocol):
    """An attack that may work with labelled data of the attacker's own, at `oracle.data`."""

    @property
    @abstractmethod
    def wants_data(self) -> bool: ...


@runtime_checkable
class Planned(Protocol):
    """An attack that knows its own cost."""

    @property
    @abstractmethod
    def planned(self) -> float:
        """About how many times it sends a row through the model."""


@runtime_checkable
class Stepped(Protocol):
    """An attack of steps of a number that is set."""

    @property
    @abstractmethod
    def steps(self) -> int: ...


@runtime_checkable
class AddsTokens(Protocol):
    """An attack that adds tokens to a prompt."""

    @property
    @abstractmethod
    def longest(self) -> int:
        """The most that its settings ask for; a threat model may admit fewer."""


@runtime_checkable
class MadeOf(Protocol):
    """An attack under a name of its own that another spec says in full."""

    @property
    @abstractmethod
    def made_of(self) -> str:
        """That spec; empty where the name says it all."""


@runtime_checkable
class Serves(Protocol):
    """An attack for some goals only; others work towards every goal."""

    @property
    @abstractmethod
    def serves(self) -> Sequence[str]:
        """Names of goals."""


@runtime_checkable
class AsksQueries(Protocol):
    """An attack whose single step takes several answers: a smaller budget is refused before the run."""

    @property
    @abstractmethod
    def least_queries(self) -> int:
        """Answers that it takes to make a step and to see where that led, >= 1."""


@runtime_checkable
class SearchesPart(Protocol):
    """An attack that searches a part of the threat model's points only: what lies elsewhere it cannot find."""

    @property
    @abstractmethod
    def part(self) -> str:
        """Which, in words: "values that the clean sample has elsewhere"."""


@runtime_checkable
class SeeksMinimum(Protocol):
    """An attack that says whether it looks for the least distance where nothing bounds it; others do."""

    @property
    @abstractmethod
    def minimal(self) -> bool: ...


@runtime_checkable
class MadeForGoal(Protocol):
    """An attack made for one goal: what a command that does not name one gets."""

    @property
    @abstractmethod
    def default_goal(self) -> str:
        """A spec; empty where there is none."""


@runtime_checkable
class MadeForThreatModel(Protocol):
    """An attack made for one threat model: what a command that does not name one gets."""

    @property
    @abstractmethod
    def default_threat_model(self) -> str:
        """A spec; empty where there is none."""


@runtime_checkable
class MadeForTask(Protocol):
    """An attack made for one kind of samples, such as prompts: the task of a request that names none."""

    @property
    @abstractmethod
    def default_task(self) -> str:
        """A spec; empty where there is none."""


@runtime_checkable
class Adapts(Protocol):
    """An attack that was made for some defenses: under these a report calls the attacker adaptive."""

    @property
    @abstractmethod
    def adapts_to(self) -> Sequence[str]:
        """Names of defenses."""


@runtime_checkable
class FlipsLabels(Protocol):
    """An attack on training labels: its rows are labels, and what it asks its oracle for are trainings."""

    @property
    @abstractmethod
    def surrogate(self) -> str:
        """What it trains where it does not know the defense, as a defense's spec; empty where it trains nothing."""

    @abstractmethod
    def flip(self, oracle: Any, y: Any, budget: int, rng: Any) -> Any:
        """The labels y, long numbers [n], with at most `budget` of them changed."""


class Selector(Protocol):
    """Decides on the items of one stream, one by one."""

    def select(self, value: float, t: int) -> bool:
        """Whether to submit item t (0-based), knowing the values up to here. Queried once per item; irrevocable."""
        ...


@runtime_checkable
class OnlineAttack(Attack, Protocol):
    """An attack on streams: shapes every item as any attack does, and decides which of them to submit.

    Ask `on_streams(attack)`: other attacks have a setting of that name.
    """

    @abstractmethod
    def start(self, length: int, budget: int, rng: Rng | None = None) -> Selector:
        """A selector for one stream of `length` items and `budget` submissions; rng (one row) for those that draw."""


def on_streams(attack: object) -> TypeIs[OnlineAttack]:
    """Whether the attack can start a selector."""
    return isinstance(attack, OnlineAttack) and callable(attack.start)


@runtime_checkable
class PlansSubmissions(Protocol):
    """An online attack that says itself how many items it will submit."""

    @property
    @abstractmethod
    def k(self) -> int | None:
        """Submissions that it plans; None takes the threat model's."""


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
    """A training set: x [N, ...] in `space`, y long [N].

    answer_shape: of one right answer where that is the sample itself; y and classes mean nothing then
    rule:         what an attacker who holds the data wants of samples like these (a Rule); None for data to train on
    """

    x: Tensor
    y: Tensor
    space: Any
    classes: int
    name: str = ""
    answer_shape: tuple[int, ...] = ()
    rule: Any = None

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
    """Hands out rows; has a name, a version and a hash of its ids and bytes."""

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


@runtime_checkable
class Hashed(Protocol):
    """Data known by a hash of its rows."""

    @abstractmethod
    def digest(self) -> str:
        """sha256 of rows, labels and ids."""


@runtime_checkable
class KnowsIds(Protocol):
    """A task that knows the ids of its rows without loading them."""

    @property
    @abstractmethod
    def ids(self) -> Sequence[str]:
        """One per row, in order."""


@runtime_checkable
class Pooled(Protocol):
    """A task whose training and test samples are one pool, which may be split anew."""

    @abstractmethod
    def pool(self) -> Any:
        """All samples, with `x`, `y` and `ids` (`tasks.base.Rows`)."""


@runtime_checkable
class OfFiles(Protocol):
    """A task with a file for every row, which may be damaged, repaired or replaced."""

    @abstractmethod
    def look(self, n: int) -> None:
        """Decode the files of the first n rows once; raises BadInput that names one that is damaged."""

    @abstractmethod
    def marks(self, n: int) -> Mapping[str, str]:
        """A short hash of each of the first n rows' files and labels, by id, in order."""


def ids_of(task: Task, n: int) -> list[str]:
    """The ids of a task's first n rows, in order."""
    if isinstance(task, KnowsIds):
        return list(task.ids[:n])
    return [row for batch in task.batches(1024, n=n) for row in batch.ids]


@runtime_checkable
class OfKind(Protocol):
    """A task of something else than classification."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """The report's word: classification (that of tasks without the member), text_generation..."""


@runtime_checkable
class Captioned(Protocol):
    """A task whose classes have captions."""

    @property
    @abstractmethod
    def captions(self) -> tuple[tuple[str, ...], ...]:
        """For every class, in the order of the labels, its captions; as many for each."""


@runtime_checkable
class Bindable(Protocol):
    """A task whose rows depend on the model (token ids).

    Its rows are requested only of the bound task; until then its own `space` is None.
    """

    @abstractmethod
    def bind(self, space: Any) -> Self:
        """The same task in a model's space."""


class Defense(Protocol):
    """Training, filtering, smoothing, rejecting: model -> model."""

    @property
    def needs_data(self) -> bool: ...

    @property
    def claims(self) -> str:
        """Spec of the threat model it was designed against, evaluated beside the one asked for; "" for none."""
        ...

    def protect(self, model: Any, data: Data | None, rng: Rng, /) -> Any:
        """The protected model; the one handed over is left as it is."""
        ...


@runtime_checkable
class Trains(Protocol):
    """A defense that is a way to train: its models are found in the zoo or the cache, or trained."""

    recipe: Any  # epochs, optimizer, schedule (`training.loop.Recipe`); a field with a default factory is no property

    @abstractmethod
    def objective(self) -> Any:
        """The loss to train with (`training.loop.Objective`), made afresh."""


@runtime_checkable
class Solves(Protocol):
    """A defense whose weights come of one solve: a network of its own, no recipe of steps, no weights to start from."""

    @abstractmethod
    def solve(self, data: Data, rng: Rng) -> tuple[Any, dict[str, Any]]:
        """The model, in evaluation mode, and what there is to say of the solve, as JSON values.

        `summary` among them is one phrase. The model's architecture is one that its name builds (`models`), so that it
        can be stored.
        """

    @abstractmethod
    def deploy(self, model: Any) -> Any:
        """The model, as solved or as it was stored, as it answers."""


@runtime_checkable
class Deploys(Protocol):
    """A defense whose models answer in another way than they were trained: a smoothed classifier."""

    @property
    @abstractmethod
    def trained_as(self) -> Any:
        """The same defense with nothing set that does not matter to training: zoo and cache know models by it."""

    @abstractmethod
    def deploy(self, model: Any) -> Any:
        """The trained model as it answers."""


@runtime_checkable
class TrainsFront(Protocol):
    """A defense that trains what stands in front of a finished model, and not that model."""

    @property
    @abstractmethod
    def weights(self) -> str:
        """File of a front that is trained already; empty where there is none."""

    @abstractmethod
    def around(self, model: Any, data: Data, rng: Rng) -> Any:
        """What is trained: the model behind a front whose weights are drawn from rng, pre-trained where it is so."""


@runtime_checkable
class Learns(Protocol):
    """A defense that is a way to learn from labels which may be wrong, and brings the model itself."""

    @abstractmethod
    def learner(self, seed: int) -> Any:
        """A classifier with scikit-learn's interface, not fitted; the same seed gives the same model."""


@runtime_checkable
class TrainsApart(Protocol):
    """A defense that trains networks of its own, on data of its own, before it stands in front of any model."""

    @abstractmethod
    def trainer(self) -> Any:
        """What is trained and how: a `recipe`, an `objective()`, the networks and their data (`begun(seed)`),
        `keep(model, path, extra)`, which writes a file and returns its sha256, and the spec of the defense that uses
        one (`use(path)`).
        """


@runtime_checkable
class Compared(Protocol):
    """A defense beside which a simpler one is evaluated, to tell what it adds."""

    @property
    @abstractmethod
    def baseline(self) -> str:
        """Spec of the simpler defense; empty for none."""
