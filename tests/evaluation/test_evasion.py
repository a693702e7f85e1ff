"""The harness on small victims: what it counts, what it refuses, what it names."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from advkit.core.errors import BadInput, BadModel, StaleRun, UsageError
from advkit.core.protocols import Access, Outcome
from advkit.evaluation import api
from advkit.evaluation.counts import count
from advkit.evaluation.execute import run
from advkit.evaluation.run.engine import open_store
from advkit.evaluation.run.store import Store, read_records
from advkit.models.torch import TorchModel

EPS = "linf:eps=0.1"


def play(case, folder):
    store = open_store(case, folder)
    try:
        run(case, store)
    finally:
        store.close()
    return api.in_order(case, list(store))


def case_of(task, model, attack="pgd:steps=10", **more):
    return api.resolve(attack, "none", task, model, more.pop("threat_model", EPS), device="cpu", **more)


@pytest.mark.slow
@pytest.mark.parametrize("attack", ["fgsm", "pgd:steps=10,restarts=2", "apgd-ce:steps=10", "square:queries=60"])
def test_records_do_not_depend_on_batch_size(digits, digits_model, tmp_path, attack):
    found = [
        play(case_of(digits, digits_model, attack, n=100, batch_size=size), tmp_path / str(size))
        for size in (1, 7, 64, 1000)
    ]
    assert any(r.outcome == Outcome.BROKEN for r in found[0])
    assert any(r.outcome == Outcome.ROBUST for r in found[0])
    for other in found[1:]:
        assert other == found[0]


def test_pgd_passes_equal_the_hand_count(digits, digits_model, tmp_path):
    records = play(case_of(digits, digits_model, "pgd:steps=40,stop=false", n=60), tmp_path)
    for record in records:
        attacked = record.outcome != Outcome.WRONG
        assert (record.forwards, record.backwards) == ((41, 40) if attacked else (0, 0))


def test_pgd_stops_at_the_first_success(digits, digits_model, tmp_path):
    whole = play(case_of(digits, digits_model, "pgd:steps=20,stop=false", n=100), tmp_path / "a")
    early = play(case_of(digits, digits_model, "pgd:steps=20", n=100), tmp_path / "b")
    assert [r.outcome for r in whole] == [r.outcome for r in early]
    for record in early:
        if record.outcome == Outcome.ROBUST:
            assert (record.forwards, record.backwards) == (21, 20)
        if record.outcome == Outcome.BROKEN:
            assert 1 <= record.backwards <= 20
            assert record.forwards in (record.backwards, record.backwards + 1)
    assert sum(r.backwards for r in early) < sum(r.backwards for r in whole)


class NaNOffData(nn.Module):
    """Answers NaN wherever a pixel is no multiple of 1/16."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        off = ((x * 16 - (x * 16).round()).abs() > 1e-3).flatten(1).any(1)
        return torch.where(off[:, None], torch.nan, self.inner(x))


class Rounded(nn.Module):
    """Sees its input on nine levels: no gradient passes."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner((x * 8).round() / 8)


class Noisy(nn.Module):
    """Adds noise to every input."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x + 0.3 * torch.randn_like(x))


@dataclass(frozen=True, kw_only=True)
class Leaves:
    """Hands in points twice as far away as allowed."""

    needs: ClassVar[Access] = Access.NOTHING

    def __call__(self, oracle, x, goal, ball, rng, /):
        return (x + 2 * ball.eps * torch.where(x > 0.5, -1.0, 1.0)).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class Fails:
    """Raises on the rows whose first pixel sum is odd, a pure function of the row."""

    needs: ClassVar[Access] = Access.NOTHING

    def __call__(self, oracle, x, goal, ball, rng, /):
        if ((x * 16).flatten(1).sum(1).round() % 2 == 1).any():
            raise RuntimeError("no such luck")
        return x


def flags_of(report):
    return {flag["id"]: flag["severity"] for flag in report.to_dict()["diagnostics"]["flags"]}


def test_nan_victim_is_named(digits, digits_module):
    report = api.evaluate("pgd:steps=5", task=digits, model=NaNOffData(digits_module).eval(), threat_model=EPS, n=50)
    assert flags_of(report).get("nonfinite_gradient") == "unreliable"
    metrics = report.to_dict()["metrics"]
    assert metrics["robust_accuracy"]["numerator"] == 0
    assert metrics["robust_accuracy_upper"]["numerator"] == metrics["clean_accuracy"]["numerator"] > 40
    assert metrics["attack_success_rate"]["numerator"] == 0


def test_zero_gradient_victim_is_named(digits, digits_module):
    report = api.evaluate("pgd:steps=5", task=digits, model=Rounded(digits_module).eval(), threat_model=EPS, n=50)
    assert flags_of(report).get("zero_gradient") == "unreliable"


@pytest.mark.parametrize("name", ["gradient-stopping", "softmax-saturated", "logits-x-1000", "winners-take-all"])
def test_broken_defenses_end_in_a_report(digits, digits_module, name):
    from advkit.testing.broken import BROKEN

    report = api.evaluate("pgd:steps=3", task=digits, model=BROKEN[name](digits_module).eval(), threat_model=EPS, n=30)
    flags = flags_of(report)
    if name == "gradient-stopping":
        assert flags["zero_gradient"] == "unreliable"
    if name == "softmax-saturated":
        assert "probability_output" in flags


def test_random_victim_is_named(digits, digits_module):
    before = torch.random.get_rng_state()
    report = api.evaluate("pgd:steps=5", task=digits, model=Noisy(digits_module).eval(), threat_model=EPS, n=50)
    assert "randomized_output" in flags_of(report)
    assert report.to_dict()["protocol"]["n_eval_repeats"] == 10
    assert torch.equal(before, torch.random.get_rng_state())


def test_an_attack_outside_its_ball_never_wins(digits, digits_model):
    report = api.evaluate(Leaves(), task=digits, model=digits_model, threat_model=EPS, n=50)
    assert flags_of(report).get("budget_violation") == "unreliable"
    metrics = report.to_dict()["metrics"]
    assert metrics["attack_success_rate"]["numerator"] == 0
    assert metrics["robust_accuracy"]["numerator"] == metrics["clean_accuracy"]["numerator"]


def test_a_row_that_raises_is_recorded_and_the_others_go_on(digits, digits_model, tmp_path):
    records = play(case_of(digits, digits_model, Fails(), n=64), tmp_path)
    outcomes = Counter(r.outcome for r in records)
    assert outcomes[Outcome.ERROR] > 10
    assert outcomes[Outcome.ROBUST] > 10
    assert {r.message for r in records if r.outcome == Outcome.ERROR} == {"RuntimeError: no such luck"}


def test_identity_of_accuracy_and_success_rate(digits, digits_model, tmp_path):
    c = count(play(case_of(digits, digits_model, n=120), tmp_path))
    assert (c.n, c.correct) == (120, c.robust + c.broken)


@pytest.mark.slow
def test_resume_after_a_cut_line(digits, digits_model, tmp_path):
    case = case_of(digits, digits_model, n=90, batch_size=16)
    whole = play(case, tmp_path / "whole")
    folder = tmp_path / "cut"
    play(case, folder)
    raw = (folder / "records.jsonl").read_bytes()
    (folder / "records.jsonl").write_bytes(raw[: len(raw) // 2])
    assert play(case, folder) == whole
    assert (folder / "records.jsonl").read_bytes() == raw


def test_another_case_in_the_folder_is_refused(digits, digits_model, tmp_path):
    play(case_of(digits, digits_model, n=10), tmp_path)
    with pytest.raises(StaleRun, match="seed"):
        play(case_of(digits, digits_model, n=10, seed=1), tmp_path)


def test_unwritable_folder(digits, digits_model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="can't be written"):
        play(case_of(digits, digits_model, n=10), tmp_path / "file" / "run")


def test_refuses_what_gives_no_number(digits, digits_module):
    first = next(iter(digits.batches(32)))
    x, y = first.x, first.labels
    quick = {"attack": "fgsm", "threat_model": EPS}
    with pytest.raises(BadInput, match="255"):
        api.evaluate(task=(x * 255, y), model=digits_module, **quick)
    broken = x.clone()
    broken[3, 0, 2, 2] = torch.nan
    with pytest.raises(BadInput, match="NaN"):
        api.evaluate(task=(broken, y), model=digits_module, **quick)
    with pytest.raises(BadInput, match="label"):
        api.evaluate(task=(x, y - 5), model=digits_module, **quick)
    with pytest.raises(BadModel, match="classes"):
        api.evaluate(task=digits, model=nn.Sequential(nn.Flatten(), nn.Linear(64, 7)).eval(), **quick)
    with pytest.raises(BadModel, match="training mode"):
        api.evaluate(task=digits, model=nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(64, 10)).train(), **quick)
    with pytest.raises(UsageError, match="gradients"):
        api.evaluate(task=digits, model=digits_module, attack="pgd", threat_model="linf:eps=0.1,access=scores")
    with pytest.raises(UsageError, match="8/255"):
        api.evaluate(task=digits, model=digits_module, attack="pgd", threat_model="linf:eps=8")


def test_model_and_generator_come_back_untouched(digits, digits_module):
    state = {k: v.clone() for k, v in digits_module.state_dict().items()}
    live = [p.requires_grad for p in digits_module.parameters()]
    generator = torch.random.get_rng_state()
    api.evaluate("pgd:steps=3", task=digits, model=digits_module, threat_model=EPS, n=20)
    assert all(torch.equal(v, digits_module.state_dict()[k]) for k, v in state.items())
    assert [p.requires_grad for p in digits_module.parameters()] == live
    assert all(p.grad is None for p in digits_module.parameters())
    assert torch.equal(generator, torch.random.get_rng_state())
    assert not digits_module.training


def test_targeted_rate_has_its_own_denominator(digits, digits_model):
    report = api.evaluate(
        "pgd:steps=20", task=digits, model=digits_model, threat_model="linf:eps=0.3", goal="targeted:how=next", n=60
    )
    rate = report.to_dict()["metrics"]["attack_success_rate"]
    assert rate["denominator_kind"] == "clean_not_target"
    assert 0 < rate["numerator"] <= rate["denominator"]


def test_transfer_never_asks_the_victim(digits, digits_model, digits_module, tmp_path):
    asked = []

    class Victim(TorchModel):
        def __call__(self, x):
            asked.append(not torch.is_grad_enabled())
            return super().__call__(x)

    torch.manual_seed(3)
    surrogate = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    from advkit.threat_models.transfer import Transfer

    victim = Victim(digits_module, space=digits.space, classes=10)
    case = case_of(
        digits, victim, n=40, threat_model=Transfer(eps=0.1, sources=(TorchModel(surrogate, name="mine", classes=10),))
    )
    records = play(case, tmp_path)
    assert all(asked), "the victim is asked for verdicts only, never for gradients"
    assert {r.backwards for r in records if r.forwards} == {10}


def test_store_refuses_a_record_twice(tmp_path, digits, digits_model):
    case = case_of(digits, digits_model, n=5)
    records = play(case, tmp_path)
    store = Store(tmp_path, case.config())
    with pytest.raises(ValueError, match="already"):
        store.append(records[:1])
    store.close()


@pytest.mark.slow
def test_kill_9_and_resume_equals_uninterrupted(tmp_path):
    command = [
        sys.executable, "-m", "advkit", "evaluate", "--task", "fashion-mnist", "--defense", "pgd_at", "--only",
        "--attack", "pgd:steps=40,restarts=3", "--n", "300", "--batch-size", "10", "--no-plots", "--device", "cpu",
    ]  # fmt: skip
    env = {**os.environ, "ADVKIT_CACHE": str(tmp_path / "cache")}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run([*command, "--out", str(whole)], check=True, env=env, capture_output=True)
    first = subprocess.Popen(
        [*command, "--out", str(cut)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for _ in range(600):
        if (cut / "records.jsonl").exists() and (cut / "records.jsonl").stat().st_size:
            break
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = len(read_records(cut / "records.jsonl"))
    assert 0 < done < 300
    subprocess.run([*command, "--out", str(cut)], check=True, env=env, capture_output=True)
    assert (cut / "records.jsonl").read_bytes() == (whole / "records.jsonl").read_bytes()
    a, b = (json.loads((f / "report.json").read_text()) for f in (whole, cut))
    assert a["metrics"] == b["metrics"]


@pytest.mark.slow
def test_two_workers_write_the_same_records(digits, digits_model, tmp_path):
    case = case_of(digits, digits_model, "apgd-ce:steps=10", n=100, batch_size=16)
    alone = play(case, tmp_path / "alone")
    store = open_store(case, tmp_path / "crew")
    run(case, store, workers=2)
    store.close()
    assert (tmp_path / "crew" / "records.jsonl").read_bytes() == (tmp_path / "alone" / "records.jsonl").read_bytes()
    assert len(alone) == 100


def children_of(process: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks up processes in /proc")
def test_workers_end_when_their_parent_is_killed(tmp_path):
    command = [
        sys.executable, "-m", "advkit", "evaluate", "--task", "digits", "--attack", "pgd:steps=5000,restarts=50",
        "--workers", "2", "--batch-size", "16", "--only", "--no-plots", "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    crew: list[int] = []
    for _ in range(600):
        time.sleep(0.1)
        # two workers, and the process that keeps track of what they share
        if run.poll() is None and len(crew := children_of(run.pid)) >= 3:
            break
    assert len(crew) >= 3
    time.sleep(8)
    run.send_signal(signal.SIGKILL)
    run.wait()
    for _ in range(200):
        if not any(Path(f"/proc/{worker}").exists() for worker in crew):
            break
        time.sleep(0.1)
    assert not any(Path(f"/proc/{worker}").exists() for worker in crew)


def test_what_cannot_travel_to_workers_is_refused(digits, digits_module, tmp_path):
    from advkit.models.torch import FunctionModel

    case = case_of(digits, FunctionModel(lambda x: digits_module(x), classes=10), "fgsm", n=10)
    store = open_store(case, tmp_path)
    with pytest.raises(UsageError, match="workers 1"):
        run(case, store, workers=2)
    store.close()


def test_out_of_memory_halves_the_batch(digits, digits_model, tmp_path, monkeypatch):
    from advkit.evaluation.run import engine

    real, sizes = engine.attacked, []

    def tight(case, batch, lanes):
        sizes.append(len(batch.ids))
        if len(batch.ids) > 16:
            raise torch.OutOfMemoryError("too much")
        return real(case, batch, lanes)

    monkeypatch.setattr(engine, "attacked", tight)
    case = case_of(digits, digits_model, n=40, batch_size=64)
    records = play(case, tmp_path / "tight")
    monkeypatch.undo()
    assert sizes[:3] == [40, 32, 16]
    assert records == play(replace(case, batch_size=64), tmp_path / "roomy")


def test_an_attack_of_ones_own_is_known_by_its_settings(digits, digits_model, tmp_path):
    @dataclass(frozen=True, kw_only=True)
    class Mine:
        needs: ClassVar[Access] = Access.NOTHING
        steps: int = 3
        weight: torch.Tensor | None = None

        def __call__(self, oracle, x, goal, ball, rng, /):
            return x

    ones = torch.ones(2)
    labels = {
        str(case_of(digits, digits_model, attack, n=5).label)
        for attack in (Mine(), Mine(steps=4), Mine(weight=ones), Mine(weight=2 * ones))
    }
    assert {"Mine", "Mine:steps=4"} < labels
    assert len(labels) == 4
    assert str(case_of(digits, digits_model, Mine(weight=ones.clone()), n=5).label) in labels
    play(case_of(digits, digits_model, Mine(), n=5), tmp_path)
    with pytest.raises(StaleRun):
        play(case_of(digits, digits_model, Mine(steps=4), n=5), tmp_path)


def test_a_request_that_no_row_can_meet_is_refused_before_anything_is_written(digits, digits_model, tmp_path):
    asked = []

    class Victim(TorchModel):
        def __call__(self, x):
            asked.append(len(x))
            return super().__call__(x)

    victim = Victim(digits_model.module, space=digits.space, classes=10)
    with pytest.raises(UsageError, match="logit"):
        api.evaluate("pgd:loss=logit", task=digits, model=victim, threat_model=EPS, n=20, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert (asked[0], len(asked)) == (4, 2), "the first call and a look at the first rows, no attack"
