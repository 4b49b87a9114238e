"""100,000 damaged frames (in ``make soak``; thousands here): a typed error each, no other way out."""

from __future__ import annotations

import json
import random
import struct
import zlib

from device_agents import messages
from device_agents.deadline import Deadline
from device_agents.errors import ProtocolError, RunnerDied
from device_agents.frames import PRELUDE_BYTES, FrameKind, encode_frame, read_frame
from tests import fuzzing
from tests.device_agents.test_frames import Source
from tests.device_agents.test_messages import OBSERVATION, REPLIES, REQUESTS

FRAMES = fuzzing.count(in_test=5_000, in_soak=100_000)


def valid_frames() -> list[bytes]:
    requests = [messages.request_frame(request, 7) for request in REQUESTS]
    replies = [messages.reply_frame(reply, 7) for reply in REPLIES]
    observed, arrays = messages.pack_observations([OBSERVATION, OBSERVATION])
    replies[2] = messages.reply_frame(observed, 7, arrays)
    return [b"".join(encode_frame(frame)) for frame in [*requests, *replies]]


def sealed(prelude: bytes, header: bytes, payload: bytes) -> bytes:
    """With lengths and checksums that are right for this header and payload."""
    head = bytearray(prelude[:28])
    struct.pack_into("<IQI", head, 12, len(header), len(payload), zlib.crc32(payload, zlib.crc32(header)))
    return bytes(head) + struct.pack("<I", zlib.crc32(head)) + header + payload


def fuzzed(draw: random.Random, good: bytes) -> bytes:
    """Damage that the checksums find, or that gets past them to the header, the arrays or the message."""
    header_bytes = int.from_bytes(good[12:16], "little")
    prelude, rest = good[:PRELUDE_BYTES], good[PRELUDE_BYTES:]
    header, payload = rest[:header_bytes], rest[header_bytes:]
    match draw.randrange(4):
        case 0:
            return fuzzing.damaged(draw, good)
        case 1:
            return sealed(prelude, fuzzing.damaged(draw, header), payload)
        case 2:
            text = json.dumps(fuzzing.damaged_json(draw, json.loads(header)))
            return sealed(prelude, text.encode(), payload)
        case _:
            return sealed(prelude, header, fuzzing.damaged(draw, payload))


def outcome(data: bytes) -> str:
    """What reading a frame and its message came to."""
    try:
        frame = read_frame(Source(data), Deadline(5))
        if frame.kind is FrameKind.REQUEST:
            messages.request_of(frame)
        else:
            reply = messages.reply_of(frame)
            if isinstance(reply, messages.Observations):
                messages.unpack_observations(reply, frame.arrays, len(reply.heads))
    except (ProtocolError, RunnerDied) as error:
        return type(error).__name__
    return "read"


def test_every_damaged_frame_is_read_or_refused_by_type() -> None:
    draw, good = random.Random(20), valid_frames()
    found = [outcome(fuzzed(draw, draw.choice(good))) for _ in range(FRAMES)]
    counts = {name: found.count(name) for name in set(found)}
    # Each way out was really taken, and most damage is found.
    assert set(counts) == {"ProtocolError", "RunnerDied", "read"}
    assert counts["ProtocolError"] > FRAMES / 4
    assert counts["read"] < FRAMES / 4, counts


def test_the_undamaged_ones_are_all_read() -> None:
    assert {outcome(good) for good in valid_frames()} == {"read"}


def test_a_damaged_frame_is_not_taken_for_the_good_one() -> None:
    """A frame is accepted only where its checksums were made for it: plain damage never gets through."""
    draw, good = random.Random(21), valid_frames()
    for _ in range(FRAMES // 5):
        one = draw.choice(good)
        bad = fuzzing.damaged(draw, one)
        if bad[: len(one)] != one:
            assert outcome(bad) != "read"
