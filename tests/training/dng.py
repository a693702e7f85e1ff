"""A small writer of DNG files (uncompressed 16-bit Bayer data in a TIFF), for tests of what reads them."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

_BYTE, _ASCII, _SHORT, _LONG, _RATIONAL, _SRATIONAL = 1, 2, 3, 4, 5, 10
_PACKED = {_BYTE: "B", _ASCII: "B", _SHORT: "H", _LONG: "I"}
XYZ_TO_CAMERA = (0.8, -0.2, -0.1, -0.4, 1.2, 0.2, -0.1, 0.2, 0.6)


def _field(kind: int, values: Any) -> tuple[int, int, bytes]:
    """A tag's type, count and content."""
    if kind == _ASCII:
        values = [*values.encode(), 0]
    if kind in (_RATIONAL, _SRATIONAL):
        sign = "i" if kind == _SRATIONAL else "I"
        pairs = [Fraction(value).limit_denominator(10_000) for value in values]
        content = b"".join(struct.pack(f"<{sign}{sign}", pair.numerator, pair.denominator) for pair in pairs)
        return kind, len(pairs), content
    return kind, len(values), struct.pack(f"<{len(values)}{_PACKED[kind]}", *values)


def write_dng(
    path: Path,
    mosaic: np.ndarray,
    pattern: str = "RGGB",
    black: int | None = 64,
    white: int | None = 1023,
    neutral: tuple[float, float, float] = (0.5, 1.0, 0.625),
    cells: tuple[int, int] = (2, 2),
) -> Path:
    """Write uint16 [H, W] as a DNG; black and white None leave the tags out. `cells`: height, width of the pattern."""
    height, width = mosaic.shape
    data = mosaic.astype("<u2").tobytes()
    fields = {
        254: _field(_LONG, [0]),
        256: _field(_LONG, [width]),
        257: _field(_LONG, [height]),
        258: _field(_SHORT, [16]),
        259: _field(_SHORT, [1]),
        262: _field(_SHORT, [32803]),  # colour filter array
        271: _field(_ASCII, "advkit"),
        272: _field(_ASCII, "test"),
        273: _field(_LONG, [0]),  # where the pixels begin; filled in below
        274: _field(_SHORT, [1]),
        277: _field(_SHORT, [1]),
        278: _field(_LONG, [height]),
        279: _field(_LONG, [len(data)]),
        284: _field(_SHORT, [1]),
        33421: _field(_SHORT, list(cells)),
        33422: _field(_BYTE, ["RGB".index(letter) for letter in pattern]),
        50706: _field(_BYTE, [1, 4, 0, 0]),
        50708: _field(_ASCII, "advkit test"),
        50721: _field(_SRATIONAL, XYZ_TO_CAMERA),
        50728: _field(_RATIONAL, neutral),
        50778: _field(_SHORT, [21]),
    }
    if black is not None:
        fields[50714] = _field(_LONG, [black])
    if white is not None:
        fields[50717] = _field(_LONG, [white])
    beyond = 8 + 2 + 12 * len(fields) + 4
    start = beyond + sum(len(content) + len(content) % 2 for _, _, content in fields.values() if len(content) > 4)
    fields[273] = _field(_LONG, [start])
    entries, outside = b"", b""
    for tag in sorted(fields):
        kind, count, content = fields[tag]
        if len(content) > 4:
            entries += struct.pack("<HHII", tag, kind, count, beyond + len(outside))
            outside += content + b"\0" * (len(content) % 2)
        else:
            entries += struct.pack("<HHI", tag, kind, count) + content.ljust(4, b"\0")
    directory = struct.pack("<H", len(fields)) + entries + struct.pack("<I", 0)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8) + directory + outside + data)
    return path
