"""Purification through camera RAW: "All You Need is RAW" (Zhang, Dong and Heide, ECCV 2022, arXiv 2112.09219)."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from advkit.core.checks import at_least_one, check, not_negative
from advkit.core.errors import UsageError
from advkit.core.files import cache_root, claimed, why
from advkit.core.protocols import Compared, Data, Rng, TrainsApart
from advkit.core.rng import RowRng
from advkit.models import raw
from advkit.models.checkpoint import canonical_json
from advkit.models.isp import (
    Mix,
    Networks,
    Purifier,
    ToRaw,
    ToRGB,
    blank,
    extra_of,
    load_purifier,
    save_purifier,
)
from advkit.models.pynet import PyNET
from advkit.models.torch import TorchModel, seeded, tensors_sha256
from advkit.models.views import Preprocessed
from advkit.training.loop import Objective, Recipe, fit
from advkit.training.raw_pairs import pairs
from advkit.training.recipes import BY_NAME

log = logging.getLogger("advkit")

SHIPPED = Path(__file__).parent / "weights" / "raw_isp.safetensors"
"""F and G of the default settings: `advkit train --defense raw_isp`, with scikit-image 0.26 installed."""
SHOT, READ = 0.002, 0.004
"""Largest shot and read noise of the planes that G is trained on."""
LEVELS = (5, 4, 3, 2, 1)
"""Of pynet, in the order in which they are trained, an equal share of the steps each."""

Features = Callable[[Tensor], Tensor]


def _recipe() -> Recipe:
    return Recipe(epochs=15, batch_size=6, lr=2e-3, schedule="steps", milestones=(0.7,), validation=0.0)


class IspObjective(Objective):
    """The losses of F and G, whose weights are trained side by side: neither sees the other.

    F: squared error of the planes of the image, and of the image under noise of a random size; G: ten times the squared
    error of the image made of noisy planes, and the distance of features where there are any.
    """

    def __init__(self, trainer: IspTrainer) -> None:
        super().__init__()
        self.settings = trainer
        self.step = 0
        self.steps = 1

    @override
    def prepare(self, model: TorchModel, data: Data, rng: Rng) -> None:
        recipe = self.settings.recipe
        self.steps = recipe.epochs * max(1, round(len(data) / recipe.batch_size))

    @override
    def loss(self, model: TorchModel, x: Tensor, y: Tensor, rows: Tensor, rng: Rng) -> Tensor:
        assert isinstance(model.module, Purifier)
        assert isinstance(rng, RowRng)
        image, planes = x[:, :3], x[:, 3:]
        size = rng.at("size").normal(image[:, :1, :1, :1])
        noisy = image + size * self.settings.noise * rng.at("noise").normal(image)
        f = model.module.f
        to_raw = F.mse_loss(f(image), planes) + F.mse_loss(f(noisy), planes)
        drawn = rng.at("sensor").uniform(x.new_empty(len(x), 2)) * x.new_tensor((SHOT, READ))
        seen = raw.shot_noise(planes, drawn[:, 0], drawn[:, 1], rng.at("shot").normal(planes))
        return to_raw + self._to_rgb(model.module, seen, image)

    def _to_rgb(self, purifier: Purifier, planes: Tensor, image: Tensor) -> Tensor:
        g = purifier.g
        if isinstance(g, PyNET):
            level = LEVELS[min(len(LEVELS) - 1, len(LEVELS) * self.step // self.steps)]
            made, wanted = g(planes, level), F.avg_pool2d(image, 2 ** (level - 1))
        else:
            made, wanted = g(planes), image
        loss = 10 * F.mse_loss(made, wanted)
        if self.settings.features is None:
            return loss
        with torch.no_grad():
            target = self.settings.features(wanted)
        return loss + F.mse_loss(self.settings.features(made), target)

    @override
    def stepped(self, model: TorchModel) -> None:
        self.step += 1

    @override
    def state(self) -> dict[str, Tensor]:
        return {"step": torch.tensor(self.step)}

    @override
    def load(self, state: dict[str, Tensor]) -> None:
        self.step = int(state["step"])


@dataclass(frozen=True, kw_only=True)
class IspTrainer:
    """How F and G are trained: all that their weights depend on.

    networks: what they are
    noise:    of F's loss
    images, black: what pairs are cut from, see `advkit.training.raw_pairs`
    crops, crop:   how many, and the mosaic's height and width
    recipe:   of the loop
    features: a frozen network whose features of G's image are compared, too; None for none
    """

    networks: Networks
    noise: float
    images: str
    black: float | None
    crops: int
    crop: int
    recipe: Recipe
    features: Features | None = None

    def objective(self) -> IspObjective:
        """The losses, made afresh."""
        return IspObjective(self)

    def begun(self, seed: int) -> tuple[TorchModel, Data]:
        """The networks before training, and the pairs."""
        rng = RowRng.from_ids(seed, ["raw_isp"])
        data = pairs(rng, self.images, self.crops, self.crop, self.black)
        module = seeded(lambda: blank(self.networks), rng.at("networks"))
        assert isinstance(module, Purifier)
        return TorchModel(module.eval(), data.space, name=f"raw_isp, F {self.networks.f}, G {self.networks.g}"), data

    def told(self) -> dict[str, Any]:
        """Everything but the images and the features, as JSON values."""
        return {
            "networks": asdict(self.networks),
            "noise": self.noise,
            "images": self.images,
            "black": self.black,
            "crops": self.crops,
            "crop": self.crop,
            "recipe": repr(self.recipe),  # which leaves out settings of later versions that are at their defaults
        }

    def keep(self, model: Any, path: Path, extra: Mapping[str, Any]) -> str:
        """Write what was trained; returns the file's sha256."""
        return save_purifier(model.module, path, {**extra, "trainer": self.told()})

    def use(self, path: Path) -> str:
        """The spec of the defense with the networks of a file."""
        from advkit.defenses import DEFENSES

        held = self.networks
        return DEFENSES.spec(RawISP(f=held.f, g=held.g, width=held.width, weights=str(path)))


@dataclass(frozen=True, kw_only=True)
class RawISP(TrainsApart, Compared):
    """Purification through camera RAW: the image becomes RAW planes (F) and an image again, by two pipelines.

    x -> clamp(w G(F(x)) + (1 - w) S(F(x)), 0, 1), in front of any model: F and G are small networks, S is a
    conventional pipeline (Malvar demosaicing, white balance, colour matrix, sRGB). F learns to map noisy images to
    clean RAW; no adversarial example is trained on. Every operator differentiates, so that attackers with gradients go
    through the whole chain; `bpda:pgd` takes the identity's derivative in its place. What was measured of either is in
    docs/raw_isp.md.

    f:        "residual", a change of the planes that unprocessing gives, or "plain", the released code's network
    g:        "residual", a change of S's image; "unet"; or "pynet" (47.6 million weights, for a GPU)
    width:    channels of F and of the residual G; the released F has 64
    noise:    standard deviation of the noise of F's loss, times a random size of standard deviation 1 per image
    w:        share of G, in [0, 1]; the released code is w=1
    sigma:    Gaussian denoising of S's planes, 3x3, in pixels of the planes; 0 for none
    demosaicing: of S: "malvar" or "bilinear"
    images:   folder to train on: photographs, camera RAW files (extra `raw`) or Zurich RAW-to-RGB; empty takes the
              colour photographs that scikit-learn and, where it is installed, scikit-image bring along
    black:    black level of camera RAW files; none takes the files'
    crops:    pairs that are cut from the images
    crop:     their mosaics' height and width
    weights:  file that `advkit train --defense raw_isp` wrote; nothing is trained then
    recipe:   how F and G are trained. The default settings' weights are embedded, others are trained once and kept in
              the cache
    baseline: a simpler defense that reports show beside this one; empty for none
    features: frozen network [B, 3, h, w] -> features, for a perceptual term of G's loss; Python alone

    Images of any height and width are padded by reflection. One-channel images go through as gray colour images, and
    the mean of the channels comes back; other numbers of channels are refused (BadModel).

    Other than in the paper and its code: S and the mix are there (the code has G alone); F and G start from an analytic
    inverse and pipeline unless told otherwise; the plain F has no ReLU at its end, which killed whole planes; Bayer
    planes are R, G, G, B. No table of the paper is reproduced.
    """

    needs_data: ClassVar[bool] = False
    claims: ClassVar[str] = ""

    f: ToRaw = "residual"
    g: ToRGB = "residual"
    width: int = 24
    noise: float = 0.1
    w: float = 0.7
    sigma: float = 0.0
    demosaicing: Literal["malvar", "bilinear"] = "malvar"
    images: str = ""
    black: float | None = None
    crops: int = 192
    crop: int = 96
    weights: str = ""
    recipe: Annotated[Recipe, BY_NAME] = field(default_factory=_recipe)
    baseline: str = "blur"
    features: Features | None = None

    def __post_init__(self) -> None:
        _ = self.networks, self.mix
        not_negative(self, "noise", what="standard deviation")
        not_negative(self, "black", what="level") if self.black is not None else None
        at_least_one(self, "crops")
        least = 64 if self.g == "pynet" else 16
        check(self, "crop", self.crop >= least and self.crop % 2 == 0, f"an even number of at least {least} pixels")
        if self.g == "pynet":
            check(self, "crop", self.crop % 32 == 0, "a multiple of 32 for g=pynet")
        if self.recipe.validation:
            raise UsageError(f"recipe: validation is {self.recipe.validation}; expected 0, F and G have no accuracy")

    @property
    def networks(self) -> Networks:
        """What F and G are."""
        return Networks(f=self.f, g=self.g, width=self.width)

    @property
    def mix(self) -> Mix:
        """How their images are put together."""
        return Mix(w=self.w, sigma=self.sigma, demosaicing=self.demosaicing)

    @override
    def trainer(self) -> IspTrainer:
        return IspTrainer(
            networks=self.networks,
            noise=self.noise,
            images=self.images,
            black=self.black,
            crops=self.crops,
            crop=self.crop,
            recipe=self.recipe,
            features=self.features,
        )

    def purifier(self) -> Purifier:
        """F, G and S alone, images to images, for what is no classifier: a segmenter, a detector.

        Frozen and in evaluation mode; gradients go through to the images. Trains F and G where they are neither
        embedded nor in the cache.
        """
        return self._found().with_mix(self.mix).eval().requires_grad_(False)

    def protect(self, model: Any, data: Data | None, rng: Rng, /) -> Preprocessed:
        """The model behind the purifier."""
        from advkit.defenses import DEFENSES

        return Preprocessed(model, self.purifier(), label=DEFENSES.label(self))

    def _found(self) -> Purifier:
        if self.weights:
            return load_purifier(self.weights, self.networks)
        trainer = self.trainer()
        if trainer.features is None and SHIPPED.is_file() and extra_of(SHIPPED).get("trainer") == trainer.told():
            return load_purifier(SHIPPED, self.networks)
        start, data = trainer.begun(0)
        if trainer.features is not None:  # whose code no key could know
            return _purifier_of(fit(start, data, trainer.objective(), trainer.recipe, _rng()).model)
        word = canonical_json(trainer.told()) + tensors_sha256([("pairs", data.x)])
        folder = cache_root() / "trained" / f"raw_isp-{hashlib.sha256(word.encode()).hexdigest()[:24]}"
        file = folder / "front.safetensors"
        if file.is_file():
            return load_purifier(file, self.networks)
        log.info("training F and G of raw_isp, kept in %s", folder)
        try:
            with claimed(folder, wait=True):  # another process may be training the same
                done = fit(start, data, trainer.objective(), trainer.recipe, _rng(), out=folder / "training")
                trainer.keep(done.model, file, {})
        except OSError as error:
            raise UsageError(
                f"the cache {folder} can't be written ({why(error)}): set ADVKIT_CACHE to a folder"
            ) from error
        return _purifier_of(done.model)


def _purifier_of(model: TorchModel) -> Purifier:
    assert isinstance(model.module, Purifier)
    return model.module


def _rng() -> RowRng:
    """The stream that F and G are trained with."""
    return RowRng.from_ids(0, ["training"]).at("train")
