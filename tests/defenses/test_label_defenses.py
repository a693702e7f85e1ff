"""Rivals of FLORAL: what each does to labels and kernels, on small sets where the answer is known."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, make_blobs
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.svm import SVC

from advkit.core.errors import MissingExtra, UsageError
from advkit.core.learners import fitted, scores
from advkit.defenses import DEFENSES
from advkit.defenses.labels.cleaning import Cleaned, CleaningDefense
from advkit.defenses.labels.curie import Curie
from advkit.defenses.labels.floral_svm import FLORALSVM
from advkit.defenses.labels.k_lid import KLIDSVM, local_dimension
from advkit.defenses.labels.ln_svm import LNSVM
from advkit.defenses.labels.ls_svm import LSSVM
from advkit.defenses.labels.networks import NNPGDAT

CLEANLAB = pytest.mark.skipif(
    importlib.util.find_spec("cleanlab") is None, reason="needs cleanlab, the extra advkit[labels]"
)
NAMES = ["floral:rounds=100", "ln_svm", "ls_svm", "curie", "k_lid", "nn:epochs=20", "nn_pgd_at:epochs=5,steps=1,lr=0.1"]
ALL = [*NAMES, pytest.param("cleanlab", marks=CLEANLAB)]


def blobs(n=120, classes=2, flips=0, seed=0):
    """Well apart; labels with the first `flips` of them changed, and the true ones."""
    centers = np.array([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]])[:classes]
    x, y = make_blobs(n, centers=centers, cluster_std=0.6, random_state=seed)
    poisoned = y.copy()
    poisoned[:flips] = (poisoned[:flips] + 1) % classes
    return x, poisoned, y


@pytest.mark.parametrize("spec", ALL)
@pytest.mark.parametrize("classes", [2, 3])
def test_every_one_learns_and_says_it_the_same_way_twice(spec, classes):
    x, poisoned, y = blobs(90, classes, flips=6)
    defense = DEFENSES.build(spec)
    before, torchs = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)  # of what cleanlab imports
        model, again = (fitted(defense.learner(3), x, poisoned) for _ in range(2))
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torchs)
    assert model.classes_.tolist() == list(range(classes))
    assert (model.predict(x) == y).mean() >= 0.95
    every = scores(model, x, classes)
    assert every.shape == (90, classes)
    assert (every.argmax(1) == model.predict(x)).mean() >= 0.98  # ties of machines one against one
    assert np.array_equal(every, scores(again, x, classes))
    if defense.duals:
        assert model.duals_.shape == (90,)
        assert (model.duals_ >= 0).all()
        assert (model.duals_ <= model.C + 1e-9).all()
        assert model.gram(x, x[:5]).shape == (90, 5)


# --- LN-SVM ---


def test_the_kernel_of_ln_svm_is_the_expected_one():
    """Labels flipped independently with probability mu: the mean over draws of s_i s_j k_ij."""
    x, y, _ = blobs(8)
    mu = 0.25
    model = LNSVM(mu=mu, gamma=0.3).learner(0).fit(x, y)
    signs = np.where(np.random.default_rng(0).random((200_000, 8)) < mu, -1.0, 1.0)
    mean = signs.T @ signs / len(signs)
    assert np.abs(model.gram(x, x) - mean * rbf_kernel(x, gamma=0.3)).max() <= 0.01


def test_ln_svm_without_noise_is_the_svm():
    x, y, _ = blobs(60, flips=5)
    model, reference = LNSVM(mu=0.0, gamma=0.3).learner(0).fit(x, y), SVC(gamma=0.3).fit(x, y)
    assert model.decision_function(x) == pytest.approx(reference.decision_function(x), abs=1e-3)


def test_ln_svm_is_an_svm_with_a_weaker_kernel_and_a_ridge():
    x, y, _ = blobs(60, flips=5)
    factor = 1 - 4 * 0.1 * 0.9
    new = np.random.default_rng(0).uniform(-1, 6, (30, 2))
    gram = factor * rbf_kernel(x, gamma=0.3) + (1 - factor) * np.eye(60)
    reference = SVC(kernel="precomputed").fit(gram, y)
    expected = reference.decision_function(factor * rbf_kernel(new, x, gamma=0.3))
    model = LNSVM(mu=0.1, gamma=0.3).learner(0).fit(x, y)
    assert model.decision_function(new) == pytest.approx(expected, abs=1e-9)


# --- sanitisation ---


def test_sanitisation_relabels_what_its_neighbours_outvote():
    x, poisoned, y = blobs(120, flips=10)
    model = LSSVM(neighbours=11).learner(0).fit(x, poisoned)
    assert np.array_equal(model.labels_, y)
    # On a line, by hand: 0 and 2 have neighbours of the other label, 4 and 5 have their own.
    line = np.array([[0.0], [1.0], [2.1], [10.0], [11.0]])
    left = LSSVM(neighbours=3, share=0.6).cleaned(line, np.array([0, 1, 1, 0, 0]), None)
    assert left.labels.tolist() == [1, 1, 1, 0, 0]


def test_sanitisation_goes_on_until_nothing_changes():
    """Sweeping 0 1 1 0 0 0 from the left with 2 of 3 votes relabels at once, so that the next one sees it."""
    line = np.arange(6.0)[:, None] ** 1.01  # the left neighbour is the nearer one
    left = LSSVM(neighbours=3, share=0.6).cleaned(line, np.array([0, 1, 0, 1, 0, 0]), None)
    again = LSSVM(neighbours=3, share=0.6).cleaned(line, left.labels, None)
    assert np.array_equal(left.labels, again.labels)


def test_sanitisation_down_to_one_class_answers_that_class():
    x = np.random.default_rng(0).standard_normal((30, 2))
    y = np.r_[np.ones(2, dtype=int), np.zeros(28, dtype=int)]
    model = LSSVM().learner(0).fit(x, y)
    assert set(model.predict(x)) == {0}
    assert not model.duals_.any()
    assert (model.decision_function(x) < 0).all()


# --- Curie ---


def test_curie_drops_what_is_far_from_its_cluster_and_what_has_none():
    rng = np.random.default_rng(0)
    x = np.r_[rng.normal(0, 0.3, (60, 2)), rng.normal(6, 0.3, (60, 2)), [[30.0, 30.0]], [[1.6, 0.0]]]
    y = np.r_[np.zeros(60, dtype=int), np.ones(60, dtype=int), [0], [0]]
    left = Curie(eps=1.5).cleaned(x, y, np.random.RandomState(0))
    assert 120 not in left.rows  # noise
    assert 121 not in left.rows  # in the cluster, at its edge
    assert len(left.rows) > 70
    assert len(Curie(eps=1.5, theta=10).cleaned(x, y, np.random.RandomState(0)).rows) == 121


def test_curie_with_a_heavy_label_drops_labels_that_are_few_in_their_cluster():
    x, poisoned, _ = blobs(120, flips=8)
    left = Curie(weight=5.0, theta=1.5).cleaned(x, poisoned, np.random.RandomState(0))
    assert not set(left.rows) & set(range(8))
    assert len(left.rows) > 90
    light = Curie(weight=0.0, theta=1.5).cleaned(x, poisoned, np.random.RandomState(0))
    assert set(light.rows) & set(range(8))  # without the label they are like any other


def test_curie_keeps_everything_where_there_is_no_cluster():
    x, y, _ = blobs(40)
    with pytest.warns(UserWarning, match=r"would drop every sample of the classes \[0, 1\]; it keeps"):
        model = Curie(eps=1e-9).learner(0).fit(x, y)
    assert len(model.kept_) == 40


def test_curies_radius_follows_the_data():
    x, y, _ = blobs(80)
    here, there = (Curie().cleaned(scale * x, y, np.random.RandomState(0)).rows for scale in (1.0, 100.0))
    assert len(here) > 40
    assert abs(len(here) - len(there)) <= 4  # the label's weight is in units of the features


# --- K-LID ---


def test_the_local_dimension_is_that_of_the_cube():
    rng = np.random.default_rng(0)
    for dimension in (1, 2, 5):
        points = rng.uniform(-1, 1, (4000, dimension))
        distances = np.sort(np.linalg.norm(points[1:] - 0.0 * points[:1], axis=1))[:100]
        assert local_dimension(distances[None])[0] == pytest.approx(dimension, rel=0.3)
    assert local_dimension(np.array([[1.0, 1.0], [0.0, 2.0]])).tolist() == [np.inf, np.inf]
    assert local_dimension(np.array([[1.0, np.e]]))[0] == pytest.approx(2.0)


def test_k_lid_weighs_a_wrong_label_less():
    x, poisoned, _ = blobs(120, flips=4)
    left = KLIDSVM().cleaned(x, poisoned, None)
    assert left.weights is not None
    assert left.weights[:4].max() < 0.5
    assert np.median(left.weights[4:]) > 0.8
    assert left.weights.max() <= 1
    # A set of one point many times: no distances at all.
    same = KLIDSVM().cleaned(np.zeros((8, 2)), np.array([0, 1] * 4), None)
    assert same.weights is not None
    assert (same.weights == 1).all()


# --- confident learning ---


@CLEANLAB
def test_confident_learning_drops_wrong_labels():
    x, poisoned, _ = blobs(120, flips=10)
    model = DEFENSES.build("cleanlab").learner(0).fit(x, poisoned)
    dropped = set(range(120)) - set(model.kept_.tolist())
    assert len(dropped & set(range(10))) >= 9
    assert len(dropped) <= 15


@CLEANLAB
def test_confident_learning_of_few_samples_drops_nothing():
    x, y, _ = blobs(12)
    with pytest.warns(UserWarning, match="smallest class has 6 samples, and 5 folds need 10"):
        model = DEFENSES.build("cleanlab").learner(0).fit(x, y)
    assert len(model.kept_) == 12


def test_without_cleanlab_the_extra_is_named(monkeypatch):
    x, y, _ = blobs(40)
    monkeypatch.setitem(sys.modules, "cleanlab.filter", None)
    with pytest.raises(MissingExtra, match=r"advkit\[labels\]"):
        DEFENSES.build("cleanlab").learner(0).fit(x, y)


# --- what they share ---


class Halved(CleaningDefense):
    def cleaned(self, x, y, rng):
        rows = np.arange(0, len(x), 2)
        return Cleaned(rows, y[rows], np.full(len(rows), 0.5))


def test_what_is_dropped_has_no_influence():
    x, y, _ = blobs(60, flips=6)
    weights = np.random.default_rng(0).uniform(0.5, 2, 60)
    model = Halved(gamma=0.3).learner(0).fit(x, y, sample_weight=weights)
    reference = SVC(gamma=0.3).fit(x[::2], y[::2], sample_weight=weights[::2] / 2)
    assert model.decision_function(x) == pytest.approx(reference.decision_function(x), abs=1e-9)
    assert not model.duals_[1::2].any()
    assert np.abs(model.duals_[::2][reference.support_] - np.abs(reference.dual_coef_[0])).max() <= 1e-9


def test_floral_without_its_attacker_is_its_ablation():
    defense = FLORALSVM(C=2.0, rounds=7)
    assert defense.ablation() == replace(defense, budget=0.0)
    assert FLORALSVM(budget=0).ablation() is None
    assert defense.learner(4).get_params()["random_state"] == 4
    assert FLORALSVM(gamma=0.5).learner(0).gamma == 0.5
    assert defense.learner(0).get_params()["budget"] == 0.05


@pytest.mark.parametrize(
    "spec",
    [
        "ln_svm:mu=0.5",
        "ls_svm:share=0",
        "ls_svm:neighbours=0",
        "curie:count=0",
        "curie:eps=0",
        "k_lid:neighbours=1",
        "cleanlab:folds=1",
        "nn:epochs=0",
        "nn:hidden=0",
        "nn_pgd_at:eps=0",
        "floral:budget=1.5",
        "floral:budget=-1",
        "floral:rounds=0",
        "floral:C=0",
    ],
)
def test_settings_out_of_range(spec):
    with pytest.raises(UsageError, match="expected"):
        DEFENSES.build(spec)


@pytest.mark.slow
def test_the_network_is_trained_against_perturbed_samples():
    """Robust within its radius where the plain network of the same size is less so."""
    x, y = load_digits(return_X_y=True)
    rows = np.isin(y, (1, 7))
    x, y = x[rows] / 16, (y[rows] == 7).astype(int)
    scored = {}
    for steps, eps in ((1, 1e-6), (5, 0.15)):
        defense = NNPGDAT(epochs=40, eps=eps, steps=steps)
        model = defense.learner(0).fit(x[:200], y[:200])
        assert model.score(x[200:], y[200:]) > 0.95
        leaf = torch.from_numpy(x[200:]).float().requires_grad_()
        torch.nn.functional.cross_entropy(model._model(leaf), torch.from_numpy(y[200:])).backward()
        moved = (leaf + 0.15 * leaf.grad.sign()).clamp(0, 1).detach().double().numpy()
        scored[steps] = model.score(moved, y[200:])
    assert scored[5] >= scored[1] + 0.1
