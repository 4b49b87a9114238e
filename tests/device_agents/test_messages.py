"""Messages: every one survives a frame; none is taken for another; nothing unexpected gets through."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_agents import messages
from device_agents.api import Vitals
from device_agents.errors import ProtocolError
from device_agents.frames import Frame, FrameKind
from device_agents.messages import Reply, Request
from device_agents.probe import Probe
from kvengine.codec import encode
from kvengine.program import (
    CacheRows,
    Decode,
    Generate,
    Measurement,
    Observation,
    OperationError,
    Prefill,
    Program,
    Reset,
    Sample,
    Workload,
)
from kvengine.recipe import SessionRecipe
from kvengine.session import SessionInfo
from tests.device_agents.conftest import unhurried

RECIPE = SessionRecipe("nnapi", ("USE_FP16",), {"a": "b"}, 2, environment={"OMP_NUM_THREADS": "1"})
REQUESTS: list[Request] = [
    messages.Hello(),
    messages.Open("/data/local/tmp/artifact", RECIPE),
    messages.RunProgram(Program(8, (Prefill((1, 2), 1, "last"), Decode((3,)), Generate(4, 2), Reset()))),
    messages.RunWorkload(Workload((1, 2, 3), 4, chunk=2)),
    messages.GetVitals(),
    messages.Close(),
]
REPLIES: list[Reply] = [
    messages.HelloReply(Probe("m", "s", "arm64-v8a", "os", "b", 8, 1 << 33, ("X",), {"python": "3.11"})),
    messages.Opened(SessionInfo("id", RECIPE, 1.5, "1.32.0", "2.4", "3.11", {"cpu": 9}, ("note",))),
    messages.Observations((messages.ObservationHead((3,), (1, 2), OperationError("InvalidToken", "why")),)),
    messages.Measured(Measurement((Sample(1.5, (0.5,), (7,)),), 2.0, 1, 2, {"cpu": 9}, 2)),
    messages.VitalsReply(Vitals(1e9, 0.5, 1, (1, 2), "g", {"BIG": 41.5}, 0, 55.0, True)),
    messages.Closed(),
    messages.Failed("InvalidToken", "why"),
    messages.RunnerError("Traceback ..."),
]
OBSERVATION = Observation((2,), np.arange(6, dtype=np.float32).reshape(2, 3), (1,), OperationError("X", "y"))


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: r.kind)
def test_a_request_survives(request_: Request) -> None:
    assert messages.request_of(messages.request_frame(request_, 7)) == request_


@pytest.mark.parametrize("reply", REPLIES, ids=lambda r: r.kind)
def test_a_reply_survives(reply: Reply) -> None:
    assert messages.reply_of(messages.reply_frame(reply, 7)) == reply


def test_the_samples_above_are_all_there_are() -> None:
    assert {type(r) for r in REQUESTS} == set(Request.__args__)
    assert {type(r) for r in REPLIES} == set(Reply.__args__)


def test_a_reply_is_no_request_and_the_other_way_round() -> None:
    with pytest.raises(ProtocolError, match="sought a request, found a reply"):
        messages.request_of(messages.reply_frame(messages.Closed(), 1))
    with pytest.raises(ProtocolError, match="not a reply of this protocol"):
        messages.reply_of(Frame(FrameKind.REPLY, 1, encode(messages.Close())))


@unhurried
@given(
    st.dictionaries(
        st.sampled_from(["kind", "info", "heads", "probe", "more"]),
        st.recursive(
            st.none()
            | st.integers()
            | st.text()
            | st.sampled_from(["opened", "observations", "hello_reply", "closed"]),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
            max_leaves=5,
        ),
    )
)
def test_any_other_json_is_a_protocol_error(message: dict[str, Any]) -> None:
    if message == {"kind": "closed"}:
        return
    try:
        found = messages.reply_of(Frame(FrameKind.REPLY, 1, message))
    except ProtocolError:
        return
    assert found == messages.Observations(())


@pytest.mark.parametrize("at", [10**400, "1.5", True, None, [1.0]])
def test_a_number_of_the_wrong_type_or_size_is_a_protocol_error(at: object) -> None:
    message = encode(messages.VitalsReply(Vitals(1.0)))
    message["vitals"]["at"] = at
    with pytest.raises(ProtocolError):
        messages.reply_of(Frame(FrameKind.REPLY, 1, message))


def test_observations_are_heads_and_arrays_put_together_again() -> None:
    reply, arrays = messages.pack_observations([OBSERVATION, OBSERVATION])
    (found, _) = messages.unpack_observations(reply, arrays, 2)
    np.testing.assert_array_equal(found.logits, OBSERVATION.logits)
    assert (found.position, found.tokens, found.error) == (2, (1,), OperationError("X", "y"))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_observations_must_answer_every_operation(count: int) -> None:
    reply, arrays = messages.pack_observations([OBSERVATION] * count)
    with pytest.raises(ProtocolError, match="2 operations were answered by"):
        messages.unpack_observations(reply, arrays, 2)
    with pytest.raises(ProtocolError, match="arrays, where"):
        messages.unpack_observations(reply, arrays[:-1], count or 1)


@pytest.mark.parametrize("array", [np.zeros((2, 3), np.float64), np.zeros(3, np.float32)])
def test_logits_are_float32_rows(array: Any) -> None:
    reply, _ = messages.pack_observations([OBSERVATION])
    with pytest.raises(ProtocolError, match=r"sought logits as float32 \[rows, vocab_size\]"):
        messages.unpack_observations(reply, (array,), 1)


def cache_rows(**other: Any) -> CacheRows:
    """Two heads, three positions, four channels of int4."""
    key = np.ones((2, 3, 4), np.float32)
    codes, scale = np.zeros((2, 3, 2), np.uint8), np.ones((2, 4), np.float32)
    right = CacheRows(np.arange(3), key, 2 * key, codes, codes + 1, scale, 3 * scale)
    return dataclasses.replace(right, **other)


def test_cache_rows_travel_beside_the_logits() -> None:
    read = Observation((3, 1), np.zeros((0, 9), np.float32), cache=cache_rows())
    reply, arrays = messages.pack_observations([OBSERVATION, read, OBSERVATION])
    first, found, last = messages.unpack_observations(reply, arrays, 3)
    assert found.positions == (3, 1)
    assert found.cache is not None
    assert first.cache is None
    for field in dataclasses.fields(CacheRows):
        np.testing.assert_array_equal(getattr(found.cache, field.name), getattr(cache_rows(), field.name))
    np.testing.assert_array_equal(last.logits, OBSERVATION.logits)


@pytest.mark.parametrize(
    "wrong",
    [
        {"positions": np.arange(4)},
        {"positions": np.arange(3, dtype=np.int32)},
        {"value": np.ones((2, 2, 4), np.float32)},
        {"key": np.ones((2, 3), np.float32)},
        {"key_codes": np.zeros((2, 3, 2), np.int64)},
        {"key_scale": np.ones(4, np.float32)},
    ],
    ids=str,
)
def test_cache_rows_of_another_shape_are_a_protocol_error(wrong: dict[str, Any]) -> None:
    read = Observation((3,), np.zeros((0, 9), np.float32), cache=cache_rows(**wrong))
    reply, arrays = messages.pack_observations([read])
    with pytest.raises(ProtocolError, match="arrays of CacheRows"):
        messages.unpack_observations(reply, arrays, 1)
