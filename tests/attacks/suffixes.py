"""What tests of searches for suffixes share: prompts, runs, and likelihoods computed by hand."""

from __future__ import annotations

import torch

from advkit.attacks.text.questions import Batcher, resolved
from advkit.attacks.text.search import SuffixSearch
from advkit.core.oracle import MeteredOracle
from advkit.core.protocols import Access
from advkit.core.rng import RowRng
from advkit.testing.language import transcripts
from advkit.threat_models.goals.says import Says
from advkit.threat_models.tokens import Suffix

PROMPTS = [("w3 w4 w5", "w6 w7 w8"), ("w3 w5", "w9 w7"), ("w8", "w4")]
IDS = ("a", "b", "c")


def found(attack, model, x, *, seed=0, ids=None, n=8, access=Access.SCORES, queries=None, **threat):
    oracle = MeteredOracle(model, len(x), access, queries)
    suffix = Suffix(n=n, queries=queries, **threat).bind(getattr(model, "space", None))
    return attack.find(oracle, x, says(len(x)), suffix, RowRng.from_ids(seed, ids or IDS[: len(x)]))


def says(rows):
    return Says(torch.zeros(rows, dtype=torch.long))


def prompts(model, room=8):
    return transcripts(model.tokenizer, PROMPTS, room=room)


def nll(model, row, ids=()):
    """Mean negative log-likelihood of the reply: one full forward, written down by hand, nothing cached."""
    tokenizer = model.tokenizer
    user, reply = row[0][row[1] == 1].tolist(), row[0][row[1] == 3].tolist()
    whole = [*tokenizer.before, *user, *ids, *tokenizer.after, *reply]
    with torch.no_grad():
        logits = model.network.run(torch.tensor([whole[:-1]]), None, len(whole) - 1)[0]
    logp = logits.log_softmax(-1)[range(len(whole) - 1), whole[1:]]
    return -float(logp[-len(reply) :].mean())


class Watched:
    """A model that keeps all the rows it was asked about."""

    def __init__(self, model):
        self.model = model
        self.scored = []

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, x):
        self.scored.append(x.clone())
        return self.model(x)


def searching(attack, model, x, ids=IDS, **threat):
    oracle = MeteredOracle(model, len(x), Access.SCORES)
    suffix = Suffix(**{"n": 8, **threat}).bind(model.space)
    rng = RowRng.from_ids(0, ids[: len(x)])
    return SuffixSearch(attack, oracle, x, says(len(x)), suffix, rng, torch.arange(len(x)))


def told(search, steps):
    """What a part of a search returns; its questions are answered."""
    return resolved(steps, search.rows, Batcher(search.oracle, search.goal))
