"""Damage to a file: bytes that change, go or come, and JSON values that become others, also in a
safetensors header.
"""

from __future__ import annotations

import json
import random
import struct
from typing import Any

_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**400, 0.5, float("nan"), float("inf"), "", "x",
    "\0", "../../x", "/dev/zero",
    "\ud800", "\x1b[2J", "x" * 5000, [], [[]], {}, {"x": 1}, [None] * 3,
)  # fmt: skip


def damaged(good: bytes, draw: random.Random) -> bytes:
    """``good`` with one to three kinds of damage."""
    for _ in range(draw.randint(1, 3)):
        good = draw.choice(
            (_flipped, _cut, _inserted, _repeated, _swapped, _values, _values, _values)
        )(good, draw)
    return good


def _place(good: bytes, draw: random.Random) -> int:
    """Headers are at the beginning, so half of the damage is there."""
    most = len(good) if draw.random() < 0.5 else min(len(good), 256)
    return draw.randint(0, most)


def _flipped(good: bytes, draw: random.Random) -> bytes:
    found = bytearray(good)
    for _ in range(draw.randint(1, 8)):
        if found:
            found[min(_place(good, draw), len(found) - 1)] = draw.randrange(256)
    return bytes(found)


def _cut(good: bytes, draw: random.Random) -> bytes:
    start = _place(good, draw)
    return good[:start] + good[start + draw.choice((1, 8, 64, len(good))) :]


def _inserted(good: bytes, draw: random.Random) -> bytes:
    at = _place(good, draw)
    more = draw.choice(
        (b"\0", b"\xff\xfe", b"[" * 2000, b"{", b'"', b"9" * 6000, b"\n", b"\xed\xa0\x80")
    )
    return good[:at] + more + good[at:]


def _repeated(good: bytes, draw: random.Random) -> bytes:
    start = _place(good, draw)
    piece = good[start : start + draw.randint(1, 64)]
    return good[:start] + piece * draw.randint(2, 20) + good[start:]


def _swapped(good: bytes, draw: random.Random) -> bytes:
    at = draw.choice((0, 4, 8, _place(good, draw)))
    number = draw.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1))
    return good[:at] + struct.pack("<Q", number) + good[at + 8 :]


def _values(good: bytes, draw: random.Random) -> bytes:
    """Another value, key or absence somewhere in JSON, JSON lines or a safetensors header; else
    `_flipped`.
    """
    if (header := _header(good)) is not None:
        changed = _with_other_value(header, draw)
        return struct.pack("<Q", len(changed)) + changed + good[8 + len(header) :]
    lines = good.split(b"\n")
    at = draw.randrange(len(lines))
    for place in (None, at):
        try:
            if place is None:
                return _with_other_value(good, draw)
            return b"\n".join([*lines[:at], _with_other_value(lines[at], draw), *lines[at + 1 :]])
        except (ValueError, RecursionError):
            continue
    return _flipped(good, draw)


def _header(good: bytes) -> bytes | None:
    """The JSON of a safetensors file."""
    if len(good) < 8 or (size := struct.unpack("<Q", good[:8])[0]) > len(good) - 8:
        return None
    header = good[8 : 8 + size]
    try:
        json.loads(header)
    except (ValueError, RecursionError):
        return None
    return header


def _with_other_value(text: bytes, draw: random.Random) -> bytes:
    tree = json.loads(text)
    places: list[tuple[Any, Any]] = []
    _collect(tree, places)
    if not places:
        return json.dumps(draw.choice(_VALUES)).encode()
    parent, key = draw.choice(places)
    match draw.randrange(4):
        case 0:
            del parent[key]
        case 1 if isinstance(parent, dict):
            parent[draw.choice(("", "x", "\0", key * 2))] = parent.pop(key)
        case 2:
            parent[key] = tree if isinstance(tree, int | str) else json.loads(text)
        case _:
            parent[key] = draw.choice(_VALUES)
    return json.dumps(tree).encode("utf-8", "surrogatepass")


def _collect(tree: Any, places: list[tuple[Any, Any]]) -> None:
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    for key, value in items:
        places.append((tree, key))
        _collect(value, places)
