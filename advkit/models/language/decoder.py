"""What runs tokens through a network: the interface, and a Llama-type decoder (arXiv 2302.13971) in plain torch.

Grouped-query attention is arXiv 2305.13245, rotary positions arXiv 2104.09864.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from advkit.core.errors import BadModel


class Network(nn.Module):
    """Next-token logits of token sequences, continued from a past where one is given.

    A past is opaque to everybody else. A network never writes into one that it was handed, unless told that it may
    `consume` it, and a past of one sequence serves any number of sequences that start with it.
    """

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """Number of ids."""

    @property
    def window(self) -> int | None:
        """Most tokens of a sequence; None where there is no bound."""
        return None

    @abstractmethod
    def table(self) -> Tensor:
        """Input embeddings [V, D] of all ids, differentiable."""

    @abstractmethod
    def extend(self, inputs: Tensor, past: Any, keep: int, *, consume: bool = False) -> tuple[Tensor, Any]:
        """Logits [N, keep, V] at the last `keep` >= 1 positions, and the past that includes the inputs.

        inputs: ids [N, n] or embeddings [N, n, D]; past: of N sequences, of one, or None
        """

    @abstractmethod
    def select(self, past: Any, rows: Tensor) -> Any:
        """The past of some of its sequences (long), one may come several times."""

    @abstractmethod
    def past_bytes(self, past: Any) -> int:
        """Memory that a past holds."""

    @abstractmethod
    def row_bytes(self, new: int, past: int, keep: int) -> int:
        """About the memory that one sequence takes while it goes through: `new` tokens on a past of `past`."""

    @property
    def gathers(self) -> bool:
        """Whether pasts may be put together: they hold one thing per token, and what stands behind changes nothing."""
        return False

    def gathered(self, pasts: Sequence[Any], length: int) -> Any:
        """One past of the first `length` tokens of several, each of one sequence; only where `gathers` says so.

        It shares no memory with them, so that it may be consumed.
        """
        raise BadModel(f"the pasts of {type(self).__name__} can't be put together")

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings [..., D] of ids."""
        return functional.embedding(ids, self.table())

    def run(self, inputs: Tensor, past: Any, keep: int) -> Tensor:
        """Logits [N, keep, V] at the last positions, the past left as it is."""
        return self.extend(inputs, past, keep)[0]


Layers = tuple[tuple[Tensor, Tensor], ...]
"""Keys and values [N, kv heads, n, head width] of every layer."""


class Past(NamedTuple):
    """What a decoder remembers: `shared` [1, ...] of what all sequences start with, `own` [N, ...] of what follows."""

    shared: Layers | None
    own: Layers | None


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a decoder.

    vocabulary: ids
    width:      of the residual stream
    layers:     blocks
    heads:      of the queries
    kv_heads:   of keys and values; divides heads
    hidden:     width inside the gated MLP
    head_width: per head; 0 is width / heads
    base:       of the rotary frequencies
    eps:        of the root-mean-square norms
    tied:       the output head is the embedding table
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    head_width: int = 0
    base: float = 10_000.0
    eps: float = 1e-5
    tied: bool = False

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise BadModel(f"{self.heads} heads can't share {self.kv_heads} key and value heads evenly")
        if not self.head_width:
            if self.width % self.heads:
                raise BadModel(f"a width of {self.width} does not divide into {self.heads} heads")
            object.__setattr__(self, "head_width", self.width // self.heads)
        if self.head_width % 2:
            raise BadModel(f"rotary positions need an even head width, got {self.head_width}")


class _Norm(nn.Module):
    """Root-mean-square norm, in float32 at least."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [N, heads, n, d] turned by its positions; the halves of a head form the pairs."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class _Block(nn.Module):
    """Attention and a gated MLP, each behind a norm and added to the stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, kv = shape.width, shape.kv_heads * shape.head_width
        self.heads, self.kv_heads, self.head_width = shape.heads, shape.kv_heads, shape.head_width
        self.attention_norm = _Norm(width, shape.eps)
        self.query = nn.Linear(width, shape.heads * shape.head_width, bias=False)
        self.key = nn.Linear(width, kv, bias=False)
        self.value = nn.Linear(width, kv, bias=False)
        self.output = nn.Linear(shape.heads * shape.head_width, width, bias=False)
        self.mlp_norm = _Norm(width, shape.eps)
        self.gate = nn.Linear(width, shape.hidden, bias=False)
        self.up = nn.Linear(width, shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, width, bias=False)

    def forward(
        self,
        x: Tensor,
        turn: tuple[Tensor, Tensor],
        hidden: Tensor,
        shared: tuple[Tensor, Tensor] | None,
        own: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The stream [N, n, width] after this block, and keys and values of all but the shared past."""
        rows, new, _ = x.shape
        normed = self.attention_norm(x)

        def split(values: Tensor, heads: int) -> Tensor:
            return values.view(rows, new, heads, self.head_width).transpose(1, 2)

        query = _rotated(split(self.query(normed), self.heads), *turn) * self.head_width**-0.5
        key = _rotated(split(self.key(normed), self.kv_heads), *turn)
        value = split(self.value(normed), self.kv_heads)
        if own is not None:
            key, value = torch.cat((own[0], key), 2), torch.cat((own[1], value), 2)
        mixed = self._attend(query, key, value, hidden, shared)
        x = x + self.output(mixed.transpose(1, 2).reshape(rows, new, -1))
        normed = self.mlp_norm(x)
        x = x + self.down(functional.silu(self.gate(normed)) * self.up(normed))
        return x, (key, value)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, shared: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Mixed values [N, heads, n, d]. The shared past is multiplied as it lies, never copied per sequence."""
        rows, heads, new, width = query.shape
        groups, kv = heads // self.kv_heads, self.kv_heads
        asked = query.reshape(rows, kv, groups * new, width)
        scores = (asked @ key.transpose(2, 3)).view(rows, kv, groups, new, -1)
        scores = scores.masked_fill(hidden, -torch.inf).view(rows, kv, groups * new, -1)
        if shared is None:
            return (_softmax(scores) @ value).reshape(rows, heads, new, width)
        flat = asked.transpose(0, 1).reshape(kv, rows * groups * new, width)
        old = shared[0].shape[2]
        past = (flat @ shared[0][0].transpose(1, 2)).view(kv, rows, groups * new, old).transpose(0, 1)
        weights = _softmax(torch.cat((past, scores), dim=-1))
        mixed = weights[..., old:] @ value
        flat = weights[..., :old].transpose(0, 1).reshape(kv, rows * groups * new, old)
        mixed = mixed + (flat @ shared[1][0]).view(kv, rows, groups * new, width).transpose(0, 1)
        return mixed.reshape(rows, heads, new, width)


def _softmax(scores: Tensor) -> Tensor:
    if scores.dtype in (torch.float16, torch.bfloat16):
        return scores.float().softmax(-1).to(scores.dtype)
    return scores.softmax(-1)


class Decoder(Network):
    """A Llama-type decoder: root-mean-square norms, rotary positions, grouped-query attention, gated MLP.

    Weights are drawn from torch's global generator (normal, 0.02), as every torch module's are.

    shape: its sizes; longest: most tokens of a sequence that it was trained for, None where that is not known
    """

    def __init__(self, shape: Shape, longest: int | None = None) -> None:
        super().__init__()
        self.shape = shape
        self.longest = longest
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(_Block(shape) for _ in range(shape.layers))
        self.norm = _Norm(shape.width, shape.eps)
        self.head = None if shape.tied else nn.Linear(shape.width, shape.vocabulary, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2 and not parameter.is_meta:
                nn.init.normal_(parameter, std=0.02)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Block by block: all are one piece of code."""
        for block in self.blocks:
            block.compile(*args, **kwargs)

    @property
    @override
    def window(self) -> int | None:
        return self.longest

    @property
    def vocabulary(self) -> int:
        return self.shape.vocabulary

    def table(self) -> Tensor:
        return self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [N, n, V] at every position of ids [N, n]."""
        return self.run(ids, None, ids.shape[1])

    def extend(self, inputs: Tensor, past: Past | None, keep: int, *, consume: bool = False) -> tuple[Tensor, Past]:
        shared, own = (None, None) if past is None else past
        x = inputs if inputs.is_floating_point() else self.embedding(inputs)
        rows, new = x.shape[:2]
        if own is not None and own[0][0].shape[0] != rows:
            # a past of one sequence, continued by many: from here on it is what they share
            if own[0][0].shape[0] != 1:
                raise ValueError(f"a past of {own[0][0].shape[0]} sequences can't be continued by {rows}")
            shared, own = _joined(shared, own), None
        start = 0 if shared is None else shared[0][0].shape[2]
        before = 0 if own is None else own[0][0].shape[2]
        turn = self._turn(start + before, new, x)
        places = torch.arange(before + new, device=x.device)
        hidden = places[None, :] > places[before:, None]
        made = []
        for index, block in enumerate(self.blocks):
            x, layer = block(
                x, turn, hidden, None if shared is None else shared[index], None if own is None else own[index]
            )
            made.append(layer)
        x = self.norm(x[:, new - keep :])
        logits = functional.linear(x, self.table()) if self.head is None else self.head(x)
        return logits, Past(shared, tuple(made))

    def _turn(self, start: int, new: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [n, d / 2] of the positions start .. start + new - 1."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        width = self.shape.head_width
        powers = torch.arange(0, width, 2, device=like.device, dtype=dtype) / width
        frequencies = 1.0 / self.shape.base**powers
        angles = torch.arange(start, start + new, device=like.device, dtype=dtype)[:, None] * frequencies
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)

    def select(self, past: Past, rows: Tensor) -> Past:
        if past.own is None:
            return past
        return Past(past.shared, _each(past.own, lambda values: values[rows]))

    @property
    def gathers(self) -> bool:
        return True

    def gathered(self, pasts: Sequence[Past], length: int) -> Past:
        whole = [past.shared if past.own is None else _joined(past.shared, past.own) for past in pasts]

        def first(layer: int, which: int) -> Tensor:
            return torch.cat([layers[layer][which][:, :, :length] for layers in whole if layers is not None])

        return Past(None, tuple((first(layer, 0), first(layer, 1)) for layer in range(self.shape.layers)))

    def past_bytes(self, past: Past) -> int:
        layers = (*(past.shared or ()), *(past.own or ()))
        return sum(values.numel() * values.element_size() for layer in layers for values in layer)

    def row_bytes(self, new: int, past: int, keep: int) -> int:
        shape, size = self.shape, self.embedding.weight.element_size()
        stream = new * (6 * shape.width + 3 * shape.hidden + 4 * shape.heads * shape.head_width)
        scores = 3 * shape.heads * new * (past + new)
        held = 2 * shape.layers * shape.kv_heads * shape.head_width * new
        return size * (stream + scores + held) + 3 * max(4, size) * keep * shape.vocabulary


def _each(layers: Layers, change: Callable[[Tensor], Tensor]) -> Layers:
    return tuple((change(key), change(value)) for key, value in layers)


def _joined(shared: Layers | None, own: Layers) -> Layers:
    if shared is None:
        return own
    return tuple((torch.cat((a[0], b[0]), 2), torch.cat((a[1], b[1]), 2)) for a, b in zip(shared, own, strict=True))
