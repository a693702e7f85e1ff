"""The goal near: its figures by hand and by finite differences, files that are none, and what PGD makes of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import advkit
from advkit.core.errors import AdvkitError, BadInput, BadModel, UsageError
from advkit.core.rng import RowRng
from advkit.evaluation.report import leaderboard
from advkit.evaluation.run.store import read_records
from advkit.models import zoo
from advkit.tasks import TASKS
from advkit.threat_models import GOALS
from advkit.threat_models.goals.near import Near, NearRule

RNG = RowRng.from_ids(0, ["a"])
TASK = "fashion-mnist-captions"


@pytest.fixture(scope="module")
def victim():
    return zoo.load("fashion-mnist-dual-encoder")


@pytest.fixture
def target(victim, tmp_path: Path) -> Path:
    """The embedding of a test image of a sandal, not of norm 1."""
    with torch.no_grad():
        np.save(tmp_path / "target.npy", 3 * victim.embed(TASKS.build(TASK).rows.x[8:9])[0].numpy())
    return tmp_path / "target.npy"


def test_figures_by_hand() -> None:
    answer = torch.tensor([[0.5, 1.3], [0.2, 0.2], [torch.nan, 1.0]], dtype=torch.float64)
    goal = Near(torch.zeros(3, dtype=torch.long), similarity=0.6)
    torch.testing.assert_close(goal.loss(answer)[:2], torch.tensor([-0.9, -0.2], dtype=torch.float64))
    torch.testing.assert_close(goal.margin(answer), torch.tensor([-0.3, 0.4, torch.inf], dtype=torch.float64))
    assert goal.reached(answer).tolist() == [True, False, False]
    assert not goal.none_reached(answer)
    assert goal.none_reached(answer[1:2].expand(3, 2))
    assert goal.under("dlr") is goal
    assert goal.met_by_truth().tolist() == [False] * 3
    assert goal.take(torch.tensor([1])).reached(answer[1:2]).tolist() == [False]
    with pytest.raises(BadInput, match="take"):
        goal.loss(answer[:2])
    with pytest.raises(BadModel, match="decisions"):
        goal.loss(torch.zeros(3, dtype=torch.long))


def test_gradient_by_finite_differences(victim, target: Path) -> None:
    """Of the loss through the model, in float64, along random directions."""
    rule = NearRule(file=str(target))
    seen = rule.view(victim)
    module = seen.copy().module.double()
    x = TASKS.build(TASK).rows.x[:6].double().requires_grad_()
    goal = Near(torch.zeros(6, dtype=torch.long), similarity=0.9)
    (gradient,) = torch.autograd.grad(goal.loss(module(x)).sum(), x)
    generator, h = torch.Generator().manual_seed(0), 1e-6
    for _ in range(4):
        way = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            slope = (goal.loss(module(x + h * way)) - goal.loss(module(x - h * way))) / (2 * h)
        torch.testing.assert_close((gradient * way).flatten(1).sum(1), slope, rtol=1e-5, atol=1e-8)


def test_the_loss_is_the_cosine_of_the_models_own_embedding(victim, target: Path) -> None:
    x, vector = TASKS.build(TASK).rows.x[:6], torch.from_numpy(np.load(target))
    goal = NearRule(file=str(target))(torch.zeros(6, dtype=torch.long), victim(x), RNG)
    with torch.no_grad():
        expected = cosines(victim.network.encode(x), vector)
        torch.testing.assert_close(-goal.loss(NearRule(file=str(target)).view(victim)(x)), expected, atol=2e-6, rtol=0)


def cosines(raw: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(raw, vector.unsqueeze(0), dim=1)


@pytest.mark.slow
def test_pgd_raises_the_similarity_and_leaves_accuracy_a_matter_of_classes(
    target: Path, tmp_path: Path, victim
) -> None:
    out = tmp_path / "run"
    near = advkit.evaluate(
        "pgd:steps=20", task=TASK, goal=f"near:file={target},similarity=0.7", n=40, device="cpu", out=out
    )
    plain = advkit.evaluate("pgd:steps=1", task=TASK, n=40, device="cpu")
    assert near.clean_accuracy == plain.clean_accuracy
    metrics = near.metrics
    assert metrics["similarity_after"]["value"] > metrics["similarity_before"]["value"] + 0.2
    # what the report says is what the model itself says of the samples that were kept
    records = {record.id: record for record in read_records(out / "records.jsonl")}
    vector = torch.from_numpy(np.load(target))
    kept = near.adversarial()
    assert len(kept) == 40
    for name, origin, adversarial in zip(kept.ids, kept.clean, kept.adversarial, strict=True):
        record = records[name]
        if record.outcome == "wrong":
            continue
        with torch.no_grad():
            before, after = cosines(victim.network.encode(torch.stack([origin, adversarial])), vector).tolist()
        assert record.figures["similarity_before"] == pytest.approx(before, abs=1e-5)
        assert record.figures["similarity_after"] == pytest.approx(after, abs=1e-5)
        assert record.reached == (record.figures["similarity_after"] > 0.7)
        assert after > before
        assert record.margin == pytest.approx(0.7 - after, abs=1e-5)
    # samples that are near when clean are not contested: a right class says nothing of the embedding
    contested = sum(record.figures["similarity_before"] <= 0.7 for record in records.values())
    assert metrics["attack_success_rate"]["denominator"] == contested
    assert metrics["attack_success_rate"]["denominator_kind"] == "clean_not_target"
    assert "recall_at_1_image_to_text" in metrics
    assert "recall_at_1_text_to_image" not in metrics  # the shift would make nonsense of it


@pytest.mark.slow
def test_through_a_defense_and_its_undefended_companion(target: Path) -> None:
    report = advkit.evaluate(
        "pgd:steps=5",
        defense="bit-depth:bits=3",
        task=TASK,
        goal=f"near:file={target},similarity=0.5",
        n=24,
        device="cpu",
    )
    assert "oblivious_attack_success_rate" in report.metrics
    assert report.metrics["similarity_after"]["value"] > report.metrics["similarity_before"]["value"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.zeros(128), "norm 0"),
        (np.array([1.0, np.nan]), "NaN or infinity"),
        (np.ones((2, 3, 4)), "expected one vector"),
        (np.ones((5, 3)), "say which: row=0 to row=4"),
        (np.array(["a"]), "is said to be|real numbers"),
        (np.array([1j]), "real numbers"),
        (np.zeros(0), "expected one vector"),
        (np.ones(3), "embeddings of 128 numbers"),
    ],
)
def test_vectors_that_are_none(values: np.ndarray, said: str, tmp_path: Path, victim) -> None:
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(AdvkitError, match=said) as error:
        NearRule(file=str(tmp_path / "a.npy")).view(victim)
    assert "\n" not in str(error.value)


def test_large_numbers_do_not_overflow(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([3e300, 4e300]))
    np.testing.assert_allclose(NearRule(file=str(tmp_path / "a.npy")).vector().numpy(), [0.6, 0.8])


def test_every_kind_of_file(tmp_path: Path) -> None:
    vectors = np.arange(12, dtype=np.float32).reshape(3, 4) + 1
    np.save(tmp_path / "a.npy", vectors)
    np.savez(tmp_path / "a.npz", one=vectors, other=vectors[0])
    save_file({"one": vectors, "other": vectors[0]}, tmp_path / "a.safetensors")
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for spec, row in (
        ("a.npy,row=1", 1),
        ("a.npz,key=one,row=2", 2),
        ("a.npz,key=other", 0),
        ("a.safetensors,key=one,row=1", 1),
        ("a.safetensors,key=other", 0),
    ):
        np.testing.assert_allclose(GOALS.build(f"near:file={tmp_path}/{spec}").vector().numpy(), unit[row], rtol=1e-6)
    for spec, said in (
        ("a.npz,row=1", "say which one with key="),
        ("a.npz,key=third", "no array 'third'"),
        ("a.npy,key=one", "without a name"),
        ("a.npy,row=3", "expected 0 to 2"),
        ("a.safetensors,key=other,row=0", "expected several vectors"),
        ("b.npy", "there is no file"),
        ("a.txt", "no .npy, .npz or .safetensors"),
    ):
        with pytest.raises(BadInput, match=said):
            GOALS.build(f"near:file={tmp_path}/{spec}").vector()


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.safetensors"])
def test_damaged_files(name: str, tmp_path: Path) -> None:
    for content in (b"", b"x" * 100):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadInput, match=r"can't be read|no archive|expected a vector"):
            NearRule(file=str(tmp_path / name), similarity=0.5 + len(content) / 1000).vector()


def test_pickles_are_not_read(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(BadInput, match="can't be read"):
        NearRule(file=str(tmp_path / "a.npy")).vector()


def test_a_model_without_embeddings(target: Path) -> None:
    for more in ({}, {"defense": "bit-depth"}):
        with pytest.raises(BadModel, match="reads embeddings"):
            advkit.evaluate("pgd", task="fashion-mnist", goal=f"near:file={target}", n=4, device="cpu", **more)


def test_surrogates_have_no_such_view(target: Path) -> None:
    with pytest.raises(UsageError, match="attack the victim itself"):
        advkit.evaluate(
            "pgd",
            task=TASK,
            goal=f"near:file={target}",
            threat_model="transfer:sources=zoo:fashion-mnist-public-cnn",
            n=4,
            device="cpu",
        )


@pytest.mark.parametrize("similarity", [-1.0, 1.0, float("nan")])
def test_similarities_out_of_range(similarity: float) -> None:
    with pytest.raises(UsageError, match="cosine"):
        NearRule(file="a.npy", similarity=similarity)


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    rule = NearRule(file=str(tmp_path / "a.npy"))
    seen = set()
    for place in (0, 1):
        np.save(tmp_path / "a.npy", np.eye(4)[place])
        assert rule.vector().argmax() == place
        seen.add(rule.content_sha256)
    assert len(seen) == 2
    np.save(tmp_path / "b.npy", np.eye(4, dtype=np.float32))
    assert NearRule(file=str(tmp_path / "b.npy"), row=1).content_sha256 == rule.content_sha256


@pytest.mark.parametrize("name", ["~nobody-of-this-name/a.npy", "a" * 5000 + ".npy"])
def test_names_that_are_no_path(name: str) -> None:
    with pytest.raises(BadInput, match="is no path") as error:
        NearRule(file=name).vector()
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_two_vectors_are_not_one_ranking(target: Path, tmp_path: Path) -> None:
    boards = []
    for place in ("one", "two"):
        report = advkit.evaluate(
            "fgsm", task=TASK, goal=f"near:file={target}", n=4, device="cpu", out=tmp_path / place, beside=False
        )
        boards.append(report.to_dict()["threat_model"]["details"]["goal_sha256"])
        np.save(target, -np.load(target))
    assert boards[0] != boards[1]
    found = leaderboard.scan(tmp_path)
    assert not found.invalid
    assert [len(group.victims) for group in found.groups] == [1, 1]
