"""`report.adversarial()`: what the victim was shown, with ids, labels and the harness's verdicts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import advkit
from advkit.core.errors import ReportError, UsageError
from advkit.evaluation.api import resolve
from advkit.evaluation.report import Report
from advkit.evaluation.run.store import read_records

DIGITS: dict[str, Any] = {"task": "digits", "n": 12, "device": "cpu"}
CASES: dict[str, dict[str, Any]] = {
    "one attack": {"attack": "pgd:steps=5", **DIGITS},
    "files of few levels": {"attack": "pgd:steps=5", "threat_model": "linf:eps=0.2,lattice=15", **DIGITS},
    "a suite": {"attack": "lean", **DIGITS},
    "a target": {"attack": "pgd:steps=5", "goal": "targeted:how=next", **DIGITS},
    "a grid": {"attack": "pgd:steps=2", "threat_model": "tapm", **DIGITS},
    "a stream": {"attack": "online:inner=fgsm,k=3", **DIGITS},
    "a defense": {"attack": "fgsm", "defense": "bit-depth:bits=3", **DIGITS},
    "events": {"attack": "sda", "task": "digits-dvs", "n": 3, "device": "cpu"},
    "prompts": {"attack": "random_suffix:length=2,evaluations=4", "task": "prompts", "model": "toychat", "n": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_victim_answers_them_as_the_records_say(name: str, tmp_path: Path) -> None:
    """Whoever asks the model again gets the verdict; memory, the run and its folder hold the same."""
    settings = CASES[name]
    memory = advkit.evaluate(beside=False, **settings).adversarial()
    run = advkit.evaluate(beside=False, out=tmp_path / "run", **settings)
    records = {(str(r.made_by), r.id): r for r in read_records(tmp_path / "run" / "records.jsonl")}
    for found in (memory, run.adversarial(), Report.load(tmp_path / "run").adversarial()):
        assert found.ids == memory.ids
        assert torch.equal(found.adversarial, memory.adversarial)
        assert torch.equal(found.clean, memory.clean)
    case = resolve(**settings)
    batch = next(iter(case.task.batches(case.n, n=case.n)))
    assert memory.ids == batch.ids
    assert torch.equal(memory.clean, batch.x)
    assert batch.labels is not None
    assert torch.equal(memory.labels, batch.labels)
    made = [records[key] for key in zip(memory.attacks, memory.ids, strict=True)]
    assert [str(record.outcome) for record in made] == list(memory.outcomes)
    assert memory.broken.tolist() == [record.outcome == "broken" for record in made]
    with torch.no_grad():
        said = case.victim(memory.adversarial).argmax(1)
    assert said.tolist() == [record.adversarial for record in made]
    ever = {record.id for record in records.values() if record.outcome == "broken"}
    assert {row for row, fell in zip(memory.ids, memory.broken.tolist(), strict=True) if fell} == ever
    assert repr(memory).startswith(f"Examples({len(memory)} of {len(memory)} samples, {len(ever)} broken")
    assert all(bool(text) == (name == "prompts") for text in memory.texts)


def test_as_many_as_were_kept() -> None:
    report = advkit.evaluate("fgsm", keep=5, **DIGITS)
    found = report.adversarial()
    assert (len(found), found.evaluated) == (5, 12)
    assert repr(found).startswith("Examples(5 of 12 samples")
    with pytest.raises(ReportError, match=r"none of the 12 samples.*keep=N"):
        advkit.evaluate("fgsm", keep=0, **DIGITS).adversarial()


@pytest.mark.slow
def test_one_attack_by_its_label() -> None:
    report = advkit.evaluate("autoattack", defense="pgd_at", **DIGITS)
    for entry in report.attacks:
        if entry["n_attacked"]:
            assert set(report.adversarial(entry["name"]).attacks) == {entry["name"]}
    with pytest.raises(ReportError, match=r"no attack of this report is called 'pgd'; it has autoattack/"):
        report.adversarial("pgd")


def test_a_report_says_what_is_not_there(tmp_path: Path) -> None:
    run = tmp_path / "run"
    report = advkit.evaluate("fgsm", out=run, **DIGITS)
    with pytest.raises(ReportError, match="document without its run"):
        Report.from_dict(report.to_dict()).adversarial()
    alone = tmp_path / "alone.json"
    shutil.copy(run / "report.json", alone)
    with pytest.raises(ReportError, match="no records beside it"):
        Report.load(alone).adversarial()
    kept = run / "records.examples"
    (file,) = kept.iterdir()
    whole = file.read_bytes()
    for damage in (b"", b"garbage" * 9, whole[: len(whole) // 2]):
        file.write_bytes(damage)
        with pytest.raises(ReportError, match="can't be read"):
            Report.load(run).adversarial()
    file.unlink()
    file.symlink_to(alone)
    with pytest.raises(ReportError, match="no adversarial examples"):
        Report.load(run).adversarial()
    shutil.rmtree(kept)
    with pytest.raises(ReportError, match="keeps the records of the run and no adversarial examples"):
        Report.load(run).adversarial()
    data = json.loads((run / "report.json").read_text())
    data["per_sample"]["path"] = "../elsewhere.jsonl"
    (run / "report.json").write_text(json.dumps(data))
    with pytest.raises(ReportError, match="expected the name of a file beside the report"):
        Report.load(run).adversarial()


@pytest.mark.slow
def test_a_random_victims_companion_has_clean_answers_of_its_own() -> None:
    """They are drawn apart, so what stands beside may start from other samples; the report is valid all the same."""
    for seed in (5, 6, 8):
        advkit.evaluate(
            "pgd:steps=2,eot=2",
            defense="random-resize:smallest=0.5",
            task="digits",
            n=6,
            draws=2,
            seed=seed,
            device="cpu",
        )


@pytest.mark.parametrize("kept", [0, 2])
def test_a_folder_in_which_a_run_kept_fewer_is_refused(kept: int, tmp_path: Path) -> None:
    asked = {"task": "digits", "n": 4, "threat_model": "linf:eps=0.1"}
    advkit.evaluate("fgsm", **asked, beside=False, keep=kept, out=tmp_path)
    with pytest.raises(UsageError, match=f"no example of {4 - kept} rows on record"):
        advkit.attack("fgsm", **asked, out=tmp_path)


def test_they_are_in_the_order_of_the_task_where_samples_were_run_again(tmp_path: Path) -> None:
    asked = {"task": "digits", "n": 4, "threat_model": "linf:eps=0.1"}
    first = advkit.attack("fgsm", **asked, out=tmp_path)
    records = tmp_path / "records.jsonl"
    records.write_bytes(b"".join(records.read_bytes().splitlines(keepends=True)[1:]))
    again = advkit.attack("fgsm", **asked, out=tmp_path)
    assert again.ids == first.ids
    assert torch.equal(again.adversarial, first.adversarial)
