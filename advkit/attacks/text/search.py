"""One search for a suffix: its candidates, what they are asked about, budgets, the best so far, a trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from advkit.attacks.base import TensorGoal, TensorOracle, finite_rows
from advkit.attacks.text.questions import Asking, Clock, Question, Steps, hallucinating
from advkit.core.errors import AccessDenied
from advkit.core.protocols import Rng
from advkit.core.spaces import NOTHING, REPLY, REREAD, SLOT, USER
from advkit.core.watching import SearchStep, watcher

Aggregate = Literal["nll", "ppl"]
Objective = Literal["targeted", "untargeted", "mia"]


@dataclass(frozen=True)
class Scored:
    """Candidates and what became of them; everything on the CPU but the ids.

    ids:     long [N, l]
    score:   float64 [N], +inf where the answer was not finite or the candidate was dropped
    reached: per candidate and row, bool [N, n]
    rank:    what a search sorts by where it needs some order: the score, and among dropped candidates +inf
    """

    ids: Tensor
    score: Tensor
    reached: Tensor
    rank: Tensor

    def best(self, most: int) -> tuple[Tensor, Tensor]:
        """Ids and scores of the best few, best first, ties in the order in which they came; none of rank +inf."""
        order = self.rank.sort(stable=True).indices[:most]
        order = order[torch.isfinite(self.rank[order])]
        return self.ids[order.to(self.ids.device)], self.score[order]


@dataclass(frozen=True)
class Candidate:
    """The best so far: ids long [l], its score, and per row whether the goal holds."""

    ids: Tensor
    score: float
    reached: tuple[bool, ...]


def combined(answers: Tensor, aggregate: Aggregate) -> Tensor:
    """One answer [n, 2] of several models' [n, models, 2]: the first column aggregated, the leads averaged."""
    answers = answers.double()
    score, lead = answers[..., 0], (answers[..., 1] - answers[..., 0]).mean(1)
    total = score.mean(1) if aggregate == "nll" else -(-score).exp().sum(1)
    return torch.stack((total, total + lead), 1)


class SuffixSettings(Protocol):
    """What a search is asked to do by its attack; the fields are those of `text.base.SuffixAttack`."""

    @property
    def universal(self) -> bool: ...
    @property
    def aggregate(self) -> Aggregate: ...
    @property
    def keep(self) -> str: ...
    @property
    def stop_on_success(self) -> bool: ...
    @property
    def max_perplexity(self) -> float | None: ...
    @property
    def require_retokenizable(self) -> bool: ...
    @property
    def evaluations(self) -> int | None: ...
    @property
    def tokens(self) -> int | None: ...
    @property
    def seconds(self) -> float | None: ...
    @property
    def longest(self) -> int:
        """Most tokens of a suffix."""
        ...

    @property
    def most_steps(self) -> int:
        """Steps at most; 0 where only a budget ends the search."""
        ...

    @property
    def aim(self) -> Objective:
        """What candidates are scored by."""
        ...

    @property
    def under(self) -> Callable[[Any], Callable[[Tensor], Tensor]] | None:
        """What of a model answers for the goal, where it is not the model itself."""
        ...

    def seek(self, search: Any) -> Steps[None]:
        """Offer candidates to the search, a SuffixSearch, until it ends."""
        ...


@dataclass(eq=False)
class SuffixSearch:
    """One suffix, sought for one row or for several together.

    x:      the rows [n, 2, W]; oracle, goal and rng are theirs
    rows:   which rows they are where the questions are answered, long [n]
    """

    attack: SuffixSettings
    oracle: TensorOracle
    x: Tensor
    goal: TensorGoal
    threat: Any
    rng: Rng
    rows: Tensor
    clock: Clock = field(default_factory=Clock)
    before: float = math.inf
    evaluations: int = 0
    tokens: int = 0
    trace: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stepped = 0.0
        self.best = Candidate(self.x.new_empty(0), math.inf, (False,) * len(self.x))
        self.beam: tuple[Tensor, Tensor] = (self.x.new_empty(0, 0), torch.empty(0, dtype=torch.float64))
        self._prefixed = False

    def steps(self) -> Steps[None]:
        """The search from the clean rows to its end."""
        if self.room and (yield from self.begin()):
            yield from self.attack.seek(self)
        self._tell(over=True)

    @cached_property
    def room(self) -> int:
        """Most tokens that the slots can hold."""
        free = int((self.x[:, 1] == NOTHING).sum(1).min()) if len(self.x) else 0
        limit = getattr(self.threat, "n", None)
        return min(self.attack.longest, free, free if limit is None else int(limit))

    @cached_property
    def allowed(self) -> Tensor:
        """Bool [V]: ids that a suffix may hold."""
        allowed: Tensor = self.threat.allowed(self.x.device)
        return allowed

    @property
    def result(self) -> Tensor:
        """The rows with the best suffix in place [n, 2, W]."""
        return self.placed(self.best.ids[None])[:, 0] if len(self.best.ids) else self.x.clone()

    def empty(self) -> Tensor:
        """The one candidate without tokens, long [1, 0]."""
        return self.x.new_empty(1, 0)

    # ---- transcripts -------------------------------------------------------------------------------------------------

    def placed(self, ids: Tensor) -> Tensor:
        """The rows with candidates [N, l] in place, [n, N, 2, W]."""
        if ids.shape[1] == 0:
            return self.x[:, None].expand(-1, len(ids), -1, -1)
        return torch.stack([self.threat.slotted(row, ids) for row in self.x])

    def opened(self, ids: Tensor) -> Tensor:
        """The same cut off after the slot, whatever of the user's words follows it: [n, N, 2, W]."""
        opened = []
        for row, (head, reply) in zip(self.x, self._ends, strict=True):
            blank = torch.stack((torch.full_like(row[0], -1), torch.zeros_like(row[1])))
            rows = blank.expand(len(ids), -1, -1).clone()
            ends = torch.tensor([0, len(head), ids.shape[1], len(reply)]).cumsum(0).tolist()
            parts = ((head, USER), (ids, SLOT), (reply, REPLY))
            for (part, role), start, stop in zip(parts, ends[:-1], ends[1:], strict=True):
                rows[:, 0, start:stop], rows[:, 1, start:stop] = part, role
            opened.append(rows)
        return torch.stack(opened)

    @cached_property
    def _ends(self) -> list[tuple[Tensor, Tensor]]:
        """Per row: the user's words before the slot, and the reply."""
        ends = []
        for row in self.x:
            marked = self.threat.slotted(row, row.new_zeros(1, 1))[0]
            first = int((marked[1] == SLOT).nonzero()[0])
            head = marked[0, :first][marked[1, :first] == USER]
            ends.append((head, row[0][row[1] == REPLY]))
        return ends

    # ---- questions ---------------------------------------------------------------------------------------------------

    def _of(self, candidates: int) -> Tensor:
        return torch.arange(len(self.x), device=self.x.device).repeat_interleave(candidates)

    def next(self, ids: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Steps[Tensor]:
        """Log-probabilities [N, V] of the token after each candidate, over the ids that a suffix may hold.

        Those of a universal suffix, and of several models, come from the sum of their logits.
        """
        rows = self.opened(ids)
        self._count(len(ids), ids.shape[1], reads=True)
        answer = yield Question(
            "next",
            rows.flatten(0, 1),
            self._of(len(ids)),
            lambda model, given: model.continuing(),
            width=len(self.allowed),
        )
        logits = answer.sum(1).view(*rows.shape[:2], -1).sum(0).double()
        # A model that answers NaN, or bars every id, leaves nothing to draw from.
        logits = torch.where(logits.isnan() | ~self.allowed, -torch.inf, logits)
        return nucleus(normal(logits / temperature), top_p)

    def noise(self, shape: tuple[int, ...], *names: object) -> Tensor:
        """Uniform float64 in [0, 1): from the row's own streams, or from the run's where rows are searched together."""
        streams = self.rng.at(*names)
        if self.attack.universal:
            return torch.rand(shape, dtype=torch.float64, generator=streams.generator()).to(self.x.device)
        return streams.uniform(torch.empty(1, *shape, dtype=torch.float64, device=self.x.device))[0]

    def draw(self, logp: Tensor, most: int, *names: object) -> tuple[Tensor, Tensor]:
        """Up to `most` distinct ids for each row of logp [N, V]: owner and id, long [n], in the order drawn."""
        return draw_distinct(logp, most, self.noise((len(logp), logp.shape[1]), *names))

    def score(self, ids: Tensor) -> Steps[Scored]:
        """Score candidates [N, l]; those that may not be submitted are dropped without a query, but count."""
        self.evaluations += len(ids)
        rows = self.placed(ids)
        passed, rank = yield from self._passed(ids, rows)
        score = torch.full((len(ids),), torch.inf, dtype=torch.float64)
        reached = torch.zeros(len(ids), len(self.x), dtype=torch.bool)
        if bool(passed.any()):
            chosen = passed.nonzero().squeeze(1)
            scores, successes = yield from self._asked(ids.shape[1], rows[:, chosen])
            score[chosen.cpu()], reached[chosen.cpu()] = scores, successes
        return Scored(ids, score, reached, rank if not bool(passed.any()) else score)

    def _passed(self, ids: Tensor, rows: Tensor) -> Steps[tuple[Tensor, Tensor]]:
        """Which candidates may be scored, bool [N], and in what order those come that may not."""
        passed = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        rank = torch.zeros(len(ids), dtype=torch.float64)
        if self.attack.require_retokenizable and ids.shape[1]:
            survives = self.survives(rows)
            passed = survives if bool(survives.any()) else passed
        if (limit := self.limit) is not None and ids.shape[1]:
            perplexity = yield from self.perplexity(rows)
            passed = passed & (perplexity <= limit)
            rank = perplexity.cpu()
        return passed, rank

    def survives(self, rows: Tensor) -> Tensor:
        """Bool [N]: which transcripts [n, N, 2, W] stay what they are when read anew from text, in all rows."""
        origin = self.x[:, None].expand_as(rows).flatten(0, 1)
        same = (self.threat.finish(rows.flatten(0, 1), origin) == rows.flatten(0, 1)).flatten(1).all(1)
        survives: Tensor = same.view(rows.shape[:2]).all(0)
        return survives

    @cached_property
    def limit(self) -> float | None:
        """The perplexity above which candidates are dropped."""
        limit = self.attack.max_perplexity
        if limit is None:
            own = [getattr(each, "max_perplexity", None) for each in self._models]
            limit = min((value for value in own if value is not None), default=None)
        return None if limit is None or math.isinf(limit) else float(limit)

    @cached_property
    def _models(self) -> tuple[Any, ...]:
        """The models themselves, where they may be seen."""
        seen: list[Any] = []

        def look(model: Any) -> Callable[[Tensor], Tensor]:
            seen.append(model)
            return lambda x: x

        try:
            self.oracle.seen_as(Asking(look))
        except AccessDenied:
            return ()
        return tuple(seen)

    def perplexity(self, rows: Tensor) -> Steps[Tensor]:
        """The largest perplexity, over rows and models, of the user's turn in transcripts [n, N, 2, W]; float64 [N]."""
        flat = rows.flatten(0, 1)
        self._count(rows.shape[1], int((rows[0, 0, 1] == SLOT).sum()), reads=True)
        logp = yield self._likelihood(flat)
        worst = turn_perplexity(logp.double(), flat, self._begun).amax(1)
        return worst.view(rows.shape[:2]).amax(0).nan_to_num(nan=torch.inf, posinf=torch.inf)

    def _likelihood(self, flat: Tensor) -> Question:
        """Log-probabilities [m, models, W] of the user's turns."""
        of = self._of(len(flat) // len(self.x))
        return Question("likelihood", flat, of, lambda model, given: model.likelihood(), width=flat.shape[2])

    def _asked(self, length: int, rows: Tensor) -> Steps[tuple[Tensor, Tensor]]:
        """Scores [N] and successes [N, n] of transcripts [n, N, 2, W], on the CPU."""
        n, count = rows.shape[:2]
        of, flat = self._of(count), rows.flatten(0, 1)
        objective = self.attack.aim
        self._count(count, length)
        if objective == "targeted":
            answer = yield self._scoring(flat, of)
            goal, good = self.goal.take(of), finite_rows(answer)
            loss = torch.where(good, goal.loss(answer).double(), torch.inf)
            reached = goal.reached(answer) & good
        else:
            if objective == "mia":
                logp = yield self._likelihood(flat)
                loss = turn_perplexity(logp.double(), flat, self._begun).sum(1)
            else:
                answer = yield self._hallucinated(flat, of)
                loss = answer[..., 0].sum(1)
            reached = torch.zeros_like(loss, dtype=torch.bool)
        loss = loss.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.inf)
        both = torch.stack((loss, reached.double())).reshape(2, n, count).cpu()  # one wait for the device
        return both[0].sum(0), both[1].T > 0

    def _scoring(self, rows: Tensor, of: Tensor) -> Question:
        attack = self.attack
        if attack.aggregate == "nll" and attack.under is None and len(self._models) <= 1:
            return Question("score", rows, of)
        under = attack.under or (lambda model: model)
        return Question(
            "score",
            rows,
            of,
            lambda model, given: under(model),
            join=lambda answers: combined(answers, attack.aggregate),
        )

    def _hallucinated(self, rows: Tensor, of: Tensor) -> Question:
        attack: Any = self.attack
        # the same for every candidate of a step: they are compared on the same luck
        uniforms = self.noise((attack.trials, attack.reply), "reply", len(self.trace))
        return Question("hallucination", rows, of, hallucinating, given=uniforms.expand(len(rows), -1, -1))

    # ---- the best so far ---------------------------------------------------------------------------------------------

    def offer(self, scored: Scored) -> bool:
        """Take the best of these candidates where it beats the best so far; whether one did."""
        if not len(scored.score):
            return False
        successes = (
            scored.reached.sum(1)
            if self.attack.keep == "reached"
            else torch.zeros(len(scored.score), dtype=torch.float32)
        )
        successes = torch.where(torch.isfinite(scored.score), successes, -1)
        index = int(torch.where(successes == successes.max(), scored.score, torch.inf).argmin())  # the first of equals
        score, most = float(scored.score[index]), float(successes[index])
        so_far = sum(self.best.reached) if self.attack.keep == "reached" else 0
        if not math.isfinite(score) or (-most, score) >= (-so_far, self.best.score):
            return False
        reached = tuple(bool(one) for one in scored.reached[index])
        self.best = Candidate(scored.ids[index].clone(), score, reached)
        return True

    @property
    def succeeded(self) -> bool:
        """Whether the attack ends with a success, and has one in every row."""
        return self.attack.stop_on_success and all(self.best.reached)

    def begin(self) -> Steps[bool]:
        """Score the clean rows; False where the search is over already."""
        if not self.affordable(1, 0):
            return False
        if self.attack.aim != "mia":  # a member is asked about with a suffix or not at all
            scored = yield from self.score(self.empty())
            self.before = float(scored.score[0])
            self.offer(scored)
            self.note(scored)
        return not self.succeeded

    def note(self, scored: Scored, **more: Any) -> None:
        """Write one step into the trace."""
        low = float(scored.score.min()) if len(scored.score) else math.inf
        figures: dict[str, Any] = {
            "step": len(self.trace),
            "candidates": len(scored.score),
            "score": low if math.isfinite(low) else None,
            "best": self.best.score if math.isfinite(self.best.score) else None,
            "length": len(self.best.ids),
            "reached": all(self.best.reached),
            "evaluations": self.evaluations,
            "tokens": self.tokens,
            **more,
        }
        self.trace.append(figures)
        for row in range(len(self.x)):
            self.oracle.note(row, figures)
        self._tell()

    def _tell(self, over: bool = False) -> None:
        """Say to whoever watches how far the search is."""
        if (told := watcher()) is not None:
            best = self.best.score if math.isfinite(self.best.score) else None
            step = SearchStep(
                max(0, len(self.trace) - 1), self.attack.most_steps, best, all(self.best.reached), over
            )  # the clean row is no step
            told.searched(self.rows.tolist(), step)

    # ---- budgets -----------------------------------------------------------------------------------------------------

    def goes_on(self) -> bool:
        """Whether there is time for another step as long as the last one; to be asked before every step."""
        now = self.clock.now
        last, self.stepped = now - self.stepped, now
        return self.attack.seconds is None or now + last < self.attack.seconds

    def affordable(self, candidates: int, length: int, reads: int = 0, read: int = 0, grown: Sequence[int] = ()) -> int:
        """How many of these candidates of that length can be paid for.

        reads: next-token probabilities asked for once, of suffixes of length `read`; grown: lengths at which every
        candidate's are asked for on top
        """
        filtered = self.limit is not None and length > 0
        queries = 1 + filtered + len(grown)
        tokens = self.cost(length) + sum(self.cost(each, True) for each in grown) + filtered * self.cost(length, True)
        if self.attack.evaluations is not None:
            candidates = min(candidates, self.attack.evaluations - self.evaluations)
        if self.attack.tokens is not None:
            left = self.attack.tokens - self.tokens - reads * self.cost(read, True)
            left -= 0 if self._prefixed else self.prefix
            candidates = min(candidates, left // max(1, tokens))
        left_queries = self.oracle.left
        if left_queries is not None:
            candidates = min(candidates, (left_queries - reads) // queries)
        return max(0, candidates)

    def cost(self, length: int, reads: bool = False) -> int:
        """Tokens that one candidate of that length takes, over all rows, with the prefix of the prompt cached.

        reads: only up to the end of the slot, for probabilities of what comes next
        """
        attack: Any = self.attack
        if reads or attack.aim == "mia":
            return length * len(self.x)
        if attack.aim == "untargeted":  # replies are written, then scored
            return sum(2 * attack.trials * (length + turn + attack.reply - 1) for turn, _ in self._behind)
        return sum(length + turn + reply for turn, reply in self._behind)

    @cached_property
    def _behind(self) -> list[tuple[int, int]]:
        """Per row, tokens behind the slot: words and template, and all of the reply but the last."""
        counts = []
        for row, (head, reply) in zip(self.x, self._ends, strict=True):
            words = int((row[1] == USER).sum()) - len(head)
            counts.append((words + self._template[1], max(0, len(reply) - 1)))
        return counts

    @cached_property
    def prefix(self) -> int:
        """Tokens before the slots."""
        return sum(self._template[0] + len(head) for head, _ in self._ends)

    @cached_property
    def _begun(self) -> tuple[bool, ...]:
        """Of every model, whether something stands before the user's turn."""
        return tuple(begins(model) for model in self._models) or (True,)

    @cached_property
    def _template(self) -> tuple[int, int]:
        """Tokens of the template before and after the user's turn; of the first model, 0 where none may be seen."""
        for model in self._models:
            tokenizer = getattr(model, "tokenizer", None)
            return len(getattr(tokenizer, "before", ())), len(getattr(tokenizer, "after", ()))
        return 0, 0

    def _count(self, candidates: int, length: int, reads: bool = False) -> None:
        if not self._prefixed:
            self.tokens += self.prefix
            self._prefixed = True
        self.tokens += candidates * self.cost(length, reads)


def begins(model: Any) -> bool:
    """Whether something stands before the user's turn: a template, or a beginning-of-text token."""
    tokenizer = getattr(model, "tokenizer", None)
    return tokenizer is None or bool(tokenizer.before)


def turn_perplexity(logp: Tensor, rows: Tensor, begun: Sequence[bool] = (True,)) -> Tensor:
    """Perplexity [n, models] of the user's turn from log-probabilities [n, models, W] of transcripts [n, 2, W].

    begun: for each model whether something stands before the turn; where nothing does, the first token has no
           probability and is not counted
    """
    counted = (rows[:, 1] == USER) | (rows[:, 1] == SLOT) | (rows[:, 1] == REREAD)
    total = torch.where(counted[:, None], logp, 0.0).sum(2)
    first = torch.tensor([not each for each in begun], device=logp.device)
    return (-total / (counted.sum(1, keepdim=True) - first.long()).clamp(min=1)).exp()


def normal(logits: Tensor) -> Tensor:
    """Log-probabilities [N, V]; a row that bars every id stays at -inf."""
    logp = logits.log_softmax(1)
    return torch.where(logp.isnan(), -torch.inf, logp)


def nucleus(logp: Tensor, top_p: float) -> Tensor:
    """The most likely ids that together have probability top_p, renormalised; the others at -inf."""
    if top_p >= 1:
        return logp
    ranked, order = logp.sort(dim=1, descending=True, stable=True)
    mass = ranked.exp().cumsum(1)
    inside = (mass - ranked.exp() < top_p).scatter(1, order, mass - ranked.exp() < top_p)
    return normal(torch.where(inside, logp, -torch.inf))


def draw_distinct(logp: Tensor, most: int, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw ids without replacement in proportion to their probabilities, one race per row (Efraimidis, Spirakis, 2006).

    logp: [N, V]; uniform: [N, V] in [0, 1). The id whose exponential clock of rate p rings first is drawn first, which
    is the law of drawing one after the other. Ids of probability 0 are never drawn, so that a row may get fewer.
    Returns owner and id, long [n], row by row in the order drawn.
    """
    clock = torch.where(logp.exp() > 0, (-torch.log1p(-uniform)).log() - logp, torch.inf)
    value, order = clock.topk(min(most, logp.shape[1]), largest=False, sorted=True)
    owner, place = (value < torch.inf).nonzero(as_tuple=True)
    return owner, order[owner, place]
