"""The questions that searches put to language models, and how those of many searches go through a model together.

A search is a generator: it yields a question and is sent the answer. Searches that go on side by side therefore know
nothing of each other, and whoever drives them puts what they ask alike into one call.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from advkit.attacks.base import TensorGoal, TensorOracle
from advkit.core.lanes import Lanes
from advkit.core.protocols import Access, Composite, CountsTokens

T = TypeVar("T")
Ask = Callable[[Any, Any], Callable[[Tensor], Tensor]]

SLOTS = 16
"""Searches that go on side by side; where one ends the next takes its place."""
NUMBERS = 2**24
"""Numbers in the answers to one call, about: bounds memory where every answer is a distribution over a vocabulary."""
WHOLE = Lanes(chunk=2**30, multiple=1)
"""Language models choose the shapes of their calls themselves."""


@dataclass(frozen=True, eq=False)
class Question:
    """What a search asks next.

    name:     questions of one name are asked in the same way, whoever asks
    x:        what is asked about, [m, ...]
    of:       which of the search's rows each of them belongs to, long [m]
    ask:      makes what is called, of a model and of `given`; none asks the oracle's own model
    given:    what goes along with each of them, [m, ...]
    join:     what is made of several models' answers side by side [m, models, ...]
    needs:    next-token probabilities and likelihoods are scores; what is differentiated is more
    gradient: the loss's gradient with respect to x is asked for, not the answer
    width:    numbers in one answer, about
    """

    name: str
    x: Tensor
    of: Tensor
    ask: Ask | None = None
    given: Tensor | None = None
    join: Callable[[Tensor], Tensor] | None = None
    needs: Access = Access.SCORES
    gradient: bool = False
    width: int = 1

    @property
    def kind(self) -> tuple[object, ...]:
        """Questions of one kind can be put together."""
        return self.name, self.x.shape[1:], None if self.given is None else self.given.shape[1:]


Steps = Generator[Question, Tensor, T]
"""A part of a search that asks on the way and returns T."""


@dataclass
class Clock:
    """Seconds that one search takes: its own, and its share of the calls that it has a part in."""

    spent: float = 0.0
    _since: float | None = None

    @property
    def now(self) -> float:
        """Seconds so far."""
        return self.spent + (0.0 if self._since is None else time.monotonic() - self._since)

    @contextmanager
    def running(self) -> Generator[None, None, None]:
        """Time inside the block counts."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self.spent, self._since = self.now, None


class Search(Protocol):
    """A search that is driven. rows: which of the oracle's rows are its own, long [n]."""

    rows: Tensor
    clock: Clock

    def steps(self) -> Steps[None]:
        """The search, from its first question to its end."""
        ...


@dataclass
class _Given:
    """What goes along with the rows that are being asked about."""

    value: Tensor | None = None


@dataclass
class Batcher:
    """Puts the questions of many searches to a model together: the oracle of all rows, and their goal."""

    oracle: TensorOracle
    goal: TensorGoal
    _views: dict[str, tuple[Any, _Given]] = field(default_factory=dict)

    def answers(self, asked: Sequence[tuple[Tensor, Question]]) -> list[Tensor]:
        """The answer to each question; they are of one kind and come with the rows of who asks."""
        question = asked[0][1]
        x = torch.cat([each.x for _, each in asked])
        of = torch.cat([rows.to(each.of.device)[each.of] for rows, each in asked])
        oracle, given = self._view(question)
        given.value = None if question.given is None else torch.cat([each.given for _, each in asked])  # type: ignore[misc]
        answers = oracle.gradient(x, self.goal.take(of), of)[1] if question.gradient else oracle(x, of)
        return list(torch.split(answers, [len(each.x) for _, each in asked]))

    def _view(self, question: Question) -> tuple[Any, _Given]:
        """The oracle that puts questions of this name to every model at hand; made once."""
        if question.ask is None:
            return self.oracle, _Given()
        if question.name not in self._views:
            ask, given = question.ask, _Given()
            asking = Asking(lambda model: ask(model, given), question.join, question.needs)
            self._views[question.name] = self.oracle.seen_as(asking), given
        return self._views[question.name]


@dataclass(frozen=True, eq=False)
class _Pending:
    """A search under way, and what it asks now."""

    search: Search
    steps: Steps[None]
    question: Question

    @property
    def numbers(self) -> int:
        """Numbers in the answer, about."""
        return len(self.question.x) * self.question.width


def _on(search: Search, steps: Steps[None], answer: Tensor | None = None) -> _Pending | None:
    """A search up to its next question; None where it has ended."""
    with search.clock.running():
        try:
            return _Pending(search, steps, next(steps) if answer is None else steps.send(answer))
        except StopIteration:
            return None


def side_by_side(searches: Iterable[Search], batcher: Batcher, slots: int | None = None) -> None:
    """Drive searches to their ends, `slots` at a time, the next one in line in the place of each that ends.

    Each round answers what most of them ask, so that one which begins among others waits until they are where it is.
    What a search finds does not depend on its company, but for the last bits of a model that computes rows together.
    """
    line = iter(searches)
    slots = SLOTS if slots is None else slots
    going: list[_Pending] = []
    while True:
        while len(going) < slots and (search := next(line, None)) is not None:
            going += filter(None, [_on(search, search.steps())])
        if not going:
            return
        moved: dict[int, _Pending | None] = {}
        for part in _parts(_most(going)):
            call = Clock()
            with call.running():
                answers = batcher.answers([(each.search.rows, each.question) for each in part])
            total = sum(len(answer) for answer in answers)
            for each, answer in zip(part, answers, strict=True):
                each.search.clock.spent += call.spent * len(answer) / max(1, total)
                moved[id(each)] = _on(each.search, each.steps, answer)
        going = [now for each in going if (now := moved.get(id(each), each)) is not None]


def _most(going: Sequence[_Pending]) -> list[_Pending]:
    """Those that ask what most of them ask; where as many ask something else, what the first in line asks."""
    kinds: dict[object, list[_Pending]] = {}
    for each in going:
        kinds.setdefault(each.question.kind, []).append(each)
    return max(kinds.values(), key=len)


def _parts(going: Sequence[_Pending]) -> list[list[_Pending]]:
    """In order, cut where the answers to one call would be too many numbers."""
    parts: list[list[_Pending]] = []
    numbers = 0
    for each in going:
        numbers += each.numbers
        if not parts or numbers > NUMBERS:
            parts.append([])
            numbers = each.numbers
        parts[-1].append(each)
    return parts


def resolved(steps: Steps[T], rows: Tensor, batcher: Batcher) -> T:
    """What a part of a search returns, its questions answered one by one."""
    answer: Tensor | None = None
    while True:
        try:
            question = next(steps) if answer is None else steps.send(answer)
        except StopIteration as end:
            value: T = end.value
            return value
        (answer,) = batcher.answers([(rows, question)])


@dataclass(frozen=True)
class Asking:
    """A question to all the models that an oracle speaks for; calling it on the oracle's model makes the view.

    ask:   makes, of one model, what is called
    join:  what is made of the answers side by side [n, models, ...], where something else is to be answered
    needs: the access that the question takes
    """

    ask: Callable[[Any], Callable[[Tensor], Tensor]]
    join: Callable[[Tensor], Tensor] | None = None
    needs: Access = Access.SCORES

    def __call__(self, model: Any) -> Asked:
        inside = members(model)
        return Asked(inside, tuple(self.ask(each) for each in inside), self.join, Lanes.own(model) or WHOLE)


@dataclass(frozen=True)
class Asked:
    """What an oracle calls: the answers of several models as one."""

    models: tuple[Any, ...]
    parts: tuple[Callable[[Tensor], Tensor], ...]
    join: Callable[[Tensor], Tensor] | None
    lanes: Lanes

    @property
    def tokens(self) -> int:
        """Tokens that these models have sent through their networks so far."""
        return sum(model.tokens for model in self.models if isinstance(model, CountsTokens))

    def modules(self) -> tuple[torch.nn.Module, ...]:
        """Those of all the models."""
        return tuple(module for model in self.models for module in model.modules())

    def __call__(self, x: Tensor) -> Tensor:
        answers = torch.stack([part(x) for part in self.parts], 1)
        return answers if self.join is None else self.join(answers)


def members(model: Any) -> tuple[Any, ...]:
    """The models inside an ensemble; the model alone where it is none."""
    return tuple(model.models) if isinstance(model, Composite) else (model,)


def hallucinating(model: Any, given: Any) -> Callable[[Tensor], Tensor]:
    """x -> minus the perplexity of what a model itself replies, [n, 1]: lower is a reply that surprises it more.

    given.value: what the replies are drawn with, [n, trials, tokens] in [0, 1)
    """

    def ask(x: Tensor) -> Tensor:
        uniforms: Tensor = given.value
        total = torch.zeros(len(x), 1, dtype=torch.float64, device=x.device)
        for trial in range(uniforms.shape[1]):
            replies = model.sampling(uniforms[:, trial])(x)
            total -= model.answering(replies)(x).double().exp()
        return total / uniforms.shape[1]

    return ask
