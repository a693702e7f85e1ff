"""BEAST, a beam search for suffixes that read like the model's own text (arXiv 2402.15570).

Written from the published description alone; the docstring says where that leaves a question open.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from advkit.attacks.text.base import SuffixAttack
from advkit.attacks.text.questions import Steps
from advkit.attacks.text.search import Objective, SuffixSearch
from advkit.core.checks import at_least_one, fraction, one_of, positive
from advkit.core.errors import UsageError
from advkit.core.protocols import Access


@dataclass(frozen=True, kw_only=True)
class BEAST(SuffixAttack):
    """BEAST: beam search for a suffix whose tokens are drawn from the model's own next-token probabilities.

    Every step draws k2 distinct children for each of the k1 suffixes in the beam, scores all k1 * k2 and keeps the k1
    best; what is returned is the best seen at any length. No gradient is asked for: next-token probabilities and the
    target's are enough.

    k:           size of the beam and children per element, where k1 or k2 do not say otherwise
    k1:          suffixes in the beam
    k2:          children of each; as many as have a probability above 0 where these are fewer
    length:      steps; a suffix has at most length * ngram tokens
    temperature: of the distribution that children are drawn from
    top_p:       share of that distribution's mass that they are drawn from
    ngram:       tokens a step adds: the drawn child and ngram - 1 more that the model goes on with, all before scoring
    objective:   targeted: the goal's loss, mean negative log-likelihood of the wanted reply under says; untargeted:
                 minus the perplexity of what the model itself replies; mia: perplexity of prompt and suffix
    reply:       tokens of the model's own reply under untargeted
    trials:      replies drawn per candidate under untargeted
    compat:      leave the one-token suffixes unscored, as the released code does

    Where the publication and its code differ from this: one-token suffixes are scored (compat), so that every result
    is a scored one; the free tokens of ngram come before the scoring, and every suffix scored counts; special tokens
    are barred by the threat model. A universal suffix, and several surrogates, draw from the softmax of their summed
    logits.
    Raises UsageError for settings out of range.
    """

    needs: ClassVar[Access] = Access.SCORES

    k: int = 15
    k1: int | None = None
    k2: int | None = None
    length: int = 40
    temperature: float = 1.0
    top_p: float = 1.0
    ngram: int = 1
    objective: Objective = "targeted"
    reply: int = 10
    trials: int = 1
    compat: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "objective", ("targeted", "untargeted", "mia"))
        at_least_one(self, "k", "k1", "k2", "ngram", "reply", "trials")
        positive(self, "temperature")
        fraction(self, "top_p", what="probability")
        if self.objective != "targeted" and (self.stop_on_success or self.keep == "reached"):
            raise UsageError(
                f"objective={self.objective} has no success to stop at or to prefer; leave stop_on_success and keep out"
            )

    @property
    def planned(self) -> int:
        """Candidates that a row is scored with at most."""
        every = 1 + self.beam + (self.length - 1) * self.beam * self.children
        return every if self.evaluations is None else min(every, self.evaluations)

    @property
    @override
    def most_steps(self) -> int:
        """Tokens at most that the beam grows by, one step each."""
        return self.length

    @property
    def longest(self) -> int:
        """Most tokens of a suffix."""
        return self.length * self.ngram

    @property
    def aim(self) -> Objective:
        """What candidates are scored by."""
        return self.objective

    @property
    def beam(self) -> int:
        """Suffixes kept."""
        return self.k if self.k1 is None else self.k1

    @property
    def children(self) -> int:
        """Tokens drawn for each of them."""
        return self.k if self.k2 is None else self.k2

    def seek(self, search: SuffixSearch) -> Steps[None]:
        """Grow the beam until it is long enough or a budget ends."""
        beam = search.empty()
        for step in range(self.length):
            length = beam.shape[1] + self.ngram
            if length > search.room or not search.goes_on():
                return
            wanted = self.beam if step == 0 else len(beam) * self.children
            free = range(beam.shape[1] + 1, length)  # lengths at which the free tokens of ngram are drawn
            most = search.affordable(wanted, length, len(beam), beam.shape[1], free)
            if not most:
                return
            candidates = yield from self._grown(search, beam, self.beam if step == 0 else self.children, most, step)
            if not len(candidates):
                return
            if self.compat and step == 0:
                beam = candidates
                continue
            scored = yield from search.score(candidates)
            search.offer(scored)
            search.note(scored)
            beam, scores = scored.best(self.beam)
            search.beam = beam, scores
            if search.succeeded or not len(beam):
                return

    def _grown(self, search: SuffixSearch, beam: Tensor, children: int, most: int, step: int) -> Steps[Tensor]:
        """The beam's continuations, long [n, l + ngram], no two alike in the drawn child."""
        logp = yield from search.next(beam, self.temperature, self.top_p)
        owner, token = search.draw(logp, children, "child", step)
        grown = torch.cat((beam[owner], token[:, None]), 1)[:most]
        for free in range(1, self.ngram):
            if not len(grown):
                break
            logp = yield from search.next(grown, self.temperature, self.top_p)
            owner, token = search.draw(logp, 1, "free", step, free)
            grown = torch.cat((grown[owner], token[:, None]), 1)
        return grown
