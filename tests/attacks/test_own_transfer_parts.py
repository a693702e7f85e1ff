"""Own parts in transfer compositions, own models as sources, own attacks inside others, and presets in full."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import advkit
from advkit.attacks import ATTACKS
from advkit.attacks.events.spiking import Spiking
from advkit.attacks.gradient.pgd import PGD
from advkit.attacks.stream.online import Online
from advkit.attacks.transfer import PARTS
from advkit.attacks.transfer.engine import Composed, Smooth, Transform
from advkit.core.errors import UsageError
from advkit.core.protocols import Access, MadeOf
from advkit.core.rng import RowRng
from advkit.models import MODELS
from advkit.models.torch import TorchModel
from advkit.threat_models.tapm import Tapm
from advkit.threat_models.transfer import Transfer, source_names

QUICK: dict[str, Any] = {"task": "digits", "n": 8, "device": "cpu", "beside": False}
SOURCE = "transfer:sources=zoo:digits-public-mlp,eps=0.2"


@dataclass(frozen=True, kw_only=True)
class Same(Transform):
    """Changes nothing."""

    times: int = 1

    def __call__(self, x: Tensor, copy: Tensor, draw: Any, run: Any) -> Tensor:
        return x


class Negated(Smooth):
    """The opposite of every gradient."""

    def __call__(self, gradient: Tensor) -> Tensor:
        return -gradient


@dataclass(frozen=True, kw_only=True)
class Step:
    """FGSM of one's own."""

    needs: ClassVar[Access] = Access.GRADIENTS

    def __call__(self, oracle: Any, x: Tensor, goal: Any, ball: Any, rng: Any, /) -> Tensor:
        return ball.project(x + ball.steepest(-oracle.gradient(x, goal)[1], x), x)


def net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()


def figures(attack: Any, threat: Any = SOURCE) -> Any:
    report = advkit.evaluate(attack, threat_model=threat, **QUICK)
    return report.adversarial().adversarial


@pytest.mark.slow
def test_a_part_of_ones_own_is_a_part() -> None:
    plain = figures("transfer:mi")
    assert torch.equal(figures(Composed(parts=("mi", Same()))), plain)
    assert torch.equal(figures(Composed(parts=("mi", "si", Same()))), figures("transfer:mi+si"))
    up = figures(Composed(parts=(Negated(),)))
    assert not torch.equal(up, figures("transfer:bim"))
    clean = advkit.evaluate("fgsm", threat_model=SOURCE, **QUICK).adversarial().clean
    away = (figures("transfer:bim") - clean) * (up - clean)
    assert float(away.sum()) < 0, "the steps go the other way"


def test_settings_of_own_parts_are_in_the_label() -> None:
    one, other = (ATTACKS.label(Composed(parts=("mi", Same(times=times)))) for times in (1, 2))
    assert one.startswith("transfer:parts=mi+Same-")
    assert one != other
    assert ATTACKS.label(Composed(parts=("mi", Same(times=2)))) == other


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ((Negated,), "is the class Negated; expected an object: Negated()"),
        ((PGD(),), "no transfer part: it lacks the base class Part"),
        ((lambda gradient: gradient,), "no transfer part"),
        ((Negated(), "ti"), "Negated and ti are both smoothings"),
        ((Same(), Same()), "names Same more than once"),
    ],
)
def test_what_is_no_part_is_refused(parts: tuple[Any, ...], words: str) -> None:
    with pytest.raises(UsageError) as refused:
        Composed(parts=parts)
    assert words in str(refused.value)


@pytest.mark.slow
def test_models_are_sources_in_any_form() -> None:
    """A torch module, a function and a wrapped model of the same weights make the same images."""
    module = net()
    wrapped = figures("mi", Transfer(eps=0.2, sources=(TorchModel(module, classes=10, name="w"),)))
    assert torch.equal(figures("mi", Transfer(eps=0.2, sources=(module,))), wrapped)
    assert torch.equal(figures("mi", Transfer(eps=0.2, sources=[lambda x: module(x)])), wrapped)  # type: ignore[arg-type]


def test_sources_that_share_a_name_are_told_apart() -> None:
    one, other = net(1), net(2)
    assert source_names((one, "zoo:a", other, TorchModel(one, name="a"))) == (
        "Sequential",
        "zoo:a",
        "Sequential-2",
        "a",
    )
    report = advkit.evaluate(
        "pgd:steps=2", threat_model=Tapm(eps=0.2, sources=(one, other), attacks=("fgsm",)), **QUICK
    )
    assert [entry["source"] for entry in report.attacks] == ["Sequential", "Sequential-2"]
    assert report.to_dict()["threat_model"]["details"]["sources"] == ["Sequential", "Sequential-2"]
    alone = figures("fgsm", Transfer(eps=0.2, sources=(other,), attacks_all=True))
    label = next(entry["name"] for entry in report.attacks if entry["source"] == "Sequential-2")
    assert torch.equal(report.adversarial(label).adversarial, alone)
    for made in (lambda: Transfer(sources=one), lambda: Tapm(sources=one)):  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="is one Sequential; expected a tuple"):
            made()


@pytest.mark.slow
def test_sgm_runs_on_a_residual_source_and_names_what_it_misses() -> None:
    """In a whole evaluation, whose rehearsal has no layers to look into."""
    residual = MODELS.build("resnet8:width=4")((1, 8, 8), 10, RowRng.from_ids(0, ["net"]))
    assert not torch.equal(
        figures("sgm:steps=2", Transfer(eps=0.2, sources=(residual,))),
        figures("mi:steps=2", Transfer(eps=0.2, sources=(residual,))),
    )
    with pytest.raises(UsageError, match="no residual addition"):
        figures("sgm:steps=2", Transfer(eps=0.2, sources=(net(),)))


@pytest.mark.slow
def test_attacks_of_ones_own_stand_inside_others() -> None:
    fgsm = advkit.evaluate("fgsm", **QUICK)
    assert advkit.evaluate(Step(), **QUICK).robust_accuracy == fgsm.robust_accuracy
    grid = advkit.evaluate(
        "fgsm",
        threat_model=Tapm(eps=0.2, sources=("zoo:digits-public-mlp",), attacks=("fgsm", Step(), PGD(steps=3))),  # type: ignore[arg-type]
        **QUICK,
    )
    accuracies = [entry["robust_accuracy"]["value"] for entry in grid.attacks]
    assert accuracies[0] == accuracies[1]
    stream = {**QUICK, "n": 20}
    own = advkit.evaluate(Online(inner=Step(), k=3), **stream)  # type: ignore[arg-type]
    assert (
        own.metrics["stream_fool_rate"]
        == advkit.evaluate("online:inner=fgsm,k=3", **stream).metrics["stream_fool_rate"]
    )
    spiking = {**QUICK, "n": 4, "model": "snn", "threat_model": "linf:eps=0.1"}
    assert (
        advkit.evaluate(Spiking(attack=Step()), **spiking).robust_accuracy  # type: ignore[arg-type]
        == advkit.evaluate("spiking:fgsm", **spiking).robust_accuracy
    )


@pytest.mark.parametrize("name", [name for name in ATTACKS.table if not name.endswith(":")])
def test_a_preset_says_what_it_is_made_of(name: str) -> None:
    """The spec that it gives builds the same attack; where it gives none, transfer:NAME is the same."""
    attack: Any = ATTACKS.build(name)
    if not isinstance(attack, MadeOf):
        return
    assert asdict(ATTACKS.build(attack.made_of or f"transfer:{name}")) == asdict(attack)  # type: ignore[call-overload]
    if not attack.made_of:
        return
    if name in PARTS:
        assert asdict(ATTACKS.build(f"transfer:{name}")) != asdict(attack)  # type: ignore[call-overload]


def test_reports_tell_ti_from_the_composition_of_that_part() -> None:
    preset, part = (advkit.evaluate(attack, **QUICK) for attack in ("ti", "transfer:ti"))
    told = "ti = transfer:ti,start=random,path=2.5"
    assert any(told in line for line, _ in preset.full())
    assert not any(told in line for line, _ in part.full())
    assert not torch.equal(preset.adversarial().adversarial, part.adversarial().adversarial)
    table = advkit.matrix(
        ["zoo:digits-public-mlp"], ["ti", "transfer:ti"], [net()], task="digits", n=8, seeds=1, equal_budget=None,
        device="cpu",
    )  # fmt: skip
    assert "= transfer:ti,start=random,path=2.5" in table.markdown()


@pytest.mark.parametrize("attack", ["admix", "transfer:admix+ti"])
@pytest.mark.parametrize("goal", ["out-of-topk:k=3", "untargeted", "topk:k=2"])
def test_admix_takes_goals_that_need_scores(attack: str, goal: str) -> None:
    """It tells other classes by the goal where the goal can say, else by the surrogate's decision."""
    report = advkit.evaluate(attack, goal=goal, **QUICK)
    assert report.undecided == 0
