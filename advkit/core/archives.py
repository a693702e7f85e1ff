"""Arrays of numpy in files of strangers: what headers declare is held against the bytes before memory is taken.

numpy takes the memory that a header asks for before it reads a byte, and a zip archive's directory may say anything.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Container
from pathlib import Path
from typing import IO, Any

import numpy as np

from advkit.core.errors import BadInput
from advkit.core.text import first_line

RATIO = 1_032
"""Bytes that one byte of deflate can stand for at most; other ways to compress are not read."""
_WAYS = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: RATIO}


def read_archive(file: Path, most: int, keys: Container[str] | None = None) -> dict[str, Any]:
    """The arrays of an .npz archive by name; never unpickled.

    most: bytes of all arrays together that are read
    keys: those that are wanted; None reads all. Others are left in the file

    Raises BadInput where the file is none, or says that it holds more than it does.
    """
    try:
        with zipfile.ZipFile(file) as held:
            entries = [each for each in held.infolist() if keys is None or _name(each) in keys]
            names = [_name(each) for each in entries]
            if len(set(names)) < len(names):
                raise ValueError("it holds two arrays of one name")
            total = sum(each.file_size for each in entries)
            if total > most:
                raise ValueError(f"its arrays take {total:,} bytes; at most {most:,} are read")
            return {_name(each): _member(held, each) for each in entries}
    except OSError as error:
        raise BadInput(f"{file} can't be read ({error.strerror or first_line(error)})") from error
    # a damaged archive makes zip, zlib and numpy raise nearly anything
    except Exception as error:
        raise BadInput(f"{file} is no archive of plain numpy arrays ({first_line(error)})") from error


def archive_keys(file: Path) -> tuple[str, ...]:
    """The names of the arrays in an archive; BadInput where the file is none."""
    try:
        with zipfile.ZipFile(file) as held:
            return tuple(map(_name, held.infolist()))
    except OSError as error:
        raise BadInput(f"{file} can't be read ({error.strerror or first_line(error)})") from error
    except Exception as error:
        raise BadInput(f"{file} is no archive of plain numpy arrays ({first_line(error)})") from error


def check_array(stream: IO[bytes], size: int, what: str) -> None:
    """Raise ValueError unless the header of a .npy stream of `size` bytes says what the bytes behind it are."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    declared = stream.tell() + math.prod(shape) * dtype.itemsize
    plain = not dtype.hasobject and dtype.itemsize and all(length >= 0 for length in shape)
    if not plain or declared != size:
        raise ValueError(f"{what} is said to be {dtype} {list(shape)}, which its {size:,} bytes are not")


def _name(entry: zipfile.ZipInfo) -> str:
    return entry.filename.removesuffix(".npy")


def _member(held: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Any:
    ratio = _WAYS.get(entry.compress_type)
    if ratio is None:
        raise ValueError(f"{entry.filename} is compressed in a way that numpy does not write")
    if entry.file_size > ratio * entry.compress_size:
        raise ValueError(f"{entry.filename} declares more bytes than its {entry.compress_size:,} can stand for")
    with held.open(entry) as stream:
        check_array(stream, entry.file_size, entry.filename)
    with held.open(entry) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)
