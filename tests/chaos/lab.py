"""harness.lab.Lab with the agent in a process of its own and a Unix socket in Ray's place.

All else is what a release runs with: the harness's Farm, leasing and recovery on this side, LabActor,
LabAgent, leases and the journal of results on the other. A nursery, forked early and without threads,
starts agents.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from device_agents import results
from device_agents.config import DeviceConfig
from device_agents.deadline import Deadline
from device_agents.errors import DeadlineExceeded, InfrastructureError
from device_agents.lab_agent import LabAgent
from device_agents.results import Kept, Key
from device_agents.virtual.namespaces import die_with_parent
from harness import lab
from harness.lab import Answer, LabActor, Node
from tests.chaos.device import make

NURSERY = "CHAOS_NURSERY"  # names its socket
OUTLIVES = "CHAOS_AGENT_OUTLIVES"  # set: the agent does not end with the client that started it
KILL_AFTER = "CHAOS_KILL_AGENT"  # names a file; who removes it dies between a result's file and its answer
START_S = 20.0


class ChaosLab:
    """The part of Lab that Farm uses. root: with the agent's socket and its PID beside it."""

    def __init__(self, name: str, node: Node, root: Path | None, **_: Any) -> None:
        assert root is not None
        self.name, self.host = name, False
        self._root = root
        self._up = False

    @property
    def running(self) -> bool:
        return self._up

    def start(self, configs: Sequence[DeviceConfig]) -> None:
        deadline = Deadline(START_S)
        while True:
            try:
                self._ask("start", START_S, self._root, tuple(configs))
                self._up = True
                return
            except InfrastructureError:
                if deadline.expired:
                    raise
            order = [str(self._root), str(os.getpid())]
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as nursery:
                nursery.connect(os.environ[NURSERY])
                nursery.sendall("\n".join(order).encode())
                nursery.shutdown(socket.SHUT_WR)
                nursery.recv(1)  # once it is forked

    def call(self, method: str, seconds: float, *arguments: Any) -> Any:
        if not self._up:
            raise InfrastructureError(f"{method}: the agent of {self.name} is not running")
        return self._ask("call", seconds, method, arguments)

    def begin(self, method: str, *arguments: Any) -> None:
        pass

    def find(self) -> bool:
        return self._up

    def close(self) -> None:
        up, self._up = self._up, False
        if up:
            with contextlib.suppress(InfrastructureError):
                self._ask("stop", START_S, True)

    def _ask(self, what: str, seconds: float, *arguments: Any) -> Any:
        try:
            with Client(str(_socket(self._root)), "AF_UNIX") as connection:
                connection.send((what, arguments))
                if not connection.poll(seconds):
                    raise DeadlineExceeded(f"{what}: no answer within {seconds:g} s")
                answer: Answer = connection.recv()
        except (OSError, EOFError) as error:
            self._up = False
            raise InfrastructureError(f"{what}: the agent of {self.name} died: {error!r}") from error
        if answer.ended:
            self._up = False
            raise InfrastructureError(f"{what}: the agent of {self.name} has ended")
        if answer.error is not None:
            raise answer.error
        return answer.value


def agent_of(root: Path) -> int | None:
    """PID of the agent that was started last."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return int(_pid(root).read_text())
    return None


def run_nursery(path: str, enter: Callable[[Path], None]) -> None:
    """Forks an agent for whoever asks, until its parent ends. enter: makes the child part of a round."""
    die_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries the agents
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        while True:
            connection, _ = listener.accept()
            with connection:
                root, client = connection.makefile().read().split("\n")
                if os.fork() == 0:
                    listener.close()
                    connection.close()
                    try:
                        _run_agent(Path(root), int(client), enter)
                    finally:
                        os._exit(1)
                connection.sendall(b".")


def _run_agent(root: Path, client: int, enter: Callable[[Path], None]) -> None:
    die_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    enter(root)
    setattr(lab, "LabAgent", functools.partial(LabAgent, make=make))  # noqa: B010 (as mypy wants it)
    _die_between_result_and_answer()
    root.mkdir(parents=True, exist_ok=True)
    path = _socket(root)
    with (root / "chaos.lock").open("w") as lock:
        import fcntl

        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os._exit(0)  # another one was quicker
        path.unlink(missing_ok=True)
        _pid(root).write_text(str(os.getpid()))
        if OUTLIVES not in os.environ:
            threading.Thread(target=_end_with, args=(client,), daemon=True).start()
        actor = LabActor()
        with Listener(str(path), "AF_UNIX", backlog=64) as listener:
            while True:
                with contextlib.suppress(OSError, EOFError):
                    threading.Thread(target=_serve, args=(actor, listener.accept()), daemon=True).start()


def _serve(actor: LabActor, connection: Connection) -> None:
    with connection, contextlib.suppress(OSError, EOFError):
        what, arguments = connection.recv()
        answer: Answer = getattr(actor, what)(*arguments)
        connection.send(answer)
        if what == "stop" and answer.value:
            os._exit(0)


def _end_with(client: int) -> None:
    """As the actors of a private Ray do."""
    while Path(f"/proc/{client}").exists():
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)


def _die_between_result_and_answer() -> None:
    put = results.ResultJournal._put

    def put_and_die(self: results.ResultJournal, key: Key, kept: Kept) -> None:
        put(self, key, kept)
        if KILL_AFTER in os.environ:
            with contextlib.suppress(FileNotFoundError):
                Path(os.environ[KILL_AFTER]).unlink()
                os.kill(os.getpid(), signal.SIGKILL)

    setattr(results.ResultJournal, "_put", put_and_die)  # noqa: B010


def _socket(root: Path) -> Path:
    return root / "agent.sock"


def _pid(root: Path) -> Path:
    return root / "agent.pid"
