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
from advkit.core.protocols import Captioned, Embeds, Evidence, Examined, Examines, Figure, TaskDefaults, Votes
from advkit.tasks.base import data_folder
from advkit.tasks.fashion_mnist import FashionMNIST


@dataclass(frozen=True)
class Ranks(Examines):
    """The place of every image's own caption among all classes, and the scores where they compare images.

    Images are compared by a caption's score only for models that embed: another classifier's scores mean something up
    to a number that is added to all of an image. A victim that votes or abstains ranks nothing: its decision need not
    be the class with the highest score.
    """

    @override
    def examine(self, evidence: Evidence) -> dict[str, Sequence[Figure]]:
        """`caption_rank_before` and `_after`, and the scores `before` and `after`."""
        said: dict[str, Sequence[Figure]] = {}
        if evidence.labels is None or isinstance(evidence.victim, Votes):
            return said
        compared = not evidence.shifted and isinstance(evidence.victim, Embeds) and evidence.victim.embeds
        for when, answer in (("before", evidence.clean), ("after", evidence.answer)):
            if answer.ndim != 2 or not answer.is_floating_point():  # decisions rank nothing
                continue
            said[f"caption_rank_{when}"] = ranks(answer, evidence.labels)
            if compared:
                said[when] = answer.double().cpu().tolist()
        return said


class Retrieval(Captioned, Examined):
    """A task whose images are also searched for by caption, and captions by image: ranks stand in the records."""

    @property
    @override
    def examiner(self) -> Examines:
        return Ranks()


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
    and captions with an image of their class among the k most similar images (text to image, only for models that
    embed), clean and under attack. Victims that vote or abstain have none.
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
