"""Smoothed classifiers: the class that a base classifier gives most often under noise (Cohen et al., arXiv 1902.02918).

A smoothed model is a chain and a noise. The chain is any model that answers logits; what works on noisy inputs, such as
a denoiser, belongs into it. The noise is added in the space of the inputs, before the chain, and not clipped.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from advkit.core.checks import check, one_of, positive
from advkit.core.errors import BadInput, BadModel, UsageError
from advkit.core.lanes import Lanes
from advkit.core.noise import VERSION, block_size, blocks, lattice_normal, normal_block, stream
from advkit.core.protocols import (
    Averages,
    Batched,
    DrawsByRow,
    Evidence,
    Examines,
    Figure,
    KnowsClasses,
    ModelInfo,
    Shaped,
    Undefended,
    Votes,
)
from advkit.core.smoothing import abstains, check_alpha
from advkit.core.spaces import Box
from advkit.core.state import full_precision

Kind = Literal["gaussian", "lattice"]
LEVELS = 255
_OFF_GRID = 1e-3
"""How far a value of an 8-bit file may be from a multiple of 1/255, in steps: float32 is off by less than 1e-4."""


@dataclass(frozen=True)
class Noise(ABC):
    """What is added to inputs.

    sigma: standard deviation in units of the inputs, > 0
    """

    sigma: float

    def __post_init__(self) -> None:
        check(self, "sigma", math.isfinite(self.sigma) and self.sigma > 0, "a standard deviation above 0, such as 0.25")

    @property
    @abstractmethod
    def kind(self) -> Kind:
        """Its name in specs."""

    @property
    @abstractmethod
    def sound(self) -> bool:
        """Whether a certificate holds with the rounding of floating-point numbers taken into account."""

    @abstractmethod
    def slack(self, features: int) -> float:
        """How far it may be from the noise of the theorem, in total variation, for inputs of so many numbers."""

    @abstractmethod
    def misfit(self, space: Any) -> str | None:
        """Why it does not suit inputs of a space, or None."""

    @abstractmethod
    def around(self, row: Tensor, key: int, block: int, draws: int) -> Tensor:
        """A block of noisy copies [draws, *row.shape] of one row."""

    def off_grid(self, x: Tensor) -> Tensor:
        """Bool [B]: rows for which a certificate would not hold, because they are no inputs of its kind."""
        return torch.zeros(len(x), dtype=torch.bool)


@dataclass(frozen=True)
class GaussianNoise(Noise):
    """Normal noise in float32.

    The theorem is about real numbers. Rounding of x + noise in float32 can make a certificate false (arXiv 2207.07209),
    which nobody has seen happen by chance; `LatticeNoise` rules it out.
    """

    kind = "gaussian"
    sound = False

    def slack(self, features: int) -> float:
        return 0.0

    def misfit(self, space: Any) -> str | None:
        if isinstance(space, Box):
            return None
        return f"smoothing adds real numbers to inputs, and this model's space is {space!r}; expected a Box"

    def around(self, row: Tensor, key: int, block: int, draws: int) -> Tensor:
        return normal_block(key, block, draws, row).mul_(self.sigma).add_(row)


@dataclass(frozen=True)
class LatticeNoise(Noise):
    """Rounded normal noise for inputs that are 8-bit files: everything stays on the multiples of 1/255.

    Why the certificate holds. Let x be whole numbers (255 times the input), N normal of standard deviation 255 sigma,
    and f any function on whole numbers: how floating point rounds inside f makes no difference. The noise is
    Z = round(N). Since x is whole, f(x + Z) = f(round(x + N)), so the smoothed f on whole numbers is the smoothed
    classifier of the function f(round(.)) on real numbers under true normal noise, of which the theorem of arXiv
    1902.02918 speaks. Its radius holds for every whole x': for all that can be submitted as 8-bit files.
    What remains are the distances between the noise that is drawn and Z (`slack`, subtracted from the bound on the
    vote), between pseudo-random words and a fair coin, and that f must be a function: it is called in calls of one
    shape, in full precision. (The idea of whole-number noise is that of arXiv 2207.07209; this construction is ours.)

    Inputs off the grid are rounded to it first; a certificate is given for inputs on it alone.
    """

    kind = "lattice"
    sound = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "sigma", 0.002 <= self.sigma <= 4, "0.002 to 4 for noise=lattice")

    def slack(self, features: int) -> float:
        return features * lattice_normal(self.sigma).slack

    def misfit(self, space: Any) -> str | None:
        if isinstance(space, Box) and space.is_unit:
            return None
        return f"noise=lattice is for 8-bit inputs in [0, 1], and this model's space is {space!r}: use noise=gaussian"

    def around(self, row: Tensor, key: int, block: int, draws: int) -> Tensor:
        whole = lattice_normal(self.sigma).block(key, block, draws, row).to(row.device)
        return (whole + (row * LEVELS).round().to(torch.int32)).to(torch.float32).div_(LEVELS)

    def off_grid(self, x: Tensor) -> Tensor:
        steps = x.double() * LEVELS
        return ((steps - steps.round()).abs() > _OFF_GRID).flatten(1).any(1).cpu()


NOISES: dict[str, type[Noise]] = {"gaussian": GaussianNoise, "lattice": LatticeNoise}


class Tally(NamedTuple):
    """Votes of some draws: int64 [C] by class; the others gave NaN or infinity, and count for no class."""

    votes: np.ndarray[Any, np.dtype[np.int64]]
    draws: int

    def __add__(self, other: object) -> Tally:
        assert isinstance(other, Tally)
        return Tally(self.votes + other.votes, self.draws + other.draws)


@dataclass(frozen=True, kw_only=True)
class Smoothing:
    """How a chain is smoothed.

    sigma:     standard deviation of the noise, > 0, in units of the inputs
    noise:     gaussian | lattice (for 8-bit inputs; see `LatticeNoise`)
    n_predict: draws of an answer, >= 1
    alpha:     share of the answers that may be another class than the smoothed classifier's, in (0, 1)
    draws:     noisy copies whose mean probability an attacker with gradients differentiates, >= 1 (`SmoothedView`)
    """

    sigma: float
    noise: Kind = "gaussian"
    n_predict: int = 1000
    alpha: float = 0.001
    draws: int = 8

    def __post_init__(self) -> None:
        one_of(self, "noise", tuple(NOISES))
        positive(self, "n_predict", "draws", what="whole number")
        check_alpha(self.alpha)
        _ = self.source

    @property
    def source(self) -> Noise:
        """The noise."""
        return NOISES[self.noise](self.sigma)


class Smoothed(Undefended, KnowsClasses, Shaped, Batched, Averages, DrawsByRow, Votes, Examines):
    """A smoothed classifier: PREDICT of arXiv 1902.02918 over the votes of a chain on noisy copies.

    An answer are the votes of `n_predict` draws, float [B, C]. It abstains where a two-sided binomial test does not
    tell the two classes in front apart at level alpha (`abstained`).

    model:    the chain: any model of logits, deterministic and in evaluation mode
    settings: see `Smoothing`

    Raises UsageError where the noise does not suit the model's space, BadModel for chains whose answers vary.
    """

    batch = 16

    def __init__(self, model: Any, settings: Smoothing) -> None:
        self.model = model
        self.settings = settings
        self.noise = settings.source
        if (reason := self.noise.misfit(model.space)) is not None:
            raise UsageError(reason)
        if model.describe().randomized:
            raise BadModel("a smoothed model draws by itself: the model inside must give one answer per input")

    def __repr__(self) -> str:
        return f"Smoothed({self.model!r}, {self.settings!r})"

    @property
    def space(self) -> Any:
        """The chain's."""
        return self.model.space

    @property
    @override
    def classes(self) -> int | None:
        return self.model.classes if isinstance(self.model, KnowsClasses) else None

    @property
    @override
    def undefended(self) -> Any:
        """The chain, or what is behind the chain's own defense."""
        return self.model.undefended if isinstance(self.model, Undefended) else self.model

    @property
    @override
    def base(self) -> Any:
        return self.model

    @property
    @override
    def lanes(self) -> Lanes:
        """One row after the other: the chain is called on a row's noisy copies, in its own shapes."""
        return Lanes(chunk=self.batch, multiple=1)

    @property
    @override
    def passes(self) -> int:
        return self.settings.n_predict

    @property
    @override
    def stream(self) -> str:
        return stream(self.noise.kind, _device(self.model))

    def modules(self) -> tuple[nn.Module, ...]:
        """The chain's."""
        return tuple(self.model.modules())

    def attacker_view(self) -> SmoothedView:
        """The mean probability over noisy copies, which has a gradient."""
        return SmoothedView(self)

    def describe(self) -> ModelInfo:
        """The chain's, with the smoothing in name and hash."""
        info: ModelInfo = self.model.describe()
        told = self.settings
        word = f"smoothed|{told.noise}|{told.sigma!r}|{told.n_predict}|{told.alpha!r}|{VERSION}|{info.state_sha256}"
        return replace(
            info,
            name=f"{info.name} smoothed with sigma {told.sigma:g}",
            state_sha256=hashlib.sha256(word.encode()).hexdigest(),
            randomized=True,
            differentiable=False,
            abstains=True,
        )

    def to(self, device: torch.device | str) -> Smoothed:
        """The same smoothed model on a device."""
        moved = self.model.to(device)
        return self if moved is self.model else Smoothed(moved, self.settings)

    def __call__(self, x: Tensor) -> Tensor:
        return self.drawing(x, _fresh_keys(len(x)))

    @override
    def drawing(self, x: Tensor, keys: Tensor) -> Tensor:
        tallies = [self.tally(row, key, self.settings.n_predict) for row, key in zip(x, keys.tolist(), strict=True)]
        votes = np.stack([each.votes for each in tallies])
        return torch.from_numpy(votes).to(x.device, torch.float32)

    @override
    def abstained(self, answer: Tensor) -> Tensor:
        top = answer.topk(min(2, answer.shape[1]), dim=1).values.round().long().cpu().numpy()
        behind = top[:, 1] if top.shape[1] > 1 else np.zeros(len(top), dtype=np.int64)
        return torch.from_numpy(abstains(top[:, 0], behind, self.settings.alpha)).to(answer.device)

    @override
    def examine(self, evidence: Evidence) -> dict[str, Sequence[Figure]]:
        """On which rows it abstains, untouched and attacked."""
        return {
            "abstained_clean": self.abstained(evidence.clean).tolist(),
            "abstained": self.abstained(evidence.answer).tolist(),
        }

    def tally(self, row: Tensor, key: int, n: int, first: int = 0, memory: int = 2**28) -> Tally:
        """Votes of n draws around one row.

        key:    of the row's stream; first: the block of it that the draws begin with. Draws of other blocks are fresh
        memory: bytes of noisy copies that one call of the chain may have; where the device's memory ends all the same,
                calls are halved
        """
        size = block_size(row.device)
        row = row.detach()
        copies = self._copies(row, memory)
        total: np.ndarray[Any, np.dtype[np.int64]] | None = None
        with torch.no_grad(), full_precision():
            for block, wanted in blocks(first, n, size):
                # On a CPU every call has one shape, so that an answer does not depend on how many draws are left; not
                # where the chain says its own shapes, as one does whose answers have a price.
                drawn = size if row.device.type == "cpu" and Lanes.own(self.model) is None else wanted
                noisy = self.noise.around(row, key, block, drawn)
                while True:
                    try:
                        votes = torch.cat([self._votes(part) for part in torch.split(noisy, copies)])
                        break
                    except torch.OutOfMemoryError:
                        if copies == 1:
                            raise
                        copies //= 2
                found = _counted(votes[:wanted])
                total = found if total is None else total + found
        assert total is not None
        return Tally(total, n)

    def _copies(self, row: Tensor, memory: int) -> int:
        own = Lanes.own(self.model) or Lanes.fitting(row[None])
        most = max(1, memory // max(1, 4 * row.numel()))
        return max(1, min(block_size(row.device), own.chunk, most))

    def _votes(self, noisy: Tensor) -> Tensor:
        """One-hot votes, int64 [B, C]; zeros where an answer is not finite."""
        answer = self.model(noisy)
        if answer.ndim != 2 or not answer.is_floating_point() or len(answer) != len(noisy):
            raise BadModel(
                f"the chain answers a tensor of shape {list(answer.shape)} and type {answer.dtype} for {len(noisy)} "
                "inputs; a smoothed model is made of logits, float [B, C]"
            )
        if answer.shape[1] != (self.classes or answer.shape[1]):
            raise BadModel(f"the chain answers {answer.shape[1]} classes on noisy inputs; expected {self.classes}")
        sane = torch.isfinite(answer).all(1)
        votes = nn.functional.one_hot(answer.argmax(1), answer.shape[1])
        return votes * sane[:, None]

    @property
    def low_precision(self) -> str:
        """The type of weights that are no float32 or float64, as its name; empty where there are none."""
        types = {tensor.dtype for module in self.modules() for tensor in module.parameters()}
        low = sorted(str(each).removeprefix("torch.") for each in types if each in (torch.float16, torch.bfloat16))
        return low[0] if low else ""

    def check_grid(self, x: Tensor, ids: Sequence[str]) -> None:
        """Raise BadInput where a row is no input that the certificate is about."""
        off = self.noise.off_grid(x)
        if bool(off.any()):
            first = ids[int(off.nonzero()[0])]
            raise BadInput(
                f"{int(off.sum())} samples (the first: {first}) are no 8-bit images: noise=lattice certifies inputs "
                "whose values are multiples of 1/255; use noise=gaussian for others"
            )


class SmoothedView(KnowsClasses, Averages, DrawsByRow):
    """What an adaptive attacker differentiates: the log of the mean probability over noisy copies (arXiv 1906.04584).

    Every query draws new noise; an attack's own `eot` averages over as many queries.
    """

    def __init__(self, smoothed: Smoothed) -> None:
        self.smoothed = smoothed
        self.model = smoothed.model.attacker_view()
        self.draws = smoothed.settings.draws

    def __repr__(self) -> str:
        return f"SmoothedView({self.smoothed!r})"

    @property
    def space(self) -> Any:
        """The model's."""
        return self.smoothed.space

    @property
    @override
    def classes(self) -> int | None:
        return self.smoothed.classes

    @property
    @override
    def base(self) -> Any:
        return self.model

    @property
    @override
    def stream(self) -> str:
        return self.smoothed.stream

    @property
    @override
    def passes(self) -> int:
        return self.draws * (self.model.passes if isinstance(self.model, Averages) else 1)

    def modules(self) -> tuple[nn.Module, ...]:
        """The chain's."""
        return tuple(self.model.modules())

    def attacker_view(self) -> SmoothedView:
        """Itself."""
        return self

    def describe(self) -> ModelInfo:
        """The smoothed model's."""
        info = self.smoothed.describe()
        word = f"view|{self.draws}|{info.state_sha256}"
        return replace(
            info, differentiable=True, abstains=False, state_sha256=hashlib.sha256(word.encode()).hexdigest()
        )

    def to(self, device: torch.device | str) -> SmoothedView:
        """The same view on a device."""
        moved = self.smoothed.to(device)
        return self if moved is self.smoothed else SmoothedView(moved)

    def __call__(self, x: Tensor) -> Tensor:
        return self.drawing(x, _fresh_keys(len(x)))

    @override
    def drawing(self, x: Tensor, keys: Tensor) -> Tensor:
        """Log of mean probabilities, float [B, C]."""
        origin = x.detach()
        around = self.smoothed.noise.around
        noisy = [around(row, key, 0, self.draws) - row for row, key in zip(origin, keys.tolist(), strict=True)]
        noise = torch.stack(noisy)
        logs = [nn.functional.log_softmax(self.model(x + noise[:, draw]), dim=1) for draw in range(self.draws)]
        return torch.stack(logs).logsumexp(0) - math.log(self.draws)


def _fresh_keys(rows: int) -> Tensor:
    """Keys from torch's generator, int64 [rows]."""
    return torch.randint(-(2**63), 2**63 - 1, (rows,), dtype=torch.int64)


def _device(model: Any) -> torch.device:
    for module in model.modules():
        for tensor in (*module.parameters(), *module.buffers()):
            return torch.device(tensor.device)
    return torch.device("cpu")


def _counted(votes: Tensor) -> np.ndarray[Any, np.dtype[np.int64]]:
    found: np.ndarray[Any, np.dtype[np.int64]] = votes.sum(0).cpu().numpy()
    return found


__all__ = ["NOISES", "GaussianNoise", "LatticeNoise", "Noise", "Smoothed", "SmoothedView", "Smoothing", "Tally"]
