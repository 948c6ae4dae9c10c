"""Text of strangers made safe to show: names, paths, descriptions and licences."""

from __future__ import annotations

import unicodedata

# Control characters, surrogates, and the characters that change the direction of text.
_UNSAFE = {"Cc", "Cs"}
_DIRECTION = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_SEPARATORS = frozenset("\u2028\u2029")


def printable(text: str) -> str:
    r"""``text`` with every control character written out, such as ``\x1b``, so that a terminal does
    not obey it.

    Line breaks and tabs stay.
    """
    return "".join(c if c in "\n\t" or not _is_unsafe(c) else _escape(c) for c in text)


def _is_unsafe(character: str) -> bool:
    return (
        unicodedata.category(character) in _UNSAFE
        or character in _DIRECTION
        or character in _SEPARATORS
    )


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
