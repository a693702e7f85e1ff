"""Every command from its arguments to what it prints and writes, on small digits models."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from safetensors.torch import load_file

from advkit.core.protocols import Outcome
from advkit.defenses import DEFENSES
from advkit.evaluation.report import Report, schema
from advkit.evaluation.run.store import read_records
from advkit.models import zoo
from advkit.models.checkpoint import load_checkpoint
from advkit.tasks import TASKS
from advkit.threat_models.lp import Linf

EVALUATE = ("evaluate", "--task", "digits", "--attack", "pgd:steps=5", "--device", "cpu", "--n", 40, "--no-plots")


def files(folder: str) -> dict[str, tuple[bytes, int]]:
    """Every file below a folder: its content and when it was written."""
    return {
        str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns)
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file()
    }


def test_evaluate_prints_a_report_and_keeps_it(advkit: Any, victim: str) -> None:
    said = advkit(*EVALUATE, "--model", victim, "--out", "run")
    assert said.code == 0
    report = Report.load("run/report.json")
    assert said.out.startswith("pgd:steps=5, defense none, on digits, model path:")
    assert "under linf eps=0.2, untargeted, white box" in said.out.splitlines()
    assert report.verdict().split(". ")[0] in " ".join(said.out.split())
    assert f"{100 * (report.robust_accuracy or 0):.1f} %" in said.out
    assert "report: run/report.json" in said.out
    records = read_records(Path("run/records.jsonl"))
    broken, wrong = (sum(r.outcome == o for r in records) for o in (Outcome.BROKEN, Outcome.WRONG))
    assert (report.metrics["clean_accuracy"]["numerator"], len(records)) == (40 - wrong, 40)
    assert report.metrics["robust_accuracy"]["numerator"] == 40 - wrong - broken
    assert broken > 0


def test_json_output_is_the_report_and_validates(advkit: Any, victim: str) -> None:
    said = advkit(*EVALUATE, "--model", victim, "--out", "run", "--json")
    assert said.code == 0
    jsonschema.Draft202012Validator(schema()).validate(said.json)
    assert said.json == json.loads(Path("run/report.json").read_text())
    assert said.json["threat_model"]["eps"] == 0.2, "the task's default"
    assert said.json["reproducibility"]["seed"] == 0


def test_the_run_folder_is_named_by_the_case(advkit: Any, victim: str) -> None:
    for seed in (0, 0, 1):
        assert advkit(*EVALUATE, "--model", victim, "--seed", seed).code == 0
    folders = list(Path("runs").iterdir())
    assert len(folders) == 2
    assert all((folder / "report.json").exists() for folder in folders)


def test_a_finished_run_is_not_run_again(advkit: Any, victim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from advkit.evaluation.run import engine

    first = advkit(*EVALUATE, "--model", victim, "--out", "run", "--json")
    before = files("run")

    def never(*_: object) -> None:
        raise AssertionError("a finished row was attacked again")

    monkeypatch.setattr(engine, "run_alone", never)
    again = advkit(*EVALUATE, "--model", victim, "--out", "run", "--json")
    assert again.code == 0
    after = files("run")
    assert {k: v for k, v in before.items() if k != "report.json"} == {
        k: v for k, v in after.items() if k != "report.json"
    }
    changing = ("created_utc", "reproducibility")
    assert {k: v for k, v in again.json.items() if k not in changing} == {
        k: v for k, v in first.json.items() if k not in changing
    }


@pytest.mark.slow
def test_the_other_side_of_a_pubdef_model(advkit: Any) -> None:
    spec = zoo.card("digits-mlp-pubdef").defense
    said = advkit(*EVALUATE, "--defense", "pubdef", "--out", "run", "--json")
    assert said.code == 0
    metrics = said.json["metrics"]
    assert metrics["tapm_acc_avg"]["denominator"] == 40 * 3 * len(zoo.public("digits"))
    for part in ("seen", "unseen"):
        assert metrics[f"tapm_acc_best_attack_{part}"]["denominator"] == 40
    assert metrics["tapm_acc_best_attack"]["value"] == min(
        metrics[f"tapm_acc_best_attack_{part}"]["value"] for part in ("seen", "unseen")
    )
    assert said.json["defense"]["params"]["eps"] == DEFENSES.build(spec).eps, (
        "as it was trained, not as it was asked for"
    )
    assert not any(
        "tapm" in name for name in advkit(*EVALUATE, "--defense", "pubdef", "--only", "--json").json["metrics"]
    )


def test_a_checkpoint_may_move_during_a_run(advkit: Any, victim: str) -> None:
    assert advkit(*EVALUATE, "--model", victim, "--out", "run").code == 0
    Path("moved.safetensors").write_bytes(Path(victim.removeprefix("path:")).read_bytes())
    assert advkit(*EVALUATE, "--model", "path:moved.safetensors", "--out", "run").code == 0


@pytest.mark.slow
def test_plots_are_drawn(advkit: Any, victim: str) -> None:
    said = advkit(*EVALUATE[:-1], "--model", victim, "--out", "run")
    assert said.code == 0
    drawn = {p.name: p.read_bytes() for p in Path("run/plots").iterdir()}
    assert {"per_class.png", "examples.png"} <= set(drawn)
    assert all(content.startswith(b"\x89PNG") for content in drawn.values())
    assert said.out.splitlines()[-1] == "`advkit show run` shows all; plots are beside the report"
    said = advkit(*EVALUATE[:-1], "--model", victim, "--out", "run", "--verbose")
    assert all(f"run/plots/{name}" in said.out for name in drawn)


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["--defense pubdef", "--defense bit-depth:bits=1", "--goal targeted"])
def test_a_report_fits_a_page_of_80_columns(asked: str, advkit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    said = advkit(*EVALUATE, *asked.split(), "--out", "run")
    lines = said.out.splitlines()
    assert len(lines) <= 15
    assert max(map(len, lines)) <= 80
    assert lines[-2:] == ["report: run/report.json", "`advkit show run` shows all"]
    # nothing was folded: no line is the rest of another's name
    assert all(len(line.split("%")) > 1 for line in lines if line.startswith(("clean", "robust", "weakest")))


def test_show_prints_all_of_a_run(advkit: Any, victim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    verbose = advkit(*EVALUATE, "--model", victim, "--out", "runs/one", "--verbose")
    for path in ("runs/one", "runs/one/report.json"):
        shown = advkit("show", path)
        assert shown.code == 0
        assert verbose.out == f"{shown.out}report: runs/one/report.json\n"
        assert max(map(len, shown.out.splitlines())) <= 80
    assert sum(line.startswith("class ") for line in shown.out.splitlines()) == 10
    assert advkit("show", "runs/one", "--json").json == json.loads(Path("runs/one/report.json").read_text())
    # a folder of a part's name is no run; a run is one, whatever it is called
    Path("pgd").mkdir()
    assert "step_size" in advkit("show", "pgd").out
    Path("pgd/report.json").write_bytes(Path("runs/one/report.json").read_bytes())
    assert advkit("show", "pgd").out == shown.out
    assert "step_size" in advkit("show", "pgd", "--kind", "attacks").out
    for name in ("runs/absent/report.json", "runs"):
        said = advkit("show", name)
        assert (said.code, said.out, said.err.count("\n")) == (2, "", 1)


def test_an_untrustworthy_number_exits_with_3(advkit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("cheating.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Rounded(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.inner = nn.Linear(64, 10)\n"
        "    def forward(self, x):\n"
        "        return self.inner((x * 8).round().flatten(1) / 8)\n",
        encoding="utf-8",
    )
    monkeypatch.delitem(sys.modules, "cheating", raising=False)
    said = advkit(*EVALUATE, "--model", "python:cheating:Rounded", "--n", 100, "--out", "run", "--json")
    assert said.code == 3
    assert ("zero_gradient", "unreliable") in {(f["id"], f["severity"]) for f in said.json["diagnostics"]["flags"]}
    assert not Report.load("run/report.json").trustworthy


@pytest.mark.slow
def test_tapm_has_the_white_box_figure_beside_it(advkit: Any, victim: str) -> None:
    public = [card.name for card in zoo.public("digits")]
    assert public
    said = advkit(
        "evaluate", "--task", "digits", "--model", victim, "--threat-model", "tapm:eps=0.2,attacks=[pgd:steps=3]+fgsm",
        "--n", 30, "--device", "cpu", "--out", "grid", "--json",
    )  # fmt: skip
    assert said.code == 0
    metrics = said.json["metrics"]
    assert metrics["tapm_acc_avg"]["denominator"] == 30 * 2 * len(public)
    assert (
        metrics["tapm_acc_per_sample"]["value"]
        <= metrics["tapm_acc_best_attack"]["value"]
        <= metrics["tapm_acc_avg"]["value"]
    )
    assert {attack["name"] for attack in said.json["attacks"]} == {
        *(f"{attack}@zoo:{name}" for name in public for attack in ("fgsm", "pgd:steps=3")),
        "pgd",
    }
    white = [json.loads(line) for line in Path("grid/beside.jsonl").read_text().splitlines()]
    assert len(white) == 30
    assert metrics["white_box_robust_accuracy"]["numerator"] == sum(r["outcome"] == "robust" for r in white)
    assert "not evaluated" not in Report.load("grid/report.json").verdict()


def test_transfer_never_uses_the_victims_gradients(advkit: Any, victim: str) -> None:
    threat = "transfer:sources=zoo:digits-public-cnn,eps=0.2"
    said = advkit(*EVALUATE, "--model", victim, "--threat-model", threat, "--out", "run", "--json")
    assert said.code == 0
    assert said.json["threat_model"]["knowledge"] == "transfer"
    white = advkit(*EVALUATE, "--model", victim, "--out", "white", "--json")
    assert white.json["metrics"]["robust_accuracy"]["value"] < said.json["metrics"]["robust_accuracy"]["value"]


def test_targeted_goal(advkit: Any, victim: str) -> None:
    said = advkit(*EVALUATE, "--model", victim, "--goal", "targeted:how=next", "--out", "run", "--json")
    assert said.code == 0
    assert said.json["threat_model"]["goal"] == "targeted"
    for record in read_records(Path("run/records.jsonl")):
        if record.outcome == Outcome.BROKEN:
            assert record.label is not None
            assert record.adversarial == (record.label + 1) % 10


@pytest.mark.slow
def test_train_saves_what_evaluate_loads(advkit: Any) -> None:
    said = advkit(
        "train", "--task", "digits", "--defense", "pgd_at:eps=0.1,steps=3", "--model", "mlp:hidden=16",
        "--recipe", "epochs=2", "--device", "cpu", "--out", "trained", "--json",
    )  # fmt: skip
    assert said.code == 0
    made = said.json
    assert (made["epochs"], made["seed"], made["task"]) == (2, 0, "digits")
    assert "eps=0.1" in made["defense"]
    assert "epochs=2" in made["defense"]
    model = load_checkpoint(made["file"], sha256=made["sha256"])
    assert model.architecture == made["model"] == "mlp:hidden=16"
    evaluated = advkit(
        *EVALUATE, "--model", f"path:{made['file']}", "--defense", made["defense"], "--out", "run", "--json"
    )
    assert evaluated.code == 0
    assert evaluated.json["defense"]["name"] == "pgd_at"
    assert evaluated.json["model"]["state_sha256"] == model.state_sha256()


@pytest.mark.slow
def test_train_says_where_the_checkpoint_is_and_repeats_itself(advkit: Any) -> None:
    train = ("train", "--task", "digits", "--model", "mlp:hidden=8", "--recipe", "epochs=2,lr=0.01", "--device", "cpu")
    said = advkit(*train, "--out", "a")
    assert said.code == 0
    assert "recipe=[epochs=2,lr=0.01]" in said.out
    assert "evaluate it: advkit evaluate --task digits --model path:a/model.safetensors" in said.out
    assert advkit(*train, "--out", "b").code == 0
    assert Path("a/model.safetensors").read_bytes() == Path("b/model.safetensors").read_bytes()
    assert advkit(*train, "--out", "c", "--seed", 1).code == 0
    assert Path("a/model.safetensors").read_bytes() != Path("c/model.safetensors").read_bytes()


@pytest.mark.slow
def test_train_killed_and_resumed_ends_with_the_same_weights(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "advkit", "train", "--task", "digits", "--defense", "pgd_at:eps=0.1,steps=2",
        "--model", "mlp:hidden=32", "--recipe", "epochs=10,schedule=cosine,ema=0.99", "--device", "cpu", "--out",
    ]  # fmt: skip
    process = subprocess.Popen([*command, str(tmp_path / "cut")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "cut" / "training" / "log.json"

    def epochs() -> int:
        return len(json.loads(log.read_text())) if log.exists() else 0

    end = time.monotonic() + 120
    while epochs() < 2 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 2 <= epochs() < 10
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    for name in ("cut", "whole"):
        subprocess.run([*command, str(tmp_path / name)], check=True, capture_output=True)
    one, other = (load_checkpoint(tmp_path / name / "model.safetensors") for name in ("cut", "whole"))
    assert one.state_sha256() == other.state_sha256()
    assert (tmp_path / "cut/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_attack_exports_examples_that_hold(advkit: Any, victim: str) -> None:
    said = advkit(
        "attack", "--task", "digits", "--model", victim, "--attack", "pgd:steps=5", "--threat-model", "linf:eps=0.15",
        "--n", 30, "--png", 4, "--device", "cpu", "--out", "run", "--json",
    )  # fmt: skip
    assert said.code == 0
    held = load_file("run/examples.safetensors")
    batch = next(iter(TASKS.build("digits").batches(30)))
    assert torch.equal(held["origin"], batch.x)
    assert torch.equal(held["label"], batch.labels)
    model = load_checkpoint(victim.removeprefix("path:"))
    ball = Linf(0.15).bind(model.space)
    assert bool(ball.admits(held["adversarial"], held["origin"]).all())
    with torch.no_grad():
        clean, found = (model(held[name]).argmax(1) for name in ("origin", "adversarial"))
    assert torch.equal(held["broken"], (clean == held["label"]) & (found != held["label"]))
    assert int(held["broken"].sum()) == said.json["broken"] > 4
    assert int((clean == held["label"]).sum()) == said.json["contested"]
    pictures = sorted(Path("run/png").iterdir())
    assert len(pictures) == 4
    from torchvision.io import ImageReadMode, decode_image

    shown = {r.id: i for i, r in enumerate(read_records(Path("run/records.jsonl")))}
    for picture in pictures:
        pixels = decode_image(str(picture), ImageReadMode.GRAY)
        row = shown[picture.stem.replace("_", "/")]
        assert torch.equal(pixels, (held["adversarial"][row] * 255).round().to(torch.uint8))


@pytest.mark.slow
def test_attack_says_what_it_wrote(advkit: Any, victim: str) -> None:
    options = ("attack", "--task", "digits", "--model", victim, "--attack", "fgsm", "--n", 20, "--device", "cpu")
    said = advkit(*options, "--out", "[red]run")
    assert said.code == 0
    assert "20 exported to [red]run/examples.safetensors" in said.out
    none = advkit(*options, "--out", "plain", "--png", 0)
    assert none.code == 0
    assert "pictures" not in none.out
    assert not Path("plain/png").exists()


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--attack", "square:queries=30", "--threat-model", "l2:eps=1"),
        ("--goal", "targeted:how=random", "--seed", 3),
        ("--threat-model", "transfer:sources=zoo:digits-public-mlp,eps=0.2"),
        pytest.param(("--threat-model", "tapm:eps=0.2,attacks=fgsm"), marks=pytest.mark.slow),
    ],
)
def test_rerun_finds_every_row_identical(advkit: Any, victim: str, options: tuple[object, ...]) -> None:
    assert advkit(*EVALUATE, "--model", victim, *options, "--out", "run").code == 0
    rows = sum(len(read_records(file)) for file in Path("run").glob("*.jsonl") if "seconds" not in file.name)
    assert rows == (40 * (len(zoo.public("digits")) + 1) if "tapm" in str(options) else 40)
    said = advkit("rerun", "run", "--batch-size", 7, "--trust")
    assert said.code == 0
    assert f"{rows} of {rows} records are identical" in said.out
    assert Path("run-rerun/records.jsonl").exists()
    machine = advkit("rerun", "run/report.json", "--out", "third", "--json", "--trust")
    assert machine.code == 0
    assert machine.json == {"rows": rows, "differ": []}


def test_rerun_of_a_zoo_model_from_inside_its_folder(advkit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert advkit(*EVALUATE, "--model", "zoo:digits-public-cnn", "--out", "run").code == 0
    monkeypatch.chdir("run")
    said = advkit("rerun", ".", "--json")
    assert said.code == 0
    assert said.json == {"rows": 40, "differ": []}


def test_rerun_says_which_rows_differ(advkit: Any, victim: str) -> None:
    assert advkit(*EVALUATE, "--model", victim, "--out", "run").code == 0
    file = Path("run/records.jsonl")
    lines = file.read_text().splitlines(keepends=True)
    record = json.loads(lines[5])
    lines[5] = json.dumps({**record, "adversarial": (record["adversarial"] + 1) % 10}, separators=(",", ":")) + "\n"
    file.write_text("".join(lines))
    refused = advkit("rerun", "run", "--trust", "--out", "not")
    assert refused.code == 3
    assert "not verified: records.jsonl is not the file" in refused.err
    data = json.loads(Path("run/report.json").read_text())
    data["per_sample"]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    Path("run/report.json").write_text(json.dumps(data))
    said = advkit("rerun", "run", "--trust")
    assert said.code == 3
    assert "not verified" not in said.err
    assert "39 of 40 records are identical" in said.out
    assert record["id"] in said.out


@pytest.mark.slow
def test_rerun_of_other_weights_is_refused(advkit: Any) -> None:
    train = ("train", "--task", "digits", "--model", "mlp:hidden=8", "--recipe", "epochs=1", "--device", "cpu")
    for seed in (0, 1):
        assert advkit(*train, "--seed", seed, "--out", f"t{seed}").code == 0
    assert advkit(*EVALUATE, "--model", "path:t0/model.safetensors", "--out", "run").code in (0, 3)
    Path("t0/model.safetensors").write_bytes(Path("t1/model.safetensors").read_bytes())
    said = advkit("rerun", "run", "--trust")
    assert said.code == 2
    assert "weights are not those of the report" in said.err
    assert not Path("run-rerun").exists()


@pytest.mark.slow
def test_zoo_lists_shows_and_verifies(advkit: Any) -> None:
    names = [card.name for card in zoo.cards()]
    said = advkit("zoo")
    assert said.code == 0
    assert all(name in said.out for name in names)
    verified = advkit("zoo", "--verify", "--json")
    assert verified.code == 0
    assert [(card["name"], card["verified"]) for card in verified.json] == [(name, True) for name in names]
    one = advkit("zoo", names[0])
    assert one.code == 0
    assert zoo.card(names[0]).command in one.out.replace("\n", " ")
    assert zoo.card(names[0]).sha256 in one.out


def test_zoo_with_a_damaged_file(advkit: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    for suffix in (".json", ".safetensors"):
        (folder / f"digits-public-mlp{suffix}").write_bytes((zoo.FOLDER / f"digits-public-mlp{suffix}").read_bytes())
    file = folder / "digits-public-mlp.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    monkeypatch.setattr(zoo, "FOLDER", folder)
    said = advkit("zoo", "--verify")
    assert said.code == 2
    assert "digits-public-mlp" in said.err
    assert said.err.count("\n") == 1


@pytest.fixture
def two_runs(advkit: Any, victim: str) -> tuple[str, str]:
    """Two models on the same rows under the same threat."""
    assert advkit(*EVALUATE, "--model", victim, "--out", "all/a").code == 0
    assert advkit(*EVALUATE, "--model", "zoo:digits-public-cnn", "--out", "all/b").code == 0
    return "all/a", "all/b"


@pytest.mark.slow
def test_compare_is_paired(advkit: Any, two_runs: tuple[str, str]) -> None:
    said = advkit("compare", *two_runs, "--json")
    assert said.code == 0
    a, b = ({r.id: r.outcome == Outcome.ROBUST for r in read_records(Path(run) / "records.jsonl")} for run in two_runs)
    only_a, only_b = (sum(x[i] and not y[i] for i in a) for x, y in ((a, b), (b, a)))
    text = json.dumps(said.json)
    assert f'"n": {len(a)}' in text or f'"rows": {len(a)}' in text
    from scipy.stats import binomtest

    expected = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert any(abs(value - expected) < 1e-9 for value in numbers(said.json)), (expected, said.json)
    assert advkit("compare", *two_runs).code == 0


def numbers(value: Any) -> list[float]:
    """Every number in a JSON value."""
    if isinstance(value, dict):
        return [n for v in value.values() for n in numbers(v)]
    if isinstance(value, list):
        return [n for v in value for n in numbers(v)]
    return [float(value)] if isinstance(value, int | float) and not isinstance(value, bool) else []


@pytest.mark.slow
def test_leaderboard_of_a_folder(advkit: Any, two_runs: tuple[str, str]) -> None:
    said = advkit("leaderboard", "all")
    assert said.code == 0
    assert "2 lines in 1 ranking, of 2 reports" in said.out
    for name in ("leaderboard.html", "leaderboard.md", "leaderboard.json"):
        assert (Path("all") / name).stat().st_size > 0
    page = Path("all/leaderboard.html").read_text()
    assert "<script src" not in page
    assert 'rel="stylesheet"' not in page
    machine = advkit("leaderboard", "all", "--json")
    assert machine.code == 0
    best = max(Report.load(f"{run}/report.json").robust_accuracy or 0 for run in two_runs)
    assert any(abs(value - best) < 1e-12 for value in numbers(machine.json))


@pytest.mark.slow
def test_doctor_of_a_model(advkit: Any, victim: str) -> None:
    said = advkit(
        "doctor", "--task", "digits", "--model", victim, "--attack", "pgd:steps=5", "--rows", 10, "--draws", 5,
        "--device", "cpu", "--out", "checked", "--json",
    )  # fmt: skip
    assert said.code in (0, 3)
    grave = [finding["id"] for finding in said.json["findings"] if finding["severity"] == "unreliable"]
    assert said.code == (3 if grave else 0)
    assert said.json == json.loads(Path("checked/doctor.json").read_text())
    assert said.json["case"]["rows"] == 10
    assert "installation" not in said.json


def test_the_command_works_as_a_module(tmp_path: Path) -> None:
    said = subprocess.run(
        [sys.executable, "-m", "advkit", "--version"], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}, check=True,
    )  # fmt: skip
    assert said.stdout.startswith("advkit ")
