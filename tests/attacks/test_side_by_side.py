"""Searches that go on side by side: who shares a call, who takes a freed place, and that nobody notices."""

from __future__ import annotations

import time

import pytest
import torch
from suffixes import Watched, found

from advkit.attacks.text import questions
from advkit.attacks.text.baselines import RandomSuffix, SampledSuffix
from advkit.attacks.text.beast import BEAST
from advkit.attacks.text.gcg import GCG
from advkit.attacks.text.questions import Batcher, Clock, Question, side_by_side
from advkit.core.protocols import Access
from advkit.testing.language import tiny_lm, transcripts

MANY = [("w3 w4 w5", "w6 w7 w8"), ("w3 w5", "w9 w7"), ("w8", "w4"), ("w5 w5 w6", "w3"), ("w10 w3", "w8 w9 w4")]
IDS = ("a", "b", "c", "d", "e")


class Counting:
    """A search that asks a number of questions and keeps the answers."""

    def __init__(self, row, kinds, size=1):
        self.rows, self.clock = torch.tensor([row]), Clock()
        self.kinds, self.size = kinds, size
        self.heard = []

    def steps(self):
        for index, kind in enumerate(self.kinds):
            x = torch.full((self.size, 1), 100 * int(self.rows) + index)
            answer = yield Question(kind, x, torch.zeros(self.size, dtype=torch.long))
            self.heard.append(answer)


class Echo:
    """An oracle that answers what it was asked and remembers every call."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, of):
        assert (x[:, 0] // 100 == of).all()
        self.calls.append(of.tolist())
        return x


def driven(askers, slots=16):
    oracle = Echo()
    side_by_side(askers, Batcher(oracle, None), slots)
    for asker in askers:
        assert [int(answer[0]) for answer in asker.heard] == [
            100 * int(asker.rows) + i for i in range(len(asker.kinds))
        ]
        assert all(len(answer) == asker.size for answer in asker.heard)
    return oracle.calls


def test_every_call_holds_all_that_ask_and_a_freed_place_is_taken_at_once():
    # lengths 3, 1, 2, 1, 0 in two places: row 1 ends first, 2 comes in, then 3; the last one asks nothing
    askers = [Counting(row, "s" * length) for row, length in enumerate((3, 1, 2, 1, 0))]
    assert driven(askers, 2) == [[0, 1], [0, 2], [0, 2], [3]]
    assert driven([Counting(row, "s" * 2) for row in range(5)], 5) == [[0, 1, 2, 3, 4]] * 2
    assert driven([Counting(row, "s") for row in range(3)], 1) == [[0], [1], [2]]
    assert driven([]) == []


def test_a_search_that_begins_among_others_waits_until_they_ask_alike():
    # the first two draw and score in turn; the third, which scores first, comes in one question later
    askers = [Counting(0, "sdsds"), Counting(1, "s"), Counting(2, "sdsd")]
    assert driven(askers, 2) == [[0, 1], [0], [0, 2], [0, 2], [0, 2], [2]]


def test_calls_are_cut_where_answers_are_many(monkeypatch):
    monkeypatch.setattr(questions, "NUMBERS", 7)
    assert driven([Counting(row, "s", size=3) for row in range(5)]) == [[0] * 3 + [1] * 3, [2] * 3 + [3] * 3, [4] * 3]
    assert driven([Counting(row, "s", size=20) for row in range(2)]) == [[0] * 20, [1] * 20]


def test_other_shapes_are_other_calls():
    class Wide(Counting):
        def steps(self):
            yield Question("s", torch.full((1, 2), 100 * int(self.rows)), torch.zeros(1, dtype=torch.long))

    oracle = Echo()
    side_by_side([Counting(0, "s"), Wide(1, "s"), Wide(2, "s")], Batcher(oracle, None))
    assert oracle.calls == [[1, 2], [0]]


def test_seconds_are_a_searchs_own_and_its_share_of_calls():
    class Slow(Echo):
        def __call__(self, x, of):
            time.sleep(0.08)
            return super().__call__(x, of)

    askers = [Counting(0, "ss", size=3), Counting(1, "ss", size=1)]
    start = time.monotonic()
    side_by_side(askers, Batcher(Slow(), None))
    whole = time.monotonic() - start
    spent = [asker.clock.spent for asker in askers]
    assert 0.9 * 0.16 <= sum(spent) <= whole
    assert spent[0] == pytest.approx(3 * spent[1], rel=0.2)


ATTACKS = {
    "beast": BEAST(k=3, length=4),
    "stops": BEAST(k=4, length=6, stop_on_success=True),
    "untargeted": BEAST(k=2, length=3, objective="untargeted", reply=3, trials=2),
    "filtered": BEAST(k=3, length=3, max_perplexity=30.0),
    "gcg": GCG(steps=3, length=3, width=10, topk=5),
    "exhaustive": GCG(steps=3, length=2, search="exhaustive"),
    "drawn": RandomSuffix(length=3, evaluations=30, chunk=8),
    "sampled": SampledSuffix(length=3, evaluations=20, chunk=8),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("slots", [1, 2, 16])
def test_what_is_found_does_not_depend_on_company(name, slots, monkeypatch):
    monkeypatch.setattr(questions, "SLOTS", slots)
    model = tiny_lm(1)
    x = transcripts(model.tokenizer, MANY, room=8)
    whole = found(ATTACKS[name], model, x, ids=IDS, access=Access.GRADIENTS)
    for row in range(5):
        alone = found(ATTACKS[name], model, x[row : row + 1], ids=IDS[row : row + 1], access=Access.GRADIENTS)
        assert torch.equal(alone.x[0], whole.x[row])
        assert alone.traces[0] == whole.traces[row]


def test_five_prompts_take_as_many_calls_as_one():
    model = tiny_lm(1)
    x = transcripts(model.tokenizer, MANY, room=8)
    calls = []
    for rows in (x[:1], x):
        watched = Watched(model)
        found(BEAST(k=3, length=4), watched, rows, ids=IDS[: len(rows)])
        calls.append(len(watched.scored))
    assert calls[0] == calls[1] == 5


@pytest.mark.slow
def test_queries_and_tokens_are_counted_row_by_row():
    model = tiny_lm(1)
    x = transcripts(model.tokenizer, MANY, room=8)
    attack = BEAST(k=3, length=4)
    whole = found(attack, model, x, ids=IDS)
    for row in range(5):
        alone = found(attack, model, x[row : row + 1], ids=IDS[row : row + 1])
        assert int(alone.evaluations) == int(whole.evaluations[row])
        assert int(alone.tokens) == int(whole.tokens[row])
