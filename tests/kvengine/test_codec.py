"""The codec: what goes out comes back, and nothing but the asked type ever comes in."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvengine.codec import DecodeError, decode, encode
from kvengine.program import (
    Damage,
    Decode,
    Extend,
    Generate,
    Operation,
    Poison,
    Prefill,
    Program,
    Reorder,
    Reset,
    Rewind,
    Save,
)

tokens = st.lists(st.integers(0, 10**6), max_size=5).map(tuple)
operations: st.SearchStrategy[Operation] = st.one_of(
    st.builds(Prefill, tokens, st.integers(0, 9), st.sampled_from(["all", "last"])),
    st.builds(Decode, tokens),
    st.builds(Generate, st.integers(0, 9), st.integers(1, 9)),
    st.just(Reset()),
    st.just(Poison()),
    st.builds(Rewind, st.integers(0, 9)),
    st.builds(Extend, st.lists(tokens, max_size=3).map(tuple), st.integers(0, 9)),
    st.builds(Reorder, tokens),
    st.builds(Reset, st.none() | st.integers(0, 3)),
    st.builds(Damage, st.text(max_size=5), st.integers(0, 9), st.booleans()),
    st.builds(Save, st.text(max_size=5)),
)
programs = st.builds(
    Program,
    st.integers(1, 99),
    st.lists(operations, max_size=5).map(tuple),
    st.none() | st.integers(0, 9),
)


@given(programs)
def test_a_program_survives_its_json(program: Program) -> None:
    assert Program.from_json(program.to_json()) == program
    assert Program.from_json(program.to_json()).digest == program.digest


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(json_values)
def test_anything_else_is_refused_with_a_path(value: Any) -> None:
    with pytest.raises(DecodeError, match=r"^\$"):
        decode(Program, value)


@dataclass(frozen=True)
class Inner:
    name: str
    kind: Literal["inner"] = "inner"


@dataclass(frozen=True)
class Outer:
    ratio: float
    flag: bool
    inner: Inner | None
    counts: dict[str, int] = field(default_factory=dict)


GOOD = {"ratio": 1, "flag": True, "inner": {"name": "a", "kind": "inner"}, "counts": {"x": 1}}


def test_an_integer_will_do_for_a_float() -> None:
    assert decode(Outer, GOOD) == Outer(1.0, True, Inner("a"), {"x": 1})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"flag": 1}, r"\$\.flag: sought bool, found int"),
        ({"ratio": "1"}, r"\$\.ratio: sought float, found str"),
        ({"ratio": True}, r"\$\.ratio"),
        ({"counts": {"x": 1.5}}, r"\$\.counts\.x: sought int, found float"),
        ({"inner": {"name": "a", "kind": "outer"}}, r"\$\.inner\.kind: sought one of \['inner'\]"),
        ({"inner": {"nane": "a"}}, r"\$\.inner: unknown key 'nane'"),
        ({"inner": {}}, r"\$\.inner: Inner needs 'name'"),
        ({"extra": 1}, r"unknown key 'extra'"),
    ],
)
def test_every_refusal_names_the_place(change: dict[str, Any], words: str) -> None:
    with pytest.raises(DecodeError, match=words):
        decode(Outer, GOOD | change)


def test_an_unknown_operation_lists_those_there_are() -> None:
    text = json.dumps({"capacity": 1, "operations": [{"kind": "explode"}]})
    with pytest.raises(
        DecodeError, match=r"operations\[0\]\.kind: sought one of \['prefill'.*found 'explode'"
    ):
        Program.from_json(text)


def test_only_plain_data_is_encoded() -> None:
    with pytest.raises(TypeError, match="cannot encode a object"):
        encode({"a": object()})


@pytest.mark.parametrize("value", [10**400, -(10**400)])
def test_an_integer_too_large_for_a_float_is_refused_in_few_words(value: int) -> None:
    with pytest.raises(DecodeError, match="sought float") as refusal:
        decode(float, value)
    assert len(str(refusal.value)) < 300


def test_a_refusal_does_not_repeat_megabytes() -> None:
    with pytest.raises(DecodeError) as refusal:
        decode(Program, {"x" * 10**6: 1})
    assert len(str(refusal.value)) < 1000
