"""From names to protected models: the embedded zoo, the user's cache, or training it now."""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from advkit.core.errors import BadModel, NoTrainingData
from advkit.core.rng import RowRng
from advkit.defenses import DEFENSES
from advkit.models import MODELS

log = logging.getLogger("advkit")


@dataclass(frozen=True)
class Victim:
    """A protected model and where it came from.

    model:  what the verdicts ask
    origin: "zoo:NAME", "cache:FOLDER", "trained now", "given"
    card:   the zoo card's measured figures and settings, or {}
    """

    model: Any
    origin: str
    card: dict[str, Any] = field(default_factory=dict)


def cache_root() -> Path:
    """Where trained models are kept: ADVKIT_CACHE, else the user's cache folder."""
    named = os.environ.get("ADVKIT_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "advkit"


def training_rng(seed: int) -> RowRng:
    """The stream that a training run draws from."""
    return RowRng.from_ids(seed, ["training"]).at("train")


def ready(spec: Any, task: Any) -> Any:
    """A trained model from a spec or an object; raises BadModel for an architecture without weights."""
    from advkit.models.torch import Architecture, as_model

    part = MODELS.build(spec)
    if isinstance(part, Architecture):
        raise BadModel(f"{spec} is an architecture without weights: name a trained model, e.g. zoo:NAME or path:FILE")
    return as_model(part.load(task) if hasattr(part, "load") else part, task)


def protected(model: Any, defense: Any, task: Any, *, seed: int = 0, device: str = "cpu", progress: bool = False) -> Victim:
    """The protected model that names or objects ask for.

    A ready model (a checkpoint, a hub name, a torch module) is protected as it is. An architecture needs weights: they
    come from the embedded zoo when a card matches task, model and defense, else from the cache, else they are trained
    now, which needs the task's training data.

    Raises NoTrainingData, BadModel, CheckpointError.
    """
    from advkit.models.torch import Architecture, as_model

    asked = model if model is not None else task.defaults.model
    part = MODELS.build(asked)
    guard = DEFENSES.build(defense)
    if not isinstance(part, Architecture):
        ready = as_model(part.load(task) if hasattr(part, "load") else part, task).to(device)
        if not guard.needs_data or getattr(part, "trained_with", "") == DEFENSES.spec(guard):
            return Victim(guard.protect(ready, None, training_rng(seed)), "given" if not isinstance(asked, str) else asked)
        return _trained(ready, guard, task, seed, device, progress, name=str(asked))

    from advkit.models import zoo

    card = zoo.find(task.name, MODELS.spec(part), DEFENSES.spec(guard))
    if card is not None and _fits(card, task):
        return Victim(zoo.load(card.name).to(device), f"zoo:{card.name}", {"figures": dict(card.measured), "card": card.name})
    shape = tuple(next(iter(task.batches(1))).x.shape[1:])
    blank = part(shape, task.classes, training_rng(seed).at("init"), space=task.space).to(device)
    return _trained(blank, guard, task, seed, device, progress, name=MODELS.spec(part))


def _fits(card: Any, task: Any) -> bool:
    shape = list(next(iter(task.batches(1))).x.shape[1:])
    return card.shape is None or list(card.shape) == shape


def _trained(blank: Any, guard: Any, task: Any, seed: int, device: str, progress: bool, name: str) -> Victim:
    from advkit.training.loop import fit

    data = task.training()
    spec = DEFENSES.spec(guard)
    if data is None:
        raise NoTrainingData(
            f"no trained weights for model {name} with defense {spec} on task {task.name}, and the task has no training "
            f"data at hand: give it some ({task.name}:root=FOLDER), or name a trained model (--model path:FILE.safetensors)"
        )
    if not hasattr(guard, "objective"):
        raise BadModel(f"model {name} has no trained weights and the defense {spec} does not train any")
    word = "|".join((name, spec, repr(guard), str(seed), task.digest(), _data_digest(data), blank.describe().state_sha256))
    folder = cache_root() / "trained" / hashlib.sha256(word.encode()).hexdigest()[:24]
    log.info("training %s with %s on %s (kept in %s)", name, spec, task.name, folder)
    fitted = fit(
        blank, data, guard.objective(), guard.recipe, training_rng(seed), device=device, out=folder, progress=progress
    )
    return Victim(fitted.model, f"cache:{folder.name}")


def _data_digest(data: Any) -> str:
    digest = hashlib.sha256(data.x.cpu().contiguous().numpy().tobytes())
    digest.update(data.y.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
