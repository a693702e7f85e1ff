"""Attacks on spiking networks under a chosen backward rule: specs, ensembles, the scale law, measured effects."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from advkit.attacks import ATTACKS
from advkit.attacks.events.spiking import ENSEMBLE, Spiking
from advkit.core import protocols
from advkit.core.errors import BadModel, UnknownName, UsageError
from advkit.core.protocols import Data
from advkit.core.rng import RowRng
from advkit.models import MODELS
from advkit.models.spiking.model import SpikingModel
from advkit.models.spiking.neurons import Neuron
from advkit.models.torch import as_model
from advkit.tasks import TASKS
from advkit.testing.play import Played, play
from advkit.threat_models.goals.untargeted import Untargeted
from advkit.threat_models.lp import Linf
from advkit.training.loop import Objective, Recipe, fit

PGD = "[pgd:steps=10,step_size=0.25]"
BALL = Linf(eps=0.1)


def trained(spec: str, data: Data, epochs: int, lr: float = 4e-3) -> SpikingModel:
    rng = RowRng.from_ids(0, ["spiking"])
    recipe = Recipe(epochs=epochs, batch_size=64, lr=lr, schedule="onecycle", validation=0.0, select="last")
    model = fit(MODELS.build(spec)((1, 8, 8), 10, rng), data, Objective(), recipe, rng, progress=False).model
    assert isinstance(model, SpikingModel)
    return model


def right(model: Any, task: Any, rows: int) -> tuple[Tensor, Tensor]:
    """Test rows that the model gets right, and their labels."""
    batch = next(iter(task.batches(360)))
    with torch.no_grad():
        correct = model(batch.x).argmax(1) == batch.labels
    assert correct.float().mean() > 0.7
    return batch.x[correct][:rows], batch.labels[correct][:rows]


def rescaled(model: SpikingModel, factor: float) -> SpikingModel:
    made = model.copy()
    previous: Any = None
    for layer in made.module.modules():
        if isinstance(layer, Neuron):
            with torch.no_grad():
                previous.weight.mul_(factor)
                previous.bias.mul_(factor)
            layer.dynamics = replace(layer.dynamics, threshold=layer.dynamics.threshold * factor)
        elif isinstance(layer, nn.BatchNorm2d | nn.Linear):
            previous = layer
    return made


@pytest.fixture(scope="module")
def task():
    """The embedded digits."""
    return TASKS.build("digits")


@pytest.fixture(scope="module")
def victim(task):
    """(model, rows, labels): a tiny network trained for a moment, and rows it gets right."""
    data = task.training()
    model = trained("snn:widths=4+8,hidden=16,time=3", replace(data, x=data.x[:640], y=data.y[:640]), 12, lr=0.02)
    return (model, *right(model, task, 24))


def attacked(model: Any, x: Tensor, y: Tensor, surrogate: str, attack: str = PGD, **more: Any) -> Played:
    return play(ATTACKS.build(f"spiking:{attack},surrogate=[{surrogate}]"), model, x, Untargeted(y), BALL, **more)


def test_specs() -> None:
    one = ATTACKS.build("spiking:attack=[pgd:steps=10],surrogate=[atan:alpha=50]")
    assert one == ATTACKS.build("spiking:[pgd:steps=10],surrogate=[atan:alpha=50]")
    assert ATTACKS.build(ATTACKS.spec(one)) == one
    assert (one.steps, one.restarts) == (10, 1)
    assert not hasattr(one, "stages")
    assert ATTACKS.build("spiking:pgd").surrogate == "pdsg"
    for wrong in ("spiking:square", "spiking:auto", "spiking:online", "spiking:pgd,surrogate="):
        with pytest.raises(UsageError):
            ATTACKS.build(wrong)


@pytest.mark.slow
def test_models_without_spikes_are_told_so(victim) -> None:
    _, x, y = victim
    model = as_model(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    for surrogate in ("pdsg", "own", "assg", "ensemble"):
        with pytest.raises(BadModel, match="no spiking neurons"):
            attacked(model, x, y, surrogate)
    with pytest.raises(UnknownName, match="pdsg"):
        attacked(victim[0], x, y, "pdgs")


def test_pdsg_through_the_wrapper_is_pgd_on_the_model_under_it(victim) -> None:
    model, x, y = victim
    wrapped = attacked(model, x, y, "pdsg")
    plain = play(ATTACKS.build(PGD[1:-1]), model.with_rule("pdsg"), x, Untargeted(y), BALL)
    assert torch.equal(wrapped.z, plain.z)
    assert torch.equal(wrapped.meter.forwards, plain.meter.forwards)
    assert int(wrapped.reached.sum()) > 0
    own = attacked(model, x, y, "own")
    assert torch.equal(own.z, play(ATTACKS.build(PGD[1:-1]), model, x, Untargeted(y), BALL).z)
    assert torch.equal(own.z, attacked(model, x, y, "atan").z)


def test_adversarials_of_a_rescaled_network_are_the_same_bits(victim) -> None:
    model, x, y = victim
    other = rescaled(model, 16.0)
    with torch.no_grad():
        assert torch.equal(other(x), model(x))
    for attack in (PGD, "fgsm", "[apgd-ce:steps=8]"):
        one, two = attacked(model, x, y, "pdsg", attack), attacked(other, x, y, "pdsg", attack)
        assert torch.equal(one.z, two.z)
    assert not torch.equal(attacked(model, x, y, "atan").z, attacked(other, x, y, "atan").z)


@pytest.mark.slow
def test_a_fixed_width_is_blind_on_a_rescaled_network(task) -> None:
    """The embedded victim, of three small layers; deeper and wider ones blind it more, see `test_effects`."""
    model = MODELS.build("zoo:digits-snn")(task.space.shape, task.classes, RowRng.from_ids(0, ["a"]))
    x, y = right(model, task, 60)
    other = rescaled(model, 16.0)
    assert torch.equal(attacked(other, x, y, "pdsg").z, attacked(model, x, y, "pdsg").z)
    for rule in ("atan", "sigmoid", "rect"):
        known, blinded = (int(attacked(net, x, y, rule).reached.sum()) for net in (model, other))
        assert known >= 40
        assert blinded < 0.35 * known


@pytest.mark.parametrize("surrogate", ["pdsg", "[pdsg:stats=batch]"])
def test_a_batch_of_one_is_attacked(victim, surrogate: str) -> None:
    """Where a layer has one value, its deviation must not become NaN: sign(NaN) = 0 would return the row untouched."""
    _, x, y = victim
    dense = MODELS.build("snn:widths=,hidden=1,time=1")((1, 8, 8), 10, RowRng.from_ids(0, ["a"]))
    for model in (dense, victim[0]):
        found = attacked(model, x[:1], y[:1], surrogate.strip("[]"))
        assert not bool(found.meter.non_finite.any())
        assert not bool(found.meter.zero_gradient.any())
        assert float((found.z - x[:1]).abs().max()) > 0.05


@pytest.mark.parametrize("surrogate", ["pdsg", "assg", "hart"])
def test_rows_are_attacked_by_themselves(victim, surrogate: str) -> None:
    model, x, y = victim
    ids = [f"row-{i}" for i in range(len(x))]
    whole = attacked(model, x, y, surrogate).z
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    shuffled = attacked(model, x[order], y[order], surrogate, ids=[ids[i] for i in order]).z
    assert torch.equal(shuffled, whole[order])
    for part in (slice(0, 1), slice(5, 12)):
        assert torch.equal(attacked(model, x[part], y[part], surrogate, ids=ids[part]).z, whole[part])


def test_assg_remembers_within_a_call_and_not_beyond(victim) -> None:
    model, x, y = victim
    first, again = attacked(model, x, y, "assg"), attacked(model, x, y, "assg")
    assert torch.equal(first.z, again.z)
    forgetful = play(ATTACKS.build(PGD[1:-1]), model.with_rule("assg"), x, Untargeted(y), BALL)
    assert not torch.equal(first.z, forgetful.z)
    assert not torch.equal(first.z, attacked(model, x, y, "assg:memory=0.5").z)


@pytest.mark.slow
def test_the_ensemble_is_the_worst_case_of_its_stages(victim) -> None:
    model, x, y = victim
    ensemble = ATTACKS.build(f"spiking:{PGD},surrogate=ensemble")
    stages = ensemble.stages()
    names = [stage.name for stage in stages]
    assert names == ["pdsg", "atan", "rect", "triangle", "rga", "bptr", "hart", "own"]
    together = play(ensemble, model, x, Untargeted(y), BALL)
    union = torch.zeros(len(x), dtype=torch.bool)
    for stage in stages:
        # every stage draws its own start, as a suite's stages do
        rng = RowRng.from_ids(0, [f"row-{i}" for i in range(len(x))]).at(stage.name)
        union |= play(stage.attack, model, x, Untargeted(y), BALL, rng=rng).reached
    assert torch.equal(together.reached, union)


@pytest.mark.slow
def test_every_rule_is_reported(task, tmp_path, victim) -> None:
    from advkit.evaluation.api import evaluate
    from advkit.evaluation.run.store import read_records

    evaluate(
        model=victim[0],
        task=task,
        threat_model="linf:eps=0.1",
        attack="spiking:[pgd:steps=2,step_size=0.5],surrogate=ensemble",
        n=12,
        out=tmp_path / "run",
    )
    records = read_records(tmp_path / "run" / "records.jsonl")
    rules = {record.stage for record in records}
    assert {"pdsg", "atan"} <= rules <= {*ENSEMBLE, "own"}


def test_nothing_of_the_victim_is_touched(victim) -> None:
    model, x, y = victim
    before = {name: tensor.clone() for name, tensor in model.state().items()}
    modes = [each.training for each in model.module.modules()]
    attacked(model, x, y, "ensemble")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state().items())
    assert modes == [each.training for each in model.module.modules()]
    assert all(parameter.grad is None for parameter in model.module.parameters())


@pytest.mark.exhaustive
def test_effects(task) -> None:
    """PDSG finds what a narrow surrogate misses; a rescaled network blinds fixed surrogates and not PDSG."""
    model = trained("snn", task.training(), 12)
    x, y = right(model, task, 150)
    share = {
        name: float(attacked(model, x, y, name).reached.float().mean())
        for name in ("pdsg", "atan", "atan:alpha=50", "ensemble")
    }
    assert share["pdsg"] >= 3 * share["atan:alpha=50"]
    assert share["pdsg"] >= 0.6 * share["atan"]
    assert share["ensemble"] >= max(share.values())
    wide = trained("snn:widths=16+32,hidden=64", task.training(), 20, lr=2e-3)
    x, y = right(wide, task, 150)
    other = rescaled(wide, 16.0)
    assert torch.equal(attacked(other, x, y, "pdsg").z, attacked(wide, x, y, "pdsg").z)
    for rule in ("atan", "sigmoid", "rect"):
        known, blinded = (float(attacked(net, x, y, rule).reached.float().mean()) for net in (wide, other))
        assert known > 0.4
        assert blinded < 0.25 * known


def test_one_rule_stands_in_for_the_ensemble_where_no_verdicts_tell_which_rows_stand() -> None:
    ensemble = Spiking(attack="pgd:steps=3", surrogate="ensemble")
    assert ensemble.stand_in == Spiking(attack="pgd:steps=3", surrogate="pdsg")
    assert not hasattr(ensemble.stand_in, "stand_in"), "one attack stands for itself"


def test_only_the_ensemble_is_a_suite_and_both_go_by_one_name():
    rule, ensemble = (ATTACKS.build(f"spiking:[pgd:steps=3],surrogate={name}") for name in ("pdsg", "ensemble"))
    assert isinstance(ensemble, protocols.Suite)
    assert not isinstance(rule, protocols.Suite)
    for attack in (rule, ensemble):
        assert ATTACKS.build(ATTACKS.spec(attack)) == attack
        assert ATTACKS.spec(attack).startswith("spiking:")
        again = pickle.loads(pickle.dumps(attack))
        assert (type(again), again) == (type(attack), attack)
        assert attack.steps == 3
    assert type(replace(ensemble, surrogate="atan")) is type(rule)
    assert replace(ensemble, surrogate="atan").surrogate == "atan"
    assert type(replace(rule, surrogate="ensemble")) is type(ensemble)
