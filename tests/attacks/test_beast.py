"""BEAST, the random baselines, and what all searches for suffixes have in common (spec of arXiv 2402.15570)."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from scipy.stats import chisquare
from suffixes import IDS, PROMPTS, Watched, found, nll, prompts, says, searching, told

from advkit.attacks.text.baselines import RandomSuffix, SampledSuffix
from advkit.attacks.text.beast import BEAST
from advkit.attacks.text.search import combined, draw_distinct, normal, nucleus, turn_perplexity
from advkit.core.errors import UsageError
from advkit.core.oracle import MeteredOracle
from advkit.core.protocols import Access
from advkit.core.rng import RowRng
from advkit.core.spaces import SLOT
from advkit.models.ensemble import Ensemble
from advkit.testing.language import PieceTokenizer, random_table, table_lm, tiny_lm, transcript, transcripts
from advkit.threat_models.tokens import Suffix


@pytest.mark.slow
def test_a_beam_as_wide_as_the_vocabulary_is_an_exhaustive_search_and_a_beam_of_one_is_not():
    missed = 0
    for seed in range(20):
        model = tiny_lm(seed, 7)
        row = transcript(model.tokenizer, "w3 w4", "w5 w6", room=2)
        every = [(), *((i,) for i in range(7)), *itertools.product(range(7), repeat=2)]
        if seed < 3:
            best = min(every, key=lambda ids: nll(model, row, ids))
            result = found(BEAST(k=7, length=2), model, row[None], forbid="none")
            assert result.ids[0].tolist() == list(best)
            assert float(result.score) == pytest.approx(nll(model, row, best), abs=1e-9)
            assert int(result.evaluations) == 1 + 7 + 49
        batch = torch.stack([replace_slot(row, ids) for ids in every])
        with torch.no_grad():
            least = float(-model(batch)[:, 0].max())
        narrow = found(BEAST(k=1, length=2), model, row[None], forbid="none")
        missed += float(narrow.score) > least + 1e-9
    assert missed >= 1


def replace_slot(row, ids):
    return Suffix(n=2).slotted(row, torch.tensor([ids], dtype=torch.long))[0]


def test_best_so_far_never_rises_and_the_score_is_that_of_a_full_forward():
    model = tiny_lm(0)
    x = prompts(model)
    result = found(BEAST(k=4, length=6), model, x)
    for i, trace in enumerate(result.traces):
        best = [step["best"] for step in trace]
        assert len(best) == 7
        assert all(later <= sooner for sooner, later in itertools.pairwise(best))
        assert best[-1] == float(result.score[i])
        assert [step["evaluations"] for step in trace] == [1, 5, 21, 37, 53, 69, 85]
        assert float(result.score[i]) == pytest.approx(nll(model, x[i], result.ids[i].tolist()), abs=1e-6)
        assert float(result.before[i]) == pytest.approx(nll(model, x[i]), abs=1e-6)
        ids, scores = result.beams[i]
        assert scores.tolist() == sorted(scores.tolist())
        assert [nll(model, x[i], beam.tolist()) for beam in ids] == pytest.approx(scores.tolist(), abs=1e-6)
    assert bool((result.score < result.before).all())


def test_candidates_differ_hold_no_forbidden_id_and_had_a_probability():
    table = random_table(0, 9)
    table[:, 5] = 0  # never follows anything
    model = table_lm(table / table.sum(1, keepdim=True))
    watched = Watched(model)
    result = found(BEAST(k=5, length=4), watched, transcript(model.tokenizer, "w3", "w4", room=4)[None])
    slots = [[row[0][row[1] == SLOT].tolist() for row in rows] for rows in watched.scored]
    assert [len(step) for step in slots] == [1, 5, 25, 25, 25]
    for step in slots:
        assert len({tuple(ids) for ids in step}) == len(step)
        assert not {i for ids in step for i in ids} & {*model.tokenizer.special, 5}
    assert result.beams[0][0].shape == (5, 4)


def test_fewer_ids_than_asked_for_are_all_drawn():
    table = torch.zeros(6, 6, dtype=torch.float64)
    table[:, 3:5] = 0.5
    model = table_lm(table)
    result = found(BEAST(k=4, length=2), model, transcript(model.tokenizer, "w3", "w5", room=4)[None])
    assert int(result.evaluations) == 1 + 2 + 4


def test_first_tokens_follow_the_models_distribution():
    model = tiny_lm(0, 12)
    p = found_law(model)
    logp = p.log().expand(20_000, -1)
    uniform = RowRng.from_ids(0, ["draws"]).uniform(torch.empty(1, *logp.shape, dtype=torch.float64))[0]
    owner, token = draw_distinct(logp, 1, uniform)
    assert owner.tolist() == list(range(20_000))
    seen = torch.bincount(token, minlength=12)
    assert not bool(seen[p == 0].any())
    keep = p > 0
    assert chisquare(seen[keep].numpy(), (p[keep] / p[keep].sum() * 20_000).numpy()).pvalue > 1e-3
    # And the second without replacement: q(j) = sum_i p(i) p(j) / (1 - p(i)).
    _, pairs = draw_distinct(logp, 2, uniform)
    second = torch.bincount(pairs[1::2], minlength=12)[keep]
    kept = p[keep]
    law = torch.stack([sum(kept[i] * kept[j] / (1 - kept[i]) for i in range(9) if i != j) for j in range(9)])
    assert chisquare(second.numpy(), (law / law.sum() * 20_000).numpy()).pvalue > 1e-3


def found_law(model):
    """Probabilities of the first token, special ones left out."""
    row = transcript(model.tokenizer, "w3 w4", "w5", room=2)
    search = searching(BEAST(k=1, length=1), model, row[None])
    p = told(search, search.next(search.empty()))[0].exp()
    whole = model.continuing()(row[None])[0].softmax(0)
    expected = torch.where(search.allowed, whole, 0.0)
    assert torch.allclose(p, expected / expected.sum())
    return p


@pytest.mark.slow
def test_whole_attacks_follow_the_law_too():
    table = torch.zeros(7, 7, dtype=torch.float64)
    table[:, 3:] = torch.tensor([0.5, 0.25, 0.15, 0.1])
    model = table_lm(table)
    x = transcript(model.tokenizer, "w3", "w4", room=1)[None].expand(240, -1, -1)
    result = found(BEAST(k=1, length=1, objective="mia"), model, x, ids=[f"row {i}" for i in range(240)])
    seen = torch.bincount(torch.cat(result.ids), minlength=7)[3:]
    assert chisquare(seen.numpy(), [120, 60, 36, 24]).pvalue > 1e-3


@pytest.mark.slow
def test_same_seed_same_suffix_and_other_seeds_others():
    model = tiny_lm(0)
    x = prompts(model)
    one, two = (found(BEAST(k=3, length=5), model, x) for _ in range(2))
    assert torch.equal(one.x, two.x)
    assert one.traces == two.traces
    assert any(not torch.equal(one.x, found(BEAST(k=3, length=5), model, x, seed=seed).x) for seed in (1, 2))


@pytest.mark.parametrize("attack", [BEAST(k=3, length=4), BEAST(k=2, length=2, ngram=2)])
def test_three_prompts_at_once_are_three_single_runs(attack):
    model = tiny_lm(1)
    x = prompts(model)
    whole = found(attack, model, x)
    for i in range(3):
        alone = found(attack, model, x[i : i + 1], ids=IDS[i : i + 1])
        assert torch.equal(alone.x[0], whole.x[i])
        assert alone.traces[0] == whole.traces[i]


def test_scores_are_exact_on_a_table():
    table = random_table(3, 8)
    model = table_lm(table)
    row = transcript(model.tokenizer, "w3", "w4 w5", room=3)
    search = searching(BEAST(k=1), model, row[None])
    scored = told(search, search.score(torch.tensor([[6, 7], [7, 4]])))
    # <assistant> (id 1) stands before the reply: no suffix reaches past it.
    by_hand = -(table[1, 4].log() + table[4, 5].log()) / 2
    assert scored.score.tolist() == pytest.approx([float(by_hand)] * 2, abs=1e-12)


def test_a_target_that_no_suffix_can_move_ends_cleanly_without_a_gain():
    model = table_lm(random_table(3, 8))
    x = transcript(model.tokenizer, "w3", "w4 w5", room=5)[None]
    for attack in (
        BEAST(k=3, length=5),
        RandomSuffix(length=3, evaluations=20),
        SampledSuffix(length=3, evaluations=20),
    ):
        result = found(attack, model, x)
        assert torch.equal(result.x, x)
        assert torch.equal(result.score, result.before)
        assert {step["best"] for step in result.traces[0]} == {float(result.before)}


def test_a_model_of_nan_ends_cleanly():
    class Nowhere(Watched):
        def __call__(self, x):
            return torch.full((len(x), 2), torch.nan)

        def continuing(self):
            return lambda x: torch.full((len(x), 12), torch.nan)

    model = tiny_lm(0)
    x = prompts(model)
    for attack in (BEAST(k=3, length=4), RandomSuffix(length=2, evaluations=9)):
        result = found(attack, Nowhere(model), x)
        assert torch.equal(result.x, x)
        assert result.score.tolist() == [math.inf] * 3
    search = searching(BEAST(), Nowhere(model), x[:1])
    logp = told(search, search.next(search.empty()))
    assert search.draw(logp, 3, "child")[0].tolist() == []


def test_no_room_and_no_tokens_give_the_row_back():
    model = tiny_lm(0)
    x = prompts(model)
    assert torch.equal(found(BEAST(k=2, length=3), model, x, n=0).x, x)
    full = transcripts(model.tokenizer, PROMPTS[:1], room=0)
    assert torch.equal(found(BEAST(k=2, length=3), model, full).x, full)


def test_ngram_adds_its_tokens_before_the_scoring():
    model = tiny_lm(0)
    watched = Watched(model)
    result = found(BEAST(k=2, length=2, ngram=3), watched, prompts(model)[:1])
    lengths = [int((rows[0, 1] == SLOT).sum()) for rows in watched.scored]
    assert lengths == [0, 3, 6]
    assert len(result.ids[0]) in (0, 3, 6)
    assert found(BEAST(k=2, length=2, ngram=3), model, prompts(model)[:1], n=4).beams[0][0].shape == (2, 3)


def test_compat_leaves_the_first_tokens_unscored():
    model = tiny_lm(0)
    x = prompts(model)[:1]
    assert torch.equal(found(BEAST(k=3, length=1, compat=True), model, x).x, x)
    steps = found(BEAST(k=3, length=3, compat=True), model, x).traces[0]
    assert [step["evaluations"] for step in steps] == [1, 10, 19]


@pytest.mark.slow
def test_universal_sums_scores_and_logits_over_the_prompts():
    model = tiny_lm(2, 8)
    x = prompts_of(model, [("w3 w4", "w5"), ("w6", "w7 w3")])
    wide = found(BEAST(k=8, length=2, universal=True), model, x, forbid="none")
    every = [(), *((i,) for i in range(8)), *itertools.product(range(8), repeat=2)]
    sums = {ids: sum(nll(model, row, ids) for row in x) for ids in every}
    best = min(sums, key=lambda ids: sums[ids])
    assert [ids.tolist() for ids in wide.ids] == [list(best)] * 2
    assert wide.score.tolist() == pytest.approx([sums[best]] * 2, abs=1e-9)
    search = searching(BEAST(universal=True), model, x, forbid="none")
    logits = model.continuing()(x).sum(0)
    assert torch.allclose(told(search, search.next(search.empty()))[0], logits.log_softmax(0))
    assert BEAST(universal=True).together
    assert not BEAST().together
    # The order of the prompts is nobody's business.
    narrow = BEAST(k=2, length=3, universal=True)
    there, back = found(narrow, model, x), found(narrow, model, x.flip(0), ids=("b", "a"))
    assert torch.equal(there.ids[0], back.ids[0])


def prompts_of(model, pairs, room=6):
    return transcripts(model.tokenizer, pairs, room=room)


def test_several_models_count_together():
    one, two = tiny_lm(0, 8), tiny_lm(1, 8)
    x = prompts_of(one, [("w3 w4", "w5 w6")])
    both = Ensemble((one, two))
    plain = found(BEAST(k=3, length=3), both, x)
    ids = plain.ids[0].tolist()
    assert float(plain.score) == pytest.approx((nll(one, x[0], ids) + nll(two, x[0], ids)) / 2, abs=1e-6)
    ppl = found(BEAST(k=3, length=3, aggregate="ppl"), both, x)
    ids = ppl.ids[0].tolist()
    assert float(ppl.score) == pytest.approx(math.exp(nll(one, x[0], ids)) + math.exp(nll(two, x[0], ids)), abs=1e-6)
    answers = torch.tensor([[[-1.0, -0.5], [-2.0, -3.0]]])
    assert combined(answers, "nll").tolist() == [[-1.5, -1.75]]


def test_membership_scores_are_perplexities_of_prompt_and_suffix():
    model = tiny_lm(0)
    x = prompts(model)[:1]
    result = found(BEAST(k=3, length=3, objective="mia"), model, x)
    ids = [0, 3, 4, 5, *result.ids[0].tolist()]  # <user>, then the words
    with torch.no_grad():
        logp = model.network.run(torch.tensor([ids]), None, len(ids))[0].log_softmax(-1)
    by_hand = math.exp(-float(logp[range(len(ids) - 1), ids[1:]].mean()))
    assert float(result.score) == pytest.approx(by_hand, abs=1e-6)
    assert len(result.ids[0]) >= 1


def test_untargeted_raises_the_perplexity_of_the_models_own_reply():
    model = tiny_lm(0)
    x = prompts(model)[:1]
    attack = BEAST(k=4, length=3, objective="untargeted", reply=4, trials=2)
    result = found(attack, model, x)
    assert float(result.score) < float(result.before) < -1
    assert torch.equal(result.x, found(attack, model, x).x)
    with pytest.raises(UsageError, match="untargeted"):
        BEAST(objective="untargeted", stop_on_success=True)


@pytest.mark.slow
def test_stopping_at_a_success_and_preferring_one():
    model = tiny_lm(0)
    x = prompts(model)[2:]
    attack = BEAST(k=6, length=6, stop_on_success=True)
    result = found(attack, model, x, ids=("c",))
    answer = model(result.x)
    assert bool(result.reached) == bool(answer[0, 1] > answer[0, 0])
    assert bool(result.reached)
    assert len(result.traces[0]) < 7
    for seed in range(3):
        lowest = found(BEAST(k=3, length=4), model, prompts(model), seed=seed)
        reached = found(BEAST(k=3, length=4, keep="reached"), model, prompts(model), seed=seed)
        assert bool((reached.reached >= lowest.reached).all())
        assert bool((reached.score >= lowest.score).all())


def test_budgets_end_the_search_within_a_step():
    model = tiny_lm(0)
    x = prompts(model)[:1]
    for budget in (1, 2, 6, 20):
        assert int(found(BEAST(k=4, length=5, evaluations=budget), model, x).evaluations) == budget
    for budget in (30, 60, 200):
        spent = found(BEAST(k=4, length=5, tokens=budget), model, x).tokens
        assert budget - 14 < int(spent) <= budget
    hours = found(BEAST(k=2, length=3, seconds=3600), model, x)
    assert torch.equal(hours.x, found(BEAST(k=2, length=3), model, x).x)
    assert len(found(BEAST(k=2, length=3, seconds=1e-9), model, x).traces[0]) == 1


def test_tokens_are_those_that_the_network_reads():
    model = tiny_lm(0)
    x = prompts(model)
    before = model.tokens
    result = found(BEAST(k=3, length=6), model, x)
    assert int(result.tokens.sum()) == model.tokens - before
    # cached: k1 l + k1 k2 (l + Q + T - 1) a step, and the prefix once; here P = Q = 1
    steps = [3 * (length - 1) + 9 * (length + 1 + 2) for length in range(2, 7)]
    assert int(result.tokens[0]) == 4 + (1 + 2) + 3 * (1 + 1 + 2) + sum(steps)


def test_places_are_continued_from_what_stands_before_them():
    model = tiny_lm(0)
    row = transcript(model.tokenizer, "w3 w4 w5 w6", "w7", room=4)
    ids = torch.tensor([[8, 9]])
    for place, before in (("suffix", "w3 w4 w5 w6"), ("infix", "w3 w4"), ("prefix", "")):
        search = searching(BEAST(), model, row[None], place=place, forbid="none")
        text = [0, *model.tokenizer.encode(before), 8, 9]
        with torch.no_grad():
            expected = model.network.run(torch.tensor([text]), None, 1)[0, 0].log_softmax(0)
        assert torch.allclose(told(search, search.next(ids))[0], expected)
        result = found(BEAST(k=3, length=3), model, row[None], place=place)
        assert bool(Suffix(n=8, place=place).bind(model.space).admits(result.x, row[None]).all())


def test_candidates_that_do_not_survive_as_text_are_dropped():
    pieces = ("<s>", "<u>", "<e>", "a", "b", "ab", "c")
    tokenizer = PieceTokenizer(pieces, special=pieces[:3], before="<s>", after="<u>", ends=("<e>",))
    model = tiny_lm(0, tokenizer=tokenizer)
    x = transcript(tokenizer, "c", "bc", room=6)[None]
    survivor = found(BEAST(k=4, length=4, require_retokenizable=True), model, x)
    for ids in [survivor.ids[0].tolist(), *survivor.beams[0][0].tolist()]:
        assert tokenizer.encode(tokenizer.decode(ids)) == ids
    search = searching(BEAST(require_retokenizable=True), model, x)
    scored = told(search, search.score(torch.tensor([[3, 4], [5, 6]])))  # "a" + "b" reads as "ab"
    assert torch.isfinite(scored.score).tolist() == [False, True]
    none_left = told(search, search.score(torch.tensor([[3, 4]])))
    assert torch.isfinite(none_left.score).tolist() == [True]


def test_max_perplexity_drops_what_reads_badly():
    model = tiny_lm(0)
    x = prompts(model)[:1]
    wide = BEAST(k=12, length=2)  # exhaustive, so that a bound can only cost
    free = found(wide, model, x)
    perplexity = float(of_turn(model, free.x))
    bound = found(replace(wide, max_perplexity=perplexity * 0.9), model, x)
    assert float(of_turn(model, bound.x)) <= perplexity * 0.9
    assert float(free.score) < float(bound.score) < float(free.before)
    assert torch.equal(found(replace(wide, max_perplexity=math.inf), model, x).x, free.x)
    # Where nothing passes, the beam goes on from what reads best, and the row comes back as it was.
    hopeless = found(replace(wide, max_perplexity=1.01), model, x)
    assert torch.equal(hopeless.x, x)
    assert len(hopeless.traces[0]) == 3


def of_turn(model, x):
    return turn_perplexity(model.likelihood()(x)[:, None], x)[0, 0]


def test_random_suffixes_are_uniform_and_nested():
    model = tiny_lm(0)
    watched = Watched(model)
    x = prompts(model)[:1]
    found(RandomSuffix(length=6, evaluations=300), watched, x)
    drawn = torch.cat([rows[:, 0][rows[:, 1] == SLOT] for rows in watched.scored])
    seen = torch.bincount(drawn, minlength=12)
    assert seen[:3].tolist() == [0, 0, 0]
    assert chisquare(seen[3:].numpy()).pvalue > 1e-3
    for attack in (RandomSuffix(length=3, evaluations=50), SampledSuffix(length=3, evaluations=50)):
        assert torch.equal(found(attack, model, x).x, found(replace(attack, chunk=7), model, x).x)
        assert int(found(attack, model, x).evaluations) == 50


def test_sampled_suffixes_follow_the_model():
    table = torch.zeros(7, 7, dtype=torch.float64)
    table[:, 3:] = torch.tensor([0.4, 0.3, 0.2, 0.1])
    table[3, 3:] = torch.tensor([0.0, 0.0, 0.0, 1.0])
    model = table_lm(table)
    watched = Watched(model)
    row = transcript(model.tokenizer, "w4", "w4", room=2)[None]
    found(SampledSuffix(length=2, evaluations=401), watched, row)
    pairs = torch.cat([rows[:, 0][rows[:, 1] == SLOT].view(-1, 2) for rows in watched.scored[1:]])
    assert chisquare(torch.bincount(pairs[:, 0], minlength=7)[3:].numpy(), [160, 120, 80, 40]).pvalue > 1e-3
    assert set(pairs[pairs[:, 0] == 3][:, 1].tolist()) == {6}


def test_a_nucleus_holds_the_most_likely_ids():
    logp = torch.tensor([[0.5, 0.1, 0.3, 0.1]], dtype=torch.float64).log()
    assert nucleus(logp, 0.6).exp()[0].tolist() == pytest.approx([0.625, 0.0, 0.375, 0.0])
    assert nucleus(logp, 1.0) is logp
    assert normal(torch.full((1, 3), -torch.inf)).tolist() == [[-math.inf] * 3]


def test_settings_out_of_range_are_refused():
    for settings in ({"length": 0}, {"k": 0}, {"evaluations": 0}, {"temperature": 0.0}, {"top_p": 1.5}, {"ngram": 0}):
        with pytest.raises(UsageError):
            BEAST(**settings)
    with pytest.raises(UsageError, match="aggregate"):
        BEAST(aggregate="mean")
    with pytest.raises(UsageError, match="evaluations, tokens or seconds"):
        RandomSuffix(evaluations=None)


def test_traces_go_to_the_oracle():
    model = tiny_lm(0)
    x = prompts(model)
    oracle = MeteredOracle(model, 3, Access.SCORES)
    result = BEAST(k=2, length=2).find(oracle, x, says(3), Suffix(n=4).bind(model.space), RowRng.from_ids(0, IDS))
    for row in range(3):
        assert list(oracle.meter.noted(row)) == list(result.traces[row])
        assert "seconds" not in result.traces[row][0]


@pytest.mark.slow
def test_wider_beams_find_better_suffixes_on_toychat():
    from advkit.models import MODELS
    from advkit.tasks import TASKS

    model = MODELS.build("toychat")()
    batch = next(TASKS.build("prompts:set=toychat").bind(model.space).batches(24))
    means = []
    for k in (1, 5, 15):
        oracle = MeteredOracle(model, 24, Access.SCORES)
        result = BEAST(k=k, length=8).find(
            oracle, batch.x, says(24), Suffix(n=8).bind(model.space), RowRng.from_ids(0, batch.ids)
        )
        means.append(float(result.score.mean()))
    assert means[0] > means[1] + 0.1 > means[2] + 0.2


def test_dropped_candidates_count_so_that_every_search_ends():
    model = tiny_lm(0)
    x = prompts(model)[:1]
    for attack in (RandomSuffix(length=3, evaluations=50), SampledSuffix(length=3, evaluations=50)):
        result = found(replace(attack, max_perplexity=1.01), model, x)
        assert int(result.evaluations) == 50
        assert torch.equal(result.x, x)
