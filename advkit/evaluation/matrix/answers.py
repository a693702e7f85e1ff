"""What targets answer to stored images: decisions, kept by the content of model and images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from advkit.core.errors import UsageError
from advkit.core.lanes import Lanes
from advkit.core.state import frozen
from advkit.evaluation.matrix.images import (
    ImageSet,
    as_seen,
    code_digest,
    digest_of_tensors,
    read_tensors,
    write_tensors,
)
from advkit.evaluation.matrix.rates import NO_DECISION, Decisions
from advkit.evaluation.run.batch import own_randomness
from advkit.evaluation.run.case import Case, digest_of
from advkit.evaluation.run.judge import Judge, decide, finite
from advkit.evaluation.sources import Participant

CHUNK = 1024
"""Images sent to the device at a time."""


@dataclass(frozen=True)
class Answers:
    """Decisions of targets, from a folder or queried now.

    folder: stored there by content, beside the images
    draws:  of a randomised target, whose commonest decision counts
    lanes:  the batch shapes of each target, by its key
    """

    folder: Path
    device: str
    draws: int
    lanes: Mapping[str, Lanes]

    @classmethod
    def of(cls, case: Case, targets: Sequence[Participant], folder: Path) -> Answers:
        """For these targets, whose shapes are tried on the task's first rows."""
        first = next(iter(case.task.batches(64, n=min(64, len(case.task))))).x.to(case.device)
        lanes = {}
        for target in targets:
            with own_randomness(case.device, "lanes"):
                lanes[target.key] = Lanes.probed(target.model, first, False)
        return cls(folder, case.device, case.draws, lanes)

    def about_set(self, target: Participant, images: ImageSet, seed: int) -> Decisions:
        """Decisions [N] about a set of images; NO_DECISION where the set holds nothing or the answer is not finite."""
        decisions = self.about(target, images.images, seed, images.sha256)
        return np.where(images.usable.numpy(), decisions, NO_DECISION).astype(np.int16)

    def about(self, target: Participant, x: Tensor, seed: int, sha256: str = "") -> Decisions:
        """Decisions [N] about stored images uint8 [N, ...], or about rows as they are.

        sha256: of the images, where it is known
        """
        draws = self.draws if target.model.describe().randomized else 1
        content = {"target": target.key, "images": sha256 or digest_of_tensors(x), "draws": draws}
        content |= {"code": code_digest()} | ({"seed": seed} if draws > 1 else {})
        name = digest_of(content)
        path = self.folder / name[:2] / f"{name}.safetensors"
        if path.is_file():
            stored = read_tensors(path, {"decisions": (torch.int64, (len(x),))})[0]["decisions"]
            if len(stored) and not NO_DECISION <= int(stored.min()) <= int(stored.max()) < 2**15:
                raise UsageError(f"{path} does not hold decisions; delete it, and it is made again")
            return np.asarray(stored.numpy(), dtype=np.int16)
        decisions = self._query(target, x, draws, name)
        write_tensors(path, {"decisions": decisions}, {"target": target.key})
        return np.asarray(decisions.numpy(), dtype=np.int16)

    def _query(self, target: Participant, x: Tensor, draws: int, name: str) -> Tensor:
        """The commonest decisions among the draws, long [N]; a randomised model's draws follow from the name."""
        model = target.model
        judge = Judge(model, self.lanes[target.key])
        votes = []
        with frozen(*model.modules()), own_randomness(self.device, "answers", name):
            for _ in range(draws):
                parts = []
                for part in torch.split(x, CHUNK):
                    answer = judge.answer(as_seen(part).to(self.device))
                    parts.append(torch.where(finite(answer), decide(answer), NO_DECISION).cpu())
                votes.append(torch.cat(parts))
        return torch.stack(votes).mode(0).values.long()
