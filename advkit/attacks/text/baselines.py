"""Suffixes drawn at random: what any search for suffixes has to beat at the same number of evaluations."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from advkit.attacks.text.base import SuffixAttack
from advkit.attacks.text.questions import Steps
from advkit.attacks.text.search import SuffixSearch
from advkit.core.checks import at_least_one, fraction, positive
from advkit.core.errors import UsageError

BLOCK = 64  # suffixes that one stream of random numbers serves


@dataclass(frozen=True, kw_only=True)
class _Drawn(SuffixAttack):
    """The best of many suffixes drawn one apart from the other.

    chunk: suffixes scored at a time; changes no result
    """

    evaluations: int | None = 512
    chunk: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "chunk")
        if self.evaluations is None and self.tokens is None and self.seconds is None:
            raise UsageError("nothing ends the drawing; give evaluations, tokens or seconds")

    @property
    def planned(self) -> int:
        """Candidates that a row is scored with; another budget may end sooner."""
        return self.chunk if self.evaluations is None else self.evaluations

    def seek(self, search: SuffixSearch) -> Steps[None]:
        """Draw and score until a budget ends."""
        start = 0
        while search.goes_on():
            most = self._affordable(search)
            if not most:
                return
            drawn = yield from self.drawn(search, most, start)
            if drawn is None:
                return
            scored = yield from search.score(drawn)
            search.offer(scored)
            search.note(scored)
            if search.succeeded:
                return
            start += most

    def _affordable(self, search: SuffixSearch) -> int:
        return search.affordable(self.chunk, search.room)

    @staticmethod
    def uniforms(search: SuffixSearch, count: int, start: int) -> Tensor:
        """Uniform [count, l]; blocks of suffixes have streams of their own, however many are scored at a time."""
        first = start // BLOCK
        blocks = range(first, (start + count - 1) // BLOCK + 1)
        drawn = torch.cat([search.noise((BLOCK, search.room), "suffixes", block) for block in blocks])
        return drawn[start - first * BLOCK :][:count]

    @abstractmethod
    def drawn(self, search: SuffixSearch, count: int, start: int) -> Steps[Tensor | None]:
        """Suffixes number start to start + count, long [count, l]; None where there is no id to draw."""


@dataclass(frozen=True, kw_only=True)
class RandomSuffix(_Drawn):
    """Random suffixes, the baseline: the best of `evaluations` suffixes of tokens drawn uniformly from those allowed.

    length: tokens of every suffix
    """

    def drawn(self, search: SuffixSearch, count: int, start: int) -> Steps[Tensor | None]:
        """Suffixes number start to start + count."""
        yield from ()  # nothing is asked
        ids = search.allowed.nonzero().squeeze(1)
        if not len(ids):
            return None
        return ids[(self.uniforms(search, count, start) * len(ids)).long().clamp(max=len(ids) - 1)]


@dataclass(frozen=True, kw_only=True)
class SampledSuffix(_Drawn):
    """Sampled suffixes, the baseline: the best of `evaluations` suffixes that the model itself writes after the prompt.

    length:      tokens of every suffix
    temperature: of the distribution they are drawn from
    top_p:       the likeliest tokens that together have this share of it are drawn from
    """

    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "temperature")
        fraction(self, "top_p", what="probability")

    def _affordable(self, search: SuffixSearch) -> int:
        """The tokens read while drawing are paid for, too."""
        return search.affordable(self.chunk, search.room, 1, 0, range(1, search.room))

    def drawn(self, search: SuffixSearch, count: int, start: int) -> Steps[Tensor | None]:
        """Suffixes number start to start + count."""
        ids = search.empty().expand(count, 0)
        uniforms = self.uniforms(search, count, start)
        for place in range(search.room):
            # All start from the same distribution: it is asked for once.
            logp = yield from search.next(ids if place else search.empty(), self.temperature, self.top_p)
            logp = logp.expand(count, -1)
            size = logp.shape[1]
            if not bool(torch.isfinite(logp).any(1).all()):
                return None
            mass = logp.exp().cumsum(1)
            token = torch.searchsorted(mass, (uniforms[:, place] * mass[:, -1])[:, None], right=True)
            ids = torch.cat((ids, token.clamp(max=size - 1)), 1)
        return ids
