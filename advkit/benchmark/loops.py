"""What the loop of an attack costs beside the model's passes: CPU time, and operations per step."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from advkit.attacks.gradient.apgd import APGDCE
from advkit.attacks.gradient.pgd import PGD
from advkit.attacks.minimal.fab import FABT
from advkit.attacks.peers import peer_package
from advkit.attacks.query.square import Square
from advkit.benchmark.sides import AsModule, labels_of, one_thread
from advkit.core.errors import UsageError
from advkit.core.lanes import Lanes
from advkit.core.oracle import MeteredOracle
from advkit.core.rng import RowRng
from advkit.core.speed import Speed, clock
from advkit.core.state import frozen
from advkit.evaluation.api import resolve
from advkit.evaluation.run.batch import on_device
from advkit.models import MODELS
from advkit.threat_models.goals.untargeted import Untargeted
from advkit.threat_models.lp import Linf


@dataclass(frozen=True)
class _Rows:
    """A model, and the task's first rows that it classifies correctly."""

    model: Any
    x: Tensor
    goal: Untargeted
    ids: tuple[str, ...]

    def first(self, size: int) -> _Rows:
        return _Rows(self.model, self.x[:size], self.goal.take(torch.arange(size)), self.ids[:size])


def _correct_rows(model: str, task: Any, rows: int, device: str = "cpu") -> _Rows:
    case = resolve("pgd", "none", task, model, n=None, device=device)
    batch = on_device(next(iter(case.task.batches(4 * rows))), device)
    labels = labels_of(case, batch)
    with torch.no_grad():
        correct = (case.victim(batch.x).argmax(1) == labels).nonzero().squeeze(1)[:rows]
    if len(correct) < rows:
        raise UsageError(f"{model} gets only {len(correct)} of {4 * rows} samples right; {rows} are needed")
    ids = tuple(batch.ids[i] for i in correct.tolist())
    return _Rows(case.victim, batch.x[correct], Untargeted(labels[correct]), ids)


# CPU time


@dataclass(frozen=True)
class _Loop:
    """A loop to time: a model, its task or the shape of its images, the batch sizes, and the steps of the attack."""

    model: str
    sizes: tuple[int, ...]
    steps: int
    task: str = ""
    shape: tuple[int, int, int] = (3, 32, 32)


LOOPS = (
    _Loop("zoo:fashion-mnist-cnn-pgd_at", (1, 20, 50, 250), 40, "fashion-mnist"),
    _Loop("resnet18", (1, 50), 1),
    _Loop("resnet18", (1,), 1, shape=(3, 224, 224)),
)
"""What the figures of `docs/benchmarks.md` are measured on; architectures have random weights, and images of noise."""


_LEAST = 0.2
"""CPU seconds of bare passes that a figure rests on at least; short ones are made over and over."""


def pgd_overhead(
    model: str | None = None,
    *,
    task: str = "",
    sizes: Sequence[int] = (1, 20, 50, 250),
    steps: int = 40,
    repetitions: int = 3,
    device: str = "cpu",
    beside: bool = True,
) -> dict[str, Any]:
    """CPU time of PGD's loop over that of the bare forward and backward passes it makes, at several batch sizes.

    Up to four figures each: called directly, at the batch's own shape; in the calls that `evaluate` makes, whose bits
    do not depend on the batch; in calls of at most 64 rows padded to multiples of 16, which it made before sizes were
    probed; and torchattacks' PGD, where it is installed. No row leaves before the last step. On an accelerator it is
    the time until the work is done.

    model:  measured alone; without it all of LOOPS
    beside: the last two as well
    """
    loops = LOOPS if model is None else (_Loop(model, tuple(sizes), steps, task),)
    return {"repetitions": repetitions, "loops": list(overheads(loops, repetitions, device, beside))}


def overheads(
    loops: Sequence[_Loop], repetitions: int, device: str = "cpu", beside: bool = True
) -> Iterator[dict[str, Any]]:
    """The entries of `pgd_overhead`, one after the other."""
    for each in loops:
        rows = _correct_rows(each.model, each.task, max(each.sizes), device) if each.task else _noise(each, device)
        for size in each.sizes:
            with one_thread(), frozen(*rows.model.modules()):
                ratios = _loop_ratios(rows, size, each.steps, repetitions, beside)
            yield {"model": each.model, "image": list(rows.x.shape[1:]), "steps": each.steps, **ratios}


def _noise(loop: _Loop, device: str) -> _Rows:
    """A network with random weights, images of noise, and what it answers for labels."""
    rows = max(loop.sizes)
    model = MODELS.build(loop.model)(loop.shape, 10, RowRng.from_ids(0, ["network"])).to(device)
    x = torch.rand(rows, *loop.shape, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        labels = torch.cat([model(part) for part in torch.split(x, 8)]).argmax(1)
    return _Rows(model, x, Untargeted(labels), tuple(map(str, range(rows))))


def _loop_ratios(all_: _Rows, size: int, steps: int, repetitions: int, beside: bool) -> dict[str, Any]:
    """The loop's time over that of bare passes, for one batch."""
    rows = all_.first(size)
    rng = RowRng.from_ids(0, rows.ids, device=rows.x.device)
    attack = PGD(steps=steps, stop=False, start="origin")
    ball = Linf(0.1).bind(rows.model.space)

    def loop(lanes: Lanes | None) -> None:
        attack(MeteredOracle(rows.model, size, lanes=lanes), rows.x, rows.goal, ball, rng)

    sides: dict[str, Callable[[], object]] = {
        "bare": partial(_bare, rows.model, rows.x, rows.goal.labels, steps),
        "direct": partial(loop, None),
        "evaluate": partial(loop, Lanes.probed(rows.model, all_.x, rows=math.inf, batch=size)),
    }
    if beside:
        sides["padded"] = partial(loop, Lanes.fitting(rows.x))
        if (peer := _peer(rows, steps)) is not None:
            sides["torchattacks"] = peer
    sides["bare"]()
    device = rows.x.device
    calls = max(1, round(_LEAST / _timed([sides["bare"]], 0, 1, device)[0]))
    times = [_timed(list(sides.values()), turn, calls, device) for turn in range(repetitions + 1)][1:]  # first: warm-up
    ratios = {
        name: round(statistics.median(each[place] / each[0] for each in times), 3)
        for place, name in enumerate(sides)
        if place
    }
    return {"batch": size, **ratios}


def _peer(rows: _Rows, steps: int) -> Callable[[], object] | None:
    """torchattacks' PGD with as many steps; None where it is not installed."""
    try:
        package = peer_package("torchattacks")
    except UsageError:
        return None
    module = AsModule(rows.model).eval().requires_grad_(False)
    attack = package.PGD(module, eps=0.1, alpha=0.01, steps=steps, random_start=False)
    return partial(attack, rows.x, rows.goal.labels)


def speeds(
    model: str = "zoo:fashion-mnist-cnn-pgd_at",
    *,
    task: Any = "fashion-mnist",
    names: Sequence[str] = ("fp32", "bf16", "fp16", "channels_last", "compile", "bf16+compile"),
    sizes: Sequence[int] = (64, 256, 1024),
    steps: int = 10,
    repetitions: int = 5,
    device: str = "cpu",
) -> dict[str, Any]:
    """Forward and backward passes of a model under each speed switch: time per sample, and how far answers move.

    On CUDA `compile` makes CUDA graphs. The first turn, in which compilers work, stands apart (`first_seconds`).
    `moved` is the largest change of a score against fp32, over the spread of the sample's scores.
    """
    rows = _correct_rows(model, task, max(sizes), device)
    table = []
    with frozen(*rows.model.modules()):
        for name in names:
            view = Speed.parse(name).view(rows.model, rows.x)
            table += [{"speed": name, **_view_entry(view, rows.first(size), steps, repetitions)} for size in sizes]
    return {"model": model, "steps": steps, "repetitions": repetitions, "speeds": table}


def _view_entry(view: Any, rows: _Rows, steps: int, repetitions: int) -> dict[str, Any]:
    """One view of the model beside the model itself, for one batch."""
    size = len(rows.x)
    sides = tuple(partial(_bare, asked, rows.x, rows.goal.labels, steps) for asked in (rows.model, view))
    times = [_timed(sides, turn, 1, rows.x.device) for turn in range(repetitions + 1)]
    with torch.no_grad():
        exact = rows.model(rows.x)
        moved = (view(rows.x) - exact).abs().amax(1) / (exact.amax(1) - exact.amin(1))
    return {
        "batch": size,
        "us_per_sample": round(1e6 * statistics.median(own for _, own in times[1:]) / (size * steps), 3),
        "times_faster": round(statistics.median(plain / own for plain, own in times[1:]), 3),
        "first_seconds": round(times[0][1], 2),
        "moved": float(f"{float(moved.max()):.2g}"),
    }


def _timed(sides: Sequence[Callable[[], object]], turn: int, loops: int, device: torch.device) -> list[float]:
    """Seconds of each side for so many calls; which side is first depends on the turn."""
    seconds = [0.0] * len(sides)
    for position in range(len(sides)):
        side = (position + turn) % len(sides)
        begin = clock(device)
        for _ in range(loops):
            sides[side]()
        seconds[side] = clock(device) - begin
    return seconds


def _bare(model: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor, steps: int) -> None:
    """As many passes as `steps` of PGD make, and nothing else."""
    for _ in range(steps):
        leaf = x.clone().requires_grad_()
        torch.autograd.grad(cross_entropy(model(leaf), labels, reduction="sum"), leaf)
    with torch.no_grad():
        model(x)


# Operations


class Ops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that reach torch's dispatcher, and those that wait for the device's result."""

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
    """Dispatcher operations and host synchronisations per step, exact and independent of the machine.

    64 rows, none of which is broken (a ball of almost no radius), in one lane of 64; a step's count is the difference
    between a longer and a shorter run, divided by the steps between them.
    """
    rows = _correct_rows(model, task, 64)
    with frozen(*rows.model.modules()), Ops() as bare:
        leaf = rows.x.clone().requires_grad_()
        torch.autograd.grad(cross_entropy(rows.model(leaf), rows.goal.labels, reduction="sum"), leaf)
    with torch.no_grad(), Ops() as forward:
        rows.model(rows.x)
    ball = Linf(1e-6).bind(rows.model.space)
    pgd, apgd = PGD(steps=5), APGDCE(steps=20)
    fab, square = FABT(steps=5, targets=1), Square(queries=50)
    return {
        "model": model,
        "bare": {"forward": forward.ops, "forward_and_backward": bare.ops},
        "steps": {
            "pgd": _per_step(rows, ball, pgd, replace(pgd, steps=15), 10),
            "apgd-ce": _per_step(rows, ball, apgd, replace(apgd, steps=60), 40),
            "fab-t": _per_step(rows, ball, fab, replace(fab, steps=15), 10),
            "square": _per_step(rows, ball, square, replace(square, queries=150), 100),
        },
    }


def _per_step(rows: _Rows, ball: Linf, few: Any, many: Any, steps: int) -> dict[str, float]:
    (few_ops, few_syncs), (many_ops, many_syncs) = _counts(rows, ball, few), _counts(rows, ball, many)
    return {"ops": (many_ops - few_ops) / steps, "syncs": (many_syncs - few_syncs) / steps}


def _counts(rows: _Rows, ball: Linf, attack: Any) -> tuple[int, int]:
    """Operations and synchronisations of one run of the attack."""
    oracle = MeteredOracle(rows.model, len(rows.x), lanes=Lanes())
    rng = RowRng.from_ids(0, rows.ids)
    with frozen(*rows.model.modules()), Ops() as ops:
        attack(oracle, rows.x, rows.goal, ball, rng)
    return ops.ops, ops.syncs
