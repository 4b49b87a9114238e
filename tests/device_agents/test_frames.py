"""Frames: what goes in comes out; whatever else arrives is refused, never misread."""

from __future__ import annotations

import json
import struct
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from device_agents.deadline import Deadline
from device_agents.errors import DeadlineExceeded, ProtocolError, RunnerDied
from device_agents.frames import PRELUDE_BYTES, Frame, FrameKind, Limits, encode_frame, read_frame
from tests.device_agents.conftest import unhurried

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
arrays = st.sampled_from(["<f4", "<f2", "<f8", "<i4", "<i8", "|i1", "|u1"]).flatmap(
    lambda dtype: hnp.arrays(
        np.dtype(dtype), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
    )
)
frames = st.builds(
    Frame,
    st.sampled_from(FrameKind),
    st.integers(0, 2**32 - 1),
    st.dictionaries(st.text(), json_values, max_size=4),
    st.lists(arrays, max_size=3).map(tuple),
)


class Source:
    """Bytes that were received; their end is the runner's death."""

    def __init__(self, data: bytes) -> None:
        self._rest = data

    def read_exactly(self, size: int, deadline: Deadline) -> bytes:
        if size > len(self._rest):
            raise RunnerDied("end of file")
        piece, self._rest = self._rest[:size], self._rest[size:]
        return piece


def wire(frame: Frame) -> bytes:
    return b"".join(encode_frame(frame))


def read(data: bytes, limits: Limits | None = None) -> Frame:
    return read_frame(Source(data), Deadline(5), limits or Limits())


def same(one: Frame, other: Frame) -> bool:
    """Also bit by bit, for NaN is not equal to itself."""
    return (one.kind, one.sequence, one.message) == (other.kind, other.sequence, other.message) and [
        (a.dtype, a.shape, a.tobytes()) for a in one.arrays
    ] == [(a.dtype, a.shape, a.tobytes()) for a in other.arrays]


def crafted(header: object, body: bytes = b"", **prelude: int) -> bytes:
    """A frame with right checksums and wrong content."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    lengths = {
        "header_bytes": len(text),
        "payload_bytes": len(body),
        "version": 1,
        "kind": 2,
        "zero": 0,
    } | prelude
    head = struct.pack(
        "<4sBBHIIQI",
        b"KVFR",
        lengths["version"],
        lengths["kind"],
        lengths["zero"],
        1,
        lengths["header_bytes"],
        lengths["payload_bytes"],
        zlib.crc32(body, zlib.crc32(text)),
    )
    return head + struct.pack("<I", zlib.crc32(head)) + text + body


@unhurried
@given(frames)
def test_a_frame_survives_the_wire(frame: Frame) -> None:
    assert same(read(wire(frame)), frame)


@unhurried
@given(frames, frames)
def test_reading_a_frame_takes_not_a_byte_of_the_next(first: Frame, second: Frame) -> None:
    source = Source(wire(first) + wire(second))
    assert same(read_frame(source, Deadline(5)), first)
    assert same(read_frame(source, Deadline(5)), second)


@unhurried
@given(frames, st.data())
def test_any_damaged_byte_is_an_infrastructure_error(frame: Frame, data: st.DataObject) -> None:
    good = wire(frame)
    at = data.draw(st.integers(0, len(good) - 1))
    bad = good[:at] + bytes([good[at] ^ data.draw(st.integers(1, 255))]) + good[at + 1 :]
    with pytest.raises((ProtocolError, DeadlineExceeded, RunnerDied)):
        read(bad)


@unhurried
@given(frames, st.data())
def test_any_truncation_is_a_dead_runner(frame: Frame, data: st.DataObject) -> None:
    good = wire(frame)
    with pytest.raises(RunnerDied):
        read(good[: data.draw(st.integers(0, len(good) - 1))])


@unhurried
@given(st.binary(min_size=PRELUDE_BYTES, max_size=200))
def test_garbage_is_refused_and_shown(garbage: bytes) -> None:
    with pytest.raises(ProtocolError, match="first bytes") as caught:
        read(garbage)
    assert f"first bytes: {garbage[:32]!r}"[:40] in str(caught.value)


@unhurried
@given(
    st.recursive(json_values, lambda inner: st.fixed_dictionaries({"message": inner, "arrays": inner})),
    st.binary(),
)
def test_a_header_of_any_other_json_is_refused(header: Any, payload: bytes) -> None:
    try:
        frame = read(crafted(header, payload))
    except ProtocolError:
        return
    assert isinstance(frame.message, dict)
    assert sum(a.nbytes for a in frame.arrays) == len(payload)


@pytest.mark.parametrize(
    "head",
    [
        {"dtype": "<f4", "shape": [3]},  # 12 bytes declared, 8 sent
        {"dtype": "<f4", "shape": [-1]},
        {"dtype": "<f4", "shape": [-2, -1]},
        {"dtype": "<f4", "shape": [2.0]},
        {"dtype": "<f4", "shape": [True, 2]},
        {"dtype": "<f4", "shape": [2**62, 0]},
        {"dtype": "<f4", "shape": [10**30]},
        {"dtype": "<f4", "shape": [1] * 40},
        {"dtype": ">f4", "shape": [2]},
        {"dtype": "O", "shape": [1]},
        {"dtype": "|S8", "shape": [1]},
        {"dtype": "<f4", "shape": [2], "more": 1},
        {"dtype": "<f4"},
    ],
)
def test_arrays_must_match_the_payload(head: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        read(crafted({"message": {}, "arrays": [head]}, bytes(8)))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"message": {"x": NaN}, "arrays": []}',
        b'{"message": {"x": ' + b"9" * 5000 + b'}, "arrays": []}',
        b'{"message": {"x": 1}, "arrays": []} trailing',
    ],
)
def test_a_header_that_is_no_json_is_refused(text: bytes) -> None:
    with pytest.raises(ProtocolError):
        read(crafted(text))


@pytest.mark.parametrize("prelude", [{"version": 2}, {"kind": 0}, {"kind": 3}, {"zero": 1}])
def test_unknown_versions_kinds_and_flags_are_refused(prelude: dict[str, int]) -> None:
    with pytest.raises(ProtocolError):
        read(crafted({"message": {}, "arrays": []}, b"", **prelude))


@pytest.mark.parametrize(
    "lie", [{"header_bytes": 2**32 - 1}, {"payload_bytes": 2**63}, {"payload_bytes": (512 << 20) + 1}]
)
def test_a_declared_length_over_the_limit_is_refused_before_anything_is_read(lie: dict[str, int]) -> None:
    with pytest.raises(ProtocolError, match="may be"):
        read(crafted({"message": {}, "arrays": []}, b"", **lie))


def test_a_lying_length_within_the_limit_costs_no_memory() -> None:
    data = crafted({"message": {}, "arrays": []}, bytes(10), payload_bytes=500 << 20)
    tracemalloc.start()
    with pytest.raises(RunnerDied):
        read(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_too_much_at_once_is_refused_by_the_sender() -> None:
    frame = Frame(FrameKind.REPLY, 1, {}, (np.zeros(100, np.float32),))
    with pytest.raises(ProtocolError, match="may be 64 bytes, this one is 400"):
        encode_frame(frame, Limits(payload_bytes=64))
    with pytest.raises(ProtocolError, match="header may be 8 bytes"):
        encode_frame(frame, Limits(header_bytes=8))


def test_arrays_that_frames_do_not_carry_are_refused_by_the_sender() -> None:
    with pytest.raises(ProtocolError, match="complex64"):
        encode_frame(Frame(FrameKind.REPLY, 1, {}, (np.zeros(1, np.complex64),)))


def test_order_and_strides_of_the_senders_memory_do_not_matter() -> None:
    array = np.arange(24, dtype=">i4").reshape(4, 6)[::2, ::-1].T
    (found,) = read(wire(Frame(FrameKind.REPLY, 1, {}, (array,)))).arrays
    np.testing.assert_array_equal(found, array)
