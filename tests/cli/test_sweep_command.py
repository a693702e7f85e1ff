"""`advkit sweep` and `advkit retry` from arguments to files, and their mistakes."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

import advkit as package
from advkit.cli.options import takes_request
from advkit.core.errors import UsageError
from advkit.evaluation.run.store import read_records
from advkit.evaluation.sweep.api import prepare
from advkit.evaluation.sweep.line import Line, Note, write_lines

GRID = "attacks: [fgsm, sda]\ntasks: [digits]\nn: 4\ndevice: cpu\n"


def grid(text: str = GRID) -> Path:
    file = Path("grid.yaml")
    file.write_text(text)
    return file


def test_dry_run_lists_commands_and_reasons_and_each_can_be_run_by_itself(advkit: Any) -> None:
    said = advkit("sweep", grid(), "--out", "runs", "--dry-run")
    assert said.code == 0, said.err
    first, second = said.out.splitlines()
    assert first.startswith("0: advkit evaluate --attack fgsm --defense none --task digits --n 4 --device cpu --only")
    assert second.startswith("1: not run (attack=sda defense=none task=digits n=4 device=cpu): ")
    assert not list(Path("runs").glob("*/report.json"))
    waiting = advkit("sweep", "--status", "runs", "--json")
    assert waiting.json == {"states": {"waiting": 1, "refused": 1}, "over": False}
    plain = advkit(*first.removeprefix("0: advkit ").split())  # any queue can run the line
    assert plain.code == 0, plain.err
    assert advkit("sweep", "--status", "runs", "--json").json == {"states": {"done": 1, "refused": 1}, "over": True}
    said = advkit("sweep", "runs", "--cell", "0")
    assert (said.code, said.out.strip()) == (0, "0: done")
    assert "done" in advkit("sweep", "--status", "runs").out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("sweep",), "one of: a grid"),
        (("sweep", "missing.yaml"), "can't be read"),
        (("sweep", "grid.yaml", "--attack", "fgsm"), "--attack belongs to --eps"),
        (("sweep", "grid.yaml", "--attack", "pgd"), "--attack belongs to --eps"),  # the usual one, said all the same
        (("sweep", "grid.yaml", "--seed", "0", "--dry-run"), "--seed belongs to --eps"),
        (("sweep", "grid.yaml", "--eps", "0:1:2"), "a grid does not go with --eps"),
        (("sweep", "grid.yaml", "--status", "runs"), "a grid does not go with --status"),
        (("sweep", "grid.yaml", "--no-plots"), "--plots does not go with a grid"),
        (("sweep", "--eps", "0:1:2", "--engine", "ray"), "--engine does not go with --eps"),
        (("sweep", "--cell", "0"), "--cell needs the folder"),
        (("sweep", "nowhere", "--cell", "0", "--n", "4"), "--n does not go with --cell"),
        (("sweep", "grid.yaml", "--engine", "slurmm"), "unknown engine 'slurmm'"),
        (("sweep", "grid.yaml", "--engine", "submitit:cluster=here"), "not 'here'"),
        (("sweep", "--eps", "1:0:3"), "START:STOP:POINTS"),
        (("sweep", "--status", "nowhere"), "no folder of a sweep"),
        (("sweep", "nowhere", "--cell", "0"), "no folder of a sweep"),
        (("sweep", "nowhere", "--cell", "x"), "numbers of lines"),
        (("sweep", "grid.yaml", "--out", "grid.yaml"), "can't be written"),
        (("sweep", "grid.yaml", "--out", "/proc/nothing"), "can't be written"),
        (("retry", "nowhere"), "no report at nowhere"),
    ],
)
def test_mistakes_are_one_line(advkit: Any, arguments: tuple[str, ...], words: str) -> None:
    grid()
    said = advkit(*arguments)
    assert said.code == 2
    assert words in said.err
    assert len(said.err.strip().splitlines()) == 1


def test_a_grid_takes_no_option_of_a_single_evaluation(advkit: Any) -> None:
    grid()
    for name in takes_request()(lambda asked: None).__signature__.parameters:  # type: ignore[attr-defined]
        value = {"device": "cpu", "speed": "fp32"}.get(name, "1")
        said = advkit("sweep", "grid.yaml", f"--{name.replace('_', '-')}", value)
        assert (said.code, said.out) == (2, "")
        assert "belongs to --eps; of a grid it stands in the file" in said.err
    assert not Path("runs").exists()


def test_slurm_that_is_not_here(advkit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit", reason="the extra slurm is not installed")
    monkeypatch.setenv("PATH", "/nowhere")
    said = advkit("sweep", grid(), "--engine", "submitit:cluster=slurm")
    assert (said.code, said.out) == (2, "")
    assert "there is no SLURM here" in said.err
    assert len(said.err.strip().splitlines()) == 1


def test_slurm_that_does_not_answer(advkit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit", reason="the extra slurm is not installed")
    for name in ("sbatch", "srun", "sacct"):
        file = Path("bin") / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("#!/bin/sh\necho 'sbatch: error: Unable to contact slurm controller' >&2\nexit 1\n")
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{Path('bin').absolute()}{os.pathsep}{os.environ['PATH']}")
    said = advkit("sweep", grid(), "--engine", "submitit")
    assert (said.code, said.out) == (2, "")
    told = said.err.strip().splitlines()[-1]  # what sbatch itself says stands before it
    assert "SLURM did not take the tasks (sbatch: error: Unable to contact slurm controller)" in told
    assert "Traceback" not in said.err
    assert advkit("sweep", "--status", "runs", "--json").json["states"] == {"waiting": 1, "refused": 1}  # nothing lost


def test_a_run_folder_that_can_not_be_written_is_one_line(advkit: Any) -> None:
    advkit("sweep", grid(), "--out", "runs", "--dry-run")
    line = Line.from_json(Path("runs/sweep.jsonl").read_text().splitlines()[0])
    (Path("runs") / line.folder).write_text("a file in the way")
    said = advkit("sweep", "runs", "--cell", "0")
    assert (said.code, said.out) == (2, "")
    assert "can't be written" in said.err
    assert len(said.err.strip().splitlines()) == 1


def test_a_folder_without_the_right_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # tests may run as root, whom no mode stops
    with pytest.raises(UsageError, match="no permission"):
        prepare({"attacks": "fgsm"}, tmp_path / "locked")
    assert not list(tmp_path.iterdir())


def test_a_strangers_lines_run_nothing_of_theirs_unasked(advkit: Any) -> None:
    request = {"attack": "python:no_such_module:Part", "defense": "none", "task": "digits"}
    write_lines(Path("theirs"), [Line(line=0, cell=0, digest="0" * 64, folder="0", request=request)])
    said = advkit("sweep", "theirs", "--cell", "0")
    assert said.code == 2
    assert "--trust" in said.err


def test_status_says_what_failed(advkit: Any) -> None:
    advkit("sweep", grid(), "--out", "runs", "--dry-run")
    line = Line.from_json(Path("runs/sweep.jsonl").read_text().splitlines()[0])
    Note(state="quarantined", reason="it ended its worker process twice").write(Path("runs") / line.folder)
    said = advkit("sweep", "--status", "runs")
    assert "quarantined" in said.out
    assert "ended its worker process" in said.out


@pytest.mark.slow
def test_a_curve_is_printed_and_written(advkit: Any) -> None:
    said = advkit("sweep", "--eps", "0:0.2:3", "--attack", "fgsm", "--task", "digits", "--n", 8, "--out", "runs")
    assert said.code == 0, said.err
    assert "taken over" in said.out
    (folder,) = Path("runs").glob("curve-*")
    assert {"curve.json", "curve.md", "curve.png"} <= {file.name for file in folder.iterdir()}
    data = json.loads((folder / "curve.json").read_text())
    assert [point["eps_string"] for point in data["points"]] == ["0", "0.1", "0.2"]
    for point in data["points"]:
        assert point["robust_accuracy"]["ci"]["method"] == "wilson"


OWN = '''
from dataclasses import dataclass
from pathlib import Path
from advkit.core.protocols import Access

@dataclass(frozen=True, kw_only=True)
class Moody:
    """Raises on every second sample while a file lies there."""
    needs = Access.NOTHING
    def __call__(self, oracle, x, goal, ball, rng, /):
        if Path("BAD").exists() and int(1000 * float(x[0].sum())) % 2:
            raise RuntimeError("a bad day")
        return x
'''


@pytest.mark.slow
def test_retry_asks_the_errors_alone_again(advkit: Any) -> None:
    Path("moods.py").write_text(OWN)
    Path("BAD").touch()
    said = advkit("evaluate", "--attack", "python:moods:Moody", "--task", "digits", "--n", 10, "--out", "run", "--only",
                  "--no-plots", "--batch-size", 1)  # fmt: skip
    assert said.code == 3
    before = {r.id: r for r in read_records("run/records.jsonl")}
    bad = {row for row, record in before.items() if record.outcome == "error"}
    assert 0 < len(bad) < 10
    assert advkit("retry", "run").code == 2  # the report names a module of somebody's
    said = advkit("retry", "run", "--trust", "--json")
    assert (said.code, said.json) == (3, {"again": len(bad), "undecided": len(bad)})
    Path("BAD").unlink()
    said = advkit("retry", "run", "--trust", "--json")
    assert (said.code, said.json) == (0, {"again": len(bad), "undecided": 0})
    after = {r.id: r for r in read_records("run/records.jsonl")}
    assert set(after) == set(before)
    assert all((after[row] == before[row]) == (row not in bad) for row in after)
    assert advkit("retry", "run", "--trust", "--json").json == {"again": 0, "undecided": 0}
    assert len(list(Path("run").glob("records.retried*"))) == 2


def test_sweeps_alone_import_pydantic_and_the_engines() -> None:
    root = Path(package.__file__).parent
    found: dict[str, set[str]] = {}
    for file in root.rglob("*.py"):
        for name in re.findall(r"^\s*(?:import|from) (pydantic|submitit|ray)\b", file.read_text("utf-8"), re.M):
            found.setdefault(name, set()).add(file.relative_to(root).as_posix())
    home = "evaluation/sweep"
    assert found == {
        "pydantic": {f"{home}/grid.py"},
        "submitit": {f"{home}/engines/slurm.py"},
        "ray": {f"{home}/engines/rays.py"},
    }
