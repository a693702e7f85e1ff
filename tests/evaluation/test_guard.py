"""An attack that changes its victim, a victim that raises, a folder that was edited: named, and nothing believed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import advkit
from advkit.core.errors import BadModel, ModelChanged, ReportError, RunInterrupted, StaleRun
from advkit.core.protocols import Access, Outcome
from advkit.evaluation.run.store import read_records
from advkit.models import zoo
from advkit.tasks import TASKS
from advkit.tasks.arrays import Arrays

EPS = "linf:eps=0.2"


@pytest.fixture(scope="module")
def batch():
    return next(iter(TASKS.build("digits").batches(40, n=40)))


@pytest.fixture(scope="module")
def rows(batch):
    return Arrays(batch.x, batch.labels, classes=10)


class Victim(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.drop = zoo.load("digits-mlp-pgd_at").module, nn.Dropout(0.5)
        self.eval()

    def forward(self, x):
        return self.inner(self.drop(x))


def inside(oracle):
    model = oracle.model
    while not isinstance(model, nn.Module):
        model = getattr(model, "module", None) or model.model
    return model


def weights(model):
    next(model.parameters()).data.mul_(-1)


def weights_in_place(model):
    with torch.no_grad():
        next(model.parameters()).mul_(-1)


def mode(model):
    model.train()


def mode_of_a_part(model):
    model.drop.train()


def hook(model):
    model.register_forward_hook(lambda module, inputs, answer: -answer)


def hook_before(model):
    model.inner.register_forward_pre_hook(lambda module, inputs: None)


@dataclass(frozen=True)
class Meddles:
    needs: ClassVar[Access] = Access.GRADIENTS
    act: Any

    def __call__(self, oracle, x, goal, threat, rng, /):
        self.act(inside(oracle))
        return x


@pytest.mark.parametrize("act", [weights, weights_in_place, mode, mode_of_a_part, hook, hook_before])
def test_an_attack_that_changes_its_victim_ends_the_run_and_the_model_comes_back(act, rows, batch, tmp_path):
    model = Victim()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    answer = model(batch.x)
    with pytest.raises(ModelChanged, match="changed a model"):
        advkit.evaluate(Meddles(act), task=rows, model=model, threat_model=EPS, batch_size=16, out=tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(batch.x), answer)
    assert not (tmp_path / "records.jsonl").exists() or not (tmp_path / "records.jsonl").read_text()


def test_an_attack_that_only_asks_is_no_meddler(rows):
    report = advkit.evaluate("pgd:steps=2", task=rows, model=Victim(), threat_model=EPS)
    assert report.robust_accuracy is not None


class Raises(nn.Module):
    def __init__(self, bad, always=False):
        super().__init__()
        self.inner, self.bad, self.always = zoo.load("digits-mlp-pgd_at").module, bad, always
        self.eval()

    def forward(self, x):
        if self.always or (x == self.bad).flatten(1).all(1).any():
            raise ValueError("this sample is refused")
        return self.inner(x)


@pytest.mark.parametrize("row", [0, 17, 39])
def test_a_victim_that_raises_on_one_sample_costs_that_sample(row, rows, batch, tmp_path):
    report = advkit.evaluate(
        "pgd:steps=3", task=rows, model=Raises(batch.x[row]), threat_model=EPS, batch_size=16, out=tmp_path / "raises"
    )
    advkit.evaluate("pgd:steps=3", task=rows, model=Victim(), threat_model=EPS, batch_size=16, out=tmp_path / "plain")
    found = {r.id: r for r in read_records(tmp_path / "raises" / "records.jsonl")}
    plain = {r.id: r for r in read_records(tmp_path / "plain" / "records.jsonl")}
    (bad,) = [r for r in found.values() if r.outcome == Outcome.ERROR]
    assert "this sample is refused" in bad.message
    assert list(found).index(bad.id) == row
    assert all(found[name].outcome == plain[name].outcome for name in found if name != bad.id)
    assert report.metrics["clean_accuracy"]["denominator"] == 40  # the sample counts, as one that is not right
    assert not report.trustworthy or report.flags


def test_a_victim_that_raises_on_every_sample_is_a_bad_model(rows, batch):
    with pytest.raises(BadModel, match="this sample is refused"):
        advkit.evaluate("pgd:steps=3", task=rows, model=Raises(batch.x[0], always=True), threat_model=EPS)


@pytest.mark.parametrize("make", [lambda x: None, lambda x: np.zeros(3), lambda x: (x,)])
def test_an_attack_that_returns_no_tensor_gives_error_records(make, rows, tmp_path):
    @dataclass(frozen=True)
    class Odd:
        needs: ClassVar[Access] = Access.GRADIENTS

        def __call__(self, oracle, x, goal, threat, rng, /):
            return make(x)

    advkit.evaluate(Odd(), task=rows, model=Victim(), threat_model=EPS, out=tmp_path)
    attacked = [r for r in read_records(tmp_path / "records.jsonl") if r.outcome != Outcome.WRONG]
    assert {r.outcome for r in attacked} == {Outcome.ERROR}
    assert all("expected a tensor" in r.message for r in attacked)


class Full(nn.Module):
    def __init__(self, fails):
        super().__init__()
        self.inner, self.fails, self.calls = zoo.load("digits-mlp-pgd_at").module, fails, 0
        self.eval()

    def forward(self, x):
        self.calls += 1
        if self.fails(self.calls, len(x)):
            raise torch.OutOfMemoryError("out of memory")
        return self.inner(x)


def test_memory_for_few_samples_is_enough(rows):
    plain = advkit.evaluate("pgd:steps=3", task=rows, model=Full(lambda c, n: False), threat_model=EPS)
    for batch in (16, 64):
        small = advkit.evaluate(
            "pgd:steps=3", task=rows, model=Full(lambda c, n: n > 20), threat_model=EPS, batch_size=batch
        )
        assert small.robust_accuracy == plain.robust_accuracy


def test_no_memory_at_all_is_one_line(rows):
    with pytest.raises(RunInterrupted, match="out of memory"):
        advkit.evaluate("pgd:steps=3", task=rows, model=Full(lambda c, n: True), threat_model=EPS)
    with pytest.raises(RunInterrupted, match="out of memory"):
        advkit.evaluate("pgd:steps=3", task=rows, model=Full(lambda c, n: c > 20), threat_model=EPS, batch_size=16)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    advkit.evaluate(out=folder, **ASKED)
    return folder


ASKED = {"attack": "fgsm", "task": "digits", "n": 20, "device": "cpu", "batch_size": 8}


def changed(line, **changes):
    return json.dumps({**json.loads(line), **changes}, separators=(",", ":")) + "\n"


DAMAGES = {
    "garbage": (lambda lines: [*lines[:5], "garbage{\n", *lines[5:]], ReportError),
    "zeros": (lambda lines: [*lines[:5], "\0" * 300 + "\n"], ReportError),
    "nesting": (lambda lines: [*lines[:5], "[" * 100_000 + "\n"], ReportError),
    "label": (lambda lines: [changed(lines[0], label="x"), *lines[1:5]], ReportError),
    "distance": (lambda lines: [changed(lines[0], distance="far"), *lines[1:5]], ReportError),
    "reached": (lambda lines: [changed(lines[0], reached=1), *lines[1:5]], ReportError),
    "contradiction": (lambda lines: [*lines[:5], changed(lines[0], outcome="invalid")], StaleRun),
    "another row": (lambda lines: [*lines[:5], changed(lines[0], id="digits/test/99999")], StaleRun),
    "another attack": (lambda lines: [*lines[:5], changed(lines[0], attack="strong")], StaleRun),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_records_that_were_not_written_are_refused(damage, finished, tmp_path):
    make, error = DAMAGES[damage]
    lines = (finished / "records.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "records.jsonl").write_text("".join(make(lines)))
    (tmp_path / "records.case.json").write_bytes((finished / "records.case.json").read_bytes())
    with pytest.raises(error):
        advkit.evaluate(out=tmp_path, **ASKED)


def test_the_same_record_twice_and_lost_times_do_no_harm(finished, tmp_path):
    lines = (finished / "records.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "records.jsonl").write_text("".join([*lines[:9], lines[3]]))
    (tmp_path / "records.case.json").write_bytes((finished / "records.case.json").read_bytes())
    (tmp_path / "records.seconds.jsonl").write_bytes(b"\xff\xfe\n[1]\ngarbage\n")
    report = advkit.evaluate(out=tmp_path, **ASKED)
    whole = {r.id: r for r in read_records(finished / "records.jsonl")}
    assert {r.id: r for r in read_records(tmp_path / "records.jsonl")} == whole
    assert report.to_dict()["dataset"]["n_evaluated"] == 20


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[1]", b"{"])
def test_a_case_file_that_says_nothing_is_refused(content, finished, tmp_path):
    (tmp_path / "records.case.json").write_bytes(content)
    with pytest.raises(StaleRun):
        advkit.evaluate(out=tmp_path, **ASKED)
