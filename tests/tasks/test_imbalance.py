"""`imbalance`: some classes keep a share of their training samples, every other sample of every split stays."""

from __future__ import annotations

import gzip
import math
import pickle
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from advkit.cli.main import run
from advkit.core.errors import UsageError
from advkit.evaluation.victims import protected
from advkit.tasks import TASKS

CLASSES = (1, 3, 5, 8, 9)
WHOLE = TASKS.build("digits")


def places(whole: torch.Tensor, part: torch.Tensor) -> list[int]:
    """Where the rows of a part stand in the whole."""
    where = {row.numpy().tobytes(): place for place, row in enumerate(whole)}
    assert len(where) == len(whole)
    return [where[row.numpy().tobytes()] for row in part]


@pytest.mark.parametrize("share", [0.05, 0.2, 0.29, 1 / 3, 0.7, 0.99])
def test_the_documented_samples_are_dropped_and_no_others(share: float) -> None:
    data = WHOLE.training()
    thin = TASKS.build(f"digits:imbalance={share!r}").training()
    exact = Fraction(share).limit_denominator(10**6)
    seen: Counter[int] = Counter()
    expected = []
    for place, label in enumerate(data.y.tolist()):
        seen[label] += 1
        i = seen[label]
        if label not in CLASSES or math.floor(i * exact) > math.floor((i - 1) * exact):
            expected.append(place)
    assert torch.equal(thin.x, data.x[expected])
    assert torch.equal(thin.y, data.y[expected])
    counts, before = Counter(thin.y.tolist()), Counter(data.y.tolist())
    for label in range(10):
        assert counts[label] == (math.floor(before[label] * exact) if label in CLASSES else before[label])


def test_a_fifth_is_every_fifth_and_spread_over_the_set() -> None:
    data = WHOLE.training()
    thin = TASKS.build("digits:imbalance=0.2,imbalance_classes=7").training()
    assert places(data.x, thin.x[thin.y == 7]) == (data.y == 7).nonzero().squeeze(1).tolist()[4::5]
    assert torch.equal(thin.x[thin.y != 7], data.x[data.y != 7])


def test_the_test_split_stays_and_the_train_split_is_thinned_under_its_own_ids() -> None:
    thin = TASKS.build("digits:imbalance=0.2,imbalance_classes=1+3+5+8+9")
    assert thin.digest() == WHOLE.digest()
    attacked = TASKS.build("digits:imbalance=0.2,split=train")
    whole = TASKS.build("digits:split=train")
    named = dict(zip(whole.ids, whole.rows.x, strict=True))
    assert len(attacked) == len(thin.training()) < len(whole)
    assert torch.equal(attacked.rows.x, thin.training().x)
    assert all(torch.equal(named[name], row) for name, row in zip(attacked.ids, attacked.rows.x, strict=True))


def test_one_keeps_every_sample() -> None:
    one = TASKS.build("digits:imbalance=1")
    assert torch.equal(one.training().x, WHOLE.training().x)
    assert TASKS.spec(one) == "digits"
    assert TASKS.spec(TASKS.build("digits:imbalance=0.2,imbalance_classes=3+1")) == (
        "digits:imbalance=0.2,imbalance_classes=3+1"
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("imbalance=0", "imbalance is 0.0"),
        ("imbalance=-0.5", "imbalance is -0.5"),
        ("imbalance=1.5", "imbalance is 1.5"),
        ("imbalance=nan", "imbalance expects"),
        ("imbalance=0.2,imbalance_classes=10", "0 to 9"),
        ("imbalance=0.2,imbalance_classes=-1", "0 to 9"),
        ("imbalance=0.2,imbalance_classes=1+1", "different numbers"),
        ("imbalance_classes=1+3", "say which: imbalance=0.2"),
        ("imbalance=0.2,imbalance_classes=one", "imbalance_classes expects"),
        ("imbalance=0.001", "no training sample of class 1"),
        ("imbalance=0.000000001", "no training sample of class 1"),
    ],
)
def test_nonsense_ends_with_one_line_and_status_2(
    settings: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = run(["train", "--task", f"digits:{settings}", "--out", str(tmp_path / "run")])
    shown = " ".join(capsys.readouterr().err.split())
    assert status == 2
    assert said in shown
    assert "Traceback" not in shown


def test_the_smallest_share_that_leaves_a_sample_is_taken() -> None:
    rows = Counter(WHOLE.training().y.tolist())[1]
    task = TASKS.build(f"digits:imbalance=1/{rows},imbalance_classes=1")
    assert Counter(task.training().y.tolist())[1] == 1
    with pytest.raises(UsageError, match=f"1/{rows}"):
        TASKS.build(f"digits:imbalance=1/{rows + 1},imbalance_classes=1").training()


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(length.to_bytes(4, "big") for length in array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes(), mtime=0))


def write_fashion(folder: Path) -> None:
    draws = np.random.default_rng(0)
    for stem, rows in (("train", 400), ("t10k", 30)):
        write_idx(folder / f"{stem}-images-idx3-ubyte.gz", draws.integers(0, 256, (rows, 28, 28)).astype(np.uint8))
        write_idx(folder / f"{stem}-labels-idx1-ubyte.gz", (np.arange(rows) % 10).astype(np.uint8))


def write_cifar(folder: Path, monkeypatch: pytest.MonkeyPatch, classes: int) -> None:
    """Files as torchvision reads them; their checksums are of random images."""
    from torchvision.datasets import CIFAR10, CIFAR100

    reader: Any = CIFAR10 if classes == 10 else CIFAR100
    draws = np.random.default_rng(1)
    place = folder / reader.base_folder
    place.mkdir()
    for name, _ in (*reader.train_list, *reader.test_list):
        rows = 100 * (len(reader.train_list) == 1) * 4 or 80
        labels = [i % classes for i in range(rows)]
        held = {"data": draws.integers(0, 256, (rows, 3072)).astype(np.uint8), "labels": labels, "fine_labels": labels}
        (place / name).write_bytes(pickle.dumps(held))
    (place / reader.meta["filename"]).write_bytes(pickle.dumps({reader.meta["key"]: list(map(str, range(classes)))}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10", "cifar100"])
def test_other_tasks_drop_by_the_same_rule(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "fashion-mnist":
        write_fashion(tmp_path)
    else:
        write_cifar(tmp_path, monkeypatch, 100 if name == "cifar100" else 10)
    whole = TASKS.build(f"{name}:root={tmp_path}")
    data = whole.training()
    size = 300 if name != "cifar100" else 400
    share = 0.25
    thin = TASKS.build(f"{name}:root={tmp_path},train={size},imbalance={share}")
    seen: Counter[int] = Counter()
    expected = []
    for place, label in enumerate(data.y[:size].tolist()):
        seen[label] += 1
        if label % 10 not in CLASSES or seen[label] % 4 == 0:
            expected.append(place)
    assert 0 < len(expected) < size
    assert torch.equal(thin.training().x, data.x[expected])
    assert torch.equal(thin.training().y, data.y[expected])
    assert thin.digest() == whole.digest()
    train = TASKS.build(f"{name}:root={tmp_path},train={size},imbalance={share},split=train")
    assert train.ids == tuple(f"{name}/train/{place:05d}" for place in expected)
    assert torch.equal(train.rows.x, thin.training().x)


def test_the_zoo_gives_no_victim_for_another_training_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADVKIT_CACHE", str(tmp_path))
    defense = "pgd_at:eps=0.2,steps=7"
    assert protected(None, defense, WHOLE).origin.startswith("zoo:")
    thin = TASKS.build("digits:imbalance=0.2")
    short = "none:recipe=[epochs=1]"
    assert protected(None, "none", WHOLE).origin.startswith("zoo:")
    assert protected(None, short, thin).origin.startswith("trained here")
    assert not thin.trains_on_all
    assert not TASKS.build("fashion-mnist:train=500").trains_on_all
    assert not TASKS.build("cifar10:train=500").trains_on_all
    assert not TASKS.build("fashion-mnist-dvs:train=500").trains_on_all
    for name in TASKS.names():
        if name in ("digits", "fashion-mnist", "cifar10", "cifar100", "digits-dvs", "fashion-mnist-dvs"):
            assert TASKS.build(name).trains_on_all
