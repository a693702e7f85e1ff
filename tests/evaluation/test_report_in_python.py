"""What a report gives in Python: examples, figures, tables, the call and the command that make the run again."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import advkit
from advkit.attacks import ATTACKS
from advkit.cli.main import run as main
from advkit.core.errors import MissingExtra, ReportError, UsageError
from advkit.evaluation.execute import check_inputs_change
from advkit.evaluation.report import tables

ASKED = {"attack": "pgd:steps=5", "task": "digits", "model": "zoo:digits-mlp", "n": 40, "beside": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("python") / "run"
    advkit.evaluate(**ASKED, out=out)
    return out


@pytest.fixture(scope="module")
def report(folder: Path) -> advkit.Report:
    return advkit.Report.load(folder)


def test_attack_gives_every_sample_with_the_verdict_and_the_distance_of_the_harness(report) -> None:
    asked = {name: value for name, value in ASKED.items() if name != "beside"}
    examples = advkit.attack(**asked, batch_size=8)
    assert len(examples) == examples.evaluated == 40
    assert int(examples.broken.sum()) == report.metrics["attack_success_rate"]["numerator"]
    moved = (examples.adversarial - examples.clean).abs().amax((1, 2, 3))
    assert moved.tolist() == pytest.approx([0.0 if each is None else each for each in examples.distances], abs=1e-7)
    assert float(moved.max()) <= report.view["threat_model"]["eps"] + 1e-6
    same = advkit.attack(**{**asked, "n": 40, "keep": 3})  # all are kept, whatever `keep` says
    assert torch.equal(same.adversarial, examples.adversarial)


def test_what_makes_no_examples_is_refused() -> None:
    with pytest.raises(UsageError, match="no adversarial examples"):
        advkit.attack("none", task="digits", n=5)
    flips = SimpleNamespace(attack=ATTACKS.build("random_labels"), label="random_labels")
    with pytest.raises(UsageError, match="flips training labels"):
        check_inputs_change(flips)


@pytest.mark.slow
def test_the_call_and_the_command_of_a_report_make_the_same_run(report, folder, tmp_path, monkeypatch, capsys) -> None:
    assert report.command.startswith("advkit evaluate ")
    space: dict[str, advkit.Report] = {}
    exec(report.python_call, space)
    assert space["report"].metrics == report.metrics
    words = shlex.split(report.command)[1:]
    assert main([*words, "--out", str(tmp_path / "again"), "--no-plots", "--json"]) in (0, 3)
    again = json.loads(capsys.readouterr().out)
    assert again["reproducibility"]["config_sha256"] == report.to_dict()["reproducibility"]["config_sha256"]
    assert again["metrics"] == report.metrics
    assert (tmp_path / "again" / "records.jsonl").read_bytes() == (folder / "records.jsonl").read_bytes()


def test_an_object_has_a_variable_in_the_call_and_no_command() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()
    report = advkit.evaluate("fgsm", model=model, task="digits", n=5, draws=7)
    assert report.command == ""
    assert "model = ...  # an object: Sequential" in report.python_call
    assert "model=model," in report.python_call
    assert "draws=7" in report.python_call


@pytest.mark.slow
def test_plots_by_kind_and_a_kind_that_is_not_there_names_those_that_are(report, folder, tmp_path, capsys) -> None:
    assert report.plots() == ["per_class", "examples"]
    assert report.plot("per_class").axes
    assert report.plot().axes[0].get_title("left") == report.plot("per_class").axes[0].get_title("left")
    with pytest.raises(ReportError, match="no plot 'curve'; it has per_class, examples"):
        report.plot("curve")
    bare = advkit.Report.from_dict({**report.to_dict(), "section": {**report.to_dict()["section"], "figures": []}})
    with pytest.raises(ReportError, match="it has none"):
        bare.plot("per_class")
    starts = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    for form, start in starts.items():
        assert main(["plot", str(folder), "examples", "--format", form, "--out", str(tmp_path), "--json"]) == 0
        (file,) = map(Path, json.loads(capsys.readouterr().out)["files"])
        assert file.read_bytes().startswith(start)
    first, again = (advkit.plots.save(report.plot("per_class"), tmp_path / f"{name}.pdf") for name in "ab")
    assert first.read_bytes() == again.read_bytes()
    assert main(["plot", str(folder), "curve"]) == 2
    assert "it has per_class, examples" in capsys.readouterr().err
    assert main(["plot", str(folder), "--format", "gif"]) == 2
    assert "expected png, svg or pdf" in capsys.readouterr().err
    assert main(["plot", str(tmp_path)]) == 2
    assert "the folder of a finished run" in capsys.readouterr().err


def test_latex_has_every_row_escaped_and_the_headline_in_bold(report, folder, capsys) -> None:
    text = report.to_latex(full=True, caption="50 % of x_1 & y", label="tab:one")
    lines = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(lines) == len(report.rows(full=True)) + 1
    assert all(line.replace(r"\&", "").count("&") == 3 for line in lines)
    (bold,) = [line for line in lines if line.startswith(r"\textbf{")]
    assert f"{100 * report.robust_accuracy:.1f}" in bold
    assert r"\caption{50\,\% of x\_1 \& y}" in text
    assert r"\label{tab:one}" in text
    assert r"\begin{table}" not in report.to_latex()
    assert tables.escaped("a\\b^2~{c}#1$|<>") == (
        r"a\textbackslash{}b\textasciicircum{}2\textasciitilde{}\{c\}\#1\$\textbar{}\textless{}\textgreater{}"
    )
    assert main(["show", str(folder), "--latex"]) == 0
    assert capsys.readouterr().out == report.to_latex(full=True)
    assert main(["show", "pgd", "--latex"]) == 2


def test_frames_hold_the_numbers_of_the_report(report, monkeypatch) -> None:
    pandas = pytest.importorskip("pandas")
    samples = report.to_frame("samples")
    assert isinstance(samples, pandas.DataFrame)
    assert (samples.outcome == "broken").sum() == report.metrics["attack_success_rate"]["numerator"]
    assert samples.id.is_unique
    summary = report.to_frame()
    headline = summary[summary.section == "headline"].iloc[0]
    assert headline["value"] == report.robust_accuracy
    assert (headline.low, headline.high) == (report.interval().low, report.interval().high)
    attacks = report.to_frame("attacks")
    assert attacks.robust_accuracy.tolist() == [report.robust_accuracy]
    with pytest.raises(UsageError, match="summary, attacks or samples"):
        report.to_frame("rows")
    with pytest.raises(ReportError, match="without its records"):
        advkit.Report.from_dict(report.to_dict()).to_frame("samples")
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtra, match=r"advkit\[pandas\]"):
        report.to_frame()


@pytest.mark.slow
def test_every_lifted_name_is_there() -> None:
    for module in (advkit, advkit.plots):
        assert all(getattr(module, name) is not None for name in module.__all__)
        assert set(module.__all__) <= set(dir(module))
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            module.nothing  # noqa: B018
