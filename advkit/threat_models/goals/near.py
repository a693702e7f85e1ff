"""An embedding close to a given vector: what attacks on image-text encoders aim at (such as arXiv 2307.14539)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import safetensors
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from advkit.core.archives import archive_keys, check_array, read_archive
from advkit.core.checks import check
from advkit.core.errors import BadInput, BadModel, UsageError
from advkit.core.paths import place_of
from advkit.core.protocols import (
    Embeds,
    Evidence,
    Examines,
    Figure,
    FromFile,
    MetByTruth,
    NoneReached,
    Rng,
    ThroughView,
    Worded,
    Wording,
)
from advkit.core.rows import finite_rows
from advkit.core.text import first_line
from advkit.threat_models.goals.per_row import PerRow

MOST = 64 * 2**20
"""Bytes of a file that are read at most."""


@dataclass(frozen=True, eq=False)
class Near(PerRow, Examines, NoneReached, MetByTruth):
    """An embedding whose cosine similarity to a given vector is above a threshold, whatever the class.

    labels:     true classes, long [B]; they matter to nothing here
    similarity: the threshold

    Answers are scores [B, C] whose mean over the classes is that cosine: those of a model seen `toward` the vector
    (`core.protocols.Embeds`). The loss is minus the cosine, the margin the threshold minus the cosine, so that it is in
    units of similarity. Answers that are not finite reach nothing. It has only its own loss: `under` returns it
    unchanged.
    """

    kind: ClassVar[str] = "near"
    labels: Tensor
    similarity: float = 0.9

    def _cosine(self, answer: Tensor) -> Tensor:
        if answer.ndim != 2 or not answer.is_floating_point():
            raise BadModel(
                f"the model answers {answer.dtype} {list(answer.shape)}; the goal near reads scores, float [B, C]: an "
                "attack that knows decisions alone can't work towards it"
            )
        if len(answer) != len(self.labels):
            raise BadInput(f"an answer of {len(answer)} samples to a goal of {len(self.labels)}; take(rows) the goal")
        return answer.mean(1)

    def reached(self, answer: Tensor) -> Tensor:
        """Bool [B]."""
        return (self._cosine(answer) > self.similarity) & finite_rows(answer)

    @override
    def none_reached(self, answer: Tensor) -> bool:
        """Whether it is plain that no row reaches it; False in doubt. One look at the device."""
        return not bool((self._cosine(answer) > self.similarity).any())

    @override
    def met_by_truth(self) -> Tensor:
        """Bool [B]: none, a right class says nothing of the embedding."""
        return torch.zeros_like(self.labels, dtype=torch.bool)

    def loss(self, answer: Tensor) -> Tensor:
        """Float [B], smaller is better for the attacker."""
        return -self._cosine(answer)

    def margin(self, answer: Tensor) -> Tensor:
        """Float [B]: negative where reached; +inf where the answer is not finite."""
        return torch.where(finite_rows(answer), self.similarity - self._cosine(answer), torch.inf)

    def under(self, loss: str) -> Self:
        """Itself: it has only its own loss."""
        return self

    @override
    def examine(self, evidence: Evidence) -> dict[str, Sequence[Figure]]:
        """The similarity before and after, and whether the class is another one than before."""
        return {
            "similarity_before": self._cosine(evidence.clean).double().tolist(),
            "similarity_after": self._cosine(evidence.answer).double().tolist(),
            "class_changed": (evidence.clean.argmax(1) != evidence.answer.argmax(1)).tolist(),
        }


@dataclass(frozen=True, kw_only=True)
class NearRule(ThroughView, Worded, FromFile):
    """Embedding similarity: the image's embedding comes close to a given vector, for models that embed (image-text).

    file:       .npy, .npz or .safetensors with the vector, [d], or several, [n, d]; its length is that of an embedding,
                its norm does not matter
    similarity: the goal is reached where the cosine of embedding and vector is larger, in (-1, 1)
    key:        name of the array in a .npz or .safetensors file that holds several
    row:        which of several vectors, from 0

    Success is counted over the samples whose clean embedding is not that near, right or wrong when clean.

    Raises UsageError for a similarity out of range; BadInput for a file that can't be read, and for a vector of another
    shape, with NaN, infinity or norm 0, or of another length than the model's embeddings; BadModel for a model without
    embeddings.
    """

    kind: ClassVar[str] = "near"
    wording: ClassVar[Wording] = Wording(
        robust="correct, embedding not near", success="embedding near the target", figure="goal not reached"
    )
    file: str
    similarity: float = 0.9
    key: str = ""
    row: int | None = None

    def __post_init__(self) -> None:
        check(self, "similarity", -1 < self.similarity < 1, "a cosine between -1 and 1")
        if not self.file:
            raise UsageError("the goal near needs the file of a vector, such as near:file=target.npy")

    def vector(self) -> Tensor:
        """The vector, float64 [d], of norm 1."""
        held = self._read()
        held = held / held.abs().max()  # squares of numbers as they come may overflow
        unit: Tensor = held / held.norm()
        return unit

    @property
    @override
    def content_sha256(self) -> str:
        """Of the vector's numbers as float64, as they stand in the file."""
        return hashlib.sha256(self._read().numpy().tobytes()).hexdigest()[:16]

    def _read(self) -> Tensor:
        """The vector as it stands in the file, float64 [d]."""
        held = torch.from_numpy(read_vectors(self.file, self.key).astype(np.float64))
        what = f"{self.file} holds {list(held.shape)} numbers"
        if held.ndim == 2 and self.row is None and len(held) == 1:
            held = held[0]
        elif held.ndim == 2:
            if self.row is None:
                raise BadInput(f"{what}, several vectors; say which: row=0 to row={len(held) - 1}")
            if not 0 <= self.row < len(held):
                raise BadInput(f"{what}, and row={self.row} was asked for; expected 0 to {len(held) - 1}")
            held = held[self.row]
        elif self.row is not None:
            raise BadInput(f"{what}, and row={self.row} was asked for; expected several vectors, [n, d]")
        if held.ndim != 1 or not len(held):
            raise BadInput(f"{what}; expected one vector, [d], or several, [n, d]")
        if not bool(torch.isfinite(held).all()):
            raise BadInput(f"the vector in {self.file} holds NaN or infinity; expected finite numbers")
        if not bool(held.any()):
            raise BadInput(f"the vector in {self.file} has norm 0, and so no direction; expected another")
        return held

    @override
    def view(self, model: Any) -> Any:
        """The model whose scores say how near the embedding is."""
        seen = model.toward(self.vector()) if isinstance(model, Embeds) else None
        if seen is None:
            raise BadModel(
                f"the goal near reads embeddings, and {model.describe().name} has none: name an image-text model, such "
                "as zoo:fashion-mnist-dual-encoder"
            )
        return seen

    def __call__(self, labels: Tensor, answer: Tensor, rng: Rng) -> Near:
        """The goal of a batch with true classes `labels` and untouched answer `answer`."""
        goal = Near(labels, similarity=self.similarity)
        goal._cosine(answer)
        return goal


def read_vectors(file: str, key: str = "") -> NDArray[np.floating[Any]]:
    """The real numbers in a .npy, .npz or .safetensors file; BadInput where it is none of these or holds others.

    key: which array of several
    """
    try:
        path = place_of(file)
    except ValueError as error:
        raise BadInput(f"{error}; expected the file of a vector") from error
    kind = path.suffix.casefold()
    if kind not in (".npy", ".npz", ".safetensors"):
        raise BadInput(f"{file} is no .npy, .npz or .safetensors file; expected one that holds a vector")
    if not path.is_file():
        raise BadInput(f"there is no file {file}; expected a vector of numbers")
    if path.stat().st_size > MOST:
        raise BadInput(f"{file} has {path.stat().st_size:,} bytes; at most {MOST:,} are read")
    try:
        read = {".npy": _npy, ".npz": _npz, ".safetensors": _safetensors}[kind]
        held: NDArray[np.floating[Any]] = read(path, key)
    except BadInput:
        raise
    except Exception as error:  # damaged files make the readers raise nearly anything
        raise BadInput(f"{file} can't be read ({first_line(error)}); expected a vector of numbers") from error
    if held.dtype.kind not in "fiu":
        raise BadInput(f"{file} holds {held.dtype}; expected real numbers")
    return held


def _npy(path: Path, key: str) -> Any:
    if key:
        raise BadInput(f"{path} holds one array without a name; leave key={key} out")
    with path.open("rb") as stream:
        check_array(stream, path.stat().st_size, path.name)
    return np.load(path, allow_pickle=False)


def _npz(path: Path, key: str) -> Any:
    name = _chosen(path, archive_keys(path), key)
    return read_archive(path, MOST, (name,))[name]


def _safetensors(path: Path, key: str) -> Any:
    with safetensors.safe_open(path, framework="pt") as held:
        tensor = held.get_tensor(_chosen(path, tuple(held.keys()), key))
    return tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()  # numpy has no bfloat16


def _chosen(path: Path, names: Sequence[str], key: str) -> str:
    if key in names:
        return key
    if not key and len(names) == 1:
        return names[0]
    listed = ", ".join(sorted(names)[:5]) or "nothing"
    seen = f"{path} holds no array {key!r}" if key else f"{path} holds {len(names)} arrays"
    raise BadInput(f"{seen}; it has {listed}: say which one with key=")
