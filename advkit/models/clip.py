"""CLIP models of other libraries as zero-shot classifiers (arXiv 2103.00020): folders of open_clip and transformers."""

from __future__ import annotations

import importlib
import json
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from advkit.core.captions import TEMPLATES, Captions, captions_of
from advkit.core.errors import BadModel, CheckpointError, MissingExtra, UsageError
from advkit.core.paths import place_of
from advkit.core.protocols import Rng
from advkit.core.spaces import Box
from advkit.core.strict_json import read_object
from advkit.core.text import first_line
from advkit.models.image_text import ImageText, ImageTextModel, digest_of, unit_means
from advkit.models.torch import image_shape, seeded

_AT_ONCE = 64  # captions
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the images that OpenAI's models were trained on."""


@dataclass(frozen=True)
class Preparation:
    """What stands between images in [0, 1] and an image tower; differentiable, of any size and one or three channels.

    size:   height and width that the tower takes
    resize: "shortest": the shorter side to `edge`, then the middle is cut out; "squash": straight to `size`
    edge:   the shorter side after resizing
    way:    "bicubic" or "bilinear", with antialiasing as Pillow has it
    mean, std: per channel
    floors: how the cut is placed where it can't be in the middle: rounded down, or to the nearest even number as
            torchvision does

    Images are not rounded to 8 bits after each pass of resizing, as the libraries do: rounding has no derivative. It
    moves a pixel by one step of 8 bits or so. Values that bicubic interpolation takes out of [0, 1] are clamped, as
    they are there. Grey images are repeated.
    """

    size: tuple[int, int]
    resize: Literal["shortest", "squash"] = "shortest"
    edge: int = 224
    way: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    floors: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """[B, 1 or 3, h, w] in [0, 1] -> [B, 3, H, W], normalised."""
        if x.shape[1] == 1:
            x = x.expand(-1, 3, -1, -1)
        height, width = x.shape[2:]
        target = self.size
        if self.resize == "shortest":
            long = int(self.edge * max(height, width) / min(height, width))
            target = (self.edge, long) if height <= width else (long, self.edge)
        for between in dict.fromkeys(
            ((height, target[1]), target)
        ):  # rows first, and clamped in between, as Pillow does
            if between != tuple(x.shape[2:]):
                x = F.interpolate(x, between, mode=self.way, align_corners=False, antialias=True).clamp(0.0, 1.0)
        top, left = (self._start(have, want) for have, want in zip(target, self.size, strict=True))
        x = x[:, :, top : top + self.size[0], left : left + self.size[1]]
        mean, std = (x.new_tensor(each).view(1, 3, 1, 1) for each in (self.mean, self.std))
        return (x - mean) / std

    def _start(self, have: int, want: int) -> int:
        return (have - want) // 2 if self.floors else round((have - want) / 2)


class Towers(ImageText):
    """A two-tower model of another library, its preparation of images, and the vectors of the captions.

    tower:     the library's model
    prepare:   images to what the tower takes
    read:      the library's tokenizer: captions to what the text tower takes
    classes, width: of the captions' vectors, which are zero until captions are known
    names, templates: captions of the caller's own; empty: those of the task
    """

    tower: Any
    vectors: Tensor
    digest: Tensor

    def __init__(
        self,
        tower: nn.Module,
        prepare: Callable[[Tensor], Tensor],
        read: Callable[[list[str]], Any],
        classes: int,
        width: int,
        names: tuple[str, ...] = (),
        templates: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.tower = tower
        self.prepare = prepare
        self.read = read
        self.names = names
        self.templates = templates
        self.captions_known = False
        self.register_buffer("vectors", torch.zeros(classes, width))
        self.register_buffer("digest", torch.zeros(32, dtype=torch.uint8))

    @abstractmethod
    def image(self, x: Tensor) -> Tensor:
        """Embeddings [B, d] of prepared images, as the tower gives them."""

    @abstractmethod
    def text(self, tokens: Any) -> Tensor:
        """Embeddings [N, d] of what the tokenizer made of N captions."""

    @override
    def encode(self, x: Tensor) -> Tensor:
        return self.image(self.prepare(x))

    @override
    def texts(self) -> Tensor:
        if not self.captions_known:
            raise BadModel("this model has no captions yet, and so no classes: give it some by with_captions")
        return self.vectors

    @override
    def scale(self) -> Tensor:
        scale: Tensor = self.tower.logit_scale.exp()
        return scale

    @override
    def wording(self, captions: Captions | None, names: tuple[str, ...]) -> Captions:
        if self.names or self.templates:
            return captions_of(self.names or names, self.templates or TEMPLATES)
        return super().wording(captions, names)

    @override
    def captioned(self, captions: Captions) -> Towers | None:
        digest = digest_of(captions).to(self.digest.device)
        if torch.equal(digest, self.digest):
            return None
        given = [text for texts in captions for text in texts]
        with torch.no_grad():
            found = [self.text(self.read(given[i : i + _AT_ONCE])) for i in range(0, len(given), _AT_ONCE)]
        classes, width = self.vectors.shape
        made = type(self)(self.tower, self.prepare, self.read, classes, width, self.names, self.templates)
        made.to(self.vectors.device)
        made.vectors.copy_(unit_means(torch.cat(found), len(captions[0])))
        made.digest.copy_(digest)
        made.captions_known = True
        return made


class _OpenCLIP(Towers):
    pooled: ClassVar[str] = "tower.visual"

    @override
    def image(self, x: Tensor) -> Tensor:
        made: Tensor = self.tower.encode_image(x, normalize=False)
        return made

    @override
    def text(self, tokens: Any) -> Tensor:
        made: Tensor = self.tower.encode_text(tokens.to(self.vectors.device))
        return made


class _Transformers(Towers):
    pooled: ClassVar[str] = "tower.visual_projection"

    @override
    def image(self, x: Tensor) -> Tensor:
        return _pooled(self.tower.get_image_features(pixel_values=x))

    @override
    def text(self, tokens: Any) -> Tensor:
        return _pooled(self.tower.get_text_features(**tokens.to(self.vectors.device)))


def _pooled(answer: Any) -> Tensor:
    """The embedding in what the library returns: from version 5 on an object, a tensor before."""
    found: Tensor = answer if isinstance(answer, Tensor) else answer.pooler_output
    return found


@dataclass(frozen=True)
class _Reader:
    """The tokenizer of a transformers folder, cut to the text tower's length."""

    tokenizer: Any
    longest: int

    def __call__(self, texts: list[str]) -> Any:
        return self.tokenizer(texts, padding=True, truncation=True, max_length=self.longest, return_tensors="pt")


def _library(name: str, prefix: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtra(
            f"{prefix} needs the package {name}, which does not import ({first_line(error)}): pip install 'advkit[vlm]'"
        ) from error


def _settings(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file of a model's folder; CheckpointError where there is none."""
    try:
        return read_object((folder / name).read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{folder} holds no {name} ({error.strerror or error}); expected the folder of a whole model"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{folder / name} is no JSON object ({first_line(error)})") from error


_TOKENIZER = ("additional_special_tokens", "clean", "language", "reduction_mask", "strip_sep_token")
"""Settings of a tokenizer that an open_clip folder may have: none loads code or names a file."""


def _no_code(folder: Path) -> None:
    """CheckpointError where a file of the library transformers names code that is to be run."""
    for name in ("config.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            continue
        try:
            held = json.loads((folder / name).read_bytes())  # the library writes numbers there beyond 64 bits
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{folder / name} can't be read ({first_line(error)}); expected JSON") from error
        if isinstance(held, dict) and "auto_map" in held:
            raise CheckpointError(
                f"{folder / name} has auto_map, which names code to be run; code of a folder is never run: expected a "
                "model that the library itself knows"
            )


def _nothing_fetched(held: Any, file: Path) -> None:
    """CheckpointError where the settings of an open_clip model have code run, or a part fetched from a hub."""
    if isinstance(held, list):
        for each in held:
            _nothing_fetched(each, file)
    if not isinstance(held, dict):
        return
    for name, value in held.items():
        why = ""
        if name in ("trust_remote_code", "auto_map"):
            why = "which asks for code to be run; code of a folder is never run"
        elif name == "hf_model_name" and value:
            why = "a text tower that is fetched from a hub; expected one whose settings stand in the folder"
        elif name == "timm_model_name" and value and (not isinstance(value, str) or set(value) & set(":/\\")):
            why = "an image tower from a hub or another folder; expected the plain name of one that timm has"
        elif name == "tokenizer_kwargs" and value:
            others = sorted(set(value) - {*_TOKENIZER}) if isinstance(value, dict) else ["no names and values"]
            why = f"and in it {', '.join(others)[:80]}; {', '.join(_TOKENIZER)} are taken" if others else ""
        if why:
            raise CheckpointError(f"{file} has {name}, {why}")
        _nothing_fetched(value, file)


class _Folder:
    """What the two loaders share."""

    names: tuple[str, ...]
    templates: tuple[str, ...]

    def _checked(self, folder: str, prefix: str, shape: tuple[int, ...], classes: int) -> Path:
        try:
            place = place_of(folder)
        except ValueError as error:
            raise UsageError(f"{prefix[:80]}: {error}; expected the folder of a model") from error
        if not folder or not place.is_dir():
            raise UsageError(f"{prefix} names {folder or 'no folder'}, which is none; expected the folder of a model")
        channels = image_shape(shape, prefix)[0]
        if channels not in (1, 3):
            raise BadModel(f"{prefix} takes images of one or three channels, this task's have {channels}")
        if self.names and len(self.names) != classes:
            raise BadModel(f"{prefix} has {len(self.names)} names, the task has {classes} classes; name each")
        captions_of((), self.templates or TEMPLATES)
        return place

    def _model(self, network: Towers, space: Any, shape: tuple[int, ...], classes: int, prefix: str) -> ImageTextModel:
        from advkit.models import MODELS

        return ImageTextModel(
            network.eval(),
            space=Box(0.0, 1.0, shape) if space is None else space,
            classes=classes,
            name=prefix,
            source="a folder of the user's",
            license="",
            architecture=MODELS.spec(self),
        )


@dataclass(frozen=True, kw_only=True)
class TransformersCLIP(_Folder):
    """CLIP model of the transformers library from a folder, as a zero-shot classifier of the task's classes.

    path:      folder that `save_pretrained` wrote: config.json, weights, tokenizer, and preprocessor_config.json, whose
               settings are kept to
    names:     of the classes, joined by +; by default the task's
    templates: captions with {} in place of a name, joined by +; by default the task's, else "a photo of a {}". A class
               is the mean of its captions' vectors of norm 1

    Logits are the model's scale times the cosine. Images are resized and normalised inside, with their gradient.

    Raises MissingExtra without the extra vlm, UsageError for what is no folder, CheckpointError where it holds no
    whole CLIP model, BadModel for tasks of other samples or another number of classes.
    """

    path: str
    names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()

    def __call__(self, shape: tuple[int, ...], classes: int, rng: Rng, *, space: Any = None) -> ImageTextModel:
        shape, prefix = tuple(shape), f"clip:path={self.path}"
        folder = self._checked(self.path, prefix, shape, classes)
        library = _library("transformers", prefix)
        kind = _settings(folder, "config.json").get("model_type")
        if kind != "clip":
            raise CheckpointError(f"{folder} holds a model of type {kind!r}; expected clip")
        _no_code(folder)
        prepare = _of_processor(_processor(folder), folder)
        try:
            tokenizer = library.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)

            def build() -> nn.Module:
                made, told = library.CLIPModel.from_pretrained(
                    folder,
                    local_files_only=True,
                    dtype=torch.float32,
                    output_loading_info=True,
                    attn_implementation="sdpa",  # a folder's own choice may name a kernel to be fetched
                )
                if lacks := sorted(told["missing_keys"]) or sorted(map(str, told["mismatched_keys"])):
                    raise CheckpointError(f"the weights in {folder} lack {', '.join(lacks[:3])}")
                tower: nn.Module = made
                return tower

            tower: Any = seeded(build, rng)
        except CheckpointError:
            raise
        except Exception as error:  # each reader of weights raises its own
            raise CheckpointError(f"{folder} can't be loaded as a CLIP model ({first_line(error)})") from error
        if prepare.size != (tower.config.vision_config.image_size,) * 2:
            raise CheckpointError(
                f"{folder} prepares images of {list(prepare.size)}, and its tower takes "
                f"{tower.config.vision_config.image_size}; mend preprocessor_config.json"
            )
        read = _Reader(tokenizer, tower.config.text_config.max_position_embeddings)
        width = tower.config.projection_dim
        network = _Transformers(tower, prepare, read, classes, width, self.names, self.templates)
        return self._model(network, space, shape, classes, prefix)


def _processor(folder: Path) -> Mapping[str, Any]:
    """The settings of the image processor, which stand in a file of their own, or in one with the tokenizer's."""
    if (folder / "preprocessor_config.json").is_file() or not (folder / "processor_config.json").is_file():
        return _settings(folder, "preprocessor_config.json")
    held = _settings(folder, "processor_config.json").get("image_processor")
    if not isinstance(held, dict):
        raise CheckpointError(f"{folder / 'processor_config.json'} has no image_processor; expected CLIP's")
    return held


def _of_processor(held: Mapping[str, Any], folder: Path) -> Preparation:
    """What the settings of an image processor say, CLIP's own where they say nothing."""
    wrong = [name for name in ("do_resize", "do_rescale", "do_normalize", "do_center_crop") if not held.get(name, True)]
    size, crop, way = held.get("size", 224), held.get("crop_size", 224), held.get("resample", 3)
    size = {"shortest_edge": size} if isinstance(size, int) else size
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    try:
        scaled = abs(255 * float(held.get("rescale_factor", 1 / 255)) - 1) < 1e-6
        cut = (int(crop["height"]), int(crop["width"]))
        squash = "height" in size
        target = (int(size["height"]), int(size["width"])) if squash else cut
        edge = 0 if squash else int(size["shortest_edge"])
        mean, std = (
            tuple(map(float, held.get(name, usual))) for name, usual in (("image_mean", MEAN), ("image_std", STD))
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: the image processor's settings are not CLIP's ({first_line(error)})"
        ) from error
    fits = target == cut if squash else edge >= max(cut)
    if wrong or way not in (2, 3) or not fits or not scaled or not len(mean) == len(std) == 3:
        what = f"{wrong[0]} off" if wrong else f"resample={way}, size={size}, crop_size={crop}"
        raise CheckpointError(f"{folder} prepares images with {what}, which is not read; expected CLIP's own steps")
    return Preparation(
        cut, "squash" if squash else "shortest", edge, "bicubic" if way == 3 else "bilinear", mean, std, floors=True
    )


@dataclass(frozen=True, kw_only=True)
class OpenCLIP(_Folder):
    """CLIP model of the open_clip library from a folder, as a zero-shot classifier of the task's classes.

    local_dir: folder with open_clip_config.json and the weights, as open_clip's own `local-dir:` takes it
    names:     of the classes, joined by +; by default the task's
    templates: captions with {} in place of a name, joined by +; by default the task's, else "a photo of a {}". A class
               is the mean of its captions' vectors of norm 1

    Logits are the model's scale times the cosine (a bias, which models trained with a sigmoid have, changes the order
    of no two classes and is left out). Images are resized and normalised inside, with their gradient.

    Raises MissingExtra without the extra vlm, UsageError for what is no folder, CheckpointError where it holds no
    whole model, or settings that have code run or parts fetched, BadModel for tasks of other samples or another number
    of classes.
    """

    local_dir: str
    names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()

    def __call__(self, shape: tuple[int, ...], classes: int, rng: Rng, *, space: Any = None) -> ImageTextModel:
        shape, prefix = tuple(shape), f"open_clip:local-dir={self.local_dir}"
        folder = self._checked(self.local_dir, prefix, shape, classes)
        library, where = _library("open_clip", prefix), f"local-dir:{folder}"
        held = _settings(folder, "open_clip_config.json")
        _nothing_fetched(held, folder / "open_clip_config.json")
        _no_code(folder)
        config = held.get("model_cfg")
        texts = config.get("text_cfg") if isinstance(config, dict) else None
        # the tokenizer of such a model lies in the folder, whatever its name
        local = isinstance(texts, dict) and texts.get("hf_tokenizer_name")
        settings = {"local_files_only": True, "trust_remote_code": False} if local else {}
        try:
            tower: Any = seeded(lambda: library.create_model(where, require_pretrained=True, weights_only=True), rng)
            read = library.get_tokenizer(where, **settings)
        except Exception as error:  # each reader of weights raises its own
            raise CheckpointError(f"{folder} can't be loaded by open_clip ({first_line(error)})") from error
        told = tower.visual.preprocess_cfg
        size = (told["size"],) * 2 if isinstance(told["size"], int) else tuple(told["size"])
        if told["resize_mode"] not in ("shortest", "squash") or len(set(size)) > 1:
            raise CheckpointError(
                f"{folder} prepares images with resize_mode={told['resize_mode']}, size={list(size)}, which is not "
                "read; expected shortest or squash, and squares"
            )
        way: Literal["bicubic", "bilinear"] = "bilinear" if told["interpolation"] == "bilinear" else "bicubic"
        prepare = Preparation(size, told["resize_mode"], size[0], way, tuple(told["mean"]), tuple(told["std"]))
        with torch.no_grad():
            width = tower.encode_text(read(["a"])).shape[1]
        network = _OpenCLIP(tower, prepare, read, classes, width, self.names, self.templates)
        return self._model(network, space, shape, classes, prefix)
