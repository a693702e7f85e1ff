"""Streams of smoothing noise: what a row draws is its own, and its distribution is the one that is named."""

from __future__ import annotations

import itertools

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats

from advkit.core.noise import LatticeNormal, block_size, blocks, lattice_normal, mixed, normal_block, stream
from advkit.core.rng import RowRng

ROW = torch.zeros(3, 8, 8)


def test_keys_are_mixed_by_splitmix64():
    # The generator's first outputs from state 0 (Steele, Lea and Flood, 2014).
    zero = torch.zeros(1, dtype=torch.int64)
    found = [int(mixed(zero, number)) % 2**64 for number in (0, 1)]
    assert found == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def test_a_rows_key_is_its_own_in_any_batch():
    names = [f"row{i}" for i in range(20)]
    keys = RowRng.from_ids(3, names).at("certify").keys()
    assert len(set(keys.tolist())) == 20
    for row in (0, 7, 19):
        assert RowRng.from_ids(3, [names[row]]).at("certify").keys().tolist() == [keys[row].item()]
    assert not set(keys.tolist()) & set(RowRng.from_ids(3, names).at("other").keys().tolist())
    assert not set(keys.tolist()) & set(RowRng.from_ids(4, names).at("certify").keys().tolist())


def test_the_same_block_has_the_same_bits_and_another_has_others():
    one, again, other = (normal_block(99, block, 64, ROW) for block in (0, 0, 1))
    assert torch.equal(one, again)
    assert one.shape == (64, 3, 8, 8)
    assert abs(float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])) < 0.05
    # A Mersenne twister has a seed of 32 bits: blocks of one key never share one, even where it overflows.
    last = [normal_block(2**32 - 1, block, 2, ROW) for block in (0, 1)]
    assert not torch.equal(*last)
    assert torch.equal(last[1], normal_block(0, 0, 2, ROW))


def test_torchs_own_generator_is_left_alone():
    before = torch.get_rng_state()
    normal_block(5, 0, 64, ROW)
    lattice_normal(0.25).block(5, 0, 64, ROW)
    assert torch.equal(before, torch.get_rng_state())


def test_normal_blocks_are_standard_normal():
    drawn = torch.cat([normal_block(key, block, 64, ROW).flatten() for key in (1, 2) for block in range(4)]).numpy()
    assert stats.kstest(drawn, "norm").pvalue > 1e-4


def test_draws_fill_blocks():
    assert list(blocks(2, 130, 64)) == [(2, 64), (3, 64), (4, 2)]
    assert list(blocks(0, 64, 64)) == [(0, 64)]
    assert block_size("cpu") == 64
    assert "mt19937" in stream("gaussian", "cpu")
    assert "sfc64" in stream("lattice", "cuda")


@pytest.mark.parametrize("scale", [0.6, 30.6, 63.75])
def test_the_lattices_table_is_a_rounded_normal_distribution_up_to_its_slack(scale):
    law = LatticeNormal(scale)
    ends = [0, *(int(each) for each in law._table), 2**64]
    drawn = np.diff(np.array(ends, dtype=object))
    whole = range(-law.reach, law.reach + 1)
    assert len(drawn) == len(whole)
    with mpmath.workdps(40):
        edges = [mpmath.ncdf((z + mpmath.mpf(1) / 2) / mpmath.mpf(scale)) for z in range(-law.reach - 1, law.reach + 1)]
        true = [high - low for low, high in itertools.pairwise(edges)]
        beyond = edges[0] + 1 - edges[-1]
        apart = (sum(abs(mpmath.mpf(int(d)) / 2**64 - t) for d, t in zip(drawn, true, strict=True)) + beyond) / 2
    assert apart <= law.slack
    assert law.slack < 1e-11


def test_every_word_gives_the_number_that_the_table_says():
    law = LatticeNormal(30.6)
    table = [int(each) for each in law._table]
    near = {max(0, min(2**64 - 1, each + off)) for each in table[::7] for off in (-1, 0, 1)}
    words = np.array(
        [*sorted(near), 0, 2**64 - 1, *np.random.default_rng(0).integers(0, 2**64, 500, dtype=np.uint64)],
        dtype=np.uint64,
    )
    expected = [sum(each <= int(word) for each in table) - law.reach for word in words]
    assert law.of(words).tolist() == expected


def test_lattice_blocks_have_the_named_variance_and_are_whole():
    law = lattice_normal(0.25)
    drawn = torch.cat([law.block(7, block, 64, ROW).flatten() for block in range(8)])
    assert drawn.dtype == torch.int16
    values = drawn.double().numpy()
    scale = 0.25 * 255
    assert abs(values.mean()) < 4 * scale / len(values) ** 0.5
    assert values.var() == pytest.approx(scale**2 + 1 / 12, rel=0.03)
    small = LatticeNormal(1.5)
    counts = np.bincount(small.block(1, 0, 64, ROW).flatten().numpy() + small.reach, minlength=2 * small.reach + 1)
    z = np.arange(-small.reach, small.reach + 1)
    expected = (stats.norm.cdf((z + 0.5) / 1.5) - stats.norm.cdf((z - 0.5) / 1.5)) * counts.sum()
    kept = expected > 5
    pooled = [np.append(each[kept], each[~kept].sum()) for each in (counts, expected)]
    assert stats.chisquare(pooled[0], pooled[1] * pooled[0].sum() / pooled[1].sum()).pvalue > 1e-4
