"""Leaderboards: grouping, ranks, hostile reports, self-containment."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from report_examples import B, R, W, document, old, run_folder
from typer.testing import CliRunner

from advkit.cli.leaderboard import leaderboard as command
from advkit.core.errors import UsageError
from advkit.evaluation.report import leaderboard as boards
from advkit.evaluation.stats import rate

WEAK, FAIR, STRONG = {"pgd": [R, B, B, B, W]}, {"pgd": [R, R, B, B, R]}, {"pgd": [R, R, R, R, W]}
UNRELIABLE = {"flags": [{"id": "zero_gradient", "severity": "unreliable", "message": "all rows"}]}
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>|`*"


def named(name: str, **changes: Any) -> dict[str, Any]:
    return {"model": {"name": name, "state_sha256": hashlib.sha256(name.encode()).hexdigest()}, **changes}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    run_folder(tmp_path / "weak", WEAK, named("weak"))
    run_folder(tmp_path / "deep" / "er" / "strong", STRONG, named("strong"))
    run_folder(tmp_path / "fair", FAIR, named("fair", threat_model={"eps": 0.031, "eps_string": "0.031"}))
    run_folder(tmp_path / "broken", STRONG, named("masked", diagnostics=UNRELIABLE))
    run_folder(tmp_path / "l2", STRONG, named("l2", threat_model={"name": "l2", "norm": "L2", "eps": 0.5}))
    run_folder(tmp_path / "transfer", STRONG, named("weak", threat_model={"knowledge": "transfer", "adaptive": False}))
    run_folder(tmp_path / "transfer2", STRONG, named("other", threat_model={"knowledge": "transfer"}))
    run_folder(tmp_path / "task", STRONG, named("task", dataset={"name": "fashion-mnist"}))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "report.json").write_text('{"kind": "evaluation"}')
    run_folder(tmp_path / "copy", WEAK, named("weak"))
    run_folder(tmp_path / "sweep", WEAK, named("sweep", kind="sweep"))
    return tmp_path


def test_groups_never_mix_and_ranks_follow_robust_accuracy(runs: Path) -> None:
    board = boards.scan(runs)
    groups = {
        group.title: [(e.rank, e.report.to_dict()["model"]["name"]) for e in group.entries] for group in board.groups
    }
    assert groups == {
        "digits 1 test: linf eps=8/255, untargeted, white box": [
            (None, "masked"),
            (1, "strong"),
            (2, "fair"),
            (3, "weak"),
        ],
        "digits 1 test: l2 eps=8/255, untargeted, white box": [(1, "l2")],
        "digits 1 test: linf eps=8/255, untargeted, transfer": [(1, "weak"), (1, "other")],
        "fashion-mnist 1 test: linf eps=8/255, untargeted, white box": [(1, "task")],
    }
    assert len(board) == 8
    assert [path for path, _ in board.invalid] == ["bad/report.json"]
    assert dict(board.unranked) == {
        "weak/report.json": "the same report as copy/report.json",
        "sweep/report.json": "a sweep, not an evaluation",
    }


def test_transfer_rows_stand_beside_their_white_box_figure(runs: Path) -> None:
    entries = {e.path: e for group in boards.scan(runs).groups for e in group.entries}
    assert entries["transfer/report.json"].beside == (boards.Beside("white_box", "White box", 0.2, "20.0 %"),)
    assert entries["transfer2/report.json"].beside == ()
    assert entries["transfer/report.json"].adaptive == "oblivious"
    assert entries["copy/report.json"].adaptive == "adaptive"
    page = boards.scan(runs).to_html(runs)
    assert "not evaluated" in page
    tapm = {"name": "tapm", "title": "TAPM, strongest cell", "metric": "tapm_acc_best_attack"}
    cell = {"metrics": {"tapm_acc_best_attack": rate(4, 5, "all_samples")}, "companions": [tapm]}
    run_folder(runs / "pubdef", WEAK, named("pubdef", **cell))
    run_folder(runs / "old", FAIR, named("old", **cell))
    file = runs / "old" / "report.json"
    file.write_text(json.dumps(old(json.loads(file.read_text()))))
    entries = {e.path: e for group in boards.scan(runs).groups for e in group.entries}
    for name in ("pubdef", "old"):  # one table, one column, whatever version wrote the report
        assert entries[f"{name}/report.json"].beside == (boards.Beside("tapm", "TAPM", 0.8, "80.0 %"),)
        assert any(
            {f"{name}/report.json", "copy/report.json"} <= {e.path for e in group.entries}
            and group.columns == {"tapm": "TAPM"}
            for group in boards.scan(runs).groups
        )


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
    assert [(g.evidence, g.score_name, [e.score for e in g.entries]) for g in board.groups] == [
        ("certified", "Certified accuracy at 0.5", [0.4]),
        ("empirical", "Robust accuracy", [0.8, 0.6]),
    ]
    empirical = board.groups[1]
    assert [e.certified for e in empirical.entries] == [None, (0.5, 0.4)]
    assert "Certified" in board.to_markdown()
    assert both.exists()


def test_reports_of_other_headlines_are_never_ranked_together(tmp_path: Path) -> None:
    """And where less is better, the least comes first; a scalar is shown as it is."""
    judged = {
        "metric": "robust_accuracy_all_judges",
        "name": "Robust accuracy (no judge says broken)",
        "better": "higher",
    }
    lines = [{"label": "judge refusal", "metric": "refusal_asr_greedy"}]
    for name, robust, refused in (("a", 1, 4), ("b", 3, 2)):
        metrics = {
            "robust_accuracy_all_judges": rate(robust, 5, "prompts"),
            "refusal_asr_greedy": rate(refused, 5, "prompts"),
        }
        section = {"headline": judged, "table": lines}
        run_folder(tmp_path / name, STRONG, named(name, metrics=metrics, section=section))
    run_folder(tmp_path / "plain", STRONG, named("plain"))
    seconds = {"metric": "delay", "name": "Delay", "better": "lower"}
    for name, value in (("slow", 7.5), ("fast", 2.0), ("unknown", None)):
        metrics = {"delay": {"value": value, "unit": "s"}}
        run_folder(tmp_path / name, STRONG, named(name, metrics=metrics, section={"headline": seconds}))
    board = boards.scan(tmp_path)
    found = {
        group.score_name: [(e.rank, e.data["model"]["name"], e.text) for e in group.entries] for group in board.groups
    }
    assert found == {
        "Robust accuracy": [(1, "plain", "80.0 %")],
        "Robust accuracy (no judge says broken)": [(1, "b", "60.0 %"), (2, "a", "20.0 %")],
        "Delay": [(1, "fast", "2 s"), (2, "slow", "7.5 s"), (None, "unknown", "-")],
    }
    by_name = {group.score_name: group for group in board.groups}
    judges = by_name["Robust accuracy (no judge says broken)"]
    assert judges.title.endswith("white box, by robust accuracy (no judge says broken)")
    assert judges.columns == {"refusal_asr_greedy": "judge refusal"}
    assert [each.text for entry in judges.entries for each in entry.beside] == ["40.0 %", "80.0 %"]
    assert "judge refusal | n |" in board.to_markdown()
    page = parse(board.to_html())
    assert sum(tag == "svg" for tag, _ in page) == 3  # no bar for what is no fraction
    assert {a["aria-sort"] for t, a in page if t == "th" and "aria-sort" in a} == {"none", "descending", "ascending"}
    assert all(row.count("|") == lines[0].count("|") for lines in tables(board.to_markdown()) for row in lines)


def tables(text: str) -> list[list[str]]:
    return [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]


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
    text = board.to_html(tmp_path)
    page = Page()
    page.feed(text)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 1
    assert "img" not in tags
    assert "b" not in tags
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    for _, attributes in page.tags:
        for name in ("src", "href", "action"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert "url(" not in text
    assert "@import" not in text
    markdown = board.to_markdown()
    assert "<script" not in markdown.replace("\\<", "")
    assert "<img" not in markdown.replace("\\<", "")
    assert len({row.replace("\\|", "").count("|") for row in markdown.splitlines() if row.startswith("|")}) == 1


def test_content_policy_names_the_very_script_and_style(runs: Path) -> None:
    text = boards.scan(runs).to_html()
    for tag in ("script", "style"):
        body = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
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
    (run / "plots" / "per_class.png").write_bytes(b"\x89PNG\r\n\x1a\n123")
    (run / "plots" / "fake.png").write_bytes(b"<svg>")
    (run / "plots" / "notes.txt").write_text("x")
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"\x89PNG\r\n\x1a\nsecret")
    (run / "plots" / "link.png").symlink_to(secret)
    found = boards.find_plots(run / "report.json")
    assert [name for name, _ in found] == ["per class"]
    images = [a["src"] for t, a in parse(boards.scan(tmp_path / "runs").to_html(tmp_path / "runs")) if t == "img"]
    assert images == ["data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n123").decode()]


def test_json_and_files(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "page"
    board, paths = boards.write(runs, out)
    assert [path.name for path in paths] == ["leaderboard.html", "leaderboard.md", "leaderboard.json"]
    document = json.loads(paths[2].read_text())
    first = (
        document["groups"][1]["entries"] if document["groups"][0]["norm"] == "L2" else document["groups"][0]["entries"]
    )
    assert {entry["model"] for group in document["groups"] for entry in group["entries"]} >= {"weak", "strong", "task"}
    assert first[0]["n"] == 5
    assert document["invalid"][0]["path"] == "bad/report.json"
    before = [path.read_bytes() for path in paths]
    boards.write(runs, out)
    assert [path.read_bytes() for path in paths] == before
    assert "bad/report.json" in paths[1].read_text()
    assert len(board) == 8


def test_empty_and_missing_folders(tmp_path: Path) -> None:
    assert "No report to rank" in boards.scan(tmp_path).to_html()
    assert "No report to rank" in boards.scan(tmp_path).to_markdown()
    with pytest.raises(UsageError, match="no folder"):
        boards.scan(tmp_path / "none")


def test_command(runs: Path) -> None:
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, [str(runs)])
    assert result.exit_code == 0
    assert "8 reports in 4 rankings" in result.output
    assert "invalid: bad/report.json" in result.output
    assert (runs / "leaderboard.html").exists()
    result = CliRunner().invoke(app, [str(runs), "--json"])
    assert len(json.loads(result.output)["groups"]) == 4
