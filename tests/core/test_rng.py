"""Per-row streams: published vectors, an integer reference, and independence of batch, order and device."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from scipy import stats

from advkit.core.errors import UsageError
from advkit.core.rng import RowRng, _round_keys, philox

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
FULL = 0xFFFFFFFF
PUBLISHED = [  # Random123's known answers for philox4x32 with ten rounds: counter, key, words
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((FULL,) * 4, (FULL,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def reference(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox 4x32-10 in Python's integers, from the paper's description."""
    a, b, c, d = counter
    k, m = key
    for _ in range(10):
        p, q = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (q >> 32) ^ b ^ k, q & FULL, (p >> 32) ^ d ^ m, p & FULL
        k, m = (k + 0x9E3779B9) & FULL, (m + 0xBB67AE85) & FULL
    return a, b, c, d


def ids(n: int) -> list[str]:
    return [f"row-{i}" for i in range(n)]


def streams(n: int, seed: int = 0, device: str = "cpu") -> RowRng:
    return RowRng.from_ids(seed, ids(n), device)


def blocks(counters: list[tuple[int, ...]], key: tuple[int, ...], device: str) -> list[tuple[int, ...]]:
    words = torch.tensor(counters, device=device).T
    even, odd = words[[0, 2]][:, None], words[[3, 1]][:, None]
    made = philox(_round_keys(torch.tensor(key, device=device)[:, None]), even, odd)
    return [tuple(block) for block in made[0].tolist()]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("counter", "key", "words"), PUBLISHED)
def test_published_vectors(counter, key, words, device):
    assert reference(counter, key) == words
    assert blocks([counter], key, device) == [words]


@pytest.mark.parametrize("device", DEVICES)
def test_random_counters_and_keys_against_integers(device):
    draw = np.random.default_rng(0)
    for _ in range(20):
        key = tuple(int(v) for v in draw.integers(0, 2**32, 2))
        counters = [tuple(int(v) for v in draw.integers(0, 2**32, 4)) for _ in range(16)]
        assert blocks(counters, key, device) == [reference(counter, key) for counter in counters]


def test_layout_of_key_and_counter():
    digest = hashlib.sha256(b"7|row-1").digest()
    key = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")
    rng = streams(2, seed=7).at("start", 3)
    for kind, code in (("uniform", 0), ("normal", 1), ("integers", 2)):
        path = rng._path
        expected = [word for i in range(3) for word in reference((i, code, path & FULL, path >> 32), key)]
        assert rng.words(10, kind)[1].tolist() == expected[:10]


def test_uniform_is_the_top_24_or_53_bits():
    rng = streams(3)
    words = rng.words(8, "uniform")
    assert torch.equal(rng.uniform(torch.empty(3, 8)), ((words >> 8).double() / 2**24).float())
    wide = rng.uniform(torch.empty(3, 4, dtype=torch.float64))
    for row in range(3):
        for i in range(4):
            high, low = int(words[row, 2 * i]), int(words[row, 2 * i + 1])
            assert wide[row, i].item() == ((high >> 5) * 2**26 + (low >> 6)) / 2**53


def test_integers_are_an_exact_multiply_shift():
    rng = streams(3)
    words = rng.words(8, "integers")
    for high in (1, 2, 10, 1000, 2**31 - 1):
        got = rng.integers(high, torch.empty(3, 4))
        assert got.dtype == torch.int64
        for row in range(3):
            for i in range(4):
                wide = (int(words[row, 2 * i]) << 32) | int(words[row, 2 * i + 1])
                assert got[row, i].item() == wide * high >> 64


def test_normal_is_box_muller_of_the_words():
    rng = streams(2)
    words = rng.words(6, "normal").double().numpy()
    radius = np.sqrt(-2 * np.log((words[:, 0::2] + 0.5) / 2**32))
    angle = 2 * np.pi * words[:, 1::2] / 2**32
    expected = np.stack((radius * np.cos(angle), radius * np.sin(angle)), -1).reshape(2, 6)
    np.testing.assert_allclose(rng.normal(torch.empty(2, 6)).numpy(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("draw", ["uniform", "normal", "integers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_draw_the_same_bits_in_any_batch_and_order(draw, dtype):
    like = torch.empty(40, 3, 33, 33, dtype=dtype)  # long enough to be made in several pieces
    rng = streams(40).at("noise", 1)

    def drawn(source: RowRng, shape: torch.Tensor) -> torch.Tensor:
        return source.integers(1000, shape) if draw == "integers" else getattr(source, draw)(shape)

    whole = drawn(rng, like)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn(rng.take(order), like), whole[order])
    mask = torch.arange(40) % 3 == 0
    assert torch.equal(drawn(rng.take(mask), like[mask]), whole[mask])
    assert torch.equal(drawn(rng.take(torch.tensor([5, 5])), like[:2]), whole[[5, 5]])
    one = RowRng.from_ids(0, ["row-7"]).at("noise", 1)
    assert torch.equal(drawn(one, like[:1]), whole[7:8])
    short = torch.empty(40, 7, dtype=dtype)
    assert torch.equal(drawn(rng, short), whole.flatten(1)[:, :7])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_bits_on_the_gpu(dtype):
    host, device = streams(9).at("a"), streams(9, device="cuda").at("a")
    like = torch.empty(9, 501, dtype=dtype)
    there = like.cuda()
    assert torch.equal(host.uniform(like), device.uniform(there).cpu())
    assert torch.equal(host.integers(77, like), device.integers(77, there).cpu())
    torch.testing.assert_close(host.normal(like), device.normal(there).cpu(), rtol=1e-6, atol=1e-7)
    assert host.uniform(there).device.type == "cuda"


def test_names_single_out_streams():
    rng, like = streams(4), torch.empty(4, 16)
    base = rng.uniform(like)
    assert torch.equal(rng.uniform(like), base)
    assert torch.equal(rng.at("a", 1).uniform(like), rng.at("a").at(1).uniform(like))
    paths = [rng, rng.at("a"), rng.at("b"), rng.at("a", 1), rng.at("a", 2), rng.at("a1"), rng.at(1, "a"), rng.at("")]
    assert len({tuple(each.uniform(like).flatten().tolist()) for each in paths}) == len(paths)
    other = streams(4, seed=1)
    assert not torch.isin(other.uniform(like), base).any()


def test_kinds_of_draw_share_no_words():
    rng = streams(2)
    kinds = [set(rng.words(400, kind).flatten().tolist()) for kind in ("uniform", "normal", "integers")]
    assert len(set.union(*kinds)) == sum(len(kind) for kind in kinds)


def test_distributions():
    rng = streams(64)
    like = torch.empty(64, 1001)
    assert stats.kstest(rng.uniform(like).flatten().numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(rng.uniform(like.double()).flatten().numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(rng.normal(like).flatten().numpy(), "norm").pvalue > 1e-3
    assert stats.kstest(rng.normal(like.double()).flatten().numpy(), "norm").pvalue > 1e-3
    assert stats.chisquare(torch.bincount(rng.integers(10, like).flatten()).numpy()).pvalue > 1e-3
    # one number per row must be as good as many: rows are independent keys
    many = RowRng.from_ids(0, ids(20_000))
    assert stats.kstest(many.normal(torch.empty(20_000)).numpy(), "norm").pvalue > 1e-3
    pair = many.normal(torch.empty(20_000, 2))
    assert abs(torch.corrcoef(pair.T)[0, 1].item()) < 0.03


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_stay_below_one(dtype):
    drawn = streams(8).uniform(torch.empty(8, 5000, dtype=dtype))
    assert drawn.dtype == dtype
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert abs(drawn.double().mean().item() - 0.5) < 0.01
    assert streams(8).normal(torch.empty(8, 3, dtype=dtype)).dtype == dtype


def test_shapes():
    rng = streams(3)
    assert rng.normal(torch.empty(3)).shape == (3,)
    assert rng.normal(torch.empty(3, 5)).shape == (3, 5)
    assert rng.uniform(torch.empty(3, 0)).shape == (3, 0)
    nobody = rng.take(torch.tensor([], dtype=torch.long))
    assert nobody.uniform(torch.empty(0, 4)).shape == (0, 4)
    assert nobody.integers(3, torch.empty(0)).shape == (0,)
    assert RowRng.from_ids(0, []).normal(torch.empty(0, 2, 2)).shape == (0, 2, 2)


def test_generator_depends_on_seed_and_name_alone():
    def first(rng: RowRng) -> float:
        return torch.rand(1, generator=rng.generator()).item()

    assert first(streams(3).at("init")) == first(streams(5).at("init"))
    assert first(streams(3).at("init")) != first(streams(3).at("shuffle"))
    assert first(streams(3, seed=1).at("init")) != first(streams(3).at("init"))


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    rng = streams(3)
    rng.uniform(torch.empty(3, 3))
    rng.normal(torch.empty(3, 3))
    rng.integers(5, torch.empty(3))
    rng.generator()
    assert torch.equal(torch.get_rng_state(), before)


def test_misuse_is_named():
    rng = streams(3)
    with pytest.raises(UsageError, match="3 rows"):
        rng.uniform(torch.empty(4, 2))
    with pytest.raises(UsageError, match="floating"):
        rng.uniform(torch.zeros(3, dtype=torch.long))
    with pytest.raises(UsageError, match="floating"):
        rng.normal(torch.zeros(3, dtype=torch.long))
    for high in (0, -1, 2**31):
        with pytest.raises(UsageError, match="integers below"):
            rng.integers(high, torch.empty(3))
