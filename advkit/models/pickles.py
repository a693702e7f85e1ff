"""`.pt` files of strangers, looked through before torch reads them: which words they use, and how much they ask for.

torch's weights-only reader runs no code, but it takes what a file asks for: a size of 2**40 in a pickle of a hundred
bytes is memory before it is an error. Here the pickle is read once with stand-ins for everything that it names.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from typing import Any

import torch

_PLAIN = frozenset(
    {
        "_codecs.encode",
        "builtins.complex",
        "builtins.set",
        "collections.Counter",
        "collections.OrderedDict",
        "torch.Size",
        "torch.device",
        "torch.nn.parameter.Parameter",
        "torch.storage.TypedStorage",
        "torch.storage.UntypedStorage",
        "torch._tensor._rebuild_from_type_v2",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
    }
)
_TYPES = re.compile(r"torch\.(\w+Storage|(b?float|q?u?int|complex)\d+\w*|bool|half|double|long|short)")
"""Words that take no more memory than the file has; also those of what training scripts keep beside the weights."""
_HEADS = 3  # pickles before the one that is meant, in files of torch before 1.6
_MODULES = {"__builtin__": "builtins"}
"""Names of modules in pickles that Python 2 could read, as torch's are."""
_WIDEST = 16  # bytes of the largest number
_NAMES = {"Char": "int8", "Byte": "uint8", "ComplexFloat": "cfloat", "ComplexDouble": "cdouble"}
"""Storages that are not called after torch's name of their numbers in small letters."""


def check_pickled(content: bytes) -> None:
    """Raise ValueError where a `.pt` file is no plain weights: other words, or more bytes declared than there are.

    What it raises on a damaged pickle is not to be listed. Whatever passes is still read by torch's own reader.
    """
    if not zipfile.is_zipfile(io.BytesIO(content)):
        stream = io.BytesIO(content)
        read = [_Dry(stream) for _ in range(_HEADS + 1)]
        for each in read:
            each.load()
        _held(read[-1], len(content))
        return
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        declared = sum(each.file_size for each in archive.infolist())
        if declared > len(content):  # torch stores its tensors as they are
            raise ValueError(f"its parts are declared as {declared} bytes, the file has {len(content)}")
        names = [each for each in archive.namelist() if each.rpartition("/")[2] == "data.pkl"]
        if len(names) != 1:
            raise ValueError(f"it holds {len(names)} pickles of weights; expected one")
        sizes = {each.filename: each.file_size for each in archive.infolist()}
        dry = _Dry(io.BytesIO(archive.read(names[0])))
    dry.load()
    _held(dry, len(content))
    folder = names[0].removesuffix("data.pkl")
    for key, size in dry.storages.items():
        if size > sizes.get(f"{folder}data/{key}", 0):
            raise ValueError(f"the storage {key:.40} is said to have {size} bytes, which it has not")


def _held(dry: _Dry, there: int) -> None:
    if sum(dry.storages.values()) > there:
        raise ValueError(f"its tensors are declared as {sum(dry.storages.values())} bytes, the file has {there}")


class _Stand:
    """In place of whatever a pickle names: takes any arguments and any state, and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class _Dry(pickle._Unpickler):
    """Reads a pickle without building anything of it but plain containers; notes the storages that it asks for.

    The reader in Python: the one in C takes memory for a table of the size that a file says.
    """

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, encoding="utf-8")
        self.storages: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        word = f"{_MODULES.get(module, module)}.{name}"
        if word not in _PLAIN and not _TYPES.fullmatch(word):
            raise pickle.UnpicklingError(f"GLOBAL {word} was not expected in weights")
        # a class of its own for each: a storage's says how wide its numbers are
        return type(name, (_Stand,), {"word": word})

    def persistent_load(self, pid: Any) -> Any:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise pickle.UnpicklingError("a storage is not named as torch names them")
        kind, key, _, count = pid[1:5]
        if not isinstance(count, int) or count < 0:
            raise pickle.UnpicklingError(f"a storage of {count!r:.40} numbers")
        self.storages[str(key)] = max(self.storages.get(str(key), 0), count * _width(kind))
        return _Stand()


def _width(kind: Any) -> int:
    """Bytes of one number of a storage, by the class that names it."""
    name = str(getattr(kind, "word", "")).rpartition(".")[2].removesuffix("Storage")
    dtype = getattr(torch, _NAMES.get(name, name.lower()), None)
    if isinstance(dtype, torch.dtype):
        return torch.empty(0, dtype=dtype).element_size()
    return 1 if name in ("Untyped", "QInt8", "QUInt8") else _WIDEST
