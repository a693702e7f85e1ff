"""The online threat model: specs, budgets said once, and what bounds an item."""

from __future__ import annotations

import pytest
import torch

from advkit.attacks import ATTACKS
from advkit.core.errors import UnknownName, UsageError
from advkit.core.protocols import Access, OnlineAttack
from advkit.core.spaces import Box
from advkit.threat_models import THREAT_MODELS
from advkit.threat_models.lp import Linf


def test_specs_round_trip():
    for spec in (
        "online",
        "online:k=10",
        "online:k=3,inner=[l2:eps=0.5,lattice=255],sources=zoo:a+zoo:b,permutations=50",
    ):
        built = THREAT_MODELS.build(spec)
        assert THREAT_MODELS.spec(built) == spec
        assert THREAT_MODELS.build(THREAT_MODELS.spec(built)) == built
    for spec in (
        "online",
        "online:selector=virtual,k=10",
        "online:inner=[pgd:steps=20,restarts=2],selector=single-ref,k=10,observe=30,reference=2,exhaust=false",
    ):
        built = ATTACKS.build(spec)
        assert ATTACKS.spec(built) == spec
        assert isinstance(built, OnlineAttack)


def test_the_plus_of_virtual_plus_is_read():
    built = ATTACKS.build("online:inner=pgd,selector=virtual+,k=10")
    assert (built.selector, built.k) == ("virtual+", 10)
    assert ATTACKS.build("online:selector=virtual").selector == "virtual"
    assert built.default_threat_model == "online:k=10"
    assert THREAT_MODELS.build(built.default_threat_model).k == 10


def test_an_item_is_bounded_by_the_inner_ball():
    threat = THREAT_MODELS.build("online:k=2,inner=[linf:eps=0.1,lattice=255,access=scores]")
    bound = threat.bind(Box(0.0, 1.0, shape=(3,)))
    ball = Linf(0.1, lattice=255, access=Access.SCORES, box=Box(0.0, 1.0, shape=(3,)))
    assert bound.ball == ball
    assert (bound.access, bound.queries, bound.lattice) == (Access.SCORES, None, 255)
    x = torch.tensor([[0.2, 0.5, 0.99], [0.0, 0.4, 1.0]])
    z = x + torch.tensor([[0.1, -0.05, 0.01], [0.2, 0.0, 0.0]])
    assert bound.admits(z, x).tolist() == ball.admits(z, x).tolist() == [True, False]
    assert torch.equal(bound.distance(z, x), ball.distance(z, x))
    assert torch.equal(bound.finish(z, x), ball.finish(z, x))
    described = bound.describe()
    assert (described["name"], described["inner"], described["norm"], described["k"]) == ("online", "linf", "Linf", 2)


def test_knowledge_is_of_the_sources():
    assert THREAT_MODELS.build("online:k=2").describe()["knowledge"] == "white_box"
    threat = THREAT_MODELS.build("online:k=2,sources=zoo:a")
    assert threat.describe()["knowledge"] == "transfer"
    assert threat.surrogates == ("zoo:a",)


def test_k_is_said_once():
    open_, said = THREAT_MODELS.build("online"), THREAT_MODELS.build("online:k=5")
    assert open_.agreed(5) == said
    assert said.agreed(None) is said
    assert said.agreed(5) is said
    with pytest.raises(UsageError, match="say k once"):
        said.agreed(6)


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda: THREAT_MODELS.build("online:k=0"), "at least 1"),
        (lambda: THREAT_MODELS.build("online:permutations=0"), "at least 1"),
        (lambda: THREAT_MODELS.build("online:inner=tapm"), "grid"),
        (lambda: THREAT_MODELS.build("online:inner=online"), "stream"),
        (lambda: THREAT_MODELS.build("online:inner=[transfer:sources=zoo:a]"), "sources"),
        (lambda: ATTACKS.build("online:k=0"), "at least 1"),
        (lambda: ATTACKS.build("online:inner=online"), "inside an online attack"),
        (lambda: ATTACKS.build("online:selector=offline"), "whole stream"),
        (lambda: ATTACKS.build("online:selector=optimal-dp,observe=5"), "no observe"),
        (lambda: ATTACKS.build("online:selector=virtual+,reference=5"), "no reference"),
    ],
)
def test_refusals(build, word):
    with pytest.raises(UsageError, match=word):
        build()


def test_unknown_parts_are_named():
    with pytest.raises(UnknownName, match="single-ref"):
        ATTACKS.build("online:selector=single")
    with pytest.raises(UnknownName, match="pgd"):
        ATTACKS.build("online:inner=pdg")
