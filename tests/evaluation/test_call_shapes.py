"""The shapes of a run's calls: the same records whatever the batches, on every embedded model, and on resuming."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from advkit.core.errors import StaleRun
from advkit.core.lanes import Lanes
from advkit.core.protocols import Outcome, Record
from advkit.evaluation import api
from advkit.evaluation.execute import run
from advkit.evaluation.run import lanes as shapes
from advkit.evaluation.run.engine import open_store
from advkit.models import zoo
from advkit.models.torch import TorchModel

EMBEDDED = {card.name: card.task for card in zoo.cards()}
# One of each architecture and how many samples: the others differ in their weights alone.
KINDS = {
    "digits-mlp": 66, "digits-public-cnn": 66, "fashion-mnist-cnn": 66, "fashion-mnist-public-cnn5": 66,
    "fashion-mnist-cnn-eigenshield": 66, "digits-snn": 20, "digits-dvs-snn": 20, "fashion-mnist-cnn-smoothing": 9,
}  # fmt: skip


def case_of(model: Any, task: Any, n: int = 30, **more: Any) -> Any:
    events = isinstance(task, str) and task.endswith("dvs")
    attack = more.pop("attack", "random_flips" if events else "pgd:steps=3")
    more = ({} if events else {"threat_model": "linf:eps=0.1"}) | more
    return api.resolve(attack, "none", task, model, n=n, device="cpu", **more)


def play(case: Any, folder: Path, **more: Any) -> list[Record]:
    store = open_store(case, folder)
    try:
        run(case, store, **more)
    finally:
        store.close()
    return api.in_order(case, list(store))


def cut(folder: Path, lines: int) -> None:
    """A run that ended after so many records."""
    kept = (folder / "records.jsonl").read_bytes().splitlines(keepends=True)[:lines]
    (folder / "records.jsonl").write_bytes(b"".join(kept))


def alike(model: Any, task: Any, folder: Path, n: int = 30, **more: Any) -> list[Record]:
    """The records of batches of 1, 7, 64 and 1000, and of a run that was resumed with others: all the same."""
    found = {
        size: play(case_of(model, task, n, batch_size=size, **more), folder / str(size)) for size in (1000, 1, 7, 64)
    }
    cut(folder / "7", n // 3)
    found[0] = play(case_of(model, task, n, batch_size=30, **more), folder / "7")
    for other in found.values():
        assert other == found[1]
    return found[1]


def sizes_in(folder: Path) -> list[int]:
    kept = json.loads((folder / "records.lanes.json").read_text())["victim"]["sizes"]
    assert isinstance(kept, list)
    return kept


def made(module: nn.Module, digits: Any) -> TorchModel:
    return TorchModel(module.eval(), space=digits.space, classes=10)


def odd_network(digits: Any) -> TorchModel:
    """SiLU on 75 numbers: at 16 rows it would end between two vectors."""
    layers = [nn.Flatten(), nn.Linear(64, 75), nn.SiLU(), nn.Linear(75, 10)]
    return made(nn.Sequential(*layers), digits)


@pytest.mark.slow
def test_records_do_not_depend_on_the_batches(tmp_path: Path) -> None:
    records = alike("zoo:digits-mlp", "digits", tmp_path, attack="pgd:steps=10", threat_model="linf:eps=0.15")
    assert {record.outcome for record in records} >= {Outcome.BROKEN, Outcome.ROBUST}
    assert sizes_in(tmp_path / "7")[-1] == 64


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_records_of_no_embedded_model_depend_on_the_batches(name: str, tmp_path: Path) -> None:
    alike(f"zoo:{name}", EMBEDDED[name], tmp_path, n=KINDS[name], draws=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fashion-mnist-cnn-pgd_at", "digits-snn"])
def test_two_processes_write_the_same_records(name: str, tmp_path: Path) -> None:
    case = case_of(f"zoo:{name}", EMBEDDED[name], batch_size=9)
    assert play(case, tmp_path / "two", workers=2) == play(replace(case, batch_size=256), tmp_path / "one")
    assert sizes_in(tmp_path / "two")


def test_a_function_that_ends_between_vectors_moves_no_record(digits: Any, tmp_path: Path) -> None:
    alike(odd_network(digits), digits, tmp_path, attack="pgd:steps=20")
    assert {size % 32 for size in sizes_in(tmp_path / "7")} == {0}


def spied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The sizes that batches are attacked in."""
    from advkit.evaluation.run import engine

    seen: list[tuple[int, ...]] = []
    real = engine.run_alone

    def spy(unit: Any, case: Any, batch: Any, lanes: Lanes) -> Any:
        seen.append(lanes.sizes)
        return real(unit, case, batch, lanes)

    monkeypatch.setattr(engine, "run_alone", spy)
    return seen


def change(folder: Path, **entries: Any) -> None:
    file = folder / "records.lanes.json"
    said = json.loads(file.read_text())
    said["victim"] |= entries
    file.write_text(json.dumps(said))


@pytest.mark.slow
def test_a_resumed_run_keeps_the_shapes_that_it_began_with(
    digits: Any, digits_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    case = case_of(digits_model, digits, batch_size=7)
    whole = play(case, tmp_path)
    assert sizes_in(tmp_path)[0] < 64
    cut(tmp_path, 20)
    change(tmp_path, sizes=[64])
    seen = spied(monkeypatch)
    monkeypatch.setattr(shapes, "lanes_of", lambda *_: pytest.fail("nothing is to be probed"))
    assert play(case, tmp_path) == whole
    assert set(seen) == {(64,)}
    assert sizes_in(tmp_path) == [64]
    assert not [each for each in caplog.records if each.levelname == "WARNING"]


def test_other_bits_than_where_the_run_began_are_said_once(
    digits: Any, digits_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As another machine, or another torch, would compute them."""
    case = case_of(digits_model, digits, batch_size=7)
    whole = play(case, tmp_path)
    cut(tmp_path, 20)
    change(tmp_path, sizes=[16, 64], bits="of another machine")
    seen = spied(monkeypatch)
    assert play(case, tmp_path) == whole
    assert set(seen) == {(16, 64)}
    (said,) = [each.message for each in caplog.records if each.levelname == "WARNING"]
    assert "computes other last bits than where the run began" in said
    assert torch.__version__ in said
    caplog.clear()
    cut(tmp_path, 20)
    assert play(case, tmp_path) == whole  # the file tells of this machine by now
    assert not [each for each in caplog.records if each.levelname == "WARNING"]


def test_shapes_that_no_longer_agree_are_said_and_not_used(
    digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    case = case_of(odd_network(digits), digits, batch_size=7)
    whole = play(case, tmp_path)
    cut(tmp_path, 20)
    change(tmp_path, sizes=[8, 64], bits="of another machine")
    seen = spied(monkeypatch)
    assert play(case, tmp_path) == whole
    assert set(seen) == {tuple(sizes_in(tmp_path))}
    assert 8 not in sizes_in(tmp_path)
    (said,) = [each.message for each in caplog.records if each.levelname == "WARNING"]
    assert "the run began with calls of 8, 64 samples" in said


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"victim": {}}', *(f'{{"victim": {{"sizes": {sizes}, "bits": ""}}}}' for sizes in ("[]", "[0]"))],
)
def test_a_damaged_list_is_refused(digits: Any, digits_model: Any, tmp_path: Path, text: str) -> None:
    case = case_of(digits_model, digits, n=8)
    play(case, tmp_path)
    cut(tmp_path, 3)
    (tmp_path / "records.lanes.json").write_text(text)
    with pytest.raises(StaleRun, match="is damaged"):
        play(case, tmp_path)
