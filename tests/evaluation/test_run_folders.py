"""Run folders that break while they are written to: one line, nothing lost, a resume that ends in the same bytes."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import advkit
from advkit.core import files
from advkit.core.errors import ReportError, RunInterrupted, RunInUse, StaleRun, UsageError
from advkit.core.files import Claimed, check_unclaimed, claimed
from advkit.evaluation.run import store as stores
from advkit.evaluation.run.store import read_records

ASKED: dict[str, Any] = {
    "attack": "pgd:steps=3",
    "task": "digits",
    "model": "zoo:digits-mlp",
    "n": 24,
    "device": "cpu",
    "batch_size": 4,
}
SUITE: dict[str, Any] = {**ASKED, "attack": "lean", "model": "zoo:digits-mlp-trades", "n": 8}
GRID: dict[str, Any] = {**ASKED, "threat_model": "tapm", "n": 4, "beside": False}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    advkit.evaluate(out=folder, **ASKED)
    return folder


def lines(folder: Path) -> list[bytes]:
    return (folder / "records.jsonl").read_bytes().splitlines(keepends=True)


def same(folder: Path, whole: Path) -> None:
    """The records are the same bytes, and the report speaks of all of them."""
    assert lines(folder) == lines(whole)
    report = json.loads((folder / "report.json").read_text())
    assert report["dataset"]["n_evaluated"] == 24
    assert report["metrics"] == json.loads((whole / "report.json").read_text())["metrics"]


def during(act: Callable[[], object], batch: int = 3) -> Callable[..., None]:
    """A watcher that acts once, after so many batches."""
    seen = []

    def watch(*_: object) -> None:
        seen.append(1)
        if len(seen) == batch:
            act()

    return watch


# Two writers


def test_two_threads_do_not_write_to_one_folder(tmp_path):
    with claimed(tmp_path):
        with claimed(tmp_path):  # the same thread may: a run and its companion
            pass
        found = []

        def other():
            try:
                advkit.evaluate(out=tmp_path, **ASKED)
            except RunInUse as error:
                found.append(str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert len(found) == 1
        assert "another run is writing" in found[0]
        assert not (tmp_path / "records.jsonl").exists()
    advkit.evaluate(out=tmp_path, **ASKED)


def test_a_claim_is_given_back_after_a_run_and_after_a_refusal(tmp_path):
    advkit.evaluate(out=tmp_path, **ASKED)
    assert not (tmp_path / files.LOCK).exists()
    check_unclaimed(tmp_path)
    with pytest.raises(StaleRun):
        advkit.evaluate(out=tmp_path, **{**ASKED, "seed": 3})
    assert not (tmp_path / files.LOCK).exists()
    right = Claimed(tmp_path)
    right.release()
    check_unclaimed(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_many_who_want_one_folder_have_it_one_by_one(tmp_path):
    """The file of the lock goes and comes: nobody holds one that is no longer there."""
    inside, most, turns = [], [], []

    def work():
        for _ in range(60):
            try:
                with claimed(tmp_path):
                    inside.append(1)
                    most.append(len(inside))
                    time.sleep(0.0005)
                    inside.pop()
                    turns.append(1)
            except RunInUse:
                time.sleep(0.0002)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert max(most) == 1
    assert len(turns) > 20


CROWD = """
import sys, time
from pathlib import Path
from advkit.core.errors import RunInUse
from advkit.core.files import claimed
folder, end = Path(sys.argv[1]), time.monotonic() + 3
turns = 0
while time.monotonic() < end:
    try:
        with claimed(folder):
            (folder / "inside").touch(exist_ok=False)
            (folder / "inside").unlink()
            turns += 1
    except RunInUse:
        pass
print(turns)
"""


@pytest.mark.slow
def test_so_do_processes(tmp_path):
    crowd = [
        subprocess.Popen(
            [sys.executable, "-c", CROWD, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    said = [each.communicate() for each in crowd]
    assert all(each.returncode == 0 for each in crowd), said
    assert all(int(out) > 0 for out, _ in said)


HOLDS = """
import sys, time
from pathlib import Path
from advkit.core.files import Claimed
right = Claimed(Path(sys.argv[1]))
print('held', flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that writes to tmp_path."""
    process = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_another_process_is_waited_for_or_refused_and_a_killed_one_blocks_nobody(holder, tmp_path, caplog):
    with pytest.raises(RunInUse, match="--out"):
        advkit.evaluate(out=tmp_path, **ASKED)
    with pytest.raises(RunInUse):
        check_unclaimed(tmp_path)
    with pytest.raises(RunInUse):
        advkit.evaluation.victims.train_victim(None, "none", "digits", recipe="epochs=1", out=tmp_path, device="cpu")
    killer = threading.Timer(0.5, lambda: os.kill(holder.pid, signal.SIGKILL))
    killer.start()
    with caplog.at_level(logging.WARNING, "advkit"), claimed(tmp_path, wait=True):
        holder.wait()
    assert sum("waiting until" in record.message for record in caplog.records) == 1
    advkit.evaluate(out=tmp_path, **ASKED)


def test_a_folder_without_locks_is_written_all_the_same(tmp_path, monkeypatch, caplog):
    def none(file):
        raise OSError(errno.ENOSYS, "no locks here")

    monkeypatch.setattr(files, "_seize", none)
    with caplog.at_level(logging.WARNING, "advkit"):
        advkit.evaluate(out=tmp_path / "run", **ASKED)
    assert any("has no locks" in record.message for record in caplog.records)


# A full disk


class Full:
    """The file of records on a disk that ends: takes so many bytes and a part of the last ones, then says so."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        taken = bytes(data[: self.room])
        if not taken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= len(taken)
        return self.file.write(taken)

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 1, 700, 1500, 2000, 5000])
def test_a_full_disk_ends_the_run_with_one_line_and_the_resume_is_exact(room, whole, tmp_path, monkeypatch):
    begin = stores.Store._begin

    def limited(self, raw):
        begin(self, raw)
        self._file = Full(self._file, room)

    monkeypatch.setattr(stores.Store, "_begin", limited)
    with pytest.raises(RunInterrupted, match=r"the disk is full: make room.*resume with the same command") as told:
        advkit.evaluate(out=tmp_path, **ASKED)
    assert "\n" not in str(told.value)
    kept = lines(tmp_path)
    assert kept == lines(whole)[: len(kept)]
    assert len(kept) % 4 == 0  # nothing of a batch that did not fit
    assert f"{len(kept)} records" in str(told.value)
    monkeypatch.undo()
    advkit.evaluate(out=tmp_path, **ASKED)
    same(tmp_path, whole)


@pytest.mark.parametrize("name", ["records.case.json", "examples", "report.json", "records.seconds.jsonl"])
def test_a_disk_that_is_full_for_one_file(name, whole, tmp_path, monkeypatch):
    """Whichever file it is: one line, and the same command goes on once there is room."""
    real, opened = files.write_whole, Path.open

    def full(path, *rest):
        if name in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, *rest)

    def full_open(self, mode="r", *rest, **more):
        if self.name == name and "a" in mode:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(self, mode, *rest, **more)

    from advkit.evaluation.report import document
    from advkit.evaluation.run import examples

    for module in (stores, examples, document):
        monkeypatch.setattr(module, "write_whole", full)
    monkeypatch.setattr(Path, "open", full_open)
    with pytest.raises((RunInterrupted, UsageError, ReportError), match="the disk is full: make room"):
        advkit.evaluate(out=tmp_path, **ASKED)
    monkeypatch.undo()
    advkit.evaluate(out=tmp_path, **ASKED)
    same(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="limits of files are set with the module resource")
def test_a_limit_of_the_system_on_the_size_of_files(whole, tmp_path):
    """The same by the kernel: writing fails in the middle of a batch."""
    script = f"""
import resource, sys
import advkit
from advkit.core.errors import AdvkitError
settings = {ASKED!r}
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
try:
    advkit.evaluate(out={str(tmp_path / "run")!r}, **settings)
except AdvkitError as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.startswith("RunInterrupted"), done
    assert "can't be written" in done.stdout
    kept = lines(tmp_path / "run")
    assert 0 < len(kept) < 24
    assert kept == lines(whole)[: len(kept)]
    advkit.evaluate(out=tmp_path / "run", **ASKED)
    same(tmp_path / "run", whole)


# Folders and files that go, or come, while a run goes on


def gone(folder: Path) -> None:
    shutil.rmtree(folder)


def moved(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


def file_gone(folder: Path) -> None:
    (folder / "records.jsonl").unlink()


def case_gone(folder: Path) -> None:
    (folder / "records.case.json").unlink()
    (folder / "records.jsonl").unlink()


def lock_gone(folder: Path) -> None:
    (folder / files.LOCK).unlink()


def cut(folder: Path) -> None:
    with (folder / "records.jsonl").open("r+b") as file:
        file.truncate(100)


def emptied(folder: Path) -> None:
    (folder / "records.jsonl").write_bytes(b"")


def longer(folder: Path) -> None:
    with (folder / "records.jsonl").open("ab") as file:
        file.write(b"a line of somebody else\n")


def edited(folder: Path) -> None:
    """By an editor that saves a new file."""
    text = (folder / "records.jsonl").read_text().replace('"robust"', '"broken"')
    (folder / "other").write_text(text)
    os.replace(folder / "other", folder / "records.jsonl")


def edited_in_place(folder: Path) -> None:
    """With as many bytes as before: seen when the run ends."""
    with (folder / "records.jsonl").open("r+b") as file:
        text = file.read()
        file.seek(0)
        file.write(text.replace(b'"forwards":4', b'"forwards":0').replace(b'"clean":0', b'"clean":9'))


@pytest.mark.parametrize(
    "act", [gone, moved, file_gone, case_gone, lock_gone, cut, emptied, longer, edited, edited_in_place]
)
def test_what_happens_to_a_folder_while_a_run_goes_on_loses_nothing(act, whole, tmp_path, caplog):
    folder = tmp_path / "run"
    with caplog.at_level(logging.WARNING, "advkit"):
        advkit.evaluate(out=folder, watch=during(lambda: act(folder)), **ASKED)
    same(folder, whole)
    assert any("written anew" in record.message for record in caplog.records)
    put_aside = list(folder.glob("records.changed*"))
    assert len(put_aside) == (act in (cut, emptied, longer, edited, edited_in_place, lock_gone)), put_aside
    advkit.evaluate(out=folder, **ASKED)  # and it is a folder like any other
    same(folder, whole)


def test_what_was_there_is_put_aside_and_not_lost(whole, tmp_path):
    folder = tmp_path / "run"
    advkit.evaluate(out=folder, watch=during(lambda: longer(folder)), **ASKED)
    assert b"a line of somebody else\n" in (folder / "records.changed").read_bytes()


def test_a_kill_after_a_removal_resumes_exactly(whole, tmp_path):
    """The records that were put back are on the disk: a run that ends right then goes on from there."""
    folder = tmp_path / "run"

    def stop():
        raise KeyboardInterrupt

    calls = [lambda: gone(folder), stop]

    def watch(*_):
        seen.append(1)
        if len(seen) in (3, 5):
            calls.pop(0)()

    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        advkit.evaluate(out=folder, watch=watch, **ASKED)
    assert lines(folder) == lines(whole)[:20]
    advkit.evaluate(out=folder, **ASKED)
    same(folder, whole)


def test_a_folder_that_another_case_has_taken_over(whole, tmp_path):
    folder = tmp_path / "run"

    def replaced():
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "records.case.json").write_text("{}\n")
        (folder / "records.jsonl").write_text("")

    with pytest.raises(RunInterrupted, match=r"12 records of this run are in .*run-rescued") as told:
        advkit.evaluate(out=folder, watch=during(replaced), **ASKED)
    assert "\n" not in str(told.value)
    assert (folder / "records.jsonl").read_text() == ""
    assert lines(tmp_path / "run-rescued") == lines(whole)[:12]
    advkit.evaluate(out=tmp_path / "run-rescued", **ASKED)
    same(tmp_path / "run-rescued", whole)


def test_a_folder_that_became_a_file(whole, tmp_path):
    folder = tmp_path / "run"

    def replaced():
        shutil.rmtree(folder)
        folder.write_text("a file")

    with pytest.raises(RunInterrupted, match="run-rescued"):
        advkit.evaluate(out=folder, watch=during(replaced), **ASKED)
    advkit.evaluate(out=tmp_path / "run-rescued", **ASKED)
    same(tmp_path / "run-rescued", whole)


def test_a_folder_that_another_process_has_taken_over(tmp_path):
    folder = tmp_path / "run"
    taken = []

    def replaced():
        shutil.rmtree(folder)
        folder.mkdir()
        process = subprocess.Popen([sys.executable, "-c", HOLDS, str(folder)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        taken.append(process)

    try:
        with pytest.raises(RunInterrupted, match=r"another run is writing.*run-rescued"):
            advkit.evaluate(out=folder, watch=during(replaced), **ASKED)
    finally:
        taken[0].kill()
        taken[0].wait()


def test_speed_that_was_settled_comes_back_with_the_records(tmp_path):
    folder = tmp_path / "run"
    asked = {**ASKED, "speed": "bf16"}
    advkit.evaluate(out=folder, watch=during(lambda: gone(folder)), **asked)
    assert json.loads((folder / "records.speed.json").read_text()) == {"victim": "bf16"}
    before = lines(folder)
    advkit.evaluate(out=folder, **asked)
    assert lines(folder) == before


# Records that are not what was written


def left(folder: Path, into: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    """A run that ended early, with other records."""
    shutil.copytree(folder, into)
    (into / "report.json").unlink()
    (into / "records.jsonl").write_bytes(b"".join(change(lines(folder)[:12])))


def test_a_line_that_was_edited_is_named_and_can_be_taken_out(whole, tmp_path):
    at = next(i for i, line in enumerate(lines(whole)[:8]) if b'"outcome":"broken"' in line)
    left(
        whole, tmp_path / "run", lambda held: [*held[:at], held[at].replace(b'"broken"', b'"robust"'), *held[at + 1 :]]
    )
    with pytest.raises(StaleRun, match=rf"records.jsonl, line {at + 1} is not what was written"):
        advkit.evaluate(out=tmp_path / "run", **ASKED)
    rest = lines(tmp_path / "run")
    (tmp_path / "run" / "records.jsonl").write_bytes(b"".join([*rest[:at], *rest[at + 1 :]]))
    advkit.evaluate(out=tmp_path / "run", **ASKED)
    assert sorted(lines(tmp_path / "run")) == sorted(lines(whole))


@pytest.mark.parametrize("times", ["lost", "of an earlier version", "garbage", "cut short"])
def test_without_the_file_of_times_lines_are_taken_as_they_stand(times, whole, tmp_path):
    left(whole, tmp_path / "run", lambda held: held)
    file = tmp_path / "run" / "records.seconds.jsonl"
    old = [
        {key: value for key, value in json.loads(line).items() if key != "lines"}
        for line in file.read_text().splitlines()
    ]
    content = {
        "lost": None,
        "of an earlier version": "".join(json.dumps(each) + "\n" for each in old),
        "garbage": "[" * 9999,
        "cut short": file.read_text()[:250],
    }[times]
    file.unlink() if content is None else file.write_text(content)
    for _ in range(2):  # what was taken is known from then on
        advkit.evaluate(out=tmp_path / "run", **ASKED)
        same(tmp_path / "run", whole)


def test_a_batch_whose_times_a_crash_cut_off_counts(whole, tmp_path):
    left(whole, tmp_path / "run", lambda held: held)
    file = tmp_path / "run" / "records.seconds.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:2]))
    seen: list[int] = []
    advkit.evaluate(out=tmp_path / "run", watch=lambda title, case, new, total: seen.append(len(new)), **ASKED)
    assert seen == [12, 4, 4, 4]
    same(tmp_path / "run", whole)


def changed(line: bytes, **changes: Any) -> bytes:
    return json.dumps({**json.loads(line), **changes}, separators=(",", ":")).encode() + b"\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "changes", "says"),
    [
        (ASKED, {"id": "digits/test/99999"}, "row digits/test/99999"),
        (ASKED, {"attack": "strong"}, "attack strong"),
        (ASKED, {"source": "zoo:other"}, "source zoo:other"),
        (ASKED, {"label": 10}, "class 10"),
        (SUITE, {"stage": "none of it"}, "stage none of it"),
        (GRID, {"source": "zoo:other"}, "source zoo:other"),
    ],
)
def test_a_record_of_another_case_is_named(asked, changes, says, tmp_path):
    advkit.evaluate(out=tmp_path, **asked)
    held = lines(tmp_path)
    (tmp_path / "records.jsonl").write_bytes(b"".join([*held[:3], changed(held[3], **changes)]))
    (tmp_path / "records.seconds.jsonl").unlink()
    with pytest.raises(StaleRun, match=says):
        advkit.evaluate(out=tmp_path, **asked)


def test_damaged_pictures_cost_no_run(whole, tmp_path, caplog):
    from advkit.evaluation.run.store import read_examples

    shutil.copytree(whole, tmp_path / "run")
    kept = read_examples(tmp_path / "run")
    first = sorted((tmp_path / "run" / "records.examples").iterdir())[0]
    first.write_bytes(b"no safetensors")
    with caplog.at_level(logging.WARNING, "advkit"):
        found = read_examples(tmp_path / "run")
    assert 0 < len(found) < len(kept)
    assert all(torch.equal(found[key][0], kept[key][0]) for key in found)
    assert any("no examples that can be read" in record.message for record in caplog.records)


# Workers


class Deadly(nn.Module):
    """Ends the process on one sample, once there is no file that says it did so before."""

    def __init__(self, inner, mark, bad):
        super().__init__()
        self.inner, self.mark, self.bad = inner, str(mark), bad
        self.eval()

    def forward(self, x):
        if not os.path.exists(self.mark) and bool((x == self.bad).flatten(1).all(1).any()) and "Spawn" in self.name():
            Path(self.mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.inner(x)

    @staticmethod
    def name():
        import multiprocessing

        return multiprocessing.current_process().name


@pytest.mark.slow
def test_a_killed_worker_is_one_line_and_the_resume_is_exact(tmp_path):
    from advkit.models import zoo
    from advkit.tasks import TASKS

    batch = next(iter(TASKS.build("digits").batches(24, n=24)))
    model = Deadly(zoo.load("digits-mlp").module, tmp_path / "dead", batch.x[13:14])
    asked = {**ASKED, "model": model, "workers": 2}
    with pytest.raises(RunInterrupted, match="a worker process ended"):
        advkit.evaluate(out=tmp_path / "run", **asked)
    kept = lines(tmp_path / "run")
    assert len(kept) < 24
    advkit.evaluate(out=tmp_path / "run", **asked)
    advkit.evaluate(out=tmp_path / "whole", **{**asked, "workers": 1})
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")


@pytest.mark.slow
def test_a_second_command_gets_one_line_and_a_killed_one_leaves_no_lock(tmp_path):
    command = [
        sys.executable, "-m", "advkit", "evaluate", "--task", "digits", "--model", "zoo:digits-mlp", "--no-plots",
        "--device", "cpu", "--attack", "pgd:steps=400,stop=false", "--n", "100", "--batch-size", "2", "--workers", "1",
        "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    records = tmp_path / "run" / "records.jsonl"
    end = time.monotonic() + 120
    while not (records.exists() and records.stat().st_size) and first.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 2
    assert second.stdout == ""
    said = [line for line in second.stderr.splitlines() if line.startswith("advkit: error")]
    assert len(said) == 1
    assert "another run is writing" in said[0]
    assert "Traceback" not in second.stderr
    first.kill()
    first.communicate()
    assert 0 < len(read_records(records)) < 100
    third = subprocess.run(command, capture_output=True, text=True)
    assert third.returncode == 0, third.stderr
    assert len(read_records(records)) == 100
