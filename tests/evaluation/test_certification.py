"""Certification: records hold counts, every figure follows from them, and no attack beats a certificate."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import advkit
from advkit.core.errors import BadInput, BadModel, UsageError
from advkit.core.protocols import Outcome, Record
from advkit.core.smoothing import largest_radius, radius
from advkit.core.spaces import Box
from advkit.evaluation.api import resolve
from advkit.evaluation.certificates import certificates, curve, refuted
from advkit.evaluation.report import Report
from advkit.evaluation.report.merge import merge
from advkit.evaluation.report.ranking import scan
from advkit.evaluation.report.verify import verify
from advkit.evaluation.run.store import read_records
from advkit.models.torch import TorchModel

DIGITS = {"task": "digits", "model": "zoo:digits-mlp", "device": "cpu"}
FEW = "certified:n0=64,n=512,radii=0+0.1+0.3+0.6"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("certified") / "run"
    advkit.certify("smoothing:sigma=0.25", threat_model=FEW, n=24, out=folder, **DIGITS)
    return folder


@pytest.mark.slow
def test_records_hold_counts_and_the_report_follows_from_them(run):
    report, records = Report.load(run), read_records(run / "records.jsonl")
    assert len(records) == 24
    for record in records:
        told = record.measures
        assert (told["n0"], told["n"], told["sigma"]) == (64, 512, 0.25)
        assert 0 < told["k0"] <= 64
        assert record.forwards == 576
        assert not {"radius", "certified"} & told.keys()
    proven = {
        record.id: radius(record.measures["k"], 512, 0.25, 0.001)
        for record in records
        if record.measures["class"] == record.label
    }
    curve = report.metrics["certified_accuracy"]
    for point in curve:
        right = sum(each > 0 and each >= point["radius"] for each in proven.values())
        assert point["certified_accuracy"]["numerator"] == right
        assert point["certified_accuracy"]["denominator"] == 24
        allowed, value = point["high_probability"]["value"], point["certified_accuracy"]["value"]
        assert allowed < value or value == 0 == allowed
    assert [point["radius"] for point in curve] == [0.0, 0.1, 0.3, 0.6]
    assert report.metrics["average_certified_radius"]["value"] == pytest.approx(sum(proven.values()) / 24)
    assert report.clean_accuracy == curve[0]["certified_accuracy"]["value"]
    abstained = sum(radius(r.measures["k"], 512, 0.25, 0.001) == 0 for r in records)
    assert report.metrics["abstention_rate"]["numerator"] == abstained
    assert verify(report).faults == ()
    assert verify(report).mark == "yes"


def test_the_curve_falls_and_ends_at_what_the_draws_can_certify(run):
    report = Report.load(run)
    values = [point["certified_accuracy"]["value"] for point in report.metrics["certified_accuracy"]]
    assert values == sorted(values, reverse=True)
    assert 0.5 < values[1] <= 1
    cap = largest_radius(512, 0.25, 0.001)
    assert report.metrics["largest_certifiable_radius"]["value"] == pytest.approx(cap)
    assert values[-1] == 0 if cap < 0.6 else True
    assert (cap < 0.6) == any(flag["id"] == "too_few_draws" for flag in report.flags)


def test_the_report_names_the_draws_and_says_whether_it_is_sound(run):
    data = Report.load(run).to_dict()
    details = data["threat_model"]["details"]
    assert {"n0": 64, "n": 512, "alpha": 0.001}.items() <= details.items()
    assert data["defense"]["params"]["sigma"] == 0.25
    assert data["defense"]["certified"]
    assert "mt19937" in data["reproducibility"]["rng_scheme"]
    assert any(flag["id"] == "unsound_arithmetic" for flag in data["diagnostics"]["flags"])
    assert "robust_accuracy" not in data["metrics"]
    assert data["attacks"] == []
    assert data["request"]["attack"] == "none"


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_records(run, tmp_path):
    other = tmp_path / "cut"
    advkit.certify("smoothing:sigma=0.25", threat_model=FEW, n=24, out=other, batch_size=5, **DIGITS)
    file = other / "records.jsonl"
    whole = file.read_bytes()
    assert whole == (run / "records.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:9]) + lines[9][:40])  # killed while it wrote
    for rest in ("report.json", "records.seconds.jsonl"):
        (other / rest).unlink()
    advkit.certify("smoothing:sigma=0.25", threat_model=FEW, n=24, out=other, **DIGITS)
    assert file.read_bytes() == whole


def test_another_seed_draws_other_noise(run):
    again = advkit.certify("smoothing:sigma=0.25", threat_model=FEW, n=24, seed=1, **DIGITS)
    before = Report.load(run).metrics["average_certified_radius"]["value"]
    assert again.metrics["average_certified_radius"]["value"] != before
    assert again.metrics["average_certified_radius"]["value"] == pytest.approx(before, abs=0.05)


@pytest.mark.parametrize(
    ("where", "change", "fault"),
    [
        ("report", lambda data: data["metrics"]["certified_accuracy"][1]["certified_accuracy"], "certified_accuracy"),
        ("report", lambda data: data["metrics"]["abstention_rate"], "abstention_rate"),
    ],
)
def test_an_edited_figure_is_found(run, tmp_path, where, change, fault):
    from advkit.evaluation.stats import rate

    data = json.loads((run / "report.json").read_text())
    entry = change(data)
    entry.update(rate(entry["numerator"] - 1 if fault.startswith("certified") else 23, 24, "all_samples"))
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("records.jsonl", "records.case.json"):
        (copy / name).write_bytes((run / name).read_bytes())
    (copy / "report.json").write_text(json.dumps(data))
    assert any(fault in each for each in verify(Report.load(copy)).faults)


def copied(run, folder):
    folder.mkdir()
    for name in ("report.json", "records.jsonl", "records.case.json"):
        (folder / name).write_bytes((run / name).read_bytes())
    return folder


@pytest.mark.parametrize("key", ["n", "n0"])
def test_votes_of_another_number_of_draws_are_found(run, tmp_path, key):
    copy = copied(run, tmp_path / "run")
    data = json.loads((run / "report.json").read_text())
    data["threat_model"]["details"][key] -= 1
    (copy / "report.json").write_text(json.dumps(data))
    assert any("n and n0" in each for each in verify(Report.load(copy)).faults)


def test_a_high_probability_that_was_edited_is_found(run, tmp_path):
    copy = copied(run, tmp_path / "run")
    data = json.loads((run / "report.json").read_text())
    data["metrics"]["certified_accuracy"][1]["high_probability"]["value"] += 0.1
    (copy / "report.json").write_text(json.dumps(data))
    assert any("certified_accuracy" in each for each in verify(Report.load(copy)).faults)


def test_a_negative_slack_is_found(run, tmp_path):
    copy = copied(run, tmp_path / "run")
    lines = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    first = next(line for line in lines if "slack" in line.get("measures", {}))
    first["measures"]["slack"] = -0.4
    (copy / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert any("slack" in each for each in verify(Report.load(copy)).faults)


def test_an_edited_sigma_or_alpha_is_found(run, tmp_path):
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("records.jsonl", "records.case.json"):
        (copy / name).write_bytes((run / name).read_bytes())
    for path, value in ((("threat_model", "details", "alpha"), 0.2), (("defense", "params", "sigma"), 0.5)):
        data = json.loads((run / "report.json").read_text())
        part = data
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = value
        (copy / "report.json").write_text(json.dumps(data))
        assert any(path[-1] in each for each in verify(Report.load(copy)).faults)


@pytest.fixture(scope="module")
def attacked(run) -> Path:
    folder = run.parent / "attacked"
    guard = "smoothing:sigma=0.25,n_predict=100"
    advkit.evaluate("pgd:steps=2", guard, threat_model="l2:eps=0.1", n=24, beside=False, out=folder, **DIGITS)
    return folder


def test_certificates_are_ranked_apart_from_what_survived_attacks(run, attacked):
    board = scan(run.parent)
    assert sorted(group.evidence for group in board.groups) == ["certified", "empirical"]
    (proven,) = (group for group in board.groups if group.evidence == "certified")
    assert proven.radius == 0.1
    assert proven.victims[0].verified.startswith(("yes", "partly"))
    assert proven.to_dict()["radius"] == 0.1


@pytest.mark.slow
def test_no_attack_within_a_certified_radius_finds_another_class():
    """The law: certified <= empirical on the same samples, under EOT-PGD in the same ball."""
    report = advkit.certify(
        "smoothing:sigma=0.25,n_predict=400",
        threat_model="certified:n0=64,n=1024,radii=0.2",
        attack="pgd:steps=8,eot=2",
        n=24,
        **DIGITS,
    )
    (point,) = report.metrics["certified_accuracy"]
    empirical = report.metrics["empirical_robust_accuracy"]
    assert point["certified_accuracy"]["denominator"] == empirical["denominator"] == 24
    assert point["certified_accuracy"]["numerator"] <= empirical["numerator"]
    assert point["certified_accuracy"]["numerator"] > 5
    assert not any(flag["id"] == "certificate_violated" for flag in report.flags)
    assert report.to_dict()["companions"][0]["metric"] == "empirical_robust_accuracy"


def test_certificates_are_never_compared_with_what_survived_an_attack(run, attacked):
    from advkit.evaluation.report.compare import compare

    with pytest.raises(UsageError, match="never compared"):
        compare(run, attacked, force=True)
    assert "in certified accuracy at any radius between" in compare(run, run).sentence()


def test_a_refuted_certificate_is_found():
    votes = {"class": 3, "k": 990, "n": 1000, "sigma": 0.25}
    proven = [Record(name, "certify", Outcome.ROBUST, label=3, clean=3, measures=votes) for name in "abc"]
    ended = [("a", Outcome.ROBUST, 3), ("b", Outcome.BROKEN, 7), ("c", Outcome.BROKEN, -1)]
    attacked = [Record(name, "pgd", end, label=3, clean=3, adversarial=to) for name, end, to in ended]
    assert refuted(proven, attacked, 0.001, 0.25) == ["b"]
    assert refuted(proven, attacked, 0.001, 2.0) == []


@pytest.mark.slow
def test_early_ends_take_certificates_away_and_give_none():
    settings = {"n": 40, **DIGITS, "threat_model": "certified:n0=64,n=2048,radii=0+0.2"}
    full = advkit.certify("smoothing:sigma=0.6", **settings)
    settings["threat_model"] += ",early=true"
    early = advkit.certify("smoothing:sigma=0.6", **settings)
    names = ("certified_accuracy", "average_certified_radius", "abstention_rate")
    one, other = ([report.metrics[name] for name in names] for report in (full, early))
    assert one[0] == other[0]
    assert one[1]["value"] == other[1]["value"]
    assert other[2]["numerator"] >= one[2]["numerator"] > 0
    assert early.metrics["noisy_copies"]["value"] < full.metrics["noisy_copies"]["value"]


class _Blind(nn.Module):
    """Class by the first feature; NaN wherever that is above a limit."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, x):
        first = x.flatten(1)[:, :1]
        answer = torch.cat([1 - first, first], 1)
        return torch.where(first > self.limit, torch.nan, answer)


def rows(values) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.tensor(values, dtype=torch.float32)[:, None].expand(-1, 6).contiguous()
    return x, (x[:, 0] > 0.5).long()


def blind(limit: float) -> TorchModel:
    return TorchModel(_Blind(limit).eval(), Box(shape=(6,)), 2)


def test_votes_of_nan_are_counted_for_no_class_and_flagged():
    report = advkit.certify(
        "smoothing:sigma=0.1", rows([0.0, 0.9]), blind(0.9), "certified:n0=64,n=512,radii=0+0.1", device="cpu"
    )
    assert report.clean_accuracy == 0.5  # half of the votes around 0.9 are lost, and a half is no majority
    assert any(flag["id"] == "non_finite_votes" for flag in report.flags)
    assert report.metrics["non_finite_votes"]["value"] == pytest.approx(0.25, abs=0.05)


def test_a_sample_without_any_finite_vote_is_undecided():
    report = advkit.certify(
        "smoothing:sigma=0.01", rows([0.0, 0.8]), blind(0.6), "certified:n0=64,n=512,radii=0", device="cpu"
    )
    assert report.clean_accuracy == 0.5
    # it has no certificate, and every one of its votes was lost
    assert (report.metrics["abstention_rate"]["numerator"], report.metrics["abstention_rate"]["denominator"]) == (1, 2)
    assert report.metrics["non_finite_votes"]["numerator"] == 64
    assert any(flag["id"] == "non_finite_votes" for flag in report.flags)


class _Growing(nn.Module):
    def forward(self, x):
        return torch.zeros(len(x), 3)


def test_what_can_not_be_certified_is_a_clear_line(tmp_path):
    def certify(*args, **settings):
        return advkit.certify(*args, **{"n": 2, "device": "cpu", "out": tmp_path / "run", **settings})

    few = "certified:n0=16,n=16"
    with pytest.raises(UsageError, match="only smoothed models are certified"):
        certify("none", threat_model=few, **DIGITS)
    with pytest.raises(UsageError, match="full precision"):
        certify(threat_model=few, speed="bf16", **DIGITS)
    with pytest.raises(UsageError, match="leave --goal targeted out"):
        certify(threat_model=few, goal="targeted", **DIGITS)
    with pytest.raises(BadModel, match=r"3 classes, the task digits has 10"):
        certify("smoothing", "digits", TorchModel(_Growing().eval(), Box(shape=(1, 8, 8)), 3), few)
    with pytest.raises(BadInput, match="no 8-bit images"):
        certify("smoothing:noise=lattice", threat_model=few, **DIGITS)
    for spec in ("n=0", "n0=0", "alpha=0", "alpha=1", "radii=0.1+-0.2", "memory=0"):
        with pytest.raises(UsageError, match=spec.partition("=")[0]):
            certify(threat_model=f"certified:{spec}", **DIGITS)
    assert not (tmp_path / "run" / "records.jsonl").exists()


@pytest.mark.slow
def test_lattice_noise_is_sound_and_says_so():
    x, y = rows([51 / 255, 230 / 255, 100 / 255])
    report = advkit.certify(
        "smoothing:sigma=0.25,noise=lattice",
        (x, y),
        blind(math.inf),
        "certified:n0=64,n=1024,radii=0+0.1",
        device="cpu",
    )
    assert not any(flag["id"] == "unsound_arithmetic" for flag in report.flags)
    assert "sound in floating point" in report.to_dict()["section"]["sentence"]
    assert "sfc64" in report.to_dict()["reproducibility"]["rng_scheme"]
    assert report.clean_accuracy > 0.5


@pytest.mark.slow
def test_shards_add_up():
    x, y = rows(np.linspace(0.05, 0.95, 12))
    settings = {"threat_model": "certified:n0=64,n=512,radii=0+0.05+0.2", "device": "cpu"}
    whole = advkit.certify("smoothing:sigma=0.25", (x, y), blind(math.inf), **settings)
    parts = []
    for half in (slice(0, 5), slice(5, 12)):
        one = advkit.certify("smoothing:sigma=0.25", (x[half], y[half]), blind(math.inf), **settings).to_dict()
        one["dataset"] |= {"n_total": 12, "sha256": "0" * 64, "selection": {"kind": "explicit_ids"}}
        one["model"]["state_sha256"] = "1" * 64
        parts.append(Report.from_dict(one))
    merged = merge(*parts).metrics
    assert [p["certified_accuracy"]["denominator"] for p in merged["certified_accuracy"]] == [12] * 3
    value = sum(part.metrics["average_certified_radius"]["value"] * n for part, n in zip(parts, (5, 7), strict=True))
    assert merged["average_certified_radius"]["value"] == pytest.approx(value / 12)
    assert merged["abstention_rate"]["denominator"] == 12
    # The rows of the halves have ids, and so noise, of their own: the same within the noise of 512 draws.
    whole_radius = whole.metrics["average_certified_radius"]["value"]
    assert merged["average_certified_radius"]["value"] == pytest.approx(whole_radius, abs=0.03)


def test_a_curve_of_no_samples_has_no_value():
    assert curve([], [0.0], 0.001)[0]["certified_accuracy"]["value"] is None
    assert certificates([], 0.001) == []


def test_the_curve_is_drawn(run):
    from advkit.evaluation.figures import write_plots

    (file,) = write_plots(run)
    assert file.name == "certified_curve.png"
    assert file.stat().st_size > 5000


@pytest.mark.slow
def test_verdicts_of_a_smoothed_model_do_not_depend_on_the_batch(tmp_path):
    settings = {"attack": "pgd:steps=2,eot=2", "defense": "smoothing:sigma=0.25,n_predict=100"}
    found = []
    for size in (16, 5):
        out = tmp_path / str(size)
        advkit.evaluate(**settings, threat_model="l2:eps=0.4", n=20, batch_size=size, out=out, **DIGITS)
        found.append([(out / name).read_bytes() for name in ("records.jsonl", "beside.jsonl")])
    assert found[0] == found[1]
    report = Report.load(tmp_path / "16")
    assert report.to_dict()["protocol"]["n_eval_repeats"] == 1  # one answer is a vote of 100 already
    assert report.metrics["abstained_clean"]["denominator"] == 20
    assert verify(report).faults == ()


def test_queries_are_answered_by_votes():
    """An attacker with scores asks the smoothed model as it is deployed."""
    case = resolve(
        "square:queries=3", "smoothing:sigma=0.25,n_predict=64", threat_model="l2:eps=0.4,access=scores", n=4, **DIGITS
    )
    from advkit.evaluation.run.attempts import attacked_model

    model, decides = attacked_model(case)
    assert model is case.victim
    assert not decides
    assert case.draws == 1
    assert replace(case, draws=10).draws == 10


@pytest.mark.slow
def test_worker_processes_make_the_same_records(run, tmp_path):
    advkit.certify("smoothing:sigma=0.25", threat_model=FEW, n=24, out=tmp_path / "w", workers=2, **DIGITS)
    assert (tmp_path / "w" / "records.jsonl").read_bytes() == (run / "records.jsonl").read_bytes()
