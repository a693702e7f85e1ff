"""ImageNet tasks: labels are the order of the wnids however a folder gives them; the shipped images are pinned."""

from __future__ import annotations

import importlib.util
import shutil
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from advkit.core.errors import BadInput, MissingExtra, UsageError
from advkit.tasks import TASKS, imagenet

SIZE = "resize=10,crop=8"
LABELS = (0, 2, 9, 10, 100, 243, 999)
"""As text, 10 and 100 come before 2 and 9: folders named by label must not be counted in alphabetical order."""


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ADVKIT_DATA", raising=False)


def file_name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}.JPEG"


def paint(path: Path, colour: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((20, 30, 3), colour, dtype=np.uint8)).save(path, format="PNG")


def truth(each: int = 2) -> dict[int, int]:
    """Number of an image -> its label; the image's colour is its number."""
    return dict(enumerate([label for _ in range(each) for label in LABELS], start=1))


def folders(root: Path, split: str = "val", by_wnid: bool = True, each: int = 2) -> None:
    for number, label in truth(each).items():
        paint(root / split / (imagenet.wnids()[label] if by_wnid else str(label)) / file_name(number), number)


def flat(root: Path, text: str) -> str:
    for number in truth():
        paint(root / "val" / file_name(number), number)
    (root / "labels.txt").write_text(text)
    return f"imagenet:root={root},labels={root / 'labels.txt'},limit=0,{SIZE}"


def rows(spec: str) -> list[tuple[str, int, int]]:
    """File name, colour and label of every row, in order."""
    task = TASKS.build(spec)
    found = []
    for batch in task.batches(4):
        assert batch.x.shape[1:] == (3, 8, 8)
        colours = (batch.x * 255).round().amax((1, 2, 3)).long().tolist()
        found += list(zip((each.rsplit("/", 1)[1] for each in batch.ids), colours, batch.labels.tolist(), strict=True))
    return found


def test_wnids_and_names_are_in_the_same_order() -> None:
    from timm.data.imagenet_info import ImageNetInfo

    wnids, names = imagenet.wnids(), imagenet.class_names()
    assert len(set(wnids)) == 1_000
    assert list(wnids) == sorted(wnids)
    # as published: tench, bull mastiff, toilet tissue
    assert (wnids[0], wnids[243], wnids[999]) == ("n01440764", "n02108422", "n15075141")
    described = ImageNetInfo("imagenet-1k").label_descriptions()
    same = [name.lower() in text.lower() for name, text in zip(names, described, strict=True)]
    assert sum(same) > 970  # the two lists shorten a few of the names differently


class TestFolder:
    def test_folders_by_wnid(self, tmp_path: Path) -> None:
        folders(tmp_path)
        folders(tmp_path, "train", each=1)
        spec = f"imagenet:root={tmp_path},limit=0,{SIZE}"
        task = TASKS.build(spec)
        assert (task.classes, len(task), task.shape) == (1_000, 14, (3, 8, 8))
        assert task.class_names()[243] == "bull mastiff"
        found = rows(spec)
        assert {colour: label for _, colour, label in found} == truth()
        assert all(name == file_name(colour) for name, colour, _ in found)
        assert [label for _, _, label in found] != sorted(label for _, _, label in found)
        assert sorted(task.training().y.tolist()) == sorted(LABELS)
        assert task.training().classes == 1_000

    def test_every_way_of_giving_labels_hands_out_the_same_rows(self, tmp_path: Path) -> None:
        wnids = imagenet.wnids()
        folders(tmp_path / "wnid")
        folders(tmp_path / "label", by_wnid=False)
        expected = rows(f"imagenet:root={tmp_path / 'wnid'},limit=0,{SIZE}")
        assert len(expected) == 14
        texts = {
            "index": "".join(f"{file_name(number)} {label}\n" for number, label in truth().items()),
            "wnid": "".join(f"val/{file_name(number)}\t{wnids[label]}\n" for number, label in truth().items()),
            # boxes after the label, a heading before, images that are not here: all as the competition's file has them
            "table": "ImageId,PredictionString\nILSVRC2012_val_00049999,n01440764 1 2 3 4\n"
            + "".join(
                f"{Path(file_name(number)).stem},{wnids[label]} 85 131 499 {number}\n"
                for number, label in reversed(truth().items())
            ),
            "order": "".join(f"{wnids[label]}\n" for label in truth().values()),
        }
        assert rows(f"imagenet:root={tmp_path / 'label'},limit=0,{SIZE}") == expected
        for name, text in texts.items():
            assert rows(flat(tmp_path / name, text)) == expected, name

    def test_balanced_order_takes_one_of_each_class_first(self, tmp_path: Path) -> None:
        folders(tmp_path, each=3)
        paint(tmp_path / "val" / imagenet.wnids()[2] / file_name(99), 99)
        spec = f"imagenet:root={tmp_path},limit=0,{SIZE}"
        mixed, balanced = rows(spec), rows(f"{spec},balanced=true")
        assert sorted(mixed) == sorted(balanced)
        labels = [label for _, _, label in balanced]
        for start in range(0, 21, 7):
            assert sorted(labels[start : start + 7]) == sorted(LABELS)
        assert labels[21] == 2
        for label in LABELS:  # within a class, the order of the mixture
            assert [row for row in balanced if row[2] == label] == [row for row in mixed if row[2] == label]

    def test_resize_then_centre_crop(self, tmp_path: Path) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3)).astype(np.uint8)
        path = tmp_path / "val" / "n01440764" / "a.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(pixels).save(path)
        found = {}
        for name, kind in (("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)):
            task = TASKS.build(f"imagenet:root={tmp_path},limit=0,interpolation={name}")
            found[name] = task.digest()
            scaled = np.asarray(Image.fromarray(pixels).resize((341, 256), kind))
            # 117 columns are too many, and half of an odd number is rounded to even
            expected = torch.from_numpy(scaled[16:240, 58:282].copy()).permute(2, 0, 1).float() / 255
            assert torch.equal(task.fetch([0])[0][0], expected)
        assert found["bilinear"] != found["bicubic"]

    def test_refusals(self, tmp_path: Path) -> None:
        folders(tmp_path / "a")
        with pytest.raises(UsageError, match="0 takes all"):
            _ = TASKS.build(f"imagenet:root={tmp_path / 'a'}").ids
        paint(tmp_path / "a" / "val" / "cat" / "1.png", 1)
        with pytest.raises(UsageError, match=r"1 folders that name none of ImageNet's 1000 classes \(cat\)"):
            _ = TASKS.build(f"imagenet:root={tmp_path / 'a'},limit=0").ids
        shutil.rmtree(tmp_path / "a" / "val" / "cat")
        paint(tmp_path / "a" / "val" / "243" / "1.png", 1)
        with pytest.raises(UsageError, match="two folders of one class"):
            _ = TASKS.build(f"imagenet:root={tmp_path / 'a'},limit=0").ids
        with pytest.raises(UsageError, match="no class folders"):
            _ = TASKS.build(f"imagenet:root={tmp_path / 'a'},limit=0,labels={tmp_path / 'none'}").ids
        with pytest.raises(UsageError, match="imagenet-samples"):
            _ = TASKS.build("imagenet").ids
        spec = flat(tmp_path / "b", "")
        with pytest.raises(UsageError, match="labels=FILE"):
            _ = TASKS.build(f"imagenet:root={tmp_path / 'b'},limit=0").ids
        with pytest.raises(UsageError, match="can't read the labels"):
            _ = TASKS.build(spec.replace("labels.txt", "none.txt")).ids

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "0 labels for 14 images"),
            ("n01440764\n" * 13, "13 labels for 14 images"),
            ("490\n" * 14, "development kit"),
            (f"{file_name(1)} 3\n", "nothing of 13 images"),
            (f"{file_name(1)} 1000\n", "'ILSVRC2012_val_00000001.JPEG 1000'"),
            (f"{file_name(1)} 3\n{file_name(2)}\n", "expected FILE LABEL"),
            (f"{file_name(1)} 3\n{file_name(1)} n01440764\n", "two labels, 3 and 0"),
        ],
    )
    def test_labels_that_can_not_be_trusted(self, tmp_path: Path, text: str, message: str) -> None:
        spec = flat(tmp_path, text)
        with pytest.raises(BadInput, match=message):
            _ = TASKS.build(spec).ids


@pytest.mark.skipif(importlib.util.find_spec("foolbox") is None, reason="the images come from foolbox, not installed")
class TestSamples:
    @pytest.mark.slow
    def test_rows_are_the_documented_preprocessing(self) -> None:
        task = TASKS.build("imagenet-samples")
        assert (len(task), task.classes, task.shape) == (20, 1_000, (3, 224, 224))
        assert TASKS.build("imagenet-samples:crop=200").digest() != task.digest()
        assert task.training() is None
        found = importlib.util.find_spec("foolbox")
        assert found is not None
        assert found.origin is not None
        folder = Path(found.origin).parent / "data"
        for row, name in enumerate(task.ids):
            file = name.removeprefix("imagenet-samples/")
            assert file.startswith(f"imagenet_{row:02d}_")
            assert int(task.rows.y[row]) == int(file[12:-4])
            image = Image.open(folder / file)
            width = image.width * 256 // image.height
            left = round((width - 224) / 2)
            assert (image.height <= image.width, image.mode) == (True, "RGB")
            pixels = np.asarray(image.resize((width, 256), Image.Resampling.BICUBIC))[16:240, left : left + 224]
            assert torch.equal(task.rows.x[row], torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255)

    def test_names_of_what_is_seen(self) -> None:
        task = TASKS.build("imagenet-samples")
        names = [task.class_names()[label] for label in task.rows.y]
        assert names[:3] == ["bull mastiff", "folding chair", "beaker"]
        assert names[6] == names[7] == "jeep"

    def test_other_images_or_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        found = importlib.util.find_spec("foolbox")
        assert found is not None
        assert found.submodule_search_locations is not None
        shutil.copytree(
            Path(found.submodule_search_locations[0]) / "data", tmp_path / "data", ignore=shutil.ignore_patterns("c*")
        )
        changed = ModuleSpec("foolbox", None)
        changed.submodule_search_locations = [str(tmp_path)]
        monkeypatch.setattr(imagenet.importlib.util, "find_spec", lambda name: changed)
        imagenet._samples.cache_clear()
        try:
            assert len(TASKS.build("imagenet-samples")) == 20
            (tmp_path / "data" / "imagenet_03_990.jpg").rename(tmp_path / "data" / "imagenet_03_991.jpg")
            imagenet._samples.cache_clear()
            with pytest.raises(BadInput, match=r"version 1.*install foolbox"):
                len(TASKS.build("imagenet-samples"))
            monkeypatch.setattr(imagenet.importlib.util, "find_spec", lambda name: None)
            with pytest.raises(MissingExtra, match=r"advkit\[imagenet-demo\]"):
                len(TASKS.build("imagenet-samples"))
        finally:
            imagenet._samples.cache_clear()
