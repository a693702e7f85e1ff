"""A planted spiked model of embeddings: a filter that finds its nuisance directions must undo an attack along them.

z = S s + U u + noise. The class is the sign of the first semantic coordinate; a linear head reads it, and leans a
little on every nuisance direction. The attack moves samples along the nuisance directions' mean and in the bulk, so
that whoever drops the nuisance directions is right again. An attacker who knows the filter moves along what the
filtered head reads, and wins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SEMANTIC = (3.5, 3.0, 2.6, 2.2)
NUISANCE = (2.9, 2.4, 2.1, 1.9)
"""Standard deviations along the directions, beside those of the noise (1)."""
LEAN = 0.175
"""Weight of every nuisance direction in the head."""
PUSH, BULK = 14.0, 0.7
"""Length of the attack along the nuisance directions' mean, and standard deviation of its noise."""


@dataclass(frozen=True)
class Planted:
    """One drawn model.

    semantic: orthonormal directions in columns, float64 [d, 4]
    nuisance: likewise
    seed:     of the directions and, with a name, of what is drawn
    """

    semantic: Tensor
    nuisance: Tensor
    seed: int

    @classmethod
    def of(cls, seed: int = 0, d: int = 60) -> Planted:
        """Directions drawn from a seed, in d dimensions (at least 8)."""
        both = torch.linalg.qr(torch.randn(d, 8, generator=_generator(seed), dtype=torch.float64))[0]
        return cls(both[:, :4], both[:, 4:], seed)

    @property
    def head(self) -> Tensor:
        """[d]; its sign on an embedding is the answer."""
        return self.semantic[:, 0] + LEAN * self.nuisance.sum(1)

    def draw(self, n: int, name: int) -> tuple[Tensor, Tensor]:
        """Clean embeddings float64 [n, d] and labels -1 or 1, [n]; every name draws others."""
        stream = _generator(self.seed, name)
        parts = [
            torch.randn(n, 4, generator=stream, dtype=torch.float64) * torch.tensor(spread, dtype=torch.float64)
            for spread in (SEMANTIC, NUISANCE)
        ]
        noise = torch.randn(n, len(self.head), generator=stream, dtype=torch.float64)
        z = parts[0] @ self.semantic.T + parts[1] @ self.nuisance.T + noise
        return z, parts[0][:, 0].sign()

    def attacked(self, z: Tensor, y: Tensor, name: int) -> Tensor:
        """The embeddings under the attack that knows of no filter."""
        mean = self.nuisance.sum(1) / self.nuisance.sum(1).norm()
        noise = torch.randn(z.shape, generator=_generator(self.seed, name, 1), dtype=torch.float64)
        moved: Tensor = z - PUSH * y[:, None] * mean + BULK * noise
        return moved

    def accuracy(self, z: Tensor, y: Tensor) -> float:
        """Share of embeddings that the head answers right."""
        return float(((z @ self.head).sign() == y).double().mean())


def _generator(*seeds: int) -> torch.Generator:
    word = 0
    for seed in seeds:
        word = (word * 1_000_003 + seed + 1) % 2**62
    return torch.Generator().manual_seed(word)
