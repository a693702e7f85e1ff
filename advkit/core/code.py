"""Which code of the user's own a part brings: what is kept by content must notice when that code is edited."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_KNOWN = ("advkit", "torch", "builtins", "numpy", "timm", "torchvision", "transformers")
_SPEC = re.compile(r"\bpython:\[?([\w.]+):")


def own_code(*parts: Any) -> dict[str, str]:
    """Module -> sha256 of its file, for all modules of the user's own that parts, and what they hold, are written in.

    Parts are objects, classes, or specs that name `python:` parts. A module without a file has an empty hash.
    """
    names = {name for part in parts for name in _modules(part, 0)}
    return {name: _digest(name) for name in sorted(names) if name.partition(".")[0] not in _KNOWN}


def _modules(part: Any, depth: int) -> Iterator[str]:
    if isinstance(part, str):
        yield from _SPEC.findall(part)
        return
    if part is None or isinstance(part, (bool, int, float, bytes)) or depth > 4:
        return
    if isinstance(part, (tuple, list)):
        for each in part:
            yield from _modules(each, depth + 1)
        return
    yield str(getattr(part, "__module__", "") or "builtins")
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        for each in dataclasses.fields(part):
            yield from _modules(getattr(part, each.name, None), depth + 1)


def _digest(name: str) -> str:
    file = getattr(sys.modules.get(name), "__file__", None)
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""
    except OSError:
        return ""
