"""Evaluations under speed switches: nothing that a fast view believes counts before the model itself says so."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import advkit.core.speed as speeds
from advkit.benchmark import our_run
from advkit.core.errors import SpecError, StaleRun, UsageError
from advkit.core.protocols import Outcome
from advkit.evaluation import api
from advkit.evaluation.counts import count
from advkit.evaluation.execute import run
from advkit.evaluation.run import batch as playing
from advkit.evaluation.run import speed as fast
from advkit.evaluation.run.case import digest_of
from advkit.evaluation.run.engine import open_store
from advkit.evaluation.run.speed import planned_passes
from advkit.evaluation.run.store import read_examples
from advkit.models.torch import TorchModel
from advkit.threat_models.transfer import Transfer

EPS = "linf:eps=0.1"


@pytest.fixture
def boundary(digits, digits_module):
    """Logits around 64, where neighbours in bf16 lie half a unit apart: near the boundary bf16 decides by rounding."""
    module = copy.deepcopy(digits_module)
    with torch.no_grad():
        module[-1].bias += 64
    return TorchModel(module, space=digits.space, classes=10, name="digits-boundary")


@pytest.fixture(scope="module")
def convolution(digits):
    """A small convolutional reader of digits with random features and a trained last layer."""
    data = digits.training()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        features = nn.Sequential(nn.Unflatten(1, (1, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Flatten())
        if data.x.ndim == 4:
            features = features[1:]
        last = nn.Linear(16 * 64, 10)
        with torch.no_grad():
            seen = features(data.x)
        optimizer = torch.optim.Adam(last.parameters(), lr=1e-2)
        for _ in range(60):
            loss = nn.functional.cross_entropy(last(seen), data.y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for parameter in last.parameters():
        parameter.grad = None
    return TorchModel(nn.Sequential(*features, last).eval(), space=digits.space, classes=10, name="digits-conv")


def case_of(task, model, attack="pgd:steps=10", speed="bf16", **more):
    threat = more.pop("threat_model", EPS)
    return api.resolve(attack, "none", task, model, threat, device="cpu", speed=speed, **more)


def play(case, folder, workers=1):
    store = open_store(case, folder)
    try:
        run(case, store, workers=workers)
    finally:
        store.close()
    return api.in_order(case, list(store))


def robust(records):
    found = count(records)
    return found.robust / found.n


def refuted(record):
    return "refuted_bf16" in record.notes


def test_full_precision_keeps_its_digest(digits, digits_model):
    plain = case_of(digits, digits_model, speed="fp32", n=20)
    config = plain.config()
    assert set(config["specs"]) == {"attack", "defense", "task", "model", "threat_model", "goal"}
    assert "speed" not in json.dumps({k: v for k, v in config.items() if k != "specs"})
    assert case_of(digits, digits_model, speed="fp32+fp32", n=20).digest() == plain.digest()
    quick = case_of(digits, digits_model, speed="compile+bf16", n=20)
    assert quick.config() == {**config, "specs": {**config["specs"], "speed": "bf16+compile"}}
    assert quick.digest() == digest_of(quick.config()) != plain.digest()
    assert replace(plain, speed=quick.speed).digest() == quick.digest()


def test_refuted_rows_get_what_full_precision_gives(digits, boundary, tmp_path):
    plain = play(case_of(digits, boundary, speed="fp32", n=200), tmp_path / "fp32")
    quick = play(case_of(digits, boundary, n=200, keep=200), tmp_path / "bf16")
    wrong = [(a, b) for a, b in zip(plain, quick, strict=True) if refuted(b)]
    assert len(wrong) >= 5
    for a, b in wrong:
        assert (a.outcome, a.adversarial, a.margin, a.distance) == (b.outcome, b.adversarial, b.margin, b.distance)
        assert b.forwards > a.forwards  # both runs are paid for
        assert b.backwards > a.backwards
        assert b.queries == a.queries
    assert {r.outcome for r in quick if refuted(r)} >= {Outcome.BROKEN, Outcome.ROBUST}
    assert [r.outcome == Outcome.WRONG for r in plain] == [r.outcome == Outcome.WRONG for r in quick]
    assert robust(quick) <= robust(plain)

    shown = read_examples(tmp_path / "bf16")
    for record in quick:
        if record.outcome == Outcome.BROKEN:
            origin, adversarial = shown[f"{record.attack}|{record.id}"]
            assert (adversarial - origin).abs().max() <= 0.1 + 1e-6
            with torch.no_grad():
                assert int(boundary.module(adversarial[None]).argmax()) == record.adversarial != record.label


def test_unchecked_low_precision_would_overstate(digits, boundary, tmp_path, monkeypatch):
    checked = play(case_of(digits, boundary, n=200), tmp_path / "a")

    def never(*given):
        return torch.zeros(len(given[-1]), dtype=torch.bool), torch.full((len(given[-1]),), torch.nan)

    monkeypatch.setattr(playing, "_believed", never)
    believed = play(case_of(digits, boundary, n=200), tmp_path / "b")
    assert not any(refuted(r) for r in believed)
    assert robust(believed) > robust(checked)


@pytest.mark.slow
@pytest.mark.parametrize("attack", ["pgd:steps=10", pytest.param("lean", marks=pytest.mark.slow), "square:queries=40"])
def test_records_do_not_depend_on_batch_size(digits, boundary, tmp_path, attack):
    found = [
        play(case_of(digits, boundary, attack, n=40, batch_size=size), tmp_path / str(size)) for size in (7, 1, 64)
    ]
    assert any(r.outcome == Outcome.BROKEN for r in found[0])
    assert any(refuted(r) for r in found[0])
    for other in found[1:]:
        assert other == found[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "speed",
    [
        pytest.param("bf16", marks=pytest.mark.slow),
        "channels_last",
        pytest.param("bf16+channels_last", marks=pytest.mark.slow),
    ],
)
def test_convolutions_do_not_depend_on_batch_size(digits, convolution, tmp_path, monkeypatch, speed):
    monkeypatch.setattr(speeds, "GAIN", float("inf"))  # any layout counts as faster
    monkeypatch.setattr(fast, "_settled", {})
    found = [
        play(case_of(digits, convolution, speed=speed, n=64, batch_size=size), tmp_path / str(size))
        for size in (1, 7, 64)
    ]
    assert any(r.outcome == Outcome.BROKEN for r in found[0])
    assert found[1] == found[0]
    assert found[2] == found[0]
    kept = json.loads((tmp_path / "7" / "records.speed.json").read_text())
    assert kept in ({"victim": speed}, {"victim": speed.replace("+channels_last", "")}, {"victim": "fp32"})


@pytest.mark.slow
def test_a_resumed_run_computes_as_it_began(digits, convolution, tmp_path, monkeypatch):
    """Whether a layout is faster may look otherwise tomorrow; the run folder remembers."""
    monkeypatch.setattr(speeds, "GAIN", float("inf"))
    monkeypatch.setattr(fast, "_settled", {})
    case = case_of(digits, convolution, speed="channels_last", n=40, batch_size=10)
    whole = play(case, tmp_path)
    kept = (tmp_path / "records.speed.json").read_text()
    lines = (tmp_path / "records.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "records.jsonl").write_text("".join(lines[:17]))
    monkeypatch.setattr(speeds, "GAIN", 0.0)  # no layout counts as faster
    monkeypatch.setattr(fast, "_settled", {})
    assert play(case, tmp_path) == whole
    assert (tmp_path / "records.speed.json").read_text() == kept
    with pytest.raises(StaleRun, match="specs"):
        open_store(replace(case, speed=speeds.Speed()), tmp_path)
    (tmp_path / "records.speed.json").write_text('{"victim": "warp"}')
    with pytest.raises(StaleRun, match="damaged"):
        play(case, tmp_path)


@pytest.mark.slow
def test_workers_write_the_same_records(digits, boundary, tmp_path):
    case = case_of(digits, boundary, n=60, batch_size=16)
    assert play(case, tmp_path / "two", workers=2) == play(case, tmp_path / "one")


def test_the_model_is_given_back_untouched(digits, boundary, tmp_path):
    module = boundary.module
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    places = {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
    flags = [p.requires_grad for p in module.parameters()]
    state = torch.random.get_rng_state()
    play(case_of(digits, boundary, n=20), tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [p.requires_grad for p in module.parameters()] == flags
    assert all(p.grad is None for p in module.parameters())
    assert not any(m.training or m._forward_hooks or m._compiled_call_impl for m in module.modules())
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.data_ptr() == places[name]


class Watched(nn.Module):
    """Remembers in which types it was asked."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.seen = []

    def forward(self, x):
        answer = self.inner(x)
        self.seen.append((answer.dtype, x.requires_grad))
        return answer


def test_verdicts_and_checks_are_full_precision(digits, digits_module):
    watched = Watched(copy.deepcopy(digits_module)).eval()
    report = api.evaluate("pgd:steps=3", "none", digits, watched, EPS, n=30, speed="bf16", device="cpu", beside=False)
    assert {dtype for dtype, _ in watched.seen} == {torch.float32, torch.bfloat16}
    data = report.to_dict()
    assert data["reproducibility"]["speed"] == {"asked": "bf16", "kept": {"records": {"victim": "bf16"}}}
    assert data["reproducibility"]["dtype"] == "float32"
    (flag,) = (f for f in data["diagnostics"]["flags"] if f["id"] == "low_precision")
    assert flag["severity"] == "info"
    assert flag["value"] == 0
    assert "speed bf16" in " ".join(line for line, _ in report.full())
    assert report.trustworthy


def test_transfer_speeds_up_the_surrogate_alone(digits, digits_module, tmp_path):
    surrogate, victim = (Watched(copy.deepcopy(digits_module)).eval() for _ in range(2))
    models = [
        TorchModel(m, space=digits.space, classes=10, name=n) for m, n in ((surrogate, "mine"), (victim, "theirs"))
    ]
    case = case_of(digits, models[1], n=30, threat_model=Transfer(eps=0.1, sources=(models[0],)))
    surrogate.seen.clear()
    victim.seen.clear()
    records = play(case, tmp_path)
    assert {dtype for dtype, _ in victim.seen} == {torch.float32}
    assert torch.bfloat16 in {dtype for dtype, _ in surrogate.seen}
    assert json.loads((tmp_path / "records.speed.json").read_text()) == {"mine": "bf16"}
    assert not any(refuted(r) for r in records)
    assert any(r.outcome == Outcome.BROKEN for r in records)


def test_an_attackers_view_is_what_is_sped_up(digits, digits_module, tmp_path):
    class Defended(TorchModel):
        def attacker_view(self):
            return smooth

    smooth = TorchModel(Watched(copy.deepcopy(digits_module)).eval(), space=digits.space, classes=10)
    defended = Defended(Watched(copy.deepcopy(digits_module)).eval(), space=digits.space, classes=10)
    records = play(case_of(digits, defended, n=30), tmp_path)
    assert {dtype for dtype, _ in defended.module.seen} == {torch.float32}
    assert torch.bfloat16 in {dtype for dtype, _ in smooth.module.seen}
    assert any(r.outcome == Outcome.BROKEN for r in records)


class Large(nn.Module):
    """Passes through values beyond the range of fp16 where pixels are bright."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.up = nn.Linear(64, 64, bias=False)
        with torch.no_grad():
            self.up.weight.copy_(torch.eye(64) * 65000)

    def forward(self, x):
        return self.inner((self.up(1.1 * x.flatten(1)) / 65000).float())


def test_overflow_of_the_view_is_no_fault_of_the_model(digits, digits_module, tmp_path, monkeypatch):
    """A pixel at 1 becomes 71500 on the way, which fp16 has not: the view answers NaN where the model answers well."""
    monkeypatch.setattr(speeds, "steady", lambda *_: True)
    model = TorchModel(Large(copy.deepcopy(digits_module)).eval(), space=digits.space, classes=10)
    plain = play(case_of(digits, model, speed="fp32", n=40), tmp_path / "a")
    quick = play(case_of(digits, model, speed="fp16", n=40), tmp_path / "b")
    again = [(a, b) for a, b in zip(plain, quick, strict=True) if "again_in_fp32" in b.notes]
    assert len(again) >= 10
    for a, b in again:
        assert (a.outcome, a.margin) == (b.outcome, b.margin)
        assert b.backwards > a.backwards
    assert not any(r.outcome in (Outcome.NON_FINITE, Outcome.ERROR) for r in quick)


def test_queries_of_a_limited_attacker_stay_within_the_budget(digits, boundary, tmp_path):
    records = play(
        case_of(digits, boundary, "square:queries=40", threat_model="linf:eps=0.1,access=scores,queries=40", n=100),
        tmp_path,
    )
    again = [r for r in records if refuted(r)]
    assert again
    assert all(r.queries <= 40 for r in records)
    assert any(r.forwards > 40 for r in again)


def test_planned_passes_are_counted_from_the_settings(digits, digits_model):
    from advkit.attacks import ATTACKS

    expected = {
        "pgd:steps=40,restarts=2,eot=3": 240,
        "apgd-t:steps=100,targets=9": 900,
        "square:queries=500": 500,
        "fgsm": 1,
        "autoattack": 100 + 900 + 900 + 5000,
        "beast:k=3,length=4": 1 + 3 + 3 * 9,
        "beast:k=3,length=4,evaluations=20": 20,
        "gcg:steps=3,width=10": 1 + 3 * 12,
        "random_suffix:evaluations=9": 9,
    }
    assert {spec: planned_passes(ATTACKS.build(spec)) for spec in expected} == expected
    assert 100 < planned_passes(ATTACKS.build("lean")) < planned_passes(ATTACKS.build("thorough")) < 6900


def test_the_benchmark_counts_passes_of_copies(digits, convolution, monkeypatch):
    monkeypatch.setattr(speeds, "GAIN", float("inf"))
    monkeypatch.setattr(fast, "_settled", {})
    plain = our_run(case_of(digits, convolution, speed="fp32", n=32))
    quick = our_run(case_of(digits, convolution, speed="channels_last", n=32))
    assert quick.backwards >= 0.9 * plain.backwards > 0
    assert quick.forwards > plain.forwards  # and the passes of the probe


def test_the_command_line_says_what_it_does_not_know():
    from advkit.cli.group import app

    result = CliRunner().invoke(app, ["evaluate", "--speed", "bf17", "--task", "digits", "-n", "4"])
    assert isinstance(result.exception, SpecError) or result.exit_code == 2


@pytest.mark.slow
def test_the_command_line_runs_and_resumes(tmp_path):
    from advkit.cli.group import app

    words = ["evaluate", "--attack", "pgd:steps=3", "--task", "digits", "--model", "zoo:digits-mlp", "-n", "12"]
    words += ["--speed", "bf16", "--device", "cpu", "--no-plots", "--out", str(tmp_path / "run")]
    first, second = (CliRunner().invoke(app, words) for _ in range(2))
    assert first.exit_code == second.exit_code == 0
    assert "speed bf16" in first.output
    again = CliRunner().invoke(app, ["rerun", str(tmp_path / "run")])
    assert again.exit_code == 0
    assert "12 of 12 records are identical" in again.output


@pytest.mark.slow
def test_a_compiled_search_gives_the_same_rows(digits, convolution, tmp_path, monkeypatch):
    monkeypatch.setattr(speeds, "BREAK_EVEN", 0)
    monkeypatch.setattr(fast, "_settled", {})
    plain = play(case_of(digits, convolution, speed="fp32", n=64), tmp_path / "a")
    quick = [
        play(case_of(digits, convolution, speed="compile", n=64, batch_size=b), tmp_path / str(b)) for b in (7, 64)
    ]
    assert json.loads((tmp_path / "7" / "records.speed.json").read_text()) == {"victim": "compile"}
    assert quick[0] == quick[1]
    assert [r.outcome for r in quick[0]] == [r.outcome for r in plain]
    assert convolution.module._compiled_call_impl is None


def test_too_many_precisions_never_reach_a_model(digits):
    with pytest.raises(UsageError, match="two precisions"):
        api.evaluate(task=digits, speed="bf16+fp16")
