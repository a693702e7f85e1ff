"""The defense `smoothing`: it keeps the laws, trains under noise, and answers by votes."""

from __future__ import annotations

import pytest
import torch

from advkit.core.errors import UsageError
from advkit.core.rng import RowRng
from advkit.defenses import DEFENSES
from advkit.defenses.smoothing.gaussian import GaussianSmoothing, UnderNoise
from advkit.evaluation.victims import protected
from advkit.models.smoothed import Smoothed
from advkit.tasks import TASKS
from advkit.testing import check_defense, check_training
from advkit.testing.defense_laws import forgetful, stripes
from advkit.training.loop import Recipe, fit

SHORT = Recipe(epochs=2, batch_size=32)


def test_it_keeps_the_laws_of_defenses():
    check_defense(GaussianSmoothing(n_predict=50))


def test_its_training_keeps_the_laws():
    check_training(GaussianSmoothing(recipe=SHORT))


def test_the_loss_is_that_of_rows_under_noise_from_their_streams():
    model, data = forgetful(), stripes()
    model.module.eval()
    x, y, rows = data.x[:16], data.y[:16], torch.arange(16)
    rng = RowRng.from_ids(0, [str(row) for row in range(16)])
    found = UnderNoise(0.25).loss(model, x, y, rows, rng)
    noisy = x + 0.25 * rng.at("noise").normal(x)
    assert torch.equal(found, torch.nn.functional.cross_entropy(model(noisy), y))
    assert float((noisy - x).std()) == pytest.approx(0.25, rel=0.1)


@pytest.mark.slow
def test_training_under_noise_beats_clean_training_under_noise():
    data = stripes(rows=240)
    votes = {}
    for name, sigma in (("noise", 0.5), ("clean", 1e-6)):
        trained = fit(
            forgetful(),
            data,
            UnderNoise(sigma),
            Recipe(epochs=30, batch_size=32),
            RowRng.from_ids(0, ["t"]),
            progress=False,
        ).model
        smoothed = GaussianSmoothing(sigma=0.5, n_predict=64).deploy(trained)
        keys = RowRng.from_ids(0, [str(row) for row in range(60)]).keys()
        share = smoothed.drawing(data.x[:60], keys) / 64
        votes[name] = float(share.gather(1, data.y[:60, None]).mean())
    assert votes["noise"] > votes["clean"] + 0.02


def test_zoo_and_cache_know_it_by_what_matters_to_training():
    full = DEFENSES.build("smoothing:sigma=0.5,noise=lattice,n_predict=10,alpha=0.01,draws=3,recipe=[epochs=2]")
    assert full.trained_as == DEFENSES.build("smoothing:sigma=0.5,recipe=[epochs=2]")
    assert full.settings.n_predict == 10


def test_a_ready_model_is_smoothed_as_it_is():
    task = TASKS.build("digits")
    plain = protected("zoo:digits-mlp", "none", task)
    smoothed = protected("zoo:digits-mlp", "smoothing:sigma=0.5,n_predict=70", task)
    assert isinstance(smoothed.model, Smoothed)
    assert smoothed.model.settings.n_predict == 70
    assert smoothed.model.undefended.describe() == plain.model.describe()
    assert smoothed.origin == "zoo:digits-mlp"


@pytest.mark.parametrize(
    "spec", ["smoothing:sigma=0", "smoothing:sigma=-0.25", "smoothing:alpha=1", "smoothing:draws=0"]
)
def test_settings_out_of_range_are_refused(spec):
    with pytest.raises(UsageError, match="expected"):
        DEFENSES.build(spec)
