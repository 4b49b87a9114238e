"""Dataclasses to JSON and back, strictly.

What a device or a file says is untrusted, so decoding checks every type, refuses unknown
keys and never instantiates anything but the dataclass that was asked for. Written on the
standard library because it runs on the phone too.

Understood: dataclasses, str, int, float, bool, None, Literal, X | None, unions of
dataclasses told apart by a ``kind`` Literal, tuple[X, ...], dict[str, X].
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")
_LARGEST = 1 << 1000  # larger integers may not fit a float


class DecodeError(ValueError):
    """A JSON value that is not of the type asked for; the message names the path to it."""


def encode(value: Any) -> Any:
    """A JSON-ready value: dataclasses become dicts, tuples become lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [encode(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"cannot encode a {type(value).__name__}")


def decode(kind: type[T], value: Any, path: str = "$") -> T:
    """``value`` (from json.loads) as a ``kind``.

    Raises:
        DecodeError: a wrong type, an unknown or a missing key, with the path to it.
    """
    return typing.cast(T, _decode(kind, value, path))


def _decode(kind: Any, value: Any, path: str) -> Any:
    origin = typing.get_origin(kind)
    arguments = typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _decode_union(arguments, value, path)
    if origin is typing.Literal:
        if not any(value == a and type(value) is type(a) for a in arguments):
            raise DecodeError(f"{path}: sought one of {list(arguments)}, found {_short(value)}")
        return value
    if origin is tuple:
        items = _expect(list, value, path)
        return tuple(_decode(arguments[0], v, f"{path}[{i}]") for i, v in enumerate(items))
    if origin is dict:
        pairs = _expect(dict, value, path)
        return {key: _decode(arguments[1], v, f"{path}.{key[:80]}") for key, v in pairs.items()}
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(typing.cast(type, kind), value, path)
    if kind is types.NoneType:
        kind = type(None)
    if kind is float and type(value) is int and abs(value) < _LARGEST:
        return float(value)
    return _expect(kind, value, path)


def _decode_union(members: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and types.NoneType in members:
        return None
    rest = [m for m in members if m is not types.NoneType]
    if len(rest) == 1:
        return _decode(rest[0], value, path)
    if all(dataclasses.is_dataclass(m) for m in rest):
        tag = _expect(dict, value, path).get("kind")
        for member in rest:
            if tag in typing.get_args(_hints(member)["kind"]):
                return _decode(member, value, path)
        names = [typing.get_args(_hints(m)["kind"])[0] for m in rest]
        raise DecodeError(f"{path}.kind: sought one of {names}, found {_short(tag)}")
    for member in rest:
        try:
            return _decode(member, value, path)
        except DecodeError:
            continue
    raise DecodeError(f"{path}: {_short(value)} is none of {rest}")


@functools.cache  # resolving them takes most of the time of decoding a row, and a store has many rows
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _decode_dataclass(kind: type, value: Any, path: str) -> Any:
    pairs = _expect(dict, value, path)
    hints = _hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(pairs) - set(fields))
    if unknown:
        raise DecodeError(f"{path}: unknown key {_short(unknown[0])}; {kind.__name__} has {sorted(fields)}")
    missing = [
        name
        for name, f in fields.items()
        if name not in pairs and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise DecodeError(f"{path}: {kind.__name__} needs {missing[0]!r}, found only {_short(sorted(pairs))}")
    return kind(**{n: _decode(hints[n], v, f"{path}.{n}") for n, v in pairs.items()})


def _short(value: Any) -> str:
    """For a message: what is untrusted may also be megabytes long."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 1 << 64 else "an enormous integer"
    return text if len(text) <= 200 else text[:197] + "..."


def _expect(kind: Any, value: Any, path: str) -> Any:
    # bool is an int in Python; on the wire it is not.
    if type(value) is not kind:
        raise DecodeError(f"{path}: sought {kind.__name__}, found {type(value).__name__}")
    return value
