"""Certified: any attacker within an L2 radius that is proven sample by sample (Cohen et al., arXiv 1902.02918)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from advkit.core.checks import at_least_one, check
from advkit.core.errors import UsageError
from advkit.core.protocols import Access
from advkit.core.smoothing import check_alpha
from advkit.core.spaces import Box
from advkit.threat_models.capability import KNOWLEDGE, UNIT
from advkit.threat_models.lp import L2, eps_text


@dataclass(frozen=True, kw_only=True)
class Certified:
    """Certification of a smoothed model: the L2 radius within which no attacker whatever changes its answer.

    The model votes on noisy copies of each clean sample: first n0 of them choose a class, then n fresh ones bound its
    probability from below. Where an attack is named, too, it is evaluated beside the certificates, in an L2 ball of the
    smallest radius above 0.

    n0:     draws that choose the class, >= 1
    n:      draws that bound its probability, >= 1. The largest radius that they can certify is sigma * Phi^-1(alpha **
            (1/n)): 3.20 sigma with 10,000 draws at alpha = 0.001, 2.46 sigma with 1,000
    alpha:  probability that a certificate is false, in (0, 1), for each sample
    radii:  at which certified accuracy is reported, >= 0, joined by +; at 0 it counts every sample with a certificate
    early:  end the draws of a sample without prospect of a certificate, and abstain; alpha stays what it is
    memory: MiB of noisy copies that one call of the model may have, >= 1
    box:    legal inputs; `bind` puts the model's own here
    """

    scenario: ClassVar[str] = "certification"
    norm: ClassVar[str] = "L2"
    access: ClassVar[Access] = Access.NOTHING
    queries: ClassVar[int | None] = None

    n0: int = 100
    n: int = 10_000
    alpha: float = 0.001
    radii: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    early: bool = False
    memory: int = 256
    box: Box = UNIT

    def __post_init__(self) -> None:
        at_least_one(self, "n0", "n", "memory")
        check_alpha(self.alpha)
        fine = bool(self.radii) and all(math.isfinite(each) and each >= 0 for each in self.radii)
        check(self, "radii", fine, "radii of at least 0 joined by +, such as 0+0.25+0.5")
        object.__setattr__(self, "radii", tuple(sorted({float(each) for each in self.radii})))

    @property
    def eps(self) -> float:
        """The radius that ranks: the smallest above 0; 0 where no other is asked for."""
        return next((each for each in self.radii if each > 0), 0.0)

    def ball(self, lattice: int = 0) -> L2 | None:
        """What an attack beside the certificates is evaluated in; `lattice` levels where these are of files alone."""
        return L2(eps=self.eps, lattice=lattice, box=self.box) if self.eps else None

    def describe(self) -> dict[str, Any]:
        """The report's threat_model block, without the goal."""
        return {
            "name": "certified",
            "phase": "test_time",
            "norm": self.norm,
            "eps": self.eps,
            "eps_string": eps_text(self.eps),
            "knowledge": KNOWLEDGE[self.access],
            "query_budget": self.queries,
            "details": {
                "n0": self.n0,
                "n": self.n,
                "alpha": self.alpha,
                "radii": list(self.radii),
                "early": self.early,
                "box": self.box.text(),
            },
        }

    def bind(self, space: Any) -> Self:
        """The same in a model's box."""
        if not isinstance(space, Box):
            raise UsageError(f"certificates are of inputs in a Box and this model's space is {space!r}")
        return replace(self, box=space)

    def admits(self, x: Tensor, origin: Tensor) -> Tensor:
        """Bool [B]: the clean samples alone; nothing else is asked about."""
        if x.shape != origin.shape:
            return torch.zeros(len(origin), dtype=torch.bool, device=origin.device)
        return (x == origin).flatten(1).all(1)

    def distance(self, x: Tensor, origin: Tensor) -> Tensor:
        """L2 distance, float [B]."""
        length: Tensor = torch.linalg.vector_norm((x.double() - origin.double()).flatten(1), dim=1)
        return length

    def finish(self, x: Tensor, origin: Tensor) -> Tensor:
        """x."""
        return x
