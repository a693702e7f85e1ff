"""Targeted success: counted over the samples whose label and clean answer are not the target, right or wrong."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import advkit
from advkit.attacks.gradient.pgd import PGD
from advkit.attacks.suites import Stage, Suite
from advkit.core.errors import ReportError, StaleRun
from advkit.core.protocols import Access, Outcome, Record
from advkit.evaluation import api
from advkit.evaluation.compare import compare
from advkit.evaluation.counts import clean_notes, contested, count, ended, was_right
from advkit.evaluation.execute import run
from advkit.evaluation.report import Report, merge
from advkit.evaluation.report.verify import verify
from advkit.evaluation.run.case import Case
from advkit.evaluation.run.engine import open_store
from advkit.evaluation.run.store import read_examples, read_records
from advkit.evaluation.trust.context import correct_rows, robust
from advkit.models.torch import TorchModel
from advkit.threat_models import GOALS
from advkit.threat_models.goals.targeted import Targeted
from advkit.threat_models.tapm import Tapm

COUNTED = ("clean_accuracy", "robust_accuracy", "attack_success_rate")
N = 120


@pytest.fixture(scope="module")
def weak(digits) -> nn.Module:
    """A linear model of digits that is wrong about a good part of them."""
    data = digits.training()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        for _ in range(30):
            nn.functional.cross_entropy(net(data.x), data.y).backward()
            optimizer.step()
            optimizer.zero_grad()
    return net.eval().requires_grad_(False)


def rates(report: Report) -> dict[str, tuple[int, int]]:
    return {name: (report.metrics[name]["numerator"], report.metrics[name]["denominator"]) for name in COUNTED}


# Against predictions made and counted without the harness

WANTED = {
    "targeted:how=next": lambda y, _: (y + 1) % 10,
    "targeted:how=class,target=3": lambda y, _: np.full_like(y, 3),
    "targeted:how=least_likely": lambda y, scores: np.where(np.arange(10) == y[:, None], np.inf, scores).argmin(1),
}


ATTACKS = {
    "pgd:steps=5": "linf:eps=0.1",
    "square:queries=40": "linf:eps=0.15,access=scores",
    "fab:steps=5": "l2:eps=0.5",
    "mifgsm:steps=5": "transfer:sources=zoo:digits-public-mlp,eps=0.2",
    "lean": "linf:eps=0.1",
}
QUICK = {("pgd:steps=5", goal) for goal in WANTED} | {("square:queries=40", "targeted:how=next")}
QUICK |= {("mifgsm:steps=5", "targeted:how=class,target=3"), ("lean", "targeted:how=class,target=3")}


@pytest.mark.parametrize(
    ("attack", "goal"),
    [
        pytest.param(attack, goal, marks=() if (attack, goal) in QUICK else pytest.mark.slow)
        for attack, goal in product(ATTACKS, WANTED)
    ],
)
def test_rates_are_those_of_the_raw_predictions(attack, goal, digits, weak, tmp_path):
    threat = ATTACKS[attack]
    case = api.resolve(attack, "none", digits, weak, threat, goal=goal, n=N, device="cpu")
    (batch,) = digits.batches(N, n=N)
    y, before = batch.labels.numpy(), _scores(weak, batch.x.numpy())
    target = WANTED[goal](y, before)
    reached = np.zeros(N, dtype=bool)
    place = {row: i for i, row in enumerate(batch.ids)}
    for row, image in returned(case, tmp_path / "examples"):  # one image per sample and stage of a suite
        reached[place[row]] |= _scores(weak, image[None]).argmax() == target[place[row]]
    right, aimed_at = before.argmax(1) == y, (y != target) & (before.argmax(1) != target)
    wrong = aimed_at & ~right
    assert wrong.sum() > 10, "the model is not wrong often enough to tell the denominators apart"

    report = advkit.evaluate(attack, task=digits, model=weak, threat_model=threat, goal=goal, n=N, out=tmp_path / "run")
    found = rates(report)
    assert found["clean_accuracy"] == (right.sum(), N)
    assert found["attack_success_rate"] == ((reached & aimed_at).sum(), aimed_at.sum())
    assert found["robust_accuracy"] == ((right & ~(reached & aimed_at)).sum(), N)
    assert report.metrics["attack_success_rate"]["denominator_kind"] == "clean_not_target"
    assert 0 <= report.attack_success_rate <= 1
    assert report.attack_success_rate > 0 or "least_likely" in goal, "nothing was reached: the test shows little"
    assert report.robust_accuracy <= report.clean_accuracy
    # Every one of them met the attack, the wrong ones too, and no other did.
    met = {r.id for r in read_records(tmp_path / "run" / "records.jsonl") if r.forwards}
    assert met == {row for row, counts in zip(batch.ids, aimed_at, strict=True) if counts}
    assert verify(Report.load(tmp_path / "run")).faults == ()


def returned(case: Case, folder: Path) -> list[tuple[str, np.ndarray]]:
    """The images that the attack returned, with their samples' ids."""
    store = open_store(case, folder)
    run(replace(case, keep=case.n), store)
    store.close()
    return [(key.rpartition("|")[2], pair[1].numpy()) for key, pair in read_examples(folder).items()]


def _scores(net: nn.Module, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return net(torch.from_numpy(np.ascontiguousarray(x))).numpy()


@pytest.mark.parametrize(
    ("goal", "holds"),
    [
        ("ordered-topk:k=2", lambda order, wanted: (order[:, :2] == wanted).all(1)),
        ("topk:k=2", lambda order, wanted: (np.sort(order[:, :2], 1) == np.sort(wanted, 1)).all(1)),
    ],
)
def test_top_k_goals_are_sought_on_misread_samples_too(goal, holds, digits, weak, tmp_path):
    asked: list[Tensor] = []

    @dataclass(frozen=True)
    class Listening:
        """The rule, and the targets that it drew."""

        inner: Any
        kind: ClassVar[str] = "targeted"

        def __call__(self, labels: Tensor, answer: Tensor, rng: Any) -> Any:
            made = self.inner(labels, answer, rng)
            asked.append(made.targets)
            return made

    (batch,) = digits.batches(N, n=N)
    case = api.resolve("apgd-margin:steps=5", "none", digits, weak, "l2:eps=1", goal=goal, n=N, device="cpu")
    found = dict(returned(replace(case, rule=Listening(GOALS.build(goal)), batch_size=N), tmp_path))
    wanted = next(t for t in reversed(asked) if len(t) == N).numpy()
    x = np.stack([found[row] for row in batch.ids])
    order, clean = (np.argsort(-_scores(weak, z), 1) for z in (x, batch.x.numpy()))
    aimed_at = ~holds(clean, wanted)
    c = count(read_records(tmp_path / "records.jsonl"))
    assert (c.broken, c.attackable) == ((holds(order, wanted) & aimed_at).sum(), aimed_at.sum())
    assert c.correct == (clean[:, 0] == batch.labels.numpy()).sum()
    assert c.attackable > c.correct


@pytest.mark.slow
def test_spikes_and_events_with_targets(tmp_path):
    for name, request in {
        "pixels": {
            "attack": "spiking:pgd,surrogate=pdsg",
            "model": "snn",
            "task": "digits",
            "threat_model": "linf:eps=0.2",
        },
        "events": {"attack": "topk_grad", "task": "digits-dvs"},
    }.items():
        report = advkit.evaluate(**request, goal="targeted:how=class,target=3", n=40, device="cpu", out=tmp_path / name)
        records = read_records(tmp_path / name / "records.jsonl")
        y, before, after = (np.array([getattr(r, what) for r in records]) for what in ("label", "clean", "adversarial"))
        aimed_at = (y != 3) & (before != 3)
        assert (aimed_at & (before != y)).sum() > 0, "no sample is misread when clean"
        assert rates(report)["attack_success_rate"] == (((after == 3) & aimed_at).sum(), aimed_at.sum())
        assert rates(report)["robust_accuracy"] == (((before == y) & ~((after == 3) & aimed_at)).sum(), 40)


# By hand

# Three classes on a plane: the class is the largest of x0, x1 and 0.5.
POINTS = {
    "right": ([0.9, 0.2], 0),
    "right, far": ([1.0, 0.0], 0),
    "misread as 2": ([0.4, 0.45], 0),  # one step of 0.1 away from class 1
    "misread as 2, far": ([0.2, 0.1], 0),
    "misread as the target": ([0.2, 0.8], 0),
    "of the target, right": ([0.1, 0.9], 1),
    "of the target, misread": ([0.45, 0.45], 1),
    "nearly the target": ([0.55, 0.5], 0),
}


class Plane(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, torch.full_like(x[:, :1], 0.5)], 1)


def plane(**more: Any) -> dict[str, Any]:
    x = torch.tensor([point for point, _ in POINTS.values()])
    y = torch.tensor([label for _, label in POINTS.values()])
    return {
        "attack": "pgd:steps=10,start=origin",
        "task": (x, y),
        "model": Plane().eval(),
        "threat_model": "linf:eps=0.1",
        "goal": "targeted:how=class,target=1",
        "device": "cpu",
        **more,
    }


def by_name(folder: Path) -> dict[str, Record]:
    return dict(zip(POINTS, sorted(read_records(folder / "records.jsonl"), key=lambda r: r.id), strict=True))


def test_a_misread_sample_driven_to_the_target_is_a_success(tmp_path):
    report = advkit.evaluate(**plane(out=tmp_path))
    found = by_name(tmp_path)
    assert {name: record.outcome.value for name, record in found.items()} == {
        "right": "robust",
        "right, far": "robust",
        "misread as 2": "broken",
        "misread as 2, far": "robust",
        "misread as the target": "wrong",
        "of the target, right": "wrong",
        "of the target, misread": "wrong",
        "nearly the target": "broken",
    }
    assert found["misread as 2"].reached
    assert [name for name, record in found.items() if "clean_wrong" in record.notes] == [
        "misread as 2",
        "misread as 2, far",
    ]
    # Right: three of class 0, one of the target. Aimed at: those three and the two misread as 2.
    assert rates(report) == {
        "clean_accuracy": (4, 8),
        "attack_success_rate": (2, 5),
        "robust_accuracy": (3, 8),  # the misread sample that was not driven to the target is not robust
    }
    assert verify(Report.load(tmp_path)).faults == ()


def test_an_untargeted_attacker_has_nothing_to_win_there(tmp_path):
    report = advkit.evaluate(**plane(goal="untargeted", out=tmp_path))
    wrong = {name for name, record in by_name(tmp_path).items() if record.outcome == Outcome.WRONG}
    assert wrong == {name for name in POINTS if "misread" in name}
    assert rates(report)["attack_success_rate"][1] == rates(report)["clean_accuracy"][0] == 4
    assert report.metrics["attack_success_rate"]["denominator_kind"] == "clean_correct"


def test_a_grid_gives_no_success_away(tmp_path):
    """It hands every sample to the attack; those that are or were taken for the target count in no success rate."""
    advkit.evaluate(**plane(threat_model=one_cell(), beside=False, out=tmp_path))
    records = [r for r in read_records(tmp_path / "records.jsonl") if r.source]
    assert len(records) == len(POINTS)
    assert all(r.forwards for r in records)
    c = count(records)
    assert (c.n, c.correct, c.attackable) == (8, 4, 5)
    assert c.broken == 2


def one_cell() -> Any:
    public = TorchModel(nn.Sequential(Plane(), nn.BatchNorm1d(3)).eval(), name="plane", classes=3)
    return Tapm(eps=0.1, sources=(public,), attacks=("pgd",))


@dataclass(frozen=True)
class Listed:
    """A class wanted per label: 0 -> 2, 1 -> 1 (its own), 2 -> 0."""

    kind: ClassVar[str] = "targeted"

    def __call__(self, labels: Tensor, answer: Tensor, rng: Any) -> Targeted:
        return Targeted(torch.tensor([2, 1, 0])[labels])


def test_targets_of_ones_own_per_sample(tmp_path):
    report = advkit.evaluate(**plane(goal=Listed(), out=tmp_path))
    y = np.array([label for _, label in POINTS.values()])
    before = np.array([r.clean for r in by_name(tmp_path).values()])
    target = np.array([2, 1, 0])[y]
    assert rates(report)["attack_success_rate"][1] == ((y != target) & (before != target)).sum() == 4


@dataclass(frozen=True)
class Confident:
    """Like class 1, and sure of it: the goal of a plug-in that says nothing but whether it is reached."""

    rows: int
    kind: ClassVar[str] = "targeted"

    def reached(self, answer: Tensor) -> Tensor:
        return answer.softmax(1)[:, 1] > 0.9

    def margin(self, answer: Tensor) -> Tensor:
        return 0.9 - answer.softmax(1)[:, 1]

    loss = margin

    def under(self, loss: str) -> Confident:
        return self

    def take(self, rows: Tensor) -> Confident:
        return Confident(len(torch.arange(self.rows)[rows.cpu()]))

    def to(self, device: Any) -> Confident:
        return self


@dataclass(frozen=True)
class ConfidentRule:
    kind: ClassVar[str] = "confident"

    def __call__(self, labels: Tensor, answer: Tensor, rng: Any) -> Confident:
        return Confident(len(labels))


def test_a_goal_that_a_right_answer_reaches_is_left_out_whatever_its_class(tmp_path):
    report = advkit.evaluate(**plane(goal=ConfidentRule(), out=tmp_path))
    # No clean answer is that sure, and a right one could be on the two samples of class 1.
    assert rates(report)["attack_success_rate"] == (0, 6)
    assert rates(report)["clean_accuracy"] == rates(report)["robust_accuracy"] == (4, 8)


class Decides(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, torch.full_like(x[:, :1], 0.5)], 1).argmax(1)


@dataclass(frozen=True)
class Upwards:
    """Moves every sample towards class 1, asking nothing."""

    needs: ClassVar[Access] = Access.NOTHING

    def __call__(self, oracle: Any, x: Tensor, goal: Any, ball: Any, rng: Any, /) -> Tensor:
        return ball.project(x + torch.tensor([-1.0, 1.0]), x)


def test_a_victim_that_answers_decisions(tmp_path):
    report = advkit.evaluate(
        **plane(attack=Upwards(), model=Decides().eval(), threat_model="linf:eps=0.1,access=labels", out=tmp_path)
    )
    assert rates(report)["attack_success_rate"] == (2, 5)


# Random victims: right or wrong by majority, as a verdict is


class Coin(nn.Module):
    """Right with the probability that stands in the sample."""

    def forward(self, x: Tensor) -> Tensor:
        right = (torch.rand(len(x)) < x[:, 0]).float()
        return torch.stack([right, 1 - right, torch.zeros(len(x))], 1) + 0.0 * x.sum(1, keepdim=True)


@pytest.mark.parametrize("goal", ["untargeted", "targeted:how=class,target=2"])
def test_how_a_random_victim_reads_a_clean_sample_is_decided_by_majority(goal, tmp_path):
    mostly, rarely = 60, 60
    x = torch.cat([torch.full((mostly, 2), 0.8), torch.full((rarely, 2), 0.2)])
    y = torch.zeros(len(x), dtype=torch.long)
    report = advkit.evaluate(
        Upwards(), task=(x, y), model=Coin().eval(), threat_model="linf:eps=0", goal=goal, draws=11, out=tmp_path
    )
    # Of 11 draws more than half are right with probability .988, and of the other samples with .012.
    right = [r.id for r in read_records(tmp_path / "records.jsonl") if was_right(r)]
    ids = [f"{i}" for i in range(mostly)]
    assert len(right) == rates(report)["clean_accuracy"][0]
    assert 54 <= len(right) <= 66
    first = sum(r.clean == r.label for r in read_records(tmp_path / "records.jsonl"))
    assert first != len(right), "the first draws happen to agree with the majorities: the test shows nothing"
    assert sum(int(row.rpartition("/")[2]) < mostly for row in right) >= 54, ids
    # Nothing was changed: whoever is right stays right, and nobody else counts as robust.
    assert rates(report)["robust_accuracy"][0] <= len(right)
    attackable = rates(report)["attack_success_rate"][1]
    assert attackable == (len(right) if goal == "untargeted" else len(x))
    assert verify(Report.load(tmp_path)).faults == ()


# Run folders


@dataclass(frozen=True, kw_only=True)
class Steps(Suite):
    """Two walks, the second on the samples that the first did not break."""

    def stages(self) -> tuple[Stage, ...]:
        return (Stage(name="short", attack=PGD(steps=2)), Stage(name="margin", attack=PGD(steps=4, loss="margin")))


@pytest.mark.slow
def test_records_do_not_depend_on_batches_or_an_interruption(digits, weak, tmp_path):
    asked = {"task": digits, "model": weak, "threat_model": "linf:eps=0.1", "goal": "targeted:how=random", "n": 40}
    whole = advkit.evaluate(Steps(), **asked, out=tmp_path / "whole")
    lines = sorted((tmp_path / "whole" / "records.jsonl").read_text().splitlines())
    assert len(lines) > 60, "no sample went on to the second stage"
    assert any("clean_wrong" in line for line in lines)
    for size in (1, 7):
        advkit.evaluate(Steps(), **asked, batch_size=size, out=tmp_path / str(size))
        assert sorted((tmp_path / str(size) / "records.jsonl").read_text().splitlines()) == lines
    for kept in (11, 53):
        folder = tmp_path / f"cut-{kept}"
        shutil.copytree(tmp_path / "whole", folder)
        raw = (folder / "records.jsonl").read_bytes().splitlines(keepends=True)
        (folder / "records.jsonl").write_bytes(b"".join(raw[:kept]) + raw[kept][:20])
        again = advkit.evaluate(Steps(), **asked, out=folder)
        assert sorted((folder / "records.jsonl").read_text().splitlines()) == lines
        assert rates(again) == rates(whole)


def test_a_run_that_left_misread_samples_out_is_read_but_not_gone_on_with(tmp_path):
    """As version 0.1 wrote it: nothing in the case, and the misread samples not attacked."""
    advkit.evaluate(**plane(out=tmp_path))
    records = by_name(tmp_path)
    for name, record in records.items():
        if "misread" in name:
            records[name] = replace(record, outcome=Outcome.WRONG, notes=(), forwards=0, backwards=0, queries=0)
    c = count(records.values())
    assert (c.n, c.correct, c.attackable, c.broken, c.right_after) == (8, 4, 3, 1, 3)
    case = tmp_path / "records.case.json"
    config = json.loads(case.read_text())
    assert "label and clean answer" in config.pop("attacked")
    case.write_text(json.dumps(config, sort_keys=True, indent=1) + "\n")
    with pytest.raises(StaleRun, match="different: attacked"):
        advkit.evaluate(**plane(out=tmp_path))


def test_untargeted_and_language_cases_keep_their_digests(digits, weak):
    untargeted = api.resolve("pgd", "none", digits, weak, "linf:eps=0.1", device="cpu")
    says = api.resolve("random_suffix", "none", "prompts", "toychat", "suffix", device="cpu")
    assert "attacked" not in untargeted.config()
    assert "attacked" not in says.config()


def test_shards_of_the_two_denominators_are_not_added(tmp_path):
    data = advkit.evaluate(**plane(out=tmp_path)).to_dict()
    assert "label and clean answer" in data["protocol"]["attacked"]
    one, other = copy.deepcopy(data), copy.deepcopy(data)
    for shard, name in ((one, "a"), (other, "b")):
        shard["dataset"]["selection"] = {"kind": "explicit_ids", "ids_sha256": name * 64}
        shard["dataset"]["n_total"] = 16
    both = merge(Report.from_dict(one), Report.from_dict(other))
    assert rates(both) == {"clean_accuracy": (8, 16), "attack_success_rate": (4, 10), "robust_accuracy": (6, 16)}
    del other["protocol"]["attacked"]
    with pytest.raises(ReportError, match="protocol"):
        merge(Report.from_dict(one), Report.from_dict(other))


def test_two_targeted_runs_are_compared_on_robust_accuracy(tmp_path):
    advkit.evaluate(**plane(out=tmp_path / "a"))
    advkit.evaluate(**plane(attack="fgsm", out=tmp_path / "b"))
    found = compare(tmp_path / "a", tmp_path / "b")
    assert found.robust.a == 3 / 8
    assert found.clean.a == found.clean.b == 4 / 8


# What a record says of its row


# A contested row ends in something else than "wrong".
STATES = [state for state in product(Outcome, *[(False, True)] * 3) if not (state[0] == Outcome.WRONG and state[-1])]


@pytest.mark.parametrize(("outcome", "same", "right", "in_contest"), STATES)
def test_notes_say_what_the_outcome_does_not(outcome, same, right, in_contest):
    clean = 1 if same else 2
    notes = clean_notes(outcome, 1, clean, right=right, in_contest=in_contest)
    record = Record(id="a", attack="pgd", outcome=outcome, label=1, clean=clean, notes=notes)
    assert was_right(record) == right
    assert contested(record) == in_contest
    c = count([record])
    assert (c.correct, c.attackable) == (right, in_contest)
    assert c.right_after <= c.correct
    if not in_contest:
        later = ended(record, Outcome.ERROR)
        assert (was_right(later), contested(later), later.outcome) == (right, False, Outcome.ERROR)


def test_undecided_misread_samples_are_in_no_interval_of_robust_accuracy():
    rows = [
        Record(id="a", attack="pgd", outcome=Outcome.ERROR, label=0, clean=0),
        Record(id="b", attack="pgd", outcome=Outcome.NON_FINITE, label=0, clean=1, notes=("clean_wrong",)),
        Record(id="c", attack="pgd", outcome=Outcome.ROBUST, label=0, clean=1, notes=("clean_wrong",)),
        Record(id="d", attack="pgd", outcome=Outcome.BROKEN, label=0, clean=0),
    ]
    c = count(rows)
    assert (c.correct, c.attackable, c.broken, c.unknown) == (2, 4, 1, 2)
    assert (c.right_after, c.right_unknown) == (0, 1)


def test_the_battery_examines_samples_that_are_right_when_clean(tmp_path):
    advkit.evaluate(**plane(out=tmp_path))
    records = {r.id: r for r in read_records(tmp_path / "records.jsonl")}
    names = dict(zip(POINTS, sorted(records), strict=True))
    assert correct_rows(records) == {names[name] for name in ("right", "right, far", "nearly the target")}
    assert robust(records) == {names["right"], names["right, far"]}
