"""What every attack on text owes its users, one function per law; each raises AssertionError with the law's name.

Played on a language model of random weights and a few prompts, within the threat model that the attacks are made for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from advkit.core.errors import AccessDenied, UsageError
from advkit.core.lanes import Lanes
from advkit.core.meter import Meter
from advkit.core.oracle import MeteredOracle
from advkit.core.protocols import Access, MadeForThreatModel
from advkit.core.rng import RowRng
from advkit.core.spaces import SLOT
from advkit.core.wrapper import Wrapper
from advkit.models.language.model import LanguageModel
from advkit.testing.language import tiny_lm, transcripts
from advkit.testing.play import failure, fields_of, names, require, require_tensor
from advkit.testing.victims import linear, uniform
from advkit.threat_models.goals.says import Says
from advkit.threat_models.goals.untargeted import Untargeted
from advkit.threat_models.lp import Linf
from advkit.threat_models.tokens import Suffix

PROMPTS = (("w3 w4 w5", "w6 w7 w8"), ("w3 w5", "w9 w7"), ("w8", "w4"))
TOKENS = 4
"""Most tokens of a suffix in the kit's games."""
EFFORT = {"length": 3, "steps": 3, "k": 3, "width": 12, "topk": 6, "evaluations": 40, "chunk": 16}


@dataclass(frozen=True)
class TextGame:
    """What an attack returned, what the victim says of it, and what it cost.

    spent: tokens that the model's network read on the attack's behalf
    """

    x: Tensor
    z: Tensor
    answer: Tensor
    meter: Meter
    spent: int
    model: LanguageModel
    threat: Suffix


def on_text(attack: Any) -> bool:
    """Whether the attack is made for transcripts: its own threat model is a slot for tokens."""
    made_for = attack.default_threat_model if isinstance(attack, MadeForThreatModel) else ""
    return isinstance(made_for, str) and made_for.partition(":")[0] == "suffix"  # a class may have a property there


def brief(attack: Any) -> Any:
    """The attack with its effort cut to what tiny victims need; settings below the cut stay."""
    have = fields_of(attack)
    cut = {name: most for name, most in EFFORT.items() if name in have}
    return replace(attack, **{n: most for n, most in cut.items() if (getattr(attack, n) or most + 1) > most})


def play_text(
    attack: Any,
    rows: Sequence[int] = range(len(PROMPTS)),
    *,
    seed: int = 0,
    model: LanguageModel | None = None,
    asked: Callable[[LanguageModel], Any] = lambda model: model,
    access: Access | None = None,
    queries: int | None = None,
    **threat: Any,
) -> TextGame:
    """Run the attack on some of the kit's prompts through an oracle that grants just what it needs.

    asked: what the oracle speaks for in place of the model
    """
    model = tiny_lm(0) if model is None else model
    index = torch.tensor(list(rows), dtype=torch.long)
    x = transcripts(model.tokenizer, PROMPTS, room=2 * TOKENS)[index]
    suffix = Suffix(**{"n": TOKENS, "queries": queries, **threat}).bind(model.space)
    granted = attack.needs if access is None else access
    oracle = MeteredOracle(asked(model), len(x), granted, queries, lanes=Lanes.fitting(x))
    ids = [names(len(PROMPTS))[row] for row in rows]
    before = model.tokens
    z = attack(oracle, x, Says(torch.zeros(len(x), dtype=torch.long)), suffix, RowRng.from_ids(seed, ids))
    require_tensor(z, x)
    spent = model.tokens - before
    with torch.no_grad():
        answer = model(z) if len(z) else torch.zeros(0, 2)
    return TextGame(x, z, answer, oracle.meter, spent, model, suffix)


def stays_admitted(attack: Any) -> None:
    """Every returned row is the origin and at most n allowed tokens, in every place."""
    for place in ("suffix", "prefix", "infix"):
        game = play_text(attack, place=place)
        require(game.z.shape == game.x.shape and game.z.dtype == game.x.dtype, "shape or type changed")
        require(bool(game.threat.admits(game.z, game.x).all()), f"rows came back outside the threat model ({place})")
        require(bool((game.z[:, 1] == SLOT).any()), f"no row was touched ({place})")


def no_tokens_is_identity(attack: Any) -> None:
    """With n=0 the rows come back as they were."""
    game = play_text(attack, n=0)
    require(torch.equal(game.z, game.x), "rows changed though no token may be added")


def never_worse_than_untouched(attack: Any) -> None:
    """The returned rows' losses are no higher than those of the untouched ones."""
    game = play_text(attack)
    with torch.no_grad():
        before = game.model(game.x)
    require(bool((game.answer[:, 0] >= before[:, 0] - 1e-9).all()), "a suffix made the wanted reply less likely")


def batch_of_one(attack: Any) -> None:
    """Rows alone, together, and in another order end the same; no rows are no crash."""
    whole = play_text(attack).z
    for rows in ((0,), (1,), (2,), (2, 0, 1)):
        part = play_text(attack, rows).z
        require(torch.equal(part, whole[list(rows)]), f"rows {rows} end elsewhere than in the whole batch")
    require(len(play_text(attack, ()).z) == 0, "an empty batch came back with rows")


def same_seed_same_tokens(attack: Any) -> None:
    """The same seed gives the same suffixes."""
    require(torch.equal(play_text(attack).z, play_text(attack).z), "the same seed gave other suffixes")


def leaves_no_trace(attack: Any) -> None:
    """Model, global randomness and the caller's rows are what they were."""
    model = tiny_lm(0)
    before = model.describe().state_sha256
    flags = [p.requires_grad for module in model.modules() for p in module.parameters()]
    state = torch.get_rng_state()
    x = transcripts(model.tokenizer, PROMPTS, room=2 * TOKENS)
    game = play_text(attack, model=model)
    after = [p.requires_grad for module in model.modules() for p in module.parameters()]
    require(model.describe().state_sha256 == before and after == flags, "the model changed")
    require(torch.equal(torch.get_rng_state(), state), "torch's global randomness was used")
    require(torch.equal(game.x, x), "the caller's rows changed")


def metered_is_counted(attack: Any) -> None:
    """The meter's tokens are those that the network read."""
    game = play_text(attack)
    require(game.meter.tokens == game.spent > 0, f"metered {game.meter.tokens} tokens, the network read {game.spent}")
    require(bool((game.meter.queries > 0).all()), "an attack without a question")


def keeps_the_query_budget(attack: Any) -> None:
    """Where the threat model counts answers, the attack ends when they do."""
    for budget in (1, 9):
        game = play_text(attack, queries=budget)
        asked = game.meter.queries
        require(int(asked.min()) > 0 and int(asked.max()) <= budget, f"{asked.tolist()} of {budget} answers were asked")
        require(bool(game.threat.admits(game.z, game.x).all()), "rows came back outside the threat model")


def more_evaluations_never_help(attack: Any) -> None:
    """What few evaluations find, more do not lose."""
    scores = []
    for evaluations in (1, 5, 25):
        scores.append(play_text(replace(attack, evaluations=evaluations)).answer[:, 0])
    for fewer, more in pairwise(scores):
        require(bool((more >= fewer - 1e-9).all()), "more evaluations ended with a less likely reply")


def refuses_without_access(attack: Any) -> None:
    """With less access than it declares the attack is refused."""
    try:
        play_text(attack, access=Access.NOTHING if attack.needs < Access.GRADIENTS else Access.SCORES)
    except AccessDenied:
        return
    raise AssertionError(f"the attack ran with less access than it declares, {attack.needs.name}")


def survives_nan(attack: Any) -> None:
    """A model that answers NaN to every touched prompt is met with admitted rows, and the meter says so."""

    class Broken(Wrapper):
        """NaN wherever the attacker has been."""

        def __init__(self, model: LanguageModel) -> None:
            self.model = model

        def __call__(self, x: Tensor) -> Tensor:
            touched = (x[:, 1] == SLOT).any(1)
            return torch.where(touched[:, None], torch.nan, self.model(x))

    game = play_text(attack, asked=Broken)
    require(bool(game.threat.admits(game.z, game.x).all()), "rows came back outside the threat model")
    require(torch.equal(game.z, game.x), "an answer of NaN was taken for a success")
    require(bool(game.meter.non_finite.all()), "NaN answers went unnoticed")


def other_threat_models_are_refused(attack: Any) -> None:
    """In a ball the attack is refused in words that name its own threat model."""
    x = uniform(3, 2, 8)
    oracle = MeteredOracle(linear(), len(x), attack.needs, lanes=Lanes.fitting(x))
    try:
        attack(oracle, x, Untargeted(torch.zeros(2, dtype=torch.long)), Linf(0.1), RowRng.from_ids(0, names(2)))
    except UsageError as refusal:
        require("suffix" in str(refusal), f"the refusal names no way out: {refusal}")
        return
    raise AssertionError("the attack ran in a ball")


TEXT_LAWS: dict[str, Callable[[Any], None]] = {
    law.__name__: law
    for law in (
        stays_admitted,
        no_tokens_is_identity,
        never_worse_than_untouched,
        batch_of_one,
        same_seed_same_tokens,
        leaves_no_trace,
        metered_is_counted,
        keeps_the_query_budget,
        more_evaluations_never_help,
        refuses_without_access,
        survives_nan,
        other_threat_models_are_refused,
    )
}


def check_text_law(name: str, attack: Any) -> None:
    """One law; its AssertionError starts with the law's name and the attack."""
    try:
        TEXT_LAWS[name](brief(attack))
    except Exception as broken:  # an attack raises whatever it likes
        raise failure(name, TEXT_LAWS[name], repr(attack), broken) from broken
