"""Images made once per (source, attack, eps, seed), stored with 8 bits under a hash of all that decides them.

Images lie in pieces of fixed rows, so that a run that was cut off goes on where it stopped and a larger n takes what a
smaller one made. A piece is written in one move; what is there is whole.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from advkit.core.code import own_code
from advkit.core.errors import AccessDenied, AdvkitError, UsageError
from advkit.core.protocols import Access, Ball, Batch, ModelInfo, Outcome, Rng, Task, ThreatModel
from advkit.core.strict_json import read_json
from advkit.core.text import first_line
from advkit.evaluation.report import write_atomic
from advkit.evaluation.run.batch import Round, attacked
from advkit.evaluation.run.case import Case, digest_of
from advkit.evaluation.run.engine import LocalEngine, within_memory
from advkit.evaluation.run.judge import submitted
from advkit.evaluation.run.store import Stopwatch
from advkit.tasks.base import raw_bytes

FORMAT = 1
FIRST = 32
"""Rows of the first piece: two seeds that agree on it are taken to agree throughout."""
PIECE = 128
LEVELS = 255
_TENSORS = ("images", "admitted", "distance", "forwards", "backwards")


class Unsupported(AdvkitError):
    """An attack that can't be made on a source; the cell is missing, for the reason that this says."""


@dataclass(frozen=True, kw_only=True)
class SignNoise:
    """A random step to the edge of the ball: in Linf every pixel up or down by eps. It queries no model."""

    needs: ClassVar[Access] = Access.NOTHING

    def __call__(self, oracle: Any, x: Tensor, goal: Any, ball: Ball[Tensor], rng: Rng, /) -> Tensor:
        """The rows [B, ...] after the step."""
        sign = torch.where(rng.at("noise").uniform(x) < 0.5, -torch.ones_like(x), torch.ones_like(x))
        return ball.project(x + ball.steepest(sign, x), x)


class NoVictim:
    """Stands where a case has its victim while images are made: the targets are queried later, with stored images."""

    def __init__(self, space: Any, classes: int) -> None:
        self.space = space
        self.classes = classes

    def __call__(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), self.classes)

    def attacker_view(self) -> NoVictim:
        return self

    def modules(self) -> tuple[torch.nn.Module, ...]:
        return ()

    def describe(self) -> ModelInfo:
        return ModelInfo(name="none", architecture="none", state_sha256="0" * 64, n_parameters=0)

    def to(self, device: torch.device | str) -> NoVictim:
        return self


@cache
def code_digest() -> str:
    """sha256 over the sources that decide what attacks make and models answer."""
    import advkit

    root = Path(advkit.__file__).parent
    files = [
        path for part in ("core", "threat_models", "models", "attacks") for path in sorted((root / part).rglob("*.py"))
    ]
    digest = hashlib.sha256()
    for path in files:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


@dataclass(frozen=True)
class Rows:
    """The rows of an evaluation in memory: x [N, ...] in [0, 1], labels long [N], on the CPU."""

    ids: tuple[str, ...]
    x: Tensor
    labels: Tensor
    goal: Any

    @classmethod
    def of(cls, task: Task, n: int) -> Rows:
        """The task's first n rows; UsageError where they carry no labels."""
        batch: Batch = next(iter(task.batches(n, n=n)))
        if batch.labels is None:
            raise UsageError(f"task {task.name} has no labels: a transfer matrix counts right answers")
        return cls(batch.ids, batch.x, batch.labels, batch.goal)

    def pieces(self) -> list[Batch]:
        """The rows in pieces whose borders do not depend on how many rows there are."""
        n = len(self.ids)
        borders = [0, *(border for border in (FIRST, *range(PIECE, n, PIECE)) if border < n), n]
        whole = Batch(ids=self.ids, x=self.x, goal=self.goal, labels=self.labels)
        return [_part(whole, torch.arange(a, b)) for a, b in pairwise(borders)]

    def first_piece(self) -> Rows:
        """The rows of the first piece alone."""
        n = min(FIRST, len(self.ids))
        return Rows(self.ids[:n], self.x[:n], self.labels[:n], self.goal.take(torch.arange(n)))


def _part(batch: Batch, rows: Tensor) -> Batch:
    labels = None if batch.labels is None else batch.labels[rows]
    ids = tuple(batch.ids[row] for row in rows.tolist())
    return replace(batch, ids=ids, x=batch.x[rows], goal=batch.goal.take(rows), labels=labels)


def rows_digest(batch: Batch) -> str:
    """sha256 over ids, inputs and labels."""
    digest = hashlib.sha256("\n".join(batch.ids).encode())
    digest.update(raw_bytes(batch.x))
    if batch.labels is not None:
        digest.update(raw_bytes(batch.labels))
    return digest.hexdigest()


@dataclass(frozen=True)
class ImageSet:
    """What one attack made of the rows on one source; all tensors start with the rows.

    key:       hash of all that decided it, without the rows
    images:    uint8
    usable:    bool: False where the attack raised (the image is the clean one and counts nowhere)
    admitted:  bool: False where the attack left the threat model (the image is the clean one)
    distance:  of the stored image from the row, in the ball's norm
    forwards, backwards: passes of the source
    messages:  what the attack said where it raised, by row
    sha256:    of the images of a whole set, once they are all there
    """

    key: str
    images: Tensor
    usable: Tensor
    admitted: Tensor
    distance: Tensor
    forwards: Tensor
    backwards: Tensor
    seconds: float
    messages: dict[int, str]
    sha256: str = ""

    @classmethod
    def joined(cls, key: str, parts: Sequence[ImageSet]) -> ImageSet:
        """The whole set, of its pieces in order."""
        messages, at = {}, 0
        for part in parts:
            messages.update({at + row: text for row, text in part.messages.items()})
            at += len(part.images)
        tensors = {name: torch.cat([getattr(part, name) for part in parts]) for name in (*_TENSORS, "usable")}
        return cls(
            key=key,
            seconds=sum(part.seconds for part in parts),
            messages=messages,
            sha256=digest_of_tensors(tensors["images"]),
            **tensors,
        )

    def without_images(self) -> ImageSet:
        """The set with its figures alone."""
        return replace(self, images=self.images[:0])


def digest_of_tensors(*tensors: Tensor) -> str:
    """sha256 over the bytes of tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def as_seen(images: Tensor) -> Tensor:
    """Stored images as targets see them, float in [0, 1]; rows that are no files stay as they are."""
    return images.float() / LEVELS if images.dtype == torch.uint8 else images


def set_config(case: Case) -> dict[str, Any]:
    """All that decides the images that a cell's attack makes, besides the rows."""
    threat = case.threat.describe()
    own = own_code(case.attack, str(case.label), case.rule)
    return {
        "format": FORMAT,
        "source": [name for name, _ in case.surrogates],
        "attack": str(replace(case.label, source="")),
        "threat": {key: threat[key] for key in ("norm", "eps", "lattice")},
        "space": cast(Any, case.threat).box.text(),
        "goal": case.specs["goal"],
        "data": case.specs["data"],
        "seed": case.seed,
        "code": code_digest(),
        **({"own_code": own} if own else {}),
    }


class Images:
    """Sets of images, from a folder or made now.

    folder:     stored there by content; safe to share between runs that go on at the same time
    made, read: pieces made anew and pieces found there
    """

    def __init__(self, folder: Path, engine: LocalEngine) -> None:
        self.folder = folder
        self.engine = engine
        self.made = 0
        self.read = 0
        self._refused: dict[str, str] = {}

    def get(self, case: Case, rows: Rows) -> ImageSet:
        """The set that a cell's attack makes of these rows.

        Raises Unsupported where the attack can't be made on this source; the next call says so at once.
        """
        key, pieces = digest_of(set_config(case)), rows.pieces()
        if key in self._refused:
            raise Unsupported(self._refused[key])
        parts = [self._load(key, piece) for piece in pieces]
        missing = [i for i, part in enumerate(parts) if part is None]
        self.read += len(parts) - len(missing)
        try:
            for i, part in zip(missing, self._make(key, case, [pieces[i] for i in missing]), strict=True):
                parts[i] = part
        except (AccessDenied, UsageError, Unsupported) as error:
            self._refused[key] = str(error)
            raise Unsupported(str(error)) from error
        return ImageSet.joined(key, [part for part in parts if part is not None])

    def _make(self, key: str, case: Case, pieces: Sequence[Batch]) -> Iterator[ImageSet]:
        """The sets of these pieces, each stored as soon as it is there."""
        if not pieces:
            return
        self.engine.lanes(case)  # probed now, so that the first piece's seconds are its own
        watch = Stopwatch()
        for piece, result in zip(pieces, self._attacked(case, pieces), strict=True):
            part = _finished(key, case.threat, result, watch.lap())
            if not bool(part.usable.any()):
                raise Unsupported(next(iter(part.messages.values())))
            if bool(part.usable.all()):  # what raised is tried again when the run is resumed
                self._save(part, piece)
            self.made += 1
            yield part

    def _attacked(self, case: Case, pieces: Sequence[Batch]) -> Iterator[Round]:
        """One round for each piece. An attack that takes all rows together takes those of a piece."""
        left, done = deque(pieces), list[Round]()

        def rounds(cell: Case) -> Iterator[Round]:
            done.clear()  # what memory cut off begins again with its piece
            parts = (
                _part(piece, rows)
                for piece in tuple(left)
                for rows in torch.split(torch.arange(len(piece.ids)), cell.batch_size)
            )
            return self.engine.over(attacked, cell, parts)

        for each in within_memory(replace(case, batch_size=PIECE), rounds):
            done.append(each)
            if sum(len(part.records) for part in done) == len(left[0].ids):
                yield _joined(done)
                done.clear()
                left.popleft()

    def _path(self, key: str, piece: Batch) -> Path:
        return self.folder / key[:2] / key / f"{rows_digest(piece)}.safetensors"

    def _load(self, key: str, piece: Batch) -> ImageSet | None:
        path = self._path(key, piece)
        if not path.is_file():
            return None
        n = (len(piece.ids),)
        kinds = {
            "images": (torch.uint8, tuple(piece.x.shape)),
            "admitted": (torch.bool, n),
            "distance": (torch.float32, n),
            "forwards": (torch.int64, n),
            "backwards": (torch.int64, n),
        }
        tensors, notes = read_tensors(path, kinds)
        try:
            fits = notes["key"] == key and read_json(notes["ids"]) == [*piece.ids]
            seconds = float(notes["seconds"])
        except (KeyError, ValueError):
            fits, seconds = False, 0.0
        if not fits or not math.isfinite(seconds) or not bool(torch.isfinite(tensors["distance"]).all()):
            raise UsageError(f"{path} does not hold the images it is named after; delete it, and it is made again")
        usable = torch.ones(len(piece.ids), dtype=torch.bool)
        held: dict[str, Any] = {**tensors}
        return ImageSet(key=key, usable=usable, seconds=seconds, messages={}, **held)

    def _save(self, part: ImageSet, piece: Batch) -> None:
        tensors = {name: getattr(part, name).contiguous() for name in _TENSORS}
        notes = {"key": part.key, "ids": json.dumps(list(piece.ids)), "seconds": repr(part.seconds)}
        write_tensors(self._path(part.key, piece), tensors, notes)


def read_tensors(
    path: Path, kinds: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of these names, types and shapes in a stored file, and its notes; UsageError where it is another."""
    try:
        with safe_open(path, framework="pt") as file:
            notes = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in kinds}
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise UsageError(f"{path} can't be read ({first_line(error)}); delete it, and it is made again") from error
    if any((tensors[name].dtype, tuple(tensors[name].shape)) != kind for name, kind in kinds.items()):
        raise UsageError(f"{path} does not hold what it is named after; delete it, and it is made again")
    return tensors, notes


def write_tensors(path: Path, tensors: dict[str, Tensor], notes: dict[str, str]) -> None:
    """A safetensors file in one move; ReportError where it can't be written."""
    write_atomic(path, save(tensors, metadata=notes))


def _joined(parts: Sequence[Round]) -> Round:
    """The round of a piece, of its parts in order."""
    if len(parts) == 1:
        return parts[0]
    return Round(
        [record for part in parts for record in part.records],
        torch.cat([part.clean for part in parts if part.clean is not None]),
        torch.cat([part.adversarial for part in parts if part.adversarial is not None]),
    )


def _finished(key: str, threat: ThreatModel[Tensor], result: Round, seconds: float) -> ImageSet:
    """Rounded to 8 bits and checked against the threat model once more."""
    records, origin, returned = result.records, result.clean, result.adversarial
    assert origin is not None
    assert returned is not None
    shaped, admitted = submitted(returned, origin, threat)
    stored = (shaped * LEVELS).round().clamp(0, LEVELS).to(torch.uint8)
    shown = stored.to(origin) / LEVELS
    if not bool(threat.admits(shown, origin).all()):
        raise AdvkitError("a stored transfer image lies outside its ball; the attack or the ball is at fault")
    outside = torch.tensor(["outside_threat_model" in record.notes for record in records])
    return ImageSet(
        key=key,
        images=stored.cpu(),
        usable=torch.tensor([record.outcome != Outcome.ERROR for record in records]),
        admitted=admitted.cpu() & ~outside,
        distance=threat.distance(shown, origin).float().cpu(),
        forwards=torch.tensor([record.forwards for record in records]),
        backwards=torch.tensor([record.backwards for record in records]),
        seconds=seconds,
        messages={row: record.message for row, record in enumerate(records) if record.outcome == Outcome.ERROR},
    )
