"""RAW purification as a defense: training, weights, both attackers, the simpler defense beside it."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import advkit
from advkit.core.errors import BadModel, CheckpointError, UsageError
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.defenses import DEFENSES
from advkit.defenses.inputs import raw_isp
from advkit.defenses.inputs.raw_isp import IspObjective, RawISP
from advkit.evaluation.report.verify import verify
from advkit.evaluation.victims import train_victim
from advkit.models import MODELS, raw
from advkit.models.isp import load_purifier
from advkit.models.torch import TorchModel
from advkit.testing import check_defense
from advkit.testing.defense_laws import stripes
from advkit.testing.victims import network, uniform
from advkit.training.loop import Recipe, fit
from advkit.training.raw_pairs import read_rgb, shipped_photographs

QUICK = Recipe(epochs=1, batch_size=4, lr=2e-3, validation=0.0)
SHAPE = (3, 24, 24)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a photograph, and a cache of the test's own."""
    monkeypatch.setenv("ADVKIT_CACHE", str(tmp_path / "cache"))
    images = tmp_path / "images"
    images.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((96, 80), Image.Resampling.BICUBIC).save(images / "photo.png")
    return images


def small(folder: Path, **settings: object) -> RawISP:
    """A defense that trains in a moment."""
    return RawISP(**{"images": str(folder), "width": 4, "crops": 8, "crop": 32, "recipe": QUICK, **settings})  # type: ignore[arg-type]


def crops(n: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Crops of the two photographs that scikit-learn ships, and which one each is of."""
    held = []
    china, flower = (read_rgb(path) for path in shipped_photographs() if path.stem in ("china", "flower"))
    generator = torch.Generator().manual_seed(0)
    for number in range(n):
        top, left = (int(torch.randint(300, (), generator=generator)) for _ in range(2))
        held.append((china, flower)[number % 2][:, top : top + 24, left : left + 24])
    return torch.stack(held), torch.arange(n) % 2


@pytest.fixture(scope="module")
def classifier() -> TorchModel:
    """A network that tells the two photographs apart, by more than their colours."""
    x, y = crops(160)
    blank = MODELS.build("cnn:width=8,hidden=16")(SHAPE, 2, RowRng.from_ids(0, ["c"]), space=Box(shape=SHAPE))
    from advkit.core.protocols import Data
    from advkit.defenses.none import NoDefense

    recipe = Recipe(epochs=12, batch_size=32, lr=3e-3, validation=0.0)
    data = Data(x, y, Box(shape=SHAPE), 2)
    return fit(
        blank, data, NoDefense(recipe=recipe).objective(), recipe, RowRng.from_ids(0, ["c"]), progress=False
    ).model


# Weights: embedded, of a file, of the cache, trained


def test_the_default_is_embedded_and_trains_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADVKIT_CACHE", str(tmp_path / "cache"))
    purifier = RawISP().purifier()
    assert not (tmp_path / "cache").exists()
    assert not any(weights.requires_grad for weights in purifier.parameters())
    image = torch.nn.functional.avg_pool2d(read_rgb(shipped_photographs()[-1])[None, :, :200, :200], 2)
    assert 28 < raw.psnr(image, purifier(image)).item() < 45
    # trained: not the analytic operators any more
    assert not torch.equal(purifier.to_raw(image), raw.analytic(image))
    # how it is mixed is no matter of training
    again = RawISP(w=0.0, sigma=1.0, demosaicing="bilinear").purifier()
    assert torch.equal(again.to_raw(image), purifier.to_raw(image))


def test_gradients_of_the_embedded_networks_reach_nearly_every_pixel() -> None:
    leaf = crops(8)[0].requires_grad_()
    (gradient,) = torch.autograd.grad(RawISP().purifier()(leaf).square().sum(), leaf)
    assert torch.isfinite(gradient).all()
    assert (gradient != 0).any(1).float().mean() >= 0.99


@pytest.mark.slow
def test_other_settings_are_trained_once_and_kept(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    x = uniform(1, 2, 3, 16, 16)
    with caplog.at_level(logging.INFO, logger="advkit"):
        first = small(folder).purifier()
        assert caplog.text.count("training F and G of raw_isp") == 1
        again = small(folder, w=0.1).purifier()
        assert caplog.text.count("training F and G of raw_isp") == 1
        small(folder, noise=0.2).purifier()
        assert caplog.text.count("training F and G of raw_isp") == 2
    assert torch.equal(first.to_raw(x), again.to_raw(x))
    Image.fromarray(np.zeros((80, 96, 3), np.uint8)).save(folder / "black.png")
    other = small(folder).purifier()
    assert not torch.equal(other.to_raw(x), first.to_raw(x))


@pytest.mark.slow
def test_the_command_trains_a_file_that_is_named_again(folder: Path, tmp_path: Path) -> None:
    spec = f"raw_isp:images={folder},width=4,crops=8,crop=32,recipe=[epochs=2,batch_size=4,validation=0]"
    made = train_victim(None, spec, None, out=tmp_path / "front", device="cpu")
    file = Path(made["file"])
    assert made["evaluate"] == f"advkit evaluate --defense raw_isp:width=4,weights={file}"
    report = json.loads(Path(made["report"]).read_text(encoding="utf-8"))
    assert report["epochs"] == 2
    assert [entry["epoch"] for entry in report["log"]] == [1, 2]
    named = RawISP(width=4, weights=str(file)).purifier()
    x = uniform(1, 2, 3, 16, 16)
    assert torch.equal(named(x), load_purifier(file)(x))
    with pytest.raises(CheckpointError, match="holds f=residual,g=residual,width=4; the defense asks for"):
        RawISP(weights=str(file)).purifier()


def test_features_of_a_network_of_ones_own_enter_the_loss(folder: Path) -> None:
    def edges(image: torch.Tensor) -> torch.Tensor:
        return 10 * (image[..., 1:] - image[..., :-1])

    x = uniform(1, 2, 3, 16, 16)
    plain, other = small(folder).purifier(), small(folder, features=edges).purifier()
    assert torch.equal(plain.to_raw(x), other.to_raw(x))  # F has no part in it
    planes = plain.to_raw(x)
    assert not torch.equal(plain.learned(planes), other.learned(planes))


@pytest.mark.slow
def test_training_halves_the_loss_on_noisy_images() -> None:
    defense = RawISP(f="plain", g="unet", width=16, crops=60, crop=48, recipe=replace(QUICK, epochs=30, batch_size=6))
    trainer = defense.trainer()
    start, data = trainer.begun(0)
    rng = RowRng.from_ids(5, [str(row) for row in range(len(data))])

    def noisy(model: TorchModel) -> float:
        image, planes = data.x[:, :3], data.x[:, 3:]
        with torch.no_grad():
            found = model.module.to_raw((image + 0.1 * rng.at("noise").normal(image)).clamp(0, 1))
        return float((found - planes).square().mean())

    done = fit(start, data, trainer.objective(), trainer.recipe, RowRng.from_ids(0, ["t"]), progress=False)
    assert len(done.log) == 30  # of ten steps each
    assert noisy(done.last) < 0.5 * noisy(start)
    assert done.log[-1].loss < 0.5 * done.log[0].loss


def test_a_run_that_was_cut_off_ends_with_the_same_weights(folder: Path, tmp_path: Path) -> None:
    trainer = small(folder, recipe=replace(QUICK, epochs=3)).trainer()
    start, data = trainer.begun(0)

    class Stopped(IspObjective):
        def stepped(self, model: TorchModel) -> None:
            super().stepped(model)
            if self.step == 5:
                raise KeyboardInterrupt

    Stopped.__qualname__, Stopped.__module__ = IspObjective.__qualname__, IspObjective.__module__
    rng = RowRng.from_ids(0, ["t"])
    whole = fit(start, data, trainer.objective(), trainer.recipe, rng, progress=False)
    with pytest.raises(KeyboardInterrupt):
        fit(start, data, Stopped(trainer), trainer.recipe, rng, out=tmp_path / "run", progress=False)
    resumed = fit(start, data, trainer.objective(), trainer.recipe, rng, out=tmp_path / "run", progress=False)
    assert resumed.last.state_sha256() == whole.last.state_sha256()


@pytest.mark.slow
def test_pynet_is_trained_from_its_coarsest_level_up() -> None:
    levels = []

    class Small(raw_isp.PyNET):
        """The wiring without its weights: every level answers one number per colour."""

        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.value = torch.nn.Parameter(torch.zeros(3))

        def forward(self, planes, level=1):
            levels.append(level)
            size = [side // 2 ** (level - 1) for side in planes.shape[2:]]
            return self.value.sigmoid()[None, :, None, None].expand(len(planes), 3, *size)

    defense = RawISP(g="pynet", width=4, crops=10, crop=64, recipe=replace(QUICK, epochs=5, batch_size=2))
    trainer = defense.trainer()
    data = raw_isp.pairs(RowRng.from_ids(0, ["p"]), crops=10, crop=64)
    f, _ = raw_isp.Networks(width=4).build()
    module = raw_isp.Purifier(f, Small(), defense.networks)
    fit(
        TorchModel(module.eval(), data.space),
        data,
        trainer.objective(),
        trainer.recipe,
        RowRng.from_ids(0, ["t"]),
        progress=False,
    )
    assert levels == [level for level in (5, 4, 3, 2, 1) for _ in range(5)]


# In front of models


def test_the_laws_hold_on_colour_and_gray_images(folder: Path) -> None:
    for channels in (1, 3):
        shape = (channels, 9, 8)
        check_defense(small(folder), network(shape, 3), stripes(shape=shape))


def test_other_channels_are_refused_in_one_line() -> None:
    victim = RawISP().protect(network(), None, RowRng.from_ids(0, ["a"]))
    with pytest.raises(BadModel, match=r"takes images \[B, 3, H, W\] in colour .* a Bayer mosaic has red"):
        victim(uniform(1, 4, 2, 6, 6))


def test_the_networks_weights_are_part_of_the_victim(folder: Path) -> None:
    model = network(SHAPE, 3)
    one, other = (small(folder, noise=noise).protect(model, None, None) for noise in (0.1, 0.3))
    assert one.describe().state_sha256 != other.describe().state_sha256
    assert len(one.modules()) == 1 + len(model.modules())
    held = sum(weights.numel() for weights in one.networks[0].parameters())
    assert one.describe().n_parameters == model.describe().n_parameters + held > 0
    assert one.undefended is model


@pytest.mark.slow
def test_the_report_has_clean_oblivious_adaptive_and_baseline_rows(
    folder: Path, tmp_path: Path, classifier: TorchModel
) -> None:
    report = advkit.evaluate(
        attack="bpda:[pgd:steps=5],through=both",
        defense=DEFENSES.spec(small(folder)),
        model=classifier,
        task=crops(24),
        threat_model="linf:eps=8/255",
        device="cpu",
        out=tmp_path / "run",
    )
    metrics, data = report.metrics, report.to_dict()
    assert [each["name"] for each in data["companions"]] == ["oblivious", "baseline"]
    rows = ("clean_accuracy", "robust_accuracy", "oblivious_robust_accuracy", "baseline_robust_accuracy")
    values = [metrics[name]["value"] for name in rows]
    assert all(metrics[name]["denominator"] == 24 for name in rows)
    clean, adaptive, oblivious, baseline = values
    assert clean > 0.8
    assert adaptive <= oblivious <= clean
    assert baseline <= metrics["baseline_clean_accuracy"]["value"]
    assert "baseline blur, defense known" in str(report)
    # the simpler defense has records of its own, which the report is held against
    lines = (tmp_path / "run" / "beside-baseline.jsonl").read_text(encoding="utf-8").splitlines()
    assert len({json.loads(line)["id"] for line in lines}) == 24
    assert not verify(report).faults
    alone = advkit.evaluate(
        attack="bpda:[pgd:steps=5],through=both",
        defense="blur",
        model=classifier,
        task=crops(24),
        threat_model="linf:eps=8/255",
        device="cpu",
        beside=False,
    )
    assert alone.metrics["robust_accuracy"]["value"] == baseline
    place = next(i for i, line in enumerate(lines) if '"outcome":"broken"' in line)
    lines[place] = lines[place].replace('"outcome":"broken"', '"outcome":"robust"')
    (tmp_path / "run" / "beside-baseline.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert any("baseline" in fault for fault in verify(report).faults)


@pytest.mark.slow
def test_a_baseline_that_trains_is_refused(folder: Path, classifier: TorchModel) -> None:
    asked = {"model": classifier, "task": crops(8), "threat_model": "linf:eps=4/255", "device": "cpu"}
    with pytest.raises(UsageError, match="baseline is pgd_at, which trains; expected a defense that trains nothing"):
        advkit.evaluate(attack="fgsm", defense=small(folder, baseline="pgd_at"), **asked)
    with pytest.raises(UsageError, match="which trains; expected a defense that trains nothing"):
        advkit.evaluate(attack="fgsm", defense=small(folder, baseline="raw_isp:f=plain"), **asked)
    report = advkit.evaluate(attack="fgsm", defense=small(folder, baseline=""), **asked)
    assert "baseline_robust_accuracy" not in report.metrics


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("raw_isp:f=release", "f expects residual | plain, not 'release'"),
        ("raw_isp:w=2", "w is 2"),
        ("raw_isp:noise=-1", "noise is -1"),
        ("raw_isp:crop=15", "crop is 15; expected an even number of at least 16"),
        ("raw_isp:g=pynet,crop=48", "crop is 48; expected an even number of at least 64"),
        ("raw_isp:black=-1", "black is -1"),
        ("raw_isp:recipe=[validation=0.1]", "validation is 0.1; expected 0"),
    ],
)
def test_settings_without_meaning_are_refused(spec: str, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        DEFENSES.build(spec)


def test_a_missing_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no folder .*nowhere; images= names"):
        RawISP(images=str(tmp_path / "nowhere")).purifier()
