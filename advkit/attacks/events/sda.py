"""SDA, the sparse dynamic attack on binary event frames, and the flips it is measured against (arXiv 2503.03272).

Written from the published description alone. Where that leaves a question open or its code has a fault, the docstrings
say what is done here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from advkit.attacks.base import TensorGoal, TensorOracle, finite_rows
from advkit.attacks.events.spiking import OWN, under_rule
from advkit.attacks.wrappers import averaged
from advkit.core.checks import at_least_one, check
from advkit.core.errors import BadModel, UsageError
from advkit.core.protocols import Access, MadeForThreatModel, Rng, Stepped
from advkit.threat_models.events import Flips

DEFAULT_RULE = "pdsg"
HELD = 2**24  # bits whose scores are kept at the same time: rows beyond that come in the next group
LANE = 64  # candidates come in multiples of the oracle's own calls, which pads what is left over


@dataclass(frozen=True)
class Found:
    """What a search for flips knows per row; the harness asks the victim again and believes none of it.

    x:         the rows with their flips [B, ...]; the clean row where the search failed
    reached:   whether it succeeded, bool [B]
    steps:     iterations of the generation phase, long [B]
    before:    flips when that phase ended, long [B]
    flips:     flips in the end, long [B]; 0 where the search failed
    forwards:  rows sent through the victim, long [B]; backwards: gradients, long [B]
    """

    x: Tensor
    reached: Tensor
    steps: Tensor
    before: Tensor
    flips: Tensor
    forwards: Tensor
    backwards: Tensor


def seen_through(surrogate: str) -> Callable[[Any], Any]:
    """The view of a model under a backward rule for its spikes.

    The default rule leaves a model without spikes alone, which has gradients of its own; another rule, asked for by
    name, must not be passed over: UsageError.
    """

    def view(model: Any) -> Any:
        if surrogate == OWN:
            return model
        try:
            return under_rule(model, surrogate)
        except BadModel as error:
            if surrogate == DEFAULT_RULE:
                return model
            raise UsageError(f"surrogate={surrogate}: {error} (or say surrogate={OWN})") from error

    return view


@dataclass(frozen=True, kw_only=True)
class SDA(Stepped, MadeForThreatModel):
    """Sparse dynamic attack (SDA): flips the bits whose flip alone brings the goal nearer, then restores what it can.

    Each of up to `steps` iterations asks for one gradient, tries the best bits it points at one by one, flips all whose
    flip alone does not take the goal farther away, and looks at the result. Once the goal is reached, a binary search
    finds how many of the least useful flips can be restored.

    steps:        iterations of the generation phase, >= 1
    k_init:       bits tried in iteration n (from 0): (n + 1) * k_init, never more than there are left. Keep it below a
                  tenth of the row's bits: all that help alone are flipped at once
    surrogate:    backward rule of a spiking victim, by name or spec, or "own" for the gradient as it comes. The
                  default is left aside where the victim has no spikes; rules with a memory start afresh at every step
    early:        as soon as a single flip of those tried reaches the goal, flip that one and go to the reduction
    prefix:       where several bits help, try them added up in the order of their margins, and flip the shortest such
                  prefix that reaches the goal
    prune:        after the reduction, restore single bits, the one that leaves the goal most clearly reached first,
                  until none can be spared: the result is 1-minimal
    filter:       try the bits one by one; False flips all that the gradient names (for comparison)
    reduce:       take back flips by binary search (False for comparison)
    eot:          gradients and answers averaged per question, for victims whose answers vary from call to call
    max_forwards: most rows sent through the victim for one row; None for no limit. A row that runs out fails, or keeps
                  what it has where it reached the goal already
    chunk:        most numbers in one batch of candidates; changes no result, only memory

    Works in `flips`, for every goal: the loss is the goal's margin, cut off at 0, success is the goal reached. Within
    flips:n=... a row that needs more than n flips comes back unchanged, as does one that never reached its goal.

    Where the publication is silent: bits are never selected twice, k is clamped to the bits left, ties go to the lower
    index, bits that do not contribute fill up at random below all that do (the published code draws values that may
    rank above), a bit already tried at the very same point is not queried again, and a row leaves when all its bits
    were tried there in vain. Restoring every flip is never tried: the clean row did not reach the goal.
    Raises UsageError for settings out of range and for threat models other than `flips`.
    """

    needs: ClassVar[Access] = Access.GRADIENTS
    default_threat_model: ClassVar[str] = "flips"
    minimal: ClassVar[bool] = True  # looks for the fewest flips

    steps: int = 500
    k_init: int = 10
    surrogate: str = DEFAULT_RULE
    early: bool = False
    prefix: bool = False
    prune: bool = False
    filter: bool = True
    reduce: bool = True
    eot: int = 1
    max_forwards: int | None = None
    chunk: int = 2**22

    def __post_init__(self) -> None:
        at_least_one(self, "steps", "k_init", "eot", "chunk", "max_forwards")
        check(self, "surrogate", bool(self.surrogate), f"a surrogate gradient such as {DEFAULT_RULE}, or own")

    def __call__(self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, threat: Any, rng: Rng, /) -> Tensor:
        return self.find(oracle, x, goal, threat, rng).x

    def find(self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, threat: Any, rng: Rng) -> Found:
        """The attack, and what it knows of the rows."""
        flips = bits_only(threat, "sda")
        view = averaged(oracle.seen_as(seen_through(self.surrogate), decides=True), self.eot)
        parts = []
        for rows in groups(x):
            parts.append(_Search(self, view.take(rows), x[rows], goal.take(rows), flips, rng.take(rows)).run())
        return merged(parts, x)


@dataclass(frozen=True, kw_only=True)
class TopKGrad(Stepped, MadeForThreatModel):
    """Top-k gradient flips, SDA's baseline: flips the bits of the largest gradient, a few more every step.

    steps:     iterations, >= 1
    k_init:    iteration n (from 0) flips (n + 1) * k_init bits more, never more than there are left
    surrogate: backward rule of a spiking victim, as in `sda`

    A row stops with the first step that reaches its goal; nothing is taken back. Works in `flips`.
    """

    needs: ClassVar[Access] = Access.GRADIENTS
    default_threat_model: ClassVar[str] = "flips"
    minimal: ClassVar[bool] = False

    steps: int = 500
    k_init: int = 10
    surrogate: str = DEFAULT_RULE

    def __post_init__(self) -> None:
        at_least_one(self, "steps", "k_init")

    def __call__(self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, threat: Any, rng: Rng, /) -> Tensor:
        bits_only(threat, "topk_grad")
        inner = SDA(steps=self.steps, k_init=self.k_init, surrogate=self.surrogate, filter=False, reduce=False)
        return inner(oracle, x, goal, threat, rng)


@dataclass(frozen=True, kw_only=True)
class RandomFlips(MadeForThreatModel):
    """Random flips, the baseline without gradients: flips bits drawn at random, twice as many at every try.

    first:    flips of the first try; later tries double them, up to all bits that may be flipped (or the budget)
    restarts: orders of the bits that are tried; the fewest flips count

    A try contains the flips of those before it. Needs decisions alone. Works in `flips`.
    """

    needs: ClassVar[Access] = Access.LABELS
    default_threat_model: ClassVar[str] = "flips"
    minimal: ClassVar[bool] = False

    first: int = 10
    restarts: int = 1

    def __post_init__(self) -> None:
        at_least_one(self, "first", "restarts")

    def __call__(self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, threat: Any, rng: Rng, /) -> Tensor:
        flips = bits_only(threat, "random_flips")
        parts = [self._group(oracle.take(r), x[r], goal.take(r), flips, rng.take(r)) for r in groups(x)]
        return torch.cat(parts) if parts else x.clone()

    def _group(self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, threat: Flips, rng: Rng) -> Tensor:
        flat = x.flatten(1)
        allowed = threat.allowed(x).flatten(1)
        most = allowed.sum(1)
        if threat.n is not None:
            most = most.clamp_max(threat.n)
        best, fewest = torch.zeros_like(allowed), torch.full_like(most, flat.shape[1] + 1)
        left = oracle.left
        queries = torch.zeros_like(most)
        for restart in range(self.restarts):
            order = _places(rng.at("order", restart).uniform(flat), allowed)
            count = torch.full_like(most, self.first)
            active = (most > 0).nonzero().squeeze(1)
            while True:
                if left is not None:
                    active = active[queries[active] < left]
                if not len(active):
                    break
                size = torch.minimum(count[active], most[active])
                chosen = order[active] < size[:, None]
                answer = oracle(Flips.flipped(x[active], chosen), active)
                queries[active] += 1
                reached = goal.take(active).reached(answer) & finite_rows(answer)
                fewer = reached & (size < fewest[active])
                best[active[fewer]], fewest[active[fewer]] = chosen[fewer], size[fewer]
                done = reached | (size >= most[active])
                count[active] = 2 * count[active]
                active = active[~done]
        return Flips.flipped(x, best)


def bits_only(threat: Any, name: str) -> Flips:
    """The threat model as flips; UsageError for any other."""
    if isinstance(threat, Flips):
        return threat
    raise UsageError(
        f"{name} was asked for {type(threat).__name__}; it flips bits of binary events and works in flips (as few as "
        "possible) or flips:n=... (at most n)"
    )


def groups(x: Tensor) -> list[Tensor]:
    """The rows, long, in groups that are searched together."""
    rows = torch.arange(len(x), device=x.device)
    return list(torch.split(rows, max(1, HELD // max(1, x[:1].numel())))) if len(x) else []


def merged(parts: list[Found], x: Tensor) -> Found:
    """What is known of all the groups, in order."""
    if not parts:
        none = torch.zeros(0, dtype=torch.long, device=x.device)
        return Found(x.clone(), none.bool(), none, none, none, none, none)
    return Found(*(torch.cat([vars(part)[name] for part in parts]) for name in Found.__dataclass_fields__))


def _places(key: Tensor, among: Tensor) -> Tensor:
    """Long [B, P]: each bit's place in the order of its key among the bits named; P for the others.

    The lower index comes first among equals.
    """
    order = torch.where(among, key, torch.inf).sort(dim=1, stable=True).indices
    place = torch.empty_like(order).scatter_(1, order, torch.arange(key.shape[1], device=key.device).expand_as(order))
    return torch.where(among & torch.isfinite(key), place, key.shape[1])


def _ranked(key: Tensor, row: Tensor, rows: int) -> Tensor:
    """Long [n]: each value's place in the order of its key among those of its row, the first among equals first.

    row: long [n], which of `rows` rows each value belongs to
    """
    order = key.sort(stable=True).indices
    order = order[row[order].sort(stable=True).indices]
    count = torch.bincount(row, minlength=rows)
    start = (count.cumsum(0) - count)[row[order]]
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device) - start)


def _best(key: Tensor, k: Tensor) -> Tensor:
    """Bool [B, P]: the k [B] largest keys of each row, the lower index first among equals."""
    most = int(k.max()) if len(k) else 0
    if most == 0:
        return torch.zeros_like(key, dtype=torch.bool)
    values = key.topk(most, dim=1).values
    border = values.gather(1, (k - 1).clamp_min(0)[:, None])
    above = key > border
    equal = key == border
    room = k - above.sum(1)
    tied = (equal.sum(1) > room).nonzero().squeeze(1)
    if len(tied):
        equal[tied] &= equal[tied].cumsum(1) <= room[tied, None]
    return (above | equal) & (k > 0)[:, None]


def _lowest(value: Tensor, row: Tensor, rows: int) -> Tensor:
    """Long [rows]: for each row the place in `value` of its lowest one, the first among equals; -1 for a row without.

    row: long [n], which row each value belongs to
    """
    lowest = torch.full((rows,), torch.inf, dtype=value.dtype, device=value.device)
    lowest.scatter_reduce_(0, row, value, "amin")
    places = torch.arange(len(value), device=value.device)
    first = torch.full((rows,), len(value), device=value.device)
    here = value == lowest[row]
    first.scatter_reduce_(0, row[here], places[here], "amin")
    return torch.where(first < len(value), first, -1)


class _Search:
    """One group of rows on its way.

    chosen: bool [B, P], the bits flipped so far; change: what each changed by itself, +inf for the others
    point:  [B, P], the rows with these flips
    """

    def __init__(self, attack: SDA, oracle: TensorOracle, x: Tensor, goal: TensorGoal, threat: Flips, rng: Rng) -> None:
        self.attack, self.oracle, self.goal, self.threat, self.rng = attack, oracle, goal, threat, rng
        self.x, self.flat = x, x.flatten(1)
        self.point = self.flat.clone()
        self.aim = goal.under("margin")
        self.allowed = threat.allowed(x).flatten(1)
        self.chosen = torch.zeros_like(self.allowed)
        self.change = torch.full_like(self.flat, torch.inf)
        self.promise = torch.zeros_like(self.flat)  # |gradient| where a flip follows it downhill, 0 elsewhere
        self.tried = torch.zeros_like(self.allowed)  # in vain, at the row's present point
        self.level = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        self.queries = torch.zeros(len(x), dtype=torch.long, device=x.device)
        self.gradients = torch.zeros_like(self.queries)
        self.broken = torch.zeros_like(self.level, dtype=torch.bool)
        # Every row has the same to spend, and all that it spends is spent here.
        budgets = [b for b in (oracle.left, attack.max_forwards and attack.max_forwards // attack.eot) if b is not None]
        self.budget = min(budgets) if budgets else None

    def room(self, rows: Tensor) -> Tensor:
        """How many questions these rows may still ask, long [n]."""
        if self.budget is None:
            return torch.full_like(rows, torch.iinfo(torch.long).max)
        return self.budget - self.queries[rows]

    def run(self) -> Found:
        steps = self._generate()
        before = self.chosen.sum(1)
        broken = self.broken.nonzero().squeeze(1)
        if self.attack.reduce:
            self._reduce(broken)
        if self.attack.prune:
            self._prune(broken)
        flipped = Flips.flipped(self.x, self.chosen & self.broken[:, None])
        x = self.threat.within(flipped, self.x)
        kept = (x != self.x).flatten(1).sum(1)
        return Found(
            x,
            self.broken & (kept == (self.chosen & self.broken[:, None]).sum(1)),
            steps,
            before,
            kept,
            self.queries * self.attack.eot,
            self.gradients * self.attack.eot,
        )

    def _generate(self) -> Tensor:
        """Flip bits until the goal is reached; the iterations of every row, long [B]."""
        steps = torch.zeros_like(self.queries)
        active = torch.arange(len(self.x), device=self.x.device)
        moved = active
        for step in range(self.attack.steps + 1):
            lost = self._look(moved)
            active = active[~(self.broken[active] | lost[active])]
            if not len(active) or step == self.attack.steps:
                break
            steps[active] = step + 1
            moved, stuck = self._flip(active, step)
            active = active[~stuck]
            if len(moved):
                moved = moved[~self.broken[moved]]
        return steps

    def _look(self, rows: Tensor) -> Tensor:
        """Ask about the points of these rows, with gradient; bool [B], which rows can't afford it."""
        lost = torch.zeros_like(self.broken)
        short = self.room(rows) < 1
        lost[rows[short]] = True
        rows = rows[~short]
        if not len(rows):
            return lost
        aim = self.aim.take(rows)
        z = self.point.index_select(0, rows).view(-1, *self.x.shape[1:])
        # Through an oracle of just these rows, which notices where a gradient is zero.
        _, gradient, answer = self.oracle.take(rows).gradient(z, aim)
        self.queries[rows] += 1
        self.gradients[rows] += 1
        margin, reached = self._judged(answer, rows)
        # The clean row counts as a success only where the victim's word here is the verdict's.
        self.broken[rows] = reached & (self.chosen[rows].any(1) | self.oracle.decides)
        self.level[rows] = margin.clamp_min(0)
        downhill = (2 * z).sub_(1).mul_(gradient).clamp_min_(0)
        self.promise.index_copy_(0, rows, downhill.flatten(1))
        self.tried.index_fill_(0, rows, False)
        return lost

    def _judged(self, answer: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Margins [n] and successes [n] of answers that belong to these rows."""
        goal = self.goal.take(rows)
        return goal.margin(answer).to(self.level.dtype), goal.reached(answer) & finite_rows(answer)

    def _flip(self, active: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """One iteration: the rows that moved, long, and those of `active` that can't get on, bool."""
        open_ = self.allowed.index_select(0, active) & ~self.chosen.index_select(0, active)
        left = open_.sum(1)
        wanted = ((step + 1) * self.attack.k_init * torch.ones_like(left)).minimum(left)
        # One question is kept for the look at what comes of the flips.
        k = wanted.minimum((self.room(active) - 1).clamp_min(0)) if self.attack.filter else wanted
        picked = _best(self._keys(active, open_, k, step), k) & open_
        if not self.attack.filter:
            place = picked.nonzero()
            row, bit = active[place[:, 0]], place[:, 1]
            self._select(row, bit, -self.promise[row, bit])
            moved = torch.zeros_like(self.broken)
            moved[row] = True
            return moved.nonzero().squeeze(1), ~moved[active]
        place = (picked & ~self.tried.index_select(0, active)).nonzero()
        row, bit = active[place[:, 0]], place[:, 1]
        margin, reached = self._ask(row, lambda part: self._single(row[part], bit[part]))
        change = margin.clamp_min(0) - self.level[row]
        helps = change <= 0  # False for NaN
        if self.oracle.decides:
            self.tried[row, bit] = True
        if self.attack.early:
            helps = helps & ~self._settled(row, bit, margin, change, reached)
        if self.attack.prefix:
            helps = helps & ~self._shortened(row, bit, margin, change, reached, helps)
        self._select(row[helps], bit[helps], change[helps])
        moved = torch.zeros_like(self.broken)
        moved[row[helps]] = True
        gone = moved | self.broken
        # At an unmoved point only bits not tried yet can help; where none is left, or affordable, the row is done.
        stuck = ~gone[active] & ((k == left) | (k < wanted)) if self.oracle.decides else (left == 0) | (k < 1)
        return moved.nonzero().squeeze(1), stuck | self.broken[active]

    def _keys(self, active: Tensor, open_: Tensor, k: Tensor, step: int) -> Tensor:
        """What bits are ranked by: contributing ones by their gradient, the others at random below them."""
        key = self.promise.index_select(0, active)
        contributes = open_ & (key > 0)
        key = torch.where(contributes, key, -1.0)
        # Where all the bits are taken there is nothing to draw for.
        short = ((contributes.sum(1) < k) & (k < open_.sum(1))).nonzero().squeeze(1)
        if len(short):
            rows = active[short]
            drawn = self.rng.take(rows).at("filler", step).uniform(self.flat[rows]) - 1  # in [-1, 0)
            key[short] = torch.where(contributes[short], key[short], drawn)
        return torch.where(open_, key, -2.0)

    def _select(self, row: Tensor, bit: Tensor, change: Tensor) -> None:
        self.chosen[row, bit] = True
        self.change[row, bit] = change
        self.point[row, bit] = 1 - self.flat[row, bit]

    def _unselect(self, row: Tensor, bit: Tensor) -> None:
        self.chosen[row, bit] = False
        self.point[row, bit] = self.flat[row, bit]

    def _single(self, row: Tensor, bit: Tensor) -> Tensor:
        """Rows at their present points with one bit more flipped, or one of their flips undone."""
        # Whole rows are copied once: a mask over all their bits would cost more than a small network's forward.
        z = self.point.index_select(0, row)
        each = torch.arange(len(row), device=row.device)
        z[each, bit] = 1 - z[each, bit]
        return z

    def _with(self, rows: Tensor, candidate: Tensor, row: Tensor, bit: Tensor) -> Tensor:
        """Rows at their points, [n, P], with more bits flipped or restored: those of their candidates, long [m]."""
        z = self.point.index_select(0, rows)
        z[candidate, bit] = 1 - self.point[row, bit]
        return z

    def _ask(self, row: Tensor, points: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Margins and successes [n] of candidates, many rows' in one batch.

        row: whose each is, long [n]; points: some of them, long -> [m, P]
        """
        size = max(1, self.attack.chunk // max(1, self.flat.shape[1]))
        size -= size % LANE if size > LANE else 0
        margins, successes = [self.level[:0]], [self.broken[:0]]
        for part in torch.split(torch.arange(len(row), device=row.device), size):
            rows = row[part]
            answer = self.oracle(points(part).view(-1, *self.x.shape[1:]), rows)
            margin, reached = self._judged(answer, rows)
            margins.append(margin)
            successes.append(reached)
        self.queries += torch.bincount(row, minlength=len(self.queries))
        return torch.cat(margins), torch.cat(successes)

    def _settled(self, row: Tensor, bit: Tensor, margin: Tensor, change: Tensor, reached: Tensor) -> Tensor:
        """`early`: end rows that one flip decides; bool [n], the candidates of these rows."""
        best = _lowest(torch.where(reached, margin, torch.inf), row, len(self.x))
        best = best[(best >= 0) & reached[best]]
        self._select(row[best], bit[best], change[best])
        self.broken[row[best]] = True
        return self.broken[row]

    def _shortened(
        self, row: Tensor, bit: Tensor, margin: Tensor, change: Tensor, reached: Tensor, helps: Tensor
    ) -> Tensor:
        """`prefix`: end rows that a nested prefix of the helpful bits decides; bool [n], the candidates of these."""
        rows = torch.zeros_like(self.broken)
        rows[row[helps]] = True
        index = rows.nonzero().squeeze(1)
        if not len(index):
            return torch.zeros_like(helps)
        number = torch.full_like(self.queries, -1)
        number[index] = torch.arange(len(index), device=row.device)
        who, what = row[helps], bit[helps]
        own = number[who]
        place = _ranked(margin[helps], own, len(index))
        count = torch.bincount(own, minlength=len(index))
        affords = count - 1 <= self.room(index) - 1
        count = torch.where(affords, count, 1)
        # The first bit alone was tried already; prefixes of two and more have to be.
        owner = torch.repeat_interleave(torch.arange(len(index), device=row.device), count - 1)
        start = (count - 1).cumsum(0) - (count - 1)
        length = torch.arange(len(owner), device=row.device) - start[owner] + 2

        def points(part: Tensor) -> Tensor:
            pairs = ((own == owner[part][:, None]) & (place < length[part][:, None])).nonzero()
            return self._with(index[owner[part]], pairs[:, 0], who[pairs[:, 1]], what[pairs[:, 1]])

        _, hit = self._ask(index[owner], points)
        never = self.flat.shape[1] + 1
        shortest = torch.full_like(count, never)
        shortest.scatter_reduce_(0, owner[hit], length[hit], "amin")
        shortest[own[reached[helps] & (place == 0)]] = 1
        decided = shortest < never
        first = (place < shortest[own]) & decided[own]
        self._select(who[first], what[first], change[helps][first])
        self.broken[index[decided]] = True
        return self.broken[row]

    def _reduce(self, rows: Tensor) -> None:
        """Restore the longest run of flips, the least useful first, that the goal can spare; by binary search."""
        flips = self.chosen[rows].nonzero()
        own, bit = flips[:, 0], flips[:, 1]
        row = rows[own]
        place = _ranked(self.change[row, bit].abs(), own, len(rows))
        count = torch.bincount(own, minlength=len(rows))
        # The flips of a candidate are those from a place on; restoring the last one, too, leaves the clean row.
        low, high, best = torch.zeros_like(count), count - 2, torch.zeros_like(count)
        while True:
            active = ((low <= high) & (self.room(rows) >= 1)).nonzero().squeeze(1)
            if not len(active):
                break
            middle = (low[active] + high[active]) // 2
            start = torch.zeros_like(count)
            start[active] = middle + 1
            number = torch.full_like(count, -1)
            number[active] = torch.arange(len(active), device=rows.device)
            undone = place < start[own]
            z = self._with(rows[active], number[own[undone]], row[undone], bit[undone])
            _, reached = self._ask(rows[active], lambda part, z=z: z[part])  # type: ignore[misc]
            best[active] = torch.where(reached, middle + 1, best[active])
            low[active] = torch.where(reached, middle + 1, low[active])
            high[active] = torch.where(reached, high[active], middle - 1)
        undone = place < best[own]
        self._unselect(row[undone], bit[undone])

    def _prune(self, rows: Tensor) -> None:
        """Restore single flips, the one that leaves the lowest margin first, until none can be spared."""
        while True:
            count = self.chosen[rows].sum(1)
            rows = rows[(count > 1) & (count <= self.room(rows))]
            if not len(rows):
                return
            place = self.chosen[rows].nonzero()
            row, bit = rows[place[:, 0]], place[:, 1]
            margin, reached = self._ask(row, lambda part, row=row, bit=bit: self._single(row[part], bit[part]))  # type: ignore[misc]
            best = _lowest(torch.where(reached, margin, torch.inf), row, len(self.x))
            best = best[(best >= 0) & reached[best]]
            self._unselect(row[best], bit[best])
            rows = row[best]
