"""What strangers write is shown, and steers nothing."""

from __future__ import annotations

import json
import unicodedata

import pytest

from advkit.core.errors import UsageError
from advkit.core.text import printable, printable_json, printable_values

MARKS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
STEERING = "\x1b[2J\x1b]0;title\x07 \x9b31m \x00 \x7f \u202e reversed \u2066 \u200f \u2028 \ud800 \ufeff \U000e0041"


@pytest.mark.slow
def test_no_control_character_is_left() -> None:
    """Of every code point that Unicode calls a control, a format or a surrogate, tab and line feed alone may stay."""
    for code in range(0x110000):
        kind = unicodedata.category(chr(code))
        shown = printable(chr(code))
        if kind in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(chr(code)) in (
            "LRE",
            "RLE",
            "LRO",
            "RLO",
            "PDF",
        ):
            assert shown == chr(code) if chr(code) in "\t\n" else shown.isascii()
        if kind[0] in "LNPS":
            assert shown == chr(code)


def test_it_is_spelled_out() -> None:
    assert printable("a\x1b[31mb\u202ec\U000e0041") == "a\\x1b[31mb\\u202ec\\U000e0041"
    assert printable("naïve 中文 emoji 🙂\ttab\n") == "naïve 中文 emoji 🙂\ttab\n"
    assert printable_values({"\x1b": ["\x00", 3, None]}) == {"\\x1b": ["\\x00", 3, None]}


def test_json_says_the_same() -> None:
    text = json.dumps({STEERING: [STEERING]}, ensure_ascii=False)
    shown = printable_json(text)
    assert json.loads(shown) == json.loads(text)
    assert printable(shown) == shown


def test_errors_are_printable() -> None:
    assert printable(str(UsageError(STEERING))) == str(UsageError(STEERING))
    assert "\x1b" not in str(UsageError(STEERING))
