"""Language models under speed switches, and how many rows they like to have in flight."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional

from advkit.core.speed import Speed
from advkit.evaluation import api
from advkit.testing.language import tiny_lm, transcript, transcripts

PROMPTS = [("w3 w4 w5", "w6 w7 w8"), ("w3 w5", "w9 w7"), ("w8", "w4")]


def test_a_faster_copy_answers_nearly_the_same_and_leaves_the_model_alone():
    model = tiny_lm(0, dtype=torch.float32, scale=4.0, memory=12345, merge=True)
    x = transcripts(model.tokenizer, PROMPTS)
    before = model(x)
    for word, limit in (("bf16", 0.1), ("fp16", 0.02)):
        fast = model.under_speed(Speed.parse(word))
        assert {p.dtype for p in fast.network.parameters()} == {torch.bfloat16 if word == "bf16" else torch.float16}
        assert 0 < float((fast(x) - before).abs().max()) < limit
        assert 0 < float((fast.continuing()(x) - model.continuing()(x)).abs().max()) < limit
        assert fast(x).dtype == before.dtype
        assert (fast.memory, fast.merge, fast.name) == (12345, True, model.name)
    assert {p.dtype for p in model.network.parameters()} == {torch.float32}
    assert torch.equal(model(x), before)


@pytest.mark.exhaustive
def test_a_compiled_copy_answers_the_same():
    """In a process of its own: torch's compiler lost its settings after other tests had compiled in the same one."""
    code = f"import {__name__} as tests; tests.compiled_copy_answers_the_same()"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def compiled_copy_answers_the_same():
    model = tiny_lm(0, dtype=torch.float32, layers=1)
    fast = model.under_speed(Speed.parse("compile"))
    t = model.tokenizer
    for length in (1, 2, 3, 4):
        x = torch.stack([transcript(t, "w3 w4", "w5 w6", slot=[3 + i] * length, width=14) for i in range(5)])
        assert float((fast(x) - model(x)).abs().max()) < 1e-5
        hot = functional.one_hot(x[:1, 0, 2 : 2 + length], 12).float()
        gradients = []
        for each in (fast, model):
            leaf = hot.clone().requires_grad_()
            gradients.append(torch.autograd.grad(each.relaxed(x[0])(leaf)[:, 0].sum(), leaf)[0])
        assert float((gradients[0] - gradients[1]).abs().max()) < 1e-5


@pytest.mark.slow
def test_searches_under_bf16_are_judged_in_full_precision(tmp_path):
    api.evaluate(
        "beast:k=3,length=3", task="prompts", model="toychat", n=4, speed="bf16", device="cpu", out=tmp_path / "run"
    )
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    plain = api.evaluate("beast:k=3,length=3", task="prompts", model="toychat", n=4, device="cpu").to_dict()
    (told,) = [flag for flag in report["diagnostics"]["flags"] if flag["id"] == "low_precision"]
    assert "bf16" in str(told)
    assert report["metrics"]["clean_accuracy"] == plain["metrics"]["clean_accuracy"]


def test_rows_in_flight_are_the_models_own_choice():
    model = tiny_lm(0)
    assert model.batch == 1
    shared = model.using(merge=True)
    assert shared.batch == 16
    assert shared.network is model.network
    case = api.resolve("beast", task="prompts", model="toychat", n=4, device="cpu")
    assert case.batch_size == 1
    assert api.resolve("beast", task="prompts", model="toychat", n=4, device="cpu", batch_size=3).batch_size == 3
    assert api.resolve("fgsm", task="digits", device="cpu", n=4).batch_size == 256


@pytest.mark.slow
def test_records_do_not_depend_on_the_batch():
    records = [
        api.evaluate(
            "beast:k=3,length=3", task="prompts", model="toychat", n=5, device="cpu", batch_size=size
        ).to_dict()["metrics"]
        for size in (1, 2, 5)
    ]
    assert records[0] == records[1] == records[2]
