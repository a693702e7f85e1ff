"""Fashion-MNIST with captions: images, and for every class what an image-text model is asked about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import override

from advkit.core.captions import TEMPLATES, Captions, captions_of
from advkit.core.protocols import Captioned, Evidence, Examines, Figure, TaskDefaults
from advkit.tasks.base import data_folder
from advkit.tasks.fashion_mnist import FashionMNIST


class Retrieval(Captioned, Examines):
    """A task whose images are also searched for by caption, and captions by image: ranks stand in the records."""

    @override
    def examine(self, evidence: Evidence) -> dict[str, Sequence[Figure]]:
        """The place of every image's own caption among all classes, and the scores where they compare images."""
        said: dict[str, Sequence[Figure]] = {}
        if evidence.labels is None:
            return said
        for when, answer in (("before", evidence.clean), ("after", evidence.answer)):
            if answer.ndim != 2 or not answer.is_floating_point():  # decisions rank nothing
                continue
            said[f"caption_rank_{when}"] = ranks(answer, evidence.labels)
            if not evidence.shifted:
                said[when] = answer.double().cpu().tolist()
        return said


def ranks(scores: Tensor, labels: Tensor) -> list[Figure]:
    """The place of every row's label by score, from 1; of equals the lowest class is first. None where not finite."""
    own = scores.gather(1, labels.unsqueeze(1))
    classes = torch.arange(scores.shape[1], device=scores.device)
    before = (scores > own) | ((scores == own) & (classes < labels.unsqueeze(1)))
    places, finite = (1 + before.sum(1)).tolist(), torch.isfinite(scores).all(1).tolist()
    return [float(place) if sane else None for place, sane in zip(places, finite, strict=True)]


@dataclass(frozen=True, kw_only=True)
class FashionMNISTCaptions(FashionMNIST, Retrieval):
    """Fashion-MNIST with a caption per class, for image-text models (zero-shot); needs no download.

    templates: captions of a class, with {} in place of its name, joined by +; a model that reads texts takes the mean
               of a class's captions

    Reports have recall@1 and @5 beside the accuracies: images whose class is among the k most similar (image to text),
    and captions with an image of their class among the k most similar images (text to image), clean and under attack.
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
