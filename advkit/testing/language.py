"""Tiny language models in float64: random weights, or next-token probabilities given as a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from advkit.core.errors import BadInput
from advkit.core.spaces import REPLY, SLOT, USER
from advkit.models.language.decoder import Decoder, Network, Shape
from advkit.models.language.model import LanguageModel
from advkit.models.language.tokenizers import Templated, Tokenizer, WordTokenizer, digest_of

IMPOSSIBLE = -1e4
"""Logit of a token with probability 0: finite, and exp of it is exactly 0."""


def words(count: int) -> WordTokenizer:
    """`count` >= 4 ids: <user>, <assistant>, <end>, then w3, w4, ... as text."""
    marks = ("<user>", "<assistant>", "<end>")
    return WordTokenizer(
        (*marks, *(f"w{index}" for index in range(len(marks), count))),
        special=marks,
        before="<user>",
        after="<assistant>",
        ends=("<end>",),
    )


class PieceTokenizer(Templated):
    """Pieces without blanks between them, read greedily, the longest first: ["a", "b", "ab"] reads "a" + "b" as "ab".

    pieces: what the ids stand for; special: those that are no text; before, after: template; ends: end a reply
    """

    def __init__(
        self,
        pieces: Sequence[str],
        *,
        special: Sequence[str] = (),
        before: str = "",
        after: str = "",
        ends: Sequence[str] = (),
    ) -> None:
        self.pieces = tuple(pieces)
        self._ids = {piece: index for index, piece in enumerate(self.pieces)}
        self._longest = sorted(self.pieces, key=len, reverse=True)
        self.special = frozenset(self._ids[piece] for piece in special)
        self.before, self.after = tuple(self.encode(before)), tuple(self.encode(after))
        self.ends = frozenset(self._ids[piece] for piece in ends)

    @property
    def vocabulary(self) -> int:
        return len(self.pieces)

    @cached_property
    def digest(self) -> str:
        """sha256 of pieces and template."""
        return digest_of(["pieces", self.pieces, self.before, self.after, sorted(self.special), sorted(self.ends)])

    def encode(self, text: str) -> list[int]:
        ids = []
        while text:
            piece = next((each for each in self._longest if text.startswith(each)), None)
            if piece is None:
                raise BadInput(f"{text[:10]!r} does not begin with any of the {len(self.pieces)} pieces")
            ids.append(self._ids[piece])
            text = text[len(piece) :]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.pieces[index] for index in ids)


class TableNetwork(Network):
    """The next token depends on the last one alone.

    table: probabilities [V, V], a row per last token, rows sum to 1; zeros are allowed
    """

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        logits = torch.where(table > 0, table.double().clamp_min(1e-300).log(), IMPOSSIBLE)
        self.following = Parameter(logits)

    @property
    def vocabulary(self) -> int:
        return len(self.following)

    def table(self) -> Tensor:
        return torch.eye(self.vocabulary, dtype=self.following.dtype, device=self.following.device)

    def extend(self, inputs: Tensor, past: Any, keep: int, *, consume: bool = False) -> tuple[Tensor, Any]:
        last = inputs[:, inputs.shape[1] - keep :]
        return (last @ self.following if last.is_floating_point() else self.following[last]), ()

    @property
    def gathers(self) -> bool:
        return True

    def gathered(self, pasts: Sequence[Any], length: int) -> Any:
        return ()

    def select(self, past: Any, rows: Tensor) -> Any:
        return past

    def past_bytes(self, past: Any) -> int:
        return 0

    def row_bytes(self, new: int, past: int, keep: int) -> int:
        return 8 * self.vocabulary * (new + keep)


def table_lm(table: Tensor, tokenizer: Tokenizer | None = None, **settings: Any) -> LanguageModel:
    """A model whose next token depends on the last one alone, by a table [V, V] of probabilities."""
    network = TableNetwork(table).eval().requires_grad_(False)
    return LanguageModel(network, tokenizer or words(len(table)), name="table", **settings)


def tiny_lm(
    seed: int = 0,
    vocabulary: int = 12,
    *,
    width: int = 16,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    scale: float = 8.0,
    dtype: torch.dtype = torch.float64,
    tied: bool = False,
    tokenizer: Tokenizer | None = None,
    **settings: Any,
) -> LanguageModel:
    """A decoder with random weights, float64 by default.

    scale: of the usual initial weights; large enough that contexts matter to what follows
    """
    tokenizer = tokenizer or words(vocabulary)
    shape = Shape(
        vocabulary=tokenizer.vocabulary,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        hidden=2 * width,
        tied=tied,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        network = Decoder(shape).to(torch.float64)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 2:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(noise * (scale * 0.02))
    network = network.to(dtype).eval().requires_grad_(False)
    return LanguageModel(network, tokenizer, name=f"tiny-{seed}", **settings)


def transcript(
    tokenizer: Tokenizer,
    user: str | Sequence[int],
    reply: str | Sequence[int],
    *,
    slot: Sequence[int] = (),
    room: int = 8,
    width: int | None = None,
) -> Tensor:
    """One row [2, W]: the user's words, the slot's tokens, room for more of them (`room` in all), the wanted reply."""
    asked = tokenizer.encode(user) if isinstance(user, str) else list(user)
    wanted = tokenizer.encode(reply) if isinstance(reply, str) else list(reply)
    free = room - len(slot)
    if free < 0:
        raise BadInput(f"{len(slot)} slot tokens do not fit a room of {room}")
    ids = [*asked, *slot, *([-1] * free), *wanted]
    roles = [*([USER] * len(asked)), *([SLOT] * len(slot)), *([0] * free), *([REPLY] * len(wanted))]
    spare = (width or len(ids)) - len(ids)
    if spare < 0:
        raise BadInput(f"a row of {len(ids)} does not fit a width of {width}")
    return torch.tensor([ids + [-1] * spare, roles + [0] * spare])


def transcripts(tokenizer: Tokenizer, pairs: Sequence[tuple[Any, Any]], *, room: int = 8) -> Tensor:
    """Rows [B, 2, W] of (user, reply) pairs, all of one width."""
    rows = [transcript(tokenizer, user, reply, room=room) for user, reply in pairs]
    width = max(row.shape[1] for row in rows)
    return torch.stack([transcript(tokenizer, user, reply, room=room, width=width) for user, reply in pairs])


def random_table(seed: int, vocabulary: int, sharpness: float = 1.0) -> Tensor:
    """Probabilities [V, V] for `table_lm`, the softmax of normal numbers times `sharpness`."""
    if not math.isfinite(sharpness):
        raise BadInput(f"sharpness={sharpness}; expected a finite number")
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(vocabulary, vocabulary, generator=generator, dtype=torch.float64)).softmax(1)
