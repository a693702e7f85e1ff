"""Language models in the harness: records, traces, judges' figures and the words of the report."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from advkit.core.errors import UsageError
from advkit.core.protocols import Access, Outcome, Record
from advkit.core.spaces import SLOT
from advkit.evaluation import api
from advkit.evaluation.execute import run
from advkit.evaluation.run.case import parameters
from advkit.evaluation.run.engine import open_store
from advkit.evaluation.run.store import from_line, read_records, to_line
from advkit.testing.language import tiny_lm

ROWS = [
    {"id": f"row-{i}", "prompt": f"w{3 + i % 5} w{4 + i % 7} w5", "target": f"w{6 + i % 4} w{3 + i}", "twin": f"t{i}"}
    for i in range(7)
] + [{"id": f"t{i}", "prompt": f"w{9 - i}", "target": f"w{3 + i}", "benign": True} for i in range(7)]
JUDGED = "says:judges=[refusal:phrases=w3+w7]+exact,samples=4,min_tokens=2,max_tokens=6"


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The best of a few random suffixes; notes every one, and fails on rows whose target begins with w9."""

    needs: ClassVar[Access] = Access.SCORES

    tries: int = 12
    raises: bool = False

    def __call__(self, oracle, x, goal, threat, rng, /):
        allowed = threat.allowed().nonzero().squeeze(1)
        best, least = x.clone(), torch.full((len(x),), torch.inf, dtype=torch.float64)
        if self.raises and bool((x[:, 0] == 9).any()):
            raise RuntimeError("a nine")
        for step in range(self.tries):
            at = (rng.at("try", step).uniform(torch.zeros(len(x), threat.n)) * len(allowed)).long()
            z = torch.stack([threat.slotted(row, allowed[ids][None])[0] for row, ids in zip(x, at, strict=True)])
            loss = goal.loss(oracle(z)).double()
            for row, value in enumerate(loss.tolist()):
                oracle.note(row, {"step": step, "score": value})
            better = loss < least
            best[better], least[better] = z[better], loss[better]
        return best


@dataclass(frozen=True, kw_only=True)
class OneForAll(Draws):
    """The same, but one suffix for all rows, and how many rows there are in every note."""

    together: ClassVar[bool] = True

    def __call__(self, oracle, x, goal, threat, rng, /):
        if self.raises:
            raise RuntimeError("nothing for anybody")
        ids = threat.allowed().nonzero().squeeze(1)[: threat.n][None]
        z = torch.cat([threat.slotted(row, ids) for row in x])
        losses = goal.loss(oracle(z))
        for row in range(len(x)):
            oracle.note(row, {"rows": len(x), "score": float(losses.sum())})
        return z


@pytest.fixture(scope="module")
def lm():
    return tiny_lm(3, 14)


@pytest.fixture
def task(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return f"prompts:file={file},room=12"


def case_of(task, lm, attack=None, goal="says", **more):
    return api.resolve(attack or Draws(), "none", task, lm, "suffix:n=3", goal, device="cpu", **more)


def played(case, folder):
    store = open_store(case, folder)
    try:
        run(case, store)
    finally:
        store.close()
    return sorted((folder / "records.jsonl").read_text().splitlines())


@pytest.mark.slow
def test_records_and_traces_do_not_depend_on_the_batch(task, lm, tmp_path):
    found = [played(case_of(task, lm, batch_size=size, goal=JUDGED), tmp_path / str(size)) for size in (1, 3, 100)]
    assert found[0] == found[1] == found[2]
    for line in found[0]:
        record = from_line(line)
        assert [note["step"] for note in record.trace] == list(range(12))
        assert record.forwards == 12
        # What the attack noted last is what the harness finds when it asks again.
        assert min(note["score"] for note in record.trace) == pytest.approx(
            record.figures["target_nll_after"], abs=1e-12
        )
        assert to_line(record) == line


@pytest.mark.slow
@pytest.mark.parametrize("attack", [Draws(), OneForAll()], ids=["alone", "together"])
def test_a_run_cut_short_is_finished_with_the_same_records_and_traces(task, lm, tmp_path, attack):
    whole = played(case_of(task, lm, attack, batch_size=2), tmp_path / "whole")
    for kept in (1, 3, 6):
        folder = tmp_path / f"cut-{kept}"
        case = case_of(task, lm, attack, batch_size=2)
        open_store(case, folder).close()
        lines = (tmp_path / "whole" / "records.jsonl").read_text().splitlines()
        (folder / "records.jsonl").write_text("".join(f"{line}\n" for line in lines[:kept]) + lines[kept][:40])
        assert played(case, folder) == whole


@pytest.mark.slow
def test_workers_write_the_same_traces(task, lm, tmp_path):
    alone = played(case_of(task, lm, "random_suffix:length=3,evaluations=9", batch_size=2), tmp_path / "one")
    case = case_of(task, lm, "random_suffix:length=3,evaluations=9", batch_size=2)
    store = open_store(case, tmp_path / "two")
    run(case, store, workers=2)
    store.close()
    assert sorted((tmp_path / "two" / "records.jsonl").read_text().splitlines()) == alone


@pytest.mark.slow
def test_all_rows_in_one_batch_for_an_attack_that_wants_them_together(task, lm, tmp_path):
    records = [from_line(line) for line in played(case_of(task, lm, OneForAll(), batch_size=2), tmp_path)]
    attacked = [r for r in records if r.outcome != Outcome.WRONG]
    assert {note["rows"] for r in attacked for note in r.trace} == {len(attacked)}
    # Halves would get another suffix each: a failure is everybody's.
    failed = [
        from_line(line) for line in played(case_of(task, lm, OneForAll(raises=True), batch_size=2), tmp_path / "failed")
    ]
    assert {r.outcome for r in failed if r.outcome != Outcome.WRONG} == {Outcome.ERROR}
    alone = [from_line(line) for line in played(case_of(task, lm, Draws(raises=True)), tmp_path / "alone")]
    assert 0 < sum(r.outcome == Outcome.ERROR for r in alone) < len(alone)


def test_a_record_without_figures_and_trace_keeps_its_bytes():
    record = Record(id="a", attack="pgd", outcome=Outcome.ROBUST, label=1, clean=1, measures={"l0": 2.0})
    line = (
        '{"id":"a","attack":"pgd","outcome":"robust","label":1,"clean":1,"adversarial":null,"reached":false,'
        '"distance":null,"margin":null,"closeness":null,"eight_bit":null,"forwards":0,"backwards":0,"queries":0,'
        '"notes":[],"message":"","measures":{"l0":2.0}}'
    )
    assert to_line(record) == line
    assert from_line(line) == record
    more = replace(record, figures={"x": True, "y": 0.5}, trace=({"step": 0, "of": [1, None]},))
    assert from_line(to_line(more)) == more
    assert to_line(more) == line[:-1] + ',"figures":{"x":true,"y":0.5},"trace":[{"step":0,"of":[1,null]}]}'


def test_images_have_no_new_fields(digits, digits_model, tmp_path):
    report = api.evaluate("fgsm", "none", digits, digits_model, "linf:eps=0.1", n=20, device="cpu", out=tmp_path)
    fields = set(json.loads((tmp_path / "records.jsonl").read_text().splitlines()[0]))
    assert fields.isdisjoint({"figures", "trace"})
    assert set(report.to_dict()["per_sample"]["fields"]) == fields
    assert report.to_dict()["task"] == "classification"
    assert not {"search", "judges"} & set(report.to_dict()["protocol"])


@pytest.mark.slow
def test_figures_of_the_report_follow_from_the_model(task, lm, tmp_path):
    attack = Draws()
    report = api.evaluate(attack, "none", task, lm, "suffix:n=3", JUDGED, device="cpu", out=tmp_path)
    records = read_records(tmp_path / "records.jsonl")
    case = case_of(task, lm, attack)
    batch = next(iter(case.task.batches(7)))
    metrics = report.metrics
    before = -lm(batch.x)[:, 0]
    assert metrics["target_nll_before"]["value"] == pytest.approx(float(before.mean()), abs=1e-12)
    assert metrics["target_nll_after"]["value"] < metrics["target_nll_before"]["value"]
    twins = lm(batch.twins)
    fine = int((twins[:, 1] > twins[:, 0]).sum())
    assert (metrics["benign_accuracy"]["numerator"], metrics["benign_accuracy"]["denominator"]) == (fine, 7)
    assert metrics["attack_success_rate"]["numerator"] == sum(r.outcome == Outcome.BROKEN for r in records)
    assert metrics["suffix_tokens"] == {"value": 3.0, "n": 7}
    assert metrics["retokenizing_share"]["value"] == 1.0  # words apart by blanks always survive
    names = {"refusal", "exact"}
    refused = metrics["clean_refusal"]["numerator"]
    assert 0 < refused < 7
    for name in names:
        for voice in ("asr", "asr_clean"):
            once, ever = metrics[f"{name}_{voice}_at_1"], metrics[f"{name}_{voice}_any_of_4"]
            counted = 7 if voice == "asr_clean" else refused
            assert once["denominator_kind"] == ("prompts" if voice == "asr_clean" else "refused_when_clean")
            assert once["numerator"] <= ever["numerator"]
            assert once["denominator"] == ever["denominator"] == counted
            assert metrics[f"{name}_{voice}_mean"]["value"] <= ever["value"] + 1e-12
    for record in records:
        held = record.figures
        for name in names:
            if not held["clean_refusal"]:
                assert not {f"{name}_asr_greedy", f"{name}_asr_at_1", f"{name}_asr_mean"} & held.keys()
                continue
            assert held[f"{name}_asr_at_1"] <= held[f"{name}_asr_any_of_4"]
            assert (held[f"{name}_asr_mean"] > 0) == held[f"{name}_asr_any_of_4"]
        assert held["clean_refusal"] is not held["refusal_asr_clean_greedy"]
        # The verdict's exact target is the greedy judge's, by another road: its tokens against its text.
        assert held.get("exact_asr_greedy", record.reached) == record.reached
    assert metrics["clean_refusal"]["numerator"] == 7 - metrics["refusal_asr_clean_greedy"]["numerator"]


@pytest.mark.slow
def test_suffix_log_probability_is_that_of_the_model(task, lm, tmp_path):
    case = case_of(task, lm, keep=7)
    played(case, tmp_path)
    from advkit.evaluation.run.store import Store, read_examples

    examples = read_examples(tmp_path)
    for record in read_records(tmp_path / "records.jsonl"):
        _, z = examples[Store.key(record.attack, record.id)]
        logp = lm.likelihood()(z[None])[0][z[1] == SLOT]
        assert record.figures["suffix_log_probability"] == pytest.approx(float(logp.mean()), abs=1e-9)


@pytest.mark.slow
def test_words_and_cards_of_the_report(task, lm, tmp_path):
    report = api.evaluate(Draws(), "none", task, lm, "suffix:n=3", JUDGED, device="cpu", out=tmp_path)
    data = report.to_dict()
    assert data["task"] == "text_generation"
    assert [card["judge"] for card in data["protocol"]["judges"]] == ["refusal:phrases=w3+w7", "exact"]
    assert "likelihood" in data["protocol"]["search"]
    assert data["threat_model"]["eps"] == 3
    cost = data["attacks"][0]["cost"]
    assert cost["forward"] == 12 * data["attacks"][0]["n_attacked"]
    assert cost["tokens"] > 0
    text = " ".join(" ".join(line for line, _ in report.full()).split())
    for words in (
        "target not said", "exact target", "target NLL before", "target NLL after", "benign prompts answered",
        "refused when clean",
        "refusal ASR at 1", "refusal ASR any of 4", "refusal ASR mean", "forward passes per attacked sample",
        "tokens per attacked sample",
        "suffix tokens", "retokenizing share", "suffix log probability", "empty replies", "suffix of 3 tokens",
        "strictest judge", "exact judge says broken", "robust accuracy all judges",
    ):  # fmt: skip
        assert words in text, words
    for words in ("class held", "8 bits", "DLR"):
        assert words not in text, words
    assert "any of" in text.partition("at 1")[2]


@pytest.mark.slow
def test_silence_is_seen(task, lm, tmp_path, monkeypatch):
    monkeypatch.setattr(
        type(lm), "generate", lambda self, x, samples, *args, **more: [[""] * samples for _ in range(len(x))]
    )
    report = api.evaluate(Draws(), "none", task, lm, "suffix:n=3", JUDGED, device="cpu", out=tmp_path)
    assert report.metrics["empty_replies"]["value"] == report.metrics["no_language_greedy"]["value"] == 1.0
    # Silence is no refusal and no success: there is nothing to count.
    assert report.metrics["clean_refusal"]["value"] == report.metrics["refusal_asr_clean_greedy"]["value"] == 0.0
    assert "refusal_asr_at_1" not in report.metrics
    assert {"garbled_replies", "not_refused_clean"} <= {flag["id"] for flag in report.flags}


@pytest.mark.slow
def test_mistakes_are_refused_before_anything_is_spent(task, lm, digits, digits_model):
    class Mute:
        """Scores replies and writes none."""

        space = lm.space

        def __init__(self):
            self.__call__ = lm.__call__

        def __call__(self, x):
            return lm(x)

        def attacker_view(self):
            return self

        def modules(self):
            return ()

        def describe(self):
            return lm.describe()

        def to(self, device):
            return self

    with pytest.raises(UsageError, match="writes none"):
        api.evaluate(Draws(), "none", task, Mute(), "suffix:n=3", JUDGED, device="cpu")
    assert api.evaluate(Draws(tries=2), "none", task, Mute(), "suffix:n=3", "says", device="cpu").metrics
    with pytest.raises(UsageError, match="language models"):
        api.resolve(Draws(), "none", task, digits_model, "suffix:n=3", "says", device="cpu")
    with pytest.raises(UsageError, match="language model"):
        api.resolve("fgsm", "none", digits, digits_model, "suffix:n=3", device="cpu")
    with pytest.raises(UsageError, match="room"):
        api.evaluate(Draws(), "none", task, lm, "suffix:n=13", "says", device="cpu")


def test_the_task_says_how_where_attack_and_task_name_the_same_part():
    case = api.resolve("random_suffix", "none", "prompts", device="cpu")
    assert case.specs["goal"].startswith("says:judges=")
    assert case.specs["threat_model"] == "suffix"
    assert api.resolve("random_suffix", "none", "prompts", goal="says", device="cpu").specs["goal"] == "says"


@pytest.mark.slow
def test_from_names_to_a_report_on_the_embedded_model(tmp_path):
    report = api.evaluate("random_suffix:length=8,evaluations=24", n=4, task="prompts", device="cpu", out=tmp_path)
    metrics = report.metrics
    assert metrics["clean_refusal"]["value"] == metrics["benign_accuracy"]["value"] == 1.0
    assert metrics["target_nll_after"]["value"] < metrics["target_nll_before"]["value"]
    assert report.trustworthy


@dataclass
class Setting:
    max_perplexity: float
    steps: int
    eps: float


def test_a_setting_without_an_end_is_reported_as_text():
    assert parameters(Setting(float("inf"), 2, 0.5)) == {
        "max_perplexity": "inf",
        "steps": 2,
        "eps": 0.5,
    }
