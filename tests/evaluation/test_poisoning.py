"""Poisoning by label flips: against scikit-learn by hand, cheating attacks, resumed runs, and what reports say."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from scipy.stats import ttest_1samp
from sklearn.svm import SVC

import advkit
from advkit.attacks.labels.base import LabelAttack
from advkit.attacks.labels.ranked import RandomLabels
from advkit.cli.main import run as command
from advkit.core.errors import AdvkitError, BadInput, NoTrainingData, UsageError
from advkit.core.learners import Constant, fitted, scores
from advkit.core.protocols import Access, Outcome, Record
from advkit.defenses.labels.base import LabelDefense
from advkit.defenses.labels.svm import SVM
from advkit.evaluation import poisonings
from advkit.evaluation.api import resolve
from advkit.evaluation.counts import GAINED, count
from advkit.evaluation.figures.plots import Point
from advkit.evaluation.figures.poisoning_plots import accuracy_by_rate, accuracy_by_trial, boundaries
from advkit.evaluation.report.ranking import scan
from advkit.evaluation.report.verify import verify
from advkit.evaluation.scenarios.poisoning import Trials
from advkit.evaluation.stats import rate
from advkit.evaluation.store import read_records
from advkit.tasks import TASKS

FLIPS = "label-flips:rate=0.25,trials=2"


def evaluated(attack: Any = "farfirst", defense: Any = "svm:C=10", flips: str = FLIPS, **more: Any) -> Any:
    settings = {"task": "digits-pair", "device": "cpu", "beside": False, **more}
    return advkit.evaluate(attack=attack, defense=defense, threat_model=flips, **settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("poisoned") / "run"
    evaluated(out=out, beside=True)
    return out


# --- the figures


def test_accuracies_are_those_of_scikit_learn_on_the_same_labels(folder: Any) -> None:
    records = read_records(folder / "records.jsonl")
    case = resolve("farfirst", "svm:C=10", "digits-pair", threat_model=FLIPS, device="cpu")
    assert isinstance(case.task, Trials)
    right: list[bool] = []
    for trial in range(2):
        split = case.task.of(trial)
        assert len(split.y) == 180
        own = [r for r in records if r.id.startswith(f"trial-{trial}/")]
        assert len(own) == len(split.test_y) == 181
        found = SVC(C=10, gamma="scale").fit(split.x, split.y)
        assert [r.clean for r in own] == found.predict(split.test).tolist()
        assert [r.label for r in own] == split.test_y.tolist()
        # farfirst, adaptive: the labels furthest from the boundary of the defense itself
        far = np.argsort(-np.abs(found.decision_function(split.x)))[:45]
        labels = split.y.copy()
        labels[far] = 1 - labels[far]
        poisoned = SVC(C=10, gamma="scale").fit(split.x, labels)
        assert [r.adversarial for r in own] == poisoned.predict(split.test).tolist()
        suspected = poisoned.predict(split.x) != labels
        told = own[0].figures
        assert told[poisonings.FLIPPED] == 45
        assert told[poisonings.SUSPECTED] == suspected.sum()
        assert told[poisonings.RECOVERED] == suspected[far].sum()
        right += [r.adversarial == r.label for r in own]
    metrics = json.loads((folder / "report.json").read_text())["metrics"]
    assert metrics["robust_accuracy"]["value"] == pytest.approx(np.mean(right))
    assert metrics["robust_accuracy"]["ci"]["method"] == "student_t_over_seeds"
    drop = metrics["clean_accuracy"]["value"] - metrics["robust_accuracy"]["value"]
    assert metrics["attack_success"]["value"] == pytest.approx(drop)
    assert metrics["flipped_labels"]["numerator"] == 90


def test_splits_differ_between_trials_and_seeds_and_share_no_sample() -> None:
    pool = TASKS.build("digits-pair")
    task = Trials(pool, 3, None, seed=0)
    splits = [task.rows_of(trial) for trial in range(3)]
    for train, test in splits:
        assert sorted([*train, *test]) == list(range(361))
    assert len({tuple(train) for train, _ in splits}) == 3
    assert Trials(pool, 3, None, seed=1).rows_of(0) != splits[0]
    assert Trials(pool, 3, None, seed=0).rows_of(2) == splits[2]
    assert task.digest() == Trials(pool, 3, None, seed=0).digest() != Trials(pool, 3, None, seed=1).digest()
    assert [len(each) for each in Trials(pool, 1, 40, seed=0).rows_of(0)] == [40, 321]


def test_a_training_set_of_its_own_stays_apart_from_the_test_samples() -> None:
    task = Trials(TASKS.build("digits"), 2, 50, seed=0)
    (first, test), (second, same) = task.rows_of(0), task.rows_of(1)
    assert len(first) == 50
    assert first != second
    assert test == same
    assert task.of(0).test.shape == (360, 64)
    assert [row.partition("/")[2] for row in task.ids[:360]] == list(TASKS.build("digits").ids)


def test_samples_without_a_training_set_are_a_pool(tmp_path: Any) -> None:
    file, draws = tmp_path / "mine.npz", np.random.default_rng(0)
    np.savez(file, x=draws.random((30, 4), dtype=np.float32), y=np.arange(30) % 2)
    task = Trials(TASKS.build(f"npz:path={file}"), 2, None, seed=0)
    (train, test), (other, _) = task.rows_of(0), task.rows_of(1)
    assert sorted([*train, *test]) == list(range(30))
    assert len(train) == 15
    assert train != other


def test_a_row_that_only_the_poisoned_model_gets_right_counts_as_right() -> None:
    rows = [
        Record("trial-0/a", "x", Outcome.WRONG, label=1, clean=0, adversarial=1, notes=(GAINED,)),
        Record("trial-0/b", "x", Outcome.WRONG, label=1, clean=0, adversarial=0),
        Record("trial-0/c", "x", Outcome.ROBUST, label=1, clean=1, adversarial=1),
        Record("trial-0/d", "x", Outcome.BROKEN, label=1, clean=1, adversarial=0),
    ]
    assert count(rows).right_after == 2
    metrics = poisonings.figures(rows)
    assert metrics["robust_accuracy"]["value"] == 0.5
    assert metrics["clean_accuracy"]["value"] == 0.5
    assert metrics["attack_success"]["value"] == 0
    assert metrics["attack_success_rate"]["value"] == 0.5
    assert poisonings.trials_of(rows)[0].robust == 0.5


# --- who trains what


@dataclass(frozen=True, kw_only=True)
class Counting(LabelDefense):
    """An SVM that notes what it is trained on."""

    fits: ClassVar[list[Any]] = []
    C: float = 1.0

    def learner(self, seed: int) -> Any:
        class Noted(SVC):
            def fit(inner, x: Any, y: Any, sample_weight: Any = None) -> Any:
                Counting.fits.append(np.array(y))
                return super().fit(x, y, sample_weight)

        return Noted(C=self.C, random_state=seed)

    def ablation(self) -> Counting:
        return replace(self, C=100.0)


@pytest.mark.parametrize(("attacker", "own"), [("adaptive", 12 + 4), ("oblivious", 4)])
def test_trainings_are_counted_and_told_apart(attacker: str, own: int) -> None:
    Counting.fits.clear()
    report = evaluated("lfa_greedy:candidates=2", Counting(), f"label-flips:k=3,trials=2,attacker={attacker}")
    first = 1  # the model that the report describes
    assert len(Counting.fits) == own + first
    metrics = report.metrics
    assert metrics["retrainings_attacker"]["value"] == 12
    assert metrics["retrainings_final"]["value"] == 4
    assert metrics["retrainings"]["value"] == 16
    queries = {record.queries for record in report_records(report)}
    assert queries == ({6} if attacker == "adaptive" else {0})
    block = report.to_dict()["threat_model"]["attacker"]
    assert block["defense"] == ("adaptive" if attacker == "adaptive" else "unknown")


def report_records(report: Any) -> Any:
    return report.kept.records if report.kept is not None else []


@pytest.mark.slow
def test_the_other_attacker_and_the_ablation_stand_beside(tmp_path: Any) -> None:
    report = evaluated("farfirst", Counting(), "label-flips:k=20,trials=2", beside=True, out=tmp_path / "run")
    named = [each["name"] for each in report.to_dict()["companions"]]
    assert named == ["oblivious", "ablation"]
    hard = evaluated("farfirst", Counting(C=100.0), "label-flips:k=20,trials=2")
    blind = evaluated("farfirst", Counting(), "label-flips:k=20,trials=2,attacker=oblivious")
    for name, alone in (("ablation", hard), ("oblivious", blind)):
        beside = report.metrics[f"{name}_robust_accuracy"]
        assert beside["value"] == alone.metrics["robust_accuracy"]["value"]
    assert {each.name for each in (tmp_path / "run").glob("beside*.jsonl")} == {
        "beside.jsonl", "beside.seconds.jsonl", "beside-ablation.jsonl", "beside-ablation.seconds.jsonl",
    }  # fmt: skip
    assert verify(report).mark == "yes"


def test_who_trains_nothing_has_one_attacker() -> None:
    plan = advkit.evaluation.api.plan(
        advkit.evaluation.plan.Request(
            attack="random_labels", defense="svm", task="digits-pair", threat_model=FLIPS, device="cpu"
        )
    )
    assert not plan.companions


# --- attacks that cheat or fail


@dataclass(frozen=True, kw_only=True)
class Cheat(RandomLabels):
    """Returns what `how` says."""

    how: str = "one more"

    def __call__(self, oracle: Any, x: Any, goal: Any, threat: Any, rng: Any, /) -> Any:
        honest = super().__call__(oracle, x, goal, threat, rng)
        if self.how == "one more":
            row = int((honest == x).nonzero()[0])
            honest[row] = 1 - honest[row]
        elif self.how == "another class":
            honest[int((honest != x).nonzero()[0])] = 2
        elif self.how == "below zero":
            honest[int((honest != x).nonzero()[0])] = -1
        elif self.how == "shorter":
            return honest[:-1]
        elif self.how == "floats":
            return honest.double()
        elif self.how == "a list":
            return honest.tolist()
        elif self.how == "samples":
            oracle._x[:] = 0
        elif self.how == "caller":
            x[:] = 1 - x
            return x
        return honest


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("one more", "flipped 46 labels; the threat model admits 45"),
        ("another class", "labels from 0 to 2; expected 0 to 1"),
        ("below zero", "labels from -1 to 1"),
        ("shorter", "shape [179]"),
        ("floats", "float64"),
        ("a list", "returned list"),
        ("caller", "flipped 180 labels"),
    ],
)
def test_labels_outside_the_budget_are_invalid_and_never_trained_on(how: str, said: str, tmp_path: Any) -> None:
    report = evaluated(Cheat(how=how), "svm", "label-flips:rate=0.25,trials=1", out=tmp_path / "run")
    records = read_records(tmp_path / "run" / "records.jsonl")
    assert {r.outcome for r in records} <= {Outcome.INVALID, Outcome.WRONG}
    assert all(said in r.message for r in records)
    assert report.metrics["robust_accuracy"]["value"] == report.metrics["clean_accuracy"]["value"]
    assert "budget_violation" in {flag["id"] for flag in report.flags}
    assert report.metrics["retrainings_final"]["value"] == 1


def test_what_an_attack_does_to_its_copy_of_the_samples_reaches_no_training() -> None:
    honest, cheat = (
        evaluated(Cheat(how=how), "svm", "label-flips:rate=0.25,trials=1") for how in ("nothing", "samples")
    )
    assert cheat.metrics["robust_accuracy"] == honest.metrics["robust_accuracy"]


@dataclass(frozen=True, kw_only=True)
class Raises(LabelAttack):
    """Raises in every trial."""

    needs: ClassVar[Access] = Access.NOTHING
    surrogate: ClassVar[str] = ""

    def flip(self, oracle: Any, y: Any, budget: int, rng: Any) -> Any:
        raise RuntimeError("no idea")


def test_an_attack_that_raises_leaves_robust_accuracy_unknown() -> None:
    report = evaluated(Raises(), "svm", "label-flips:rate=0.25,trials=1")
    assert report.metrics["robust_accuracy"]["value"] == 0
    upper = report.metrics["robust_accuracy_upper"]["value"]
    assert upper == report.metrics["clean_accuracy"]["value"] > 0.9
    assert "attack_error" in {flag["id"] for flag in report.flags}


class Broken(LabelDefense):
    """Its learner does not fit."""

    def learner(self, seed: int) -> Any:
        class Fails(SVC):
            def fit(inner, x: Any, y: Any, sample_weight: Any = None) -> Any:
                if len(set(np.asarray(y)[:90])) and (np.asarray(y) == 0).sum() > 120:
                    raise ValueError("too many zeros")
                return super().fit(x, y, sample_weight)

        return Fails(random_state=seed)


@dataclass(frozen=True, kw_only=True)
class Zeros(RandomLabels):
    """Makes ones zeros."""

    def flip(self, oracle: Any, y: Any, budget: int, rng: Any) -> Any:
        y[np.flatnonzero(y == 1)[:budget]] = 0
        return y


def test_a_defense_that_raises_is_named() -> None:
    report = evaluated(Zeros(), Broken(), "label-flips:rate=0.4,trials=1")
    assert "model_error" in {flag["id"] for flag in report.flags}


def test_labels_that_are_all_equal_are_learned_as_one_class() -> None:
    report = evaluated(Zeros(), "svm", "label-flips:rate=1,trials=1")
    records_of_ones = report.metrics["robust_accuracy"]["value"]
    assert 0.4 < records_of_ones < 0.6
    x = np.zeros((3, 2))
    model = fitted(SVC(), x, np.array([1, 1, 1]))
    assert isinstance(model, Constant)
    assert scores(model, x, 3).argmax(1).tolist() == [1, 1, 1]


# --- runs


def test_a_run_that_was_cut_goes_on_where_it_ended(folder: Any, tmp_path: Any) -> None:
    whole = (folder / "records.jsonl").read_bytes()
    out = tmp_path / "run"
    out.mkdir()
    lines = whole.splitlines(keepends=True)
    (out / "records.jsonl").write_bytes(b"".join(lines[:250]))  # in the middle of the second trial
    for name in ("records.case.json",):
        (out / name).write_bytes((folder / name).read_bytes())
    evaluated(out=out)
    assert (out / "records.jsonl").read_bytes() == whole


@pytest.mark.parametrize("size", [1000, 7])
def test_records_do_not_depend_on_the_batch_size(folder: Any, size: int, tmp_path: Any) -> None:
    evaluated(out=tmp_path / "run", batch_size=size)
    assert (tmp_path / "run" / "records.jsonl").read_bytes() == (folder / "records.jsonl").read_bytes()


@pytest.mark.slow
def test_reports_verify_rerun_show_compare_and_rank(folder: Any, tmp_path: Any, capsys: Any) -> None:
    from advkit.evaluation.report import Report

    report = Report.load(folder)
    assert verify(report).mark == "yes"
    assert command(["rerun", str(folder), "--out", str(tmp_path / "again")]) == 0
    assert "724 of 724 records are identical" in capsys.readouterr().out
    other = tmp_path / "random"
    evaluated("random_labels", out=other)
    assert command(["show", str(folder)]) == 0
    assert command(["compare", str(folder), str(other)]) == 0
    said = capsys.readouterr().out
    assert "over 2 paired trials" in " ".join(said.split())
    board = scan(tmp_path)
    (group,) = [each for each in board.groups if each.headline == "robust_accuracy" and "no access" in each.title]
    assert group.victims[0].score.value == Report.load(other).metrics["robust_accuracy"]["value"]


@pytest.mark.slow
def test_a_leaderboard_takes_the_worst_attack_and_not_what_all_of_them_break(folder: Any, tmp_path: Any) -> None:
    values = []
    for name, attack in (("a", "farfirst"), ("b", "alfa:steps=3")):
        evaluated(attack, out=tmp_path / name)
        values.append(json.loads((tmp_path / name / "report.json").read_text())["metrics"]["robust_accuracy"]["value"])
    (group,) = scan(tmp_path).groups
    (line,) = group.victims
    assert line.score.value == min(values)
    assert "each attack trained another model" in line.how


def test_a_changed_figure_is_found_out(folder: Any, tmp_path: Any) -> None:
    import shutil

    from advkit.evaluation.report import Report

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    data = json.loads((copy / "report.json").read_text())
    told = data["metrics"]["flip_recovery_recall"]
    data["metrics"]["flip_recovery_recall"] = rate(told["numerator"] + 1, told["denominator"], "flipped_labels")
    (copy / "report.json").write_text(json.dumps(data))
    assert any("flip_recovery_recall" in fault for fault in verify(Report.load(copy)).faults)


def test_an_oblivious_attacker_who_hurts_more_is_flagged() -> None:
    def rows(values: list[float]) -> list[Record]:
        return [
            Record(f"trial-{t}/{i}", "x", Outcome.ROBUST, label=1, clean=1, adversarial=int(i < 20 * value))
            for t, value in enumerate(values)
            for i in range(20)
        ]

    strong, weak = rows([0.5, 0.55, 0.6, 0.5]), rows([0.8, 0.9, 0.85, 0.9])
    drop, p = poisonings.hurts_more(weak, strong)
    assert drop == pytest.approx(0.325)
    assert p == pytest.approx(ttest_1samp([0.3, 0.35, 0.25, 0.4], 0, alternative="greater").pvalue)
    assert p < 0.01
    assert poisonings.hurts_more(strong, weak)[1] > 0.9
    assert poisonings.hurts_more(weak, weak) == (0.0, 1.0)


# --- bad input


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"attack": "pgd"}, "need an attack on labels, and PGD, which changes inputs"),
        ({"attack": "none"}, "need an attack on labels, and no attack"),
        ({"defense": "pgd_at"}, "the defense pgd_at does not say how it learns from labels.*--defense svm"),
        ({"defense": "none"}, "--defense svm"),
        ({"model": "mlp"}, "leave --model out"),
        ({"attack": "svflip", "defense": "nn"}, "dual variables, and what nn trains has none: .*=oblivious"),
        ({"goal": "targeted"}, "leave --goal targeted out"),
        ({"sample_timeout": 5.0}, "leave --sample-timeout out"),
        ({"threat_model": "label-flips:rate=0.001"}, "flips nothing"),
        ({"threat_model": "label-flips:k=500"}, "k is 500 and there are 180"),
        ({"threat_model": "label-flips:k=5,train=361"}, "361 training samples of a pool of 361"),
        ({"threat_model": "label-flips:k=5,attacker=oblivious,surrogate=pgd_at"}, "does not learn from labels"),
        ({"task": "prompts"}, "the task prompts has no labels"),
        ({"attack": "alfa", "threat_model": "linf:eps=0.1"}, "flips training labels, which linf has none of"),
        ({"attack": "alfa", "task": "digits", "threat_model": "label-flips:k=5,train=50"}, "two classes.*has 10"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(settings: dict[str, Any], said: str) -> None:
    asked = {"attack": "farfirst", "defense": "svm", "task": "digits-pair", "threat_model": FLIPS, "device": "cpu"}
    with pytest.raises(AdvkitError, match=said) as refused:
        advkit.evaluate(**{**asked, **settings})
    assert "\n" not in str(refused.value)


def test_commands_for_inputs_refuse_flips_of_labels(tmp_path: Any, capsys: Any) -> None:
    asked = ["--attack", "farfirst", "--defense", "svm", "--task", "digits-pair", "--threat-model", FLIPS]
    assert command(["attack", *asked, "--out", str(tmp_path / "examples")]) == 2
    assert "there are no adversarial examples" in " ".join(capsys.readouterr().err.split())
    assert command(["doctor", *asked, "--out", str(tmp_path / "doctor")]) == 2
    assert "the battery attacks within balls" in " ".join(capsys.readouterr().err.split())


def test_a_training_set_of_one_class_is_refused(tmp_path: Any) -> None:
    file = tmp_path / "one.npz"
    x = np.random.default_rng(0).random((20, 3), dtype=np.float32)
    np.savez(file, x=x, y=np.arange(20) % 2, x_train=x, y_train=np.zeros(20, dtype=np.int64))
    with pytest.raises(BadInput, match=r"trial 0 of one have one class only \(0\)"):
        evaluated("random_labels", "svm", FLIPS, task=f"npz:path={file}")


@pytest.mark.slow
def test_labels_that_are_texts_are_mapped_and_given_back(tmp_path: Any) -> None:
    file = tmp_path / "named.npz"
    draws = np.random.default_rng(0)
    y = np.array(["cat", "dog", "emu"] * 20)
    x = (0.2 * draws.random((60, 4)) + 0.7 * np.eye(3, 4)[np.arange(60) % 3]).astype(np.float32)
    np.savez(file, x=x[30:], y=y[30:], x_train=x[:30], y_train=y[:30])
    task = TASKS.build(f"npz:path={file}")
    assert task.class_names() == ("cat", "dog", "emu")
    assert [task.class_names()[label] for label in task.rows.y.tolist()] == y[30:].tolist()
    for attack in ("random_labels", "farfirst", "nearfirst", "svflip", "floral_inner", "lfa_greedy:candidates=2"):
        report = evaluated(attack, "svm", "label-flips:k=3,trials=1", task=f"npz:path={file}")
        assert report.metrics["clean_accuracy"]["value"] == 1.0
        assert report.metrics["flipped_labels"]["numerator"] == 3


def test_a_kernel_that_does_not_fit_into_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from advkit.core import kernels

    with pytest.raises(BadInput, match=r"30,000 x 30,000 numbers \(6.7 GiB\).*take 23,170 training samples or fewer"):
        kernels.check_dense(30_000, 30_000, "ALFATilt")
    monkeypatch.setattr(kernels, "LARGEST", 8 * 100 * 100)
    with pytest.raises(BadInput, match="ALFATilt needs a kernel matrix of 180 x 180"):
        evaluated("alfa_tilt:draws=1", "svm", "label-flips:k=5,trials=1")
    evaluated("random_labels", "svm", "label-flips:k=5,trials=1")  # no attack on labels pays for a view of the victim


@pytest.mark.slow
def test_a_defense_on_labels_meets_attacks_on_inputs_too() -> None:
    report = advkit.evaluate(
        attack="pgd:steps=20", defense="svm", task="digits-pair", threat_model="linf:eps=0.3", device="cpu"
    )
    assert report.metrics["clean_accuracy"]["value"] > 0.95
    assert report.metrics["robust_accuracy"]["value"] < 0.7  # through the view that the defense hands out
    with pytest.raises(NoTrainingData, match="svm learns from labels"):
        advkit.evaluate(attack="pgd", defense="svm", task="fashion-mnist", device="cpu")
    with pytest.raises(UsageError, match="protects a model: name one"):
        advkit.evaluate(attack="pgd", defense="bit-depth", model="none", task="digits", device="cpu")


# --- figures


def test_figures_are_drawn(folder: Any) -> None:
    records = read_records(folder / "records.jsonl")
    drawn = accuracy_by_trial(records)
    values = sorted(float(v) for line in drawn.axes[0].get_lines()[2::2] for v in np.ravel(line.get_ydata())[:1])
    assert all(0 <= v <= 1 for v in values)
    points = [Point(0.05, 0.9, 0.85, 0.95), Point(0.25, 0.7, 0.6, 0.8)]
    assert len(accuracy_by_rate({"alfa": {"svm": points}, "farfirst": {"svm": points}}).axes) >= 2
    task = Trials(TASKS.build("moons:samples=80"), 1, None, seed=0)
    split = task.of(0)
    labels = split.y.copy()
    labels[:5] = 1 - labels[:5]
    model = SVM().learner(0).fit(split.x, split.y)
    figure = boundaries(split.x, {"clean": (split.y, model), "poisoned": (labels, model)})
    circled = figure.axes[1].collections[-1].get_offsets()
    assert len(circled) == 5
    with pytest.raises(UsageError, match="in the plane"):
        boundaries(np.zeros((3, 4)), {"clean": (split.y, model)})


# --- what the attacks are for


@pytest.mark.slow
def test_alfa_hurts_far_more_than_random_flips_on_digits() -> None:
    chosen, drawn = (
        evaluated(attack, "svm:C=1", "label-flips:rate=0.25,trials=8").metrics["robust_accuracy"]["value"]
        for attack in ("alfa", "random_labels")
    )
    assert drawn - chosen >= 0.10
    assert torch.tensor(chosen) < 0.85


@pytest.mark.slow
def test_worker_processes_play_the_same_trials(folder: Any, tmp_path: Any) -> None:
    evaluated(out=tmp_path / "run", workers=2)
    assert (tmp_path / "run" / "records.jsonl").read_bytes() == (folder / "records.jsonl").read_bytes()
