"""The runner: one process on the device that opens one artifact and does as the lab host asks.

``python -m device_agents.runner`` reads frames on stdin and writes frames on stdout, nothing
else; everything that anything prints goes to stderr. It ends when stdin does, also in the
middle of work. Standard library and kvengine only, for it runs on phones.

Why no PR_SET_PDEATHSIG: that signal comes when the *thread* that started us ends, and a lab
agent starts runners from pool threads; and it does not exist between an adb host and a phone.
"""

from __future__ import annotations

import faulthandler
import logging
import math
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Final

from device_agents import messages
from device_agents.deadline import Deadline
from device_agents.errors import ProtocolError
from device_agents.frames import Array, Frame, encode_frame, read_frame
from device_agents.messages import Reply, Request
from device_agents.probe import probe
from device_agents.vitals import read_vitals
from kvengine.errors import InvalidRequest, KvEngineError
from kvengine.recipe import SessionRecipe
from kvengine.session import EngineSession

OpenEngine = Callable[[str, SessionRecipe], EngineSession]

# Exit codes, after sysexits.h.
EXIT_CRASHED: Final = 70
EXIT_ORPHANED: Final = 75
EXIT_PROTOCOL: Final = 76

# After stdin has ended an idle runner leaves at once; one that is in the middle of work is
# given this long to notice, then leaves without asking.
_ORPHAN_GRACE_S: Final = 0.5

_log = logging.getLogger("kvfarm.runner")


class _Input:
    """Frames' bytes from a file descriptor. No deadline: waiting for the lab host is the runner's life."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def read_exactly(self, size: int, deadline: Deadline) -> bytes:
        """Raises EOFError when stdin has ended."""
        buffer = bytearray()
        while len(buffer) < size:
            piece = os.read(self._descriptor, min(size - len(buffer), 1 << 20))
            if not piece:
                raise EOFError
            buffer += piece
        return bytes(buffer)


class Runner:
    """Answers one request after the other. The engine is opened by ``open_engine(folder, recipe)``."""

    def __init__(self, open_engine: OpenEngine, input_descriptor: int, output_descriptor: int) -> None:
        self._open_engine = open_engine
        self._input = _Input(input_descriptor)
        self._output = output_descriptor
        self._engine: EngineSession | None = None
        self._requests: queue.Queue[Frame | Exception] = queue.Queue()
        self._leaving = threading.Event()

    def serve(self) -> int:
        """Until Close or the end of stdin; returns the exit code."""
        threading.Thread(target=self._read, name="requests", daemon=True).start()
        try:
            while True:
                item = self._requests.get()
                if isinstance(item, EOFError):
                    return 0
                if isinstance(item, Exception):
                    _log.error("the lab host sent what is no request: %s", item)
                    return EXIT_PROTOCOL
                code = self._answer(item)
                if code is not None:
                    return code
        except BrokenPipeError:
            return EXIT_ORPHANED
        finally:
            self._close_engine()
            self._leaving.set()

    def _read(self) -> None:
        """In a thread of its own, so that the end of stdin is seen also during work."""
        while True:
            try:
                self._requests.put(read_frame(self._input, Deadline(math.inf)))
            except (EOFError, ProtocolError, OSError) as error:
                self._requests.put(error)
                break
        if not self._leaving.wait(_ORPHAN_GRACE_S):
            os._exit(EXIT_ORPHANED)

    def _answer(self, frame: Frame) -> int | None:
        try:
            request = messages.request_of(frame)
        except ProtocolError as error:
            _log.error("%s", error)
            return EXIT_PROTOCOL
        try:
            reply, arrays = self._handle(request)
            parts = encode_frame(messages.reply_frame(reply, frame.sequence, arrays))
        except KvEngineError as error:
            refusal = messages.Failed(type(error).__name__, str(error))
            self._write(encode_frame(messages.reply_frame(refusal, frame.sequence)))
            return None
        except Exception:
            crash = messages.RunnerError(traceback.format_exc())
            self._write(encode_frame(messages.reply_frame(crash, frame.sequence)))
            return EXIT_CRASHED
        self._write(parts)
        return 0 if isinstance(request, messages.Close) else None

    def _handle(self, request: Request) -> tuple[Reply, tuple[Array, ...]]:
        match request:
            case messages.Hello():
                return messages.HelloReply(probe()), ()
            case messages.Open():
                if self._engine is not None:
                    raise InvalidRequest("this runner has an artifact open; start another runner")
                self._engine = self._open_engine(request.folder, request.recipe)
                return messages.Opened(self._engine.info), ()
            case messages.RunProgram():
                return messages.pack_observations(self._opened().run_program(request.program))
            case messages.RunWorkload():
                return messages.Measured(self._opened().run_workload(request.workload)), ()
            case messages.GetVitals():
                return messages.VitalsReply(read_vitals()), ()
            case messages.Close():
                self._close_engine()
                return messages.Closed(), ()

    def _opened(self) -> EngineSession:
        if self._engine is None:
            raise InvalidRequest("no artifact is open in this runner; send Open first")
        return self._engine

    def _close_engine(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def _write(self, parts: list[bytes | memoryview]) -> None:
        for part in parts:
            view = memoryview(part)
            while view:
                view = view[os.write(self._output, view) :]


def _open_local_engine(folder: str, recipe: SessionRecipe) -> EngineSession:
    from kvengine.engine import LocalEngine

    return LocalEngine.open(folder, recipe)


def main(open_engine: OpenEngine = _open_local_engine) -> int:
    """Take stdin and stdout for frames, point the old descriptors where they do no harm, and serve."""
    input_descriptor, output_descriptor = os.dup(0), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    os.close(nowhere)
    os.dup2(2, 1)  # also what C libraries and child processes print
    faulthandler.enable()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(name)s %(levelname)s %(message)s")
    return Runner(open_engine, input_descriptor, output_descriptor).serve()


if __name__ == "__main__":
    sys.exit(main())
