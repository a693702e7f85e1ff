import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import nn

from advkit.attacks.gradient.fgsm import FGSM
from advkit.core.errors import UsageError
from advkit.core.protocols import Access
from advkit.core.spaces import Box
from advkit.evaluation.api import evaluate
from advkit.models.torch import TorchModel
from advkit.threat_models import THREAT_MODELS
from advkit.threat_models.lp import Linf
from advkit.threat_models.tapm import Tapm, TransferGrid, game_value

SOURCES, ATTACKS = ["a", "b", "c"], ["fgsm", "pgd"]
GROUPS = {"a": "normal", "b": "linf", "c": "normal"}


@pytest.fixture
def by_hand():
    errors = np.zeros((3, 2, 4), dtype=bool)
    errors[0, 0] = [1, 0, 0, 0]
    errors[0, 1] = [1, 1, 0, 0]
    errors[1, 1] = [0, 0, 1, 0]
    errors[2, 0] = [1, 0, 0, 0]
    return errors


@pytest.fixture
def drawn():
    return np.random.default_rng(5).random((3, 2, 60)) < np.linspace(0.1, 0.8, 6).reshape(3, 2, 1)


def accuracies(errors, sources, attacks, groups=None, seen=(), white_box=()):
    """Of the grid with these names; groups by source."""
    grid = TransferGrid(
        sources=tuple(sources),
        attacks=tuple(attacks),
        groups=tuple(groups[name] for name in sources) if groups else (),
        seen=frozenset(seen),
        white_box=frozenset(white_box),
    )
    return grid.accuracies(errors)


def value(block, figure):
    return block[figure]["value"]


def test_hand_made_tensor(by_hand):
    found = accuracies(by_hand, SOURCES, ATTACKS, GROUPS, seen=["a"])
    overall = found["overall"]
    assert overall["acc_avg"] == {"value": 19 / 24, "numerator": 19, "denominator": 24}
    assert overall["acc_best_attack"] == {"value": 0.5, "numerator": 2, "denominator": 4}
    assert overall["acc_per_sample"] == {"value": 0.25, "numerator": 1, "denominator": 4}
    assert overall["worst"] == {"source": "a", "attack": "pgd"}
    assert found["by_source"]["b"]["acc_avg"]["numerator"] == 7
    assert found["by_attack"]["fgsm"]["acc_best_attack"]["numerator"] == 3
    assert found["by_attack"]["fgsm"]["worst"] == {"source": "a", "attack": "fgsm"}
    assert found["by_group"]["normal"]["acc_per_sample"]["numerator"] == 2
    assert found["seen"]["acc_best_attack"]["numerator"] == 2
    assert found["unseen"]["acc_per_sample"]["numerator"] == 2


def test_union_below_best_below_average_in_every_block(drawn):
    found = accuracies(drawn, SOURCES, ATTACKS, GROUPS, seen=["b"])
    blocks = [found["overall"], found["seen"], found["unseen"]]
    blocks += [b for kind in ("source", "attack", "group") for b in found[f"by_{kind}"].values()]
    assert len(blocks) == 10
    for block in blocks:
        assert value(block, "acc_per_sample") <= value(block, "acc_best_attack") <= value(block, "acc_avg")


def test_the_three_accuracies_agree_with_their_definitions(drawn):
    overall = accuracies(drawn, SOURCES, ATTACKS)["overall"]
    assert value(overall, "acc_avg") == pytest.approx(1 - drawn.mean())
    assert value(overall, "acc_best_attack") == pytest.approx(1 - drawn.mean(2).max())
    assert value(overall, "acc_per_sample") == pytest.approx(1 - drawn.any((0, 1)).mean())


def test_the_order_of_sources_changes_nothing(drawn):
    drawn[2] = drawn[0]  # ties too
    plain = accuracies(drawn, SOURCES, ATTACKS, GROUPS, seen=["a"])
    for order in itertools.permutations(range(3)):
        names = [SOURCES[i] for i in order]
        moved = accuracies(drawn[list(order)], names, ATTACKS, GROUPS, seen=["a"])
        for part in ("overall", "by_source", "by_attack", "by_group", "seen", "unseen"):
            assert moved[part] == plain[part]


def test_one_more_source_never_raises_best_or_union(drawn):
    for figure in ("acc_best_attack", "acc_per_sample"):
        values = [value(accuracies(drawn[:s], SOURCES[:s], ATTACKS)["overall"], figure) for s in (1, 2, 3)]
        assert values == sorted(values, reverse=True)


def test_missing_cells_are_listed_and_count_neither_way(by_hand):
    errors = by_hand.astype(float)
    errors[0, 1] = np.nan
    found = accuracies(errors, SOURCES, ATTACKS)
    assert found["missing"] == [["a", "pgd"]]
    assert found["overall"]["cells"] == 5
    assert found["overall"]["acc_avg"]["denominator"] == 20
    assert found["overall"]["acc_avg"]["numerator"] == 17
    assert found["overall"]["acc_per_sample"]["numerator"] == 2


def test_an_image_that_lacks_an_entry_is_left_out_everywhere(by_hand):
    errors = by_hand.astype(float)
    errors[2, 0, 3] = np.nan
    found = accuracies(errors, SOURCES, ATTACKS)
    assert (found["rows"], found["incomplete"]) == (3, 1)
    complete = accuracies(by_hand[:, :, :3], SOURCES, ATTACKS)
    assert found["overall"] == complete["overall"]


def test_a_victim_among_the_sources_is_shown_by_source_only(by_hand):
    found = accuracies(by_hand, SOURCES, ATTACKS, white_box=["a"])
    without = accuracies(by_hand[1:], SOURCES[1:], ATTACKS)
    assert found["overall"] == without["overall"]
    assert found["by_source"]["a"]["acc_best_attack"]["numerator"] == 2


def test_nothing_measured_is_nothing_reported():
    found = accuracies(np.full((1, 1, 3), np.nan), ["a"], ["fgsm"])
    assert found["overall"] is None
    assert found["missing"] == [["a", "fgsm"]]
    assert accuracies(np.zeros((1, 1, 3)), ["a"], ["fgsm"], seen=["a"])["unseen"] is None


@pytest.mark.parametrize(
    ("errors", "arguments"),
    [
        (np.zeros((3, 2)), {}),
        (np.zeros((2, 2, 4)), {}),
        (np.full((3, 2, 4), 0.5), {}),
        (np.zeros((3, 2, 4)), {"seen": ["d"]}),
        (np.zeros((3, 2, 4)), {"white_box": ["d"]}),
    ],
)
def test_what_does_not_fit_is_refused(errors, arguments):
    with pytest.raises(UsageError):
        accuracies(errors, SOURCES, ATTACKS, **arguments)


def test_names_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="1 groups for 3 sources"):
        TransferGrid(sources=("a", "b", "c"), attacks=("fgsm",), groups=("x",))
    with pytest.raises(UsageError, match="differ"):
        TransferGrid(sources=("a", "a"), attacks=("fgsm",))


def test_two_by_two_game_with_an_interior_solution():
    # Both columns pay the same at p, both rows at q.
    a, b, c, d = 0.9, 0.3, 0.2, 0.8
    p = (d - c) / (a - b - c + d)
    q = (d - b) / (a - b - c + d)
    defender, attacker, found = game_value([[a, b], [c, d]])
    assert found == pytest.approx((a * d - b * c) / (a - b - c + d))
    assert defender == pytest.approx([p, 1 - p])
    assert attacker == pytest.approx([q, 1 - q])


def test_dominated_defenders_get_no_weight():
    game = np.array([[0.9, 0.3], [0.2, 0.8], [0.1, 0.2]])
    defender, _, found = game_value(game)
    assert defender[2] == pytest.approx(0.0, abs=1e-9)
    assert found == pytest.approx(game_value(game[:2])[2])


def test_dominated_attackers_get_no_weight():
    game = np.array([[0.9, 0.3, 0.95], [0.2, 0.8, 0.9]])
    assert game_value(game)[1][2] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_value_solves_both_programmes_and_lies_between_the_pure_values(seed):
    generator = np.random.default_rng(seed)
    game = generator.random(tuple(generator.integers(1, 7, 2)))
    defender, attacker, found = game_value(game)
    m, n = game.shape
    assert defender.sum() == pytest.approx(1)
    assert attacker.sum() == pytest.approx(1)
    assert (defender >= 0).all()
    assert (attacker >= 0).all()
    # Neither side gains by deviating: a certificate that needs no solver.
    assert (defender @ game).min() == pytest.approx(found, abs=1e-7)
    assert (game @ attacker).max() == pytest.approx(found, abs=1e-7)
    assert game.min(1).max() - 1e-9 <= found <= game.max(0).min() + 1e-9
    least = linprog(
        np.r_[np.zeros(n), 1.0],
        A_ub=np.c_[game, -np.ones(m)],
        b_ub=np.zeros(m),
        A_eq=np.r_[np.ones(n), 0.0][None],
        b_eq=[1],
        bounds=[(0, None)] * n + [(None, None)],
    )
    assert least.fun == pytest.approx(found, abs=1e-7)


def test_a_constant_shifts_the_value_and_no_mix():
    game = np.array([[0.9, 0.3], [0.2, 0.8]])
    defender, attacker, found = game_value(game)
    moved = game_value(game + 7.0)
    assert moved[2] == pytest.approx(found + 7.0)
    assert moved[0] == pytest.approx(defender)
    assert moved[1] == pytest.approx(attacker)


def test_a_game_with_a_saddle_point_and_a_constant_game():
    assert game_value([[0.5, 0.6], [0.1, 0.9]])[2] == pytest.approx(0.5)
    assert game_value([[0.4, 0.4]])[2] == pytest.approx(0.4)


@pytest.mark.parametrize("game", [[0.1, 0.2], [[]], [[0.1, float("nan")]]])
def test_no_game_no_value(game):
    with pytest.raises(UsageError):
        game_value(game)


def test_the_grid_of_a_spec():
    threat = THREAT_MODELS.build("tapm:eps=0.1,sources=[zoo:a]+[zoo:b],attacks=fgsm+[pgd:steps=3],seen=[zoo:a]")
    assert threat.cells == (
        ("zoo:a", "fgsm"),
        ("zoo:a", "pgd:steps=3"),
        ("zoo:b", "fgsm"),
        ("zoo:b", "pgd:steps=3"),
    )
    assert THREAT_MODELS.build(THREAT_MODELS.spec(threat)) == threat
    assert threat.scenario == "grid"
    cell = threat.cell("zoo:b")
    assert (cell.surrogates, cell.eps, cell.attacks_all) == (("zoo:b",), 0.1, True)
    assert cell.access == Access.GRADIENTS
    assert cell.victim_access == Access.NOTHING


def test_public_sources_are_filled_in_later():
    threat = Tapm(eps=0.1)
    assert threat.surrogates == ("public",)
    with pytest.raises(UsageError, match="with_sources"):
        _ = threat.cells
    filled = threat.with_sources(["x", "y"], seen=["x"])
    assert len(filled.cells) == 2 * len(threat.attacks)
    assert filled.seen == ("x",)


# Played by the harness


class Watched(TorchModel):
    """A victim that must not be asked while an attack is at work."""

    working = False

    def __call__(self, x):
        assert not Watched.working, "the victim was asked while transfer images were made"
        return super().__call__(x)

    def to(self, device):
        return self


@dataclass(frozen=True, kw_only=True)
class Watching(FGSM):
    def __call__(self, *arguments):
        Watched.working = True
        try:
            return super().__call__(*arguments)
        finally:
            Watched.working = False


def model(seed, name, kind=TorchModel):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    return kind(module, Box(0.0, 1.0, (1, 4, 4)), 3, name=name)


@pytest.fixture
def rows():
    x = torch.rand(80, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return x, model(0, "labeller")(x).argmax(1)


@pytest.mark.slow
def test_the_victim_is_never_asked_while_images_are_made(rows):
    grid = Tapm(eps=0.2, sources=(model(1, "s"), model(2, "t")), attacks=(Watching(),))
    report = evaluate(task=rows, model=model(0, "v", Watched), threat_model=grid, device="cpu")
    assert report.to_dict()["metrics"]["tapm_acc_avg"]["denominator"] == 2 * 80
    # The wire is live: a white-box attack on the same victim trips it in every row.
    direct = evaluate(Watching(), task=rows, model=model(0, "v", Watched), threat_model=Linf(0.2), device="cpu")
    assert direct.to_dict()["metrics"]["robust_accuracy_upper"]["numerator"] == 80


@pytest.mark.slow
def test_a_victim_that_is_a_source_shows_its_white_box_result_there(rows):
    victim = model(0, "v")
    grid = Tapm(eps=0.2, sources=(model(0, "itself"), model(1, "s")), attacks=("fgsm",))
    shown = evaluate(task=rows, model=victim, threat_model=grid, device="cpu").to_dict()
    own = next(entry for entry in shown["attacks"] if entry["name"] == "fgsm@itself")
    other = next(entry for entry in shown["attacks"] if entry["name"] == "fgsm@s")
    direct = evaluate("fgsm", task=rows, model=victim, threat_model=Linf(0.2, lattice=255), device="cpu").to_dict()
    assert own["robust_accuracy"]["numerator"] == direct["metrics"]["robust_accuracy"]["numerator"] < 40
    # and that cell is left out of what counts as transfer
    assert shown["metrics"]["tapm_acc_avg"]["numerator"] == other["robust_accuracy"]["numerator"]


def test_a_grid_whose_every_source_is_the_victim_is_no_transfer(rows):
    grid = Tapm(eps=0.2, sources=(model(0, "itself"),), attacks=("fgsm",))
    with pytest.raises(UsageError, match=r"every source \(itself\) has the victim's own weights.*add a source"):
        evaluate(task=rows, model=model(0, "v"), threat_model=grid, device="cpu")


@pytest.mark.parametrize("arguments", [{"sources": ()}, {"attacks": ()}, {"sources": ("a", "a")}, {"sources": "a"}])
def test_a_grid_without_cells_or_with_doubles_is_refused(arguments):
    with pytest.raises(UsageError):
        Tapm(eps=0.1, **arguments)
