"""The spectral filter on matrices with planted spikes: counts, scores, projections, files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from advkit.core import rmt
from advkit.core.errors import BadInput, CheckpointError, UsageError
from advkit.models.spectral import (
    Filter,
    Place,
    Projection,
    SpectralFilter,
    as_vectors,
    causal,
    load_filter,
    rbns,
    save_filter,
    spectrum,
    taken,
)
from advkit.testing.planted import Planted

SPIKES = np.array([12.0, 6.0, 3.0, 1.6, 1.2])


def spiked_rows(seed: int, n: int = 400, d: int = 60) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Rows whose population covariance is the identity and SPIKES, and the spikes' directions."""
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.normal(size=(d, len(SPIKES))))[0]
    rows = rng.normal(size=(n, d))
    return rows + (rows @ directions) * (np.sqrt(SPIKES) - 1) @ directions.T, directions


@pytest.mark.parametrize("sigma", ["median", "iterative"])
@pytest.mark.parametrize("seed", range(4))
def test_spikes_above_the_threshold_are_counted_exactly(seed: int, sigma: Any) -> None:
    rows, directions = spiked_rows(seed)
    found = spectrum(rows, sigma=sigma)
    assert int((1.5 * rmt.bbp_threshold(found.g) < SPIKES).sum()) == 3
    # 1.6 is above the threshold itself (1.39), and may be seen where the noise comes out small
    assert found.spikes in ((3,) if sigma == "median" else (3, 4))
    assert found.sigma2 == pytest.approx(1, abs=0.1)
    assert found.debiased[:3] == pytest.approx(SPIKES[:3], rel=0.15)
    overlaps = np.square((found.vectors[:, :3] * directions[:, :3]).sum(0))
    assert overlaps == pytest.approx(rmt.overlap(SPIKES[:3], found.g), abs=0.1)


def test_spectrum_is_numpy_s_in_both_ways_of_computing_it() -> None:
    rows, _ = spiked_rows(0)
    found = spectrum(rows)
    values = np.linalg.eigvalsh(np.cov(rows.T))[::-1]
    assert found.values == pytest.approx(values, rel=1e-8)
    assert found.sigma2 == pytest.approx(np.median(values) / rmt.mp_median(60 / 399), rel=1e-8)
    assert found.edge == pytest.approx(rmt.tracy_widom_edge(399, 60, 0.99, found.sigma2), rel=1e-8)
    assert spectrum(rows, edge="mp").edge == pytest.approx(found.sigma2 * (1 + np.sqrt(60 / 399)) ** 2, rel=1e-8)
    few = spectrum(rows[:30])
    assert (few.n, few.d, few.vectors.shape) == (29, 60, (60, 29))
    assert few.values == pytest.approx(np.linalg.eigvalsh(np.cov(rows[:30].T))[::-1][:29], rel=1e-8)
    assert few.vectors.T @ few.vectors == pytest.approx(np.eye(29), abs=1e-10)


def test_few_samples_and_dimensions_that_never_vary_are_counted_as_such() -> None:
    rng = np.random.default_rng(3)
    wide = spectrum(rng.normal(size=(101, 400)))  # g = 4: the bulk of the Gram matrix
    assert wide.sigma2 == pytest.approx(1, abs=0.1)
    assert wide.spikes == 0
    rows, _ = spiked_rows(1)
    dead = spectrum(np.concatenate([rows, np.full((400, 200), 7.0)], 1))
    alive = spectrum(rows)
    assert (dead.spikes, dead.d) == (alive.spikes, 60)
    assert dead.values == pytest.approx(alive.values)


@pytest.mark.slow
def test_pure_noise_rarely_has_a_spike_and_often_one_above_the_bare_edge() -> None:
    draws = [np.random.default_rng(seed).normal(size=(200, 40)) for seed in range(200)]
    rates = {
        (edge, sigma): np.mean([spectrum(rows, edge=edge, sigma=sigma).spikes > 0 for rows in draws])
        for edge in ("tw", "mp")
        for sigma in ("median", "iterative")
    }
    assert max(rates["tw", "median"], rates["tw", "iterative"]) <= 0.03
    assert min(rates["mp", "median"], rates["mp", "iterative"]) >= 0.05


def test_signs_of_eigenvectors_are_fixed() -> None:
    rows, _ = spiked_rows(2)
    one, other = spectrum(rows).vectors, spectrum(-rows).vectors
    assert one == pytest.approx(other, abs=1e-9)
    assert (one[np.abs(one).argmax(0), np.arange(60)] > 0).all()


# --- scores and thresholds


def world(seed: int = 0, n: int = 2000) -> tuple[Planted, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """The planted model, calibration embeddings with labels, and pairs under its attack."""
    model = Planted.of(seed)
    z, y = model.draw(n, 0)
    return model, z, y, (z[:400], model.attacked(z[:400], y[:400], 3))


@pytest.mark.parametrize("kind", ["normalised", "abs", "corr"])
def test_scores_tell_nuisance_directions_apart(kind: Any) -> None:
    model, z, _, pairs = world(n=20_000)
    found = spectrum(z)
    assert found.spikes == 8
    scores = rbns(found, *pairs, kind=kind)
    semantic = torch.from_numpy(found.vectors[:, :8]).T @ model.semantic
    meaning = semantic.square().sum(1).numpy() > 0.5
    assert meaning.sum() == 4
    assert scores[meaning].max() < scores[~meaning].min()
    if kind == "normalised":
        assert scores[meaning].max() < 0.9
        assert scores[~meaning].min() > 2


def test_scores_do_not_depend_on_scale_or_rotation() -> None:
    _, z, _, pairs = world()
    setting = SpectralFilter(q=0.5)
    plain = setting.fit(z, pairs)
    scaled = setting.fit(7 * z, (7 * pairs[0], 7 * pairs[1]))
    assert scaled.scores == pytest.approx(plain.scores)
    assert (scaled.kept == plain.kept).all()
    turn = torch.linalg.qr(torch.randn(60, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(5)))[0]
    turned = setting.fit(z @ turn, (pairs[0] @ turn, pairs[1] @ turn))
    assert turned.scores == pytest.approx(plain.scores)
    same = turned.projection.basis.T @ turn.T @ plain.projection.basis
    assert same.abs().numpy() == pytest.approx(np.eye(len(same)), abs=1e-8)


@pytest.mark.parametrize("kind", ["normalised", "abs", "corr"])
def test_without_an_attack_scores_are_zero_and_every_spike_stays(kind: Any) -> None:
    _, z, _, _ = world()
    fitted = SpectralFilter(q=0.25, rbns=kind).fit(z, (z[:100], z[:100]))
    assert fitted.scores.tolist() == [0.0] * 8
    assert fitted.kept.all()
    assert SpectralFilter(q=0.25).fit(z).kept.all()


def test_a_larger_quantile_never_keeps_less_and_one_keeps_all() -> None:
    scores = np.random.default_rng(0).random(17)
    before = np.zeros(17, dtype=bool)
    for q in (0.01, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0):
        kept, threshold = causal(scores, q)
        assert kept.any()
        assert (kept >= before).all()
        assert threshold in scores
        before = kept
    assert before.all()


# --- the planted attack


def through(fitted: Filter, rows: Tensor) -> Tensor:
    found: Tensor = fitted.projection(rows)
    return found


def test_the_planted_attack_is_undone_and_an_unbounded_adaptive_one_is_not() -> None:
    before, after, clean = [], [], []
    for seed in range(5):
        model, z, _, pairs = world(seed, n=20_000)
        test, labels = model.draw(2000, 2)
        attacked = model.attacked(test, labels, 4)
        fitted = SpectralFilter(q=0.5).fit(z, pairs)
        before.append(model.accuracy(attacked, labels))
        after.append(model.accuracy(through(fitted, attacked), labels))
        clean.append(model.accuracy(through(fitted, test), labels) - model.accuracy(test, labels))
        read = fitted.projection.basis @ (fitted.projection.basis.T @ model.head)
        adaptive = test - 14 * labels[:, None] * read / read.norm()
        assert model.accuracy(through(fitted, adaptive), labels) <= 0.01
    assert max(before) <= 0.35
    assert np.mean(after) >= 0.85
    assert min(clean) >= -0.01


def test_few_samples_blur_directions_of_like_variance() -> None:
    # 2,000 samples of 60 dimensions mix semantic and nuisance directions of nearly the same variance: not every draw
    # comes to .85, and the documentation has the figures. Without the filter none comes to .35.
    after, before = [], []
    for seed in range(20):
        model, z, _, pairs = world(seed)
        test, labels = model.draw(2000, 2)
        attacked = model.attacked(test, labels, 4)
        before.append(model.accuracy(attacked, labels))
        after.append(model.accuracy(through(SpectralFilter(q=0.5).fit(z, pairs), attacked), labels))
    assert max(before) <= 0.35
    assert min(after) >= 0.6
    assert np.mean(after) == pytest.approx(0.83, abs=0.03)
    assert max(after) >= 0.85


def test_auto_takes_the_smallest_quantile_that_costs_no_accuracy() -> None:
    model, z, _, pairs = world()
    held, labels = model.draw(1000, 1)

    def accuracy(projection: Projection | None) -> float:
        return model.accuracy(held if projection is None else projection(held), labels)

    fitted = SpectralFilter().fit(z, pairs, accuracy)
    assert fitted.q <= 0.5
    assert set(fitted.drops) == {1.0, 0.95, 0.9, 0.75, 0.5, 0.25}
    assert fitted.q == min(q for q, drop in fitted.drops.items() if drop <= 0.01)
    semantic = SpectralFilter().fit(z, pairs, lambda projection: 1.0 if projection is None or wide(projection) else 0.5)
    assert (semantic.q, semantic.kept.all()) == (0.9, True)  # of 8 scores the quantile .9 is the largest
    with pytest.warns(UserWarning, match="costs 50.0% of clean accuracy"):
        refused = SpectralFilter().fit(z, pairs, lambda projection: 1.0 if projection is None else 0.5)
    assert refused.identity
    assert torch.equal(refused.projection(z), z)
    with pytest.raises(UsageError, match="accuracy"):
        SpectralFilter().fit(z, pairs)


def wide(projection: Projection) -> bool:
    return projection.basis.shape[1] == 8


def test_the_residual_tells_attacks_that_leave_the_subspace() -> None:
    _, z, _, pairs = world()
    fitted = SpectralFilter(q=0.5).fit(z, pairs)
    assert fitted.auroc(*pairs) > 0.7
    assert float(fitted.detects(z).double().mean()) == pytest.approx(0.05, abs=0.005)
    assert fitted.projection.residual(fitted.projection.mean[None]).tolist() == [0.0]
    inside = fitted.projection(z[:50])
    assert fitted.projection.residual(inside).max() < 1e-6
    assert fitted.auroc(z[:200], z[:200]) == pytest.approx(0.5)


# --- the projection


@pytest.fixture(scope="module")
def fitted() -> Filter:
    _, z, _, pairs = world()
    return SpectralFilter(q=0.5).fit(z, pairs)


def test_it_is_an_orthogonal_projection_about_the_mean(fitted: Filter) -> None:
    projection = fitted.projection
    matrix = projection.basis @ projection.basis.T
    assert torch.allclose(matrix @ matrix, matrix, atol=1e-12)
    assert torch.equal(matrix, matrix.T)
    assert torch.linalg.matrix_rank(matrix) == 4
    z = 5 * torch.randn(20, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    once = projection(z)
    assert torch.allclose(projection(once), once, atol=1e-12)
    assert torch.allclose(projection(projection.mean[None]), projection.mean[None])
    assert ((once - projection.mean).norm(dim=1) <= (z - projection.mean).norm(dim=1)).all()
    jacobian = torch.autograd.functional.jacobian(lambda row: projection(row[None])[0], z[0])
    assert torch.allclose(jacobian, matrix, atol=1e-12)


def test_shapes_types_and_rows_are_kept(fitted: Filter) -> None:
    projection = fitted.projection
    z = torch.randn(6, 60, generator=torch.Generator().manual_seed(2))
    whole = projection(z)
    assert whole.dtype == torch.float32
    assert torch.allclose(torch.cat([projection(row[None]) for row in z]), whole, atol=1e-6)
    tokens = z.view(2, 3, 60)
    assert torch.allclose(projection(tokens).view(6, 60), whole, atol=1e-6)
    maps = tokens.transpose(1, 2).reshape(2, 60, 3, 1)
    assert torch.allclose(projection(maps).flatten(2).transpose(1, 2).reshape(6, 60), whole, atol=1e-6)
    with pytest.raises(BadInput, match="60 dimensions"):
        projection(torch.zeros(2, 59))


def test_blend_and_center() -> None:
    _, z, _, pairs = world()
    z = z + 3
    whole, half = (SpectralFilter(q=0.5, weight=weight).fit(z, pairs).projection for weight in (1.0, 0.5))
    assert torch.allclose(half(z), (z + whole(z)) / 2)
    plain = SpectralFilter(q=0.5, center=False).fit(z, pairs).projection
    assert torch.allclose(plain(z), z @ plain.basis @ plain.basis.T)


def test_tokens_are_drawn_per_sample_and_alike_for_pairs() -> None:
    z = torch.arange(2 * 9 * 4.0).view(2, 9, 4)
    vectors, drawn = as_vectors(z, 5, torch.Generator().manual_seed(0))
    assert vectors.shape == (10, 4)
    assert all(len(set(row)) == 5 for row in drawn.tolist())
    assert torch.equal(taken(z + 1, drawn), vectors + 1)
    maps = z.transpose(1, 2).reshape(2, 4, 3, 3)
    assert torch.equal(taken(maps, drawn), vectors)
    assert as_vectors(z[:, 0], 5, torch.Generator())[0].shape == (2, 4)
    with pytest.raises(BadInput, match="expected embeddings"):
        as_vectors(torch.zeros(2), 5, torch.Generator())


# --- what can't be fitted


def test_embeddings_that_make_no_filter_are_refused_in_a_line() -> None:
    for rows, words in (
        (np.zeros((1, 5)), "1 calibration sample: a covariance takes at least 2"),
        (np.zeros((0, 5)), "0 calibration samples"),
        (np.ones((9, 5)), "all the same"),
        (np.full((9, 5), np.nan), "NaN"),
        (np.zeros(5), "expected \\[samples, dimensions\\]"),
    ):
        with pytest.raises(BadInput, match=words):
            SpectralFilter(q=1.0).fit(rows)
    _, z, _, _ = world()
    with pytest.raises(BadInput, match="no pairs of 60 dimensions"):
        SpectralFilter(q=1.0).fit(z, (z[:5], z[:4]))


def test_noise_without_spikes_is_the_identity_with_a_warning() -> None:
    rows = np.random.default_rng(0).normal(size=(300, 20))
    with pytest.warns(UserWarning, match="none of 20 eigenvalues is above"):
        found = SpectralFilter().fit(rows)
    assert found.identity
    z = torch.randn(3, 20)
    assert found.projection(z) is z


@pytest.mark.parametrize(
    "wrong",
    [
        {"edge": "bbp"}, {"level": 1.0}, {"q": 0.0}, {"q": 1.5}, {"q": "half"}, {"edge": "topk"}, {"weight": 0.0},
        {"max_clean_drop": -0.1}, {"rbns": "cosine"}, {"sigma": "mean"}, {"top": -1},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong)) if wrong != {"edge": "topk"} else "top"):
        SpectralFilter(**wrong)


def test_topk_takes_the_first_so_many() -> None:
    rows, _ = spiked_rows(0)
    assert spectrum(rows, edge="topk", top=5).spikes == 5
    assert spectrum(rows, edge="topk", top=500).spikes == 60


# --- files


def test_a_filter_is_the_same_after_it_was_stored(fitted: Filter, tmp_path: Path) -> None:
    path = tmp_path / "filter.safetensors"
    sha256 = save_filter(fitted, Place("encoder.last", before=True), path, "abc", {"note": 1})
    assert (
        save_filter(fitted, Place("encoder.last", before=True), tmp_path / "b.safetensors", "abc", {"note": 1})
        == sha256
    )
    again, place, model = load_filter(path, sha256)
    assert (place, model) == (Place("encoder.last", before=True), "abc")
    z = torch.randn(4, 60, generator=torch.Generator().manual_seed(3))
    assert torch.equal(again.projection(z), fitted.projection(z))
    assert again.spectrum.values.tolist() == fitted.spectrum.values.tolist()
    assert again.spectrum.debiased.tolist() == fitted.spectrum.debiased.tolist()
    for name in ("threshold", "q", "drops", "detects_at"):
        assert getattr(again, name) == getattr(fitted, name)
    assert again.scores.tolist() == fitted.scores.tolist()
    assert again.kept.tolist() == fitted.kept.tolist()
    assert again.detects(z).tolist() == fitted.detects(z).tolist()


def test_files_that_hold_no_filter_are_refused(fitted: Filter, tmp_path: Path) -> None:
    path = tmp_path / "filter.safetensors"
    save_filter(fitted, Place("last"), path)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    (tmp_path / "damaged.safetensors").write_bytes(bytes(content))
    from advkit.models.checkpoint import pack

    (tmp_path / "other.safetensors").write_bytes(pack({"x": torch.zeros(2)}, {"format": "advkit-model-1"}))
    for name, words in (("damaged", "damaged"), ("other", "holds no filter"), ("missing", "can't read")):
        with pytest.raises(CheckpointError, match=words):
            load_filter(tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="was not opened"):
        load_filter(path, "0" * 64)
    skewed = Filter(**{**vars(fitted), "projection": Projection(np.zeros(60), np.ones((60, 2)))})
    save_filter(skewed, Place("last"), path)
    with pytest.raises(CheckpointError, match="orthonormal"):
        load_filter(path)


def test_warnings_are_silent_where_there_are_spikes() -> None:
    _, z, _, pairs = world()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SpectralFilter(q=0.5).fit(z, pairs)
