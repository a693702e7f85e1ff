"""What every search for a suffix needs: scoring through the oracle, budgets, the best candidate so far, a trace.

A candidate is a row of token ids [l]; the threat model says where in the transcript they stand. Every row is searched
by itself, with its own random streams, so that it ends the same in any batch; a universal suffix is searched for all
rows at once.
"""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from advkit.attacks.base import TensorGoal, TensorOracle, finite_rows
from advkit.core.errors import AccessDenied, UsageError
from advkit.core.oracle import Lanes
from advkit.core.protocols import Access, Rng
from advkit.core.spaces import NOTHING, REPLY, REREAD, SLOT, USER

log = logging.getLogger("advkit")

Objective = Literal["targeted", "untargeted", "mia"]
Aggregate = Literal["nll", "ppl"]
Keep = Literal["lowest", "reached"]

WHOLE = Lanes(chunk=2**30, multiple=1)
"""Language models choose the shapes of their calls themselves."""


@dataclass(frozen=True)
class Found:
    """What a search knows of its rows; the harness asks the victim again and believes none of it.

    x:           the transcripts with their suffixes [B, 2, W]; the untouched row where nothing beat it
    ids:         the suffixes, long [l] each
    score:       their scores, float64 [B]; lower is better for the attacker, +inf where nothing was scored
    before:      score of the untouched row, float64 [B]
    reached:     whether the goal seemed to hold there, bool [B]
    evaluations: candidates scored or dropped, the untouched row among them, long [B]
    tokens:      tokens these and the reads of next-token probabilities take with the prompt's prefix cached, long [B]
    seconds:     float64 [B]
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
class SuffixAttack(ABC):
    """A search for tokens to put into the slot of a prompt.

    length:       most tokens of a suffix; the threat model's n caps it
    universal:    one suffix for all the rows, by the sum of their scores
    aggregate:    several surrogates count by the mean of their losses (nll) or by the sum of their perplexities (ppl)
    keep:         lowest returns the best score; reached prefers candidates whose greedy reply is the one wanted
    stop_on_success: end as soon as the best candidate reaches the goal
    max_perplexity:  candidates that make the user's turn less likely than this are dropped; none takes the victim's own
                  threshold where it filters by perplexity, inf looks away from it
    require_retokenizable: drop candidates that another tokenisation of the text would replace, unless all are such
    evaluations:  most candidates per row, the untouched one and dropped ones included; none for no limit
    tokens:       most tokens per row, counted with the prompt's prefix cached
    seconds:      most seconds per row; the only budget whose results differ from machine to machine

    Whichever budget ends first ends the search, before a step that the last one's duration says would not fit, and with
    as many candidates of a step as are left; the threat model's queries count as well. The untouched row is scored
    first and returned where nothing beats it.
    Raises UsageError for settings out of range and for threat models without a slot.
    """

    needs: ClassVar[Access] = Access.SCORES
    default_threat_model: ClassVar[str] = "suffix"
    default_goal: ClassVar[str] = "says"

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
        if self.length < 1:
            raise UsageError(f"length is {self.length}; give a whole number of at least 1")
        one_of(self, "aggregate", "nll", "ppl")
        one_of(self, "keep", "lowest", "reached")
        for name in ("evaluations", "tokens", "seconds", "max_perplexity"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name} is {value}; give a number above 0, or none for no limit")

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
        searches = []
        for rows in parts:
            search = Search(self, oracle.take(rows), x[rows], goal.take(rows), threat, rng.take(rows))
            if search.room and search.begin():
                self.seek(search)
            search.elapsed = time.monotonic() - search.started
            searches.append(search)
        return merged(searches, x)

    @property
    def longest(self) -> int:
        """Most tokens of a suffix that the settings ask for."""
        return self.length

    @property
    def aim(self) -> Objective:
        """What candidates are scored by."""
        return "targeted"

    @property
    def under(self) -> Callable[[Any], Callable[[Tensor], Tensor]] | None:
        """What of a model answers for the goal, where it is not the model itself."""
        return None

    @abstractmethod
    def seek(self, search: Search) -> None:
        """Offer candidates to the search until it ends."""


def one_of(attack: object, name: str, *choices: str) -> None:
    """UsageError unless the field holds one of the choices."""
    if getattr(attack, name) not in choices:
        raise UsageError(f"{name} is {getattr(attack, name)!r}; expected {' or '.join(choices)}")


def slots_only(threat: Any, name: str) -> None:
    """UsageError for threat models without a slot for tokens."""
    if not callable(getattr(threat, "slotted", None)):
        raise UsageError(
            f"{name} puts tokens into a slot of a prompt, and threat model {type(threat).__name__.lower()} has none; "
            "use suffix:n=20 on a language model (task prompts). Balls such as linf, l2, l1 and l0, minimum-l2 and "
            "flips are for other inputs"
        )


def merged(searches: Sequence[Search], x: Tensor) -> Found:
    """What the searches found, row by row in the order of x."""
    rows = [(search, i) for search in searches for i in range(len(search.x))]

    def numbers(value: Callable[[Search], float], dtype: torch.dtype) -> Tensor:
        return torch.tensor([value(search) for search, _ in rows], dtype=dtype)

    return Found(
        x=torch.stack([search.result[i] for search, i in rows]) if rows else x.clone(),
        ids=tuple(search.best.ids for search, _ in rows),
        score=numbers(lambda search: search.best.score, torch.float64),
        before=numbers(lambda search: search.before, torch.float64),
        reached=torch.tensor([search.best.reached[i] for search, i in rows], dtype=torch.bool),
        evaluations=numbers(lambda search: search.evaluations, torch.long),
        tokens=numbers(lambda search: search.tokens, torch.long),
        seconds=numbers(lambda search: search.elapsed, torch.float64),
        beams=tuple(search.beam for search, _ in rows),
        traces=tuple(tuple(search.trace) for search, _ in rows),
    )


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


@dataclass(frozen=True)
class Asking:
    """A question to all the models that an oracle speaks for; calling it on the oracle's model makes the view.

    ask:   makes, of one model, what is called
    join:  what is made of the answers side by side [n, models, ...], where something else is to be answered
    needs: next-token probabilities and likelihoods are scores; what is differentiated is more
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
        return sum(getattr(model, "tokens", 0) for model in self.models)

    def modules(self) -> tuple[torch.nn.Module, ...]:
        """Those of all the models."""
        return tuple(module for model in self.models for module in model.modules())

    def __call__(self, x: Tensor) -> Tensor:
        answers = torch.stack([part(x) for part in self.parts], 1)
        return answers if self.join is None else self.join(answers)


def members(model: Any) -> tuple[Any, ...]:
    """The models inside an ensemble; the model alone where it is none."""
    inside = getattr(model, "models", None)
    return (model,) if inside is None else tuple(inside)


def combined(answers: Tensor, aggregate: Aggregate) -> Tensor:
    """One answer [n, 2] of several models' [n, models, 2]: the first column aggregated, the leads averaged."""
    answers = answers.double()
    said, lead = answers[..., 0], (answers[..., 1] - answers[..., 0]).mean(1)
    total = said.mean(1) if aggregate == "nll" else -(-said).exp().sum(1)
    return torch.stack((total, total + lead), 1)


@dataclass
class Hallucination:
    """Minus the perplexity of what a model itself replies, [n, 1]: lower is a reply that surprises it more.

    uniforms: what the replies are drawn with, [trials, tokens] in [0, 1), the same for every transcript of a question:
              candidates are compared on the same luck. Set before each
    """

    model: Any
    uniforms: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        total = torch.zeros(len(x), 1, dtype=torch.float64, device=x.device)
        for uniforms in self.uniforms:
            replies = self.model.sampling(uniforms.expand(len(x), -1))(x)
            total -= self.model.answering(replies)(x).double().exp()
        return total / len(self.uniforms)


@dataclass
class Search:
    """One suffix, sought for one row or for several together.

    x: the rows [n, 2, W]; oracle, goal and rng are theirs
    """

    attack: SuffixAttack
    oracle: TensorOracle
    x: Tensor
    goal: TensorGoal
    threat: Any
    rng: Rng
    before: float = math.inf
    evaluations: int = 0
    tokens: int = 0
    trace: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.started = self.stepped = time.monotonic()
        self.elapsed = 0.0
        self.best = Candidate(self.x.new_empty(0), math.inf, (False,) * len(self.x))
        self.beam: tuple[Tensor, Tensor] = (self.x.new_empty(0, 0), torch.empty(0, dtype=torch.float64))
        self._views: dict[str, TensorOracle] = {}
        self._hallucinations: list[Hallucination] = []
        self._prefixed = False

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
        """The same cut off after the slot, whatever of the user's words stands behind it: [n, N, 2, W]."""
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

    def asking(self, name: str, ask: Callable[[Any], Any], join: Callable[[Tensor], Tensor] | None = None) -> Any:
        """The oracle that puts this question to every model at hand; made once per name."""
        if name not in self._views:
            self._views[name] = self.oracle.seen_as(Asking(ask, join))
        return self._views[name]

    def _of(self, candidates: int) -> Tensor:
        return torch.arange(len(self.x), device=self.x.device).repeat_interleave(candidates)

    def next(self, ids: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
        """Log-probabilities [N, V] of the token after each candidate, over the ids that a suffix may hold.

        Those of a universal suffix, and of several models, come from the sum of their logits.
        """
        view = self.asking("next", lambda model: model.continuing())
        rows = self.opened(ids)
        self._count(len(ids), ids.shape[1], reads=True)
        logits = view(rows.flatten(0, 1), self._of(len(ids))).sum(1)
        logits = logits.unflatten(0, rows.shape[:2]).sum(0).double()
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

    def score(self, ids: Tensor) -> Scored:
        """Score candidates [N, l]; those that may not be handed in are dropped unasked, and count all the same."""
        self.evaluations += len(ids)
        rows = self.placed(ids)
        passed, rank = self._passed(ids, rows)
        score = torch.full((len(ids),), torch.inf, dtype=torch.float64)
        reached = torch.zeros(len(ids), len(self.x), dtype=torch.bool)
        if bool(passed.any()):
            chosen = passed.nonzero().squeeze(1)
            score[chosen.cpu()], reached[chosen.cpu()] = self._asked(ids.shape[1], rows[:, chosen])
        return Scored(ids, score, reached, rank if not bool(passed.any()) else score)

    def _passed(self, ids: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Which candidates may be scored, bool [N], and in what order those come that may not."""
        passed = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        rank = torch.zeros(len(ids), dtype=torch.float64)
        if self.attack.require_retokenizable and ids.shape[1]:
            survives = self.survives(rows)
            passed = survives if bool(survives.any()) else passed
        if (limit := self.limit) is not None and ids.shape[1]:
            perplexity = self.perplexity(rows)
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

    def perplexity(self, rows: Tensor) -> Tensor:
        """The largest perplexity, over rows and models, of the user's turn in transcripts [n, N, 2, W]; float64 [N]."""
        view = self.asking("likelihood", lambda model: model.likelihood())
        self._count(rows.shape[1], int((rows[0, 0, 1] == SLOT).sum()), reads=True)
        logp = view(rows.flatten(0, 1), self._of(rows.shape[1])).double()
        worst = turn_perplexity(logp, rows.flatten(0, 1)).amax(1)
        return worst.view(rows.shape[:2]).amax(0).nan_to_num(nan=torch.inf, posinf=torch.inf)

    def _asked(self, length: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [N] and successes [N, n] of transcripts [n, N, 2, W], on the CPU."""
        n, count = rows.shape[:2]
        of, flat = self._of(count), rows.flatten(0, 1)
        objective = self.attack.aim
        self._count(count, length)
        if objective == "mia":
            view = self.asking("likelihood", lambda model: model.likelihood())
            loss = turn_perplexity(view(flat, of).double(), flat).sum(1)
            reached = torch.zeros_like(loss, dtype=torch.bool)
        elif objective == "untargeted":
            loss = self._hallucinated(flat, of, count)
            reached = torch.zeros_like(loss, dtype=torch.bool)
        else:
            answer = self._answer(flat, of)
            goal, good = self.goal.take(of), finite_rows(answer)
            loss = torch.where(good, goal.loss(answer).double(), torch.inf)
            reached = goal.reached(answer) & good
        loss = loss.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.inf)
        both = torch.stack((loss, reached.double())).reshape(2, n, count).cpu()  # one wait for the device
        return both[0].sum(0), both[1].T > 0

    def _answer(self, rows: Tensor, of: Tensor) -> Tensor:
        attack = self.attack
        if attack.aggregate == "nll" and attack.under is None and len(self._models) <= 1:
            return self.oracle(rows, of)
        view = self.asking(
            "score", attack.under or (lambda model: model), lambda answers: combined(answers, attack.aggregate)
        )
        answer: Tensor = view(rows, of)
        return answer

    def _hallucinated(self, rows: Tensor, of: Tensor, count: int) -> Tensor:
        attack: Any = self.attack

        def ask(model: Any) -> Hallucination:
            self._hallucinations.append(Hallucination(model, rows.new_empty(0)))
            return self._hallucinations[-1]

        view = self.asking("hallucination", ask)
        uniforms = self.noise((attack.trials, attack.reply), "reply", len(self.trace))
        for each in self._hallucinations:
            each.uniforms = uniforms
        score: Tensor = view(rows, of)[..., 0].sum(1)
        return score

    # ---- the best so far ---------------------------------------------------------------------------------------------

    def offer(self, scored: Scored) -> bool:
        """Take the best of these candidates where it beats what is held; whether one did."""
        if not len(scored.score):
            return False
        fell = scored.reached.sum(1) if self.attack.keep == "reached" else torch.zeros(len(scored.score))
        fell = torch.where(torch.isfinite(scored.score), fell, -1)
        index = int(torch.where(fell == fell.max(), scored.score, torch.inf).argmin())  # the first of equals
        score, most = float(scored.score[index]), float(fell[index])
        held = sum(self.best.reached) if self.attack.keep == "reached" else 0
        if not math.isfinite(score) or (-most, score) >= (-held, self.best.score):
            return False
        reached = tuple(bool(one) for one in scored.reached[index])
        self.best = Candidate(scored.ids[index].clone(), score, reached)
        return True

    @property
    def succeeded(self) -> bool:
        """Whether the attack ends with a success, and has one in every row."""
        return self.attack.stop_on_success and all(self.best.reached)

    def begin(self) -> bool:
        """Score the untouched rows; False where the search is over already."""
        if not self.affordable(1, 0):
            return False
        if self.attack.aim != "mia":  # a member is asked about with a suffix or not at all
            scored = self.score(self.empty())
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
        write = getattr(self.oracle, "note", None)
        if write is not None:
            for row in range(len(self.x)):
                write(row, figures)

    # ---- budgets -----------------------------------------------------------------------------------------------------

    def goes_on(self) -> bool:
        """Whether there is time for another step as long as the last one; to be asked before every step."""
        now = time.monotonic()
        last, self.stepped = now - self.stepped, now
        return self.attack.seconds is None or now - self.started + last < self.attack.seconds

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


def turn_perplexity(logp: Tensor, rows: Tensor) -> Tensor:
    """Perplexity [n, models] of the user's turn from log-probabilities [n, models, W] of transcripts [n, 2, W]."""
    said = (rows[:, 1] == USER) | (rows[:, 1] == SLOT) | (rows[:, 1] == REREAD)
    total = torch.where(said[:, None], logp, 0.0).sum(2)
    return (-total / said.sum(1, keepdim=True).clamp(min=1)).exp()


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
    kept = (mass - ranked.exp() < top_p).scatter(1, order, mass - ranked.exp() < top_p)
    return normal(torch.where(kept, logp, -torch.inf))


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
