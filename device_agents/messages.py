"""What a lab host and a runner say to each other, as dataclasses; arrays travel beside them."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from device_agents import frames
from device_agents.api import Vitals
from device_agents.errors import ProtocolError
from device_agents.frames import Array, Frame, FrameKind
from device_agents.probe import Probe
from kvengine.codec import DecodeError, decode, encode
from kvengine.program import Measurement, Observation, OperationError, Program, Workload
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
    """An Observation without its logits."""

    position: int
    tokens: tuple[int, ...]
    error: OperationError | None


@dataclass(frozen=True)
class Observations:
    """One head an operation; the frame carries as many float32 arrays [rows, vocab_size]."""

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
    heads = tuple(ObservationHead(o.position, o.tokens, o.error) for o in observations)
    return Observations(heads), tuple(o.logits for o in observations)


def unpack_observations(
    reply: Observations, arrays: Sequence[Array], operations: int
) -> tuple[Observation, ...]:
    """Raises ProtocolError unless there is one head and one array of logits for each operation."""
    if not len(arrays) == len(reply.heads) == operations:
        raise ProtocolError(
            f"{operations} operations were answered by {len(reply.heads)} observations "
            f"and {len(arrays)} arrays of logits"
        )
    for array in arrays:
        if array.dtype != np.float32 or array.ndim != 2:
            raise ProtocolError(
                f"sought logits as float32 [rows, vocab_size], found {array.dtype} {array.shape}"
            )
    return tuple(
        Observation(head.position, array, head.tokens, head.error)
        for head, array in zip(reply.heads, arrays, strict=True)
    )


def _decode(union: Any, frame: Frame, kind: FrameKind) -> Any:
    if frame.kind is not kind:
        raise ProtocolError(f"sought a {kind.name.lower()}, found a {frame.kind.name.lower()}")
    try:
        return decode(union, frame.message)
    except (DecodeError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ProtocolError(f"not a {kind.name.lower()} of this protocol: {error}") from error
