"""Images made once per (source, attack, eps, seed), stored with 8 bits under a hash of all that decides them.

Images lie in pieces of fixed rows, so that a run that was cut off goes on where it stopped and a larger n takes what a
smaller one made. A piece is written in one move; what is there is whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from advkit.core.errors import AccessDenied, AdvkitError, UsageError
from advkit.core.oracle import Lanes
from advkit.core.protocols import Access, Ball, Batch, ModelInfo, Outcome, Rng, ThreatModel
from advkit.evaluation.report.document import write_atomic
from advkit.evaluation.run.batch import Round, attacked, run_alone
from advkit.evaluation.run.case import Case, digest_of
from advkit.evaluation.run.judge import submitted
from advkit.evaluation.run.store import Stopwatch
from advkit.evaluation.run.workers import Workers
from advkit.tasks.base import raw_bytes

log = logging.getLogger("advkit")

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
    """A random step to the edge of the ball: in Linf every pixel up or down by eps. It asks nothing of any model."""

    needs: ClassVar[Access] = Access.NOTHING

    def __call__(self, oracle: Any, x: Tensor, goal: Any, ball: Ball[Tensor], rng: Rng, /) -> Tensor:
        """The rows [B, ...] after the step."""
        sign = torch.where(rng.at("noise").uniform(x) < 0.5, -torch.ones_like(x), torch.ones_like(x))
        return ball.project(x + ball.steepest(sign, x), x)


class Unasked:
    """Stands where a case has its victim while images are made: the targets are asked later, about stored images."""

    def __init__(self, space: Any, classes: int) -> None:
        self.space = space
        self.classes = classes

    def __call__(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), self.classes)

    def attacker_view(self) -> Unasked:
        return self

    def modules(self) -> tuple[torch.nn.Module, ...]:
        return ()

    def describe(self) -> ModelInfo:
        return ModelInfo(name="unasked", architecture="none", state_sha256="0" * 64, n_parameters=0)

    def to(self, device: torch.device | str) -> Unasked:
        return self


@cache
def code_digest(module: str = "") -> str:
    """sha256 over the sources that decide what attacks make and models answer, and over somebody else's module."""
    import sys

    import advkit

    root = Path(advkit.__file__).parent
    files = [
        path for part in ("core", "threat_models", "models", "attacks") for path in sorted((root / part).rglob("*.py"))
    ]
    if module and not module.startswith("advkit."):
        files += [Path(file) for file in [getattr(sys.modules.get(module), "__file__", None)] if file]
    digest = hashlib.sha256()
    for path in files:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


@dataclass(frozen=True)
class Rows:
    """The rows of an evaluation, all at hand: x [N, ...] in [0, 1], labels long [N], on the CPU."""

    ids: tuple[str, ...]
    x: Tensor
    labels: Tensor
    goal: Any

    @classmethod
    def of(cls, task: Any, n: int) -> Rows:
        """The task's first n rows; UsageError where they carry no labels."""
        batch: Batch = next(iter(task.batches(n, n=n)))
        if batch.labels is None:
            raise UsageError(f"task {task.name} has no labels: a transfer matrix counts right answers")
        return cls(batch.ids, batch.x, batch.labels, batch.goal)

    def pieces(self) -> list[Batch]:
        """The rows in pieces whose borders do not depend on how many there are."""
        n = len(self.ids)
        borders = [0, *(place for place in (FIRST, *range(PIECE, n, PIECE)) if place < n), n]
        return [
            Batch(ids=self.ids[a:b], x=self.x[a:b], goal=self.goal.take(torch.arange(a, b)), labels=self.labels[a:b])
            for a, b in pairwise(borders)
        ]


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
    usable:    bool: False where the attack raised (the image is the untouched one and counts nowhere)
    admitted:  bool: False where the attack left the threat model (the image is the untouched one)
    distance:  of the stored image from the row, in the ball's norm
    forwards, backwards: passes of the source
    messages:  what the attack said where it raised, by row
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

    @property
    def sha256(self) -> str:
        """Of the stored images."""
        return hashlib.sha256(raw_bytes(self.images)).hexdigest()

    @classmethod
    def joined(cls, key: str, parts: Sequence[ImageSet]) -> ImageSet:
        """One set of the rows of several, in order."""
        messages, at = {}, 0
        for part in parts:
            messages.update({at + row: text for row, text in part.messages.items()})
            at += len(part.images)
        tensors = {
            name: torch.cat([getattr(part, name) for part in parts])
            for name in ("images", "usable", "admitted", "distance", "forwards", "backwards")
        }
        return cls(key=key, seconds=sum(part.seconds for part in parts), messages=messages, **tensors)


def as_seen(images: Tensor) -> Tensor:
    """Stored images as targets see them, float in [0, 1]; rows that are no files stay as they are."""
    return images.float() / LEVELS if images.dtype == torch.uint8 else images


def set_config(case: Case) -> dict[str, Any]:
    """All that decides the images that a cell's attack makes, besides the rows."""
    threat = case.threat.describe()
    return {
        "format": FORMAT,
        "source": [name for name, _ in case.surrogates],
        "attack": str(replace(case.label, source="")),
        "threat": {key: threat[key] for key in ("norm", "eps", "lattice")},
        "space": cast(Any, case.threat).box.text(),
        "goal": case.specs["goal"],
        "data": case.specs["data"],
        "seed": case.seed,
        "code": code_digest(type(case.attack).__module__),
    }


class Images:
    """Sets of images, from a folder or made now.

    folder:     kept there by content; safe to share between runs that go on at the same time
    made, read: pieces made anew and pieces found
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made = 0
        self.read = 0

    def get(
        self,
        case: Case,
        pieces: Sequence[Batch],
        lanes: Callable[[], Lanes],
        crew: Workers | None = None,
    ) -> ImageSet:
        """The set that a cell's attack makes of these pieces.

        Raises Unsupported where the attack can't be made on this source.
        """
        key = digest_of(set_config(case))
        found: dict[int, ImageSet] = {}
        for place, piece in enumerate(pieces):
            held = self._load(key, piece)
            if held is not None:
                found[place] = held
                self.read += 1
        waiting = [place for place in range(len(pieces)) if place not in found]
        if waiting:
            shapes, watch = lanes(), Stopwatch()
            plays = _played(case, (pieces[place] for place in waiting), shapes, crew)
            for place in waiting:
                try:
                    played = next(plays)
                except (AccessDenied, UsageError) as error:
                    raise Unsupported(str(error)) from error
                made = _finished(key, case.threat, played, watch.lap())
                if not bool(made.usable.any()):
                    raise Unsupported(next(iter(made.messages.values())))
                if bool(made.usable.all()):  # what raised is tried again when the run is resumed
                    self._save(made, pieces[place])
                found[place] = made
                self.made += 1
        return ImageSet.joined(key, [found[place] for place in range(len(pieces))])

    def _path(self, key: str, piece: Batch) -> Path:
        return self.folder / "images" / key[:2] / key / f"{rows_digest(piece)}.safetensors"

    def _load(self, key: str, piece: Batch) -> ImageSet | None:
        path = self._path(key, piece)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as held:
                told = held.metadata()
                tensors = {name: held.get_tensor(name) for name in _TENSORS}
        except (OSError, SafetensorError) as error:
            raise UsageError(f"{path} can't be read ({error}); delete it, and it is made again") from error
        if (
            told.get("key") != key
            or tensors["images"].shape != piece.x.shape
            or json.loads(told["ids"]) != [*piece.ids]
        ):
            raise UsageError(f"{path} does not hold the images it is named after; delete it, and it is made again")
        usable = torch.ones(len(piece.ids), dtype=torch.bool)
        return ImageSet(key=key, usable=usable, seconds=float(told["seconds"]), messages={}, **tensors)

    def _save(self, made: ImageSet, piece: Batch) -> None:
        tensors = {name: getattr(made, name).contiguous() for name in _TENSORS}
        told = {"key": made.key, "ids": json.dumps(list(piece.ids)), "seconds": repr(made.seconds)}
        write_tensors(self._path(made.key, piece), tensors, told)


def write_tensors(path: Path, tensors: dict[str, Tensor], told: dict[str, str]) -> None:
    """A safetensors file in one move; ReportError where it can't be written."""
    write_atomic(path, save(tensors, metadata=told))


def _played(case: Case, batches: Iterable[Batch], lanes: Lanes, crew: Workers | None) -> Iterator[Round]:
    if crew is not None:
        yield from crew.run(attacked, case, iter(batches), lanes)
        return
    for batch in batches:
        yield _alone(case, batch, lanes)


def _alone(case: Case, batch: Batch, lanes: Lanes) -> Round:
    """One piece; in halves where the device's memory does not hold it."""
    try:
        return run_alone(attacked, case, batch, lanes)
    except torch.OutOfMemoryError:
        if len(batch.ids) == 1:
            raise
        log.warning("out of memory: going on with %d rows at a time", len(batch.ids) // 2)
    halves = []
    for rows in torch.arange(len(batch.ids)).tensor_split(2):
        labels = None if batch.labels is None else batch.labels[rows]
        ids = tuple(batch.ids[row] for row in rows.tolist())
        halves.append(
            _alone(case, replace(batch, ids=ids, x=batch.x[rows], goal=batch.goal.take(rows), labels=labels), lanes)
        )
    return Round(
        [record for half in halves for record in half.records],
        torch.cat([half.clean for half in halves if half.clean is not None]),
        torch.cat([half.adversarial for half in halves if half.adversarial is not None]),
    )


def _finished(key: str, threat: ThreatModel[Tensor], played: Round, seconds: float) -> ImageSet:
    """Rounded to 8 bits and checked against the threat model once more."""
    records, origin, returned = played.records, played.clean, played.adversarial
    assert origin is not None
    assert returned is not None
    handed, admitted = submitted(returned, origin, threat)
    stored = (handed * LEVELS).round().clamp(0, LEVELS).to(torch.uint8)
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
