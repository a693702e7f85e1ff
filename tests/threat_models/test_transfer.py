import pytest
import torch

from advkit.core.errors import UsageError
from advkit.core.protocols import Access
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.threat_models import THREAT_MODELS
from advkit.threat_models.lp import L2, Linf
from advkit.threat_models.transfer import Transfer


@pytest.fixture
def x():
    return torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("norm", "ball"), [("linf", Linf), ("l2", L2)])
def test_it_is_the_ball_it_wraps(norm, ball, x):
    threat, inner = Transfer(eps=0.1, norm=norm, sources=("a",)), ball(eps=0.1, lattice=255)
    far = x + torch.linspace(-0.3, 0.3, 16).reshape(1, 1, 4, 4)
    gradient = far - 0.5
    rng = RowRng.from_ids(0, [str(i) for i in range(6)])
    assert torch.equal(threat.project(far, x), inner.project(far, x))
    assert torch.equal(threat.distance(far, x), inner.distance(far, x))
    assert torch.equal(threat.steepest(gradient, x), inner.steepest(gradient, x))
    assert torch.equal(threat.sample(x, rng), inner.sample(x, rng))
    for z in (far, inner.project(far, x)):
        assert torch.equal(threat.admits(z, x), inner.admits(z, x))
        assert torch.equal(threat.finish(z, x), inner.finish(z, x))


def test_files_are_eight_bit_and_inside(x):
    threat = Transfer(eps=0.1, sources=("a",))
    handed = threat.finish(threat.project(x + 1, x), x)
    assert torch.allclose(handed * 255, (handed * 255).round(), atol=1e-4)
    assert threat.admits(handed, x).all()
    assert (handed - x).abs().max() <= 0.1 + 1e-6


def test_access_is_to_the_surrogates_alone():
    threat = Transfer(eps=0.1, sources=("zoo:a", "zoo:b"))
    assert threat.access == Access.GRADIENTS
    assert threat.victim_access == Access.NOTHING
    assert threat.queries is None
    assert threat.surrogates == ("zoo:a", "zoo:b")


def test_spec_round_trip():
    threat = THREAT_MODELS.build("transfer:eps=8/255,sources=[zoo:a]+[zoo:b],norm=l2")
    assert threat.sources == ("zoo:a", "zoo:b")
    assert THREAT_MODELS.build(THREAT_MODELS.spec(threat)) == threat


def test_binding_takes_the_space_of_the_model():
    box = Box(-1.0, 1.0)
    threat = Transfer(eps=0.1, lattice=0, sources=("a",)).bind(box)
    x = torch.full((2, 3), -0.95)
    assert threat.project(x - 1, x).min() == pytest.approx(-1.0)
    assert threat.sources == ("a",)


@pytest.mark.parametrize("arguments", [{}, {"sources": "zoo:a"}, {"sources": ("a",), "norm": "l7"}])
def test_nonsense_is_refused(arguments):
    with pytest.raises(UsageError):
        Transfer(eps=0.1, **arguments)


def test_description_is_what_a_report_may_hold():
    described = Transfer(eps=0.1, sources=("zoo:a",)).describe()
    assert described["name"] == "transfer"
    assert described["knowledge"] == "transfer"
    assert described["norm"] == "Linf"
    assert described["eps"] == pytest.approx(0.1)
    assert described["sources"] == ["zoo:a"]
