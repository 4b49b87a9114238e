"""A process on this machine as a ByteStream: every wait has a deadline, nothing is left behind."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import IO

from device_agents.deadline import Deadline
from device_agents.errors import DeadlineExceeded, RunnerDied

_TAIL_BYTES = 16 << 10
_TAIL_LINES = 20
_READ_BYTES = 1 << 20
_SLICE_S = 0.1  # how soon a waiting call notices that close() was called
_KILL_WAIT_S = 10.0  # SIGKILL acts at once, unless the process hangs inside the kernel

_log = logging.getLogger(__name__)


class ProcessStream:
    """stdin and stdout of a process started here, in a process group of its own.

    stderr is kept as a tail. It is drained by the calls that wait, so no thread is needed:
    a process that works is always waited for. Calls from several threads take turns;
    ``close`` may come from any thread and interrupts a waiting call.

    Raises:
        RunnerDied: the program cannot be started.
    """

    def __init__(
        self, argv: Sequence[str], environment: Mapping[str, str] | None = None, *, grace_s: float = 2.0
    ) -> None:
        """environment: all of it; None inherits ours. grace_s: for each of the polite ways to end."""
        try:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                env=None if environment is None else dict(environment),
                start_new_session=True,
            )
        except OSError as error:
            raise RunnerDied(f"cannot start {list(argv)}: {error}") from error
        self.pid = self._process.pid
        self._name = f"process {self.pid} ({os.path.basename(argv[0])})"
        self._exit = os.pidfd_open(self.pid)  # readable once it has ended, also when a child holds its pipes
        self._stdin = _pipe(self._process.stdin)
        self._stdout = _pipe(self._process.stdout)
        self._stderr = _pipe(self._process.stderr)
        for pipe in (self._stdin, self._stdout, self._stderr):
            os.set_blocking(pipe.fileno(), False)
        self._grace_s = grace_s
        self._tail = bytearray()
        self._stderr_ended = False
        self._turn = threading.Lock()
        self._closing = threading.Event()
        self._closed = False

    def write(self, data: bytes, deadline: Deadline) -> None:
        """Raises RunnerDied when the process takes no more input, DeadlineExceeded when late."""
        with self._take_turn(deadline, "writing to"):
            rest = memoryview(data)
            while rest:
                ended = self._has_ended()
                try:
                    rest = rest[os.write(self._stdin.fileno(), rest) :]
                except BlockingIOError:
                    if ended:  # a child of it still holds the pipe
                        raise self._death(deadline, "while being written to") from None
                    self._wait(self._stdin.fileno(), select.POLLOUT, deadline, "writing to")
                except BrokenPipeError:
                    raise self._death(deadline, "while being written to") from None

    def read_exactly(self, size: int, deadline: Deadline) -> bytes:
        """Raises RunnerDied at end of file or death, DeadlineExceeded when late."""
        buffer = bytearray()
        with self._take_turn(deadline, "reading from"):
            while len(buffer) < size:
                ended = self._has_ended()  # asked first: what it wrote before its end is still read
                try:
                    piece = os.read(self._stdout.fileno(), min(size - len(buffer), _READ_BYTES))
                except BlockingIOError:
                    if not ended:
                        self._wait(self._stdout.fileno(), select.POLLIN, deadline, "reading from")
                        continue
                    piece = b""
                if not piece:
                    raise self._death(deadline, f"after {len(buffer):,} of {size:,} bytes sought")
                buffer += piece
        return bytes(buffer)

    def stderr_tail(self) -> str:
        """The last lines of stderr, also after close."""
        if self._turn.acquire(blocking=False):
            try:
                self._drain_stderr()
            finally:
                self._turn.release()
        lines = bytes(self._tail).decode(errors="replace").splitlines()
        return "\n".join(lines[-_TAIL_LINES:])

    def close(self) -> None:
        """End of stdin, then SIGTERM, then SIGKILL to the whole group; returns once it is gone."""
        self._closing.set()
        with self._turn:  # whoever has it gives it back within one slice
            if self._closed:
                return
            self._stdin.close()
            if not self._await_end(self._grace_s):
                self._signal(signal.SIGTERM)
                self._await_end(self._grace_s)
            # Before the process is reaped, for until then its group's number cannot be anyone else's.
            self._signal(signal.SIGKILL)
            if not self._await_end(_KILL_WAIT_S):
                _log.error("%s survived SIGKILL for %g s: it hangs in the kernel", self._name, _KILL_WAIT_S)
            self._drain_stderr()
            self._process.poll()
            self._stdout.close()
            self._stderr.close()
            os.close(self._exit)
            self._closed = True

    @contextlib.contextmanager
    def _take_turn(self, deadline: Deadline, doing: str) -> Iterator[None]:
        if not self._turn.acquire(timeout=min(deadline.remaining, threading.TIMEOUT_MAX)):
            raise DeadlineExceeded(f"{self._name} was busy with another call for {deadline.seconds:g} s")
        try:
            self._check_open(doing)
            yield
        finally:
            self._turn.release()

    def _check_open(self, doing: str) -> None:
        if self._closing.is_set():
            raise RunnerDied(f"{doing} {self._name}: it was closed from our side")

    def _wait(self, descriptor: int, event: int, deadline: Deadline, doing: str) -> None:
        """One slice at most. Raises DeadlineExceeded; RunnerDied if closed meanwhile."""
        deadline.check(f"{doing} {self._name}")
        self._poll(min(deadline.remaining, _SLICE_S), (descriptor, event), (self._exit, select.POLLIN))
        self._check_open(doing)

    def _poll(self, seconds: float, *wanted: tuple[int, int]) -> None:
        """Until one of ``wanted`` is ready or ``seconds`` have passed; stderr is drained besides."""
        poller = select.poll()
        for descriptor, event in wanted:
            poller.register(descriptor, event)
        if not self._stderr_ended:
            poller.register(self._stderr.fileno(), select.POLLIN)
        poller.poll(seconds * 1000)
        self._drain_stderr()

    def _drain_stderr(self) -> None:
        for _ in range(16):  # bounded, for it may be written as fast as we read
            if self._stderr_ended or self._closed:
                return
            try:
                piece = os.read(self._stderr.fileno(), 1 << 16)
            except BlockingIOError:
                return
            self._stderr_ended = not piece
            self._tail += piece
            del self._tail[:-_TAIL_BYTES]

    def _has_ended(self) -> bool:
        poller = select.poll()
        poller.register(self._exit, select.POLLIN)
        return bool(poller.poll(0))

    def _await_end(self, seconds: float) -> bool:
        """Whether the process ends in time; meanwhile its output is thrown away, lest it blocks on it."""
        deadline = Deadline(seconds)
        wanted = [(self._exit, select.POLLIN), (self._stdout.fileno(), select.POLLIN)]
        while not self._has_ended():
            if deadline.expired:
                return False
            self._poll(min(deadline.remaining, _SLICE_S), *wanted)
            with contextlib.suppress(BlockingIOError):
                if not os.read(self._stdout.fileno(), _READ_BYTES):
                    del wanted[1:]  # at its end it would be ready for ever
        return True

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def _death(self, deadline: Deadline, when: str) -> RunnerDied:
        ended = self._await_end(min(self._grace_s, deadline.remaining))
        self._drain_stderr()
        if not ended:
            return RunnerDied(f"{self._name} closed its pipes {when}, yet still runs")
        return RunnerDied(f"{self._name} ended {when}: {self._exit_status()}")

    def _exit_status(self) -> str:
        """Without reaping, see close."""
        try:
            status = os.waitid(os.P_PIDFD, self._exit, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        except ChildProcessError:
            status = None
        if status is None:
            return "exit code unknown"
        if status.si_code == os.CLD_EXITED:
            return f"exit code {status.si_status}"
        return f"killed by {signal.Signals(status.si_status).name}"


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe
