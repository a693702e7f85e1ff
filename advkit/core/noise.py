"""Streams of smoothing noise: a block of draws at a time, per row and by name, several times as fast as `core.rng`.

A row's key (64 bits, from its Philox stream) and a block's number seed one generator, which fills the whole block. So a
row's noise depends on the key and on how many draws are asked for, never on the batch. The blocks of one key have
generators of different seeds. `core.rng` stays what everything else draws from.

Normal numbers are torch's (Mersenne twister on a CPU, Philox on CUDA): their bits belong to the kind of device, and
`stream` names it for reports. Whole numbers of the lattice are made from words of numpy's SFC64 and are the same
everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

Words = np.ndarray[Any, np.dtype[np.uint64]]
Whole = np.ndarray[Any, np.dtype[np.int16]]

VERSION = 1
_BLOCK = {"cpu": 64}
_LARGE_BLOCK = 1024
_LEVELS = 255
_REACH = 9.2
"""Standard deviations that lattice noise goes up to: less than 2**-64 of a normal distribution lies beyond."""
_LUT_BITS = 16


def block_size(device: torch.device | str) -> int:
    """Draws of a block."""
    return _BLOCK.get(torch.device(device).type, _LARGE_BLOCK)


def stream(kind: str, device: torch.device | str) -> str:
    """What a report calls the stream of normal ("gaussian") or whole ("lattice") numbers on a device."""
    if kind == "lattice":
        return f"sfc64 per row and block of {block_size(device)}, version {VERSION}"
    name = "mt19937" if torch.device(device).type == "cpu" else f"torch {torch.device(device).type}"
    return f"{name} per row and block of {block_size(device)}, version {VERSION}"


def mixed(keys: Tensor, numbers: Tensor | int) -> Tensor:
    """Keys [B], int64 on the CPU, of the streams `numbers` below these: SplitMix64 of key and number."""
    steps = np.atleast_1d(np.asarray(numbers, dtype=np.uint64)) + np.uint64(1)  # arrays wrap around without a word
    z = keys.numpy().view(np.uint64) + steps * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy((z ^ (z >> np.uint64(31))).view(np.int64))


def blocks(first: int, n: int, size: int) -> Iterator[tuple[int, int]]:
    """(number, draws) of the blocks that hold n draws, from block `first` on."""
    for number in range(-(-n // size)):
        yield first + number, min(size, n - number * size)


def normal_block(key: int, block: int, draws: int, row: Tensor) -> Tensor:
    """Standard normal numbers [draws, *row.shape], float32 on the row's device."""
    generator = torch.Generator(device=row.device)
    # A Mersenne twister is seeded by 32 bits: consecutive ones, so that no two blocks of a key share a seed.
    mask = 0xFFFFFFFF if row.device.type == "cpu" else 0x7FFFFFFFFFFFFFFF
    generator.manual_seed(((key & mask) + block) & mask)
    return torch.randn((draws, *row.shape), generator=generator, device=row.device, dtype=torch.float32)


class LatticeNormal:
    """Whole numbers distributed as a rounded normal variable, round(N(0, scale**2)), from 64-bit words.

    scale: standard deviation in steps of the lattice, > 0

    P(z) = Phi((z + 1/2) / scale) - Phi((z - 1/2) / scale). A word w gives the number z with T[z] <= w < T[z + 1], where
    T holds 2**64 times the distribution function, rounded to whole numbers: the draw is exact for the distribution that
    T says. That one is within `slack` of the true one, in total variation and for one coordinate: every entry of T is
    off by less than 2**13 (round-off of erfc is below 2**-52, and rounding adds one), and beyond the table's ends lies
    less than 2**-64.
    """

    def __init__(self, scale: float) -> None:
        reach = max(2, math.ceil(_REACH * scale))
        if reach >= 2**14:
            raise ValueError(f"a scale of {scale} steps is beyond the table")
        lower = [int(0.5 * math.erfc((z + 0.5) / (scale * math.sqrt(2))) * 2.0**64) for z in range(reach)]
        table = [*reversed(lower), *(2**64 - each for each in lower)]
        self.reach = reach
        self.slack = (len(table) + 1) * 2.0**-51
        self._table: Words = np.array([min(each, 2**64 - 1) for each in table], dtype=np.uint64)
        starts = np.arange(2**_LUT_BITS, dtype=np.uint64) << np.uint64(64 - _LUT_BITS)
        low = self._place(starts)
        high = self._place(starts + np.uint64(2 ** (64 - _LUT_BITS) - 1))
        self._sure: Whole = low
        self._open = low != high

    def _place(self, words: Words) -> Whole:
        return (np.searchsorted(self._table, words, side="right") - self.reach).astype(np.int16)

    def of(self, words: Words) -> Whole:
        """The numbers of words, both [n]."""
        top = (words >> np.uint64(64 - _LUT_BITS)).view(np.int64)
        found = self._sure.take(top)
        unsure = np.flatnonzero(self._open.take(top))
        found[unsure] = self._place(words[unsure])
        return found

    def block(self, key: int, block: int, draws: int, row: Tensor) -> Tensor:
        """Whole numbers [draws, *row.shape], int16 on the CPU."""
        seed = np.random.SeedSequence([key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF, block])
        words = np.random.Generator(np.random.SFC64(seed)).integers(0, 2**64, size=draws * row.numel(), dtype=np.uint64)
        return torch.from_numpy(self.of(words)).reshape(draws, *row.shape)


@lru_cache(maxsize=16)
def lattice_normal(sigma: float) -> LatticeNormal:
    """The distribution of noise of standard deviation sigma on the lattice of 8-bit files, k / 255."""
    return LatticeNormal(sigma * _LEVELS)
