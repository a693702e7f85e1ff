"""One door for the user's model: what can't give a number is refused by name, all else gives the right number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from advkit.core.errors import BadModel
from advkit.core.spaces import Box
from advkit.evaluation.api import evaluate, resolve
from advkit.models.torch import TorchModel, misleading_mode
from advkit.tasks.arrays import Arrays

N = 24
WEIGHT = torch.randn(48, 5, generator=torch.Generator().manual_seed(0))
X = torch.rand(N, 3, 4, 4, generator=torch.Generator().manual_seed(1))
Y = (X - 0.5).flatten(1).mm(WEIGHT).argmax(1)
ATTACK = {"attack": "pgd", "threat_model": "linf:eps=0.01"}


class Net(nn.Module):
    """A linear network that is right on every sample; `returns` changes what it hands back."""

    def __init__(self, returns: Any = lambda logits: logits) -> None:
        super().__init__()
        self.weight = nn.Parameter(WEIGHT.clone())
        self.returns = returns

    def forward(self, x: Tensor) -> Any:
        return self.returns((x - 0.5).flatten(1) @ self.weight)


@dataclass
class Output:
    logits: Tensor
    hidden: None = None


@pytest.fixture(scope="module")
def plain() -> Any:
    return evaluate(task=(X, Y), model=Net().eval(), **ATTACK)


def flags(report: Any) -> dict[str, str]:
    return {flag["id"]: flag["severity"] for flag in report.to_dict()["diagnostics"]["flags"]}


@pytest.mark.parametrize("wrap", [Output, lambda s: {"logits": s, "loss": None}, lambda s: [s]])
def test_logits_in_a_container_are_found(plain: Any, wrap: Any) -> None:
    report = evaluate(task=(X, Y), model=Net(wrap).eval(), **ATTACK)
    assert report.clean_accuracy == 1
    assert report.robust_accuracy == plain.robust_accuracy < 1


@pytest.mark.parametrize("wrap", [lambda s: (s, s.exp()), lambda s: {"scores": s}, lambda s: s.tolist, lambda s: None])
def test_other_containers_are_named(wrap: Any) -> None:
    for model in (Net(wrap).eval(), lambda x: wrap((x - 0.5).flatten(1) @ WEIGHT)):
        with pytest.raises(BadModel, match=r"returns .*logits"):
            evaluate(task=(X, Y), model=model, **ATTACK)


@pytest.mark.parametrize("score", [lambda s: s[:, :1], lambda s: s[:, 0], lambda s: s[:, 0].sigmoid()])
def test_one_score_is_not_two(score: Any) -> None:
    with pytest.raises(BadModel, match="one score per sample, and two are needed"):
        evaluate(task=(X, Y.clamp(max=1)), model=Net(score).eval(), **ATTACK)


def test_whatever_a_model_raises_is_one_line() -> None:
    class Raises(Net):
        def forward(self, x: Tensor) -> Any:
            return {"day": x}["night"]

    with pytest.raises(BadModel, match=r"KeyError: 'night'") as raised:
        evaluate(task=(X, Y), model=Raises().eval(), **ATTACK)
    assert "\n" not in str(raised.value)


def test_channels_last_is_named() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5)).eval()
    with pytest.raises(BadModel, match="channels come last"):
        evaluate(task=(X.permute(0, 2, 3, 1), Y), model=net, **ATTACK)


def test_the_order_of_memory_is_nobodys_business(plain: Any) -> None:
    class Views(Net):
        def forward(self, x: Tensor) -> Any:
            return (x - 0.5).view(len(x), -1) @ self.weight

    permuted = X.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    for rows in (permuted, permuted.numpy()):
        report = evaluate(task=(rows, Y), model=Views().eval(), **ATTACK)
        assert report.robust_accuracy == plain.robust_accuracy


@pytest.mark.slow
def test_a_model_of_one_sample_at_a_time_is_asked_so(plain: Any) -> None:
    class Fixed(Net):
        def forward(self, x: Tensor) -> Any:
            return (x - 0.5).reshape(1, 48) @ self.weight

    for size in (1, None):
        report = evaluate(task=(X, Y), model=Fixed().eval(), batch_size=size, **ATTACK)
        assert (report.clean_accuracy, report.robust_accuracy) == (1, plain.robust_accuracy)


@pytest.mark.slow
@pytest.mark.parametrize("attack", ["pgd", "square:queries=100"])
def test_an_input_changed_in_place_is_copied(attack: str) -> None:
    class InPlace(Net):
        def forward(self, x: Tensor) -> Any:
            return x.sub_(0.5).flatten(1) @ self.weight

    threat = "linf:eps=0.05,access=" + ("scores" if attack.startswith("square") else "gradients")
    data = X.clone()
    want = evaluate(attack, task=(X, Y), model=Net().eval(), threat_model=threat)
    for model in (InPlace().eval(), lambda x: x.sub_(0.5).flatten(1) @ WEIGHT):
        got = evaluate(attack, task=(data, Y), model=model, threat_model=threat)
        assert torch.equal(data, X)
        assert (got.clean_accuracy, got.robust_accuracy) == (1, want.robust_accuracy)
        assert flags(got)["input_changed"] == "info"


def test_an_input_changed_behind_the_door_is_unreliable() -> None:
    class Own(TorchModel):
        """A model of the user's own that leaves nothing to the door."""

        def __call__(self, x: Tensor) -> Tensor:
            answer: Tensor = self.module(x.clone())
            if len(x) > 4:
                x.mul_(0.5)
            return answer

    model = Own(Net().eval(), Box(shape=(3, 4, 4)), 5)
    report = evaluate(
        "square:queries=20", task=(X[:16], Y[:16]), model=model, threat_model="linf:eps=0.01,access=scores"
    )
    assert flags(report)["input_changed"] == "unreliable"


def test_samples_that_depend_on_their_batch_are_flagged() -> None:
    class Centred(Net):
        def forward(self, x: Tensor) -> Any:
            logits = super().forward(x)
            return logits - logits.mean(0, keepdim=True)

    norm = nn.Sequential(nn.BatchNorm2d(3, affine=False, track_running_stats=False), Net()).eval()
    for net in (Centred().eval(), norm):
        with torch.no_grad():
            y = net(X).argmax(1)
        assert flags(evaluate(task=(X, y), model=net, **ATTACK))["batch_dependence"] == "unreliable"


def test_state_kept_between_calls_is_flagged() -> None:
    class Remembers(Net):
        last = 0.0

        def forward(self, x: Tensor) -> Any:
            logits = super().forward(x) + self.last
            self.last = 3 * x.detach().flatten(1).mean(0)[:5] if self.calls_matter(x) else self.last
            return logits

        def calls_matter(self, x: Tensor) -> bool:
            return not torch.equal(x[0], X[0])

    assert flags(evaluate(task=(X, Y), model=Remembers().eval(), **ATTACK))["state_between_calls"] == "unreliable"


def test_a_sound_model_has_none_of_these_flags(plain: Any) -> None:
    assert not flags(plain).keys() & {"batch_dependence", "state_between_calls", "input_changed", "training_mode"}


@pytest.mark.parametrize("attack", ["pgd", "apgd-margin:steps=5", "square:queries=50"])
def test_masked_classes_are_an_answer(attack: str) -> None:
    mask = torch.tensor([0.0, 0.0, 0.0, -torch.inf, -torch.inf])
    y = ((X - 0.5).flatten(1).mm(WEIGHT) + mask).argmax(1)
    threat = "linf:eps=0.01"
    finite = Net(lambda s: s + mask.clamp(min=-1e4)).eval()
    want = evaluate(attack, task=(X, y), model=finite, threat_model=threat)
    got = evaluate(attack, task=(X, y), model=Net(lambda s: s + mask).eval(), threat_model=threat)
    assert got.clean_accuracy == 1
    assert got.robust_accuracy == want.robust_accuracy
    assert "nonfinite_gradient" not in flags(got)


def test_minus_infinity_elsewhere_is_no_mask() -> None:
    def log_of_zero(logits: Tensor) -> Tensor:
        return torch.where(logits == logits.amin(1, keepdim=True), -torch.inf, logits)

    report = evaluate(task=(X, Y), model=Net(log_of_zero).eval(), **ATTACK)
    assert "nonfinite_gradient" in flags(report)


class TestMode:
    def test_a_flag_matters_where_a_layer_acts_on_it(self, plain: Any) -> None:
        report = evaluate(task=(X, Y), model=Net().train(), **ATTACK)
        assert report.robust_accuracy == plain.robust_accuracy
        assert "training_mode" not in flags(report)

    def test_a_forgotten_eval(self) -> None:
        class Own(Net):
            def forward(self, x: Tensor) -> Any:
                return super().forward(nn.functional.dropout(x, 0.2, training=self.training))

        for net in (nn.Sequential(nn.Dropout(0.2), Net()), Own(), nn.Sequential(nn.BatchNorm2d(3), Net())):
            with pytest.raises(BadModel, match=r"training mode.*eval"):
                evaluate(task=(X, Y), model=net.train(), **ATTACK)
        assert not misleading_mode([nn.Sequential(nn.Dropout(0.0), nn.BatchNorm2d(3, track_running_stats=False))])

    def test_dropout_on_purpose_is_a_random_victim(self) -> None:
        net = nn.Sequential(nn.Dropout(0.1), Net()).eval()
        net[0].train()
        report = evaluate("pgd:eot=2", task=(X, Y), model=net, threat_model="linf:eps=0.01", draws=3)
        assert "randomized_output" in flags(report)
        assert net[0].training

    def test_batch_statistics_are_never_on_purpose(self) -> None:
        net = nn.Sequential(nn.BatchNorm2d(3), Net()).eval()
        net[0].train()
        with pytest.raises(BadModel, match="BatchNorm2d"):
            evaluate(task=(X, Y), model=net, **ATTACK)


class TestClasses:
    def test_the_model_knows_more_classes_than_the_labels(self) -> None:
        few = Y < 3
        for model in (Net().eval(), lambda x: (x - 0.5).flatten(1) @ WEIGHT):
            case = resolve("pgd", task=(X[few], Y[few]), model=model, threat_model="linf:eps=0.01")
            assert case.task.classes == case.victim.describe().classes == 5

    def test_both_numbers_are_named(self) -> None:
        with pytest.raises(BadModel, match=r"answers 5 classes.*has 7"):
            evaluate(task=Arrays(X, Y, classes=7), model=Net().eval(), **ATTACK)
        with pytest.raises(BadModel, match=r"answers 5 classes.*has 4.*classes="):
            evaluate(task=Arrays(X[Y < 4], Y[Y < 4], classes=4), model=Net().eval(), **ATTACK)
        with pytest.raises(BadModel, match="said to have 9 classes and returns 5"):
            evaluate(task=(X, Y), model=TorchModel(Net().eval(), classes=9), **ATTACK)


def test_data_sets_and_loaders_give_the_figures_of_their_tensors() -> None:
    data = torch.utils.data.TensorDataset(X, Y)
    given = ((X, Y), data, torch.utils.data.DataLoader(data, batch_size=8))
    model = Net().eval()
    figures = [evaluate(task=task, model=model, **ATTACK).to_dict()["metrics"] for task in given]
    assert figures[1] == figures[2] == figures[0]


@pytest.mark.parametrize("name", ["pgd", "mifgsm"])
def test_a_step_size_in_pixels_is_flagged(name: str) -> None:
    model = Net().eval()
    short = evaluate(f"{name}:steps=10,step_size=2/255", task=(X, Y), model=model, threat_model="linf:eps=8/255")
    assert flags(short)["incomplete_optimization"] == "warning"
    assert "in units of eps" in str(short.to_dict()["diagnostics"]["flags"])
    fine = evaluate(f"{name}:steps=10,step_size=0.25", task=(X, Y), model=model, threat_model="linf:eps=8/255")
    assert "incomplete_optimization" not in flags(fine)


def test_few_steps_of_the_usual_size_are_flagged_as_well(caplog: pytest.LogCaptureFixture) -> None:
    """A random start moves half of the way at most: what five steps of a tenth leave robust says little."""
    model = Net().eval()
    short = evaluate("pgd:steps=5", task=(X, Y), model=model, threat_model="linf:eps=8/255")
    assert flags(short)["incomplete_optimization"] == "warning"
    assert "pgd:steps=5 can't reach the boundary of the ball (" in caplog.text
    assert "incomplete_optimization" not in flags(
        evaluate("pgd:steps=10", task=(X, Y), model=model, threat_model="linf:eps=8/255")
    )
