"""Which gaps of a ranking are real, and which figures are not ranked together."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_examples import B, R, W, records, run_folder
from scipy import stats as reference

from advkit.core.protocols import Outcome, Record
from advkit.evaluation.counts import GAINED, count, rows_broken, rows_robust
from advkit.evaluation.report import gaps
from advkit.evaluation.report import leaderboard as boards
from advkit.evaluation.stats import mcnemar_exact


def named(name: str, **changes: Any) -> dict[str, Any]:
    return {"model": {"name": name, "state_sha256": name.encode().hex().ljust(64, "0")}, **changes}


def mixed(seed: int) -> list[Record]:
    draw = np.random.default_rng(seed)
    ends = [W, R, B, Outcome.ERROR, Outcome.NON_FINITE, Outcome.INVALID]
    found = records({name: [ends[k] for k in draw.integers(0, 6, 40)] for name in ("a", "b")})
    return [replace(r, notes=(GAINED,)) if draw.random() < 0.1 else r for r in found]


@pytest.mark.parametrize("seed", range(5))
def test_rows_add_up_to_the_counts(seed: int) -> None:
    found = mixed(seed)
    counted = count(found)
    robust, broken = rows_robust(found), rows_broken(found)
    assert (sum(robust.values()), len(robust)) == (counted.right_after, counted.n)
    assert (sum(broken.values()), len(broken)) == (counted.broken, counted.attackable)


def test_tests_of_pairs_are_those_of_the_libraries() -> None:
    draw = np.random.default_rng(0)
    table = (draw.random((5, 60)) < draw.random((5, 1))).astype(float)
    p = gaps._mcnemar(table)
    for i in range(5):
        for j in range(5):
            only = int((table[i] * (1 - table[j])).sum()), int((table[j] * (1 - table[i])).sum())
            assert p[i, j] == pytest.approx(mcnemar_exact(*only))
    k, n = np.array([30.0, 50, 3, 60]), np.array([60.0, 80, 10, 60])
    p = gaps._two_rates(k, n)
    for i in range(4):
        for j in range(i):
            table2 = np.array([[k[i], n[i] - k[i]], [k[j], n[j] - k[j]]])
            plain = reference.chi2_contingency(table2, correction=False).statistic
            total = n[i] + n[j]
            assert p[i, j] == pytest.approx(reference.chi2.sf(plain * (total - 1) / total, 1))


def test_holm_rejects_what_the_step_down_rejects() -> None:
    draw = np.random.default_rng(1)
    p = np.triu(draw.random((6, 6)) ** 4, 1)
    p = p + p.T
    pairs = sorted((p[i, j], i, j) for i in range(6) for j in range(i + 1, 6))
    wanted = np.zeros((6, 6), dtype=bool)
    for step, (value, i, j) in enumerate(pairs):
        if value > 0.05 / (len(pairs) - step):
            break
        wanted[i, j] = wanted[j, i] = True
    assert (gaps._holm(p) == wanted).all()
    assert wanted.any()
    assert not wanted.all()


def test_a_paired_gap_is_found_where_rates_alone_show_none(tmp_path: Path) -> None:
    """Twelve of 100 samples that only one of two holds, none that only the other holds."""
    run_folder(tmp_path / "a", {"pgd": [R] * 56 + [B] * 44}, named("a"))
    run_folder(tmp_path / "b", {"pgd": [R] * 44 + [B] * 56}, named("b"))
    (group,) = boards.scan(tmp_path).groups
    first, second = (victim.gap for victim in group.victims)
    assert first is not None
    assert second is not None
    assert (first.ranks, second.ranks) == ((1, 1), (2, 2))
    assert (first.test, first.p) == (gaps.PAIRED, pytest.approx(2 * 0.5**12))
    for name in "ab":
        (tmp_path / name / "records.jsonl").unlink()
    (group,) = boards.scan(tmp_path).groups
    first = group.victims[0].gap
    assert first is not None
    assert (first.ranks, first.same, first.test) == ((1, 2), (1,), gaps.RATES)
    assert first.p is not None
    assert 0.05 < first.p < 0.1
    told = json.loads(boards.scan(tmp_path).to_json())["groups"][0]["victims"][0]["gap"]
    assert told["no_gap_shown"] == [1]


def test_an_older_revision_of_a_suite_gives_no_rank_and_says_which(tmp_path: Path) -> None:
    run_folder(tmp_path / "a", {"pgd": [R, R, R, R]}, named("a", protocol={"name": "thorough"}))
    run_folder(tmp_path / "b", {"pgd": [R, R, B, B]}, named("b", protocol={"name": "thorough", "revision": 2}))
    run_folder(tmp_path / "c", {"pgd": [R, R, R, B]}, named("c", protocol={"name": "pgd"}))
    (group,) = boards.scan(tmp_path).groups
    assert [(v.model, v.rank) for v in group.victims] == [("a", None), ("c", 1), ("b", 2)]
    assert group.victims[0].why.startswith("made with revision 1 of thorough, other lines with revision 2")
    run_folder(tmp_path / "a2", {"pgd": [R, R, R, B]}, named("a", protocol={"name": "thorough", "revision": 2}))
    (group,) = boards.scan(tmp_path).groups
    assert {v.model: v.rank for v in group.victims} == {"a": 1, "c": 1, "b": 3}


def test_rates_counted_over_other_samples_are_tables_of_their_own(tmp_path: Path) -> None:
    headline = {"headline": {"metric": "attack_success_rate", "name": "Attack success rate", "better": "lower"}}
    for name, kind in (("new", "clean_not_target"), ("old", "clean_correct")):
        folder = run_folder(tmp_path / name, {"pgd": [R, R, B, B]}, named(name, section=headline))
        file = folder / "report.json"
        data = json.loads(file.read_text())
        data["metrics"]["attack_success_rate"]["denominator_kind"] = kind
        data["attacks"][0]["attack_success_rate"]["denominator_kind"] = kind
        file.write_text(json.dumps(data))
    groups = boards.scan(tmp_path).groups
    assert len(groups) == 2
    for group in groups:
        assert "counted over" in group.title
        assert group.note.startswith("Not ranked with the table that counts over")
        assert group.note in boards.html_of(boards.scan(tmp_path))


def test_who_does_not_know_the_defense_stands_beside(tmp_path: Path) -> None:
    for name, knows, column in (("known", "adaptive", [R, B, B, B]), ("blind", "unknown", [R, R, R, B])):
        threat = {"granted": "white_box", "attacker": {"access": "white_box", "defense": knows}}
        run_folder(tmp_path / name, {"pgd": column}, {"threat_model": threat, "defense": {"name": "jpeg"}})
    (group,) = boards.scan(tmp_path).groups
    (victim,) = group.victims
    figure = victim.figure("oblivious")
    assert figure is not None
    assert (victim.score.value, figure.value) == (0.25, 0.75)
