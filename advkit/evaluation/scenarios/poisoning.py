"""Poisoning: the attacker moves before training, and every answer it gets costs a training (Biggio et al., 2011, 2012).

A trial splits the data by its seed, lets the attacker flip labels of the training half, trains the defense on clean and
on flipped labels, and asks both models about test samples that nobody touched. The harness counts the flips itself.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from advkit.core.blame import MODEL, blamed, code_of
from advkit.core.errors import AdvkitError, BadInput, UsageError
from advkit.core.lanes import Lanes
from advkit.core.learners import Floats, Ints, fitted, seed_of
from advkit.core.protocols import (
    Access,
    Batch,
    Data,
    FlipsLabels,
    Label,
    Learns,
    Outcome,
    Pooled,
    Record,
    Task,
    TaskDefaults,
)
from advkit.core.retraining import Retraining
from advkit.core.rng import RowRng
from advkit.defenses import DEFENSES
from advkit.evaluation import poisonings
from advkit.evaluation.counts import GAINED
from advkit.evaluation.poisonings import BY_ATTACKER, BY_HARNESS, FLIPPED, RECOVERED, SUSPECTED, TRAINED, trial_of
from advkit.evaluation.run.attempts import reason_of
from advkit.evaluation.run.batch import run_alone
from advkit.evaluation.run.case import lent
from advkit.evaluation.run.store import Store
from advkit.evaluation.scenarios.base import (
    BaseScenario,
    Case,
    Companion,
    Engine,
    Headline,
    Parts,
    Records,
    Round,
    Section,
    parameters,
)
from advkit.models.learned import flat
from advkit.tasks.base import ClassificationTask, raw_bytes
from advkit.threat_models.labels import LabelFlips

SHARED = ("clean_accuracy", "robust_accuracy", "robust_accuracy_upper", "attack_success", "attack_success_rate")


def streams(seed: int, trial: int) -> RowRng:
    """The random streams of one trial of a seed."""
    return RowRng.from_ids(seed, ["poisoning"]).at("trial", trial)


@dataclass(frozen=True)
class Split:
    """The samples of one trial.

    x:    training samples, float64 [n, d]; y: their clean labels, [n]
    test: test samples, float64 [m, d]; test_y: their labels, [m]
    """

    x: Floats
    y: Ints
    test: Floats
    test_y: Ints

    def digest(self) -> str:
        """sha256 over training samples, test samples and test labels: what no attacker may change."""
        held = hashlib.sha256()
        for array in (self.x, self.test, self.test_y):
            held.update(np.ascontiguousarray(array).tobytes())
        return held.hexdigest()


class Trials(ClassificationTask):
    """The test samples of every trial, one trial after the other, of a task that is split by seed.

    task:   hands out the samples
    trials: how many
    train:  training samples of a trial; None takes half of a pool, and all of a training set. A task without a training
            set is a pool
    seed:   of the splits
    """

    def __init__(self, task: Task, trials: int, train: int | None, seed: int) -> None:
        self.task, self.trials, self.seed = task, trials, seed
        self.name, self.version, self.split = task.name, task.version, task.split
        self.classes = task.classes
        self.defaults: TaskDefaults = replace(task.defaults, n=None)
        self._load(train)

    def _load(self, train: int | None) -> None:
        task = self.task
        data = None if isinstance(task, Pooled) else task.training()
        self._fixed: list[int] | None = None
        if data is None:
            self._x, self._y, self._names = _pool(task)
            self.split = "all" if isinstance(task, Pooled) else task.split
            self.train = len(self._y) // 2 if train is None else train
            if not 2 <= self.train < len(self._y):
                raise UsageError(
                    f"{self.train} training samples of a pool of {len(self._y)}: expected 2 to {len(self._y) - 1}, "
                    "and the others to test on"
                )
            return
        x, y, names = _pool(task)
        self._x, self._y = torch.cat((data.x, x)), torch.cat((data.y, y))
        self._names = [*(f"train/{row}" for row in range(len(data.y))), *names]
        self._fixed = list(range(len(data.y)))
        self.train = len(data.y) if train is None else train
        if not 2 <= self.train <= len(data.y):
            raise UsageError(f"{self.train} training samples of {len(data.y)}: expected 2 to {len(data.y)}")

    def __repr__(self) -> str:
        return f"Trials({self.name}, {self.trials} trials, {self.train} training samples each)"

    def rows_of(self, trial: int) -> tuple[list[int], list[int]]:
        """Places of the training and of the test samples of a trial, in the order of the data."""
        order = np.random.default_rng(seed_of(streams(self.seed, trial).at("split")))
        if self._fixed is not None:
            chosen = np.sort(order.permutation(len(self._fixed))[: self.train]).tolist()
            return chosen, list(range(len(self._fixed), len(self._y)))
        permuted = order.permutation(len(self._y))
        return np.sort(permuted[: self.train]).tolist(), np.sort(permuted[self.train :]).tolist()

    def __getstate__(self) -> dict[str, Any]:
        """Without the task behind it, whose samples it has: what worker processes need."""
        return {name: value for name, value in vars(self).items() if name != "task"}

    def classes_of(self, trial: int) -> list[int]:
        """Numbers of the classes that occur among the training samples of a trial."""
        return sorted(set(self._y[self.rows_of(trial)[0]].tolist()))

    def tests_of(self, trial: int) -> list[str]:
        """The ids of a trial's rows, in the order of its test samples."""
        return [f"trial-{trial}/{self._names[row]}" for row in self.rows_of(trial)[1]]

    def of(self, trial: int) -> Split:
        """The samples of a trial as learners see them."""
        train, test = self.rows_of(trial)
        y = self._y.numpy().astype(np.int64)
        return Split(flat(self._x[train]), y[train], flat(self._x[test]), y[test])

    @cached_property
    def _places(self) -> list[tuple[str, int]]:
        return [
            place
            for trial in range(self.trials)
            for place in zip(self.tests_of(trial), self.rows_of(trial)[1], strict=True)
        ]

    @property
    def space(self) -> Any:
        return self.task.space

    @property
    @override
    def ids(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self._places)

    @override
    def fetch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        places = torch.tensor([self._places[row][1] for row in rows], dtype=torch.long)
        return self._x[places], self._y[places]

    @override
    def training(self) -> Data | None:
        """The clean training samples of the first trial."""
        train = torch.tensor(self.rows_of(0)[0])
        return Data(self._x[train], self._y[train], self.space, self.classes, f"{self.name}/trial-0")

    @cached_property
    def _digest(self) -> str:
        held = hashlib.sha256(raw_bytes(self._x))
        held.update(raw_bytes(self._y))
        held.update("\n".join([*self._names, *self.ids]).encode())
        return held.hexdigest()

    @override
    def digest(self) -> str:
        """sha256 of all samples, labels and ids, and of the splits."""
        return self._digest

    @override
    def class_names(self) -> tuple[str, ...]:
        return self.task.class_names()


def _pool(task: Task) -> tuple[Tensor, Tensor, list[str]]:
    """Samples, labels and ids of a pool; of another task, of what it hands out. UsageError without labels."""
    if isinstance(task, Pooled):
        held = task.pool()
        return held.x, held.y, list(held.ids)
    if task.space is None:
        raise UsageError(f"the task {task.name} has no labels that could be flipped; name one such as digits-pair")
    batch = next(iter(task.batches(len(task))))
    if batch.labels is None or int(batch.labels.min()) < 0:
        raise UsageError(f"the task {task.name} has no labels that could be flipped; name one such as digits-pair")
    return batch.x, batch.labels, list(batch.ids)


@dataclass(frozen=True)
class Poisoned:
    """What one trial came to.

    clean, after: predictions of the models trained on clean and on flipped labels for the test samples, [m]
    figures:      of the trial, by name
    message:      why the labels were refused; empty where they were admitted
    """

    clean: Ints
    after: Ints
    figures: Mapping[str, float]
    message: str = ""


@dataclass(frozen=True)
class Play:
    """Plays the trials of a case: the unit of work, which worker processes get with the rows of a trial.

    task:     with the samples of all trials
    defense:  what is trained on clean and on flipped labels
    attacker: what the attacker trains
    """

    task: Trials
    defense: Learns
    attacker: Learns

    @classmethod
    def of(cls, case: Case) -> Play:
        """That of a case."""
        defense: object = case.defense
        trained: object = DEFENSES.build(surrogate(case)) if oblivious(case) else defense
        assert isinstance(defense, Learns)
        assert isinstance(trained, Learns)
        return cls(_task(case), defense, trained)

    def __call__(self, case: Case, batch: Batch, lanes: Lanes) -> Round:
        """The records of test samples of one trial."""
        return Round(_records(self, case, batch))

    def clean(self, split: Split, seed: int) -> tuple[Any, Ints]:
        """The model trained on clean labels, and its predictions for the test samples, [m]."""
        with code_of(MODEL):
            model = fitted(self.defense.learner(seed), split.x, split.y)
            return model, np.asarray(model.predict(split.test), dtype=np.int64)

    def travels(self) -> bool:
        """Whether it can be sent to another process."""
        try:
            pickle.dumps((self.defense, self.attacker))
        except Exception:  # pickle raises whatever the parts' own code does
            return False
        return True


def play(unit: Play, case: Case, trial: int) -> Poisoned:
    """One trial: attack, count, train twice, predict.

    Labels that the threat model does not admit are trained on by nobody: the model trained on clean labels stands.
    """
    threat, split, stream = _threat(case), unit.task.of(trial), streams(case.seed, trial)
    before, own = split.digest(), seed_of(stream.at("learner"))
    _, right = unit.clean(split, own)
    oracle = Retraining(
        split.x.copy(), split.y, unit.task.classes, unit.attacker.learner, seed_of(stream.at("attacker", "learner"))
    )
    assert case.attack is not None
    labels = torch.from_numpy(split.y.copy())
    # The budget is counted on the harness's own labels and the copy that came back, whatever the attack says or keeps.
    returned = case.attack(oracle, labels, None, lent(threat), stream.at("attack"))
    message = _refused(returned, split.y, threat, unit.task.classes)
    if not message and split.digest() != before:
        message = "the attack changed samples or test labels, which no threat model of label flips admits"
    figures: dict[str, float] = {TRAINED: len(split.y), BY_ATTACKER: oracle.trainings, BY_HARNESS: 1}
    if message:
        return Poisoned(right, right, figures, message)
    given = returned.detach().cpu().numpy().astype(np.int64)
    with code_of(MODEL):
        model = fitted(unit.defense.learner(own), split.x, given)
        after = np.asarray(model.predict(split.test), dtype=np.int64)
        suspected = np.asarray(model.predict(split.x)) != given
    flipped = given != split.y
    figures |= {
        BY_HARNESS: 2,
        FLIPPED: int(flipped.sum()),
        SUSPECTED: int(suspected.sum()),
        RECOVERED: int((suspected & flipped).sum()),
    }
    return Poisoned(right, after, figures)


def _refused(returned: Any, y: Ints, threat: LabelFlips, classes: int) -> str:
    """Why returned labels are not admitted; empty where they are."""
    if not isinstance(returned, Tensor):
        return f"the attack returned {type(returned).__name__}; expected a tensor of labels"
    if returned.shape != (len(y),) or returned.is_floating_point() or returned.dtype == torch.bool:
        return (
            f"the attack returned labels of shape {list(returned.shape)}, type {returned.dtype}; expected one whole "
            f"number for each of {len(y)} samples"
        )
    labels = returned.detach().cpu().numpy()
    if labels.min() < 0 or labels.max() >= classes:
        return f"the attack returned labels from {labels.min()} to {labels.max()}; expected 0 to {classes - 1}"
    flips, budget = int((labels != y).sum()), threat.budget(len(y))
    return f"the attack flipped {flips} labels; the threat model admits {budget}" if flips > budget else ""


def _records(unit: Play, case: Case, batch: Batch) -> list[Record]:
    trial = trial_of(batch.ids[0])
    assert batch.labels is not None
    labels = batch.labels.tolist()
    start = Record("", case.label.attack, Outcome.ERROR, stage=case.label.stage, source=case.label.source)
    try:
        found = play(unit, case, trial)
    except (AdvkitError, torch.OutOfMemoryError):
        raise  # nobody's row is at fault
    except Exception as error:  # a trial is one piece of work: it ends for all of its rows
        return _failed(unit, case, batch, start, error)
    place = {row: i for i, row in enumerate(unit.task.tests_of(trial))}
    records = []
    for row, label in zip(batch.ids, labels, strict=True):
        clean, after = int(found.clean[place[row]]), int(found.after[place[row]])
        records.append(
            replace(
                start,
                id=row,
                outcome=_outcome(clean, after, label, found.message),
                label=label,
                clean=clean,
                adversarial=after,
                reached=after != label,
                distance=float(found.figures[FLIPPED]) if FLIPPED in found.figures else None,
                queries=0 if oblivious(case) else int(found.figures[BY_ATTACKER]),
                notes=(GAINED,) if clean != label and after == label else (),
                message=found.message,
                figures=dict(found.figures),
            )
        )
    return records


def _outcome(clean: int, after: int, label: int, message: str) -> Outcome:
    if clean != label:
        return Outcome.WRONG
    if message:
        return Outcome.INVALID
    return Outcome.BROKEN if after != label else Outcome.ROBUST


def _failed(unit: Play, case: Case, batch: Batch, start: Record, error: Exception) -> list[Record]:
    """Error records for the rows of a trial in which the attack or the defense raised."""
    trial, who = trial_of(batch.ids[0]), blamed(error)
    assert batch.labels is not None
    notes: tuple[str, ...] = (f"{who}_raised",) if who else ()
    clean: list[int | None] = [None] * len(batch.ids)
    try:
        _, predicted = unit.clean(unit.task.of(trial), seed_of(streams(case.seed, trial).at("learner")))
    except Exception:  # it does not learn from clean labels either
        notes = ("clean_raised", *notes)
    else:
        place = {row: i for i, row in enumerate(unit.task.tests_of(trial))}
        clean = [int(predicted[place[row]]) for row in batch.ids]
    return [
        replace(
            start,
            id=row,
            outcome=Outcome.WRONG if before is not None and before != label else Outcome.ERROR,
            label=label,
            clean=before,
            notes=notes,
            message=reason_of(error),
        )
        for row, label, before in zip(batch.ids, batch.labels.tolist(), clean, strict=True)
    ]


def _task(case: Case) -> Trials:
    assert isinstance(case.task, Trials)
    return case.task


def _threat(case: Case) -> LabelFlips:
    assert isinstance(case.threat, LabelFlips)
    return case.threat


def asks(case: Case) -> bool:
    """Whether the attack trains anything."""
    attack: object = case.attack
    return isinstance(attack, FlipsLabels) and bool(attack.surrogate)


def oblivious(case: Case) -> bool:
    """Whether the attacker trains a surrogate in place of the defense."""
    return asks(case) and _threat(case).attacker == "oblivious"


def _unreadable(case: Case) -> str:
    """Why the attack can't read what the defense trains; empty where it can."""
    reads = case.attack is not None and Access(case.attack.needs) >= Access.GRADIENTS
    if not reads or getattr(case.defense, "duals", False):
        return ""
    name = DEFENSES.label(case.defense)
    return f"{case.label.attack} reads dual variables, and what {name} trains has none"


def surrogate(case: Case) -> str:
    """The spec of what an oblivious attacker trains."""
    attack: object = case.attack
    assert isinstance(attack, FlipsLabels)
    return _threat(case).surrogate or attack.surrogate


class Poisoning(BaseScenario):
    """The attacker flips training labels; the defense is trained on them and asked about untouched test samples."""

    name: ClassVar[str] = "poisoning"

    @override
    def resolve(self, parts: Parts) -> Parts:
        """The task split into trials; raises UsageError where parts of other settings are named."""
        if parts.attack is None or not isinstance(parts.attack, FlipsLabels):
            named = "no attack" if parts.attack is None else f"{type(parts.attack).__name__}, which changes inputs,"
            raise UsageError(
                f"label flips need an attack on labels, and {named} is asked for: name one such as alfa, farfirst or "
                "random_labels"
            )
        if not isinstance(parts.defense, Learns):
            raise UsageError(
                f"the defense {DEFENSES.label(parts.defense)} does not say how it learns from labels; name one that "
                "does: --defense svm (no defense), or `advkit list defenses labels`"
            )
        if not isinstance(parts.threat, LabelFlips):
            raise UsageError("poisoning is evaluated under label flips: --threat-model label-flips:rate=0.1")
        if isinstance(parts.task, Trials):
            return parts
        threat = parts.threat
        return replace(parts, task=Trials(parts.task, threat.trials, threat.train, parts.seed))

    @override
    def accepts(self, case: Case) -> str | None:
        """None, or why this case can't be run; raises UsageError for a budget of nothing, BadInput for one class."""
        attack: object = case.attack
        defense: object = case.defense
        if not isinstance(attack, FlipsLabels):
            return "label flips need an attack on labels: name one such as alfa, farfirst or random_labels"
        if not isinstance(case.task, Trials) or not isinstance(defense, Learns):
            return "poisoning trains the defense anew: name one that learns from labels, such as svm"
        if case.rule.kind != "untargeted":
            return f"label flips are evaluated by accuracy on clean labels; leave --goal {case.rule.kind} out"
        if case.sample_timeout is not None:
            return "a trial trains for all of its samples together: leave --sample-timeout out"
        threat = _threat(case)
        threat.budget(case.task.train)
        for trial in range(case.task.trials):
            found = case.task.classes_of(trial)
            if len(found) < 2:
                only = case.task.class_names()[found[0]]
                raise BadInput(
                    f"the training samples of trial {trial} of {case.task.name} have one class only ({only}); expected "
                    "two or more: take more samples, or other ones"
                )
        if asks(case) and not oblivious(case) and (reason := _unreadable(case)):
            return f"{reason}: --threat-model label-flips:...,attacker=oblivious trains a surrogate in its place"
        if oblivious(case):
            built = DEFENSES.build(surrogate(case))
            if not isinstance(built, Learns):
                return f"the surrogate {surrogate(case)} does not learn from labels; name one such as svm or logreg"
        return None

    @override
    def cells(self, case: Case) -> Sequence[Case]:
        """The case under the label of who the attacker is; nothing to try on a row, for its rows are labels."""
        return [replace(case, attack=None, label=self._label(case))]

    def _label(self, case: Case) -> Label:
        return replace(case.label, source=surrogate(case) if oblivious(case) else "")

    @override
    def rounds(self, case: Case, engine: Engine, records: Records) -> Iterator[Round]:
        """Trial by trial: one is trained for all of its samples together.

        Trials that are not on record go out as batches of one size, so that worker processes share them; what is left
        of a trial that was cut short comes first.
        """
        task, unit = _task(case), Play.of(case)
        travels = unit.travels()
        cell = replace(case, label=self._label(case), batch_size=len(task.tests_of(0)))
        asked = set(task.ids[: case.n])
        held = {row for row in asked if Store.key(cell.label, row) in records}
        whole = set[str]()
        for trial in range(task.trials):
            rows = asked & set(task.tests_of(trial))
            if not travels or rows & held or len(rows) < cell.batch_size:
                yield from self._here(unit, cell, engine, records, rows)
            else:
                whole |= rows
        if whole:
            yield from engine.run(unit, cell, records, whole)

    def _here(self, unit: Play, cell: Case, engine: Engine, records: Records, rows: set[str]) -> Iterator[Round]:
        """Rows of one trial, in this process."""
        skip = {row for row in _task(cell).ids if row not in rows or Store.key(cell.label, row) in records}
        for batch in cell.task.batches(cell.batch_size, skip=skip):
            yield run_alone(unit, cell, batch, engine.lanes(cell))

    @override
    def companions(self, case: Case) -> Sequence[Companion]:
        """The attacker who knows less, or more, and the defense without what makes it one."""
        return [*self._other_attacker(case), *self._ablation(case)]

    def _other_attacker(self, case: Case) -> Iterator[Companion]:
        if not asks(case):
            return
        threat = _threat(case)
        knows_less = threat.attacker == "adaptive"
        other = replace(threat, attacker="oblivious" if knows_less else "adaptive")
        spec = f"label-flips:{_settings_text(other)}"
        name = "oblivious" if knows_less else "adaptive"
        title = "oblivious (defense unknown)" if knows_less else "adaptive (defense known)"
        if not knows_less and (reason := _unreadable(case)):
            yield Companion(name, title, None, without=reason)
            return
        yield Companion(
            name,
            title,
            replace(case, threat=other, specs={**case.specs, "threat_model": spec}),
            SHARED,
            f"{name}_robust_accuracy",
            prefix=f"{name}_",
            knows_less=knows_less,
        )

    def _ablation(self, case: Case) -> Iterator[Companion]:
        made = getattr(case.defense, "ablation", None)
        ablated = made() if callable(made) else None
        if ablated is None:
            return
        spec = DEFENSES.label(ablated)
        yield Companion(
            "ablation",
            f"{spec}",
            replace(case, defense=ablated, specs={**case.specs, "defense": spec}),
            SHARED,
            "ablation_robust_accuracy",
            prefix="ablation_",
        )

    @override
    def summarize(self, case: Case, records: Sequence[Record]) -> Section:
        """Accuracies with intervals over trials, recovered flips, and what was trained."""
        metrics = poisonings.figures(records)
        flips = _threat(case).describe()["eps_string"]
        sentence = (
            f"Trained with {flips} flipped, the model is right on {{robust_accuracy}} of the clean test labels; "
            "trained on clean labels, on {clean_accuracy}."
        )
        return Section(
            metrics,
            Headline("robust_accuracy", "Robust accuracy"),
            table=[
                ("clean accuracy", "clean_accuracy"),
                ("robust accuracy", "robust_accuracy"),
                ("attack success", "attack_success"),
                ("flips recovered", "flip_recovery_recall"),
            ],
            sentence=sentence,
            figures=[{"name": "accuracy_by_trial"}],
            settings={self._label(case): parameters(case.attack)},
        )


def _settings_text(threat: LabelFlips) -> str:
    from advkit.threat_models import THREAT_MODELS

    return THREAT_MODELS.spec(threat).partition(":")[2]


__all__ = ["Play", "Poisoned", "Poisoning", "Split", "Trials", "play"]
