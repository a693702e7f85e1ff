"""Tokenizers with a chat template around the user's turn."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import cached_property
from typing import Protocol

from advkit.core.errors import BadInput, UsageError


class Tokenizer(Protocol):
    """Text to ids and back, and the template that a chat model wants around the user's words."""

    @property
    def vocabulary(self) -> int:
        """Number of ids; legal ids are 0 .. vocabulary - 1."""
        ...

    @property
    def before(self) -> tuple[int, ...]:
        """Template ids before the user's words; the beginning-of-sequence id, where there is one, is among them."""
        ...

    @property
    def after(self) -> tuple[int, ...]:
        """Template ids between the user's words and the reply."""
        ...

    @property
    def ends(self) -> frozenset[int]:
        """Ids that end a reply."""
        ...

    @property
    def special(self) -> frozenset[int]:
        """Ids that are no text: turn marks, padding, beginning and end."""
        ...

    @property
    def printable(self) -> frozenset[int]:
        """Ids whose own text is printable ASCII, special ones left out."""
        ...

    @property
    def digest(self) -> str:
        """sha256 of all that decides how a text is read."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text; no special id is added, those that the text spells out are read as such."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special ones spelt out."""
        ...

    def reread(self, user_ids: Sequence[int]) -> list[int] | None:
        """The user's ids as the model gets them when the whole chat is written down and read anew.

        None where the template does not survive, because its ids grow together with the user's.
        """
        ...

    def user_ids(self, text: str) -> list[int] | None:
        """The user's ids where the chat is read as one text; None where the template does not survive."""
        ...

    def reply_ids(self, text: str) -> list[int]:
        """Ids of a reply, read as one text with the chat before it."""
        ...

    @property
    def closing(self) -> str:
        """What ends the user's turn in the template where ordinary ids spell it; empty where special ids do."""
        ...


class Templated(ABC):
    """What tokenizers have in common once encode, decode and the template are known."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    ends: frozenset[int]
    special: frozenset[int]
    closing: str = ""

    @property
    @abstractmethod
    def vocabulary(self) -> int: ...

    @property
    @abstractmethod
    def digest(self) -> str: ...

    @abstractmethod
    def encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str: ...

    @property
    def templated(self) -> bool:
        """Whether the user's words stand in a chat template, and not by themselves."""
        return bool(self.before or self.after)

    @cached_property
    def printable(self) -> frozenset[int]:
        """Ids whose own text is printable ASCII, special ones left out."""
        texts = ((index, self.decode([index])) for index in range(self.vocabulary) if index not in self.special)
        return frozenset(index for index, text in texts if text and text.isascii() and text.isprintable())

    def reread(self, user_ids: Sequence[int]) -> list[int] | None:
        """See `Tokenizer.reread`."""
        head, tail = list(self.before), list(self.after)
        ids = self.encode(self.decode([*head, *user_ids, *tail]))
        end = len(ids) - len(tail)
        if end < len(head) or ids[: len(head)] != head or ids[end:] != tail:
            return None
        return ids[len(head) : end]

    def user_ids(self, text: str) -> list[int] | None:
        """See `Tokenizer.user_ids`."""
        return self.reread(self.encode(text))

    def reply_ids(self, text: str) -> list[int]:
        """See `Tokenizer.reply_ids`."""
        return self.encode(text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Templated) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocabulary={self.vocabulary}, digest={self.digest[:12]})"


def digest_of(parts: object) -> str:
    """sha256 of JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


class WordTokenizer(Templated):
    """One id per word, words parted by blanks.

    words:   the words, ids in this order
    special: those that are no text
    before:  template before the user's words, such as "<user>"
    after:   template after them, such as "<assistant>"
    ends:    words that end a reply

    A word that it does not know raises BadInput: a word-level model has no way to read it.
    """

    def __init__(
        self,
        words: Sequence[str],
        *,
        special: Sequence[str] = (),
        before: str = "",
        after: str = "",
        ends: Sequence[str] = (),
    ) -> None:
        self.words = tuple(words)
        self._ids = {word: index for index, word in enumerate(self.words)}
        odd = [word for word in self.words if not word or word.split() != [word]]
        if odd or len(self._ids) != len(self.words):
            raise UsageError(f"words must be distinct and hold no blanks; look at {odd or 'the repeated ones'}")
        self.special = frozenset(self._ids[word] for word in special)
        self.before, self.after = tuple(self.encode(before)), tuple(self.encode(after))
        self.ends = frozenset(self._ids[word] for word in ends)

    @property
    def vocabulary(self) -> int:
        return len(self.words)

    @cached_property
    def digest(self) -> str:
        """sha256 of words and template."""
        sets = [sorted(self.special), sorted(self.ends)]
        return digest_of(["words", self.words, self.before, self.after, *sets])

    def encode(self, text: str) -> list[int]:
        words = text.split()
        for word in words:
            if word not in self._ids:
                near = get_close_matches(word, self._ids, n=3, cutoff=0.5)
                said = f"; near are {', '.join(near)}" if near else ""
                raise BadInput(f"the word {word!r} is not among the {len(self.words)} words of this model{said}")
        return [self._ids[word] for word in words]

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(self.words[index] for index in ids)
