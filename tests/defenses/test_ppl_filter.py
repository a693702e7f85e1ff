"""The perplexity filter, and the attack that knows of it."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import pytest
import torch

from advkit.attacks.text.baselines import RandomSuffix
from advkit.attacks.text.beast import BEAST
from advkit.attacks.text.search import begins, turn_perplexity
from advkit.core.errors import UsageError
from advkit.core.oracle import MeteredOracle
from advkit.core.protocols import Access, Data
from advkit.core.rng import RowRng
from advkit.defenses import DEFENSES
from advkit.defenses.inputs.ppl_filter import HELD_BACK, REJECTION, Filtered, PPLFilter
from advkit.evaluation.api import evaluate
from advkit.evaluation.plan import Request, plan
from advkit.models import MODELS
from advkit.models.language.model import LanguageModel
from advkit.models.language.tokenizers import WordTokenizer
from advkit.models.torch import is_model
from advkit.tasks import TASKS
from advkit.testing.language import tiny_lm, transcript, transcripts
from advkit.testing.victims import linear
from advkit.threat_models.goals.says import Says
from advkit.threat_models.tokens import Suffix

RNG = RowRng.from_ids(0, ["defense"])
PAIRS = [("w3 w4 w5", "w6 w7 w8"), ("w3 w5", "w9 w7"), ("w8", "w4")]


def by_hand(model, row):
    """Perplexity of the user's turn by one full forward."""
    user = row[0][(row[1] == 1) | (row[1] == 2)].tolist()
    whole = [*model.tokenizer.before, *user]
    with torch.no_grad():
        logp = model.network.run(torch.tensor([whole[:-1]]), None, len(user))[0].log_softmax(-1)
    return math.exp(-float(logp[range(len(user)), user].mean()))


def bare(model):
    """The same network without a template: nothing stands before the user's turn."""
    t = model.tokenizer
    return LanguageModel(model.network, WordTokenizer(t.words, special=t.words[:3], ends=("<end>",)))


def test_a_first_token_that_has_no_probability_is_not_counted():
    model = bare(tiny_lm(0))
    assert model.tokenizer.before == ()
    row = transcripts(model.tokenizer, PAIRS[:1])
    user = row[0][0][row[0][1] == 1].tolist()
    with torch.no_grad():
        logp = model.network.run(torch.tensor([user[:-1]]), None, len(user) - 1)[0].log_softmax(-1)
    right = math.exp(-float(logp[range(len(user) - 1), user[1:]].mean()))
    assert float(Filtered(model, 1.0).perplexity(row)) == pytest.approx(right, rel=1e-6)
    assert PPLFilter().protect(model, Data(row, torch.zeros(1).long(), model.space, 2), RNG).max_perplexity == (
        pytest.approx(right, rel=1e-6)
    )
    slotted = transcript(model.tokenizer, "w4 w5", "w6", slot=[4])[None]
    with torch.no_grad():
        loss = turn_perplexity(model.likelihood()(slotted)[:, None].double(), slotted, [begins(model)])
        assert float(loss) == pytest.approx(by_hand_bare(model, slotted[0]), rel=1e-6)


def by_hand_bare(model, row):
    user = row[0][(row[1] == 1) | (row[1] == 2)].tolist()
    logp = model.network.run(torch.tensor([user[:-1]]), None, len(user) - 1)[0].log_softmax(-1)
    return math.exp(-float(logp[range(len(user) - 1), user[1:]].mean()))


@pytest.mark.slow
def test_the_threshold_is_the_largest_clean_perplexity_and_what_lies_above_is_held_back():
    model = tiny_lm(0)
    x = transcripts(model.tokenizer, PAIRS)
    clean = [by_hand(model, row) for row in x]
    victim = PPLFilter().protect(model, Data(x, torch.zeros(3).long(), model.space, 2), RNG)
    assert victim.max_perplexity == pytest.approx(max(clean), rel=1e-9)
    assert torch.equal(victim(x), model(x))
    assert not bool(victim.rejects(x).any())
    odd = torch.stack([transcript(model.tokenizer, [i, j], "w3") for i in range(3, 12) for j in range(3, 12)])
    above = torch.tensor([by_hand(model, row) > max(clean) for row in odd])
    assert 0 < int(above.sum()) < len(odd)
    assert torch.equal(victim.rejects(odd), above)
    answer = victim(odd)
    assert torch.equal(answer[~above], model(odd)[~above])
    assert torch.equal(answer[above, 0], model(odd)[above, 0])
    assert torch.allclose(answer[above, 0] - answer[above, 1], torch.tensor(HELD_BACK).double())
    replies = victim.generate(odd, 2, RowRng.from_ids(0, [str(i) for i in range(len(odd))]), max_new_tokens=3)
    assert [row == [REJECTION] * 2 for row in replies] == above.tolist()


def test_the_filtered_model_is_a_model_with_a_name_and_a_hash_of_its_own():
    model = tiny_lm(0)
    one, two = (PPLFilter(threshold=limit).protect(model, None, RNG) for limit in (5.0, 6.0))
    assert is_model(one)
    assert one.attacker_view() is one
    assert one.space == model.space
    assert one.to("cpu") is one
    assert len({victim.describe().state_sha256 for victim in (one, two, model)}) == 3
    assert "ppl_filter" in one.describe().name
    assert one.tokens == model.tokens
    with pytest.raises(AttributeError):
        _ = one.something_else


def test_what_can_not_be_filtered_is_refused():
    with pytest.raises(UsageError, match="language model"):
        PPLFilter().protect(linear(), None, RNG)
    with pytest.raises(UsageError, match="threshold"):
        PPLFilter(threshold=0.5)
    assert DEFENSES.build("ppl_filter:threshold=12").threshold == 12


@pytest.mark.slow
def test_an_attack_that_knows_of_the_filter_passes_it():
    model = tiny_lm(0)
    # Prompts that read well, so that not everything passes.
    odd = torch.stack([transcript(model.tokenizer, [i, j], "w3") for i in range(3, 12) for j in range(3, 12)])
    x = torch.stack(sorted(odd, key=lambda row: by_hand(model, row))[:3])
    victim = Filtered(model, max(by_hand(model, row) for row in x))
    threat = Suffix(n=6).bind(victim.space)

    def run(attack):
        oracle = MeteredOracle(victim, 3, Access.SCORES)
        return attack.find(oracle, x, Says(torch.zeros(3).long()), threat, RowRng.from_ids(0, ["a", "b", "c"]))

    # BEAST writes what the model itself goes on with; uniform tokens read badly, and only pass when they look for it.
    for adaptive in (BEAST(k=6, length=6), RandomSuffix(length=6, evaluations=60)):
        result = run(adaptive)
        assert not bool(victim.rejects(result.x).any())
        assert bool((result.score <= result.before).all())
        if isinstance(adaptive, BEAST):
            assert bool((result.score < result.before).any())
    blind = run(RandomSuffix(length=6, evaluations=60, max_perplexity=math.inf))
    assert bool(victim.rejects(blind.x).any())
    answer = victim(blind.x)
    assert not bool((answer[:, 1] > answer[:, 0])[victim.rejects(blind.x)].any())


@pytest.mark.slow
def test_who_does_not_know_of_the_filter_stands_beside_who_does():
    """The oblivious attacker searches by what the bare model says; the verdict on both is the filtered one's."""
    asked = {"task": "prompts", "model": "toychat", "defense": "ppl_filter", "n": 6, "device": "cpu"}
    resolved = plan(Request(attack="beast:k=10,length=8", **asked))
    (companion,) = resolved.companions
    assert companion.case.threat == resolved.case.threat
    assert companion.case.victim is resolved.case.victim
    assert companion.case.surrogates == (("undefended", resolved.case.victim.model),)
    report = evaluate("beast:k=10,length=8", **asked)
    metrics = report.metrics
    assert report.clean_accuracy == 1.0
    assert [attack["name"] for attack in report.to_dict()["attacks"]] == [
        "beast:length=8,k=10",
        "beast:length=8,k=10@undefended",
    ]
    assert (metrics["rejected"]["numerator"], metrics["rejected"]["denominator"]) == (0, 6)
    assert metrics["oblivious_rejected"]["numerator"] >= 5
    assert metrics["oblivious_attack_success_rate"]["numerator"] <= 6 - metrics["oblivious_rejected"]["numerator"]
    # nobody told him to keep to likely words, so he finds more, and it never arrives
    assert metrics["oblivious_target_nll_after"]["value"] < metrics["target_nll_after"]["value"] - 0.05
    assert metrics["target_nll_after"]["value"] < metrics["target_nll_before"]["value"] - 0.1


@pytest.mark.slow
def test_toychats_threshold_comes_from_harmless_prompts_as_it_was_trained_on():
    model = MODELS.build("toychat")()
    victim = PPLFilter().protect(model, None, RNG)
    clean, attacked = (bound(TASKS.build(f"prompts:set={name}"), model) for name in ("toychat-clean", "toychat"))
    assert victim.max_perplexity == float(Filtered(model, math.inf).perplexity(clean.x).max())
    assert victim.max_perplexity == pytest.approx(15.584, abs=0.01)
    for batch in (clean, attacked):
        assert not bool(victim.rejects(batch.x).any())
    assert not bool(victim.rejects(attacked.twins).any())
    # its words: a question, and 0 to 8 fillers, each number about a ninth of the time
    fillers = (clean.x[:, 1] == 1).sum(1) - 6
    counts = torch.bincount(fillers, minlength=9)
    assert len(counts) == 9
    assert float((counts - len(fillers) / 9).abs().max()) < 4 * math.sqrt(len(fillers) / 9)


@pytest.mark.slow
def test_the_clean_prompts_are_the_recipes_and_fresh_ones_pass(tmp_path):
    recipe = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "make_clean_prompts.py"))
    assert recipe["FILE"].read_text(encoding="utf-8").splitlines() == recipe["lines"](0, 500)
    model = MODELS.build("toychat")()
    victim = PPLFilter().protect(model, None, RNG)
    fresh = tmp_path / "fresh.jsonl"
    fresh.write_text("\n".join(recipe["lines"](1, 1000)), encoding="utf-8")
    # the largest of 500 is passed by a fresh one about once in 500 times
    assert int(victim.rejects(bound(TASKS.build(f"prompts:file={fresh}"), model).x).sum()) <= 10


def bound(task, model):
    """All rows of a task of prompts."""
    return next(task.bind(model.space).batches(len(task)))
