"""CLIP folders of open_clip and transformers: the libraries' own classifiers and preparation, on tiny random models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import advkit
from advkit.core.captions import captions_of
from advkit.core.errors import AdvkitError, BadModel, CheckpointError, UsageError
from advkit.core.rng import RowRng
from advkit.evaluation.victims import ready
from advkit.models import MODELS
from advkit.models.clip import Preparation
from advkit.models.image_text import ImageTextModel
from advkit.tasks.arrays import Arrays

NAMES = ("bag", "boot", "coat")
TEMPLATES = ("a photo of a {}", "a drawing of a {}")
SPEC = f"names={'+'.join(NAMES)},templates={'+'.join(TEMPLATES)}"
PICTURE = Image.fromarray(np.random.default_rng(0).integers(256, size=(37, 24, 3), dtype=np.uint8))
SMOOTH = PICTURE.resize((48, 60), Image.Resampling.BICUBIC)


def batch(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(picture).astype(np.float32) / 255).permute(2, 0, 1).unsqueeze(0)


def rows(picture: Image.Image, n: int = 6) -> Arrays:
    """A task of shifted copies of a picture with three classes."""
    x = torch.cat([batch(picture).roll(i, 3) for i in range(n)])
    return Arrays(x, torch.arange(n) % 3)


@pytest.fixture(scope="module")
def open_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = pytest.importorskip("open_clip", reason="needs the extra vlm")
    folder = tmp_path_factory.mktemp("open_clip")
    vision = {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1}
    config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}
    prepared = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25], "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": prepared}))
    torch.manual_seed(0)
    state = library.model.CLIP(**config).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = pytest.importorskip("transformers", reason="needs the extra vlm")
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra vlm")
    folder = tmp_path_factory.mktemp("clip")
    words = ["<pad>", "<start>", "<end>", "<unk>", "a", "photo", "drawing", "of", *NAMES]
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    library.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<start>", eos_token="<end>", unk_token="<unk>"
    ).save_pretrained(folder)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    config = library.CLIPConfig(
        text_config={"vocab_size": len(words), "max_position_embeddings": 12, **small, **ends},
        vision_config={"image_size": 16, "patch_size": 8, **small},
        projection_dim=8,
    )
    torch.manual_seed(0)
    library.CLIPModel(config).eval().save_pretrained(folder)
    library.CLIPImageProcessor(size={"shortest_edge": 18}, crop_size={"height": 16, "width": 16}).save_pretrained(
        folder
    )
    return folder


def loaded(spec: str, task: Any) -> ImageTextModel:
    model = ready(spec, task)
    assert isinstance(model, ImageTextModel)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("picture", [PICTURE, SMOOTH, SMOOTH.rotate(90, expand=True)])
def test_open_clips_own_classifier(open_folder: Path, picture: Image.Image) -> None:
    library = pytest.importorskip("open_clip", reason="needs the extra vlm")
    tower, _, prepare = library.create_model_and_transforms(f"local-dir:{open_folder}")
    tower.eval()
    tokenizer = library.get_tokenizer(f"local-dir:{open_folder}")
    weights = library.build_zero_shot_classifier(tower, tokenizer, NAMES, TEMPLATES)
    model = loaded(f"open_clip:local-dir={open_folder},{SPEC}", rows(picture))
    x = batch(picture)
    torch.testing.assert_close(model.texts(), weights.t().detach(), atol=1e-5, rtol=0)
    seen, expected = model.network.prepare(x), prepare(picture).unsqueeze(0)
    # one step of 8 bits per pass of resizing, over the smallest std; see Preparation on rounding
    assert (seen - expected).abs().max() <= 1.01 / 255 / 0.2
    with torch.no_grad():
        embedding = tower.encode_image(seen, normalize=True)
        torch.testing.assert_close(model.embed(x), embedding, atol=1e-5, rtol=0)
        torch.testing.assert_close(model(x), tower.logit_scale.exp() * embedding @ weights, atol=1e-4, rtol=0)
        whole = tower.logit_scale.exp() * tower.encode_image(expected, normalize=True) @ weights
    assert (model(x) - whole).abs().max() < 0.1  # what 8-bit rounding comes to in logits of scale 14


@pytest.mark.slow
@pytest.mark.parametrize("picture", [PICTURE, SMOOTH, SMOOTH.rotate(90, expand=True)])
def test_transformers_own_classifier(folder: Path, picture: Image.Image) -> None:
    library = pytest.importorskip("transformers", reason="needs the extra vlm")
    tower, processor = (
        library.CLIPModel.from_pretrained(folder).eval(),
        library.CLIPImageProcessor.from_pretrained(folder),
    )
    tokenizer = library.AutoTokenizer.from_pretrained(folder)
    model = loaded(f"clip:path={folder},{SPEC}", rows(picture))
    x = batch(picture)
    seen = model.network.prepare(x)
    expected = processor(images=picture, return_tensors="pt")["pixel_values"]
    assert (seen - expected).abs().max() <= 1.01 / 255 / min(processor.image_std)
    for row, name in enumerate(NAMES):
        given = tokenizer([each.format(name) for each in TEMPLATES], padding=True, return_tensors="pt")
        with torch.no_grad():
            vectors = tower.get_text_features(**given).pooler_output
        mean = (vectors / vectors.norm(dim=1, keepdim=True)).mean(0)
        torch.testing.assert_close(model.texts()[row], mean / mean.norm(), atol=1e-5, rtol=0)
    single = loaded(f"clip:path={folder},names={'+'.join(NAMES)}", rows(picture))
    given = tokenizer([f"a photo of a {name}" for name in NAMES], padding=True, return_tensors="pt")
    with torch.no_grad():
        answer = tower(**given, pixel_values=seen)
        torch.testing.assert_close(single(x), answer.logits_per_image, atol=1e-4, rtol=0)
        torch.testing.assert_close(single.embed(x), answer.image_embeds, atol=1e-5, rtol=0)


def test_bilinear_squashed_and_grey() -> None:
    x = batch(SMOOTH)
    made = Preparation((16, 16), resize="squash", way="bilinear", mean=(0.0,) * 3, std=(1.0,) * 3)(x)
    expected = batch(SMOOTH.resize((16, 16), Image.Resampling.BILINEAR))
    assert (made - expected).abs().max() <= 1.01 / 255
    prepare = Preparation((16, 16), edge=16)
    torch.testing.assert_close(prepare(x[:, :1]), prepare(x[:, :1].repeat(1, 3, 1, 1)))
    untouched = replace(prepare, mean=(0.0,) * 3, std=(1.0,) * 3)(x[:, :, :16, :16])
    assert torch.equal(untouched, x[:, :, :16, :16])


@pytest.mark.slow
def test_preparation_is_differentiable() -> None:
    torch.manual_seed(0)
    x = (0.3 + 0.4 * torch.rand(1, 3, 7, 9, dtype=torch.float64)).requires_grad_()  # no value is clamped
    assert torch.autograd.gradcheck(Preparation((6, 6), edge=6), x)
    assert torch.autograd.gradcheck(Preparation((12, 12), edge=13), x)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["open_clip:local-dir", "clip:path"])
def test_an_evaluation(kind: str, open_folder: Path, folder: Path, tmp_path: Path) -> None:
    """With the task's own names, under PGD, and toward a vector."""
    spec = f"{kind}={open_folder if kind.startswith('open') else folder}"
    task = rows(SMOOTH)
    model = loaded(spec, task)
    with torch.no_grad():
        np.save(tmp_path / "target.npy", model.embed(1 - task.rows.x[:1]).numpy())
        labels = model(task.rows.x).argmax(1)
    task = Arrays(task.rows.x, labels)
    if int(labels.max()) < 2:  # the task has the classes that occur
        task = Arrays(task.rows.x, labels.clone().index_fill_(0, torch.tensor([0]), 2))
    report = advkit.evaluate("pgd:steps=5", task=task, model=spec, threat_model="linf:eps=0.2", n=6, device="cpu")
    assert report.clean_accuracy >= 5 / 6
    goal = f"near:file={tmp_path / 'target.npy'},similarity=0.999"
    near = advkit.evaluate(
        "pgd:steps=5", task=task, model=spec, goal=goal, threat_model="linf:eps=0.2", n=6, device="cpu"
    )
    assert near.clean_accuracy == report.clean_accuracy
    assert near.metrics["similarity_after"]["value"] > near.metrics["similarity_before"]["value"]


@pytest.mark.slow
def test_a_model_that_is_handed_over_keeps_its_captions(folder: Path) -> None:
    task = rows(SMOOTH)
    blank = MODELS.build(f"clip:{folder}")((3, 60, 48), 3, RowRng.from_ids(0, ["a"]), space=task.space)
    with pytest.raises(BadModel, match="no captions yet"):
        blank(task.rows.x)
    model = blank.with_captions(captions_of(NAMES, TEMPLATES[1:]), NAMES)
    report = advkit.evaluate("fgsm", task=task, model=model, threat_model="linf:eps=0", n=6, device="cpu")
    assert report.to_dict()["model"]["state_sha256"] == model.state_sha256()
    assert model.state_sha256() != blank.with_captions(None, NAMES).state_sha256()


@pytest.mark.slow
def test_what_does_not_fit(open_folder: Path, folder: Path, tmp_path: Path) -> None:
    task = rows(SMOOTH)
    config = json.loads((folder / "config.json").read_text())
    for spec, error, said in (
        (f"clip:path={tmp_path / 'nowhere'}", UsageError, "expected the folder of a model"),
        (f"clip:path={tmp_path}", CheckpointError, "holds no config.json"),
        (f"open_clip:local-dir={tmp_path}", CheckpointError, "holds no open_clip_config.json"),
        (f"clip:path={folder},names=bag+boot", BadModel, "2 names, the task has 3 classes"),
        (f"open_clip:local-dir={open_folder},templates=a photo", UsageError, "places"),
    ):
        with pytest.raises(error, match=said) as caught:
            ready(spec, task)
        assert "\n" not in str(caught.value)
    with pytest.raises(BadModel, match="one or three channels"):
        ready(f"clip:path={folder}", Arrays(torch.rand(3, 2, 9, 9), torch.arange(3)))
    for changed, said in (
        ({"config.json": {**config, "model_type": "siglip"}}, "of type 'siglip'"),
        ({"preprocessor_config.json": {"do_center_crop": False}}, "do_center_crop off"),
        ({"preprocessor_config.json": {"crop_size": 12, "size": 12}}, "its tower takes 16"),
        ({"preprocessor_config.json": {"crop_size": 16, "size": 12}}, "which is not read"),
        ({"preprocessor_config.json": {"crop_size": 16, "size": 16, "rescale_factor": 1}}, "which is not read"),
        ({"preprocessor_config.json": {"crop_size": {"edge": 3}}}, "not CLIP's"),
        ({"model.safetensors": {}}, "can't be loaded"),
    ):
        copy = tmp_path / str(abs(hash(said)))
        copy.mkdir(exist_ok=True)
        for file in folder.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        for name, content in changed.items():
            (copy / name).write_text(json.dumps(content))
        with pytest.raises(AdvkitError, match=said) as caught:
            ready(f"clip:path={copy},{SPEC}", task)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_processors_settings_may_stand_with_the_tokenizers(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    held = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="holds no preprocessor_config"):
        ready(f"clip:path={tmp_path},{SPEC}", rows(SMOOTH))
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": held}))
    one, other = (loaded(f"clip:path={place},{SPEC}", rows(SMOOTH)) for place in (folder, tmp_path))
    assert torch.equal(one(batch(SMOOTH)), other(batch(SMOOTH)))


SMALL = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}
MARK = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"


@pytest.mark.parametrize(
    ("texts", "images", "said"),
    [
        ({"hf_tokenizer_name": "a", "tokenizer_kwargs": {"trust_remote_code": True}}, {}, "tokenizer_kwargs"),
        ({"hf_tokenizer_name": "a", "tokenizer_kwargs": {"subfolder": "a"}}, {}, "subfolder"),
        ({"tokenizer_kwargs": ["a"]}, {}, "tokenizer_kwargs"),
        ({"trust_remote_code": True}, {}, "never run"),
        ({"hf_tokenizer_name": "a"}, {}, "auto_map"),
        ({"hf_model_name": "a/b"}, {}, "fetched from a hub"),
        ({}, {"timm_model_name": "hf-hub:a/b"}, "timm_model_name"),
        ({}, {"timm_model_name": "local-dir:b"}, "timm_model_name"),
    ],
)
def test_a_folder_of_open_clip_runs_nothing_and_fetches_nothing(
    texts: dict[str, Any], images: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = pytest.importorskip("open_clip", reason="needs the extra vlm")
    monkeypatch.setattr(library, "create_model", None)  # refused before the library is asked
    monkeypatch.setattr(library, "get_tokenizer", None)
    config = {**SMALL, "text_cfg": {**SMALL["text_cfg"], **texts}, "vision_cfg": {**SMALL["vision_cfg"], **images}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["own.Tok", null]}}')
    (tmp_path / "own.py").write_text(MARK)
    with pytest.raises(CheckpointError, match=said) as caught:
        ready(f"open_clip:local-dir={tmp_path},{SPEC}", rows(SMOOTH))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_a_folder_of_transformers_runs_nothing(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the extra vlm")
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["own.Tok", null]}}')
    (tmp_path / "own.py").write_text(MARK)
    with pytest.raises(CheckpointError, match="auto_map"):
        ready(f"clip:path={tmp_path},{SPEC}", rows(SMOOTH))
    assert not (tmp_path / "ran").exists()


def test_names_that_are_no_path() -> None:
    for name in ("~nobody-of-this-name/a", "a" * 5000):
        with pytest.raises(UsageError, match="is no path") as caught:
            ready(f"clip:path={name}", rows(SMOOTH))
        assert "\n" not in str(caught.value)
