"""The networks of RAW purification: what they are before training, how they are mixed, padded and kept."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from advkit.core.errors import BadModel, CheckpointError, UsageError
from advkit.models import raw
from advkit.models.isp import (
    Mix,
    Networks,
    Purifier,
    blank,
    extra_of,
    load_purifier,
    mirrored,
    save_purifier,
)
from advkit.models.pynet import PyNET


def images(rows: int, height: int, width: int, channels: int = 3, seed: int = 0) -> Tensor:
    """Smooth random images, away from black and white."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(rows, channels, 4, 4, generator=generator)
    fine = nn.functional.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True)
    return (0.2 + 0.5 * fine).clamp(0.1, 0.8)


def made(seed: int = 0, **settings: object) -> Purifier:
    """A purifier with drawn weights, its last layers too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        purifier = blank(Networks(**{"width": 6, **settings}))  # type: ignore[arg-type]
        for weights in purifier.parameters():
            if not weights.any():
                nn.init.normal_(weights, std=0.02)
    return purifier


KINDS = [("residual", "residual"), ("plain", "unet"), ("residual", "unet"), ("plain", "residual")]


def test_pynet_has_as_many_weights_as_the_released_one() -> None:
    with torch.device("meta"):
        assert sum(each.numel() for each in PyNET().parameters()) == 47_554_738


@pytest.mark.slow
def test_pynet_answers_every_level_at_its_size() -> None:
    with torch.device("meta"):
        net, planes = PyNET(), torch.zeros(1, 4, 64, 96)
        shapes = [tuple(net(planes, level).shape[1:]) for level in range(6)]
    assert shapes == [(3, 128, 192), (3, 64, 96), (3, 32, 48), (3, 16, 24), (3, 8, 12), (3, 4, 6)]


def test_pynet_takes_multiples_of_sixteen() -> None:
    with torch.device("meta"):
        net = PyNET()
        with pytest.raises(UsageError, match="planes of 40 x 64; expected multiples of 16, at least 32"):
            net(torch.zeros(1, 4, 40, 64))


def test_the_plain_f_has_the_released_ones_weights() -> None:
    f, _ = Networks(f="plain", width=64).build()
    # five 3x3 convolutions 3-64-64-64-64-4: 114,948 with their biases
    assert sum(each.numel() for each in f.parameters()) == 9 * (3 * 64 + 3 * 64 * 64 + 64 * 4) + 4 * 64 + 4


def test_residuals_are_the_analytic_operators_before_training() -> None:
    x = images(2, 12, 10)
    x[:, :, :3] = 0.0  # where the square root's derivative has no end
    x[:, :, 3:5] = 1.0
    fresh = blank(Networks(width=6))
    planes = raw.analytic(x)
    assert torch.equal(fresh.to_raw(x), planes)
    assert torch.equal(fresh.learned(planes), raw.develop(planes))
    assert torch.equal(fresh.learned(planes), fresh.conventional(planes))


@pytest.mark.parametrize(("f", "g"), KINDS)
def test_the_mix_has_both_ends_and_stays_in_the_box(f: str, g: str) -> None:
    purifier, x = made(f=f, g=g), images(3, 12, 16)
    planes = purifier.to_raw(x)
    learned, conventional = purifier.learned(planes), purifier.conventional(planes)
    assert torch.equal(purifier.with_mix(Mix(w=1))(x), learned)
    assert torch.equal(purifier.with_mix(Mix(w=0))(x), conventional)
    mixed = purifier.with_mix(Mix(w=0.25))(x)
    assert torch.allclose(mixed, 0.25 * learned + 0.75 * conventional, atol=1e-6)
    assert not torch.allclose(learned, conventional, atol=1e-3)
    assert mixed.min() >= 0
    assert mixed.max() <= 1
    assert torch.equal(purifier(x), purifier(x))
    softer = purifier.with_mix(Mix(w=0, sigma=1.0))(x)
    assert torch.equal(softer, raw.develop(planes, 1.0))


@pytest.mark.parametrize(("f", "g"), KINDS)
@pytest.mark.parametrize("size", [(13, 11), (5, 30), (3, 3), (1, 1), (16, 16)])
def test_every_size_comes_back(f: str, g: str, size: tuple[int, int]) -> None:
    purifier, x = made(f=f, g=g), images(2, *size)
    z = purifier(x)
    assert z.shape == x.shape
    assert torch.isfinite(z).all()


def test_padding_mirrors_as_often_as_it_takes() -> None:
    row = torch.arange(3.0)[None, None, None]
    assert mirrored(row, 1, 8)[0, 0, 0].tolist() == [0, 1, 2, 1, 0, 1, 2, 1]
    x = images(1, 9, 7)
    wanted = nn.functional.pad(x, (0, 5, 0, 7), mode="reflect")
    assert torch.equal(mirrored(x, 16, 12), wanted)
    assert torch.equal(mirrored(images(1, 1, 1), 2, 3), images(1, 1, 1).expand(1, 3, 2, 3))


def test_gray_images_go_through_as_colour_and_other_channels_are_refused() -> None:
    purifier, x = made(), images(2, 12, 12, channels=1)
    assert torch.equal(purifier(x), purifier(x.expand(-1, 3, -1, -1)).mean(1, keepdim=True))
    for wrong in (images(1, 8, 8, channels=2), images(1, 8, 8, channels=4), torch.rand(3, 8, 8)):
        with pytest.raises(BadModel, match=r"in colour or \[B, 1, H, W\] in gray, got"):
            purifier(wrong)


@pytest.mark.parametrize(("f", "g"), KINDS)
def test_gradients_reach_nearly_every_pixel_and_are_right(f: str, g: str) -> None:
    purifier = made(f=f, g=g, width=24).double().requires_grad_(False)
    if f == "plain":  # drawn weights answer planes around 0, most of them clipped
        purifier.f.net[-1].bias.add_(0.3)
    x = images(2, 16, 16).double()
    weights = torch.rand(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def value(z: Tensor) -> Tensor:
        return (purifier(z) * weights).sum()

    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    assert torch.isfinite(gradient).all()
    assert (gradient != 0).any(1).float().mean() >= 0.99
    step = 1e-6
    for place in torch.randperm(x.numel(), generator=torch.Generator().manual_seed(4))[:20].tolist():
        moved = torch.zeros(x.numel(), dtype=torch.float64)
        moved[place] = step
        moved = moved.reshape(x.shape)
        difference = (value(x + moved) - value(x - moved)) / (2 * step)
        assert difference.item() == pytest.approx(gradient.flatten()[place].item(), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(("f", "g"), [("residual", "residual"), ("plain", "unet")])
def test_files_bring_the_networks_back(tmp_path, f: str, g: str) -> None:
    purifier, x = made(f=f, g=g), images(2, 8, 8)
    file = tmp_path / "front.safetensors"
    save_purifier(purifier, file, {"seed": 3})
    again = load_purifier(file, purifier.networks)
    assert torch.equal(again(x), purifier(x))
    assert extra_of(file) == {"seed": 3}
    assert load_purifier(file).networks == Networks(f=f, g=g, width=6)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=rf"holds f={f},g={g},width=6; the defense asks for f={f},g={g},width=7"):
        load_purifier(file, Networks(f=f, g=g, width=7))  # type: ignore[arg-type]


def test_damaged_and_foreign_files_are_refused(tmp_path) -> None:
    file = tmp_path / "front.safetensors"
    save_purifier(made(), file, {})
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="does not match its seal"):
        load_purifier(file)
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, str(other))
    with pytest.raises(CheckpointError, match="holds no networks of raw_isp"):
        load_purifier(other)
    assert load_file(str(other))
    with pytest.raises(CheckpointError, match="can't read"):
        load_purifier(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Networks(f="release"), "f is 'release'; expected one of residual, plain"),  # type: ignore[arg-type]
        (lambda: Networks(width=0), "width is 0"),
        (lambda: Mix(w=1.5), "w is 1.5"),
        (lambda: Mix(sigma=-1.0), "sigma is -1.0"),
    ],
)
def test_settings_without_meaning_are_refused(call, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        call()


class _Segmenter(nn.Module):
    """A torchvision model of segmentation behind the purifier."""

    def __init__(self, purifier: Purifier, model: nn.Module) -> None:
        super().__init__()
        self.purifier, self.model = purifier, model

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.model(self.purifier(x))["out"]
        return answer


@pytest.mark.slow
def test_it_stands_before_a_segmentation_model_and_a_detector() -> None:
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        segmenter = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4).eval()
        detector = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3).eval()
    purifier, x = made(), images(2, 65, 97)
    leaf = x.clone().requires_grad_()
    maps = _Segmenter(purifier, segmenter)(leaf)
    assert maps.shape == (2, 4, 65, 97)
    maps[:, 1].sum().backward()
    assert torch.isfinite(leaf.grad).all()
    assert (leaf.grad != 0).any(1).float().mean() > 0.5

    leaf = x.clone().requires_grad_()
    found = detector(list(purifier(leaf)))
    assert len(found) == 2
    assert {"boxes", "labels", "scores"} <= found[0].keys()
    loss = sum(each["scores"].sum() for each in found)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 0
