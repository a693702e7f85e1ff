"""The first number, beside peers: advkit's scripts run, the page is the measured table, and the table counts right."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from advkit.cli.main import run

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "benchmarks" / "first_number"


def loaded(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return loaded(ROOT / "benchmarks" / "first_number.py", "first_number_benchmark")


@pytest.fixture(scope="module")
def held() -> dict[str, Any]:
    return json.loads((ROOT / "docs" / "first_number.json").read_text(encoding="utf-8"))


def test_the_page_is_the_measured_table(bench: ModuleType, held: dict[str, Any]) -> None:
    text = (ROOT / "docs" / "first_number.md").read_text(encoding="utf-8")
    assert f"<!-- first_number -->\n{bench.page(held)}\n<!-- end -->" in text


def test_every_script_is_measured_and_counted(bench: ModuleType, held: dict[str, Any]) -> None:
    measured = {(row["way"], row["who"], row["before"]): row for row in held["rows"]}
    entries = [*bench.ENTRIES, *bench.BEFORE]
    assert measured.keys() == {(each.way, each.who, each.before) for each in entries}
    for entry in entries:
        row = measured[entry.way, entry.who, entry.before]
        counts = [bench.lines_of(SCRIPTS / file) for file in (entry.script, *entry.more)]
        assert row["files"] == [entry.script, *entry.more]
        assert row["lines"] == sum(lines for lines, _ in counts)
        assert row["without_imports"] == sum(lines - imports for lines, imports in counts)
        assert row["checked_by"] in ("advkit", "the user")
        assert len(row["figures"]) == (held["repeats"] if entry.timed else 1)
        assert bool(row["ratios"]) == entry.timed


def test_lines_leave_out_blank_ones_and_comments_and_tell_imports(bench: ModuleType, tmp_path: Path) -> None:
    script = tmp_path / "a.py"
    script.write_text("# a comment\nimport a\nfrom b import (\n    c,\n    d,\n)\n\nprint(a, c, d)  # here, too\n")
    assert bench.lines_of(script) == (6, 5)
    script = tmp_path / "a.sh"
    script.write_text("# a comment\n\nadvkit list\n")
    assert bench.lines_of(script) == (1, 0)


def test_figures_of_every_script_are_read(bench: ModuleType) -> None:
    ours = "clean accuracy    98.0 %  [95.0, 99.2]  196 / 200\nrobust accuracy   67.5 %   [60.7, 73.6]  135 / 200\n"
    assert bench.said(ours) == bench.Said(67.5, 98.0, 60.7, 73.6)
    assert bench.said("clean accuracy 98.0%\nrobust accuracy 6.5%\n") == bench.Said(6.5, 98.0)
    ours = "target not said, clean prompt  100.0 %  [67.6, 100.0]\nexact target rate (greedy)  50.0 %   [21.5, 78.5]\n"
    assert bench.said(ours) == bench.Said(50.0, 0.0, 21.5, 78.5)
    theirs = (
        "target said, clean prompt 0.0%\ntarget said, with turn marks in the suffix 25.0%\nexact target rate 37.5%\n"
    )
    assert bench.said(theirs) == bench.Said(37.5, 0.0, forged=25.0)
    with pytest.raises(ValueError, match="no figures"):
        bench.said("done\n")


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What a user has, with a network that was hardly trained; the working directory."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("user") / "here"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        loaded(SCRIPTS / "setup.py", "first_number_setup").main(
            [str(folder), "--samples", "8", "--prompts", "1", "--epochs", "2"]
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        yield folder
    for name in ("mine", "network", "first_number_setup"):
        sys.modules.pop(name, None)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["tensors_advkit", "folder_advkit", "own_advkit", "language_advkit"])
def test_every_way_leads_to_a_number(
    script: str, bench: ModuleType, user: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(SCRIPTS / f"{script}.py", user)
    runpy.run_path(f"{script}.py")
    in_python = bench.said(capsys.readouterr().out)
    assert in_python.low is not None
    command = SCRIPTS / f"{script}.sh"
    if command.exists():
        (line,) = command.read_text(encoding="utf-8").splitlines()
        assert run([*shlex.split(line)[1:], "--no-plots"]) == 0
        assert bench.said(capsys.readouterr().out) == in_python


def test_suites_differ_from_single_attacks_by_their_name_alone() -> None:
    for suffix in ("py", "sh"):
        plain = (SCRIPTS / f"tensors_advkit.{suffix}").read_text(encoding="utf-8")
        suite = (SCRIPTS / f"suite_advkit.{suffix}").read_text(encoding="utf-8")
        assert re.sub(r"\bpgd\b", "autoattack", plain) == suite
