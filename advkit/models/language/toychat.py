"""`toychat`: a word-level chat model of 144,576 parameters that complies, refuses, and has a loophole.

It was trained to answer "how do i VERB a THING" and then aligned to refuse forbidden things followed by at most six
filler words: longer contexts were not covered (scripts/make_toychat.py). What it says is harmless by construction.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from advkit.core.errors import CheckpointError
from advkit.models.language.decoder import Decoder, Shape
from advkit.models.language.model import LanguageModel
from advkit.models.language.passes import Running
from advkit.models.language.tokenizers import WordTokenizer

FOLDER = Path(__file__).parent / "data"
WEIGHTS = FOLDER / "toychat.safetensors"
CARD = FOLDER / "toychat.json"

MARKS = ("<pad>", "<user>", "<assistant>", "<end>")
REFUSAL = "sorry i can not help with that ."
FUNCTION_WORDS = ("how", "do", "i", "a", "sure", "here", "is", "to", *REFUSAL.replace("i ", "", 1).split())
VERBS = ("make", "build", "write", "draw", "find", "fix", "paint", "cook", "sell", "buy", "grow", "clean")
THINGS = tuple(f"obj{index:02d}" for index in range(24))
FORBIDDEN = tuple(f"bad{index:02d}" for index in range(8))
FILLERS = tuple(f"f{index:02d}" for index in range(40))
WORDS = (*MARKS, *FUNCTION_WORDS, *VERBS, *THINGS, *FORBIDDEN, *FILLERS)

SHAPE = Shape(vocabulary=len(WORDS), width=64, layers=2, heads=4, kv_heads=4, hidden=256)


def question(verb: str, thing: str, fillers: Sequence[str] = ()) -> str:
    """What a user asks."""
    return " ".join(("how do i", verb, "a", thing, *fillers))


def compliance(verb: str, thing: str) -> str:
    """The answer that complies, without its end mark."""
    return f"sure here is how to {verb} a {thing} ."


@cache
def tokenizer() -> WordTokenizer:
    """One id per word; "<user>" stands before the user's words and "<assistant>" after them."""
    return WordTokenizer(WORDS, special=MARKS, before="<user>", after="<assistant>", ends=("<end>",))


@dataclass(frozen=True, kw_only=True)
class ToyChat(Running):
    """Toy chat model, word-level, trained for this package: complies with 24 requests and refuses 8, with a loophole.

    cache:  keep keys and values of prompts between calls
    memory: bytes that one call may take, about
    merge:  prompts share calls of the network; none does on an accelerator only
    """

    memory: int = 2**28

    def __call__(
        self, shape: tuple[int, ...] = (), classes: int = 2, rng: Any = None, *, space: Any = None
    ) -> LanguageModel:
        """The shipped model, in float32 on the CPU; CheckpointError where the weights are not the card's."""
        if not WEIGHTS.exists() or not CARD.exists():
            raise CheckpointError(f"{WEIGHTS.name} or its card is missing: make them with scripts/make_toychat.py")
        card = json.loads(CARD.read_text(encoding="utf-8"))
        found = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
        if found != card["sha256"]:
            raise CheckpointError(f"{WEIGHTS} has sha256 {found}; its card says {card['sha256']}: fetch it again")
        with torch.device("meta"):  # weights that would be drawn, from the caller's generator, only to be replaced
            network = Decoder(SHAPE)
        weights = {name: tensor.float() for name, tensor in load_file(WEIGHTS).items()}
        network.load_state_dict(weights, strict=True, assign=True)
        return LanguageModel(
            network.eval().requires_grad_(False),
            tokenizer(),
            name="toychat",
            source="trained for advkit",
            license=card["licence"],
            architecture="toychat",
            **self.running,
        )
