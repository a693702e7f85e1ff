"""The engine's goals as one table: what a figure was before, what it is now, and what bounds it from below."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from advkit.benchmark.loops import LOOPS, overheads
from advkit.benchmark.sides import one_thread, our_run
from advkit.benchmark.training import epoch_ratios
from advkit.evaluation.api import resolve

NOT_INSTALLED = "not installed"
FEW, MANY = 40, 340
"""Numbers of samples whose runs tell what one record costs."""

PGD = {
    (LOOPS[0].model, 1): ("2.9; 5.05", "1.25; 2"),
    (LOOPS[0].model, 20): ("1.65", "1.10"),
    (LOOPS[0].model, 50): ("1.46", "1.08"),
    (LOOPS[0].model, 250): ("1.26", "1.04"),
    ("resnet18 32", 1): ("8.7", "1.05"),
    ("resnet18 32", 50): ("1.24", "1.03"),
    ("resnet18 224", 1): ("3.3", "1.05"),
}
"""Before and goal of PGD over bare passes, by model (and width of the image) and batch size."""

STARTED = {
    "torch": ["-c", "import torch"],
    "python": ["-c", "import advkit; advkit.evaluate(task='digits', model='zoo:digits-mlp', attack='pgd', n=10)"],
    "command": ["-m", "advkit", "evaluate", "--task", "digits", "--model", "zoo:digits-mlp", "-n", "10"],
    "help": ["-m", "advkit", "--help"],
}
"""Programs whose start is timed: arguments of the interpreter."""


def goals_table(repetitions: int = 3) -> Iterator[dict[str, str]]:
    """Every goal's figure: name, before, now, goal, limit. For those of suites see `side_by_side`."""
    yield _record(repetitions)
    yield from _training(repetitions)
    yield from _starts(repetitions)
    yield from _loops(repetitions)


def _row(name: str, before: str, now: str, goal: str, limit: str) -> dict[str, str]:
    return {"name": name, "before": before, "now": now, "goal": goal, "limit": limit}


def _loops(repetitions: int) -> Iterator[dict[str, str]]:
    for each in overheads(LOOPS, repetitions, beside=False):
        width, batch = each["image"][-1], each["batch"]
        known = PGD.get((each["model"], batch)) or PGD[f"{each['model']} {width}", batch]
        name = f"PGD over bare passes, {each['model']}, {width} x {width}, batch {batch}: direct; by `evaluate`"
        yield _row(name, known[0], f"{each['direct']:.2f}; {each['evaluate']:.2f}", known[1], "1.00")


def _starts(repetitions: int) -> list[dict[str, str]]:
    turns = [{name: _cpu(arguments) for name, arguments in STARTED.items()} for _ in range(repetitions)]

    def above(name: str) -> float:
        return statistics.median(turn[name] - turn["torch"] for turn in turns)

    share = statistics.median(turn["torch"] / turn["help"] for turn in turns)
    torch_ = statistics.median(turn["torch"] for turn in turns)
    what = f"CPU s above `import torch` ({torch_:.1f} s here) of a run of 10 digits"
    return [
        _row(f"{what}, from Python", "2.0", f"{above('python'):.2f}", "0.5", "0.06"),
        _row(f"{what}, command line", "3.0", f"{above('command'):.2f}", "1.2", "0.06"),
        _row("`advkit --help` over `import torch`", "1/11.5", f"1/{share:.1f}", "1/30", "1/85"),
    ]


def _cpu(arguments: list[str]) -> float:
    """CPU seconds of a program of its own, in an empty folder, where no run of before can be resumed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory(prefix="advkit-") as folder:
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True, cwd=folder)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _training(repetitions: int) -> list[dict[str, str]]:
    found = epoch_ratios(10, repetitions=repetitions)
    madry = f"{found['madry_over_fit']:.2f}" if "madry_over_fit" in found else NOT_INSTALLED
    return [
        _row("PGD-10 training epoch over bare passes", "1.28", f"{found['fit_over_bare']:.2f}", "1.10", "1.00"),
        _row("ART's Madry trainer over ours", "1.4 to 1.56", madry, "1.8", ""),
    ]


def _record(repetitions: int) -> dict[str, str]:
    """What a sample more costs in a run of one gradient step, its passes included."""

    def seconds(n: int) -> float:
        done = our_run(resolve("fgsm", "none", "digits", "zoo:digits-mlp", "linf:eps=0.1", n=n, device="cpu"))
        assert done.rows == n
        return done.seconds

    with one_thread():
        seconds(FEW)
        turns = [(seconds(MANY) - seconds(FEW)) / (MANY - FEW) for _ in range(5 * repetitions)]
    return _row("CPU us per record (digits, FGSM)", "140", f"{1e6 * statistics.median(turns):.0f}", "40", "8")
