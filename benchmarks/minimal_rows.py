"""What benchmarks/minimal.py measures: attacks of advkit, and who else has them, with settings of as many propagations.

Settings of peers are those with which they work on the two models: published first weights and steps of C&W and EAD are
too small for a hundred steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Peer:
    """An attack of another package, as PACKAGE:NAME, and its settings there."""

    name: str
    settings: dict[str, Any]
    rows: int | None = None
    """On how many of the samples it is run, None for all: fewer where it is slow."""

    @property
    def package(self) -> str:
        return self.name.partition(":")[0]


def peer(name: str, rows: int | None = None, **settings: Any) -> Peer:
    return Peer(name, settings, rows)


@dataclass(frozen=True)
class Row:
    """An attack here, the threat model, and who else has it."""

    attack: str
    threat: str
    peers: tuple[Peer, ...] = ()

    @property
    def name(self) -> str:
        return self.attack.partition(":")[0]


INF = math.inf
ROWS = [
    Row("deepfool", "minimum-l2", (
        peer("foolbox:L2DeepFoolAttack"), peer("torchattacks:DeepFool"), peer("art:DeepFool"),
        peer("advlib:df", norm=2, steps=50),
    )),
    Row("deepfool", "minimum-linf", (
        peer("foolbox:LinfDeepFoolAttack"), peer("advlib:df", norm=INF, steps=50),
    )),
    Row("superdeepfool", "minimum-l2", (peer("advlib:sdf"),)),
    Row("ddn:steps=99", "minimum-l2", (
        peer("foolbox:DDNAttack", steps=100), peer("advlib:ddn", steps=100, levels=None),
    )),
    Row("fmn:steps=96", "minimum-l0", (peer("advlib:fmn", norm=0, steps=100),)),
    Row("fmn:steps=99", "minimum-l1", (
        peer("foolbox:L1FMNAttack", steps=100), peer("advlib:fmn", norm=1, steps=100),
    )),
    Row("fmn:steps=99", "minimum-l2", (
        peer("foolbox:L2FMNAttack", steps=100), peer("advlib:fmn", norm=2, steps=100),
    )),
    Row("fmn:steps=99", "minimum-linf", (
        peer("foolbox:LInfFMNAttack", steps=100), peer("advlib:fmn", norm=INF, steps=100),
    )),
    Row("alma:steps=190", "minimum-l1", (
        peer("advlib:alma", distance="l1", num_steps=200, init_lr_distance=0.5),
    )),
    Row("alma:steps=190", "minimum-l2", (
        peer("advlib:alma", distance="l2", num_steps=200, init_lr_distance=0.1),
    )),
    Row("pdpgd:steps=183", "minimum-l0", (
        peer("advlib:pdpgd", norm=0, num_steps=200, proximal_operator=23),
    )),
    Row("pdpgd:steps=189", "minimum-l1", (peer("advlib:pdpgd", norm=1, num_steps=200),)),
    Row("pdpgd:steps=189", "minimum-l2", (
        peer("advlib:pdgd", num_steps=200), peer("advlib:pdpgd", norm=2, num_steps=200),
    )),
    Row("pdpgd:steps=189", "minimum-linf", (peer("advlib:pdpgd", norm=INF, num_steps=200),)),
    Row("trust_region", "minimum-l2", (peer("advlib:tr", p=2, adaptive=True),)),
    Row("trust_region", "minimum-linf", (peer("advlib:tr", p=INF, adaptive=True),)),
    Row("cw:budget=9x40", "minimum-l2", (
        peer("foolbox:L2CarliniWagnerAttack", binary_search_steps=9, steps=100, stepsize=0.05, initial_const=0.1),
        peer("torchattacks:CW", c=1, steps=300, lr=0.05),
        peer("advlib:carlini_wagner_l2", binary_search_steps=9, max_iterations=100, learning_rate=0.05,
             initial_const=0.1),
        peer("art:CarliniL2Method", 3, binary_search_steps=9, max_iter=40, learning_rate=0.1, initial_const=0.1),
    )),
    Row("cw:budget=9x100", "minimum-linf", (
        peer("advlib:carlini_wagner_linf", max_iterations=50, learning_rate=0.05, initial_const=0.1, const_factor=4),
    )),
    Row("cw:budget=9x100", "minimum-l0", (
        peer("art:CarliniL0Method", 4, binary_search_steps=3, max_iter=30, learning_rate=0.1, initial_const=10.0),
    )),
    Row("ead:budget=9x100", "minimum-l1", (
        peer("foolbox:EADAttack", binary_search_steps=9, steps=100, decision_rule="L1", initial_stepsize=0.05,
             initial_const=0.1, regularization=0.1),
        peer("art:ElasticNet", 2, binary_search_steps=9, max_iter=40, decision_rule="L1", learning_rate=0.05,
             initial_const=0.1, beta=0.1),
    )),
    Row("jsma", "minimum-l0", (
        peer("torchattacks:JSMA", 3, theta=1.0, gamma=0.1), peer("art:SaliencyMapMethod", theta=1.0, gamma=0.2),
    )),
    Row("sigma_zero:steps=100", "minimum-l0", (peer("advlib:sigma_zero", num_steps=100),)),
    Row("brendel_bethge:steps=100", "minimum-l0"),
    Row("brendel_bethge:steps=100", "minimum-l1"),
    Row("brendel_bethge:steps=100", "minimum-l2"),
    Row("brendel_bethge:steps=100", "minimum-linf"),
]  # fmt: skip
