"""Named per-row random streams on Philox 4x32-10 (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3").

A counter-based generator has no state: word w of a row is a function of the row's key, the stream's name and w. So a
row draws the same bits in any batch, in any order, on any device.

Layout. Key: the first 8 bytes of sha256("{seed}|{id}"), little-endian, as two 32-bit words. Counter: block index (low
word), kind of draw (uniform 0, normal 1, integers 2), 64-bit hash of the stream's path. The kind sits in the index's
high word, which no draw of fewer than 2**34 numbers per row needs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from advkit.core.errors import UsageError

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_BUMPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_CACHED = 1 << 16
Kind = Literal["uniform", "normal", "integers"]
_KINDS: dict[Kind, int] = {"uniform": 0, "normal": 1, "integers": 2}
_BITS = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


def _round_keys(key: Tensor) -> Tensor:
    """The keys of all rounds, [rounds, 2, B, 1] in the order (k1, k0), from [2, B] in the order (k0, k1)."""
    bumps = torch.tensor([[r * bump for bump in _BUMPS] for r in range(_ROUNDS)], device=key.device)[:, :, None]
    return ((key[None] + bumps) & _MASK).flip(1).unsqueeze(-1).contiguous()


def philox(rounds: Tensor, even: Tensor, odd: Tensor) -> Tensor:
    """Ten rounds of Philox 4x32: 32-bit words as int64 [B, n, 4].

    rounds: `_round_keys`, [10, 2, B, 1]; even: counter words (c0, c2), [2, B, n]; odd: (c3, c1), in this order.
    Both lanes go through one tensor. int64 products wrap modulo 2**64, which is what their low 64 bits are; high halves
    are masked once a round and low halves, which are only ever xored into something masked, at the end.
    """
    multipliers = torch.tensor(_MULTIPLIERS, device=even.device)[:, None, None]
    for key in rounds.unbind(0):
        product = even * multipliers
        crossed = product >> 32
        crossed.bitwise_xor_(odd).bitwise_xor_(key).bitwise_and_(_MASK)
        even, odd = crossed.flip(0), product
    odd = odd & _MASK
    return torch.stack((even[0], odd[1], even[1], odd[0]), dim=-1)


class RowRng:
    """Randomness by name and by row: the protocol `Rng` on Philox.

    A stream is stateless: the same call on the same stream returns the same numbers. Ask for new ones under a new name,
    `rng.at("step", 3).uniform(x)`. A longer draw starts with the numbers of a shorter one.

    Uniform float32 has 24 random bits, float64 53. Normals are Box-Muller in float64, cast at the end. Integers are a
    64-bit multiply-shift: no value's probability is off by more than 2**-64.
    """

    __slots__ = ("_path", "_rounds", "_seed")

    def __init__(self, seed: int, rounds: Tensor, path: int = 0) -> None:
        self._seed = seed
        self._rounds = rounds
        self._path = path

    @classmethod
    def from_ids(cls, seed: int, ids: Sequence[str], device: torch.device | str = "cpu") -> RowRng:
        """One stream per row id."""
        digests = b"".join([hashlib.sha256(f"{seed}|{name}".encode()).digest()[:8] for name in ids])
        key = torch.from_numpy(np.frombuffer(digests, "<u4").astype(np.int64).reshape(-1, 2).T)
        return cls(int(seed), _round_keys(key)).to(device)

    def __len__(self) -> int:
        return self._rounds.shape[2]

    def __repr__(self) -> str:
        return f"RowRng(seed={self._seed}, rows={len(self)}, path={self._path:#018x}, device={self._rounds.device})"

    @property
    def device(self) -> torch.device:
        """Where the keys live."""
        return self._rounds.device

    def at(self, *names: object) -> RowRng:
        """The stream below this one; `at("a", "b")` is `at("a").at("b")`, and names are compared by their text."""
        path = self._path
        for name in names:
            text = str(name).encode()
            path = int.from_bytes(hashlib.blake2b(path.to_bytes(8, "little") + text, digest_size=8).digest(), "little")
        return RowRng(self._seed, self._rounds, path)

    def take(self, rows: Tensor) -> RowRng:
        """The streams of a subset of the rows (long or bool [B]); a row may come several times."""
        return RowRng(self._seed, self._rounds[:, :, rows.to(self._rounds.device)], self._path)

    def to(self, device: torch.device | str) -> RowRng:
        """The same streams with their keys on a device (Apple's has no float64: there they stay on the host)."""
        place = torch.device(device)
        if place.type == "mps":
            place = torch.device("cpu")
        return self if self._rounds.device == place else RowRng(self._seed, self._rounds.to(place), self._path)

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """A torch generator for what is not per row; depends on the seed and the name, not on the rows."""
        digest = hashlib.sha256(f"{self._seed}|generator|{self._path}".encode()).digest()
        return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def keys(self) -> Tensor:
        """A 64-bit number per row, int64 [B] on the CPU, for models that draw from streams of their own."""
        words = self.to("cpu").words(2, "integers")
        return (words[:, 0] << 32) | words[:, 1]

    def words(self, n: int, kind: Kind) -> Tensor:
        """The first n 32-bit words of every row, int64 [B, n]."""
        return self._words(self._rounds, n, kind)

    def _words(self, rounds: Tensor, n: int, kind: Kind) -> Tensor:
        rows, blocks = rounds.shape[2], -(-n // 4)
        even = torch.empty((2, rows, blocks), dtype=torch.int64, device=rounds.device)
        even[0] = torch.arange(blocks, device=rounds.device)
        even[1] = self._path & _MASK
        # (c3, c1) as a [2, 1, 1] tensor: the first round broadcasts it
        odd = torch.tensor((self._path >> 32, _KINDS[kind]), device=rounds.device)[:, None, None]
        return philox(rounds, even, odd).reshape(rows, blocks * 4)[:, :n]

    def _draw(
        self, like: Tensor, dtype: torch.dtype, n: int, kind: Kind, convert: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Numbers shaped like `like` from n words per row; on a CPU, as many rows at a time as its cache holds."""
        if like.ndim == 0 or like.shape[0] != len(self):
            raise UsageError(
                f"asked for random numbers of shape {tuple(like.shape)} from streams of {len(self)} rows; "
                "expected rows first: take(rows) the streams of the rows that are left"
            )
        rounds = self.to(like.device)._rounds
        values = math.prod(like.shape[1:])
        rows = max(1, _CACHED // max(1, n)) if rounds.device.type == "cpu" else max(1, len(self))
        if len(self) <= rows:
            drawn = convert(self._words(rounds, n, kind))[:, :values].to(dtype)
        else:
            drawn = torch.empty((len(self), values), dtype=dtype, device=rounds.device)
            for start in range(0, len(self), rows):
                part = slice(start, start + rows)
                drawn[part] = convert(self._words(rounds[:, :, part], n, kind))[:, :values]
        return drawn.reshape(like.shape).to(like.device)

    def uniform(self, like: Tensor) -> Tensor:
        """Uniform in [0, 1) with the shape, floating dtype and device of `like`."""
        n = math.prod(like.shape[1:])
        if like.dtype == torch.float64:
            return self._draw(like, like.dtype, 2 * n, "uniform", _double)
        bits = _BITS.get(like.dtype)
        if bits is None:
            raise UsageError(f"asked for uniform numbers of type {like.dtype}; expected a floating type")
        return self._draw(
            like, like.dtype, n, "uniform", lambda words: (words >> (32 - bits)).to(like.dtype).mul_(2.0**-bits)
        )

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal with the shape, floating dtype and device of `like` (beyond 6.7 sigma only in float64)."""
        if not like.is_floating_point():
            raise UsageError(f"asked for normal numbers of type {like.dtype}; expected a floating type")
        precise = like.dtype == torch.float64
        pairs = -(-math.prod(like.shape[1:]) // 2)
        return self._draw(
            like, like.dtype, (4 if precise else 2) * pairs, "normal", _box_muller_double if precise else _box_muller
        )

    def integers(self, high: int, like: Tensor) -> Tensor:
        """Long integers in [0, high), 1 <= high < 2**31, with the shape and device of `like`."""
        if not 1 <= high < 2**31:
            raise UsageError(f"asked for integers below {high}; expected a bound from 1 to 2**31 - 1")
        return self._draw(
            like, torch.int64, 2 * math.prod(like.shape[1:]), "integers", lambda words: _scaled(words, high)
        )


def _double(words: Tensor) -> Tensor:
    """53 random bits of two words each, in [0, 1)."""
    return ((words[:, 0::2] >> 5 << 26) | (words[:, 1::2] >> 6)).to(torch.float64).mul_(2.0**-53)


def _scaled(words: Tensor, high: int) -> Tensor:
    """floor(r * high / 2**64) for the 64-bit r = (first word, second word), without leaving int64."""
    product = words * high
    return (product[:, 0::2] + (product[:, 1::2] >> 32)) >> 32


def _box_muller(words: Tensor) -> Tensor:
    uniform = words.to(torch.float64)
    return _normals((uniform[:, 0::2] + 0.5) * 2.0**-32, uniform[:, 1::2] * 2.0**-32)


def _box_muller_double(words: Tensor) -> Tensor:
    uniform = _double(words)
    return _normals(1.0 - uniform[:, 0::2], uniform[:, 1::2])


def _normals(radius: Tensor, angle: Tensor) -> Tensor:
    """Two normals of each pair of uniforms, radius in (0, 1]."""
    # contiguous, so that every element goes through the same vector routine whatever its place in the batch
    radius, angle = radius.contiguous(), angle.contiguous()
    radius = radius.log_().mul_(-2.0).sqrt_()
    angle = angle.mul_(2.0 * math.pi)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(1)
