"""What the benchmark counts and how it compares; the times themselves are never tested."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from advkit import benchmark as bench
from advkit.attacks import ATTACKS
from advkit.benchmark import Run, counted, goals, shapes, sides
from advkit.cli import main
from advkit.core.errors import UsageError

# Dispatcher operations per step as they are: a step may become cheaper, never dearer unnoticed.
OPS = {"pgd": 36.5, "apgd-ce": 47.8, "fab-t": 150, "square": 43.4}
SYNCS = {"pgd": 0, "apgd-ce": 0, "fab-t": 1, "square": 1}


@pytest.fixture(scope="module")
def ops():
    return bench.dispatcher_ops()


@pytest.mark.slow
@pytest.mark.parametrize("attack", OPS)
def test_steps_cost_no_more_operations_than_today(ops, attack):
    bare = ops["bare"]["forward" if attack == "square" else "forward_and_backward"]
    assert bare < ops["steps"][attack]["ops"] <= OPS[attack]
    assert ops["steps"][attack]["syncs"] <= SYNCS[attack]


def test_operations_are_counted_one_by_one():
    x = torch.rand(5)
    with bench.Ops() as ops:
        y = x + 1
        y.mul_(2)
        assert float(y.sum()) > 0
        y[x > 0.5]
    # add, mul_, sum, item; the mask is compared, and picking by it waits for its size
    assert ops.ops == 6
    assert ops.syncs == 2


def test_passes_are_rows_through_the_module():
    module = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    x = torch.rand(7, 2, 2)
    with counted(module) as passes:
        with torch.no_grad():
            module(x)
        leaf = x[:5].clone().requires_grad_()
        answer = module(leaf)
        for column in range(3):
            torch.autograd.grad(answer[:, column].sum(), leaf, retain_graph=True)
    module(x)
    assert (passes.forwards, passes.backwards, passes.calls) == (12, 15, 2)


def test_robust_accuracy_of_a_run():
    run = Run(1.0, 0, 0, 0, 10, frozenset("ab"), {"c": "apgd-ce", "d": "apgd-t", "e": "apgd-t"})
    assert run.robust_accuracy == 0.5
    assert run.to_dict()["felled_by"] == {"apgd-ce": 1, "apgd-t": 2}


def entry_of(monkeypatch, theirs, ours):
    """side_by_side of runs made up: broken rows per seed."""
    case = SimpleNamespace(n=10, specs={"threat_model": "linf:eps=0.1", "task": "made up"})
    monkeypatch.setattr(
        sides, "resolve", lambda attack, *_, seed, **__: SimpleNamespace(**vars(case), attack=attack, seed=seed)
    )

    def made(broken, seconds):
        return Run(seconds, 100, 50, 5, 10, frozenset("ab"), broken)

    monkeypatch.setattr(sides, "reference_run", lambda case: made(theirs[case.seed], 10.0 + case.seed))
    monkeypatch.setattr(sides, "our_run", lambda case: made(ours[case.seed], 2.0))
    return bench.side_by_side("zoo:made-up", ["lean"], n=10, repetitions=len(ours))


def test_missed_and_gained_rows(monkeypatch):
    entry = entry_of(
        monkeypatch,
        theirs=[{"c": "apgd-ce", "d": "square"}, {"c": "apgd-ce", "e": "fab-t"}],
        ours=[{"c": "one", "d": "one", "f": "two"}, {"c": "one", "d": "one", "e": "two"}],
    )
    suite = entry["suites"]["lean"]
    assert suite["missed"] == [{"row": "e", "our_seed": 0, "felled_by": "fab-t", "their_seeds": [1]}]
    assert suite["gained"] == [{"row": "f", "our_seed": 0, "felled_by": "two"}]
    assert suite["cpu_ratios"] == [5.0, 5.5]
    assert entry["reference"]["fooled_under_some_seeds_only"] == ["d", "e"]
    assert entry["clean_accuracy"] == pytest.approx(0.8)
    page = bench.markdown({"command": "advkit benchmark", "environment": bench.environment(), "suites": [entry]})
    assert ": e under our seed 0; broken by fab-t under their seeds 1" in page
    assert "| lean (revision 2) | 0.5 | 2.0 | 5.2 |" in page


def test_a_page_without_misses_says_so(monkeypatch):
    entry = entry_of(monkeypatch, theirs=[{"c": "apgd-ce"}], ours=[{"c": "one"}])
    page = bench.markdown({"command": "advkit benchmark", "environment": {}, "suites": [entry]})
    assert "None by any suite under any seed." in page


def test_the_reference_is_judged_by_us():
    """pyautoattack on a few digits: every row it breaks is wrong on the victim and inside the ball, stage by stage."""
    pytest.importorskip("pyautoattack")
    from advkit.evaluation.api import resolve

    case = resolve("pgd", "none", "digits", "zoo:digits-mlp", "linf:eps=0.3", n=8, seed=3, device="cpu")
    before = torch.get_rng_state()
    run = bench.reference_run(case)
    assert torch.equal(torch.get_rng_state(), before)
    assert run.rows == 8
    assert set(run.broken.values()) <= set(bench.STAGES)
    assert not run.wrong & set(run.broken)
    assert len(run.broken) >= 3
    assert run.forwards > run.backwards > 0
    ours = bench.our_run(resolve("lean", "none", "digits", "zoo:digits-mlp", "linf:eps=0.3", n=8, device="cpu"))
    assert ours.wrong == run.wrong
    assert set(ours.broken.values()) <= {stage.name for stage in ATTACKS.build("lean").stages()}
    assert set(run.broken) <= set(ours.broken)


@pytest.mark.slow
def test_overhead_of_a_loop():
    found = bench.pgd_overhead("zoo:digits-mlp", task="digits", sizes=(1, 20), steps=3, repetitions=1)
    assert [each["batch"] for each in found["loops"]] == [1, 20]
    assert all(each[side] > 0 for each in found["loops"] for side in ("direct", "evaluate", "padded"))
    page = bench.markdown({"command": "advkit benchmark", "environment": {}, "overhead": found})
    assert f"| zoo:digits-mlp | 1x8x8 | 3 | 20 | {found['loops'][1]['direct']:.2f} | " in page


@pytest.mark.slow
def test_overhead_on_an_architecture():
    (found,) = bench.pgd_overhead("mlp", sizes=(2,), steps=2, repetitions=1)["loops"]
    assert found["image"] == [3, 32, 32]
    assert found["evaluate"] > 0


@pytest.mark.slow
def test_what_a_record_costs_is_told_beside_what_it_cost(monkeypatch):
    monkeypatch.setattr(goals, "FEW", 4)
    monkeypatch.setattr(goals, "MANY", 24)
    row = goals._record(1)
    assert row["before"] == "140"
    page = bench.markdown({"command": "advkit benchmark", "environment": {}, "goals": [row]})
    assert f"| CPU us per record (digits, FGSM) | 140 | {row['now']} | 40 | 8 |" in page


def test_sizes_of_a_call_network_by_network(monkeypatch):
    monkeypatch.setattr(shapes, "NETWORKS", {"mlp": (1, 8, 8), "efficientnet-lite0": (3, 224, 224)})
    monkeypatch.setattr(shapes, "_built", lambda name, shape: built(name, shape))

    def built(name, shape):
        if name != "mlp":
            raise UsageError("not installed")
        return torch.nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).requires_grad_(False)

    found = bench.call_sizes()
    assert found[0]["sizes"][-1] == 64
    page = bench.markdown({"command": "advkit benchmark", "environment": {}, "sizes": found})
    assert "| mlp | 1x8x8 | " in page
    assert "| efficientnet-lite0 | 3x224x224 | left out: not installed |" in page


def test_too_few_rows_for_a_loop_are_refused():
    with pytest.raises(UsageError, match="needed"):
        bench.pgd_overhead("zoo:digits-mlp", task="digits", sizes=(5000,))


def test_the_command_writes_page_and_json(tmp_path, capsys):
    out = tmp_path / "found"
    arguments = ["benchmark", "--models", "zoo:digits-mlp", "--task", "digits", "--reference", "pgd:steps=5"]
    arguments += ["--suites", "[apgd-ce:steps=5,restarts=2]", "--n", "20", "--repetitions", "1", "--parts", "suites"]
    assert main.run([*arguments, "--out", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert json.loads((out / "benchmarks.json").read_text()) == said
    assert said["command"].startswith(
        "advkit benchmark --models zoo:digits-mlp --suites '[apgd-ce:steps=5,restarts=2]'"
    )
    (entry,) = said["suites"]
    assert entry["reference"]["name"] == "pgd:steps=5"
    assert entry["suites"]["apgd-ce:steps=5,restarts=2"]["runs"][0]["forwards"] > 0
    assert "suites against pgd:steps=5" in (out / "benchmarks.md").read_text()


@pytest.mark.parametrize(
    "arguments", [["--parts", "speed"], ["--suites", "leen"], ["--models", "zoo:none-such"], ["--n", "0"]]
)
def test_mistakes_are_refused(arguments):
    assert (
        main.run(
            ["benchmark", *arguments] if "--parts" in arguments else ["benchmark", "--parts", "suites", *arguments]
        )
        == 2
    )
