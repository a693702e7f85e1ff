"""Attacks on labels against linear programming, exhaustive search, explicit hyperplanes and scikit-learn itself."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC

from advkit.attacks import ATTACKS
from advkit.attacks.labels.alfa import ALFATilt, cheapest, cosine
from advkit.core.errors import BadInput, UsageError
from advkit.core.retraining import Retraining
from advkit.core.rng import RowRng
from advkit.defenses import DEFENSES
from advkit.testing import LABEL_LAWS, check_attack, check_label_law
from advkit.testing.label_laws import clusters, play_labels
from advkit.threat_models.labels import LabelFlips


def oracle_of(x, y, classes=2, defense="svm", seed=0):
    return Retraining(x, y, classes, DEFENSES.build(defense).learner, seed)


def flipped(spec, oracle, budget, seed=0):
    labels = ATTACKS.build(spec).flip(oracle, oracle.y.copy(), budget, np.random.default_rng(seed))
    return np.flatnonzero(labels != oracle.y), labels


# --- ALFA


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [1, 3, 7])
def test_the_cheapest_flips_are_the_optimum_of_the_linear_program(seed, budget):
    gain = np.random.default_rng(seed).normal(size=8)
    exact = linprog(gain, A_eq=np.ones((1, 8)), b_eq=[budget], bounds=(0, 1))
    chosen = cheapest(gain, budget)
    assert len(chosen) == budget
    assert gain[chosen].sum() == pytest.approx(exact.fun, abs=1e-9)
    brute = min(gain[list(each)].sum() for each in combinations(range(8), budget))
    assert gain[chosen].sum() == pytest.approx(brute, abs=1e-12)


def hinges(y, f):
    return np.maximum(0, 1 - (2 * y - 1) * f)


def cost(x, y, labels):
    """ALFA's objective: what labels cost under the clean machine less what they cost under their own."""
    before, after = (SVC(gamma="scale").fit(x, each).decision_function(x) for each in (y, labels))
    return float((hinges(labels, before) - hinges(labels, after)).sum())


@pytest.mark.slow
def test_alfa_is_never_worse_than_its_first_program_and_never_better_than_exhaustive_search():
    x, y = clusters(12)
    _, labels = flipped("alfa", oracle_of(x, y), 2)
    f = SVC(gamma="scale").fit(x, y).decision_function(x)
    first = y.copy()
    chosen = cheapest(hinges(y, f) - hinges(1 - y, f), 2)
    first[chosen] = 1 - first[chosen]
    every = []
    for each in combinations(range(12), 2):
        other = y.copy()
        other[list(each)] = 1 - other[list(each)]
        every.append(cost(x, y, other))
    found = cost(x, y, labels)
    assert cost(x, y, first) - 1e-9 <= found <= max(every) + 1e-9


def test_more_restarts_of_alfa_never_cost_less():
    x, y = clusters(30)
    costs = [cost(x, y, flipped(f"alfa:restarts={n}", oracle_of(x, y), 6)[1]) for n in (0, 3)]
    assert costs[1] >= costs[0] - 1e-9


# --- ALFA-tilt


def test_the_cosine_is_that_of_explicit_hyperplanes():
    x, y = clusters(30)
    other = y.copy()
    other[:6] = 1 - other[:6]
    oracle = oracle_of(x, y, defense="svm:kernel=linear")
    models = [oracle.train(labels) for labels in (y, other)]
    one, two = (model.coef_[0] for model in models)
    exact = abs(one @ two) / (np.linalg.norm(one) * np.linalg.norm(two))
    weights = [m.duals_ * (2 * labels - 1) for m, labels in zip(models, (y, other), strict=True)]
    assert cosine(models[0].gram(x, x), *weights) == pytest.approx(exact, abs=1e-6)


def test_alfa_tilt_takes_the_draw_of_the_smallest_cosine():
    x, y = clusters(30)
    attack = ALFATilt(draws=8, surrogate="svm:kernel=linear")
    oracle = oracle_of(x, y, defense="svm:kernel=linear")
    candidates = attack.candidates(oracle, y, 5, np.random.default_rng(0))
    clean = SVC(kernel="linear").fit(x, y).coef_[0]
    exact = []
    for _, labels in candidates:
        normal = SVC(kernel="linear").fit(x, labels).coef_[0]
        exact.append(abs(clean @ normal) / (np.linalg.norm(clean) * np.linalg.norm(normal)))
    assert len(set(np.round(exact, 6))) > 1  # the draws differ
    assert attack.flip(oracle, y, 5, np.random.default_rng(0)).tolist() == candidates[int(np.argmin(exact))][1].tolist()


# --- greedy


def harm(x, y, labels):
    model = SVC(gamma="scale").fit(x, labels)
    return int((model.predict(x) != y).sum()), float(hinges(y, model.decision_function(x)).mean())


def test_greedy_flips_are_the_best_single_flips_by_exhaustive_search():
    x, y = clusters(12)
    expected, labels = [], y.copy()
    for _ in range(3):
        tried = []
        for row in np.flatnonzero(labels == y):
            other = labels.copy()
            other[row] = 1 - other[row]
            tried.append((*harm(x, y, other), -row))
        expected.append(-max(tried)[2])
        labels[expected[-1]] = 1 - labels[expected[-1]]
    oracle = oracle_of(x, y)
    found, _ = flipped("lfa_greedy:candidates=none", oracle, 3)
    assert found.tolist() == sorted(expected)
    assert oracle.trainings == 12 + 11 + 10


def test_one_greedy_flip_is_the_worst_of_all_single_flips():
    x, y = clusters(12)
    _, labels = flipped("lfa_greedy:candidates=none", oracle_of(x, y), 1)
    every = []
    for row in range(12):
        other = y.copy()
        other[row] = 1 - other[row]
        every.append(harm(x, y, other))
    assert harm(x, y, labels) == pytest.approx(max(every))


def test_candidates_bound_the_trainings():
    x, y = clusters(30)
    oracle = oracle_of(x, y)
    flipped("lfa_greedy:candidates=4", oracle, 5)
    assert oracle.trainings == 20


# --- rankings


@pytest.mark.parametrize("name", ["farfirst", "nearfirst"])
def test_distances_are_those_of_logistic_regression(name):
    x, y = clusters(40)
    distance = np.abs(LogisticRegression(max_iter=1000).fit(x, y).decision_function(x))
    order = np.argsort(-distance if name == "farfirst" else distance)
    found, _ = flipped(name, oracle_of(x, y, defense="logreg"), 7)
    assert set(found) == set(order[:7])


def test_support_vectors_of_largest_dual_variable_are_flipped():
    x, y = clusters(40)
    machine = SVC(gamma="scale", C=2.0).fit(x, y)
    duals = np.zeros(40)
    duals[machine.support_] = np.abs(machine.dual_coef_[0])
    found, _ = flipped("svflip", oracle_of(x, y, defense="svm:C=2"), 6)
    rest = np.setdiff1d(np.arange(40), found)
    assert duals[found].min() >= duals[rest].max() - 1e-9


def test_the_inner_attacker_draws_from_the_top_of_the_pool():
    x, y = clusters(60)
    oracle = oracle_of(x, y, defense="svm:C=1000")  # few dual variables reach C, so that there is an order
    duals = oracle.train(y).duals_
    order = np.argsort(-duals, kind="stable")
    draws = [set(flipped("floral_inner", oracle, 4, seed)[0]) for seed in range(12)]
    assert set.union(*draws) <= set(order[:8])
    assert len(set(map(frozenset, draws))) > 1
    assert set(flipped("floral_inner:pool_factor=1", oracle, 4)[0]) == set(order[:4])
    many = int((duals > 1e-5).sum()) + 3
    assert set(np.flatnonzero(duals > 1e-5)) <= set(flipped("floral_inner", oracle, many)[0])


@pytest.mark.slow
def test_random_flips_are_uniform_over_samples_and_other_classes():
    x, y = clusters(30, classes=3)
    oracle = oracle_of(x, y, classes=3)
    hits, moves = np.zeros(30), np.zeros((3, 3))
    for seed in range(600):
        rows, labels = flipped("random_labels", oracle, 10, seed)
        hits[rows] += 1
        np.add.at(moves, (y[rows], labels[rows]), 1)
    assert oracle.trainings == 0
    assert np.abs(hits - 200).max() < 5 * np.sqrt(600 * (1 / 3) * (2 / 3))
    assert np.diag(moves).sum() == 0
    for row in moves:
        share = row[row > 0] / row.sum()
        assert share == pytest.approx([0.5, 0.5], abs=5 * 0.5 / np.sqrt(row.sum()))


@pytest.mark.parametrize("name", ["farfirst", "nearfirst", "svflip", "floral_inner"])
def test_of_several_classes_labels_go_to_the_other_class_of_highest_score(name):
    x, y = clusters(30, classes=3)
    rows, labels = flipped(name, oracle_of(x, y, classes=3), 6)
    every = SVC(gamma="scale").fit(x, y).decision_function(x)
    every[np.arange(30), y] = -np.inf
    assert (labels[rows] == every.argmax(1)[rows]).all()


@pytest.mark.parametrize("name", ["alfa", "alfa_tilt"])
def test_what_is_defined_for_two_classes_says_so(name):
    x, y = clusters(30, classes=3)
    with pytest.raises(UsageError, match="two classes and the task has 3"):
        flipped(name, oracle_of(x, y, classes=3), 3)


def test_attacks_by_dual_variables_refuse_what_has_none():
    x, y = clusters(30)
    with pytest.raises(UsageError, match=r"reads dual variables and LogisticRegression has none.*surrogate=svm"):
        flipped("svflip", oracle_of(x, y, defense="logreg"), 3)


# --- budget, oracle, laws


@pytest.mark.parametrize(
    ("spec", "n", "flips"), [("rate=0.29", 100, 29), ("rate=0.25", 181, 45), ("rate=1", 7, 7), ("k=3", 7, 3)]
)
def test_the_budget_is_the_floor_of_the_rate(spec, n, flips):
    settings = dict([spec.split("=")])
    threat = LabelFlips(**{key: int(value) if key == "k" else float(value) for key, value in settings.items()})
    assert threat.budget(n) == flips
    y = torch.zeros(n, dtype=torch.long)
    one_less, one_more = y.clone(), y.clone()
    one_less[:flips] = 1
    one_more[: flips + 1] = 1
    assert threat.admits(one_less, y).all()
    assert flips == n or not threat.admits(one_more, y).any()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "neither rate nor k"),
        ({"rate": 0.1, "k": 3}, "both rate=0.1 and k=3"),
        ({"rate": 0.0}, "rate is 0.0"),
        ({"rate": 1.5}, "rate is 1.5"),
        ({"rate": float("nan")}, "rate is nan"),
        ({"k": 0}, "k is 0"),
        ({"k": 1, "trials": 0}, "trials is 0"),
        ({"k": 1, "train": 1}, "train is 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, said):
    with pytest.raises(UsageError, match=said):
        LabelFlips(**settings)


def test_a_rate_that_flips_nothing_says_what_would():
    with pytest.raises(UsageError, match=r"rate=0.01 of 50 training labels flips nothing; expected at least 0.02"):
        LabelFlips(rate=0.01).budget(50)
    with pytest.raises(UsageError, match="k is 51 and there are 50"):
        LabelFlips(k=51).budget(50)


def test_the_oracle_trains_on_its_own_samples_and_counts():
    x, y = clusters(20)
    oracle = oracle_of(x, y)
    with pytest.raises(ValueError, match="read-only"):
        oracle.x[0, 0] = 1.0
    assert (oracle.train(1 - y).predict(x) == SVC(gamma="scale").fit(x, 1 - y).predict(x)).all()
    assert (oracle.train(np.zeros(20, dtype=np.int64)).predict(x) == 0).all()
    assert oracle.trainings == 2
    for labels, said in ((y[:-1], "one whole number"), (y * 0.5, "one whole number"), (y + 1, "from 1 to 2")):
        with pytest.raises(BadInput, match=said):
            oracle.train(labels)
    assert oracle.trainings == 2


class Greedy(type(ATTACKS.build("random_labels"))):
    """Flips one label more."""

    def flip(self, oracle, y, budget, rng):
        return super().flip(oracle, y, budget + 1, rng)


class Unseeded(type(ATTACKS.build("random_labels"))):
    """Draws from numpy's global generator."""

    def flip(self, oracle, y, budget, rng):
        return super().flip(oracle, y, budget, np.random.default_rng(np.random.randint(2**31)))  # noqa: NPY002


class InPlace(type(ATTACKS.build("random_labels"))):
    """Changes the caller's labels."""

    def __call__(self, oracle, x, goal, threat, rng, /):
        x.copy_(super().__call__(oracle, x, goal, threat, rng))
        return x


class Trainer(type(ATTACKS.build("random_labels"))):
    """Trains though it says that it needs nothing."""

    def flip(self, oracle, y, budget, rng):
        oracle.train(y)
        return super().flip(oracle, y, budget, rng)


class Anywhere(type(ATTACKS.build("random_labels"))):
    """Runs in any threat model."""

    def __call__(self, oracle, x, goal, threat, rng, /):
        return super().__call__(oracle, x, goal, threat, rng) if isinstance(threat, LabelFlips) else x


@pytest.mark.parametrize(
    ("law", "attack"),
    [
        ("flips_exactly_the_budget", Greedy()),
        ("same_seed_same_labels", Unseeded()),
        ("leaves_nothing_behind", InPlace()),
        ("trains_what_it_says", Trainer()),
        ("refuses_what_has_no_labels", Anywhere()),
    ],
)
def test_every_law_of_labels_can_fail(law, attack):
    assert law in LABEL_LAWS
    with pytest.raises(AssertionError, match=f"law {law}"):
        check_label_law(law, attack)


def test_the_contract_kit_takes_attacks_on_labels():
    check_attack(ATTACKS.build("random_labels"))
    with pytest.raises(AssertionError, match="law flips_exactly_the_budget"):
        check_attack(Greedy())


def test_another_seed_draws_other_labels():
    x, y = clusters(40)
    attack, found = ATTACKS.build("random_labels"), []
    for seed in (0, 0, 1):
        stream = RowRng.from_ids(seed, ["labels"]).at("attack")
        found.append(attack(oracle_of(x, y), torch.from_numpy(y.copy()), None, LabelFlips(k=9), stream))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert play_labels(attack, 3).trainings == 0
