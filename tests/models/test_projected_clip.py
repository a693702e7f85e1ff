"""open_clip, CLIP and LLaVA with random weights: answers and images as of the packages, and the filter inside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from advkit.core.captions import captions_of
from advkit.core.errors import BadModel, UsageError
from advkit.core.protocols import Data
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.defenses.representations.eigenshield import EigenShield
from advkit.models import MODELS
from advkit.models.clip import Prepared
from advkit.models.projected import changed, collected, default_place
from advkit.models.spectral import Place, SpectralFilter, as_vectors
from advkit.testing.victims import uniform

transformers = pytest.importorskip("transformers", reason="needs the extra vlm")
RNG = RowRng.from_ids(0, ["training"]).at("train")
CAPTIONS = captions_of(("cat", "dog", "ship"), ("a photo of a {}", "a drawing of a {}"))
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
SIDE = 40


def picture() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A smooth colour image of 44x56 pixels between 20 and 235, where nothing overshoots."""
    y, x = np.mgrid[0:1:44j, 0:1:56j]
    waves = [np.sin(9 * x + 2 * y), np.cos(7 * y - 3 * x), np.sin(12 * x * y)]
    return np.asarray(np.round(127 + 100 * np.stack(waves, -1)), dtype=np.uint8)


def as_tensor(image: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP of transformers with its own tokenizer of letters."""
    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: at for at, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPTokenizer.from_pretrained(str(folder)).save_pretrained(folder)
    text = {"vocab_size": len(words), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 40, "eos_token_id": 1, "bos_token_id": 0}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**VISION, "num_hidden_layers": 2}, projection_dim=16
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(clip_folder: Path) -> Any:
    return MODELS.build(f"clip:{clip_folder}")((3, 44, 56), 3, RNG).with_captions(CAPTIONS)


def test_clip_answers_as_transformers_does(clip: Any, clip_folder: Path) -> None:
    image_module = pytest.importorskip("PIL.Image")
    net = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip_folder)
    processor = transformers.CLIPImageProcessor.from_pretrained(clip_folder)
    pixels = processor(image_module.fromarray(picture()), return_tensors="pt")["pixel_values"]
    assert float((clip.network.prepared(as_tensor(picture())) - pixels).abs().max()) < 1 / 255 / 0.26
    with torch.no_grad():
        tokens = tokenizer([text for texts in CAPTIONS for text in texts], padding=True, return_tensors="pt")
        answer = net(**tokens, pixel_values=pixels)
        vectors = answer.text_embeds.view(3, 2, -1).mean(1)
        expected = net.logit_scale.exp() * answer.image_embeds @ nn.functional.normalize(vectors, dim=1).T
        assert torch.allclose(clip(as_tensor(picture())), expected, atol=0.05)
        features = net.get_image_features(pixel_values=clip.network.prepared(as_tensor(picture())))
        assert torch.allclose(clip.network.encode(as_tensor(picture())), features.pooler_output, atol=1e-5)


def test_clip_has_a_gradient_and_takes_grey_images(clip: Any, clip_folder: Path) -> None:
    x = uniform(0, 2, 3, 44, 56).requires_grad_()
    (gradient,) = torch.autograd.grad(clip(x).square().sum(), x)
    assert (gradient.flatten(1).abs().max(1).values > 0).all()
    grey = MODELS.build(f"clip:{clip_folder}")((1, 28, 28), 3, RNG).with_captions(CAPTIONS)
    x = uniform(1, 2, 1, 28, 28)
    assert torch.allclose(grey(x), grey(x.expand(-1, 3, -1, -1)), atol=1e-6)
    assert grey.with_captions(CAPTIONS) is grey
    other = grey.with_captions(captions_of(("bird", "car", "tree")))
    assert not torch.allclose(other.texts(), grey.texts())
    assert torch.equal(grey.texts(), clip.texts())


def rows(n: int, model: Any) -> Data:
    return Data(uniform(2, n, *model.space.shape), torch.arange(n) % 3, Box(shape=model.space.shape), 3, name="drawn")


def filtered(model: Any, **settings: Any) -> Any:
    guard = EigenShield(**{"q": 1.0, "edge": "topk", "top": 5, "calibration_attack": "none", **settings})
    return guard.protect(model, rows(60, model), RNG)


def test_the_filter_projects_clip_s_vector_before_it_has_norm_one(clip: Any) -> None:
    assert default_place(clip) == Place("net.visual_projection")
    guarded, x = filtered(clip), uniform(3, 3, 3, 44, 56)
    z = guarded.fitted.projection(clip.network.encode(x))
    expected = clip.network.logits(nn.functional.normalize(z, dim=1))
    assert torch.allclose(guarded(x), expected, atol=1e-5)
    leaf = x.clone().requires_grad_()
    assert torch.autograd.grad(guarded(leaf).square().sum(), leaf)[0].abs().max() > 0
    tokens = filtered(clip, module="net.vision_model.encoder.layers.0", tokens_per_image=3)
    assert tokens.fitted.spectrum.n == 60 * 3 - 1
    assert tokens(x).shape == (3, 3)
    with pytest.raises(UsageError, match=r"did you mean 'net.visual_projection'"):
        filtered(clip, module="visual_projektion")


def test_what_is_no_clip_is_refused_in_a_line(clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="can't be loaded"):
        MODELS.build(f"clip:{tmp_path / 'nowhere'}")((3, 32, 32), 3, RNG)
    transformers.LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(BadModel, match="expected clip"):
        MODELS.build(f"clip:{tmp_path}")((3, 32, 32), 3, RNG)
    silent = MODELS.build(f"clip:{clip_folder}")((3, 32, 32), 3, RNG)
    with pytest.raises(BadModel, match="texts of its classes"):
        silent(torch.zeros(1, 3, 32, 32))


def test_images_may_be_resized_whatever_their_proportions() -> None:
    x = as_tensor(picture())
    squashed = Prepared((16, 20), None, (), ())(x)
    assert squashed.shape == (1, 3, 16, 20)
    assert torch.equal(Prepared(None, None, (0.5,), (2.0,))(x), (x - 0.5) / 2)
    with pytest.raises(BadModel, match="bicubic, bilinear"):
        Prepared(16, None, (), (), "nearest")


# --- open_clip


@pytest.mark.slow
def test_open_clip_answers_as_the_package_does(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip", reason="needs the extra vlm")
    image_module = pytest.importorskip("PIL.Image")
    import safetensors.torch

    vision = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    prepare = {"size": 32, "mean": [0.48, 0.45, 0.4], "std": [0.26, 0.27, 0.28], "resize_mode": "shortest"}
    model_cfg = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    told = {"model_cfg": model_cfg, "preprocess_cfg": {**prepare, "interpolation": "bicubic", "mode": "RGB"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(told))
    name = f"local-dir:{tmp_path}"
    # without weights the package answers a network of random ones and logs a warning
    with pytest.raises(UsageError, match="can't be loaded"):
        MODELS.build(f"open_clip:{name}")((3, 44, 56), 3, RNG)
    torch.manual_seed(0)
    safetensors.torch.save_file(
        open_clip.create_model(name).state_dict(), str(tmp_path / "open_clip_model.safetensors")
    )
    model = MODELS.build(f"open_clip:{name}")((3, 44, 56), 3, RNG).with_captions(CAPTIONS)
    net, _, transform = open_clip.create_model_and_transforms(name)
    pixels = transform(image_module.fromarray(picture()))[None]
    assert float((model.network.prepared(as_tensor(picture())) - pixels).abs().max()) < 1 / 255 / 0.26
    with torch.no_grad():
        tokens = open_clip.get_tokenizer(name)([text for texts in CAPTIONS for text in texts])
        texts = net.eval().encode_text(tokens, normalize=True).view(3, 2, -1).mean(1)
        z = net.encode_image(pixels, normalize=True)
        expected = net.logit_scale.exp() * z @ nn.functional.normalize(texts, dim=1).T
        assert torch.allclose(model(as_tensor(picture())), expected, atol=0.05)
    assert default_place(model) == Place("net.visual")
    guarded, x = filtered(model), uniform(3, 3, 3, 44, 56)
    z = guarded.fitted.projection(model.network.encode(x))
    assert torch.allclose(guarded(x), model.network.logits(nn.functional.normalize(z, dim=1)), atol=1e-5)
    leaf = x.clone().requires_grad_()
    assert torch.autograd.grad(guarded(leaf).square().sum(), leaf)[0].abs().max() > 0
    with pytest.raises(UsageError, match="pretrained=TAG, such as"):
        MODELS.build("open_clip:ViT-B-32")((3, 32, 32), 3, RNG)
    told["preprocess_cfg"] = {**prepare, "resize_mode": "longest"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(told))
    with pytest.raises(BadModel, match="'longest'; expected"):
        MODELS.build(f"open_clip:{name}")((3, 44, 56), 3, RNG)


# --- projectors of vision-language models


def test_the_input_of_a_llava_projector_is_filtered_without_its_class_token() -> None:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION, num_hidden_layers=3, projection_dim=16),
        text_config=transformers.LlamaConfig(
            hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
        ),
        image_token_index=63,
        image_seq_length=16,
    )
    torch.manual_seed(0)
    net, place = (
        transformers.LlavaForConditionalGeneration(config).eval(),
        Place("model.multi_modal_projector", before=True),
    )
    ids = torch.tensor([[1, 2, *[63] * 16, 3]])

    def answer(pixels: Tensor) -> Tensor:
        logits: Tensor = net(input_ids=ids.expand(len(pixels), -1), pixel_values=pixels).logits
        return logits

    pixels = uniform(4, 40, 3, 32, 32)
    with torch.no_grad(), collected(net, place) as found:
        answer(pixels)
    tokens = found[0]
    assert tokens.shape == (40, 16, 32)  # 16 patches: the class token is dropped before
    vectors, drawn = as_vectors(tokens, 8, torch.Generator().manual_seed(0))
    assert drawn.shape == (40, 8)
    fitted = SpectralFilter(q=1.0, edge="topk", top=6).fit(vectors)
    leaf = pixels[:2].clone().requires_grad_()
    with changed(net, place, fitted.projection), collected(net, Place("model.multi_modal_projector")) as after:
        filtered_answer = answer(leaf)
    projector = net.get_submodule("model.multi_modal_projector")
    assert torch.allclose(after[0], projector(fitted.projection(tokens[:2])), atol=1e-5)
    assert torch.autograd.grad(filtered_answer.square().sum(), leaf)[0].abs().max() > 0
    with torch.no_grad():
        assert not torch.allclose(filtered_answer, answer(pixels[:2]), atol=1e-5)
    with (
        pytest.raises(UsageError, match=r"did you mean 'model.multi_modal_projector'"),
        changed(net, Place("multi_modal_projector"), fitted.projection),
    ):
        pass
