"""A sample whose attack, victim, judge or goal does not come back is an error record, and the run goes on."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import advkit
from advkit.core import limits
from advkit.core.errors import BadModel, UsageError
from advkit.core.protocols import Access, Examines, Outcome, Record
from advkit.evaluation.run.store import read_records
from advkit.models import zoo
from advkit.tasks import TASKS
from advkit.tasks.arrays import Arrays
from advkit.threat_models.goals.untargeted import UntargetedRule

EPS = "linf:eps=0.1"
N = 24
FIRST = next(iter(TASKS.build("digits").batches(N, n=N)))
SECONDS = 0.5


def hang() -> None:
    while True:
        time.sleep(0.01)


def hang_in_c() -> None:
    """Minutes in compiled code that looks at no signal."""
    hashlib.pbkdf2_hmac("sha256", b"", b"", 1_000_000_000)


def rows() -> Arrays:
    assert FIRST.labels is not None
    return Arrays(FIRST.x, FIRST.labels, classes=10)


def holds(x: torch.Tensor, row: int, reach: float = 0.0) -> bool:
    return bool(((x - FIRST.x[row]).abs().flatten(1).amax(1) <= reach).any())


class Net(nn.Module):
    """The digits MLP; hangs on one sample, or on what is made of it."""

    def __init__(self, row: int = -1, near: bool = False, how: Any = hang) -> None:
        super().__init__()
        self.inner, self.row, self.near, self.how = zoo.load("digits-mlp-pgd_at").module, row, near, how
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.row >= 0 and (holds(x, self.row, 0.11) and not holds(x, self.row) if self.near else holds(x, self.row)):
            self.how()
        return self.inner(x)


@dataclass(frozen=True)
class Walks:
    """A step against the sign of the gradient; does not come back from one sample."""

    row: int = -1
    how: str = ""
    together: bool = False
    needs: ClassVar[Access] = Access.GRADIENTS

    def __call__(self, oracle: Any, x: Any, goal: Any, ball: Any, rng: Any, /) -> Any:
        if self.row >= 0 and holds(x, self.row):
            hang_in_c() if self.how == "c" else hang()
        _, gradient, _ = oracle.gradient(x, goal)
        return ball.project(x + ball.steepest(-gradient, x), x)


def run(folder: Path, attack: Any = None, model: Any = None, **more: Any) -> tuple[Any, dict[str, Record]]:
    asked = {"task": rows(), "threat_model": EPS, "batch_size": 8, "device": "cpu", "sample_timeout": SECONDS, **more}
    report = advkit.evaluate(attack or Walks(), model=model or Net(), out=folder, **asked)
    return report, {record.id: record for record in read_records(folder / "records.jsonl")}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    """Nobody hangs, and nobody looks at a clock."""
    return run(tmp_path_factory.mktemp("plain"), sample_timeout=None)[1]


def others_stand(found: dict[str, Record], plain: dict[str, Record], row: int) -> Record:
    """The records of the others are those of a run in which nobody hangs; gives that of the one."""
    assert list(found) == list(plain)
    names = list(found)
    told = {name: (r.outcome, r.distance, r.margin, r.clean, r.forwards) for name, r in found.items()}
    want = {name: (r.outcome, r.distance, r.margin, r.clean, r.forwards) for name, r in plain.items()}
    assert {k: v for k, v in told.items() if k != names[row]} == {k: v for k, v in want.items() if k != names[row]}
    return found[names[row]]


def flags(report: Any) -> dict[str, dict[str, Any]]:
    return {flag["id"]: flag for flag in report.to_dict()["diagnostics"]["flags"]}


@pytest.mark.parametrize("row", [0, pytest.param(13, marks=pytest.mark.slow)])
def test_an_attack_that_hangs_costs_its_sample(row, plain, tmp_path):
    """Also on the first sample, on which every attack is tried before the run."""
    report, found = run(tmp_path, Walks(row))
    one = others_stand(found, plain, row)
    assert one.outcome == Outcome.ERROR
    assert one.message == "timed out after 0.5 s"
    assert "timed_out" in one.notes
    assert one.clean == list(plain.values())[row].clean  # what the victim says of the clean sample is known
    assert report.metrics["clean_accuracy"]["numerator"] == sum(r.outcome != Outcome.WRONG for r in plain.values())
    flag = flags(report)["timed_out"]
    assert flag["severity"] == "unreliable"
    assert "the attack did not come back in time on 1 of 24 samples (timed out after 0.5 s)" in flag["message"]
    assert not report.trustworthy
    assert "attack_error" not in flags(report)
    assert report.to_dict()["request"]["sample_timeout"] == SECONDS


@pytest.mark.parametrize("row", [pytest.param(1, marks=pytest.mark.slow), 13])
def test_a_victim_that_hangs_costs_its_sample(row, plain, tmp_path):
    report, found = run(tmp_path, model=Net(row))
    one = others_stand(found, plain, row)
    assert one.outcome == Outcome.ERROR
    assert one.message == "timed out after 0.5 s"
    assert {"timed_out", "clean_raised", "model_raised"} <= set(one.notes)
    assert "the victim did not come back in time" in flags(report)["timed_out"]["message"]


@pytest.mark.slow
def test_a_victim_that_hangs_on_what_the_attack_makes(plain, tmp_path):
    row = next(i for i, r in enumerate(plain.values()) if r.outcome != Outcome.WRONG and i > 3)
    _, found = run(tmp_path, model=Net(row, near=True))
    one = others_stand(found, plain, row)
    assert one.outcome == Outcome.ERROR
    assert one.clean is not None
    assert {"timed_out", "model_raised"} <= set(one.notes)


class Looks(Examines):
    """A goal whose figures take for ever on one sample."""

    def __init__(self, goal: Any, row: int) -> None:
        self.goal, self.row = goal, row

    def __getattr__(self, name: str) -> Any:
        return getattr(self.goal, name)

    def take(self, at: Any) -> Any:
        return Looks(self.goal.take(at), self.row)

    def to(self, device: Any) -> Any:
        return Looks(self.goal.to(device), self.row)

    def examine(self, evidence: Any) -> Any:
        if holds(evidence.origin, self.row):
            hang()
        return {}


class LooksRule(UntargetedRule):
    def __init__(self, row: int) -> None:
        object.__setattr__(self, "row", row)

    def __call__(self, labels: Any, answer: Any, rng: Any) -> Any:
        return Looks(super().__call__(labels, answer, rng), self.row)


def test_a_goal_that_hangs_costs_its_sample(plain, tmp_path):
    _, found = run(tmp_path, goal=LooksRule(13))
    one = others_stand(found, plain, 13)
    assert one.outcome == Outcome.ERROR
    assert "timed_out" in one.notes


@pytest.mark.slow
def test_an_attack_on_all_samples_at_once_has_the_time_of_all_of_them(plain, tmp_path):
    start = time.monotonic()
    _, found = run(tmp_path, Walks(13, together=True), sample_timeout=0.2)
    assert {r.outcome for r in found.values()} == {Outcome.ERROR, Outcome.WRONG} - ({Outcome.WRONG} if not any(
        r.outcome == Outcome.WRONG for r in plain.values()) else set())  # fmt: skip
    assert time.monotonic() - start > 0.2 * sum(r.outcome == Outcome.ERROR for r in found.values())


def test_without_a_hang_records_and_case_are_the_same(plain, tmp_path):
    report, found = run(tmp_path, sample_timeout=600)
    assert found == plain
    assert "timed_out" not in flags(report)
    again = run(tmp_path, sample_timeout=None)  # the same case: the folder is taken up
    assert again[1] == found


@pytest.mark.slow
def test_a_resumed_run_ends_in_the_same_records(tmp_path):
    _, found = run(tmp_path / "whole", Walks(13))
    run(tmp_path / "cut", Walks(13))
    file = tmp_path / "cut" / "records.jsonl"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:9]))
    assert run(tmp_path / "cut", Walks(13))[1] == found


@pytest.mark.slow
def test_a_slow_batch_is_no_slow_sample(plain, tmp_path):
    """Eight samples take longer than one may: they are attacked in parts, and every one of them is judged."""

    @dataclass(frozen=True)
    class Slow(Walks):
        def __call__(self, oracle: Any, x: Any, goal: Any, ball: Any, rng: Any, /) -> Any:
            time.sleep(0.05 * len(x))
            return super().__call__(oracle, x, goal, ball, rng)

    report, found = run(tmp_path, Slow(), sample_timeout=0.2)
    assert {name: r.outcome for name, r in found.items()} == {name: r.outcome for name, r in plain.items()}
    assert report.trustworthy


def test_a_victim_that_never_answers_is_refused_in_one_line(tmp_path):
    class Never(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hang()
            return x

    with pytest.raises(BadModel, match=r"timed out after 0\.4 s") as told:
        run(tmp_path, model=Never().eval(), sample_timeout=0.1)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "records.jsonl").exists()


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_a_time_that_is_none_is_refused(seconds, tmp_path):
    with pytest.raises(UsageError, match="sample_timeout"):
        run(tmp_path, sample_timeout=seconds)


def test_the_command_line_and_its_exit_status(tmp_path, monkeypatch, capsys):
    from advkit.cli.main import run as advkit_command

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADVKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "a_victim_that_hangs.py").write_text(
        "import time, torch\nfrom torch import nn\nfrom advkit.models import zoo\nfrom advkit.tasks import TASKS\n"
        "BAD = next(iter(TASKS.build('digits').batches(12, n=12))).x[9]\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.inner = zoo.load('digits-mlp').module\n"
        "    def forward(self, x):\n"
        "        while bool((x == BAD).flatten(1).all(1).any()):\n            time.sleep(0.01)\n"
        "        return self.inner(x)\n"
    )
    asked = [
        "evaluate", "--task", "digits", "--model", "python:a_victim_that_hangs:Net", "--attack", "fgsm", "--n", "12",
        "--device", "cpu", "--no-plots", "--out", "run",
    ]  # fmt: skip
    assert advkit_command([*asked, "--sample-timeout", "0.3"]) == 3
    assert "timed_out" in capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["request"]["sample_timeout"] == 0.3
    assert any(
        "did not come back in time on 1 of 12 samples" in flag["message"] for flag in report["diagnostics"]["flags"]
    )
    assert advkit_command([*asked, "--sample-timeout", "0"]) == 2
    assert "sample_timeout is 0" in capsys.readouterr().err
    sys.modules.pop("a_victim_that_hangs", None)


@pytest.mark.slow
def test_who_can_not_be_stopped_from_inside_is_told_of(monkeypatch, tmp_path, caplog):
    """One process: a warning says what to do; the sample is an error as soon as the code returns."""
    monkeypatch.setattr(limits, "GRACE", 0.2)
    start = time.monotonic()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 200_000)
    rounds = int(200_000 * 1.5 / (time.monotonic() - start))

    @dataclass(frozen=True)
    class Hard(Walks):
        def __call__(self, oracle: Any, x: Any, goal: Any, ball: Any, rng: Any, /) -> Any:
            if holds(x, 13):
                hashlib.pbkdf2_hmac("sha256", b"", b"", rounds)
            return super().__call__(oracle, x, goal, ball, rng)

    _, found = run(tmp_path, Hard(), sample_timeout=0.3)
    assert [r.outcome == Outcome.ERROR for r in found.values()].index(True) == 13
    assert any("--workers 2" in record.message for record in caplog.records)


@pytest.mark.exhaustive
@pytest.mark.parametrize("how", ["c"])  # "python" ends by itself, as without workers
def test_worker_processes_are_ended_and_replaced(how, plain, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(limits, "GRACE", 2.0)
    report, found = run(tmp_path, Walks(13, how), workers=2, sample_timeout=2)
    one = others_stand(found, plain, 13)
    assert one.outcome == Outcome.ERROR
    assert one.message == "timed out after 2 s"
    assert "timed_out" in one.notes
    assert one.clean == list(plain.values())[13].clean
    assert "the attack did not come back in time" in flags(report)["timed_out"]["message"]
    assert any("it is ended" in record.message for record in caplog.records) == (how == "c")


@pytest.mark.slow
def test_a_victim_that_hangs_in_compiled_code_costs_its_sample_with_workers(plain, tmp_path, monkeypatch):
    """On the clean sample, too: no process ever hears what it says of it."""
    monkeypatch.setattr(limits, "GRACE", 2.0)
    asked = {"task": rows(), "threat_model": EPS, "batch_size": 8, "device": "cpu", "sample_timeout": 2}
    from advkit.evaluation import execute
    from advkit.evaluation.run import lanes, rehearsal

    # Here the first samples are asked in this process, which would hang itself.
    for module in (rehearsal, execute, lanes):
        monkeypatch.setattr(module, "first_rows", lambda case, rows=64: next(iter(case.task.batches(4))))
    advkit.evaluate(Walks(), model=Net(13, how=hang_in_c), out=tmp_path, workers=2, **asked)
    found = {record.id: record for record in read_records(tmp_path / "records.jsonl")}
    one = others_stand(found, plain, 13)
    assert one.outcome == Outcome.ERROR
    assert one.clean is None
    assert {"timed_out", "clean_raised", "model_raised"} <= set(one.notes)
