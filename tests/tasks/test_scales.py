"""What a file or a spec says is what the model gets: bytes, boxes, default radii, numbered folders, damaged files."""

from __future__ import annotations

import io
import logging
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from advkit.core.errors import AdvkitError, BadInput, UsageError
from advkit.core.spaces import Box
from advkit.tasks import TASKS
from advkit.tasks.arrays import Arrays
from advkit.tasks.base import default_ball
from advkit.tasks.folder import Folder, label_order

LEVELS = np.arange(0, 240, 10, dtype=np.uint8).reshape(2, 3, 2, 2)


class TestBytes:
    @pytest.mark.parametrize(
        ("low", "high", "want"),
        [(0, 1, LEVELS / 255), (0, 255, LEVELS * 1.0), (-1, 1, LEVELS / 127.5 - 1), (-128, 127, LEVELS - 128.0)],
    )
    def test_they_fill_the_box(self, tmp_path: Path, low: float, high: float, want: np.ndarray) -> None:
        file = tmp_path / "bytes.npz"
        np.savez(file, x=LEVELS, y=[0, 1])
        packed = TASKS.build(f"npz:path={file},low={low},high={high}")
        memory = Arrays(LEVELS, [0, 1], space=Box(low, high, (3, 2, 2)))
        for task in (packed, memory):
            assert np.allclose(next(iter(task.batches(2))).x, want, atol=1e-5)

    def test_other_depths_are_refused(self) -> None:
        for high, top in ((1, 1), (1, 16), (-1, 15)):
            x = (np.indices((2, 3, 4, 4)).sum(0) % (top + 1)).astype(np.uint8)
            with pytest.raises(BadInput, match="uint8"):
                Arrays(x, [0, 1], space=Box(min(0, high), 1, (3, 4, 4)))
        with pytest.raises(BadInput, match="uint8"):
            Arrays(LEVELS, [0, 1], space=Box(0, 100, (3, 2, 2)))
        with pytest.raises(BadInput, match="uint16"):
            Arrays(LEVELS.astype(np.uint16), [0, 1])

    def test_fractions_in_a_box_of_bytes_are_refused(self) -> None:
        with pytest.raises(BadInput, match="divided by 255 already"):
            Arrays(LEVELS / 255, [0, 1], space=Box(0, 255, (3, 2, 2)))

    def test_big_endian_floats(self) -> None:
        task = Arrays((LEVELS / 255).astype(">f4"), np.array([0, 1], ">i8"))
        assert torch.equal(next(iter(task.batches(2))).x, torch.from_numpy((LEVELS / 255).astype(np.float32)))


def test_the_usual_radius_is_a_part_of_the_width() -> None:
    assert default_ball(Box()) == "linf:eps=8/255"
    assert default_ball(Box(0, 255)) == "linf:eps=8"
    assert default_ball(Box(-1, 1)) == "linf:eps=0.0627451"
    columns = Box(torch.zeros(2), torch.tensor([1.0, 1e6]), (2,))
    assert default_ball(columns) == default_ball(Box(0, torch.inf)) == ""
    from advkit.evaluation.api import evaluate

    with pytest.raises(UsageError, match="name a threat model"):
        evaluate("pgd", task=Arrays(torch.rand(4, 2), [0, 1, 0, 1], space=columns), model=torch.nn.Linear(2, 2).eval())


def write(root: Path, names: tuple[str, ...], mode: str = "RGB", kind: str = "png", each: int = 2) -> None:
    for value, name in enumerate(names):
        (root / "test" / name).mkdir(parents=True)
        for i in range(each):
            Image.new(mode, (8, 8), 10 * value + i if mode != "RGB" else (10 * value + i,) * 3).save(
                root / "test" / name / f"{i}.{kind}"
            )


def labels(task: Folder) -> dict[str, int]:
    batch = next(iter(task.batches(1000)))
    assert batch.labels is not None
    return {row.split("/")[2]: int(label) for row, label in zip(batch.ids, batch.labels, strict=True)}


class TestFolders:
    @pytest.mark.parametrize("pattern", ["{}", "class_{}", "{}-sign"])
    def test_numbers_are_the_labels(self, tmp_path: Path, pattern: str, caplog: pytest.LogCaptureFixture) -> None:
        names = tuple(pattern.format(label) for label in range(12))
        write(tmp_path, names)
        spec = f"folder:path={tmp_path},resize=8,crop=8"
        with caplog.at_level(logging.WARNING, "advkit"):
            task = TASKS.build(spec)
            assert labels(task) == {name: label for label, name in enumerate(names)}
        assert "order=name" in caplog.text
        assert task.class_names() == names
        assert TASKS.label(task) == spec
        text = labels(TASKS.build(f"{spec},order=name"))
        assert text == {name: label for label, name in enumerate(sorted(names))}

    def test_names_are_in_alphabetical_order(self) -> None:
        assert label_order(["b10", "a2", "c"]) == ["a2", "b10", "c"]
        assert label_order(["1", "01", "2"]) == ["01", "1", "2"]
        with pytest.raises(UsageError, match="not numbered"):
            label_order(["cat", "dog"], "number")

    def test_some_of_the_classes(self, tmp_path: Path) -> None:
        write(tmp_path, ("3", "7"))
        task = TASKS.build(f"folder:path={tmp_path},resize=8,crop=8")
        assert task.counts_labels
        assert labels(task) == {"3": 0, "7": 1}
        more = task.with_classes(10)
        assert (more.classes, labels(more), len(more.class_names())) == (10, {"3": 3, "7": 7}, 10)
        write(tmp_path / "words", ("cat", "dog"))
        with pytest.raises(UsageError, match="2 class folders and classes is 5"):
            len(TASKS.build(f"folder:path={tmp_path}/words,classes=5"))

    def test_helpers_are_no_classes_and_others_are_counted(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        write(tmp_path, ("cat", "dog", ".ipynb_checkpoints", "__MACOSX"))
        (tmp_path / "test" / "cat" / "._0.png").write_bytes(b"no image")
        (tmp_path / "test" / "cat" / ".DS_Store").write_bytes(b"")
        for name in ("a.gif", "b.gif", "c.heic"):
            (tmp_path / "test" / "dog" / name).write_bytes(b"")
        with caplog.at_level(logging.WARNING, "advkit"):
            task = TASKS.build(f"folder:path={tmp_path},resize=8,crop=8")
            assert (task.class_names(), len(task)) == (("cat", "dog"), 4)
        assert "3 files" in caplog.text
        assert "2 .gif" in caplog.text

    def test_more_than_eight_bits_are_refused(self, tmp_path: Path) -> None:
        write(tmp_path, ("cat", "dog"), mode="I;16")
        with pytest.raises(BadInput, match="more than 8 bits"):
            next(iter(TASKS.build(f"folder:path={tmp_path},resize=8,crop=8").batches(1)))

    @pytest.mark.parametrize("kind", ["jpg", "png", "bmp"])
    def test_a_file_cut_off_is_named_before_the_run(self, tmp_path: Path, kind: str) -> None:
        write(tmp_path, ("cat", "dog"), kind=kind)
        file = tmp_path / "test" / "dog" / f"1.{kind}"
        whole = file.read_bytes()
        spec = f"folder:path={tmp_path},resize=8,crop=8"
        before = TASKS.build(spec).digest()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(BadInput, match=f"1.{kind} is no readable image"):
            TASKS.build(spec).digest()
        file.write_bytes(whole)
        assert TASKS.build(spec).digest() == before


def used(spec: str) -> None:
    """All that a plan asks of a task."""
    task = TASKS.build(spec)
    _ = task.defaults, task.classes, task.digest()


class TestArchives:
    def test_classes_are_those_asked_for(self, tmp_path: Path) -> None:
        file = tmp_path / "few.npz"
        np.savez(file, x=LEVELS, y=[0, 2])
        task = TASKS.build(f"npz:path={file}")
        assert (task.classes, task.counts_labels, TASKS.label(task)) == (3, True, f"npz:path={file}")
        asked = TASKS.build(f"npz:path={file},classes=9")
        assert (asked.classes, asked.counts_labels) == (9, False)
        assert TASKS.label(asked).endswith("classes=9")
        with pytest.raises(UsageError, match="classes is 0"):
            TASKS.build(f"npz:path={file},classes=0")
        with pytest.raises(BadInput, match="labels from 0 to 2 with 2 classes"):
            TASKS.build(f"npz:path={file},classes=2").digest()

    def test_a_header_that_asks_for_more_than_there_is(self, tmp_path: Path) -> None:
        file = tmp_path / "huge.npz"
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 9)})
        y = io.BytesIO()
        np.save(y, np.array([0, 1]))
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("x.npy", header.getvalue() + bytes(64))
            archive.writestr("y.npy", y.getvalue())
        with pytest.raises(BadInput, match="bytes are not"):
            TASKS.build(f"npz:path={file}").digest()

    @pytest.mark.parametrize(
        ("x", "y"),
        [
            (np.array(["a", "b"]), np.array([0, 1])),
            (np.zeros(2, "datetime64[s]"), np.array([0, 1])),
            (np.zeros((2, 3), complex), np.array([0, 1])),
            (np.zeros((0, 3)), np.zeros(0, int)),
            (np.float32(1), np.int64(0)),
            (np.zeros((2, 3)), np.array([0, 2**62])),
            (np.zeros((2, 3)), np.array([0.0, 1.0])),
            (np.zeros((2, 3)), np.eye(2, dtype=int)),
            (np.array([[1], ["a"]], object), np.array([0, 1])),
        ],
    )
    def test_every_odd_array_is_one_line(self, tmp_path: Path, x: np.ndarray, y: np.ndarray) -> None:
        file = tmp_path / "odd.npz"
        np.savez(file, x=x, y=y)
        with pytest.raises(AdvkitError) as raised:
            used(f"npz:path={file}")
        assert "\n" not in str(raised.value)

    def test_every_damaged_archive_is_one_line(self, tmp_path: Path) -> None:
        file = tmp_path / "damaged.npz"
        np.savez_compressed(file, x=LEVELS, y=[0, 1])
        whole = file.read_bytes()
        rng = np.random.default_rng(0)
        for _ in range(150):
            damaged = bytearray(whole[: rng.integers(1, len(whole) + 1)])
            for place in rng.integers(0, len(damaged), rng.integers(1, 4)):
                damaged[place] = rng.integers(256)
            file.write_bytes(damaged)
            with suppress(AdvkitError):  # and nothing else
                used(f"npz:path={file}")
