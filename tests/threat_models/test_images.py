"""Threat models of images: what is rendered, what is admitted, and what is measured."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.models import squeezenet1_1
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import affine

from advkit.core.errors import BadInput, UsageError
from advkit.core.lanes import Lanes
from advkit.core.oracle import MeteredOracle
from advkit.core.protocols import Renders, one_change
from advkit.core.rendered import RenderedOracle, asked_in
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.evaluation.run.judge import submission
from advkit.testing.play import names
from advkit.testing.victims import network, normal, uniform
from advkit.threat_models import THREAT_MODELS
from advkit.threat_models.goals.untargeted import Untargeted
from advkit.threat_models.warps import roughness

SHAPE = (2, 9, 8)
BOX = Box(shape=SHAPE)


def bound(spec, shape=SHAPE):
    return THREAT_MODELS.build(spec).bind(Box(shape=shape))


def images(n=6, shape=SHAPE, seed=50):
    return uniform(seed, n, *shape)


# --- rotations, translations and flows


@pytest.mark.parametrize("spec", ["transform", "transform:rotation=180,translation=8", "flow:tau=2"])
def test_the_identity_renders_the_input_to_the_bit(spec):
    threat, x = bound(spec), images()
    start = threat.identity(x)
    assert torch.equal(threat.render(start, x), x)
    assert bool(threat.admits(start, start).all())
    assert bool((threat.distance(start, start) == 0).all())


@pytest.mark.parametrize("spec", ["transform:rotation=0,translation=0", "flow:tau=0"])
def test_limits_of_zero_render_the_input_whatever_the_parameters(spec):
    threat, x = bound(spec), images()
    z = threat.sample(threat.identity(x), RowRng.from_ids(0, names(len(x))))
    assert torch.equal(threat.render(z, x), x)


@pytest.mark.parametrize(("angle", "right", "down"), [(0, 2, 0), (0, 0, -3), (90, 0, 0), (17.5, 1, -2), (-40, 0.0, 3)])
def test_rotations_and_translations_are_those_of_torchvision(angle, right, down):
    x = images(shape=(3, 9, 9))
    threat = bound("transform:rotation=180,translation=8", (3, 9, 9))
    z = torch.tensor([[angle / 180, right / 8, down / 8]]).expand(len(x), 3)
    wanted = affine(x, -angle, [right, down], 1.0, [0.0, 0.0], InterpolationMode.BILINEAR)
    torch.testing.assert_close(threat.render(z, x), wanted, atol=2e-5, rtol=0)


def test_a_shift_by_whole_pixels_moves_pixels():
    x = images()
    shifted = bound("transform:rotation=0,translation=4").render(torch.tensor([[0.0, 0.5, 0.25]]).expand(6, 3), x)
    assert torch.equal(shifted[..., 1:, 2:], x[..., :-1, :-2])
    assert bool((shifted[..., :1, :] == 0).all())
    flow = torch.zeros(6, 2, 9, 8)
    flow[:, 0], flow[:, 1] = 0.5, -1.0
    moved = bound("flow:tau=2").render(flow, x)
    assert torch.equal(moved[..., :-1, 2:], x[..., 1:, :-2])
    assert torch.equal(moved[..., -1, 2:], x[..., -1, :-2])  # the edge of the image beyond it


@pytest.mark.parametrize("spec", ["transform:rotation=40,translation=2", "flow:tau=1"])
def test_the_gradient_of_what_is_rendered_is_that_of_finite_differences(spec):
    threat = bound(spec)
    x, weight = images(2).double(), normal(51, 2, *SHAPE).double()
    z = 0.61 * threat.sample(threat.identity(x), RowRng.from_ids(3, names(2))).double()
    leaf = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((weight * threat.render(leaf, x)).sum(), leaf)
    step = 1e-6
    for place in torch.randperm(z.numel(), generator=torch.Generator().manual_seed(0))[:12].tolist():
        ahead, behind = z.flatten().clone(), z.flatten().clone()
        ahead[place] += step
        behind[place] -= step
        rise = (weight * (threat.render(ahead.view_as(z), x) - threat.render(behind.view_as(z), x))).sum() / (2 * step)
        assert float(gradient.flatten()[place]) == pytest.approx(float(rise), abs=1e-5)


def test_the_oracle_of_parameters_differentiates_through_the_rendering_and_meters_as_ever():
    model, x = network((1, 8, 8)), uniform(52, 5, 1, 8, 8)
    threat = bound("transform", (1, 8, 8))
    oracle = asked_in(MeteredOracle(model, 5, queries=3, lanes=Lanes.fitting(x)), x, threat)
    assert isinstance(oracle, RenderedOracle)
    goal = Untargeted(model(x).argmax(1))
    z = 0.3 * threat.sample(threat.identity(x), RowRng.from_ids(0, names(5)))
    loss, gradient, answer = oracle.gradient(z, goal)
    leaf = z.clone().requires_grad_()
    plain = goal.loss(model(threat.render(leaf, x)))
    (wanted,) = torch.autograd.grad(plain.sum(), leaf)
    torch.testing.assert_close(loss, plain.detach())
    torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(answer, oracle(z))
    several = asked_in(MeteredOracle(model, 5, lanes=Lanes.fitting(x)), x, threat).gradients(z, [goal, goal])
    torch.testing.assert_close(several[1], torch.stack([gradient, gradient]))
    assert oracle.left == 1
    part = torch.tensor([3, 1])
    torch.testing.assert_close(oracle.take(part)(z[part]), answer[part])
    assert oracle.meter.forwards.tolist() == [2, 3, 2, 3, 2]
    assert asked_in(oracle.oracle, x, THREAT_MODELS.build("linf:eps=0.1")) is oracle.oracle
    with pytest.raises(UsageError, match="parameters"):
        oracle.differentiable(x)


@pytest.mark.parametrize("spec", ["transform", "flow:tau=1"])
def test_parameters_beyond_the_limits_are_not_admitted_and_leave_the_image_alone(spec):
    threat, x = bound(spec), images(4)
    start = threat.identity(x)
    z = start.clone()
    for row, value in enumerate((1.0, 1.0 + 1e-6, math.nan, -math.inf)):
        z.flatten(1)[row, 0] = value
    handed = submission(z, x, threat)
    assert handed.admitted.tolist() == [True, False, False, False]
    assert torch.equal(handed.seen[1:], x[1:])
    assert not torch.equal(handed.seen[0], x[0])
    assert not bool(submission(images(4, (3, 9, 8)), x, threat).admitted.any())  # of another shape


def test_measures_are_in_units_that_people_use():
    threat, x = bound("transform:rotation=20,translation=4"), images(1)
    said = threat.measures(torch.tensor([[-0.5, 0.25, -0.75]]), threat.identity(x))
    assert {name: float(value) for name, value in said.items()} == {"rotation": 10, "translation": 3}
    assert threat.describe()["eps_string"] == "rotation=20, translation=4"


def test_the_roughness_of_a_flow_is_the_sum_over_neighbours():
    flow = normal(53, 3, 2, 4, 5).double()
    total = torch.zeros(3, dtype=torch.float64)
    for row in range(4):
        for column in range(5):
            for other in ((row + 1, column), (row, column + 1)):
                if other[0] < 4 and other[1] < 5:
                    total += (flow[:, :, row, column] - flow[:, :, other[0], other[1]]).norm(dim=1)
    torch.testing.assert_close(roughness(flow), total, atol=1e-4, rtol=0)
    assert float(roughness(torch.ones(1, 2, 4, 5)).max()) == 0


@pytest.mark.parametrize("spec", ["transform", "flow", "patch", "ssim", "corruption"])
def test_inputs_that_are_no_images_are_refused_in_one_line(spec):
    if spec in ("ssim", "corruption"):
        pytest.importorskip("kornia")
    for shape in ((8,), (4, 4)):
        with pytest.raises(UsageError, match=r"images \[C, H, W\]") as refusal:
            THREAT_MODELS.build(spec).bind(Box(shape=shape))
        assert "\n" not in str(refusal.value)
    threat = THREAT_MODELS.build(spec).bind(Box())
    with pytest.raises(UsageError, match=r"images \[C, H, W\]"):
        threat.identity(torch.rand(2, 8)) if isinstance(threat, Renders) else threat.project(
            torch.rand(2, 8), torch.rand(2, 8)
        )


@pytest.mark.parametrize(
    "spec",
    [
        "transform:rotation=181",
        "transform:translation=-1",
        "flow:tau=-1",
        "patch:size=0",
        "patch:place=fixed,at=1",
        "patch:at=1+1",
        "patch:universal=true",
        "universal:eps=-1",
        "universal:ball=l1",
        "ssim:eps=-1",
        "ssim:window=4",
        "lpips:net=resnet",
        "corruption:severity=6",
        "corruption:constants=mine",
        "online:inner=transform",
        "online:inner=universal",
    ],
)
def test_settings_out_of_range_are_refused(spec):
    with pytest.raises(UsageError):
        THREAT_MODELS.build(spec)


# --- patches


def brute_force_square(gain, size):
    """The corner of the square with the largest sum, by looking at all."""
    best, place = -1.0, (0, 0)
    for row in range(gain.shape[0] - size + 1):
        for column in range(gain.shape[1] - size + 1):
            held = float(gain[row : row + size, column : column + size].sum())
            if held > best + 1e-12:
                best, place = held, (row, column)
    return place


def test_the_projection_keeps_the_square_that_exhaustive_search_finds():
    threat, x = bound("patch:size=3"), images(5)
    z = x + 0.5 * normal(54, *x.shape)
    kept = threat.project(z, x)
    for row in range(5):
        legal = z[row].clamp(0, 1)
        gain = (z[row].double() - x[row]).square() - (z[row].double() - legal).square()
        top, left = brute_force_square(gain.sum(0), 3)
        wanted = x[row].clone()
        wanted[:, top : top + 3, left : left + 3] = legal[:, top : top + 3, left : left + 3]
        assert torch.equal(kept[row], wanted)


@pytest.mark.parametrize("place", ["chosen", "fixed", "random"])
def test_one_bit_outside_the_square_is_enough_to_be_refused(place):
    threat, x = bound(f"patch:size=3,place={place}"), images(4)
    z = threat.sample(x, RowRng.from_ids(0, names(4)))
    assert bool(threat.admits(z, x).all())
    changed = (z != x).any(1)
    assert bool((changed.flatten(1).sum(1) <= 9).all())
    torch.testing.assert_close(threat.distance(z, x), changed.flatten(1).sum(1).double())
    for row in range(4):
        far = (0 if int(changed[row].any(1).nonzero()[0]) > 4 else 8, 0)
        beyond = z.clone()
        beyond[row, 1, far[0], far[1]] = torch.nextafter(beyond[row, 1, far[0], far[1]], torch.tensor(0.5))
        assert threat.admits(beyond, x).tolist() == [each != row for each in range(4)]


def test_random_places_hang_on_image_and_seed_alone_and_are_spread():
    x = images(300)
    threat = bound("patch:size=3,place=random")
    row, column = threat.corners(x)
    assert torch.equal(threat.corners(x[[7]])[0], row[[7]])
    assert {*row.tolist()} == {*range(7)}
    assert {*column.tolist()} == {*range(6)}
    counts = torch.bincount(row * 6 + column, minlength=42).double()
    assert float(((counts - 300 / 42) ** 2 / (300 / 42)).sum()) < 74.7  # chi square with 41 degrees, 0.1 %
    assert not torch.equal(bound("patch:size=3,place=random,seed=1").corners(x)[0], row)


def test_fixed_places_are_where_they_are_said_to_be():
    x = images(2)
    assert [corner.tolist() for corner in bound("patch:size=3,place=fixed,at=2+1").corners(x)] == [[2, 2], [1, 1]]
    assert [corner.tolist() for corner in bound("patch:size=3,place=fixed").corners(x)] == [[6, 6], [5, 5]]
    with pytest.raises(UsageError, match="9 x 8"):
        bound("patch:size=3,place=fixed,at=7+0")
    with pytest.raises(UsageError, match="smaller"):
        bound("patch:size=9")


def test_steps_go_on_in_the_square_that_was_begun():
    threat, x = bound("patch:size=3"), images(3)
    start = threat.sample(x, RowRng.from_ids(1, names(3)))
    gradient = normal(55, *x.shape)
    z = start
    for _ in range(4):
        z = threat.descend(z, gradient, x, 0.1)
    assert bool(threat.admits(z, x).all())
    inside = threat.inside(threat._around((start != x).any(1))[0], x).expand_as(x)
    assert torch.equal(z[~inside], x[~inside])
    want = (start - 0.4 * gradient.sign()).clamp(0, 1)
    torch.testing.assert_close(z[inside], want[inside], atol=1e-6, rtol=0)


def test_a_universal_patch_has_one_content():
    threat, x = bound("patch:size=2,place=random,universal=true"), images(5)
    assert one_change(threat)
    assert not one_change(bound("patch:size=2"))
    content = threat.blank(x, torch.Generator().manual_seed(0))
    z = threat.applied(content, x)
    assert bool(threat.admits(z, x).all())
    torch.testing.assert_close(threat.content(z, threat.corners(x)), content.expand(5, -1, -1, -1))
    some = torch.where(torch.tensor([True, False, True, False, True])[:, None, None, None], z, x)
    assert bool(threat.admits(some, x).all())  # an image without the patch was not attacked
    other = z.clone()
    other[2] = threat.applied(1 - content, x)[2]
    assert not bool(threat.admits(other, x).any())
    with pytest.raises(UsageError, match="attack patch"):
        threat.project(z, x)


# --- universal perturbations


@pytest.mark.parametrize("ball", ["linf", "l2"])
def test_one_vector_explains_what_was_added_and_clipped(ball):
    threat = bound(f"universal:eps=0.3,ball={ball}")
    x = images(7).round(decimals=1)
    change = threat.within(normal(56, *SHAPE))
    z = threat.applied(change, x)
    assert bool(threat.admits(z, x).all())
    assert bool((z != x).flatten(1).any(1).all())
    # Rows that were left alone say nothing.
    some = z.clone()
    some[3] = x[3]
    assert bool(threat.admits(some, x).all())
    # A row that was changed by something else makes the vector impossible.
    apart = z.clone()
    place = int(((z[2] > 0.2) & (z[2] < 0.8)).flatten().nonzero()[0])
    apart[2].view(-1)[place] += 0.01
    assert threat.admits(apart, x).tolist() == [False] * 7


def test_a_vector_beyond_the_ball_is_refused_unless_clipping_hides_it():
    threat = THREAT_MODELS.build("universal:eps=0.1").bind(Box(shape=(1, 1, 2)))
    x = torch.tensor([[[[0.5, 0.95]]], [[[0.4, 0.98]]]])
    far = (x + 0.11).clamp(0, 1)
    assert threat.admits(far, x).tolist() == [False, False]
    # The second feature is clipped in both rows: any vector of at least 0.05 there gives it.
    edge = (x + torch.tensor([0.1, 0.4])).clamp(0, 1)
    assert threat.admits(edge, x).tolist() == [True, True]
    opposite = torch.stack([x[0] + 0.1, x[1] - 0.1]).clamp(0, 1)
    assert threat.admits(opposite, x).tolist() == [False, False]
    assert threat.admits(opposite[:1], x[:1]).tolist() == [True]
    with pytest.raises(UsageError, match="attack universal"):
        threat.project(far, x)


# --- corruptions


def test_a_corruption_is_the_librarys_own_output_from_the_same_seed():
    kornia = pytest.importorskip("kornia")
    shape = (3, 16, 16)
    x, threat = images(4, shape), bound("corruption", shape)
    seeds = torch.tensor([5, 6, 5, 7])

    def made(kind, severity):
        return threat.render(torch.stack([torch.full((4,), kind), torch.full((4,), severity), seeds], 1).float(), x)

    augmentation = kornia.augmentation
    noise = augmentation.RandomGaussianNoise(0.0, 0.06, p=1.0)
    impulses = augmentation.RandomSaltAndPepperNoise(amount=0.07, salt_vs_pepper=0.5, p=1.0)
    for number, severity, library in ((1, 2, noise), (2, 5, impulses)):
        state, found = torch.get_rng_state(), made(number, severity)
        assert torch.equal(state, torch.get_rng_state())
        for row, seed in enumerate(seeds.tolist()):
            torch.manual_seed(seed)
            assert torch.equal(found[row], library(x[row : row + 1])[0].clamp(0, 1))
    assert torch.equal(made(3, 5), kornia.filters.gaussian_blur2d(x, (9, 9), (1.0, 1.0)).clamp(0, 1))
    assert torch.equal(made(4, 3), (x + 0.15).clamp(0, 1))
    grey = x.mean(1, keepdim=True).mean((-2, -1), keepdim=True)
    torch.testing.assert_close(made(5, 1).mean(), (0.75 * x + 0.25 * grey).clamp(0, 1).mean(), atol=2e-2, rtol=0)
    jpeg = kornia.enhance.jpeg_codec_differentiable(x, torch.full((4,), 40.0))
    torch.testing.assert_close(made(6, 5), jpeg.clamp(0, 1))


def test_corruptions_admit_whole_numbers_in_range_alone():
    pytest.importorskip("kornia")
    threat, x = bound("corruption:severity=3", (1, 8, 8)), images(1, (1, 8, 8))
    start = threat.identity(x)
    fine = ([0, 0, 0], [1, 3, 17], [6, 1, (1 << 24) - 1])
    wrong = ([1, 4, 0], [7, 1, 0], [1, 1.5, 0], [1, 0, 0], [0, 1, 0], [1, 1, -1], [1, 1, 1 << 24], [math.nan, 1, 0])
    assert all(bool(threat.admits(torch.tensor([each]).float(), start)) for each in fine)
    assert not any(bool(threat.admits(torch.tensor([each]).float(), start)) for each in wrong)
    assert torch.equal(threat.render(start, x), x)


def test_larger_images_have_the_constants_of_larger_images():
    pytest.importorskip("kornia")
    threat = THREAT_MODELS.build("corruption")
    assert threat.table(torch.zeros(1, 3, 224, 224))["gaussian_noise"][4] == 0.38
    assert threat.table(torch.zeros(1, 3, 32, 32))["gaussian_noise"][4] == 0.10
    chosen = THREAT_MODELS.build("corruption:constants=imagenet-c")
    assert chosen.table(torch.zeros(1, 3, 32, 32))["contrast"][0] == 0.4


# --- perceptual distances


def ssim_by_hand(a, b, window=11, sigma=1.5):
    """The paper's formula, value by value over valid windows of a mirrored image."""
    half = window // 2
    line = torch.exp(-((torch.arange(window) - half).double() ** 2) / (2 * sigma**2))
    kernel = torch.outer(line, line) / line.sum() ** 2
    a, b = (torch.nn.functional.pad(each[None, None].double(), (half,) * 4, mode="reflect")[0, 0] for each in (a, b))
    total, count = 0.0, 0
    for row in range(a.shape[0] - window + 1):
        for column in range(a.shape[1] - window + 1):
            p, q = (each[row : row + window, column : column + window] for each in (a, b))
            mp, mq = (kernel * p).sum(), (kernel * q).sum()
            vp, vq = (kernel * p * p).sum() - mp**2, (kernel * q * q).sum() - mq**2
            both = (kernel * p * q).sum() - mp * mq
            upper = (2 * mp * mq + 1e-4) * (2 * both + 9e-4)
            total, count = total + float(upper / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4))), count + 1
    return total / count


def test_ssim_is_the_papers_formula_and_its_ball_holds_what_is_pulled_back():
    pytest.importorskip("kornia")
    shape = (1, 12, 12)
    threat, x = bound("ssim:eps=0.05,linf=0.3", shape), images(4, shape)
    z = (x + (0.25 * normal(57, *x.shape)).clamp(-0.3, 0.3)).clamp(0, 1)
    assert float(threat.distance(z, x)[0]) == pytest.approx(1 - ssim_by_hand(z[0, 0], x[0, 0]), abs=1e-9)
    assert float(threat.distance(x, x).max()) == 0
    back = threat.project(z, x)
    assert bool(threat.admits(back, x).all())
    assert torch.equal(threat.project(back, x), back)
    assert float(threat.distance(back, x).min()) > 0.045  # pulled back no further than need be
    assert not bool(threat.admits(z, x).any())
    drawn = threat.sample(x, RowRng.from_ids(0, names(4)))
    assert bool(threat.admits(drawn, x).all())
    assert not bool(threat.admits(torch.full_like(x, math.nan), x).any())


@pytest.mark.slow
def test_lpips_is_loaded_from_a_file_and_nothing_is_fetched(tmp_path):
    pytest.importorskip("lpips")
    shape = (1, 16, 16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = squeezenet1_1(weights=None)
    file = tmp_path / "squeeze.pth"
    torch.save(backbone.state_dict(), file)
    state = torch.get_rng_state()
    threat, x = bound(f"lpips:eps=0.001,weights={file}", shape), images(3, shape)
    assert torch.equal(state, torch.get_rng_state())
    loaded = threat._network(torch.device("cpu")).net
    assert torch.equal(loaded.slice1[0].weight, backbone.features[0].weight)
    z = (x + 0.2 * normal(58, *x.shape)).clamp(0, 1)
    assert float(threat.distance(x, x).max()) == 0
    assert float(threat.distance(z, x).min()) > 0
    back = threat.project(z, x)
    assert bool(threat.admits(back, x).all())
    assert "weights_sha256" in threat.describe()["details"]
    with pytest.raises(UsageError, match="weights=FILE"):
        bound("lpips", shape)
    with pytest.raises(BadInput, match="no file"):
        bound(f"lpips:weights={tmp_path / 'none.pth'}", shape)
    with pytest.raises(BadInput, match="expected torchvision's alexnet"):
        bound(f"lpips:net=alex,weights={file}", shape)
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(BadInput, match="does not read"):
        bound(f"lpips:weights={tmp_path / 'text.pth'}", shape)
