"""How fast memory is read: how much of it, with how many threads, and where it cannot be told."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvengine import bandwidth
from kvengine.bandwidth import (
    buffer_bytes,
    last_level_cache,
    measure_bandwidth,
    memory_available,
    parse_size,
    read_bandwidth,
)

MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.parametrize(("text", "size"), [("48K", 48 << 10), ("2M", 2 << 20), ("1G", 1 << 30), ("7", 7)])
def test_a_cache_size_is_read_as_linux_writes_it(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "K", "2 M", "-1K", "2T"])
def test_anything_else_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="sought a size"):
        parse_size(text)


def test_the_last_level_is_the_largest_cache_reported(tmp_path: Path) -> None:
    for index, size in enumerate(["48K", "32K", "2048K", "16M"]):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert last_level_cache(str(tmp_path)) == 16 << 20
    assert last_level_cache(str(tmp_path / "missing")) == 0
    (tmp_path / "index0" / "size").write_text("unknown")
    assert last_level_cache(str(tmp_path)) == 0


def test_available_memory_is_what_linux_says(tmp_path: Path) -> None:
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:       24000000 kB\nMemAvailable:    1048576 kB\n")
    assert memory_available(str(file)) == GIB
    assert memory_available(str(tmp_path / "missing")) is None


@pytest.mark.parametrize(
    ("cache", "available", "size"),
    [
        (0, None, 512 * MIB),
        (32 * MIB, None, 512 * MIB),
        (48 * MIB, None, 768 * MIB),
        (8 * GIB, None, 4 * GIB),
        (32 * MIB, 600 * MIB, 150 * MIB),
    ],
)
def test_the_buffer_is_sixteen_caches_within_what_a_machine_has(
    cache: int, available: int | None, size: int
) -> None:
    assert buffer_bytes(cache, available) == size


def test_every_piece_is_read_once_by_whichever_thread_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_PIECE", 1 << 10)
    taken: list[int] = []

    class Piece:
        def __init__(self, number: int) -> None:
            self.number = number

        def max(self) -> None:
            taken.append(self.number)

    bandwidth._pass([Piece(number) for number in range(100)], threads=3)  # type: ignore[misc]
    assert sorted(taken) == list(range(100))


def test_a_buffer_of_any_size_is_read_whole() -> None:
    assert read_bandwidth(threads=2, size=(5 << 20) + 8, repeats=2) > 0


@pytest.mark.parametrize(("cache", "available"), [(32 * MIB, 1000 * MIB), (0, 500 * MIB)])
def test_too_little_memory_to_tell_it_from_cache_is_no_number(
    cache: int, available: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bandwidth, "last_level_cache", lambda: cache)
    monkeypatch.setattr(bandwidth, "memory_available", lambda: available)
    monkeypatch.setattr(bandwidth, "read_bandwidth", lambda *_: pytest.fail("it was measured"))
    assert measure_bandwidth() is None


def test_a_process_that_gets_no_memory_has_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: int) -> float:
        raise MemoryError

    monkeypatch.setattr(bandwidth, "read_bandwidth", refused)
    assert measure_bandwidth() is None


def test_what_was_measured_says_how() -> None:
    found = measure_bandwidth()
    assert found is not None
    assert found.buffer_bytes >= 8 * found.cache_bytes
    assert found.threads >= 1
    assert 1e8 < found.bytes_per_s < 1e13
