"""Samples that are files: looked at before a run, and a file that is repaired costs no more than its own sample."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import advkit
from advkit.core.errors import BadInput, StaleRun
from advkit.evaluation.run.store import read_examples, read_records
from advkit.tasks.events import EventFolder
from advkit.tasks.folder import Folder

N = 20


class Net(nn.Module):
    """Bright or dark."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = nn.Parameter(torch.tensor(0.42))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        mean = z.mean((1, 2, 3))
        return torch.stack([self.cut - mean, mean - self.cut], 1) * 10


def picture(label: int, i: int) -> np.ndarray[Any, Any]:
    pixels = np.random.default_rng(100 * label + i).integers(0, 60, (24, 24, 3))
    return (pixels + 60 + 100 * label + i).clip(0, 255).astype(np.uint8)


def png(pixels: np.ndarray[Any, Any]) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for label in range(2):
        (tmp_path / "data" / "test" / f"c{label}").mkdir(parents=True)
        for i in range(N // 2):
            (tmp_path / "data" / "test" / f"c{label}" / f"{i}.png").write_bytes(png(picture(label, i)))
    return tmp_path


def run(place: Path, out: str = "run", attack: Any = "pgd:steps=3", **more: Any) -> tuple[list[int], Any]:
    """How many records each batch brought, those that were there first; and the report."""
    seen: list[int] = []
    task = Folder(path=str(place / "data"), resize=16, crop=16)
    asked = {"threat_model": "linf:eps=0.01", "batch_size": 4, "device": "cpu", **more}
    report = advkit.evaluate(
        attack,
        task=task,
        model=Net().eval(),
        out=place / out,
        watch=lambda t, c, new, n: seen.append(len(new)),
        **asked,
    )
    return seen, report


def file_of(place: Path, number: int) -> Path:
    return Folder(path=str(place / "data"), resize=16, crop=16)._samples[number][0]


def middle_damaged(content: bytes) -> bytes:
    """Zeros in the compressed pixels; the marks at both ends are whole."""
    at = content.index(b"IDAT") + 60
    return content[:at] + bytes(40) + content[at + 40 :]


def test_damage_with_an_intact_end_is_met_before_anything_is_spent(place):
    last = file_of(place, N - 1)
    whole = last.read_bytes()
    last.write_bytes(middle_damaged(whole))
    assert last.read_bytes().endswith(whole[-12:])
    with pytest.raises(BadInput, match=f"{last.name} is no readable image") as told:
        run(place)
    assert "\n" not in str(told.value)
    assert not (place / "run").exists()
    last.write_bytes(whole)
    assert run(place)[0] == [4] * 5


def test_only_the_samples_of_the_run_are_looked_at(place):
    last = file_of(place, N - 1)
    last.write_bytes(middle_damaged(last.read_bytes()))
    task = Folder(path=str(place / "data"), resize=16, crop=16)
    task.look(N - 1)
    with pytest.raises(BadInput, match=last.name):
        task.look(N)


def test_damaged_recordings_are_met_before_anything_is_spent(tmp_path):
    for label in "ab":
        (tmp_path / "data" / "test" / label).mkdir(parents=True)
        for i in range(3):
            t = np.arange(30)
            np.savez(tmp_path / "data" / "test" / label / f"{i}.npz", t=t, x=t % 8, y=t % 8, p=t % 2)
    task = EventFolder(path=str(tmp_path / "data"), frames=2, height=8, width=8)
    task.look(6)
    assert list(task.marks(6)) == list(task.ids)
    last = task._listing[1][-1][0]
    whole = last.read_bytes()
    last.write_bytes(whole[:120] + b"\xff" * 8 + whole[128:])
    with pytest.raises(BadInput, match=last.name):
        task.look(6)
    task.look(5)
    last.write_bytes(whole)
    known = task.marks(6)
    last.write_bytes(whole + b"x")
    assert [a != b for a, b in zip(known.values(), task.marks(6).values(), strict=True)] == [False] * 5 + [True]


@pytest.mark.slow
def test_a_file_that_breaks_and_is_restored_while_a_run_goes_on(place):
    """To the same bytes: the run is taken up where it ended."""
    last = file_of(place, N - 1)
    whole = last.read_bytes()
    plain = run(place, "plain")[1]

    def breaks(*_: Any) -> None:
        last.write_bytes(middle_damaged(whole))

    task = Folder(path=str(place / "data"), resize=16, crop=16)
    with pytest.raises(BadInput, match=last.name):
        advkit.evaluate(
            "pgd:steps=3",
            task=task,
            model=Net().eval(),
            threat_model="linf:eps=0.01",
            batch_size=4,
            device="cpu",
            out=place / "run",
            watch=breaks,
        )
    last.write_bytes(whole)
    seen, report = run(place)
    assert seen == [16, 4]
    assert (place / "run" / "records.jsonl").read_bytes() == (place / "plain" / "records.jsonl").read_bytes()
    assert report.metrics == plain.metrics


@pytest.mark.slow
@pytest.mark.parametrize("attack", ["pgd:steps=3", "fgsm"])
def test_a_file_that_is_replaced_costs_its_own_sample(attack, place, caplog):
    """By other pixels: a run that was finished, or one that was cut short, runs that sample alone again."""
    run(place, attack=attack)
    names = [record.id for record in read_records(place / "run" / "records.jsonl")]
    changed = file_of(place, 7)
    changed.write_bytes(png(255 - picture(0, 3)))
    with caplog.at_level(logging.WARNING, "advkit"):
        seen, report = run(place, attack=attack)
    assert seen == [N - 1, 1]
    assert any("1 files of" in record.message and names[7] in record.message for record in caplog.records)
    fresh = run(place, "fresh", attack=attack)[1]
    assert report.metrics == fresh.metrics
    both = [{r.id: r for r in read_records(place / each / "records.jsonl")} for each in ("run", "fresh")]
    assert both[0] == both[1]
    assert len(read_records(place / "run" / "records.changed")) == N  # what was there is not lost
    assert report.to_dict()["dataset"]["sha256"] == fresh.to_dict()["dataset"]["sha256"]
    one, other = (read_examples(place / each) for each in ("run", "fresh"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key][0], other[key][0]) and torch.equal(one[key][1], other[key][1]) for key in one)
    assert run(place, attack=attack)[0] == [N]  # and the folder is that of the files as they are


@pytest.mark.slow
def test_a_file_that_is_taken_away_costs_nothing(place):
    run(place)
    file_of(place, 7).unlink()
    seen, report = run(place)
    assert seen == [N - 1]
    assert report.metrics == run(place, "fresh")[1].metrics
    assert len(read_records(place / "run" / "records.jsonl")) == N - 1


@pytest.mark.slow
def test_a_class_that_goes_moves_every_label(place):
    """Labels are part of what a sample is known by."""
    (place / "data" / "test" / "b_third").mkdir()
    (place / "data" / "test" / "b_third" / "x.png").write_bytes(png(picture(0, 1)))
    with pytest.raises(advkit.core.errors.AdvkitError):
        run(place)  # the model has two classes
    (place / "data" / "test" / "b_third" / "x.png").unlink()
    (place / "data" / "test" / "b_third").rmdir()
    run(place)
    (place / "data" / "test" / "c0").rename(place / "data" / "test" / "d0")
    seen, _ = run(place)
    assert seen == [4] * 5


@pytest.mark.slow
@pytest.mark.parametrize("asked", [{"attack": "lean"}, {"n": N - 1}, {"seed": 1}, {"threat_model": "linf:eps=0.02"}])
def test_what_is_another_case_stays_one(asked, place):
    """Stages of a suite take some of what is left: their samples do not stand alone. Other settings are other cases."""
    run(place, attack=asked.get("attack", "pgd:steps=3"))
    if "attack" in asked:
        file_of(place, 7).write_bytes(png(picture(1, 3)))
    with pytest.raises(StaleRun, match="another case"):
        run(place, **asked)


@pytest.mark.slow
def test_random_victims_share_their_draws_and_start_anew(place):
    run(place, attack="fgsm", defense="random-resize", draws=2, beside=False)
    file_of(place, 7).write_bytes(png(picture(1, 3)))
    with pytest.raises(StaleRun, match="data"):
        run(place, attack="fgsm", defense="random-resize", draws=2, beside=False)


def test_a_damaged_list_of_files_is_one_line(place):
    run(place)
    (place / "run" / "records.rows.json").write_bytes(b"\xff[")
    assert run(place)[0] == [N]  # the case is the same: nobody asks
    file_of(place, 7).write_bytes(png(picture(1, 3)))
    with pytest.raises(StaleRun, match=r"records\.rows\.json is damaged"):
        run(place)


def test_a_folder_of_an_earlier_version_has_no_list_and_gets_one(place):
    run(place)
    (place / "run" / "records.rows.json").unlink()
    run(place)
    assert len(json.loads((place / "run" / "records.rows.json").read_text())) == N
