"""A condition on devices: read strictly, decided from what is known, explained where it is not so."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import InventoryError
from harness.selection import FIELDS, Known, is_expression, parse

GIB = 1 << 30
PHONE: Known = {
    "name": "pixel8",
    "model": "Google Pixel 8",
    "soc": None,
    "abi": "arm64-v8a",
    "api": 35,
    "ram": int(7.6 * GIB),
    "cores": 9,
    "simulated": True,
    "onnxruntime": "1.32.0",
    "provider": ("cpu", "nnapi"),
    "pool": (),
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("abi==arm64-v8a", True),
        ("abi == 'arm64-v8a' and ram>=7GiB", True),
        ("abi==x86_64 or api>=35 and cores<9", False),
        ("(abi==x86_64 or api>=35) and cores<=9", True),
        ("not abi==x86_64 and not not api>34", True),
        ('model~"*pixel*"', True),
        ("model==Pixel", False),
        ("ram>=8GiB", False),
        ("ram>=8GB", True),
        ("ram < 7800 MiB", True),
        ("onnxruntime>=1.9", True),  # as versions, not as text
        ("onnxruntime~1.32.*", True),
        ("provider==nnapi", True),
        ("provider!=nnapi", False),
        ("pool==release", False),
        ("pool!=release", True),
        ("simulated", True),
        ("simulated==no", False),
        ("not simulated", False),
        ("soc==x", False),
        ("soc~*", False),
        ("soc!=x", True),
    ],
)
def test_a_condition_is_decided(text: str, expected: bool) -> None:
    assert parse(text).decide(PHONE) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("abi==arm64-v8a and ram>=8GiB", ["ram>=8GiB is false: 7.6 GiB"]),
        ("ram>=8GiB and cores==1", ["ram>=8GiB is false: 7.6 GiB", "cores==1 is false: 9"]),
        ("abi==x86_64 or api==3", ["abi==x86_64 is false: arm64-v8a", "api==3 is false: 35"]),
        ("not (abi==arm64-v8a and api==35)", ["abi==arm64-v8a is true: arm64-v8a", "api==35 is true: 35"]),
        ("not simulated", ["simulated is true"]),
        ("soc ~ '*x*'", ["soc~'*x*' is false: not told"]),
        ("pool==a", ["pool==a is false: none"]),
        ("provider==qnn", ["provider==qnn is false: cpu, nnapi"]),
    ],
)
def test_what_is_false_says_which_part_and_what_was_found(text: str, expected: list[str]) -> None:
    assert list(parse(text).why(PHONE, True)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name==pixel8 and build==x", None),
        ("name==other and build==x", False),
        ("name==pixel8 or build==x", True),
        ("not build==x", None),
    ],
)
def test_what_was_not_asked_yet_is_neither_true_nor_false(text: str, expected: bool | None) -> None:
    assert parse(text).decide({"name": "pixel8"}) is expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("abi=arm64", "character 4, found =arm64; for example abi==arm64-v8a"),
        ("abi==", "sought a value at character 6, found the end"),
        ("(abi==x", r"sought \) at character 8, found the end"),
        ("abi==x)", "sought the end at character 7, found"),
        ("abi==x y", "found y"),
        ("", "found the end"),
        ("organ==1", "unknown field 'organ'; there are name, kind"),
        ("abi>=3", "abi is text; it can be compared with == != ~, not with >="),
        ("ram>=8", "ram: sought a size such as 8GiB, found '8'"),
        ("ram>=lots", "sought a size"),
        ("api==new", "api: sought a whole number, found 'new'"),
        ("onnxruntime>=new", "sought a version such as"),
        ("simulated==maybe", "sought true or false"),
        ("model", "model is text; compare it"),
    ],
)
def test_what_cannot_be_read_says_where_and_what_may_stand_there(text: str, message: str) -> None:
    with pytest.raises(InventoryError, match=message):
        parse(text)


WORDS = st.sampled_from([*FIELDS, *"()<>~'", "==", "!=", "<=", ">=", "and", "or", "not", "8GiB", "1.2", "x*"])


@given(st.lists(WORDS).map(" ".join) | st.text(max_size=30))
def test_no_text_raises_anything_else(text: str) -> None:
    with contextlib.suppress(InventoryError):
        parse(text).decide(PHONE)


@pytest.mark.parametrize("text", ["abi==x", "not simulated", "simulated", "a~b", "cores<3", "( x"])
def test_a_condition_is_told_from_names(text: str) -> None:
    assert is_expression(text)


@pytest.mark.parametrize("text", ["host", "farm,virtual:2:arm64-v8a", "my phone, host", "android-1", "adb"])
def test_names_are_told_from_a_condition(text: str) -> None:
    assert not is_expression(text)
