"""Reconstruction: models of the user's own by name, attacks and speeds that are refused, lost rows, edited figures."""

from __future__ import annotations

import json
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

import advkit
from advkit.cli.train import _score as score_text
from advkit.core.errors import AdvkitError, BadModel, UsageError
from advkit.core.protocols import Access
from advkit.core.rng import RowRng
from advkit.evaluation.report.compare import _goal as goal_of
from advkit.evaluation.report.compare import compare
from advkit.evaluation.report.document import Report
from advkit.evaluation.report.leaderboard import scan
from advkit.evaluation.report.verify import verify
from advkit.evaluation.run.store import read_records
from advkit.evaluation.victims import protected
from advkit.models import MODELS
from advkit.tasks import TASKS
from advkit.threat_models.goals.reconstruction import Reconstruction

NET = "python:own_reconstructions:net"


class Scaled(nn.Module):
    def __init__(self, factor=0.9):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x):
        return self.factor * x


@pytest.fixture(autouse=True)
def own(monkeypatch):
    """A module of the user's own, with factories of a function, of a network and of what does not fit."""
    module = types.ModuleType("own_reconstructions")
    module.function = lambda: lambda x: 0.9 * x
    module.net = Scaled
    module.classifier = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    module.no_factory = lambda x: 0.9 * x
    monkeypatch.setitem(sys.modules, "own_reconstructions", module)


def run(model=NET, attack="pgd:steps=2", **more):
    more = {"n": 6, "device": "cpu", "threat_model": "l2:eps=0.5", **more}
    return advkit.evaluate(attack=attack, model=model, task="digits-reconstruction", **more)


@pytest.mark.parametrize("name", ["function", "net"])
def test_a_factory_of_a_function_or_network_is_a_model(name):
    task = TASKS.build("digits-reconstruction")
    model = protected(f"python:own_reconstructions:{name}", "none", task, device="cpu").model
    assert (model.answer_shape, model.classes) == ((1, 8, 8), None)
    x = next(iter(task.batches(6))).x
    metrics = run(f"python:own_reconstructions:{name}").metrics
    expected = (0.1 * x).double().square().flatten(1).mean(1).sqrt().mean()
    assert metrics["clean_rmse"]["value"] == pytest.approx(float(expected), abs=1e-6)
    # the answer to x + d is 0.9 (x + d): the worst d lies along -x
    worst = ((0.1 * x).flatten(1).norm(dim=1) + 0.9 * 0.5) / 8
    assert metrics["clean_rmse"]["value"] < metrics["rmse"]["value"] <= float(worst.mean()) + 1e-6


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("python:own_reconstructions:classifier", "wants reconstructed samples"),
        ("python:own_reconstructions:no_factory", "expected a factory"),
        ("zoo:digits-mlp", "this task wants reconstructed samples"),
    ],
)
def test_models_that_do_not_fit_are_named_without_classes(name, said):
    with pytest.raises(BadModel, match=said) as refused:
        protected(name, "none", TASKS.build("digits-reconstruction"), device="cpu")
    assert "has 0" not in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"attack": "fab:steps=2"}, "looks for the nearest point"),
        ({"attack": "fab-t:steps=2"}, "looks for the nearest point"),
        ({"speed": "bf16"}, "use fp32"),
        ({"speed": "fp16"}, "use fp32"),
    ],
)
def test_what_would_understate_the_error_is_refused(more, said):
    with pytest.raises(AdvkitError, match=said) as refused:
        run(**more)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("attack", ["apgd-dlr:steps=2", "apgd-t:steps=2"])
def test_other_attacks_do_not_depend_on_the_threshold(attack):
    found = [run(attack=attack, n=3, goal=f"reconstruction:rmse={rmse}").metrics["rmse"] for rmse in (0.02, 9)]
    assert found[0] == found[1]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two finished runs on the same samples, by attacks of which each is the worse for some of them."""
    place = tmp_path_factory.mktemp("runs")
    folders = [place / name for name in ("flat", "steep")]
    for folder, attack in zip(folders, ("fgsm", "square:queries=30"), strict=True):
        run(Scaled().eval(), attack, out=folder, n=8, threat_model="linf:eps=0.1", goal="reconstruction:rmse=0.12")
    return folders


@pytest.mark.slow
def test_two_runs_on_the_same_samples_rank_by_the_worst_of_each_sample(pair):
    errors = [{r.id: r.figures["rmse"] for r in read_records(folder / "records.jsonl")} for folder in pair]
    assert errors[0] != errors[1]
    board = scan(pair[0].parent)
    lines = [victim for group in board.groups for victim in group.victims]
    assert {line.how for line in lines} == {"worst case per sample over 2 reports", "one report"}
    (line,) = [line for line in lines if line.how != "one report"]  # of who has the weights; the other asks for scores
    assert line.score.value == pytest.approx(np.mean([max(errors[0][row], errors[1][row]) for row in errors[0]]))
    assert line.score.low < line.score.value < line.score.high


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda entry: entry["ci"].update(low=0.9 * entry["ci"]["low"]), "the interval of rmse"),
        (lambda entry: entry["ci"].update(high=entry["ci"]["high"] + 1e-3), "the interval of rmse"),
        (lambda entry: entry.update(ci=None), "the interval of rmse"),
        (lambda entry: entry.update(n=7), "over n = 7 samples"),
        (lambda entry: None, None),
    ],
)
def test_an_edited_interval_or_count_of_a_mean_is_found(pair, tmp_path, edit, said):
    shutil.copytree(pair[0], tmp_path / "run")
    file = tmp_path / "run" / "report.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    edit(data["metrics"]["rmse"])
    file.write_text(json.dumps(data), encoding="utf-8")
    faults = verify(Report.load(tmp_path / "run")).faults
    assert faults == () if said is None else any(said in fault for fault in faults)


def test_runs_with_different_thresholds_are_not_compared(pair, tmp_path):
    run(Scaled().eval(), "fgsm", out=tmp_path / "other", n=8, threat_model="linf:eps=0.1")
    with pytest.raises(UsageError, match="different goals"):
        compare(pair[0], tmp_path / "other")
    assert any("different goals" in note for note in compare(pair[0], tmp_path / "other", force=True).notes)
    assert compare(pair[0], pair[1]).robust.n == 8


class Fails:
    """Raises on samples whose first pixels sum to more than a bound; others are moved as far as allowed."""

    needs = Access.SCORES

    def __call__(self, oracle, x, goal, threat, rng, /):
        if bool((x.flatten(1).sum(1) > 19.5).any()):
            raise ValueError("lost")
        return threat.project(x + 0.1, x)


def test_a_sample_on_which_the_attack_raised_has_no_error_under_attack(tmp_path):
    x = next(iter(TASKS.build("digits-reconstruction").batches(8))).x
    kept = int((x.flatten(1).sum(1) <= 19.5).sum())
    assert 0 < kept < 8
    metrics = run(lambda x: 0.9 * x, Fails(), n=8, out=tmp_path / "run").metrics
    assert metrics["rmse"]["n"] == metrics["clean_rmse"]["n"] == metrics["over_threshold"]["denominator"] == kept
    assert metrics["robust_accuracy"]["numerator"] == kept
    assert metrics["rmse"]["value"] > 0
    assert verify(Report.load(tmp_path / "run")).faults == ()


def test_the_error_of_a_finite_answer_is_finite():
    goal = Reconstruction(torch.zeros(2, 1, 2, 2), 0.25)
    answer = torch.stack([torch.full((1, 2, 2), 1e30), torch.full((1, 2, 2), 0.1)])
    assert goal.error(answer).tolist() == pytest.approx([1e30, 0.1])
    assert goal.reached(answer).tolist() == [True, False]


@pytest.mark.parametrize(
    ("spec", "classes"),
    [
        ("reconstructor:measurements=10000000000", 0),
        ("reconstructor:hidden=10000000000", 0),
        ("mlp:hidden=10000000000", 10),
    ],
)
def test_a_network_that_fits_no_memory_is_refused_in_one_line(spec, classes):
    with pytest.raises(BadModel, match="choose smaller layers") as refused:
        MODELS.build(spec)((1, 8, 8), classes, RowRng.from_ids(0, ["sizes"]))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("reconstruction", "reconstruction:rmse=0.25", True),
        ("reconstruction", "reconstruction:rmse=0.2", False),
        ("targeted:how=next", "targeted:how=random", False),
        ("near:file=a.npy", "near:file=b.npy", False),
    ],
)
def test_goals_are_the_same_where_their_settings_are(one, other, same):
    told = [goal_of({"request": {"goal": goal}, "threat_model": {"goal": goal.split(":")[0]}}) for goal in (one, other)]
    assert (told[0] == told[1]) is same


def test_a_validation_score_of_errors_is_no_rate():
    assert (
        score_text({"score": 0.75, "scores": "samples"})
        == "validation score 0.7500 (1 minus the root mean squared error)"
    )
    assert score_text({"score": 0.75, "scores": "classes"}) == "validation score 75.0 %"
