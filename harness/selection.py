"""Devices by what they are: ``abi==arm64-v8a and ram>=8GiB``, decided, and explained where it is not so.

::

    abi==arm64-v8a and ram>=8GiB
    model~"Pixel*" or (soc~"*G3*" and not simulated)
    pool==release and onnxruntime>=1.32

A condition is decided from what is known of a device: what farm.toml says is known at once, the rest
when the device was asked. What a device does not tell satisfies nothing but ``!=``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from lark import Lark, Token, Transformer
from lark.exceptions import UnexpectedCharacters, UnexpectedInput, UnexpectedToken, VisitError
from packaging.version import InvalidVersion, Version

from harness.errors import InventoryError

Value = str | int | bool | tuple[str, ...]
Known = Mapping[str, Value | None]
"""A device's values by field. None: the device does not tell; no key: it was not asked."""


class Kind(Enum):
    """What a field's values are, and so which operators it has."""

    TEXT = "text"
    NUMBER = "a whole number"
    SIZE = "a size such as 8GiB"
    VERSION = "a version such as 1.32"
    TRUTH = "true or false"
    NAMES = "names"  # several; a comparison holds when one of them satisfies it


FIELDS: dict[str, Kind] = {
    "name": Kind.TEXT,
    "kind": Kind.TEXT,
    "lab": Kind.TEXT,
    "owner": Kind.TEXT,
    "pool": Kind.NAMES,
    "model": Kind.TEXT,
    "soc": Kind.TEXT,
    "abi": Kind.TEXT,
    "os": Kind.TEXT,
    "api": Kind.NUMBER,
    "build": Kind.TEXT,
    "serial": Kind.TEXT,
    "cores": Kind.NUMBER,
    "ram": Kind.SIZE,
    "simulated": Kind.TRUTH,
    "provider": Kind.NAMES,
    "python": Kind.VERSION,
    "numpy": Kind.VERSION,
    "onnxruntime": Kind.VERSION,
    "kvengine": Kind.VERSION,
}
EXAMPLE = 'abi==arm64-v8a and ram>=8GiB, model~"Pixel*", not simulated'

_GRAMMAR = r"""
    ?start: either
    ?either: both (_OR both)*
    ?both: term (_AND term)*
    ?term: _NOT term -> negation
         | "(" either ")"
         | FIELD OPERATOR value -> comparison
         | FIELD -> flag
    value: QUOTED | BARE UNIT?
    _AND.2: /and\b/
    _OR.2: /or\b/
    _NOT.2: /not\b/
    OPERATOR: "==" | "!=" | "<=" | ">=" | "<" | ">" | "~"
    FIELD: /[A-Za-z_]+/
    QUOTED: /"[^"]*"|'[^']*'/
    UNIT.2: /([KMGT]i?)?B\b/
    BARE: /[^\s()"'=!<>~]+/
    %ignore /\s+/
"""
_WORDS = {
    "FIELD": "a field",
    "OPERATOR": "== != < <= > >= or ~",
    "LPAR": "(",
    "RPAR": ")",
    "_AND": "and",
    "_OR": "or",
    "_NOT": "not",
    "QUOTED": "a value",
    "BARE": "a value",
    "UNIT": "",
    "$END": "the end",
}
_ORDERED: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_OPERATORS: dict[Kind, frozenset[str]] = {
    Kind.TEXT: frozenset(("==", "!=", "~")),
    Kind.NAMES: frozenset(("==", "!=", "~")),
    Kind.NUMBER: frozenset(_ORDERED),
    Kind.SIZE: frozenset(_ORDERED),
    Kind.VERSION: frozenset((*_ORDERED, "~")),
    Kind.TRUTH: frozenset(("==", "!=")),
}
_BYTES = {"B": 1, **{f"{p}B": 1000**n for n, p in enumerate("KMGT", 1)}}
_BYTES |= {f"{p}iB": 1024**n for n, p in enumerate("KMGT", 1)}
_TRUTHS = {"true": True, "yes": True, "false": False, "no": False}


@dataclass(frozen=True)
class Comparison:
    """``field operator value``; text: as it was written, without spaces."""

    field: str
    operator: str
    value: str | int | bool | Version
    text: str

    @property
    def fields(self) -> frozenset[str]:
        return frozenset((self.field,))

    def decide(self, known: Known) -> bool | None:
        """Whether it is so; None: not known yet."""
        if self.field not in known:
            return None
        found = known[self.field]
        if found is None:
            return self.operator == "!="
        if isinstance(found, tuple):
            if self.operator == "!=":
                return self.value not in found
            return any(self._holds(each) for each in found)
        return self._holds(found)

    def why(self, known: Known, wanted: bool) -> tuple[str, ...]:
        """Why it is not as ``wanted``: the comparison and the value that was found."""
        found = "" if isinstance(self.value, bool) else f": {shown(self.field, known.get(self.field))}"
        return (f"{self.text} is {'false' if wanted else 'true'}{found}",)

    def _holds(self, found: str | int | bool) -> bool:
        if self.operator == "~":
            return fnmatchcase(str(found).lower(), str(self.value).lower())
        if isinstance(self.value, Version):
            try:
                return _ORDERED[self.operator](Version(str(found)), self.value)
            except InvalidVersion:  # of somebody's own build
                return self.operator == "!="
        return _ORDERED[self.operator](found, self.value)


@dataclass(frozen=True)
class Negation:
    inner: Condition

    @property
    def fields(self) -> frozenset[str]:
        return self.inner.fields

    def decide(self, known: Known) -> bool | None:
        found = self.inner.decide(known)
        return None if found is None else not found

    def why(self, known: Known, wanted: bool) -> tuple[str, ...]:
        return self.inner.why(known, not wanted)


@dataclass(frozen=True)
class Group:
    """Several, of which all (``and``) or one (``or``) must hold."""

    every: bool
    parts: tuple[Condition, ...]

    @property
    def fields(self) -> frozenset[str]:
        return frozenset().union(*(part.fields for part in self.parts))

    def decide(self, known: Known) -> bool | None:
        found = [part.decide(known) for part in self.parts]
        if (not self.every) in found:
            return not self.every
        return None if None in found else self.every

    def why(self, known: Known, wanted: bool) -> tuple[str, ...]:
        """The parts at fault: those that are not as wanted."""
        wrong = [part for part in self.parts if part.decide(known) is (not wanted)]
        return tuple(dict.fromkeys(reason for part in wrong for reason in part.why(known, wanted)))


Condition = Comparison | Negation | Group


def is_expression(text: str) -> bool:
    """Whether ``text`` is a condition and not a list of names, none of which has such characters."""
    words = text.split()
    return (
        bool(set(text) & RESERVED) or bool({"and", "or", "not"} & set(words)) or text.strip() == "simulated"
    )


RESERVED = frozenset("=<>~!()\"'")
"""What the name of a device or a pool cannot have in it."""


@cache
def parse(text: str) -> Condition:
    """Raises InventoryError: says where it is wrong, and what may stand there."""
    try:
        tree = _parser().parse(text)
        condition: Condition = _Conditions().transform(tree)
    except UnexpectedInput as error:
        raise InventoryError(_misread(text, error)) from None
    except VisitError as error:
        raise InventoryError(f"{text!r}: {error.orig_exc}") from None
    return condition


def shown(field: str, value: Value | None) -> str:
    """A device's value for people."""
    if value is None:
        return "not told"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return ", ".join(value) or "none"
    if FIELDS[field] is Kind.SIZE:
        return f"{int(value) / 2**30:.1f} GiB"
    return str(value)


@cache
def _parser() -> Lark:
    return Lark(_GRAMMAR, parser="lalr")


class _Conditions(Transformer[Token, Condition]):
    """From lark's tree. Raises InventoryError (wrapped by lark) for what makes no sense of a field."""

    def either(self, parts: list[Condition]) -> Condition:
        return Group(False, tuple(parts))

    def both(self, parts: list[Condition]) -> Condition:
        return Group(True, tuple(parts))

    def negation(self, parts: list[Condition]) -> Condition:
        return Negation(parts[0])

    def flag(self, parts: list[Token]) -> Condition:
        name, kind = _field(parts[0])
        if kind is not Kind.TRUTH:
            raise InventoryError(f"{name} is {kind.value}; compare it, as in {EXAMPLE}")
        return Comparison(name, "==", True, name)

    def value(self, parts: list[Token]) -> str:
        return "".join(parts)

    def comparison(self, parts: list[str]) -> Condition:
        name, kind = _field(parts[0])
        sign, raw = str(parts[1]), parts[2]
        if sign not in _OPERATORS[kind]:
            signs = " ".join(sign for sign in (*_ORDERED, "~") if sign in _OPERATORS[kind])
            raise InventoryError(f"{name} is {kind.value}; it can be compared with {signs}, not with {sign}")
        plain = raw[1:-1] if raw[:1] in "\"'" else raw
        value = plain if sign == "~" else _value(name, kind, plain)
        return Comparison(name, sign, value, f"{name}{sign}{raw}")


def _field(word: str) -> tuple[str, Kind]:
    name = str(word)
    if name not in FIELDS:
        raise InventoryError(f"unknown field {name!r}; there are {', '.join(FIELDS)}")
    return name, FIELDS[name]


def _value(field: str, kind: Kind, text: str) -> str | int | bool | Version:
    try:
        if kind is Kind.NUMBER:
            return int(text)
        if kind is Kind.SIZE:
            return _size(text)
        if kind is Kind.TRUTH:
            return _TRUTHS[text.lower()]
        if kind is Kind.VERSION:
            return Version(text)
    except (ValueError, KeyError):
        raise InventoryError(f"{field}: sought {kind.value}, found {text!r}") from None
    return text


def _size(text: str) -> int:
    """Bytes. Raises ValueError, also without a unit: 8 would be 8 bytes."""
    compact = text.replace(" ", "")
    number = compact.rstrip("KMGTiB")
    if (unit := compact[len(number) :]) not in _BYTES:
        raise ValueError(text)
    return int(float(number) * _BYTES[unit])


def _misread(text: str, error: UnexpectedInput) -> str:
    ended = isinstance(error, UnexpectedToken) and error.token.type == "$END"
    at = len(text) if ended else max(0, error.column - 1)
    expected = (error.accepts or error.expected) if isinstance(error, UnexpectedToken) else ()
    expected = error.allowed or () if isinstance(error, UnexpectedCharacters) else expected
    # After a whole condition a bracket may stand only where one is open.
    closable = text[:at].count("(") > text[:at].count(")")
    words = {_WORDS[name] for name in expected if name != "RPAR" or closable}
    sought = ", ".join(sorted(words - {""}))
    found = text[at:].strip()[:20] or "the end"
    return f"{text!r}: sought {sought} at character {at + 1}, found {found}; for example {EXAMPLE}"
