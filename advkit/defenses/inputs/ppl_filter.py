"""A perplexity filter in front of a language model (Jain et al., arXiv 2309.00614; evaluated in arXiv 2402.15570)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from advkit.attacks.text.search import begins, turn_perplexity
from advkit.core.errors import BadInput, UsageError
from advkit.core.lanes import Lanes
from advkit.core.protocols import (
    CountsTokens,
    Data,
    Evidence,
    Examines,
    Figure,
    Generates,
    KnowsClasses,
    Likelihood,
    ModelInfo,
    Rng,
    Shaped,
    Undefended,
)

HELD_BACK = 1e4
"""Lead by which a rejected prompt's reply is held back: beyond any of a model's own, and finite."""
SLACK = 1e-5
"""Share by which a perplexity may pass the threshold: other batches round otherwise."""
REJECTION = "I'm sorry, but I cannot read this prompt."


class Filtered(Undefended, Examines, Likelihood, Generates, CountsTokens, Shaped, KnowsClasses):
    """A language model that rejects prompts whose user's turn it finds too unlikely.

    model:          the model behind the filter
    max_perplexity: perplexity of the user's turn above which a prompt is rejected

    A rejected prompt's answer keeps the likelihood of the wanted reply, which is the model's own, and is held back by a
    lead of 1e4; its reply is a sentence of refusal. What an adaptive attacker asks of the model (probabilities of next
    tokens, likelihoods, gradients) is that of the model behind, and the threshold is his to see: the candidates that
    he keeps to are those that pass.
    """

    classes = 2
    lanes: Lanes | None = None

    def __init__(self, model: Any, max_perplexity: float, label: str = "ppl_filter") -> None:
        self.model = model
        self.max_perplexity = float(max_perplexity)
        self.label = label
        self.lanes = Lanes.own(model)

    def __getattr__(self, name: str) -> Any:
        if name in ("continuing", "relaxed", "answering", "sampling", "under", "tokenizer"):
            return getattr(self.model, name)
        raise AttributeError(f"{type(self).__name__} has no {name}")

    def __repr__(self) -> str:
        return f"Filtered({self.model!r}, max_perplexity={self.max_perplexity:.4g})"

    @property
    def space(self) -> Any:
        """The model's."""
        return self.model.space

    @property
    @override
    def tokens(self) -> int:
        return self.model.tokens if isinstance(self.model, CountsTokens) else 0

    @override
    def likelihood(self) -> Callable[[Tensor], Tensor]:
        view: Callable[[Tensor], Tensor] = self.model.likelihood()
        return view

    @property
    @override
    def undefended(self) -> Any:
        """The model behind the filter: what an attacker who knows of no filter attacks."""
        return self.model

    def modules(self) -> tuple[nn.Module, ...]:
        """The model's."""
        return tuple(self.model.modules())

    def attacker_view(self) -> Self:
        """Itself: the threshold and all that the model behind it answers are plain to see."""
        return self

    def to(self, device: torch.device | str) -> Filtered:
        """The same filter on a device."""
        moved = self.model.to(device)
        return self if moved is self.model else Filtered(moved, self.max_perplexity, self.label)

    def describe(self) -> ModelInfo:
        """The model's, with the threshold in name and hash."""
        info: ModelInfo = self.model.describe()
        word = f"{info.state_sha256}|ppl_filter|{self.max_perplexity!r}"
        return replace(info, name=f"{info.name}+{self.label}", state_sha256=hashlib.sha256(word.encode()).hexdigest())

    def perplexity(self, x: Tensor) -> Tensor:
        """Of the user's turn, attacker's tokens included, float64 [B]."""
        return turn_perplexity(self.likelihood()(x).double()[:, None], x, [begins(self)])[:, 0]

    def rejects(self, x: Tensor) -> Tensor:
        """Bool [B]; a turn whose likelihood is not a number is rejected."""
        return ~(self.perplexity(x) <= self.max_perplexity * (1 + SLACK))

    def __call__(self, x: Tensor) -> Tensor:
        """Scores [B, 2]: held back, said."""
        answer: Tensor = self.model(x)
        held = torch.stack((answer[:, 0], answer[:, 0] - HELD_BACK), 1)
        return torch.where(self.rejects(x)[:, None], held, answer)

    @override
    def examine(self, evidence: Evidence) -> dict[str, Sequence[Figure]]:
        """Whether the prompt that was handed in is rejected."""
        with torch.no_grad():
            return {"rejected": self.rejects(evidence.handed).tolist()}

    @override
    def generate(self, x: Tensor, samples: int, rng: Rng, **settings: Any) -> list[list[str]]:
        """Replies to every row; to rejected ones the refusal."""
        written = self._passed(x, rng, lambda rows, streams: self.model.generate(rows, samples, streams, **settings))
        return [[REJECTION] * samples if row is None else row for row in written]

    def generate_ids(self, x: Tensor, samples: int, rng: Rng, **settings: Any) -> list[list[list[int]]]:
        """Replies as ids; to rejected rows the refusal, or nothing where the vocabulary has no words for it."""
        try:
            refusal = list(self.model.tokenizer.encode(REJECTION))
        except BadInput:
            refusal = []
        written = self._passed(
            x, rng, lambda rows, streams: self.model.generate_ids(rows, samples, streams, **settings)
        )
        return [[list(refusal) for _ in range(samples)] if row is None else row for row in written]

    def _passed(self, x: Tensor, rng: Rng, write: Callable[[Tensor, Rng], list[Any]]) -> list[Any]:
        """What is written for the rows that pass; None for the others."""
        with torch.no_grad():
            passes = (~self.rejects(x)).nonzero().squeeze(1)
        written: list[Any] = [None] * len(x)
        if len(passes):
            for row, replies in zip(passes.tolist(), write(x[passes], rng.take(passes)), strict=True):
                written[row] = replies
        return written


@dataclass(frozen=True, kw_only=True)
class PPLFilter:
    """Perplexity filter: rejects prompts whose perplexity is above the largest among clean prompts.

    Attacks on text keep to the threshold by default (`max_perplexity` of beast, gcg and the random baselines), so that
    the headline is the filter against attackers who know of it; beside it stands the same attack made on the model
    without the filter, by attackers who do not.

    threshold: perplexity of the user's turn above which a prompt is rejected; none takes the largest among clean ones
    clean:     task of these clean prompts, by spec (prompts:file=...), harmless twins included; empty takes the data at
               hand, or else embedded prompts that the model can read (prompts:set=general; for toychat
               prompts:set=toychat-clean)

    Raises UsageError for a threshold below 1 and for models without likelihoods.
    """

    needs_data: ClassVar[bool] = False
    claims: ClassVar[str] = ""

    threshold: float | None = None
    clean: str = ""

    def __post_init__(self) -> None:
        if self.threshold is not None and not self.threshold >= 1:
            raise UsageError(f"threshold is {self.threshold}; a perplexity is 1 or more")

    def protect(self, model: Any, data: Data | None, rng: Rng, /) -> Filtered:
        """The model behind the filter."""
        from advkit.defenses import DEFENSES

        if not isinstance(model, Likelihood):
            raise UsageError(
                f"ppl_filter reads how likely prompts are and {model.describe().name} does not say; put it in front "
                "of a language model such as toychat, or choose another defense"
            )
        limit = self.threshold
        if limit is None:
            limit = largest_perplexity(model, self._prompts(model, data))
        return Filtered(model, limit, DEFENSES.label(self))

    def _prompts(self, model: Any, data: Data | None) -> Tensor:
        from advkit.tasks import TASKS

        if self.clean:
            return _rows(TASKS.build(self.clean), model)
        if data is not None:
            return data.x
        try:
            return _rows(TASKS.build("prompts:set=general"), model)
        except BadInput:  # a closed vocabulary: the embedded model's own little language
            return _rows(TASKS.build("prompts:set=toychat-clean"), model)


def _rows(task: Any, model: Any) -> Tensor:
    """All prompts of a task and their twins, as the model reads them."""
    batch = next(task.bind(model.space).batches(len(task)))
    return batch.x if batch.twins is None else torch.cat((batch.x, batch.twins))


def largest_perplexity(model: Any, x: Tensor) -> float:
    """The largest perplexity of a user's turn among transcripts [N, 2, W]; rows without one are left out."""
    device = next((p.device for module in model.modules() for p in module.parameters()), torch.device("cpu"))
    said = x[(x[:, 1] == 1).any(1)].to(device)
    if not len(said):
        raise UsageError("no clean prompt to take a threshold from; give threshold=..., or clean=prompts:file=...")
    with torch.no_grad():
        found = float(Filtered(model, math.inf).perplexity(said).max())
    if not math.isfinite(found):
        raise UsageError(f"the model finds a clean prompt's perplexity to be {found}; give threshold=...")
    return found
