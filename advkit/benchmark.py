"""Side by side with a peer in one process: robust accuracy, flags per image, passes, CPU time, dispatcher operations.

Times are CPU seconds of this process on one thread. Repetitions are interleaved and every figure is the median of the
ratios of runs that stood beside each other, so that another program on the machine weighs on both sides alike. Passes
are counted on the model itself, for both sides with the same hooks.
"""

from __future__ import annotations

import logging
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from advkit.attacks import ATTACKS
from advkit.attacks.gradient.apgd import APGDCE
from advkit.attacks.gradient.pgd import PGD
from advkit.attacks.minimal.fab import FABT
from advkit.attacks.peers import peer_package
from advkit.attacks.query.square import Square
from advkit.core.errors import UsageError
from advkit.core.oracle import Lanes, MeteredOracle, frozen
from advkit.core.protocols import Batch, Outcome
from advkit.core.rng import RowRng
from advkit.evaluation.api import resolve
from advkit.evaluation.execute import run
from advkit.evaluation.run.batch import on_device
from advkit.evaluation.run.case import Case
from advkit.evaluation.run.engine import open_store
from advkit.models.torch import TorchModel
from advkit.threat_models.goals.untargeted import Untargeted
from advkit.threat_models.lp import Linf

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

    def forth(_: nn.Module, inputs: Any, answer: Tensor) -> None:
        passes.calls += 1
        passes.forwards += len(answer)
        if answer.requires_grad:
            answer.register_hook(back)  # type: ignore[no-untyped-call]

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

    seconds: CPU time
    wrong:   ids of the rows that are wrong untouched
    felled:  the stage that felled a row, by id
    stages:  seconds per stage, where the side tells
    refuted: rows that only a fast view of the model took for fallen
    """

    seconds: float
    forwards: int
    backwards: int
    calls: int
    rows: int
    wrong: frozenset[str]
    felled: dict[str, str]
    stages: dict[str, float] = field(default_factory=dict)
    refuted: int = 0

    @property
    def robust_accuracy(self) -> float:
        return (self.rows - len(self.wrong) - len(self.felled)) / self.rows

    def to_dict(self) -> dict[str, Any]:
        by_stage: dict[str, int] = {}
        for stage in self.felled.values():
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
    """The case played and judged by the harness into a folder that is thrown away.

    Copies of the model that speed switches compute on carry the counting hooks along; a compiled one does not call
    them, and its passes are then those of the records, without padding and verdicts.
    """
    with tempfile.TemporaryDirectory(prefix="advkit-") as folder, counted(case.victim.modules()[0]) as passes:
        store = open_store(case, Path(folder))
        begin = time.process_time()
        records = run(case, store)
        seconds = time.process_time() - begin
        store.close()
    if case.speed.compile:
        passes.forwards, passes.backwards = sum(r.forwards for r in records), sum(r.backwards for r in records)
    wrong = frozenset(r.id for r in records if r.outcome == Outcome.WRONG)
    felled = {r.id: r.attack.partition("/")[2] or r.attack for r in records if r.outcome == Outcome.BROKEN}
    refuted = sum(any(note.startswith("refuted_") for note in r.notes) for r in records)
    return Run(seconds, passes.forwards, passes.backwards, passes.calls, case.n, wrong, felled, refuted=refuted)


class _AsModule(nn.Module):
    """A model of ours, normalisation inside, as a peer wants it; parameters live, as users hand theirs over."""

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


def reference_run(case: Case, batch_size: int = 250) -> Run:
    """AutoAttack standard of pyautoattack, the authors' code, on the rows of the case with the case's seed.

    Its attacks are asked for one after the other, to learn which felled a row; each reseeds from the one seed, so the
    flags are those of a run in one go. What it returns is judged by our threat model and the victim, not by itself.
    """
    peer = peer_package("pyautoattack")
    batch = on_device(next(iter(case.task.batches(case.n, n=case.n))), "cpu")
    x, labels = batch.x, _labels(case, batch)
    victim = _AsModule(cast(Any, case.victim))
    made, ball = {}, case.threat.describe()
    with torch.random.fork_rng(devices=[]), _hushed("auto-attack"), counted(victim.module) as passes:
        with torch.no_grad():
            sound = victim(x).argmax(1) == labels
        passes.forwards = passes.calls = 0
        begin = time.process_time()
        adversary = peer.AutoAttack(
            victim, norm=ball["norm"], eps=ball["eps"], seed=case.seed, version="standard", device="cpu"
        )
        standing = sound.nonzero().squeeze(1)
        felled: dict[str, str] = {}
        for stage in adversary.attacks_to_run[:]:
            if not len(standing):
                break
            start = time.process_time()
            adversary.attacks_to_run = [stage]
            z, _ = adversary.run_standard_evaluation(x[standing], labels[standing], batch_size=batch_size)
            with torch.no_grad():
                fell = (victim(z).argmax(1) != labels[standing]) & case.threat.admits(z, x[standing])
            felled.update((batch.ids[i], stage) for i in standing[fell].tolist())
            standing = standing[~fell]
            made[stage] = time.process_time() - start
        seconds = time.process_time() - begin
    wrong = frozenset(batch.ids[i] for i in (~sound).nonzero().flatten().tolist())
    return Run(seconds, passes.forwards, passes.backwards, passes.calls, case.n, wrong, felled, made)


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
    say: Say = log.info,
) -> dict[str, Any]:
    """One model: the reference and the suites, repetition by repetition, each with the repetition's number as its seed.

    suites:    names or specs of attacks; "thorough@bf16" is thorough at that speed
    reference: "pyautoattack", or the spec of any attack, which the harness then plays (`torchattacks:AutoAttack`)
    speed:     of the suites that do not say one; the reference is always full precision
    """
    names = {suite: ATTACKS.label(ATTACKS.build(suite.partition("@")[0])) for suite in suites}
    runs: dict[str, list[Run]] = {name: [] for name in (reference, *suites)}
    order = list(runs)
    with one_thread():
        for repetition in range(repetitions):
            turn = repetition % len(order)
            for name in order[turn:] + order[:turn]:
                attack, _, pace = ("pgd" if name == REFERENCE else name).partition("@")
                pace = "fp32" if name == reference else pace or speed
                case = resolve(
                    attack, "none", task, model, threat_model, n=n, seed=repetition, device="cpu", speed=pace
                )
                done = reference_run(case) if name == REFERENCE else our_run(case)
                runs[name].append(done)
                say(
                    f"{model} {case.specs['threat_model']} {name} seed {repetition}: {done.robust_accuracy:.4f} in "
                    f"{done.seconds:.1f} CPU s"
                )
    theirs = runs[reference]
    fooled_any = {row: stage for done in reversed(theirs) for row, stage in done.felled.items()}
    entry: dict[str, Any] = {
        "model": model,
        "threat_model": case.specs["threat_model"],
        "task": case.specs["task"],
        "n": case.n,
        "clean_accuracy": 1 - len(theirs[0].wrong) / case.n,
        "reference": {
            "name": reference,
            "runs": [done.to_dict() for done in theirs],
            "fooled_under_some_seeds_only": sorted(
                row for row in fooled_any if not all(row in done.felled for done in theirs)
            ),
        },
        "suites": {},
    }
    for suite in suites:
        ours = runs[suite]
        ratios = [them.seconds / us.seconds for them, us in zip(theirs, ours, strict=True)]
        entry["suites"][suite] = {
            "spec": names[suite],
            "runs": [done.to_dict() for done in ours],
            "cpu_ratios": [round(ratio, 2) for ratio in ratios],
            "cpu_ratio": round(statistics.median(ratios), 2),
            "forward_ratio": round(
                statistics.median(t.forwards / u.forwards for t, u in zip(theirs, ours, strict=True)), 2
            ),
            "backward_ratio": round(
                statistics.median(t.backwards / max(1, u.backwards) for t, u in zip(theirs, ours, strict=True)), 2
            ),
            "missed": [
                {
                    "row": row,
                    "our_seed": seed,
                    "felled_by": stage,
                    "their_seeds": [s for s, done in enumerate(theirs) if row in done.felled],
                }
                for seed, us in enumerate(ours)
                for row, stage in sorted(fooled_any.items())
                if row not in us.felled
            ],
            "gained": [
                {"row": row, "our_seed": seed, "felled_by": stage}
                for seed, us in enumerate(ours)
                for row, stage in sorted(us.felled.items())
                if row not in fooled_any
            ],
        }
    return entry


def entries(asked: Sequence[dict[str, Any]], workers: int = 1, say: Say = log.info) -> Iterator[dict[str, Any]]:
    """`side_by_side` of every set of keywords, in their order; each whole in one process, so that its ratios stand.

    workers: processes that share them; what they say is heard when they are done
    """
    if workers == 1:
        for one in asked:
            yield side_by_side(**one, say=say)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for future in [pool.submit(_heard, one) for one in asked]:
            entry, lines = future.result()
            for line in lines:
                say(line)
            yield entry


def _heard(asked: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    lines: list[str] = []
    return side_by_side(**asked, say=lines.append), lines


def _victim(model: str, task: Any, rows: int) -> tuple[Case, Tensor, Untargeted, tuple[str, ...]]:
    """A case for the loops below, and its first rows that the model gets right."""
    case = resolve("pgd", "none", task, model, n=None, device="cpu")
    batch = next(iter(case.task.batches(4 * rows)))
    labels = _labels(case, batch)
    with torch.no_grad():
        right = (case.victim(batch.x).argmax(1) == labels).nonzero().squeeze(1)[:rows]
    if len(right) < rows:
        raise UsageError(f"{model} gets only {len(right)} of {4 * rows} rows right; {rows} are needed")
    return case, batch.x[right], Untargeted(labels[right]), tuple(batch.ids[i] for i in right.tolist())


def _labels(case: Case, batch: Batch) -> Tensor:
    if batch.labels is None:
        raise UsageError(f"task {case.task.name} has no labels: a benchmark needs them")
    return batch.labels


def _bare(model: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor, steps: int) -> None:
    """As many passes as `steps` of PGD make, and nothing else."""
    for _ in range(steps):
        leaf = x.clone().requires_grad_()
        torch.autograd.grad(cross_entropy(model(leaf), labels, reduction="sum"), leaf)
    with torch.no_grad():
        model(x)


def pgd_overhead(
    model: str = "zoo:fashion-mnist-cnn-pgd_at",
    *,
    task: Any = "fashion-mnist",
    sizes: Sequence[int] = (1, 10, 50, 250),
    steps: int = 20,
    repetitions: int = 9,
) -> dict[str, Any]:
    """CPU time of PGD's loop over that of the bare forward and backward passes it makes, at several batch sizes.

    Two figures each: the loop alone, at the batch's own shape, and in the harness's lanes, whose padding buys bits that
    do not depend on the batch (on a CPU one row is evaluated in the company of fifteen copies).
    """
    case, x, goal, ids = _victim(model, task, max(sizes))
    attack = PGD(steps=steps, stop=False, start="origin")
    ball = Linf(0.1).bind(case.victim.space)
    found: list[dict[str, Any]] = []
    with one_thread(), frozen(*case.victim.modules()):
        for size in sizes:
            rows, aim = x[:size], goal.take(torch.arange(size))
            rng = RowRng.from_ids(0, ids[:size])
            loops = max(1, 50 // size)

            def ours(lanes: Lanes, rows: Tensor = rows, aim: Untargeted = aim, rng: RowRng = rng) -> None:
                attack(MeteredOracle(case.victim, len(rows), lanes=lanes), rows, aim, ball, rng)

            sides: tuple[Callable[[], object], ...] = (
                partial(_bare, case.victim, rows, aim.labels, steps),
                partial(ours, Lanes(chunk=size, multiple=1)),
                partial(ours, Lanes()),
            )
            times: list[list[float]] = []
            for repetition in range(repetitions + 1):
                made = [0.0] * len(sides)
                for at in range(len(sides)):
                    side = (at + repetition) % len(sides)
                    begin = time.process_time()
                    for _ in range(loops):
                        sides[side]()
                    made[side] = time.process_time() - begin
                if repetition:  # the first warms up
                    times.append(made)
            found.append(
                {
                    "batch": size,
                    "loop": round(statistics.median(t[1] / t[0] for t in times), 3),
                    "in_lanes": round(statistics.median(t[2] / t[0] for t in times), 3),
                }
            )
    return {"model": model, "steps": steps, "repetitions": repetitions, "sizes": found}


class Ops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that reach torch's dispatcher, and those that wait for the device's answer."""

    WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::is_nonzero")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops = 0
        self.syncs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops += 1
        name = func._schema.name
        masks = name in ("aten::index", "aten::index_put_", "aten::index_put") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        )
        self.syncs += masks or name in self.WAITS
        return func(*args, **(kwargs or {}))


def dispatcher_ops(model: str = "zoo:fashion-mnist-cnn-pgd_at", *, task: Any = "fashion-mnist") -> dict[str, Any]:
    """Dispatcher operations and host synchronisations per step, exact and free of the machine.

    64 rows, none of which falls (a ball of almost no radius), in one lane of 64; a step's count is the difference
    between a longer and a shorter run, divided by the steps between them.
    """
    case, x, goal, ids = _victim(model, task, 64)
    ball = Linf(1e-6).bind(case.victim.space)
    rng = RowRng.from_ids(0, ids)

    def count(attack: Any) -> tuple[int, int]:
        oracle = MeteredOracle(case.victim, len(x), lanes=Lanes())
        with frozen(*case.victim.modules()), Ops() as ops:
            attack(oracle, x, goal, ball, rng)
        return ops.ops, ops.syncs

    def per_step(few: Any, many: Any, steps: int) -> dict[str, float]:
        (few_ops, few_syncs), (many_ops, many_syncs) = count(few), count(many)
        return {"ops": (many_ops - few_ops) / steps, "syncs": (many_syncs - few_syncs) / steps}

    with frozen(*case.victim.modules()), Ops() as bare:
        leaf = x.clone().requires_grad_()
        torch.autograd.grad(cross_entropy(case.victim(leaf), goal.labels, reduction="sum"), leaf)
    with torch.no_grad(), Ops() as forward:
        case.victim(x)
    pgd, apgd = PGD(steps=5), APGDCE(steps=20)
    fab, square = FABT(steps=5, targets=1), Square(queries=50)
    return {
        "model": model,
        "bare": {"forward": forward.ops, "forward_and_backward": bare.ops},
        "steps": {
            "pgd": per_step(pgd, replace(pgd, steps=15), 10),
            "apgd-ce": per_step(apgd, replace(apgd, steps=60), 40),
            "fab-t": per_step(fab, replace(fab, steps=15), 10),
            "square": per_step(square, replace(square, queries=150), 100),
        },
    }


def environment() -> dict[str, str]:
    """What the figures depend on besides the code."""
    found = {"python": platform.python_version(), "machine": platform.machine(), "threads": "1"}
    for package in ("torch", "advkit", REFERENCE):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def markdown(found: dict[str, Any]) -> str:
    """The tables as a page."""
    lines = [
        "# Benchmarks",
        "",
        "Made by",
        "",
        f"    {found['command']}",
        "",
        "CPU seconds of one process on one thread; the sides are interleaved and a ratio is the median of the ratios",
        "of neighbouring runs. Passes are samples that went through the model, counted by the same hooks",
        "on both sides, padding and verdicts included. "
        + ", ".join(f"{name} {value}" for name, value in found["environment"].items())
        + ".",
        "",
    ]
    threats = dict.fromkeys(entry["threat_model"] for entry in found.get("suites", ()))
    for threat in threats:
        lines += _suites_page([entry for entry in found["suites"] if entry["threat_model"] == threat])
    if found.get("overhead"):
        lines += _overhead_page(found["overhead"])
    if found.get("ops"):
        lines += _ops_page(found["ops"])
    return "\n".join(lines).rstrip() + "\n"


def _suites_page(entries: Sequence[dict[str, Any]]) -> list[str]:
    first = entries[0]
    reference, repetitions = first["reference"]["name"], len(first["reference"]["runs"])
    lines = [
        f"## {first['threat_model']}: suites against {reference}"
        + (" (AutoAttack standard)" if reference == REFERENCE else ""),
        "",
        f"{first['n']} samples of {first['task']}, {repetitions} repetitions with seeds 0 to {repetitions - 1} on both "
        "sides. RA is robust accuracy, one figure where all seeds agree. *Missed* are",
        "samples that the reference breaks under any of its seeds and the suite does not, *gained* the converse, each",
        "the worst of our seeds.",
        "",
        "| model | side | RA | CPU s | times less CPU | forwards k | backwards k | missed | gained |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in entries:
        theirs = entry["reference"]
        unsteady = len(theirs["fooled_under_some_seeds_only"])
        lines.append(
            f"| {entry['model']} | {reference} | {_spread(theirs['runs'])} | {_middle(theirs['runs'], 'seconds'):.1f} "
            f"|  | {_middle(theirs['runs'], 'forwards') / 1e3:.0f} | {_middle(theirs['runs'], 'backwards') / 1e3:.0f} "
            f"| {unsteady} by some seeds only |  |"
        )
        for name, suite in entry["suites"].items():
            lines.append(
                f"| | {name} | {_spread(suite['runs'])} | {_middle(suite['runs'], 'seconds'):.1f} "
                f"| {suite['cpu_ratio']:.1f} | {_middle(suite['runs'], 'forwards') / 1e3:.0f} "
                f"| {_middle(suite['runs'], 'backwards') / 1e3:.0f} | {_worst(suite['missed'])} "
                f"| {_worst(suite['gained'])} |"
            )
    lines.append("")
    for name in first["suites"]:
        ratios = [entry["suites"][name]["cpu_ratio"] for entry in entries if name in entry["suites"]]
        target = TARGETS.get(name.partition("@")[0])
        goal = f" (goal {target:g})" if target and reference == REFERENCE else ""
        lines.append(
            f"- `{name}`: {min(ratios):.1f} to {max(ratios):.1f} times less CPU time, median of the models "
            f"{statistics.median(ratios):.1f}{goal}"
        )
    lines += ["", "### Samples missed", ""]
    missed = [
        f"- {name} on {entry['model']}: {_row(one)}"
        for entry in entries
        for name, suite in entry["suites"].items()
        for one in suite["missed"]
    ]
    lines += missed or ["None by any suite under any seed."]
    lines += ["", "### What broke the samples", "", "Samples broken by each stage, first seed.", ""]
    for entry in entries:
        told = [f"{reference}: {_stages(entry['reference']['runs'][0])}"]
        told += [f"{name}: {_stages(suite['runs'][0])}" for name, suite in entry["suites"].items()]
        lines += [f"- {entry['model']}", *(f"  - {one}" for one in told)]
    return [*lines, ""]


def _row(one: dict[str, Any]) -> str:
    seeds = ", ".join(str(seed) for seed in one["their_seeds"])
    return f"{one['row']} under our seed {one['our_seed']}; broken by {one['felled_by']} under their seeds {seeds}"


def _stages(run: dict[str, Any]) -> str:
    return ", ".join(f"{stage} {count}" for stage, count in run["felled_by"].items()) or "none"


def _middle(runs: Sequence[dict[str, Any]], key: str) -> float:
    return float(statistics.median(run[key] for run in runs))


def _spread(runs: Sequence[dict[str, Any]]) -> str:
    values = sorted({run["robust_accuracy"] for run in runs})
    return f"{values[0]:.4g}" if len(values) == 1 else f"{values[0]:.4g} to {values[-1]:.4g}"


def _worst(rows: Sequence[dict[str, Any]]) -> int:
    counts: dict[int, int] = {}
    for one in rows:
        counts[one["our_seed"]] = counts.get(one["our_seed"], 0) + 1
    return max(counts.values(), default=0)


def _overhead_page(found: dict[str, Any]) -> list[str]:
    lines = [
        "## PGD against bare passes",
        "",
        f"PGD of {found['steps']} steps on {found['model']} over as many bare forward and backward passes of the same",
        f"batch, medians of {found['repetitions']}. *In lanes* is what the harness runs: on a CPU, calls padded to a",
        "multiple of 16 rows and at most 64, so that the bits of a row do not depend on its batch; below 16 rows the",
        "padding is what is paid for.",
        "",
        "| batch | loop / bare | in lanes / bare |",
        "|---|---|---|",
        *(f"| {row['batch']} | {row['loop']:.2f} | {row['in_lanes']:.2f} |" for row in found["sizes"]),
        "",
    ]
    return lines


def _ops_page(found: dict[str, Any]) -> list[str]:
    bare = found["bare"]
    return [
        "## Dispatcher operations per step",
        "",
        f"On {found['model']}, exact counts; a bare forward is {bare['forward']}, a bare forward and backward "
        f"{bare['forward_and_backward']}. A step of Square is one query, of FAB-T one step toward one target.",
        "",
        "| attack | operations | host synchronisations |",
        "|---|---|---|",
        *(f"| {name} | {step['ops']:.4g} | {step['syncs']:.3g} |" for name, step in found["steps"].items()),
        "",
    ]
