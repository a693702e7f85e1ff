"""Reconstruction: the attacker's goal against closed forms, errors measured on the victim, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import advkit
from advkit.attacks import ATTACKS
from advkit.core.errors import AdvkitError, BadInput, BadModel, UsageError
from advkit.core.oracle import MeteredOracle
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.defenses import DEFENSES
from advkit.evaluation.run.store import read_records
from advkit.evaluation.victims import agreeing, protected, train_victim
from advkit.models import MODELS
from advkit.models.fronts import Denoised
from advkit.models.torch import FunctionModel, TorchModel
from advkit.tasks import TASKS
from advkit.threat_models import GOALS
from advkit.threat_models.goals.reconstruction import Reconstruction, ReconstructionRule
from advkit.threat_models.lp import L2

SHAPE = (1, 4, 4)
D = math.prod(SHAPE)
IDS = [f"row {i}" for i in range(6)]


class Linear(nn.Module):
    """x -> M x, in the shape of x."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def forward(self, x):
        return (x.flatten(1) @ self.matrix.T).reshape(x.shape)


def linear(seed=0, scale=1.0):
    matrix = scale * torch.randn(D, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return TorchModel(Linear(matrix).eval(), Box(-50.0, 50.0, SHAPE), answer_shape=SHAPE, name="linear")


def untrained(task):
    return MODELS.build("reconstructor:hidden=16")(
        task.answer_shape, 0, RowRng.from_ids(0, ["untrained"]), space=task.space
    )


@pytest.fixture(scope="module")
def small():
    """A reconstructor of digits that is trained a little, and the task."""
    task = TASKS.build("digits-reconstruction")
    from advkit.training.loop import Objective, Recipe, fit

    blank = MODELS.build("reconstructor:hidden=32")(
        task.answer_shape, 0, RowRng.from_ids(0, ["small"]), space=task.space
    )
    recipe = Recipe(epochs=3, batch_size=64, lr=3e-3, validation=0.0)
    return fit(blank, task.training(), Objective(), recipe, RowRng.from_ids(0, ["t"]), progress=False).model, task


def farthest(matrix, residual, eps):
    """max |residual + matrix d| over |d| <= eps, by the secular equation of its trust-region problem."""
    _, s, vt = np.linalg.svd(matrix)
    u = np.linalg.svd(matrix)[0]
    pull = s * (u.T @ residual)  # of M' r in the basis of right singular vectors

    def length(lam):
        return np.linalg.norm(pull / (lam - s**2))

    low, high = s[0] ** 2 * (1 + 1e-14), s[0] ** 2 + np.linalg.norm(pull) / eps + 1
    for _ in range(300):
        middle = (low + high) / 2
        low, high = (middle, high) if length(middle) > eps else (low, middle)
    d = vt.T @ (pull / (high - s**2))
    assert np.linalg.norm(d) == pytest.approx(eps, rel=1e-6)
    return float(np.linalg.norm(residual + matrix @ d))


# --- the goal


def test_the_gradient_of_the_loss_is_that_of_finite_differences():
    model = linear()
    x = torch.randn(6, *SHAPE, dtype=torch.float64)
    goal, z = Reconstruction(x, 0.5), x + torch.randn_like(x)
    loss, gradient, answer = MeteredOracle(model, 6).gradient(z, goal)
    torch.testing.assert_close(loss, -goal.error(answer).square())
    step = 1e-6
    for place in range(D):
        way = torch.zeros(D, dtype=torch.float64)
        way[place] = step
        ahead, behind = (goal.loss(model(z + sign * way.reshape(SHAPE))) for sign in (1, -1))
        torch.testing.assert_close(gradient.flatten(1)[:, place], (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-6)


def test_reached_margin_and_error_agree():
    clean = torch.zeros(4, *SHAPE)
    answer = clean.clone()
    answer[0], answer[1], answer[2], answer[3, 0, 0, 0] = 0.25, 0.5, 0.75, torch.nan
    goal = GOALS.build("reconstruction:rmse=0.5").about(clean)
    torch.testing.assert_close(goal.error(answer)[:3], torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    assert goal.reached(answer).tolist() == [False, False, True, False]
    torch.testing.assert_close(goal.margin(answer)[:3], torch.tensor([0.25, 0.0, -0.25]))
    assert goal.margin(answer)[3] == torch.inf
    assert goal.take(torch.tensor([2])).reached(answer[2:3]).tolist() == [True]
    assert goal.under("ce") is goal


@pytest.mark.parametrize("rmse", [0, -1, math.nan, math.inf])
def test_a_threshold_is_a_number_above_zero(rmse):
    with pytest.raises(UsageError, match=r"rmse is .*; expected a root mean squared error above 0"):
        ReconstructionRule(rmse=rmse)


@pytest.mark.parametrize("shape", [(6, D), (6, 1, 4, 3), (6,)])
def test_answers_of_another_shape_are_refused(shape):
    goal = Reconstruction(torch.zeros(6, *SHAPE), 0.5)
    with pytest.raises(BadModel, match=r"expected reconstructed samples, float \[6, 1, 4, 4\]"):
        goal.loss(torch.zeros(shape))
    with pytest.raises(BadInput, match="take"):
        goal.loss(torch.zeros(5, *SHAPE))


# --- closed forms: the worst change of a linear reconstruction


@pytest.mark.parametrize("eps", [0.5, 2.0])
def test_pgd_finds_the_worst_change_of_a_linear_reconstruction(eps):
    model = linear()
    matrix = model.module.matrix.detach().numpy()
    x = torch.randn(6, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    goal = Reconstruction(x, 1e-3)
    ball = L2(eps=eps).bind(model.space)
    rng = RowRng.from_ids(0, IDS)
    z = ATTACKS.build("pgd:steps=40")(MeteredOracle(model, 6, decides=False), x, goal, ball, rng)
    for row in range(6):
        clean = x[row].flatten().numpy()
        bound = farthest(matrix, matrix @ clean - clean, eps) / math.sqrt(D)
        found = float(goal.error(model(z))[row].detach())
        assert 0.99 * bound <= found <= bound * (1 + 1e-9)


def test_without_a_clean_error_the_worst_is_the_top_singular_value():
    model = linear(scale=0.3)
    x = torch.zeros(6, *SHAPE, dtype=torch.float64)  # M 0 = 0: nothing is lost when clean
    goal, ball = Reconstruction(x, 1e-3), L2(eps=1.5).bind(model.space)
    assert float(goal.error(model(x)).max()) == 0
    z = ATTACKS.build("pgd:steps=40,step_size=1")(
        MeteredOracle(model, 6, decides=False), x, goal, ball, RowRng.from_ids(0, IDS)
    )
    bound = 1.5 * float(torch.linalg.matrix_norm(model.module.matrix.detach(), 2)) / math.sqrt(D)
    found = goal.error(model(z)).detach()
    assert float(found.max()) <= bound * (1 + 1e-9)
    assert float(found.min()) >= 0.99 * bound


def test_the_harness_is_never_above_the_bound_of_a_linear_model():
    task = TASKS.build("digits-reconstruction")
    matrix = torch.eye(64) + 0.2 * torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    report = advkit.evaluate(
        attack="pgd:steps=40", model=Linear(matrix).eval(), task=task, threat_model="l2:eps=0.05", n=20, device="cpu"
    )
    clean = next(iter(task.batches(20))).x.flatten(1)
    residuals = (clean @ matrix.T - clean).double().numpy()
    whole = [farthest(matrix.double().numpy(), residual, 0.05) / 8 for residual in residuals]
    assert report.metrics["rmse"]["value"] <= np.mean(whole) * (1 + 1e-5)  # the box leaves less than the ball


@pytest.mark.parametrize(
    "spec",
    ["fgsm", "pgd:steps=5", "mifgsm:steps=5", "apgd-ce:steps=5", "apgd-t:steps=5", "square:queries=60", "vmi:steps=3"],
)
def test_attacks_on_classes_work_towards_it_unchanged(spec, small):
    model, task = small
    batch = next(iter(task.batches(16)))
    goal, ball = GOALS.build("reconstruction:rmse=0.9").about(batch.x), L2(eps=1.0).bind(task.space)
    oracle = MeteredOracle(model, 16, decides=False)
    z = ATTACKS.build(spec)(oracle, batch.x, goal, ball, RowRng.from_ids(0, batch.ids))
    assert bool(ball.admits(z, batch.x).all())
    with torch.no_grad():
        before, after = goal.error(model(batch.x)), goal.error(model(z))
    assert bool((after >= before - 1e-6).all())
    assert float((after - before).mean()) > 0.02


def test_fab_crosses_the_threshold_at_a_smaller_distance_than_pgd_takes(small):
    model, task = small
    batch = next(iter(task.batches(16)))
    with torch.no_grad():
        errors = Reconstruction(batch.x, 1.0).error(model(batch.x))
    goal, ball = (
        GOALS.build(f"reconstruction:rmse={float(errors.max()) + 0.02:.3f}").about(batch.x),
        L2(eps=3.0).bind(task.space),
    )
    z = ATTACKS.build("fab:steps=20")(MeteredOracle(model, 16), batch.x, goal, ball, RowRng.from_ids(0, batch.ids))
    with torch.no_grad():
        reached = goal.reached(model(z))
    assert bool(reached.any())
    assert float(ball.distance(z, batch.x)[reached].mean()) < 2.0


# --- through the harness


def test_errors_are_those_of_the_victim_on_what_was_returned(small, tmp_path):
    model, task = small
    report = advkit.evaluate(
        attack="pgd:steps=5", model=model, task=task, threat_model="l2:eps=1", goal="reconstruction:rmse=0.3", n=20,
        device="cpu", out=tmp_path / "run",
    )  # fmt: skip
    kept, records = report.adversarial(), read_records(tmp_path / "run" / "records.jsonl")
    with torch.no_grad():
        after = (model(kept.adversarial) - kept.clean).square().flatten(1).mean(1).sqrt()
        before = (model(kept.clean) - kept.clean).square().flatten(1).mean(1).sqrt()
    by_id = {record.id: record for record in records}
    for row, name in enumerate(kept.ids):
        record = by_id[name]
        assert record.figures["rmse"] == pytest.approx(float(after[row]), abs=1e-6)
        assert record.figures["clean_rmse"] == pytest.approx(float(before[row]), abs=1e-6)
        assert record.figures["over_threshold"] is bool(after[row] > 0.3)
        assert record.margin == pytest.approx(0.3 - float(after[row]), abs=1e-6)
        assert (record.clean, record.adversarial, record.label) == (None, None, None)
        assert record.outcome in ("robust", "broken", "wrong")
        assert record.queries == 6  # no sample stops early, and none is left out
    metrics = report.metrics
    assert metrics["rmse"]["value"] == pytest.approx(float(after.double().mean()), abs=1e-6)
    assert metrics["rmse"]["ci"]["low"] < metrics["rmse"]["value"] < metrics["rmse"]["ci"]["high"]
    assert metrics["over_threshold"]["numerator"] == int((after > 0.3).sum())
    assert metrics["clean_accuracy"]["numerator"] == int((before <= 0.3).sum())
    assert report.threat.startswith("l2 eps=1, reconstruction, white box")
    assert "n_classes" not in report.to_dict()["dataset"]


def test_the_threshold_changes_no_example(small):
    model, task = small
    found = [
        advkit.evaluate(
            attack="pgd:steps=5", model=model, task=task, goal=f"reconstruction:rmse={rmse}", n=10, device="cpu"
        ).metrics
        for rmse in (0.01, 0.9)
    ]
    assert found[0]["rmse"] == found[1]["rmse"]
    assert [each["over_threshold"]["numerator"] for each in found] == [10, 0]


@pytest.mark.slow
def test_without_a_radius_nothing_changes_and_black_boxes_are_attacked_too(small):
    model, task = small
    nothing = advkit.evaluate(attack="pgd:steps=3", model=model, task=task, threat_model="l2:eps=0", n=10, device="cpu")
    assert nothing.metrics["rmse"]["value"] == nothing.metrics["clean_rmse"]["value"]

    def f(x):
        with torch.no_grad():
            return model(x)

    square = advkit.evaluate(
        attack="square:queries=100", model=f, task=task, threat_model="l2:eps=1,access=scores", n=10, device="cpu"
    )
    assert square.metrics["rmse"]["value"] > square.metrics["clean_rmse"]["value"] + 0.02


@pytest.mark.slow
def test_a_chain_has_both_attackers(small):
    model, task = small
    defense = DEFENSES.build("fo_ds:sigma=0.1,width=8,targets=labels,recipe=[epochs=1,validation=0]")
    chain = defense.protect(model, task.training(), RowRng.from_ids(0, ["chain"]))
    assert isinstance(chain, Denoised)
    assert chain.answer_shape == task.answer_shape
    report = advkit.evaluate(attack="pgd:steps=5", model=chain, task=task, threat_model="l2:eps=1", n=20, device="cpu")
    metrics = report.metrics
    assert metrics["oblivious_rmse"]["n"] == metrics["rmse"]["n"] == 20
    assert metrics["clean_rmse"]["value"] < metrics["oblivious_rmse"]["value"] <= metrics["rmse"]["value"] + 1e-3
    assert any("oblivious" in row.label for row in report.rows())


def test_no_number_from_the_victim_is_no_error_of_zero(small):
    _, task = small

    def f(x):
        return torch.full_like(x, torch.nan)

    report = advkit.evaluate(attack="square:queries=5", model=f, task=task, threat_model="l2:access=scores,eps=1", n=5,
                             device="cpu")  # fmt: skip
    assert "rmse" not in report.metrics
    assert report.metrics["clean_accuracy"]["numerator"] == 0


@pytest.mark.slow
def test_commands_read_reports_without_classes(small, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from advkit.cli.group import app

    model, task = small
    monkeypatch.chdir(tmp_path)
    for name, steps in (("a", 2), ("b", 5)):
        advkit.evaluate(attack=f"pgd:steps={steps}", model=model, task=task, n=10, device="cpu", out=tmp_path / name)
    runner = CliRunner()
    for line, said in (
        (["show", "a"], "RMSE under attack"),
        (["compare", "a", "b"], "McNemar"),
        (["leaderboard", ".", "--out", "board"], ""),
    ):
        done = runner.invoke(app, line)
        assert done.exit_code == 0, done.output
        assert said in done.output
    page = next(Path("board").glob("*.md")).read_text(encoding="utf-8")
    assert "RMSE" in page


@pytest.mark.slow
def test_training_and_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("ADVKIT_CACHE", str(tmp_path / "cache"))
    made = train_victim(
        "reconstructor:hidden=8", "none", "digits-reconstruction", recipe="epochs=1", device="cpu", out=tmp_path / "net"
    )
    task = TASKS.build("digits-reconstruction")
    held = protected(f"path:{made['file']}", "none", task, device="cpu").model
    assert held.answer_shape == (1, 8, 8)
    assert held.classes is None
    x = next(iter(task.batches(5))).x
    assert held(x).shape == x.shape
    with pytest.raises(BadModel, match="answers samples, this task has 10 classes"):
        protected(f"path:{made['file']}", "none", TASKS.build("digits"), device="cpu")
    front = train_victim(
        f"path:{made['file']}", "zo_ae_ds:width=8,d_z=2,hidden=8,pretraining=[epochs=1,validation=0]",
        "digits-reconstruction", recipe="epochs=1", device="cpu", out=tmp_path / "front",
    )  # fmt: skip
    spec = f"zo_ae_ds:width=8,d_z=2,hidden=8,weights={front['file']}"
    chain = protected(f"path:{made['file']}", spec, task, device="cpu").model
    assert isinstance(chain, Denoised)
    log = json.loads((tmp_path / "front" / "training.json").read_text(encoding="utf-8"))
    assert log["queries"]["answered"] == front["queries"]["answered"] > 0


# --- what is refused, in one line


REFUSED = {
    "untargeted": ({"goal": "untargeted"}, "goal untargeted is about classes"),
    "an ordered goal": ({"attack": "quadattack:k=2"}, "about classes"),
    "a suite": ({"attack": "autoattack"}, "wants the worst answer on every sample"),
    "a classifier": ({"model": "zoo:digits-mlp"}, "answers 10 classes"),
    "an architecture of classes": ({"model": "mlp:hidden=8"}, "mlp:hidden=8 answers classes"),
    "adversarial training": ({"model": "reconstructor:hidden=8", "defense": "pgd_at"}, "a loss on classes"),
    "a certificate": (
        {"model": "reconstructor:hidden=8", "threat_model": "certified:n0=10,n=20", "attack": "none"},
        "a certificate speaks of classes",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(name, tmp_path, monkeypatch, small):
    monkeypatch.setenv("ADVKIT_CACHE", str(tmp_path))
    asked, said = REFUSED[name]
    if asked.get("model") == "reconstructor:hidden=8" and "defense" not in asked:
        asked = {**asked, "model": small[0]}
    with pytest.raises(AdvkitError, match=said) as refused:
        advkit.evaluate(
            **{"model": small[0], "attack": "pgd:steps=2", "task": small[1], "n": 5, "device": "cpu", **asked}
        )
    assert "\n" not in str(refused.value)


def test_a_goal_on_samples_needs_a_task_of_samples():
    with pytest.raises(UsageError, match="use --goal untargeted, or a task such as digits-reconstruction"):
        advkit.evaluate(model="zoo:digits-mlp", task="digits", goal="reconstruction", n=5, device="cpu")
    with pytest.raises(BadModel, match="this task has 10 classes"):
        advkit.evaluate(model="reconstructor", task="digits", n=5, device="cpu")


@pytest.mark.parametrize("shape", [(64,), (1, 8, 7)])
def test_a_model_of_another_shape_is_refused(shape, small):
    def f(x):
        return torch.zeros(len(x), *shape)

    with pytest.raises(BadModel, match=r"wants reconstructed samples, float \[4, 1, 8, 8\]"):
        advkit.evaluate(model=f, task=small[1], n=5, device="cpu")
    model = FunctionModel(lambda x: x.flatten(1), small[1].space, answer_shape=(64,))
    with pytest.raises(BadModel, match=r"answers samples \[64\]"):
        agreeing(model, small[1])


def test_the_map_is_fixed_and_measures_what_is_said():
    task = TASKS.build("digits-reconstruction")
    one, other = (
        MODELS.build(f"reconstructor:measurements=16,seed={seed}")(SHAPE, 0, RowRng.from_ids(number, ["m"]))
        for number, seed in ((0, 3), (1, 3))
    )
    matrix = one.module[0].matrix
    assert torch.equal(matrix, other.module[0].matrix)  # one map for all seeds of training
    assert matrix.shape == (16, D)
    assert not any(each is matrix for each in one.module.parameters())
    wide = MODELS.build("reconstructor:measurements=400")((1, 28, 28), 0, RowRng.from_ids(0, ["m"])).module[0].matrix
    assert float(wide.var()) == pytest.approx(1 / 400, rel=0.01)
    assert untrained(task).describe().classes is None
