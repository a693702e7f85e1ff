"""The engines of sweeps in real processes: identical records, also where a worker and the driver are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import advkit
from advkit.core.errors import UsageError
from advkit.evaluation.sweep import Sweep, sweep
from advkit.evaluation.sweep.engines import ENGINES

pytestmark = pytest.mark.slow

SECONDS = 170.0
"""Of one command: what takes longer hangs."""
OWN = '''
import os, signal, time
from dataclasses import dataclass
from pathlib import Path
from advkit.attacks import ATTACKS
from advkit.core.protocols import Access

@dataclass(frozen=True, kw_only=True)
class Killer:
    """PGD; with a run's third batch it kills its process once, while KILL lies there, and waits while HOLD does."""
    needs = Access.GRADIENTS
    def __call__(self, oracle, x, goal, ball, rng, /):
        if len(x) > 1 and any(each.read_bytes().count(b"\\n") >= 8 for each in Path("runs").rglob("records.jsonl")):
            try:
                os.rename("KILL", "KILLED")
            except FileNotFoundError:
                while Path("HOLD").exists():
                    Path("HELD").touch()
                    time.sleep(0.05)
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return ATTACKS.build("pgd:steps=3")(oracle, x, goal, ball, rng)
'''
GRID = """attacks: ['python:killer:Killer']
tasks: [digits]
seeds: [0, 1]
n: 16
batch_size: 4
device: cpu
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("killer.py").write_text(OWN)
    Path("grid.yaml").write_text(GRID)
    yield tmp_path
    sys.modules.pop("killer", None)


def begun(engine: str, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "advkit", "sweep", "grid.yaml", "--trust", "--engine", engine, "--out", "runs"]
    return subprocess.Popen(
        [*command, "--workers", "2", "--json", *more],
        stdout=subprocess.DEVNULL,
        stderr=Path("said.txt").open("a"),
        text=True,
        env=dict(os.environ),
    )


def ended(driver: subprocess.Popen[str]) -> int:
    try:
        return driver.wait(timeout=SECONDS)
    finally:
        driver.kill()


def records(home: Path) -> list[bytes]:
    made = Sweep.load(home)
    assert [row.state for row in made.rows] == ["done", "done"]
    return [(made.folder / row.folder / "records.jsonl").read_bytes() for row in made.rows]


def reference() -> list[bytes]:
    """The records of the same cells, uncut and undisturbed, in this process."""
    for seed in (0, 1):
        advkit.evaluate(
            "python:killer:Killer", task="digits", n=16, batch_size=4, device="cpu", seed=seed, beside=False,
            out=f"alone/{seed}",
        )  # fmt: skip
    return [Path(f"alone/{seed}/records.jsonl").read_bytes() for seed in (0, 1)]


@pytest.mark.parametrize(
    ("engine", "more"), [("local", ("--shard", "12")), ("submitit:cluster=local", ()), ("ray", ())]
)
def test_a_worker_and_then_the_driver_are_killed_and_no_record_changes(
    here: Path, engine: str, more: tuple[str, ...]
) -> None:
    package = engine.partition(":")[0]
    if package != "local":
        pytest.importorskip(package, reason=f"{package} is not installed")
    whole = reference()
    for name in ("KILL", "HOLD"):
        Path(name).touch()
    driver = begun(engine, *more)
    until = time.monotonic() + SECONDS
    while not Path("HELD").exists() and driver.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    assert Path("KILLED").exists(), Path("said.txt").read_text()[-2000:]  # a worker killed itself
    assert Path("HELD").exists(), Path("said.txt").read_text()[-2000:]  # and another one is in the middle of a run
    driver.send_signal(signal.SIGKILL)
    assert ended(driver) == -signal.SIGKILL
    Path("HOLD").unlink()
    assert ended(begun(engine, *more)) == 0, Path("said.txt").read_text()[-2000:]
    assert records(here / "runs") == whole


def test_a_ray_cluster_that_is_not_there(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    grid: dict[str, Any] = {"attacks": "fgsm", "tasks": "digits", "n": 2}
    with pytest.raises(UsageError, match=r"no Ray cluster answers at 127\.0\.0\.1:1") as raised:
        sweep(grid, out=tmp_path, engine=ENGINES.build("ray:address=127.0.0.1:1"))
    assert "\n" not in str(raised.value)
