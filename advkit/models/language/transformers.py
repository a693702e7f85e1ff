"""`hf:PATH_OR_NAME`: causal language models of the transformers library, behind their own chat templates."""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from advkit.core.errors import BadModel, CheckpointError, MissingExtra
from advkit.models.language.decoder import Network
from advkit.models.language.model import LanguageModel
from advkit.models.language.passes import Running
from advkit.models.language.tokenizers import Templated

log = logging.getLogger("advkit")

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SENTINEL = "ADVKITUSERWORDS7391"


def needed(name: str, prefix: str) -> Any:
    """An optional package; MissingExtra where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtra(
            f"{prefix} needs the package {name}, which is not installed: pip install 'advkit[lm]'"
        ) from (error)


class ChatTokenizer(Templated):
    """A tokenizer of the transformers library with the chat template that it carries.

    inner:  the tokenizer
    system: a system message, where the template takes one; empty leaves the template its own default
    ends:   further ids that end a reply, beside the tokenizer's own
    begins: whether sequences start with the beginning-of-sequence id; None does what the tokenizer does

    A tokenizer without a template gives the model the user's words as they are. The beginning-of-sequence id comes
    exactly once, whoever adds it. Raises BadModel where the template does not carry the user's words once and whole.
    """

    def __init__(self, inner: Any, *, system: str = "", ends: Iterable[int] = (), begins: bool | None = None) -> None:
        self.inner = inner
        self._begins = begins
        marked = {index for index, token in inner.added_tokens_decoder.items() if token.special}
        self.special = frozenset(int(index) for index in marked | set(inner.all_special_ids))
        own = [] if inner.eos_token_id is None else [inner.eos_token_id]
        self.ends = frozenset(int(index) for index in (*own, *ends))
        before, after = self._template(system)
        self.before, self.after = self._begun(self.encode(before)), tuple(self.encode(after))

    def _template(self, system: str) -> tuple[str, str]:
        if not self.inner.chat_template:
            if system:
                raise BadModel("a system message was given, and this model has no chat template to put it in")
            return "", ""
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": SENTINEL})
        try:
            text = self.inner.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise what they like
            raise BadModel(f"the chat template does not take these messages: {error}") from error
        parts = str(text).split(SENTINEL)
        if len(parts) != 2:
            raise BadModel(f"the chat template writes the user's words {len(parts) - 1} times; expected once")
        return parts[0], parts[1]

    def _begun(self, ids: list[int]) -> tuple[int, ...]:
        """The template's first half with exactly one beginning-of-sequence id, where the tokenizer or it has one."""
        begin = self.inner.bos_token_id
        if begin is None:
            return tuple(ids)
        if ids[:2] == [begin, begin]:
            return tuple(ids[1:])
        adds = self._begins
        if adds is None:
            adds = list(self.inner("")["input_ids"])[:1] == [begin]
        return (begin, *ids) if adds and ids[:1] != [begin] else tuple(ids)

    @property
    def vocabulary(self) -> int:
        return len(self.inner)

    @cached_property
    def digest(self) -> str:
        """sha256 of the tokenizer's own file and the template."""
        backend = getattr(self.inner, "backend_tokenizer", None)
        text = json.dumps(sorted(self.inner.get_vocab().items())) if backend is None else str(backend.to_str())
        rest = [self.before, self.after, sorted(self.special), sorted(self.ends)]
        return hashlib.sha256(f"{text}|{json.dumps(rest)}".encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return [int(index) for index in self.inner.encode(text, add_special_tokens=False)] if text else []

    def decode(self, ids: Iterable[int]) -> str:
        plain = [int(index) for index in ids]
        return str(self.inner.decode(plain, skip_special_tokens=False, clean_up_tokenization_spaces=False))


class Held(NamedTuple):
    """A past: the library's cache and how many sequences it holds."""

    cache: Any
    rows: int


class TransformersNetwork(Network):
    """A causal language model of the transformers library as a network.

    The library writes into the caches that it is handed: every call here works on a copy.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """The library's module: it is what is called."""
        self.inner.compile(*args, **kwargs)

    @property
    def vocabulary(self) -> int:
        return int(self._config.vocab_size)

    @property
    def _config(self) -> Any:
        config: Any = self.inner.config
        return config.get_text_config(decoder=True)

    def table(self) -> Tensor:
        # through the layer itself: some scale what they look up
        return self.embed(torch.arange(self.vocabulary, device=next(self.inner.parameters()).device))

    def embed(self, ids: Tensor) -> Tensor:
        looked: Tensor = self.inner.get_input_embeddings()(ids)  # type: ignore[operator]
        return looked

    def extend(self, inputs: Tensor, past: Held | None, keep: int, *, consume: bool = False) -> tuple[Tensor, Held]:
        cache = None if past is None else self._cache(past, len(inputs), consume)
        out = self._call(inputs, cache, keep, use_cache=True)
        return out.logits[:, -keep:], Held(out.past_key_values, len(inputs))

    def run(self, inputs: Tensor, past: Held | None, keep: int) -> Tensor:
        cache = None if past is None else self._cache(past, len(inputs), False)
        logits: Tensor = self._call(inputs, cache, keep, use_cache=cache is not None).logits
        return logits[:, -keep:]

    def _call(self, inputs: Tensor, cache: Any, keep: int, use_cache: bool) -> Any:
        named = {"inputs_embeds" if inputs.is_floating_point() else "input_ids": inputs}
        return self.inner(**named, past_key_values=cache, use_cache=use_cache, logits_to_keep=keep, return_dict=True)

    @staticmethod
    def _cache(past: Held, rows: int, consume: bool) -> Any:
        if past.rows not in (1, rows):
            raise ValueError(f"a past of {past.rows} sequences can't be continued by {rows}")
        cache = past.cache if consume else copy.deepcopy(past.cache)
        if past.rows != rows:
            cache.batch_repeat_interleave(rows)
        return cache

    @cached_property
    def gathers(self) -> bool:
        """Whether all layers keep keys and values of every token, and nothing else."""
        caches = importlib.import_module("transformers.cache_utils")
        stateful = any(getattr(module, "_is_stateful", False) for module in self.inner.modules())
        layers = caches.DynamicCache(config=self.inner.config).layers
        return not stateful and all(type(layer) is caches.DynamicLayer for layer in layers)

    def _kept(self, caches: Sequence[Any], change: Callable[[list[Tensor]], Tensor]) -> Any:
        """A cache whose keys and values are made of those of others."""
        kind = importlib.import_module("transformers.cache_utils").DynamicCache
        made = kind(config=self.inner.config)
        for index, layers in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
            if layers[0].is_initialized:  # layers that use another one's keys hold none
                keys, values = ([getattr(layer, name) for layer in layers] for name in ("keys", "values"))
                made.update(change(keys), change(values), index)
        return made

    def gathered(self, pasts: Sequence[Held], length: int) -> Held:
        cache = self._kept(
            [past.cache for past in pasts], lambda each: torch.cat([value[:, :, :length] for value in each])
        )
        return Held(cache, len(pasts))

    def select(self, past: Held, rows: Tensor) -> Held:
        if self.gathers:
            return Held(self._kept([past.cache], lambda each: each[0][rows]), len(rows))
        cache = copy.deepcopy(past.cache)
        cache.batch_select_indices(rows)
        return Held(cache, len(rows))

    def past_bytes(self, past: Held) -> int:
        held = [value for layer in past.cache.layers for value in vars(layer).values() if isinstance(value, Tensor)]
        return sum(value.numel() * value.element_size() for value in held)

    def row_bytes(self, new: int, past: int, keep: int) -> int:
        config, size = self._config, next(self.inner.parameters()).element_size()
        width, heads = int(config.hidden_size), int(config.num_attention_heads)
        head = int(getattr(config, "head_dim", None) or width // heads)
        kv = int(getattr(config, "num_key_value_heads", None) or heads) * head
        stream = new * (10 * width + 3 * int(getattr(config, "intermediate_size", None) or 4 * width))
        scores = 3 * heads * new * (past + new)
        # the library keeps no past that sequences share: each has a copy
        held = 4 * int(config.num_hidden_layers) * kv * (past + new)
        return size * (stream + scores + held) + 3 * max(4, size) * keep * self.vocabulary


def end_ids(model: Any) -> Sequence[int]:
    """Ids at which the model's own generation settings end a reply."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return [] if ends is None else [int(ends)] if isinstance(ends, int) else [int(each) for each in ends]


def from_transformers(model: nn.Module, tokenizer: Any, *, system: str = "", **settings: Any) -> LanguageModel:
    """A language model around a causal model and a tokenizer of the transformers library.

    The module is used as it is: in training mode it raises BadModel. settings: those of LanguageModel.
    """
    if model.training:
        raise BadModel("the model is in training mode: call eval() first")
    return LanguageModel(
        TransformersNetwork(model).eval(), ChatTokenizer(tokenizer, system=system, ends=end_ids(model)), **settings
    )


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Which stored model is read, and how.

    name:   where it is
    dtype:  of the weights; scores come from float32 log-probabilities in any case
    system: a system message; empty leaves the template its own default
    """

    name: str
    dtype: Dtype = "float32"
    system: str = ""


@dataclass(frozen=True, kw_only=True)
class HuggingFace(Running, Stored):
    """Hugging Face causal language model: a folder, or a name that the hub or the local cache knows.

    name:   folder or name, such as HuggingFaceTB/SmolLM2-135M-Instruct
    dtype:  of the weights; scores come from float32 log-probabilities in any case
    system: a system message; empty leaves the template its own default
    cache:  keep keys and values of prompts between calls
    memory: bytes that one call may take, about
    merge:  prompts share calls of the network; none does on an accelerator only

    No code from a repository is run. Raises MissingExtra, CheckpointError, BadModel.
    """

    def __call__(
        self, shape: tuple[int, ...] = (), classes: int = 2, rng: Any = None, *, space: Any = None
    ) -> LanguageModel:
        library = needed("transformers", f"hf:{self.name}")
        local = Path(self.name).exists()
        try:
            tokenizer = library.AutoTokenizer.from_pretrained(self.name, local_files_only=local)
            model = library.AutoModelForCausalLM.from_pretrained(
                self.name, dtype=DTYPES[self.dtype], local_files_only=local
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"hf:{self.name} can't be loaded: {error}; name a folder with config, weights and tokenizer, or a "
                "model that the hub knows (offline: one that is in its local cache)"
            ) from error
        return from_transformers(
            model.eval().requires_grad_(False),
            tokenizer,
            system=self.system,
            name=f"hf:{self.name}",
            source="transformers",
            architecture=f"hf:{type(model).__name__},dtype={self.dtype}",
            **self.running,
        )
