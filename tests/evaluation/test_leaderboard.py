"""Leaderboards: victims ranked by the worst case of their reports, hostile reports, self-containment."""

from __future__ import annotations

import base64
import gc
import hashlib
import html.parser
import io
import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from report_examples import B, R, W, document, old, records, run_folder, told
from typer.testing import CliRunner

import advkit
from advkit.cli.leaderboard import leaderboard as command
from advkit.core.errors import UsageError
from advkit.core.protocols import Outcome, Record
from advkit.evaluation.report import Report
from advkit.evaluation.report import leaderboard as boards
from advkit.evaluation.report.ranking import scan as ranked
from advkit.evaluation.run.store import read_records, to_line
from advkit.evaluation.stats import rate, wilson

WEAK, FAIR, STRONG = {"pgd": [R, B, B, B, W]}, {"pgd": [R, R, B, B, R]}, {"pgd": [R, R, R, R, W]}
UNRELIABLE = {"flags": [{"id": "zero_gradient", "severity": "unreliable", "message": "all rows"}]}
TRANSFER = {"knowledge": "transfer", "granted": "transfer", "attacker": {"access": "transfer", "defense": "unknown"}}
SCORES = {"knowledge": "black_box_score", "granted": "white_box",
          "attacker": {"access": "black_box_score", "defense": "none"}}  # fmt: skip
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>|`*"


def named(name: str, **changes: Any) -> dict[str, Any]:
    return {"model": {"name": name, "state_sha256": hashlib.sha256(name.encode()).hexdigest()}, **changes}


def lines(board: boards.Board) -> dict[str, list[tuple[int | None, str]]]:
    return {group.title: [(v.rank, v.model) for v in group.victims] for group in board.groups}


def only(board: boards.Board) -> boards.Victim:
    (group,) = board.groups
    (victim,) = group.victims
    return victim


def asking_scores(folder: Path) -> None:
    """The records and costs of a run in a folder as those of an attack that takes no gradient."""
    file = folder / "records.jsonl"
    found = [replace(record, backwards=0) for record in read_records(file)]
    file.write_text("".join(to_line(record) + "\n" for record in found))
    data = json.loads((folder / "report.json").read_text())
    for attack in data["attacks"]:
        attack["cost"]["backward"] = 0
    (folder / "report.json").write_text(json.dumps(data))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    run_folder(tmp_path / "weak", WEAK, named("weak"))
    run_folder(tmp_path / "deep" / "er" / "strong", STRONG, named("strong"))
    run_folder(tmp_path / "fair", FAIR, named("fair", threat_model={"eps": 0.031, "eps_string": "0.031"}))
    run_folder(tmp_path / "broken", STRONG, named("masked", diagnostics=UNRELIABLE))
    run_folder(tmp_path / "l2", STRONG, named("l2", threat_model={"name": "l2", "norm": "L2", "eps": 0.5}))
    run_folder(tmp_path / "transfer", STRONG, named("weak", threat_model=TRANSFER, defense={"name": "pubdef"}))
    run_folder(tmp_path / "transfer2", STRONG, named("other", threat_model=TRANSFER))
    run_folder(tmp_path / "task", STRONG, named("task", dataset={"name": "fashion-mnist"}))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "report.json").write_text('{"kind": "evaluation"}')
    run_folder(tmp_path / "copy", WEAK, named("weak"))
    run_folder(tmp_path / "sweep", WEAK, named("sweep", kind="sweep"))
    return tmp_path


def test_groups_never_mix_and_ranks_follow_robust_accuracy(runs: Path) -> None:
    board = boards.scan(runs)
    assert lines(board) == {
        "digits test (version 1), first 5 samples: linf eps=8/255, untargeted, white box": [
            (None, "masked"),
            (1, "strong"),
            (2, "fair"),
            (3, "weak"),
        ],
        "digits test (version 1), first 5 samples: l2 eps=8/255, untargeted, white box": [(1, "l2")],
        "digits test (version 1), first 5 samples: linf eps=8/255, untargeted, transfer": [(1, "weak"), (1, "other")],
        "fashion-mnist test (version 1), first 5 samples: linf eps=8/255, untargeted, white box": [(1, "task")],
    }
    assert len(board) == 8
    assert [path for path, _ in board.invalid] == ["bad/report.json"]
    assert dict(board.unranked) == {
        "weak/report.json": "the same report as copy/report.json",
        "sweep/report.json": "a sweep, not an evaluation",
    }


# One line per victim

OUTCOMES = st.lists(st.sampled_from([R, B]), min_size=8, max_size=8)


@settings(max_examples=25, deadline=None)
@given(st.lists(OUTCOMES, min_size=1, max_size=4), st.sets(st.integers(0, 7)))
def test_a_victim_scores_the_worst_case_of_every_sample(
    tmp_path_factory: pytest.TempPathFactory, columns: list[list[Outcome]], wrong: set[int]
) -> None:
    root = tmp_path_factory.mktemp("board")
    table = [[W if i in wrong else outcome for i, outcome in enumerate(column)] for column in columns]
    for k, column in enumerate(table):
        run_folder(root / f"run-{k}", {f"attack-{k}": column}, {"protocol": {"name": f"attack-{k}"}})
    victim = only(boards.scan(root))
    survives = sum(all(column[i] is R for column in table) for i in range(8))
    assert victim.score.value == survives / 8
    interval = wilson(survives, 8)
    assert (victim.score.low, victim.score.high) == pytest.approx((interval.low, interval.high))
    assert victim.clean.value == (8 - len(wrong)) / 8
    assert victim.rank == 1
    k = len(columns)
    assert victim.how == ("one report" if k == 1 else f"worst case per sample over {k} reports")
    # The attacks on it, the strongest first; those that leave as many are as strong.
    alone = {f"attack-{i}": sum(o is R for o in column) / 8 for i, column in enumerate(table)}
    assert {a.name: a.score.value for a in victim.attacks} == alone
    assert [a.score.value for a in victim.attacks] == sorted(alone.values())
    assert {a.name: a.rank for a in victim.attacks} == {
        name: 1 + sum(other < value for other in alone.values()) for name, value in alone.items()
    }


def test_a_feeble_attack_of_ones_own_changes_nothing(tmp_path: Path) -> None:
    run_folder(tmp_path / "pgd_at", FAIR, named("pgd_at"))
    run_folder(tmp_path / "plain", {"pgd": [B, B, B, B, B]}, named("plain"))
    run_folder(tmp_path / "feeble", {"shy": [R, R, R, R, R]}, named("plain"))
    (group,) = boards.scan(tmp_path).groups
    assert [(v.rank, v.model, v.score.value, len(v.attacks)) for v in group.victims] == [
        (1, "pgd_at", 0.6, 1),
        (2, "plain", 0.0, 2),
    ]


def test_other_weights_defenses_and_settings_are_other_victims(tmp_path: Path) -> None:
    run_folder(tmp_path / "a", WEAK, named("a"))
    run_folder(tmp_path / "b", STRONG, named("a", defense={"name": "bit-depth", "params": {"bits": 3}}))
    run_folder(tmp_path / "c", FAIR, named("a", defense={"name": "bit-depth", "params": {"bits": 4}}))
    run_folder(tmp_path / "d", FAIR, {"model": {"name": "a", "state_sha256": "d" * 64}})
    (group,) = boards.scan(tmp_path).groups
    assert sorted(victim.score.value for victim in group.victims) == [0.2, 0.6, 0.6, 0.8]
    assert {len(victim.attacks) for victim in group.victims} == {1}


def test_without_records_the_lowest_score_counts_and_says_so(tmp_path: Path) -> None:
    run_folder(tmp_path / "a", {"pgd": [R, B, R, R, W]})
    run_folder(tmp_path / "b", {"square": [R, R, B, R, W]})
    run_folder(tmp_path / "c", {"bare": [R, R, R, B, W]})
    assert only(boards.scan(tmp_path)).score.value == 0.2
    (tmp_path / "c" / "records.jsonl").unlink()
    victim = only(boards.scan(tmp_path))  # two of three robust samples by count, and no more than three by the other
    assert (victim.score.value, victim.how) == (0.4, "worst of 3 reports: no records beside c/report.json")
    (tmp_path / "b" / "records.jsonl").unlink()
    victim = only(boards.scan(tmp_path))
    assert victim.score.value == 0.6
    assert victim.how == "worst of 3 reports: no records beside b/report.json, c/report.json"
    assert victim.verified == "no records (2 of 3 reports)"
    assert victim.rank == 1


def test_where_samples_differ_the_lowest_score_counts_and_says_so(tmp_path: Path) -> None:
    run_folder(tmp_path / "a", {"pgd": [R, B, R, R, R]})
    run_folder(tmp_path / "b", {"fgsm": [B, R, R, R, R]}, first=2)
    victim = only(boards.scan(tmp_path))
    assert (victim.score.value, victim.how) == (0.8, "worst of 2 reports: their samples differ")


def test_other_numbers_of_samples_never_share_a_rank(tmp_path: Path) -> None:
    """And a sample that a report on fewer samples broke is broken among more of them, too."""
    run_folder(tmp_path / "a", {"pgd": [R, B, R, R, R, R]}, named("one"))
    run_folder(tmp_path / "b", {"strong": [B, B, R]}, named("one"))
    run_folder(tmp_path / "c", {"pgd": [R, B, B, R, R, R]}, named("two"))
    run_folder(tmp_path / "d", {"pgd": [R, R, R]}, named("three"))
    board = boards.scan(tmp_path)
    found = {g.samples: [(v.rank, v.model, v.score.value, v.n) for v in g.victims] for g in board.groups}
    assert found == {
        "first 3 samples": [(1, "three", 1.0, 3), (2, "one", 1 / 3, 3)],
        "first 6 samples": [(1, "one", 4 / 6, 6), (1, "two", 4 / 6, 6)],
    }
    by_n = {group.samples: group for group in board.groups}
    one = next(v for v in by_n["first 6 samples"].victims if v.model == "one")
    assert one.how == "worst case per sample over 2 reports, 1 of them on other samples"
    assert [(a.name, a.rank, a.n) for a in one.attacks] == [("pgd", 1, 6), ("strong", None, 3)]


# What may count


def forge(folder: Path, robust: int, n: int = 5) -> None:
    """A report that claims another number of robust samples than its records."""
    data = json.loads((folder / "report.json").read_text())
    clean = data["metrics"]["clean_accuracy"]["numerator"]
    for entry in (data["metrics"], data["attacks"][0]):
        entry["robust_accuracy"].update(rate(robust, n, "all_samples"))
        entry["attack_success_rate"].update(rate(clean - robust, clean, "clean_correct"))
    (folder / "report.json").write_text(json.dumps(data))


def test_what_does_not_verify_neither_lifts_a_victim_nor_lowers_another(tmp_path: Path) -> None:
    run_folder(tmp_path / "mine", FAIR, named("mine"))
    run_folder(tmp_path / "theirs", STRONG, named("theirs"))
    run_folder(tmp_path / "lie-of-mine", WEAK, named("mine"))
    forge(tmp_path / "lie-of-mine", 4)
    run_folder(tmp_path / "lie-of-theirs", STRONG, named("theirs"))
    forge(tmp_path / "lie-of-theirs", 0)
    run_folder(tmp_path / "lie-alone", WEAK, named("nobody"))
    forge(tmp_path / "lie-alone", 4)
    board = boards.scan(tmp_path)
    (group,) = board.groups
    found = {v.model: (v.rank, v.score.value, v.refuted, v.verified.partition(":")[0]) for v in group.victims}
    assert found == {
        "theirs": (1, 0.8, 1, "partly"),
        "mine": (2, 0.6, 1, "partly"),
        "nobody": (None, 0.8, 1, "no"),
    }
    for victim in group.victims:
        liars = [attack for attack in victim.attacks if not attack.counts]
        assert [(a.rank, a.why) for a in liars] == [(None, "it does not agree with its records")]
    assert "1 report not verified, not counted" in boards.markdown_of(board)


def test_weaker_attackers_do_not_stand_in_for_what_does_not_verify(tmp_path: Path) -> None:
    run_folder(tmp_path / "pgd", WEAK)
    forge(tmp_path / "pgd", 4)
    run_folder(tmp_path / "square", {"square": [R, R, R, R, W]}, {"threat_model": SCORES})
    asking_scores(tmp_path / "square")
    board = boards.scan(tmp_path)
    assert [(g.access, [(v.rank, len(v.attacks)) for v in g.victims]) for g in board.groups] == [
        ("black_box_score", [(1, 1)]),
        ("white_box", [(None, 1)]),
    ]


def test_a_flagged_report_lowers_a_score_and_lifts_none(tmp_path: Path) -> None:
    run_folder(tmp_path / "a", FAIR, named("a"))
    run_folder(tmp_path / "b", {"auto": [R, R, B, B, B]}, named("a", diagnostics=UNRELIABLE))
    run_folder(tmp_path / "c", STRONG, named("c", diagnostics=UNRELIABLE))
    (group,) = boards.scan(tmp_path).groups
    found = {v.model: (v.rank, v.score.value) for v in group.victims}
    assert found == {"a": (1, 0.4), "c": (None, 0.8)}
    flags = {v.model: [(flag["id"], flag["severity"]) for flag in v.flags] for v in group.victims}
    assert flags["a"] == flags["c"] == [("zero_gradient", "unreliable")]


def test_an_error_of_one_report_says_nothing_where_another_decided(tmp_path: Path) -> None:
    run_folder(tmp_path / "a", {"pgd": [R, B, R, R, R]})
    data = document({"odd": [R, R, R, R, B]})
    made = [replace(r, outcome=Outcome.ERROR) if r.id == "row-0" else r for r in records({"odd": [R, R, R, R, B]})]
    for entry in (data["metrics"], data["attacks"][0]):
        entry["robust_accuracy"] = rate(3, 5, "all_samples")
    data["metrics"]["robust_accuracy_upper"] = rate(4, 5, "all_samples")
    data["attacks"][0]["undecided"] = 1
    folder = tmp_path / "b"
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(data))
    (folder / "records.jsonl").write_text("".join(to_line(record) + "\n" for record in made))
    victim = only(boards.scan(tmp_path))
    assert victim.score.value == 3 / 5  # samples 1 and 4 are broken, 0 is robust to the attack that decided it
    assert victim.rank == 1


# Who attacked


def test_a_score_attack_is_no_white_box_and_counts_for_the_white_box(tmp_path: Path) -> None:
    run_folder(tmp_path / "pgd", {"pgd": [R, B, R, R, W]})
    run_folder(tmp_path / "square", {"square": [R, R, B, R, W]}, {"threat_model": SCORES})
    asking_scores(tmp_path / "square")
    run_folder(tmp_path / "transfer", {"mi": [R, R, R, B, W]}, {"threat_model": TRANSFER})
    board = boards.scan(tmp_path)
    found = {group.access: only(replace(board, groups=(group,))) for group in board.groups}
    assert {access: victim.score.value for access, victim in found.items()} == {
        "white_box": 0.2, "black_box_score": 0.6, "transfer": 0.6,
    }  # fmt: skip
    assert {access: victim.attacker for access, victim in found.items()} == {
        "white_box": "white box", "black_box_score": "black box (scores)", "transfer": "transfer, oblivious",
    }  # fmt: skip
    assert {a.name: a.attacker for a in found["white_box"].attacks}["square"] == "black box (scores)"
    assert any(group.title.endswith("untargeted, black box (scores)") for group in board.groups)


def test_a_budget_of_queries_is_a_threat_model_of_its_own(tmp_path: Path) -> None:
    for name, column, budget in (("few", [R, R, R, B], 100), ("many", [R, R, B, R], 1000), ("any", [R, B, R, R], None)):
        folder = run_folder(tmp_path / name, {name: column}, {"threat_model": {**SCORES, "query_budget": budget}})
        asking_scores(folder)
    found = {g.title.rpartition(")")[2]: g.victims[0].score.value for g in boards.scan(tmp_path).groups}
    assert found == {", 100 queries": 0.75, ", 1000 queries": 0.5, "": 0.25}


def test_reports_made_before_attackers_were_told_apart(tmp_path: Path) -> None:
    """ "adaptive" stood in all of them; what took no gradient is no white box."""
    defended = {"defense": {"name": "pgd_at", "params": {}}}
    for name, column in (("pgd", [R, B, R, R, W]), ("square", [R, R, B, R, W])):
        folder = run_folder(tmp_path / name, {name: column}, defended)
        if name == "square":
            asking_scores(folder)
        file = folder / "report.json"
        file.write_text(json.dumps(old(json.loads(file.read_text()))))
    board = boards.scan(tmp_path)
    found = {g.access: (g.victims[0].score.value, g.victims[0].attacker) for g in board.groups}
    assert found == {
        "white_box": (0.4, "white box, defense known"),
        "black_box_score": (0.6, "black box (scores), defense known"),
    }
    assert "adaptive" not in boards.markdown_of(board)
    threat = Report.load(tmp_path / "square").current["threat_model"]
    assert (threat["granted"], threat["adaptive"]) == ("white_box", False)
    assert Report.load(tmp_path / "square").threat == ("linf eps=8/255, untargeted, black box (scores), defense known")


def test_transfer_lines_stand_beside_their_white_box_figure(runs: Path) -> None:
    changes = named("both", threat_model=TRANSFER)
    run_folder(runs / "both-transfer", STRONG, changes)
    run_folder(runs / "both-white", WEAK, named("both"))
    board = boards.scan(runs)
    (group,) = (group for group in board.groups if group.transfer)
    victims = {victim.model: victim for victim in group.victims}
    assert victims["both"].beside == (boards.Beside("white_box", "White box", 0.2, "20.0 %"),)
    assert victims["other"].beside == ()
    assert victims["weak"].attacker == "transfer, oblivious"
    assert "not evaluated" in boards.html_of(board, runs)
    assert "not evaluated" in boards.markdown_of(board)
    tapm = {"name": "tapm", "title": "TAPM, strongest cell", "metric": "tapm_acc_best_attack"}
    cell = {"metrics": {"tapm_acc_best_attack": rate(4, 5, "all_samples")}, "companions": [tapm]}
    run_folder(runs / "pubdef", WEAK, named("pubdef", **cell))
    run_folder(runs / "old", FAIR, named("old", **cell))
    file = runs / "old" / "report.json"
    file.write_text(json.dumps(old(json.loads(file.read_text()))))
    (group,) = (g for g in boards.scan(runs).groups if any(v.model == "pubdef" for v in g.victims))
    assert group.columns == {"tapm": "TAPM"}  # one table, one column, whatever version wrote the report
    for victim in group.victims:
        if victim.model in ("pubdef", "old"):
            assert victim.beside == (boards.Beside("tapm", "TAPM", 0.8, "80.0 %"),)


# Headlines


def test_certified_and_empirical_never_share_a_column(tmp_path: Path) -> None:
    curve = [{"radius": r, "certified_accuracy": rate(k, 5, "all_samples")} for r, k in ((0.25, 3), (0.5, 2))]
    threat = {"name": "l2", "norm": "L2", "eps": 0.5}
    both = run_folder(tmp_path / "both", FAIR, named("both", threat_model=threat, metrics={"certified": curve}))
    run_folder(tmp_path / "attacked", STRONG, named("attacked", threat_model=threat))
    data = document(FAIR, named("proof", threat_model=threat | {"knowledge": "none"}, metrics={"certified": curve}))
    data["attacks"] = []
    data["section"] |= {
        "headline": {"metric": "certified", "name": "Certified accuracy", "better": "higher"},
        "table": [],
        "sentence": "Proven under {threat}.",
    }
    del data["metrics"]["robust_accuracy"], data["metrics"]["attack_success_rate"]
    (tmp_path / "proof").mkdir()
    (tmp_path / "proof" / "report.json").write_text(json.dumps(data))
    board = boards.scan(tmp_path)
    assert [(g.evidence, g.score_name, [v.score.value for v in g.victims]) for g in board.groups] == [
        ("certified", "Certified accuracy at 0.5", [0.4]),
        ("empirical", "Robust accuracy", [0.8, 0.6]),
    ]
    empirical = board.groups[1]
    assert [v.certified for v in empirical.victims] == [None, (0.5, 0.4)]
    assert "Certified" in boards.markdown_of(board)
    assert both.exists()


def test_reports_of_other_headlines_are_never_ranked_together(tmp_path: Path) -> None:
    """And where less is better, the least comes first; a scalar is shown as it is."""
    judged = {"metric": "success_by_a_judge", "name": "Success rate by a judge", "better": "lower"}
    shown = [{"label": "clean refusal", "metric": "clean_refusal"}]
    for name, success, refused in (("a", 1, 4), ("b", 3, 2)):
        metrics = {
            "success_by_a_judge": rate(success, 5, "prompts"),
            "clean_refusal": rate(refused, 5, "prompts"),
        }
        section = {"scenario": "talking", "headline": judged, "table": shown}
        run_folder(tmp_path / name, STRONG, named(name, metrics=metrics, section=section))
    # Two reports on one victim: without a count of samples the worst stands.
    seconds = {"metric": "delay", "name": "Delay", "better": "lower"}
    run_folder(tmp_path / "plain", STRONG, named("plain"))
    for name, value, victim in (
        ("slow", 7.5, "slow"), ("slower", 9.0, "slow"), ("fast", 2.0, "fast"), ("unknown", None, "unknown"),
    ):  # fmt: skip
        metrics = {"delay": {"value": value, "unit": "s"}}
        section = {"scenario": "waiting", "headline": seconds}
        run_folder(tmp_path / name, STRONG, named(victim, metrics=metrics, section=section))
    board = boards.scan(tmp_path)
    found = {group.score_name: [(v.rank, v.model, v.score.text) for v in group.victims] for group in board.groups}
    assert found == {
        "Robust accuracy": [(1, "plain", "80.0 %")],
        "Success rate by a judge": [(1, "a", "20.0 %"), (2, "b", "60.0 %")],
        "Delay": [(1, "fast", "2 s"), (2, "slow", "9 s"), (None, "unknown", "-")],
    }
    by_name = {group.score_name: group for group in board.groups}
    judges = by_name["Success rate by a judge"]
    assert (judges.scenario, judges.direction) == ("talking", "lower is safer")
    assert judges.title.endswith("white box, by success rate by a judge")
    assert judges.columns == {"clean_refusal": "clean refusal"}
    assert [each.text for victim in judges.victims for each in victim.beside] == ["80.0 %", "40.0 %"]
    slow = next(v for v in by_name["Delay"].victims if v.model == "slow")
    assert slow.how == "worst of 2 reports: the score is no count of samples"
    assert [(a.rank, a.score.value) for a in slow.attacks] == [(1, 9.0), (2, 7.5)]
    drawn = [v for tab in told(boards.html_of(board))["tabs"] for group in tab["groups"] for v in group["victims"]]
    assert sum(v.get("fraction", False) for v in drawn) == 3  # no bar for what is no fraction


@pytest.mark.slow
def test_flips_are_ranked_by_their_median_and_combined_by_the_least(tmp_path: Path) -> None:
    for name, attack in (("sda", "sda"), ("random", "random_flips")):
        advkit.evaluate(attack=attack, task="digits-dvs", n=9, device="cpu", out=tmp_path / name)
    board = boards.scan(tmp_path)
    (group,) = (group for group in board.groups if group.access == "white_box")
    assert (group.headline, group.better) == ("least_l0_median", "higher")
    (victim,) = group.victims

    def least(found: Sequence[Record]) -> dict[str, float]:
        return {r.id: 0.0 if r.outcome is W else r.measures["l0"] if r.outcome is B else math.inf for r in found}

    each = {name: least(read_records(tmp_path / name / "records.jsonl")) for name in ("sda", "random")}
    both = {row: min(each["sda"][row], each["random"][row]) for row in each["sda"]}
    assert victim.score.value == statistics.median(both.values())
    assert {a.name: a.score.value for a in victim.attacks} == {
        "sda": statistics.median(each["sda"].values()), "random_flips": statistics.median(each["random"].values()),
    }  # fmt: skip
    assert victim.how == "worst case per sample over 2 reports"
    assert victim.verified == "yes"
    assert 0 < victim.score.value < math.inf


def test_a_median_without_an_end_ranks_first(tmp_path: Path) -> None:
    headline = {"metric": "least_l0_median", "name": "Median flips", "better": "higher"}
    for name, column in (("tough", [R, R, R, B, W]), ("soft", [B, B, B, B, W])):
        outcomes = {"sda": column}
        made = [replace(r, measures={"l0": 7.0} if r.outcome is B else {}) for r in records(outcomes)]
        entry = (
            {"value": 7.0, "unit": "flips"} if name == "soft" else {"value": None, "unit": "flips", "unbounded": True}
        )
        changes = named(name, metrics={"least_l0_median": entry}, section={"headline": headline})
        folder = run_folder(tmp_path / name, outcomes, changes)
        (folder / "records.jsonl").write_text("".join(to_line(record) + "\n" for record in made))
    board = boards.scan(tmp_path)
    (group,) = board.groups
    assert [(v.rank, v.model, v.score.text) for v in group.victims] == [
        (1, "tough", "no median: half of the samples or more withstood"),
        (2, "soft", "7 flips"),
    ]
    assert [v.verified.partition(":")[0] for v in group.victims] == ["partly", "partly"]
    told = [(v["score"], v["unbounded"]) for v in json.loads(board.to_json())["groups"][0]["victims"]]
    assert told == [(None, True), (7.0, False)]


@pytest.mark.slow
def test_replies_are_ranked_by_the_strictest_judge_over_all_reports(tmp_path: Path) -> None:
    prompts: dict[str, Any] = {"task": "prompts", "n": 5, "device": "cpu"}
    advkit.evaluate(attack="random_suffix:length=6,evaluations=30", out=tmp_path / "a", **prompts)
    advkit.evaluate(attack="random_suffix:length=6,evaluations=30", seed=3, out=tmp_path / "b", **prompts)
    (group,) = boards.scan(tmp_path).groups
    assert (group.headline, group.better) == ("attack_success_rate_strictest_judge", "lower")
    assert {"clean_refusal", "benign_accuracy"} <= group.columns.keys()
    (victim,) = group.victims
    found = [r for name in "ab" for r in read_records(tmp_path / name / "records.jsonl")]
    refused = {r.id for r in found if r.figures["clean_refusal"]}
    fell = {judge: {r.id for r in found if r.figures.get(f"{judge}_asr_greedy")} for judge in ("refusal", "exact")}
    assert refused
    most = max(len(rows & refused) for rows in fell.values())
    assert victim.score.value == most / len(refused) > 0
    assert victim.figure("refusal_asr_greedy").value == len(fell["refusal"] & refused) / len(refused)
    assert victim.verified == "yes"


def tables(text: str) -> list[list[list[str]]]:
    """The tables of a Markdown text: lines of cells."""
    parts = (part.splitlines() for part in text.split("\n\n") if part.startswith("|"))
    return [[cells(line) for line in part if not line.startswith("| ---")] for part in parts]


def cells(line: str) -> list[str]:
    return [re.sub(r"\\(.)", r"\1", cell.strip()) for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_every_form_of_the_board_says_the_same(runs: Path) -> None:
    run_folder(runs / "again", {"fgsm": [R, B, R, B, R]}, named("fair"))
    run_folder(runs / "lie", WEAK, named("fair"))
    forge(runs / "lie", 4)
    board = boards.scan(runs)
    data = json.loads(board.to_json())
    groups = data["groups"]
    assert any(len(victim["attacks"]) > 2 for group in groups for victim in group["victims"])
    wanted = []
    for group in groups:
        wanted.append([(str(v["rank"] or "-"), v["model"], v["text"], str(v["n"]), v["how"]) for v in group["victims"]])
        for victim in group["victims"]:
            if len(victim["attacks"]) > 1:
                made = victim["attacks"]
                wanted.append([(str(a["rank"] or "-"), a["attack"], a["text"], str(a["n"]), a["path"]) for a in made])
    found = []
    for head, *rows in tables(boards.markdown_of(board)):
        n, last = head.index("n"), head.index("Counted") if "Counted" in head else head.index("Report")
        score = 3 if head[1] == "Model" else 2
        found.append([(row[0], row[1], row[score], row[n], row[last]) for row in rows])
        assert {len(row) for row in rows} == {len(head)}
    assert found == wanted
    page = told(boards.html_of(board, runs))
    lines = [victim for tab in page["tabs"] for group in tab["groups"] for victim in group["victims"]]
    lines.sort(key=lambda line: line["id"])
    shown = [(str(line.get("rank", "-")), line["model"], line["score"]) for line in lines]
    assert shown == [(str(v["rank"] or "-"), v["model"], v["text"]) for g in groups for v in g["victims"]]
    listed = [
        (cells[0], cells[1], cells[2], cells[3], cells[-1])
        for line in lines for cells in page["victims"][line["id"]]["attacks"]
    ]  # fmt: skip
    assert listed == [
        (str(a["rank"] or "-"), a["attack"], a["text"], str(a["n"]), a["path"])
        for g in groups for v in g["victims"] for a in v["attacks"]
    ]  # fmt: skip


class Page(html.parser.HTMLParser):
    """Tags and attributes as a browser reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_page_is_self_contained_and_escapes_everything(tmp_path: Path) -> None:
    flag = {"id": "zero_gradient", "severity": "warning", "message": HOSTILE, "attack": HOSTILE}
    changes = named(
        HOSTILE,
        title=HOSTILE,
        defense={"name": HOSTILE, "params": {HOSTILE: HOSTILE}},
        dataset={"name": HOSTILE, "version": HOSTILE},
        threat_model={"name": HOSTILE, "eps_string": HOSTILE},
        reproducibility={"command": HOSTILE, "packages": {HOSTILE: HOSTILE}, "device": HOSTILE},
        diagnostics={"flags": [flag]},
    )
    run_folder(tmp_path / "a", {HOSTILE: WEAK["pgd"]}, changes)
    (tmp_path / "b<b>").mkdir()
    (tmp_path / "b<b>" / "report.json").write_text(json.dumps({HOSTILE: 1}))
    board = boards.scan(tmp_path)
    text = boards.html_of(board, tmp_path)
    page = Page()
    page.feed(text)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 3
    assert [a.get("type") for t, a in page.tags if t == "script"] == ["application/json", "text/plain", None]
    assert "img" not in tags
    assert "b" not in tags
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    for _, attributes in page.tags:
        assert not {"src", "action"} & attributes.keys()
        assert (attributes.get("href") or "#").rpartition("/")[0] == ""  # files beside the page, or places in it
        assert ":" not in (attributes.get("href") or "")
    assert "url(" not in text
    assert "@import" not in text
    markdown = boards.markdown_of(board)
    assert "<script" not in markdown.replace("\\<", "")
    assert "<img" not in markdown.replace("\\<", "")
    assert len({row.replace("\\|", "").count("|") for row in markdown.splitlines() if row.startswith("|")}) == 1


def test_content_policy_names_the_very_script_and_style(runs: Path) -> None:
    text = boards.html_of(boards.scan(runs))
    for tag in ("script", "style"):
        body = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)  # the one without a type: the data are none
        assert body is not None
        digest = base64.b64encode(hashlib.sha256(body.group(1).encode()).digest()).decode()
        assert f"{tag}-src &#39;sha256-{digest}&#39;" in text or f"{tag}-src 'sha256-{digest}'" in text
    policy = next(a["content"] for t, a in parse(text) if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def parse(text: str) -> list[tuple[str, dict[str, str | None]]]:
    page = Page()
    page.feed(text)
    return page.tags


def test_plots_are_embedded_and_links_are_not_followed(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "runs" / "a", WEAK)
    (run / "plots").mkdir()
    Image.new("RGB", (900, 300), "white").save(run / "plots" / "per_class.png")
    (run / "plots" / "fake.png").write_bytes(b"<svg>")
    (run / "plots" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n123")
    (run / "plots" / "notes.txt").write_text("x")
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"\x89PNG\r\n\x1a\nsecret")
    (run / "plots" / "link.png").symlink_to(secret)
    found = boards.find_plots(run / "report.json")
    assert [name for name, _ in found] == ["broken", "per class"]
    (report,) = told(boards.html_of(boards.scan(tmp_path / "runs"), tmp_path / "runs"))["reports"]
    (name, href, small), broken = report["plots"]
    assert (name, href) == ("per class", "./a/plots/per_class.png")
    picture = Image.open(io.BytesIO(base64.b64decode(small.removeprefix("data:image/webp;base64,"))))
    assert picture.size == (480, 160)  # the plot itself is linked
    assert broken == ["broken", "./a/plots/broken.png", None]


def test_a_page_elsewhere_has_copies_beside_it(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "runs" / "a b", WEAK)
    (run / "plots").mkdir()
    Image.new("RGB", (9, 3), "white").save(run / "plots" / "per_class.png")
    board, _ = boards.write(tmp_path / "runs", tmp_path / "site")
    page = told((tmp_path / "site" / "leaderboard.html").read_text())
    assert page["victims"][0]["links"] == ["./leaderboard_files/a%20b/report.json"]
    copies = tmp_path / "site" / "leaderboard_files" / "a b"
    assert (copies / "report.json").read_bytes() == (run / "report.json").read_bytes()
    assert (copies / "plots" / "per_class.png").is_file()
    boards.write(tmp_path / "runs")  # in place nothing is copied
    assert not (tmp_path / "runs" / "leaderboard_files").exists()
    assert len(boards.scan(tmp_path)) == len(board)  # copies are no further reports


def test_json_and_files(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "page"
    board, paths = boards.write(runs, out)
    assert [path.name for path in paths] == ["leaderboard.html", "leaderboard.md", "leaderboard.json"]
    document = json.loads(paths[2].read_text())
    assert document["schema_version"] == "2.1"
    assert {v["model"] for group in document["groups"] for v in group["victims"]} >= {"weak", "strong", "task"}
    assert {v["n"] for group in document["groups"] for v in group["victims"]} == {5}
    assert document["invalid"][0]["path"] == "bad/report.json"
    before = [path.read_bytes() for path in paths]
    boards.write(runs, out)
    assert [path.read_bytes() for path in paths] == before
    assert "bad/report.json" in paths[1].read_text()
    assert len(board) == 8


def test_empty_and_missing_folders(tmp_path: Path) -> None:
    assert "No report to rank" in boards.html_of(boards.scan(tmp_path))
    assert "No report to rank" in boards.markdown_of(boards.scan(tmp_path))
    with pytest.raises(UsageError, match="no folder"):
        boards.scan(tmp_path / "none")


@pytest.mark.parametrize("on", [True, False])
def test_the_cycle_collector_rests_while_a_board_is_made_and_is_as_it_was_after(tmp_path: Path, on: bool) -> None:
    seen = []
    before = gc.isenabled()
    (gc.enable if on else gc.disable)()
    try:
        with pytest.raises(ZeroDivisionError):
            ranked(tmp_path, lambda board: (seen.append(gc.isenabled()), 1 / 0))
        assert (seen, gc.isenabled()) == ([False], on)
    finally:
        (gc.enable if before else gc.disable)()


def test_command(runs: Path) -> None:
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, [str(runs)])
    assert result.exit_code == 0
    assert "8 lines in 4 rankings, of 8 reports" in result.output
    assert "invalid: bad/report.json" in result.output
    assert (runs / "leaderboard.html").exists()
    result = CliRunner().invoke(app, [str(runs), "--json"])
    assert len(json.loads(result.output)["groups"]) == 4
