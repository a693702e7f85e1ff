"""Damaged and hostile files and specs: one line or a sound meaning, nothing run, memory bounded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("gguf")
resource = pytest.importorskip("resource")  # limits of memory are set where the system has them

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
SEED = 0


def run(mode: str, folder: Path) -> list[dict[str, Any]]:
    """What became of every case, in a process of its own; a case that ended the process is the last."""
    out = folder / f"{mode}.jsonl"
    command = [sys.executable, str(HERE / "fuzz_run.py"), mode, str(out), str(SEED)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=1500, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    asked = [line for line in lines if "what" in line]
    told = {(line["name"], line["turn"]): line["said"] for line in lines if "said" in line}
    assert done.returncode == 0, (asked[-1:], done.stderr[-2000:])
    return [{**line, "said": told[line["name"], line["turn"]]} for line in asked]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run("files", tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run("specs", tmp_path_factory.mktemp("specs"))


def faults(cases: list[dict[str, Any]]) -> list[str]:
    return [
        f"{case['name']} {case['turn']} ({case['what'][:100]}): {case['said']}"
        for case in cases
        if case["said"].startswith("FAULT")
    ]


def test_no_damaged_file_gives_a_traceback_runs_code_or_takes_memory(files: list[dict[str, Any]]) -> None:
    assert len(files) >= 2000
    assert faults(files) == []


def test_no_changed_spec_gives_a_traceback(specs: list[dict[str, Any]]) -> None:
    assert len(specs) >= 400
    assert faults(specs) == []


def test_the_changes_are_neither_all_refused_nor_all_harmless(files: list[dict[str, Any]]) -> None:
    """Of every way in some damage is noticed, and most files are damaged enough to be refused."""
    refused = Counter(case["name"] for case in files if case["said"].startswith("refused"))
    names = {case["name"] for case in files}
    assert set(refused) == names
    assert sum(refused.values()) > len(files) / 2
    assert any(case["said"] == "taken" for case in files)


@pytest.mark.parametrize(
    ("source", "seen"),
    [
        ("import subprocess; subprocess.run(['true'])", "subprocess.Popen"),
        ("import socket; socket.create_connection(('127.0.0.1', 9), 1)", "socket."),
        ("exec('x = 1')", "exec"),
        ("import pickle; pickle.loads(b'cos\\nsystem\\n.')", "pickle.find_class"),
        ("bytearray(600 << 20)", "MiB"),
        ("bytearray(4 << 30)", "MemoryError"),
        ("import time; time.sleep(60)", "no end"),
        ("raise ValueError('x')", "ValueError"),
    ],
)
def test_the_watch_sees(source: str, seen: str) -> None:
    """What it is to notice, noticed: a watch that sees nothing would pass everything."""
    script = f"""
import fuzz_watch
fuzz_watch.SECONDS = 6
def parse():
    {source}
watch = fuzz_watch.Watch()
fuzz_watch.settle()
print(fuzz_watch.outcome(watch, parse))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=HERE)
    assert "FAULT" in done.stdout, (done.stdout, done.stderr)
    assert seen in done.stdout


@pytest.mark.parametrize(
    "source", ["pass", "import colorsys", "from dataclasses import make_dataclass; make_dataclass('A', ['x'])"]
)
def test_the_watch_lets_pass(source: str) -> None:
    script = f"""
import fuzz_watch
def parse():
    {source}
watch = fuzz_watch.Watch()
fuzz_watch.settle()
print(fuzz_watch.outcome(watch, parse))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=HERE)
    assert done.stdout == "taken\n", (done.stdout, done.stderr)
