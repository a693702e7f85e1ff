"""Reports of other tools, of other versions and of nobody's hand: each is one line of the board, the others stand."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import advkit
from advkit.core.errors import ReportError
from advkit.evaluation.report import Report, board_page
from advkit.evaluation.report.board import Board
from advkit.evaluation.report.leaderboard import html_of, markdown_of, scan

ODD: tuple[Any, ...] = (None, [], {}, "x", -1, 1e308, True, [None], {"a": 1}, "\ud800", 10**40, "\x1b]0;own\x07")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs of several scenarios."""
    home = tmp_path_factory.mktemp("runs")
    digits: dict[str, Any] = {"task": "digits", "device": "cpu"}
    advkit.evaluate("fgsm", n=12, out=home / "evasion", **digits)
    advkit.evaluate(
        "fgsm", n=6, threat_model="tapm:attacks=fgsm,sources=zoo:digits-public-mlp", out=home / "grid", **digits
    )
    advkit.evaluate("online:inner=fgsm,k=2", n=12, out=home / "stream", **digits)
    advkit.evaluate("pgd:steps=2", n=6, goal="targeted:how=next", out=home / "targeted", **digits)
    return home


def shown(folder: Path) -> Board:
    """The board of a folder, written in every form."""
    board = scan(folder)
    for text in (html_of(board, folder), markdown_of(board), board.to_json()):
        assert "\x1b" not in text
    return board


def ranked(board: Board) -> list[str]:
    """Where the reports lie that the board ranks."""
    return [attack.path for group in board.groups for victim in group.victims for attack in victim.attacks]


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inside:
        yield from paths(each, (*path, key))


def changed(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The document with another value somewhere; Ellipsis takes what is there away."""
    if not path:
        return value
    made = copy.deepcopy(document)
    place = made
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return made


def mutated(runs: Path, folder: Path, seed: int, number: int) -> int:
    """Boards of a good report beside a mutated one; how many of those were no reports any more."""
    draw, bad = random.Random(seed), 0
    documents = {run.name: json.loads((run / "report.json").read_text()) for run in sorted(runs.iterdir())}
    places = {name: list(paths(document)) for name, document in documents.items()}
    for _ in range(number):
        name = draw.choice(sorted(documents))
        path, value = draw.choice(places[name]), draw.choice((..., *ODD))
        if value is ... and not path:
            continue
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(runs / "evasion", folder / "good", ignore=shutil.ignore_patterns("plots", "*.examples"))
        shutil.copytree(runs / name, folder / "odd", ignore=shutil.ignore_patterns("plots", "*.examples"))
        (folder / "odd" / "report.json").write_text(json.dumps(changed(documents[name], path, value)))
        board = shown(folder)
        assert "good/report.json" in ranked(board), (path, value)
        bad += bool(board.invalid)
    return bad


@pytest.mark.slow
def test_one_odd_report_does_not_stop_the_board(runs: Path, tmp_path: Path) -> None:
    assert mutated(runs, tmp_path / "board", seed=0, number=60) > 20


@pytest.mark.slow
def test_no_odd_report_stops_the_board(runs: Path, tmp_path: Path) -> None:
    assert mutated(runs, tmp_path / "board", seed=1, number=600) > 180


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "JSON document"),
        (b"\xff\xfe\x00", "can't be read"),
        (b"[" * 100_000, "nested too deeply"),
        (b"3", "not an object of names and values"),
        (b'{"schema_version": "9.0"}', "required property"),
        (b'{"robust_accuracy": 0.9, "model": "mine"}', ""),
        (b'{"kind": NaN}', "NaN"),
        (b'{"kind": 1e999}', "beyond all numbers"),
        (b'{"kind": ' + b"9" * 4000 + b"}", "beyond 64 bits"),
    ],
)
def test_what_is_no_report_is_listed_with_its_fault(content: bytes, words: str, runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "evasion", tmp_path / "good")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "report.json").write_bytes(content)
    board = shown(tmp_path)
    assert ranked(board) == ["good/report.json"]
    ((path, fault),) = board.invalid
    assert path == "odd/report.json"
    assert words in fault
    assert "\n" not in fault


def test_a_pipe_or_a_folder_of_that_name_is_no_report(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "evasion", tmp_path / "good")
    for name in ("pipe", "folder"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "pipe" / "report.json")
    (tmp_path / "folder" / "report.json").mkdir()
    board = shown(tmp_path)
    assert ranked(board) == ["good/report.json"]
    assert board.invalid == (("pipe/report.json", "no regular file"),)


def test_a_report_that_no_check_foresaw_is_one_line(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever showing it raises; the others are shown."""
    shutil.copytree(runs / "evasion", tmp_path / "good")
    shutil.copytree(runs / "targeted", tmp_path / "odd")
    whole = board_page.page

    def page(data: Any, full: bool = False) -> Any:
        if "goal=targeted" in data["title"]:
            raise ZeroDivisionError("never foreseen")
        return whole(data, full)

    monkeypatch.setattr(board_page, "page", page)
    board = shown(tmp_path)
    assert ranked(board) == ["good/report.json"]
    assert board.invalid == (("odd/report.json", "it can't be shown (ZeroDivisionError: never foreseen)"),)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("numerator", -1),
        ("numerator", True),
        ("numerator", {"a": 1}),
        ("denominator", "\ud800"),
        ("denominator_kind", None),
        ("value", "x"),
        ("ci", {"low": 0}),
        ("ci", [0, 1]),
    ],
)
def test_rates_of_any_name_are_checked(name: str, value: Any, runs: Path) -> None:
    """The schema leaves metrics open; what is a rate has counts, a kind and an interval of numbers."""
    data = json.loads((runs / "evasion" / "report.json").read_text())
    metric = next(each for each in data["metrics"] if each.startswith("robust_accuracy_class_"))
    with pytest.raises(ReportError, match=metric):
        Report.from_dict(changed(data, ("metrics", metric, name), value))
