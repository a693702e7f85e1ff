"""An oracle of parameters: what a threat model that renders its inputs (`Renders`) lends its attacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from advkit.core.errors import UsageError
from advkit.core.meter import Meter
from advkit.core.oracle import MeteredOracle
from advkit.core.protocols import Access, Data, Renders


class RenderedOracle:
    """Answers to parameters with what the model answers to the inputs that they render; see `core.protocols.Oracle`.

    The meter, the budget and the shapes of calls are those of the oracle behind it. A gradient is the model's, taken
    back through the rendering: parameters cost one forward and one backward, as inputs do.

    oracle: of the model
    origin: the clean inputs of its rows [rows, ...]
    threat: renders
    """

    def __init__(self, oracle: MeteredOracle, origin: Tensor, threat: Renders) -> None:
        self.oracle, self.origin, self.threat = oracle, origin, threat

    @property
    def access(self) -> Access:
        return self.oracle.access

    @property
    def queries(self) -> int | None:
        return self.oracle.queries

    @property
    def propagations(self) -> int | None:
        return self.oracle.propagations

    @property
    def decides(self) -> bool:
        return self.oracle.decides

    @property
    def data(self) -> Data | None:
        return self.oracle.data

    @property
    def meter(self) -> Meter:
        return self.oracle.meter

    @property
    def rows(self) -> int:
        return self.oracle.rows

    @property
    def left(self) -> int | None:
        return self.oracle.left

    def __call__(self, z: Tensor, of: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            x = self.threat.render(z, self._origin(of))
        return self.oracle(x, of)

    def gradient(self, z: Tensor, goal: Any, of: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            leaf = z.detach().clone().requires_grad_()
            x = self.threat.render(leaf, self._origin(of))
        loss, gradient, answer = self.oracle.gradient(x.detach(), goal, of)
        if not x.requires_grad:
            return loss, torch.zeros_like(z), answer
        (back,) = torch.autograd.grad(x, leaf, gradient)
        return loss, back.nan_to_num(0.0, 0.0, 0.0), answer

    def gradients(self, z: Tensor, goals: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            leaf = z.detach().clone().requires_grad_()
            x = self.threat.render(leaf, self.origin)
        losses, gradients, answer = self.oracle.gradients(x.detach(), goals)
        if not x.requires_grad:
            return losses, torch.zeros(len(goals), *z.shape, dtype=z.dtype, device=z.device), answer
        back = [torch.autograd.grad(x, leaf, each, retain_graph=True)[0] for each in gradients]
        return losses, torch.stack(back).nan_to_num(0.0, 0.0, 0.0), answer

    def take(self, rows: Tensor) -> RenderedOracle:
        return RenderedOracle(self.oracle.take(rows), self.origin[rows], self.threat)

    def note(self, row: int, figures: Mapping[str, Any]) -> None:
        self.oracle.note(row, figures)

    def seen_as(self, view: Callable[[Any], Any], decides: bool = False) -> RenderedOracle:
        return RenderedOracle(self.oracle.seen_as(view, decides), self.origin, self.threat)

    def head(self) -> Tensor | None:
        return self.oracle.head()

    def differentiable(self, origin: Tensor) -> Any:
        """Refused: what brings its own loop takes its points for inputs of the model."""
        raise UsageError(
            f"attacks of other packages change inputs, and in {type(self.threat).__name__.lower()} parameters are set: "
            "use spatial, stadv or pgd, or a ball such as linf:eps=8/255"
        )

    def _origin(self, of: Tensor | None) -> Tensor:
        return self.origin if of is None else self.origin[of.to(self.origin.device)]


def asked_in(oracle: MeteredOracle, origin: Tensor, threat: object) -> MeteredOracle | RenderedOracle:
    """What an attack may ask within a threat model: the oracle itself, or one of parameters of these clean inputs."""
    return RenderedOracle(oracle, origin, threat) if isinstance(threat, Renders) else oracle
