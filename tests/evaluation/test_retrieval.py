"""Recall at k: a brute-force computation, worst cases of several attacks, and reports that say what records say."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import advkit
from advkit.core.protocols import Evidence, Label, Outcome, Record, Votes
from advkit.core.rng import RowRng
from advkit.evaluation.counts import recalls, unranked
from advkit.evaluation.report import Report, merge
from advkit.evaluation.report.verify import verify
from advkit.evaluation.run.case import Case
from advkit.evaluation.run.store import from_line, read_records, to_line
from advkit.evaluation.run.workers import Workers
from advkit.evaluation.stats import rate
from advkit.models import zoo
from advkit.models.views import Preprocessed
from advkit.tasks import TASKS
from advkit.tasks.captions import Ranks, ranks
from advkit.threat_models import GOALS, THREAT_MODELS

TASK = "fashion-mnist-captions"


def made(scores: np.ndarray, labels: np.ndarray, when: str = "before") -> list[Record]:
    places = ranks(torch.from_numpy(scores), torch.from_numpy(labels))
    return [
        Record(
            f"r{i:03}",
            "pgd",
            Outcome.ROBUST,
            label=int(label),
            figures={} if place is None else {f"caption_rank_{when}": place},
            scores={when: tuple(map(float, row))},
        )
        for i, (row, label, place) in enumerate(zip(scores, labels, places, strict=True))
    ]


def test_recall_is_what_brute_force_finds() -> None:
    draw = np.random.default_rng(0)
    for rows, classes in ((3, 5), (40, 4), (200, 10)):
        scores, labels = draw.normal(size=(rows, classes)).round(1), draw.integers(classes, size=rows)
        found = recalls(made(scores, labels), at=(1, 2, 5))
        for k in (1, 2, 5):
            image_to_text = sum(
                labels[i] in sorted(range(classes), key=lambda c: (-scores[i, c], c))[:k] for i in range(rows)
            )
            asked = sorted(set(labels.tolist()))
            order = {c: sorted(range(rows), key=lambda i, c=c: (-scores[i, c], i)) for c in asked}
            text_to_image = sum(any(labels[i] == c for i in order[c][:k]) for c in asked)
            one = found[f"clean_recall_at_{k}_image_to_text"]
            assert (one.found, one.queries, one.what) == (image_to_text, rows, "all_samples")
            if k >= rows:  # all of them are among the first k
                assert f"clean_recall_at_{k}_text_to_image" not in found
                continue
            other = found[f"clean_recall_at_{k}_text_to_image"]
            assert (other.found, other.queries, other.what) == (text_to_image, len(asked), "captions")


def test_rank_one_is_the_decision() -> None:
    scores = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 2.0, 1.0], [float("nan"), 0.0, 1.0]])
    assert ranks(scores, torch.tensor([0, 1, 0, 2])) == [1.0, 2.0, 3.0, None]


def test_an_image_counts_as_the_attack_that_broke_it_left_it() -> None:
    base = made(np.array([[3.0, 1.0], [3.0, 1.0]]), np.array([0, 0]), "after")
    first = replace(base[0], stage="one")
    broken = replace(base[0], stage="two", outcome=Outcome.BROKEN, figures={"caption_rank_after": 2.0})
    later = replace(base[0], stage="three")
    lost = Record("r001", "pgd", Outcome.ERROR, label=0)
    found = recalls([first, broken, later, lost], at=(1,))
    assert (found["recall_at_1_image_to_text"].found, found["recall_at_1_image_to_text"].queries) == (0, 2)
    assert recalls([first, later, lost], at=(1,))["recall_at_1_image_to_text"].found == 1
    assert recalls([lost]) == {}
    # an attack that came to nothing on the last image says nothing of what the first one did
    came_to_nothing = replace(lost, id="r000", clean=0)
    assert recalls([first, came_to_nothing], at=(1,))["recall_at_1_image_to_text"].found == 1


def test_recalls_are_left_out_where_an_answer_has_no_rank() -> None:
    records = [
        replace(each, clean=0, margin=0.1) for each in made(np.array([[3.0, 1.0], [3.0, 1.0]]), np.array([0, 0]))
    ]
    assert "clean_recall_at_1_image_to_text" in recalls(records, at=(1,))
    assert unranked(records[:0]) == (0, 0)
    dropped = [records[0], replace(records[1], figures={}, scores={})]
    assert recalls(dropped, at=(1,)) == {}
    nan = replace(dropped[1], notes=("clean_non_finite",), margin=None)
    assert recalls([records[0], nan], at=(1,))["clean_recall_at_1_image_to_text"].found == 1
    both = [replace(each, figures={**each.figures, "caption_rank_after": 1.0}) for each in records]
    assert unranked(both) == (0, 2)
    assert unranked([both[0], dropped[1]]) == (1, 2)


def test_a_victim_that_votes_ranks_nothing_and_one_without_embeddings_compares_no_images() -> None:
    answer, labels = torch.tensor([[0.2, 0.8]]), torch.tensor([1])

    class Voting(Votes):
        def abstained(self, answer: object) -> torch.Tensor:
            return torch.zeros(1, dtype=torch.bool)

    def said(victim: object) -> set[str]:
        rng = RowRng.from_ids(0, ["a"])
        return set(Ranks().examine(Evidence(victim, None, None, None, None, answer, answer, None, rng, labels, False)))

    ranked = {"caption_rank_before", "caption_rank_after"}
    victim = zoo.load("fashion-mnist-dual-encoder")
    assert said(Voting()) == set()
    assert said(object()) == ranked
    assert said(zoo.load("fashion-mnist-public-cnn")) == ranked
    assert said(victim) == said(Preprocessed(victim, torch.abs)) == {*ranked, "before", "after"}
    assert said(Preprocessed(zoo.load("fashion-mnist-public-cnn"), torch.abs)) == ranked


def test_worker_processes_get_what_examines_the_task() -> None:
    task = TASKS.build(TASK)
    case = Case(
        task=task,
        victim=zoo.load("fashion-mnist-dual-encoder"),
        attack=None,
        threat=THREAT_MODELS.build("linf:eps=0.1"),
        rule=GOALS.build("untargeted"),
        label=Label("pgd"),
        n=4,
    )
    with Workers(case, 1) as workers:
        sent = torch.load(io.BytesIO(workers._payload), weights_only=False)
    assert sent.task.examiner == task.examiner == Ranks()
    assert len(workers._payload) < 2e6  # no images


@pytest.mark.slow
def test_two_workers_write_the_same_ranks(runs: dict[int, Report], tmp_path: Path) -> None:
    settings = {"task": TASK, "n": 40, "device": "cpu", "batch_size": 7}
    report = advkit.evaluate("pgd:steps=2", **settings, workers=2, out=tmp_path / "run")
    one, two = (Path(each.path).with_name("records.jsonl").read_bytes() for each in (runs[7], report))
    assert one == two
    assert report.metrics == runs[7].metrics


def test_records_keep_scores() -> None:
    record = made(np.array([[0.1, 0.7]]), np.array([1]))[0]
    assert from_line(to_line(record)) == record
    assert '"scores"' not in to_line(replace(record, scores={}))
    for wrong in ('{"before":[1,"a"]}', '{"before":3}', "[1]", '{"before":[NaN]}'):
        with pytest.raises(TypeError, match="scores"):
            from_line(to_line(record).replace('{"before":[0.1,0.7]}', wrong))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Report]:
    """The same evaluation in batches of three sizes."""
    return {
        size: advkit.evaluate(
            "pgd:steps=2",
            task=TASK,
            n=40,
            device="cpu",
            batch_size=size,
            out=tmp_path_factory.mktemp(f"b{size}") / "run",
        )
        for size in (1, 7, 64)
    }


@pytest.mark.slow
def test_records_do_not_depend_on_the_batch_size(runs: dict[int, Report]) -> None:
    lines = [Path(report.path).with_name("records.jsonl").read_bytes() for report in runs.values()]
    assert lines[0] == lines[1] == lines[2]


def test_a_reports_recalls_are_those_of_the_model(runs: dict[int, Report]) -> None:
    report, rows = runs[64], TASKS.build(TASK).rows
    with torch.no_grad():
        scores, labels = zoo.load("fashion-mnist-dual-encoder")(rows.x[:40]), rows.y[:40]
    metrics = report.metrics
    for k in (1, 5):
        hits = (scores.topk(k, dim=1).indices == labels[:, None]).any(1).sum()
        assert metrics[f"clean_recall_at_{k}_image_to_text"]["numerator"] == int(hits)
        found = [bool((labels[scores[:, c].topk(k).indices] == c).any()) for c in labels.unique().tolist()]
        assert metrics[f"clean_recall_at_{k}_text_to_image"]["numerator"] == sum(found)
    assert metrics["clean_recall_at_1_image_to_text"]["numerator"] == metrics["clean_accuracy"]["numerator"]
    assert metrics["recall_at_1_image_to_text"]["numerator"] == metrics["robust_accuracy"]["numerator"]
    named = [line["metric"] for line in report.to_dict()["section"]["table"]]
    assert "recall_at_5_text_to_image" in named


def test_verify_counts_recalls_again(runs: dict[int, Report]) -> None:
    report = runs[7]
    assert verify(report).mark == "yes"
    data = report.to_dict()
    entry = data["metrics"]["recall_at_5_text_to_image"]
    data["metrics"]["recall_at_5_text_to_image"] = rate(entry["numerator"] - 1, entry["denominator"], "captions")
    forged = replace(Report.from_dict(data), path=report.path)
    assert any("recall_at_5_text_to_image" in fault for fault in verify(forged).faults)


@pytest.mark.slow
def test_a_suite_has_recalls_too() -> None:
    report = advkit.evaluate("lean", task=TASK, n=10, device="cpu")
    metrics = report.metrics
    assert metrics["recall_at_1_image_to_text"]["numerator"] == metrics["robust_accuracy"]["numerator"]
    assert metrics["recall_at_5_image_to_text"]["numerator"] >= metrics["recall_at_1_image_to_text"]["numerator"]


@pytest.mark.slow
def test_other_tasks_have_none() -> None:
    report = advkit.evaluate("fgsm", task="digits", n=8, device="cpu")
    assert not [name for name in report.metrics if "recall" in name or "caption" in name]


def test_shards_add_what_adds(runs: dict[int, Report]) -> None:
    data = runs[64].to_dict()
    other = runs[64].to_dict()
    for each, ids in ((data, "0" * 64), (other, "1" * 64)):
        each["dataset"]["selection"] = {"kind": "explicit_ids", "ids_sha256": ids}
    both = merge(Report.from_dict(data), Report.from_dict(other)).metrics
    assert both["recall_at_5_image_to_text"]["denominator"] == 80
    assert "recall_at_5_text_to_image" not in both


def test_records_of_the_run_hold_ranks_and_scores(runs: dict[int, Report]) -> None:
    for record in read_records(Path(runs[1].path).with_name("records.jsonl")):
        assert len(record.scores["before"]) == len(record.scores["after"]) == 10
        assert np.argmax(record.scores["after"]) == record.adversarial
        assert (record.figures["caption_rank_before"] == 1) == (record.clean == record.label)
