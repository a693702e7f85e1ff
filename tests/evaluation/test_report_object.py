"""The report object: what it refuses, what it says, how shards add up."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from report_examples import B, R, W, document, old, run_folder

import advkit
from advkit.core.errors import ReportError
from advkit.evaluation.report import Report, merge, schema, shorten
from advkit.evaluation.stats import rate
from advkit.evaluation.trust.advice import ADVICE

# Three attacks, each breaking another row: the worst case is below the best single attack.
CROSSED = {
    "pgd:steps=40": [R, R, B, R, W, R, R, R, R, R],
    "apgd": [R, B, R, R, W, R, R, R, R, R],
    "square": [B, R, R, R, W, R, R, R, R, R],
}


def report(**changes: Any) -> Report:
    return Report.from_dict(document(CROSSED, changes))


def test_worst_case_is_not_the_best_single_attack() -> None:
    made = report()
    assert made.clean_accuracy == 0.9
    assert made.robust_accuracy == 0.6
    assert made.attack_success_rate == pytest.approx(3 / 9)
    assert min(attack["robust_accuracy"]["value"] for attack in made.attacks) == 0.8
    interval = made.interval()
    assert interval is not None
    assert (interval.low, interval.high) == pytest.approx((0.3126738, 0.8318197), abs=1e-6)


def test_schema_is_the_packaged_one_and_every_flag_has_advice() -> None:
    flags = schema()["properties"]["diagnostics"]["properties"]["flags"]["items"]["properties"]["id"]["enum"]
    assert set(ADVICE) == set(flags)


def edit(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        *steps, last = path.split(".")
        place: Any = data
        for step in steps:
            place = place[int(step)] if isinstance(place, list) else place[step]
        if value is ...:
            del place[last]
        else:
            place[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (edit("surprise", 1), "surprise"),
        (edit("metrics.clean_accuracy", ...), "clean_accuracy"),
        (edit("metrics.clean_accuracy.denominator", ...), "denominator"),
        (edit("metrics.clean_accuracy.denominator_kind", ...), "denominator_kind"),
        (edit("metrics.clean_accuracy.denominator_kind", "Rows of mine!"), "Rows of mine"),
        (edit("threat_model.goal", "two words"), "two words"),
        (edit("schema_version", "2.0"), "2.0"),
        (edit("section.headline.metric", "no_such"), "section.headline.*no_such"),
        (edit("section.table.1.metric", "no_such"), "section.table.1.*no_such"),
        (edit("section.sentence", "As low as {no_such}."), "section.sentence.*no_such"),
        (edit("section.headline.better", "larger"), "larger"),
        (edit("companions", [{"name": "tapm", "title": "TAPM", "metric": "no_such"}]), "companions.0.*no_such"),
        (edit("request.seed", "0"), "request.seed"),
        (edit("metrics.extra", {"value": 0.5, "numerator": 1, "denominator": 2}), "denominator_kind"),
        (edit("metrics.clean_accuracy.value", 0.91), "9 / 10"),
        (edit("metrics.clean_accuracy.value", 90.0), "90.0"),
        (edit("metrics.clean_accuracy.value", None), "9 / 10"),
        (edit("metrics.clean_accuracy.ci.high", 0.95), "Wilson"),
        (edit("metrics.clean_accuracy.ci.high", 0.7), "outside"),
        (edit("metrics.clean_accuracy", rate(9, 11, "all_samples")), "n_evaluated"),
        (edit("metrics.robust_accuracy", rate(5, 10, "all_samples")), "5 robust"),
        (edit("metrics.robust_accuracy", rate(10, 10, "all_samples")), "exceed"),
        (edit("metrics.robust_accuracy.numerator", 11), "exceeds"),
        (edit("attacks.0.attack_success_rate", rate(2, 9, "clean_correct")), "2 broken"),
        (edit("attacks.0.undecided", -1), "undecided"),
        (edit("attacks.0.cost", {}), "seconds"),
        (edit("dataset.n_total", 5), "5"),
        (edit("dataset.sha256", "A" * 64), "sha256"),
        (edit("created_utc", "yesterday"), "yesterday"),
        (edit("created_utc", "2026-01-02T03:04:05"), "time zone"),
        (edit("diagnostics.flags", [{"id": "odd", "severity": "info", "message": ""}]), "odd"),
        (edit("reproducibility.seed", float("nan")), "JSON"),
        (edit("model.name", object()), "JSON"),
    ],
)
def test_refuses_what_is_off(change: Callable[[dict[str, Any]], None], says: str) -> None:
    data = document(CROSSED)
    Report.from_dict(data)
    change(data)
    with pytest.raises(ReportError, match=says):
        Report.from_dict(data)


def test_refuses_a_worst_case_above_a_single_attack() -> None:
    data = document(CROSSED)
    data["metrics"]["robust_accuracy"] = rate(8, 10, "all_samples")
    data["metrics"]["attack_success_rate"] = rate(1, 9, "clean_correct")
    Report.from_dict(data)
    data["attacks"][1]["robust_accuracy"] = rate(7, 10, "all_samples")
    data["attacks"][1]["attack_success_rate"] = rate(2, 9, "clean_correct")
    with pytest.raises(ReportError, match="apgd alone leaves 7"):
        Report.from_dict(data)
    data["attacks"][1]["beside"] = True
    Report.from_dict(data)


def test_rows_without_a_verdict_make_an_interval() -> None:
    data = document({"pgd": [R, R, B, B, W]})
    data["metrics"]["robust_accuracy"] = rate(1, 5, "all_samples")
    data["attacks"][0]["robust_accuracy"] = rate(1, 5, "all_samples")
    with pytest.raises(ReportError, match="undecided"):
        Report.from_dict(data)
    data["attacks"][0]["undecided"] = 1
    data["metrics"]["robust_accuracy_upper"] = rate(2, 5, "all_samples")
    made = Report.from_dict(data)
    assert made.undecided == 1
    assert not made.trustworthy
    assert "between 20.0 % and 40.0 %" in made.verdict()


def test_refuses_a_certificate_that_grows_with_its_radius() -> None:
    data = document(CROSSED)
    data["metrics"]["certified"] = [
        {"radius": 0.5, "certified_accuracy": rate(3, 10, "all_samples")},
        {"radius": 0.25, "certified_accuracy": rate(5, 10, "all_samples")},
    ]
    assert "certified at radius 0.25" in [row.label for row in Report.from_dict(data).rows(full=True)]
    data["metrics"]["certified"][0]["certified_accuracy"] = rate(6, 10, "all_samples")
    with pytest.raises(ReportError, match=r"radius 0\.5 than at 0\.25"):
        Report.from_dict(data)


def test_no_rows_is_null_not_zero() -> None:
    data = document({"pgd": [W, W]})
    assert Report.from_dict(data).attack_success_rate is None
    data["attacks"][0]["attack_success_rate"]["value"] = 0.0
    with pytest.raises(ReportError, match="0 of 0"):
        Report.from_dict(data)


def test_is_immutable_and_hands_out_copies() -> None:
    data = document(CROSSED)
    made = Report.from_dict(data)
    data["metrics"]["clean_accuracy"]["numerator"] = 3
    made.metrics["clean_accuracy"]["numerator"] = 4
    made.attacks[0]["name"] = "x"
    made.to_dict()["kind"] = "x"
    assert made == report()
    assert hash(made) == hash(report())
    assert pickle.loads(pickle.dumps(made)) == made
    with pytest.raises(FrozenInstanceError):
        made.text = "{}"  # type: ignore[misc]


def test_saves_in_one_move_and_loads_the_same(tmp_path: Path) -> None:
    made = report()
    target = made.save(tmp_path / "run" / "report.json")
    assert Report.load(target).to_dict() == made.to_dict()
    assert Report.load(tmp_path / "run").to_json() == made.to_json()
    assert [file.name for file in target.parent.iterdir()] == ["report.json"]
    before = target.read_bytes()
    assert Report.load(target).save(target).read_bytes() == before


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder_is_one_clear_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ReportError, match="writable"):
        report().save(tmp_path / "report.json")


def test_a_file_in_the_way_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ReportError, match="can't be written"):
        report().save(tmp_path / "run" / "report.json")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"kind": NaN}', '{"kind": "evaluation"}'])
def test_load_names_the_file_and_the_fault(tmp_path: Path, text: str) -> None:
    file = tmp_path / "report.json"
    file.write_text(text)
    with pytest.raises(ReportError, match=r"report\.json"):
        Report.load(file)
    with pytest.raises(ReportError, match="no report"):
        Report.load(tmp_path / "nowhere")


def flag(severity: str = "unreliable", **more: Any) -> dict[str, Any]:
    return {"id": "zero_gradient", "severity": severity, "message": "12 of 64 rows", "attack": "apgd", **more}


CLASSES = {f"robust_accuracy_class_{c}": rate(k, 5, "all_samples") for c, k in zip("wxyz", (3, 1, 2, 5), strict=True)}
TAPM = {"name": "tapm", "title": "TAPM, strongest cell", "metric": "tapm_acc_best_attack"}


def eventful() -> Report:
    return report(
        diagnostics={"flags": [{"id": "low_precision", "severity": "info", "message": "float16"}, flag()]},
        metrics={
            "tapm_acc_best_attack": rate(7, 10, "all_samples"),
            "mean_distance": {"value": 0.0271, "unit": "Linf"},
            **CLASSES,
        },
        companions=[TAPM],
    )


def test_the_page_says_what_decides() -> None:
    assert str(eventful()).splitlines() == [
        "pgd:steps=40+apgd+square, defense none, on digits, model mlp, 10 samples",
        "under linf eps=8/255, untargeted, white box",
        "Robust accuracy is 60.0 % [31.3, 83.2]: worst case of 3 attacks. Do not trust",
        "this number: zero_gradient.",
        "                                        95 % interval",
        "clean accuracy                  90.0 %   [59.6, 98.2]  9 / 10 all samples",
        "robust accuracy                 60.0 %   [31.3, 83.2]  6 / 10 all samples",
        "attack success rate             33.3 %   [12.1, 64.6]  3 / 9 clean correct",
        "TAPM, strongest cell            70.0 %   [39.7, 89.2]  7 / 10 all samples",
        "weakest class: x                20.0 %    [3.6, 62.4]  1 / 5 all samples",
        "unreliable: zero_gradient: 12 of 64 rows",
        "info: low_precision: float16",
    ]
    assert "No reliability flag was raised." in " ".join(str(report()).split())


@pytest.mark.parametrize("width", [60, 80, 100])
def test_a_page_never_outgrows_its_lines_and_columns(width: int) -> None:
    """However long names and messages are and however many figures and flags there are."""
    long = "transfer:" + "+".join(f"part{i}" for i in range(40))
    crowded = report(
        diagnostics={"flags": [flag("warning", message=long * 3)] * 7},
        metrics={
            **CLASSES,
            **{f"{i}_asr": rate(i, 9, "prompts") for i in range(9)},
            "tapm": rate(7, 10, "all_samples"),
        },
        companions=[{"name": f"c{i}", "title": long, "metric": "tapm"} for i in range(4)],
        threat_model={"name": long, "eps": 12.5, "eps_string": None},
        request={"attack": long, "task": long},
        section={
            "table": [{"label": f"{i} {long}", "metric": f"{i}_asr"} for i in range(9)],
            "sentence": f"{{robust_accuracy}} {long} " * 9,
        },
    )
    lines = [line for line, _ in crowded.brief(width)]
    assert len(lines) <= 13
    assert max(map(len, lines)) <= width
    assert sum(line.startswith("warning: zero_gradient") for line in lines) >= 1
    assert any("more)" in line for line in lines)
    text = "\n".join(lines)
    assert "90.0 %" not in text  # the table that the scenario names has no line for clean accuracy
    assert "60.0 %   [31.3, 83.2]" in text.replace("     ", "   ")
    everything = [line for line, _ in crowded.full(width)]
    assert max(map(len, everything)) <= width
    assert sum("_class_" not in line and line.startswith("class ") for line in everything) == 4


def test_shortened_names_keep_both_ends() -> None:
    assert shorten("pgd:steps=40@zoo:fashion-mnist-public-cnn", 20) == "pgd:steps...blic-cnn"
    assert [len(shorten("abcdefghij", width)) for width in (0, 2, 5, 10, 20)] == [0, 2, 5, 10, 10]
    assert shorten("two\n lines", 80) == "two lines"


def test_everything_is_shown_in_full() -> None:
    shown = " ".join(" ".join(line for line, _ in eventful().full(100)).split())
    for words in (
        "3 / 9 clean correct",
        "pgd:steps=40",
        "1 / 9 broken",
        "mean distance",
        "0.0271 Linf",
        "class w",
        "unreliable: zero_gradient: 12 of 64 rows",
        ADVICE["zero_gradient"],
        "Threat model: linf eps=8/255, untargeted, white box.",
        "Do not trust this number: zero_gradient.",
    ):
        assert words in shown, words
    assert [flag["id"] for flag in eventful().flags] == ["zero_gradient", "low_precision"]
    assert not eventful().trustworthy
    labels = [row.label for row in eventful().rows(full=True)]
    assert len(labels) == len(set(labels))
    assert {"clean accuracy", "apgd", "class x", "mean distance", "TAPM, strongest cell"} <= set(labels)


def test_the_section_rules_what_is_said() -> None:
    """Another headline, other words, a scalar in percent: nothing of it is known to the renderer."""
    made = report(
        metrics={
            "missed": {"value": 0.25, "unit": "fraction", "n": 8},
            "delay": {"value": 3.5, "unit": "s"},
            **{f"missed_class_{c}": rate(k, 5, "alarms") for c, k in zip("wxyz", (3, 1, 2, 5), strict=True)},
        },
        section={
            "scenario": "watchtower",
            "headline": {"metric": "missed", "name": "Missed attacks", "better": "lower"},
            "table": [{"label": "delay", "metric": "delay"}, {"label": "clean", "metric": "clean_accuracy"}],
            "sentence": "{missed} of the attacks are missed after {delay} under {threat}.",
        },
        task="watching",
        threat_model={"goal": "go_unseen", "norm": "LPIPS", "knowledge": "insider"},
    )
    assert made.verdict() == (
        "25.0 % of the attacks are missed after 3.5 s under linf eps=8/255, go unseen, insider. "
        "No reliability flag was raised."
    )
    assert [(row.section, row.label, row.value) for row in made.rows()] == [
        ("table", "delay", "3.5 s"),
        ("headline", "Missed attacks", "25.0 %"),
        ("table", "clean", "90.0 %"),
        ("class", "weakest class: z", "100.0 %"),  # of misses, the most are the worst
    ]


def test_a_plug_ins_own_words_are_valid() -> None:
    """What a goal, a threat model or a task of another package calls itself ends in a report, not in an error."""
    data = document(CROSSED, {"threat_model": {"goal": "stop-it.v2", "norm": "LPIPS-alex"}, "task": "segmentation"})
    data["metrics"]["frames_kept"] = rate(3, 4, "frames_of_mine")
    assert Report.from_dict(data).threat == "linf eps=8/255, stop-it.v2, white box"


def test_old_reports_say_what_their_readers_said() -> None:
    """Version 1.0 has no section: it is made of goal, task and metrics."""

    def one(**changes: Any) -> Report:
        return Report.from_dict(old(document(CROSSED, changes)))

    plain = one(metrics=CLASSES)
    assert json.loads(plain.to_json())["schema_version"] == "1.0"
    assert plain.verdict().startswith(
        "Robust accuracy 60.0 % [31.3, 83.2] under linf eps=8/255, untargeted, white box; worst case of 3 attacks. "
    )
    assert "weakest class: x" in str(plain)
    wanted = one(metrics=CLASSES, threat_model={"goal": "topk_ordered", "norm": "L2"})
    assert wanted.verdict().startswith("Attack success rate 33.3 % [")
    assert "weakest class" not in str(wanted)
    assert "Robust accuracy" not in wanted.verdict()
    far = one(metrics={"l2_mean": {"value": 1.25, "n": 3}}, threat_model={"goal": "topk_ordered", "norm": "L2"})
    assert "Successes lie 1.25 (L2) from their clean inputs" in far.verdict()
    told = one(task="text_generation", metrics={"refusal_asr_greedy": rate(4, 10, "prompts")})
    assert "target not said" in str(told)
    assert "refusal judge says broken" in str(told)
    submitted = {
        "value": 0.5,
        "n": 100,
        "ci": {"low": 0.4, "high": 0.6, "level": 0.95, "method": "bootstrap_percentile"},
    }
    online = one(metrics={"stream_fool_rate": submitted, "stream_competitive_ratio": {"value": 0.53}})
    assert online.verdict().startswith("50.0 % [40.0, 60.0] of what is submitted fools the model under linf eps=8/255")
    assert "in the mean of 100 orders" in online.verdict()
    assert online.metrics["stream_fool_rate"] == submitted
    for made in (plain, wanted, told, online):
        assert all({"attack", "stage", "source", "beside"} <= set(attack) for attack in made.attacks)


def test_transfer_reports_never_pass_for_white_box() -> None:
    changes = {"threat_model": {"knowledge": "transfer", "adaptive": False}, "defense": {"name": "pubdef"}}
    made = report(**changes)
    assert "White-box accuracy was not evaluated" in made.verdict()
    assert "White-box accuracy was not evaluated" in " ".join(str(made).split())
    assert "No adaptive attack declared." in made.verdict()
    beside = {"name": "white_box", "title": "white box, pgd", "metric": "white_box_robust_accuracy"}
    metrics = {"white_box_robust_accuracy": rate(1, 10, "all_samples")}
    assert "not evaluated" not in report(**changes, companions=[beside], metrics=metrics).verdict()


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_cells_beside_the_headline_are_shown_but_stay_out_of_it(version: str) -> None:
    data = document({"pgd": [R, R, R, B, W]})
    for k, source in enumerate(("a", "b", "c", "d", "e")):
        cell = copy.deepcopy(data["attacks"][0])
        cell |= {"name": f"fgsm@{source}", "attack": "fgsm", "source": source, "params": {"source": source}}
        cell["robust_accuracy"] = rate(min(k, 4), 5, "all_samples")
        cell["attack_success_rate"] = rate(4 - min(k, 4), 4, "clean_correct")
        data["attacks"].append(cell | ({"beside": True} if version == "1.1" else {}))
    data["protocol"]["aggregation"] = "worst_case_per_sample"
    made = Report.from_dict(data if version == "1.1" else old(data))
    assert [(row.section, row.label) for row in made.rows()] == [
        ("table", "clean accuracy"),
        ("headline", "robust accuracy"),
        ("table", "attack success rate"),
    ]
    sections = [(row.section, row.label) for row in made.rows(full=True)]
    assert [label for section, label in sections if section == "beside"] == [f"beside: fgsm@{x}" for x in "abcde"]
    assert [label for section, label in sections if section == "attack"] == ["pgd"]
    assert "one attack" in made.verdict()
    if version == "1.1":  # not marked, a cell counts, and contradicts the headline
        del data["attacks"][1]["beside"]
        with pytest.raises(ReportError, match="fgsm@a alone leaves 0"):
            Report.from_dict(data)


@pytest.mark.slow
def test_reports_load_without_torch_and_scenarios() -> None:
    """Reports of plug-ins that are not installed open anywhere."""
    code = (
        "import sys, advkit.evaluation.report.leaderboard, advkit.evaluation.report.compare; "
        "print(*(name for name in sys.modules if name == 'torch' or name.startswith('advkit.evaluation.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    loaded = {".".join(name.split(".")[:3]) for name in done.stdout.split()}
    assert loaded == {
        f"advkit.evaluation.{room}"
        for room in (
            "certificates", "counts", "poisonings", "replies", "report", "run", "stats", "stats_agreement",
            "stats_replies", "trust",
        )
    }  # fmt: skip


def test_html_and_table_show_hostile_names_and_obey_none() -> None:
    hostile = "[bold]<img src=x onerror=1>"
    label = {"label": hostile, "metric": "robust_accuracy"}
    made = report(
        model={"name": "<script>alert(1)</script>[red]x[/red]"},
        title=hostile,
        section={"table": [label]},
        companions=[],
    )
    html = made._repr_html_()
    assert "<script>" not in html
    assert "<img" not in html
    assert "&lt;img src=x onerror=1&gt;" in html
    assert hostile in str(made)
    assert "60.0 %" in html
    from rich.console import Console

    console = Console(width=120, file=StringIO(), color_system=None)
    console.print(made.summary_table(full=True))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.count(hostile) == 2


def test_robustbench_block_and_back() -> None:
    made = report(
        dataset={"name": "cifar-10"},
        protocol={"name": "autoattack-standard"},
        model={"architecture": "WideResNet-28-10", "additional_data": False},
    )
    block = made.robustbench(authors="A. Author", venue="None")
    assert (block["clean_acc"], block["autoattack_acc"], block["eps"]) == ("90.00", "60.00", "8/255")
    assert (block["dataset"], block["architecture"]) == ("cifar10", "WideResNet-28-10")
    assert block["unreliable"] is False
    assert abs(float(block["autoattack_acc"]) / 100 - made.robust_accuracy) <= 5e-5  # type: ignore[operator]
    again = made.to_dict() | {"robustbench": block}
    assert Report.from_dict(again).robust_accuracy == made.robust_accuracy
    weaker = report(dataset={"name": "cifar10"}).robustbench()
    assert "autoattack_acc" not in weaker
    assert weaker["reported"] == "60.00"
    with pytest.raises(ReportError, match="digits"):
        report().robustbench()
    with pytest.raises(ReportError, match="clean_acc"):
        made.robustbench(clean_acc=0.9)  # type: ignore[arg-type]


def split(at: int) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    return {k: v[:at] for k, v in CROSSED.items()}, {k: v[at:] for k, v in CROSSED.items()}


@pytest.mark.parametrize("at", [1, 3, 5])
def test_merged_shards_equal_the_union(at: int) -> None:
    one, two = split(at)
    a, b = Report.from_dict(document(one)), Report.from_dict(document(two))
    for merged in (merge(a, b), merge(b, a)):
        whole = report().to_dict()
        found = merged.to_dict()
        assert found["metrics"] == whole["metrics"]
        assert found["dataset"]["n_evaluated"] == 10
        for x, y in zip(found["attacks"], whole["attacks"], strict=True):
            x["cost"]["seconds"] = y["cost"]["seconds"]
            assert x == y


def test_merge_drops_what_two_summaries_cannot_give(caplog: pytest.LogCaptureFixture) -> None:
    shards = []
    for part in split(4):
        data = document(part)
        n = data["dataset"]["n_evaluated"]
        data["metrics"] |= {"tapm_acc_best_attack": rate(1, n, "all_samples"), "loss": {"value": 1.0}}
        data["diagnostics"]["flags"] = [
            {"id": "zero_gradient", "severity": "info" if n == 4 else "warning", "message": str(n)}
        ]
        shards.append(Report.from_dict(data))
    merged = merge(*shards)
    assert set(merged.metrics) == {"clean_accuracy", "robust_accuracy", "attack_success_rate"}
    assert "tapm_acc_best_attack" in caplog.text
    assert merged.to_dict()["request"]["n"] == 10
    assert merged.to_dict()["section"] == shards[0].to_dict()["section"]
    assert [flag["message"] for flag in merged.flags] == ["6"]
    added = merge(*shards, additive=["tapm_acc_best_attack"])
    assert added.metrics["tapm_acc_best_attack"] == rate(2, 10, "all_samples")


@pytest.fixture(scope="module")
def by_rows() -> dict[str, Report]:
    """Shards of one evaluation, by their rows."""
    asked: dict[str, Any] = {"attack": "fgsm", "task": "digits", "n": 6, "beside": False}
    shards = {rows: advkit.evaluate(**asked, rows=rows) for rows in ("0:2", "2:3", "3:6", "1:3")}
    return shards | {"all": advkit.evaluate(**asked)}


def test_merged_shards_name_the_call_of_their_rows(by_rows: dict[str, Report]) -> None:
    part = merge(by_rows["2:3"], by_rows["0:2"])
    assert part.to_dict()["request"] | {"rows": None} == by_rows["0:2"].to_dict()["request"] | {"rows": None}
    assert part.python_call == by_rows["0:2"].python_call.replace("0:2", "0:3")
    whole = merge(by_rows["3:6"], part)
    assert whole.to_dict()["request"] == by_rows["all"].to_dict()["request"]
    assert whole.python_call == by_rows["all"].python_call
    assert whole.metrics["robust_accuracy"] == by_rows["all"].metrics["robust_accuracy"]


def test_shards_of_the_same_rows_are_refused_without_their_records(by_rows: dict[str, Report]) -> None:
    part = merge(by_rows["0:2"], by_rows["2:3"])
    for one, other, said in (
        (part, by_rows["1:3"], "share rows 1:3"),
        (by_rows["1:3"], by_rows["0:2"], "share rows 1:2"),
        (by_rows["all"], by_rows["2:3"], "share rows 2:3"),
        (by_rows["0:2"], by_rows["3:6"], "next to one another first"),
    ):
        with pytest.raises(ReportError, match=said):
            merge(one, other)


def test_merge_refuses_other_cases_and_shared_rows(tmp_path: Path) -> None:
    one, two = split(5)
    a = Report.from_dict(document(one))
    with pytest.raises(ReportError, match="same rows"):
        merge(a, a)
    for change in (
        {"model": {"state_sha256": "d" * 64}},
        {"threat_model": {"eps": 0.1}},
        {"reproducibility": {"seed": 1}},
        {"dataset": {"sha256": "e" * 64}},
    ):
        with pytest.raises(ReportError, match="not shards"):
            merge(a, Report.from_dict(document(two, change)))
    with pytest.raises(ReportError, match="attacks"):
        merge(a, Report.from_dict(document({k + "2": v for k, v in two.items()})))
    folders = [run_folder(tmp_path / name, part, first=first) for name, part, first in (("a", one, 0), ("b", two, 4))]
    with pytest.raises(ReportError, match="share 1 rows"):
        merge(Report.load(folders[0]), Report.load(folders[1]))
    small = {"dataset": {"n_total": 9}}
    with pytest.raises(ReportError, match="overlap"):
        merge(Report.from_dict(document(one, small)), Report.from_dict(document(two, small)))


def test_text_is_json() -> None:
    assert json.loads(report().to_json()) == document(CROSSED)
