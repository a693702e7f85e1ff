"""Stored transfer images: made once on each source, 8-bit, memory-mapped (PubDef, arXiv 2310.17645)."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from advkit.core.errors import AdvkitError, BadInput, UsageError
from advkit.core.lanes import Lanes
from advkit.core.oracle import MeteredOracle
from advkit.core.protocols import Ball, Boxed, Data, Rng, Task
from advkit.core.rng import RowRng
from advkit.core.state import frozen
from advkit.core.text import first_line
from advkit.defenses.adversarial.base import in_mode
from advkit.models.torch import tensors_sha256
from advkit.threat_models.goals.untargeted import Untargeted

log = logging.getLogger("advkit")

Augment = Callable[[Tensor, Rng], Tensor]
_ROWS = 512
_FORMAT = 1


def default_folder() -> Path:
    """Where stored sets live: ADVKIT_CACHE, else the user's cache folder."""
    named = os.environ.get("ADVKIT_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return (Path(named) if named else Path(base) / "advkit") / "transfer"


@dataclass(frozen=True)
class Maker:
    """Makes one source's images of given rows.

    attack:    keeps the best point and never stops early: what fools the source less may fool others more
    ball:      8-bit (lattice 255), around the augmented image
    augment:   a fresh version of each row, or None for the rows as they are
    seed, key: of every draw; key names the source by its weights
    device:    where the source is
    """

    source: Any
    attack: Any
    ball: Ball[Tensor]
    augment: Augment | None
    seed: int
    key: str
    device: torch.device | str = "cpu"

    def __call__(self, x: Tensor, y: Tensor, rows: Sequence[int], copy: object) -> tuple[Tensor, Tensor]:
        """(uint8 images, the versions they were made from) of rows x [B, ...] with labels y [B].

        rows: their places in the training data, which key the draws. Raises AdvkitError if an image leaves the ball.
        """
        rng = RowRng.from_ids(self.seed, [str(row) for row in rows], device=self.device).at("transfer", self.key, copy)
        x, y = x.to(self.device), y.to(self.device)
        origin = x if self.augment is None else self.augment(x, rng.at("augment"))
        with in_mode(self.source, False), frozen(*self.source.modules()):
            oracle = MeteredOracle(self.source, rows=len(x), decides=False, lanes=Lanes.fitting(x))
            z = self.attack(oracle, origin, Untargeted(y), self.ball, rng.at("attack"))
        stored = (self.ball.finish(z, origin) * 255).round().clamp(0, 255).to(torch.uint8)
        if not bool(self.ball.admits(stored.to(origin) / 255, origin).all()):
            raise AdvkitError("a stored transfer image lies outside its ball; the attack or the ball is at fault")
        return stored.cpu(), origin.cpu()


@dataclass(frozen=True)
class TransferSet:
    """Stored images uint8 [N, ...], memory-mapped, by source and copy."""

    images: tuple[tuple[NDArray[np.uint8], ...], ...]

    @property
    def sources(self) -> int:
        return len(self.images)

    @property
    def copies(self) -> int:
        return len(self.images[0])

    def take(self, source: int | Tensor, copy: Tensor, rows: Tensor) -> Tensor:
        """Float images [B, ...] in [0, 1] of training rows `rows`; source and copy [B] say which of each row's."""
        place, cell = rows.cpu().numpy(), (copy + self.copies * source).cpu().numpy()
        found = np.empty((len(place), *self.images[0][0].shape[1:]), dtype=np.uint8)
        for one in np.unique(cell):
            mine = cell == one
            found[mine] = self.images[one // self.copies][one % self.copies][place[mine]]
        return torch.from_numpy(found).to(rows.device).float() / 255


def check_space(data: Data | Task) -> None:
    """BadInput unless the rows live in [0, 1]: stored images have 8 bits."""
    bounds = (data.space.low, data.space.high) if isinstance(data.space, Boxed) else None
    if bounds != (0.0, 1.0):
        raise BadInput(
            f"transfer images are stored with 8 bits and need samples in Box(0, 1); this task's are in {data.space}"
        )


def stored_copies(
    maker: Maker, data: Data, copies: int, folder: Path, recorded: dict[str, Any]
) -> tuple[NDArray[np.uint8], ...]:
    """One source's images of the whole training data, one array per copy, from the folder or made now.

    recorded: all that decides the images besides source, seed, data and copy; its hash names the file. A run that was
    cut off leaves no half file: it goes on with the next copy.
    """
    digest = tensors_sha256([("x", data.x), ("y", data.y)])
    parts = []
    for copy in range(copies):
        word = {"format": _FORMAT, **recorded, "source": maker.key, "seed": maker.seed, "data": digest, "copy": copy}
        name = hashlib.sha256(json.dumps(word, sort_keys=True).encode()).hexdigest()
        path = folder / name[:2] / f"{name}.npy"
        if not path.is_file():
            log.info("making transfer images on %s, copy %d of %d", maker.key[:12], copy + 1, copies)
            _write(path, maker, data, copy)
        parts.append(_stored(path, tuple(data.x.shape)))
    return tuple(parts)


def _stored(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    try:
        found = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # a header is Python text that numpy reads: what it raises is not to be listed
        raise UsageError(
            f"{path} holds no transfer images ({first_line(error)}): delete it, and they are made again"
        ) from error
    if found.shape != shape or found.dtype != np.uint8:
        raise UsageError(f"{path} does not hold the transfer images it is named after: delete it")
    return found


def _write(path: Path, maker: Maker, data: Data, copy: int) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    except OSError as error:
        raise UsageError(
            f"cannot write transfer images to {path.parent} ({error}); name a folder with cache="
        ) from error
    os.close(descriptor)
    try:
        images = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=tuple(data.x.shape))
        for start in range(0, len(data), _ROWS):
            rows = range(start, min(start + _ROWS, len(data)))
            made, _ = maker(data.x[start : rows.stop], data.y[start : rows.stop], rows, copy)
            images[start : rows.stop] = made.numpy()
        images.flush()
        del images
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
