"""GCG, and what is left of it when every swap is tried (spec of arXiv 2307.15043)."""

from __future__ import annotations

import itertools
import logging
import math

import pytest
import torch
from suffixes import IDS, Watched, found, nll, prompts, says, searching, told

from advkit.attacks.text.baselines import RandomSuffix
from advkit.attacks.text.gcg import GCG, _Run, swapped, unique
from advkit.attacks.text.search import Scored
from advkit.core.errors import AccessDenied, UsageError
from advkit.core.oracle import MeteredOracle
from advkit.core.protocols import Access
from advkit.core.rng import RowRng
from advkit.models.ensemble import Ensemble
from advkit.testing.language import PieceTokenizer, random_table, table_lm, tiny_lm, transcript, transcripts
from advkit.threat_models.tokens import Suffix


def gcg(attack, model, x, **settings):
    return found(attack, model, x, access=Access.GRADIENTS, **settings)


def walking(attack, model, x, **threat):
    """A walk before its first step."""
    search = searching(attack, model, x, **threat)
    search.oracle.access = Access.GRADIENTS
    told(search, search.begin())
    walk = _Run(attack, search)
    assert told(search, walk.start())
    return walk


def gradient_of(walk, ids):
    return told(walk.search, walk.gradient(ids))


def stepping(walk, given):
    """A step of a walk whose candidates are given."""

    def drawn(step):
        yield from ()
        return given

    walk._drawn = drawn
    return told(walk.search, walk.step(0))


@pytest.mark.parametrize("loss", ["ce", "mellowmax"])
def test_the_gradient_is_that_of_finite_differences(loss):
    model = tiny_lm(0, 8)
    row = transcript(model.tokenizer, "w3 w4", "w5 w6", room=3)
    walk = walking(GCG(length=3, loss=loss, alpha=2.0), model, row[None])
    ids = walk.current
    gradient = gradient_of(walk, ids)
    view = model.relaxed(walk._slotted[0], loss, 2.0)
    hot = torch.nn.functional.one_hot(ids, 8).double()
    step = 1e-5
    for place, token in itertools.product(range(3), range(8)):
        up, down = hot.clone(), hot.clone()
        up[place, token] += step
        down[place, token] -= step
        with torch.no_grad():
            answer = view(torch.stack((up, down)))[:, 0]
        difference = float(-(answer[0] - answer[1]) / (2 * step))
        assert float(gradient[place, token]) == pytest.approx(difference, abs=1e-6)


def test_gradients_of_several_rows_and_models_add_up():
    one, two = tiny_lm(0, 8), tiny_lm(1, 8)
    x = transcripts(one.tokenizer, [("w3 w4", "w5 w6"), ("w5", "w7")], room=3)
    parts = []
    for model, row in itertools.product((one, two), x):
        walk = walking(GCG(length=3), model, row[None])
        parts.append(gradient_of(walk, torch.tensor([3, 4, 5])))
    walk = walking(GCG(length=3, universal=True), Ensemble((one, two)), x)
    assert torch.allclose(gradient_of(walk, torch.tensor([3, 4, 5])), sum(parts) / 2, atol=1e-10)


def test_candidates_differ_where_and_by_what_they_may():
    generator = torch.Generator().manual_seed(0)
    current = torch.arange(5)
    top = torch.stack([torch.randperm(20, generator=generator)[:4] for _ in range(5)])
    for replace in (1, 2, 5):
        position = torch.rand(300, 5, generator=generator)
        token = torch.rand(300, replace, generator=generator)
        made = swapped(current, top, replace, position, token)
        changed = made != current
        assert int(changed.sum(1).max()) <= replace
        for place in range(5):
            assert set(made[changed[:, place], place].tolist()) <= set(top[place].tolist())
        assert changed.any(0).all()
    assert unique(torch.tensor([[3, 1], [0, 2], [3, 1], [0, 1]])).tolist() == [[3, 1], [0, 2], [0, 1]]


def test_a_step_keeps_to_the_most_promising_ids():
    model = tiny_lm(0)
    attack = GCG(steps=1, length=4, width=60, topk=3)
    watched = Watched(model)
    row = transcript(model.tokenizer, "w3 w4", "w5 w6", room=4)[None]
    walk = walking(attack, model, row)
    start, gradient = walk.current, gradient_of(walk, walk.current)
    gradient[:, :3] = math.inf  # special ids
    top = gradient.argsort(1)[:, :3]
    gcg(attack, watched, row)
    first, tried = (rows[:, 0][rows[:, 1] == 2].view(len(rows), -1) for rows in watched.scored[1:])
    assert first.tolist() == [start.tolist()]
    assert len({tuple(ids) for ids in tried.tolist()}) == len(tried)
    for ids in tried:
        places = (ids != start).nonzero().squeeze(1).tolist()
        assert len(places) <= 1
        assert all(int(ids[place]) in top[place].tolist() for place in places)


def test_an_exhaustive_search_falls_at_every_step_and_ends_where_no_swap_helps():
    model = tiny_lm(2, 9)
    x = transcript(model.tokenizer, "w3 w4", "w5 w6", room=3)[None]
    result = gcg(GCG(steps=50, length=3, search="exhaustive"), model, x)
    current = [step["current"] for step in result.traces[0] if "current" in step]
    assert len(current) < 50
    assert all(later < sooner for sooner, later in itertools.pairwise(current))
    ids = result.beams[0][0][0].tolist()
    least = nll(model, x[0], ids)
    for place, token in itertools.product(range(3), range(3, 9)):
        other = [*ids[:place], token, *ids[place + 1 :]]
        assert nll(model, x[0], other) >= least - 1e-12


def test_a_step_goes_to_the_best_of_its_candidates_even_uphill():
    model = tiny_lm(0)
    row = transcript(model.tokenizer, "w3 w4", "w5 w6", room=2)[None]
    walk = walking(GCG(length=2), model, row)
    given = torch.tensor([[3, 4], [5, 6], [7, 8]])
    assert stepping(walk, given)
    scores = [nll(model, row[0], ids.tolist()) for ids in given]
    best = min(range(3), key=lambda i: scores[i])
    assert walk.current.tolist() == given[best].tolist()
    worst = max(range(3), key=lambda i: scores[i])
    assert stepping(walk, given[worst : worst + 1])
    assert walk.current.tolist() == given[worst].tolist()
    assert walk.search.best.score <= scores[best]


@pytest.mark.slow
def test_a_buffer_keeps_the_best_ever():
    model = tiny_lm(0)
    row = transcript(model.tokenizer, "w3 w4", "w5 w6", room=2)[None]
    walk = walking(GCG(length=2, buffer=2), model, row)
    scores = dict(zip([(3, 4), (5, 6), (7, 8)], [3.0, 0.25, 0.5], strict=True))
    walk.pool = [(1.0, torch.tensor([9, 9])), (2.0, torch.tensor([10, 10]))]
    for ids, score in scores.items():
        given, value = torch.tensor([ids]), torch.tensor([score], dtype=torch.float64)
        walk._enter(Scored(given, value, torch.zeros(1, 1, dtype=torch.bool), value), False)
    assert [score for score, _ in walk.pool] == [0.25, 0.5]
    result = gcg(GCG(steps=6, length=3, width=16, topk=5, buffer=3), model, prompts(model))
    for trace in result.traces:
        current = [step["current"] for step in trace if "current" in step]
        assert all(later <= sooner for sooner, later in itertools.pairwise(current))


@pytest.mark.slow
def test_what_is_returned_is_the_best_of_all_steps():
    model = tiny_lm(0)
    x = prompts(model)
    result = gcg(GCG(steps=8, length=4, width=16, topk=5), model, x)
    for i, trace in enumerate(result.traces):
        assert float(result.score[i]) == min(step["score"] for step in trace)
        assert float(result.score[i]) == pytest.approx(nll(model, x[i], result.ids[i].tolist()), abs=1e-6)
    uphill = [
        later["score"] > sooner["score"] for trace in result.traces for sooner, later in itertools.pairwise(trace)
    ]
    assert any(uphill)


@pytest.mark.slow
def test_three_prompts_at_once_are_three_single_runs_and_seeds_count():
    model = tiny_lm(1)
    x = prompts(model)
    attack = GCG(steps=4, length=3, width=12, topk=5, replace=2)
    whole = gcg(attack, model, x)
    for i in range(3):
        alone = gcg(attack, model, x[i : i + 1], ids=IDS[i : i + 1])
        assert torch.equal(alone.x[0], whole.x[i])
        assert alone.traces[0] == whole.traces[i]
    assert torch.equal(gcg(attack, model, x).x, whole.x)
    assert any(gcg(attack, model, x, seed=seed).traces != whole.traces for seed in (1, 2))


def test_mellowmax_scores_are_those_of_the_targets_logits():
    model = tiny_lm(0)
    x = prompts(model)[:1]
    result = gcg(GCG(steps=3, length=3, width=12, topk=5, loss="mellowmax", alpha=1.5), model, x)
    ids = [0, 3, 4, 5, *result.ids[0].tolist(), 1, 6, 7, 8]
    with torch.no_grad():
        logits = model.network.run(torch.tensor([ids[:-1]]), None, 3)[0]
    minus = -logits[range(3), ids[-3:]]
    by_hand = float((torch.logsumexp(1.5 * minus, 0) - math.log(3)) / 1.5)
    assert float(result.score) == pytest.approx(by_hand, abs=1e-6)


def test_a_gradient_of_zero_and_a_model_of_nan_end_cleanly():
    constant = table_lm(random_table(3, 8))
    x = transcript(constant.tokenizer, "w3", "w4 w5", room=5)[None]
    result = gcg(GCG(steps=3, length=3, width=10, topk=4), constant, x)
    assert torch.equal(result.x, x)
    assert torch.equal(result.score, result.before)

    class Nowhere(Watched):
        def __call__(self, rows):
            return torch.full((len(rows), 2), torch.nan)

    model = tiny_lm(0)
    broken = gcg(GCG(steps=3, length=3, width=10, topk=4), Nowhere(model), prompts(model))
    assert torch.equal(broken.x, prompts(model))


def test_candidates_are_filtered_by_their_text(caplog):
    pieces = ("<s>", "<u>", "<e>", "a", "b", "ab", "c")
    tokenizer = PieceTokenizer(pieces, special=pieces[:3], before="<s>", after="<u>", ends=("<e>",))
    model = tiny_lm(0, tokenizer=tokenizer)
    x = transcript(tokenizer, "c", "bc", room=4)[None]
    watched = Watched(model)
    gcg(GCG(steps=3, length=3, width=40, topk=4, init="c"), watched, x)
    for rows in watched.scored[2:]:
        for ids in rows[:, 0][rows[:, 1] == 2].view(len(rows), -1).tolist():
            assert tokenizer.encode(tokenizer.decode(ids)) == ids
    walk = walking(GCG(length=2), model, x)
    with caplog.at_level(logging.WARNING, "advkit"):
        kept = walk._filtered(torch.tensor([[3, 4]]))
    assert kept.tolist() == [[3, 4]]
    assert "tokenised" in caplog.text


def test_first_suffixes_say_what_they_are_told_to():
    tokenizer = PieceTokenizer(("<s>", "x", " x", "y", "."), special=("<s>",), before="<s>")
    model = tiny_lm(0, tokenizer=tokenizer)
    row = transcript(tokenizer, "y", "y", room=4)[None]
    assert walking(GCG(length=3), model, row).current.tolist() == [1, 2, 2]
    closed = tiny_lm(0)
    drawn = walking(GCG(length=3), closed, transcript(closed.tokenizer, "w3", "w4", room=4)[None]).current
    assert set(drawn.tolist()) <= set(range(3, 12))
    pool = walking(GCG(length=3, buffer=4), model, row).pool
    assert len(pool) == 4
    assert {int(i) for _, ids in pool for i in ids} <= {1, 2, 3, 4}


def test_budgets_count_gradients():
    model = tiny_lm(0)
    x = prompts(model)[:1]
    for budget in (1, 2, 4, 5, 30):
        spent = int(gcg(GCG(steps=9, length=3, width=8, topk=5, evaluations=budget), model, x).evaluations)
        assert spent <= budget
        assert spent >= min(budget, 2)
    model = tiny_lm(0)  # nothing cached yet
    result = gcg(GCG(steps=3, length=3, width=8, topk=5), model, x)
    passes = model.tokens  # a backward reads nothing anew, and counts as much again
    steps = sum("current" in step for step in result.traces[0])
    assert int(result.tokens) == passes + steps * (3 + 1 + 2)


def test_stops_at_a_success():
    model = tiny_lm(0)
    x = prompts(model)[2:]
    result = gcg(GCG(steps=60, length=4, width=32, topk=9, stop_on_success=True), model, x, ids=("c",))
    assert bool(result.reached)
    assert len(result.traces[0]) < 62
    assert float(model(result.x)[0, 1]) > float(model(result.x)[0, 0])


def test_scores_alone_are_not_enough():
    model = tiny_lm(0)
    x = prompts(model)[:1]
    with pytest.raises(AccessDenied):
        found(GCG(steps=2, length=2, width=4, topk=4), model, x, access=Access.SCORES)
    for settings in ({"steps": 0}, {"width": 0}, {"buffer": -1}, {"search": "greedy"}, {"alpha": 0.0}):
        with pytest.raises(UsageError):
            GCG(**settings)


@pytest.mark.slow
def test_toychat_says_what_it_was_aligned_not_to():
    from advkit.models import MODELS
    from advkit.tasks import TASKS

    model = MODELS.build("toychat")()
    batch = next(TASKS.build("prompts:set=toychat").bind(model.space).batches(24))
    suffix = Suffix(n=8).bind(model.space)
    attack = GCG(steps=15, width=48, topk=32, length=8)
    for seed in range(1):  # as at seeds 1 and 2
        found_, drawn = (
            each.find(MeteredOracle(model, 24), batch.x, says(24), suffix, RowRng.from_ids(seed, batch.ids))
            for each in (attack, RandomSuffix(length=8, evaluations=700))
        )
        assert int(found_.evaluations.max()) <= 1 + 1 + 15 * (2 + 48)
        # Measured on the shipped weights: 0.50 at every seed; the other prompts' replies begin as wanted and name
        # another thing, whatever the suffix. Random suffixes reach as many and are less sure of them.
        answer = model(found_.x)
        assert float(says(24).reached(answer).float().mean()) >= 0.45
        assert float(found_.score.mean()) < float(drawn.score.mean()) - 0.03
        assert float(found_.score.mean()) < 0.3 * float(found_.before.mean())
