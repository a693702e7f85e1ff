"""Tail and worst class: means over the weakest classes by their own robust accuracy, in every report of labels."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import advkit
from advkit.core.protocols import Outcome, Record
from advkit.evaluation.counts import by_class, tail_accuracy, weakest_classes
from advkit.evaluation.report import Report
from advkit.evaluation.report.verify import verify
from advkit.tasks.arrays import Arrays

OUTCOMES = (Outcome.ROBUST, Outcome.BROKEN, Outcome.WRONG, Outcome.NON_FINITE)


def records(rates: dict[int, tuple[int, int]]) -> list[Record]:
    """Robust and other rows by class."""
    made = []
    for label, (robust, rows) in rates.items():
        for row in range(rows):
            outcome = OUTCOMES[0] if row < robust else OUTCOMES[1 + row % 3]
            clean = label + (outcome == Outcome.WRONG)
            made.append(Record(id=f"{label}/{row}", attack="pgd", outcome=outcome, label=label, clean=clean))
    return made


@pytest.mark.parametrize("classes", range(1, 25))
def test_the_tail_is_the_weakest_three_tenths_rounded_up(classes: int) -> None:
    draws = np.random.default_rng(classes)
    rates = {}
    for label in draws.permutation(classes).tolist():
        rows = int(draws.integers(1, 9))
        rates[label] = (int(draws.integers(0, rows + 1)), rows)
    found = by_class(records(rates))
    assert {label: (c.right_after, c.n) for label, c in found.items()} == rates
    assert list(found) == sorted(rates)
    shares = sorted(robust / rows for robust, rows in rates.values())
    size = math.ceil(classes * 3 / 10 - 1e-9)
    assert len(weakest_classes(found)) == size
    assert tail_accuracy(found) == pytest.approx(sum(shares[:size]) / size)
    worst = rates[weakest_classes(found)[0]]
    assert worst[0] / worst[1] == shares[0]


def test_classes_count_alike_whatever_their_size() -> None:
    found = by_class(records({0: (1, 2), 1: (0, 50), 2: (9, 10), 3: (10, 10)}))
    assert weakest_classes(found) == [1, 0]
    assert tail_accuracy(found) == 0.25


def test_every_report_has_them_and_they_are_those_of_its_records(tmp_path: Path) -> None:
    report = advkit.evaluate(
        "fgsm", task="digits", n=60, threat_model="linf:eps=0.05", device="cpu", out=tmp_path / "run"
    )
    metrics = report.to_dict()["metrics"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "records.jsonl").read_text().splitlines()]
    robust: dict[int, list[bool]] = {}
    for line in lines:
        robust.setdefault(line["label"], []).append(line["outcome"] in ("robust", "invalid"))
    shares = sorted(sum(held) / len(held) for held in robust.values())
    assert metrics["tail_30_accuracy"]["value"] == pytest.approx(sum(shares[:3]) / 3)
    assert metrics["worst_class_accuracy"]["value"] == shares[0]
    assert metrics["worst_class_accuracy"]["ci"] is None
    assert 0 < metrics["tail_30_accuracy"]["value"] < report.robust_accuracy < 1
    assert any("tail 30 accuracy" in line for line, _ in report.full())


def test_tasks_of_many_classes_have_the_tail_without_the_list() -> None:
    """A hundred classes of one sample each; a model that knows the first thirty-five."""
    torch.manual_seed(0)
    x, y = torch.rand(100, 1, 4, 4), torch.arange(100)

    def model(z: torch.Tensor) -> torch.Tensor:
        near = -torch.cdist(z.flatten(1), x.flatten(1))
        return torch.cat([near[:, :35], torch.full((len(z), 65), -99.0)], 1)

    metrics = advkit.evaluate("fgsm", task=Arrays(x, y), model=model, threat_model="linf:eps=0.001").to_dict()[
        "metrics"
    ]
    assert metrics["robust_accuracy"]["value"] == pytest.approx(0.35)
    assert metrics["tail_30_accuracy"] == {"value": 0.0, "unit": "fraction", "n": 30}
    assert (metrics["worst_class_accuracy"]["numerator"], metrics["worst_class_accuracy"]["denominator"]) == (0, 1)
    assert not [name for name in metrics if name.startswith("robust_accuracy_class_")]


@pytest.mark.slow
def test_reports_of_texts_have_none() -> None:
    metrics = advkit.evaluate("random_suffix", task="prompts", model="toychat", n=1, device="cpu").to_dict()["metrics"]
    assert not {"tail_30_accuracy", "worst_class_accuracy"} & metrics.keys()


def test_a_report_without_them_is_read_and_one_with_others_is_found_out(tmp_path: Path) -> None:
    first = tmp_path / "one"
    advkit.evaluate("fgsm", task="digits", n=40, threat_model="linf:eps=0.05", device="cpu", out=first)
    assert verify(Report.load(first)).mark == "yes"

    def edited(name: str, **metrics: object) -> Report:
        folder = Path(shutil.copytree(first, tmp_path / name))
        data = json.loads((folder / "report.json").read_text())
        for key, value in metrics.items():
            if value is None:
                del data["metrics"][key]
            else:
                data["metrics"][key].update(value)
        (folder / "report.json").write_text(json.dumps(data))
        return Report.load(folder)

    earlier = edited("earlier", tail_30_accuracy=None, worst_class_accuracy=None)
    assert verify(earlier).mark == "yes"
    assert not any("tail 30" in line for line, _ in earlier.full())
    better = verify(edited("tail", tail_30_accuracy={"value": 0.99}))
    assert any("tail_30_accuracy is 0.99" in fault for fault in better.faults)
    worst = verify(edited("worst", worst_class_accuracy={"value": 1.0, "numerator": 3, "denominator": 3}))
    assert any("worst_class_accuracy is 3 / 3" in fault for fault in worst.faults)
