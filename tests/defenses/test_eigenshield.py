"""The EigenShield-style defense in the harness: fitted, stored, embedded; oblivious and adaptive attackers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import advkit
from advkit.core.errors import BadInput, NoTrainingData, UsageError
from advkit.core.protocols import Data
from advkit.core.rng import RowRng
from advkit.defenses import DEFENSES
from advkit.defenses.representations.eigenshield import EigenShield
from advkit.evaluation.plan import Request, plan
from advkit.evaluation.victims import protected
from advkit.models import zoo
from advkit.models.projected import Projected, default_place, embeddings
from advkit.models.spectral import Filter, Place, Projection, rbns, spectrum
from advkit.tasks import TASKS
from advkit.testing import check_defense

SMALL = "calibration=600,pairs=100,validation=200,calibration_attack=[pgd:steps=4]"
RNG = RowRng.from_ids(0, ["training"]).at("train")


@pytest.fixture(autouse=True)
def _no_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ADVKIT_DATA", raising=False)
    monkeypatch.setenv("ADVKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def data() -> Data:
    found = TASKS.build("digits").training()
    assert found is not None
    return found


@pytest.fixture(scope="module")
def guarded(data: Data) -> Projected:
    return DEFENSES.build(f"eigenshield:{SMALL},q=0.5").protect(zoo.load("digits-mlp"), data, RNG)


# --- without training data


def test_the_embedded_filter_needs_no_training_images() -> None:
    victim = plan(Request(attack="pgd", defense="eigenshield", device="cpu")).victim
    assert victim.origin == "zoo:fashion-mnist-cnn-eigenshield"
    assert isinstance(victim.model, Projected)
    card = zoo.card("fashion-mnist-cnn-eigenshield")
    assert card.base == "fashion-mnist-cnn"
    assert victim.model.undefended.describe().state_sha256 == zoo.load(card.base).describe().state_sha256
    assert DEFENSES.name_of(DEFENSES.build(card.defense)) == "eigenshield"
    batch = next(iter(TASKS.build("fashion-mnist").batches(1000)))
    with torch.no_grad():
        right = float((victim.model(batch.x).argmax(1) == batch.labels).float().mean())
    assert right == pytest.approx(card.measured["clean accuracy"], abs=0.0021)
    fitted = victim.model.fitted
    assert not fitted.identity
    assert fitted.kept.sum() < fitted.spectrum.spikes < len(fitted.spectrum.values) <= 64


@pytest.mark.exhaustive
def test_the_card_s_figures_are_measured() -> None:
    report = advkit.evaluate("pgd:steps=40,step_size=0.1", defense="eigenshield", device="cpu")
    measured = zoo.card("fashion-mnist-cnn-eigenshield").measured
    assert report.robust_accuracy == pytest.approx(measured["pgd-40 accuracy, adaptive"], abs=0.0051)
    oblivious = report.to_dict()["metrics"]["oblivious_robust_accuracy"]["value"]
    assert oblivious == pytest.approx(measured["pgd-40 accuracy, oblivious"], abs=0.0051)


def test_other_settings_ask_for_training_data_in_a_line() -> None:
    with pytest.raises(
        NoTrainingData, match=r"eigenshield:q=0.5 is fitted to zoo:fashion-mnist-cnn .* fashion-mnist:root="
    ):
        protected(None, "eigenshield:q=0.5", TASKS.build("fashion-mnist"))
    with pytest.raises(NoTrainingData, match="weights=FILE"):
        EigenShield().protect(zoo.load("digits-mlp"), None, RNG)


# --- in the harness


def test_a_report_has_clean_oblivious_and_adaptive_and_names_the_calibration() -> None:
    report = advkit.evaluate(
        "pgd:steps=10", f"eigenshield:{SMALL},q=0.5", "digits", threat_model="linf:eps=0.1", n=150, device="cpu"
    )
    document = report.to_dict()
    metrics = {name: document["metrics"][name]["value"] for name in ("robust_accuracy", "oblivious_robust_accuracy")}
    assert metrics["robust_accuracy"] <= metrics["oblivious_robust_accuracy"] + 0.02
    assert report.clean_accuracy > 0.8
    assert document["threat_model"]["adaptive"]
    assert document["defense"]["params"]["calibration_attack"] == "pgd:steps=4"
    assert document["defense"]["params"]["threat_model"] == "linf:eps=0.1"
    assert document["defense"]["origin"] == "zoo:digits-mlp"
    text = str(report)
    assert "oblivious (defense unknown)" in text
    assert "adaptive" in text


class Detached(Projection):
    """A projection that hides its derivative."""

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z.detach()) + 0 * z


def test_a_filter_that_hides_its_gradient_fails_the_checks(guarded: Projected) -> None:
    fitted, place = guarded.fitted, guarded.place
    hidden = Detached(fitted.projection.mean, fitted.projection.basis)

    class Hides:
        needs_data, claims = False, ""

        def protect(self, model: Any, data: Data | None, rng: Any, /) -> Projected:
            return Projected(model, Filter(**{**vars(fitted), "projection": hidden}), place)

    digits = TASKS.build("digits").training()
    with pytest.raises(AssertionError, match="honest_view"):
        check_defense(Hides(), zoo.load("digits-mlp"), digits)
    report = advkit.evaluate("pgd:steps=5", Hides(), "digits", "zoo:digits-mlp", "linf:eps=0.1", n=60, device="cpu")
    assert not report.trustworthy
    assert "zero_gradient" in {flag["id"] for flag in report.flags}


@pytest.mark.slow
def test_a_torch_module_and_any_of_its_layers_can_be_protected(data: Data) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 20), nn.ReLU(), nn.Linear(20, 10)
    ).eval()
    for module, d in (("1", 6), ("3", 20)):
        guard = EigenShield(module=module, q=1.0, calibration=200, calibration_attack="noise", tokens_per_image=4)
        report = advkit.evaluate("fgsm", guard, "digits", net, "linf:eps=0.1", n=20, device="cpu")
        assert report.to_dict()["defense"]["params"]["module"] == module
        model = protected(net, guard, TASKS.build("digits")).model
        assert len(model.fitted.spectrum.mean) == d
        assert model.fitted.spectrum.n == (799 if module == "1" else 199)


# --- what is fitted


def test_the_same_seed_gives_the_same_filter_and_no_sample_depends_on_its_batch(data: Data, guarded: Projected) -> None:
    again = DEFENSES.build(f"eigenshield:{SMALL},q=0.5").protect(zoo.load("digits-mlp"), data, RNG)
    assert again.describe().state_sha256 == guarded.describe().state_sha256
    other = DEFENSES.build(f"eigenshield:{SMALL},q=0.5").protect(zoo.load("digits-mlp"), data, RNG.at("other"))
    assert other.describe().state_sha256 != guarded.describe().state_sha256
    x = next(iter(TASKS.build("digits").batches(9))).x
    together = guarded(x)
    for row in range(9):
        assert torch.allclose(guarded(x[row : row + 1])[0], together[row], atol=1e-5)


def test_scores_are_those_of_the_calibration_attack(data: Data) -> None:
    model = zoo.load("digits-mlp")
    attacks = ("pgd:steps=4", "noise", "none")
    fits = {
        attack: EigenShield(calibration=600, pairs=100, q=1.0, calibration_attack=attack)
        .protect(model, data, RNG)
        .fitted
        for attack in attacks
    }
    assert fits["none"].scores.tolist() == [0.0] * fits["none"].spectrum.spikes
    assert fits["noise"].spectrum.values.tolist() == fits["none"].spectrum.values.tolist()
    assert (fits["pgd:steps=4"].scores[:4] > fits["noise"].scores[:4]).all()
    order = torch.randperm(len(data), generator=RNG.at("samples").generator())[:600]
    guard, place = EigenShield(calibration_attack="pgd:steps=4"), default_place(model)
    moved = guard.attacked(model, data.x[order[:100]], data.y[order[:100]], RNG)
    found = spectrum(embeddings(model, data.x[order], place))
    pairs = embeddings(model, data.x[order[:100]], place), embeddings(model, moved, place)
    assert fits["pgd:steps=4"].scores == pytest.approx(rbns(found, *pairs))


def test_noise_is_as_long_as_the_radius_allows_and_stays_in_the_box(data: Data) -> None:
    model, x = zoo.load("digits-mlp"), data.x[:40] * 0 + 0.5
    for threat, length in (("linf:eps=0.01", 0.01 * 8), ("l2:eps=0.05", 0.05)):
        guard = EigenShield(calibration_attack="noise", threat_model=threat)
        moved = guard.attacked(model, x, data.y[:40], RNG)
        assert (moved - x).flatten(1).norm(dim=1).numpy() == pytest.approx(length, rel=1e-4)
    moved = EigenShield(calibration_attack="noise", threat_model="linf:eps=0.9").attacked(model, x, data.y[:40], RNG)
    assert moved.min() >= 0
    assert moved.max() <= 1


def test_the_calibration_attack_stays_in_its_ball_and_spends_its_budget(data: Data) -> None:
    model, x, y = zoo.load("digits-mlp"), data.x[:50], data.y[:50]
    moved = EigenShield(threat_model="linf:eps=0.1").attacked(model, x, y, RNG)
    assert (moved - x).abs().max() <= 0.1 + 1e-6
    assert float((model(moved).argmax(1) == y).float().mean()) < float((model(x).argmax(1) == y).float().mean()) - 0.3


def test_auto_keeps_the_clean_accuracy_that_it_was_allowed_to_cost(data: Data) -> None:
    model = EigenShield(calibration=600, pairs=100, validation=300, calibration_attack="pgd:steps=4").protect(
        zoo.load("digits-mlp"), data, RNG
    )
    assert model.fitted.drops[model.fitted.q] <= 0.01
    assert all(drop > 0.01 for q, drop in model.fitted.drops.items() if q < model.fitted.q)


def test_a_stored_filter_is_named_by_its_file(guarded: Projected, tmp_path: Path) -> None:
    path = tmp_path / "filter.safetensors"
    guarded.save(path)
    guard = DEFENSES.build(f"eigenshield:weights={path}")
    assert not guard.needs_data
    victim = protected("zoo:digits-mlp", guard, TASKS.build("digits"))
    assert victim.model.describe() == guarded.describe()


def test_what_cannot_be_fitted_is_said_in_a_line(data: Data) -> None:
    model = zoo.load("digits-mlp")

    def few(n: int) -> Data:
        return Data(data.x[:n], data.y[:n], data.space, data.classes, data.name)

    with pytest.raises(BadInput, match="1 calibration sample: a covariance takes at least 2"):
        EigenShield(q=1.0, calibration_attack="none").protect(model, few(1), RNG)
    with pytest.raises(BadInput, match="there are 3 in all"):
        EigenShield().protect(model, few(3), RNG)
    with pytest.raises(UsageError, match="no layer 'heads'"):
        EigenShield(module="heads").protect(model, data, RNG)
    with pytest.raises(UsageError, match="name the layer"):
        EigenShield(before=True)
    with pytest.raises(UsageError, match="expected a ball"):
        EigenShield(threat_model="minimum-l2")
    with pytest.raises(UsageError, match="calibration is 1"):
        EigenShield(calibration=1)


def test_noise_alone_leaves_the_model_as_it_is_with_a_warning() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    noise = Data(torch.randn(400, 1, 8, 8), torch.zeros(400, dtype=torch.long), None, 10, name="noise")
    from advkit.core.spaces import Box
    from advkit.models.torch import TorchModel

    model = TorchModel(net, Box(-9.0, 9.0, (1, 8, 8)), 10)
    with pytest.warns(UserWarning, match="the filter is the identity"):
        guarded = EigenShield(q=1.0, calibration_attack="none").protect(model, noise, RNG)
    assert torch.equal(guarded(noise.x), model(noise.x))
    assert embeddings(model, noise.x, Place("0")).shape == (400, 64)
