"""Spectral filter of embeddings: which directions of a layer carry more than noise, and a projection onto some of them.

The method is "EigenShield-style", after Darabi et al., arXiv 2502.14976: eigenvectors of the embeddings' covariance
that lie above the noise of random matrix theory are kept, unless a robustness-based nonconformity score (RbNS) says
that attacks move samples along them more than clean samples spread. No code is public and the formula of the score was
not to be had, so the score, its quantile, the choice of that quantile ("auto"), the blend and the detector are ours.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from advkit.core import rmt
from advkit.core.checks import at_least_one, check, fraction, not_negative, one_of
from advkit.core.errors import BadInput, CheckpointError, UsageError
from advkit.models.checkpoint import canonical_json, pack, read_checked, unpack, write_atomically
from advkit.models.torch import tensors_sha256

FORMAT = "advkit-filter-1"
GRID = (1.0, 0.95, 0.9, 0.75, 0.5, 0.25)
"""Quantiles that "auto" tries."""
DETECTS = 0.95
"""Share of the calibration samples whose residual the detector lets pass."""

Floats = np.ndarray[Any, np.dtype[np.float64]]
Edge = Literal["tw", "mp", "topk"]
Sigma = Literal["median", "iterative"]
Score = Literal["normalised", "abs", "corr"]
Accuracy = Callable[["Projection | None"], float]
"""Share of clean validation samples answered right (or as without a filter) under a projection; None is no filter."""


@dataclass(frozen=True)
class Spectrum:
    """The covariance of calibration embeddings, and what of it is more than noise.

    mean:    [d]
    values:  eigenvalues above 0 by size, largest first, [r]; r is at most samples - 1
    vectors: their eigenvectors in columns, [d, r], the entry of largest size positive in each; from a file the spikes'
             alone, [d, spikes]
    sigma2:  variance of the noise
    edge:    eigenvalues above it are spikes
    spikes:  how many there are; they come first
    n:       samples less one
    d:       dimensions that vary: those that are constant are no part of the aspect ratio
    """

    mean: Floats
    values: Floats
    vectors: Floats
    sigma2: float
    edge: float
    spikes: int
    n: int
    d: int

    @property
    def g(self) -> float:
        """Aspect ratio: dimensions over samples."""
        return self.d / self.n

    @property
    def debiased(self) -> Floats:
        """Population eigenvalues of the spikes; NaN for those inside the bulk."""
        return np.asarray(rmt.debiased(self.values[: self.spikes], self.g, self.sigma2))


def vectors_of(embeddings: ArrayLike | Tensor, what: str = "embeddings") -> Floats:
    """Embeddings [N, d] in float64; BadInput where they are no such table of finite numbers."""
    held = embeddings.detach().cpu().double().numpy() if isinstance(embeddings, Tensor) else embeddings
    rows = np.asarray(held, dtype=np.float64)
    if rows.ndim != 2 or 0 in rows.shape[1:]:
        raise BadInput(f"the {what} have shape {list(rows.shape)}; expected [samples, dimensions]")
    if not bool(np.isfinite(rows).all()):
        raise BadInput(f"the {what} hold NaN or infinity; expected finite numbers")
    return rows


def spectrum(
    embeddings: ArrayLike | Tensor, *, edge: Edge = "tw", level: float = 0.99, sigma: Sigma = "median", top: int = 0
) -> Spectrum:
    """Eigenvalues and eigenvectors of embeddings [N, d], and how many of them are spikes.

    edge:  "tw": the Tracy-Widom quantile of `level`; "mp": the bare Marchenko-Pastur edge, above which 15 % of all pure
           noise has an eigenvalue; "topk": the first `top`
    sigma: "median": the noise's variance by the median eigenvalue; "iterative": the mean of the eigenvalues that are no
           spikes, until their number stays (at most 20 times)

    Raises BadInput for fewer than two samples and for embeddings that do not vary.
    """
    rows = vectors_of(embeddings)
    if len(rows) < 2:
        raise BadInput(
            f"{len(rows)} calibration sample{'' if len(rows) == 1 else 's'}: a covariance takes at least 2, and 10 per "
            "dimension are better"
        )
    n, mean = len(rows) - 1, rows.mean(0)
    values, vectors = _eigenpairs(rows - mean)
    d = _varying(rows, values, n)
    spikes = 0
    if sigma == "iterative":
        sigma2, limit = math.nan, math.nan
        for _ in range(20):
            sigma2 = float(values[spikes:].sum()) / max(1, d - spikes)
            limit = _edge(values, edge, level, top, n, d, sigma2)
            found = _count(values, edge, top, limit)
            if found == spikes:
                break
            spikes = found
    else:
        sigma2 = float(np.median(values)) / rmt.mp_median(d / n)
        limit = _edge(values, edge, level, top, n, d, sigma2)
        spikes = _count(values, edge, top, limit)
    return Spectrum(mean, values, vectors, sigma2, limit, spikes, n, d)


def _eigenpairs(centred: Floats) -> tuple[Floats, Floats]:
    """Eigenvalues above round-off, largest first, and eigenvectors in columns with their signs fixed."""
    n, d = len(centred) - 1, centred.shape[1]
    if d > n:
        _, singular, rows = np.linalg.svd(centred, full_matrices=False)
        values, vectors = singular**2 / n, rows.T
    else:
        values, vectors = np.linalg.eigh(centred.T @ centred / n)
        values, vectors = values[::-1], vectors[:, ::-1]
    kept = values > max(len(centred), d) * np.finfo(np.float64).eps * max(float(values[0]), 0.0)
    if not kept.any():
        raise BadInput("the calibration embeddings are all the same; expected samples that differ")
    values, vectors = values[kept][:n], vectors[:, kept][:, :n]
    signs = np.sign(vectors[np.abs(vectors).argmax(0), np.arange(vectors.shape[1])])
    return np.ascontiguousarray(values), np.ascontiguousarray(vectors * signs)


def _varying(rows: Floats, values: Floats, n: int) -> int:
    """Dimensions that vary, as far as the samples tell: the rank, or, where there are too few samples, the columns."""
    return len(values) if len(values) < n else max(len(values), int((rows.max(0) > rows.min(0)).sum()))


def _edge(values: Floats, edge: Edge, level: float, top: int, n: int, d: int, sigma2: float) -> float:
    if edge == "topk":
        return float(values[top]) if top < len(values) else 0.0
    return rmt.tracy_widom_edge(n, d, level, sigma2) if edge == "tw" else rmt.mp_edges(d / n, sigma2)[1]


def _count(values: Floats, edge: Edge, top: int, limit: float) -> int:
    return min(top, len(values)) if edge == "topk" else int((values > limit).sum())


def rbns(
    found: Spectrum, clean: ArrayLike | Tensor, attacked: ArrayLike | Tensor, kind: Score = "normalised"
) -> Floats:
    """Robustness-based nonconformity score of every spike, [spikes]: large where an attack moves samples along it.

    clean, attacked: embeddings of the same samples, [M, d]
    kind:            "normalised": root mean square of the displacement along the eigenvector, over the root of its
                     eigenvalue, the natural spread; "abs": not divided; "corr": 1 less the correlation of the
                     coordinates before and after

    The score is ours: the paper's formula was not to be had.
    """
    before, after = vectors_of(clean, "clean embeddings"), vectors_of(attacked, "attacked embeddings")
    if before.shape != after.shape or not len(before) or before.shape[1] != len(found.mean):
        raise BadInput(
            f"clean embeddings {list(before.shape)} and attacked ones {list(after.shape)} are no pairs of "
            f"{len(found.mean)} dimensions"
        )
    axes = found.vectors[:, : found.spikes]
    moved = (after - before) @ axes
    if kind == "corr":
        scores = [_one_less_correlation(*pair) for pair in zip((before @ axes).T, (after @ axes).T, strict=True)]
        return np.where((moved == 0).all(0), 0.0, np.asarray(scores))
    size = np.sqrt(np.square(moved).mean(0))
    return np.asarray(size / np.sqrt(found.values[: found.spikes]) if kind == "normalised" else size)


def _one_less_correlation(one: Floats, other: Floats) -> float:
    spread = float(one.std() * other.std())
    return 1.0 if spread == 0 else 1 - float(((one - one.mean()) * (other - other.mean())).mean()) / spread


def causal(scores: Floats, q: float) -> tuple[np.ndarray[Any, np.dtype[np.bool_]], float]:
    """Which spikes are kept, [spikes], and the threshold: the q-quantile of the scores, itself one of them.

    q: in (0, 1]; 1 keeps all. At least one is kept.
    """
    threshold = float(np.quantile(scores, q, method="inverted_cdf"))
    return scores <= threshold, threshold


class Projection(nn.Module):
    """Embeddings [..., d] to `mean + V V^T (z - mean)`, blended with z; differentiable, every vector by itself.

    Feature maps [B, d, H, W] are projected place by place. Held in float64, computed in the embeddings' type.

    mean:   [d]
    basis:  V, orthonormal columns [d, k]
    weight: of the projection in the blend, in [0, 1]; 0 answers z itself
    """

    mean: Tensor
    basis: Tensor
    weight: Tensor

    def __init__(self, mean: ArrayLike | Tensor, basis: ArrayLike | Tensor, weight: float = 1.0) -> None:
        super().__init__()
        held = (
            torch.tensor(np.asarray(each), dtype=torch.float64, device="cpu").contiguous()
            for each in (mean, basis, weight)
        )
        for name, tensor in zip(("mean", "basis", "weight"), held, strict=True):
            self.register_buffer(name, tensor)
        self.eval()

    @property
    def d(self) -> int:
        """Dimensions of an embedding."""
        return len(self.mean)

    def forward(self, z: Tensor) -> Tensor:
        weight = float(self.weight)
        if weight == 0:
            return z
        rows, back = self._last(z)
        mean, basis = self.mean.to(z.device, z.dtype), self.basis.to(z.device, z.dtype)
        kept = mean + (rows - mean) @ basis @ basis.T
        return back(kept if weight == 1 else (1 - weight) * rows + weight * kept)

    def residual(self, z: Tensor) -> Tensor:
        """What the projection takes away of every sample, relative to its distance from the mean, [B] in [0, 1].

        That is |(I - V V^T)(z - mean)| / |z - mean|, over all tokens of a sample; 0 for the mean itself.
        """
        rows, _ = self._last(z)
        mean, basis = self.mean.to(z.device, z.dtype), self.basis.to(z.device, z.dtype)
        off = rows - mean
        lost = (off - off @ basis @ basis.T).flatten(1).norm(dim=1)
        return torch.where(lost > 0, lost / off.flatten(1).norm(dim=1).clamp_min(torch.finfo(z.dtype).tiny), lost)

    def _last(self, z: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The embeddings with their dimensions last, and the way back."""
        maps = z.ndim == 4 and z.shape[1] == self.d
        if z.ndim < 2 or (not maps and z.shape[-1] != self.d):
            raise BadInput(
                f"the filter was fitted to embeddings of {self.d} dimensions and gets {list(z.shape)}: name the layer "
                "that it was fitted to"
            )
        return (z.movedim(1, -1), lambda rows: rows.movedim(-1, 1)) if maps else (z, lambda rows: rows)


def as_vectors(z: Tensor, per_sample: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Embeddings as vectors [N, d], and which were taken, [B, T], so that attacked ones can be taken alike.

    Of tokens [B, T, d] and feature maps [B, d, H, W] at most `per_sample` of each sample are drawn: those of one sample
    depend on one another, and all of them would pretend to a larger number of samples.
    """
    if z.ndim == 2:
        return z, torch.zeros(len(z), 1, dtype=torch.long)
    tokens = _tokens(z)
    places = tokens.shape[1]
    drawn = torch.rand(len(z), places, generator=generator, device="cpu").argsort(1)[:, : min(per_sample, places)]
    return taken(z, drawn), drawn


def taken(z: Tensor, drawn: Tensor) -> Tensor:
    """The vectors of `as_vectors` at the places drawn."""
    if z.ndim == 2:
        return z
    tokens = _tokens(z)
    return tokens.gather(1, drawn.to(z.device)[:, :, None].expand(-1, -1, tokens.shape[2])).flatten(0, 1)


def _tokens(z: Tensor) -> Tensor:
    if z.ndim == 4:
        return z.movedim(1, -1).flatten(1, 2)
    if z.ndim != 3:
        raise BadInput(
            f"the layer answers {list(z.shape)}; expected embeddings [B, d], tokens [B, T, d] or maps [B, d, H, W]"
        )
    return z


@dataclass(frozen=True)
class Filter:
    """A fitted filter: the projection, and how it came about.

    projection: what is applied
    spectrum:   of the calibration embeddings
    scores:     of the spikes, [spikes]; empty without attacked embeddings
    kept:       bool [spikes]: the causal ones
    threshold:  of the scores
    q:          quantile that gave it
    drops:      clean accuracy lost at every quantile that "auto" tried
    detects_at: residual above which the detector calls a sample attacked
    """

    projection: Projection
    spectrum: Spectrum
    scores: Floats
    kept: np.ndarray[Any, np.dtype[np.bool_]]
    threshold: float
    q: float
    drops: Mapping[float, float]
    detects_at: float

    @property
    def identity(self) -> bool:
        """Whether it changes nothing."""
        return float(self.projection.weight) == 0

    def detects(self, z: Tensor) -> Tensor:
        """Bool [B]: embeddings whose residual is above that of 95 % of the calibration samples."""
        return self.projection.residual(z) > self.detects_at

    def auroc(self, clean: Tensor, attacked: Tensor) -> float:
        """Area under the ROC curve of the residual as a detector of attacked embeddings."""
        from sklearn.metrics import roc_auc_score

        scores = [self.projection.residual(each).detach().cpu().double().numpy() for each in (clean, attacked)]
        labels = np.repeat([0, 1], [len(each) for each in scores])
        return float(roc_auc_score(labels, np.concatenate(scores)))


@dataclass(frozen=True, kw_only=True)
class SpectralFilter:
    """How a filter is fitted to embeddings.

    edge:           tw | mp | topk: which eigenvalues are spikes (see `spectrum`)
    level:          of the Tracy-Widom edge, in (0, 1)
    top:            eigenvectors of topk, >= 1
    sigma:          median | iterative: how the noise's variance is found
    rbns:           normalised | abs | corr: the nonconformity score (see `rbns`)
    q:              spikes with scores up to this quantile are kept, in (0, 1], 1 keeps all; auto takes the smallest of
                    1, .95, .9, .75, .5, .25 that costs at most `max_clean_drop` of clean accuracy
    max_clean_drop: in [0, 1]
    center:         whether the mean is taken off before the projection
    weight:         of the projection in a blend with the embedding, in (0, 1]

    Raises UsageError for values out of range.
    """

    edge: Edge = "tw"
    level: float = 0.99
    top: int = 0
    sigma: Sigma = "median"
    rbns: Score = "normalised"
    q: float | Literal["auto"] = "auto"
    max_clean_drop: float = 0.01
    center: bool = True
    weight: float = 1.0

    def __post_init__(self) -> None:
        one_of(self, "edge", ("tw", "mp", "topk"))
        one_of(self, "sigma", ("median", "iterative"))
        one_of(self, "rbns", ("normalised", "abs", "corr"))
        fraction(self, "level", ends="()")
        fraction(self, "max_clean_drop", ends="[]")
        fraction(self, "weight")
        not_negative(self, "top")
        if self.edge == "topk":
            at_least_one(self, "top")
        if self.q != "auto":
            check(self, "q", isinstance(self.q, (int, float)) and 0 < self.q <= 1, "auto, or a number in (0, 1]")

    def fit(
        self,
        clean: ArrayLike | Tensor,
        pairs: tuple[ArrayLike | Tensor, ArrayLike | Tensor] | None = None,
        accuracy: Accuracy | None = None,
    ) -> Filter:
        """The filter of calibration embeddings [N, d].

        pairs:    clean and attacked embeddings of the same samples, [M, d] both; None keeps all spikes
        accuracy: what "auto" asks (see `Accuracy`); only "auto" needs it

        Where no eigenvalue is above the edge, or every quantile costs more clean accuracy than it may, the filter is
        the identity, and a warning says so. Raises BadInput for embeddings that make no filter.
        """
        found = spectrum(clean, edge=self.edge, level=self.level, sigma=self.sigma, top=self.top)
        rows = vectors_of(clean)
        if not found.spikes:
            warnings.warn(
                f"none of {len(found.values)} eigenvalues is above the noise's edge {found.edge:.4g} "
                f"({found.n + 1} samples of {found.d} dimensions): the filter is the identity",
                stacklevel=2,
            )
            return self._made(found, rows, np.zeros(0), None, 1.0, {})
        scores = np.zeros(found.spikes) if pairs is None else rbns(found, *pairs, kind=self.rbns)
        if self.q != "auto":
            return self._made(found, rows, scores, causal(scores, float(self.q)), float(self.q), {})
        if accuracy is None:
            raise UsageError(
                "q=auto chooses by clean accuracy and there is none to ask: pass accuracy=..., or say q=1 or another "
                "number"
            )
        before = accuracy(None)
        drops = {q: before - accuracy(self._projection(found, causal(scores, q)[0])) for q in GRID}
        fine = [q for q, drop in drops.items() if drop <= self.max_clean_drop]
        if not fine:
            warnings.warn(
                f"keeping all {found.spikes} spikes costs {drops[1.0]:.1%} of clean accuracy, and at most "
                f"{self.max_clean_drop:.1%} is allowed: the filter is the identity",
                stacklevel=2,
            )
            return self._made(found, rows, scores, None, 1.0, drops)
        return self._made(found, rows, scores, causal(scores, min(fine)), min(fine), drops)

    def _projection(self, found: Spectrum, kept: np.ndarray[Any, np.dtype[np.bool_]]) -> Projection:
        mean = found.mean if self.center else np.zeros_like(found.mean)
        return Projection(mean, found.vectors[:, : found.spikes][:, kept], self.weight)

    def _made(
        self,
        found: Spectrum,
        rows: Floats,
        scores: Floats,
        chosen: tuple[np.ndarray[Any, np.dtype[np.bool_]], float] | None,
        q: float,
        drops: Mapping[float, float],
    ) -> Filter:
        """The filter; the identity where nothing was chosen."""
        kept, threshold = (np.ones(found.spikes, dtype=bool), math.inf) if chosen is None else chosen
        projection = self._projection(found, kept)
        residuals = projection.residual(torch.from_numpy(rows)).numpy()
        if chosen is None:
            projection.weight.zero_()
        return Filter(projection, found, scores, kept, threshold, q, drops, float(np.quantile(residuals, DETECTS)))


# --- on disk


@dataclass(frozen=True)
class Place:
    """Where in a model embeddings are taken and replaced.

    module: name of a layer in the model's module (`named_modules`)
    before: what goes into the layer, in place of what it answers
    """

    module: str
    before: bool = False

    def __str__(self) -> str:
        return f"{'the input' if self.before else 'the output'} of {self.module}"


_ARRAYS = ("mean", "values", "vectors", "scores", "kept", "projected_mean", "basis", "weight")
_NUMBERS = ("sigma2", "edge", "threshold", "q", "detects_at")


def save_filter(
    fitted: Filter, place: Place, path: str | Path, model_sha256: str = "", extra: Mapping[str, Any] | None = None
) -> str:
    """Write a filter to a safetensors file, atomically; returns the file's sha256. The model is not stored.

    model_sha256: state hash of the model that it was fitted to; extra: anything JSON can say
    """
    found, projection = fitted.spectrum, fitted.projection
    # spikes alone: what lies in the bulk is of no use again, and of 4,096 dimensions it is large
    arrays = (
        found.mean,
        found.values,
        found.vectors[:, : found.spikes],
        fitted.scores,
        fitted.kept.astype(np.uint8),
        *(each.cpu().numpy() for each in (projection.mean, projection.basis, projection.weight)),
    )
    # a copy of one's own for each: the format refuses arrays that share memory
    tensors = {name: torch.tensor(each) for name, each in zip(_ARRAYS, arrays, strict=True)}
    numbers = (found.sigma2, found.edge, fitted.threshold, fitted.q, fitted.detects_at)
    metadata = {
        "format": FORMAT,
        "numbers": canonical_json({name: repr(each) for name, each in zip(_NUMBERS, numbers, strict=True)}),
        "counts": canonical_json({"n": found.n, "d": found.d, "spikes": found.spikes}),
        "drops": canonical_json({repr(q): drop for q, drop in fitted.drops.items()}),
        "module": place.module,
        "before": str(place.before),
        "model_sha256": model_sha256,
        "extra": canonical_json(dict(extra or {})),
    }
    metadata["seal"] = _seal(tensors, metadata)
    content = pack(tensors, metadata)
    write_atomically(Path(path), content)
    return hashlib.sha256(content).hexdigest()


def load_filter(path: str | Path, sha256: str = "") -> tuple[Filter, Place, str]:
    """A filter from a file, where it belongs, and the state hash of the model that it was fitted to.

    sha256: of the file; checked before it is opened. Raises CheckpointError where the file is missing, damaged or of
    another kind.
    """
    tensors, metadata = unpack(read_checked(path, sha256), path)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} holds no filter (format {metadata.get('format')!r}); expected one that save_filter wrote"
        )
    if metadata.get("seal") != _seal(tensors, {key: value for key, value in metadata.items() if key != "seal"}):
        raise CheckpointError(f"{path} is damaged: its content does not match its seal; fit it again")
    try:
        held = {name: tensors[name].numpy() for name in _ARRAYS}
        numbers = {name: float(text) for name, text in json.loads(metadata["numbers"]).items()}
        counts = {name: int(value) for name, value in json.loads(metadata["counts"]).items()}
        drops = {float(q): float(drop) for q, drop in json.loads(metadata["drops"]).items()}
        place = Place(metadata["module"], metadata["before"] == "True")
        found = Spectrum(
            held["mean"], held["values"], held["vectors"], numbers["sigma2"], numbers["edge"], counts["spikes"],
            counts["n"], counts["d"],
        )  # fmt: skip
        projection = Projection(held["projected_mean"], held["basis"], float(held["weight"]))
        fitted = Filter(
            projection, found, held["scores"], held["kept"].astype(bool), numbers["threshold"], numbers["q"], drops,
            numbers["detects_at"],
        )  # fmt: skip
        _check_projection(projection)
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path} is no filter of this version ({error})") from error
    return fitted, place, metadata.get("model_sha256", "")


def _check_projection(projection: Projection) -> None:
    """ValueError unless it is a projection: orthonormal columns, as many numbers as the mean, a weight in [0, 1]."""
    mean, basis, weight = projection.mean, projection.basis, projection.weight
    if mean.ndim != 1 or basis.ndim != 2 or len(basis) != len(mean) or weight.ndim:
        raise ValueError(f"mean {list(mean.shape)}, basis {list(basis.shape)}")
    gram = basis.T @ basis
    if not bool(torch.isfinite(mean).all()) or not torch.allclose(gram, torch.eye(len(gram), dtype=gram.dtype)):
        raise ValueError("the basis is not orthonormal")
    if not 0 <= float(weight) <= 1:
        raise ValueError(f"the weight is {float(weight)}")


def _seal(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    word = f"{tensors_sha256(tensors.items())}|{canonical_json(dict(metadata))}"
    return hashlib.sha256(word.encode()).hexdigest()
