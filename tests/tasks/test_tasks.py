"""Tasks: fixed rows under fixed ids, hashes of every byte, readers against files made here, refusals with a reason."""

from __future__ import annotations

import gzip
import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from advkit.core.errors import BadInput, UsageError
from advkit.core.spaces import Box
from advkit.tasks import TASKS
from advkit.tasks.arrays import Arrays
from advkit.tasks.fashion_mnist import EMBEDDED, embedded

GENERATOR = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ADVKIT_DATA", raising=False)


def write_idx(path: Path, array: np.ndarray, zipped: bool = True) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(length.to_bytes(4, "big") for length in array.shape)
    content = header + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content, mtime=0) if zipped else content)


def write_fashion(folder: Path, train: int = 30, test: int = 20, zipped: bool = True) -> dict[str, np.ndarray]:
    held = {}
    for stem, rows in (("train", train), ("t10k", test)):
        held[stem] = GENERATOR.integers(0, 256, (rows, 28, 28)).astype(np.uint8)
        held[f"{stem}-labels"] = GENERATOR.integers(0, 10, rows).astype(np.uint8)
        end = ".gz" if zipped else ""
        write_idx(folder / f"{stem}-images-idx3-ubyte{end}", held[stem], zipped)
        write_idx(folder / f"{stem}-labels-idx1-ubyte{end}", held[f"{stem}-labels"], zipped)
    return held


class TestFashionMnist:
    def test_embedded_rows(self) -> None:
        task = TASKS.build("fashion-mnist")
        images, labels = embedded()
        assert len(task) == EMBEDDED == 1_000
        assert task.rows.ids[17] == "fashion-mnist/test/00017"
        assert torch.equal((task.rows.x * 255).round().to(torch.uint8), torch.from_numpy(images.copy()).unsqueeze(1))
        assert torch.equal(task.rows.x, (task.rows.x * 255).round() / 255)
        assert task.rows.y.tolist() == labels.tolist()
        # the first labels of the published test file, and the counts of its first thousand
        assert labels[:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]
        assert np.bincount(labels).tolist() == [107, 105, 111, 93, 115, 87, 97, 95, 95, 95]
        assert task.training() is None
        assert task.class_names()[9] == "Ankle boot"

    def test_digest_is_the_documented_bytes(self) -> None:
        task = TASKS.build("fashion-mnist:test=3")
        x, y, ids = task.rows.x, task.rows.y, task.rows.ids
        expected = hashlib.sha256(x.numpy().tobytes() + y.numpy().tobytes() + "\n".join(ids).encode()).hexdigest()
        assert task.digest() == expected
        assert TASKS.build("fashion-mnist:test=4").digest() != expected
        assert TASKS.build("fashion-mnist:test=3,size=14").digest() != expected

    @pytest.mark.parametrize("size", [14, 7, 4])
    def test_smaller_images_are_block_means(self, size: int) -> None:
        whole = TASKS.build("fashion-mnist:test=5").rows.x
        small = TASKS.build(f"fashion-mnist:test=5,size={size}")
        assert torch.allclose(small.rows.x, torch.nn.functional.avg_pool2d(whole, 28 // size), atol=1e-6)
        assert small.space.shape == (1, size, size)

    @pytest.mark.parametrize("place", [".", "raw", "FashionMNIST/raw"])
    @pytest.mark.parametrize("zipped", [True, False])
    def test_folder_of_the_published_files(self, tmp_path: Path, place: str, zipped: bool) -> None:
        held = write_fashion(tmp_path / place, zipped=zipped)
        task = TASKS.build(f"fashion-mnist:root={tmp_path},train=25")
        assert torch.equal((task.rows.x * 255).round().to(torch.uint8).squeeze(1), torch.from_numpy(held["t10k"]))
        assert task.rows.y.tolist() == held["t10k-labels"].tolist()
        data = task.training()
        assert len(data) == 25
        assert torch.equal((data.x * 255).round().to(torch.uint8).squeeze(1), torch.from_numpy(held["train"][:25]))
        assert data.y.tolist() == held["train-labels"][:25].tolist()
        assert data.classes == 10
        train = TASKS.build(f"fashion-mnist:root={tmp_path},split=train,train=3")
        assert train.rows.ids == tuple(f"fashion-mnist/train/0000{i}" for i in range(3))

    def test_torchvision_reads_the_same(self, tmp_path: Path) -> None:
        from torchvision.datasets import FashionMNIST

        write_fashion(tmp_path / "FashionMNIST" / "raw", zipped=False)
        theirs = FashionMNIST(str(tmp_path), train=True)
        ours = TASKS.build(f"fashion-mnist:root={tmp_path}").training()
        assert torch.equal((ours.x.squeeze(1) * 255).round().to(torch.uint8), theirs.data)
        assert torch.equal(ours.y, theirs.targets)

    def test_default_folder_gives_training_and_leaves_the_evaluation_alone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = TASKS.build("fashion-mnist").digest()
        write_fashion(tmp_path / "fashion-mnist", test=1_200)
        monkeypatch.setenv("ADVKIT_DATA", str(tmp_path))
        task = TASKS.build("fashion-mnist")
        assert task.digest() == before
        assert len(task.training()) == 30
        assert len(TASKS.build("fashion-mnist:test=1100")) == 1_100

    def test_refusals(self, tmp_path: Path) -> None:
        for spec in ("size=13", "size=1", "train=-1", "root=/no/such/folder", "test=1001", "split=train"):
            with pytest.raises(UsageError):
                _ = TASKS.build(f"fashion-mnist:{spec}").rows
        with pytest.raises(UsageError, match="t10k-images"):
            _ = TASKS.build(f"fashion-mnist:root={tmp_path}").rows
        write_fashion(tmp_path)
        with pytest.raises(UsageError, match="more samples"):
            TASKS.build(f"fashion-mnist:root={tmp_path},train=31").training()
        path = tmp_path / "t10k-images-idx3-ubyte.gz"
        whole = path.read_bytes()
        for damaged in (whole[:-50], b"not an idx file", gzip.compress(gzip.decompress(whole)[:-1])):
            path.write_bytes(damaged)
            with pytest.raises(BadInput):
                _ = TASKS.build(f"fashion-mnist:root={tmp_path}").rows


class TestDigits:
    def test_splits_are_scikit_learns_rows(self) -> None:
        from sklearn.datasets import load_digits

        held = load_digits()
        seen = set()
        for split, n in (("train", 1_437), ("test", 360)):
            task = TASKS.build(f"digits:split={split}")
            assert len(task) == n
            for row in (0, n // 2, n - 1):
                place = int(task.ids[row].rsplit("/", 1)[1])
                assert np.array_equal(task.rows.x[row, 0].numpy() * 16, held.images[place])
                assert int(task.rows.y[row]) == held.target[place]
            seen |= {name.rsplit("/", 1)[1] for name in task.ids}
            assert np.bincount(task.rows.y).min() > 0.06 * n
        assert len(seen) == 1_797
        data = TASKS.build("digits").training()
        assert torch.equal(data.x, TASKS.build("digits:split=train").rows.x)


class TestBatches:
    @pytest.mark.parametrize("size", [1, 7, 64, 1000])
    def test_same_rows_in_any_batches(self, size: int) -> None:
        task = TASKS.build("digits")
        batches = list(task.batches(size))
        assert torch.equal(torch.cat([batch.x for batch in batches]), task.rows.x)
        assert torch.equal(torch.cat([batch.labels for batch in batches]), task.rows.y)
        assert tuple(name for batch in batches for name in batch.ids) == task.ids
        assert max(len(batch.ids) for batch in batches) == min(size, 360)
        right = torch.nn.functional.one_hot(batches[0].labels, 10).float()
        assert not batches[0].goal.reached(right).any()
        assert batches[0].goal.reached(-right).all()

    def test_skip_and_n(self) -> None:
        task = TASKS.build("digits")
        skip = {task.ids[0], task.ids[8], task.ids[50]}
        got = tuple(name for batch in task.batches(4, skip=skip, n=20) for name in batch.ids)
        assert got == tuple(name for name in task.ids[:20] if name not in skip)
        assert list(task.batches(4, skip=set(task.ids))) == []
        for size, n in ((0, None), (4, 361), (4, 0)):
            with pytest.raises(UsageError):
                list(task.batches(size, n=n))

    def test_a_batch_is_the_callers(self) -> None:
        task = TASKS.build("digits")
        before = task.digest()
        next(iter(task.batches(8))).x.zero_()
        assert float(task.rows.x[:8].sum()) > 0
        assert task.digest() == before


class TestArrays:
    def test_defaults(self) -> None:
        x = torch.rand(4, 3, 5, 5)
        task = Arrays(x, [0, 2, 1, 2], training=(torch.rand(2, 3, 5, 5), [3, 0]))
        assert task.classes == 4
        assert task.space == Box(0.0, 1.0, (3, 5, 5))
        assert task.ids[3] == "arrays/test/00003"
        assert len(task.training()) == 2
        x.zero_()
        assert float(task.rows.x.sum()) > 0

    def test_bytes_become_fractions(self) -> None:
        images = GENERATOR.integers(0, 256, (3, 1, 2, 2)).astype(np.uint8)
        assert np.array_equal(Arrays(images, [0, 1, 0]).rows.x.numpy(), images.astype(np.float32) / np.float32(255))

    @pytest.mark.parametrize(
        ("x", "y", "more"),
        [
            (torch.full((2, 3), float("nan")), [0, 1], {}),
            (torch.full((2, 3), 1.5), [0, 1], {}),
            (torch.rand(2, 3) - 2, [0, 1], {}),
            (torch.rand(2, 3), [0, 1, 1], {}),
            (torch.rand(2, 3), [0, -1], {}),
            (torch.rand(2, 3), [0, 2], {"classes": 2}),
            (torch.rand(2, 3), [0.0, 1.0], {}),
            (torch.rand(2, 3), [[0], [1]], {}),
            (torch.ones(2, 3).long(), [0, 1], {}),
            (torch.rand(0, 3), torch.zeros(0).long(), {}),
            (torch.rand(2, 3), [0, 1], {"ids": ["same", "same"]}),
            (torch.rand(2, 3), [0, 1], {"ids": ["one"]}),
            (torch.rand(2, 3), [0, 1], {"labels": ["one"]}),
            (torch.rand(2, 3), [0, 1], {"training": (torch.rand(2, 4), [0, 1])}),
            ("nonsense", [0, 1], {}),
        ],
    )
    def test_refusals(self, x: object, y: object, more: dict[str, object]) -> None:
        with pytest.raises(BadInput):
            Arrays(x, y, **more)

    def test_labels_counted_from_one(self) -> None:
        with pytest.raises(BadInput, match="subtract one"):
            Arrays(torch.rand(2, 3), [1, 2], classes=2)


class TestNpz:
    def test_reads_what_numpy_wrote(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.npz"
        images = GENERATOR.integers(0, 256, (6, 4, 5, 3)).astype(np.uint8)
        labels = np.arange(6) % 3
        np.savez(path, x=images[:4], y=labels[:4], x_train=images[4:], y_train=labels[4:])
        task = TASKS.build(f"npz:path={path},layout=hwc")
        assert task.name == "mine"
        assert task.classes == 3
        assert task.ids[0] == "mine/test/00000"
        assert np.allclose(task.rows.x.permute(0, 2, 3, 1).numpy(), images[:4] / 255, atol=1e-7)
        assert task.training().y.tolist() == labels[4:].tolist()
        assert task.defaults.model == "cnn"

    def test_tabular_in_its_own_range(self, tmp_path: Path) -> None:
        path = tmp_path / "table.npz"
        np.savez(path, x=np.array([[-3.0, 4.0], [0.0, 1.0]]), y=np.array([0, 1]))
        task = TASKS.build(f"npz:path={path},low=-5,high=5")
        assert task.rows.x.tolist() == [[-3.0, 4.0], [0.0, 1.0]]
        assert task.training() is None
        with pytest.raises(BadInput, match=r"values in \[-3, 4\]"):
            _ = TASKS.build(f"npz:path={path}").rows

    def test_refusals(self, tmp_path: Path) -> None:
        path = tmp_path / "bad.npz"

        def rows() -> None:
            _ = TASKS.build(f"npz:path={path}").rows

        with pytest.raises(UsageError, match="no file"):
            rows()
        np.savez(path, data=np.zeros(3))
        with pytest.raises(UsageError, match="keys data"):
            rows()
        np.savez(path, x=np.zeros((1, 2)), y=np.zeros(1, int), x_train=np.zeros((1, 2)))
        with pytest.raises(UsageError, match="only one"):
            rows()
        sentinel = tmp_path / "sentinel"

        class Bomb:
            def __reduce__(self) -> tuple[object, tuple[str]]:
                return eval, (f"open({str(sentinel)!r}, 'w')",)

        np.savez(path, x=np.array([Bomb()], dtype=object), y=np.zeros(1, int))
        with pytest.raises(BadInput):
            rows()
        path.write_bytes(pickle.dumps({"x": 1}))
        with pytest.raises(BadInput):
            rows()
        assert not sentinel.exists()


def write_folder(root: Path, split: str, classes: tuple[str, ...] = ("cat", "dog"), each: int = 6) -> None:
    for number, name in enumerate(classes):
        (root / split / name).mkdir(parents=True)
        for i in range(each):
            pixels = np.full((20, 30, 3), (40 * number + i) % 256, dtype=np.uint8)
            Image.fromarray(pixels).save(root / split / name / f"{i}.png")


class TestFolder:
    def test_reads_crops_and_mixes(self, tmp_path: Path) -> None:
        root = tmp_path / "pets"
        write_folder(root, "test")
        write_folder(root, "train", each=2)
        task = TASKS.build(f"folder:path={root},resize=10,crop=8")
        assert task.name == "pets"
        assert task.class_names() == ("cat", "dog")
        assert task.shape == (3, 8, 8)
        batches = list(task.batches(5))
        x = torch.cat([batch.x for batch in batches])
        for row, name in enumerate(task.ids):
            _, split, kind, file = name.split("/")
            label = ("cat", "dog").index(kind)
            assert split == "test"
            assert int(torch.cat([batch.labels for batch in batches])[row]) == label
            assert torch.equal(x[row], torch.full((3, 8, 8), (40 * label + int(file[0])) / 255))
        assert len({name.split("/")[2] for name in task.ids[:6]}) == 2  # not sorted by class
        assert len(task.training()) == 4
        assert len(TASKS.build(f"folder:path={root},resize=10,crop=8,limit=3")) == 3

    def test_digest_sees_every_file(self, tmp_path: Path) -> None:
        root = tmp_path / "pets"
        write_folder(root, "test")
        spec = f"folder:path={root},resize=10,crop=8"
        first = TASKS.build(spec).digest()
        assert TASKS.build(spec).digest() == first
        assert TASKS.build(f"folder:path={root},resize=11,crop=8").digest() != first
        Image.fromarray(np.full((20, 30, 3), 200, dtype=np.uint8)).save(root / "test" / "dog" / "5.png")
        assert TASKS.build(spec).digest() != first
        assert TASKS.build(spec).training() is None

    def test_refusals(self, tmp_path: Path) -> None:
        root = tmp_path / "pets"
        write_folder(root, "test")
        for spec in (
            "folder:path=/no/such/folder",
            f"folder:path={root},split=validation",
            f"folder:path={root},limit=13",
            f"imagenet:root={tmp_path}",
            "imagenet",
        ):
            with pytest.raises(UsageError):
                _ = TASKS.build(spec).ids
        write_folder(tmp_path / "small", "val")
        with pytest.raises(UsageError, match="1000"):
            _ = TASKS.build(f"imagenet:root={tmp_path / 'small'}").ids
        (root / "test" / "cat" / "0.png").write_bytes(b"no image")
        with pytest.raises(BadInput, match="readable"):
            list(TASKS.build(f"folder:path={root},resize=10,crop=8").batches(100))
        with pytest.raises(UsageError, match="crop"):
            TASKS.build(f"folder:path={root},resize=10,crop=11")


class TestCifar:
    @pytest.mark.parametrize(("name", "labels"), [("cifar10", "labels"), ("cifar100", "fine_labels")])
    def test_reads_torchvisions_files(
        self, name: str, labels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import torchvision.datasets

        reader = getattr(torchvision.datasets, name.upper())
        classes = int(name[5:])
        folder = tmp_path / reader.base_folder
        folder.mkdir()
        pixels = GENERATOR.integers(0, 256, (5, 3072)).astype(np.uint8)
        targets = [0, 3, 2, 1, classes - 1]

        def write(file: str, content: object) -> tuple[str, str]:
            (folder / file).write_bytes(pickle.dumps(content))
            return file, hashlib.md5((folder / file).read_bytes()).hexdigest()

        key = "label_names" if classes == 10 else "fine_label_names"
        file, checksum = write("meta_here", {key: [f"kind {i}" for i in range(classes)]})
        monkeypatch.setattr(reader, "meta", {"filename": file, "key": key, "md5": checksum})
        monkeypatch.setattr(reader, "train_list", [write("train_here", {"data": pixels, labels: targets})])
        monkeypatch.setattr(reader, "test_list", [write("test_here", {"data": pixels[:4], labels: targets[:4]})])
        task = TASKS.build(f"{name}:root={tmp_path},train=4")
        assert np.array_equal((task.rows.x * 255).round().numpy().reshape(4, -1), pixels[:4])
        assert task.rows.y.tolist() == targets[:4]
        assert task.classes == classes
        assert task.class_names()[1] == "kind 1"
        assert len(task.training()) == 4
        assert len(TASKS.build(f"{name}:root={tmp_path},split=train")) == 5
        (folder / "test_here").write_bytes(b"tampered")
        with pytest.raises(UsageError, match="no intact"):
            _ = TASKS.build(f"{name}:root={tmp_path}").rows

    def test_without_a_folder(self) -> None:
        with pytest.raises(UsageError, match="download=true"):
            _ = TASKS.build("cifar10").rows
        with pytest.raises(UsageError, match="root=FOLDER"):
            _ = TASKS.build("cifar10:download=true").rows


@pytest.mark.parametrize("spec", ["fashion-mnist", "fashion-mnist:size=14", "digits"])
def test_defaults_name_parts_that_exist(spec: str) -> None:
    from advkit.core.rng import RowRng
    from advkit.models import MODELS
    from advkit.threat_models import THREAT_MODELS

    task = TASKS.build(spec)
    model = MODELS.build(task.defaults.model)(task.shape, task.classes, RowRng.from_ids(0, ["a"]))
    assert THREAT_MODELS.build(task.defaults.threat_model).bind(model.space) is not None
    assert model.space.complaint(task.rows.x) is None
    assert TASKS.spec(task) == spec
