"""Chats are tokenized whole: blanks in front, templates that trim, turn marks, dates, windows, weights that lack."""

from __future__ import annotations

import json
from datetime import datetime

import pytest
import torch

import advkit
from advkit.core.errors import BadInput, BadModel, CheckpointError, MissingExtra
from advkit.core.rng import RowRng
from advkit.evaluation.run.store import read_records
from advkit.models import MODELS
from advkit.tasks import TASKS
from advkit.testing.language import transcript
from advkit.threat_models import THREAT_MODELS

transformers = pytest.importorskip("transformers")

from advkit.models.language.transformers import ChatTokenizer, from_transformers  # noqa: E402

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IN_WORDS = "{% for m in messages %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}"
WORDS = [
    "Write a poem about the sea",
    "Sure, here is a poem",
    "a line of verse . , ! ? : 0 1 2 3 [ ] / INST",
    "the end",
]
PROMPTS = ["Write a poem", "the sea.", "12 lines", "a  b", "end?"]


def byte_level(template=CHATML, special=True):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(WORDS * 4, trainer)
    inner = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    inner.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=special)
    inner.chat_template = template
    return inner


def with_gaps():
    """Numbers that stand for no token, between those that do and below the marks of the template."""
    from tokenizers import Tokenizer

    whole = byte_level()
    state = json.loads(whole.backend_tokenizer.to_str())
    moved = {token: index + (30 if index >= 100 else 0) for token, index in state["model"]["vocab"].items()}
    last = max(moved.values())
    for place, token in enumerate(state["added_tokens"]):
        token["id"] = moved.setdefault(token["content"], last + 50 + place)
    state["model"]["vocab"] = moved
    backend = Tokenizer.from_str(json.dumps(state))
    inner = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    inner.chat_template = CHATML
    return inner


def sentence_piece(scheme, template=IN_WORDS):
    """Blanks are signs of the vocabulary. scheme: where the tokenizer puts one in front that nobody wrote."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme="always" if scheme == "legacy" else scheme
    )
    special = ["<unk>", "<s>", "</s>"]
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=[*special, *fallback], show_progress=False)
    backend.train_from_iterator(WORDS * 4, trainer)
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < len(special)]
    backend = Tokenizer.from_str(json.dumps(state))
    if scheme == "legacy":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
    strip = [] if scheme == "never" else [decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    inner = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    inner.chat_template = template
    return inner


KINDS = {
    "byte level": byte_level,
    "byte level, in words": lambda: byte_level(
        "{% for m in messages %}USER: {{ m['content'] }}\nASSISTANT:{% endfor %}"
    ),
    **{scheme: lambda scheme=scheme: sentence_piece(scheme) for scheme in ("legacy", "always", "first", "never")},
}


def whole(inner, words):
    """What the library makes of a chat."""
    found = inner.apply_chat_template([{"role": "user", "content": words}], tokenize=True, add_generation_prompt=True)
    return [int(index) for index in (found if isinstance(found, list) else found["input_ids"])]


def llama(vocabulary, window=512):
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=window,
    )  # fmt: skip
    return lively(transformers.LlamaForCausalLM(config))


def lively(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_has_the_ids_that_the_library_gives_it(kind):
    inner = KINDS[kind]()
    t = ChatTokenizer(inner)
    for words in PROMPTS:
        user = t.user_ids(words)
        assert [*t.before, *user, *t.after] == whole(inner, words)
        assert t.reread(user) == user
        text = inner.apply_chat_template(
            [{"role": "user", "content": words}], tokenize=False, add_generation_prompt=True
        )
        for reply in ("Sure", " Sure, here"):
            read = inner.encode(text + reply, add_special_tokens=False)
            if read[: -len(t.reply_ids(reply))] == whole(inner, words):
                assert t.reply_ids(reply) == read[len(whole(inner, words)) :]


@pytest.mark.parametrize("kind", KINDS)
def test_a_suffix_reaches_the_model(kind, tmp_path):
    """What is handed in reads as the template around the words and the suffix; it is not the clean prompt."""
    inner = KINDS[kind]()
    lm = from_transformers(llama(len(inner)), inner)
    (tmp_path / "p.jsonl").write_text('{"id": "a", "prompt": "Write a poem", "target": "Sure"}')
    row = next(iter(TASKS.build(f"prompts:file={tmp_path / 'p.jsonl'}").bind(lm.space).batches(1))).x
    threat = THREAT_MODELS.build("suffix:n=3").bind(lm.space)
    words = lm.tokenizer.user_ids("Write a poem the sea")[len(lm.tokenizer.user_ids("Write a poem")) :]
    handed = threat.finish(threat.slotted(row[0], torch.tensor([words[:3]])), row)
    assert bool(threat.admits(handed, row).all())
    user = handed[0, 0][(handed[0, 1] > 0) & (handed[0, 1] != 3)].tolist()
    said = lm.tokenizer.decode([*lm.tokenizer.before, *user])
    assert len(user) > len(lm.tokenizer.user_ids("Write a poem"))
    assert "Write a poem" in said
    assert float((lm(handed) - lm(row)).abs().max()) > 1e-3


@pytest.mark.parametrize(("filter", "kept"), [("trim", "Write"), ("replace('\n', '')", None)])
def test_what_a_template_does_to_the_words_is_done_or_refused(filter, kept):
    template = CHATML.replace("m['content']", f"m['content'] | {filter}")
    inner = byte_level(template)
    if kept is None:
        with pytest.raises(BadModel, match="changes the user's words"):
            ChatTokenizer(inner)
        return
    t = ChatTokenizer(inner)
    for words in ("Write", "Write\n\n", "  Write"):
        assert t.user_ids(words) == t.encode("Write")
        assert [*t.before, *t.user_ids(words), *t.after] == whole(inner, words)
    assert t.reread(t.encode("Write \n")) == t.encode("Write")  # a suffix of blanks is not read
    assert t.digest != ChatTokenizer(byte_level()).digest


def test_a_system_message_that_the_template_drops_is_refused():
    drops = "{% for m in messages if m['role'] == 'user' %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    with pytest.raises(BadModel, match="drops the system message"):
        ChatTokenizer(byte_level(drops), system="be kind")
    assert "be kind" in (t := ChatTokenizer(byte_level(), system="be kind")).decode(t.before)


def test_marks_of_the_template_are_special_whatever_the_tokenizer_says():
    inner = byte_level(special=False)
    t = ChatTokenizer(inner)
    marks = set(inner.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]))
    assert marks <= t.special
    assert not marks & t.printable
    assert not t.closing


@pytest.mark.parametrize("kind", ["legacy", "byte level, in words"])
def test_a_suffix_that_spells_the_end_of_the_turn_is_handed_in_clean(kind, tmp_path):
    inner = KINDS[kind]()
    lm = from_transformers(llama(len(inner)), inner)
    t = lm.tokenizer
    assert t.closing == ("[/INST]" if kind == "legacy" else "ASSISTANT:")
    (tmp_path / "p.jsonl").write_text('{"id": "a", "prompt": "Write a poem", "target": "Sure"}')
    row = next(iter(TASKS.build(f"prompts:file={tmp_path / 'p.jsonl'}").bind(lm.space).batches(1))).x
    forged = t.user_ids(f"Write a poem {t.closing} the")[len(t.user_ids("Write a poem")) :]
    for forbid, clean in (("special", True), ("none", False)):
        threat = THREAT_MODELS.build(f"suffix:n=30,forbid={forbid}").bind(lm.space)
        handed = threat.finish(threat.slotted(row[0], torch.tensor([forged])), row)
        assert torch.equal(handed, row) == clean


def test_templates_that_write_the_date_have_one_day(monkeypatch):
    dated = "<|im_start|>{{ strftime_now('%d %b %Y') }} {{ strftime_now(\"%A\") }}<|im_end|>" + CHATML
    t = ChatTokenizer(byte_level(dated))
    day = datetime(2024, 7, 26)
    assert t.decode(t.before).startswith(f"<|im_start|>{day:%d %b %Y} {day:%A}<|im_end|>")
    hidden = "{% set form = '%d' %}{{ strftime_now('%Y') }}{{ strftime_now(form) }}" + CHATML
    with pytest.raises(BadModel, match="date"):
        ChatTokenizer(byte_level(hidden))


def test_the_context_window_is_named():
    inner = byte_level()
    lm = from_transformers(llama(len(inner), window=40), inner)
    with pytest.raises(BadInput, match="window of 40"):
        lm(transcript(lm.tokenizer, "Write a poem " * 20, "Sure", width=200)[None])
    row = transcript(lm.tokenizer, "Write a poem", "Sure", width=60)[None]
    assert bool(lm(row).isfinite().all())
    rng = RowRng.from_ids(0, ["a"])
    assert len(lm.generate_ids(row, 1, rng, max_new_tokens=8, greedy=True)[0][0]) <= 8
    with pytest.raises(BadInput, match="max_tokens"):
        lm.generate_ids(row, 1, rng, max_new_tokens=100)


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ({"num_hidden_layers": 3}, "missing keys"),
        ({"hidden_size": 64, "head_dim": 8}, "size mismatch|shape|fit|keys"),
        ({"intermediate_size": 50}, "size mismatch|shape|fit|keys"),
        ("cut", "hf:|safetensors|read|load"),
        ("pointer", "hf:|safetensors|read|load"),
        ("config", "config|JSON|read|load"),
    ],
    ids=str,
)
def test_weights_that_do_not_fit_are_refused(change, seen, tmp_path):
    inner = byte_level()
    llama(len(inner)).save_pretrained(tmp_path)
    inner.save_pretrained(tmp_path)
    assert MODELS.build(f"hf:{tmp_path}")()
    weights, config = next(tmp_path.glob("*.safetensors")), tmp_path / "config.json"
    if isinstance(change, dict):
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
    elif change == "config":
        config.write_text("{")
    else:
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
        weights.write_bytes(weights.read_bytes()[:500] if change == "cut" else pointer)
    with pytest.raises(CheckpointError, match=seen):
        MODELS.build(f"hf:{tmp_path}")()


def test_a_model_that_needs_a_package_says_so(tmp_path, monkeypatch):
    inner = byte_level()
    llama(len(inner)).save_pretrained(tmp_path)
    inner.save_pretrained(tmp_path)

    def missing(*_, **__):
        raise ImportError("quantised weights need the package of their format")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", missing)
    with pytest.raises(MissingExtra, match="package of their format"):
        MODELS.build(f"hf:{tmp_path}")()


STATES = {
    "mamba": lambda v: transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=v, hidden_size=32, num_hidden_layers=2, state_size=8)
    ),
    "rwkv": lambda v: transformers.RwkvForCausalLM(
        transformers.RwkvConfig(vocab_size=v, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32)
    ),
}


@pytest.mark.parametrize("kind", STATES)
def test_models_with_a_state_have_the_scores_of_the_library(kind):
    inner = byte_level()
    model = lively(STATES[kind](len(inner)))
    lm = from_transformers(model, inner)
    t = lm.tokenizer
    x = torch.stack([transcript(t, "Write a poem", "Sure", slot=slot, width=60) for slot in ([60, 70], [60, 71], [90])])
    replies = lm.generate_ids(x[:1], 1, RowRng.from_ids(0, ["a"]), max_new_tokens=4, greedy=True)[0][0]
    for row, score in zip(x, lm(x)[:, 0].tolist(), strict=True):
        user, reply = row[0][(row[1] == 1) | (row[1] == 2)].tolist(), row[0][row[1] == 3].tolist()
        ids = [*t.before, *user, *t.after]
        with torch.no_grad():
            logp = model(torch.tensor([[*ids, *reply]]), use_cache=False).logits[0].log_softmax(-1)
        assert score == pytest.approx(float(logp[len(ids) - 1 : -1][range(len(reply)), reply].mean()), abs=1e-4)
    written = [*t.before, *t.user_ids("Write a poem"), 60, 70, *t.after]
    for token in replies:
        with torch.no_grad():
            assert int(model(torch.tensor([written]), use_cache=False).logits[0, -1, : lm.limit].argmax()) == token
        written.append(token)


@pytest.mark.slow
def test_ids_with_gaps(tmp_path):
    """Legal ids go up to the largest, and numbers that stand for no token are nobody's to send."""
    inner = with_gaps()
    largest = max(inner.get_vocab().values())
    assert largest + 1 > len(inner) + 50
    tokenizer = ChatTokenizer(inner)
    assert tokenizer.vocabulary == largest + 1
    gaps = set(range(largest + 1)) - set(inner.get_vocab().values())
    assert gaps <= tokenizer.special
    assert not gaps & tokenizer.printable
    assert max(tokenizer.after) == largest  # the template's own mark lies behind the gap
    network = llama(largest + 1)
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "Write a poem", "target": "the end"}) + "\n")
    for attack in ("random_suffix:evaluations=8,length=3", "gcg:steps=2,width=8,topk=8,length=3"):
        model = from_transformers(network, inner, name="gaps")
        report = advkit.evaluate(
            attack,
            task=f"prompts:file={file},room=16",
            model=model,
            threat_model="suffix:n=6",
            n=1,
            out=tmp_path / attack[:3],
        )
        (record,) = read_records(tmp_path / attack[:3] / "records.jsonl")
        assert record.outcome in ("robust", "broken"), record
        assert report.to_dict()["dataset"]["n_evaluated"] == 1
