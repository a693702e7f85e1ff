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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advkit.core.errors import BadInput, BadModel, CheckpointError, StaleRun, UsageError
from advkit.core.protocols import Data, Rng, answer_shape
from advkit.core.rng import RowRng
from advkit.core.tail import weakest
from advkit.core.text import first_line
from advkit.core.watching import watcher
from advkit.models.checkpoint import canonical_json, pack, read_checked, unpack, write_atomically
from advkit.models.torch import TorchModel, named_tensors, tensors_sha256
from advkit.training.augment import AUGMENTATIONS
from advkit.training.ranks import ALONE, Ranks, check_rows, least_rows
from advkit.training.recipe import Recipe as Recipe
from advkit.training.recipe import optimizer_of
from advkit.training.stored import CHECKPOINT as CHECKPOINT
from advkit.training.stored import (
    FORMAT,
    check_weights,
    fill,
    load_optimizer,
    optimizer_tensors,
    progress_of,
    readable,
    seal,
)
from advkit.training.stored import Epoch as Epoch
from advkit.training.stored import log_entries as log_entries

log = logging.getLogger("advkit")

LOSS_SCALE = "loss_scale"
"""In the log's figures of float16 training: what the loss is multiplied with at the end of the epoch."""
_LABELS, _SCORES, _CLEAN = "labels of the rows", "scores of the rows", "correctness of the rows"
TAIL_SCORE = "tail_30_score"
"""In the log's figures: the mean score of the weakest 30 % of the classes, on the validation rows."""
RESIDENT = 4 * 2**30
"""Bytes of training rows that are kept on an accelerator as a whole; larger sets travel batch by batch."""


def correct(model: Any, x: Tensor, y: Tensor, clean: Tensor | None = None) -> Tensor:
    """Float [B]: 1 where the model's largest logit is the label's.

    Of a model that answers samples, 1 minus the root mean squared error to the clean sample, x where none is given.
    """
    with torch.no_grad():
        answer: Tensor = model(x)
    if answer_shape(model):
        return 1 - (answer - (x if clean is None else clean)).square().flatten(1).mean(1).sqrt()
    return (answer.argmax(dim=1) == y).float()


class Objective:
    """The loss of a training run, with whatever state it keeps; the base class is plain cross-entropy.

    Of models that answer samples it is the mean squared error to the clean ones.

    A defense makes a fresh one for every run. Rows are given by their place in the training data, validation rows
    included, as a long tensor on the device of x; rng holds one stream per row of the batch.

    replays:    optimiser steps in a row on every batch, each with a loss of its own. The recipe's epochs count steps:
                the loop makes max(1, ceil(epochs / replays)) passes over the data, and each is an epoch of the log
    rolls_back: whether a run that `review` ends hands back its best-scored weights, whatever the recipe selects
    whole:      why a batch can't be taken in pieces (the recipe's accumulate); empty where it can
    eager:      why the network can't be compiled (the recipe's compile); empty where it can

    On several processes every one has an objective and calls it on its share of each batch. `advkit.training.ranks`
    has the rows of the others (`gathered`) for losses that couple the rows of a batch.
    """

    replays: int = 1
    rolls_back: bool = False
    whole: str = ""
    eager: str = ""

    @property
    def for_samples(self) -> bool:
        """Whether it trains models that answer samples, too; losses on classes do not."""
        return type(self) is Objective

    def prepare(self, model: TorchModel, data: Data, rng: Rng) -> None:
        """Called once before the first epoch with the initial weights, and again when a run is resumed.

        Must be deterministic: what it makes is not stored, only what `state` returns.
        """

    def loss(self, model: TorchModel, x: Tensor, y: Tensor, rows: Tensor, rng: Rng) -> Tensor:
        """The scalar to descend on a batch of augmented clean rows; the model's module is in training mode."""
        return F.mse_loss(model(x), x) if answer_shape(model) else F.cross_entropy(model(x), y)

    def parameters(self) -> Sequence[nn.Parameter]:
        """Weights of the objective's own that are trained with the model's; asked for after `prepare`.

        They are no part of the model that comes out. `state` must return them, as everything else that lives on.
        """
        return ()

    def buffers(self) -> Sequence[Tensor]:
        """Running statistics of the objective's own: of several processes, those of the first are everyone's."""
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


class _Loss(nn.Module):
    """The objective's loss as one module, which has all weights that are trained, and is called once in a step.

    Buffers are not its own: copies of them are made after a step (`Objective.stepped`), when all processes must have
    the same, and not before the next one, as DistributedDataParallel would see to it.
    """

    def __init__(self, objective: Objective, model: TorchModel, further: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.objective, self.model = objective, model
        self.weights = nn.ParameterList(dict.fromkeys((*model.module.parameters(), *further)))
        # DistributedDataParallel warns of looking for weights without a gradient where there are none
        self.without = nn.Parameter(torch.zeros((), device=model.device))

    def forward(self, x: Tensor, y: Tensor, rows: Tensor, rng: Rng) -> Tensor:
        return self.objective.loss(self.model, x, y, rows, rng)


@dataclass(frozen=True)
class _Piece:
    """This process's rows of a piece of a batch.

    sizes: how many rows every process has of the piece
    """

    x: Tensor
    y: Tensor
    rows: Tensor
    streams: RowRng
    sizes: tuple[int, ...]


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
    ranks: Ranks = ALONE,
) -> Fit:
    """Train a copy of the model; the caller's keeps its weights, mode, gradients and device.

    device:   where to train (default: where the model is)
    out:      folder of the run. Its checkpoint is replaced after every epoch and taken up again by the next call
    progress: tell whoever watches (`core.watching`), else show a bar where standard error is a terminal
    ranks:    the processes that train together (`advkit.training.ranks.joined`), which all make this call with the same
              arguments, each with a device of its own; they get the same weights and log

    Raises BadInput for data outside the model's space or labels out of range, BadModel for a model that can't be
    trained, StaleRun where `out` holds another run, UsageError where the loss becomes NaN or infinite. Of several
    processes one raises that, the others EndedElsewhere; LostProcess where one of them is gone.
    """
    with ranks.agreed():
        if not isinstance(model, TorchModel):
            raise BadModel(f"only torch models are trained here, got {type(model).__name__}")
        held = validation_rows(len(data), recipe.validation)
        _check(model, data, held)
        _check_answers(model, data, objective)
        check_rows(len(data) - held, recipe.batch_size, ranks, _batch_statistics(model.module))
        _check_speed(objective, recipe)
    place = model.device if device is None else torch.device(device)
    with _own_randomness(place):
        run = _Run(model, data, objective, recipe, rng, place, None if out is None else Path(out), held, ranks)
        with ranks.listening(run.kept), _compiling(recipe.compile):
            return run.play(progress and ranks.first)


def _check(model: TorchModel, data: Data, held: int) -> None:
    if len(data) - held < 1:
        raise BadInput(f"{len(data)} training samples leave none to train on after {held} for validation")
    if len(data.x) != len(data.y):
        raise BadInput(f"{len(data.x)} training samples and {len(data.y)} labels; expected one label per sample")
    if not data.answer_shape and (int(data.y.min()) < 0 or int(data.y.max()) >= data.classes):
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


def _check_answers(model: TorchModel, data: Data, objective: Objective) -> None:
    """Raise where samples are to be recovered and the loss is about classes, or the model answers the other kind."""
    given = answer_shape(model)
    if given != data.answer_shape:
        seen = f"samples {list(given)}" if given else "classes"
        wanted = f"samples {list(data.answer_shape)}" if data.answer_shape else f"{data.classes} classes"
        raise BadModel(f"{model.name} answers {seen}, and the training data {data.name} wants {wanted}")
    if given and not objective.for_samples:
        raise UsageError(
            f"{data.name} has samples to recover and no classes, and {type(objective).__name__} is a loss on classes: "
            "train with none, or with fo_ds, zo_ds, fo_ae_ds or zo_ae_ds"
        )


@contextmanager
def _compiling(wanted: bool) -> Iterator[None]:
    """UsageError where torch.compile fails: no compiler here, or a network that is not for it."""
    try:
        yield
    except RuntimeError as error:
        if not wanted or not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        raise UsageError(
            f"compile=true, and torch can't compile the network here ({first_line(error)}): leave compile out"
        ) from error


def _check_speed(objective: Objective, recipe: Recipe) -> None:
    if recipe.accumulate > 1 and objective.whole:
        raise UsageError(f"accumulate={recipe.accumulate}, and {objective.whole}: leave accumulate out")
    if recipe.compile and objective.eager:
        raise UsageError(f"compile=true, and {objective.eager}: leave compile out")


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
        ranks: Ranks,
    ) -> None:
        self.data, self.objective, self.recipe, self.rng, self.ranks = data, objective, recipe, rng, ranks
        self.device, self.out, self.held = device, out, held
        self.initial = model.state_sha256() if out is not None or ranks.world > 1 else ""
        self.model = model.copy()
        self.model.module.to(device)
        if recipe.channels_last:
            self.model.module.to(memory_format=torch.channels_last)
        self.least = least_rows(ranks, _batch_statistics(model.module))
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.half == torch.float16)
        self.average = self.model.copy() if recipe.ema else None
        whole = data.x.numel() * data.x.element_size() <= RESIDENT
        self.x = data.x.to(device) if whole else data.x
        self.y = data.y.to(device) if whole else data.y
        seed = rng.at("rows").generator().initial_seed()
        self.streams = RowRng.from_ids(seed, [str(row) for row in range(len(data))], device)
        self.passes = max(1, math.ceil(recipe.epochs / objective.replays))
        self.log: list[Epoch] = []
        self.halted = ""
        self.stored = 0
        """The last epoch that the folder's checkpoint has."""
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
            with self.ranks.agreed():
                self.objective.prepare(self.model, self.data, self.rng.at("prepare"))
            further = self.objective.parameters()
            self.optimizer = optimizer_of(self.model.module, further, recipe)
            if recipe.compile:
                self.model.module.compile()  # in place: no name changes, and copies are not compiled
            self.loss = self.ranks.wrapped(_Loss(self.objective, self.model, further))
        if saved is not None:
            with self.ranks.agreed():
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
            fill(best.module, self.best)
        for one in (last, best):
            if recipe.channels_last:
                one.module.to(memory_format=torch.contiguous_format)
            one.source = f"trained on {self.data.name}" if self.data.name else "trained by advkit"
        return Fit(best, last, tuple(self.log), chosen, self.halted)

    def _finished(self, progress: Mapping[str, Any]) -> bool:
        """Whether a saved run has nothing left to train."""
        return progress["epochs"] >= self.passes or bool(progress["halted"])

    def _batches(self, epoch: int) -> list[Tensor]:
        generator = self.rng.at("shuffle", epoch).generator()
        order = torch.randperm(len(self.data) - self.held, generator=generator) + self.held
        batches = list(torch.split(order, self.recipe.batch_size))
        if len(batches) > 1 and len(batches[-1]) < max(2, self.least):
            # batch normalisation has no statistics of a single row, and a process without rows has no gradient
            batches[-2:] = [torch.cat(batches[-2:])]
        return batches

    def _batches_per_epoch(self) -> int:
        rows, size = len(self.data) - self.held, self.recipe.batch_size
        whole, rest = divmod(rows, size)
        return max(1, whole + (rest >= max(2, self.least) or (rest > 0 and whole == 0)))

    def _rows(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x, y and the rows themselves, on the device."""
        index = rows.to(self.x.device)
        x, y = self.x.index_select(0, index), self.y.index_select(0, index)
        return self._laid_out(x.to(self.device)), y.to(self.device), rows.to(self.device)

    def _laid_out(self, x: Tensor) -> Tensor:
        """The rows in the recipe's memory layout."""
        last = self.recipe.channels_last and x.dim() == 4
        return x.contiguous(memory_format=torch.channels_last) if last else x

    def _pieces(self, batch: Tensor, streams: RowRng) -> list[_Piece]:
        """This process's share of a batch, augmented, in as many pieces as the recipe says or as there are rows for."""
        number = max(1, min(self.recipe.accumulate, len(batch) // self.least))
        augment = AUGMENTATIONS[self.recipe.augment]
        made = []
        for chosen, sizes in self.ranks.pieces(batch, number):
            x, y, rows = self._rows(chosen)
            own = streams.take(rows)
            if augment is not None:
                x = self._laid_out(augment(x, own.at("augment")))
            made.append(_Piece(x, y, rows, own, sizes))
        return made

    def _gradients(self, pieces: Sequence[_Piece], batch: int, names: Sequence[object]) -> Tensor:
        """Leave the gradient of the batch's mean loss on the weights; returns the sum of this process's losses."""
        total = torch.zeros((), device=self.device)
        for piece in pieces:
            last = piece is pieces[-1]
            with nullcontext() if last else self.ranks.silent(self.loss):
                with (
                    torch.autocast(self.device.type, dtype=self.recipe.half, enabled=self.recipe.half is not None),
                    self.ranks.working_on(piece.sizes),
                ):
                    loss = self.loss(piece.x, piece.y, piece.rows, piece.streams.at(*names))
                weight = self.ranks.weight(len(piece.rows), batch)
                self.scaler.scale(loss if weight == 1 else loss * weight).backward()
            total += loss.detach() * len(piece.rows)
        return total

    def _epoch(self, epoch: int, bar: _Bar) -> None:
        started = time.perf_counter()
        recipe, module, ranks = self.recipe, self.model.module, self.ranks
        # dropout masks are no row's own: every process draws others
        own = () if ranks.first else ("process", ranks.rank)
        _seed(self.rng.at("torch", epoch, *own).generator(), self.device)
        streams = self.streams.at("epoch", epoch)
        batches = self._batches(epoch)
        replays = self.objective.replays
        steps = self.passes * len(batches) * replays
        total = torch.zeros((), device=self.device)
        rate = recipe.lr
        finite = _Finite(self.device, ranks)
        for number, chosen in enumerate(batches):
            pieces = self._pieces(chosen, streams)
            for replay in range(replays):
                step = ((epoch - 1) * len(batches) + number) * replays + replay
                rate = recipe.lr_at(step, steps)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                module.train()
                self.optimizer.zero_grad(set_to_none=True)
                loss = self._gradients(pieces, len(chosen), ("objective", replay) if replay else ("objective",))
                bad = finite.look(step, loss)
                if bad is not None:
                    self._diverged(bad, steps, epoch)
                self.scaler.step(self.optimizer)
                self.scaler.update()
                ranks.share_buffers((*module.buffers(), *self.objective.buffers()))
                self.objective.stepped(self.model)
                if self.average is not None:
                    _average(self.average.module, module, min(recipe.ema, (1 + step) / (10 + step)))
                total += loss
            bar.advance()
        bad = finite.first()
        if bad is not None:
            self._diverged(bad, steps, epoch)
        mean = sum(ranks.everyone(float(total))) / (replays * (len(self.data) - self.held))
        figures: dict[str, float] = {}
        if self.scaler.is_enabled():
            figures[LOSS_SCALE] = self.scaler.get_scale()
            if figures[LOSS_SCALE] < 1:
                self._end(f"training diverged: float16 gradients overflow in epoch {epoch} at any scale; use bf16")
        score, clean = math.nan, math.nan
        if self.held and (epoch % recipe.select_every == 0 or epoch == self.passes):
            score, clean, measured = self._score()
            figures |= measured
            if not math.isfinite(score):
                self._end(f"the validation score of epoch {epoch} is {score}; expected finite scores")
        entry = Epoch(epoch, mean, score, clean, time.perf_counter() - started, rate, figures)
        with ranks.agreed():
            review = self.objective.review(entry, tuple(self.log))
        review = ranks.from_first(review)
        self.log.append(replace(entry, figures={**figures, **review.figures}))
        self._select(epoch, score, review)
        self.halted = review.halt
        bar.report(self.log[-1])
        log.debug("epoch %d: loss %.4f, score %.4f, clean %.4f", epoch, mean, score, clean)

    def _diverged(self, step: int, steps: int, epoch: int) -> None:
        rate, kept = self.recipe.lr_at(step, steps), self.kept()
        self._end(
            f"training diverged: the loss of step {step + 1} of {steps} (epoch {epoch}) is not finite at learning rate "
            f"{rate:.3g}; lower lr" + (f"; {kept}" if kept else "")
        )

    def _end(self, words: str) -> None:
        """What all processes have found alike ends the training; the first says it."""
        with self.ranks.agreed():
            raise UsageError(words)

    def kept(self) -> str:
        """What is there of the run if it ends now, in words."""
        return f"the checkpoint of epoch {self.stored} stays in {self.out}" if self.out and self.stored else ""

    def _select(self, epoch: int, score: float, review: Review) -> None:
        if not self.held or (self.recipe.select == "last" and not self.objective.rolls_back):
            self.best_epoch = epoch
        elif score > self.best_score and (self.best is None or not review.halt):
            # an epoch that ends the run is none to go back to, unless it is the first one
            self.best_score, self.best_epoch = score, epoch
            state = named_tensors(self.scored.module)
            self.best = {name: tensor.detach().clone() for name, tensor in state.items()}

    def _score(self) -> tuple[float, float, dict[str, float]]:
        """Mean score, clean accuracy and further figures over the validation rows, of which every process takes some.

        All have the same figures in the end, and so decide alike.
        """
        model, objective = self.scored, self.objective
        model.module.eval()
        streams = self.streams.at("validation")
        plain = type(objective).score is Objective.score
        own: list[dict[str, Tensor]] = []
        mine = self.ranks.split(torch.arange(self.held))[self.ranks.rank]
        for chosen in torch.split(mine, max(256, self.recipe.batch_size)) if len(mine) else ():
            x, y, rows = self._rows(chosen)
            score = objective.score(model, x, y, rows, streams.take(rows)).detach().float().cpu()
            clean = score if plain else correct(model, x, y).cpu()
            found = {_LABELS: y.cpu(), _SCORES: score, _CLEAN: clean}
            for name, each in objective.measures(model, x, y, rows, streams.take(rows)).items():
                found[name] = each.detach().float().cpu()
            own.append(found)
        every = [found for one in self.ranks.everyone(own) for found in one]
        whole = {name: torch.cat([found[name] for found in every]) for name in every[0]}
        labels, scores, cleans = (whole.pop(name) for name in (_LABELS, _SCORES, _CLEAN))
        figures = {name: _mean(each) for name, each in whole.items()}
        figures[TAIL_SCORE] = _tail(scores, labels)
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
        """Tensors and progress of an earlier call, or None; StaleRun where the folder is another run's.

        The first process reads; a folder that the others don't have is no hindrance.
        """
        ranks = self.ranks
        if self.out is None and ranks.world == 1:
            return None
        self.mark = self._fingerprint()
        with ranks.agreed():
            other = next((rank for rank, mark in enumerate(ranks.everyone(self.mark)) if mark != self.mark), None)
            if other is not None:
                raise UsageError(f"processes {ranks.rank} and {other} have other data, models, recipes or seeds")
        with ranks.agreed():
            found = self._read(self.out) if self.out is not None and ranks.first else None
        return ranks.from_first(found)

    def _read(self, out: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        path = out / CHECKPOINT
        for unfinished in path.parent.glob(f".{CHECKPOINT}.*"):
            unfinished.unlink(missing_ok=True)  # left by a process that was killed while writing
        if not path.exists():
            return None
        tensors, metadata = unpack(read_checked(path), path)
        if metadata.get("format") != FORMAT:
            raise CheckpointError(f"{path} is no training checkpoint; choose another folder for this run")
        if metadata.get("fingerprint") != self.mark:
            raise StaleRun(
                f"{out} holds the training of another model, data set, recipe, objective or seed; choose another "
                "folder, or remove it"
            )
        if metadata.get("seal") != seal(tensors, metadata.get("progress", "")):
            raise CheckpointError(f"{path} is damaged; remove it and train again")
        with readable(path):
            progress = progress_of(metadata["progress"], self.passes)
        if progress["ranks"] != self.ranks.world:
            raise StaleRun(
                f"{out} holds a training on {progress['ranks']} processes, this one runs on {self.ranks.world}: "
                f"start {progress['ranks']} (torchrun --nproc-per-node), choose another folder, or remove it"
            )
        return tensors, progress

    def _restore(self, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
        assert self.out is not None
        with readable(self.out / CHECKPOINT):
            self._take(tensors, progress)
        self.stored = len(self.log)
        log.info("training goes on after epoch %d of %d", len(self.log), self.passes)

    def _take(self, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
        groups: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            group, _, rest = name.partition("/")
            groups.setdefault(group, {})[rest] = tensor
        fill(self.model.module, groups["model"])
        if self.average is not None:
            fill(self.average.module, groups["average"])
        if not self._finished(progress):  # else there was no need to prepare, and nothing steps any more
            load_optimizer(self.optimizer, groups.get("optimizer", {}))
            if self.scaler.is_enabled():
                held = self._scaling()
                self.scaler.load_state_dict({name: type(held[name])(value) for name, value in groups["scaler"].items()})
        best = groups.get("best")
        if best is not None:
            check_weights(self.scored.module, best)
            self.best = {name: tensor.to(self.device) for name, tensor in best.items()}
        self.best_epoch, self.log, self.halted = progress["best_epoch"], progress["log"], progress["halted"]
        self.best_score = -math.inf if progress["best_score"] is None else progress["best_score"]
        own = groups.get(f"objective@{self.ranks.rank}", groups.get("objective", {}))
        self.objective.load({name: tensor.to(self.device) for name, tensor in own.items()})

    def _objective_states(self) -> dict[str, Mapping[str, Tensor]]:
        """The objective's state at the first process, and at those others where it is another one."""
        state = {name: tensor.detach().cpu() for name, tensor in self.objective.state().items()}
        marks = self.ranks.everyone(tensors_sha256(state.items()) if self.ranks.world > 1 else "")
        states = [state]
        if len(set(marks)) > 1:
            states = self.ranks.to_first({} if marks[self.ranks.rank] == marks[0] else state)
        own = {f"objective@{rank}": other for rank, other in enumerate(states) if marks[rank] != marks[0]}
        return {"objective": state, **own}

    def _save(self) -> None:
        if self.out is None:
            return
        states = self._objective_states()
        with self.ranks.agreed():
            if self.ranks.first:
                self._write(self.out, states)
        self.stored = len(self.log)  # not before it is on disk, whichever process says so

    def _write(self, out: Path, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        groups: dict[str, Mapping[str, Tensor]] = {
            "model": named_tensors(self.model.module),
            "average": named_tensors(self.average.module) if self.average is not None else {},
            "best": self.best or {},
            "optimizer": optimizer_tensors(self.optimizer),
            "scaler": {name: torch.tensor(float(value)) for name, value in self._scaling().items()},
            **states,
        }
        tensors = {f"{group}/{name}": tensor for group, held in groups.items() for name, tensor in held.items()}
        entries = log_entries(self.log)
        told: dict[str, Any] = {
            "epochs": len(self.log),
            "best_epoch": self.best_epoch,
            "best_score": self.best_score if math.isfinite(self.best_score) else None,
            "log": entries,
            "halted": self.halted,
        }
        if self.ranks.world > 1:
            told["ranks"] = self.ranks.world
        progress = canonical_json(told)
        metadata = {"format": FORMAT, "fingerprint": self.mark, "progress": progress, "seal": seal(tensors, progress)}
        write_atomically(out / CHECKPOINT, pack(tensors, metadata))
        write_atomically(out / "log.json", (json.dumps(entries, indent=1) + "\n").encode())

    def _scaling(self) -> dict[str, Any]:
        """What the scale of float16's loss depends on; empty where there is none."""
        return self.scaler.state_dict() if self.scaler.is_enabled() else {}


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def _tail(scores: Tensor, y: Tensor) -> float:
    """Mean over the weakest 30 % of the classes of their mean scores."""
    means = {label: float(scores[y == label].double().mean()) for label in sorted(set(y.tolist()))}
    weak = weakest(means)
    return sum(means[label] for label in weak) / len(weak)


class _Finite:
    """The first step whose loss was not finite; on an accelerator asked now and then, since asking means waiting."""

    EVERY = 32

    def __init__(self, device: torch.device, ranks: Ranks) -> None:
        self.every = 1 if device.type == "cpu" else self.EVERY
        self.ranks = ranks
        self.steps: list[int] = []
        self.losses: list[Tensor] = []

    def look(self, step: int, loss: Tensor) -> int | None:
        """The first bad step where it is time to ask, else None."""
        self.steps.append(step)
        self.losses.append(loss.detach())
        return self.first() if len(self.steps) >= self.every else None

    def first(self) -> int | None:
        """The first bad step, at any process, among those not asked for yet."""
        if not self.steps:
            return None
        values = torch.stack(self.losses).tolist()
        steps, self.steps, self.losses = self.steps, [], []
        bad = (step for step, value in zip(steps, values, strict=True) if not math.isfinite(value))
        return self.ranks.earliest(next(bad, None))


def _average(average: nn.Module, module: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * module; buffers (running statistics, counters) are copied."""
    with torch.no_grad():
        for mean, parameter in zip(average.parameters(), module.parameters(), strict=True):
            mean.lerp_(parameter, 1 - decay)
        for held, buffer in zip(average.buffers(), module.buffers(), strict=True):
            held.copy_(buffer)


class _Bar:
    """Tells how far a training is; nobody where `tell` is None."""

    def __init__(self, tell: Callable[[int, str], None] | None, per_epoch: int) -> None:
        self.tell, self.per_epoch = tell, per_epoch
        self.done, self.said = 0, ""

    def start(self, epochs: int) -> None:
        self._at(epochs * self.per_epoch)

    def advance(self) -> None:
        self._at(self.done + 1)

    def report(self, entry: Epoch) -> None:
        measured = "" if math.isnan(entry.score) else f", validation {entry.score:.3f}"
        self.said = f"epoch {entry.epoch}: loss {entry.loss:.3f}{measured}"
        self._at(self.done)

    def _at(self, done: int) -> None:
        self.done = done
        if self.tell is not None:
            self.tell(done, self.said)


@contextmanager
def _bar(progress: bool, epochs: int, per_epoch: int) -> Iterator[_Bar]:
    """Whoever watches is told; a bar of its own is shown on a terminal that nobody else writes to."""
    batches, told = epochs * per_epoch, watcher()
    if progress and told is not None:
        yield _Bar(lambda done, said: told.works("training", done, batches, said), per_epoch)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not progress or not console.is_terminal:
        yield _Bar(None, per_epoch)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task("training", total=batches)
        yield _Bar(lambda done, said: shown.update(task, completed=done, description=said or "training"), per_epoch)
