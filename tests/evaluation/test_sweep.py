"""Sweeps in this process: grids and their mistakes, lines, shards, resumed folders, and curves over radii."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import advkit
from advkit.cli.main import load_command
from advkit.core.errors import AdvkitError, UsageError
from advkit.defenses.labels.svm import SVM
from advkit.evaluation import victims
from advkit.evaluation.execute import preflight
from advkit.evaluation.plan import Request, plan
from advkit.evaluation.report.merge import merge
from advkit.evaluation.run.store import read_examples, read_records
from advkit.evaluation.sweep import Curve, Sweep, radii, sweep
from advkit.evaluation.sweep.api import carry_out, prepare
from advkit.evaluation.sweep.engines.slurm import shared_out
from advkit.evaluation.sweep.grid import read_grid
from advkit.evaluation.sweep.line import Line, Note, state_of
from advkit.evaluation.sweep.line import carry_out as run_line
from advkit.evaluation.sweep.shards import apart, cut
from advkit.tasks import TASKS

SMALL: dict[str, Any] = {"attacks": ["fgsm"], "tasks": ["digits"], "n": 6, "device": "cpu"}


class Noisy(nn.Module):
    """A model that answers otherwise every time, and does not say so."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.layers(x + torch.randn_like(x))
        return answer


class Here:
    """An engine of this very process, with a list of what it began."""

    def __init__(self) -> None:
        self.begun: list[int] = []

    def run(self, home: Path, lines: Sequence[Line], workers: int) -> Iterator[int]:
        for line in lines:
            self.begun.append(line.line)
            run_line(home, line.line)
            yield line.line


def swept(grid: dict[str, Any], out: Path, **settings: Any) -> Sweep:
    made = sweep(grid, out=out, engine=settings.pop("engine", Here()), workers=1, **settings)
    assert isinstance(made, Sweep)
    return made


# What cells share


@pytest.mark.slow
def test_what_was_learned_from_labels_is_shared_where_nothing_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    learned: list[str] = []
    protect = SVM.protect

    def counted(self: SVM, *given: Any) -> Any:
        learned.append(repr(self))
        return protect(self, *given)

    monkeypatch.setattr(SVM, "protect", counted)
    monkeypatch.setattr(victims, "_learned_here", {})
    digits, pair = TASKS.build("digits"), TASKS.build("digits-pair")
    first = victims.protected(None, "svm", digits).model
    assert victims.protected(None, SVM(), digits).model is first
    assert victims.protected(None, "svm", digits, seed=1).model is not first
    assert victims.protected(None, "svm:C=2", digits).model is not first
    assert victims.protected(None, "svm", pair).model.classes == 2
    assert len(learned) == 4


@pytest.mark.slow
def test_a_cell_is_refused_by_the_plan_where_an_evaluation_refuses_it_and_in_its_words(tmp_path: Path) -> None:
    every = read_grid(Path(__file__).parents[2] / "docs" / "every_pair.yaml")
    grid = every.model_copy(update={"defenses": ["none"], "exclude": []})
    refused = [line for line in prepare(grid, tmp_path).lines if line.reason]
    assert {"sda:steps=2", "beast:length=2,k=3", "pixle:queries=60"} <= {line.request["attack"] for line in refused}
    for line in refused:
        with pytest.raises(AdvkitError) as raised:
            preflight(plan(Request(**line.request, beside=False)).case)
        assert line.reason == str(raised.value)


# The file


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("attack: [fgsm]", "unknown key 'attack'; did you mean 'attacks'"),
        ("attacks: [fgsm]\nexclude: [{atack: fab}]", "unknown key 'atack'; did you mean 'attack'"),
        ("tasks: [digits]", "no attacks; name at least one"),
        ("attacks: [pgd: steps=3]", "without a space after the colon"),
        ("attacks: [fgsm]\nn: 2.5", "n is 2.5"),
        ("attacks: [fgsm]\nn: 0", "n is 0"),
        ("attacks: [fgsm]\nseeds: ['1']", "seeds.0 is '1'"),
        ("attacks: []", "attacks is []"),
        ("- fgsm", "expected keys and lists"),
        ("attacks: [fgsm", "no YAML"),
        ("attacks: !!python/object/apply:os.system [ls]", "no YAML"),
    ],
)
def test_mistakes_of_a_grid_are_one_line(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as raised:
        read_grid(file)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    assert str(file) in str(raised.value)


def test_cells_are_every_combination_once_in_order() -> None:
    grid = read_grid({"attacks": ["fgsm", "pgd", "fgsm"], "tasks": "digits", "seeds": [0, 1], "goals": [None]})
    cells = list(grid.cells())
    assert [(cell["attack"], cell["seed"]) for cell in cells] == [("fgsm", 0), ("fgsm", 1), ("pgd", 0), ("pgd", 1)]
    from advkit.attacks import ATTACKS

    every = [cell["attack"] for cell in read_grid({"attacks": "all"}).cells()]
    assert every == list(ATTACKS.names())


def test_a_file_imports_nothing_of_others_unasked(tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text("attacks: [python:no_such_module:Part]\ntasks: [digits]\n")
    (line,) = prepare(file, tmp_path / "runs").lines
    assert "--trust" in line.reason
    (line,) = prepare(file, tmp_path / "runs", trust=True).lines
    assert "no_such_module" in line.reason
    assert "--trust" not in line.reason


# Lines


def test_a_line_is_the_command_that_the_parser_reads_back(tmp_path: Path) -> None:
    grid = {**SMALL, "attacks": ["pgd:steps=2,restarts=2"], "threat_models": ["linf:eps=0.1"], "seeds": [3], "n": 9}
    made = prepare({**grid, "batch_size": 4, "goals": ["targeted:how=next"]}, tmp_path, shard=4)
    assert [line.rows for line in made.lines] == ["0:3", "3:6", "6:9", None]
    for line in made.lines:
        command, *words = line.argv(tmp_path)
        asked = load_command(command).make_context(command, words).params
        told = Request(
            **{name: asked[name] for name in (*Request.__dataclass_fields__,) if name in asked and name != "keep"}
        )
        assert replace(told, beside=True) == Request(**line.request)
        assert asked["beside"] is False
        assert asked["out"] == tmp_path / line.folder
    assert json.loads((tmp_path / "sweep.jsonl").read_text().splitlines()[0])["argv"][0] == "evaluate"
    assert Sweep.load(tmp_path).lines == made.lines


def test_digests_name_what_is_evaluated(tmp_path: Path) -> None:
    def digest(**changes: Any) -> str:
        return prepare({**SMALL, **changes}, tmp_path).lines[0].digest

    assert digest(attacks=["pgd"]) == digest(attacks=["PGD"]) != digest()
    assert digest(device="auto") == digest(batch_size=2) == digest()
    assert (
        len({digest(), digest(n=7), digest(seeds=[1]), digest(speed="bf16"), digest(threat_models=["linf:eps=0.1"])})
        == 5
    )


def test_the_dearest_goes_first_and_groups_cost_alike() -> None:
    lines = [Line(line=i, cell=i, digest="", folder="", request={}, passes=p) for i, p in enumerate((9, 7, 6, 5, 3))]
    groups = shared_out(lines, 2)
    assert [[line.line for line in group] for group in groups] == [[0, 3], [1, 2, 4]]
    assert shared_out(lines[:1], 4) == [lines[:1]]


@pytest.mark.parametrize(("n", "passes", "rows"), [(1000, 5e6, None), (10, 1.0, 3), (65, 1e9, None), (7, 7.0, 6)])
def test_shards_are_all_rows_once(n: int, passes: float, rows: int | None) -> None:
    places = [Request(rows=each).places for each in cut(n, passes, rows)]
    assert [row for place in places if place for row in range(*place)] == list(range(n))


def test_a_cell_is_cut_only_where_rows_stand_apart(tmp_path: Path) -> None:
    grid = {**SMALL, "attacks": ["fgsm", "lean"], "defenses": ["none", "random-resize"]}
    found = {
        (line.request["attack"], line.request["defense"]): line.shards
        for line in prepare(grid, tmp_path, shard=2).lines
    }
    assert len(found["fgsm", "none"]) == 3
    assert [found["lean", "none"], found["fgsm", "random-resize"]] == [(), ()]
    for attack, defense in (("lean", "none"), ("fgsm", "random-resize")):
        with pytest.raises(UsageError, match="leave rows out"):
            advkit.evaluate(attack, defense, "digits", n=6, rows="0:2")


@pytest.mark.parametrize("rows", ["3", "3:3", "-1:2", "0:7", "a:b"])
def test_rows_that_are_no_shard(rows: str) -> None:
    with pytest.raises(UsageError, match="START:STOP"):
        advkit.evaluate("fgsm", task="digits", n=6, rows=rows)


# Runs


def test_cells_end_in_a_number_or_a_reason_and_are_run_once(tmp_path: Path) -> None:
    grid = {**SMALL, "attacks": ["fgsm", "ddn", "sda", "nothing"], "exclude": {"attack": "ddn"}}
    engine = Here()
    rows = {row.parts["attack"]: row for row in swept(grid, tmp_path, engine=engine).rows}
    assert len(engine.begun) == 1  # what does not fit is known before
    assert rows["fgsm"].state == "done"
    assert rows["fgsm"].value == advkit.evaluate("fgsm", task="digits", n=6, device="cpu", beside=False).robust_accuracy
    assert rows["ddn"].outcome == "excluded: excluded by the grid (attack=ddn)"
    assert "unknown attack" in rows["nothing"].outcome
    with pytest.raises(UsageError) as raised:
        advkit.evaluate("sda", task="digits", n=6)
    assert rows["sda"].reason == str(raised.value)
    assert "4 cells" in (tmp_path / "sweep.md").read_text()
    engine = Here()
    assert not swept(grid, tmp_path, engine=engine).failed
    assert not engine.begun


@pytest.mark.slow
def test_shards_are_joined_to_the_records_of_the_whole_run(tmp_path: Path) -> None:
    grid = {**SMALL, "attacks": ["pgd:steps=3"], "n": 11}
    made = prepare(grid, tmp_path / "cut", shard=4)
    whole = advkit.evaluate("pgd:steps=3", task="digits", n=11, device="cpu", beside=False, out=tmp_path / "whole")
    shards = [line for line in made.lines if line.rows]
    assert len(shards) == 3
    for line in shards:
        assert run_line(tmp_path / "cut", line.line).state == "done"
    parts = [advkit.Report.load(tmp_path / "cut" / line.folder) for line in shards]
    carry_out(made, engine=Here(), workers=1)
    (row,) = made.rows
    folder = tmp_path / "cut" / row.folder
    assert (folder / "records.jsonl").read_bytes() == (tmp_path / "whole" / "records.jsonl").read_bytes()
    report = advkit.Report.load(folder)
    assert report.metrics == whole.metrics
    assert report.to_dict()["dataset"] == whole.to_dict()["dataset"]
    merged = merge(merge(parts[0], parts[1]), parts[2]).metrics
    assert merged["robust_accuracy"] == whole.metrics["robust_accuracy"]
    held, kept = read_examples(folder), read_examples(tmp_path / "whole")
    assert set(held) == set(kept)
    assert all(torch.equal(a, b) for key in held for a, b in zip(held[key], kept[key], strict=True))
    assert not list(folder.glob("rows-*"))  # a shard's report would pass for another evaluation
    assert {state_of(tmp_path / "cut", line).state for line in made.lines} == {"done"}


def test_shards_of_another_cut_do_not_stay_beside_the_whole(tmp_path: Path) -> None:
    grid = {**SMALL, "attacks": ["fgsm"], "n": 4}
    (first, *_) = prepare(grid, tmp_path, shard=2).lines
    assert run_line(tmp_path, first.line).state == "done"
    assert (tmp_path / first.folder / "report.json").exists()
    made = carry_out(prepare(grid, tmp_path, shard=1), engine=Here(), workers=1)
    (row,) = made.rows
    assert row.n == 4
    assert not list((tmp_path / row.folder).glob("rows-*"))


def test_a_cell_whose_report_was_removed_is_run_again(tmp_path: Path) -> None:
    first = swept(SMALL, tmp_path)
    (row,) = first.rows
    (tmp_path / row.folder / "report.json").unlink()
    engine = Here()
    (again,) = swept(SMALL, tmp_path, engine=engine).rows
    assert engine.begun == [0]
    assert again == row


@pytest.mark.parametrize(
    "note", ['{"state":"running","place":5}', '{"state":"failed","tries":"x"}', '{"state":"else"}', '{"reason":[]}']
)
def test_an_odd_note_says_nothing(note: str, tmp_path: Path) -> None:
    (line,) = prepare(SMALL, tmp_path).lines
    (tmp_path / line.folder).mkdir()
    (tmp_path / line.folder / "line.json").write_text(note)
    assert state_of(tmp_path, line) == Note()


@pytest.mark.parametrize(
    ("name", "value"),
    [("line", "0"), ("request", 3), ("request", {"attack": 5}), ("passes", "x"), ("folder", "../x"), ("folder", "/x")],
)
def test_a_list_of_lines_that_was_edited_is_refused_in_one_line(name: str, value: Any, tmp_path: Path) -> None:
    prepare(SMALL, tmp_path)
    file = tmp_path / "sweep.jsonl"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))
    for look in (lambda: Sweep.load(tmp_path), lambda: run_line(tmp_path, 0)):
        with pytest.raises(AdvkitError, match=r"sweep.jsonl is damaged or of another version"):
            look()


def test_a_line_that_crashes_is_tried_again_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from advkit.evaluation.sweep import line as lines

    def broken(*_: Any) -> None:
        calls.append(1)
        raise RuntimeError("no luck")

    calls: list[int] = []
    monkeypatch.setattr(lines, "_evaluate", broken)
    made = swept(SMALL, tmp_path, retries=2)
    (row,) = made.rows
    assert len(calls) == 3
    assert (row.state, made.failed) == ("failed", True)
    assert "RuntimeError: no luck" in row.outcome
    monkeypatch.undo()
    assert not swept(SMALL, tmp_path).failed


def test_a_line_that_ends_its_process_is_put_aside(tmp_path: Path) -> None:
    class Deadly(Here):
        def run(self, home: Path, lines: Sequence[Line], workers: int) -> Iterator[int]:
            for line in lines:
                self.begun.append(line.line)
                folder = home / line.folder
                replace(Note.read(folder), state="running").write(folder)
                yield line.line

    engine = Deadly()
    (row,) = swept(SMALL, tmp_path, engine=engine).rows
    assert row.state == "quarantined"
    assert "ended its worker process" in row.outcome
    engine = Deadly()
    swept(SMALL, tmp_path, engine=engine)
    assert not engine.begun  # a second sweep leaves it alone
    assert not swept(SMALL, tmp_path, again=True).failed


def test_a_line_is_left_off_once_its_process_is_gone(tmp_path: Path) -> None:
    made = prepare(SMALL, tmp_path)
    (line,) = made.lines
    gone = subprocess.Popen([sys.executable, "-S", "-c", ""])
    gone.wait()
    for number, state in ((os.getpid(), "running"), (gone.pid, "left off")):
        Note(state="running", place=f"{socket.gethostname()}:{number}").write(tmp_path / line.folder)
        assert state_of(tmp_path, line).state == state
    Note(state="running", place=f"another-machine:{os.getpid()}").write(tmp_path / line.folder)
    assert state_of(tmp_path, line).state == "left off"


@pytest.mark.slow
def test_a_line_waits_for_a_process_that_is_still_at_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from advkit.evaluation.sweep import line as lines

    monkeypatch.setattr(lines, "_POLL", 0.01)
    made = prepare(SMALL, tmp_path)
    folder = tmp_path / made.lines[0].folder
    held = "import sys, pathlib, advkit.core.files as f; c = f.Claimed(pathlib.Path(sys.argv[1])); print(1); input()"
    other = subprocess.Popen(  # a task of a sweep whose driver was ended
        [sys.executable, "-u", "-c", held, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline()
    seen: list[bool] = []

    def ends() -> None:
        seen.append((folder / "line.json").exists())
        other.communicate("\n")

    threading.Timer(0.3, ends).start()
    assert run_line(tmp_path, 0).state == "done"
    assert seen == [False]  # its note was not overwritten while it was at work


def test_a_report_of_another_schema_is_told_and_kept(tmp_path: Path) -> None:
    (row,) = swept(SMALL, tmp_path).rows
    file = tmp_path / row.folder / "report.json"
    file.write_text(file.read_text().replace('"schema_version": "1.', '"schema_version": "9.'))
    before = file.read_bytes()
    made = swept(SMALL, tmp_path)
    assert made.failed
    assert "schema" in made.rows[0].outcome
    assert file.read_bytes() == before


def test_a_file_in_the_place_of_a_run_folder_stops_one_cell_alone(tmp_path: Path) -> None:
    made = prepare({**SMALL, "seeds": [0, 1]}, tmp_path)
    in_the_way = tmp_path / made.lines[0].folder
    in_the_way.write_text("mine")
    with pytest.raises(UsageError, match="can't be written"):
        run_line(tmp_path, 0)
    first, second = swept({**SMALL, "seeds": [0, 1]}, tmp_path).rows
    assert (first.state, second.state) == ("failed", "done")
    assert "is a file" in first.reason
    assert in_the_way.read_text() == "mine"


def test_the_report_of_another_evaluation_is_told(tmp_path: Path) -> None:
    made = swept({**SMALL, "seeds": [0, 1]}, tmp_path)
    one, other = (tmp_path / row.folder / "report.json" for row in made.rows)
    one.write_bytes(other.read_bytes())
    assert "another evaluation (seed differ)" in swept({**SMALL, "seeds": [0, 1]}, tmp_path).rows[0].outcome


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UsageError, match="can't be written"):
        swept(SMALL, file)


# Curves


def test_radii_are_the_fractions_that_they_name() -> None:
    assert radii("0:16/255:17") == [step / 255 for step in range(17)]
    assert radii("0.1, 8/255") == [0.1, 8 / 255]
    for text in ("0:1", "1:0:3", "0:1:1", "a", "0:1/0:3", ""):
        with pytest.raises(UsageError, match="START:STOP:POINTS"):
            radii(text)


@pytest.mark.slow
def test_a_curve_takes_over_what_smaller_radii_found(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"attack": "pgd:steps=4", "task": "digits", "n": 16, "device": "cpu"}
    made = sweep(eps=[0.0, 0.05, 0.1, 0.15], out=tmp_path, **asked)
    assert isinstance(made, Curve)
    points = made.data["points"]
    values = [value for _, value in made.points]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) > 2
    taken = 0
    for eps, point in zip((0.05, 0.1, 0.15), points[1:], strict=True):
        folder = made.folder / point["run"]
        records = {r.id: r for r in read_records(folder / "records.jsonl")}
        alone = tmp_path / f"alone-{eps}"
        threat_model = f"linf:eps={eps}"
        single = advkit.evaluate(threat_model=threat_model, beside=False, out=alone, **asked)
        held = read_examples(folder)
        for record in read_records(alone / "records.jsonl"):
            mine = records[record.id]
            if not any(note.startswith("found_at_eps") for note in mine.notes):
                assert mine == record  # those that are attacked end as in a run of that radius alone
                continue
            taken += 1
            origin, adversarial = held[f"{mine.made_by}|{mine.id}"]
            assert mine.outcome == "broken"
            assert float((adversarial - origin).abs().max()) <= eps - 0.04  # it was found at a smaller one
        assert point["robust_accuracy"]["value"] <= single.robust_accuracy
        assert point["robust_accuracy"] == advkit.Report.load(folder).metrics["robust_accuracy"]
        assert point["attacked"] + point["taken_over"] <= 16
    assert taken == sum(point["taken_over"] for point in points) > 0
    assert points[0]["robust_accuracy"]["value"] == single.clean_accuracy
    again = sweep(eps="0:0.15:4", out=tmp_path, **asked)
    assert isinstance(again, Curve)
    assert again.data == made.data
    assert {file.name for file in made.save()} == {"curve.json", "curve.md", "curve.png"}


def test_one_run_of_least_distances_gives_the_whole_curve(tmp_path: Path) -> None:
    made = sweep(eps="0:1:5", attack="ddn:steps=10", task="digits", n=12, device="cpu", out=tmp_path)
    assert isinstance(made, Curve)
    (folder,) = [each for each in made.folder.iterdir() if each.is_dir()]
    records = read_records(folder / "records.jsonl")
    for eps, value in made.points:
        held = [r for r in records if r.outcome != "wrong" and not (r.outcome == "broken" and r.distance <= eps)]
        assert value == len(held) / 12
    assert sum(point["passes"] for point in made.data["points"]) == sum(r.forwards + r.backwards for r in records)


@pytest.mark.slow
def test_a_suite_shares_through_its_first_stage(tmp_path: Path) -> None:
    made = sweep(eps=[0.05, 0.1], attack="lean", task="digits", model="zoo:digits-mlp", n=5, device="cpu", out=tmp_path)
    assert isinstance(made, Curve)
    first, second = made.data["points"]
    assert second["robust_accuracy"]["value"] <= first["robust_accuracy"]["value"] < 1
    assert second["taken_over"] == 5 - first["robust_accuracy"]["numerator"] - (5 - made.data["right"])


def test_what_has_no_curve(tmp_path: Path) -> None:
    for settings, words in (
        ({"threat_model": "transform", "attack": "spatial"}, "no radius"),
        ({"goal": "targeted:how=next"}, "robust accuracy"),
        ({"defense": "random-resize"}, "vary"),
    ):
        with pytest.raises(UsageError, match=words):
            sweep(eps=[0.1], **{"attack": "fgsm", "task": "digits", "n": 3, "out": tmp_path, **settings})
    for eps in ([], [0.0], [-0.1], [float("nan")]):
        with pytest.raises(UsageError, match="radii"):
            sweep(eps=eps, attack="fgsm", task="digits", out=tmp_path)
    with pytest.raises(UsageError, match="sweep needs a grid"):
        sweep()
    with pytest.raises(UsageError, match="a grid and eps"):
        sweep(SMALL, eps=[0.1])
    with pytest.raises(UsageError, match="belong into it"):
        sweep(SMALL, attack="fgsm")


def test_models_of_the_callers_own_have_curves(tmp_path: Path) -> None:
    x, y = torch.rand(8, 1, 4, 4), torch.arange(8) % 2
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()
    made = sweep(eps=[0.01, 0.5], attack="fgsm", task=(x, y), model=model, threat_model="linf:eps=0.1", out=tmp_path)
    assert isinstance(made, Curve)
    assert made.points[-1][1] == 0


def test_curves_of_other_models_and_budgets_have_folders_of_their_own(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"attack": "fgsm", "task": "digits", "n": 3, "out": tmp_path, "eps": [0.1]}
    others: list[dict[str, Any]] = [{}, {"model": "zoo:digits-mlp-trades"}, {"budget": "propagations=4"}]
    made = [sweep(**asked, **each) for each in (*others, {"batch_size": 2, "threat_model": "linf:eps=0.3"})]
    folders = [each.folder for each in made]
    assert len({*folders[:3]}) == 3
    assert folders[3] == folders[0]  # the radius of the request says nothing, the batches change nothing


def test_what_a_curve_can_not_have_is_refused_before_anything_is_run(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"attack": "pgd:steps=1", "task": "digits", "n": 3, "out": tmp_path}
    with pytest.raises(UsageError, match="whole number of positions"):
        sweep(eps=[1, 2.5], threat_model="l0:eps=1", **asked)
    with pytest.raises(UsageError, match="leave rows out"):
        sweep(eps=[0.1], rows="0:2", **asked)
    with pytest.raises(UsageError, match="vary from call to call"):
        sweep(eps=[0.1, 0.2], **asked, model=Noisy())
    assert not list(tmp_path.iterdir())


def test_a_curve_under_a_speed_switch_warns_of_no_other_machine(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = sweep(eps=[0.2, 0.25], attack="fgsm", task="digits", n=6, speed="bf16", device="cpu", out=tmp_path)
    assert isinstance(made, Curve)
    assert made.data["points"][1]["taken_over"]
    assert "last bits" not in caplog.text


def test_a_victim_that_is_found_to_vary_is_not_cut() -> None:
    asked = Request(attack="fgsm", task="digits", n=6)
    assert apart(asked)
    assert not apart(replace(asked, model=Noisy()))


def test_a_grid_that_is_no_regular_file_is_refused_unopened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "grid.yaml")
    with pytest.raises(UsageError, match="is no regular file; expected a grid in YAML"):
        read_grid(tmp_path / "grid.yaml")
