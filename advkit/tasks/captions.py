"""Fashion-MNIST with captions: images, and for every class what an image-text model is asked about them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from typing_extensions import override

from advkit.core.captions import TEMPLATES, Captions, captions_of
from advkit.core.protocols import Captioned, TaskDefaults
from advkit.tasks.base import data_folder
from advkit.tasks.fashion_mnist import FashionMNIST


@dataclass(frozen=True, kw_only=True)
class FashionMNISTCaptions(FashionMNIST, Captioned):
    """Fashion-MNIST with a caption per class, for image-text models (zero-shot); needs no download.

    templates: captions of a class, with {} in place of its name, joined by +; a model that reads texts takes the mean
               of a class's captions

    Images and the other settings are those of fashion-mnist.

    Raises UsageError for a template without {}, and what fashion-mnist raises.
    """

    templates: tuple[str, ...] = TEMPLATES

    name = "fashion-mnist-captions"
    defaults = TaskDefaults(model="dual-encoder", threat_model="linf:eps=0.05", n=1_000)

    def __post_init__(self) -> None:
        super().__post_init__()
        captions_of((), self.templates)

    @property
    @override
    def _folder(self) -> Path | None:
        return data_folder(self.root, FashionMNIST.name)

    @cached_property
    def captions(self) -> Captions:
        """For every class its captions, one in each template."""
        return captions_of(self.class_names(), self.templates)
