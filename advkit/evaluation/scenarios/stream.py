"""Streams: items come one by one, k submissions, every decision final (arXiv 2103.02014).

Candidates and their values do not depend on the order of the stream, so all items are attacked and judged once; the
stream is then played in many random orders of the same items. The harness asks the selector, item by item, and counts:
one that asks for more than k items, or does not decide twice alike, has handed in nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional

from advkit.attacks.stream.online import Online
from advkit.attacks.stream.selectors import SELECTORS, Rule, selector
from advkit.core.errors import AdvkitError, BadModel, UsageError
from advkit.core.lanes import Lanes
from advkit.core.protocols import (
    Label,
    OnlineAttack,
    Outcome,
    PlansSubmissions,
    Submissions,
    WrapsBall,
    ids_of,
    on_streams,
)
from advkit.core.rng import RowRng
from advkit.evaluation.counts import ended, was_right
from advkit.evaluation.run.attempts import attacked_model
from advkit.evaluation.run.batch import alone
from advkit.evaluation.run.judge import Judge, submitted
from advkit.evaluation.run.store import Store
from advkit.evaluation.scenarios.base import (
    BaseScenario,
    Case,
    Engine,
    Headline,
    Parts,
    Record,
    Records,
    Round,
    Section,
    accuracy_section,
    lacks_access,
    parameters,
    rate,
)
from advkit.evaluation.stats import bootstrap_mean

log = logging.getLogger("advkit")

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Rows = NDArray[np.int64]
VALUE, TRUE_VALUE, POSITION = "value", "true_value", "position"
SUBMITTED = "submitted"
_TESTED = frozenset(SELECTORS.values())


class Violation(AdvkitError):
    """A selector broke the rules of the stream; `asked` are the items it had asked for, in order."""

    def __init__(self, message: str, asked: Sequence[int]) -> None:
        super().__init__(message)
        self.asked = tuple(asked)


@dataclass(frozen=True)
class Items:
    """What a stream consists of; all arrays [n], in the task's order.

    value:      what the attacker sees: the loss of the true label on its surrogates; -inf where there is none
    true_value: the same on the victim; 0 where there is none
    fooled:     the victim is wrong about the candidate
    before:     the victim is right about the untouched item
    """

    value: Floats
    true_value: Floats
    fooled: Flags
    before: Flags

    def __post_init__(self) -> None:
        if not len(self.value) == len(self.true_value) == len(self.fooled) == len(self.before) > 0:
            raise UsageError("the items' values, true values and verdicts differ in number, or there are none")

    def __len__(self) -> int:
        return len(self.value)

    @classmethod
    def of(cls, records: Sequence[Record]) -> Items:
        """From the records of a stream's candidates, in the task's order."""
        return cls(
            np.array([r.measures.get(VALUE, -np.inf) for r in records], dtype=np.float64),
            np.array([r.measures.get(TRUE_VALUE, 0.0) for r in records], dtype=np.float64),
            np.array([r.reached and r.outcome not in (Outcome.ERROR, Outcome.INVALID) for r in records], dtype=bool),
            np.array([was_right(r) for r in records], dtype=bool),
        )


@dataclass(frozen=True)
class Submitted:
    """What was submitted, order by order.

    k:        submissions granted
    picked:   items [orders, k] in the order they were handed in, -1 where fewer were
    void:     orders in which the selector broke the rules, with the reason; nothing was handed in there
    """

    k: int
    picked: Rows
    void: Mapping[int, str] = field(default_factory=dict)

    def shares(self, of: Flags) -> Floats:
        """How many of the items handed in are among these [n], by order."""
        return self._sum(of.astype(np.float64))

    def _sum(self, values: Floats) -> Floats:
        taken = np.where(self.picked >= 0, values[self.picked], 0.0)
        total: Floats = taken.sum(1)
        return total

    def competitive_ratio(self, items: Items) -> Floats:
        """Share of the k items of highest true value that were handed in, by order; the denominator is k."""
        return self.shares(top(items.true_value, self.k)) / self.k

    def value_ratio(self, items: Items) -> Floats | None:
        """True value handed in over the most that k items can have, by order; None where that is 0."""
        most = float(items.true_value[top(items.true_value, self.k)].sum())
        return self._sum(items.true_value) / most if most > 0 else None

    def fooled(self, items: Items) -> Floats:
        """How many submissions fooled the victim, by order."""
        return self.shares(items.fooled)

    def selected(self) -> Floats:
        """How many items were handed in, by order."""
        count: Floats = (self.picked >= 0).sum(1).astype(np.float64)
        return count

    def accuracy(self, items: Items) -> Floats:
        """The victim's accuracy on the stream it got to see, by order."""
        lost = items.before.astype(np.float64) - ~items.fooled
        return (float(items.before.sum()) - self._sum(lost)) / len(items)


def top(values: Floats, k: int) -> Flags:
    """Which are the k largest; of equals the first."""
    chosen = np.zeros(len(values), dtype=bool)
    chosen[np.argsort(-values, kind="stable")[:k]] = True
    return chosen


def streams(seed: int, orders: int) -> RowRng:
    """The random streams of the first orders of a seed."""
    return RowRng.from_ids(seed, [f"order-{m}" for m in range(orders)])


def shuffled(rng: RowRng, n: int) -> Rows:
    """A uniformly random order of n items per row: which item comes when."""
    keys = rng.at("order").uniform(torch.empty((len(rng), n), dtype=torch.float64)).cpu().numpy()
    order: Rows = np.argsort(keys, axis=1, kind="stable")
    return order


def feed(start: Any, values: Floats, k: int, rng: RowRng) -> list[int]:
    """The positions that a selector takes of one stream, asked item by item; Violation where it breaks the rules.

    start: `start(length, budget, rng) -> selector` of an online attack
    """
    found = [_fed(start, values, k, rng), _fed(start, values, k, rng)]
    if found[0] != found[1]:
        raise Violation("the selector decided otherwise when it was shown the same stream again", found[0])
    return found[0]


def _fed(start: Any, values: Floats, k: int, rng: RowRng) -> list[int]:
    running = start(len(values), k, rng)
    taken: list[int] = []
    for t, value in enumerate(values.tolist()):
        said = running.select(value, t)
        if not isinstance(said, bool | np.bool_):
            raise Violation(
                f"the selector answered {said!r} to item {t}; expected True or False, which is final", taken
            )
        if said:
            taken.append(t)
            if len(taken) > k:
                raise Violation(
                    f"the selector asked for a submission more than its {k} at item {t} of the stream", taken
                )
    return taken


def submit(attack: Any, items: Items, k: int, *, orders: int = 1000, seed: int = 0) -> Submitted:
    """Run the selector over the stream in the first `orders` random orders of a seed.

    attack: an online attack or a rule. The rules of this package are played over all orders at once, and item by item
            in the first order, where both forms have to agree; any other is asked item by item throughout.
    """
    n = len(items)
    rng = streams(seed, orders)
    order = shuffled(rng, n)
    values = items.value[order]
    drawn = rng.at("selector")
    rule = attack.rule if type(attack) is Online else attack
    void: dict[int, str] = {}
    if type(rule) in _TESTED:
        positions = rule.select(values, k, drawn)
        if rule.online:
            found = feed(rule.start, values[0], k, drawn.take(torch.tensor([0])))
            if found != [t for t in positions[0].tolist() if t >= 0]:
                raise RuntimeError(f"{rule!r} takes {found} item by item and {positions[0].tolist()} over many streams")
    else:
        positions = np.full((orders, k), -1, dtype=np.int64)
        for m in range(orders):
            try:
                found = feed(attack.start, values[m], k, drawn.take(torch.tensor([m])))
            except Violation as broken:
                void[m] = str(broken)
            else:
                positions[m, : len(found)] = found
    picked = np.where(positions >= 0, np.take_along_axis(order, np.maximum(positions, 0), 1), -1)
    return Submitted(k, picked, void)


def compare_selectors(
    items: Items, k: int, rules: Mapping[str, Rule] | None = None, *, orders: int = 1000, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Mean figures of several rules on the same orders of the same items.

    rules: by name; all of the package with `exhaust` where None

    Each has competitive_ratio, value_ratio (NaN where the best k are worth nothing), fool_rate, selected, and
    fool_rate_error, the standard error of the fool rate over the orders.
    """
    chosen = {name: selector(name, exhaust=True) for name in SELECTORS} if rules is None else rules
    table = {}
    for name, rule in chosen.items():
        played = submit(rule, items, k, orders=orders, seed=seed)
        value, fooled = played.value_ratio(items), played.fooled(items) / k
        table[name] = {
            "competitive_ratio": float(played.competitive_ratio(items).mean()),
            "value_ratio": float("nan") if value is None else float(value.mean()),
            "fool_rate": float(fooled.mean()),
            "fool_rate_error": float(fooled.std(ddof=1) / np.sqrt(orders)) if orders > 1 else float("nan"),
            "selected": float(played.selected().mean()),
        }
    return table


def noise_study(
    rule: Rule, k: int, sigma: float, *, n: int = 100, orders: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Competitive ratio of a rule that sees values 0..n-1 in random order through Gaussian noise, and its error.

    The best k are those of the values without noise. (The released code of the paper takes them from the noisy stream,
    which no noise can change.)

    Returns the mean and its standard error.
    """
    if sigma < 0 or orders < 2:
        raise UsageError(f"sigma {sigma} over {orders} orders; expected sigma >= 0 and at least 2 orders")
    rng = streams(seed, orders)
    clean = shuffled(rng, n).astype(np.float64)
    noise = rng.at("noise").normal(torch.empty((orders, n), dtype=torch.float64)).numpy()
    hits = _ranks_hit(rule.select(clean + sigma * noise, k, rng.at("selector")), clean, k)
    return float(hits.mean()), float(hits.std(ddof=1) / np.sqrt(orders))


def _ranks_hit(picked: Rows, values: ArrayLike, k: int) -> Floats:
    """Competitive ratio per stream of positions [M, k] in streams [M, n] of the distinct values 0..n-1."""
    ranks = np.asarray(values)
    taken = np.where(picked >= 0, np.take_along_axis(ranks, np.maximum(picked, 0), 1), -1.0)
    ratio: Floats = (taken >= ranks.shape[1] - k).sum(1) / k
    return ratio


def cell(case: Case) -> Case:
    """The evasion of single items inside a stream: every item is attacked, right or wrong when clean."""
    assert isinstance(case.threat, WrapsBall)
    return replace(case, threat=case.threat.ball, attack_misclassified=True)


def budget(case: Case) -> int:
    """The submissions that the threat model grants, or else the attack plans."""
    granted = _stream(case).k
    granted = _planned(case.attack) if granted is None else granted
    if granted is None:
        raise UsageError("nobody says how many submissions a stream allows: name k, e.g. online:k=10")
    return int(granted)


def _planned(attack: object) -> int | None:
    """Submissions that the attack says itself."""
    return attack.k if isinstance(attack, PlansSubmissions) else None


def _stream(case: Case) -> Submissions:
    assert isinstance(case.threat, Submissions)
    return case.threat


def _online(case: Case) -> OnlineAttack:
    assert on_streams(case.attack)
    return case.attack


class Stream(BaseScenario):
    """All items are attacked and judged, and the k that the selector submits in the first order once more.

    The candidates' records have the attack's label and measures `value` and `true_value`; those of the submissions have
    the stage `submitted` and `position`, the place in the stream.
    """

    name: ClassVar[str] = "stream"

    def resolve(self, parts: Parts) -> Parts:
        """The attack's budget is the threat model's where one of them names it."""
        planned = _planned(parts.attack)
        return replace(parts, threat=parts.threat.agreed(planned)) if isinstance(parts.threat, Submissions) else parts

    def accepts(self, case: Case) -> str | None:
        """None, or why this case can't be run; raises UsageError where the selector refuses the stream."""
        attack = case.attack
        if not on_streams(attack):
            return f"a stream needs an online attack: online:inner=[{case.label}],k={_stream(case).k or 10}"
        if reason := lacks_access(case):
            return reason.replace("access=...", "inner=[...,access=...]")
        if case.rule.kind != "untargeted":
            return f"the items of a stream are valued by the loss of the true label; goal {case.rule.kind} has another"
        planned = _planned(attack)
        if planned not in (None, budget(case)):
            return f"the attack plans {planned} submissions and the threat model grants {budget(case)}: say k once"
        if not 1 <= budget(case) <= case.n:
            return f"{budget(case)} submissions for a stream of {case.n} items; expected at most as many as items"
        attack.start(case.n, budget(case), streams(case.seed, 1))
        return None

    def expected(self, case: Case, records: Records) -> int:
        """How many records a finished case has, at most."""
        return case.n + budget(case)

    def rounds(self, case: Case, engine: Engine, records: Records) -> Iterator[Round]:
        """Candidates batch by batch, in the task's order, and then the submissions of the first order."""
        item = cell(case)
        lanes = engine.lanes(item)
        done = dict(records)
        for each in engine.attack(item, done):
            valued = replace(each, records=_valued(item, lanes, each))
            done.update((Store.key(case.label, record.id), record) for record in valued.records)
            yield valued
        yield from self._submissions(case, item, engine, done)

    def _submissions(self, case: Case, item: Case, engine: Engine, done: Records) -> Iterator[Round]:
        label = replace(case.label, stage=SUBMITTED)
        candidates = candidates_of(case, done.values())
        ids = [record.id for record in candidates]
        items, k = Items.of(candidates), budget(case)
        attack, rng = _online(case), streams(case.seed, 1)
        order = shuffled(rng, len(items))[0]
        try:
            taken, broken = feed(attack.start, items.value[order], k, rng.at("selector")), ""
            if not _tested(attack):
                void = submit(attack, items, k, orders=_stream(case).permutations, seed=case.seed).void
                broken = next((f"in order {m}: {reason}" for m, reason in void.items()), "")
        except Violation as violation:
            taken, broken = list(violation.asked), str(violation)
        place = {ids[order[t]]: t for t in taken}
        new = frozenset(row for row in place if Store.key(label, row) not in done)
        if broken:
            yield from _refused(case, label, new, done, place, broken)
            return
        # The streams of the candidates' label: an item is submitted as it was made.
        for each in engine.attack(item, {}, new):
            records = [
                replace(r, stage=SUBMITTED, measures={**r.measures, POSITION: float(place[r.id])})
                for r in _valued(item, engine.lanes(item), each)
            ]
            yield replace(each, records=records)

    def summarize(self, case: Case, records: Sequence[Record]) -> Section:
        """Means over the random orders, beside the accuracies were every item submitted."""
        section = accuracy_section(case, records)
        metrics = {**section.metrics, **stream_metrics(case, records)}
        orders = _stream(case).permutations
        return replace(
            section,
            metrics=metrics,
            headline=Headline("stream_fool_rate", "Fool rate of submissions", "lower"),
            table=[
                (section.wording.clean, "clean_accuracy"),
                ("fool rate of submissions", "stream_fool_rate"),
                ("competitive ratio", "stream_competitive_ratio"),
                ("accuracy on the stream", "stream_accuracy"),
                ("robust, every item submitted", "robust_accuracy"),
            ],
            sentence=(
                "{stream_fool_rate} of the submitted samples fool the model; the competitive ratio is "
                f"{{stream_competitive_ratio}}. Both are means over {orders} orders. If every sample were submitted, "
                "robust accuracy would be {robust_accuracy}."
            ),
            settings={case.label: parameters(case.attack)},
        )


def _valued(case: Case, lanes: Lanes, each: Round) -> list[Record]:
    """The records with what the candidates are worth to the attacker, and to the victim's loss."""
    assert each.clean is not None
    assert each.adversarial is not None
    records = each.records
    model, _ = attacked_model(case)
    seen, _ = submitted(each.adversarial, each.clean, case.threat)
    labels = torch.tensor([-1 if r.label is None else r.label for r in records], device=seen.device)
    with alone(case, "value", records[0].id):
        true = _loss(case.victim, lanes, seen, labels)
        known = _loss(model, lanes, seen, labels) if case.surrogates else true
    valued = []
    for record, one, other in zip(records, known.tolist(), true.tolist(), strict=True):
        measures = {VALUE: one, TRUE_VALUE: other}
        finite = {name: value for name, value in measures.items() if np.isfinite(value)}
        kept = {} if record.outcome == Outcome.ERROR else finite
        valued.append(replace(record, measures={**record.measures, **kept}))
    return valued


def _tested(attack: OnlineAttack) -> bool:
    """Whether the attack's decisions are this package's own."""
    return type(attack) is Online and type(attack.rule) in _TESTED


def _refused(
    case: Case, label: Label, new: frozenset[str], done: Records, place: Mapping[str, int], reason: str
) -> Iterator[Round]:
    """Error records for the items that a selector outside the rules asked for; nothing of them was submitted."""
    others = frozenset(ids_of(case.task, case.n)) - new
    for batch in case.task.batches(case.batch_size, skip=others, n=case.n):
        records = [
            replace(
                ended(done[Store.key(case.label, row)], Outcome.ERROR),
                stage=label.stage,
                reached=False,
                message=reason,
                measures={POSITION: float(place[row])},
                forwards=0,
                backwards=0,
                queries=0,
            )
            for row in batch.ids
        ]
        yield Round(records, batch.x, batch.x)


def _loss(model: Any, lanes: Lanes, x: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the true labels [B] in double precision, where confident answers still differ."""
    answer = Judge(model, lanes).answer(x)
    if answer.ndim != 2 or not answer.is_floating_point():
        raise BadModel(
            f"a model that answers a tensor of shape {tuple(answer.shape)} gives no values to a stream; expected "
            "logits [rows, classes]"
        )
    if bool((labels < 0).any()):
        raise UsageError("the items of a stream are valued by the loss of the true label; this task has no labels")
    return functional.cross_entropy(answer.double(), labels, reduction="none").cpu()


def candidates_of(case: Case, records: Iterable[Record]) -> list[Record]:
    """The candidates' records in the task's order; raises UsageError where some are missing."""
    held = {record.id: record for record in records if record.made_by == case.label}
    ids = ids_of(case.task, case.n)
    if missing := [row for row in ids if row not in held]:
        raise UsageError(f"{len(missing)} of {len(ids)} items have no record (the first: {missing[0]}); run the rest")
    return [held[row] for row in ids]


def stream_metrics(case: Case, records: Sequence[Record]) -> dict[str, Any]:
    """The report's figures of a stream, from its records: means over the random orders, with bootstrap intervals.

    An interval says how far the mean over all orders may lie from the mean over those played; items and candidates are
    the same in all of them. Beside the selector's figures stand those of a naive attacker (any k items), of one who
    sees all of the attacker's values before choosing (source_offline), and of one who knows the true values (opt).
    """
    items, k = Items.of(candidates_of(case, records)), budget(case)
    played = submit(_online(case), items, k, orders=_stream(case).permutations, seed=case.seed)
    if played.void:
        log.warning("the selector broke the rules in %d of %d orders", len(played.void), len(played.picked))

    def mean(values: Floats | None, unit: str = "") -> dict[str, Any]:
        entry: dict[str, Any] = {"value": None if values is None else float(values.mean())}
        if unit:
            entry["unit"] = unit
        if values is not None and len(values) > 1:
            entry["ci"] = bootstrap_mean(values.tolist(), seed=case.seed).to_dict()
        return {**entry, "n": len(played.picked)}

    blind = Submitted(k, np.flatnonzero(top(items.value, k))[None])
    best = Submitted(k, np.flatnonzero(top(items.true_value, k))[None])
    return {
        "stream_competitive_ratio": mean(played.competitive_ratio(items)),
        "stream_value_ratio": mean(played.value_ratio(items)),
        "stream_fool_rate": mean(played.fooled(items) / k, "fraction"),
        "stream_fooled": mean(played.fooled(items), f"of {k}"),
        "stream_selected": mean(played.selected(), f"of {k}"),
        "stream_accuracy": mean(played.accuracy(items), "fraction"),
        "stream_naive_fool_rate": rate(int(items.fooled.sum()), len(items), "all_samples"),
        "stream_source_offline_competitive_ratio": {"value": float(blind.competitive_ratio(items)[0])},
        "stream_source_offline_fool_rate": {"value": float(blind.fooled(items)[0]) / k, "unit": "fraction"},
        "stream_opt_fool_rate": {"value": float(best.fooled(items)[0]) / k, "unit": "fraction"},
    }
