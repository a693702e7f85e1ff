"""What attacks that search for suffixes have in common: their settings, and what they find.

A candidate is a row of token ids [l]; the threat model says where in the transcript they go. Every row has a search
of its own, with its own random streams, and many go on side by side; a universal suffix is searched for all rows at
once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from typing_extensions import override

from advkit.attacks.base import TensorGoal, TensorOracle
from advkit.attacks.text.questions import Batcher, Steps, side_by_side
from advkit.attacks.text.search import Aggregate, Objective, SuffixSearch
from advkit.core.checks import at_least_one, one_of, positive
from advkit.core.errors import UsageError
from advkit.core.protocols import (
    Access,
    Adapts,
    AddsTokens,
    MadeForGoal,
    MadeForTask,
    MadeForThreatModel,
    Planned,
    Rng,
    WholeBatch,
)

Keep = Literal["lowest", "reached"]


@dataclass(frozen=True)
class Found:
    """What a search knows of its rows; the harness asks the victim again and believes none of it.

    x:           the transcripts with their suffixes [B, 2, W]; the clean row where nothing beat it
    ids:         the suffixes, long [l] each
    score:       their scores, float64 [B]; lower is better for the attacker, +inf where nothing was scored
    before:      score of the clean row, float64 [B]
    reached:     whether the goal seemed to hold there, bool [B]
    evaluations: candidates scored or dropped, the clean row among them, long [B]
    tokens:      tokens these and the reads of next-token probabilities take with the prompt's prefix cached, long [B]
    seconds:     its own and its share of the calls that it had a part in, float64 [B]
    beams:       the last candidates kept and their scores, per row
    traces:      one entry per step and row
    """

    x: Tensor
    ids: tuple[Tensor, ...]
    score: Tensor
    before: Tensor
    reached: Tensor
    evaluations: Tensor
    tokens: Tensor
    seconds: Tensor
    beams: tuple[tuple[Tensor, Tensor], ...]
    traces: tuple[tuple[dict[str, Any], ...], ...]


@dataclass(frozen=True, kw_only=True)
class SuffixAttack(WholeBatch, MadeForGoal, MadeForThreatModel, MadeForTask, Planned, Adapts, AddsTokens, ABC):
    """A search for tokens to put into the slot of a prompt.

    length:       most tokens of a suffix; the threat model's n caps it
    universal:    one suffix for all the rows, by the sum of their scores
    aggregate:    several surrogates count by the mean of their losses (nll) or by the sum of their perplexities (ppl)
    keep:         lowest returns the best score; reached prefers candidates whose greedy reply is the one wanted
    stop_on_success: end as soon as the best candidate reaches the goal
    max_perplexity:  candidates that make the user's turn less likely than this are dropped; none takes the victim's own
                  threshold where it filters by perplexity, inf looks away from it
    require_retokenizable: drop candidates that another tokenisation of the text would replace, unless all are such
    evaluations:  most candidates per row, the clean one and dropped ones included; none for no limit
    tokens:       most tokens per row, counted with the prompt's prefix cached
    seconds:      most seconds per row; the only budget whose results differ from machine to machine

    Whichever budget ends first ends the search, before a step that the last one's duration says would not fit, and with
    as many candidates of a step as are left; the threat model's queries count as well. The clean row is scored
    first and returned where nothing beats it.
    Raises UsageError for settings out of range and for threat models without a slot.
    """

    needs: ClassVar[Access] = Access.SCORES
    default_threat_model: ClassVar[str] = "suffix"
    default_goal: ClassVar[str] = "says"
    default_task: ClassVar[str] = "prompts"

    length: int = 20
    universal: bool = False
    aggregate: Aggregate = "nll"
    keep: Keep = "lowest"
    stop_on_success: bool = False
    max_perplexity: float | None = None
    require_retokenizable: bool = False
    evaluations: int | None = None
    tokens: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        at_least_one(self, "length")
        one_of(self, "aggregate", ("nll", "ppl"))
        one_of(self, "keep", ("lowest", "reached"))
        positive(self, "evaluations", "tokens", "seconds", "max_perplexity")

    @property
    @override
    def adapts_to(self) -> tuple[str, ...]:
        """The filter by perplexity, whose threshold the candidates keep to."""
        return () if self.max_perplexity is not None and math.isinf(self.max_perplexity) else ("ppl_filter",)

    @property
    def together(self) -> bool:
        """Whether all rows have to come in one batch."""
        return self.universal

    def __call__(self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, threat: Any, rng: Rng, /) -> Tensor:
        return self.find(oracle, x, goal, threat, rng).x

    def find(self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, threat: Any, rng: Rng) -> Found:
        """The attack, and what it knows of the rows."""
        slots_only(threat, type(self).__name__.lower())
        index = torch.arange(len(x), device=x.device)
        parts = (index,) if self.universal and len(x) else torch.split(index, 1)
        searches = [
            SuffixSearch(self, oracle.take(rows), x[rows], goal.take(rows), threat, rng.take(rows), rows)
            for rows in parts
        ]
        side_by_side(searches, Batcher(oracle, goal))
        return merged(searches, x)

    @property
    @abstractmethod
    def planned(self) -> int:
        """Candidates that a row is scored with at most, about."""

    @property
    @override
    def longest(self) -> int:
        """Most tokens of a suffix that the settings ask for."""
        return self.length

    @property
    def most_steps(self) -> int:
        """Steps at most; 0 where only a budget ends the search."""
        return 0

    @property
    def aim(self) -> Objective:
        """What candidates are scored by."""
        return "targeted"

    @property
    def under(self) -> Callable[[Any], Callable[[Tensor], Tensor]] | None:
        """What of a model answers for the goal, where it is not the model itself."""
        return None

    @abstractmethod
    def seek(self, search: SuffixSearch) -> Steps[None]:
        """Offer candidates to the search until it ends; what it asks is yielded."""


@runtime_checkable
class HasSlot(Protocol):
    """A threat model with a slot in the prompt for the attacker's tokens."""

    def slotted(self, row: Tensor, ids: Tensor) -> Tensor:
        """A transcript [2, W] with each of the candidates [N, l] in place, [N, 2, W]."""
        ...


def slots_only(threat: Any, name: str) -> None:
    """UsageError for threat models without a slot for tokens."""
    if not isinstance(threat, HasSlot):
        raise UsageError(
            f"{name} puts tokens into a slot of a prompt, and threat model {type(threat).__name__.lower()} has none; "
            "use suffix:n=20 on a language model (task prompts). Balls such as linf, l2, l1 and l0, minimum-l2 and "
            "flips are for other inputs"
        )


def merged(searches: Sequence[SuffixSearch], x: Tensor) -> Found:
    """The results of the searches, row by row in the order of x."""
    rows = [(search, i) for search in searches for i in range(len(search.x))]

    def numbers(value: Callable[[SuffixSearch], float], dtype: torch.dtype) -> Tensor:
        return torch.tensor([value(search) for search, _ in rows], dtype=dtype)

    return Found(
        x=torch.stack([search.result[i] for search, i in rows]) if rows else x.clone(),
        ids=tuple(search.best.ids for search, _ in rows),
        score=numbers(lambda search: search.best.score, torch.float64),
        before=numbers(lambda search: search.before, torch.float64),
        reached=torch.tensor([search.best.reached[i] for search, i in rows], dtype=torch.bool),
        evaluations=numbers(lambda search: search.evaluations, torch.long),
        tokens=numbers(lambda search: search.tokens, torch.long),
        seconds=numbers(lambda search: search.clock.spent, torch.float64),
        beams=tuple(search.beam for search, _ in rows),
        traces=tuple(tuple(search.trace) for search, _ in rows),
    )
