"""Blur, JPEG and total variation as input defenses: against other libraries, exact solvers and closed forms."""

from __future__ import annotations

import json
from io import BytesIO

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from advkit.core.errors import BadModel, UsageError
from advkit.defenses import DEFENSES
from advkit.defenses.inputs.blur import Blur
from advkit.defenses.inputs.jpeg import JPEG, smooth_jpeg, soft_round, tables
from advkit.defenses.inputs.tv import TotalVariation
from advkit.evaluation.api import evaluate
from advkit.testing import check_defense
from advkit.testing.victims import uniform

SPECS = ["blur", "blur:kind=gaussian,sigma=0.8", "jpeg:quality=60", "jpeg:view=smooth", "tv:weight=0.1"]


def smooth(rows: int, channels: int = 3, side: int = 32) -> Tensor:
    """Images with edges and slopes, values k/255."""
    coarse = uniform(11, rows, channels, 5, 5)
    return (F.interpolate(coarse, size=(side, side), mode="bilinear") * 255).round() / 255


# Blur


@pytest.mark.parametrize("radius", [1, 2])
def test_a_box_is_the_mean_of_the_neighbours(radius):
    x = uniform(1, 2, 3, 9, 7)
    padded = F.pad(x, (radius,) * 4, mode="reflect")
    assert torch.allclose(Blur(radius=radius).transform(x), F.avg_pool2d(padded, 2 * radius + 1, 1), atol=1e-6)


def test_a_gaussian_is_scipys():
    from scipy.ndimage import gaussian_filter

    x = uniform(2, 1, 1, 12, 15).double()
    found = Blur(kind="gaussian", sigma=1.3).transform(x)[0, 0]
    # scipy's `mirror` is the reflection at the outermost pixel; 4 pixels are 3 sigma, rounded
    wanted = gaussian_filter(x[0, 0].numpy(), 1.3, mode="mirror", radius=4)
    assert np.abs(found.numpy() - wanted).max() < 1e-12


def test_blurring_does_not_depend_on_the_batch_and_takes_images_smaller_than_its_reach():
    x = uniform(3, 5, 3, 8, 8)
    blur = Blur(kind="gaussian", sigma=2.0)
    assert torch.equal(blur.transform(x)[2:3], blur.transform(x[2:3].clone()))
    assert torch.equal(blur.transform(torch.full((1, 1, 1, 2), 0.5)), torch.full((1, 1, 1, 2), 0.5))


# JPEG


@pytest.mark.parametrize("quality", [10, 50, 75, 95])
@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_what_pillow_writes(quality, channels):
    x = smooth(2, channels, 24)
    found = JPEG(quality=quality).transform(x)
    for row, image in zip(found, x, strict=True):
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        file = BytesIO()
        Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(
            file, "JPEG", quality=quality, subsampling="4:2:0"
        )
        again = torch.from_numpy(np.array(Image.open(file))).reshape(24, 24, channels).permute(2, 0, 1)
        assert torch.equal(row, again.float() / 255)


@pytest.mark.parametrize("quality", [10, 49, 50, 75, 95])
def test_tables_are_those_of_the_file(quality):
    file = BytesIO()
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(file, "JPEG", quality=quality)
    held = Image.open(file).quantization
    assert torch.equal(tables(quality), torch.tensor([held[0], held[1]], dtype=torch.float32))


@pytest.mark.parametrize(("quality", "channels"), [(30, 3), (75, 3), (90, 1)])
def test_the_stand_in_with_true_rounding_is_pillows_within_a_level_or_two(quality, channels):
    x = smooth(4, channels, 32)
    true = JPEG(quality=quality).transform(x)
    assert (smooth_jpeg(x, quality, torch.round) - true).abs().mean() < 2 / 255
    # the smooth one lies between the image and what becomes of it
    assert (smooth_jpeg(x, quality) - true).abs().mean() < (x - true).abs().mean()


def test_soft_rounding_is_right_at_whole_numbers_and_halves_with_a_bounded_slope():
    at = torch.arange(-4, 5, dtype=torch.float64) / 2
    assert torch.allclose(soft_round(at), at, atol=1e-12)
    leaf = torch.linspace(-3, 3, 601, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(soft_round(leaf).sum(), leaf)
    assert slope.min() >= -1e-12
    assert slope.max() <= 2 + 1e-12


# Total variation


@pytest.mark.slow
def test_total_variation_is_the_minimum_that_an_exact_solver_finds():
    cp = pytest.importorskip("cvxpy", reason="the dev extra brings cvxpy")
    x, weight = uniform(4, 1, 1, 6, 7).double(), 0.08
    u = cp.Variable((6, 7))
    cp.Problem(cp.Minimize(0.5 * cp.sum_squares(u - x[0, 0].numpy()) + weight * _tv(cp, u))).solve(cp.CLARABEL)
    found = TotalVariation(weight=weight, steps=2000).transform(x)[0, 0].numpy()
    assert np.abs(found - u.value).max() < 1e-4
    # the default number of steps is near
    assert np.abs(TotalVariation(weight=weight).transform(x)[0, 0].numpy() - u.value).max() < 0.02


def _tv(cp, u):
    """The sum over pixels of the length of both differences; beyond the border they are 0."""
    down, right = u[1:, :-1] - u[:-1, :-1], u[:-1, 1:] - u[:-1, :-1]
    inner = cp.sum(cp.norm(cp.vstack([cp.vec(down, order="C"), cp.vec(right, order="C")]), 2, axis=0))
    return inner + cp.sum(cp.abs(u[1:, -1] - u[:-1, -1])) + cp.sum(cp.abs(u[-1, 1:] - u[-1, :-1]))


def test_total_variation_keeps_flat_images_and_the_mean():
    flat = torch.full((1, 3, 5, 5), 0.3)
    assert torch.allclose(TotalVariation().transform(flat), flat)
    x = uniform(5, 2, 3, 8, 9)
    z = TotalVariation(weight=0.2, steps=50).transform(x)
    assert torch.allclose(z.mean((2, 3)), x.mean((2, 3)), atol=1e-5)
    assert z.flatten(1).std(1).max() < x.flatten(1).std(1).min()


# As defenses


@pytest.mark.parametrize("spec", SPECS)
def test_the_laws_hold_on_colour_images(spec):
    data_shape = (3, 8, 8)
    from advkit.testing.defense_laws import stripes
    from advkit.testing.victims import network

    check_defense(DEFENSES.build(spec), network(data_shape, 3), stripes(shape=data_shape))


@pytest.mark.parametrize("spec", [each for each in SPECS if not each.startswith("jpeg")])
def test_gradients_are_the_transformations_own(spec):
    defense, x = DEFENSES.build(spec), uniform(6, 1, 3, 7, 6).double()
    weights = uniform(7, 1, 3, 7, 6).double()
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((defense.transform(leaf) * weights).sum(), leaf)
    for place in range(0, x.numel(), 17):
        moved = torch.zeros(x.numel(), dtype=torch.float64)
        moved[place] = 1e-6
        moved = moved.reshape(x.shape)
        up, down = ((defense.transform(x + sign * moved) * weights).sum() for sign in (1, -1))
        assert ((up - down) / 2e-6).item() == pytest.approx(gradient.flatten()[place].item(), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("blur:kind=median", "kind"),
        ("blur:radius=-1", "radius is -1"),
        ("blur:kind=gaussian,sigma=0", "sigma is 0"),
        ("jpeg:quality=0", "quality is 0; expected a whole number from 1 to 95"),
        ("jpeg:view=none", "view"),
        ("tv:weight=0", "weight is 0"),
        ("tv:steps=0", "steps is 0"),
    ],
)
def test_settings_without_meaning_are_refused(spec, said):
    with pytest.raises(UsageError, match=said):
        DEFENSES.build(spec)


@pytest.mark.parametrize("spec", ["blur", "jpeg", "tv"])
def test_rows_that_are_no_images_are_refused(spec):
    with pytest.raises(BadModel, match=r"images \[B"):
        DEFENSES.build(spec).transform(uniform(8, 4, 9))
    if spec == "jpeg":
        with pytest.raises(BadModel, match=r"\[1, 2, 8, 8\]"):
            DEFENSES.build(spec).transform(uniform(8, 1, 2, 8, 8))


@pytest.mark.parametrize("spec", ["blur", "jpeg:quality=50", "tv:weight=0.05,steps=5"])
def test_both_attackers_stand_in_the_report(spec):
    asked = {"task": "digits", "model": "zoo:digits-mlp", "threat_model": "linf:eps=0.15", "n": 24, "device": "cpu"}
    report = evaluate("pgd:steps=8", spec, **asked)
    data = report.to_dict()
    metrics = data["metrics"]
    names = {attack["name"]: bool(attack.get("beside")) for attack in data["attacks"]}
    assert names == {"pgd:steps=8": False, "pgd:steps=8@undefended": True}
    # the adaptive attacker breaks what the oblivious one breaks, but for a sample or two
    assert metrics["robust_accuracy"]["value"] <= metrics["oblivious_robust_accuracy"]["value"] + 0.05
    assert data["defense"]["is_differentiable"] is not spec.startswith("jpeg")
    assert not [flag for flag in report.flags if flag["id"] == "zero_gradient"]
    json.dumps(data)


def test_a_jpeg_view_answers_as_the_defense_and_lends_either_derivative():
    from advkit.core.spaces import Box
    from advkit.models.torch import TorchModel

    class Total(nn.Module):
        def forward(self, x):
            return torch.stack((x.flatten(1).sum(1), x.flatten(1).square().sum(1)), 1)

    model, x = TorchModel(Total().eval(), Box(shape=(3, 16, 16)), 2), smooth(2, 3, 16)
    for view in ("smooth", "identity"):
        victim = JPEG(quality=40, view=view).protect(model, None, None)
        seen = victim.attacker_view()
        assert torch.equal(seen(x), victim(x))
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(seen(leaf)[:, 0].sum(), leaf)
        if view == "identity":
            assert torch.equal(gradient, torch.ones_like(x))
        else:
            assert not torch.equal(gradient, torch.ones_like(x))
            assert gradient.abs().max() > 0
