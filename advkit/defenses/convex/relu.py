"""Convex adversarial training of two-layer ReLU networks (Bai, Gautam, Sojoudi, arXiv 2201.01965; 2105.12237)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from typing_extensions import override

from advkit.core.checks import at_least, not_negative, one_of, positive
from advkit.core.errors import BadInput, NoTrainingData
from advkit.core.protocols import Data, Rng, Solves
from advkit.core.spaces import Box
from advkit.models.mlp import MLP
from advkit.models.torch import TorchModel
from advkit.models.two_layer import Norm, P, TwoLayer


@dataclass(frozen=True, kw_only=True)
class ConvexReLUAT(Solves):
    """Convex adversarial training (Bai et al., arXiv 2201.01965): a globally optimal two-layer ReLU network, certified.

    A convex program (Pilanci & Ergen, arXiv 2002.10553) has the network's optimum: its variables are the weights of one
    pair of units per activation pattern, its constraints keep every unit's pattern. Under attack they keep it on each
    training sample's whole ball. There the network is affine, its worst case is a dual norm, and training samples whose
    margin exceeds it are certified. The network is the defense's own: `mlp:hidden=K`, with as many units as the optimum
    has; a model that is named gives nothing to it.

    eps:        radius of the ball trained for, in units of the model's space; 0 trains without an attacker
    norm:       linf | l2 | l1
    loss:       "hinge", "logistic" or "squared" (labels -1 and 1)
    beta:       weight of the penalty, on the mean of the losses, above 0; papers have sums: theirs is n times this
    patterns:   activation patterns that are sampled, and pruned to those that are usable under the attack (linear
                programs); units of `scp`; 0 enumerates all, which a few dimensions alone allow. The cone solver's time
                grows with them (178 samples of 64 pixels: 20 usable ones take a minute); in 2-D take hundreds
    components: principal components of the standardised features; 0 takes the features. Fewer leave more patterns
                usable; the attacker moves pixels all the same
    method:     "cone": exact, by cvxpy; "admm", "scp" (drawn hidden weights): for more samples, without an attacker
    solver:     of the cone program, "clarabel" or "scs"
    rows:       training samples taken, the first ones of every class alike; 0 takes all

    Raises BadInput for labels of one class and for more than a cone solver holds, MissingExtra without cvxpy,
    AdvkitError where the solver finds no optimum. Warns where two patterns or fewer are usable.

    Two classes are one network. More are one network against the rest per class, no longer optimal together.

    Deviations: standardised features (folded into the first layer) and a bias, which the attacker does not move.
    Patterns are sampled on clean samples alone: those of perturbed ones, which the paper adds, force a weight of zero.
    Half are drawn for their distance from the samples. Unusable ones are pruned, which changes no optimum. Sampling
    ends; the public code's loop does not where too few patterns exist. The paper's BCE is logistic loss with doubled
    logits. ADMM splits fitted values from weights for losses other than the squared one.
    """

    needs_data: ClassVar[bool] = True

    eps: float = 8 / 255
    norm: Norm = "linf"
    loss: Literal["hinge", "logistic", "squared"] = "hinge"
    beta: float = 1e-3
    patterns: int = 20
    components: int = 0
    method: Literal["cone", "admm", "scp"] = "cone"
    solver: Literal["clarabel", "scs"] = "clarabel"
    rows: int = 0

    def __post_init__(self) -> None:
        not_negative(self, "eps", what="radius")
        one_of(self, "norm", tuple(P))
        one_of(self, "loss", ("hinge", "logistic", "squared"))
        positive(self, "beta")
        at_least(self, 0, "patterns", "components", "rows")
        one_of(self, "method", ("cone", "admm", "scp"))
        one_of(self, "solver", ("clarabel", "scs"))

    @property
    def claims(self) -> str:
        """The threat model it trains against; none without an attacker."""
        return f"{self.norm}:eps={self.eps!r}" if self.eps > 0 else ""

    @override
    def deploy(self, model: TorchModel) -> TwoLayer:
        """The network with its certificates; BadModel for other networks."""
        return TwoLayer.around(model, self.norm, self.eps)

    @override
    def solve(self, data: Data, rng: Rng) -> tuple[TorchModel, dict[str, Any]]:
        """See `Solves`.

        Raises BadInput, MissingExtra, AdvkitError; see the class.
        """
        from advkit.training.convex import cones
        from advkit.training.convex.fit import Columns, Trained, Way, train
        from advkit.training.convex.program import Program

        if self.method == "cone":
            cones.cvxpy()  # where it is missing, say so before anything is computed
        if not isinstance(data.space, Box):
            raise BadInput(
                f"the samples' space is {type(data.space).__name__}; expected a Box, whose values move by eps"
            )
        rows = self._rows(data)
        x = data.x[rows].flatten(1).double().cpu().numpy()
        y = data.y[rows].cpu().numpy()
        seen = sorted(set(y.tolist()))
        if len(seen) < 2:
            raise BadInput(f"all {len(y)} training labels are {seen[0]}; expected samples of two classes or more")
        columns = Columns.of(x, self.components)
        rows_of_x = columns(x)
        moves = columns.moves(self.eps, P[self.norm]) if self.eps > 0 else None
        way = Way(loss=self.loss, beta=self.beta, patterns=self.patterns, method=self.method, solver=self.solver)
        classes = [1] if data.classes == 2 else range(data.classes)
        found: list[Trained] = []
        for label in classes:
            against = np.where(y == label, 1.0, -1.0)
            seed = rng.at("patterns", label).generator().initial_seed()
            program = Program(rows_of_x, against, self.loss, self.beta, moves)
            found.append(train(program, way, np.random.default_rng(seed)))
        model = _exported([each.network for each in found], columns, data, rng)
        certified = TwoLayer.around(model, self.norm, self.eps).margins(data.x[rows], data.y[rows]) > 0
        told = {
            "samples": len(y),
            "certified_training_samples": int(certified.sum()),
            "networks": [dict(each.told) for each in found],
        }
        return model, told | {"summary": _summary(told)}

    def protect(self, model: Any, data: Data | None, rng: Rng, /) -> TwoLayer:
        """The network that is trained on the data; the one handed over is not used.

        Raises NoTrainingData without data, and what `solve` raises.
        """
        if data is None:
            raise NoTrainingData("convex_relu_at trains and the task has no training data at hand: give it some")
        return self.deploy(self.solve(data, rng)[0])

    def _rows(self, data: Data) -> torch.Tensor:
        """The places of the samples that are trained on, in order."""
        if self.rows == 0 or self.rows >= len(data):
            return torch.arange(len(data))
        share = -(-self.rows // data.classes)
        places = [torch.nonzero(data.y.cpu() == label).flatten()[:share] for label in range(data.classes)]
        return torch.cat(places).sort().values[: self.rows]


def _exported(networks: list[Any], columns: Any, data: Data, rng: Rng) -> TorchModel:
    """`mlp:hidden=K`: the networks' units side by side, standardisation and bias in the first layer.

    One network f of two classes has the logits -f/2 and f/2, whose cross-entropy is the logistic loss of f; several
    have a logit each.
    """
    layers = [columns.unfolded(each) for each in networks]
    first = torch.from_numpy(np.concatenate([weights for weights, _ in layers]))
    bias = torch.from_numpy(np.concatenate([each for _, each in layers]))
    second = torch.zeros(len(networks), len(first), dtype=torch.float64)
    start = 0
    for row, each in enumerate(networks):
        second[row, start : start + len(each.alpha)] = torch.from_numpy(each.alpha)
        start += len(each.alpha)
    if data.classes == 2:
        second = torch.cat([-second, second]) / 2
    if not len(first):  # the optimum is f = 0
        first, bias = torch.zeros(1, columns.scale.size), torch.zeros(1)
        second = torch.zeros(data.classes, 1)
    model = MLP(hidden=(len(first),))(tuple(data.x.shape[1:]), data.classes, rng, space=data.space)
    held = {"1.weight": first, "1.bias": bias, "3.weight": second, "3.bias": torch.zeros(data.classes)}
    model.module.load_state_dict({name: tensor.float() for name, tensor in held.items()})
    model.source = "a convex program of advkit"
    return model


def _summary(told: dict[str, Any]) -> str:
    """One phrase for logs and reports."""
    networks = told["networks"]
    worst = max((each["gap"] for each in networks if each["gap"] is not None), default=None)
    optimum = " + ".join(f"{each['optimum']:.6g}" for each in networks[:3]) + (" + ..." if len(networks) > 3 else "")
    usable = ", ".join(f"{each['patterns_usable']} of {each['patterns_sampled']}" for each in networks[:3])
    statuses = ", ".join(sorted({each["status"] for each in networks}))
    gap = "" if worst is None else f", duality gap {worst:.1e}"
    # A solver that stopped early, or gives no gap, has an objective and no proof that it is the least.
    what = "optimum" if worst is not None else "objective"
    return (
        f"{what} {optimum} ({statuses}{gap}, {networks[0]['solver']}), {usable} patterns usable, "
        f"{told['certified_training_samples']} of {told['samples']} training samples certified"
    )
