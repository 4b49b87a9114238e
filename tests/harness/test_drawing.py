"""One seed, the same programs: whatever modules a process happens to have loaded."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from harness.drawing import same_everywhere


def draw(within: AbstractContextManager[None]) -> list[list[int]]:
    found: list[list[int]] = []

    @seed(7)
    @settings(max_examples=30, database=None, deadline=None)
    @given(st.lists(st.integers(0, 10**9), min_size=20))
    def collect(values: list[int]) -> None:
        found.append(values)

    with within:
        collect()
    return found


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module of the user's, not loaded yet."""
    name = "loaded_meanwhile"
    (tmp_path / f"{name}.py").write_text(f"CONSTANTS = {[n * 1_000_003 for n in range(300)]}\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


def test_what_is_drawn_does_not_depend_on_what_is_loaded(load: str) -> None:
    before = draw(same_everywhere())
    __import__(load)
    assert draw(same_everywhere()) == before
