"""The one training loop: a defense brings an Objective, a Recipe says how, `fit` trains a copy and can be killed.

What a run depends on is data, model, recipe, objective and rng. All randomness is derived from rng by epoch and row,
and the checkpoint after every epoch holds everything else that lives on, so a run that was killed and started again
ends with the same bits (on the same device and library versions).
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import logging
import math
import re
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advkit.core.checks import at_least_one, check, fraction, not_negative, one_of
from advkit.core.errors import AdvkitError, BadInput, BadModel, CheckpointError, StaleRun, UsageError
from advkit.core.protocols import Data, Rng
from advkit.core.rng import RowRng
from advkit.core.strict_json import read_object
from advkit.core.tail import weakest
from advkit.core.text import first_line
from advkit.models.checkpoint import canonical_json, pack, read_checked, unpack, write_atomically
from advkit.models.torch import TorchModel, named_tensors, tensors_sha256
from advkit.training.augment import AUGMENTATIONS
from advkit.training.lars import LARS

log = logging.getLogger("advkit")

CHECKPOINT = "training.safetensors"
FORMAT = "advkit-training-1"
TAIL_SCORE = "tail_30_score"
"""In the log's figures: the mean score of the weakest 30 % of the classes, on the validation rows."""
RESIDENT = 4 * 2**30
"""Bytes of training rows that are kept on an accelerator as a whole; larger sets travel batch by batch."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train: everything but the loss.

    epochs:       passes over the training rows
    batch_size:   rows per step; a last batch of a single row joins the one before
    optimizer:    "adam", "sgd", or "lars" for very large batches (`advkit.training.lars`)
    lr:           peak learning rate
    momentum:     of sgd and lars
    weight_decay: L2 coefficient on weights with two axes or more; biases and normalisation parameters are spared
    schedule:     "none"; "cosine" to zero; "onecycle": linearly up from zero, and down again from half time; "steps": a
                  tenth at half time, a hundredth at three quarters
    ema:          decay of the averaged weights that are scored and returned, such as 0.999; 0 for none. At step t the
                  decay is at most (1 + t) / (10 + t), so that random initial weights are forgotten
    amp:          the loss under bfloat16 autocast (no gradient scaling needed)
    augment:      "none", or "crop-flip" for images
    validation:   fraction of the rows, the first ones of the file, kept for scoring; 0 for none
    select:       "best" weights on the validation rows, or "last"
    select_every: epochs between scorings; the last epoch is always scored
    """

    epochs: int = 10
    batch_size: int = 128
    optimizer: Literal["adam", "sgd", "lars"] = "adam"
    lr: float = 2e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Literal["none", "cosine", "onecycle", "steps"] = "none"
    ema: float = 0.0
    amp: bool = False
    augment: Literal["none", "crop-flip"] = "none"
    validation: float = 0.1
    select: Literal["best", "last"] = "best"
    select_every: int = 1

    def __post_init__(self) -> None:
        at_least_one(self, "epochs", "batch_size", "select_every")
        check(self, "lr", self.lr > 0 and math.isfinite(self.lr), "a positive number")
        not_negative(self, "weight_decay")
        fraction(self, "momentum", "ema", "validation", ends="[)")
        one_of(self, "optimizer", ("adam", "sgd", "lars"))
        one_of(self, "schedule", ("none", "cosine", "onecycle", "steps"))
        one_of(self, "augment", tuple(AUGMENTATIONS))
        one_of(self, "select", ("best", "last"))

    def lr_at(self, step: int, steps: int) -> float:
        """The learning rate of optimiser step `step` of `steps`, counted from 0."""
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        if self.schedule == "onecycle":
            return self.lr * (1 - abs(2 * (step + 0.5) / steps - 1))
        if self.schedule == "steps":
            return self.lr * (1.0 if 2 * step < steps else 0.1 if 4 * step < 3 * steps else 0.01)
        return self.lr


def correct(model: Any, x: Tensor, y: Tensor) -> Tensor:
    """Float [B]: 1 where the model's largest logit is the label's."""
    with torch.no_grad():
        answer: Tensor = model(x)
    return (answer.argmax(dim=1) == y).float()


class Objective:
    """The loss of a training run, with whatever state it keeps; the base class is plain cross-entropy.

    A defense makes a fresh one for every run. Rows are given by their place in the training data, validation rows
    included, as a long tensor on the device of x; rng holds one stream per row of the batch.

    replays:    optimiser steps in a row on every batch, each with a loss of its own. The recipe's epochs count steps:
                the loop makes max(1, ceil(epochs / replays)) passes over the data, and each is an epoch of the log
    rolls_back: whether a run that `review` ends hands back its best-scored weights, whatever the recipe selects
    """

    replays: int = 1
    rolls_back: bool = False

    def prepare(self, model: TorchModel, data: Data, rng: Rng) -> None:
        """Called once before the first epoch with the initial weights, and again when a run is resumed.

        Must be deterministic: what it makes is not stored, only what `state` returns.
        """

    def loss(self, model: TorchModel, x: Tensor, y: Tensor, rows: Tensor, rng: Rng) -> Tensor:
        """The scalar to descend on a batch of augmented clean rows; the model's module is in training mode."""
        return F.cross_entropy(model(x), y)

    def parameters(self) -> Sequence[nn.Parameter]:
        """Weights of the objective's own that are trained with the model's; asked for after `prepare`.

        They are no part of the model that comes out. `state` must return them, as everything else that lives on.
        """
        return ()

    @contextmanager
    def trial(self) -> Iterator[None]:
        """A loss taken inside is no step of training: the objective is afterwards as it was before.

        What `state` returns is given back, and so is every attribute, lists, dicts and deques with what they held.
        """
        state = {name: tensor.detach().clone() for name, tensor in self.state().items()}
        containers = (list, dict, set, deque)
        held = {name: copy.copy(v) if isinstance(v, containers) else v for name, v in vars(self).items()}
        try:
            yield
        finally:
            vars(self).clear()
            vars(self).update(held)
            self.load(state)

    def stepped(self, model: TorchModel) -> None:
        """Called after every optimiser step: the place to take back a perturbation of the weights."""

    def score(self, model: TorchModel, x: Tensor, y: Tensor, rows: Tensor, rng: Rng) -> Tensor:
        """Float or bool [B], larger is better, on validation rows; the module is in evaluation mode.

        The streams are the same at every scoring.
        """
        return correct(model, x, y)

    def measures(self, model: TorchModel, x: Tensor, y: Tensor, rows: Tensor, rng: Rng) -> Mapping[str, Tensor]:
        """Further figures of validation rows, float or bool [B] by name, beside the score; the log has their means.

        The streams are those of `score`.
        """
        return {}

    def review(self, entry: Epoch, log: Sequence[Epoch]) -> Review:
        """What there is to say of the epoch just trained and scored; `log` has the epochs before it.

        The place for figures that were noted step by step, and to end a run. An error raised here leaves the
        checkpoint of the epoch before.
        """
        return Review()

    def state(self) -> dict[str, Tensor]:
        """What must survive an interruption, as tensors by name."""
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` returned."""

    def fingerprint(self) -> str:
        """Tells runs with other settings apart: the class and the dataclasses it holds as attributes."""
        settings = {
            # addresses differ from process to process and say nothing
            name: re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
            for name, value in vars(self).items()
            if dataclasses.is_dataclass(value) and not isinstance(value, type)
        }
        return f"{type(self).__module__}.{type(self).__qualname__}{sorted(settings.items())}"


@dataclass(frozen=True)
class Epoch:
    """One line of the log.

    epoch:   from 1
    loss:    mean over the epoch's rows
    score:   mean of the objective's score over the validation rows, NaN where it was not measured
    clean:   accuracy on the validation rows as they are, NaN likewise
    seconds: training and scoring
    lr:      learning rate of the last step
    figures: what was measured beside them, by name: `tail_30_score`, the mean score of the weakest 30 % of the classes,
             and what the objective adds
    """

    epoch: int
    loss: float
    score: float
    clean: float
    seconds: float
    lr: float
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Review:
    """What an objective says of an epoch.

    figures: for the log, by name; NaN where something was not measured
    halt:    why training ends here, in words; empty where it goes on
    """

    figures: Mapping[str, float] = field(default_factory=dict)
    halt: str = ""


@dataclass(frozen=True)
class Fit:
    """What came out of a run.

    model:      the selected weights, in evaluation mode
    last:       the weights after the last epoch
    log:        one entry per epoch
    best_epoch: the epoch whose weights `model` holds
    halted:     why the objective ended the run before its last epoch; empty where it did not
    """

    model: TorchModel
    last: TorchModel
    log: tuple[Epoch, ...]
    best_epoch: int
    halted: str = ""

    @property
    def best(self) -> Epoch:
        """The log entry of the selected weights."""
        return self.log[self.best_epoch - 1]


def validation_rows(n: int, fraction: float) -> int:
    """How many rows, the first ones, are kept for scoring: at least one where the fraction is positive."""
    return 0 if fraction == 0 else max(1, int(n * fraction))


def fit(
    model: TorchModel,
    data: Data,
    objective: Objective,
    recipe: Recipe,
    rng: Rng,
    *,
    device: torch.device | str | None = None,
    out: Path | str | None = None,
    progress: bool = True,
) -> Fit:
    """Train a copy of the model; the caller's keeps its weights, mode, gradients and device.

    device:   where to train (default: where the model is)
    out:      folder of the run. Its checkpoint is replaced after every epoch and taken up again by the next call
    progress: show a bar where standard error is a terminal

    Raises BadInput for data outside the model's space or labels out of range, BadModel for a model that can't be
    trained, StaleRun where `out` holds another run, UsageError where the loss becomes NaN or infinite.
    """
    if not isinstance(model, TorchModel):
        raise BadModel(f"only torch models are trained here, got {type(model).__name__}")
    held = validation_rows(len(data), recipe.validation)
    _check(model, data, held)
    if _single_rows(len(data) - held, recipe.batch_size) and _batch_statistics(model.module):
        raise BadModel(
            f"a batch of a single row (batch_size={recipe.batch_size}, {len(data) - held} training rows) and a model "
            "with batch normalisation, which has no statistics of one row: choose a batch_size of at least 2"
        )
    place = model.device if device is None else torch.device(device)
    run = _Run(model, data, objective, recipe, rng, place, None if out is None else Path(out), held)
    with _own_randomness(place):
        return run.play(progress)


def _check(model: TorchModel, data: Data, held: int) -> None:
    if len(data) - held < 1:
        raise BadInput(f"{len(data)} training samples leave none to train on after {held} for validation")
    if len(data.x) != len(data.y):
        raise BadInput(f"{len(data.x)} training samples and {len(data.y)} labels; expected one label per sample")
    if int(data.y.min()) < 0 or int(data.y.max()) >= data.classes:
        raise BadInput(
            f"training labels from {int(data.y.min())} to {int(data.y.max())}; expected 0 to {data.classes - 1}"
        )
    if model.classes is not None and model.classes < data.classes:
        raise BadModel(f"the model answers {model.classes} classes, the training data has {data.classes}")
    complaint = model.space.complaint(data.x)
    if complaint is not None:
        raise BadInput(f"training data: {complaint}")
    if not any(parameter.requires_grad for parameter in model.module.parameters()):
        raise BadModel(f"{model.name} has no parameter that requires a gradient; nothing can be trained")


def _single_rows(rows: int, batch_size: int) -> bool:
    """Whether there is a batch of one row; one that is left over joins the batch before."""
    return rows == 1 or batch_size == 1


def _batch_statistics(module: nn.Module) -> bool:
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())


@contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    """torch's generators and cuDNN's flags are given back as they were: dropout must not move the caller's draws."""
    cudnn = torch.backends.cudnn
    flags = cudnn.deterministic, cudnn.benchmark
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        cudnn.deterministic, cudnn.benchmark = True, False
        try:
            yield
        finally:
            cudnn.deterministic, cudnn.benchmark = flags


def _seed(generator: torch.Generator, device: torch.device) -> None:
    """Seed torch's generator on the host and on the device in use, and no other."""
    seed = generator.initial_seed()
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


class _Run:
    """One call of fit: the working copy, the optimiser, the averaged and the best weights, the log."""

    def __init__(
        self,
        model: TorchModel,
        data: Data,
        objective: Objective,
        recipe: Recipe,
        rng: Rng,
        device: torch.device,
        out: Path | None,
        held: int,
    ) -> None:
        self.data, self.objective, self.recipe, self.rng = data, objective, recipe, rng
        self.device, self.out, self.held = device, out, held
        self.initial = model.state_sha256() if out is not None else ""
        self.model = model.copy()
        self.model.module.to(device)
        self.average = self.model.copy() if recipe.ema else None
        whole = data.x.numel() * data.x.element_size() <= RESIDENT
        self.x = data.x.to(device) if whole else data.x
        self.y = data.y.to(device) if whole else data.y
        seed = rng.at("rows").generator().initial_seed()
        self.streams = RowRng.from_ids(seed, [str(row) for row in range(len(data))], device)
        self.passes = max(1, math.ceil(recipe.epochs / objective.replays))
        self.log: list[Epoch] = []
        self.halted = ""
        self.best: dict[str, Tensor] | None = None
        self.best_epoch = 0
        self.best_score = -math.inf

    @property
    def scored(self) -> TorchModel:
        """The weights that are scored and returned."""
        return self.model if self.average is None else self.average

    def play(self, progress: bool) -> Fit:
        recipe = self.recipe
        saved = self._saved()
        if saved is None or not self._finished(saved[1]):
            _seed(self.rng.at("torch", "prepare").generator(), self.device)
            self.model.module.eval()
            self.objective.prepare(self.model, self.data, self.rng.at("prepare"))
            self.optimizer = _optimizer(self.model.module, self.objective.parameters(), recipe)
        if saved is not None:
            self._restore(*saved)
        with _bar(progress, self.passes, self._batches_per_epoch()) as bar:
            bar.start(len(self.log))
            while len(self.log) < self.passes and not self.halted:
                self._epoch(len(self.log) + 1, bar)
                self._save()
        last = self.scored.copy()
        last.module.eval()
        best, chosen = last, len(self.log)
        returns = recipe.select == "best" or (self.halted and self.objective.rolls_back)
        if self.best is not None and returns and self.best_epoch != chosen:
            best, chosen = last.copy(), self.best_epoch
            _fill(best.module, self.best)
        for one in (last, best):
            one.source = f"trained on {self.data.name}" if self.data.name else "trained by advkit"
        return Fit(best, last, tuple(self.log), chosen, self.halted)

    def _finished(self, progress: Mapping[str, Any]) -> bool:
        """Whether a saved run has nothing left to train."""
        return progress["epochs"] >= self.passes or bool(progress["halted"])

    def _batches(self, epoch: int) -> list[Tensor]:
        generator = self.rng.at("shuffle", epoch).generator()
        order = torch.randperm(len(self.data) - self.held, generator=generator) + self.held
        batches = list(torch.split(order, self.recipe.batch_size))
        if len(batches) > 1 and len(batches[-1]) == 1:
            # batch normalisation has no statistics of a single row
            batches[-2:] = [torch.cat(batches[-2:])]
        return batches

    def _batches_per_epoch(self) -> int:
        rows, size = len(self.data) - self.held, self.recipe.batch_size
        whole, rest = divmod(rows, size)
        return max(1, whole + (rest > 1 or (rest == 1 and whole == 0)))

    def _rows(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x, y and the rows themselves, on the device."""
        index = rows.to(self.x.device)
        x, y = self.x.index_select(0, index), self.y.index_select(0, index)
        return x.to(self.device), y.to(self.device), rows.to(self.device)

    def _epoch(self, epoch: int, bar: _Bar) -> None:
        started = time.perf_counter()
        recipe, module = self.recipe, self.model.module
        _seed(self.rng.at("torch", epoch).generator(), self.device)
        streams = self.streams.at("epoch", epoch)
        augment = AUGMENTATIONS[recipe.augment]
        batches = self._batches(epoch)
        replays = self.objective.replays
        steps = self.passes * len(batches) * replays
        total = torch.zeros((), device=self.device)
        rate = recipe.lr
        finite = _Finite(self.device)
        for number, chosen in enumerate(batches):
            x, y, rows = self._rows(chosen)
            own = streams.take(rows)
            if augment is not None:
                x = augment(x, own.at("augment"))
            for replay in range(replays):
                step = ((epoch - 1) * len(batches) + number) * replays + replay
                rate = recipe.lr_at(step, steps)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                module.train()
                self.optimizer.zero_grad(set_to_none=True)
                names = ("objective", replay) if replay else ("objective",)
                with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=recipe.amp):
                    loss = self.objective.loss(self.model, x, y, rows, own.at(*names))
                bad = finite.look(step, loss)
                if bad is not None:
                    self._diverged(bad, steps, epoch)
                loss.backward()  # type: ignore[no-untyped-call]
                self.optimizer.step()
                self.objective.stepped(self.model)
                if self.average is not None:
                    _average(self.average.module, module, min(recipe.ema, (1 + step) / (10 + step)))
                total += loss.detach() * len(rows)
            bar.advance()
        bad = finite.first()
        if bad is not None:
            self._diverged(bad, steps, epoch)
        mean = float(total) / (replays * (len(self.data) - self.held))
        score, clean = math.nan, math.nan
        figures: dict[str, float] = {}
        if self.held and (epoch % recipe.select_every == 0 or epoch == self.passes):
            score, clean, figures = self._score()
            if not math.isfinite(score):
                raise UsageError(f"the validation score of epoch {epoch} is {score}; expected finite scores")
        entry = Epoch(epoch, mean, score, clean, time.perf_counter() - started, rate, figures)
        review = self.objective.review(entry, tuple(self.log))
        self.log.append(replace(entry, figures={**figures, **review.figures}))
        self._select(epoch, score, review)
        self.halted = review.halt
        bar.report(self.log[-1])
        log.debug("epoch %d: loss %.4f, score %.4f, clean %.4f", epoch, mean, score, clean)

    def _diverged(self, step: int, steps: int, epoch: int) -> None:
        rate = self.recipe.lr_at(step, steps)
        kept = f"; the checkpoint of epoch {epoch - 1} stays in {self.out}" if self.out and epoch > 1 else ""
        raise UsageError(
            f"training diverged: the loss of step {step + 1} of {steps} (epoch {epoch}) is not finite at learning rate "
            f"{rate:.3g}; lower lr{kept}"
        )

    def _select(self, epoch: int, score: float, review: Review) -> None:
        if not self.held or (self.recipe.select == "last" and not self.objective.rolls_back):
            self.best_epoch = epoch
        elif score > self.best_score and (self.best is None or not review.halt):
            # an epoch that ends the run is none to go back to, unless it is the first one
            self.best_score, self.best_epoch = score, epoch
            state = named_tensors(self.scored.module)
            self.best = {name: tensor.detach().clone() for name, tensor in state.items()}

    def _score(self) -> tuple[float, float, dict[str, float]]:
        """Mean score, clean accuracy and further figures over the validation rows."""
        model, objective = self.scored, self.objective
        model.module.eval()
        streams = self.streams.at("validation")
        plain = type(objective).score is Objective.score
        scores, cleans, labels = [], [], []
        further: dict[str, list[Tensor]] = {}
        for chosen in torch.split(torch.arange(self.held), max(256, self.recipe.batch_size)):
            x, y, rows = self._rows(chosen)
            labels.append(y.cpu())
            scores.append(objective.score(model, x, y, rows, streams.take(rows)).detach().float().cpu())
            cleans.append(scores[-1] if plain else correct(model, x, y).cpu())
            for name, each in objective.measures(model, x, y, rows, streams.take(rows)).items():
                further.setdefault(name, []).append(each.detach().float().cpu())
        figures = {name: _mean(each) for name, each in further.items()}
        figures[TAIL_SCORE] = _tail(torch.cat(scores), torch.cat(labels))
        return _mean(scores), _mean(cleans), figures

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for part in (
            FORMAT,
            repr(self.recipe),
            self.initial,
            self.objective.fingerprint(),
            str(self.rng.at("fingerprint").generator().initial_seed()),
            tensors_sha256([("x", self.data.x), ("y", self.data.y)]),
        ):
            digest.update(hashlib.sha256(part.encode()).digest())
        return digest.hexdigest()

    def _saved(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and progress of an earlier call, or None; StaleRun where the folder is another run's."""
        if self.out is None:
            return None
        self.mark = self._fingerprint()
        path = self.out / CHECKPOINT
        for unfinished in path.parent.glob(f".{CHECKPOINT}.*"):
            unfinished.unlink(missing_ok=True)  # left by a process that was killed while writing
        if not path.exists():
            return None
        tensors, metadata = unpack(read_checked(path), path)
        if metadata.get("format") != FORMAT:
            raise CheckpointError(f"{path} is no training checkpoint; choose another folder for this run")
        if metadata.get("fingerprint") != self.mark:
            raise StaleRun(
                f"{self.out} holds the training of another model, data set, recipe, objective or seed; choose another "
                "folder, or remove it"
            )
        if metadata.get("seal") != _seal(tensors, metadata.get("progress", "")):
            raise CheckpointError(f"{path} is damaged; remove it and train again")
        with _readable(path):
            return tensors, _progress(metadata["progress"], self.passes)

    def _restore(self, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
        assert self.out is not None
        with _readable(self.out / CHECKPOINT):
            self._take(tensors, progress)
        log.info("training goes on after epoch %d of %d", len(self.log), self.passes)

    def _take(self, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
        groups: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            group, _, rest = name.partition("/")
            groups.setdefault(group, {})[rest] = tensor
        _fill(self.model.module, groups["model"])
        if self.average is not None:
            _fill(self.average.module, groups["average"])
        if not self._finished(progress):  # else there was no need to prepare, and nothing steps any more
            _load_optimizer(self.optimizer, groups.get("optimizer", {}))
        best = groups.get("best")
        if best is not None:
            _check_weights(self.scored.module, best)
            self.best = {name: tensor.to(self.device) for name, tensor in best.items()}
        self.best_epoch, self.log, self.halted = progress["best_epoch"], progress["log"], progress["halted"]
        self.best_score = -math.inf if progress["best_score"] is None else progress["best_score"]
        self.objective.load({name: tensor.to(self.device) for name, tensor in groups.get("objective", {}).items()})

    def _save(self) -> None:
        if self.out is None:
            return
        groups: dict[str, Mapping[str, Tensor]] = {
            "model": named_tensors(self.model.module),
            "average": named_tensors(self.average.module) if self.average is not None else {},
            "best": self.best or {},
            "optimizer": _optimizer_tensors(self.optimizer),
            "objective": self.objective.state(),
        }
        tensors = {f"{group}/{name}": tensor for group, held in groups.items() for name, tensor in held.items()}
        entries = log_entries(self.log)
        progress = canonical_json(
            {
                "epochs": len(self.log),
                "best_epoch": self.best_epoch,
                "best_score": self.best_score if math.isfinite(self.best_score) else None,
                "log": entries,
                "halted": self.halted,
            }
        )
        metadata = {"format": FORMAT, "fingerprint": self.mark, "progress": progress, "seal": _seal(tensors, progress)}
        write_atomically(self.out / CHECKPOINT, pack(tensors, metadata))
        write_atomically(self.out / "log.json", (json.dumps(entries, indent=1) + "\n").encode())


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """CheckpointError where a training checkpoint does not hold the state of this training: a seal is no signature."""
    try:
        yield
    except AdvkitError:
        raise
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} holds no state of this training ({first_line(error)}): remove it and train again"
        ) from error


def _progress(text: str, epochs: int) -> dict[str, Any]:
    """How far a training is; ValueError and its kin where the text does not say it."""
    read = read_object(text)
    found = [_entry(each) for each in read["log"]]
    if read["epochs"] != len(found) or not 1 <= len(found) <= epochs:
        raise ValueError(f"it is after {len(found)} of {epochs} epochs")
    if [each.epoch for each in found] != list(range(1, len(found) + 1)):
        raise ValueError("its epochs are not in order")
    best, score = read["best_epoch"], read["best_score"]
    if type(best) is not int or not len(found) // epochs <= best <= len(found):  # the last epoch is always scored
        raise ValueError(f"its best epoch is {best!r:.40}")
    best_score = None if score is None else _number(score)
    halted = read.get("halted", "")
    if type(halted) is not str:
        raise ValueError(f"it says {halted!r:.40} of why it ended")
    return {"epochs": len(found), "log": found, "best_epoch": best, "best_score": best_score, "halted": halted}


def _entry(written: Mapping[str, Any]) -> Epoch:
    """The inverse of `log_entries`, for one epoch; figures came later than the rest."""
    values: dict[str, Any] = {
        key: value if key == "epoch" else _number(value) for key, value in written.items() if key != "figures"
    }
    figures = {key: _number(value) for key, value in dict(written.get("figures", {})).items()}
    return Epoch(**values, figures=figures)


def _number(value: Any) -> float:
    """A number of the log; NaN for null, which is what was not measured."""
    if value is None:
        return math.nan
    if type(value) not in (int, float):
        raise ValueError(f"{value!r:.40} is no number")
    return float(value)


def log_entries(log: Sequence[Epoch]) -> list[dict[str, Any]]:
    """The log as JSON values: null for what was not measured, since JSON has no NaN."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(each) for key, each in value.items()}
        return None if isinstance(value, float) and math.isnan(value) else value

    return [plain(asdict(epoch)) for epoch in log]


def _mean(parts: Sequence[Tensor]) -> float:
    return float(torch.cat(list(parts)).double().mean())


def _tail(scores: Tensor, y: Tensor) -> float:
    """Mean over the weakest 30 % of the classes of their mean scores."""
    means = {label: float(scores[y == label].double().mean()) for label in sorted(set(y.tolist()))}
    weak = weakest(means)
    return sum(means[label] for label in weak) / len(weak)


class _Finite:
    """The first step whose loss was not finite; on an accelerator asked now and then, since asking means waiting."""

    EVERY = 32

    def __init__(self, device: torch.device) -> None:
        self.every = 1 if device.type == "cpu" else self.EVERY
        self.steps: list[int] = []
        self.losses: list[Tensor] = []

    def look(self, step: int, loss: Tensor) -> int | None:
        """The first bad step where it is time to ask, else None."""
        self.steps.append(step)
        self.losses.append(loss.detach())
        return self.first() if len(self.steps) >= self.every else None

    def first(self) -> int | None:
        """The first bad step among those not asked for yet."""
        if not self.steps:
            return None
        values = torch.stack(self.losses).tolist()
        steps, self.steps, self.losses = self.steps, [], []
        return next((step for step, value in zip(steps, values, strict=True) if not math.isfinite(value)), None)


def _seal(tensors: Mapping[str, Tensor], progress: str) -> str:
    return hashlib.sha256(f"{tensors_sha256(tensors.items())}|{progress}".encode()).hexdigest()


def _optimizer(module: nn.Module, further: Sequence[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = []
    for parameters in (module.parameters(), further):
        live = [parameter for parameter in parameters if parameter.requires_grad]
        groups.append({"params": [p for p in live if p.dim() > 1], "weight_decay": recipe.weight_decay})
        groups.append({"params": [p for p in live if p.dim() <= 1], "weight_decay": 0.0})
    groups = [group for group in groups if group["params"]]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum)
    if recipe.optimizer == "lars":
        return LARS(groups, lr=recipe.lr, momentum=recipe.momentum)
    return torch.optim.Adam(groups, lr=recipe.lr)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of every parameter as place/key; hyper-parameters come from the recipe."""
    state = optimizer.state_dict()["state"]
    return {
        f"{place}/{key}": value
        for place, values in state.items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        place, _, key = name.partition("/")
        state.setdefault(int(place), {})[key] = tensor
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    kinds = {frozenset(held) for held in state.values()}
    if not set(state) <= set(range(len(parameters))) or len(kinds) > 1:
        raise ValueError("the optimiser's state is not that of these parameters")
    for number, held in state.items():
        if any(tensor.ndim and tensor.shape != parameters[number].shape for tensor in held.values()):
            raise ValueError("the optimiser's state has other shapes than the parameters")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _check_weights(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    wanted = {name: (tensor.shape, tensor.dtype) for name, tensor in named_tensors(module).items()}
    if wanted != {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}:
        raise CheckpointError("the training checkpoint's weights are not this model's; remove it and train again")


def _fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    _check_weights(module, tensors)
    wanted = named_tensors(module)
    with torch.no_grad():
        for name, tensor in tensors.items():
            wanted[name].copy_(tensor)


def _average(average: nn.Module, module: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * module; buffers (running statistics, counters) are copied."""
    with torch.no_grad():
        for mean, parameter in zip(average.parameters(), module.parameters(), strict=True):
            mean.lerp_(parameter, 1 - decay)
        for held, buffer in zip(average.buffers(), module.buffers(), strict=True):
            held.copy_(buffer)


class _Bar:
    """The progress bar, or nothing where nobody looks."""

    def __init__(self, shown: Any, task: Any, per_epoch: int) -> None:
        self.shown, self.task, self.per_epoch = shown, task, per_epoch

    def start(self, epochs: int) -> None:
        if self.shown is not None:
            self.shown.update(self.task, completed=epochs * self.per_epoch)

    def advance(self) -> None:
        if self.shown is not None:
            self.shown.advance(self.task)

    def report(self, entry: Epoch) -> None:
        if self.shown is not None:
            measured = "" if math.isnan(entry.score) else f", validation {entry.score:.3f}"
            self.shown.update(self.task, description=f"epoch {entry.epoch}: loss {entry.loss:.3f}{measured}")


@contextmanager
def _bar(progress: bool, epochs: int, per_epoch: int) -> Iterator[_Bar]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not progress or not console.is_terminal:
        yield _Bar(None, None, per_epoch)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as shown:
        yield _Bar(shown, shown.add_task("training", total=epochs * per_epoch), per_epoch)
