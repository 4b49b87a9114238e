"""Seeded damage to JSON documents: the same seed gives the same document."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

# What a config never holds, from nearly right to absurd.
HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 16, 17, 0.5, -0.5, 1.0, 1e-40, 1e40),
    *(float("nan"), float("inf"), float("-inf"), 2**31, 2**31 - 1, 2**63, -(2**63), 10**400, 1 << 24),
    *("", "x", "full_attention", "sliding_attention", "a" * 10_000, "\x00", "../../etc", "5", "é\ud800"),
    *([], {}, [None], [1, "2", []], [[[[]]]], {"a": {"b": {"c": 1}}}, [0] * 5000, {"rope_type": "yarn"}),
    *(["sliding_attention"] * 6, [1, 0, 1, 0], [-1], {"": None}),
)


def damaged(document: dict[str, Any], seed: int) -> bytes:
    """``document`` with one to four changes, as the bytes of a file; one in eight is also damaged as text."""
    chance = random.Random(seed)
    value = copy.deepcopy(document)
    for _ in range(chance.randint(1, 4)):
        _change(value, chance)
    data = json.dumps(value).encode()
    return _damaged_text(data, chance) if chance.random() < 0.125 else data


def _change(value: dict[str, Any], chance: random.Random) -> None:
    """One change at a place drawn evenly from all containers' entries, in place."""
    places = list(_places(value))
    holder, key = chance.choice(places)
    kind = chance.randrange(8)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[f"{key}_"] = holder.pop(key)
    elif kind == 2:
        other, from_key = chance.choice(places)
        holder[key] = copy.deepcopy(other[from_key])
    elif kind == 3:
        holder[key] = [holder[key]]
    elif kind == 4 and type(holder[key]) in (int, float):
        holder[key] = holder[key] * chance.choice((-1, 0, 2, 3, 0.5, 10**9)) + chance.choice((-1, 0, 1))
    elif kind == 5 and isinstance(holder[key], str):
        text = holder[key]
        at = chance.randrange(len(text) + 1)
        holder[key] = text[:at] + chance.choice(("x", "/", "..", "\x00")) + text[at:]
    else:
        holder[key] = copy.deepcopy(chance.choice(HOSTILE))


def entries(value: Any) -> list[tuple[Any, Any]]:
    """(key or index, value) of a dict or list; none of anything else."""
    if isinstance(value, dict):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, list) else []


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key or index) of everything inside."""
    found: list[tuple[Any, Any]] = []
    for key, inner in entries(value)[:200]:
        found.append((value, key))
        found += _places(inner)
    return found or [({"nothing": 0}, "nothing")]


def _damaged_text(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data) + 1)
    kind = chance.randrange(5)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]
    if kind == 2:
        return data[:at] + b"[" * 100_000 + data[at:]
    if kind == 3:
        return data[:at] + chance.choice((b"\xff\xfe", b"\x00", b'"', b"}", b"NaN", b"9" * 5000)) + data[at:]
    return b"\xef\xbb\xbf" + data
