"""The loop: a killed run ends with the same bits, schedules and averages are their formulas, nothing leaks out."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from advkit.core.errors import BadInput, BadModel, CheckpointError, StaleRun, UsageError
from advkit.core.protocols import Data
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.defenses import DEFENSES
from advkit.models import MODELS
from advkit.models.checkpoint import unpack
from advkit.models.torch import FunctionModel, TorchModel
from advkit.tasks import TASKS
from advkit.training.loop import CHECKPOINT, LOSS_SCALE, Objective, Recipe, correct, fit, validation_rows

RNG = RowRng.from_ids(7, ["run"])


def blobs(n: int = 120) -> Data:
    streams = RowRng.from_ids(1, [str(i) for i in range(n)])
    y = torch.arange(n) % 3
    x = (0.2 + 0.3 * y[:, None].float() + 0.1 * streams.uniform(torch.empty(n, 2))).clamp(0, 1)
    return Data(x=x, y=y, space=Box(), classes=3, name="blobs")


def images(n: int = 40) -> Data:
    streams = RowRng.from_ids(2, [str(i) for i in range(n)])
    return Data(x=streams.uniform(torch.empty(n, 1, 6, 6)), y=torch.arange(n) % 3, space=Box(), classes=3)


def small(shape: tuple[int, ...] = (2,)) -> TorchModel:
    return MODELS.build("mlp:hidden=8")(shape, 3, RNG.at("init"))


def noisy(shape: tuple[int, ...] = (1, 6, 6)) -> TorchModel:
    """With everything that a resumed run must bring back: running statistics, a counter, dropout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Flatten(),
            nn.Linear(144, 3),
        )
    return TorchModel(module.eval(), Box(0.0, 1.0, shape), 3)


class Stopped(Exception):
    pass


class Moody(Objective):
    """An objective with state, that stops the process's run at a batch of its choice."""

    def __init__(self, stop_at: int = -1) -> None:
        self.stop_at = stop_at
        self.batches = 0
        self.average = torch.zeros(())

    def prepare(self, model: TorchModel, data: Data, rng: Any) -> None:
        self.noise = torch.rand(len(data), generator=rng.at("noise").generator())
        self.start = model.state_sha256()

    def loss(self, model: TorchModel, x: Tensor, y: Tensor, rows: Tensor, rng: Any) -> Tensor:
        self.batches += 1
        if self.batches == self.stop_at:
            raise Stopped
        jitter = rng.at("jitter").uniform(x) * 0.02
        each = nn.functional.cross_entropy(model(x + jitter), y, reduction="none")
        self.average = 0.9 * self.average + 0.1 * each.detach().mean()
        return (each * (1 + self.noise[rows] + self.average)).mean()

    def state(self) -> dict[str, Tensor]:
        return {"average": self.average}

    def load(self, state: dict[str, Tensor]) -> None:
        self.average = state["average"]


HARD = Recipe(
    epochs=4, batch_size=8, lr=0.01, weight_decay=1e-3, schedule="cosine", ema=0.9, augment="crop-flip", validation=0.2
)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("stop_at", [3, 6, 11])  # in the first epoch, in the second, in the third
def test_interrupted_equals_uninterrupted(optimizer: str, stop_at: int, tmp_path: Path) -> None:
    recipe = replace(HARD, optimizer=optimizer)
    whole = fit(noisy(), images(), Moody(), recipe, RNG, progress=False)
    with pytest.raises(Stopped):
        fit(noisy(), images(), Moody(stop_at), recipe, RNG, out=tmp_path, progress=False)
    resumed = Moody()
    again = fit(noisy(), images(), resumed, recipe, RNG, out=tmp_path, progress=False)
    assert resumed.batches == 16 - 4 * ((stop_at - 1) // 4)
    assert resumed.start == noisy().state_sha256()
    assert again.model.state_sha256() == whole.model.state_sha256()
    assert again.last.state_sha256() == whole.last.state_sha256()
    assert again.best_epoch == whole.best_epoch
    assert [(e.epoch, e.loss, e.score, e.clean, e.lr) for e in again.log] == [
        (e.epoch, e.loss, e.score, e.clean, e.lr) for e in whole.log
    ]
    finished = Moody()
    third = fit(noisy(), images(), finished, recipe, RNG, out=tmp_path, progress=False)
    assert finished.batches == 0
    assert third.model.state_sha256() == whole.model.state_sha256()
    assert json.loads((tmp_path / "log.json").read_text())[3]["loss"] == whole.log[3].loss
    assert sorted(each.name for each in tmp_path.iterdir()) == ["log.json", CHECKPOINT]


KILLED = """
import sys, time
import torch
from advkit.core.rng import RowRng
from advkit.models import MODELS
from advkit.tasks import TASKS
from advkit.training.loop import Objective, Recipe, fit

class Slow(Objective):
    def loss(self, model, x, y, rows, rng):
        time.sleep(float(sys.argv[2]))
        return super().loss(model, x, y, rows, rng)

rng = RowRng.from_ids(0, ["run"])
model = MODELS.build("mlp:hidden=16")((1, 8, 8), 10, rng)
done = fit(model, TASKS.build("digits").training(), Slow(), Recipe(epochs=4), rng, out=sys.argv[1], progress=False)
sys.stdout.write(done.model.state_sha256() + " " + done.last.state_sha256())
"""


@pytest.mark.slow
def test_kill_9_in_mid_epoch(tmp_path: Path) -> None:
    def start(folder: str, delay: float) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", KILLED, str(tmp_path / folder), str(delay)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])

    killed = start("killed", 0.1)
    log = tmp_path / "killed" / "log.json"
    deadline = time.monotonic() + 60
    while not (log.exists() and len(json.loads(log.read_text())) == 2):
        assert time.monotonic() < deadline
        assert killed.poll() is None
        time.sleep(0.02)
    time.sleep(0.25)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert len(json.loads(log.read_text())) == 2
    resumed, _ = start("killed", 0.0).communicate()
    whole, _ = start("whole", 0.0).communicate()
    assert resumed == whole
    assert len(whole) == 129


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    recipe = Recipe(epochs=1)

    def again(**other: Any) -> None:
        given = {"model": small(), "data": blobs(), "objective": Objective(), "recipe": recipe, "rng": RNG, **other}
        fit(*given.values(), out=tmp_path, progress=False)

    again()
    again()
    changed = blobs()
    changed.x[3, 1] += 1e-3
    for other in (
        {"model": MODELS.build("mlp:hidden=8")((2,), 3, RNG.at("other"))},
        {"data": changed},
        {"objective": Moody()},
        {"recipe": Recipe(epochs=2)},
        {"rng": RowRng.from_ids(8, ["run"])},
    ):
        with pytest.raises(StaleRun):
            again(**other)
    path = tmp_path / CHECKPOINT
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        again()


def test_callers_model_generators_and_flags_are_untouched() -> None:
    model = noisy()
    model.module.train()
    for parameter in model.module.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: tensor.clone() for name, tensor in model.state().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    flags = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    done = fit(model, images(), Moody(), HARD, RNG, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == flags
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state().items())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.module.parameters())
    assert all(each.training for each in model.module.modules())
    assert not any(each.training for out in (done.model, done.last) for each in out.module.modules())
    assert done.last.state_sha256() != model.state_sha256()


@pytest.mark.slow
def test_same_seed_same_weights_other_seed_others() -> None:
    def run(seed: int) -> str:
        torch.rand(seed + 1)  # the global generator has no say
        return fit(noisy(), images(), Moody(), HARD, RowRng.from_ids(seed, ["run"]), progress=False).last.state_sha256()

    assert run(0) == run(0) != run(1)


@pytest.mark.slow
def test_learns_blobs_and_digits() -> None:
    done = fit(small(), blobs(), Objective(), Recipe(epochs=30, lr=0.05, batch_size=16), RNG, progress=False)
    assert done.best.score == 1.0
    task = TASKS.build("digits")
    for spec, recipe in (
        ("mlp:hidden=64", Recipe(epochs=15, lr=5e-3, batch_size=64)),
        ("cnn", Recipe(epochs=12, lr=8e-3, batch_size=64, schedule="onecycle")),
    ):
        model = MODELS.build(spec)(task.shape, 10, RNG)
        started = time.monotonic()
        done = fit(model, task.training(), Objective(), recipe, RNG, progress=False)
        assert float(correct(done.model, task.rows.x, task.rows.y).mean()) > 0.95
        assert time.monotonic() - started < 30


def test_best_weights_are_those_of_the_best_epoch() -> None:
    class Scripted(Objective):
        scores = iter([0.2, 0.7, 0.5, 0.7])

        def __init__(self) -> None:
            self.seen: list[str] = []

        def score(self, model: TorchModel, x: Tensor, y: Tensor, rows: Tensor, rng: Any) -> Tensor:
            assert not model.module.training
            assert rows.tolist() == list(range(12))
            self.seen.append(model.state_sha256())
            return torch.full((len(x),), next(self.scores))

    objective = Scripted()
    done = fit(small(), blobs(), objective, Recipe(epochs=4), RNG, progress=False)
    assert done.best_epoch == 2  # the earlier of equals
    assert done.model.state_sha256() == objective.seen[1]
    assert done.last.state_sha256() == objective.seen[3] != objective.seen[1]
    assert [entry.score for entry in done.log] == pytest.approx([0.2, 0.7, 0.5, 0.7])
    assert done.best is done.log[1]


def test_scoring_every_few_epochs_and_not_at_all() -> None:
    done = fit(small(), blobs(), Objective(), Recipe(epochs=5, select_every=3), RNG, progress=False)
    assert [math.isnan(entry.score) for entry in done.log] == [True, True, False, True, False]
    assert done.best_epoch in (3, 5)
    for recipe in (Recipe(epochs=3, validation=0), Recipe(epochs=3, select="last")):
        done = fit(small(), blobs(), Objective(), recipe, RNG, progress=False)
        assert done.best_epoch == 3
        assert done.model.state_sha256() == done.last.state_sha256()


def test_every_training_row_once_an_epoch_and_no_validation_row() -> None:
    class Watcher(Objective):
        def __init__(self) -> None:
            self.epochs: list[list[int]] = []
            self.sizes: list[int] = []

        def loss(self, model: TorchModel, x: Tensor, y: Tensor, rows: Tensor, rng: Any) -> Tensor:
            assert model.module.training
            data = blobs(121)
            assert torch.equal(x, data.x[rows])
            assert torch.equal(y, data.y[rows])
            if not self.epochs or len(self.epochs[-1]) == 109:
                self.epochs.append([])
            self.epochs[-1] += rows.tolist()
            self.sizes.append(len(rows))
            return super().loss(model, x, y, rows, rng)

    watcher = Watcher()
    fit(small(), blobs(121), watcher, Recipe(epochs=3, batch_size=12, select="last"), RNG, progress=False)
    assert all(sorted(epoch) == list(range(12, 121)) for epoch in watcher.epochs)
    assert len({tuple(epoch) for epoch in watcher.epochs}) == 3
    assert watcher.sizes[:9] == [12] * 8 + [13]  # the single row left over joined the last batch


def test_streams_follow_rows_and_epochs() -> None:
    drawn: list[dict[int, float]] = []

    class Drawer(Objective):
        def __init__(self) -> None:
            drawn.append({})
            self.calls = 0

        def loss(self, model: TorchModel, x: Tensor, y: Tensor, rows: Tensor, rng: Any) -> Tensor:
            values = rng.uniform(torch.empty(len(x), 1)).squeeze(1)
            for row, value in zip(rows.tolist(), values.tolist(), strict=True):
                drawn[-1].setdefault(row, value)
                drawn[-1][-row] = value
            return super().loss(model, x, y, rows, rng)

    for size in (7, 32):
        fit(small(), blobs(), Drawer(), Recipe(epochs=2, batch_size=size), RNG, progress=False)
    assert drawn[0] == drawn[1]  # whatever the batches
    assert all(drawn[0][row] != drawn[0][-row] for row in range(12, 120))  # another epoch, other numbers


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("none", [1.0] * 8),
        ("cosine", [0.5 * (1 + math.cos(math.pi * s / 8)) for s in range(8)]),
        ("onecycle", [1 / 8, 3 / 8, 5 / 8, 7 / 8, 7 / 8, 5 / 8, 3 / 8, 1 / 8]),
        ("steps", [1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]),
    ],
)
def test_schedules(schedule: Any, expected: list[float]) -> None:
    recipe = Recipe(schedule=schedule, lr=0.3)
    assert [recipe.lr_at(step, 8) for step in range(8)] == pytest.approx([0.3 * factor for factor in expected])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"schedule": "linear"}, [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
        ({"schedule": "poly"}, [1.0, 0.81, 0.64, 0.49, 0.36, 0.25, 0.16, 0.09, 0.04, 0.01]),
        ({"schedule": "linear", "warmup": 0.2}, [0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ({"schedule": "none", "warmup": 0.4}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
        ({"schedule": "steps", "milestones": (0.7, 0.9)}, [1, 1, 1, 1, 1, 1, 1, 0.1, 0.1, 0.01]),
        ({"schedule": "steps", "milestones": (0.5,), "warmup": 0.1}, [1, 1, 1, 1, 1, 0.1, 0.1, 0.1, 0.1, 0.1]),
    ],
)
def test_warm_up_milestones_and_falls_to_zero(changes: dict[str, Any], expected: list[float]) -> None:
    recipe = Recipe(lr=0.3, **changes)
    assert [recipe.lr_at(step, 10) for step in range(10)] == pytest.approx([0.3 * factor for factor in expected])


def test_settings_that_came_later_leave_fingerprints_as_they_were() -> None:
    assert repr(Recipe()) == (
        "Recipe(epochs=10, batch_size=128, optimizer='adam', lr=0.002, momentum=0.9, weight_decay=0.0, "
        "schedule='none', ema=0.0, amp=False, augment='none', validation=0.1, select='best', select_every=1)"
    )
    changed = Recipe(warmup=0.2, milestones=(0.75, 0.9), accumulate=4, compile=True, channels_last=True)
    assert len({repr(changed), repr(Recipe()), repr(Recipe(warmup=0.2)), repr(Recipe(accumulate=4))}) == 4
    built: Any = DEFENSES.build("none:recipe=[schedule=steps,milestones=0.75+0.9,amp=fp16,warmup=0.1]")
    assert built.recipe == Recipe(schedule="steps", milestones=(0.75, 0.9), amp="fp16", warmup=0.1)
    assert DEFENSES.build(DEFENSES.spec(built)) == built
    old: Any = DEFENSES.build("none:recipe=[amp=true]")
    assert old.recipe.amp is True


@pytest.mark.parametrize("spec", ["pgd_at:steps=2", "trades:steps=2", "fgsm_rs", "conadv:tau=2"])
def test_accumulated_gradients_are_those_of_the_whole_batch(spec: str) -> None:
    # 108 training rows: batches of 32 and one of 12, cut into pieces of 6 or 7 and of 2 or 3
    def run(pieces: int) -> list[Tensor]:
        model = MODELS.build("mlp:hidden=8")((1, 6, 6), 3, RNG.at("init"))
        model.module.double()
        recipe = Recipe(epochs=2, batch_size=32, optimizer="sgd", lr=0.1, accumulate=pieces)
        defense: Any = DEFENSES.build(spec)
        done = fit(model, images(120), defense.objective(), recipe, RNG, progress=False)
        return [*done.last.module.parameters()]

    for one, several in zip(run(1), run(5), strict=True):
        assert torch.allclose(one, several, rtol=0, atol=1e-12)


def test_accumulation_is_refused_where_a_method_needs_the_whole_batch() -> None:
    defense: Any = DEFENSES.build("awp:base=free_at")
    with pytest.raises(UsageError, match="free_at has one perturbation"):
        fit(small(), blobs(), defense.objective(), Recipe(accumulate=2), RNG, progress=False)


class Overflowing(Objective):
    """Cross-entropy plus zero; in its first steps the zero has a gradient that no scale brings into float16."""

    def __init__(self, steps: int, stop_at: int = -1) -> None:
        super().__init__()
        self.steps, self.stop_at = torch.tensor(steps), stop_at
        self.batches = 0

    def loss(self, model: TorchModel, x: Tensor, y: Tensor, rows: Tensor, rng: Any) -> Tensor:
        self.batches += 1
        if self.batches == self.stop_at:
            raise Stopped
        self.steps = self.steps - 1
        logits = model(x)
        loss = nn.functional.cross_entropy(logits, y)
        return loss + 1e38 * (logits - logits.detach()).sum() if self.steps >= 0 else loss

    def state(self) -> dict[str, Tensor]:
        return {"steps": self.steps}

    def load(self, state: dict[str, Tensor]) -> None:
        self.steps = state["steps"]


def test_float16_leaves_out_steps_whose_gradients_overflow_and_resumes(tmp_path: Path) -> None:
    one = Recipe(epochs=1, batch_size=200, optimizer="sgd", lr=0.1, amp="fp16", validation=0.0)
    skipped = fit(small(), blobs(), Overflowing(1), one, RNG, progress=False)
    assert skipped.last.state_sha256() == small().state_sha256()  # the only step was left out
    assert skipped.log[0].figures[LOSS_SCALE] == 2.0**15
    recipe = Recipe(epochs=3, batch_size=16, optimizer="sgd", momentum=0.0, lr=0.1, amp="fp16", validation=0.0)
    whole = fit(small(), blobs(), Overflowing(3), recipe, RNG, progress=False)
    assert [each.figures[LOSS_SCALE] for each in whole.log] == [2.0**13] * 3
    with pytest.raises(Stopped):
        fit(small(), blobs(), Overflowing(3, 12), recipe, RNG, out=tmp_path, progress=False)
    resumed = fit(small(), blobs(), Overflowing(3), recipe, RNG, out=tmp_path, progress=False)
    assert resumed.last.state_sha256() == whole.last.state_sha256()
    assert [each.figures for each in resumed.log] == [each.figures for each in whole.log]
    with pytest.raises(UsageError, match="overflow in epoch 3"):  # eight steps an epoch: 2 ** (16 - 24) is below one
        fit(small(), blobs(), Overflowing(99), recipe, RNG, progress=False)


@pytest.mark.slow
def test_float16_learns_what_float32_does() -> None:
    task = TASKS.build("digits")
    model = MODELS.build("mlp:hidden=32")(task.shape, 10, RNG)
    plain = Recipe(epochs=6, lr=5e-3)
    one, half = (
        fit(model, task.training(), Objective(), recipe, RNG, progress=False)
        for recipe in (plain, replace(plain, amp="fp16"))
    )
    assert half.best.clean == pytest.approx(one.best.clean, abs=0.03)
    assert all(p.dtype == torch.float32 for p in half.model.module.parameters())


def test_channels_last_changes_the_layout_alone() -> None:
    layouts = []

    class Watcher(Objective):
        def loss(self, model: TorchModel, x: Tensor, y: Tensor, rows: Tensor, rng: Any) -> Tensor:
            weight = next(model.module.parameters())
            layouts.append([each.is_contiguous(memory_format=torch.channels_last) for each in (x, weight)])
            return super().loss(model, x, y, rows, rng)

    streams = RowRng.from_ids(2, [str(i) for i in range(40)])
    data = Data(x=streams.uniform(torch.empty(40, 2, 6, 6)), y=torch.arange(40) % 3, space=Box(), classes=3)
    model = MODELS.build("cnn:width=4")((2, 6, 6), 3, RNG.at("init"))
    recipe = Recipe(epochs=2, batch_size=8, augment="crop-flip")
    plain = fit(model, data, Objective(), recipe, RNG, progress=False)
    other = fit(model, data, Watcher(), replace(recipe, channels_last=True), RNG, progress=False)
    assert all(all(each) for each in layouts)
    for one, two in zip(plain.last.module.parameters(), other.last.module.parameters(), strict=True):
        assert two.is_contiguous()
        assert torch.allclose(one, two, atol=1e-5)


@pytest.mark.exhaustive
def test_compiled_networks_train_as_others_do(tmp_path: Path) -> None:
    data = images(60)
    model = MODELS.build("cnn:width=4")((1, 6, 6), 3, RNG.at("init"))
    defense: Any = DEFENSES.build("pgd_at:steps=2")
    recipe = Recipe(epochs=2, batch_size=16, optimizer="sgd", lr=0.05)
    plain = fit(model, data, defense.objective(), recipe, RNG, progress=False)
    fast = replace(recipe, compile=True)
    other = fit(model, data, defense.objective(), fast, RNG, out=tmp_path, progress=False)
    names = list(plain.last.module.state_dict())
    assert list(other.last.module.state_dict()) == names
    stored, _ = unpack((tmp_path / CHECKPOINT).read_bytes(), tmp_path)
    assert {f"model/{name}" for name in names} <= set(stored)
    for one, two in zip(plain.last.module.parameters(), other.last.module.parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-5)


@pytest.mark.slow
def test_a_missing_compiler_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    # not by monkeypatch, which deletes the setting in the end: torch's part of a configuration passes for a class
    missing = config.patch({"cpp.cxx": (None, "no-such-compiler")})
    with missing, pytest.raises(UsageError, match="compile=true, and torch can't compile"):
        fit(small(), blobs(), Objective(), Recipe(epochs=1, compile=True), RNG, progress=False)


def test_networks_that_are_differentiated_twice_are_not_compiled() -> None:
    for spec in ("grad_align", "awp:base=grad_align", "doubly_robust:barrier=0.01,implicit=true"):
        defense: Any = DEFENSES.build(spec)
        with pytest.raises(UsageError, match="differentiates the network twice"):
            fit(small(), blobs(), defense.objective(), Recipe(compile=True), RNG, progress=False)


def test_sgd_step_decay_and_average_are_their_formulas() -> None:
    data = blobs(9)
    model = MODELS.build("mlp:hidden=")((2,), 3, RNG)
    recipe = Recipe(
        epochs=2, batch_size=9, optimizer="sgd", lr=0.5, momentum=0.9, weight_decay=0.1, validation=0, ema=0.99
    )
    done = fit(model, data, Objective(), recipe, RNG, progress=False)
    weight, bias = (value.double() for value in model.module.state_dict().values())
    mean_weight, mean_bias = weight.clone(), bias.clone()
    velocity_weight, velocity_bias = torch.zeros_like(weight), torch.zeros_like(bias)
    x, hot = data.x.double(), nn.functional.one_hot(data.y, 3).double()
    for step in range(2):
        error = (torch.softmax(x @ weight.T + bias, 1) - hot) / 9
        velocity_weight = 0.9 * velocity_weight + error.T @ x + 0.1 * weight  # the bias does not decay
        velocity_bias = 0.9 * velocity_bias + error.sum(0)
        weight, bias = weight - 0.5 * velocity_weight, bias - 0.5 * velocity_bias
        decay = (1 + step) / (10 + step)
        mean_weight = decay * mean_weight + (1 - decay) * weight
        mean_bias = decay * mean_bias + (1 - decay) * bias
    got = done.model.module.state_dict()
    assert np.allclose(got["1.weight"], mean_weight, atol=1e-6)
    assert np.allclose(got["1.bias"], mean_bias, atol=1e-6)


def test_perturbation_taken_back_after_the_step() -> None:
    class Perturbed(Objective):
        def loss(self, model: TorchModel, x: Tensor, y: Tensor, rows: Tensor, rng: Any) -> Tensor:
            with torch.no_grad():
                for p in model.module.parameters():
                    p.add_(0.25)
            return 0 * super().loss(model, x, y, rows, rng)

        def stepped(self, model: TorchModel) -> None:
            with torch.no_grad():
                for p in model.module.parameters():
                    p.sub_(0.25)

    model = small()
    done = fit(model, blobs(), Perturbed(), Recipe(epochs=2, optimizer="sgd", momentum=0), RNG, progress=False)
    for p, q in zip(model.module.parameters(), done.last.module.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)


def test_mixed_precision_trains() -> None:
    task = TASKS.build("digits")
    model = MODELS.build("mlp:hidden=32")(task.shape, 10, RNG)
    seen = []

    class Watcher(Objective):
        def loss(self, model: TorchModel, x: Tensor, y: Tensor, rows: Tensor, rng: Any) -> Tensor:
            seen.append(model.module(x).dtype)
            return super().loss(model, x, y, rows, rng)

    done = fit(model, task.training(), Watcher(), Recipe(epochs=6, lr=5e-3, amp=True), RNG, progress=False)
    assert set(seen) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in done.model.module.parameters())
    assert done.best.clean > 0.9


def test_validation_rows() -> None:
    assert [validation_rows(n, f) for n, f in ((100, 0.1), (100, 0.0), (5, 0.1), (8000, 0.1))] == [10, 0, 1, 800]


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"lr": 0.0},
        {"lr": float("inf")},
        {"weight_decay": -1.0},
        {"validation": 1.0},
        {"ema": 1.0},
        {"optimizer": "adamw"},
        {"schedule": "cosin"},
        {"augment": "flip"},
        {"select": "worst"},
        {"select_every": 0},
        {"warmup": 1.0},
        {"warmup": 0.2, "schedule": "onecycle"},
        {"milestones": (0.9, 0.5)},
        {"milestones": (0.0, 0.5)},
        {"accumulate": 0},
        {"accumulate": 129},
        {"amp": "fp8"},
    ],
)
def test_recipes_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Recipe(**wrong)


def test_bad_runs_are_refused_before_training(tmp_path: Path) -> None:
    def run(model: Any = None, **change: Any) -> None:
        data = blobs()
        given = {"x": data.x, "y": data.y, "space": data.space, "classes": 3, **change}
        fit(model or small(), Data(**given), Objective(), Recipe(epochs=1), RNG, out=tmp_path, progress=False)

    data = blobs()
    with pytest.raises(BadInput, match="values in"):
        run(x=data.x * 255)
    with pytest.raises(BadInput, match="NaN"):
        run(x=data.x / 0 * 0)
    with pytest.raises(BadInput, match="labels"):
        run(y=data.y + 1)
    with pytest.raises(BadInput, match="one label per sample"):
        run(y=data.y[1:])
    with pytest.raises(BadModel, match="classes"):
        run(classes=4)
    with pytest.raises(BadModel, match="torch models"):
        run(FunctionModel(lambda x: x))
    frozen = small()
    frozen.module.requires_grad_(False)
    with pytest.raises(BadModel, match="gradient"):
        run(frozen)
    with pytest.raises(BadInput, match="leave none"):
        run(x=data.x[:1], y=data.y[:1])
    assert list(tmp_path.iterdir()) == []


def test_divergence_is_an_error_and_leaves_the_last_good_epoch(tmp_path: Path) -> None:
    class Explodes(Objective):
        calls = 0

        def loss(self, model: TorchModel, x: Tensor, y: Tensor, rows: Tensor, rng: Any) -> Tensor:
            self.calls += 1
            return super().loss(model, x, y, rows, rng) * (1.0 if self.calls == 1 else float("nan"))

    with pytest.raises(UsageError, match="epoch 2"):
        fit(small(), blobs(), Explodes(), Recipe(epochs=3), RNG, out=tmp_path, progress=False)
    assert len(json.loads((tmp_path / "log.json").read_text())) == 1
