"""Class folders with and without splits above them, and paths where a name belongs."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from advkit.core.errors import BadInput, UnknownName, UsageError
from advkit.models import MODELS
from advkit.tasks import TASKS
from advkit.tasks.folder import class_folders, decode

LINKED = (("cat", 0), ("cat/dogs", 0), ("dog", 1), ("dog/cats", 1))
"""Where the images of two classes are found that link to one another: each once by every way that does not go round."""


def images(folder: Path, *classes: str) -> Path:
    for shade, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (8, 8), (40 * shade, 0, 90 * number)).save(folder / name / f"{number}.png")
    return folder


def test_class_folders_are_taken_as_they_lie_where_there_is_no_split(tmp_path: Path) -> None:
    bare = TASKS.build(f"folder:path={images(tmp_path / 'bare', 'cat', 'dog')},resize=8,crop=8")
    split = images(tmp_path / "split" / "test", "cat", "dog")
    above = TASKS.build(f"folder:path={split.parent},resize=8,crop=8")
    assert bare.class_names() == above.class_names() == ("cat", "dog")
    assert len(bare) == 4
    (one,), (other,) = bare.batches(8), above.batches(8)
    assert one.x.equal(other.x)
    assert one.labels.tolist() == other.labels.tolist()
    assert bare.training() is None


def test_a_link_that_leads_back_up_gives_no_images_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = images(tmp_path / "in", "cat", "dog")
    (folder / "cat" / "all").symlink_to(folder)
    (folder / "cat" / "dogs").symlink_to(folder / "dog")
    (folder / "dog" / "cats").symlink_to(folder / "cat")
    found = class_folders(folder)
    names = [(path.relative_to(folder).as_posix(), label) for path, label in found.files]
    assert names == [(f"{at}/{number}.png", label) for at, label in LINKED for number in (0, 1)]
    assert "leads back to a folder that it lies in" in caplog.text


@pytest.mark.parametrize(("content", "words"), [(b"", "it is empty"), (b"<html>", "its content is none of JPEG, PNG")])
def test_a_file_that_is_no_image_is_told_without_an_address_in_memory(content: bytes, words: str) -> None:
    with pytest.raises(BadInput) as raised:
        decode(content, 8, 8, "bilinear", "a.png")
    assert words in str(raised.value)
    assert "0x" not in str(raised.value)


def test_another_split_is_no_class(tmp_path: Path) -> None:
    images(tmp_path / "val", "cat", "dog")
    images(tmp_path / "train", "cat", "dog")
    with pytest.raises(UsageError, match=r"has no folder test and has train, val: say folder:path=.*,split=val"):
        TASKS.build(f"folder:path={tmp_path}").class_names()
    assert TASKS.build(f"folder:path={tmp_path},split=val").class_names() == ("cat", "dog")
    with pytest.raises(UsageError, match=r"there is no folder .*holdout"):
        TASKS.build(f"folder:path={images(tmp_path / 'bare', 'cat')},split=holdout").class_names()
    with pytest.raises(UsageError, match=r"expected .*/CLASS/"):
        TASKS.build(f"folder:path={tmp_path / 'nowhere'}").class_names()


def test_a_path_where_a_task_belongs_is_answered_with_its_spec(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("")
    for path, words in (
        (tmp_path, f"folder:path={tmp_path}"),
        (tmp_path / "page.html", "a task is no .html file"),
        (tmp_path / "nowhere", "there is no folder and no file"),
    ):
        with pytest.raises(UnknownName) as raised:
            TASKS.build(str(path))
        assert words in str(raised.value)


def test_a_folder_where_a_model_belongs_is_answered_with_what_lies_in_it(tmp_path: Path) -> None:
    for name, file, words in (
        ("chat", "config.json", "hf:"),
        ("trained", "model.safetensors", "path:"),
        ("weights", "net.pt", "net.pt"),
        ("quantised", "chat.gguf", "gguf:"),
        ("run", "report.json", "the folder of a run"),
        ("empty", "note.txt", "holds no weights"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_bytes(b"")
        with pytest.raises(UnknownName) as raised:
            MODELS.build(str(tmp_path / name))
        assert words in str(raised.value), name
