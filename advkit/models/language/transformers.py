"""`hf:PATH_OR_NAME`: causal language models of the transformers library, behind their own chat templates."""

from __future__ import annotations

import copy
import hashlib
import importlib
import inspect
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import product, takewhile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from advkit.core.errors import AdvkitError, BadModel, CheckpointError, MissingExtra
from advkit.core.text import first_line
from advkit.models.language.decoder import Network
from advkit.models.language.model import LanguageModel
from advkit.models.language.passes import Running
from advkit.models.language.tokenizers import Templated

log = logging.getLogger("advkit")

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SENTINEL = "ADVKITUSERWORDS7391"
EDGES = (*(f"{sign}e{sign}" for sign in map(chr, range(33, 127))), SENTINEL, "Write a poem", "the sea.", "1 and 1")
"""Words of all kinds of edges: which of a chat's ids the words change."""
DATE = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
TODAY = datetime(2024, 7, 26)
"""The day of templates that ask for it; one of them has this day where nobody says one."""


def needed(name: str, prefix: str) -> Any:
    """An optional package; MissingExtra where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtra(
            f"{prefix} needs the package {name}, which is not installed: pip install 'advkit[lm]'"
        ) from (error)


@dataclass(frozen=True)
class Turn:
    """What a chat template writes around the user's words.

    before, after: its text
    trim:          what it does to the words' ends
    """

    before: str = ""
    after: str = ""
    trim: Callable[[str], str] = str


class ChatTokenizer(Templated):
    """A tokenizer of the transformers library with the chat template that it carries.

    inner:  the tokenizer
    system: a system message, where the template takes one; empty leaves the template its own default
    ends:   further ids that end a reply, beside the tokenizer's own
    begins: whether sequences start with the beginning-of-sequence id; None does what the tokenizer does

    Chats are tokenized whole: the template's ids are those that no words of the user change, and what grows together
    with the words belongs to them. Marks that the template uses are special, whatever the tokenizer calls them, and so
    are ids below the largest that stand for no token. Where a template writes today's date it is 26 July 2024, so that
    a run can be repeated.

    A tokenizer without a template gives the model the user's words as they are; it says so (`templated`) and warns. The
    beginning-of-sequence id comes exactly once, whoever adds it. Raises BadModel where the template does not carry the
    system message, or the user's words once and whole, blanks at their ends aside.
    """

    def __init__(self, inner: Any, *, system: str = "", ends: Iterable[int] = (), begins: bool | None = None) -> None:
        self.inner = inner
        self._begins = begins
        self._turn = self._template(system)
        marked = {index for index, token in inner.added_tokens_decoder.items() if token.special}
        self.special = frozenset(int(index) for index in marked | set(inner.all_special_ids) | self._marks())
        self.special |= frozenset(range(self.vocabulary)) - self._ids
        own = [] if inner.eos_token_id is None else [inner.eos_token_id]
        self.ends = frozenset(int(index) for index in (*own, *ends))
        self._head, self.after = self._ends_of_chat()
        self.before = self._begun(list(self._head))
        spelt = not self.special & set(self.encode(self._turn.after))
        self.closing = self._turn.after.strip() if spelt else ""

    def _template(self, system: str) -> Turn:
        if not self.inner.chat_template:
            if system:
                raise BadModel("a system message was given, and this model has no chat template to put it in")
            log.warning("the tokenizer has no chat template: the model gets the user's words with nothing around them")
            return Turn()
        messages = [{"role": "system", "content": system}] if system else []
        text = self._rendered([*messages, {"role": "user", "content": SENTINEL}])
        parts = text.split(SENTINEL)
        if len(parts) != 2:
            raise BadModel(f"the chat template writes the user's words {len(parts) - 1} times; expected once")
        if system.strip() and system.strip() not in text:
            raise BadModel("the chat template drops the system message: leave system out, or put it into the prompts")
        spaced, odd = f" \n{SENTINEL}\t ", f"{SENTINEL} <a> & 'b' \"c\" {{{{d}}}} \\n\n\n {SENTINEL}"
        for trim in (str, str.strip, str.lstrip, str.rstrip):
            if all(
                self._rendered([*messages, {"role": "user", "content": words}]) == parts[0] + trim(words) + parts[1]
                for words in (spaced, odd)
            ):
                return Turn(parts[0], parts[1], trim)
        raise BadModel("the chat template changes the user's words by more than blanks at their ends")

    def _rendered(self, messages: Sequence[Any]) -> str:
        try:
            text = self.inner.apply_chat_template(
                messages, chat_template=self._dated, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # templates raise what they like
            raise BadModel(f"the chat template does not take these messages: {error}") from error
        return str(text)

    @cached_property
    def _dated(self) -> str | None:
        """The template with its dates written out; None where it asks for none and stays as it is."""
        held = self.inner.chat_template
        source = self.inner.get_chat_template() if isinstance(held, dict) else str(held)
        if not DATE.search(source):
            return None
        pinned = DATE.sub(lambda call: repr(TODAY.strftime(call[2])), source)
        if "strftime_now(" in pinned:
            raise BadModel("the chat template writes today's date in a format that is not plain to see; expected text")
        return pinned

    def _marks(self) -> set[int]:
        """Ids that were added to the vocabulary, and that the template writes in a conversation."""
        if not self.inner.chat_template:
            return set()
        asked, told = {"role": "user", "content": SENTINEL}, {"role": "assistant", "content": SENTINEL}
        try:
            text = self._rendered([asked, told, asked])
        except BadModel:  # it takes one turn only
            text = self._rendered([asked])
        return set(self.encode(text)) & set(self.inner.added_tokens_decoder)

    def _ends_of_chat(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids that a chat begins and ends with, whatever the user's words are."""
        if self._turn == Turn():
            return (), ()
        chats = [self.encode(f"{self._turn.before}{words}{self._turn.after}") for words in EDGES]

        def shared(several: Sequence[Sequence[int]]) -> tuple[int, ...]:
            alike = takewhile(lambda ids: len(set(ids)) == 1, zip(*several, strict=False))
            return tuple(ids[0] for ids in alike)

        return shared(chats), shared([ids[::-1] for ids in chats])[::-1]

    @cached_property
    def _written(self) -> tuple[str, str]:
        """The template's text before and after the words, as `decode` writes it."""
        if self._turn == Turn():
            return "", ""
        text = self.decode(self.encode(f"{self._turn.before}{SENTINEL}{self._turn.after}"))
        before, _, after = text.partition(SENTINEL)
        return before, after

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
    @override
    def templated(self) -> bool:
        # without one a beginning-of-sequence id may stand before the words all the same
        return self._turn != Turn()

    @override
    def user_ids(self, text: str) -> list[int] | None:
        ids = self.encode(f"{self._turn.before}{self._turn.trim(text)}{self._turn.after}")
        end = len(ids) - len(self.after)
        if end < len(self._head) or tuple(ids[: len(self._head)]) != self._head or tuple(ids[end:]) != self.after:
            return None
        return ids[len(self._head) : end]

    @override
    def reread(self, user_ids: Sequence[int]) -> list[int] | None:
        text = self.decode([*self._head, *user_ids, *self.after])
        before, after = self._written
        # an attacker's tokens may stand where the template has a blank between itself and the words
        for start, end in product((before, before.rstrip()), (after, after.lstrip())):
            if len(text) >= len(start) + len(end) and text.startswith(start) and text.endswith(end):
                return self.user_ids(text[len(start) : len(text) - len(end)])
        return None

    @override
    def reply_ids(self, text: str) -> list[int]:
        if self._turn != Turn():
            chat = f"{self._turn.before}{SENTINEL}{self._turn.after}"
            asked, whole = self.encode(chat), self.encode(chat + text)
            if whole[: len(asked)] == asked:
                return whole[len(asked) :]
        return self.encode(text)

    @cached_property
    def _ids(self) -> frozenset[int]:
        """Those that stand for a token: their numbers may have gaps."""
        return frozenset(int(index) for index in self.inner.get_vocab().values())

    @property
    def vocabulary(self) -> int:
        return 1 + max(self._ids, default=-1)

    @cached_property
    def digest(self) -> str:
        """sha256 of the tokenizer's own file and the template."""
        backend = getattr(self.inner, "backend_tokenizer", None)
        text = json.dumps(sorted(self.inner.get_vocab().items())) if backend is None else str(backend.to_str())
        rest: list[Any] = [self.before, self.after, sorted(self.special), sorted(self.ends)]
        if self._turn.trim is not str:
            rest.append(self._turn.trim.__name__)
        return hashlib.sha256(f"{text}|{json.dumps(rest)}".encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return [int(index) for index in self.inner.encode(text, add_special_tokens=False)] if text else []

    def decode(self, ids: Iterable[int]) -> str:
        plain = [int(index) for index in ids]
        return str(self.inner.decode(plain, skip_special_tokens=False, clean_up_tokenization_spaces=False))


class Held(NamedTuple):
    """A past: the library's cache and how many sequences it holds. Without a cache, what was sent so far."""

    cache: Any
    rows: int


class TransformersNetwork(Network):
    """A causal language model of the transformers library as a network.

    The library writes into the caches that it is handed: every call here works on a copy. A model that keeps a state in
    place of keys and values (Mamba, RWKV, RecurrentGemma, Jamba) reads the whole sequence at every call.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self._takes = frozenset(inspect.signature(inner.forward).parameters)
        self._cache_name = "cache" if "cache" in self._takes else "past_key_values"

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

    @property
    @override
    def window(self) -> int | None:
        most = getattr(self._config, "max_position_embeddings", None)
        return int(most) if most else None

    @cached_property
    def remembers(self) -> bool:
        """Whether what was sent can be kept as keys and values."""
        stateful = any(getattr(module, "_is_stateful", False) for module in self.inner.modules())
        return not stateful and self._cache_name in self._takes

    def extend(self, inputs: Tensor, past: Held | None, keep: int, *, consume: bool = False) -> tuple[Tensor, Held]:
        if not self.remembers:
            whole = self._whole(inputs, past)
            return self._call(whole, None, keep, use_cache=False).logits[:, -keep:], Held(whole, len(whole))
        cache = None if past is None else self._cache(past, len(inputs), consume)
        out = self._call(inputs, cache, keep, use_cache=True)
        return out.logits[:, -keep:], Held(out[self._cache_name], len(inputs))

    def run(self, inputs: Tensor, past: Held | None, keep: int) -> Tensor:
        if not self.remembers:
            return self.extend(inputs, past, keep)[0]
        cache = None if past is None else self._cache(past, len(inputs), False)
        logits: Tensor = self._call(inputs, cache, keep, use_cache=cache is not None).logits
        return logits[:, -keep:]

    def _whole(self, inputs: Tensor, past: Held | None) -> Tensor:
        """What was sent so far, and what comes now: ids [N, n] or embeddings [N, n, D]."""
        if past is None:
            return inputs
        sent = past.cache
        if past.rows not in (1, len(inputs)):
            raise ValueError(f"a past of {past.rows} sequences can't be continued by {len(inputs)}")
        if inputs.is_floating_point() != sent.is_floating_point():
            sent, inputs = (each if each.is_floating_point() else self.embed(each) for each in (sent, inputs))
        return torch.cat((sent.expand(len(inputs), *sent.shape[1:]), inputs), 1)

    def _call(self, inputs: Tensor, cache: Any, keep: int, use_cache: bool) -> Any:
        named: dict[str, Any] = {"inputs_embeds" if inputs.is_floating_point() else "input_ids": inputs}
        if cache is not None:
            named[self._cache_name] = cache
        if "logits_to_keep" in self._takes:
            named["logits_to_keep"] = keep
        return self.inner(**named, use_cache=use_cache, return_dict=True)

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
        if not self.remembers:
            return False
        layers = caches.DynamicCache(config=self.inner.config).layers
        return all(type(layer) is caches.DynamicLayer for layer in layers)

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
        if not self.remembers:
            return Held(past.cache[rows], len(rows))
        cache = copy.deepcopy(past.cache)
        cache.batch_select_indices(rows)
        return Held(cache, len(rows))

    def past_bytes(self, past: Held) -> int:
        if not self.remembers:
            return int(past.cache.numel() * past.cache.element_size())
        held = [value for layer in past.cache.layers for value in vars(layer).values() if isinstance(value, Tensor)]
        return sum(value.numel() * value.element_size() for value in held)

    def row_bytes(self, new: int, past: int, keep: int) -> int:
        config, size = self._config, next(self.inner.parameters()).element_size()
        width, heads = int(config.hidden_size), int(getattr(config, "num_attention_heads", None) or 1)
        head = int(getattr(config, "head_dim", None) or width // heads)
        kv = int(getattr(config, "num_key_value_heads", None) or heads) * head
        hidden = getattr(config, "intermediate_size", None) or 4 * width
        stream = new * (10 * width + 3 * int(max(hidden) if isinstance(hidden, list | tuple) else hidden))
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


def _complete(told: Any, name: str) -> None:
    """CheckpointError where the library has filled weights with random numbers, since the files do not have them."""
    for what in ("missing_keys", "mismatched_keys"):
        keys = sorted(each if isinstance(each, str) else str(each[0]) for each in told.get(what, ()))
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise CheckpointError(
                f"{name}: the weights do not fit its config.json: {len(keys)} {what.replace('_', ' ')} "
                f"({', '.join(keys[:3])}{more}); fetch weights and configuration that belong together"
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


_TOKENIZERS = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece", "tekken", "tiktoken")
"""What the names of files begin with that hold a tokenizer, or name one."""


@contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """Without the library's bar of weights, which it draws on any standard error."""
    bars = library.utils.logging
    drawn = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            bars.enable_progress_bar()


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
        if Path(self.name).is_dir() and not any(
            each.name.startswith(_TOKENIZERS) for each in Path(self.name).iterdir()
        ):
            raise CheckpointError(
                f"hf:{self.name} has no tokenizer (tokenizer.json): save it there, too, with "
                "tokenizer.save_pretrained(FOLDER)"
            )
        try:
            tokenizer = library.AutoTokenizer.from_pretrained(self.name, local_files_only=local)
            with _quiet(library) if local else nullcontext():
                model, told = library.AutoModelForCausalLM.from_pretrained(
                    self.name, dtype=DTYPES[self.dtype], local_files_only=local, output_loading_info=True
                )
        except ImportError as error:  # quantised weights want a package of their own
            raise MissingExtra(f"hf:{self.name} needs a package that is not installed: {error}") from error
        except Exception as error:  # each reader of weights raises its own
            reason = str(error).strip() or type(error).__name__
            raise CheckpointError(
                f"hf:{self.name} can't be loaded: {reason}; name a folder with config, weights and tokenizer, or a "
                "model that the hub knows (offline: one that is in its local cache)"
            ) from error
        _complete(told, f"hf:{self.name}")
        try:
            return from_transformers(
                model.eval().requires_grad_(False),
                tokenizer,
                system=self.system,
                name=f"hf:{self.name}",
                source="transformers",
                architecture=f"hf:{type(model).__name__},dtype={self.dtype}",
                **self.running,
            )
        except AdvkitError:
            raise
        except Exception as error:  # settings of a tokenizer or a template that are not what the library takes
            raise CheckpointError(f"hf:{self.name} can't be used: {first_line(error)}; fetch it again") from error
