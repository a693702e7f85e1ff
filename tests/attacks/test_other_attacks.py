"""Attacks beyond Lp balls: exhaustive search, one change for all, and whole evaluations."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import advkit
from advkit.attacks import ATTACKS
from advkit.core.errors import UsageError
from advkit.core.oracle import MeteredOracle
from advkit.core.protocols import Access
from advkit.core.rendered import asked_in
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.evaluation.run.judge import Judge
from advkit.testing.image_laws import CLASSES, SHAPE, play_images
from advkit.testing.play import names
from advkit.testing.victims import network, uniform
from advkit.threat_models import THREAT_MODELS
from advkit.threat_models.goals.untargeted import Untargeted


def build(spec):
    return ATTACKS.build(spec)


def records(folder):
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


# --- rotations and translations


def test_the_grid_finds_what_exhaustive_search_finds():
    model, x = network(SHAPE, CLASSES), uniform(61, 40, *SHAPE)
    threat = THREAT_MODELS.build("transform:rotation=4,translation=0.2").bind(Box(shape=SHAPE))
    attack = build("spatial:rotations=5,translations=3")
    labels = model(x).argmax(1)
    game = attack(
        asked_in(MeteredOracle(model, 40, Access.LABELS), x, threat),
        threat.identity(x),
        Untargeted(labels),
        threat,
        RowRng.from_ids(0, names(40)),
    )
    breakable = torch.zeros(40, dtype=torch.bool)
    smallest = torch.full((40,), torch.inf)
    for angle in (-1, -0.5, 0, 0.5, 1):
        for right in (-1, 0, 1):
            for down in (-1, 0, 1):
                z = torch.tensor([[angle, right, down]]).float().expand(40, 3)
                broken = model(threat.render(z, x)).argmax(1) != labels
                breakable |= broken
                size = float(z[0].abs().max())
                smallest = torch.where(broken, smallest.clamp_max(size), smallest)
    found = model(threat.render(game, x)).argmax(1) != labels
    assert torch.equal(found, breakable)
    assert 0 < int(found.sum()) < 40
    assert torch.equal(game[found].abs().amax(1), smallest[found])  # the smallest that does is returned


def test_the_default_grid_is_the_papers():
    points = build("spatial").grid()
    assert points.shape == (775, 3)
    assert torch.equal(points[0], torch.zeros(3))
    assert len(points.unique(dim=0)) == 775
    assert torch.equal(points.abs().amax(1), points.abs().amax(1).sort().values)


@pytest.mark.parametrize(("search", "needs"), [("grid", 1), ("random", 1), ("gradient", 3)])
def test_the_search_says_what_it_asks_for(search, needs):
    assert build(f"spatial:search={search}").needs == needs


def test_the_query_budget_ends_a_grid():
    game = play_images(build("spatial"), queries=7)
    assert int(game.meter.queries.max()) == 7


# --- flows


def test_a_smoother_flow_is_what_the_weight_buys():
    rough = play_images(build("stadv:smooth=0,steps=20"), threat=THREAT_MODELS.build("flow:tau=1"))
    smooth = play_images(build("stadv:smooth=1,steps=20"), threat=THREAT_MODELS.build("flow:tau=1"))
    of = [game.threat.measures(game.z, game.start)["flow_roughness"] for game in (rough, smooth)]
    assert float(of[1].mean()) < float(of[0].mean())


# --- one change for all


@pytest.mark.parametrize(
    ("spec", "threat"),
    [
        ("universal:samples=30,steps=12,batch=10", "universal:eps=0.2"),
        ("universal:samples=30,steps=12,batch=10", "universal:eps=1,ball=l2"),
        ("universal:method=deepfool,samples=10,passes=1", "universal:eps=0.2"),
        ("patch:samples=30,steps=12,batch=10", "patch:size=3,place=random,universal=true"),
    ],
)
def test_the_change_is_one_for_all_images_whatever_the_batch(spec, threat):
    attack, threat = build(spec), THREAT_MODELS.build(threat)
    whole = play_images(attack, threat=threat)
    assert bool(whole.threat.admits(whole.z, whole.x).all())
    assert torch.equal(play_images(attack, [6, 2], threat=threat).z, whole.z[[6, 2]])
    assert not torch.equal(play_images(attack, threat=threat, seed=1).z, whole.z)


def test_a_universal_perturbation_on_a_linear_victim_is_the_sign_of_its_weights():
    """With one label and a linear victim every sample has the same gradient: the vector is eps times its sign."""
    weight = torch.linspace(-1, 1, 64).reshape(1, 64) + 0.001

    def model(x):
        score = (x.flatten(1) * weight).sum(1)
        return torch.stack([score, -score], 1)

    x = 0.3 + 0.4 * uniform(62, 5, *SHAPE)
    threat = THREAT_MODELS.build("universal:eps=0.05").bind(Box(shape=SHAPE))
    known = 0.3 + 0.4 * uniform(63, 30, *SHAPE)
    rule = replace(advkit.threat_models.GOALS.build("targeted:how=class,target=1"))
    data = advkit.core.protocols.Data(known, torch.zeros(30, dtype=torch.long), Box(shape=SHAPE), 2, rule=rule)
    oracle = MeteredOracle(model, 5, data=data)
    goal = rule(torch.zeros(5, dtype=torch.long), model(x), None)
    z = build("universal:samples=30,steps=40,batch=10")(oracle, x, goal, threat, RowRng.from_ids(0, names(5)))
    torch.testing.assert_close(z, x - 0.05 * weight.reshape(SHAPE).sign(), atol=1e-6, rtol=0)


def test_learning_needs_data_like_the_images_and_a_goal_that_has_targets_for_it():
    attack = build("universal:samples=10,steps=2,batch=5")
    x, model = uniform(64, 2, *SHAPE), network(SHAPE, CLASSES)
    threat = THREAT_MODELS.build("universal:eps=0.1").bind(Box(shape=SHAPE))
    goal, rng = Untargeted(torch.zeros(2, dtype=torch.long)), RowRng.from_ids(0, names(2))
    with pytest.raises(UsageError, match="training set"):
        attack(MeteredOracle(model, 2), x, goal, threat, rng)
    each = advkit.threat_models.GOALS.build("targeted:how=each,targets=1+2")
    data = advkit.core.protocols.Data(x, torch.zeros(2, dtype=torch.long), Box(shape=SHAPE), CLASSES, rule=each)
    with pytest.raises(UsageError, match="no targets of their own"):
        attack(MeteredOracle(model, 2, data=data), x, goal, threat, rng)
    other = replace(data, x=uniform(65, 2, 1, 4, 4), rule=advkit.threat_models.GOALS.build("untargeted"))
    with pytest.raises(UsageError, match="shape"):
        attack(MeteredOracle(model, 2, data=other), x, goal, threat, rng)


# --- whole evaluations


def evaluated(tmp_path, name, **settings):
    folder = tmp_path / name
    report = advkit.evaluate(
        task="digits", model="zoo:digits-mlp", device="cpu", out=folder, **{"n": 40, "seed": 0} | settings
    )
    return report.to_dict(), records(folder)


@pytest.mark.slow
def test_records_do_not_depend_on_the_batch_size(tmp_path):
    for attack in ("spatial:rotations=5,translations=3", "stadv:steps=5", "patch:steps=5,restarts=2"):
        _, whole = evaluated(tmp_path, f"{attack}-40", attack=attack)
        _, parts = evaluated(tmp_path, f"{attack}-7", attack=attack, batch_size=7)
        assert parts == whole


def test_a_universal_perturbation_is_judged_on_all_samples_at_once(tmp_path):
    attack = "universal:samples=200,steps=20,batch=50"
    said, whole = evaluated(tmp_path, "one", attack=attack)
    _, parts = evaluated(tmp_path, "batches", attack=attack, batch_size=7)
    assert parts == whole
    rate = said["metrics"]["fooling_rate"]
    changed = sum(record["clean"] != record["adversarial"] for record in whole)
    assert (rate["numerator"], rate["denominator"]) == (changed, 40)
    assert all(record["measures"]["linf"] > 0 for record in whole)  # also those that are wrong when clean
    assert not any("outside_threat_model" in record["notes"] for record in whole)
    assert said["threat_model"]["name"] == "universal"


def test_changes_that_are_not_one_are_invalid(tmp_path):
    class EachItsOwn:
        needs = Access.NOTHING

        def __call__(self, oracle, x, goal, threat, rng):
            return (x + 0.05 * (2 * rng.uniform(x) - 1)).clamp(0, 1)

    _, found = evaluated(tmp_path, "own", attack=EachItsOwn(), threat_model="universal:eps=0.1", n=10)
    assert {record["outcome"] for record in found} <= {"invalid", "wrong"}


def test_parameters_beyond_the_limits_are_invalid(tmp_path):
    class TooFar:
        needs = Access.NOTHING

        def __call__(self, oracle, x, goal, threat, rng):
            return x + 1.5

    _, found = evaluated(tmp_path, "far", attack=TooFar(), threat_model="transform:rotation=5,translation=1", n=10)
    assert {record["outcome"] for record in found} <= {"invalid", "wrong"}
    assert all(record["distance"] == 0 for record in found)


@pytest.mark.slow
def test_a_corrupted_accuracy_is_the_models_on_the_librarys_images(tmp_path):
    pytest.importorskip("kornia")
    said, found = evaluated(tmp_path, "noise", attack="corruption:kind=contrast,severity=5")
    task = advkit.tasks.TASKS.build("digits")
    batch = next(iter(task.batches(40, n=40)))
    threat = THREAT_MODELS.build("corruption").bind(task.space)
    z = torch.tensor([[5.0, 5.0, 0.0]]).expand(40, 3)
    model = advkit.models.MODELS.build("zoo:digits-mlp")((1, 8, 8), 10, RowRng.from_ids(0, ["model"]), space=task.space)
    decided = Judge(model, advkit.core.oracle.Lanes()).answer(threat.render(z, batch.x)).argmax(1)
    attacked = [record for record in found if record["outcome"] != "wrong"]
    places = {name: place for place, name in enumerate(batch.ids)}
    assert all(record["adversarial"] == int(decided[places[record["id"]]]) for record in attacked)
    assert said["threat_model"]["knowledge"] == "none"
    assert all(record["queries"] == 0 for record in found)


def test_any_attack_that_walks_works_on_parameters(tmp_path):
    for attack, threat in (("pgd:steps=5", "flow:tau=1"), ("fgsm", "transform"), ("pgd:steps=3", "patch:size=3")):
        _, found = evaluated(tmp_path, threat, attack=attack, threat_model=threat, n=10)
        assert {record["outcome"] for record in found} <= {"broken", "robust", "wrong"}


@pytest.mark.parametrize(
    ("attack", "threat", "said"),
    [
        ("pgd", "universal", "use the attack universal"),
        ("pgd", "corruption", "corruption:kind=NAME"),
        ("spatial", "linf:eps=0.1", "transform:rotation=30,translation=3"),
        ("universal", "patch:size=3", "universal:eps=0.1"),
        ("corruption:severity=5", "corruption:severity=2", "severity=5"),
        ("square", "flow", "square"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(attack, threat, said):
    if "corruption" in threat:
        pytest.importorskip("kornia")
    with pytest.raises(UsageError, match=said):
        advkit.evaluate(attack=attack, threat_model=threat, task="digits", model="zoo:digits-mlp", n=4, device="cpu")


@pytest.mark.parametrize(
    "spec",
    [
        "spatial:rotations=0",
        "spatial:search=all",
        "stadv:smooth=-1",
        "patch:steps=0",
        "universal:rate=0",
        "universal:method=adam",
        "corruption:kind=fog",
        "corruption:severity=0",
    ],
)
def test_settings_out_of_range_are_refused(spec):
    with pytest.raises(UsageError):
        build(spec)
