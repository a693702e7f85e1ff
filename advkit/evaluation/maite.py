"""For programs that speak MAITE 0.10: attacks as an augmentation, models and tasks as its models and data sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from advkit.core.errors import BadInput, BadModel
from advkit.core.maite import datum_id, label_of
from advkit.core.protocols import Task
from advkit.core.spaces import Box
from advkit.evaluation.api import evaluate
from advkit.models.maite import from_maite
from advkit.models.torch import as_model, is_model
from advkit.tasks.arrays import Arrays

TOLD = "advkit"
"""Key of a datum's metadata under which the augmentation says what it did."""
Batch = tuple[Sequence[Any], Sequence[Any], Sequence[Mapping[str, Any]]]


class AttackAugmentation:
    """An attack as a MAITE image classification Augmentation: batches in, adversarial batches out.

    Each batch is attacked and judged by the harness as `advkit.evaluate` does: what leaves the threat model is no
    success. A sample's result depends on the seed and its id, not on its batch, so ids must be those of the data set.

    attack:       spec or object, such as "pgd:steps=40"
    model:        what is attacked: a MAITE model, or what `advkit.evaluate` takes
    threat_model: spec or object; None takes linf of 8/255 of the box's width
    defense:      spec or object, put around the model
    goal:         spec or object
    low, high:    smallest and largest legal value of an image; the protocol does not say them
    gradients:    whether a MAITE model is differentiated (see `MaiteModel`)
    seed:         of all random streams
    settings:     of `advkit.evaluate`: device, draws, budget, sample_timeout

    Targets come back as they were. Images come back as float32 arrays. The metadata of each sample has one entry more,
    "advkit": attack, threat_model, seed, outcome (as in records), broken, and the clean image's label.

    Raises BadInput for a batch that the protocol forbids, and for images that are not floats in [low, high].
    """

    def __init__(
        self,
        attack: Any,
        model: Any,
        *,
        threat_model: Any = None,
        defense: Any = "none",
        goal: Any = None,
        low: float = 0.0,
        high: float = 1.0,
        gradients: bool = False,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        self.attack, self.model, self.threat_model, self.defense, self.goal = attack, model, threat_model, defense, goal
        self.low, self.high, self.gradients, self.seed, self.settings = low, high, gradients, seed, settings
        self.metadata = {"id": f"advkit {attack}"}

    def __call__(self, batch: Batch, /) -> tuple[list[Any], Sequence[Any], list[dict[str, Any]]]:
        """Attack the images of a batch (images, targets, metadata)."""
        if not isinstance(batch, tuple) or len(batch) != 3 or len({len(part) for part in batch}) != 1:
            raise BadInput("expected a MAITE batch: a tuple of images, targets and metadata, as many of each")
        images, targets, metadata = batch
        if not len(images):
            return [], targets, []
        task = self._task(images, targets, metadata)
        report = evaluate(
            self.attack,
            self.defense,
            task,
            self._victim(task.space),
            self.threat_model,
            self.goal,
            seed=self.seed,
            keep=len(task),
            beside=False,
            **self.settings,
        )
        found = report.adversarial()
        place = {row: i for i, row in enumerate(found.ids)}
        order = [place[row] for row in task.ids]
        threat = report.to_dict()["request"]["threat_model"]
        done = [
            {
                **dict(told),
                TOLD: {
                    "attack": found.attacks[i],
                    "threat_model": threat,
                    "seed": self.seed,
                    "outcome": found.outcomes[i],
                    "broken": bool(found.broken[i]),
                    "label": int(found.labels[i]),
                },
            }
            for i, told in zip(order, metadata, strict=True)
        ]
        return [found.adversarial[i].float().numpy() for i in order], targets, done

    def _task(self, images: Sequence[Any], targets: Sequence[Any], metadata: Sequence[Any]) -> Arrays:
        names = [f"sample {i} of the batch" for i in range(len(images))]
        labels, counts = zip(*(label_of(each, where) for each, where in zip(targets, names, strict=True)), strict=True)
        if len(set(counts)) != 1:
            raise BadInput(f"the targets of the batch have {min(counts)} to {max(counts)} classes; expected one number")
        ids = [datum_id(each, where) for each, where in zip(metadata, names, strict=True)]
        arrays = [np.asarray(image) for image in images]
        for array, where in zip(arrays, names, strict=True):
            if array.ndim != 3 or array.shape != arrays[0].shape or not np.issubdtype(array.dtype, np.floating):
                raise BadInput(
                    f"{where} is {array.dtype} {list(array.shape)}; expected float images [C, H, W] of one shape, in "
                    f"[{self.low:g}, {self.high:g}]"
                )
        x = np.stack(arrays).astype(np.float32)
        space = Box(self.low, self.high, tuple(x.shape[1:]))
        return Arrays(x, np.array(labels), classes=counts[0], name="maite", ids=ids, space=space)

    def _victim(self, space: Box) -> Any:
        model = self.model
        foreign = not isinstance(model, str | torch.nn.Module) and not is_model(model) and hasattr(model, "metadata")
        return from_maite(model, space, gradients=self.gradients) if foreign else model


class MaiteClassifier:
    """An advkit model, torch module or function from rows to logits as a MAITE image classification Model.

    model:  what `advkit.evaluate` takes as an object; a task's model is `resolve(...).victim`
    name:   the id of its metadata
    labels: names of the classes, in their order

    Answers float32 arrays [classes]: the model's logits, as they are.
    """

    def __init__(self, model: Any, name: str = "", labels: Sequence[str] = ()) -> None:
        self.model = as_model(model)
        self.metadata: dict[str, Any] = {"id": name or self.model.describe().name}
        if labels:
            self.metadata["index2label"] = dict(enumerate(labels))

    def __call__(self, batch: Sequence[Any], /) -> list[Any]:
        """Logits [classes] of every image [C, H, W]."""
        if not len(batch):
            return []
        x = torch.from_numpy(np.stack([np.asarray(image, dtype=np.float32) for image in batch]))
        with torch.no_grad():
            answer = self.model(x)
        if answer.ndim != 2:
            raise BadModel(f"the model answers {list(answer.shape)}; a MAITE model answers scores, [images, classes]")
        return list(answer.float().cpu().numpy())


class MaiteDataset:
    """An advkit classification task as a MAITE image classification Dataset.

    task: with images [C, H, W]; n: its first samples, None for all

    Images are float32 in the task's space, targets one-hot, ids those of the task's samples.
    """

    def __init__(self, task: Task, n: int | None = None) -> None:
        batch = next(iter(task.batches(len(task) if n is None else n, n=n)))
        if batch.x.ndim != 4 or batch.labels is None:
            raise BadInput(
                f"{task.name} has samples of shape {list(batch.x.shape[1:])}; expected labelled images [C, H, W]"
            )
        self._images, self._ids = batch.x.float().cpu().numpy(), batch.ids
        self._targets = np.eye(task.classes, dtype=np.float32)[batch.labels.numpy()]
        self.metadata = {"id": task.name, "index2label": dict(enumerate(task.class_names()))}

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, place: int, /) -> tuple[Any, Any, dict[str, str]]:
        """Image, one-hot target, metadata; IndexError beyond the last."""
        if not 0 <= place < len(self):
            raise IndexError(f"sample {place} of {len(self)}")
        return self._images[place], self._targets[place], {"id": self._ids[place]}
