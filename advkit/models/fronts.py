"""What stands in front of a model that may only be queried: a denoiser, and an auto-encoder (arXiv 2203.14195)."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from advkit.core.checks import at_least, at_least_one, check, one_of
from advkit.core.errors import BadModel, BudgetExhausted, CheckpointError, UsageError
from advkit.core.lanes import Lanes
from advkit.core.protocols import CountsQueries, Headed, KnowsClasses, ModelInfo, Sized, Undefended, answer_shape
from advkit.models.checkpoint import canonical_json, pack, read_checked, unpack, write_atomically
from advkit.models.torch import TorchModel, checked_logits, image_shape, tensors_sha256

log = logging.getLogger("advkit")

FORMAT = "advkit-front-1"

Denoiser = Literal["mlp", "dncnn"]
AutoEncoder = Literal["none", "mlp", "conv"]
_LARGEST_CALL = 1024


class Residual(nn.Module):
    """x - net(x); the last layer of the net is zero at first, so that this is the identity."""

    def __init__(self, net: nn.Module, last: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.net = net
        nn.init.zeros_(last.weight)
        if last.bias is not None:
            nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.net(x)
        return x - change.reshape(x.shape)


def mlp_denoiser(features: int, width: int = 256, depth: int = 2) -> Residual:
    """A residual MLP on flattened rows: `depth` hidden layers of `width` units."""
    layers: list[nn.Module] = [nn.Flatten()]
    units = features
    for _ in range(depth):
        layers += [nn.Linear(units, width), nn.ReLU()]
        units = width
    last = nn.Linear(units, features)
    return Residual(nn.Sequential(*layers, last), last)


def dncnn(channels: int, width: int = 64, depth: int = 17) -> Residual:
    """DnCNN (Zhang et al., arXiv 1608.03981): 3x3 convolutions, batch normalisation in all but the first and last.

    Convolutions are orthogonal at first, the last one zero.
    """
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
    for _ in range(depth - 2):
        layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    last = nn.Conv2d(width, channels, 3, padding=1, bias=False)
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.orthogonal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return Residual(nn.Sequential(*layers, last), last)


def mlp_autoencoder(shape: tuple[int, ...], d_z: int = 32, hidden: int = 128) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder of one hidden layer each; the decoder ends in a sigmoid."""
    features = math.prod(shape)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, d_z))
    decoder = nn.Sequential(
        nn.Linear(d_z, hidden), nn.ReLU(), nn.Linear(hidden, features), nn.Sigmoid(), nn.Unflatten(1, shape)
    )
    return encoder, decoder


# (channels, kernel, stride, padding) of each convolution of the encoder; the decoder has them backwards.
_CONVOLUTIONS: dict[tuple[int, int, int], tuple[tuple[int, int, int, int], ...]] = {
    (3, 32, 32): ((24, 4, 4, 0), (48, 3, 3, 2), (96, 4, 2, 1), (192, 2, 2, 0)),
    (1, 28, 28): ((3, 4, 2, 1), (12, 5, 3, 0)),
}
CONV_D_Z = 192
"""Numbers between encoder and decoder of both convolutional auto-encoders."""


def conv_autoencoder(shape: tuple[int, ...]) -> tuple[nn.Module, nn.Module]:
    """The paper's convolutional encoder and decoder, for images 3x32x32 and 1x28x28; 192 numbers between them.

    Raises UsageError for other shapes.
    """
    image = image_shape(shape, "autoencoder=conv")
    if image not in _CONVOLUTIONS:
        raise UsageError(
            f"autoencoder=conv is for images of 3x32x32 or 1x28x28, and these samples are {list(shape)}: "
            "use autoencoder=mlp"
        )
    down: list[nn.Module] = []
    up: list[nn.Module] = []
    channels, side = image[0], image[1]
    for number, (wide, kernel, stride, padding) in enumerate(_CONVOLUTIONS[image]):
        down += [nn.Conv2d(channels, wide, kernel, stride, padding), nn.ReLU()]
        back = nn.ConvTranspose2d(wide, channels, kernel, stride, padding)
        up = [back, nn.ReLU() if number else nn.Sigmoid(), *up]
        channels, side = wide, (side + 2 * padding - kernel) // stride + 1
    return nn.Sequential(*down, nn.Flatten()), nn.Sequential(nn.Unflatten(1, (channels, side, side)), *up)


@dataclass(frozen=True, kw_only=True)
class Networks:
    """What a front is made of.

    denoiser:    "mlp" on flattened samples, or "dncnn" for images
    width:       units or channels of its layers; 0 for 256 of mlp, 64 of dncnn
    depth:       hidden layers of mlp, convolutions of dncnn (at least 2); 0 for 2 of mlp, 17 of dncnn
    autoencoder: behind the denoiser: "none", "mlp", or "conv" (images 3x32x32 or 1x28x28)
    d_z:         numbers between its encoder and decoder; 0 for 32 of mlp, 192 of conv, which has no other
    hidden:      units of the hidden layers of an mlp auto-encoder
    """

    denoiser: Denoiser = "mlp"
    width: int = 0
    depth: int = 0
    autoencoder: AutoEncoder = "none"
    d_z: int = 0
    hidden: int = 128

    def __post_init__(self) -> None:
        one_of(self, "denoiser", ("mlp", "dncnn"))
        one_of(self, "autoencoder", ("none", "mlp", "conv"))
        at_least(self, 0, "width", "depth", "d_z")
        at_least_one(self, "hidden")
        check(self, "d_z", self.autoencoder != "conv" or self.d_z in (0, CONV_D_Z), f"{CONV_D_Z} for autoencoder=conv")
        if self.denoiser == "dncnn" and self.depth == 1:
            raise UsageError("depth is 1; expected at least 2 convolutions of a dncnn, or 0 for 17")

    def build(self, shape: tuple[int, ...]) -> Front:
        """The front for samples of a shape, its weights drawn from torch's global generator."""
        if self.denoiser == "dncnn":
            channels = image_shape(shape, "denoiser=dncnn")[0]
            denoiser = dncnn(channels, self.width or 64, self.depth or 17)
        else:
            denoiser = mlp_denoiser(math.prod(shape), self.width or 256, self.depth or 2)
        if self.autoencoder == "none":
            return Front(denoiser)
        if self.autoencoder == "conv":
            return Front(denoiser, *conv_autoencoder(shape))
        return Front(denoiser, *mlp_autoencoder(shape, self.d_z or 32, self.hidden))

    def text(self) -> str:
        """In a few words, for descriptions."""
        name = f"{self.denoiser} denoiser"
        return name if self.autoencoder == "none" else f"{name}, {self.autoencoder} auto-encoder"


class Front(nn.Module):
    """Samples to samples: denoiser, and the encoder and decoder where there are any.

    Parts that are frozen (no parameter of theirs takes a gradient) stay in evaluation mode.
    """

    def __init__(self, denoiser: nn.Module, encoder: nn.Module | None = None, decoder: nn.Module | None = None) -> None:
        super().__init__()
        self.denoiser, self.encoder, self.decoder = denoiser, encoder, decoder

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(self.denoiser(x)))

    def encode(self, x: Tensor) -> Tensor:
        """The code of denoised samples, [B, d_z]; the samples where there is no auto-encoder."""
        z: Tensor = x if self.encoder is None else self.encoder(x)
        return z

    def decode(self, z: Tensor) -> Tensor:
        """The samples of codes."""
        x: Tensor = z if self.decoder is None else self.decoder(z)
        return x

    @override
    def train(self, mode: bool = True) -> Front:
        super().train(mode)
        for part in (self.denoiser, self.encoder, self.decoder):
            if part is not None and not any(each.requires_grad for each in part.parameters()):
                part.train(False)
        return self


class Queries:
    """How many samples a model was asked about, and how many it may be.

    spent: samples that were answered
    limit: of `spent`; None for none
    """

    def __init__(self) -> None:
        self.spent = 0
        self.limit: int | None = None

    def afford(self, samples: int) -> None:
        """Raise BudgetExhausted where so many more are over the limit."""
        if self.limit is not None and self.spent + samples > self.limit:
            raise BudgetExhausted(
                f"the query budget allows {self.limit - self.spent} more queries of the model, and {samples} are needed"
            )

    @contextmanager
    def within(self, left: int | None) -> Iterator[None]:
        """No more than `left` further queries inside the block; None sets no limit."""
        held = self.limit
        self.limit = None if left is None else self.spent + left
        try:
            yield
        finally:
            self.limit = held


class Denoised(TorchModel, Undefended, CountsQueries):
    """A model behind a front that is trained: model(front(x)). The model inside is queried and never changed.

    front:    samples to samples
    victim:   any model: a torch model, a function, one behind HTTP
    networks: what the front is made of
    queries:  shared with all copies
    """

    def __init__(self, front: Front, victim: Any, networks: Networks, queries: Queries | None = None) -> None:
        super().__init__(
            front,
            victim.space,
            victim.classes if isinstance(victim, KnowsClasses) else None,
            name=f"{victim.describe().name} behind a {networks.text()}",
            answer_shape=answer_shape(victim),
        )
        self.victim = victim
        self.networks = networks
        self.queries = Queries() if queries is None else queries

    def __repr__(self) -> str:
        return f"Denoised({self.victim!r}, {self.networks!r})"

    @property
    def front(self) -> Front:
        """The module that is trained."""
        assert isinstance(self.module, Front)
        return self.module

    @property
    def model(self) -> Any:
        """The model inside."""
        return self.victim

    @property
    @override
    def undefended(self) -> Any:
        return self.victim

    @property
    @override
    def lanes(self) -> Lanes | None:
        """The model's own shapes; rows are not padded where every one is a query of something else than a network."""
        own = Lanes.own(self.victim)
        return own if own is not None or isinstance(self.victim, TorchModel) else Lanes(_LARGEST_CALL, 1)

    @override
    def __call__(self, x: Tensor) -> Tensor:
        return self._asked(self.front(x))

    def ask(self, images: Tensor) -> Tensor:
        """The model's own logits [B, C] of samples, or its own reconstructions of them, counted.

        Raises BudgetExhausted before it is asked where the limit does not allow it, BadModel for answers of another
        shape or number of classes and for NaN or infinity. Called like any other model the chain answers what is not
        finite as it is: an evaluation has outcomes for that.
        """
        logits = self._asked(images)
        if not bool(torch.isfinite(logits).all()):
            bad = int((~torch.isfinite(logits)).flatten(1).any(1).sum())
            raise BadModel(f"the model answers NaN or infinity for {bad} of {len(images)} samples")
        return logits

    def _asked(self, images: Tensor) -> Tensor:
        self.queries.afford(len(images))
        counts = self.victim.answered if isinstance(self.victim, CountsQueries) else None
        try:
            answer = self.victim(images)
        except BaseException:
            if counts is not None:  # of a call in several requests some were answered
                self.queries.spent += self.victim.answered - counts
            raise
        self.queries.spent += len(images)
        logits = checked_logits(answer, len(images), self.answer_shape)
        if self.answer_shape:
            return logits
        if logits.ndim != 2:
            raise BadModel(
                f"the model answers decisions [{len(images)}]; expected logits or probabilities [B, C]: wrap it so "
                "that it answers one-hot rows, and say answers=labels"
            )
        if logits.shape[1] != (self.classes or logits.shape[1]):
            raise BadModel(f"the model answers {logits.shape[1]} classes; expected {self.classes}")
        self.classes = int(logits.shape[1])
        return logits

    @property
    @override
    def answered(self) -> int:
        return self.queries.spent

    @property
    @override
    def retried(self) -> int:
        return self.victim.retried if isinstance(self.victim, CountsQueries) else 0

    @override
    def attacker_view(self) -> Denoised:
        view = self.victim.attacker_view()
        return self if view is self.victim else Denoised(self.front, view, self.networks, self.queries)

    @override
    def modules(self) -> tuple[nn.Module, ...]:
        return (self.module, *self.victim.modules())

    @override
    def head(self) -> Tensor | None:
        return self.victim.head() if isinstance(self.victim, Headed) else None

    @override
    def state_sha256(self) -> str:
        word = f"denoised|{tensors_sha256(self.state().items())}|{self.victim.describe().state_sha256}"
        return hashlib.sha256(word.encode()).hexdigest()

    @override
    def describe(self) -> ModelInfo:
        info: ModelInfo = self.victim.describe()
        return replace(
            info,
            name=self.name,
            architecture=f"{info.architecture} behind a {self.networks.text()}",
            state_sha256=self.state_sha256(),
            n_parameters=info.n_parameters + sum(each.numel() for each in self.module.parameters()),
        )

    @override
    def with_module(self, module: nn.Module) -> Denoised:
        assert isinstance(module, Front)
        return Denoised(module, self.victim, self.networks, self.queries)

    @override
    def to(self, device: torch.device | str) -> Denoised:
        moved, victim = super().to(device), self.victim.to(device)
        assert isinstance(moved, Denoised)
        return moved if victim is self.victim else Denoised(moved.front, victim, self.networks, self.queries)

    def apart(self) -> Denoised:
        """The same model with a count of its own, from 0 and without a limit."""
        return Denoised(self.front, self.victim, self.networks)


def save_front(chain: Denoised, path: str | Path, shape: tuple[int, ...], extra: Mapping[str, Any]) -> str:
    """Write a front to a safetensors file, atomically; returns the file's sha256. The model behind it is not stored.

    shape: of a sample; extra: anything JSON can say
    """
    metadata = {
        "format": FORMAT,
        "networks": canonical_json(asdict(chain.networks)),
        "shape": canonical_json(list(shape)),
        "model_sha256": chain.victim.describe().state_sha256,
        "extra": canonical_json(dict(extra)),
    }
    tensors = {name: tensor.detach().cpu() for name, tensor in chain.front.state_dict().items()}
    metadata["seal"] = _seal(tensors, metadata)
    content = pack(tensors, metadata)
    write_atomically(Path(path), content)
    return hashlib.sha256(content).hexdigest()


def load_front(path: str | Path, model: Any, networks: Networks) -> Denoised:
    """The model behind the front of a file.

    networks: what the front is made of: a file may not say it. Raises CheckpointError where the file is missing,
    damaged, of another kind or holds another front. A model other than the front's is warned of.
    """
    tensors, metadata = unpack(read_checked(path), path)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} holds no front (format {metadata.get('format')!r}); expected one of advkit train"
        )
    if metadata.get("seal") != _seal(tensors, {key: value for key, value in metadata.items() if key != "seal"}):
        raise CheckpointError(f"{path} is damaged: its content does not match its seal; train it again")
    if metadata.get("networks") != canonical_json(asdict(networks)):
        raise CheckpointError(f"{path} holds a front of {metadata.get('networks')}; the defense asks for {networks}")
    try:
        shape = tuple(int(length) for length in json.loads(metadata["shape"]))
        with torch.device("meta"):
            wanted = {name: (each.shape, each.dtype) for name, each in networks.build(shape).state_dict().items()}
    except (LookupError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path} says no shape of a sample") from error
    if wanted != {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}:
        raise CheckpointError(f"{path} does not hold the weights of {networks} for samples {list(shape)}")
    expected = model.space.shape if isinstance(model.space, Sized) else None
    if expected is not None and tuple(expected) != shape:
        raise BadModel(f"{path} is a front for samples {list(shape)}, and this model takes {list(expected)}")
    with torch.random.fork_rng(devices=[]):
        front = networks.build(shape)
    front.load_state_dict(tensors)
    if metadata.get("model_sha256") != model.describe().state_sha256:
        log.warning("the front of %s was trained for another model than this one", path)
    return Denoised(front.eval(), model, networks)


def _seal(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    word = f"{tensors_sha256(tensors.items())}|{canonical_json(dict(metadata))}"
    return hashlib.sha256(word.encode()).hexdigest()
