"""What a property was checked with when it failed: enough to check just that again, on any device."""

from __future__ import annotations

import hashlib
import json
import typing
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from kvengine.codec import DecodeError, decode, encode


@dataclass(frozen=True)
class Case:
    """A failure as data, for ``kvfarm replay``.

    check: name of the suite's function. drawn: what it drew, as JSON; None where no single value was wrong
    but all of them together, or where it is not data: then seed and examples give the same programs again.
    recipe: its name. model: the checkpoint's folder where it failed, "" if unknown.
    """

    check: str
    drawn: Any
    seed: int
    examples: int
    recipe: str
    model: str = ""
    version: Literal[1] = 1

    def to_json(self) -> str:
        return json.dumps(encode(self), separators=(",", ":"), sort_keys=True)

    @property
    def key(self) -> str:
        """The same for the same failure, whatever seed found it."""
        found = self if self.drawn is None else replace(self, seed=0, examples=0)
        return hashlib.sha256(found.to_json().encode()).hexdigest()[:16]

    @classmethod
    def from_json(cls, text: str) -> Case:
        """Raises kvengine.codec.DecodeError (a ValueError) for anything but a case."""
        return decode(cls, json.loads(text))


def as_data(value: object) -> Any:
    """What ``Case.drawn`` holds of a drawn value; None where a user's own check drew what is no data."""
    try:
        return encode(value)
    except TypeError:
        return None


def drawn_for(check: Callable[..., None], case: Case) -> Any:
    """The drawn value as ``check`` takes it, by the annotation of its parameter.

    Raises:
        DecodeError: it is something else.
    """
    hints = typing.get_type_hints(check)
    kinds = [kind for name, kind in hints.items() if name != "return"]
    if not kinds:
        raise DecodeError(f"{case.check} does not say what it checks; annotate the parameter of its check")
    return _decoded(kinds[0], case.drawn, "$.drawn")


def _decoded(kind: Any, value: Any, path: str) -> Any:
    """As decode, which knows tuples of one kind of element only."""
    kinds = typing.get_args(kind)
    if typing.get_origin(kind) is not tuple or Ellipsis in kinds:
        return decode(kind, value, path)
    if not isinstance(value, list) or len(value) != len(kinds):
        raise DecodeError(f"{path}: sought a list of {len(kinds)}")
    return tuple(_decoded(k, v, f"{path}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
