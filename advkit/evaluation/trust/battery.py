"""The expensive checks behind `advkit doctor`: masked gradients and failed attacks.

After Carlini et al. (arXiv 1902.06705), Athalye et al. (arXiv 1802.00420) and Pintor et al. (arXiv 2106.09947).

Two questions are kept apart. Does the model hide its gradients? A reference attack, PGD on the margin loss, answers it.
Does the attack do its job? The case's own attack answers it, traced on its way through the harness. A fault that has
been named is not named again by its consequences: without gradients, an unlimited budget does not help either.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from advkit.attacks import ATTACKS
from advkit.core.errors import AdvkitError, UsageError
from advkit.core.oracle import Lanes, MeteredOracle, frozen
from advkit.core.protocols import Access, Copies, Label, Lattice, Outcome, Record, Undefended, WrapsBall
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.evaluation.run.batch import attacked_model, own_randomness
from advkit.evaluation.run.case import Case
from advkit.evaluation.run.engine import LocalEngine
from advkit.evaluation.run.judge import decide, finite
from advkit.evaluation.stats import newcombe_paired
from advkit.evaluation.trust import indicators
from advkit.evaluation.trust.diagnostics import (
    FIRST_ROWS,
    GROSS,
    Finding,
    Progress,
    after,
    black_box_beats_white_box,
    cheap,
    found,
    graded,
    merge,
)
from advkit.threat_models.lp import L2, Linf

log = logging.getLogger("advkit")

UNSTABLE = 0.1
UNFINISHED = 0.25  # share of surviving rows whose loss was still falling
STRANDED = 0.1
WEAKER = 0.02  # robust accuracy by which two losses, or one restart and ten, may differ
MISMATCH = 1e-2
MISMATCH_SINGLE = 0.1  # in float32, where a central difference is mostly round-off
BLOCK = 512  # random points asked about at once
STEPS = 100
STEPS_RANDOMIZED = 20  # each of them averages over draws
SWEEP = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)

Played = dict[str, Record]  # by row id


class _Trace:
    """Margin and success of every point that one call of an attack asked about, per row.

    The margin stands for the attack's loss, so that attacks with different losses, or none, are measured alike.
    """

    def __init__(self, goal: Any, rows: int) -> None:
        self.goal = goal
        self.rows = rows
        self.losses: list[Tensor] = []
        self.hits: list[Tensor] = []

    def add(self, answer: Tensor, index: Tensor, goal: Any) -> None:
        loss = goal.under("margin").loss(answer).detach().double()
        hit = goal.reached(answer) & finite(answer)
        # Several candidates of one row count by their best; rows that were not asked stay at infinity.
        best = torch.full((self.rows,), torch.inf, dtype=torch.float64, device=loss.device)
        best.scatter_reduce_(0, index, loss.nan_to_num(nan=torch.inf), "amin")
        hits = torch.zeros(self.rows, dtype=torch.long, device=loss.device)
        hits.scatter_reduce_(0, index, hit.long(), "amax")
        self.losses.append(best)
        self.hits.append(hits.bool())

    def curves(self) -> Tensor:
        """[T, rows]; infinite where a row was not asked."""
        return torch.stack(self.losses).cpu() if self.losses else torch.empty(0, self.rows, dtype=torch.float64)

    def reached(self) -> Tensor:
        """Bool [T, rows]."""
        return torch.stack(self.hits).cpu() if self.hits else torch.zeros(0, self.rows, dtype=torch.bool)


class _Recording:
    """An oracle that notes every answer in a trace; the attack sees no difference."""

    def __init__(self, inner: Any, trace: _Trace, index: Tensor, goal: Any) -> None:
        self._inner = inner
        self._trace = trace
        self._index = index
        self._goal = goal

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, x: Tensor, of: Tensor | None = None) -> Tensor:
        answer: Tensor = self._inner(x, of)
        self._note(answer, of)
        return answer

    def gradient(self, x: Tensor, goal: Any, of: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        loss, gradient, answer = self._inner.gradient(x, goal, of)
        self._note(answer, of)
        return loss, gradient, answer

    def take(self, rows: Tensor) -> _Recording:
        return _Recording(self._inner.take(rows), self._trace, self._index[rows], self._goal.take(rows))

    def _note(self, answer: Tensor, of: Tensor | None) -> None:
        if of is None:
            self._trace.add(answer, self._index, self._goal)
        else:
            self._trace.add(answer, self._index[of], self._goal.take(of))


@dataclass(frozen=True)
class _Traced:
    """An attack, and a trace of each of its calls."""

    attack: Any
    traces: list[_Trace] = field(default_factory=list)

    @property
    def needs(self) -> Access:
        return Access(self.attack.needs)

    def __call__(self, oracle: Any, x: Tensor, goal: Any, threat: Any, rng: Any, /) -> Any:
        trace = _Trace(goal, len(x))
        index = torch.arange(len(x), device=x.device)
        returned = self.attack(_Recording(oracle, trace, index, goal), x, goal, threat, rng)
        self.traces.append(trace)
        return returned


@dataclass(frozen=True, kw_only=True)
class RandomSearch:
    """Keep the first random point of the ball that reaches the goal; every other one is as far out as the ball goes.

    draws: points per row
    """

    needs: ClassVar[Access] = Access.LABELS
    draws: int = 1000

    def __call__(self, oracle: Any, x: Tensor, goal: Any, ball: Any, rng: Any, /) -> Tensor:
        kept = x.clone()
        left = torch.arange(len(x), device=x.device)
        draw = 0
        while draw < self.draws and len(left):
            block = range(draw, min(self.draws, draw + max(1, BLOCK // len(left))))
            draw = block.stop
            origin = x[left]
            points = torch.stack([self._point(i, origin, ball, rng.take(left)) for i in block])
            of = left.repeat(len(block))
            hit = goal.take(of).reached(oracle(points.flatten(0, 1), of)).view(len(block), -1)
            # The first hit in the order of the draws, so that the block's length changes nothing.
            first = hit.long().argmax(0)
            rows = hit.any(0)
            kept[left[rows]] = points[first[rows], rows.nonzero().squeeze(1)]
            left = left[~rows]
        return kept

    @staticmethod
    def _point(draw: int, origin: Tensor, ball: Any, rng: Any) -> Tensor:
        stream = rng.at("draw", draw)
        if draw % 2:
            outward = ball.project(origin + ball.steepest(stream.normal(origin), origin), origin)
            return torch.as_tensor(outward)
        return torch.as_tensor(ball.sample(origin, stream))


@dataclass
class _Run:
    """A traced run: its records, and what the traces say of the rows that were attacked, by row id.

    fooled: rows on which the goal was reached on what the attack's oracle speaks for, where that is not the victim
    """

    records: Played = field(default_factory=dict)
    unfinished: dict[str, bool] = field(default_factory=dict)
    silent: dict[str, bool] = field(default_factory=dict)
    stranded: dict[str, bool] = field(default_factory=dict)
    fooled: int = 0
    curves: list[Tensor] = field(default_factory=list)

    def mean_curve(self) -> list[float]:
        """The best margin so far after each question, averaged over the rows that were asked."""
        length = max((len(curve) for curve in self.curves), default=0)
        if not length:
            return []
        padded = [nn.functional.pad(c, (0, 0, 0, length - len(c)), value=torch.inf) for c in self.curves]
        best = torch.cummin(torch.cat(padded, 1), 0).values
        best = best[:, torch.isfinite(best).all(0)]
        return [float(value) for value in best.mean(1)] if best.shape[1] else []


class Battery:
    """One pass over the checks, and what they share.

    findings: in the order found
    curves:   everything measured, as plain JSON values
    """

    def __init__(self, case: Case, rows: int, draws: int, queries: int, surrogate: Any) -> None:
        ball: Any = case.threat.ball if isinstance(case.threat, WrapsBall) else case.threat
        if not all(hasattr(ball, name) for name in ("project", "sample", "steepest", "eps", "access")):
            space = case.victim.space
            advice = "name one, --threat-model linf"
            if not isinstance(space, Box):
                advice = (
                    f"{type(space).__name__.lower()} have none; `advkit evaluate` makes the cheap checks on any model"
                )
            raise UsageError(f"the battery walks in balls and {type(case.threat).__name__} is none: {advice}")
        self.n = min(rows, case.n)
        self.draws, self.queries, self.surrogate = draws, queries, surrogate
        self.case = replace(case, n=self.n, attack_misclassified=False)
        settings: dict[str, Any] = {"access": Access.GRADIENTS, "queries": None}
        if isinstance(ball, Lattice):
            settings["lattice"] = 0  # points between files: the model's answers are what is examined
        self.ball: Any = replace(ball, **settings)
        self.findings: list[Finding] = []
        self.indicators: dict[str, float] = {}
        self.curves: dict[str, Any] = {"rows": self.n, "indicators": self.indicators}
        self.white: list[Played] = []

    def run(self, progress: Progress | None) -> None:
        """Every check in turn; a model in training mode gets none but the first."""
        steps: list[tuple[str, Callable[[], None]]] = [
            ("cheap checks", self._cheap),
            ("the attack itself", self._attack),
            ("losses", self._losses),
            ("iterations", self._iterations),
            ("restarts", self._restarts),
            ("eps sweep", self._sweep),
            ("black box", self._square),
            ("transfer", self._transfer),
            ("random search", self._noise),
            ("finite differences", self._differences),
            ("stability", self._stability),
        ]
        for done, (name, step) in enumerate(steps):
            if progress:
                progress(name, done, len(steps))
            step()
            if self._named("training_mode"):
                break
        if progress:
            progress("done", len(steps), len(steps))

    def _named(self, *ids: str) -> bool:
        return any(finding.id in ids and finding.severity != "info" for finding in self.findings)

    def _say(self, *args: Any, **kwargs: Any) -> None:
        self.findings.append(found(*args, **kwargs))

    # Playing

    def _play(self, case: Case, only: set[str] | None = None) -> Played:
        if only is not None and not only:
            return {}
        return {record.id: record for each in LocalEngine().attack(case, {}, only) for record in each.records}

    def _reference(self, *, steps: int = STEPS, restarts: int = 1, loss: str = "margin", **changes: Any) -> Case:
        """The case of the reference attack on the victim; its walk is 2.5 eps long."""
        steps = min(steps, STEPS_RANDOMIZED) if self.case.randomized else steps
        pgd_class: Any = ATTACKS.load("pgd")
        pgd = pgd_class(
            steps=steps,
            step_size=min(1.0, 2.5 / steps),
            restarts=restarts,
            loss=loss,
            eot=self.case.draws if self.case.randomized else 1,
        )
        same = {"attack": pgd, "label": Label(ATTACKS.spec(pgd)), "threat": self.ball, "surrogates": ()}
        return replace(self.case, **{**same, **changes})

    @staticmethod
    def _standing(*runs: Played) -> set[str]:
        """Rows right untouched that none of these runs broke; the first run has met every row."""
        standing = {row for row, record in runs[0].items() if record.outcome != Outcome.WRONG}
        for records in runs:
            standing -= {row for row, record in records.items() if record.outcome == Outcome.BROKEN}
        return standing

    def _share(self, *runs: Played) -> float:
        return len(self._standing(*runs)) / self.n

    def _rises(self, weak: set[str], strong: set[str]) -> tuple[bool, float]:
        """Whether more rows stand under what should be the stronger attack, beyond the paired 95 % interval."""
        both, more, fewer = len(strong & weak), len(strong - weak), len(weak - strong)
        interval = newcombe_paired(both, more, fewer, self.n - both - more - fewer)
        return interval.low > 0, (more - fewer) / self.n

    def _traced(self, case: Case) -> _Run:
        attack = _Traced(case.attack)
        model, decides = attacked_model(case)
        run = _Run()
        for each in LocalEngine().attack(replace(case, attack=attack), {}):
            played, returned = each.records, each.adversarial
            assert returned is not None
            run.records.update({record.id: record for record in played})
            traces = attack.traces[:]
            attack.traces.clear()
            where = [
                i for i, r in enumerate(played) if r.outcome != Outcome.WRONG and "clean_non_finite" not in r.notes
            ]
            if len(traces) != 1 or traces[0].rows != len(where):
                continue  # the batch was halved around a row that raised: it has no one trace
            trace, rows = traces[0], [played[i] for i in where]
            ids = [record.id for record in rows]
            run.curves.append(trace.curves())
            run.unfinished.update(zip(ids, indicators.incomplete_optimization(trace.curves()).tolist(), strict=True))
            if decides:
                came = torch.tensor([record.reached for record in rows])
                run.silent.update(zip(ids, indicators.silent_success(trace.reached(), came).tolist(), strict=True))
            if model is not case.victim:
                points = returned[torch.tensor(where, device=returned.device)]
                answer = MeteredOracle(model, len(where), Access.SCORES, lanes=Lanes.fitting(points))(points)
                fooled = trace.goal.reached(answer).cpu()
                said = torch.tensor([-1 if r.adversarial is None else r.adversarial for r in rows])
                lost = indicators.transfer_failure(decide(answer).cpu(), said, fooled)
                run.stranded.update(zip(ids, lost.tolist(), strict=True))
                run.fooled += int(fooled.sum())
        return run

    # Does the attack do its job?

    def _cheap(self) -> None:
        batches = list(self.case.task.batches(FIRST_ROWS, n=self.n))
        self.ids = [row for batch in batches for row in batch.ids]
        first = batches[0]
        if first.labels is None:
            raise UsageError(f"the battery needs labels and the task {self.case.task.name} gives none")
        # The battery walks along the victim's gradients, so they are checked whatever the case's attacker knows.
        probe = replace(self.case, threat=self.ball, surrogates=())
        self.findings += cheap(probe, first.x.to(self.case.device), first.labels.to(self.case.device))
        if self._named("randomized_output"):
            self.case = replace(self.case, randomized=True)
        self.indicators["I1_unavailable_gradients"] = float(self._named("zero_gradient", "not_differentiable"))

    def _attack(self) -> None:
        self.own = self.case if self.case.attack is not None else self._reference(steps=40)
        run = self._traced(self.own)
        self.own_run = run
        label = str(self.own.label)
        if not self.own.surrogates:
            self.white.append(run.records)
        self.findings += [
            finding for finding in after(self.own, list(run.records.values())) if not self._named(finding.id)
        ]
        self.curves["loss"] = {"attack": label, "mean_margin": run.mean_curve()}

        silent = sum(run.silent.values())
        self.indicators["I3_silent_success"] = silent / len(run.silent) if run.silent else 0.0
        if silent:
            seen = f"on {silent} rows the attack passed a point that reached its goal and returned another"
            self._say("silent_success", "warning", seen, silent / len(run.silent), 0.0, label)

        flags = [flag for row, flag in run.unfinished.items() if run.records[row].outcome == Outcome.ROBUST]
        unfinished = sum(flags) / len(flags) if flags else 0.0
        self.indicators["I4_incomplete_optimization"] = unfinished
        # The best of noisy answers goes on falling for ever, and what has no gradient stands still.
        if unfinished > UNFINISHED and not self.case.randomized and not self._named("zero_gradient"):
            seen = f"the loss was still falling on {sum(flags)} of {len(flags)} surviving rows when the attack ended"
            self._say("incomplete_optimization", "warning", seen, unfinished, UNFINISHED, label)

        if run.stranded:
            lost = sum(run.stranded.values())
            share = lost / run.fooled if run.fooled else 0.0
            self.indicators["I5_transfer_failure"] = share
            if share > STRANDED:
                # That foreign surrogates transfer badly is a result; that a view of the victim does is a fault.
                foreign = bool(self.own.surrogates)
                at_home = "the surrogate" if foreign else "the attacker view"
                seen = f"{lost} of {run.fooled} points that fool {at_home} get another answer from the model"
                self._say("transfer_failure", "info" if foreign else "warning", seen, share, STRANDED, label)
        self._rerun(run)

    def _rerun(self, run: _Run) -> None:
        again = self._play(self.own)
        differ = [row for row, record in run.records.items() if again.get(row) != record]
        if differ:
            worse = sum(row not in again or again[row].outcome != run.records[row].outcome for row in differ)
            seen = f"two identical runs differ on {len(differ)} of {self.n} rows, {worse} of them in the outcome"
            severity = "warning" if worse else "info"
            self._say("nondeterministic_rerun", severity, seen, len(differ) / self.n, 0.0, str(self.own.label))

    # Does the model hide its gradients?

    def _losses(self) -> None:
        self.margin, ce = self._play(self._reference()), self._play(self._reference(loss="ce"))
        self.white += [self.margin, ce]
        low, high = self._share(self.margin), self._share(ce)
        self.curves["losses"] = {"margin": low, "ce": high}
        significant, difference = self._rises(self._standing(self.margin), self._standing(ce))
        if difference > WEAKER and not self._named("zero_gradient_ce_only", "zero_gradient", "not_differentiable"):
            seen = f"{low:.1%} of the rows stand under the margin loss and {high:.1%} under cross-entropy"
            self._say("zero_gradient_ce_only", "warning" if significant else "info", seen, difference, WEAKER)

    def _iterations(self) -> None:
        most = STEPS_RANDOMIZED if self.case.randomized else STEPS
        runs = {1: self._play(self._reference(steps=1)), 10: self._play(self._reference(steps=10)), most: self.margin}
        self.white += [runs[1], runs[10]]
        self.curves["iterations"] = {"steps": [*runs], "robust_accuracy": [self._share(run) for run in runs.values()]}
        if self.case.randomized:
            return  # the best of more noisy answers is more often a lucky one: longer walks may look worse
        for few, many in ((1, 10), (10, most), (1, most)):
            rises, difference = self._rises(self._standing(runs[few]), self._standing(runs[many]))
            if rises:
                seen = f"{many} steps leave {difference:.1%} more rows standing than {few}: the gradient misleads"
                self._say("iterative_weaker_than_single_step", "unreliable", seen, difference, 0.0)
                return

    def _restarts(self) -> None:
        before = self._standing(*self._all())
        self.white.append(self._play(self._reference(steps=20, restarts=10), before))
        gained = (len(before) - len(self._standing(*self._all()))) / self.n
        self.curves["restarts"] = {
            "restarts": [1, 10],
            "robust_accuracy": [len(before) / self.n, len(before) / self.n - gained],
        }
        if gained >= WEAKER:
            seen = f"ten restarts break {gained:.1%} of the rows more than one"
            self._say("incomplete_optimization", "info", seen, gained, WEAKER, "pgd", advice="use restarts=10 or more")

    def _all(self) -> list[Played]:
        """The white-box runs, one that met every row first."""
        return [self.margin, *self.white]

    def _whole(self) -> float | None:
        """The radius from which the ball around any row holds the whole box; None where the box has no end."""
        space = self.case.victim.space
        if not (isinstance(space, Box) and space.bounded):
            return None
        row = next(iter(self.case.task.batches(1, n=1))).x.to(self.case.device)
        low, high = space.bounds_like(row)
        return float(self.ball.distance(high.expand_as(row), low.expand_as(row)).max())

    def _sweep(self) -> None:
        whole = self._whole()
        radii = {self.ball.eps * factor for factor in SWEEP}
        if whole is not None:
            radii = {min(radius, whole) for radius in radii} | {whole}
        sound = {row for row, record in self.margin.items() if record.outcome != Outcome.WRONG}
        standing: dict[float, set[str]] = {}
        for radius in sorted(radii):
            ball = replace(self.ball, eps=radius)
            standing[radius] = self._standing(self._play(self._reference(steps=20, threat=ball))) if radius else sound
        if whole is not None:
            for loss in ("margin", "ce"):  # the few that are left get a real attack before anything is said of them
                last = self._reference(restarts=5, loss=loss, threat=replace(self.ball, eps=whole))
                again = self._play(last, standing[whole])
                standing[whole] -= {row for row, record in again.items() if record.outcome == Outcome.BROKEN}
        self.curves["eps"] = {
            "eps": [*standing],
            "whole_box": whole,
            "robust_accuracy": [len(rows) / self.n for rows in standing.values()],
        }
        for less, more in zip([*standing], [*standing][1:], strict=False):
            rises, difference = self._rises(standing[less], standing[more])
            if rises:
                seen = f"{difference:.1%} more rows stand at eps={more:.4g} than at eps={less:.4g}"
                self._say("non_monotone_in_eps", "unreliable", seen, difference, 0.0)
                break
        if whole is not None:
            self._unlimited(whole, len(standing[whole]), len(sound))

    def _unlimited(self, whole: float, left: int, sound: int) -> None:
        """I6, of the reference attack and of the case's own."""
        failed = left / sound if sound else 0.0
        explained = self._named("zero_gradient", "not_differentiable", "randomized_output")
        if failed and not explained:
            seen = f"{left} of {sound} rows withstand a white-box attack that may change every feature at will"
            self._say("unconstrained_attack_failure", graded(failed), seen, failed, 0.0)
        own = self.own
        share = failed
        if not own.surrogates and own.threat.describe().get("eps") is not None:
            threat: Any = own.threat
            run = self._traced(replace(own, threat=replace(threat, eps=whole)))
            rows = [record for record in run.records.values() if record.outcome != Outcome.WRONG]
            share = indicators.unconstrained_attack_failure(
                torch.ones(len(rows), dtype=torch.bool),
                torch.tensor([record.outcome == Outcome.BROKEN for record in rows], dtype=torch.bool),
                torch.tensor([run.silent.get(record.id, False) for record in rows], dtype=torch.bool),
            )
            explained |= self._named("incomplete_optimization", "zero_gradient_ce_only", "budget_violation")
            if share > GROSS and not failed and not explained:
                seen = f"the attack leaves {share:.1%} of the rows standing although it may change all of the input"
                self._say("unconstrained_attack_failure", "warning", seen, share, GROSS, str(own.label))
        self.indicators["I6_unconstrained_attack_failure"] = share

    def _black_box(self, name: str, case: Case) -> float:
        """Play a black-box attack where the white box failed, compare, and return what is left standing."""
        # A randomised victim's comparison needs the rows on which the black box is behind, too.
        records = self._play(case, None if self.case.randomized else self.left)
        white = [record for run in self._all() for record in run.values()]
        finding = black_box_beats_white_box(white, records.values(), name, randomized=self.case.randomized)
        if finding:
            self.findings.append(finding)
        return len(self.left - {row for row, r in records.items() if r.outcome == Outcome.BROKEN}) / self.n

    def _square(self) -> None:
        self.left = self._standing(*self._all())
        self.curves["white_box"] = len(self.left) / self.n
        if not isinstance(self.ball, Linf | L2):
            return  # square has no patches for the other norms
        square_class: Any = ATTACKS.load("square")
        square = square_class(queries=self.queries)
        ball = replace(self.ball, access=Access.SCORES)
        case = self._reference(attack=square, label=Label(ATTACKS.spec(square)), threat=ball)
        self.curves["square"] = {"queries": self.queries, "robust_accuracy": self._black_box("square", case)}

    def _transfer(self) -> None:
        surrogate = self.surrogate if self.surrogate is not None else _undefended(self.case)
        if surrogate is None:
            return
        name = str(surrogate.describe().name)
        case = self._reference(steps=40, surrogates=((name, surrogate),))
        share = self._black_box("transfer", replace(case, label=replace(case.label, source=name)))
        self.curves["transfer"] = {"surrogate": name, "robust_accuracy": share}

    def _noise(self) -> None:
        if self.case.randomized:
            return  # of a thousand noisy answers one is always wrong
        ball = replace(self.ball, access=Access.LABELS)
        search = self._reference(attack=RandomSearch(draws=self.draws), label=Label("random"), threat=ball)
        records = self._play(search, self.left)
        broken = sum(record.outcome == Outcome.BROKEN for record in records.values())
        self.curves["random_search"] = {"draws": self.draws, "rows": len(records), "broken": broken}
        if broken:
            share = broken / self.n
            seen = f"{self.draws} random points of the ball break {broken} of {len(records)} rows called robust"
            self._say("random_search_finds_failures", graded(share, 0.01), seen, share, 0.0, "random")

    def _probe(self, most: int) -> tuple[Tensor, Any, RowRng] | None:
        """Rows right untouched, their goal and their streams; None where there are none."""
        known = {Outcome.ROBUST, Outcome.BROKEN}
        ids = [row for row in self.ids if self.margin[row].outcome in known][:most]
        if not ids:
            return None
        wanted, xs, labels = set(ids), [], []
        for batch in self.case.task.batches(self.case.batch_size, n=self.n):
            where = [i for i, row in enumerate(batch.ids) if row in wanted]
            if where and batch.labels is not None:
                xs.append(batch.x[where])
                labels.append(batch.labels[where])
        x, y = torch.cat(xs).to(self.case.device), torch.cat(labels).to(self.case.device)
        rng = RowRng.from_ids(self.case.seed, ids, device=self.case.device).at("diagnostics")
        clean = MeteredOracle(self.case.victim, len(x), Access.SCORES, lanes=Lanes.fitting(x))(x)
        return x, self.case.rule(y, clean, rng.at("goal")).under("margin"), rng

    def _differences(self) -> None:
        if self.case.randomized or self._named("zero_gradient", "not_differentiable"):
            return
        victim, space = self.case.victim, self.case.victim.space
        view = victim.attacker_view()
        with frozen(*victim.modules()), own_randomness(self.case.device, self.case.seed, "differences"):
            probe = self._probe(8)
            if probe is None:
                return
            x, goal, rng = probe
            width = 1.0
            z = self.ball.sample(x, rng.at("start"))
            if isinstance(space, Box) and space.bounded:
                low, high = space.bounds_like(z)
                width = float((high - low).max())
                z = z + 0.01 * ((low + high) / 2 - z)  # off the walls, where a model that clamps has a kink
            errors, double = gradient_errors(view, victim, z, goal, rng, width)
        threshold = MISMATCH if double else MISMATCH_SINGLE
        # The median: a point whose step crosses a kink of the model proves nothing.
        middle = float(errors.median())
        self.curves["gradient"] = {"relative_error": errors.tolist(), "float64": double}
        if middle > threshold:
            declared = view is not victim
            seen = f"autograd and central differences disagree: median relative error {middle:.2g} of {len(errors)}"
            seen += "; the model declares an attacker view, which may" if declared else ""
            self._say("gradient_mismatch", "info" if declared else "warning", seen, middle, threshold)

    def _stability(self) -> None:
        victim, space = self.case.victim, self.case.victim.space
        with frozen(*victim.modules()), own_randomness(self.case.device, self.case.seed, "stability"):
            probe = self._probe(self.n)
            if probe is None:
                return
            x, goal, rng = probe
            bounded = isinstance(space, Box) and space.bounded
            width = space.extent[1] - space.extent[0] if bounded else 1.0
            oracle = MeteredOracle(victim, len(x), Access.SCORES, lanes=Lanes.fitting(x))
            repeats = self.case.draws if self.case.randomized else 1

            def loss(z: Tensor) -> Tensor:
                return torch.stack([goal.loss(oracle(z)).double() for _ in range(repeats)]).mean(0)

            base, moved = loss(x), []
            for draw in range(indicators.DRAWS):
                z = x + (rng.at("noise", draw).uniform(x) - 0.5) * indicators.RADIUS * width
                moved.append(loss(space.clamp(z) if bounded else z))
        change = indicators.unstable_predictions(base, torch.stack(moved))
        change = change[torch.isfinite(change)]
        value = float(change.mean()) if len(change) else 0.0
        self.indicators["I2_unstable_predictions"] = value
        # A model that is a staircase jumps by nature, and has been called one.
        if value > UNSTABLE and not self._named("zero_gradient", "not_differentiable"):
            seen = f"noise of at most 4/255 of the input's range changes the margin by {value:.0%} on average"
            self._say("unstable_predictions", "warning", seen, value, UNSTABLE)


def gradient_errors(view: Any, victim: Any, x: Tensor, goal: Any, rng: Any, width: float = 1.0) -> tuple[Tensor, bool]:
    """Relative errors [B] of the view's gradient against central differences of the victim, and whether in float64.

    The direction is half the gradient and half random, so that the derivative along it is never small by accident.
    width: of the input's range; the step is 1e-3 of it in float64, 1e-2 in float32
    """
    lanes = Lanes.fitting(x)
    z = x
    pair = _in_double((view, victim), x)
    if pair is not None:
        (view, victim), z = pair, x.double()
    oracle = MeteredOracle(victim, len(z), Access.SCORES, lanes=lanes)
    _, gradient, _ = MeteredOracle(view, len(z), lanes=lanes).gradient(z, goal)

    def unit(v: Tensor) -> Tensor:
        return nn.functional.normalize(v.flatten(1), dim=1).view_as(v)

    direction = unit(unit(gradient) + unit(rng.at("direction").normal(x).to(z.dtype)))
    step = (1e-3 if pair is not None else 1e-2) * width
    slope = (goal.loss(oracle(z + step * direction)) - goal.loss(oracle(z - step * direction))) / (2 * step)
    claimed = (gradient * direction).flatten(1).sum(1)
    size = torch.maximum(slope.abs(), claimed.abs())
    errors = torch.where(size > 1e-12, (slope - claimed).abs() / size.clamp(min=1e-12), torch.zeros_like(size))
    return errors.double().cpu(), pair is not None


def _in_double(models: Sequence[Any], x: Tensor) -> list[Any] | None:
    """Copies that compute in float64, or None where they can't be made; the originals are not touched."""
    made: dict[int, Any] = {}
    for model in models:
        if id(model) in made:
            continue
        try:
            double = model.copy() if isinstance(model, Copies) else copy.deepcopy(model)
            for module in double.modules():
                module.double()
            answer = MeteredOracle(double, len(x), Access.SCORES, lanes=Lanes.fitting(x))(x.double())
        except Exception:
            log.debug("no float64 copy of %s", model, exc_info=True)
            return None
        if answer.dtype != torch.float64 or not bool(torch.isfinite(answer).all()):
            return None
        made[id(model)] = double
    return [made[id(model)] for model in models]


def _undefended(case: Case) -> Any:
    """The victim with its defense taken off, where that can be; else an undefended model of the task's zoo, or None."""
    from advkit.models import zoo

    if isinstance(case.victim, Undefended):
        return case.victim.undefended
    own = case.victim.describe().state_sha256
    for card in zoo.find(case.task.name, "", "none"):
        try:
            model = zoo.load(card.name).to(case.device)
        except AdvkitError as error:
            log.warning("the zoo's %s can't be loaded: %s", card.name, error)
            continue
        held = getattr(model.space, "shape", None)
        fits = held is None or tuple(held) == tuple(next(iter(case.task.batches(1, n=1))).x.shape[1:])
        if fits and model.classes == case.task.classes and model.describe().state_sha256 != own:
            return model
    return None


def battery(
    case: Case,
    *,
    rows: int = 100,
    draws: int = 1000,
    queries: int = 1000,
    surrogate: Any = None,
    progress: Progress | None = None,
) -> tuple[list[Finding], dict[str, Any]]:
    """The expensive checks, on the first rows of the case; findings, and every curve measured as plain JSON values.

    rows:      rows used
    draws:     random points per surviving row
    queries:   of the square attack
    surrogate: an undefended model whose adversarial examples are shown to the victim; None looks into the zoo
    progress:  called with what runs now, steps done and steps in all

    Every run is played by the harness's own scenario. The white-box runs are made on the victim whatever knowledge the
    case's threat model grants: they examine the model, not the attacker.

    Raises UsageError where the threat model is no ball.
    """
    if rows < 1:
        raise UsageError(f"rows is {rows}; the battery needs at least one")
    checks = Battery(case, rows, draws, queries, surrogate)
    checks.run(progress)
    return merge(checks.findings), checks.curves
