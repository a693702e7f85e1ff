"""The filter inside CLIP models of open_clip and transformers, and before a LLaVA projector; random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from advkit.core.errors import UsageError
from advkit.core.protocols import Data
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.defenses.representations.eigenshield import EigenShield
from advkit.models import MODELS
from advkit.models.projected import changed, collected, default_place
from advkit.models.spectral import Place, SpectralFilter, as_vectors
from advkit.testing.victims import uniform

transformers = pytest.importorskip("transformers", reason="needs the extra vlm")
RNG = RowRng.from_ids(0, ["training"]).at("train")
NAMES = ("cat", "dog", "ship")
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny CLIP of transformers with a tokenizer of letters."""
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
    size = {"shortest_edge": 32}
    transformers.CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return MODELS.build(f"clip:path={folder}")((3, 44, 56), 3, RNG).with_captions(None, NAMES)


def filtered(model: Any, **settings: Any) -> Any:
    """The model with a filter that was fitted to 60 drawn images."""
    shape = model.space.shape
    rows = Data(uniform(2, 60, *shape), torch.arange(60) % 3, Box(shape=shape), 3, name="drawn")
    guard = EigenShield(**{"q": 1.0, "edge": "topk", "top": 5, "calibration_attack": "none", **settings})
    return guard.protect(model, rows, RNG)


def check_projected(model: Any, x: Tensor) -> None:
    """The vector that the library gives is projected before it has norm 1, and all of it is differentiated."""
    guarded, network = filtered(model), model.network
    z = guarded.fitted.projection(network.encode(x))
    assert torch.allclose(guarded(x), network.logits(nn.functional.normalize(z, dim=1)), atol=1e-5)
    assert not torch.allclose(guarded(x), model(x), atol=1e-3)
    for one in (guarded, guarded.attacker_view()):
        leaf = x.clone().requires_grad_()
        assert (torch.autograd.grad(one(leaf).square().sum(), leaf)[0].flatten(1).abs().max(1).values > 0).all()


def test_clip_of_transformers(clip: Any) -> None:
    assert default_place(clip) == Place("tower.visual_projection")
    x = uniform(3, 3, 3, 44, 56)
    with collected(clip.module, default_place(clip)) as found:
        clip(x)
    features = clip.network.tower.get_image_features(pixel_values=clip.network.prepare(x))
    assert torch.allclose(found[0], features.pooler_output, atol=1e-6)
    check_projected(clip, x)


def test_tokens_of_a_layer_inside_clip(clip: Any) -> None:
    guarded, x = (
        filtered(clip, module="tower.vision_model.encoder.layers.0", tokens_per_image=3),
        uniform(3, 3, 3, 44, 56),
    )
    assert guarded.fitted.spectrum.n == 60 * 3 - 1
    assert guarded(x).shape == (3, 3)
    assert not torch.allclose(guarded(x), clip(x), atol=1e-3)
    with pytest.raises(UsageError, match=r"did you mean 'tower.visual_projection'"):
        filtered(clip, module="visual_projektion")


def test_open_clip(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip", reason="needs the extra vlm")
    import safetensors.torch

    vision = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    told = {"model_cfg": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {"size": 32}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(told))
    torch.manual_seed(0)
    net = open_clip.create_model(f"local-dir:{tmp_path}")
    safetensors.torch.save_file(net.state_dict(), str(tmp_path / "open_clip_model.safetensors"))
    model = MODELS.build(f"open_clip:local-dir={tmp_path}")((3, 44, 56), 3, RNG).with_captions(None, NAMES)
    assert default_place(model) == Place("tower.visual")
    check_projected(model, uniform(3, 3, 3, 44, 56))


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
    net = transformers.LlavaForConditionalGeneration(config).eval()
    place, output = Place("model.multi_modal_projector", before=True), Place("model.multi_modal_projector")
    ids = torch.tensor([[1, 2, *[63] * 16, 3]])

    def answer(pixels: Tensor) -> Tensor:
        logits: Tensor = net(input_ids=ids.expand(len(pixels), -1), pixel_values=pixels).logits
        return logits

    pixels = uniform(4, 40, 3, 32, 32)
    with torch.no_grad(), collected(net, place) as found:
        plain = answer(pixels)
    tokens = found[0]
    assert tokens.shape == (40, 16, 32)  # 16 patches: the class token is dropped before
    vectors, drawn = as_vectors(tokens, 8, torch.Generator().manual_seed(0))
    assert drawn.shape == (40, 8)
    fitted = SpectralFilter(q=1.0, edge="topk", top=6).fit(vectors)
    leaf = pixels[:2].clone().requires_grad_()
    with changed(net, place, fitted.projection), collected(net, output) as after:
        shielded = answer(leaf)
    assert torch.allclose(after[0], net.get_submodule(output.module)(fitted.projection(tokens[:2])), atol=1e-5)
    assert torch.autograd.grad(shielded.square().sum(), leaf)[0].abs().max() > 0
    assert not torch.allclose(shielded, plain[:2], atol=1e-4)
    with (
        pytest.raises(UsageError, match=r"did you mean 'model.multi_modal_projector'"),
        changed(net, Place("multi_modal_projector"), fitted.projection),
    ):
        pass
