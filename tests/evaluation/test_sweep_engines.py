"""The engines of sweeps in real processes: identical records, also where a worker or the driver is killed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from advkit.core.errors import UsageError
from advkit.evaluation.sweep import Sweep, sweep
from advkit.evaluation.sweep.engines import ENGINES

pytestmark = pytest.mark.slow

OWN = '''
import os, signal
from dataclasses import dataclass
from pathlib import Path
from advkit.attacks import ATTACKS
from advkit.core.protocols import Access

@dataclass(frozen=True, kw_only=True)
class Killer:
    """PGD; it kills a process with its third batch, as often as a file has letters."""
    needs = Access.GRADIENTS
    whom: str = "me"
    def __call__(self, oracle, x, goal, ball, rng, /):
        file = Path("KILL")
        if len(x) > 1 and file.exists() and file.read_text() and begun():
            file.write_text(file.read_text()[1:])
            os.kill(os.getpid() if self.whom == "me" else os.getppid(), signal.SIGKILL)
            if self.whom != "me":
                signal.pause()
        return ATTACKS.build("pgd:steps=3")(oracle, x, goal, ball, rng)

def begun():
    return any(each.read_bytes().count(b"\\n") >= 8 for each in Path("runs").rglob("records.jsonl"))
'''
GRID = """attacks: ['python:killer:Killer,whom={whom}']
tasks: [digits]
seeds: [0, 1]
n: 24
batch_size: 4
device: cpu
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("killer.py").write_text(OWN)
    yield tmp_path
    sys.modules.pop("killer", None)


def ask(engine: str, out: str, whom: str = "me", *more: str) -> subprocess.CompletedProcess[str]:
    Path("grid.yaml").write_text(GRID.format(whom=whom))
    command = [sys.executable, "-m", "advkit", "sweep", "grid.yaml", "--trust", "--engine", engine, "--out", out]
    return subprocess.run(
        [*command, "--workers", "2", "--json", *more],
        capture_output=True,
        text=True,
        timeout=1800,
        env=dict(os.environ),
    )


def records(out: str) -> list[bytes]:
    made = Sweep.load(out)
    assert [row.state for row in made.rows] == ["done", "done"]
    return [(made.folder / row.folder / "records.jsonl").read_bytes() for row in made.rows]


def reference(whom: str) -> list[bytes]:
    """The records of the same cells, uncut and undisturbed, in this process."""
    import advkit

    for seed in (0, 1):
        advkit.evaluate(
            f"python:killer:Killer,whom={whom}", task="digits", n=24, batch_size=4, device="cpu", seed=seed,
            beside=False, out=f"alone/{seed}",
        )  # fmt: skip
    return [Path(f"alone/{seed}/records.jsonl").read_bytes() for seed in (0, 1)]


@pytest.mark.parametrize("engine", ["local", "submitit:cluster=local", "ray"])
def test_a_worker_that_is_killed_changes_no_record(here: Path, engine: str) -> None:
    package = engine.partition(":")[0]
    if package != "local":
        pytest.importorskip(package, reason=f"{package} is not installed")
    whole = reference("me")
    Path("KILL").write_text("x")
    done = ask(engine, "runs", "me", "--shard", "12")
    assert done.returncode == 0, done.stderr[-2000:]
    assert Path("KILL").read_text() == ""  # a worker was killed
    assert records("runs") == whole


def test_a_driver_that_is_killed_is_resumed_to_the_same_records(here: Path) -> None:
    Path("KILL").write_text("x")
    killed = ask("local", "runs", "parent")
    assert killed.returncode == -9
    assert Path("KILL").read_text() == ""
    resumed = ask("local", "runs", "parent")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert records("runs") == reference("parent")


def test_a_ray_cluster_that_is_not_there(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    grid: dict[str, Any] = {"attacks": "fgsm", "tasks": "digits", "n": 2}
    with pytest.raises(UsageError, match=r"no Ray cluster answers at 127\.0\.0\.1:1") as raised:
        sweep(grid, out=tmp_path, engine=ENGINES.build("ray:address=127.0.0.1:1"))
    assert "\n" not in str(raised.value)
