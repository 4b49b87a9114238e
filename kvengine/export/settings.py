"""Reading a parsed JSON object that anybody may have written: typed, bounded, every refusal by name."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from kvengine.errors import CheckpointError, UnsupportedModel

# Beyond any model there is; below, sums and products of sizes stay small and lists short.
MOST = 1 << 24
_LARGEST_FILE = 1 << 24  # bytes


class Settings:
    """One JSON object; ``where`` names it in messages.

    Every method raises UnsupportedModel for a value of another kind than it is named after.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "config") -> None:
        self._values = values
        self._where = where

    def __contains__(self, key: str) -> bool:
        """Whether ``key`` is there and not null."""
        return self._values.get(key) is not None

    def get(self, key: str) -> Any:
        """The value as it is, None if there is none."""
        return self._values.get(key)

    def integer(self, key: str, most: int = MOST) -> int:
        value = self._values.get(key)
        if type(value) is not int or not 1 <= value <= most:
            raise self._refusal(key, f"a positive integer of at most {most}")
        return value

    def number(self, key: str) -> float:
        value = self._values.get(key)
        if not _is_number(value):
            raise self._refusal(key, "a positive number")
        return float(value)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        value = self._values.get(key)
        if not isinstance(value, list) or len(value) != count or not all(map(_is_number, value)):
            raise self._refusal(key, f"a list of {count} positive numbers")
        return tuple(map(float, value))

    def flag(self, key: str) -> bool:
        value = self._values.get(key, False)
        if value is None:
            return False
        if type(value) is not bool:
            raise self._refusal(key, "true or false")
        return value

    def strings(self, key: str) -> tuple[str, ...]:
        value = self._values.get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._refusal(key, "a list of strings")
        return tuple(value)

    def flags(self, key: str, count: int) -> tuple[bool, ...]:
        """Zeros and ones (or booleans), at least ``count``; what is beyond is not looked at."""
        value = self._values.get(key)
        if not isinstance(value, list) or len(value) < count or any(item not in (0, 1) for item in value):
            raise self._refusal(key, f"a list of {count} zeros and ones")
        return tuple(bool(item) for item in value[:count])

    def tokens(self, key: str, vocabulary: int) -> tuple[int, ...]:
        """One token id or a list of them; none for null or a missing key."""
        value = self._values.get(key)
        found = [] if value is None else value if isinstance(value, list) else [value]
        if any(type(token) is not int or not 0 <= token < vocabulary for token in found):
            raise self._refusal(key, f"token ids in 0..{vocabulary - 1} (vocab_size {vocabulary})")
        return tuple(found)

    def within(self, key: str) -> Settings:
        """The object under ``key``; an empty one for null or a missing key."""
        value = self._values.get(key)
        if value is None:
            return Settings({}, f"{self._where}.{key}")
        if not isinstance(value, Mapping):
            raise self._refusal(key, "an object")
        return Settings(value, f"{self._where}.{key}")

    def items(self) -> dict[str, Any]:
        """A copy as a plain dict."""
        return dict(self._values)

    def _refusal(self, key: str, sought: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"{self._where} key {key}: sought {sought}, found {shown(self._values.get(key))}"
        )


def _is_number(value: Any) -> TypeGuard[float]:
    """Positive, and such that its float32 neither overflows nor vanishes; nor is it a huge integer."""
    return type(value) in (int, float) and 1e-30 < value < 1e30


def shown(value: Any) -> str:
    """``value`` for a message, cut short: it may be megabytes long."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 1 << 64:
        return f"an integer of {int(math.log10(value.bit_length() or 1)) + 1}-digit bit length"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from ``path``.

    Raises:
        CheckpointError: no such file, larger than 16 MiB, or not a JSON object.
    """
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise CheckpointError(f"{path}: sought at most {_LARGEST_FILE:,} bytes of JSON, found more")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"sought {path.name} in {path.parent}, found none; a checkpoint is a Hugging Face folder "
            "with config.json and *.safetensors"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: sought a JSON object, found a {type(value).__name__}")
    return value
