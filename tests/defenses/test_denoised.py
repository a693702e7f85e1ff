"""Fronts for black boxes: the surrogate is backpropagation, queries are exact, and the model gets no gradient."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import advkit
from advkit.core.errors import BadModel, BudgetExhausted, NoTrainingData, UsageError
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.defenses import DEFENSES
from advkit.defenses.smoothing.denoised import ZOAEDS, ZODS, DenoisedSmoothing, FirstOrderAEDS, FirstOrderDS
from advkit.defenses.smoothing.fronts import QUERIES, surrogate
from advkit.evaluation.victims import protected, train_victim
from advkit.models.fronts import Denoised
from advkit.models.smoothed import Smoothed
from advkit.models.torch import NumpyModel
from advkit.tasks import TASKS
from advkit.testing import check_defense, check_training
from advkit.testing.defense_laws import forgetful, stripes
from advkit.training.loop import Recipe, fit

SHORT = Recipe(epochs=2, batch_size=32, lr=1e-3)
PRE = Recipe(epochs=2, batch_size=32, lr=1e-3, validation=0.0)
SMALL = {"width": 8, "recipe": SHORT}
ENCODED = {**SMALL, "d_z": 3, "hidden": 8, "pretraining": PRE}
DEFENSE = {
    "mse": DenoisedSmoothing(loss="mse", **SMALL),
    "both": DenoisedSmoothing(loss="both", gamma=0.5, **SMALL),
    "fo_ds": FirstOrderDS(**SMALL),
    "fo_ae_ds": FirstOrderAEDS(**ENCODED),
    "zo_ds": ZODS(q=3, **SMALL),
    "zo_ae_ds": ZOAEDS(**ENCODED),
    "zo_ae_ds, rge": ZOAEDS(estimator="rge", antithetic=True, q=3, **ENCODED),
    "zo_ae_ds, forward": ZOAEDS(mode="forward", targets="labels", train="part", **ENCODED),
    "zo_ae_ds, labels": ZOAEDS(answers="labels", votes=2, mu=0.5, **ENCODED),
    "zo_ds, probabilities": ZODS(answers="probabilities", q=2, **SMALL),
}


def softmaxed(model):
    """The model's probabilities, from a function that knows numpy alone."""

    def f(x):
        with torch.no_grad():
            return model(torch.from_numpy(x)).softmax(1).numpy()

    return NumpyModel(f, model.space, model.classes, identity=model.state_sha256())


@pytest.mark.parametrize("name", DEFENSE)
def test_training_keeps_the_laws(name):
    check_training(DEFENSE[name], softmaxed(forgetful()) if "probabilities" in name else None)


@pytest.mark.parametrize("name", ["mse", "fo_ds", "zo_ae_ds"])
def test_they_keep_the_laws_of_defenses(name):
    check_defense(replace(DEFENSE[name], n_predict=50, sigma=0.1))


def test_the_surrogates_gradient_is_the_estimates_over_the_batch():
    z = torch.randn(5, 7, requires_grad=True)
    a, value = torch.randn(5, 7), torch.rand(5)
    found = surrogate(z, a, value)
    assert float(found.detach()) == pytest.approx(float(value.mean()))
    found.backward()
    torch.testing.assert_close(z.grad, a / 5)


@pytest.mark.parametrize("name", ["fo_ds", "fo_ae_ds"])
def test_with_the_exact_gradient_the_parameters_gradients_are_those_of_backpropagation(name):
    defense, data, model = DEFENSE[name], stripes(), forgetful()
    chain = defense.around(model, data, RowRng.from_ids(0, ["f"]))
    with torch.no_grad():
        for each in chain.front.denoiser.parameters():
            each.add_(0.02 * torch.randn_like(each))
    objective = defense.objective()
    objective.prepare(chain, data, RowRng.from_ids(0, ["p"]))
    rows = torch.arange(20)
    x, y = data.x[rows], data.y[rows]
    rng = RowRng.from_ids(0, [str(row) for row in range(20)])
    loss = objective.loss(chain, x, y, rows, rng)
    live = [each for each in chain.front.parameters() if each.requires_grad]
    found = torch.autograd.grad(loss, live, retain_graph=True)
    plain = F.cross_entropy(chain(x + defense.sigma * rng.at("noise").normal(x)), model(x).argmax(1))
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), abs=1e-6)
    for one, other in zip(found, torch.autograd.grad(plain, live), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_zeroth_order_gradients_point_where_the_first_order_ones_do():
    data, model = stripes(), forgetful()
    gradients = {}
    for name in ("fo_ae_ds", "zo_ae_ds"):
        chain = DEFENSE[name].around(model, data, RowRng.from_ids(0, ["f"]))
        objective = DEFENSE[name].objective()
        objective.prepare(chain, data, RowRng.from_ids(0, ["p"]))
        rows = torch.arange(20)
        rng = RowRng.from_ids(0, [str(row) for row in range(20)])
        objective.loss(chain, data.x[rows], data.y[rows], rows, rng).backward()
        live = [each for each in chain.front.parameters() if each.requires_grad]
        gradients[name] = torch.cat([each.grad.flatten() for each in live])
    assert float(F.cosine_similarity(*gradients.values(), dim=0)) > 0.98


@pytest.mark.parametrize(
    ("name", "each"),
    [
        ("mse", 0),
        ("fo_ds", 1),
        ("zo_ds", 3 + 1),
        ("zo_ae_ds", 2 * 3 + 1),
        ("zo_ae_ds, rge", 2 * 3 + 1),
        ("zo_ae_ds, forward", 3 + 1),
        ("zo_ae_ds, labels", 2 * (2 * 3 + 1)),
    ],
)
def test_a_numpy_function_is_asked_exactly_so_often(name, each):
    """Epochs times rows times the estimator's price, a label for every row that is trained on, and validation."""
    data, asked = stripes(rows=64), []
    model = forgetful()

    def f(x):
        asked.append(len(x))
        assert type(x) is np.ndarray
        with torch.no_grad():
            return model(torch.from_numpy(x)).numpy()

    victim = NumpyModel(f, model.space, 3)
    if name == "fo_ds":
        victim = model
    defense = replace(DEFENSE[name], recipe=replace(SHORT, validation=0.25))
    chain = defense.around(victim, data, RowRng.from_ids(0, ["f"]))
    assert asked == []
    done = fit(chain, data, defense.objective(), defense.recipe, RowRng.from_ids(0, ["t"]), progress=False)
    trained, held, epochs = 48, 16, 2
    labels = trained if each and defense.targets == "model" else 0
    expected = [epoch * (trained * each + 2 * held) + labels for epoch in range(1, epochs + 1)]
    assert [entry.figures[QUERIES] for entry in done.log] == expected
    assert name == "fo_ds" or sum(asked) == expected[-1]
    assert all(p.grad is None for p in model.module.parameters())


def test_a_budget_ends_training_before_an_epoch_that_it_does_not_pay(tmp_path):
    data = stripes(rows=64)
    once, labels = 48 * 4 + 2 * 16, 48
    recipe = replace(SHORT, epochs=5, validation=0.25)
    defense = replace(DEFENSE["zo_ds"], recipe=recipe, budget=2 * once + labels + 7)
    model = forgetful()
    chain = defense.around(model, data, RowRng.from_ids(0, ["f"]))
    settings = {"rng": RowRng.from_ids(0, ["t"]), "progress": False, "out": tmp_path}
    done = fit(chain, data, defense.objective(), recipe, **settings)
    assert len(done.log) == 2
    assert done.log[-1].figures[QUERIES] == 2 * once + labels
    assert "does not pay another epoch: 496 queries were made, and the next epoch takes 224" in done.halted
    again = fit(chain, data, defense.objective(), recipe, **settings)  # a run that is over stays over
    assert again.halted == done.halted
    assert again.last.state_sha256() == done.last.state_sha256()


def test_a_budget_below_the_first_epoch_is_refused_before_a_query():
    defense, data = replace(DEFENSE["zo_ds"], budget=100), stripes()
    chain = defense.around(forgetful(), data, RowRng.from_ids(0, ["f"]))
    with pytest.raises(UsageError, match="budget is 100 queries; the first epoch takes"):
        fit(chain, data, defense.objective(), defense.recipe, RowRng.from_ids(0, ["t"]), progress=False)
    assert chain.answered == 0


def test_the_budget_is_kept_by_the_chain_and_not_by_good_will():
    defense, data = replace(DEFENSE["zo_ds"], budget=10_000), stripes()
    chain = defense.around(forgetful(), data, RowRng.from_ids(0, ["f"]))
    objective = defense.objective()
    objective.prepare(chain, data, RowRng.from_ids(0, ["p"]))
    chain.queries.spent += 9_999
    rows = torch.arange(4)
    with pytest.raises(BudgetExhausted):
        objective.loss(chain, data.x[rows], data.y[rows], rows, RowRng.from_ids(0, list("abcd")))


@pytest.mark.slow
def test_mse_alone_trains_a_denoiser():
    data = stripes(rows=240)
    defense = DenoisedSmoothing(loss="mse", sigma=0.5, width=64, recipe=Recipe(epochs=20, batch_size=32, lr=1e-3))
    chain = defense.around(forgetful(), data, RowRng.from_ids(0, ["f"]))
    done = fit(chain, data, defense.objective(), defense.recipe, RowRng.from_ids(0, ["t"]), progress=False)
    noisy = data.x + 0.5 * torch.randn_like(data.x)
    with torch.no_grad():
        before, after = (float((each - data.x).square().mean()) for each in (noisy, done.last.front.denoiser(noisy)))
    assert after < before - 0.02  # seven standard errors of the noise's mean square, 0.25 (2 / 17280)^.5


@pytest.mark.slow
@pytest.mark.parametrize("answers", ["logits", "probabilities"])
def test_zo_ae_ds_lifts_the_chain_under_noise(answers):
    """A black box of numpy: the share of noisy copies that are right grows, and the box stays what it was."""
    data = stripes(rows=240)
    plain = Recipe(epochs=20, batch_size=32)
    box = fit(forgetful(), data, DEFENSES.build("none").objective(), plain, RowRng.from_ids(0, ["b"]), progress=False)
    before = box.model.state_sha256()
    victim = softmaxed(box.model) if answers == "probabilities" else box.model
    defense = ZOAEDS(
        sigma=0.5,
        d_z=8,
        hidden=32,
        width=32,
        answers=answers,
        pretraining=Recipe(epochs=30, batch_size=32, lr=3e-3, validation=0.0),
        recipe=Recipe(epochs=12, batch_size=32, lr=3e-3, validation=0.0),
    )
    chain = defense.around(victim, data, RowRng.from_ids(0, ["f"]))
    done = fit(chain, data, defense.objective(), defense.recipe, RowRng.from_ids(0, ["t"]), progress=False)
    noisy = data.x + 0.5 * torch.randn_like(data.x)
    right = [float((each(noisy).argmax(1) == data.y).float().mean()) for each in (victim, done.model)]
    assert right[1] > right[0] + 0.1
    assert box.model.state_sha256() == before


def test_answers_that_are_no_probabilities_are_not_taken_for_some():
    """Logarithms would all be cut to the same number: nothing would be learned, and every query spent."""
    data = stripes(rows=40)
    defense = ZODS(answers="probabilities", q=2, **SMALL)
    chain = defense.around(forgetful(), data, RowRng.from_ids(0, ["f"]))
    with pytest.raises(BadModel, match="answers=probabilities, and the model answers numbers that are negative"):
        fit(chain, data, defense.objective(), defense.recipe, RowRng.from_ids(0, ["t"]), progress=False)


def test_labels_of_clean_samples_are_those_of_the_data_set_whatever_the_augmentation():
    """Asked once, of the sample itself: a flipped copy does not decide."""
    data = stripes(rows=32)
    defense = replace(DEFENSE["zo_ds"], recipe=replace(SHORT, augment="crop-flip", validation=0.0))
    model = forgetful()
    chain = defense.around(model, data, RowRng.from_ids(0, ["f"]))
    objective = defense.objective()
    fit(chain, data, objective, defense.recipe, RowRng.from_ids(0, ["t"]), progress=False)
    assert torch.equal(objective.state()["labels"], model(data.x).argmax(1))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("zo_ae_ds:sigma=0", "sigma is 0.0; expected"),
        ("zo_ae_ds:mu=0", "mu is 0.0; expected"),
        ("zo_ds:q=0", "q is 0; expected"),
        ("zo_ae_ds:estimator=spsa", "estimator"),
        ("zo_ae_ds:d_z=-1", "d_z is -1; expected"),
        ("zo_ae_ds:autoencoder=conv,d_z=16", "d_z is 16; expected 192"),
        ("zo_ae_ds:budget=0", "budget is 0; expected"),
        ("zo_ae_ds:alpha=1", "alpha is 1.0; expected"),
        ("zo_ae_ds:votes=0", "votes is 0; expected"),
        ("zo_ae_ds:pretraining=[validation=0.1]", "pretraining: validation is 0.1; expected 0"),
        ("fo_ds:answers=labels", "labels have no gradient"),
        ("denoised_smoothing:gamma=0", "gamma is 0.0; expected"),
        ("denoised_smoothing:loss=l1", "loss"),
    ],
)
def test_settings_out_of_range_are_refused(spec, words):
    with pytest.raises(UsageError, match=words):
        DEFENSES.build(spec)


@pytest.mark.parametrize(
    ("victim", "words"),
    [
        (lambda x: np.zeros((len(x), 4), dtype=np.float32), "answers 4 classes; expected 3"),
        (lambda x: np.full((len(x), 3), np.nan, dtype=np.float32), "NaN or infinity"),
    ],
)
def test_a_model_that_answers_something_else_ends_training_in_a_clear_line(victim, words):
    defense, data = DEFENSE["zo_ds"], stripes()
    chain = defense.around(NumpyModel(victim, data.space, 3), data, RowRng.from_ids(0, ["f"]))
    with pytest.raises(BadModel, match=words):
        fit(chain, data, defense.objective(), defense.recipe, RowRng.from_ids(0, ["t"]), progress=False)


def test_what_can_not_be_is_refused_in_words():
    data = stripes()
    rng = RowRng.from_ids(0, ["f"])
    with pytest.raises(NoTrainingData, match="no training data"):
        DEFENSE["zo_ds"].protect(forgetful(), None, rng)
    wide = replace(data, space=Box(-1.0, 1.0, (2, 6, 6)))
    model = forgetful()
    model.space = wide.space
    with pytest.raises(UsageError, match=r"a decoder answers samples in \[0, 1\]"):
        DEFENSE["zo_ae_ds"].around(model, wide, rng)
    with pytest.raises(BadModel, match="has no front to train"):
        fit(forgetful(), data, DEFENSE["zo_ds"].objective(), SHORT, rng, progress=False)
    chain = DEFENSE["fo_ds"].around(softmaxed(forgetful()), data, rng)
    with pytest.raises(UsageError, match="use zo_ae_ds or zo_ds"):
        fit(chain, data, DEFENSE["fo_ds"].objective(), SHORT, rng, progress=False)
    busy = forgetful()
    busy.module.train()
    with pytest.raises(BadModel, match="training mode"):
        DEFENSE["zo_ds"].around(busy, data, rng)
    smoothed = DEFENSES.build("smoothing").protect(forgetful(), None, rng)
    with pytest.raises(BadModel, match="vary from call to call"):
        DEFENSE["zo_ds"].around(smoothed, data, rng)


SPEC = "zo_ae_ds:sigma=0.25,d_z=4,hidden=8,width=8,n_predict=40,pretraining=[epochs=1,validation=0],recipe=[epochs=1]"


@pytest.mark.slow
def test_victims_are_found_trained_kept_and_smoothed(tmp_path, monkeypatch):
    monkeypatch.setenv("ADVKIT_CACHE", str(tmp_path))
    task = TASKS.build("digits")
    one = protected("zoo:digits-mlp", SPEC, task)
    assert isinstance(one.model, Smoothed)
    assert isinstance(one.model.model, Denoised)
    assert one.model.undefended.describe() == protected("zoo:digits-mlp", "none", task).model.describe()
    assert one.origin == "zoo:digits-mlp, front trained here, seed 0"
    again = protected("zoo:digits-mlp", SPEC.replace("n_predict=40", "n_predict=50"), task)
    assert again.model.model.describe() == one.model.model.describe()
    assert len(list((tmp_path / "trained").iterdir())) == 1


def test_without_training_data_a_front_is_asked_for():
    with pytest.raises(NoTrainingData, match=r"trains a front before zoo:fashion-mnist-cnn.* weights=FILE"):
        protected(None, "zo_ds", TASKS.build("fashion-mnist"))


@pytest.mark.slow
def test_trained_certified_and_attacked(tmp_path):
    """`train_victim` keeps the front; the same file serves certificates, and attacks that know of it and do not."""
    made = train_victim("zoo:digits-mlp", SPEC, TASKS.build("digits"), out=tmp_path)
    assert made["queries"]["retried"] == 0
    rows = 1437 - 143
    assert made["queries"]["answered"] == rows * 9 + rows + 2 * 143
    assert made["evaluate"] == (
        f"advkit evaluate --task digits --model zoo:digits-mlp --defense {made['defense']},weights={made['file']}"
    )
    kept = f"{SPEC},weights={made['file']}"
    proof = advkit.certify(
        defense=kept, model="zoo:digits-mlp", task="digits", threat_model="certified:n0=20,n=100", n=3
    )
    assert proof.metrics["noisy_copies"]["value"] == 3 * 120
    assert proof.to_dict()["model"]["queries"]["retried"] == 0
    report = advkit.evaluate(
        attack="pgd:steps=2", defense=kept, model="zoo:digits-mlp", task="digits", threat_model="l2:eps=0.2", n=4
    )
    assert {"robust_accuracy", "oblivious_robust_accuracy"} <= set(report.metrics)
    assert report.to_dict()["threat_model"]["attacker"]["defense"] == "adaptive"
