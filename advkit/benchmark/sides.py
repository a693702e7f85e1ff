"""Suites against a reference: robust accuracy, broken rows, passes and CPU time, repetition by repetition."""

from __future__ import annotations

import logging
import platform
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from advkit.attacks import ATTACKS
from advkit.attacks.peers import peer_package
from advkit.core.errors import UsageError
from advkit.core.protocols import Batch, Outcome, Revised
from advkit.core.speed import clock
from advkit.evaluation.api import resolve
from advkit.evaluation.execute import run
from advkit.evaluation.run.batch import on_device
from advkit.evaluation.run.case import Case
from advkit.evaluation.run.engine import open_store
from advkit.models.torch import TorchModel

log = logging.getLogger("advkit")

REFERENCE = "pyautoattack"
STAGES = ("apgd-ce", "apgd-t", "fab-t", "square")
TARGETS = {"thorough": 15.0, "lean": 25.0, "autoattack": 1.4}
"""CPU-time ratios that the suites are meant to reach against the reference (AutoAttack standard)."""

Say = Callable[[str], None]


@dataclass
class Passes:
    """Rows that went through a module since the hooks were put on: paddings, verdicts and checks included."""

    forwards: int = 0
    backwards: int = 0
    calls: int = 0


@contextmanager
def counted(module: nn.Module) -> Iterator[Passes]:
    """Counts a module's passes inside the block; the hooks are gone after it."""
    passes = Passes()

    def back(gradient: Tensor) -> None:
        passes.backwards += len(gradient)

    def forth(_: nn.Module, inputs: Any, output: Tensor) -> None:
        passes.calls += 1
        passes.forwards += len(output)
        if output.requires_grad:
            output.register_hook(back)  # type: ignore[no-untyped-call]

    handle = module.register_forward_hook(forth)
    try:
        yield passes
    finally:
        handle.remove()


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread inside the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Run:
    """One run of one side.

    seconds: CPU time; on an accelerator the time until the work is done
    wrong:   ids of the rows that are wrong when clean
    broken:  the stage that broke a row, by id
    stages:  seconds per stage, where the side says
    refuted: rows that only a fast view of the model took for broken
    """

    seconds: float
    forwards: int
    backwards: int
    calls: int
    rows: int
    wrong: frozenset[str]
    broken: Mapping[str, str]
    stages: Mapping[str, float] = field(default_factory=dict)
    refuted: int = 0

    @property
    def robust_accuracy(self) -> float:
        return (self.rows - len(self.wrong) - len(self.broken)) / self.rows

    def to_dict(self) -> dict[str, Any]:
        by_stage: dict[str, int] = {}
        for stage in self.broken.values():
            by_stage[stage] = by_stage.get(stage, 0) + 1
        return {
            "seconds": round(self.seconds, 3),
            "robust_accuracy": self.robust_accuracy,
            "forwards": self.forwards,
            "backwards": self.backwards,
            "calls": self.calls,
            "felled_by": by_stage,
            **({"refuted": self.refuted} if self.refuted else {}),
            **({"seconds_by_stage": {k: round(v, 3) for k, v in self.stages.items()}} if self.stages else {}),
        }


def our_run(case: Case) -> Run:
    """The case run and judged by the harness into a folder that is thrown away.

    Copies of the model that speed switches compute on carry the counting hooks along; a compiled one does not call
    them, and its passes are then those of the records, without padding and verdicts.
    """
    with tempfile.TemporaryDirectory(prefix="advkit-") as folder, counted(case.victim.modules()[0]) as passes:
        store = open_store(case, Path(folder))
        begin = clock(torch.device(case.device))
        records = run(case, store)
        seconds = clock(torch.device(case.device)) - begin
        store.close()
    if case.speed.compile:
        passes.forwards, passes.backwards = sum(r.forwards for r in records), sum(r.backwards for r in records)
    wrong = frozenset(r.id for r in records if r.outcome == Outcome.WRONG)
    broken = {r.id: r.stage or r.attack for r in records if r.outcome == Outcome.BROKEN}
    refuted = sum(any(note.startswith("refuted_") for note in r.notes) for r in records)
    return Run(seconds, passes.forwards, passes.backwards, passes.calls, case.n, wrong, broken, refuted=refuted)


class AsModule(nn.Module):
    """A model of ours, normalisation inside, as a peer wants it; parameters require gradients, as users' own do."""

    def __init__(self, model: TorchModel) -> None:
        super().__init__()
        self.model = model.copy()
        self.module = self.model.module

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


@contextmanager
def _hushed(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def reference_run(case: Case, batch_size: int = 250, stages: Sequence[str] = STAGES) -> Run:
    """AutoAttack standard of pyautoattack, the authors' code, on the rows of the case with the case's seed.

    Its attacks are called one after the other, to learn which broke a row; each reseeds from the one seed, so the
    broken rows are those of a run in one go. What it returns is judged by our threat model and the victim, not by
    itself.

    stages: of its attacks the ones to run, the first so many of them
    """
    peer = peer_package("pyautoattack")
    device = torch.device(case.device)
    batch = on_device(next(iter(case.task.batches(case.n, n=case.n))), case.device)
    x, labels = batch.x, labels_of(case, batch)
    victim = AsModule(cast(Any, case.victim))
    ball = case.threat.describe()
    broken: dict[str, str] = {}
    stage_seconds: dict[str, float] = {}
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        _hushed("auto-attack"),
        counted(victim.module) as passes,
    ):
        with torch.no_grad():
            correct = victim(x).argmax(1) == labels
        passes.forwards = passes.calls = 0
        begin = clock(device)
        adversary = peer.AutoAttack(
            victim, norm=ball["norm"], eps=ball["eps"], seed=case.seed, version="standard", device=case.device
        )
        robust = correct.nonzero().squeeze(1)
        for stage in [each for each in adversary.attacks_to_run if each in stages]:
            if not len(robust):
                break
            start = clock(device)
            adversary.attacks_to_run = [stage]
            z, _ = adversary.run_standard_evaluation(x[robust], labels[robust], batch_size=batch_size)
            with torch.no_grad():
                success = (victim(z).argmax(1) != labels[robust]) & case.threat.admits(z, x[robust])
            broken.update((batch.ids[i], stage) for i in robust[success].tolist())
            robust = robust[~success]
            stage_seconds[stage] = clock(device) - start
        seconds = clock(device) - begin
    wrong = frozenset(batch.ids[i] for i in (~correct).nonzero().flatten().tolist())
    return Run(seconds, passes.forwards, passes.backwards, passes.calls, case.n, wrong, broken, stage_seconds)


def labels_of(case: Case, batch: Batch) -> Tensor:
    """The batch's labels; UsageError where the task has none."""
    if batch.labels is None:
        raise UsageError(f"task {case.task.name} has no labels: a benchmark needs them")
    return batch.labels


def side_by_side(
    model: str,
    suites: Sequence[str],
    *,
    task: Any = "fashion-mnist",
    threat_model: Any = None,
    n: int = 200,
    repetitions: int = 3,
    reference: str = REFERENCE,
    speed: str = "fp32",
    device: str = "cpu",
    say: Say = log.info,
) -> dict[str, Any]:
    """One model: the reference and the suites, repetition by repetition, each with the repetition's number as its seed.

    suites:    names or specs of attacks; "thorough@bf16" is thorough at that speed
    reference: "pyautoattack", or the spec of any attack, which the harness then runs (`torchattacks:AutoAttack`)
    speed:     of the suites that do not name one; the reference is always full precision
    device:    of both sides; on a CPU seconds are CPU seconds, elsewhere those that pass until the work is done
    """
    built: dict[str, Any] = {suite: ATTACKS.build(suite.partition("@")[0]) for suite in suites}
    specs = {suite: ATTACKS.label(attack) for suite, attack in built.items()}
    runs: dict[str, list[Run]] = {name: [] for name in (reference, *suites)}
    with one_thread():
        for name, seed in _interleaved([*runs], repetitions):
            attack, own_speed = _attack_and_speed(name, "fp32" if name == reference else speed)
            case = resolve(attack, "none", task, model, threat_model, n=n, seed=seed, device=device, speed=own_speed)
            done = reference_run(case) if name == REFERENCE else our_run(case)
            runs[name].append(done)
            say(
                f"{model} {case.specs['threat_model']} {name} seed {seed}: {done.robust_accuracy:.4f} in "
                f"{done.seconds:.1f} {'CPU s' if device == 'cpu' else 's'}"
            )
    theirs = runs[reference]
    return {
        "model": model,
        "threat_model": case.specs["threat_model"],
        "task": case.specs["task"],
        "n": case.n,
        "clean_accuracy": 1 - len(theirs[0].wrong) / case.n,
        "reference": _reference_entry(reference, theirs),
        "suites": {
            suite: {**_revision(built[suite]), **_suite_entry(spec, runs[suite], theirs)}
            for suite, spec in specs.items()
        },
    }


def _interleaved(names: Sequence[str], repetitions: int) -> Iterator[tuple[str, int]]:
    """(name, repetition) of every run: all names once per repetition, each time another one first."""
    for repetition in range(repetitions):
        turn = repetition % len(names)
        yield from ((name, repetition) for name in (*names[turn:], *names[:turn]))


def _attack_and_speed(name: str, speed: str) -> tuple[str, str]:
    """The attack of a case, and its speed: what stands behind `@`, else `speed`."""
    attack, _, own = ("pgd" if name == REFERENCE else name).partition("@")
    return attack, own or speed


def _reference_entry(name: str, runs: Sequence[Run]) -> dict[str, Any]:
    return {
        "name": name,
        "runs": [each.to_dict() for each in runs],
        "fooled_under_some_seeds_only": sorted(
            row for row in _broken_by_any(runs) if not all(row in each.broken for each in runs)
        ),
    }


def _revision(attack: object) -> dict[str, int]:
    """Of a suite, whose stages may change while its spec stays; empty for other attacks."""
    return {"revision": attack.revision} if isinstance(attack, Revised) else {}


def _suite_entry(spec: str, ours: Sequence[Run], theirs: Sequence[Run]) -> dict[str, Any]:
    """A suite's runs against the reference's, pair by pair; the rows that one side breaks and the other does not."""
    pairs = [*zip(theirs, ours, strict=True)]
    ratios = [them.seconds / us.seconds for them, us in pairs]
    broken_by_reference = _broken_by_any(theirs)
    return {
        "spec": spec,
        "runs": [each.to_dict() for each in ours],
        "cpu_ratios": [round(ratio, 2) for ratio in ratios],
        "cpu_ratio": round(statistics.median(ratios), 2),
        "forward_ratio": round(statistics.median(them.forwards / us.forwards for them, us in pairs), 2),
        "backward_ratio": round(statistics.median(them.backwards / max(1, us.backwards) for them, us in pairs), 2),
        "missed": [
            {
                "row": row,
                "our_seed": seed,
                "felled_by": stage,
                "their_seeds": [s for s, them in enumerate(theirs) if row in them.broken],
            }
            for seed, us in enumerate(ours)
            for row, stage in sorted(broken_by_reference.items())
            if row not in us.broken
        ],
        "gained": [
            {"row": row, "our_seed": seed, "felled_by": stage}
            for seed, us in enumerate(ours)
            for row, stage in sorted(us.broken.items())
            if row not in broken_by_reference
        ],
    }


def _broken_by_any(runs: Sequence[Run]) -> dict[str, str]:
    """Rows that some run broke, and the stage of the first that did."""
    return {row: stage for each in reversed(runs) for row, stage in each.broken.items()}


def entries(requests: Sequence[dict[str, Any]], workers: int = 1, say: Say = log.info) -> Iterator[dict[str, Any]]:
    """`side_by_side` of every set of keywords, in their order; each whole in one process, so that its ratios hold.

    workers: processes that share them; what they say is heard when they are done
    """
    if workers == 1:
        for request in requests:
            yield side_by_side(**request, say=say)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for future in [pool.submit(_with_lines, request) for request in requests]:
            entry, lines = future.result()
            for line in lines:
                say(line)
            yield entry


def _with_lines(request: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    lines: list[str] = []
    return side_by_side(**request, say=lines.append), lines


def environment() -> dict[str, str]:
    """What the figures depend on besides the code."""
    versions = {"python": platform.python_version(), "machine": platform.machine(), "threads": "1"}
    for package in ("torch", "advkit", REFERENCE):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "missing"
    return versions
