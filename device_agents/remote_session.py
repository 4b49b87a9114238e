"""An EngineSession whose engine is a runner at the other end of a ByteStream."""

from __future__ import annotations

import contextlib
import inspect
import logging
import threading
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TypeVar

import kvengine.errors
from device_agents import messages
from device_agents.api import ByteStream, Vitals
from device_agents.deadline import Deadline
from device_agents.errors import DeadlineExceeded, InfrastructureError, ProtocolError, RunnerDied
from device_agents.frames import Array, encode_frame, read_frame
from device_agents.messages import Reply, Request
from kvengine.errors import KvEngineError
from kvengine.program import Measurement, Observation, Program, Workload
from kvengine.recipe import SessionRecipe
from kvengine.session import SessionInfo

R = TypeVar("R")

_log = logging.getLogger(__name__)

# What a device may name in a Failed; nothing else is ever looked up.
_REFUSALS: dict[str, type[KvEngineError]] = {
    name: kind
    for name, kind in inspect.getmembers(kvengine.errors, inspect.isclass)
    if issubclass(kind, KvEngineError)
}


@dataclass(frozen=True)
class Budgets:
    """Seconds a call may take before its runner counts as hanging."""

    hello_s: float = 60.0
    program_s: float = 120.0
    workload_s: float = 600.0
    vitals_s: float = 10.0
    close_s: float = 5.0


class RunnerClient:
    """Requests and replies, one at a time. After any infrastructure error the runner is ended.

    artifact: the folder that it has open, to be named in errors.
    """

    def __init__(self, stream: ByteStream, artifact: str = "") -> None:
        self._stream = stream
        self._artifact = artifact
        self._turn = threading.Lock()
        self._sequence = 0
        self._ended = ""  # why, once it has

    def call(self, request: Request, expected: type[R], deadline: Deadline) -> tuple[R, tuple[Array, ...]]:
        """Send ``request`` and read the reply, which must be an ``expected``.

        Raises:
            KvEngineError: what the engine refused, as the same class; the runner goes on.
            RunnerDied, DeadlineExceeded, ProtocolError: with the runner's last stderr lines;
                the runner has been ended, every further call raises RunnerDied.
        """
        what = request.kind
        if not self._turn.acquire(timeout=min(deadline.remaining, threading.TIMEOUT_MAX)):
            raise DeadlineExceeded(f"{what}: the runner was busy for {deadline.seconds:g} s")
        try:
            if self._ended:
                raise RunnerDied(f"{what}: this session is closed: {self._ended}")
            try:
                reply, arrays = self._exchange(request, deadline)
                if isinstance(reply, messages.RunnerError):
                    raise RunnerDied(f"the runner crashed:\n{reply.traceback}")
                if isinstance(reply, messages.Failed):
                    refusal = _refusal(reply)
                elif isinstance(reply, expected):
                    return reply, arrays
                else:
                    raise ProtocolError(f"sought {expected.__name__}, found {type(reply).__name__}")
            except InfrastructureError as error:
                raise self._end(what, error) from error
            raise refusal
        finally:
            self._turn.release()

    def reject(self, what: str, error: ProtocolError) -> InfrastructureError:
        """A reply of the right type with senseless content ends the runner too; returns what to raise."""
        return self._end(what, error)

    def close(self, deadline: Deadline) -> None:
        """Politely if the runner is idle, at once if it is in the middle of a call. Never raises."""
        if self._turn.acquire(blocking=False):
            try:
                if not self._ended:
                    self._ended = "closed from our side"
                    with contextlib.suppress(InfrastructureError):
                        self._exchange(messages.Close(), deadline)
            finally:
                self._turn.release()
        self._stream.close()

    def _exchange(self, request: Request, deadline: Deadline) -> tuple[Reply, tuple[Array, ...]]:
        self._sequence += 1
        parts = encode_frame(messages.request_frame(request, self._sequence))
        self._stream.write(b"".join(parts), deadline)
        frame = read_frame(self._stream, deadline)
        if frame.sequence != self._sequence:
            raise ProtocolError(f"sought the reply to {self._sequence}, found one to {frame.sequence}")
        return messages.reply_of(frame), frame.arrays

    def _end(self, what: str, error: InfrastructureError) -> InfrastructureError:
        """End the runner; the same error with the request and the last stderr lines added."""
        self._ended = f"{what} failed: {error}"
        self._stream.close()
        tail = self._stream.stderr_tail() or "(nothing)"
        _log.warning("runner ended: %s", self._ended)
        # onnxruntime itself may have died of the graph: then the artifact is what to look at.
        subject = f" of artifact {self._artifact}" if self._artifact else ""
        return type(error)(f"{what}: {error}\nThe runner{subject} was ended. Its last stderr lines:\n{tail}")


class RunnerSession:
    """EngineSession over a ByteStream. Made by ``open``."""

    def __init__(
        self, client: RunnerClient, info: SessionInfo, budgets: Budgets, pid: int | None = None
    ) -> None:
        """pid: the runner's process on the device, where that is known."""
        self.pid = pid
        self._client = client
        self._info = info
        self._budgets = budgets

    @classmethod
    def open(
        cls,
        stream: ByteStream,
        folder: str,
        recipe: SessionRecipe,
        deadline: Deadline,
        budgets: Budgets | None = None,
    ) -> RunnerSession:
        """Open the artifact in ``folder`` (on the device). ``stream`` is ours from now on, also on failure.

        Raises:
            KvEngineError: the engine refused the artifact or the recipe.
            InfrastructureError: see RunnerClient.call.
        """
        client = RunnerClient(stream, PurePosixPath(folder).name)
        budgets = budgets or Budgets()
        try:
            opened, _ = client.call(messages.Open(folder, recipe), messages.Opened, deadline)
        except BaseException:
            client.close(Deadline(budgets.close_s))
            raise
        return cls(client, opened.info, budgets, getattr(stream, "pid", None))

    @property
    def info(self) -> SessionInfo:
        return self._info

    def run_program(self, program: Program) -> tuple[Observation, ...]:
        """Raises what RunnerClient.call does; an operation's refusal is in its Observation."""
        request = messages.RunProgram(program)
        reply, arrays = self._client.call(request, messages.Observations, Deadline(self._budgets.program_s))
        try:
            return messages.unpack_observations(reply, arrays, len(program.operations))
        except ProtocolError as error:
            raise self._client.reject(request.kind, error) from error

    def run_workload(self, workload: Workload) -> Measurement:
        request = messages.RunWorkload(workload)
        reply, _ = self._client.call(request, messages.Measured, Deadline(self._budgets.workload_s))
        return reply.measurement

    def vitals(self, deadline: Deadline | None = None) -> Vitals:
        """The device's state as the runner reads it."""
        deadline = deadline or Deadline(self._budgets.vitals_s)
        reply, _ = self._client.call(messages.GetVitals(), messages.VitalsReply, deadline)
        return reply.vitals

    def close(self) -> None:
        self._client.close(Deadline(self._budgets.close_s))


def _refusal(reply: messages.Failed) -> KvEngineError:
    kind = _REFUSALS.get(reply.error)
    if kind is None:
        raise ProtocolError(f"the runner named an unknown engine error {reply.error!r}: {reply.message}")
    return kind(reply.message)
