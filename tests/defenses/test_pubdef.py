import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from advkit.attacks.gradient.pgd import PGD
from advkit.core.errors import AdvkitError, BadInput, BadModel, NoTrainingData, UsageError
from advkit.core.protocols import Data
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.defenses import DEFENSES
from advkit.defenses.adversarial.pubdef import PubDef, Source, public_sources, select_sources
from advkit.defenses.adversarial.pubdef_losses import base_weights, dynamic_weights
from advkit.defenses.adversarial.transfer_set import Maker, TransferSet
from advkit.models.torch import TorchModel
from advkit.threat_models.lp import Linf
from advkit.training.augment import crop_flip
from advkit.training.loop import Objective, Recipe, fit

EPS = 0.1
ROWS, CLASSES = 60, 3


def streams(n, seed=0):
    return RowRng.from_ids(seed, [str(row) for row in range(n)])


def network(seed, name="", hidden=16):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Flatten(), nn.Linear(36, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES)).eval()
    return TorchModel(module, Box(0.0, 1.0, (1, 6, 6)), CLASSES, name=name)


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    centres = torch.rand(CLASSES, 1, 6, 6, generator=generator)
    y = torch.arange(ROWS) % CLASSES
    x = (centres[y] + 0.15 * torch.randn(ROWS, 1, 6, 6, generator=generator)).clamp(0, 1)
    return Data(x, y, Box(0.0, 1.0, (1, 6, 6)), CLASSES, "blobs")


@pytest.fixture(scope="module")
def sources(data):
    recipe = Recipe(epochs=15, batch_size=20, lr=1e-2, validation=0.0, select="last")
    found = []
    for seed, name in enumerate(("a", "b", "c")):
        model = fit(network(seed), data, Objective(), recipe, streams(1, seed), progress=False).model
        model.name = name
        found.append(model)
    return tuple(found)


@pytest.fixture
def defense(sources, tmp_path):
    recipe = Recipe(epochs=2, batch_size=20)
    return PubDef(eps=EPS, sources=sources, copies=2, recipe=recipe, cache=str(tmp_path))


def prepared(defense, data, model=None):
    objective = defense.objective()
    objective.prepare(model or network(9), data, streams(1))
    return objective


def maker(source, augment=crop_flip, eps=EPS, seed=0, attack=None):
    attack = attack or PGD(steps=4, step_size=0.5, stop=False)
    return Maker(source, attack, Linf(eps, lattice=255), augment, seed, source.describe().state_sha256)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.module.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Forbidden(TorchModel):
    def __call__(self, x):
        raise AssertionError("the target was asked while transfer images were made")


# The stored images


def test_stored_images_lie_in_the_ball_of_the_augmented_image(data, sources):
    images, origin = maker(sources[0])(data.x, data.y, range(ROWS), 0)
    x = images.float() / 255
    assert images.dtype == torch.uint8
    assert (x - origin).abs().max() <= EPS + 1e-6
    assert (x - origin).abs().max() > EPS - 2 / 255
    assert x.min() >= 0
    assert x.max() <= 1
    # They were made from shifted images: around the clean ones the ball is left.
    assert (x - data.x).abs().max() > EPS + 0.05


def test_copies_are_augmented_and_started_independently(data, sources):
    make = maker(sources[0])
    (one, origin), (other, other_origin), (again, _) = (make(data.x, data.y, range(ROWS), copy) for copy in (0, 1, 0))
    assert torch.equal(one, again)
    assert not torch.equal(origin, other_origin)
    assert (one != other).flatten(1).any(1).float().mean() > 0.9
    plain = maker(sources[0], augment=None)
    assert torch.equal(plain(data.x, data.y, range(ROWS), 0)[1], data.x)
    assert not torch.equal(plain(data.x, data.y, range(ROWS), 0)[0], plain(data.x, data.y, range(ROWS), 1)[0])


def test_a_rows_images_do_not_depend_on_the_batch_it_is_made_in(data, sources):
    make = maker(sources[0])
    whole, _ = make(data.x, data.y, range(ROWS), 0)
    for rows in ([0], list(range(7, 30)), [59, 3, 11]):
        part, _ = make(data.x[rows], data.y[rows], rows, 0)
        assert torch.equal(part, whole[rows])


def test_rows_that_already_fool_the_source_are_attacked_to_the_end(data, sources):
    """No early stop: the loss is that of the whole walk, also where the first step fooled the source."""
    long = maker(sources[0], augment=None, eps=0.4, attack=PGD(steps=8, step_size=0.25, stop=True))
    images, _ = long(data.x, data.y, range(ROWS), 0)
    brief = maker(sources[0], augment=None, eps=0.4, attack=PGD(steps=2, step_size=0.25))
    short, _ = brief(data.x, data.y, range(ROWS), 0)

    def losses(stored):
        return functional.cross_entropy(sources[0](stored.float() / 255), data.y, reduction="none").detach()

    fooled = sources[0](short.float() / 255).argmax(1) != data.y
    assert fooled.any()
    assert (losses(images)[fooled] > losses(short)[fooled]).float().mean() > 0.8


def test_images_that_leave_their_ball_are_refused(data, sources):
    def cheat(oracle, x, goal, ball, rng):
        return x + 0.5

    class Open(Linf):
        def finish(self, x, origin):
            return x

    bad = replace(maker(sources[0], attack=cheat), ball=Open(EPS, lattice=255))
    with pytest.raises(AdvkitError, match="outside its ball"):
        bad(data.x, data.y, range(ROWS), 0)


def test_the_set_is_made_once_and_opened_afterwards(data, defense, tmp_path, monkeypatch):
    first = prepared(defense, data)
    files = sorted(tmp_path.rglob("*"))
    assert len([f for f in files if f.suffix == ".npy"]) == 3 * 2
    assert not [f for f in files if f.suffix == ".part"]
    assert all(isinstance(array, np.memmap) for copies in first.stored.images for array in copies)
    with monkeypatch.context() as patch:
        patch.setattr(Maker, "__call__", lambda *_: pytest.fail("made again"))
        again = prepared(defense, data)
    for one, other in itertools.product(range(3), range(2)):
        assert np.array_equal(first.stored.images[one][other], again.stored.images[one][other])


@pytest.mark.parametrize("change", [{"eps": 0.2}, {"set_seed": 1}, {"attack": "pgd:steps=2,step_size=0.5,stop=false"}])
def test_other_settings_make_another_set(data, defense, tmp_path, change):
    prepared(defense, data)
    prepared(replace(defense, **change), data)
    assert len(list(tmp_path.rglob("*.npy"))) == 2 * 3 * 2


def test_what_does_not_change_the_images_shares_the_set(data, defense, tmp_path):
    prepared(defense, data)
    prepared(replace(defense, loss="topk", k=2, weights=(1.0, 3.0), sources=defense.sources[:2]), data)
    assert len(list(tmp_path.rglob("*.npy"))) == 3 * 2


def test_a_run_that_was_cut_off_leaves_no_half_file(data, defense, tmp_path, monkeypatch):
    whole = Maker.__call__

    def cut(self, x, y, rows, copy):
        if copy == 1:
            raise KeyboardInterrupt
        return whole(self, x, y, rows, copy)

    with monkeypatch.context() as patch:
        patch.setattr(Maker, "__call__", cut)
        with pytest.raises(KeyboardInterrupt):
            prepared(defense, data)
    assert len([f for f in tmp_path.rglob("*") if f.is_file()]) == 1
    prepared(defense, data)
    assert len(list(tmp_path.rglob("*.npy"))) == 6


def test_the_target_is_not_asked_while_images_are_made(data, defense):
    target = Forbidden(network(9).module, Box(0.0, 1.0, (1, 6, 6)), CLASSES)
    assert prepared(defense, data, target).stored.sources == 3


def test_taking_images_by_source_copy_and_row():
    images = tuple(
        tuple(
            np.full((5, 2), 50 * s + 10 * c, dtype=np.uint8) + np.arange(5, dtype=np.uint8)[:, None] for c in range(2)
        )
        for s in range(3)
    )
    stored = TransferSet(images)
    rows, copy, source = torch.tensor([4, 0, 2, 2]), torch.tensor([1, 0, 1, 0]), torch.tensor([2, 0, 1, 2])
    expected = torch.tensor([114.0, 0.0, 62.0, 102.0]) / 255
    assert torch.allclose(stored.take(source, copy, rows)[:, 0], expected)
    assert torch.allclose(stored.take(1, copy, rows)[:, 1], torch.tensor([64.0, 50.0, 62.0, 52.0]) / 255)


def test_every_access_draws_a_source_and_a_copy_uniformly(data, defense):
    objective, drawn = prepared(defense, data), []
    take = objective.stored.take

    class Spy:
        sources, copies = 3, 2

        def take(self, source, copy, rows):
            drawn.append(torch.stack([source, copy]))
            return take(source, copy, rows)

    objective.stored = Spy()
    rows = torch.arange(ROWS)
    for epoch in range(20):
        objective.loss(network(9), data.x, data.y, rows, streams(ROWS).at("epoch", epoch))
    source, copy = torch.cat(drawn, dim=1)
    counts = torch.bincount(2 * source + copy, minlength=6)
    expected = 20 * ROWS / 6
    # Chi-square with 5 degrees of freedom: 20.5 is its 99.9 % quantile.
    assert float(((counts - expected) ** 2 / expected).sum()) < 20.5
    assert not torch.equal(drawn[0], drawn[1])


def test_paper_attack_and_its_shortest_step():
    assert PubDef(eps=8 / 255).maker_attack == PGD(steps=10, step_size=0.25, stop=False)
    assert PubDef(eps=0.002).maker_attack.step_size * 0.002 == pytest.approx(0.001)


# The losses on stored images


@pytest.mark.parametrize("loss", ["all", "topk", "dynamic-loss", "dynamic-acc"])
def test_with_one_source_every_loss_is_random(data, defense, loss):
    single = replace(defense, sources=defense.sources[:1])
    model, rows, rng = network(9), torch.arange(ROWS), streams(ROWS)
    values = [
        prepared(one, data).loss(model, data.x, data.y, rows, rng) for one in (single, replace(single, loss=loss, k=1))
    ]
    assert torch.allclose(values[0], values[1], rtol=1e-6)


def test_topk_over_all_sources_is_all(data, defense):
    model, rows, rng = network(9), torch.arange(ROWS), streams(ROWS)
    values = [
        prepared(replace(defense, loss=loss, k=3), data).loss(model, data.x, data.y, rows, rng)
        for loss in ("all", "topk")
    ]
    assert torch.allclose(values[0], values[1], rtol=1e-6)


def test_dynamic_step_moves_the_average_then_weighs_with_it(data, defense):
    objective = prepared(replace(defense, loss="dynamic-loss", ema=0.5), data)
    model, rows, rng = network(9), torch.arange(ROWS), streams(ROWS)
    found = objective.loss(model, data.x, data.y, rows, rng)
    streams_ = [data.x]
    for source in range(3):
        streams_.append(objective.stored.take(source, rng.at("copy", source).integers(2, rows), rows))
    losses = torch.stack([functional.cross_entropy(model(x), data.y) for x in streams_]).detach()
    average = 0.5 * torch.full((4,), 0.25) + 0.5 * losses
    assert torch.allclose(objective.average, average)
    weights_ = dynamic_weights(average, base_weights((0.5, 0.5), 3))
    assert torch.allclose(found.detach(), (weights_ * losses).sum())
    assert found.requires_grad
    assert not objective.average.requires_grad


def test_dynamic_acc_follows_error_rates(data, defense):
    objective = prepared(replace(defense, loss="dynamic-acc", ema=1.0), data)
    model, rows, rng = network(9), torch.arange(ROWS), streams(ROWS)
    objective.loss(model, data.x, data.y, rows, rng)
    clean = (model(data.x).argmax(1) != data.y).float().mean()
    assert torch.allclose(objective.average[0], clean)
    assert ((objective.average * ROWS).round() - objective.average * ROWS).abs().max() < 1e-4


def test_score_is_the_weighted_accuracy_over_clean_and_plain_transfer_images(data, defense):
    objective = prepared(replace(defense, weights=(1.0, 3.0)), data)
    model, rows = network(9), torch.arange(20, 45)
    score = objective.score(model, data.x[rows], data.y[rows], rows, streams(25))
    expected = 0.25 * (model(data.x[rows]).argmax(1) == data.y[rows]).float()
    for source in objective.sources:
        attack, ball = defense.maker_attack, defense.stored_ball(data.space)
        make = Maker(source.model, attack, ball, None, 0, source.key)
        images, _ = make(data.x[rows], data.y[rows], rows.tolist(), "validation")
        expected = expected + 0.25 * (model(images.float() / 255).argmax(1) == data.y[rows]).float()
    assert torch.allclose(score, expected)
    again = objective.score(model, data.x[:30], data.y[:30], torch.arange(30), streams(30))
    assert torch.equal(again[20:], score[:10])


# Training


def test_same_seed_same_weights_and_the_callers_models_are_left_alone(data, defense):
    start = network(9)
    before = [weights(model) for model in (start, *defense.sources)]
    one, again, other = (defense.protect(start, data, streams(1, seed)) for seed in (0, 0, 1))
    assert same(weights(one), weights(again))
    assert not same(weights(one), weights(other))
    assert not same(weights(one), before[0])
    assert all(same(weights(m), b) for m, b in zip((start, *defense.sources), before, strict=True))
    assert all(p.requires_grad for model in defense.sources for p in model.module.parameters())


@pytest.mark.slow
def test_killed_and_resumed_is_uninterrupted(data, defense, tmp_path):
    dynamic = replace(defense, loss="dynamic-loss", recipe=Recipe(epochs=4, batch_size=20))

    def run(objective, out):
        return fit(network(9), data, objective, dynamic.recipe, streams(1), out=out, progress=False)

    whole = run(dynamic.objective(), tmp_path / "whole").last
    failing = dynamic.objective()
    plain, calls = failing.loss, itertools.count()

    def killed(*arguments):
        if next(calls) == 8:
            raise KeyboardInterrupt
        return plain(*arguments)

    failing.loss = killed
    with pytest.raises(KeyboardInterrupt):
        run(failing, tmp_path / "killed")
    resumed = dynamic.objective()
    assert same(weights(run(resumed, tmp_path / "killed").last), weights(whole))
    assert not torch.equal(resumed.average, torch.full((4,), 0.25))


@pytest.mark.slow
def test_training_withstands_the_sources_images(data, defense):
    recipe = Recipe(epochs=30, batch_size=20, lr=1e-2, validation=0.0, select="last")
    undefended = defense.sources[0]
    trained = replace(defense, eps=0.25, recipe=recipe).protect(network(9), data, streams(1))
    images, _ = maker(undefended, augment=None, eps=0.25, seed=5)(data.x, data.y, range(ROWS), 0)
    right = [(model(images.float() / 255).argmax(1) == data.y).float().mean() for model in (undefended, trained)]
    assert right[1] > right[0] + 0.3


def test_training_needs_data(defense):
    with pytest.raises(NoTrainingData):
        defense.protect(network(9), None, streams(1))


# Choosing sources


@pytest.fixture
def grouped(sources):
    groups = {"a": "normal", "b": "normal", "c": "normal", "d": "linf", "e": "linf", "f": "l2"}
    models = {**dict(zip("abc", sources, strict=True)), **{name: network(ord(name)) for name in "def"}}
    return [Source(name, models[name], group) for name, group in groups.items()]


def chosen(candidates, select, data, seed=0):
    attack = PGD(steps=4, step_size=0.5, stop=False)
    return [
        one.name for one in select_sources(candidates, select, data, attack, Linf(EPS, lattice=255), streams(1, seed))
    ]


def test_transfer_takes_of_each_group_the_member_that_fools_the_others_most(data, grouped):
    found = chosen(grouped, ("transfer",), data)
    assert len(found) == 3
    by_group = {one.group: [m for m in grouped if m.group == one.group] for one in grouped}
    for group, members in by_group.items():
        scores = {}
        for one in members:
            images, _ = maker(one.model, augment=None)(data.x, data.y, range(ROWS), "select")
            others = [m for m in members if m is not one]
            scores[one.name] = sum(int((m.model(images.float() / 255).argmax(1) == data.y).sum()) for m in others)
        best = min(scores, key=lambda name: (scores[name], name))
        assert best in found, (group, scores)


@pytest.mark.parametrize("select", [("transfer",), ("random",), ("all",), ("e", "a")])
def test_the_listing_order_does_not_matter(data, grouped, select):
    found = [chosen([grouped[i] for i in order], select, data) for order in ((0, 1, 2, 3, 4, 5), (5, 3, 1, 0, 4, 2))]
    assert found[0] == found[1]


def test_random_takes_one_per_group(data, grouped):
    groups = {one.name: one.group for one in grouped}
    drawn = [chosen(grouped, ("random",), data, seed) for seed in range(12)]
    assert all(sorted(groups[name] for name in found) == ["l2", "linf", "normal"] for found in drawn)
    assert {name for found in drawn for name in found} == set("abcdef")


def test_equal_members_are_told_apart_by_name(data, sources):
    twins = [Source(name, sources[0], "normal") for name in ("z", "y", "x")]
    assert chosen(twins, ("transfer",), data) == ["x"]


def test_unknown_names_and_groups_are_refused(data, grouped):
    with pytest.raises(UsageError, match="nobody"):
        chosen(grouped, ("nobody",), data)
    with pytest.raises(UsageError, match="groups="):
        chosen([replace(grouped[0], group="")], ("transfer",), data)


def test_sources_are_models_with_names_and_groups(data, defense, sources):
    named = public_sources(replace(defense, groups=("normal", "linf", "l2")), data)
    assert [(one.name, one.group, one.model) for one in named] == [
        ("a", "normal", sources[0]),
        ("b", "linf", sources[1]),
        ("c", "l2", sources[2]),
    ]


def test_sources_come_from_the_zoo_and_from_files(data, defense, sources, tmp_path, monkeypatch):
    from advkit.models import zoo

    def card(name, group, seen_by):
        return zoo.Card(
            name=name, task="blobs", model="mlp", group=group, role="public", seen_by=seen_by, sha256="0" * 64, size=1
        )

    cards = [card("p", "normal", ("pubdef",)), card("q", "linf", ("pubdef",)), card("r", "linf", ())]
    held = dict(zip("pqr", sources, strict=True))
    monkeypatch.setattr(zoo, "public", lambda task="", folder=None: tuple(cards) if task == "blobs" else ())
    monkeypatch.setattr(zoo, "load", lambda name, folder=None: held[name])
    training = replace(data, name="blobs/train")
    auto = public_sources(PubDef(eps=EPS), training)
    assert [(one.name, one.group, one.model) for one in auto] == [
        ("zoo:p", "normal", sources[0]),
        ("zoo:q", "linf", sources[1]),
    ]
    assert [one.name for one in public_sources(PubDef(eps=EPS, sources=("public",)), training)] == [
        "zoo:p",
        "zoo:q",
        "zoo:r",
    ]
    assert public_sources(PubDef(eps=EPS, sources=("zoo:r",)), training)[0].group == "linf"
    with pytest.raises(UsageError, match="no public models"):
        public_sources(PubDef(eps=EPS), replace(data, name="elsewhere"))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"sources": ("mlp",)}, BadModel),
        ({"sources": ("auto",)}, UsageError),
        ({"loss": "topk", "k": 4}, UsageError),
        ({"weights": (1.0, 2.0, 3.0)}, UsageError),
        ({"select": ("nobody",)}, UsageError),
        ({"cache": "/dev/null/nowhere"}, UsageError),
    ],
)
def test_what_cannot_be_trained_on_is_refused_before_training(data, defense, change, error):
    with pytest.raises(error):
        prepared(replace(defense, **change), data)


def test_two_sources_of_one_name_are_refused(data, defense, sources):
    with pytest.raises(UsageError, match="more than once"):
        prepared(replace(defense, sources=(sources[0], sources[0])), data)


def test_rows_that_eight_bits_cannot_hold_are_refused(data, defense):
    with pytest.raises(BadInput, match="8 bits"):
        prepared(defense, replace(data, space=Box(-1.0, 1.0)))


@pytest.mark.parametrize(
    "arguments",
    [
        {"sources": "auto"},
        {"sources": ()},
        {"groups": ("a", "b")},
        {"loss": "most"},
        {"ema": 0.0},
        {"copies": 0},
        {"k": 0},
        {"eps": -0.1},
        {"attack": "nonsense"},
    ],
)
def test_nonsense_is_refused(arguments):
    with pytest.raises(AdvkitError):
        PubDef(**arguments)


@pytest.mark.parametrize(
    "spec",
    [
        "pubdef",
        "pubdef:eps=0.1,sources=[zoo:a]+[path:b.safetensors],loss=topk,k=2,weights=0.25+0.75",
        "pubdef:select=transfer,sources=public,attack=[pgd:steps=5,step_size=0.5],recipe=[epochs=3,augment=crop-flip]",
    ],
)
def test_specs_round_trip(spec):
    defense = DEFENSES.build(spec)
    assert DEFENSES.build(DEFENSES.spec(defense)) == defense
    assert defense.claims == "tapm"
