"""Camera RAW in torch: demosaicing against other libraries, and a pipeline whose steps invert one another."""

from __future__ import annotations

from importlib import resources

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from advkit.core.errors import BadInput
from advkit.models import raw
from advkit.training.raw_pairs import read_rgb

# What a 4x4 corner of a sensor sees, line by line, for each name.
CORNERS = {"RGGB": "RGRG GBGB", "BGGR": "BGBG GRGR", "GRBG": "GRGR BGBG", "GBRG": "GBGB RGRG"}


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def photograph(name: str) -> Tensor:
    return read_rgb(resources.files("sklearn.datasets").joinpath("images", name))[None]  # type: ignore[arg-type]


@pytest.mark.parametrize("pattern", raw.PATTERNS)
def test_names_of_patterns_read_line_by_line(pattern: str) -> None:
    corner = torch.zeros(1, 3, 4, 4)
    for row, letters in enumerate(CORNERS[pattern].split() * 2):
        for column, letter in enumerate(letters):
            corner[0, "RGB".index(letter), row, column] = 1 + 4 * row + column
    numbered = torch.arange(1.0, 17).reshape(1, 4, 4)
    everything = numbered[:, None].expand(1, 3, 4, 4)
    assert torch.equal(raw.mosaic(everything, pattern), numbered)
    assert torch.equal(raw.places(pattern, 4, 4), corner[0] > 0)
    # a red image is seen where the name says R, and nowhere else
    red = torch.zeros(1, 3, 4, 4)
    red[:, 0] = 1
    assert torch.equal(raw.mosaic(red, pattern)[0].bool(), corner[0, 0] > 0)


# Filters of Malvar, He and Cutler's figure 2, times 8, for a sensor whose pixel (0, 0) is red.
GREEN = [[0, 0, -1, 0, 0], [0, 0, 2, 0, 0], [-1, 2, 4, 2, -1], [0, 0, 2, 0, 0], [0, 0, -1, 0, 0]]
IN_ROW = [[0, 0, 0.5, 0, 0], [0, -1, 0, -1, 0], [-1, 4, 5, 4, -1], [0, -1, 0, -1, 0], [0, 0, 0.5, 0, 0]]
ACROSS = [[0, 0, -1.5, 0, 0], [0, 2, 0, 2, 0], [-1.5, 0, 6, 0, -1.5], [0, 2, 0, 2, 0], [0, 0, -1.5, 0, 0]]


@pytest.mark.parametrize(
    ("row", "column", "colour", "kernel"),
    [
        (4, 4, 1, GREEN),
        (5, 5, 1, GREEN),
        (4, 5, 0, IN_ROW),
        (5, 4, 2, IN_ROW),
        (5, 4, 0, list(map(list, zip(*IN_ROW, strict=True)))),
        (4, 5, 2, list(map(list, zip(*IN_ROW, strict=True)))),
        (5, 5, 0, ACROSS),
        (4, 4, 2, ACROSS),
    ],
)
def test_the_filters_are_the_papers(row: int, column: int, colour: int, kernel: list[list[float]]) -> None:
    leaf = drawn(8, 1, 10, 10).requires_grad_()
    (weights,) = torch.autograd.grad(raw.malvar(leaf, "RGGB")[0, colour, row, column], leaf)
    wanted = torch.zeros(10, 10, dtype=torch.float64)
    wanted[row - 2 : row + 3, column - 2 : column + 3] = torch.tensor(kernel, dtype=torch.float64) / 8
    assert torch.equal(weights[0], wanted)


@pytest.mark.slow  # its import takes seconds
@pytest.mark.parametrize("pattern", raw.PATTERNS)
@pytest.mark.parametrize("way", ["malvar", "bilinear"])
def test_the_interior_is_that_of_colour_demosaicing(pattern: str, way: str) -> None:
    library = pytest.importorskip("colour_demosaicing", reason="the dev extra brings colour-demosaicing")
    reference = {
        "malvar": library.demosaicing_CFA_Bayer_Malvar2004,
        "bilinear": library.demosaicing_CFA_Bayer_bilinear,
    }[way]
    seen = drawn(0, 2, 14, 18)
    found = raw.DEMOSAICING[way](seen, pattern)
    for row, mosaic in zip(found, seen, strict=True):
        wanted = torch.from_numpy(np.asarray(reference(mosaic.numpy(), pattern))).permute(2, 0, 1)
        # its border repeats the outermost pixel, which puts colours in each other's places: left out
        assert (row - wanted)[:, 2:-2, 2:-2].abs().max() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "theirs"), [("RGGB", "BG"), ("BGGR", "RG"), ("GRBG", "GB"), ("GBRG", "GR")])
def test_bilinear_is_that_of_kornia(pattern: str, theirs: str) -> None:
    # kornia names a pattern by the second line's second and first pixel, as OpenCV does
    color = pytest.importorskip("kornia.color", reason="the dev extra brings kornia")
    seen = drawn(1, 2, 12, 16, dtype=torch.float32)
    wanted = color.raw_to_rgb(seen[:, None], color.CFA[theirs])
    assert (raw.bilinear(seen, pattern) - wanted)[:, :, 2:-2, 2:-2].abs().max() < 1e-6


@pytest.mark.parametrize("pattern", raw.PATTERNS)
@pytest.mark.parametrize("way", [raw.malvar, raw.bilinear])
def test_constant_colours_are_exact_up_to_the_border(pattern, way) -> None:
    colour = torch.tensor([0.7, 0.2, 0.4], dtype=torch.float64)[None, :, None, None].expand(1, 3, 9, 12)
    assert (way(raw.mosaic(colour, pattern), pattern) - colour).abs().max() < 1e-15


@pytest.mark.parametrize("pattern", raw.PATTERNS)
@pytest.mark.parametrize("way", [raw.malvar, raw.bilinear])
def test_it_is_linear_keeps_what_was_seen_and_does_not_depend_on_the_batch(pattern, way) -> None:
    one, other = drawn(2, 3, 11, 13), drawn(3, 3, 11, 13)
    both = way(2 * one - 3 * other, pattern)
    assert torch.allclose(both, 2 * way(one, pattern) - 3 * way(other, pattern), atol=1e-12)
    assert torch.equal(raw.mosaic(way(one, pattern), pattern), one)
    single = one.float()
    assert torch.equal(way(single, pattern)[1:2], way(single[1:2].clone(), pattern))
    # <A x, y> = <x, A' y>, with the adjoint from autograd
    leaf, y = one.clone().requires_grad_(), drawn(4, 3, 3, 11, 13)
    (adjoint,) = torch.autograd.grad((way(leaf, pattern) * y).sum(), leaf)
    assert torch.allclose((way(other, pattern) * y).sum(), (other * adjoint).sum(), rtol=1e-12)


def test_planes_and_mosaics_are_each_others() -> None:
    planes, mosaic = drawn(5, 2, 4, 5, 6), drawn(6, 2, 8, 10)
    assert torch.equal(raw.pack(raw.unpack(planes)), planes)
    assert torch.equal(raw.unpack(raw.pack(mosaic)), mosaic)
    assert torch.equal(raw.pack(mosaic)[:, 2], mosaic[:, 1::2, 0::2])


def test_the_transfer_function_is_srgbs_and_has_an_inverse() -> None:
    values = torch.linspace(0, 1, 4097, dtype=torch.float64)
    assert (raw.from_srgb(raw.to_srgb(values)) - values).abs().max() < 1e-6
    assert (raw.to_srgb(raw.from_srgb(values)) - values).abs().max() < 1e-6
    # the standard's: 0.5 in the file is 0.2140 of the light
    assert raw.from_srgb(torch.tensor(0.5)).item() == pytest.approx(0.21404, abs=1e-5)
    leaf = torch.zeros(3, requires_grad=True)
    (slope,) = torch.autograd.grad(raw.to_srgb(leaf).sum(), leaf)
    assert torch.allclose(slope, torch.full((3,), 12.92))


def test_gray_stays_gray() -> None:
    assert [sum(row) for row in raw.MATRIX] == pytest.approx([1, 1, 1])
    for value in (0.0, 0.02, 0.5, 1.0):
        neutral = torch.full((1, 3, 12, 12), value, dtype=torch.float64)
        assert (raw.develop(raw.unprocess(neutral)) - neutral[..., ::2, ::2]).abs().max() < 1e-6
    gray = F.avg_pool2d(photograph("china.jpg")[:, :, :426], 2).mean(1, keepdim=True).expand(-1, 3, -1, -1)
    back = raw.develop(raw.analytic(gray))
    spread = back.amax(1) - back.amin(1)
    # half of the pixels; at hard edges demosaicing guesses red and blue from other neighbours, and colours show
    assert spread.median() <= 2 / 255
    assert spread.max() > 10 / 255


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
def test_the_analytic_round_trip_keeps_natural_images(name: str) -> None:
    image = F.avg_pool2d(photograph(name)[:, :, :426], 2)
    assert raw.psnr(image, raw.develop(raw.analytic(image))).item() > 30


def test_other_white_balance_goes_both_ways() -> None:
    colour = torch.tensor([[0.5, 0.4, 0.3], [0.2, 0.3, 0.25]], dtype=torch.float64)[:, :, None, None]
    image, gains = colour.expand(2, 3, 8, 8), torch.tensor([[1.9, 1.0, 1.7], [2.1, 0.95, 1.5]])
    planes = raw.unprocess(image, gains)
    assert (raw.develop(planes, gains=gains) - colour).abs().max() < 1e-6
    usual = raw.unprocess(image)
    ratio = torch.tensor(raw.GAINS)[[0, 1, 1, 2]] / gains[:, [0, 1, 1, 2]]
    assert torch.allclose(planes, usual * ratio[:, :, None, None].double(), rtol=1e-6)


def test_smoothing_is_a_gaussian_and_keeps_constants() -> None:
    flat = torch.full((1, 4, 5, 5), 0.3, dtype=torch.float64)
    assert torch.allclose(raw.smoothed(flat, 0.8), flat)
    point = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    point[..., 2, 2] = 1
    weights = torch.exp(-0.5 * (torch.arange(-1.0, 2, dtype=torch.float64) / 0.8) ** 2)
    weights /= weights.sum()
    assert torch.allclose(raw.smoothed(point, 0.8)[0, 0, 1:4, 1:4], weights[:, None] * weights[None])
    assert raw.smoothed(point, 0.0) is point


def test_noise_has_the_variance_it_says() -> None:
    planes = torch.full((2, 4, 100, 100), 0.25)
    normal = torch.randn(planes.shape, generator=torch.Generator().manual_seed(0))
    noisy = raw.shot_noise(planes, torch.tensor([0.002, 0.0]), torch.tensor([0.0, 0.004]), normal)
    found = (noisy - planes).flatten(1).std(1)
    assert torch.allclose(found, torch.tensor([(0.25 * 0.002) ** 0.5, 0.004]), rtol=0.03)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: raw.malvar(torch.rand(1, 8, 8), "RGBG"), "'RGBG'; expected one of RGGB"),
        (lambda: raw.bilinear(torch.rand(8, 8), "RGGB"), r"\[8, 8\]; expected floating point \[B, H, W\]"),
        (lambda: raw.malvar(torch.rand(1, 2, 8), "RGGB"), "at least 3 x 3"),
        (lambda: raw.malvar(torch.zeros(1, 8, 8, dtype=torch.int16)), "int16"),
        (lambda: raw.pack(torch.rand(1, 7, 8)), "even height and width"),
        (lambda: raw.unpack(torch.rand(1, 3, 8, 8)), r"expected \[B, 4, H, W\]"),
        (lambda: raw.mosaic(torch.rand(1, 1, 8, 8)), r"expected \[B, 3, H, W\]"),
    ],
)
def test_what_is_no_mosaic_is_refused(call, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        call()
