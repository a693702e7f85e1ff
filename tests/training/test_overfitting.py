"""The detector of catastrophic overfitting: its rule on curves of known kind, and what the loop does about it."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from advkit.core.errors import StaleRun, UsageError
from advkit.core.protocols import Data
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.defenses.adversarial.single_step import FGSMRS
from advkit.defenses.adversarial.watched import WatchedObjective
from advkit.models.torch import TorchModel
from advkit.training.loop import CHECKPOINT, Objective, Recipe, fit
from advkit.training.overfitting import Look, collapsed

RNG = RowRng.from_ids(3, ["run"])
NAN = math.nan


def fired(curve):
    """The places in a curve of (fgsm, pgd, abnormal) where the detector fires."""
    looks = [Look(*point) for point in curve]
    return [end for end in range(len(looks)) if collapsed(looks[: end + 1])]


HEALTHY = [(0.30 + 0.03 * t, 0.25 + 0.02 * t, 0.01 * (t % 8)) for t in range(10)]
SUDDEN = [*HEALTHY[:6], (0.75, 0.02, 0.40), (0.85, 0.0, 0.6)]
SLOW = [(0.50, 0.14, 0.02), (0.55, 0.11, 0.05), (0.55, 0.08, 0.10), (0.60, 0.02, 0.17), (0.72, 0.0, 0.47)]


def test_curves_of_known_kind():
    assert fired(HEALTHY) == []
    assert fired(SUDDEN) == [6, 7]
    assert fired([(f, p, NAN) for f, p, _ in SUDDEN]) == [6, 7]  # by accuracy alone, without a share
    assert fired(SLOW) == [3, 4]
    assert fired([(0.02 * t, 0.01 * t, 0.0) for t in range(10)]) == []  # low from the start
    assert fired([(0.6, 0.0, 0.02)] * 3) == []  # low from the start beside a gap: never fell, and no abnormal share
    assert fired([(0.6, 0.0, 0.4)]) == [0]
    assert fired([(0.45, 0.40, 0.0), (0.30, 0.10, 0.0)]) == []  # both fall: a bad epoch, no overfitting to one step
    assert fired([(0.5, 0.4, 0.5)]) == []  # an abnormal share alone is no sign
    assert fired([*SUDDEN, (0.45, 0.35, 0.03)]) == [6, 7]  # and back again
    assert collapsed([]) == ""


@pytest.mark.parametrize(
    ("last", "expected"),
    [((0.501, 0.25, NAN), False), ((0.51, 0.249, NAN), True), ((0.4985, 0.249, NAN), False)],
)
def test_thresholds_of_the_first_sign(last, expected):
    # fallen below half of the best 0.5, and a gap of more than 0.25
    assert bool(fired([(0.6, 0.5, NAN), last])) == expected


@pytest.mark.parametrize(
    ("last", "expected"), [((0.41, 0.2, 0.151), True), ((0.41, 0.2, 0.15), False), ((0.4, 0.201, 0.9), False)]
)
def test_thresholds_of_the_second_sign(last, expected):
    assert bool(fired([last])) == expected


def test_the_reason_has_the_figures():
    why = collapsed([Look(0.5, 0.4), Look(0.8, 0.01, 0.3)])
    assert all(each in why for each in ("1.0 %", "80.0 %", "40.0 %"))
    assert "30 %" in collapsed([Look(0.8, 0.01, 0.3)])


def test_a_random_model_is_not_flagged():
    data = toy()
    model = network()
    model.module.eval()
    objective = FGSMRS(eps=0.3).objective()
    rows = torch.arange(len(data))
    rng = RowRng.from_ids(0, [str(i) for i in range(len(data))])
    pgd = objective.score(model, data.x, data.y, rows, rng).mean()
    fgsm = objective.measures(model, data.x, data.y, rows, rng)["fgsm_accuracy"].float().mean()
    objective.loss(model, data.x, data.y, rows, rng)
    assert fgsm >= pgd
    assert not collapsed([Look(float(fgsm), float(pgd), objective.noted()["abnormal_share"])])


# ---- what the loop does


def toy(n=96):
    y = torch.arange(n) % 3
    x = (0.5 * torch.rand(n, 6, generator=torch.Generator().manual_seed(5)) + 0.2 * nn.functional.one_hot(y, 6)).clamp(
        0, 1
    )
    return Data(x, y, Box(0.0, 1.0), 3, "toy")


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    return TorchModel(module, Box(0.0, 1.0), 3)


class Scripted(WatchedObjective):
    """Trains on clean rows; the accuracies that the detector sees are written down beforehand."""

    curve = SUDDEN[2:]  # collapses in epoch 5

    def __init__(self, defense):
        super().__init__(defense)
        self.scored = 0
        self.steps = 0

    def prepare(self, model, data, rng):
        self.scored = self.reviewed = 0

    def loss(self, model, x, y, rows, rng):
        self.steps += 1
        return nn.functional.cross_entropy(model(x), y)

    def load(self, state):
        self.scored = int(state["scored"])

    def state(self):
        return {"scored": torch.tensor(self.scored)}

    def score(self, model, x, y, rows, rng):
        self.scored += 1
        return torch.full((len(x),), self.curve[self.scored - 1][1])

    def measures(self, model, x, y, rows, rng):
        return {"fgsm_accuracy": torch.full((len(x),), self.curve[self.scored - 1][0])}

    def noted(self):
        return {"abnormal_share": self.curve[self.scored - 1][2]}


def scripted(**settings):
    return Scripted(FGSMRS(eps=0.3, **settings))


LAST = Recipe(epochs=6, batch_size=32, validation=0.25, select="last")


def run(objective, recipe=LAST, **more):
    return fit(network(), toy(), objective, recipe, RNG, progress=False, **more)


def test_warn_goes_on_and_says_so(caplog):
    caplog.set_level(logging.WARNING, logger="advkit")
    done = run(scripted())
    assert len(done.log) == 6
    assert done.best_epoch == 6
    assert not done.halted
    assert [entry.figures["overfitting"] for entry in done.log] == [0, 0, 0, 0, 1, 1]
    assert [entry.figures["abnormal_share"] for entry in done.log] == [point[2] for point in Scripted.curve]
    assert done.log[4].figures["fgsm_accuracy"] == pytest.approx(0.75)
    assert [record.message for record in caplog.records if "catastrophic overfitting in epoch 5" in record.message]


def test_stop_ends_the_run_and_rolls_back():
    whole, five = run(scripted()), run(scripted(), replace(LAST, epochs=5))
    assert whole.log[3].loss == five.log[3].loss
    done = run(scripted(overfitting="stop"))
    assert len(done.log) == 5
    assert "epoch 5" in done.halted
    assert done.best_epoch == 4  # the best PGD accuracy before it
    assert done.last.state_sha256() == five.last.state_sha256()
    # the weights of epoch 4, as a run of the same length that saw nothing selects them
    best = run(scripted(), replace(LAST, select="best"))
    assert best.best_epoch == 4
    assert done.model.state_sha256() == best.model.state_sha256() != done.last.state_sha256()


def test_without_roll_back_the_recipe_selects():
    done = run(scripted(overfitting="stop", roll_back=False))
    assert done.best_epoch == len(done.log) == 5
    assert done.model.state_sha256() == done.last.state_sha256()
    best = run(scripted(overfitting="stop", roll_back=False), replace(LAST, select="best"))
    assert best.best_epoch == 4


def test_a_collapse_that_scores_best_is_not_rolled_back_to():
    class Odd(Scripted):
        curve = [(0.3, 0.25, 0.0), (0.5, 0.28, 0.4)]  # the second sign fires at the best PGD accuracy so far

    done = run(Odd(FGSMRS(eps=0.3, overfitting="stop")), replace(LAST, select="best"))
    assert [entry.figures["overfitting"] for entry in done.log] == [0, 1]
    assert done.best_epoch == 1


def test_a_collapse_in_the_first_epoch_has_nothing_before_it():
    class Early(Scripted):
        curve = [(0.6, 0.0, 0.4)]

    done = run(Early(FGSMRS(eps=0.3, overfitting="stop")))
    assert done.best_epoch == len(done.log) == 1


def test_raise_is_an_error_and_the_epoch_before_stays(tmp_path):
    with pytest.raises(UsageError, match="catastrophic overfitting in epoch 5"):
        run(scripted(overfitting="raise"), out=tmp_path)
    assert len(json.loads((tmp_path / "log.json").read_text())) == 4
    again = scripted(overfitting="raise")
    with pytest.raises(UsageError, match="epoch 5"):
        run(again, out=tmp_path)
    assert again.steps == 3  # one epoch of three batches


def test_a_halted_run_is_finished(tmp_path):
    first = run(scripted(overfitting="stop"), out=tmp_path)
    again = scripted(overfitting="stop")
    second = run(again, out=tmp_path)
    assert again.steps == 0
    assert second.halted == first.halted != ""
    assert second.model.state_sha256() == first.model.state_sha256()
    assert second.best_epoch == first.best_epoch
    assert second.log == first.log


def test_interrupted_and_resumed_it_stops_at_the_same_place(tmp_path):
    class Cut(Scripted):
        def loss(self, *given):
            if self.steps == 10:
                raise KeyboardInterrupt
            return super().loss(*given)

    whole = run(scripted(overfitting="stop"))
    with pytest.raises(KeyboardInterrupt):
        fit(network(), toy(), _as_scripted(Cut), LAST, RNG, out=tmp_path, progress=False)
    resumed = run(scripted(overfitting="stop"), out=tmp_path)
    assert resumed.halted == whole.halted
    assert resumed.model.state_sha256() == whole.model.state_sha256()
    assert [replace(e, seconds=0) for e in resumed.log] == [replace(e, seconds=0) for e in whole.log]


def _as_scripted(kind):
    made = kind(FGSMRS(eps=0.3, overfitting="stop"))
    made.fingerprint = scripted(overfitting="stop").fingerprint
    return made


def test_it_looks_when_the_loop_scores():
    done = run(scripted(), replace(LAST, epochs=5, select_every=2))
    assert ["overfitting" in entry.figures for entry in done.log] == [False, True, False, True, True]
    assert all("abnormal_share" in entry.figures for entry in done.log)


def test_a_checkpoint_of_another_defense_is_refused(tmp_path):
    from advkit.defenses import DEFENSES

    run(DEFENSES.build("fgsm_rs:eps=0.3").objective(), replace(LAST, epochs=1), out=tmp_path)
    others = ["n_fgsm", "fgsm_at", "aaer", "grad_align", "free_at", "pgd_at"]
    for spec in [*(f"{name}:eps=0.3" for name in others), "fgsm_rs:eps=0.2", "fgsm_rs:eps=0.3,overfitting=stop"]:
        with pytest.raises(StaleRun, match="another model, data set, recipe, objective or seed"):
            run(DEFENSES.build(spec).objective(), replace(LAST, epochs=1), out=tmp_path)


@pytest.mark.parametrize("bad_at", [1, 5, 6])  # first step, in mid-epoch, last step of the second epoch
@pytest.mark.parametrize("value", [NAN, math.inf])
def test_a_loss_that_is_not_finite_stops_at_its_step(bad_at, value, tmp_path):
    class Explodes(Objective):
        steps = 0

        def loss(self, model, x, y, rows, rng):
            self.steps += 1
            return super().loss(model, x, y, rows, rng) * (value if self.steps == bad_at else 1.0)

    objective = Explodes()
    with pytest.raises(UsageError, match=rf"step {bad_at} of 18 \(epoch {(bad_at + 2) // 3}\) is not finite") as said:
        run(objective, out=tmp_path)
    assert objective.steps == bad_at
    kept = (tmp_path / CHECKPOINT).exists()
    assert kept == (bad_at > 3)
    assert ("the checkpoint of epoch 1 stays" in str(said.value)) == kept
    if kept:
        healthy = Explodes()
        healthy.steps = 100
        again = run(healthy, out=tmp_path)
        assert healthy.steps == 100 + 15  # the second epoch is trained again
        assert again.last.state_sha256() == run(Objective()).last.state_sha256()


def test_a_batch_of_one_row_has_no_batch_statistics():
    from advkit.core.errors import BadModel

    objective = FGSMRS(eps=0.3).objective()
    with pytest.raises(BadModel, match="batch_size of at least 2"):
        run(objective, replace(LAST, batch_size=1))
    one = Data(toy().x[:5], toy().y[:5], Box(0.0, 1.0), 3, "toy")
    with pytest.raises(BadModel, match="single row"):
        fit(network(), one, objective, replace(LAST, validation=0.8), RNG, progress=False)
    # a model without them takes it
    plain = TorchModel(nn.Linear(6, 3), Box(0.0, 1.0), 3)
    fit(plain, toy(12), objective, replace(LAST, epochs=1, batch_size=1), RNG, progress=False)
