"""Every broken fixture raises its own flag and no other; a sound model raises none.

The figures of evaluation_methodology section 7 come from an MLP 64-64-10 on scikit-learn's digits, trained here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from advkit.attacks.gradient.pgd import PGD
from advkit.attacks.query.square import Square
from advkit.attacks.suites import Stage, Suite
from advkit.core.errors import UsageError
from advkit.core.protocols import Access, Label, Outcome, Record
from advkit.core.rng import RowRng
from advkit.defenses.inputs.bit_depth import BitDepth
from advkit.evaluation.api import evaluate, resolve
from advkit.evaluation.run.case import Case
from advkit.evaluation.run.engine import LocalEngine
from advkit.evaluation.trust import battery as expensive
from advkit.evaluation.trust import diagnostics
from advkit.evaluation.trust.advice import ADVICE
from advkit.evaluation.trust.findings import SEVERITIES, Finding, found, merge
from advkit.evaluation.trust.gradient_checks import undefended
from advkit.evaluation.trust.gradients import gradient_errors
from advkit.evaluation.trust.random_search import RandomSearch
from advkit.models.torch import FunctionModel, TorchModel
from advkit.tasks.arrays import Arrays
from advkit.tasks.digits import Digits
from advkit.testing.victims import Leaver, linear, nan_off, noisy, quantised
from advkit.threat_models.goals.untargeted import Untargeted, UntargetedRule
from advkit.threat_models.lp import L2, Linf

DIGITS = Digits()
SCHEMA = Path(diagnostics.__file__).parents[1] / "report" / "evaluation_report.schema.json"


def trained(eps: float, epochs: int) -> TorchModel:
    """The MLP of section 7; eps > 0 trains it on three-step adversarial examples."""
    data = DIGITS.training()
    assert data is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
        for _ in range(epochs):
            for rows in torch.randperm(len(data)).split(64):
                x, y = data.x[rows], data.y[rows]
                z = x + eps * (2 * torch.rand_like(x) - 1) if eps else x
                for _ in range(3 if eps else 0):
                    z = z.detach().clamp(0, 1).requires_grad_()
                    slope = torch.autograd.grad(nn.functional.cross_entropy(net(z), y), z)[0]
                    z = (z.detach() + 0.5 * eps * slope.sign()).clamp(x - eps, x + eps).clamp(0, 1)
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(z.detach()), y).backward()
                optimizer.step()
    return TorchModel(net.eval(), DIGITS.space, 10, name="mlp")


@pytest.fixture(scope="module")
def plain() -> TorchModel:
    return trained(0.0, 20)


@pytest.fixture(scope="module")
def hardened() -> TorchModel:
    return trained(0.1, 8)


def case(model: Any, attack: Any = None, *, threat: Any = None, task: Any = DIGITS, n: int = 48) -> Case:
    attack = PGD() if attack is None else attack
    threat = Linf(0.1) if threat is None else threat
    return Case(
        task=task,
        victim=model,
        attack=attack,
        threat=threat.bind(model.space),
        rule=UntargetedRule(),
        label=Label(type(attack).__name__.lower()),
        n=min(n, len(task)),
    )


class After(nn.Module):
    """A function of a module's answer."""

    def __init__(self, inner: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.function = inner, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.inner(x))


class Before(After):
    """A function of a module's input."""

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.inner(self.function(x))
        return answer


def wrapped(kind: type[After], model: TorchModel, function: Callable[[Tensor], Tensor]) -> TorchModel:
    return TorchModel(kind(model.module, function).eval(), model.space, model.classes, name="wrapped")


def saturated(model: TorchModel) -> TorchModel:
    return wrapped(After, model, lambda logits: 1e6 * logits)


def first(case: Case) -> tuple[Tensor, Tensor]:
    batch = next(iter(case.task.batches(64, n=min(64, len(case.task)))))
    assert batch.labels is not None
    return batch.x, batch.labels


def cheap(case: Case) -> list[Finding]:
    return diagnostics.cheap(case, *first(case))


def grave(findings: Sequence[Finding]) -> set[str]:
    return {finding.id for finding in findings if finding.severity != "info"}


def play(case: Case) -> list[Record]:
    return [record for each in LocalEngine().attack(case, {}) for record in each.records]


def battery(case: Case, **settings: Any) -> tuple[set[str], dict[str, Any]]:
    quick = {"rows": 24, "draws": 60, "queries": 60, **settings}
    findings, curves = expensive.battery(case, **quick)
    json.dumps(curves, allow_nan=False)
    return grave(findings), curves


class Forgetful:
    """Walks to the goal and then back to where it came from."""

    needs: ClassVar[Access] = Access.GRADIENTS

    def __call__(self, oracle: Any, x: Tensor, goal: Any, ball: Any, rng: Any, /) -> Tensor:
        z = x.clone()
        for _ in range(20):
            z = ball.project(z - 0.25 * ball.steepest(oracle.gradient(z, goal)[1], z), x)
        oracle(z)
        for _ in range(10):
            oracle(x)
        return x.clone()


# The battery


@pytest.mark.slow
def test_sound_models_raise_nothing(plain: TorchModel, hardened: TorchModel) -> None:
    for model in (plain, hardened):
        ids, curves = battery(case(model))
        assert ids == set()
        accuracies = curves["eps"]["robust_accuracy"]
        assert accuracies == sorted(accuracies, reverse=True)
        assert accuracies[-1] == 0.0
        assert curves["eps"]["eps"] == pytest.approx([0.0, 0.025, 0.05, 0.1, 0.2, 0.4, 1.0])
        assert curves["random_search"]["broken"] == 0
        errors = sorted(curves["gradient"]["relative_error"])
        assert errors[len(errors) // 2] < 1e-6  # a step may cross a kink of the network here and there
        assert curves["gradient"]["float64"]
        assert curves["white_box"] <= min(curves["iterations"]["robust_accuracy"])
        assert curves["square"]["robust_accuracy"] == curves["white_box"]


@pytest.mark.slow
def test_saturated_logits_are_named_by_their_loss(plain: TorchModel) -> None:
    broken = saturated(plain)
    by_ce, by_margin = cheap(case(broken)), cheap(case(broken, PGD(loss="margin")))
    assert grave(by_ce) == grave(by_margin) == {"zero_gradient_ce_only"}
    assert [f.severity for f in by_ce + by_margin] == ["unreliable", "warning"]
    ids, curves = battery(case(broken))
    assert ids == {"zero_gradient_ce_only"}
    assert curves["losses"]["margin"] < curves["losses"]["ce"] - 0.3
    assert grave(diagnostics.after(case(broken), play(case(broken)))) == {"zero_gradient_ce_only"}


@pytest.mark.slow
def test_probabilities_are_named(plain: TorchModel) -> None:
    broken = wrapped(After, plain, lambda logits: logits.softmax(1))
    assert grave(cheap(case(broken))) == {"probability_output"}
    assert battery(case(broken))[0] == {"probability_output"}


@pytest.mark.slow
@pytest.mark.parametrize("cut", [False, True])
def test_a_quantised_input_hides_its_gradient(plain: TorchModel, cut: bool) -> None:
    broken = wrapped(Before, quantised(plain, 3), Tensor.detach) if cut else quantised(plain, 3)
    hidden = {"zero_gradient", "not_differentiable"} if cut else {"zero_gradient"}
    assert grave(cheap(case(broken))) == hidden
    if cut:
        return
    ids, curves = battery(case(broken), surrogate=plain, rows=40, draws=400, queries=200)
    assert ids == {"zero_gradient", "black_box_beats_white_box", "random_search_finds_failures"}
    assert curves["indicators"]["I1_unavailable_gradients"] == 1.0
    assert curves["transfer"]["robust_accuracy"] < curves["white_box"]
    assert curves["square"]["robust_accuracy"] < curves["white_box"]
    assert grave(diagnostics.after(case(broken), play(case(broken)))) == {"zero_gradient"}


@pytest.mark.slow
def test_noise_at_inference_is_named(plain: TorchModel) -> None:
    broken = noisy(plain)
    assert grave(cheap(case(broken))) == {"randomized_output"}
    findings = cheap(case(broken, PGD(eot=5)))
    assert [f.severity for f in findings] == ["warning"]
    ids, curves = battery(replace(case(broken, PGD(steps=20)), draws=5), rows=16, queries=20)
    assert ids == {"randomized_output", "unstable_predictions"}
    assert curves["indicators"]["I2_unstable_predictions"] > 0.1


def test_training_mode_is_named_and_nothing_is_asked(plain: TorchModel) -> None:
    module = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 10)).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    broken = TorchModel(module, DIGITS.space, 10)
    assert grave(cheap(case(broken))) == {"training_mode"}
    assert battery(case(broken))[0] == {"training_mode"}
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


@pytest.mark.slow
def test_an_attack_outside_the_ball_is_named(plain: TorchModel) -> None:
    attacked = case(plain, Leaver())
    findings = diagnostics.after(attacked, play(attacked))
    assert grave(findings) == {"budget_violation"}
    assert battery(attacked)[0] == {"budget_violation"}


@pytest.mark.slow
def test_an_attack_that_forgets_its_best_point_is_named(plain: TorchModel) -> None:
    ids, curves = battery(case(plain, Forgetful()))
    assert ids == {"silent_success", "returned_unchanged"}  # it hands back the clean input
    records = {r.id: r for r in play(case(plain, PGD(steps=20, start="origin", step_size=0.25), n=24))}
    broken = sum(r.outcome == Outcome.BROKEN for r in records.values())
    attacked = sum(r.outcome != Outcome.WRONG for r in records.values())
    assert curves["indicators"]["I3_silent_success"] == pytest.approx(broken / attacked, abs=2 / attacked)


@pytest.mark.slow
def test_two_tiny_steps_are_incomplete(plain: TorchModel) -> None:
    ids, curves = battery(case(plain, PGD(steps=2, step_size=0.01)))
    assert ids == {"incomplete_optimization"}
    assert curves["indicators"]["I4_incomplete_optimization"] > 0.9


@pytest.mark.slow
def test_a_wrong_backward_pass_disagrees_with_differences(plain: TorchModel) -> None:
    class Turned(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            return gradients[0].flip(-1)

    broken = wrapped(Before, plain, Turned.apply)
    x, labels = first(case(plain))
    rng, goal = RowRng.from_ids(0, [str(i) for i in range(8)]), Untargeted(labels[:8], "margin")
    z = 0.01 + 0.98 * x[:8]
    right, double = gradient_errors(plain, plain, z, goal, rng)
    wrong, _ = gradient_errors(broken, broken, z, goal, rng)
    assert double
    assert float(right.max()) < 1e-6
    assert float(wrong.median()) > 0.1
    assert "gradient_mismatch" in battery(case(broken))[0]


def test_float32_is_the_fallback_where_no_double_copy_works(plain: TorchModel) -> None:
    weight = plain.module[1].weight.detach().clone()
    function = FunctionModel(lambda x: (x.flatten(1) @ weight.T)[:, :10], DIGITS.space, 10)
    x, labels = first(case(plain))
    rng, goal = RowRng.from_ids(0, [str(i) for i in range(8)]), Untargeted(labels[:8], "margin")
    errors, double = gradient_errors(function, function, 0.01 + 0.98 * x[:8], goal, rng)
    assert not double
    assert float(errors.median()) < 1e-3


def wells(margin: Callable[[Tensor], Tensor], rows: int = 100) -> tuple[TorchModel, Arrays]:
    """Two classes on one feature around 0.5: the margin of class 0 is a function of the distance walked."""

    class Well(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            height = margin(x.flatten(1)[:, 0] - 0.5)
            return torch.stack([height, -height], 1)

    task = Arrays(torch.full((rows, 1), 0.5), torch.zeros(rows, dtype=torch.long), classes=2)
    return TorchModel(Well().eval(), task.space, 2), task


@pytest.mark.slow
def test_ripples_make_many_steps_worse_than_one() -> None:
    # A slope with ripples of a fifth of eps: small steps stay in the valley they start in, one long step leaps out.
    model, task = wells(lambda t: 1.05 - 9 * t.abs() - 0.2 * torch.cos(2 * torch.pi * t / 0.02))
    findings, curves = expensive.battery(
        case(model, PGD(loss="margin"), task=task, n=60), rows=60, draws=20, queries=20
    )
    one, _, hundred = curves["iterations"]["robust_accuracy"]
    assert hundred > one
    assert "iterative_weaker_than_single_step" in grave(findings)


@pytest.mark.slow
def test_a_narrow_pit_is_missed_from_far_away() -> None:
    # A pit beside the row; outside it the slope leads away. A larger ball starts further off and never finds it.
    def margin(t: Tensor) -> Tensor:
        away = (t - 0.05).abs()
        return torch.minimum(away / 0.01 - 2, 1 - 0.1 * away)

    model, task = wells(margin)
    findings, curves = expensive.battery(
        case(model, PGD(loss="margin"), task=task, n=60), rows=60, draws=20, queries=20
    )
    assert {"non_monotone_in_eps", "unconstrained_attack_failure"} <= grave(findings)
    assert curves["eps"]["robust_accuracy"][-1] > 0


@pytest.mark.slow
def test_state_left_behind_makes_two_runs_differ(plain: TorchModel) -> None:
    class Tired(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return plain.module(x) * (1 + 1e-4 * self.calls)  # type: ignore[no-any-return]

    broken = TorchModel(Tired().eval(), DIGITS.space, 10)
    findings, _ = expensive.battery(case(broken), rows=20, draws=10, queries=10)
    assert "nondeterministic_rerun" in {finding.id for finding in findings}


def test_the_battery_needs_a_ball_and_rows(plain: TorchModel) -> None:
    class NoBall:
        scenario = "evasion"

    with pytest.raises(UsageError, match="none: name one"):
        expensive.battery(replace(case(plain), threat=NoBall()))
    with pytest.raises(UsageError, match="at least one"):
        expensive.battery(case(plain), rows=0)


@pytest.mark.slow
def test_the_battery_repeats_itself_and_gives_randomness_back(hardened: TorchModel) -> None:
    state = torch.random.get_rng_state()
    once = expensive.battery(case(hardened), rows=12, draws=20, queries=20)
    assert torch.equal(state, torch.random.get_rng_state())
    again = expensive.battery(replace(case(hardened), batch_size=5), rows=12, draws=20, queries=20)
    again[1]["loss"] = once[1]["loss"]  # a mean over batches of other sizes
    assert once == again


# The cheap checks


def test_cheap_checks_cost_what_they_say_and_leave_no_trace(hardened: TorchModel) -> None:
    forwards, backwards = [], []

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = hardened.module

        def forward(self, x: Tensor) -> Tensor:
            forwards.append(len(x))
            if x.requires_grad:
                x.register_hook(lambda gradient: backwards.append(len(gradient)))
            answer: Tensor = self.inner(x)
            return answer

    model = TorchModel(Counting().eval(), DIGITS.space, 10)
    grad, backward, tensor_backward = torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward
    state = torch.random.get_rng_state()
    flags = [p.requires_grad for p in model.module.parameters()]
    assert cheap(case(model)) == []
    # Six forwards, one of them in two halves, and two with backward.
    assert (len(forwards), len(backwards)) == (9, 2)
    assert max(forwards) == 64
    assert torch.equal(state, torch.random.get_rng_state())
    assert flags == [p.requires_grad for p in model.module.parameters()]
    assert (torch.autograd.grad, torch.autograd.backward) == (grad, backward)
    assert torch.Tensor.backward is tensor_backward


def test_no_gradient_is_asked_where_none_is_granted(plain: TorchModel) -> None:
    broken = quantised(plain, 3)
    assert cheap(case(broken, Square(queries=10), threat=Linf(0.1, access=Access.SCORES))) == []
    assert cheap(replace(case(broken), surrogates=(("plain", plain),))) == []


def test_optimisation_during_the_answer_is_seen(plain: TorchModel) -> None:
    def purify(x: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            z = x.detach().clone().requires_grad_()
            slope = torch.autograd.grad((z - 0.5).square().sum(), z)[0]
        return x - 1e-3 * slope

    findings = cheap(case(wrapped(Before, plain, purify)))
    assert grave(findings) == {"inference_time_optimization"}
    assert "torch.autograd.grad" in findings[0].message


def test_entry_points_are_put_back_when_the_model_raises() -> None:
    grad = torch.autograd.grad

    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("no answer")

    with pytest.raises(RuntimeError, match="no answer"):
        cheap(case(FunctionModel(fail, DIGITS.space, 10)))
    assert torch.autograd.grad is grad


def test_a_backward_that_raises_is_not_differentiable(plain: TorchModel) -> None:
    class Refuses(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            raise RuntimeError("one way only")

    findings = cheap(case(wrapped(Before, plain, Refuses.apply)))
    assert grave(findings) == {"not_differentiable"}
    assert "one way only" in findings[0].message


def test_nan_gradients_are_not_called_zero(plain: TorchModel) -> None:
    # sqrt(|x|) at 0 has an infinite slope, and infinity times 0 is NaN.
    broken = wrapped(Before, plain, lambda x: x + 0 * (x - x).abs().sqrt())
    assert grave(cheap(case(broken))) == {"nonfinite_gradient"}


def test_half_precision_is_named(plain: TorchModel) -> None:
    model = plain.copy()
    model.module.bfloat16()
    findings = cheap(case(model))
    assert "low_precision" in grave(findings)
    assert "bfloat16" in next(f.message for f in findings if f.id == "low_precision")


def test_bits_that_vary_are_a_remark(plain: TorchModel) -> None:
    def jitter(logits: Tensor) -> Tensor:
        return logits * (1 + 1e-6 * torch.rand_like(logits))

    findings = cheap(case(wrapped(After, plain, jitter)))
    assert [(f.id, f.severity) for f in findings] == [("randomized_output", "info")]


def test_few_classes_and_guesses_are_remarks() -> None:
    model = linear(features=6, classes=2)
    x = torch.rand(40, 6, generator=torch.Generator().manual_seed(1))
    answer = model(x).argmax(1).detach()
    for labels, ids in ((answer, {"too_few_classes"}), (1 - answer, {"too_few_classes", "preprocessing_mismatch"})):
        findings = cheap(case(model, task=Arrays(x, labels, classes=2)))
        assert {f.id for f in findings} == ids
        assert grave(findings) == set()


# The records


def record(row: str, outcome: Outcome, attack: str = "pgd", **more: Any) -> Record:
    return Record(id=row, attack=attack, outcome=outcome, **more)


def test_records_without_faults_say_nothing(plain: TorchModel) -> None:
    assert diagnostics.after(case(plain), play(case(plain))) == []
    assert diagnostics.after(case(plain), []) == []


def test_nan_makes_an_interval(plain: TorchModel) -> None:
    broken = nan_off(plain, DIGITS.rows.x)
    attacked = case(broken, PGD(steps=3))
    records = play(attacked)
    findings = diagnostics.after(attacked, records)
    assert grave(findings) == {"nonfinite_gradient"}
    unknown = sum(r.outcome == Outcome.NON_FINITE for r in records)
    assert unknown > 0
    assert f"on {unknown} of 48 samples" in findings[0].message
    assert f"[0.0000, {unknown / 48:.4f}]" in findings[0].message


def test_errors_rounding_and_survived_nan_are_told(plain: TorchModel) -> None:
    rows = [
        record("a", Outcome.ROBUST),
        record("b", Outcome.ERROR, message="ValueError: no"),
        record("c", Outcome.BROKEN, eight_bit=False),
        record("d", Outcome.BROKEN, eight_bit=True, notes=("met_non_finite",)),
    ]
    findings = diagnostics.after(case(plain), rows)
    assert {(f.id, f.severity) for f in findings} == {
        ("attack_error", "unreliable"),
        ("low_precision", "info"),
        ("nonfinite_gradient", "info"),
    }
    error = next(f for f in findings if f.severity == "unreliable")
    assert "ValueError: no" in error.message
    assert "[0.2500, 0.5000]" in error.message
    assert next(f for f in findings if f.id == "low_precision").value == 0.5


def test_a_black_box_must_break_what_every_white_box_left() -> None:
    rows = [str(i) for i in range(100)]
    pgd = [record(row, Outcome.BROKEN if int(row) < 50 else Outcome.ROBUST) for row in rows]
    apgd = [record(row, Outcome.BROKEN if int(row) == 60 else Outcome.ROBUST, "apgd") for row in rows]
    same = [
        record(row, Outcome.BROKEN if int(row) < 40 or int(row) == 60 else Outcome.ROBUST, "square") for row in rows
    ]
    assert diagnostics.black_box_beats_white_box(pgd + apgd, same, "square") is None
    ahead = [record(row, Outcome.BROKEN if int(row) >= 60 else Outcome.ROBUST, "square") for row in rows]
    finding = diagnostics.black_box_beats_white_box(pgd + apgd, ahead, "square")
    assert finding is not None
    assert (finding.id, finding.severity, finding.value) == ("black_box_beats_white_box", "unreliable", 0.39)
    # The black box is behind on 50 rows: with noisy verdicts 39 prove nothing.
    assert diagnostics.black_box_beats_white_box(pgd + apgd, ahead, "square", randomized=True) is None
    assert diagnostics.black_box_beats_white_box([], ahead, "square") is None
    stranger = [record("x", Outcome.BROKEN, "square")]
    assert diagnostics.black_box_beats_white_box(pgd, stranger, "square") is None


@dataclass(frozen=True, kw_only=True)
class Short(Suite):
    """One walk along gradients, a sentinel, and what it calls for."""

    needs: ClassVar[Access] = Access.GRADIENTS

    def stages(self) -> tuple[Stage, ...]:
        return (
            Stage(name="walk", attack=PGD(steps=40, restarts=3)),
            Stage(name="sentinel", attack=Square(queries=100), sentinel=True),
            Stage(name="square", attack=Square(queries=200), when="escalated"),
            Stage(name="again", attack=PGD(steps=10, loss="margin"), when="escalated"),
        )


def test_rows_that_fall_to_a_suites_sentinel_are_counted_by_stage(plain: TorchModel) -> None:
    suite = case(plain, Short(), n=100)

    def stage(name: str, rows: range, broken: int, wrong: int = 0) -> list[Record]:
        outcomes = [Outcome.WRONG] * wrong + [Outcome.BROKEN] * broken
        outcomes += [Outcome.ROBUST] * (len(rows) - len(outcomes))
        return [record(str(i), o, suite.label.attack, stage=name) for i, o in zip(rows, outcomes, strict=True)]

    walk, sentinel = stage("walk", range(100), 20, 10), stage("sentinel", range(30, 100), 5)
    assert diagnostics.after(suite, walk + stage("sentinel", range(30, 100), 0)) == []
    told = walk + sentinel + stage("square", range(35, 100), 3) + stage("again", range(38, 100), 2)
    (finding,) = diagnostics.after(suite, told)
    assert (finding.id, finding.severity, finding.attack) == ("black_box_beats_white_box", "unreliable", "short")
    assert finding.value == 0.08
    assert "broke 8 samples that the gradients of walk had not (sentinel 5 of 70, square 3 of 65)" in finding.message
    assert "of 100 samples 70 were robust before, 60 after" in finding.message
    assert "attacker_view" in finding.advice
    # Fewer than one row in twenty is a warning; on noisy verdicts it never is more.
    (few,) = diagnostics.after(suite, walk + stage("sentinel", range(30, 100), 2))
    (noise,) = diagnostics.after(replace(suite, randomized=True), told)
    assert few.severity == noise.severity == "warning"


@pytest.mark.slow
def test_the_sentinels_find_on_a_quantised_victim_is_in_the_report(plain: TorchModel) -> None:
    settings: dict[str, Any] = {"task": "digits", "threat_model": "linf:eps=0.1", "n": 48, "device": "cpu"}
    suite: Any = Short()
    masked = evaluate(suite, model=quantised(plain, 6), **settings)
    (flag,) = [f for f in masked.flags if f["id"] == "black_box_beats_white_box"]
    stages = {attack["name"].rpartition("/")[2]: attack for attack in masked.to_dict()["attacks"]}
    broken = [stages[name]["attack_success_rate"]["numerator"] for name in ("sentinel", "square")]
    assert broken[0] > 0
    assert flag["value"] == pytest.approx(sum(broken) / 48)
    walked, end = stages["walk"]["cumulative_robust_accuracy"], masked.metrics["robust_accuracy"]
    assert f"of 48 samples {walked['numerator']} were robust before, {end['numerator']} after" in flag["message"]
    sound = evaluate(suite, model=plain, **settings)
    assert not [f for f in sound.flags if f["id"] == "black_box_beats_white_box"]


def test_the_battery_transfers_from_the_model_without_its_defense(plain: TorchModel) -> None:
    behind = BitDepth(bits=3).protect(plain, None, RowRng.from_ids(0, ["a"]))
    assert undefended(case(behind)) is plain
    findings = diagnostics.cheap(case(behind), *first(case(behind)))
    assert {(f.id, f.severity) for f in findings} == {("not_differentiable", "info")}
    assert "behind bit-depth" in findings[0].message


# Findings


def test_flags_fit_the_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    if not SCHEMA.exists():
        pytest.skip("the schema is not there yet")
    flags = json.loads(SCHEMA.read_text(encoding="utf-8"))["properties"]["diagnostics"]["properties"]["flags"]
    assert set(ADVICE) == set(flags["items"]["properties"]["id"]["enum"])
    assert set(SEVERITIES) == set(flags["items"]["properties"]["severity"]["enum"])
    finding = found("zero_gradient", "warning", "seen", float("nan"), 0.0, "pgd")
    flag = finding.to_dict()
    jsonschema.validate([flag], flags)
    assert "value" not in flag
    assert flag["message"] == f"seen ({ADVICE['zero_gradient']})"


def test_merge_keeps_the_gravest_of_each() -> None:
    make = Finding
    findings = [
        make("a", "info", "1"),
        make("b", "warning", "2"),
        make("a", "unreliable", "3"),
        make("a", "info", "4", attack="x"),
    ]
    assert [f.message for f in merge(findings)] == ["3", "2", "4"]


@dataclass(frozen=True)
class Seen:
    """Counts the points that a random search asks about, all of them admitted."""

    inner: Any
    ball: Any
    origin: Tensor
    asked: list[Tensor]

    def __call__(self, z: Tensor, of: Tensor | None = None) -> Tensor:
        assert of is not None
        assert bool(self.ball.admits(z, self.origin[of]).all())
        self.asked.append(of)
        return self.inner(z).detach()  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("ball", [Linf(0.3), L2(0.6)])
def test_random_search_keeps_the_first_hit_in_any_batch(ball: Any) -> None:
    model = linear(features=6, classes=2)
    x = torch.rand(12, 6, generator=torch.Generator().manual_seed(3))
    labels = model(x).argmax(1).detach()
    rng, goal, ball = RowRng.from_ids(0, [str(i) for i in range(12)]), Untargeted(labels), ball.bind(model.space)
    asked: list[Tensor] = []
    best = RandomSearch(draws=80)(Seen(model, ball, x, asked), x, goal, ball, rng)
    hit = goal.reached(model(best).detach())
    distance = model.distance(x, labels, "linf" if isinstance(ball, Linf) else "l2")
    assert bool(hit.any())
    assert not bool(hit[distance > ball.eps].any())
    assert torch.equal(best[~hit], x[~hit])
    assert torch.bincount(torch.cat(asked), minlength=12)[~hit].tolist() == [80] * int((~hit).sum())
    for row in range(12):
        index = torch.tensor([row])
        alone = RandomSearch(draws=80)(
            Seen(model, ball, x[index], []), x[index], goal.take(index), ball, rng.take(index)
        )
        assert torch.equal(alone, best[index])


@pytest.mark.slow
def test_where_there_are_no_balls_the_battery_says_so_and_names_none() -> None:
    with pytest.raises(UsageError, match="transcripts have none") as refused:
        expensive.battery(resolve("beast:k=2,length=2", "ppl_filter", "prompts", "toychat", n=2, device="cpu"))
    assert "linf" not in str(refused.value)


def test_a_suffix_longer_than_its_slot_is_said_before_the_run(caplog):
    """The search ends with the slot; who asked for more is told, in the report and before anything is spent."""
    from advkit.evaluation.api import resolve

    settings = {"task": "prompts", "model": "toychat", "n": 1, "device": "cpu"}
    for attack, threat, words in (
        ("beast", "suffix", "beast asks for up to 40 tokens, the threat model admits 20"),
        ("random_suffix:length=9", "suffix:n=8", "asks for up to 9 tokens, the threat model admits 8"),
        ("beast:length=20", "suffix", ""),
        ("beast:length=5,ngram=2", "suffix:n=10", ""),
        ("beast:length=6,ngram=2", "suffix:n=10", "asks for up to 12 tokens, the threat model admits 10"),
    ):
        caplog.clear()
        asked = resolve(attack, threat_model=threat, **settings)
        batch = next(iter(asked.task.batches(1)))
        found = [
            each for each in diagnostics.cheap(asked, batch.x, batch.labels) if each.id == "incomplete_optimization"
        ]
        assert [words in each.message for each in found] == ([True] if words else [])
        assert (words in caplog.text) if words else not caplog.text
        assert all(each.severity == "info" for each in found)
