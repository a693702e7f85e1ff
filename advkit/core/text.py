"""Text of strangers, made fit to be shown: no character of it may steer a terminal or reorder a line."""

from __future__ import annotations

import re
from typing import Any

_UNSAFE = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but for tab and line feed, DEL, C1: a terminal obeys them
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # bidirectional marks: what is read is not what is written
    "\u2028\u2029"  # line and paragraph separators
    "\u200b\u2060-\u2064\ufeff\ufff9-\ufffb"  # nothing to see, so that two names look the same
    "\ud800-\udfff"  # halves of a pair: no output can encode them
    "\U000e0000-\U000e007f"  # tags
    "]"
)

_ESCAPED = re.compile(r"\\[ubfr]")  # what JSON may hide such a character behind


def _spelled(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def printable(text: str) -> str:
    r"""The text with every character that is no print spelled out, as in \x1b; tab and line feed stay."""
    return _UNSAFE.sub(_spelled, text)


def one_line(text: str, most: int = 1_200) -> str:
    """The text on one line that a screen can hold: printable, without line breaks, and its middle cut where it is long.

    Its end is kept, since that says what to do.
    """
    line = " ".join(part.strip() for part in printable(text).splitlines() if part.strip())
    return line if len(line) <= most else f"{line[: most * 2 // 3]} ... {line[-most // 3 + 5 :]}"


def first_line(error: BaseException, most: int = 200) -> str:
    """What an error of a library says, in few words: the first line of its message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]


def all_printable(document: str) -> bool:
    """Whether no text in a JSON document needs spelling out; False, too, where only reading it would tell."""
    return _ESCAPED.search(document) is None and _UNSAFE.search(document) is None


def printable_values(value: Any) -> Any:
    """JSON values with every text in them printable, keys too."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(key): printable_values(each) for key, each in value.items()}
    if isinstance(value, list):
        return [printable_values(each) for each in value]
    return value


def printable_json(text: str) -> str:
    r"""A JSON document that says the same in characters that can be printed: \u001b for ESC."""
    return _UNSAFE.sub(lambda match: _as_json(ord(match[0])), text)


def _as_json(code: int) -> str:
    if code < 0x10000:
        return f"\\u{code:04x}"
    high, low = divmod(code - 0x10000, 0x400)
    return f"\\u{0xD800 + high:04x}\\u{0xDC00 + low:04x}"
