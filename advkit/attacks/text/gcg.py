"""GCG, greedy coordinate gradient over the tokens of a suffix (arXiv 2307.15043)."""

from __future__ import annotations

import logging
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from advkit.attacks.text.base import SuffixAttack
from advkit.attacks.text.questions import Question, Steps
from advkit.attacks.text.search import Scored, SuffixSearch, combined
from advkit.core.checks import at_least, at_least_one, one_of, positive
from advkit.core.errors import UsageError
from advkit.core.protocols import Access

log = logging.getLogger("advkit")

CHUNK = 4096  # candidates of one question under an exhaustive search: bounds memory, changes no result
GRADIENT = 2  # evaluations that a gradient counts as: one pass forward and one back


@dataclass(frozen=True, kw_only=True)
class GCG(SuffixAttack):
    """Greedy coordinate gradient (GCG): swaps single suffix tokens, chosen by the gradient at the one-hot tokens.

    Every step differentiates the loss at the current suffix, takes the topk most promising ids of every position, draws
    `width` suffixes that differ in `replace` positions, scores them and goes on from the best, even where that is worse
    than the last. What is returned is the best of all steps.

    steps:    swaps
    length:   tokens of the suffix, never more than the threat model's n
    width:    candidates drawn per step; those drawn twice are scored once
    topk:     ids per position that candidates are drawn from
    replace:  positions in which a candidate differs, at most
    buffer:   suffixes kept; with one or more, a step goes on from the best ever instead of the last step's best
    search:   sampled, or exhaustive: score every single swap and stop where none is better (exact coordinate descent)
    loss:     ce, the goal's own loss, or mellowmax of minus the target's logits
    alpha:    sharpness of mellowmax
    init:     text repeated for the first suffix; where that does not make `length` allowed tokens, or is empty, the
              first suffix is drawn
    filter:   drop candidates whose text is tokenised otherwise, taken by themselves; all stay where none survives

    A gradient counts as two evaluations. Under an exhaustive search ties go to the lower position, then the lower id.
    Raises UsageError for settings out of range.
    """

    needs: ClassVar[Access] = Access.GRADIENTS

    steps: int = 250
    width: int = 512
    topk: int = 256
    replace: int = 1
    buffer: int = 0
    search: Literal["sampled", "exhaustive"] = "sampled"
    loss: Literal["ce", "mellowmax"] = "ce"
    alpha: float = 1.0
    init: str = " x"
    filter: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "search", ("sampled", "exhaustive"))
        one_of(self, "loss", ("ce", "mellowmax"))
        at_least_one(self, "steps", "width", "topk", "replace")
        at_least(self, 0, "buffer")
        positive(self, "alpha")

    @property
    def planned(self) -> int:
        """Candidates that a row is scored with at most, its gradients among them."""
        every = 1 + self.steps * (self.width + GRADIENT)
        return every if self.evaluations is None else min(every, self.evaluations)

    @property
    @override
    def most_steps(self) -> int:
        """Swaps at most."""
        return self.steps

    @property
    def under(self) -> Callable[[Any], Callable[[Tensor], Tensor]] | None:
        """Mellowmax in place of the model's own score."""
        return None if self.loss == "ce" else lambda model: model.under(self.loss, self.alpha)

    def seek(self, search: SuffixSearch) -> Steps[None]:
        """Swap until the steps or a budget end; an exhaustive search ends where no swap helps."""
        run = _Run(self, search)
        if not (yield from run.start()):
            return
        for step in range(self.steps):
            if search.succeeded or not search.goes_on() or not (yield from run.step(step)):
                return


class _Run:
    """GCG on one search: the current suffix, and the buffer."""

    def __init__(self, attack: GCG, search: SuffixSearch) -> None:
        self.attack = attack
        self.search = search
        self.pool: list[tuple[float, Tensor]] = []
        self.length = search.room
        self._slotted = search.placed(search.x.new_zeros(1, self.length))[:, 0]

    @property
    def current(self) -> Tensor:
        """The suffix that the next step starts from, long [l]."""
        return self.pool[0][1]

    def start(self) -> Steps[bool]:
        """Score the first suffixes; False where there is nothing to swap or to spend."""
        ids = self._first(max(1, self.attack.buffer))
        most = self.search.affordable(len(ids), self.length) if ids is not None else 0
        if ids is None or not most:
            return False
        scored = yield from self._scored(ids[:most])
        self.search.offer(scored)
        self.search.note(scored)
        self._enter(scored, True)
        return True

    def step(self, step: int) -> Steps[bool]:
        """One swap; False where the search is over."""
        attack, search = self.attack, self.search
        exhaustive = attack.search == "exhaustive"
        ids = self._every_swap() if exhaustive else (yield from self._drawn(step))
        if ids is None:
            return False
        ids = ids[: search.affordable(len(ids), self.length)]
        if not len(ids):
            return False
        scored = yield from self._scored(ids)
        search.offer(scored)
        search.note(scored, current=self.pool[0][0])
        best, score = scored.best(1)
        if not len(best) or (exhaustive and not float(score[0]) < self.pool[0][0]):
            return False
        self._enter(scored, False)
        return True

    def _enter(self, scored: Scored, first: bool) -> None:
        """Make the best candidate of a step the current suffix, or a member of the buffer where it earns that."""
        ids, scores = scored.best(len(scored.score) if first else 1)
        entries = [(float(score), each) for score, each in zip(scores, ids, strict=True)]
        if first:
            # A first suffix without a finite score still has neighbours that may have one.
            self.pool = entries or [(float("inf"), scored.ids[0])]
        elif not self.attack.buffer:
            self.pool = entries
        elif len(self.pool) < self.attack.buffer or entries[0][0] < self.pool[-1][0]:
            kept = self.pool if len(self.pool) < self.attack.buffer else self.pool[:-1]
            self.pool = sorted([*kept, *entries], key=lambda entry: entry[0])
        self.search.beam = (
            torch.stack([each for _, each in self.pool]),
            torch.tensor([score for score, _ in self.pool], dtype=torch.float64),
        )

    def _first(self, count: int) -> Tensor | None:
        """The first suffixes [count, l]: the given text, then letters and punctuation; None where no id is allowed."""
        allowed = self.search.allowed
        if not bool(allowed.any()):
            return None
        given = self._given()
        letters = torch.zeros_like(allowed)
        if count > 1:
            tokenizer = self.search.threat.space.tokenizer
            marks = set(string.ascii_letters + string.punctuation)
            known = [i for i in allowed.nonzero().squeeze(1).tolist() if tokenizer.decode([i]) in marks]
            letters[known] = True
        among = (letters if bool(letters.any()) else allowed).nonzero().squeeze(1)
        uniform = self.search.noise((count, self.length), "init")
        drawn = among[(uniform * len(among)).long().clamp(max=len(among) - 1)]
        if given is None:
            pool = allowed.nonzero().squeeze(1)
            drawn[0] = pool[(uniform[0] * len(pool)).long().clamp(max=len(pool) - 1)]
        else:
            drawn[0] = given
        return drawn

    def _given(self) -> Tensor | None:
        """The first suffix as `init` says it, where the tokenizer can."""
        if not self.attack.init:
            return None
        tokenizer = self.search.threat.space.tokenizer
        try:
            ids = tokenizer.encode((self.attack.init * self.length).strip())[: self.length]
        except (KeyError, ValueError, UsageError):  # words that a closed vocabulary does not have
            return None
        suffix = torch.tensor(ids, dtype=torch.long, device=self.search.x.device)
        fits = len(ids) == self.length and bool(self.search.allowed[suffix].all())
        return suffix if fits else None

    def gradient(self, ids: Tensor) -> Steps[Tensor]:
        """The loss's gradient [l, V] with respect to one-hot tokens at a suffix [l], summed over the rows."""
        search, attack = self.search, self.attack
        rows, size = len(search.x), len(search.allowed)

        def join(answers: Tensor) -> Tensor:
            return answers[:, 0] if answers.shape[1] == 1 else combined(answers, attack.aggregate)

        gradient = yield Question(
            "gradient",
            torch.nn.functional.one_hot(ids, size).to(self._type()).expand(rows, -1, -1),
            torch.arange(rows, device=ids.device),
            lambda model, given: lambda hot: model.relaxed(given.value, attack.loss, attack.alpha)(hot),
            given=self._slotted,
            join=join,
            needs=Access.GRADIENTS,
            gradient=True,
            width=len(ids) * size,
        )
        search.evaluations += GRADIENT
        search.tokens += GRADIENT * search.cost(len(ids))
        return gradient.sum(0)

    def _type(self) -> torch.dtype:
        """The floating type that the model computes its embeddings in."""
        kinds = (
            parameter.dtype
            for model in self.search._models
            for module in model.modules()
            for parameter in module.parameters()
            if parameter.is_floating_point()
        )
        return next(kinds, torch.float32)

    def _drawn(self, step: int) -> Steps[Tensor | None]:
        """Candidates [n, l], `replace` swaps away from the current suffix; None where no budget is left for them."""
        attack, search = self.attack, self.search
        if search.affordable(GRADIENT + 1, self.length) <= GRADIENT:
            return None
        gradient = yield from self.gradient(self.current)
        gradient = torch.where(search.allowed, gradient, torch.inf)
        top = (-gradient).topk(min(attack.topk, int(search.allowed.sum())), dim=1).indices
        candidates = swapped(
            self.current,
            top,
            attack.replace,
            search.noise((attack.width, self.length), "position", step),
            search.noise((attack.width, min(attack.replace, self.length)), "token", step),
        )
        return self._filtered(unique(candidates))

    def _every_swap(self) -> Tensor | None:
        ids = self.search.allowed.nonzero().squeeze(1)
        grid = self.current.repeat(self.length, len(ids), 1)
        place = torch.arange(self.length, device=ids.device)
        grid[place, :, place] = ids
        flat = grid.flatten(0, 1)
        flat = flat[(flat != self.current).any(1)]
        return self._filtered(flat) if len(flat) else None

    def _filtered(self, ids: Tensor) -> Tensor:
        """Those whose text comes back as the same ids."""
        if not self.attack.filter:
            return ids
        tokenizer = self.search.threat.space.tokenizer
        same = torch.tensor([list(tokenizer.encode(tokenizer.decode(each))) == each for each in ids.tolist()])
        if not bool(same.any()):
            log.warning("gcg: no candidate's text is tokenised as the candidate; all are kept (filter=false is quiet)")
            return ids
        return ids[same.to(ids.device)]

    def _scored(self, ids: Tensor) -> Steps[Scored]:
        """Candidates' scores, in as many questions as memory asks for."""
        parts = []
        for part in torch.split(ids, CHUNK):
            parts.append((yield from self.search.score(part)))
        return parts[0] if len(parts) == 1 else together(parts)


def together(parts: list[Scored]) -> Scored:
    """Candidates scored in several questions, as one; what was dropped in one of them stays behind what was not."""
    return Scored(
        torch.cat([part.ids for part in parts]),
        torch.cat([part.score for part in parts]),
        torch.cat([part.reached for part in parts]),
        torch.cat([part.score for part in parts]),
    )


def swapped(current: Tensor, top: Tensor, replace: int, position: Tensor, token: Tensor) -> Tensor:
    """Candidates [n, l] that hold, in `replace` distinct positions of current [l], an id out of those positions' top.

    top: long [l, k]; position: uniform [n, l]; token: uniform [n, replace]. An id may be the one already there.
    """
    place = position.argsort(dim=1, stable=True)[:, : min(replace, len(current))]
    pick = (token[:, : place.shape[1]] * top.shape[1]).long().clamp(max=top.shape[1] - 1)
    return current.repeat(len(position), 1).scatter(1, place, top[place, pick])


def unique(ids: Tensor) -> Tensor:
    """The rows without repetitions, in the order in which they first came."""
    _, inverse = torch.unique(ids, dim=0, return_inverse=True)
    first = torch.full((int(inverse.max()) + 1,), len(ids), dtype=torch.long, device=ids.device)
    first.scatter_reduce_(0, inverse, torch.arange(len(ids), device=ids.device), "amin")
    return ids[first.sort().values]
