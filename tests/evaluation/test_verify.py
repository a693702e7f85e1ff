"""A report is held against its records: edits are noticed, and what can't be counted is named."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import advkit
from advkit.core.errors import ReportError
from advkit.evaluation.report import Report
from advkit.evaluation.report.leaderboard import html_of, markdown_of, scan
from advkit.evaluation.report.verify import records_file, verify
from advkit.evaluation.stats import rate

N = 30
REQUESTS: dict[str, dict[str, Any]] = {
    "single": {"attack": "pgd:steps=3"},
    "suite": {"attack": "thorough"},
    "targeted": {"attack": "pgd:steps=3", "goal": "targeted:how=random"},
    "transfer": {"attack": "fgsm", "threat_model": "transfer:sources=zoo:digits-public-mlp,eps=0.2"},
    "grid": {"attack": "fgsm", "threat_model": "tapm:eps=0.2,attacks=fgsm"},
    "oblivious": {"attack": "pgd:steps=3", "defense": "bit_depth:bits=3"},
    "ordered": {"attack": "cw-topk", "goal": "ordered-topk:k=2", "threat_model": "minimum-l2"},
    "stream": {"attack": "online", "threat_model": "online:k=3"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    for name, request in REQUESTS.items():
        advkit.evaluate(task="digits", n=N, device="cpu", out=root / name, **request)
    return root


@pytest.fixture
def single(runs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs / "single", tmp_path / "run"))


def edited(folder: Path, edit: Callable[[dict[str, Any]], object]) -> Report:
    data = json.loads((folder / "report.json").read_text())
    edit(data)
    (folder / "report.json").write_text(json.dumps(data))
    return Report.load(folder)


@pytest.mark.parametrize("name", REQUESTS)
def test_an_untouched_report_agrees(name: str, runs: Path) -> None:
    found = verify(Report.load(runs / name))
    assert found.faults == ()
    assert found.records
    unchecked = {metric.split("_")[0] for metric in found.unchecked}
    assert unchecked <= {"tapm", "stream"}
    assert found.headline == (name != "stream")


def test_every_figure_of_one_attack_is_counted_again(runs: Path) -> None:
    assert verify(Report.load(runs / "single")).mark == "yes"
    assert verify(Report.load(runs / "suite")).mark == "yes"
    assert verify(Report.load(runs / "ordered")).mark == "yes"


def test_what_a_scenario_computed_is_named(runs: Path) -> None:
    found = verify(Report.load(runs / "stream"))
    assert "stream_fool_rate" in found.unchecked
    assert found.mark == "partly: the score can't be counted from records"


def _raise(data: dict[str, Any]) -> None:
    clean = data["metrics"]["clean_accuracy"]["numerator"]
    for entry in (data["metrics"], data["attacks"][0]):
        entry["robust_accuracy"].update(rate(clean, N, "all_samples"))
        entry["attack_success_rate"].update(rate(0, clean, "clean_correct"))


def _swap_classes(data: dict[str, Any]) -> None:
    names = [name for name in data["metrics"] if name.startswith("robust_accuracy_class_")]
    values = [data["metrics"][name] for name in names]
    assert values != values[::-1]
    data["metrics"] |= dict(zip(names, values[::-1], strict=True))


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "accuracy": _raise,
    "classes": _swap_classes,
    "tail": lambda d: d["metrics"]["tail_30_accuracy"].update(value=0.5),
    "worst class": lambda d: d["metrics"]["worst_class_accuracy"].update(value=1.0, numerator=3, denominator=3),
    "eps": lambda d: d["threat_model"].update(eps=0.3),
    "norm": lambda d: d["threat_model"].update(norm="L2"),
    "knowledge": lambda d: d["threat_model"].update(knowledge="black_box"),
    "access": lambda d: d["threat_model"]["attacker"].update(access="black_box_score"),
    "access of one attack": lambda d: d["attacks"][0].update(access="black_box_score"),
    "attack": lambda d: d["attacks"][0].update(name="autoattack"),
    "protocol": lambda d: d["protocol"].update(name="autoattack-standard"),
    "cost": lambda d: d["attacks"][0]["cost"].update(forward=10**6),
    "distance": lambda d: d["attacks"][0]["perturbation"].update(max=0.01),
    "defense": lambda d: d["defense"].update(name="pgd_at"),
    "weights": lambda d: d["model"].update(state_sha256="0" * 64),
    "data": lambda d: d["dataset"].update(sha256="0" * 64),
    "ids": lambda d: d["dataset"]["selection"].update(ids_sha256="0" * 64),
    "config": lambda d: d["reproducibility"].update(config_sha256="0" * 64),
    "seed": lambda d: d["reproducibility"].update(seed=7),
    "records": lambda d: d["per_sample"].update(sha256="0" * 64),
    "request": lambda d: d["request"].update(threat_model="linf:eps=0.01"),
    "title": lambda d: d.update(title=d["title"].replace("model=", "model=python:")),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_noticed(name: str, single: Path) -> None:
    report = edited(single, EDITS[name])
    assert verify(report).faults
    board = scan(single.parent)
    (victim,) = (victim for group in board.groups for victim in group.victims)
    assert [attack.verified.partition(":")[0] for attack in victim.attacks] == ["no"]
    assert (victim.rank, victim.verified.partition(":")[0]) == (None, "no")
    assert "| no:" in markdown_of(board)
    assert '"verified":"no"' in html_of(board, single.parent)


def test_an_edited_record_is_noticed_though_the_hash_was_made_anew(single: Path) -> None:
    file = single / "records.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    row = next(i for i, line in enumerate(lines) if json.loads(line)["outcome"] == "broken")
    lines[row] = json.dumps({**json.loads(lines[row]), "outcome": "robust"}, separators=(",", ":")) + "\n"
    file.write_text("".join(lines))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    found = verify(edited(single, lambda d: d["per_sample"].update(sha256=digest)))
    assert any("robust_accuracy is" in fault for fault in found.faults)


def test_without_records_nothing_is_confirmed(single: Path) -> None:
    (single / "records.jsonl").unlink()
    assert verify(Report.load(single)).mark == "no records"


def test_without_its_case_a_report_is_confirmed_in_part(single: Path) -> None:
    (single / "records.case.json").unlink()
    found = verify(Report.load(single))
    assert found.unchecked == ("reproducibility.config_sha256",)
    (single / "records.case.json").write_text("[[")
    assert verify(Report.load(single)).faults == ("records.case.json is no case",)


@pytest.mark.parametrize("path", ["../records.jsonl", "/etc/passwd", "..", "a/b"])
def test_records_lie_beside_the_report(path: str, single: Path) -> None:
    report = edited(single, lambda d: d["per_sample"].update(path=path))
    with pytest.raises(ReportError, match="beside the report"):
        records_file(report)
    assert verify(report).faults


def test_a_report_of_schema_1_0_agrees() -> None:
    found = verify(Report.load(Path(__file__).with_name("run_of_schema_1_0")))
    assert found.faults == ()


STEERING = "\x1b]0;own\x07\x9b31m\u202e\x00"


def test_nothing_of_a_report_steers_a_terminal(single: Path) -> None:
    """Whatever text of it is shown, wherever."""

    def poison(value: Any) -> None:
        for key, each in list(value.items()):
            if isinstance(each, dict):
                poison(each)
            elif isinstance(each, str) and key in ("name", "title", "architecture", "source", "message", "command"):
                value[key] = each + STEERING

    def edit(data: dict[str, Any]) -> None:
        poison(data)
        poison(data["attacks"][0])
        data["section"]["wording"] = {key: text + STEERING for key, text in data["section"]["wording"].items()}
        data["section"]["sentence"] += STEERING
        data["diagnostics"]["flags"].append({"id": "zero_gradient", "severity": "info", "message": STEERING})

    report = edited(single, edit)
    board = scan(single.parent)
    shown = [repr(report), str(report), report.verdict(), report.title, report.threat, report._repr_html_()]
    shown += [line for line, _ in [*report.brief(), *report.full()]]
    shown += [report.to_json(), board.to_json(), markdown_of(board), html_of(board, single.parent)]
    shown += [str(flag) for flag in report.flags] + [*verify(report).faults]
    assert len(board) == 1
    for text in shown:
        assert not set(text) & set(STEERING.replace("]0;own", "").replace("31m", "")), text[:80]
    assert json.loads(report.to_json())["title"].endswith(STEERING)


def test_a_shard_agrees_with_its_records(tmp_path: Path) -> None:
    advkit.evaluate("fgsm", task="digits", n=4, rows="1:3", beside=False, out=tmp_path)
    assert verify(advkit.Report.load(tmp_path)).faults == ()
