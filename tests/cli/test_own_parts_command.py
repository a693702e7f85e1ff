"""Parts of the user's own on the command line: evaluate, rerun, matrix, worker processes, and the question before."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from advkit.core.errors import UsageError
from advkit.evaluation.matrix import read_matrix

OWN = '''
from dataclasses import dataclass
import torch
from torch import nn
from advkit.core.protocols import Access
from advkit.defenses import DEFENSES
from advkit.tasks import TASKS
from advkit.threat_models.goals.targeted import Targeted
from advkit.threat_models.lp import Linf

open("IMPORTED", "w").close()

@dataclass(frozen=True, kw_only=True)
class Ray:
    needs = Access.GRADIENTS
    points: int = 5
    def __call__(self, oracle, x, goal, ball, rng, /):
        downhill = ball.steepest(-oracle.gradient(x, goal)[1], x)
        best, lowest = x, goal.loss(oracle(x))
        for point in range(1, self.points + 1):
            z = ball.project(x + point / self.points * downhill, x)
            loss = goal.loss(oracle(z))
            better = (loss < lowest).view(-1, 1, 1, 1)
            best, lowest = torch.where(better, z, best), torch.minimum(loss, lowest)
        return best

@dataclass(frozen=True, kw_only=True)
class Levels:
    needs_data, claims = False, ""
    bits: int = 3
    def protect(self, model, data, rng, /):
        return DEFENSES.build(f"bit-depth:bits={self.bits}").protect(model, data, rng)

@dataclass(frozen=True, kw_only=True)
class Ball(Linf):
    """A ball of one's own."""

@dataclass(frozen=True, kw_only=True)
class Next:
    kind = "targeted"
    by: int = 1
    def __call__(self, labels, answer, rng, /):
        return Targeted((labels + self.by) % answer.shape[1])

def rows():
    batch = next(iter(TASKS.build("digits").batches(24)))
    return batch.x, batch.labels

def net():
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        module[1].weight.copy_(torch.randn(10, 64, generator=torch.Generator().manual_seed(0)))
        module[1].bias.zero_()
    return module.eval()
'''

ALL = (
    "--attack", "python:own_parts:Ray,points=3",
    "--defense", "python:own_parts:Levels,bits=4",
    "--threat-model", "python:own_parts:Ball,eps=0.1",
    "--goal", "python:own_parts:Next,by=2",
    "--task", "python:own_parts:rows",
    "--model", "python:own_parts:net",
)  # fmt: skip


@pytest.fixture
def mine(advkit: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command line in a folder with a module of one's own."""
    Path("own_parts.py").write_text(OWN, encoding="utf-8")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "own_parts", raising=False)
    return advkit


def records(folder: str) -> list[str]:
    return Path(folder, "records.jsonl").read_text(encoding="utf-8").splitlines()


@pytest.mark.slow
def test_every_kind_of_part_runs_and_reruns(mine: Any) -> None:
    said = mine("evaluate", *ALL, "--n", 16, "--device", "cpu", "--out", "run")
    assert said.code in (0, 3), said.err
    asked = json.loads(Path("run/report.json").read_text())["request"]
    assert [asked[name] for name in ("attack", "defense", "threat_model", "goal", "task", "model")] == [
        "python:own_parts:Ray,points=3",
        "python:own_parts:Levels,bits=4",
        "python:own_parts:Ball,eps=0.1",
        "python:own_parts:Next,by=2",
        "python:own_parts:rows",
        "python:own_parts:net",
    ]
    assert json.loads(records("run")[0])["attack"] == "python:own_parts:Ray,points=3"

    # Nothing that a report names is loaded unasked, and what it would load is listed part by part.
    Path("IMPORTED").unlink()
    del sys.modules["own_parts"]
    said = mine("rerun", "run", "--out", "again")
    assert said.code == 2
    assert "--trust" in said.err
    for part in ("attack", "defense", "threat_model", "goal", "task", "model"):
        assert f"{part}=python:own_parts:" in said.err
    assert not Path("IMPORTED").exists()
    assert not Path("again").exists()

    said = mine("rerun", "run", "--out", "again", "--trust", "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out[said.out.index("{") :])["differ"] == []
    assert records("again") == records("run")


@pytest.mark.slow
def test_worker_processes_find_the_module(mine: Any) -> None:
    """They start in a process that knows nothing of the working directory."""
    rest = ("--only", "--n", 16, "--batch-size", 4, "--device", "cpu", "--json")
    assert mine("evaluate", *ALL, *rest, "--workers", 1, "--out", "one").code in (0, 3)
    said = mine("evaluate", *ALL, *rest, "--workers", 2, "--out", "two")
    assert said.code in (0, 3), said.err
    assert records("two") == records("one")


@pytest.mark.slow
def test_a_matrix_of_ones_own_parts(mine: Any) -> None:
    attacks = "[python:own_parts:Ray,points=2],[transfer:mi+[python:own_smooth:Half]]"
    Path("own_smooth.py").write_text(
        "from advkit.attacks.transfer.engine import Smooth\nclass Half(Smooth):\n"
        "    def __call__(self, gradient):\n        return gradient / 2\n"
    )
    asked = ("matrix", "--task", "python:own_parts:rows", "--n", 12, "--seeds", 1, "--budget", "none", "--device",
             "cpu", "--eps", 0.2, "--sources", "zoo:digits-public-mlp", "--attacks", attacks, "--cache", "kept",
             "--out", "matrix", "--json",
             "--targets", "python:own_parts:Levels@zoo:digits-mlp,zoo:digits-mlp")  # fmt: skip
    said = mine(*asked)
    assert said.code == 0, said.err
    table = said.json
    assert [one["spec"] for one in table["attacks"]] == [
        "python:own_parts:Ray,points=2",
        "transfer:mi+python:own_smooth:Half",
    ]
    assert table["request"]["task"] == "python:own_parts:rows"
    assert len(table["cells"]) == 4
    made = sorted(each.name for each in Path("kept").rglob("*.safetensors"))
    assert mine(*asked).json["cells"] == table["cells"]
    assert sorted(each.name for each in Path("kept").rglob("*.safetensors")) == made, "kept images were used again"

    # Its file is a report like any other: whoever makes it again is asked first.
    kept = read_matrix("matrix")
    with pytest.raises(UsageError, match=r"python:own_parts:Ray.*trust=True"):
        _ = kept.request
    assert kept.asked(trust=True).attacks[0] == "python:own_parts:Ray,points=2"

    # An edited part makes other images: what was kept is not taken for theirs.
    Path("own_parts.py").write_text(OWN.replace("downhill = ", "downhill = 0 * "), encoding="utf-8")
    del sys.modules["own_parts"]
    moved = {one["a"]: one["acc"]["value"] for one in mine(*asked).json["cells"] if one["t"] == "zoo:digits-mlp"}
    before = {one["a"]: one["acc"]["value"] for one in table["cells"] if one["t"] == "zoo:digits-mlp"}
    assert moved["python:own_parts:Ray,points=2"] > before["python:own_parts:Ray,points=2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("doctor", "--task", "python:own_parts:rows", "--model", "python:own_parts:net", "--rows", 8),
        ("attack", *ALL, "--out", "made"),
        ("evaluate", "--attack", "online:inner=[python:own_parts:Ray],k=2", "--task", "digits", "--n", 12),
        ("evaluate", "--attack", "fgsm", "--task", "digits", "--n", 6, "--threat-model",
         "tapm:sources=zoo:digits-public-mlp,attacks=fgsm+[python:own_parts:Ray]"),
    ],
    ids=lambda command: command[0],
)  # fmt: skip
def test_other_commands_take_them_too(mine: Any, command: tuple[object, ...]) -> None:
    said = mine(*command, "--device", "cpu")
    assert said.code in (0, 3), said.err
    assert "Traceback" not in said.err


def test_a_report_of_objects_says_that_it_cannot_be_run_again(mine: Any) -> None:
    """What was handed over in Python has no name; the report says so before anything is built."""
    import advkit as package

    sys.path.insert(0, str(Path.cwd()))
    try:
        from own_parts import Ray  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(Path.cwd()))
    package.evaluate(Ray(points=2), task="digits", n=6, device="cpu", out="objects")
    said = mine("rerun", "objects", "--out", "again")
    assert said.code == 2
    assert "attack=Ray:points=2 is no name" in said.err
    assert "python:MODULE:NAME" in said.err
