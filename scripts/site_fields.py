"""What mkdocstrings does to our docstrings: the lines `name: meaning` become a list."""

from __future__ import annotations

import re
from typing import Any

import griffe

_FIELD = re.compile(r"(?P<names>[a-zA-Z_]\w*(?:, [a-zA-Z_]\w*)*)(?P<more>[^:`.]{0,40}):\s+(?P<meaning>\S.*)")


def listed(docstring: str) -> str:
    """A docstring whose paragraphs of fields are Markdown lists."""
    return "\n\n".join(map(_paragraph, docstring.split("\n\n")))


def _paragraph(text: str) -> str:
    lines = text.split("\n")
    first = _FIELD.match(lines[0])
    if not first or any(not _FIELD.match(line) and not line.startswith("  ") for line in lines):
        return text
    made: list[str] = []
    for line in lines:
        field = _FIELD.match(line)
        if field:
            made.append(f"- **`{field['names']}`**{field['more']}: {field['meaning']}")
        else:
            made.append(f"  {line.strip()}")
    return "\n".join(made)


class Fields(griffe.Extension):
    """For every docstring of the package."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called when an object was read."""
        if obj.docstring is not None:
            obj.docstring.value = listed(obj.docstring.value)
