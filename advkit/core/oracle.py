"""The metered oracle: the only caller of victim models.

It answers what the threat model grants and nothing more, counts every forward, backward and query per row, enforces the
query budget, keeps NaN out of the attack while remembering who answered it, and evaluates in fixed-shape chunks so that
a row's bits do not depend on the batch it happens to travel in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from advkit.core.blame import BACKWARD, GOAL, MODEL, blame
from advkit.core.errors import AccessDenied, BudgetExhausted
from advkit.core.lanes import Lanes as Lanes
from advkit.core.meter import Meter as Meter
from advkit.core.noise import mixed
from advkit.core.protocols import (
    Access,
    CountsTokens,
    Data,
    DrawsByRow,
    Headed,
    Modular,
    NeedsAccess,
    Sloped,
    conforms,
)
from advkit.core.rows import all_finite, all_moving, finite_rows, plainly_finite, row_size, sizes_of
from advkit.core.state import frozen as frozen
from advkit.core.watching import watcher

log = logging.getLogger("advkit")


_engine: Callable[..., tuple[Tensor | None, ...]] | None = getattr(torch.autograd.graph, "_engine_run_backward", None)
"""What `torch.autograd.grad` calls at last; asked itself, since that one imports sympy, a second, for its checks."""


def _backward(end: Tensor, slope: Tensor, leaf: Tensor, again: bool) -> Tensor | None:
    """The gradient at the leaf, given the one at the end; None where no path leads there."""
    if _engine is None:
        return torch.autograd.grad(end, leaf, slope, retain_graph=again, allow_unused=True)[0]
    return _engine((end,), (slope,), again, False, (leaf,), allow_unreachable=True, accumulate_grad=False)[0]


class MeteredOracle:
    """All an attack sees of a model.

    model:   called on whole chunks; `modules()` is not touched here (see `frozen`)
    rows:    how many rows this oracle serves
    access:  NOTHING refuses all, LABELS answers one-hot decisions, SCORES the answers, GRADIENTS everything
    queries: answers each row may ask for; None is unlimited
    propagations: passes through the model that each row may cost, forward and backward ones together; None is unlimited
    differentiates: whether the attack takes gradients: of so many propagations are left half as many questions
    decides: its answers are the verdict's, so that a row which reached its goal may stop
    lanes:   shapes of the calls, where the model does not say its own; None pads nothing, so that a row's last bits may
             depend on its batch, and sends a model in training mode, which has batch statistics, all rows at once
    data:    what labelled data the attacker holds, for attacks that need some; None where none was handed over
    keys:    of the meter's rows, int64 on the CPU, for models that draw by row (`RowRng.keys`): every query of a row
             draws anew, whatever is asked beside it; None leaves such a model to torch's generators

    Raises AccessDenied and BudgetExhausted.
    """

    def __init__(
        self,
        model: Callable[[Any], Any],
        rows: int,
        access: Access = Access.GRADIENTS,
        queries: int | None = None,
        decides: bool = True,
        lanes: Lanes | None = None,
        meter: Meter | None = None,
        index: Tensor | None = None,
        data: Data | None = None,
        keys: Tensor | None = None,
        propagations: int | None = None,
        differentiates: bool = True,
    ) -> None:
        self.model = cast(Any, model)
        self.propagations = propagations
        self.differentiates = differentiates
        self.data = data
        self.keys = keys
        self._drawing = None if keys is None or not isinstance(self.model, DrawsByRow) else self.model
        self.rows = rows
        self.access = access
        self.queries = queries
        self.decides = decides
        self.lanes = Lanes.own(model) or lanes
        self.meter = meter or Meter(rows)
        self._index = index
        self._counting = self.model if isinstance(self.model, CountsTokens) else None
        self._segment = self.meter.segment(index)
        self._aims: tuple[Any, list[int], list[Any]] = (None, [], [])
        self._ones: Tensor | None = None
        self._times: Tensor | None = None  # how often this view holds each row of the meter
        if queries is not None or propagations is not None:
            rows_here = torch.arange(self.meter.rows) if index is None else index.cpu()
            self._times = torch.bincount(rows_here, minlength=self.meter.rows)
        # The meter's queries are looked up again only where somebody else has asked since `_known` calls.
        self._most, self._known = 0, -1

    def take(self, rows: Tensor) -> MeteredOracle:
        """The oracle of some of the rows (long or bool index); a row may come several times. The meter is shared."""
        rows = rows.nonzero().squeeze(1) if rows.dtype == torch.bool else rows
        index = rows if self._index is None else self._index.to(rows.device)[rows]
        return MeteredOracle(
            self.model,
            len(index),
            self.access,
            self.queries,
            self.decides,
            self.lanes,
            self.meter,
            index,
            self.data,
            self.keys,
            self.propagations,
            self.differentiates,
        )

    def note(self, row: int, figures: Mapping[str, Any]) -> None:
        """Keep what a step of the attack tells of one of this oracle's rows, for its record."""
        if not 0 <= row < self.rows:
            raise ValueError(f"a note on sample {row} of an oracle that serves {self.rows}")
        self.meter.note(int(self._global(torch.tensor([row]))), figures)

    @property
    def left(self) -> int | None:
        """Times that this view may still be asked about all its rows; None when unlimited."""
        if self._times is None:
            return None
        limits = []
        here = self._times > 0
        times, queries = self._times[here], self.meter.queries[here]
        if self.queries is not None:
            limits.append((self.queries, (self.queries - queries) // times))
        if self.propagations is not None:
            passes = self.propagations - queries - self.meter.backwards[here]
            limits.append((self.propagations, passes // (times * (2 if self.differentiates else 1))))
        return min((int(left.min()) if len(left) else most for most, left in limits), default=None)

    def __call__(self, x: Tensor, of: Tensor | None = None) -> Tensor:
        """Answers [n, ...] without gradient; `of` [n] says which row each candidate belongs to."""
        if self.access < Access.LABELS:
            raise AccessDenied("the attack asked for an answer; this threat model grants no access to the victim")
        self._spend(x, of)
        chunks, lanes = self._chunks(x)
        keys = self._keys(x, of, chunks)
        # Not inference mode, 2-5 % faster: a defense that optimises while it predicts must be able to.
        with torch.no_grad():
            parts = [self._forward(part, lanes, key)[: len(part)] for part, key in zip(chunks, keys, strict=True)]
        answer = parts[0].detach() if len(parts) == 1 else torch.cat(parts).detach()
        self._note(x, answer, of)
        if self.access == Access.LABELS and answer.ndim > 1:
            return nn.functional.one_hot(answer.argmax(1), answer.shape[1]).to(answer.dtype)
        return answer

    def gradient(self, x: Tensor, goal: Any, of: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Loss [n], each row's own gradient (no mean over the batch), answer [n, ...]: one forward and one backward.

        A non-finite loss comes back as +inf and a non-finite gradient entry as 0; the meter remembers the row.
        """
        self._may_differentiate()
        self._spend(x, of, 2)
        chunks, lanes = self._chunks(x)
        aims = [goal] if len(chunks) == 1 else self._aimed(goal, [len(part) for part in chunks], x.device)
        keys = self._keys(x, of, chunks)
        parts = [self._passed(*each, lanes) for each in zip(chunks, aims, keys, strict=True)]
        with torch.no_grad():
            loss, gradient, answer = parts[0] if len(parts) == 1 else (torch.cat(v) for v in zip(*parts, strict=True))
            if not (self._note(x, answer, of, gradient) and self._owned(gradient)):
                gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
            if loss.device.type != "cpu" or not all_finite(loss):
                loss = loss.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.inf)
            return loss, gradient, answer

    def gradients(self, x: Tensor, goals: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Losses [K, n] of several goals, their gradients [K, n, ...], answer [n, ...]: one forward and K backwards.

        What is not finite comes back as from `gradient`.
        """
        self._may_differentiate()
        self._spend(x, None, 1 + len(goals))
        chunks, lanes = self._chunks(x)
        rows = torch.split(torch.arange(len(x), device=x.device), [len(part) for part in chunks])
        keys = self._keys(x, None, chunks)
        losses: list[list[Tensor]] = [[] for _ in goals]
        gradients: list[list[Tensor]] = [[] for _ in goals]
        answers = []
        for part, own, key in zip(chunks, rows, keys, strict=True):
            leaf, answer = self._called(part, key, lanes)
            for which, goal in enumerate(goals):
                aim = goal if len(chunks) == 1 else goal.take(own)
                loss, gradient = self._differentiated(aim, answer, leaf, again=which < len(goals) - 1)
                losses[which].append(loss)
                gradients[which].append(gradient[: len(part)])
            answers.append(answer.detach())
        with torch.no_grad():
            each = [torch.cat(parts) for parts in gradients]
            answer = torch.cat(answers)
            self._note(x, answer, None, each[0])
            asked = ~torch.isfinite(row_size(x.detach())) if self.meter.looks else None
            others = [self._passed_back(more, None, asked) for more in each[1:]]
            stacked = torch.stack([each[0].nan_to_num(0.0, 0.0, 0.0), *others])
            loss = torch.stack([torch.cat(parts) for parts in losses])
            return loss.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.inf), stacked, answer

    def _may_differentiate(self) -> None:
        if self.access < Access.GRADIENTS:
            raise AccessDenied(
                f"the attack asked for a gradient; this threat model grants {self.access.name.lower()} only "
                "(use a query attack such as `square`, or grant access=gradients)"
            )

    def _owned(self, gradient: Tensor) -> bool:
        """Whether its rows share memory neither with one another nor with what is kept here."""
        if not gradient.is_contiguous():
            return False
        kept = self._ones
        return kept is None or gradient.untyped_storage().data_ptr() != kept.untyped_storage().data_ptr()

    def _passed(self, x: Tensor, goal: Any, keys: Tensor | None, lanes: Lanes) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, gradient and answer of one call of the model, as they come."""
        leaf, answer = self._called(x, keys, lanes)
        loss, gradient = self._differentiated(goal, answer, leaf)
        short = leaf.shape[0] != x.shape[0]
        return loss, gradient[: x.shape[0]] if short else gradient, answer.detach()

    def _called(self, x: Tensor, keys: Tensor | None, lanes: Lanes) -> tuple[Tensor, Tensor]:
        """The leaf of one call of the model, padded, and the answer to the rows of x, with its graph."""
        with torch.enable_grad():
            leaf = self._leaf(x, lanes)
            answer = self._forward(leaf, None, keys)
            return leaf, answer if leaf.shape[0] == x.shape[0] else answer[: x.shape[0]]

    @staticmethod
    def _leaf(x: Tensor, lanes: Lanes) -> Tensor:
        """What is differentiated by: x itself where it is lent for that, which it shows by requiring a gradient."""
        if x.requires_grad and x.is_leaf and lanes.padded(x.shape[0]) == x.shape[0]:
            return x
        return MeteredOracle._padded(x.detach() if x.requires_grad else x, lanes).requires_grad_()

    def _differentiated(self, goal: Any, answer: Tensor, leaf: Tensor, again: bool = False) -> tuple[Tensor, Tensor]:
        """The goal's loss and its gradient at the leaf, each row's own; `again` where more will follow."""
        loss, end, slope = self._loss(goal, answer)
        gradient = None
        if end.requires_grad:
            try:
                gradient = _backward(end, slope, leaf, again)
            except BaseException as error:
                blame(error, BACKWARD)
                raise
        if gradient is None:
            self.meter.detached = True
            gradient = torch.zeros_like(leaf, requires_grad=False)
        return loss, gradient

    def _loss(self, goal: Any, answer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The goal's loss, where autograd begins, and the derivative that it begins with."""
        try:
            if conforms(goal, Sloped):
                with torch.no_grad():
                    sloped = goal.sloped(answer)
                if sloped is not None:
                    return sloped[0], answer, sloped[1]
            with torch.enable_grad():
                loss: Tensor = goal.loss(answer)
        except BaseException as error:
            blame(error, GOAL)
            raise
        if self._ones is None or self._ones.shape != loss.shape or self._ones.dtype != loss.dtype:
            self._ones = torch.ones_like(loss, requires_grad=False)
        return loss.detach(), loss, self._ones

    def _aimed(self, goal: Any, sizes: list[int], device: torch.device) -> list[Any]:
        """The goal of every chunk; those of the goal asked for last are kept, since a walk keeps its goal."""
        if self._aims[0] is not goal or self._aims[1] != sizes:
            rows = torch.split(torch.arange(sum(sizes), device=device), sizes)
            self._aims = (goal, sizes, [goal.take(part) for part in rows])
        return self._aims[2]

    def seen_as(self, view: Callable[[Any], Any], decides: bool = False) -> MeteredOracle:
        """The same rows and the same meter, but the questions go to `view(model)`.

        What white box means beyond a gradient: a tap that answers the features of a layer, a copy with another
        backward rule, one member of an ensemble. `decides` where its answers are the verdict's still. A view that asks
        for no more than the scores of outputs, such as the next token's, says so in `needs`.
        """
        least = max(Access.SCORES, view.needs) if isinstance(view, NeedsAccess) else Access.GRADIENTS
        if self.access < least:
            self._white_box("the inside of the model" if least == Access.GRADIENTS else "scores of the model's outputs")
        return MeteredOracle(
            view(self.model),
            self.rows,
            self.access,
            self.queries,
            decides and self.decides,
            self.lanes,
            self.meter,
            self._index,
            self.data,
            self.keys,
            self.propagations,
            self.differentiates,
        )

    def head(self) -> Tensor | None:
        """Weight [classes, features] of the model's last linear layer; None where it has none, or does not say."""
        self._white_box("the weights of the last layer")
        return self.model.head() if isinstance(self.model, Headed) else None

    def _white_box(self, what: str) -> None:
        if self.access < Access.GRADIENTS:
            raise AccessDenied(
                f"the attack asked for {what}; this threat model grants {self.access.name.lower()} only (choose an "
                "attack that asks for less, or grant access=gradients)"
            )

    def differentiable(self, origin: Tensor) -> nn.Module:
        """The model as a torch module, for attacks that bring their own loop and autograd.

        Metered and refused like every other question. The module holds none of the model's parameters, so that nobody
        can switch modes or move weights through it, and they are frozen while it computes; its one empty parameter
        says where it lives to those who ask. Lanes do not apply: whole batches go through as they come, and a row's
        last bits may depend on its batch.

        origin: the rows [rows, ...] that the candidates come from. As many candidates as rows are taken to be the rows
                in order; any other number is told apart by the nearest origin, for nothing but the meter
        """
        return _Differentiable(self, origin)

    def _chunks(self, x: Tensor) -> tuple[list[Tensor], Lanes]:
        lanes = self.lanes
        if lanes is None:
            training = isinstance(self.model, Modular) and any(m.training for m in self.model.modules())
            lanes = Lanes(max(1, len(x)), 1) if training else Lanes.unpadded(x)
            self.lanes = lanes
        sizes = lanes.split(x.shape[0])
        if len(sizes) == 1:
            return [x], lanes
        return list(torch.split(x.detach() if x.requires_grad else x, list(sizes))), lanes

    @staticmethod
    def _padded(x: Tensor, lanes: Lanes) -> Tensor:
        short = lanes.padded(x.shape[0]) - x.shape[0]
        if not short:
            return x.clone()
        return torch.cat([x, x[-1:].expand(short, *x.shape[1:])])

    def _keys(self, x: Tensor, of: Tensor | None, chunks: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """The keys of a query's candidates, chunk by chunk: each row's own, and how often it was asked about before."""
        if self._drawing is None or self.keys is None:
            return [None] * len(chunks)
        rows = torch.arange(len(x)) if of is None else of.cpu()
        rows = rows if self._index is None else self._index.cpu()[rows]
        keys = mixed(self.keys[rows], self.meter.forwards[rows])
        return torch.split(keys, [len(part) for part in chunks])

    def _forward(self, x: Tensor, lanes: Lanes | None, keys: Tensor | None) -> Tensor:
        before = 0 if self._counting is None else self._counting.tokens
        x = x if lanes is None or lanes.padded(x.shape[0]) == x.shape[0] else self._padded(x, lanes)
        try:
            answer: Tensor
            if self._drawing is None or keys is None:
                answer = self.model(x)
            else:  # padded rows are copies of the last one
                answer = self._drawing.drawing(x, torch.cat([keys, keys[-1:].expand(len(x) - len(keys))]))
        except BaseException as error:
            if not x.is_floating_point() or bool(finite_rows(x.detach()).all()):
                blame(error, MODEL)  # about NaN nobody should have asked
            raise
        if self._counting is not None:
            self.meter.tokens += self._counting.tokens - before
        return answer

    def _passed_back(self, gradient: Tensor, of: Tensor | None, asked: Tensor | None) -> Tensor:
        """Count a backward pass of somebody else's autograd; what is not finite goes on as 0."""
        high, low = (_excused(extreme, asked) for extreme in _extremes(gradient))
        if of is not None:
            bad = ~(torch.isfinite(high) & torch.isfinite(low))
            self.meter.scatter(self._global(of), bad, forward=False, backward=True)
        else:
            self._segment.backwards += 1
            self._segment.gradients.note(high, low)
        return gradient.nan_to_num(0.0, 0.0, 0.0)

    def _spend(self, x: Tensor, of: Tensor | None, passes: int = 1) -> None:
        """Refuse what no budget allows: an answer for every candidate, of so many passes each."""
        if of is None and x.shape[0] != self.rows:
            raise ValueError(f"{len(x)} candidates for {self.rows} samples: say which sample each belongs to (`of`)")
        if (told := watcher()) is not None:
            told.passed(len(x))
        if self._times is None or not x.shape[0]:
            return
        if self.propagations is not None:
            self._check_propagations(of, passes)
        if self.queries is None:
            return
        if of is None and self._known == self.meter.calls:
            most = self._most + 1
        else:
            times = self._asked_for(of)
            most = int((self.meter.queries + times)[times > 0].max())
        if most > self.queries:
            raise BudgetExhausted(
                f"the attack made query number {most} of a sample; the threat model allows {self.queries} "
                "(lower the attack's steps, or raise queries)"
            )
        if of is None and int(self._times.max()) == 1:
            self._most, self._known = most, self.meter.calls + 1

    def _check_propagations(self, of: Tensor | None, passes: int) -> None:
        times = self._asked_for(of)
        most = int((self.meter.forwards + self.meter.backwards + passes * times)[times > 0].max())
        if most > cast(int, self.propagations):
            raise BudgetExhausted(
                f"the attack came to {most} propagations of a sample; the budget is {self.propagations} "
                "(lower the attack's steps, or raise the budget)"
            )

    def _asked_for(self, of: Tensor | None) -> Tensor:
        """How often a query asks about each of the meter's rows."""
        assert self._times is not None
        return self._times if of is None else torch.bincount(self._global(of), minlength=self.meter.rows)

    def _global(self, of: Tensor) -> Tensor:
        return of.cpu() if self._index is None else self._index.cpu()[of.cpu()]

    def _note(self, x: Tensor, answer: Tensor, of: Tensor | None, gradient: Tensor | None = None) -> bool:
        """Count a pass and keep what it met; whether it is plain that the gradient is finite throughout."""
        looks = self.meter.looks
        plain = gradient is not None and all_moving(gradient)
        told = not looks or ((gradient is None or plain) and (not answer.is_floating_point() or plainly_finite(answer)))
        if of is None and told:
            self.meter.calls += 1
            self._segment.forwards += 1
            self._segment.backwards += gradient is not None
            self._segment.moved |= plain and looks
            return plain
        sizes = sizes_of(answer) if looks and answer.is_floating_point() else None
        extremes = _extremes(gradient) if looks and gradient is not None else None
        plain = plain or (extremes is not None and extremes[0].device.type == "cpu" and all_finite(*extremes))
        length = None if sizes is None else _suspects(x, answer)
        asked = None if length is None else ~torch.isfinite(length)
        if asked is not None:
            sizes = None if sizes is None else _excused(sizes, asked)
            extremes = None if extremes is None else (_excused(extremes[0], asked), _excused(extremes[1], asked))
        if of is not None:
            bad = torch.zeros(len(answer), dtype=torch.bool, device=answer.device)
            for size in (sizes, *(extremes or ())):
                bad = bad if size is None else bad | ~torch.isfinite(size)
            self.meter.scatter(self._global(of), bad, backward=gradient is not None, asked=asked)
            return plain
        self.meter.calls += 1
        segment = self._segment
        segment.forwards += 1
        if length is not None:
            segment.asked.note(length, length)
        if sizes is not None:
            segment.answers.note(sizes, sizes)
        segment.backwards += gradient is not None
        if extremes is not None:
            segment.gradients.note(*extremes)
        return plain


def _suspects(x: Tensor, answer: Tensor) -> Tensor | None:
    """The sizes of the inputs [n] where the answer may be non-finite because its input is; else None.

    On a CPU, where all is well, a look at the sizes' memory that costs no tensor operation; elsewhere it would wait for
    the device, the sizes of the inputs do not.
    """
    if not x.is_floating_point() or plainly_finite(answer):
        return None
    return row_size(x.detach())


def _excused(values: Tensor, asked: Tensor | None) -> Tensor:
    """Values per candidate [n], with 1 for those whose input was not finite: they say nothing of the victim."""
    return values if asked is None else torch.where(asked, torch.ones_like(values), values)


def _extremes(values: Tensor) -> tuple[Tensor, Tensor]:
    """The largest and the smallest value of every row. On a CPU a norm would take ten times as long."""
    features = tuple(range(1, values.ndim))
    return values.amax(features), values.amin(features)


class _Differentiable(nn.Module):
    """See `MeteredOracle.differentiable`."""

    def __init__(self, oracle: MeteredOracle, origin: Tensor) -> None:
        super().__init__()
        self._oracle = oracle
        self._origin = origin.detach().flatten(1)
        self._before: Tensor | None = None
        self.place = nn.Parameter(origin.new_empty(0), requires_grad=False)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Answers [n, ...]; with gradient where x requires one and the threat model grants it."""
        oracle = self._oracle
        if x.is_floating_point():
            x = x.to(self._origin.dtype)  # some packages compute in float64 and hand that over
        follows = x.requires_grad and torch.is_grad_enabled()
        if oracle.access < (Access.GRADIENTS if follows else Access.LABELS):
            raise AccessDenied(
                f"the attack asked for {'a gradient' if follows else 'an answer'}; this threat model grants "
                f"{oracle.access.name.lower()} only"
            )
        length = row_size(x.detach())
        asked = None if bool(torch.isfinite(length).all()) else ~torch.isfinite(length)
        of = None if len(x) == oracle.rows else self._rows_of(x.detach().flatten(1), asked)
        oracle._spend(x, of, 2 if follows else 1)
        with frozen(*oracle.model.modules() if isinstance(oracle.model, Modular) else ()):
            if follows:
                x = x.view_as(x)
                x.register_hook(lambda gradient: oracle._passed_back(gradient, of, asked))  # type: ignore[no-untyped-call]
            answer = oracle._forward(x, None, oracle._keys(x, of, [x])[0])
        oracle._note(x, answer.detach(), of)
        if oracle.access == Access.LABELS and answer.ndim > 1:
            return nn.functional.one_hot(answer.argmax(1), answer.shape[1]).to(answer.dtype)
        if follows and not answer.requires_grad:
            oracle.meter.detached = True
        return answer

    def _rows_of(self, x: Tensor, asked: Tensor | None) -> Tensor:
        """The rows [n] that flat candidates belong to: the nearest, and where NaN has no nearest, those of before."""
        of = torch.cdist(x, self._origin).argmin(1)
        if asked is not None and self._before is not None and len(self._before) == len(of):
            of = torch.where(asked, self._before, of)
        self._before = of
        return of
