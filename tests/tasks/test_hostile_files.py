"""Files of strangers: what they declare is checked before memory is taken, and what they are is told by content."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from advkit.core.errors import AdvkitError, BadInput, UsageError
from advkit.core.strict_json import read_json, read_object
from advkit.core.text import one_line
from advkit.tasks import TASKS
from advkit.tasks.archives import RATIO, archive_keys, read_archive
from advkit.tasks.events import EventFolder
from advkit.tasks.fashion_mnist import read_idx
from advkit.tasks.folder import Folder, decode
from advkit.tasks.imagenet import ImageNet


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def header(shape: tuple[int, ...], descr: str = "<f4") -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": descr, "fortran_order": False, "shape": shape})
    return out.getvalue()


def archive(file: Path, parts: list[tuple[str, bytes]], how: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(file, "w", how) as held:
        for name, content in parts:
            held.writestr(name, content)
    return file


# Archives of arrays: one reader for images and events


def test_archives_are_read_as_numpy_reads_them(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "x": rng.random((3, 4)),
        "y": np.arange(3),
        "z": rng.random(4).astype(">f4"),
        "f": np.asfortranarray(rng.random((3, 2))),
    }
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", **arrays)
        found = read_archive(tmp_path / "a.npz", 1 << 20)
        assert archive_keys(tmp_path / "a.npz") == tuple(arrays)
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)
        assert read_archive(tmp_path / "a.npz", 1 << 20, ("x",)).keys() == {"x"}


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([("x.npy", header((1 << 40, 9)) + bytes(64))], "bytes are not"),
        ([("x.npy", header((1 << 62, 1 << 62)) + bytes(64))], "bytes are not"),
        ([("x.npy", header((0, 1 << 62)) + bytes(64))], "bytes are not"),
        ([("x.npy", header((3,), "|O") + bytes(24))], "bytes are not"),
        ([("x.npy", header((3,), "<U0"))], "bytes are not"),
        ([("x.npy", npy(np.arange(3))[:-1])], "bytes are not"),
        ([("x.npy", npy(np.arange(3)) + b"\0")], "bytes are not"),
        ([("x.npy", npy(np.arange(3))), ("x.npy", npy(np.arange(4)))], "two arrays of one name"),
        ([("x.npy", b"\x93NUMPY\x01\x00\x10\x00{'descr':open('x')")], "no archive"),
        ([("x.npy", b"")], "no archive"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_arrays_that_are_not_what_their_headers_say(parts, says, tmp_path):
    file = archive(tmp_path / "a.npz", parts)
    with pytest.raises(BadInput, match=says) as told:
        read_archive(file, 1 << 30)
    assert "\n" not in str(told.value)


def test_a_directory_that_declares_more_than_its_bytes_can_stand_for(tmp_path):
    file = archive(tmp_path / "a.npz", [("x.npy", npy(np.zeros(1000)))], zipfile.ZIP_DEFLATED)
    raw = bytearray(file.read_bytes())
    at = raw.rfind(b"PK\x01\x02")
    raw[at + 24 : at + 28] = (1 << 29).to_bytes(4, "little")  # the size when unpacked
    file.write_bytes(raw)
    with pytest.raises(BadInput, match="can stand for"):
        read_archive(file, 1 << 30)
    with pytest.raises(BadInput, match="at most 1,000 are read"):
        read_archive(file, 1000)
    zeros = archive(tmp_path / "zeros.npz", [("x.npy", npy(np.zeros(1 << 17)))], zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(zeros) as held:  # and no honest file is refused: this is as far as deflate goes
        entry = held.infolist()[0]
        assert 900 < entry.file_size / entry.compress_size < RATIO
    assert read_archive(zeros, 1 << 30)["x"].shape == (1 << 17,)
    for how in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with pytest.raises(BadInput, match="compressed in a way"):
            read_archive(archive(tmp_path / "odd.npz", [("x.npy", npy(np.arange(3)))], how), 1 << 30)


def test_images_and_events_come_through_the_same_door(tmp_path):
    lie = header((1 << 40,)) + bytes(64)
    file = archive(tmp_path / "a.npz", [("x.npy", lie), ("y.npy", npy(np.arange(2)))])
    with pytest.raises(BadInput, match="bytes are not"):
        TASKS.build(f"npz:path={file}").digest()
    place = tmp_path / "test" / "c"
    place.mkdir(parents=True)
    archive(place / "a.npz", [("t.npy", lie), *((f"{key}.npy", npy(np.arange(2))) for key in "xyp")])
    with pytest.raises(BadInput, match="bytes are not"):
        next(EventFolder(path=str(tmp_path)).batches(1))


def test_labels_beyond_64_bits_with_a_sign(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 3), np.float32), y=np.array([0, 2**63 + 5], np.uint64))
    with pytest.raises(BadInput, match=r"beyond 2\*\*63"):
        TASKS.build(f"npz:path={tmp_path / 'a.npz'}").digest()
    np.savez(tmp_path / "b.npz", x=np.zeros((2, 3), np.float32), y=np.array([0, 1], np.uint64))
    assert TASKS.build(f"npz:path={tmp_path / 'b.npz'}").classes == 2


# Images


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def test_postscript_under_the_name_of_an_image_starts_no_program(monkeypatch, tmp_path):
    """Pillow goes by the content, and hands PostScript to Ghostscript."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n0 0 moveto\nshowpage\n%%EOF\n"
    marker = tmp_path / "started"
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {marker}\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "gs_binary", str(program))
    with pytest.raises(BadInput, match="no readable image"):
        decode(eps, 8, 8, "bilinear", "a.png")
    assert not marker.exists()
    with suppress(OSError, subprocess.CalledProcessError):  # what it would have done
        Image.open(io.BytesIO(eps)).load()
    assert marker.exists()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "PPM", "TIFF", "WEBP", "GIF"])
def test_every_kind_of_image_that_folders_hold_is_read(kind):
    pixels = np.full((12, 10, 3), 200, np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    x = decode(out.getvalue(), 10, 8, "bilinear", "x.png")
    assert tuple(x.shape) == (3, 8, 8)
    assert float((x - 200 / 255).abs().max()) < 0.02


def test_pixels_that_are_declared_and_not_there():
    raw = bytearray(png(np.zeros((8, 8, 3), np.uint8)))
    raw[16:24] = (10_000).to_bytes(4, "big") * 2
    raw[29:33] = zlib.crc32(bytes(raw[12:29])).to_bytes(4, "big")
    with pytest.raises(BadInput, match="10000 x 10000 pixels in"):
        decode(bytes(raw), 8, 8, "bilinear", "a.png")


@pytest.mark.slow
def test_a_large_image_of_one_colour_is_no_lie():
    x = decode(png(np.full((5000, 5000), 7, np.uint8)), 8, 8, "bilinear", "a.png")
    assert float((x - 7 / 255).abs().max()) < 1e-6


def test_a_line_of_pixels_is_not_scaled_to_a_wall():
    with pytest.raises(BadInput, match="too narrow"):
        decode(png(np.zeros((1, 100_000), np.uint8)), 224, 224, "bilinear", "a.png")


def test_names_that_are_no_text_are_named(tmp_path):
    if sys.platform == "darwin":
        pytest.skip("this file system takes UTF-8 names alone")
    place = tmp_path / "data" / "test" / "a"
    place.mkdir(parents=True)
    (place / "fine.png").write_bytes(png(np.zeros((8, 8), np.uint8)))
    name = os.fsencode(place) + b"/\xff\xfe.png"
    Path(os.fsdecode(name)).write_bytes(png(np.zeros((8, 8), np.uint8)))
    with pytest.raises(BadInput, match="no UTF-8 text") as told:
        Folder(path=str(tmp_path / "data"), resize=8, crop=8).digest()
    str(told.value).encode()
    events = tmp_path / "events" / "test" / "a"
    events.mkdir(parents=True)
    Path(os.fsdecode(os.fsencode(events) + b"/\xff.bin")).write_bytes(bytes(5))
    with pytest.raises(BadInput, match="no UTF-8 text"):
        EventFolder(path=str(tmp_path / "events")).digest()
    (tmp_path / "net" / "val").mkdir(parents=True)
    Path(os.fsdecode(os.fsencode(tmp_path / "net" / "val") + b"/\xff.png")).write_bytes(b"")
    with pytest.raises((BadInput, UsageError), match="no UTF-8 text"):
        ImageNet(root=str(tmp_path / "net"), labels=str(tmp_path / "none")).digest()


# idx files


def idx(shape: tuple[int, ...], content: bytes, axes: int | None = None) -> bytes:
    return (
        b"\0\0\x08"
        + bytes([len(shape) if axes is None else axes])
        + b"".join(n.to_bytes(4, "big") for n in shape)
        + content
    )


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files(zipped, tmp_path):
    pack = gzip.compress if zipped else bytes
    file = tmp_path / "x"
    file.write_bytes(pack(idx((2, 3, 4), bytes(range(24)))))
    np.testing.assert_array_equal(read_idx(file), np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
    file.write_bytes(pack(idx((3,), b"abc")))
    assert bytes(read_idx(file)) == b"abc"
    damages = [
        idx((2, 3, 4), bytes(23)),
        idx((2, 3, 4), bytes(25)),
        idx((1 << 31, 1 << 31), b""),
        idx((1 << 20, 1 << 20), bytes(9)),
        idx((), b"x"),
        idx((1,) * 200, b"x"),
        idx((2,), b"ab", 3),
        b"\0\0\x09\x01" + bytes(5),
        b"",
        b"\x1f\x8b" + bytes(9),
    ]
    for damaged in damages:
        file.write_bytes(pack(damaged))
        with pytest.raises(BadInput, match="x"):
            read_idx(file)


BOMB = """
import gzip, resource, sys
from pathlib import Path
from advkit.core.errors import BadInput
from advkit.tasks.fashion_mnist import read_idx
file = Path(sys.argv[1])
with gzip.open(file, "wb", 1) as out:
    out.write(b"\\0\\0\\x08\\x01" + (100).to_bytes(4, "big"))
    for _ in range(300):
        out.write(bytes(1 << 20))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_idx(file)
except BadInput:
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
def test_a_file_that_unpacks_to_more_than_it_says_is_not_unpacked(tmp_path):
    done = subprocess.run([sys.executable, "-c", BOMB, str(tmp_path / "x.gz")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 50  # MiB; all of it would be 300


# JSON and messages


@pytest.mark.parametrize(
    "text",
    [
        "NaN",
        "-Infinity",
        "1e400",
        "-1e400",
        "9" * 40,
        str(2**63),
        "[" * 100_000,
        '{"a":' * 100_000,
        "",
        "\x00",
        "1 2",
        b"\xff",
    ],
)
def test_json_that_no_reader_should_take(text):
    with pytest.raises(ValueError, match=r".+"):
        read_json(text)


def test_json_that_is_fine():
    assert read_json('[1, -9223372036854775807, 1.5e300, null, "\\u2028", true]') == [
        1,
        -(2**63) + 1,
        1.5e300,
        None,
        "\u2028",
        True,
    ]
    assert read_object('{"a": 1}') == {"a": 1}
    with pytest.raises(ValueError, match="list"):
        read_object("[]")


def test_errors_are_one_line_that_a_screen_can_hold():
    assert str(UsageError("one\n  two\n\nthree")) == "one two three"
    long = str(AdvkitError(f"the file says {'x' * 100_000}: expected less; cut it"))
    assert len(long) <= 1200
    assert long.startswith("the file says xxx")
    assert long.endswith(": expected less; cut it")
    assert one_line("a\x1b[2J\nb", 100) == "a\\x1b[2J b"


def test_a_line_separator_inside_of_a_prompt_is_part_of_it(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"prompt": "one\u2028two\u2029\x85three", "target": "yes"}\n{"prompt": "next", "target": "no"}\n',
        encoding="utf-8",
    )
    held = TASKS.build(f"prompts:file={file}").prompts
    assert [each.prompt for each in held] == ["one\u2028two\u2029\x85three", "next"]
    assert [each.id for each in held] == ["line-0001", "line-0002"]
