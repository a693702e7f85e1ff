"""Tokens added to a prompt: an attacker who writes a suffix, a prefix, or something in between (arXiv 2402.15570,
2307.15043).
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from typing_extensions import override

from advkit.core.checks import check, one_of
from advkit.core.errors import BadInput, UsageError
from advkit.core.protocols import Access, Counted, Evidence, Examines, Figure, InSpace, Measures, Slotted
from advkit.core.spaces import NOTHING, REPLY, REREAD, SLOT, USER, Transcripts
from advkit.threat_models.capability import Capability, checked_shape

Place = Literal["suffix", "prefix", "infix", "placeholder"]
Forbid = Literal["special", "special+nonascii", "eos", "none"]
REREADINGS = 4
"""How often a text may change by being written down and read anew before it is given up."""

PLACES = ("suffix", "prefix", "infix", "placeholder")
FORBIDS = ("special", "special+nonascii", "eos", "none")


@dataclass(frozen=True)
class Suffix(Capability, Measures, Examines, Slotted, Counted, InSpace):
    """Adversarial suffix: at most n tokens added to a user's prompt, in one place; everything else stays as it is.

    n:          most tokens, >= 0
    place:      "suffix" after the user's words, "prefix" before them, "infix" in their middle (after half of their
                tokens), "placeholder" where the prompt itself has its room, after the words where it names no place
    forbid:     ids that may not be used: "special" (turn marks and the like, with which a suffix could forge another
                turn; one that spells the end of the user's turn in ordinary ids is submitted clean),
                "special+nonascii" (also ids whose own text is not printable ASCII), "eos" (only those that end a
                reply, as the published code of arXiv 2402.15570 has it), "none"
    retokenize: what counts is what arrives: the whole chat decoded to text and tokenized again. A sample whose ids
                change by that is judged by the new ids; one that can't be told from them (the template does not
                survive, the text never settles, there is no room) is submitted clean
    access:     what the attacker may query: nothing, labels, scores or gradients
    queries:    how often, per sample; None for no limit
    space:      legal samples; `bind` puts the model's own here

    Samples that were tokenized again hold role 4; as words and added tokens can't be told apart there, they are
    admitted where their text begins and ends with the user's own, tokenizing it once more changes nothing, no
    forbidden id is among them and they have at most 2 n + 8 tokens more than the user's words.
    Raises UsageError for fields out of range, in `bind` for a space that is not made of transcripts, and in `slotted`
    where a row has no room.
    """

    norm: ClassVar[None] = None

    n: int = 20
    _: KW_ONLY
    place: Place = "suffix"
    forbid: Forbid = "special"
    retokenize: bool = True
    access: Access = Access.GRADIENTS
    queries: int | None = None
    space: Transcripts | None = None

    def __post_init__(self) -> None:
        check(self, "n", self.n >= 0 and int(self.n) == self.n, "a whole number of tokens >= 0")
        one_of(self, "place", PLACES)
        one_of(self, "forbid", FORBIDS)
        super().__post_init__()

    def _budget(self) -> tuple[float | None, str | None]:
        return self.n, f"{self.n} tokens"

    def _details(self) -> dict[str, Any]:
        return {"place": self.place, "forbid": self.forbid, "retokenize": self.retokenize}

    def bind(self, space: Any) -> Self:
        """The same threat model in a model's space."""
        if not isinstance(space, Transcripts):
            raise UsageError(
                f"a suffix is made of tokens and this model's space is {space!r}; choose a language model (toychat, "
                "hf:NAME) and a task of prompts, or a threat model for other inputs such as linf:eps=8/255"
            )
        return replace(self, space=space)

    @property
    def _tokenizer(self) -> Any:
        if self.space is None:
            raise UsageError("this suffix belongs to no model yet; bind(model.space) it first")
        return self.space.tokenizer

    def forbidden(self) -> frozenset[int]:
        """Ids that may not be used."""
        tokenizer = self._tokenizer
        if self.forbid == "none":
            return frozenset()
        if self.forbid == "eos":
            return frozenset(tokenizer.ends)
        special = frozenset(tokenizer.special)
        if self.forbid == "special":
            return special
        return special | (frozenset(range(tokenizer.vocabulary)) - frozenset(tokenizer.printable))

    def allowed(self, device: torch.device | str = "cpu") -> Tensor:
        """Bool [V]: ids that may be used."""
        allowed = torch.ones(self._tokenizer.vocabulary, dtype=torch.bool)
        allowed[sorted(self.forbidden())] = False
        return allowed.to(device)

    # Where the tokens are

    def _before(self, roles: Tensor) -> int:
        """How many of the user's tokens stand before the slot; roles: long [W] of a row."""
        user = (roles == USER).nonzero().squeeze(1)
        if self.place == "prefix":
            return 0
        if self.place == "infix":
            return len(user) // 2
        if self.place == "placeholder":
            slot = (roles == SLOT).nonzero().squeeze(1)
            if len(slot):
                return int((user < slot[0]).sum())
            first = int((roles == NOTHING).int().argmax())
            # A row that begins with room, or has it amid its words, names a place; room behind them is a suffix's.
            if bool((user > first).any()) and roles[first] == NOTHING:
                return int((user < first).sum())
        return len(user)

    def slot(self, row: Tensor) -> Tensor:
        """The attacker's tokens in a row [2, W], long [l]."""
        return row[0][row[1] == SLOT]

    @override
    def slotted(self, row: Tensor, ids: Tensor) -> Tensor:
        """The row [2, W] with each of the candidates [N, l] in its slot, [N, 2, W]; what was there goes."""
        if bool((row[1] == REREAD).any()):
            raise BadInput("a sample that was tokenized again has no slot; put tokens into the clean sample")
        if ids.ndim != 2 or ids.shape[1] > self.n:
            raise BadInput(f"candidates of shape {tuple(ids.shape)}; expected [N, l] with l <= {self.n}")
        user, reply = row[0][row[1] == USER], row[0][row[1] == REPLY]
        cut, length, width = self._before(row[1]), ids.shape[1], row.shape[1]
        if len(user) + length + len(reply) > width:
            room = width - len(user) - len(reply)
            raise UsageError(
                f"a sample has room for {room} tokens, not for {length}: make more with prompts:room={length}, or "
                "ask for fewer"
            )
        made = torch.full((len(ids), 2, width), -1, dtype=row.dtype, device=row.device)
        made[:, 1] = NOTHING
        tail = width - len(reply)
        behind = tail - (len(user) - cut)
        for start, part, role in ((0, user[:cut], USER), (behind, user[cut:], USER), (tail, reply, REPLY)):
            made[:, 0, start : start + len(part)] = part
            made[:, 1, start : start + len(part)] = role
        made[:, 0, cut : cut + length] = ids.to(row.dtype)
        made[:, 1, cut : cut + length] = SLOT
        return made

    # What a threat model owes

    def distance(self, x: Tensor, origin: Tensor) -> Tensor:
        """How many tokens the attacker has added, float64 [B]; of rows read anew, how many more there are."""
        checked_shape(x, origin)
        added = (x[:, 1] == SLOT).sum(1) + (x[:, 1] == REREAD).sum(1)
        words = torch.where((x[:, 1] == REREAD).any(1), (origin[:, 1] == USER).sum(1), 0)
        return (added - words).clamp_min(0).to(torch.float32 if x.device.type == "mps" else torch.float64)

    @override
    def measures(self, x: Tensor, origin: Tensor) -> dict[str, Tensor]:
        """What a record says of a change: the tokens it took."""
        return {"tokens": self.distance(x, origin)}

    def admits(self, x: Tensor, origin: Tensor) -> Tensor:
        """Bool [B]: the user's words and the wanted reply as they were, and no more than the attacker may add."""
        if x.shape != origin.shape or x.dtype != origin.dtype:
            return torch.zeros(len(origin), dtype=torch.bool, device=origin.device)
        space = Transcripts(self._tokenizer) if self.space is None else replace(self.space, width=None)
        legal = space.contains(x)
        allowed = self.allowed(x.device)
        own = (x[:, 1] == SLOT) | (x[:, 1] == REREAD)
        legal &= ~(own & ~allowed[x[:, 0].clamp(0, len(allowed) - 1)]).any(1)
        legal &= (x[:, 1] == SLOT).sum(1) <= self.n
        fits = [bool(fine) and self._admits(z, o) for fine, z, o in zip(legal, x.cpu(), origin.cpu(), strict=True)]
        return torch.tensor(fits, dtype=torch.bool, device=origin.device)

    def _admits(self, z: Tensor, origin: Tensor) -> bool:
        """Whether a row of legal roles and ids is the origin but for what the attacker may do."""
        if not torch.equal(z[0][z[1] == REPLY], origin[0][origin[1] == REPLY]):
            return False
        user = origin[0][origin[1] == USER]
        if bool((z[1] == REREAD).any()):
            return self._reread_admits(z, origin)
        if not torch.equal(z[0][z[1] == USER], user):
            return False
        slot = (z[1] == SLOT).nonzero().squeeze(1)
        if not len(slot):
            return True
        kept = (z[1] == USER).nonzero().squeeze(1)
        before = int((kept < slot[0]).sum())
        return before == self._before(origin[1]) and before == int((kept < slot[-1]).sum())

    def _reread_admits(self, z: Tensor, origin: Tensor) -> bool:
        if bool(((z[1] == USER) | (z[1] == SLOT)).any()) or not self.retokenize:
            return False
        return self._reads_as(z[0][z[1] == REREAD].tolist(), origin)

    def _reads_as(self, ids: list[int], origin: Tensor) -> bool:
        """Whether ids are what a text reads as that begins and ends with the user's, and not too many."""
        tokenizer = self._tokenizer
        user = origin[0][origin[1] == USER].tolist()
        if len(ids) > len(user) + 2 * self.n + 8 or tokenizer.reread(ids) != ids:
            return False
        cut = self._before(origin[1])
        text, head, tail = (tokenizer.decode(part) for part in (ids, user[:cut], user[cut:]))
        if self._forges(ids, user):
            return False
        return len(text) >= len(head) + len(tail) and text.startswith(head) and text.endswith(tail)

    def _forges(self, ids: list[int], user: list[int]) -> bool:
        """Whether ids spell the end of the user's turn, where special ids are forbidden and the template has words."""
        closing = self._tokenizer.closing
        if not closing or not self.forbid.startswith("special"):
            return False
        text, words = (str(self._tokenizer.decode(each)) for each in (ids, user))
        return text.count(closing) > words.count(closing)

    def finish(self, x: Tensor, origin: Tensor) -> Tensor:
        """The rows as they arrive: the whole chat written down as text and read anew; see `retokenize`."""
        if not self.retokenize:
            return x
        done = x.clone()
        for i in (x[:, 1] == SLOT).any(1).nonzero().squeeze(1).tolist():
            arrived = self._arrived(x[i], origin[i])
            if arrived is not None:
                done[i] = arrived
        return done

    def _arrived(self, row: Tensor, origin: Tensor) -> Tensor | None:
        """A row [2, W] as it is read anew; None where that changes nothing."""
        reading = (row[1] == USER) | (row[1] == SLOT)
        ids = row[0][reading].tolist()
        again = self._tokenizer.reread(ids)
        if self._forges(ids, row[0][row[1] == USER].tolist()):
            return origin
        if again == ids:
            return None
        for _ in range(REREADINGS):
            if again is None or (once_more := self._tokenizer.reread(again)) == again:
                break
            again = once_more
        reply = row[0][row[1] == REPLY]
        if not again or len(again) + len(reply) > row.shape[1] or not self._reads_as(again, origin):
            return origin
        made = torch.full_like(row, -1)
        made[1] = NOTHING
        made[0, : len(again)], made[1, : len(again)] = torch.tensor(again, dtype=row.dtype), REREAD
        made[0, len(row[0]) - len(reply) :], made[1, len(row[0]) - len(reply) :] = reply, REPLY
        return made

    @override
    def examine(self, evidence: Evidence) -> dict[str, list[Figure]]:
        """Of every row that the attacker changed: how many tokens, and whether they survive being read anew."""
        tokens = (evidence.returned[:, 1] == SLOT).sum(1).tolist()
        same = (evidence.returned == evidence.handed).flatten(1).all(1).tolist()
        if self.retokenize:
            survived: list[Figure] = [fine if count else None for count, fine in zip(tokens, same, strict=True)]
        else:
            survived = [
                self._arrived(row, row) is None if count else None
                for row, count in zip(evidence.returned.cpu(), tokens, strict=True)
            ]
        return {"suffix_tokens": [float(count) if count else None for count in tokens], "retokenizing_share": survived}
