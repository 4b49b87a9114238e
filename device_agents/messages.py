"""What a lab host and a runner say to each other, as dataclasses; arrays travel beside them."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from device_agents import frames
from device_agents.api import Vitals
from device_agents.errors import ProtocolError
from device_agents.frames import Array, Frame, FrameKind
from device_agents.probe import Probe
from kvengine.codec import DecodeError, decode, encode
from kvengine.program import CacheRows, Measurement, Observation, OperationError, Program, Workload
from kvengine.recipe import SessionRecipe
from kvengine.session import SessionInfo


@dataclass(frozen=True)
class Hello:
    """Who are you?"""

    kind: Literal["hello"] = "hello"


@dataclass(frozen=True)
class Open:
    """Open the artifact in ``folder`` (on the device). One a runner."""

    folder: str
    recipe: SessionRecipe
    kind: Literal["open"] = "open"


@dataclass(frozen=True)
class RunProgram:
    program: Program
    kind: Literal["run_program"] = "run_program"


@dataclass(frozen=True)
class RunWorkload:
    workload: Workload
    kind: Literal["run_workload"] = "run_workload"


@dataclass(frozen=True)
class GetVitals:
    kind: Literal["get_vitals"] = "get_vitals"


@dataclass(frozen=True)
class Close:
    """Close the session and end; answered by Closed, the runner's last frame."""

    kind: Literal["close"] = "close"


@dataclass(frozen=True)
class HelloReply:
    probe: Probe
    protocol: int = frames.PROTOCOL_VERSION
    kind: Literal["hello_reply"] = "hello_reply"


@dataclass(frozen=True)
class Opened:
    info: SessionInfo
    kind: Literal["opened"] = "opened"


@dataclass(frozen=True)
class ObservationHead:
    """An Observation without its arrays. cache: whether it has one."""

    positions: tuple[int, ...]
    tokens: tuple[int, ...]
    error: OperationError | None
    cache: bool = False


@dataclass(frozen=True)
class Observations:
    """One head an operation; the frame carries for each the logits, float32 [rows, vocab_size], and the
    seven arrays of its CacheRows, in the order of their fields, if it has one."""

    heads: tuple[ObservationHead, ...]
    kind: Literal["observations"] = "observations"


@dataclass(frozen=True)
class Measured:
    measurement: Measurement
    kind: Literal["measured"] = "measured"


@dataclass(frozen=True)
class VitalsReply:
    vitals: Vitals
    kind: Literal["vitals"] = "vitals"


@dataclass(frozen=True)
class Closed:
    kind: Literal["closed"] = "closed"


@dataclass(frozen=True)
class Failed:
    """The engine refused: the class name in kvengine.errors and its message. The runner goes on."""

    error: str
    message: str
    kind: Literal["failed"] = "failed"


@dataclass(frozen=True)
class RunnerError:
    """The runner itself crashed; it ends after this frame."""

    traceback: str
    kind: Literal["runner_error"] = "runner_error"


Request = Hello | Open | RunProgram | RunWorkload | GetVitals | Close
Reply = HelloReply | Opened | Observations | Measured | VitalsReply | Closed | Failed | RunnerError


def request_frame(request: Request, sequence: int) -> Frame:
    return Frame(FrameKind.REQUEST, sequence, encode(request))


def reply_frame(reply: Reply, sequence: int, arrays: Sequence[Array] = ()) -> Frame:
    return Frame(FrameKind.REPLY, sequence, encode(reply), tuple(arrays))


def request_of(frame: Frame) -> Request:
    """Raises ProtocolError for anything but a request."""
    return typing.cast(Request, _decode(Request, frame, FrameKind.REQUEST))


def reply_of(frame: Frame) -> Reply:
    """Raises ProtocolError for anything but a reply."""
    return typing.cast(Reply, _decode(Reply, frame, FrameKind.REPLY))


def pack_observations(observations: Sequence[Observation]) -> tuple[Observations, tuple[Array, ...]]:
    heads = tuple(ObservationHead(o.positions, o.tokens, o.error, o.cache is not None) for o in observations)
    arrays: list[Array] = []
    for observation in observations:
        arrays.append(observation.logits)
        if observation.cache is not None:
            arrays += [getattr(observation.cache, name) for name in _CACHE_FIELDS]
    return Observations(heads), tuple(arrays)


def unpack_observations(
    reply: Observations, arrays: Sequence[Array], operations: int
) -> tuple[Observation, ...]:
    """Raises ProtocolError unless there is one head and what it says of arrays for each operation."""
    sought = sum(1 + head.cache * len(_CACHE_FIELDS) for head in reply.heads)
    if len(reply.heads) != operations or len(arrays) != sought:
        raise ProtocolError(
            f"{operations} operations were answered by {len(reply.heads)} observations "
            f"and {len(arrays)} arrays, where {sought} were announced"
        )
    rest = iter(arrays)
    return tuple(_observation(head, rest) for head in reply.heads)


_CACHE_FIELDS = tuple(field.name for field in dataclasses.fields(CacheRows))
_CODES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.int8), np.dtype(np.uint8))


def _observation(head: ObservationHead, arrays: Iterator[Array]) -> Observation:
    logits = next(arrays)
    if logits.dtype != np.float32 or logits.ndim != 2:
        raise ProtocolError(
            f"sought logits as float32 [rows, vocab_size], found {logits.dtype} {logits.shape}"
        )
    if not head.positions:
        raise ProtocolError("sought the position of each batch row, found none")
    cache = _cache_rows([next(arrays) for _ in _CACHE_FIELDS]) if head.cache else None
    return Observation(head.positions, logits, head.tokens, head.error, cache)


def _cache_rows(arrays: Sequence[Array]) -> CacheRows:
    """Raises ProtocolError unless types and shapes are those that CacheRows states."""
    rows = CacheRows(*arrays)
    heads, count, width = rows.key.shape if rows.key.ndim == 3 else (0, 0, 0)
    float32 = np.dtype(np.float32)
    right = (
        rows.positions.dtype == np.int64
        and rows.positions.shape == (count,)
        and rows.value.shape == (heads, count, width)
        and all(s.shape == (heads, width) for s in (rows.key_scale, rows.value_scale))
        and all(p.dtype == float32 for p in (rows.key, rows.value, rows.key_scale, rows.value_scale))
        and all(c.dtype in _CODES for c in (rows.key_codes, rows.value_codes))
        and all(c.shape[:2] == (heads, count) for c in (rows.key_codes, rows.value_codes))
    )
    if not right:
        raise ProtocolError(
            f"sought the arrays of CacheRows, found {[(str(a.dtype), a.shape) for a in arrays]}"
        )
    return rows


def _decode(union: Any, frame: Frame, kind: FrameKind) -> Any:
    if frame.kind is not kind:
        raise ProtocolError(f"sought a {kind.name.lower()}, found a {frame.kind.name.lower()}")
    try:
        return decode(union, frame.message)
    except (DecodeError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ProtocolError(f"not a {kind.name.lower()} of this protocol: {error}") from error
