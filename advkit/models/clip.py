"""Vision-language models of other packages as zero-shot classifiers: open_clip, and CLIP of transformers.

Images are resized, cropped and normalised inside the model, in torch, so that an attack differentiates through it. The
packages do that on 8-bit images and round after resizing; here nothing is rounded, and values differ by half a level.
"""

from __future__ import annotations

import copy
import importlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as images
from typing_extensions import override

from advkit.core.captions import Captions, captions_sha256
from advkit.core.errors import BadModel, MissingExtra, UsageError
from advkit.core.protocols import Rng
from advkit.core.spaces import Box
from advkit.core.text import first_line
from advkit.models.image_text import ImageText, ImageTextModel, unit_means
from advkit.models.torch import image_shape, seeded

_RESAMPLE = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}
_PIL = {2: "bilinear", 3: "bicubic"}
_DIGEST = 32


class Prepared(nn.Module):
    """Images [B, 1 or 3, H, W] in [0, 1] as an encoder gets them: resized, cropped at the centre, normalised.

    resize:   side of the shorter edge, or (height, width) whatever the proportions; None leaves the size
    crop:     (height, width) cut out at the centre; None cuts nothing
    mean/std: per channel, after resizing; empty: as they are
    resample: bicubic | bilinear, antialiased
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        resize: int | tuple[int, int] | None,
        crop: tuple[int, int] | None,
        mean: Sequence[float],
        std: Sequence[float],
        resample: str = "bicubic",
    ) -> None:
        super().__init__()
        if resample not in _RESAMPLE:
            raise BadModel(f"images are resampled by {resample!r}; expected one of {', '.join(_RESAMPLE)}")
        self.resize = resize
        self.crop = crop
        self.resample = resample
        self.register_buffer("mean", torch.tensor(list(mean) or [0.0]).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(list(std) or [1.0]).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
        if self.resize is not None:
            size = [self.resize] if isinstance(self.resize, int) else list(self.resize)
            # bicubic overshoots; an 8-bit image can't
            x = images.resize(x, size, interpolation=_RESAMPLE[self.resample], antialias=True).clamp(0, 1)
        if self.crop is not None:
            x = images.center_crop(x, list(self.crop))
        return (x - self.mean.to(x.dtype)) / self.std.to(x.dtype)


class Foreign(ImageText):
    """An image-text network of another package. Its texts are known once captions are.

    net:       the network
    prepared:  what happens to images before it
    tokenizer: texts to what its text encoder takes
    classes:   how many texts there are
    """

    vectors: Tensor
    digest: Tensor

    def __init__(self, net: nn.Module, prepared: Prepared, tokenizer: Any, classes: int) -> None:
        super().__init__()
        self.net = net
        self.prepared = prepared
        self.tokenizer = tokenizer
        self.register_buffer("vectors", torch.zeros(classes, self.read(["a"]).shape[1]))
        self.register_buffer("digest", torch.zeros(_DIGEST, dtype=torch.uint8))

    @abstractmethod
    def read(self, texts: Sequence[str]) -> Tensor:
        """Embeddings [n, d] of texts, of any norm, without gradient."""

    @override
    def texts(self) -> Tensor:
        if not bool(self.digest.any()):
            raise BadModel(
                "the model was not told the texts of its classes: model.with_captions(captions), as tasks with class "
                "names do"
            )
        return self.vectors

    @override
    def scale(self) -> Tensor:
        return cast(Tensor, self.net.logit_scale).exp()

    @override
    def captioned(self, captions: Captions) -> Foreign | None:
        digest = torch.tensor(list(captions_sha256(captions)), dtype=torch.uint8)
        if torch.equal(digest, self.digest.cpu()):
            return None
        made = copy.copy(self)  # the network is shared
        made._buffers = dict(self._buffers)
        vectors = self.read([text for texts in captions for text in texts])
        made.vectors = unit_means(vectors, len(captions[0])).to(self.vectors)
        made.digest = digest.to(self.digest.device)
        return made


class OpenCLIPNet(Foreign):
    """An open_clip network; its embedding is what `visual` answers (`encode_image(x, normalize=False)`)."""

    pooled: ClassVar[str] = "net.visual"

    @override
    def encode(self, x: Tensor) -> Tensor:
        found: Tensor = cast(Any, self.net).encode_image(self.prepared(x), normalize=False)
        return found

    @override
    def read(self, texts: Sequence[str]) -> Tensor:
        device = next(self.net.parameters()).device
        with torch.no_grad():
            found: Tensor = cast(Any, self.net).encode_text(self.tokenizer(list(texts)).to(device))
        return found


class TransformersCLIPNet(Foreign):
    """A CLIPModel of transformers; its embedding is what `visual_projection` answers."""

    pooled: ClassVar[str] = "net.visual_projection"

    @override
    def encode(self, x: Tensor) -> Tensor:
        return _projected(cast(Any, self.net).get_image_features(pixel_values=self.prepared(x)))

    @override
    def read(self, texts: Sequence[str]) -> Tensor:
        device = next(self.net.parameters()).device
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            return _projected(
                cast(Any, self.net).get_text_features(**{key: each.to(device) for key, each in tokens.items()})
            )


def _projected(answer: Any) -> Tensor:
    """The projected vector: from version 5 on `pooler_output` of what is answered, before that all of it."""
    found: Tensor = answer if isinstance(answer, Tensor) else answer.pooler_output
    return found


def _package(name: str, prefix: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtra(f"{prefix} needs the package {name}: pip install 'advkit[vlm]'") from error


def _unloadable(spec: str, error: Exception) -> UsageError:
    return UsageError(
        f"{spec} can't be loaded ({type(error).__name__}: {first_line(error)}); expected a folder with its "
        "configuration and weights, or a name of the hub while there is a network"
    )


@dataclass(frozen=True, kw_only=True)
class OpenCLIP:
    """open_clip model as a zero-shot classifier: the class is the one whose caption is most similar to the image.

    name:       folder, as local-dir:FOLDER (open_clip_config.json beside the weights); or hf-hub:OWNER/NAME; or a name
                of open_clip's own, such as ViT-B-32
    pretrained: tag or file of the weights for open_clip's own names; the others bring theirs

    Captions are the task's, else "a photo of a {class}". Raises UsageError where it can't be loaded, BadModel where
    images are prepared in other ways than by resizing the shorter edge to a square's side, or to the size as it is.
    """

    name: str
    pretrained: str = ""

    def __call__(self, shape: tuple[int, ...], classes: int, rng: Rng, *, space: Any = None) -> ImageTextModel:
        package, spec = _package("open_clip", "open_clip:"), f"open_clip:{self.name}"
        image_shape(tuple(shape), spec)
        named = self.name.startswith(("local-dir:", "hf-hub:"))
        if not named and not self.pretrained:
            known = package.list_pretrained_tags_by_model(self.name)
            raise UsageError(
                f"{spec} is an architecture: say which weights, pretrained=TAG"
                + (f", such as {known[0]}" if known else f"; open_clip knows none for {self.name!r}")
            )

        def build() -> nn.Module:
            made: nn.Module = package.create_model(
                self.name, pretrained=self.pretrained or None, require_pretrained=True
            )
            return made

        try:
            net = seeded(build, rng).eval()
            tokenizer = package.get_tokenizer(self.name)
        except Exception as error:  # code of others raises whatever it likes
            raise _unloadable(spec, error) from error
        prepared = _prepared_by_open_clip(cast(Any, net).visual.preprocess_cfg, spec)
        return _model(OpenCLIPNet(net, prepared, tokenizer, classes), spec, shape, classes, space)


def _prepared_by_open_clip(told: Mapping[str, Any], spec: str) -> Prepared:
    size, mode = told["size"], told.get("resize_mode") or "shortest"
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    if mode not in ("shortest", "squash") or (mode == "shortest" and height != width):
        raise BadModel(
            f"{spec} resizes images to {height}x{width} by {mode!r}; expected a square by 'shortest', or 'squash'"
        )
    resize = (height, width) if mode == "squash" else height
    crop = None if mode == "squash" else (height, width)
    return Prepared(resize, crop, told["mean"], told["std"], told.get("interpolation") or "bicubic")


@dataclass(frozen=True, kw_only=True)
class TransformersCLIP:
    """CLIP of transformers as a zero-shot classifier: the class is the one whose caption is most similar to the image.

    name: folder with model, tokenizer and image processor, or a name of the hub such as openai/clip-vit-base-patch32

    Captions are the task's, else "a photo of a {class}". Raises UsageError where it can't be loaded, BadModel for other
    models than CLIP.
    """

    name: str

    def __call__(self, shape: tuple[int, ...], classes: int, rng: Rng, *, space: Any = None) -> ImageTextModel:
        package, spec = _package("transformers", "clip:"), f"clip:{self.name}"
        image_shape(tuple(shape), spec)
        try:
            kind = package.AutoConfig.from_pretrained(self.name).model_type
        except Exception as error:
            raise _unloadable(spec, error) from error
        if kind != "clip":
            raise BadModel(f"{spec} is a model of the kind {kind!r}; expected clip")
        try:
            net = package.CLIPModel.from_pretrained(self.name).eval()
            tokenizer = package.AutoTokenizer.from_pretrained(self.name)
            processor = package.CLIPImageProcessor.from_pretrained(self.name)
        except Exception as error:
            raise _unloadable(spec, error) from error
        return _model(
            TransformersCLIPNet(net, _prepared_by_transformers(processor), tokenizer, classes),
            spec,
            shape,
            classes,
            space,
        )


def _prepared_by_transformers(told: Any) -> Prepared:
    size, crop = dict(told.size or {}), dict(told.crop_size or {})
    resize = int(size["shortest_edge"]) if size.get("shortest_edge") else (int(size["height"]), int(size["width"]))
    return Prepared(
        resize if told.do_resize else None,
        (int(crop["height"]), int(crop["width"])) if told.do_center_crop else None,
        told.image_mean if told.do_normalize else (),
        told.image_std if told.do_normalize else (),
        _PIL.get(int(told.resample), str(told.resample)),
    )


def _model(net: Foreign, spec: str, shape: tuple[int, ...], classes: int, space: Any) -> ImageTextModel:
    return ImageTextModel(
        net.eval(),
        space=Box(0.0, 1.0, tuple(shape)) if space is None else space,
        classes=classes,
        name=spec,
        source=spec,
        architecture=spec,
    )
