"""Several processes train the model that one trains: the same examples, gradients, log and decisions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from advkit.core.errors import BadModel, EndedElsewhere, LostProcess, StaleRun, UsageError
from advkit.core.protocols import Trains, TrainsFront
from advkit.core.rng import RowRng
from advkit.defenses import DEFENSES
from advkit.defenses.adversarial.pubdef import PubDef
from advkit.models import MODELS
from advkit.models.checkpoint import unpack
from advkit.models.torch import TorchModel
from advkit.tasks import TASKS
from advkit.testing.defense_laws import forgetful, stripes
from advkit.training.loop import CHECKPOINT, Epoch, Fit, Objective, Recipe, Review, fit
from advkit.training.ranks import Ranks, check_rows, gathered, joined, launched, mean_of_batch, place

RNG = RowRng.from_ids(3, ["run"])
# 87 training rows: three batches of 24, each shared evenly by two, and one of 15
RECIPE = Recipe(epochs=2, batch_size=24, optimizer="sgd", lr=0.05, schedule="linear", warmup=0.2)
METHODS = (
    "none",
    "pgd_at:steps=3",
    "trades:steps=3",
    "mart:steps=3",
    "awp:base=[trades:steps=2],gamma=0.1",
    "awp:base=aaer,gamma=0.1",
    "awp:base=conadv",
    "awp:base=[free_at:replays=2]",
    "conadv:tau=2,watch=1",
    "fgsm_at",
    "fgsm_rs",
    "n_fgsm",
    "free_at:replays=2",
    "aaer:eps=0.3,ce_grad=true",
    "doubly_robust:steps=2,r=0.5",
    "doubly_robust:steps=2,rho=0.3,eta=0.1,outer=trades",
    "doubly_robust:steps=2,outer=alp",
    "doubly_robust:steps=2,eta=0.5,r=1,barrier=0.01,implicit=true",
    "grad_align:eps=0.2,weight=5",
    "smoothing:sigma=0.25",
)


def network(seed: int = 0) -> TorchModel:
    """In float64, so that another order of a sum is told from another sum."""
    model: TorchModel = MODELS.build("mlp:hidden=12+12")((2, 6, 6), 3, RowRng.from_ids(seed, ["init"]))
    model.module.double()
    return model


def _child(rank: int, world: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    with joined() as ranks:
        made = work(ranks, *arguments)
    torch.save(made, f"{folder}/{rank}.pt")
    os._exit(0)  # gloo's threads may abort the process at the end of the interpreter


def started(folder: Path, world: int, work: Callable[..., Any], *arguments: Any) -> list[int | None]:
    """Run `work(ranks, *arguments)` in some new processes and wait for all of them; their exit codes."""
    folder.mkdir(parents=True)
    context = mp.get_context("spawn")
    given = (world, str(folder), work, arguments)
    processes = [context.Process(target=_child, args=(rank, *given)) for rank in range(world)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 240
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    return codes


def together(folder: Path, world: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(ranks, *arguments)` returns in every one of some new processes."""
    assert started(folder, world, work, *arguments) == [0] * world
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def outcome(done: Fit) -> dict[str, Any]:
    log = [(each.loss, each.score, each.clean, each.lr, dict(each.figures)) for each in done.log]
    weights = {name: tensor.clone() for name, tensor in done.last.module.state_dict().items()}
    return {"weights": weights, "log": log, "best": done.model.state_sha256(), "best_epoch": done.best_epoch}


def trained(spec: str, ranks: Ranks) -> dict[str, Any]:
    defense: Any = DEFENSES.build(spec)
    return outcome(fit(network(), stripes(), defense.objective(), RECIPE, RNG, progress=False, ranks=ranks))


def all_trained(ranks: Ranks, specs: tuple[str, ...]) -> list[dict[str, Any]]:
    return [trained(spec, ranks) for spec in specs]


def apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of two runs' weights."""
    return max(float((one["weights"][name] - tensor).abs().max()) for name, tensor in other["weights"].items())


def assert_same_run(one: dict[str, Any], several: list[dict[str, Any]], tolerance: float = 1e-11) -> None:
    first = several[0]
    for other in several[1:]:
        assert apart(first, other) == 0
        assert other["best"] == first["best"]
        assert str(other["log"]) == str(first["log"])  # as text: NaN is not equal to itself
    assert apart(one, first) < tolerance
    for expected, got in zip(one["log"], first["log"], strict=True):
        assert got[0] == pytest.approx(expected[0], rel=1e-6)  # the sum over an epoch is in float32
        assert got[1:4] == expected[1:4]
        assert got[4] == pytest.approx(expected[4], rel=1e-6, nan_ok=True)
    assert first["best_epoch"] == one["best_epoch"]


def shared(ranks: Ranks) -> dict[str, Any]:
    """A coupled loss of five rows, of which the first of two processes has three."""
    weight = torch.tensor([1.5], dtype=torch.float64, requires_grad=True)
    rows = torch.arange(5.0, dtype=torch.float64)
    ((mine, sizes),) = ranks.pieces(rows, 1)
    with ranks.working_on(sizes):
        each = gathered((weight * mine).exp())
        loss = each.logsumexp(0) * each.square().mean()
        (mean,) = mean_of_batch([mine.mean()])
        flags = gathered(mine > 2)
    (gradient,) = torch.autograd.grad(loss * ranks.weight(len(mine), 5) / ranks.world, weight)
    return {
        "mine": mine.tolist(),
        "values": (float(loss.detach()), float(mean), float(torch.stack(ranks.everyone(gradient)).sum())),
        "flags": flags.tolist(),
        "lowest": ranks.earliest(7 - ranks.rank),
    }


LIGHT = ("awp:base=[pgd_at:steps=2],gamma=0.1", "aaer:eps=0.3,ce_grad=true")


def small_runs(ranks: Ranks) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    return all_trained(ranks, LIGHT), shared(ranks)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    found = together(tmp_path / "two", 2, small_runs)  # one start for both: it is what takes the time
    for number, spec in enumerate(LIGHT):
        assert_same_run(trained(spec, Ranks()), [runs[number] for runs, _ in found])
    # a coupled loss has the value and the gradient of the whole batch
    expected, first, second = shared(Ranks()), found[0][1], found[1][1]
    assert (first["mine"], second["mine"]) == ([0.0, 2.0, 4.0], [1.0, 3.0])
    for got in (first, second):
        assert got["values"] == pytest.approx(expected["values"], rel=1e-12)
        assert got["flags"] == expected["flags"]
        assert got["lowest"] == 6


def test_every_method_is_compared() -> None:
    named = {spec.partition(":")[0] for spec in METHODS} | {"pubdef"}
    made = {name: DEFENSES.build(name) for name in DEFENSES.names()}
    # what trains a front counts its victim's queries, and is refused on several processes
    assert named == {
        name for name, part in made.items() if isinstance(part, Trains) and not isinstance(part, TrainsFront)
    }


def assert_every_method_same(several: list[list[dict[str, Any]]]) -> None:
    for number, spec in enumerate(METHODS):
        # grad_align takes its cosines of input gradients in float32
        tolerance = 1e-6 if "grad_align" in spec else 1e-11
        assert_same_run(trained(spec, Ranks()), [each[number] for each in several], tolerance)


@pytest.mark.exhaustive
def test_three_processes_train_as_one(tmp_path: Path) -> None:
    assert_every_method_same(together(tmp_path / "three", 3, all_trained, METHODS))


def public(ranks: Ranks, folder: str) -> dict[str, Any]:
    sources: Any = tuple(network(seed) for seed in (1, 2))
    for name, source in zip("ab", sources, strict=True):
        source.name = name
    defense = PubDef(eps=0.1, sources=sources, copies=2, loss="dynamic-loss", cache=folder)
    objective = defense.objective()
    made = outcome(fit(network(), stripes(), objective, RECIPE, RNG, progress=False, ranks=ranks))
    return {**made, "average": objective.state()["average"]}


def normalised(ranks: Ranks, spec: str) -> dict[str, Any]:
    defense: Any = DEFENSES.build(spec)
    return outcome(fit(forgetful(), stripes(), defense.objective(), RECIPE, RNG, progress=False, ranks=ranks))


class Partial(nn.Module):
    """A network with weights that no loss uses."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(72, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.used(x.flatten(1))
        return answer


def partial(ranks: Ranks) -> dict[str, Any]:
    torch.manual_seed(0)
    model = TorchModel(Partial().double().eval(), classes=3)
    recipe = Recipe(epochs=1, batch_size=24, weight_decay=0.1, accumulate=3)
    return outcome(fit(model, stripes(), Objective(), recipe, RNG, progress=False, ranks=ranks))


SINGLE = (
    ("pgd_at:eps=0.1,steps=3", Recipe(epochs=3, optimizer="sgd", lr=0.1)),
    ("trades:eps=0.1,steps=3", Recipe(epochs=3)),
)


def in_float32(ranks: Ranks) -> list[dict[str, Any]]:
    made = []
    for spec, recipe in SINGLE:
        defense: Any = DEFENSES.build(spec)
        data = TASKS.build("digits").training()
        assert data is not None
        model = MODELS.build("mlp")((1, 8, 8), 10, RowRng.from_ids(0, ["init"]))
        made.append(outcome(fit(model, data, defense.objective(), recipe, RNG, progress=False, ranks=ranks)))
    return made


NORMALISED = ("fgsm_rs", "conadv:tau=1,mode=train")


def all_runs(ranks: Ranks, folder: str) -> dict[str, Any]:
    return {
        "methods": all_trained(ranks, METHODS),
        "public": public(ranks, folder + "/cache"),
        "normalised": [normalised(ranks, spec) for spec in NORMALISED],
        "partial": partial(ranks),
        "float32": in_float32(ranks),
        "broken": broken(ranks, folder + "/run"),
        "disagreeing": disagreeing(ranks),
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """Everything that two processes are asked for, in one start: it is what takes the time."""
    folder = tmp_path_factory.mktemp("ranks")
    first, second = together(folder / "two", 2, all_runs, str(folder))
    return folder, first, second


@pytest.mark.exhaustive
def test_every_method_trains_as_on_one_process(two: Any) -> None:
    assert_every_method_same([each["methods"] for each in two[1:]])


@pytest.mark.slow
def test_round_off_of_float32(two: Any) -> None:
    """The tolerances that docs/adversarial_training.md states."""
    (pgd, trades), (first, second) = in_float32(Ranks()), two[1]["float32"]
    assert apart(pgd, first) < 1e-5
    for expected, got, tolerance in ((pgd, first, 1e-5), (trades, second, 1e-2)):
        assert [each[0] for each in got["log"]] == pytest.approx([each[0] for each in expected["log"]], rel=tolerance)


@pytest.mark.slow
def test_pubdef_trains_as_on_one_process(two: Any) -> None:
    folder, first, second = two
    one = public(Ranks(), str(folder / "cache"))
    assert_same_run(one, [first["public"], second["public"]], 1e-6)  # the moving average of the losses is float32
    assert torch.equal(first["public"]["average"], second["public"]["average"])
    assert torch.allclose(one["average"], first["public"]["average"], rtol=1e-5)


@pytest.mark.slow
def test_running_statistics_are_those_of_the_first_process(two: Any) -> None:
    for number, spec in enumerate(NORMALISED):
        first, second = (each["normalised"][number] for each in two[1:])
        one = normalised(Ranks(), spec)
        assert apart(first, second) == 0
        assert first["log"] == second["log"]
        assert set(first["weights"]) == set(one["weights"])
        assert apart(one, first) > 1e-4  # every process normalises its own rows, and drops other units


@pytest.mark.slow
def test_unused_weights_and_accumulated_gradients(two: Any) -> None:
    assert_same_run(partial(Ranks()), [each["partial"] for each in two[1:]])
    torch.manual_seed(0)
    assert torch.equal(two[1]["partial"]["weights"]["spare.weight"], Partial().double().spare.weight)


def test_every_row_of_a_batch_is_one_process_s() -> None:
    for world, rows, number in ((2, 5, 1), (3, 8, 2), (4, 13, 3), (1, 6, 4)):
        batch = torch.randperm(rows, generator=torch.Generator().manual_seed(rows))
        every = [Ranks(rank, world).pieces(batch, number) for rank in range(world)]
        assert sorted(int(row) for pieces in every for piece, _ in pieces for row in piece) == list(range(rows))
        for place_ in range(number):
            sizes = tuple(len(pieces[place_][0]) for pieces in every)
            assert all(pieces[place_][1] == sizes for pieces in every)
            assert list(sizes) == sorted(sizes, reverse=True)
            assert max(sizes) - min(sizes) <= 1
        for rank, pieces in enumerate(every):
            assert torch.equal(torch.cat([piece for piece, _ in pieces]), batch[rank::world])


def test_batches_too_small_for_the_processes_are_refused() -> None:
    check_rows(100, 8, Ranks(0, 4), statistics=True)
    check_rows(100, 4, Ranks(0, 4), statistics=False)
    with pytest.raises(UsageError, match="at least 4"):
        check_rows(100, 3, Ranks(0, 4), statistics=False)
    with pytest.raises(UsageError, match=r"two rows each.*at least 8"):
        check_rows(100, 7, Ranks(0, 4), statistics=True)
    with pytest.raises(UsageError, match="3 training rows"):
        check_rows(3, 128, Ranks(0, 4), statistics=False)
    with pytest.raises(BadModel, match="single row"):
        check_rows(100, 1, Ranks(), statistics=True)


def test_devices_of_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place("cuda:1", Ranks()) == "cuda:1"
    assert place("cpu", Ranks(1, 2)) == "cpu"
    with pytest.raises(UsageError, match="say cuda"):
        place("cuda:0", Ranks(1, 2))
    with pytest.raises(UsageError, match="mps"):
        place("mps", Ranks(1, 2))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UsageError, match="1 CUDA devices"):
        place("cuda", Ranks(1, 2))


def test_one_process_is_not_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert not launched()
    with joined() as ranks:
        assert (ranks.rank, ranks.world, ranks.first) == (0, 1, True)
        assert not dist.is_initialized()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launched()


class Broken(Objective):
    """One process's loss is not a number at a step."""

    def __init__(self, rank: int, step: int) -> None:
        super().__init__()
        self.rank, self.step = rank, step
        self.steps = 0

    def loss(self, model: TorchModel, x: Tensor, y: Tensor, rows: Tensor, rng: Any) -> Tensor:
        self.steps += 1
        loss = super().loss(model, x, y, rows, rng)
        return loss * float("nan") if (self.steps, dist.get_rank()) == (self.step, self.rank) else loss


def broken(ranks: Ranks, folder: str) -> dict[str, Any]:
    try:
        fit(network(), stripes(), Broken(1, 6), RECIPE, RNG, out=folder, progress=False, ranks=ranks)
    except UsageError as error:
        said = ("usage", str(error))
    except EndedElsewhere as error:
        said = ("elsewhere", str(error))
    return {"said": said}


class Raises(Objective):
    """An objective whose word at the end of an epoch is one process's alone."""

    def review(self, entry: Epoch, log: Any) -> Review:
        if dist.get_rank() == 1:
            raise UsageError("enough")
        return Review()


def disagreeing(ranks: Ranks) -> str:
    try:
        fit(network(), stripes(), Raises(), RECIPE, RNG, progress=False, ranks=ranks)
    except (UsageError, EndedElsewhere) as error:
        return f"{type(error).__name__}: {error}"
    return "went on"


@pytest.mark.slow
def test_all_processes_end_alike(two: Any) -> None:
    folder, first, second = two
    # four steps an epoch: the sixth is in the second
    assert first["broken"]["said"][0] == "usage"
    assert "step 6 of 8 (epoch 2)" in first["broken"]["said"][1]
    assert f"the checkpoint of epoch 1 stays in {folder / 'run'}" in first["broken"]["said"][1]
    assert second["broken"]["said"][0] == "elsewhere"
    assert "step 6 of 8" in second["broken"]["said"][1]
    assert len(json.loads((folder / "run" / "log.json").read_text())) == 1
    assert first["disagreeing"] == "EndedElsewhere: process 1 of 2 ended the training: enough"
    assert second["disagreeing"] == "UsageError: enough"


FREE: Any = DEFENSES.build("free_at:replays=2,eps=0.1")
LONG = Recipe(epochs=6, batch_size=24, ema=0.9, augment="crop-flip")


class KilledFree(type(FREE.objective())):  # type: ignore[misc]
    """Free training, of which one process is killed at a step."""

    kill_at = 0

    def loss(self, model: Any, x: Tensor, y: Tensor, rows: Tensor, rng: Any) -> Tensor:
        self.kill_at -= 1
        if self.kill_at == 0 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(model, x, y, rows, rng)


def free(ranks: Ranks, folder: str, kill_at: int) -> dict[str, Any]:
    objective = KilledFree(FREE)
    objective.kill_at = kill_at
    try:
        return outcome(fit(forgetful(), stripes(), objective, LONG, RNG, out=folder, progress=False, ranks=ranks))
    except LostProcess as error:
        return {"said": str(error)}


@pytest.mark.slow
def test_a_killed_process_is_reported_and_the_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    run = tmp_path / "run"
    before = time.time()
    assert started(tmp_path / "killed", 2, free, str(run), 13) == [0, -signal.SIGKILL]
    assert time.time() - before < 120  # most of it to start: torch's own time limit is 10 minutes
    said = torch.load(tmp_path / "killed" / "0.pt", weights_only=False)["said"]
    assert "process 0 of 2: another process" in said
    assert f"the checkpoint of epoch 1 stays in {run}" in said
    resumed = together(tmp_path / "resumed", 2, free, str(run), 0)
    whole = together(tmp_path / "whole", 2, free, str(tmp_path / "other"), 0)
    for one, other in zip(resumed, whole, strict=True):
        assert apart(one, other) == 0
        assert one["log"] == other["log"]
        assert one["best"] == other["best"]
    # the perturbations of two processes are two
    tensors, metadata = unpack((run / CHECKPOINT).read_bytes(), run)
    assert not torch.equal(tensors["objective/delta"], tensors["objective@1/delta"])
    assert json.loads(metadata["progress"])["ranks"] == 2
    with pytest.raises(StaleRun, match="on 2 processes, this one runs on 1"):
        fit(forgetful(), stripes(), KilledFree(FREE), LONG, RNG, out=run, progress=False)


def test_a_command_that_was_connected_ends_with_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    from advkit.cli.main import run
    from advkit.training import ranks

    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    assert (run(["list", "nonsense"]), ended) == (2, [])
    monkeypatch.setattr(ranks, "connected", True)
    assert (run(["list", "nonsense"]), ended) == (2, [2])


def launch(arguments: list[str], world: int = 2) -> subprocess.CompletedProcess[str]:
    """`torchrun` of the command line, on a free port of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, "-m", "advkit", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as launcher:
        try:
            out, err = launcher.communicate(timeout=240)
        finally:
            launcher.terminate()  # it ends its processes with it, where they have not ended by now
    return subprocess.CompletedProcess(command, launcher.returncode, out, err)


@pytest.mark.exhaustive
def test_the_command_line_under_torchrun(tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = ["train", "--task", "digits", "--model", "mlp", "--defense", "n_fgsm:eps=0.1", "--recipe", "epochs=2"]
    asked += ["--out", str(out), "--json"]
    done = launch(asked)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)  # said once
    assert sorted(each.name for each in out.iterdir()) == [
        "model.safetensors",
        "plots",
        "training",
        "training.json",
        "training.sha256",
    ]
    assert json.loads((out / "training.json").read_text())["sha256"] == made["sha256"]
    again = launch(asked)
    assert json.loads(again.stdout)["sha256"] == made["sha256"]
    refused = launch(asked, world=3)
    assert refused.returncode != 0
    lines = [line for line in refused.stderr.splitlines() if line.startswith("advkit: ")]
    assert len(lines) == 1
    assert "on 2 processes, this one runs on 3" in lines[0]
    assert "exitcode  : 2 " in refused.stderr
    small = launch([*asked[:-3], "--out", str(tmp_path / "small"), "--recipe", "batch_size=1"])
    lines = [line for line in small.stderr.splitlines() if line.startswith("advkit: ")]
    assert len(lines) == 1
    assert "choose a batch_size of at least 2" in lines[0]
    assert not (tmp_path / "small").exists()
