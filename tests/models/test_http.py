"""Models behind HTTP, against a real server process that fails every 50th request and limits the rate."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import advkit
from advkit.core.errors import BadModel, MissingExtra, RunInterrupted, UsageError
from advkit.core.registry import outside
from advkit.core.rng import RowRng
from advkit.defenses import DEFENSES
from advkit.defenses.smoothing.fronts import QUERIES
from advkit.evaluation.victims import train_victim
from advkit.models import MODELS, own_architecture
from advkit.testing.defense_laws import stripes
from advkit.training.loop import fit

pytest.importorskip("httpx2")

FAST = "backoff=0.001,timeout=10"
SHAPE = (2, 6, 6)


@contextmanager
def served(least: float = 0.0):
    """A server process of its own; yields its address."""
    command = [sys.executable, str(Path(__file__).parent / "service.py"), str(least)]
    clean = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=clean) as process:
        try:
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def service():
    with served() as url:
        yield url


@pytest.fixture(autouse=True)
def _direct(monkeypatch):
    for name in list(os.environ):
        if "proxy" in name.lower():
            monkeypatch.delenv(name)


def counts(url: str) -> dict[str, int]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{url}/counts", timeout=10) as answer:
        return json.loads(answer.read())


def model(url: str, settings: str = FAST, classes: int = 3):
    return MODELS.build(f"{url},{settings}")(SHAPE, classes, RowRng.from_ids(0, ["m"]))


def expected(x):
    flat = x.flatten(1).double()
    places = torch.arange(flat.shape[1], dtype=torch.float64)
    weight = torch.stack([torch.cos(1 + places + 10 * j) for j in range(3)])
    return flat @ weight.T / 4


def test_logits_probabilities_and_labels(service):
    x = torch.rand(70, *SHAPE)
    right = expected(x)
    torch.testing.assert_close(model(f"{service}/logits")(x).double(), right, rtol=1e-5, atol=1e-6)
    logs = model(f"{service}/probabilities")(x).double()
    torch.testing.assert_close(logs, right.log_softmax(1), rtol=1e-4, atol=1e-5)
    one_hot = model(f"{service}/labels")(x)
    assert torch.equal(one_hot, torch.nn.functional.one_hot(right.argmax(1), 3).float())


@pytest.mark.slow
def test_every_sample_counts_once_however_often_it_was_sent():
    """60 requests and more: every 50th fails, and those that come too fast are refused."""
    with served(least=0.002) as url:
        asked = model(f"{url}/logits", f"{FAST},batch=4,retries=12")
        for _ in range(60):
            answer = asked(torch.rand(4, *SHAPE))
            assert answer.shape == (4, 3)
        told = counts(url)
    assert asked.answered == told["answered"] == 240
    assert asked.requests == told["requests"] == 60 + asked.retried
    assert asked.retried == told["failed"] + told["limited"]
    assert told["failed"] >= 1


def test_requests_keep_to_the_rate(service):
    asked = model(f"{service}/logits", f"{FAST},batch=1,rate=100")
    began = time.monotonic()
    asked(torch.rand(21, *SHAPE))
    assert time.monotonic() - began >= 20 / 100


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("four", r"logits \[2, 4\] for 2 samples; expected \[2, 3\]"),
        ("nan", "NaN or infinity for 2 of 2 samples"),
        ("words", "answers no JSON"),
        ("empty", "an object with 'result'; expected an object with one of logits, probabilities, labels"),
        ("short", r"logits \[1, 3\] for 2 samples"),
        ("ragged", "no array of numbers"),
        ("wrong", "labels that are no whole numbers from 0 to 2"),
        ("negative", "negative or do not sum to 1"),
    ],
)
def test_answers_that_are_none_are_refused_in_words_and_not_counted(service, path, words):
    asked = model(f"{service}/{path}")
    with pytest.raises(BadModel, match=words):
        asked(torch.rand(2, *SHAPE))
    assert asked.answered == 0


def test_a_service_that_is_down_ends_the_run_after_its_retries(service):
    asked = model(f"{service}/down", f"{FAST},retries=2")
    with pytest.raises(RunInterrupted, match=r"did not answer in 3 tries \(the last: status 503\); 0 samples"):
        asked(torch.rand(2, *SHAPE))
    assert (asked.answered, asked.requests, asked.retried) == (0, 3, 2)
    with pytest.raises(RunInterrupted, match="did not answer in 1 tries"):
        model("http://127.0.0.1:9/nobody", f"{FAST},retries=0")(torch.rand(1, *SHAPE))


def test_the_key_is_sent_and_told_to_nobody(service, monkeypatch):
    x = torch.rand(1, *SHAPE)
    monkeypatch.setenv("SERVICE_KEY", "s3cret")
    for settings in ("key=SERVICE_KEY", "key=SERVICE_KEY,header=X-Key"):
        asked = model(f"{service}/secret", f"{FAST},{settings}")
        assert asked(x).shape == (1, 3)
        assert "s3cret" not in f"{asked!r}{asked.describe()}{MODELS.spec(asked.service)}{pickle.dumps(asked)!r}"
    monkeypatch.setenv("SERVICE_KEY", "other-key")
    with pytest.raises(BadModel, match=r"refuses the request \(status 401\): bad key Bearer \*\*\*") as refused:
        model(f"{service}/secret", f"{FAST},key=SERVICE_KEY")(x)
    assert "other-key" not in str(refused.value)
    long = "other/" + "key" * 70  # longer than what a message shows of an answer
    monkeypatch.setenv("SERVICE_KEY", long)
    with pytest.raises(BadModel, match=r"bad key Bearer \*\*\*") as refused:
        model(f"{service}/secret", f"{FAST},key=SERVICE_KEY")(x)
    assert long[:20] not in str(refused.value)
    monkeypatch.delenv("SERVICE_KEY")
    with pytest.raises(UsageError, match="the environment variable SERVICE_KEY is not set"):
        model(f"{service}/secret", f"{FAST},key=SERVICE_KEY")(x)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("http:nowhere", "expected http://HOST/PATH"),
        ("http:http://user:word@host/x", "put a key into an environment variable"),
        ("http://host/x,batch=0", "batch is 0; expected"),
        ("http://host/x,retries=-1", "retries is -1; expected"),
        ("http://host/x,timeout=0", "timeout is 0.0; expected"),
        ("http://host/x,rate=-1", "rate is -1.0; expected"),
    ],
)
def test_settings_out_of_range_are_refused(spec, words):
    with pytest.raises(UsageError, match=words):
        MODELS.build(spec)


def test_addresses_are_specs_and_never_a_files_choice():
    for spec, url in (
        ("http://host:80/path", "http://host:80/path"),
        ("https://host/path,batch=3", "https://host/path"),
        ("http:https://host/path", "https://host/path"),
    ):
        part = MODELS.build(spec)
        assert part.url == url
        assert MODELS.build(MODELS.spec(part)) == part
        assert outside(spec)
        assert not own_architecture(spec)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(MissingExtra, match=r"advkit\[http\]"):
        model("http://127.0.0.1:9/x")(torch.rand(1, *SHAPE))


def test_it_travels_without_its_connection(service):
    asked = model(f"{service}/logits")
    x = torch.rand(2, *SHAPE)
    answer = asked(x)
    assert torch.equal(pickle.loads(pickle.dumps(asked))(x), answer)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["logits", "probabilities", "labels"])
def test_a_front_is_trained_before_a_service_and_no_query_is_lost_or_counted_twice(path):
    """Every 50th request fails and the rate is limited; what the server answered is what the log says."""
    answers = "answers=labels,votes=2,mu=0.5," if path == "labels" else ""
    defense = DEFENSES.build(
        f"zo_ae_ds:d_z=3,hidden=16,width=16,{answers}pretraining=[epochs=1,validation=0],"
        "recipe=[epochs=2,batch_size=16,validation=0]"
    )
    data = stripes(rows=16)
    with served(least=0.001) as url:
        asked = MODELS.build(f"{url}/{path},{FAST},retries=20,batch=4")(SHAPE, 3, RowRng.from_ids(0, ["m"]))
        chain = defense.around(asked, data, RowRng.from_ids(0, ["f"]))
        done = fit(chain, data, defense.objective(), defense.recipe, RowRng.from_ids(0, ["t"]), progress=False)
        told = counts(url)
    votes = 2 if path == "labels" else 1
    queries = 16 * 2 * 7 * votes + 16
    assert done.log[-1].figures[QUERIES] == asked.answered == told["answered"] == queries
    assert asked.retried == told["failed"] + told["limited"] > 0


def test_a_call_that_fails_in_the_middle_counts_what_was_answered():
    """Of a chunk in several requests those that were answered are paid, and counted."""
    defense = DEFENSES.build("zo_ds:q=1,width=4")
    data = stripes(rows=32)
    with served() as url:
        asked = MODELS.build(f"{url}/logits,{FAST},retries=0,batch=1")(SHAPE, 3, RowRng.from_ids(0, ["m"]))
        chain = defense.around(asked, data, RowRng.from_ids(0, ["f"]))
        with pytest.raises(RunInterrupted, match="49 samples were answered"):
            chain(torch.rand(64, *SHAPE))
        assert chain.queries.spent == asked.answered == counts(url)["answered"] == 49


def test_an_evaluation_says_what_the_service_answered():
    """Its own count, and the server's, of everything: checks before the run, attack and verdicts."""
    data = stripes(rows=6)
    y = expected(data.x).argmax(1)
    with served() as url:
        asked = model(f"{url}/probabilities")
        report = advkit.evaluate(
            attack="square:queries=4", model=asked, task=(data.x, y), threat_model="linf:eps=0.1", defense="none"
        )
        told = counts(url)
    assert report.to_dict()["model"]["queries"] == {"answered": told["answered"], "retried": told["failed"]}
    assert report.metrics["clean_accuracy"]["value"] == 1.0


def test_processes_would_count_and_hurry_apart(service):
    data = stripes(rows=6)
    settings = {"task": (data.x, data.y), "threat_model": "linf:eps=0.1", "defense": "none"}
    with pytest.raises(UsageError, match="a service's rate is kept, in one process: use --workers 1"):
        advkit.evaluate(attack="square:queries=4", model=model(f"{service}/logits"), workers=2, **settings)


@pytest.mark.slow
def test_the_training_report_says_what_was_asked_and_what_was_sent_again(digits, tmp_path):
    rows = len(digits.training())
    with served() as url:
        url += "/labels"
        made = train_victim(
            f"{url},{FAST}",
            "zo_ds:q=1,width=8,answers=labels,votes=1,mu=1,recipe=[epochs=1,validation=0,batch_size=256]",
            digits,
            out=tmp_path,
        )
        told = counts(url.removesuffix("/labels"))
    assert made["queries"]["answered"] == told["answered"] == rows * 3
    assert made["queries"]["retried"] == told["failed"] > 0
    assert json.loads((tmp_path / "training.json").read_text())["queries"] == made["queries"]
