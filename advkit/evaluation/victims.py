"""From names to protected models: the embedded zoo, the user's cache, or training it now."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advkit.core.checks import whole
from advkit.core.errors import (
    AdvkitError,
    BadModel,
    CheckpointError,
    NoTrainingData,
    SpecError,
    StaleRun,
    UnknownName,
    UsageError,
)
from advkit.core.files import LOCK, cache_root, claimed, why, write_whole
from advkit.core.protocols import (
    Bindable,
    Captioned,
    CountsQueries,
    Deploys,
    KnowsClasses,
    Learns,
    Solves,
    TakesCaptions,
    Task,
    Trains,
    TrainsApart,
    TrainsFront,
    answer_shape,
)
from advkit.core.registry import Registry, outside
from advkit.core.rng import RowRng
from advkit.core.spaces import Transcripts
from advkit.core.state import plainly
from advkit.defenses import DEFENSES
from advkit.evaluation.screen import Works
from advkit.models import MODELS
from advkit.models.external import PythonFactory
from advkit.models.reconstructor import Reconstructor
from advkit.tasks.base import ClassificationTask

if TYPE_CHECKING:
    from advkit.training.recipes.files import RecipeFile

log = logging.getLogger("advkit")

MARK = "training.sha256"
_FEW = 2_000_000
"""Numbers of a training set of which what was learned is kept in memory."""
_KEPT = 16
_learned_here: dict[tuple[str, int, str], Any] = {}


@dataclass(frozen=True)
class Victim:
    """A protected model and where it came from.

    model:   what the verdicts ask
    origin:  "zoo:NAME", "trained here, seed 0", the spec of a model that was ready, or "given"
    defense: spec of the defense as its weights were really trained; empty where that is the one asked for
    card:    the zoo card's measured figures and settings, or {}
    solved:  what the defense's solver said of the model (`protocols.Solves`), or {}
    """

    model: Any
    origin: str
    defense: str = ""
    card: dict[str, Any] = field(default_factory=dict)
    solved: dict[str, Any] = field(default_factory=dict)


def training_rng(seed: int) -> RowRng:
    """The stream that a training run draws from."""
    return RowRng.from_ids(seed, ["training"]).at("train")


def _row_shape(task: Any) -> tuple[int, ...]:
    if task.space is None:  # its rows wait for a model's space: they have no shape before
        return ()
    return tuple(next(iter(task.batches(1))).x.shape[1:])


def model_part(spec: Any) -> tuple[Any, bool]:
    """What a spec or object stands for, and whether it is a builder of the registry (else it is a model itself)."""
    part = MODELS.build(spec)
    try:
        MODELS.name_of(part)
    except UnknownName:
        from advkit.models.torch import Architecture

        return part, isinstance(part, Architecture)
    return part, True


def ready(spec: Any, task: Any, sample_timeout: float | None = None) -> Any:
    """A trained model from a spec or an object; raises BadModel for an architecture without weights.

    sample_timeout: seconds that its first call may take per sample; None sets no limit
    """
    from advkit.evaluation.first_call import introduced
    from advkit.models.torch import Architecture, as_model, is_model

    part, builder = model_part(spec)
    if isinstance(part, Architecture):
        raise BadModel(f"{spec} is an architecture without weights: name a trained model, e.g. zoo:NAME or path:FILE")
    made = part
    if builder:  # a model that was handed over keeps the captions that it has
        wanted = answer_shape(task)
        more = {"answer_shape": wanted} if wanted and isinstance(part, PythonFactory) else {}
        made = part(_row_shape(task), task.classes, training_rng(0), space=task.space, **more)
        made = with_captions_of(task, made)
    model = introduced(as_model(made, task), task, wrapped=not is_model(made), sample_timeout=sample_timeout)
    return agreeing(model, task)


def agreeing(model: Any, task: Task) -> Any:
    """The model, where it answers the task's classes, or more than a task shows that only knows its labels.

    BadModel names both numbers otherwise.
    """
    if task.space is None:  # a task that waits for a model's space says itself which models it is for
        return model
    if isinstance(model.space, Transcripts) and not isinstance(task.space, Transcripts):
        raise BadModel(f"a language model reads prompts, and the task {task.name} has none: --task prompts:file=FILE")
    if wanted := answer_shape(task):
        _check_recovers(model, task, wanted)
        return model
    classes = model.classes if isinstance(model, KnowsClasses) else None
    if classes is None or classes == task.classes or (_counts_labels(task) and classes > task.classes):
        return model
    raise BadModel(
        f"the model answers {classes} classes, the task {task.name} has {task.classes}: choose a model trained for "
        "this task"
        + (", or say classes= in the task" if _may_have_more(task) else "")
        + ("; labels count from 0" if classes + 1 == task.classes else "")
    )


def _check_recovers(model: Any, task: Task, wanted: tuple[int, ...]) -> None:
    """BadModel where a model is known to answer something else than samples of that shape."""
    classes = model.classes if isinstance(model, KnowsClasses) else None
    given = answer_shape(model)
    if classes is not None or (given and given != wanted):
        seen = f"samples {list(given)}" if given else f"{classes} classes"
        raise BadModel(
            f"the model answers {seen}, and the task {task.name} wants reconstructed samples {list(wanted)}: use "
            "reconstructor, or a function or module whose answer has that shape"
        )


def with_classes_of(task: Task, model: Any) -> Task:
    """The task with the model's number of classes, where the task knows no more than the labels that occur."""
    classes = model.classes if isinstance(model, KnowsClasses) else None
    if classes is None or not isinstance(task, ClassificationTask) or not _counts_labels(task):
        return task
    return task.with_classes(classes) if classes > task.classes else task


def _may_have_more(task: Task) -> bool:
    """Whether the task has a setting `classes`."""
    return isinstance(task, ClassificationTask) and type(task).with_classes is not ClassificationTask.with_classes


def _trains_on_all(task: Task) -> bool:
    """Whether the task's training set is the one that the zoo's models were trained on."""
    return not isinstance(task, ClassificationTask) or task.trains_on_all


def _counts_labels(task: Task) -> bool:
    return isinstance(task, ClassificationTask) and task.counts_labels


def blank(spec: Any, task: Any, seed: int) -> Any:
    """An untrained model of an architecture, its weights drawn from the seed."""
    part, _ = model_part(spec)
    if answer_shape(task) and not isinstance(part, Reconstructor):
        raise BadModel(
            f"{MODELS.spec(part)} answers classes, and the task {task.name} wants reconstructed samples: use "
            "reconstructor"
        )
    made = part(_row_shape(task), task.classes, training_rng(seed).at("init"), space=task.space)
    return with_captions_of(task, made)


def with_captions_of(task: Task, model: Any) -> Any:
    """The model with the captions of the task's classes, where its classes are texts."""
    if not isinstance(model, TakesCaptions):
        return model
    return model.with_captions(task.captions if isinstance(task, Captioned) else None, task.class_names())


def bound(task: Task, space: Any) -> Task:
    """The task in a model's space, where its rows depend on one."""
    return task.bind(space) if isinstance(task, Bindable) else task


def protected(model: Any, defense: Any, task: Any, **settings: Any) -> Victim:
    """The protected model that names or objects ask for.

    A ready model (a checkpoint, a hub name, a torch module) is protected as it is. An architecture needs weights: they
    come from the embedded zoo when a card matches task, model and defense, else from the cache, else they are trained
    now, which needs the task's training data. A task that asks for a part of its training set (imbalance=, train=) gets
    nothing from the zoo, whose models saw another. A defense that answers in another way than it trains (smoothing) is
    put around what was found.

    task:     a spec, a Task, or a pair (x, y), as of `advkit.evaluate`
    settings: see `_protected`

    Raises NoTrainingData, BadModel, CheckpointError, UsageError.
    """
    from advkit.evaluation.inputs import task_of

    task, guard = task_of(task), DEFENSES.build(defense)
    if isinstance(guard, Solves):
        return _solved(model, guard, DEFENSES.label(guard, defense), task, **settings)
    if not isinstance(guard, Deploys):
        return _protected(model, defense, task, **settings)
    found = _protected(model, guard.trained_as, task, **settings)
    # Zoo and cache know what was trained; how it is deployed, the request says.
    return replace(found, model=guard.deploy(found.model), defense="")


def _protected(
    model: Any,
    defense: Any,
    task: Any,
    *,
    seed: int = 0,
    device: str = "cpu",
    progress: bool = False,
    sample_timeout: float | None = None,
) -> Victim:
    """The same, as the defense trains it."""
    from advkit.models import zoo
    from advkit.models.torch import Architecture

    asked = model if model is not None else task.defaults.model
    guard = DEFENSES.build(defense)
    spec = DEFENSES.label(guard, defense)
    if isinstance(guard, Learns):
        data = task.training()
        if data is None:
            raise NoTrainingData(
                f"{spec} learns from labels, and the task {task.name} has no training data at hand: give it some "
                f"({_training_data(task)})"
            )
        return Victim(_learned(guard, data, seed), f"trained here, seed {seed}")
    part, _ = model_part(asked)
    if isinstance(guard, TrainsFront):
        plain = protected(
            asked, "none", task, seed=seed, device=device, progress=progress, sample_timeout=sample_timeout
        )
        if guard.weights:  # `deploy` puts that front before the model
            return plain
        trained = _trained(plain.model, guard, task, seed, device, progress, name=plain.origin, spec=spec)
        return replace(trained, origin=f"{plain.origin}, front {trained.origin}")
    if not isinstance(part, Architecture):
        given = ready(part, task, sample_timeout).to(device)
        task = with_classes_of(task, given)
        origin = asked if isinstance(asked, str) else "given"
        if not guard.needs_data:
            kept = isinstance(guard, Deploys)  # it is put around the model last
            return Victim(given if kept else guard.protect(given, None, training_rng(seed)), origin)
        if told := _known(asked, spec):
            return Victim(given, origin, told)
        if not isinstance(guard, Trains):
            return Victim(_fitted(given, guard, task, seed, name=origin, spec=spec), origin)
        return _trained(given, guard, task, seed, device, progress, name=origin, spec=spec)

    shape = _row_shape(task)
    cards = zoo.find(task.name, MODELS.spec(part), spec, role="victim") if _trains_on_all(task) else ()
    for card in cards:
        if card.defense != spec and outside(card.defense):
            continue
        held = with_captions_of(task, zoo.load(card.name))
        if held.space.shape is None or tuple(held.space.shape) == shape:
            return Victim(
                held.to(device), f"zoo:{card.name}", card.defense, {"card": card.name, "measured": dict(card.measured)}
            )
    if not isinstance(guard, Trains):
        # What trains nothing goes around the task's undefended model of that architecture.
        plain = protected(model, "none", task, seed=seed, device=device, progress=progress)
        if isinstance(guard, Deploys):
            return plain
        if guard.needs_data:
            made = _fitted(plain.model, guard, task, seed, name=plain.origin, spec=spec)
        else:
            made = guard.protect(plain.model, None, training_rng(seed))
        return replace(plain, model=made, defense="")
    start, name = blank(part, task, seed).to(device), MODELS.spec(part)
    return _trained(start, guard, task, seed, device, progress, name=name, spec=spec)


def _learned(guard: Any, data: Any, seed: int) -> Any:
    """What a defense of the registry learns from few labels is kept in memory: a sweep asks for it in every cell."""
    small = data.x.numel() <= _FEW
    try:
        key = (DEFENSES.spec(guard), seed, _data_digest(data)) if small else None
    except (SpecError, UnknownName):  # an object whose settings no text says
        key = None
    if key is None:
        return guard.protect(None, data, training_rng(seed))
    if key not in _learned_here:
        _learned_here[key] = guard.protect(None, data, training_rng(seed))
        while len(_learned_here) > _KEPT:
            del _learned_here[next(iter(_learned_here))]
    return _learned_here[key]


def _fitted(model: Any, guard: Any, task: Any, seed: int, *, name: str, spec: str) -> Any:
    """A finished model under a defense that trains no weights, and fits itself to the model and to training data."""
    data = task.training()
    if data is None:
        raise NoTrainingData(
            f"{spec} is fitted to {name} on training data, and the task has none at hand: give it some "
            f"({_training_data(task)})"
        )
    return guard.protect(model, data, training_rng(seed))


def _trained_with(asked: Any) -> str:
    """The spec of the defense that a stored model says it was trained with; empty where it does not say."""
    from advkit.models import zoo
    from advkit.models.checkpoint import CheckpointFile, checkpoint_extra

    part, _ = model_part(asked)
    if isinstance(part, zoo.ZooModel):
        return zoo.card(part.name).defense
    if isinstance(part, CheckpointFile) and str(part.file).endswith(".safetensors"):
        return str(checkpoint_extra(part.file).get("defense", ""))
    return ""


def _known(asked: Any, spec: str) -> str:
    """The defense that a stored model says it was trained with, where it is the one of the spec; else empty.

    A spec that is a name alone takes whatever settings there are. CheckpointError where these run code of others.
    """
    told = _trained_with(asked)
    if not told or (told != spec and (":" in spec or told.partition(":")[0] != spec)):
        return ""
    if told != spec and (found := outside(told)):
        raise CheckpointError(
            f"{asked} says that it was trained with {told}, which names what is not advkit's own "
            f"({'; '.join(found)}): a file may not choose what code runs here; where you trust it, name that "
            "defense yourself"
        )
    return told


def _solved(
    model: Any,
    guard: Solves,
    spec: str,
    task: Any,
    *,
    seed: int = 0,
    device: str = "cpu",
    progress: bool = False,
    sample_timeout: float | None = None,
) -> Victim:
    """The network that a defense's solver finds for the task, from the cache where it is there.

    A model may be named that `advkit train` stored of the same defense, or an `mlp`, whose width the solver sets.
    """
    from advkit.models.checkpoint import checkpoint_extra, load_checkpoint, save_checkpoint
    from advkit.models.mlp import MLP

    part = None if model is None else model_part(model)[0]
    if part is not None and not isinstance(part, MLP):
        told = _known(model, spec)
        if not told:
            raise BadModel(
                f"{spec} finds a network of its own (mlp:hidden=K) and {model} is another: leave the model out, or "
                "name one that `advkit train` stored of this defense (path:FILE)"
            )
        trained: Any = DEFENSES.build(told)
        given = ready(part, task, sample_timeout).to(device)
        said = checkpoint_extra(part.file).get("solved", {})
        return Victim(trained.deploy(given), f"{model}: {said.get('summary', '')}", told, solved=said)
    data = task.training()
    if data is None:
        raise NoTrainingData(
            f"{spec} trains and the task {task.name} has no training data at hand: give it some "
            f"({_training_data(task)})"
        )
    folder = cache_root() / "solved" / _fingerprint_solved(guard, data, seed)[:24]
    file = folder / "model.safetensors"
    try:
        with claimed(folder, wait=True):  # another process may be solving the same
            if not file.exists():
                log.info("solving %s on %s (kept in %s)", spec, task.name, folder)
                found, told_of_it = guard.solve(data, training_rng(seed))
                save_checkpoint(found, file, extra={"solved": told_of_it}, shape=tuple(data.x.shape[1:]))
    except OSError as error:
        raise UsageError(f"the cache {folder} can't be written ({why(error)}): set ADVKIT_CACHE to a folder") from error
    said = checkpoint_extra(file)["solved"]
    held = load_checkpoint(file).to(device)
    return Victim(guard.deploy(held), f"solved here, seed {seed}: {said['summary']}", solved=said)


def _fingerprint_solved(guard: Any, data: Any, seed: int) -> str:
    return hashlib.sha256("|".join(("solved", repr(guard), str(seed), _data_digest(data))).encode()).hexdigest()


def _trained(
    start: Any, guard: Any, task: Any, seed: int, device: str, progress: bool, *, name: str, spec: str
) -> Victim:
    data = task.training()
    if data is None and isinstance(guard, TrainsFront):
        raise NoTrainingData(
            f"{spec} trains a front before {name}, and the task has no training data at hand: give it some "
            f"({_training_data(task)}), or name a front of advkit train: weights=FILE"
        )
    if data is None:
        raise NoTrainingData(
            f"no trained weights for model {name} with defense {spec} on task {task.name}, and the task has no "
            f"training data at hand: name a trained model (--model path:FILE.safetensors; model= in Python), or give "
            f"the task some ({_training_data(task)})"
        )
    start = _start(start, guard, data, seed)
    folder = cache_root() / "trained" / _fingerprint(start, guard, data, seed)[:24]
    log.info("training %s with %s on %s (kept in %s)", name, spec, task.name, folder)
    try:
        with claimed(folder, wait=True):  # another process may be training the same
            fitted = _fit(start, guard, data, seed, device, folder, progress)
    except OSError as error:
        raise UsageError(f"the cache {folder} can't be written ({why(error)}): set ADVKIT_CACHE to a folder") from error
    return Victim(fitted.model, f"trained here, seed {seed}")


def _training_data(task: Any) -> str:
    """How a task is given data to train on."""
    from advkit.tasks.arrays import Arrays
    from advkit.tasks.folder import Folder

    if isinstance(task, Arrays):
        return "task=Arrays(x, y, training=(x_train, y_train)) of advkit.tasks.arrays"
    if isinstance(task, Folder):
        return f"class folders in {task.path}/train"
    return f"e.g. {task.name}:root=FOLDER"


def _start(model: Any, guard: Any, data: Any, seed: int) -> Any:
    """What is trained: the model, or what the defense makes of it."""
    return guard.around(model, data, training_rng(seed).at("front")) if isinstance(guard, TrainsFront) else model


def _fingerprint(start: Any, guard: Any, data: Any, seed: int) -> str:
    parts = (repr(guard), str(seed), _data_digest(data), start.describe().state_sha256)
    return hashlib.sha256("|".join(parts).encode()).hexdigest()


def _fit(
    start: Any, guard: Any, data: Any, seed: int, device: str, folder: Path, progress: bool, ranks: Any = None
) -> Any:
    from advkit.training.loop import fit
    from advkit.training.ranks import ALONE

    return fit(
        start,
        data,
        guard.objective(),
        guard.recipe,
        training_rng(seed),
        device=device,
        out=folder,
        progress=progress,
        ranks=ALONE if ranks is None else ranks,
    )


@plainly
def train_victim(
    model: Any,
    defense: Any,
    task: Any,
    *,
    recipe: str = "",
    seed: int = 0,
    device: str = "auto",
    out: str | Path,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Train an architecture under a defense and save OUT/model.safetensors with a report; returns what was made.

    The report is OUT/training.json, with the log of every epoch, and OUT/plots/training.png. What is returned are JSON
    values.

    Where torchrun started several processes, or a process group of torch.distributed is up, all of them make this call
    and train one model together; the first one writes, and all return the same.

    defense: a spec or object; where it is None, the recipe's, else `none`
    task:    likewise; else `digits`
    model:   likewise; else the task's
    recipe:  changes to the defense's recipe, `key=value,...`; or FILE.yaml or the name of a shipped recipe, either with
             `,key=value...` after it, which may name defense, task and model, too (`advkit.training.recipes.files`)
    out:     folder of the training
    progress: show the epoch, its loss and about how long the rest takes. None shows it where standard error is a
             terminal, and in notebooks; True always, False never
    device:  cpu, cuda...; with several processes each takes the CUDA device of its number on the machine

    Raises NoTrainingData, BadModel, StaleRun, UsageError; of several processes one raises that, the others
    EndedElsewhere.
    """
    from advkit.evaluation.inputs import pick_device
    from advkit.training.ranks import joined, place

    out, seed = Path(out), whole("seed", seed)
    with joined() as ranks, ExitStack() as held:
        fresh = False
        try:
            with ranks.agreed():
                training = _Training.asked(model, defense, task, recipe, seed)
                device = place(pick_device(device), ranks)
            with ranks.agreed(), _writable(out):
                if ranks.first:
                    held.enter_context(claimed(out))
                    fresh = _claim(out, training.fingerprint())
            with _writable(out), Works(progress) as shows:
                fitted = training.fitted(device, out / "training", shows.shown, ranks)
            with ranks.agreed(), _writable(out):
                made = training.saved(fitted, out) if ranks.first else {}
        except UsageError:
            if fresh and not (out / "training").exists():
                _unclaim(out)
            raise
        return ranks.from_first(made)


@dataclass(frozen=True)
class _Training:
    """What there is to train, and how it is called.

    apart: networks of a defense's own (`TrainsApart`): the guard is its trainer
    """

    start: Any
    guard: Any
    data: Any
    task: str
    defense: str
    seed: int
    model: str
    apart: bool = False

    @classmethod
    def asked(cls, model: Any, defense: Any, task: Any, recipe: str, seed: int) -> _Training:
        """Raises NoTrainingData, BadModel, UsageError."""
        from advkit.evaluation.inputs import task_of
        from advkit.models.torch import Architecture
        from advkit.tasks import TASKS
        from advkit.training.recipes import RECIPES

        held = RECIPES.build(recipe)
        defense = _asked("defense", defense, held, DEFENSES, "none")
        task = _asked("task", task, held, TASKS, "digits")
        model = _asked("model", model, held, MODELS, None)
        work = task_of(task)
        if held.settings:
            if isinstance(DEFENSES.build(defense), Solves):
                raise UsageError(f"{defense} is solved in one go and has no recipe: leave the recipe out")
            if not isinstance(defense, str):
                raise UsageError(
                    "a recipe text changes a defense given by its spec; set the object's own recipe instead"
                )
            defense = f"{defense}{',' if ':' in defense else ':'}recipe=[{held.text}]"
        guard: Any = DEFENSES.build(defense)
        if isinstance(guard, Solves):
            return _Solving.of(guard, defense, task, model, work, seed)
        if isinstance(guard, TrainsApart):
            trainer = guard.trainer()
            start, data = trainer.begun(seed)
            return cls(start, trainer, data, data.name, DEFENSES.label(guard, defense), seed, start.name, apart=True)
        if not isinstance(guard, Trains):
            raise UsageError(
                f"the defense {DEFENSES.label(guard, defense)} trains nothing: apply it with `advkit evaluate`"
            )
        asked = model if model is not None else work.defaults.model
        if isinstance(guard, TrainsFront) and guard.weights:
            raise UsageError(f"{DEFENSES.label(guard, defense)} names a front that is trained: evaluate it")
        part, _ = model_part(asked)
        if isinstance(guard, TrainsFront):
            start = protected(asked, "none", work, seed=seed).model
        else:
            start = blank(part, work, seed) if isinstance(part, Architecture) else ready(part, work)
        data = work.training()
        if data is None:
            raise NoTrainingData(
                f"the task {work.name} has no training data at hand: give it some ({_training_data(work)})"
            )
        name = asked if isinstance(asked, str) else "given"
        start = _start(start, guard, data, seed)
        return cls(start, guard, data, TASKS.label(work, task), DEFENSES.label(guard, defense), seed, name)

    def fingerprint(self) -> str:
        return _fingerprint(self.start, self.guard, self.data, self.seed)

    def fitted(self, device: str, folder: Path, progress: bool, ranks: Any) -> Any:
        """The trained model and its log."""
        return _fit(self.start.to(device), self.guard, self.data, self.seed, device, folder, progress, ranks)

    def saved(self, fitted: Any, out: Path) -> dict[str, Any]:
        """Write the weights and the report; what was made, as JSON values."""
        from advkit.defenses.smoothing.fronts import QUERIES
        from advkit.evaluation.training_report import write_training_report
        from advkit.models.checkpoint import save_checkpoint
        from advkit.models.fronts import Denoised, save_front
        from advkit.training.loop import log_entries

        file = out / "model.safetensors"
        extra = {"task": self.task, "defense": self.defense, "seed": self.seed, "data": _data_digest(self.data)}
        model = fitted.model.to("cpu")
        task = f"--task {self.task} "
        if self.apart:
            stored, task, use = self.guard.keep(model, file, extra), "", f"--defense {self.guard.use(file)}"
        elif isinstance(model, Denoised):
            stored = save_front(model, file, tuple(self.data.x.shape[1:]), extra)
            defense = f"{self.defense}{',' if ':' in self.defense else ':'}weights={file}"
            use = f"--model {self.model} --defense {defense}"
        else:
            stored, use = save_checkpoint(model, file, extra=extra), f"--model path:{file}"
        made: dict[str, Any] = {
            "file": str(file),
            "sha256": stored,
            "model": model.describe().architecture or self.model,
            "defense": self.defense,
            "task": self.task,
            "seed": self.seed,
            "epochs": len(fitted.log),
            "best_epoch": fitted.best_epoch,
            "score": None if math.isnan(fitted.best.score) else fitted.best.score,
            "scores": "samples" if answer_shape(model) else "classes",
            "halted": fitted.halted,
            "evaluate": f"advkit evaluate {task}{use}",
        }
        if isinstance(model, CountsQueries):
            made["queries"] = {"answered": int(fitted.log[-1].figures[QUERIES]), "retried": model.retried}
        report, curves = write_training_report(out, made, asdict(self.guard.recipe), log_entries(fitted.log))
        return {**made, "report": str(report), "curves": str(curves)}


class _Solving(_Training):
    """A defense that has no loop: one solve, and what the solver says of it in place of a log."""

    @classmethod
    def of(cls, guard: Any, defense: Any, task: Any, model: Any, work: Any, seed: int) -> _Solving:
        from advkit.models.mlp import MLP
        from advkit.tasks import TASKS

        name = DEFENSES.label(guard, defense)
        if model is not None and not isinstance(model_part(model)[0], MLP):
            raise BadModel(f"{name} finds a network of its own (mlp:hidden=K): leave the model {model} out")
        data = work.training()
        if data is None:
            raise NoTrainingData(
                f"the task {work.name} has no training data at hand: give it some ({_training_data(work)})"
            )
        return cls(None, guard, data, TASKS.label(work, task), name, seed, "")

    def fingerprint(self) -> str:
        return _fingerprint_solved(self.guard, self.data, self.seed)

    def fitted(self, device: str, folder: Path, progress: bool, ranks: Any) -> Any:
        """The model and what there is to say of it; a solve takes one process."""
        if ranks.world > 1:
            raise UsageError(f"{self.defense} is solved by one process, and there are {ranks.world}: start one")
        return self.guard.solve(self.data, training_rng(self.seed))

    def saved(self, fitted: Any, out: Path) -> dict[str, Any]:
        from advkit.evaluation.training_report import write_solve_report
        from advkit.models.checkpoint import save_checkpoint

        model, solved = fitted
        file = out / "model.safetensors"
        extra = {"task": self.task, "defense": self.defense, "seed": self.seed, "data": _data_digest(self.data)}
        stored = save_checkpoint(model, file, extra={**extra, "solved": solved}, shape=tuple(self.data.x.shape[1:]))
        made: dict[str, Any] = {
            "file": str(file),
            "sha256": stored,
            "model": model.describe().architecture,
            "defense": self.defense,
            "task": self.task,
            "seed": self.seed,
            "solved": solved,
            "evaluate": f"advkit evaluate --task {self.task} --defense {self.defense} --model path:{file}",
        }
        return {**made, "report": str(write_solve_report(out, made))}


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    """UsageError where the folder can't be written."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"the folder {folder} can't be written ({why(error)}): name another --out") from error


def _asked(kind: str, given: Any, recipe: RecipeFile, registry: Registry[Any], default: Any) -> Any:
    """What was given, else what the recipe says of this kind of part, else the default."""
    if given is not None:
        return given
    said = recipe.said(kind)
    if not said:
        return default
    try:
        registry.build(said)
    except AdvkitError as error:
        raise UsageError(f"{recipe.source}: {kind}: {error}") from error
    return said


def _claim(folder: Path, fingerprint: str) -> bool:
    """Mark a folder as this training's and say whether it is new to it; raises StaleRun for another's, or OSError."""
    mark = folder / MARK
    fresh = not mark.exists()
    if fresh:
        write_whole(mark, fingerprint + "\n")
    elif mark.read_bytes().strip() != fingerprint.encode():
        raise StaleRun(f"{folder} holds another training (other settings, data or seed): name another --out")
    return fresh


def _unclaim(folder: Path) -> None:
    """Take the folder away again where nothing was trained in it."""
    with suppress(OSError):
        if {each.name for each in folder.iterdir()} <= {MARK, LOCK}:
            for each in folder.iterdir():
                each.unlink()
            folder.rmdir()


def _data_digest(data: Any) -> str:
    digest = hashlib.sha256(data.x.cpu().contiguous().numpy().tobytes())
    digest.update(data.y.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
