"""Distance to a polyhedron of score orders, solved exactly for a whole batch (QuadAttacK, arXiv 2312.11510).

Head: logits = W z + b with features z. The nearest features at which every pair of classes (upper, lower) is ordered by
a margin solve a quadratic program whose dual needs only the logits and the Gram matrix S = W W^T:

    minimise 1/2 multipliers^T M multipliers - multipliers^T v over multipliers >= 0

with M = D S D^T, v = margin - D logits and one row e_upper - e_lower of D per pair. mu = D^T multipliers moves the
logits to logits + S mu, the features by W^T mu, and costs mu^T S mu. Its gradient at the logits is -2 mu; at the
features -2 W^T mu.

The solver is block principal pivoting (Kim and Park, SIAM J. Sci. Comput. 2011) on a growing working set of pairs. It
differs from the released attack, which stops an interior-point method at a median residual of 1e-2 in float32 and keeps
a pair that says nothing: every row here is solved to rounding and carries its certificate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from advkit.core.errors import BadInput, UsageError

MARGIN = 0.2  # of the released attack, in units of logits
_LANES = 16  # rows per product with S: one shape whatever the batch, so that a row's bits do not depend on its batch
_ALIGN = 8  # working sets are padded to this: all matrices of a batch lie alike in memory, so LAPACK treats them alike
_WIDTH = 64  # smallest first working set
_GROWTH = 1.5
_SPARE = 16  # pairs that a first working set holds beside those of a warm start
_PATIENCE = 3  # block flips without progress before single flips
_SOFT = 1e-2  # slack of pairs that can't all hold, in units of mean(diag S)
_WIDEST = 1024  # largest working set; of pairs that hold a solution in place, a few hundred are many
_FLIPS = 100  # linear systems per pass and row; a dozen are common
_STALLS = 3  # passes that a working set may miss its own margins before it counts as impossible
_PASSES = 64
_CELLS = 2**22  # entries of M held at a time


class _Precision(NamedTuple):
    """Ridge in units of mean(diag S); the rest in units of the largest |difference of a pair| + margin."""

    ridge: float
    exact: float  # a pair counts as met
    accept: float  # where rounding stops before `exact`, still good enough to be called solved
    gap: float


_PRECISION = {
    torch.float64: _Precision(ridge=1e-9, exact=1e-11, accept=1e-8, gap=1e-7),
    torch.float32: _Precision(ridge=1e-6, exact=1e-5, accept=1e-3, gap=1e-2),
}


class Pairs(NamedTuple):
    """Ordered pairs of classes, one constraint logits[upper] - logits[lower] >= margin each.

    upper, lower: class indices, long [B, R]
    always:       how many of the leading pairs belong to every working set (the chain of an ordered list)
    """

    upper: Tensor
    lower: Tensor
    always: int = 0


def ordered_pairs(targets: Tensor, classes: int) -> Pairs:
    """targets[:, 0] above targets[:, 1] above ... above every other class; R = classes - 1.

    targets: distinct classes, long [B, K] with 1 <= K <= classes. Raises BadInput otherwise.
    """
    others = _others(targets, classes)
    chain = targets.shape[1] - 1
    last = targets[:, -1:].expand(-1, others.shape[1])
    upper = torch.cat([targets[:, :-1], last], dim=1)
    return Pairs(upper, torch.cat([targets[:, 1:], others], dim=1), chain)


def unordered_pairs(targets: Tensor, classes: int) -> Pairs:
    """Every target above every other class, in any order among themselves; R = K (classes - K)."""
    others = _others(targets, classes)
    rows, k = targets.shape
    shape = (rows, k, others.shape[1])
    upper = targets.unsqueeze(2).expand(shape).reshape(rows, -1)
    return Pairs(upper, others.unsqueeze(1).expand(shape).reshape(rows, -1))


def out_of_topk_pairs(labels: Tensor, above: Tensor) -> Pairs:
    """Each of the classes `above` [B, K] over the true class [B], which then is out of the top K; R = K.

    The set of scores whose top K misses the true class is a union of such polyhedra, one for each choice of `above`.
    """
    if labels.ndim != 1 or above.ndim != 2 or len(labels) != len(above):
        raise BadInput(f"labels {list(labels.shape)} and above {list(above.shape)}; expected [B] and [B, K]")
    if bool((above == labels.unsqueeze(1)).any()):
        raise BadInput("a true class is among the classes that go above it; take it out of `above`")
    return Pairs(above, labels.unsqueeze(1).expand_as(above), above.shape[1])


def _others(targets: Tensor, classes: int) -> Tensor:
    """The classes that are not targets, ascending, long [B, classes - K]."""
    if not isinstance(targets, Tensor) or targets.ndim != 2 or targets.dtype != torch.int64:
        seen = f"{targets.dtype} {list(targets.shape)}" if isinstance(targets, Tensor) else type(targets).__name__
        raise BadInput(f"targets are {seen}; expected distinct class indices, a long tensor [B, K]")
    k = targets.shape[1]
    if not 1 <= k <= classes:
        raise BadInput(f"{k} targets among {classes} classes; expected 1 to {classes}")
    if targets.numel():
        low, high = (int(value) for value in torch.aminmax(targets))
        if low < 0 or high >= classes:
            raise BadInput(f"targets from {low} to {high}; expected class indices 0..{classes - 1}")
    taken = torch.zeros(len(targets), classes, dtype=torch.bool, device=targets.device).scatter_(1, targets, True)
    if targets.numel() and int(taken.sum(1).min()) < k:
        raise BadInput("a row of targets names a class twice; expected distinct classes")
    return taken.to(torch.uint8).argsort(dim=1, stable=True)[:, : classes - k]


def gram(weight: Tensor) -> Tensor:
    """S = W W^T in float64, [C, C], of a head's weight [C, d]; computed once per model."""
    if weight.ndim != 2:
        raise BadInput(f"a head's weight of shape {list(weight.shape)}; expected [classes, features]")
    weight = weight.detach().to(torch.float64)
    return weight @ weight.T


@dataclass(frozen=True, kw_only=True, eq=False)
class Solution:
    """The nearest point of each row's polyhedron, and how far the solver can vouch for it.

    loss:        squared distance [B]; of rows without a solution the soft problem's value (see `solve`)
    mu:          how the logits have to move before S: logits + S mu is nearest, features + W^T mu [B, C]
    gap:         |multipliers^T v - mu^T S mu| / loss [B], 0 at the optimum
    residual:    largest margin still missing at logits + S mu, in logits [B]; 0 where all hold
    feasible:    every pair can hold and does, up to rounding, bool [B]; False for logits that are not finite
    rounds:      linear systems solved, long [B]; 0 where every pair held already
    multipliers: one per pair [B, R]: the warm start of the next call
    """

    loss: Tensor
    mu: Tensor
    gap: Tensor
    residual: Tensor
    feasible: Tensor
    rounds: Tensor
    multipliers: Tensor

    @property
    def support(self) -> Tensor:
        """The pairs that hold the solution in place, bool [B, R]."""
        return self.multipliers > 0

    def take(self, rows: Tensor) -> Solution:
        """The solutions of a subset of the rows (long or bool index)."""
        return replace(self, **{entry.name: getattr(self, entry.name)[rows] for entry in fields(self)})

    def surrogate(self, answer: Tensor) -> Tensor:
        """The loss [B] as a function of the logits it was solved at: this value, gradient -2 mu.

        A distance to a convex set is differentiable with twice the step back to the set as gradient, so nothing
        has to be differentiated through the solver.
        """
        slope = -2.0 * (self.mu.to(answer.dtype) * answer).sum(1)
        return self.loss.to(answer.dtype) + (slope - slope.detach())


def projection_loss(
    answer: Tensor,
    gram: Tensor | None,
    pairs: Pairs | tuple[Tensor, Tensor] | Tensor,
    margin: float | Tensor = MARGIN,
    *,
    warm: Solution | Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Squared distance of each row to its polyhedron, differentiable in the answer [B, C]; arguments as `solve`."""
    return solve(answer.detach(), gram, pairs, margin, warm=warm, dtype=dtype).surrogate(answer)


def solve(
    logits: Tensor,
    gram: Tensor | None,
    pairs: Pairs | tuple[Tensor, Tensor] | Tensor,
    margin: float | Tensor = MARGIN,
    *,
    warm: Solution | Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Solution:
    """Project each row of logits [B, C] onto the scores at which all its pairs hold by the margin.

    gram:   S [C, C] of the head (`gram(weight)`), or None for the identity: distances between logits themselves
    pairs:  Pairs, (upper, lower) long [B, R], or targets long [B, K] standing for `ordered_pairs`
    margin: one number, or a tensor that broadcasts to [B, R], in logits
    warm:   the solution of earlier, similar logits for the same pairs, or its multipliers [B, R]; changes the time only
    dtype:  float64, or float32 for a loss within 1e-3

    On the CPU a row's bits do not depend on the rows beside it. Rows whose pairs hold already cost nothing. A head with
    too few features may not be able to hold all pairs at once; such rows come back with feasible False and solve the
    soft problem, min |features|^2 + |missing margin|^2 / slack, slack = 1e-2 mean(diag S), of which loss is the value
    and -2 mu still the gradient. Rows whose logits are not finite come back with a NaN loss and mu = 0.
    Raises BadInput for shapes that do not fit, UsageError for another dtype.
    """
    if dtype not in _PRECISION:
        raise UsageError(f"the solver in {dtype}; expected torch.float64 or torch.float32")
    guess = warm.multipliers if isinstance(warm, Solution) else warm
    pairs = _checked(logits, gram, pairs, guess)
    with torch.no_grad():
        logits = logits.detach().to(dtype)
        metric = None if gram is None else gram.detach().to(device=logits.device, dtype=dtype)
        sound = torch.isfinite(logits).all(1)
        logits = torch.where(sound.unsqueeze(1), logits, 0.0)
        difference = logits.gather(1, pairs.upper) - logits.gather(1, pairs.lower)
        wanted = torch.as_tensor(margin, dtype=dtype, device=logits.device).expand(difference.shape)
        problem = _Problem(metric, pairs.upper, pairs.lower, wanted - difference, logits.shape[1], pairs.always)
        if not pairs.upper.shape[1]:
            return _trivial(problem, sound)
        unit = (difference.abs() + wanted.abs()).amax(1)
        start = torch.zeros_like(difference) if guess is None else guess.to(difference)
        hard = _solve(problem, unit, sound, start, slack=0.0)
        return _finished(problem, unit, sound, hard)


def _checked(
    logits: Tensor, gram: Tensor | None, pairs: Pairs | tuple[Tensor, Tensor] | Tensor, guess: Tensor | None
) -> Pairs:
    if logits.ndim != 2 or not logits.is_floating_point():
        raise BadInput(f"logits are {logits.dtype} {list(logits.shape)}; expected floats [B, C]")
    rows, classes = logits.shape
    if isinstance(pairs, Tensor):
        pairs = ordered_pairs(pairs, classes)
    elif not isinstance(pairs, Pairs):
        pairs = Pairs(*pairs)
    if gram is not None and gram.shape != (classes, classes):
        raise BadInput(f"a Gram matrix {list(gram.shape)} for {classes} classes; expected {[classes, classes]}")
    if pairs.upper.shape != pairs.lower.shape or pairs.upper.ndim != 2 or len(pairs.upper) != rows:
        raise BadInput(
            f"pairs {list(pairs.upper.shape)} and {list(pairs.lower.shape)} for {rows} samples; expected "
            f"[{rows}, R] twice"
        )
    if guess is not None and guess.shape != pairs.upper.shape:
        raise BadInput(
            f"a warm start with multipliers {list(guess.shape)}; "
            f"expected {list(pairs.upper.shape)}, the solution of the same pairs"
        )
    return pairs


@dataclass(frozen=True)
class _Problem:
    """The dual of a batch of projections; v = margin - difference [B, R]."""

    metric: Tensor | None
    upper: Tensor
    lower: Tensor
    v: Tensor
    classes: int
    always: int

    def take(self, rows: Tensor) -> _Problem:
        upper, lower, v = _rows(rows, self.upper, self.lower, self.v)
        return replace(self, upper=upper, lower=lower, v=v)

    @property
    def scale(self) -> float | Tensor:
        return 1.0 if self.metric is None else self.metric.diagonal().mean()

    def mu(self, multipliers: Tensor, index: Tensor) -> Tensor:
        """D^T multipliers [B, C] of the pairs named by index [B, w]."""
        mu = multipliers.new_zeros(len(multipliers), self.classes)
        mu.scatter_add_(1, self.upper.gather(1, index), multipliers)
        return mu.scatter_add_(1, self.lower.gather(1, index), -multipliers)

    def moved(self, mu: Tensor) -> Tensor:
        """S mu, row by row."""
        if self.metric is None:
            return mu
        rows = len(mu)
        padded = torch.cat([mu, mu.new_zeros(-rows % _LANES, self.classes)])
        return torch.cat([padded[i : i + _LANES] @ self.metric for i in range(0, len(padded), _LANES)])[:rows]

    def missing(self, move: Tensor) -> Tensor:
        """v - D move [B, R]: the margin that each pair still misses at logits + move."""
        return self.v - (move.gather(1, self.upper) - move.gather(1, self.lower))

    def matrix(self, index: Tensor) -> Tensor:
        """M restricted to the pairs named by index [B, w], as [B, w, w]."""
        upper, lower = self.upper.gather(1, index), self.lower.gather(1, index)
        across = self._between(upper, lower)
        return self._between(upper, upper).add_(self._between(lower, lower)).sub_(across).sub_(across.mT)

    def _between(self, left: Tensor, right: Tensor) -> Tensor:
        left, right = left.unsqueeze(2), right.unsqueeze(1)
        if self.metric is None:
            return (left == right).to(self.v.dtype)
        place = (left * self.classes + right).reshape(-1)
        return self.metric.reshape(-1).index_select(0, place).view(-1, left.shape[1], right.shape[2])


@dataclass(frozen=True)
class _Dual:
    """Where the working-set loop ended: multipliers [B, R], mu and move = S mu [B, C], bool solved [B]."""

    multipliers: Tensor
    mu: Tensor
    move: Tensor
    solved: Tensor
    rounds: Tensor


def _solve(problem: _Problem, unit: Tensor, wanted: Tensor, start: Tensor, slack: float) -> _Dual:
    """Solve the rows `wanted` on working sets that grow until no pair outside misses its margin.

    slack > 0 (in units of mean(diag S)) lets every pair miss slack * multiplier: the soft problem. At 0 a ridge keeps
    the linear systems regular; each pass starts from the multipliers of the one before (a proximal point step), so the
    ridge leaves no bias behind.
    """
    dtype = problem.v.dtype
    precision = _PRECISION[dtype]
    scale = problem.scale
    softness, ridge = slack * scale, (0.0 if slack else precision.ridge * scale)
    batch, pairs = problem.v.shape
    end = _Dual(
        multipliers=torch.zeros_like(problem.v),
        mu=problem.v.new_zeros(batch, problem.classes),
        move=problem.v.new_zeros(batch, problem.classes),
        solved=problem.v.amax(1) <= precision.exact * unit,
        rounds=torch.zeros(batch, dtype=torch.int64, device=problem.v.device),
    )
    multipliers = start.clamp_min(0.0)
    missing = problem.v
    if bool((multipliers > 0).any()):
        everything = torch.arange(pairs, device=start.device).expand(batch, -1)
        missing = problem.missing(problem.moved(problem.mu(multipliers, everything))) - softness * multipliers
    waiting = wanted & ~end.solved
    held = (multipliers > 0).sum(1)
    # Rows of a warm start begin at the first width that holds their own support: never at that of the rows beside them.
    width = max(_WIDTH, 4 * (problem.always + 1))
    while bool(waiting.any()):
        now = waiting & (held + _SPARE <= width) if width < min(pairs, _WIDEST) else waiting
        if bool(now.any()):
            _grow(problem, end, unit, now.nonzero().squeeze(1), multipliers, missing, width, softness, ridge)
        waiting = waiting & ~now
        width = _wider(width)
    return end


def _wider(width: int) -> int:
    return max(width + 32, math.ceil(width * _GROWTH))


def _grow(
    problem: _Problem,
    end: _Dual,
    unit: Tensor,
    left: Tensor,
    multipliers: Tensor,
    missing: Tensor,
    width: int,
    softness: float | Tensor,
    ridge: float | Tensor,
) -> None:
    """Solve the rows `left`, all on working sets of the same width, and write them into `end`."""
    precision = _PRECISION[problem.v.dtype]
    pairs = problem.v.shape[1]
    part = problem.take(left)
    unit, multipliers, missing = _rows(left, unit, multipliers, missing)
    stalls = torch.zeros_like(left)
    for _ in range(_PASSES):
        width = min(width, pairs, _WIDEST)
        index, real = _working_set(missing, multipliers, width, problem.always)
        found, settled, spent = _pivoted(part, index, real, multipliers, softness, ridge, precision.exact, unit)
        multipliers = torch.zeros_like(part.v).scatter_add_(1, index, found)
        mu = part.mu(found, index)
        move = part.moved(mu)
        missing = part.missing(move) - softness * multipliers
        inside = missing.gather(1, index).masked_fill(~real, -torch.inf).amax(1)
        worst = missing.amax(1)
        exact = settled & (worst <= precision.exact * unit)
        # What the working set itself can't hold, a larger one can't either: a few proximal steps, then give up on it.
        outside = worst > precision.accept * unit
        short = inside > torch.where(outside, precision.accept, precision.exact) * unit
        stalls = stalls + (~settled | short | (width == _WIDEST)).long()
        end.rounds[left] += spent
        for kept, value in ((end.multipliers, multipliers), (end.mu, mu), (end.move, move)):
            kept[left] = value
        quadratic = (mu * move).sum(1) + softness * multipliers.square().sum(1)
        gap = ((multipliers * part.v).sum(1) - quadratic).abs()
        end.solved[left] = exact | ((worst <= precision.accept * unit) & (gap <= precision.gap * quadratic))
        go = (~exact & (stalls < _STALLS)).nonzero().squeeze(1)
        if not len(go):
            return
        if len(go) < len(left):
            part = part.take(go)
            left, unit, stalls, multipliers, missing = _rows(go, left, unit, stalls, multipliers, missing)
        width = _wider(width)


def _pivoted(
    part: _Problem,
    index: Tensor,
    real: Tensor,
    multipliers: Tensor,
    softness: float | Tensor,
    ridge: float | Tensor,
    tolerance: float,
    unit: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`_pivot` on the working sets, as many rows at a time as memory should hold."""
    pieces = []
    step = max(1, _CELLS // index.shape[1] ** 2)
    for first in range(0, len(index), step):
        rows = torch.arange(first, min(first + step, len(index)), device=index.device)
        few, places = part.take(rows), index[rows]
        matrix = few.matrix(places)
        matrix.diagonal(dim1=1, dim2=2).add_(softness)
        centre = multipliers[rows].gather(1, places)
        pieces.append(_pivot(matrix, few.v.gather(1, places), centre, real[rows], ridge, tolerance, unit[rows]))
    found, settled, spent = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return found, settled, spent


def _working_set(missing: Tensor, multipliers: Tensor, width: int, always: int) -> tuple[Tensor, Tensor]:
    """The pairs to solve next, ascending, padded to a multiple of _ALIGN: index [B, w] and which entries are real.

    Those that hold the solution in place come first, then the leading ones, then what misses most.
    """
    urgency = missing.clone()
    urgency[:, :always] = torch.finfo(missing.dtype).max
    urgency.masked_fill_(multipliers > 0, torch.inf)
    index = urgency.topk(width, dim=1, sorted=False).indices.sort(dim=1).values
    padding = -width % _ALIGN
    index = torch.cat([index, index.new_zeros(len(index), padding)], dim=1)
    real = torch.arange(width + padding, device=index.device) < width
    return index, real.expand(len(index), -1)


def _pivot(
    matrix: Tensor,
    v: Tensor,
    centre: Tensor,
    real: Tensor,
    ridge: float | Tensor,
    tolerance: float,
    unit: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """x >= 0 with y = (M + ridge) x - v - ridge centre >= 0 and x y = 0, by block principal pivoting.

    Returns x [B, w] freed from the ridge where that keeps its signs, whether a row settled [B], linear systems [B].
    """
    rows, width = v.shape
    x_end = torch.zeros_like(v)
    settled = torch.zeros(rows, dtype=torch.bool, device=v.device)
    rounds = torch.zeros(rows, dtype=torch.int64, device=v.device)
    left = torch.arange(rows, device=v.device)
    passive = (centre > 0) & real
    fewest = torch.full_like(left, width + 1)
    patience = torch.full_like(left, _PATIENCE)
    place = torch.arange(width, device=v.device)
    target = v + ridge * centre.masked_fill(~real, 0.0)
    slack = (tolerance * unit).unsqueeze(1)
    for _ in range(_FLIPS):
        both = passive.unsqueeze(2) & passive.unsqueeze(1)
        system = torch.where(both, matrix, 0.0)
        system.diagonal(dim1=1, dim2=2).add_(torch.where(passive, ridge, 1.0))
        factor, failed = torch.linalg.cholesky_ex(system)
        x = _substitute(factor, torch.where(passive, target, 0.0))
        y = _product(matrix, x) + ridge * x - target
        rounds[left] += 1
        low = tolerance * x.abs().amax(1, keepdim=True)
        wrong = torch.where(passive, x < -low, (y < -slack) & real)
        count = wrong.sum(1)
        broken = (failed != 0) | ~torch.isfinite(x).all(1)
        over = (count == 0) & ~broken
        if bool((over | broken).any()):
            ended = over.nonzero().squeeze(1)
            x_end[left[ended]] = _without_ridge(*_rows(ended, matrix, v, factor, x, passive, real, low, slack))
            settled[left[ended]] = True
            go = (~(over | broken)).nonzero().squeeze(1)
            left, matrix, v, target, real, passive = _rows(go, left, matrix, v, target, real, passive)
            fewest, patience, slack, wrong, count, x = _rows(go, fewest, patience, slack, wrong, count, x)
        if not len(left):
            break
        better = count < fewest
        block = better | (patience > 0)
        patience = torch.where(better, _PATIENCE, (patience - 1).clamp_min(0))
        fewest = torch.where(better, count, fewest)
        last = place == torch.where(wrong, place, -1).amax(1, keepdim=True)
        passive = passive ^ torch.where(block.unsqueeze(1), wrong, last)
    else:
        x_end[left] = x.clamp_min(0.0)
    return x_end, settled, rounds


def _without_ridge(
    matrix: Tensor,
    v: Tensor,
    factor: Tensor,
    x: Tensor,
    passive: Tensor,
    real: Tensor,
    low: Tensor,
    slack: Tensor,
) -> Tensor:
    """Refine x to M x = v on its passive set; the ridged x where the signs would change."""
    refined = x
    for _ in range(2):
        refined = refined + _substitute(factor, torch.where(passive, v - _product(matrix, refined), 0.0))
    y = _product(matrix, refined) - v
    keeps = (torch.where(passive, refined >= -low, (y >= -slack) | ~real)).all(1, keepdim=True)
    return torch.where(keeps & torch.isfinite(refined), refined, x).clamp_min(0.0)


def _rows(rows: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.index_select(0, rows) for tensor in tensors)


def _substitute(factor: Tensor, right: Tensor) -> Tensor:
    return torch.cholesky_solve(right.unsqueeze(2), factor).squeeze(2)


def _product(matrix: Tensor, x: Tensor) -> Tensor:
    # Not bmm: its kernel for one matrix rounds otherwise than its kernel for several.
    return (matrix * x.unsqueeze(1)).sum(2)


def _trivial(problem: _Problem, sound: Tensor) -> Solution:
    """No pair at all: every point is in the polyhedron."""
    zero = torch.where(sound, 0.0, torch.nan).to(problem.v.dtype)
    return Solution(
        loss=zero,
        mu=problem.v.new_zeros(len(zero), problem.classes),
        gap=zero,
        residual=zero,
        feasible=sound,
        rounds=torch.zeros_like(sound, dtype=torch.int64),
        multipliers=torch.zeros_like(problem.v),
    )


def _finished(problem: _Problem, unit: Tensor, sound: Tensor, hard: _Dual) -> Solution:
    """The solution with its certificate; rows that the hard problem does not settle are solved softly."""
    unsolved = sound & ~hard.solved
    dual, softness = hard, torch.zeros_like(unit)
    if bool(unsolved.any()):
        soft = _solve(problem, unit, unsolved, torch.zeros_like(problem.v), slack=_SOFT)
        pick = unsolved.unsqueeze(1)
        dual = _Dual(
            multipliers=torch.where(pick, soft.multipliers, hard.multipliers),
            mu=torch.where(pick, soft.mu, hard.mu),
            move=torch.where(pick, soft.move, hard.move),
            solved=hard.solved,
            rounds=hard.rounds + soft.rounds,
        )
        softness = torch.where(unsolved, _SOFT * problem.scale, 0.0).to(unit.dtype)
    loss = (dual.mu * dual.move).sum(1) + softness * dual.multipliers.square().sum(1)
    loss = loss.clamp_min(0.0)
    gap = ((dual.multipliers * problem.v).sum(1) - loss).abs() / torch.where(loss > 0, loss, 1.0)
    return Solution(
        loss=loss.masked_fill(~sound, torch.nan),
        mu=dual.mu,
        gap=gap.masked_fill(~sound, torch.nan),
        residual=problem.missing(dual.move).amax(1).clamp_min(0.0).masked_fill(~sound, torch.nan),
        feasible=hard.solved & sound,
        rounds=dual.rounds,
        multipliers=dual.multipliers,
    )
