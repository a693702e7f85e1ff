"""The report object: what it refuses, what it says, how shards add up."""

from __future__ import annotations

import copy
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
from report_examples import B, R, W, document, run_folder

from advkit.core.errors import ReportError
from advkit.evaluation.report import Report, merge, schema
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
        (edit("metrics.clean_accuracy.denominator_kind", "rows"), "rows"),
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
    assert "certified at radius 0.25" in str(Report.from_dict(data))
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


def test_summary_says_all_that_matters() -> None:
    flag = {"id": "zero_gradient", "severity": "unreliable", "message": "12 of 64 rows", "attack": "apgd"}
    made = report(
        diagnostics={"flags": [{"id": "low_precision", "severity": "info", "message": "float16"}, flag]},
        metrics={
            "tapm_acc_best_attack": rate(7, 10, "all_samples"),
            "mean_distance": {"value": 0.0271, "unit": "Linf"},
            **{
                f"robust_accuracy_class_{c}": rate(k, 5, "all_samples")
                for c, k in zip("wxyz", (3, 1, 2, 5), strict=True)
            },
        },
    )
    text = str(made)
    for words in (
        "90.0 %",
        "[59.6, 98.2]",
        "9 / 10 all samples",
        "worst case of 3 attacks",
        "33.3 %",
        "3 / 9 clean correct broken",
        "pgd:steps=40",
        "TAPM accuracy best attack",
        "0.0271 Linf",
        "weakest class: x",
        "unreliable: zero_gradient: 12 of 64 rows",
        ADVICE["zero_gradient"],
        "Do not trust this number: zero_gradient.",
        "linf eps=8/255, untargeted, white box",
    ):
        assert words in " ".join(text.split()), words
    assert [flag["id"] for flag in made.flags] == ["zero_gradient", "low_precision"]
    assert not made.trustworthy
    assert len(made.rows(full=True)) == len(made.rows()) + 3
    assert "No reliability flag was raised." in str(report())


def test_goals_beyond_a_wrong_answer_are_headed_by_their_success_rate() -> None:
    classes = {
        f"robust_accuracy_class_{c}": rate(k, 5, "all_samples") for c, k in zip("wxyz", (3, 1, 2, 5), strict=True)
    }
    wanted = report(metrics=classes, threat_model={"goal": "topk_ordered", "norm": "L2"})
    success = wanted.attack_success_rate
    assert wanted.verdict().startswith(f"Attack success rate {100 * success:.1f} % [")
    assert "weakest class" not in str(wanted)
    assert "Robust accuracy" not in wanted.verdict()
    far = report(metrics={"l2_mean": {"value": 1.25, "n": 3}}, threat_model={"goal": "topk_ordered", "norm": "L2"})
    assert "Successes lie 1.25 (L2) from their origins" in far.verdict()
    plain = report(metrics=classes)
    assert plain.verdict().startswith("Robust accuracy ")
    assert "weakest class" in str(plain)


def test_transfer_reports_never_pass_for_white_box() -> None:
    made = report(threat_model={"knowledge": "transfer", "adaptive": False}, defense={"name": "pubdef"})
    assert "White-box accuracy was not evaluated" in made.verdict()
    assert "No adaptive attack declared." in made.verdict()


def test_cells_beside_the_headline_are_shown_but_stay_out_of_it() -> None:
    data = document({"pgd": [R, R, R, B, W]})
    for k, source in enumerate(("a", "b", "c", "d", "e")):
        cell = copy.deepcopy(data["attacks"][0])
        cell |= {"name": f"fgsm@{source}", "params": {"source": source}}
        cell["robust_accuracy"] = rate(min(k, 4), 5, "all_samples")
        cell["attack_success_rate"] = rate(4 - min(k, 4), 4, "clean_correct")
        data["attacks"].append(cell)
    data["protocol"]["aggregation"] = "worst_case_per_sample"
    made = Report.from_dict(data)
    sections = [(row.section, row.label) for row in made.rows()]
    assert ("worst", "robust accuracy") in sections
    assert [label for section, label in sections if section == "beside"] == [
        "beside: fgsm@a",
        "beside: fgsm@b",
        "beside: fgsm@c",
        "... 2 weaker attacks",
    ]


def test_html_and_table_show_hostile_names_and_obey_none() -> None:
    made = report(model={"name": "<script>alert(1)</script>[red]x[/red]"}, title="[bold]<img src=x onerror=1>")
    html = made._repr_html_()
    assert "<script>" not in html
    assert "<img" not in html
    assert "&lt;img src=x onerror=1&gt;" in html
    assert "[bold]<img src=x onerror=1>" in str(made)
    assert "90.0 %" in html


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
    assert [flag["message"] for flag in merged.flags] == ["6"]
    added = merge(*shards, additive=["tapm_acc_best_attack"])
    assert added.metrics["tapm_acc_best_attack"] == rate(2, 10, "all_samples")


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
