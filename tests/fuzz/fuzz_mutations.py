"""Damaged and hostile versions of a file's bytes, drawn from a seeded generator: by bytes, by JSON value, by header."""

from __future__ import annotations

import copy
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

Mutator = Callable[[bytes, Random], bytes]

INTEGERS = (0, 1, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)
FOREIGN = (
    b"",
    b"\0",
    b"\n",
    b"hello",
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(x) run\n",
    b"\x89PNG\r\n\x1a\n" + b"\0" * 40,
    b"PK\x03\x04" + b"\0" * 60,
    b"PK\x05\x06" + b"\0" * 18,
    b"\x80\x02cos\nsystem\nX\x04\0\0\0true\x85R.",
    b"\x80\x02cbuiltins\nexec\nX\x05\0\0\0x = 1\x85R.",
    b"\x1f\x8b\x08" + b"\0" * 20,
    b"\xff\xfe" + "{}".encode("utf-16-le"),
    b"GGUF" + struct.pack("<IQQ", 3, 1 << 62, 1 << 62),
    b"\x93NUMPY\x01\x00\x10\x00{'descr':'|O',  \n",
    struct.pack("<Q", 1 << 62) + b"{}",
    b"[" * 200_000,
    b'{"a":' * 100_000,
)


def by_bytes(raw: bytes, rng: Random) -> bytes:
    """One or two changes that know nothing of the format."""
    for _ in range(rng.choice((1, 1, 1, 2))):
        raw = rng.choice(_BYTE_CHANGES)(raw, rng)
    return raw


def _place(raw: bytes, rng: Random) -> int:
    """Somewhere in the file; headers more often than not."""
    return rng.randrange(min(len(raw), 96) if rng.random() < 0.5 else len(raw)) if raw else 0


def _flip(raw: bytes, rng: Random) -> bytes:
    changed = bytearray(raw)
    for _ in range(rng.randint(1, 8) if raw else 0):
        changed[_place(raw, rng)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(raw: bytes, rng: Random) -> bytes:
    return raw[: rng.choice((len(raw) - 1, len(raw) // 2, _place(raw, rng)))]


def _cut_front(raw: bytes, rng: Random) -> bytes:
    return raw[_place(raw, rng) :]


def _more(raw: bytes, rng: Random) -> bytes:
    return raw + rng.choice((b"\0", b"\n", rng.randbytes(64), raw[:512]))


def _fill(raw: bytes, rng: Random) -> bytes:
    at, length = _place(raw, rng), rng.choice((1, 4, 16, 200))
    return raw[:at] + rng.choice((b"\0", b"\xff", b"9", b" ")) * len(raw[at : at + length]) + raw[at + length :]


def _drop(raw: bytes, rng: Random) -> bytes:
    at = _place(raw, rng)
    return raw[:at] + raw[at + rng.choice((1, 2, 8, 64)) :]


def _double(raw: bytes, rng: Random) -> bytes:
    at = _place(raw, rng)
    return raw[:at] + raw[at : at + rng.choice((1, 8, 64))] * 2 + raw[at:]


def _integer(raw: bytes, rng: Random) -> bytes:
    at, width = _place(raw, rng), rng.choice((2, 4, 8))
    value = rng.choice(INTEGERS) & ((1 << 8 * width) - 1)
    return raw[:at] + value.to_bytes(width, rng.choice(("little", "big"))) + raw[at + width :]


def _insert(raw: bytes, rng: Random) -> bytes:
    at = _place(raw, rng)
    word = rng.choice((b"\0", b"\n", b"\r", b'"', b"\xe2\x80\xa8", b"\xef\xbb\xbf", b"\x1b[2J", b"\xff", b"1" * 5000))
    return raw[:at] + word + raw[at:]


def _foreign(raw: bytes, rng: Random) -> bytes:
    return rng.choice(FOREIGN)


_BYTE_CHANGES: tuple[Mutator, ...] = (
    _flip, _flip, _cut, _cut_front, _more, _fill, _drop, _double, _integer, _integer, _insert, _foreign,
)  # fmt: skip


# JSON


def _deep(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 10**30, 10**400, -(2**63), 0.5, -0.0, 1e308, float("nan"), float("inf"), "", " ",
    "0", "nan", "x", "x" * 20_000, "\u2028", "\ud800", "\x1b]0;x\x07", "../../etc/passwd", "/dev/zero", "\0", "a,b=[c",
    [], [[]], [None], [1, "a"], {}, {"a": {}}, {"": ""}, _deep(50),
)  # fmt: skip


def _paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    if isinstance(value, dict):
        for key in value:
            yield from _paths(value[key], (*at, key))
    elif isinstance(value, list):
        for i in range(min(len(value), 4)):
            yield from _paths(value[i], (*at, i))


def _found(value: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        value = value[step]
    return value


def odd_value(value: Any, rng: Random) -> Any:
    """The JSON value with one or two places changed."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2))):
        paths = list(_paths(value))
        path = rng.choice(paths)
        if not path:
            if rng.random() < 0.1:
                return copy.deepcopy(rng.choice(ODD))
            continue
        holder, last = _found(value, path[:-1]), path[-1]
        what = rng.randrange(8)
        if what == 0:
            del holder[last]
        elif what == 1 and isinstance(holder, dict):
            holder[rng.choice(("", "x", "\u2028", f"{last} "))] = holder.pop(last)
        elif what == 2:
            holder[last] = copy.deepcopy(_found(value, rng.choice(paths)) if _reaches(value, paths) else None)
        elif what == 3 and isinstance(holder[last], list):
            holder[last] = holder[last] * rng.choice((2, 50)) if len(holder[last]) < 1000 else []
        elif what == 4 and isinstance(holder[last], int | float) and not isinstance(holder[last], bool):
            holder[last] = rng.choice((-holder[last], holder[last] + 1, holder[last] * 1000, str(holder[last])))
        else:
            holder[last] = copy.deepcopy(rng.choice(ODD))
    return value


def _reaches(value: Any, paths: list[tuple[Any, ...]]) -> bool:
    try:
        for path in paths:
            _found(value, path)
    except (KeyError, IndexError, TypeError):
        return False
    return True


def by_json(raw: bytes, rng: Random) -> bytes:
    """A JSON document with other values in it, some of which JSON has no word for."""
    value = odd_value(json.loads(raw), rng)
    return json.dumps(value, indent=rng.choice((None, 1)), ensure_ascii=True).encode()


def by_json_lines(raw: bytes, rng: Random) -> bytes:
    """A file of JSON lines: one line changed, left out, twice, moved, joined, or broken."""
    lines = raw.decode().split("\n")[:-1]
    at = rng.randrange(len(lines))
    what = rng.randrange(10)
    if what == 0:
        del lines[at]
    elif what == 1:
        lines.insert(rng.randrange(len(lines)), lines[at])
    elif what == 2:
        rng.shuffle(lines)
    elif what == 3:
        return (" ".join(lines) + "\n").encode()
    elif what == 4:
        lines.insert(at, rng.choice(("", " ", "{}", "[]", "null", "1", '"x"', "[" * 100_000, "\x00" * 50)))
    elif what == 5:
        return "\n".join(lines).encode()[: -rng.randrange(1, 40)]
    else:
        lines[at] = json.dumps(odd_value(json.loads(lines[at]), rng))
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")


def by_words(raw: bytes, rng: Random) -> bytes:
    """A text file: fields and lines changed."""
    lines = raw.decode().split("\n")
    at = rng.randrange(len(lines))
    cells = lines[at].split(",")
    cell = rng.randrange(len(cells))
    words = (
        "",
        '"',
        "\0",
        "-1",
        "1e9",
        "9" * 5000,
        "\u2028",
        "\ud800",
        "\x1b[2J",
        "=cmd()",
        "a b c",
        "\r",
        "x" * 200_000,
    )
    what = rng.randrange(6)
    if what == 0:
        del lines[at]
    elif what == 1:
        lines.insert(at, lines[at])
    elif what == 2:
        cells.insert(cell, rng.choice(words))
    elif what == 3:
        del cells[cell]
    else:
        cells[cell] = rng.choice(words)
    if what > 1:
        lines[at] = ",".join(cells)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


# Archives


def members(raw: bytes) -> dict[str, bytes]:
    """The parts of a zip archive."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        return {each.filename: archive.read(each) for each in archive.infolist()}


def zipped(parts: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive of these parts."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", how) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return out.getvalue()


DESCRIPTIONS = (
    "|O",
    "<f2",
    "<f4",
    ">f8",
    "<f16",
    "|i1",
    "|u1",
    ">i4",
    "<u8",
    "|b1",
    "<c8",
    "|V8",
    "<U7",
    "|S3",
    "<M8[s]",
    "<U0",
)
SHAPES = (
    "()",
    "(0,)",
    "(0, 1, 4, 4)",
    "(6,)",
    "(6, 0)",
    "(-1,)",
    "(1 << 40,)",
    f"({1 << 40},)",
    f"({1 << 62}, 4)",
    f"({1 << 63}, 2)",
    f"(0, {1 << 62})",
    f"({10**30},)",
    "(6, 1, 4, 4.0)",
    "('a',)",
    "[6]",
    "6",
    "(True, 6)",
    "((6,),)",
    "(6,) * 9",
)


def npy_header(raw: bytes, rng: Random) -> bytes:
    """A .npy file whose header says something else than its bytes are."""
    length = int.from_bytes(raw[8:10], "little")
    head = eval(raw[10 : 10 + length], {"__builtins__": {}})  # of this test's own making
    descr, shape, fortran = repr(head["descr"]), repr(head["shape"]), repr(head["fortran_order"])
    version, declared = b"\x01\x00", None
    what = rng.randrange(9)
    if what in (0, 1):
        descr = repr(rng.choice(DESCRIPTIONS))
    elif what in (2, 3, 4):
        shape = rng.choice(SHAPES)
    elif what == 5:
        descr = rng.choice(
            ("[('a', '<i4')]", "('<f4', (1 << 20,))", f"('<f4', ({1 << 30},))", "'x'", "7", "open('x')", "'|O8'")
        )
    elif what == 6:
        fortran = rng.choice(("True", "2", "'no'", "None"))
    elif what == 7:
        version = rng.choice((b"\x02\x00", b"\x03\x00", b"\x09\x09", b"\x00\x00"))
    else:
        declared = rng.choice(INTEGERS) & 0xFFFF
    text = f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}"
    if rng.random() < 0.05:
        text = rng.choice(
            (text[:-1], "{" * 500, "()" * 3000, "__import__('os').system('true')", "{}", text + " " * 70_000)
        )
    body = text.encode() + b"\n"
    width = 2 if version == b"\x01\x00" else 4
    said = len(body) if declared is None else declared
    return raw[:6] + version + (said & ((1 << 8 * width) - 1)).to_bytes(width, "little") + body + raw[10 + length :]


def by_archive(raw: bytes, rng: Random, inside: Mutator = npy_header) -> bytes:
    """A zip archive with one part changed, renamed, left out or twice, or with sizes that its directory makes up."""
    parts = members(raw)
    name = rng.choice(list(parts))
    what = rng.randrange(12)
    if what == 0:
        del parts[name]
    elif what == 1:
        parts[rng.choice(("x", "../x.npy", "x" * 3000, "\u2028", name.upper()))] = parts.pop(name)
    elif what == 2:
        parts[name] = by_bytes(parts[name], rng)
    elif what == 3:
        out = bytearray(zipped(parts, zipfile.ZIP_DEFLATED))
        at = out.rfind(b"PK\x01\x02")
        where = at + rng.choice((8, 10, 16, 20, 24, 28, 30, 42))
        out[where : where + 4] = (rng.choice(INTEGERS) & 0xFFFFFFFF).to_bytes(4, "little")
        return bytes(out)
    elif what == 4:
        return zipped(parts, rng.choice((zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_DEFLATED)))
    elif what == 5:
        return zipped(parts) + zipped({name: parts[name]})
    else:
        parts[name] = inside(parts[name], rng)
    return zipped(parts, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))


# safetensors


def by_safetensors(raw: bytes, rng: Random) -> bytes:
    """A safetensors file whose header says other names, types, shapes or places."""
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    what = rng.randrange(4)
    if what == 0 or not header:
        changed = odd_value(header, rng)
    else:
        name = rng.choice([key for key in header if key != "__metadata__"])
        entry = copy.deepcopy(header[name])
        key = rng.choice(("dtype", "shape", "data_offsets"))
        entry[key] = {
            "dtype": rng.choice(("F64", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "C64", "X", "")),
            "shape": rng.choice(
                ([], [0], [1 << 40], [1 << 62, 4], [1 << 33, 1 << 33], [-1], [0, 1 << 62], entry["shape"] * 2)
            ),
            "data_offsets": rng.choice(([0, 0], [0, 1 << 40], [8, 4], [-4, 4], [0], entry["data_offsets"] * 2)),
        }[key]
        changed = {**header, name: entry}
    text = json.dumps(changed).encode()
    said = len(text) if rng.random() < 0.9 else rng.choice(INTEGERS)
    return said.to_bytes(8, "little") + text + raw[8 + length :]


# Images


def png_header(raw: bytes, rng: Random) -> bytes:
    """A PNG whose first part says another size or kind, with a checksum that fits."""
    body = bytearray(raw[12:29])  # IHDR and its thirteen bytes
    if rng.random() < 0.7:
        width, height = rng.choice(
            ((1 << 31, 1), (1, 1 << 30), (30_000, 30_000), (16_000, 9_000), (0, 8), (8, 0), (1 << 16, 1 << 16))
        )
        body[4:12] = struct.pack(">II", width & 0xFFFFFFFF, height & 0xFFFFFFFF)
    else:
        body[rng.randrange(12, 17)] = rng.randrange(256)
    return raw[:12] + bytes(body) + struct.pack(">I", zlib.crc32(bytes(body))) + raw[33:]
