"""`kvfarm join`, as long as it lasts: one stay in the cluster after the other, until somebody ends it."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_result,
    sleep_using_event,
    stop_when_event_set,
    wait_random_exponential,
)

from device_agents.deadline import Deadline
from device_agents.errors import DeadlineExceeded, InfrastructureError
from harness.errors import HostTaken
from harness.hosting.keeper import LEFT, LOST, REFUSED, Options
from harness.lab import cache_folder
from kvengine.codec import encode

STOP_S = 90.0  # the agent's runners, then Ray's processes
_AGAIN_S, _LONGEST_AGAIN_S = 1.0, 15.0
_LOOK_S = 0.2


def keep_joined(options: Options, stopped: threading.Event, say: Callable[[str], None]) -> int:
    """Join, and again whenever that is over, until ``stopped`` or refused. Returns keeper's exit code.

    Raises:
        HostTaken: this machine has joined under this name already.
    """

    def again(state: RetryCallState) -> None:
        seconds = state.next_action.sleep if state.next_action else 0.0
        say(f"joins again in {seconds:.0f} s")

    with _only_one(options.name):
        attempts = Retrying(
            # Whatever else it ended with: Ray aborts a process whose head is gone for a minute.
            retry=retry_if_result(lambda code: code not in (LEFT, REFUSED) and not stopped.is_set()),
            wait=wait_random_exponential(_AGAIN_S, _LONGEST_AGAIN_S),
            sleep=sleep_using_event(stopped),
            stop=stop_when_event_set(stopped),
            before_sleep=again,
            retry_error_callback=lambda _: LEFT,  # stopped while it waited
        )
        return attempts(_stay, options, stopped)


def joined() -> dict[str, int]:
    """The hosts that this machine and user keeps joined: PID of `kvfarm join` by name."""
    found = {}
    for path in sorted(_folder().glob("*.json")):
        with path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:  # its process lives
                found[path.stem] = int(json.load(file)["pid"])
    return found


def end(name: str, deadline: Deadline) -> None:
    """Let the `kvfarm join` of this name end in order. Raises DeadlineExceeded, InfrastructureError."""
    known = joined()
    if name not in known:
        there = ", ".join(known) or "none"
        raise InfrastructureError(f"sought a lab host {name!r} on this machine, found {there}")
    os.kill(known[name], signal.SIGTERM)
    pause = threading.Event()
    while name in joined():
        if deadline.expired:
            raise DeadlineExceeded(f"{name} (pid {known[name]}) did not end within {deadline.seconds:g} s")
        pause.wait(_LOOK_S)


def _stay(options: Options, stopped: threading.Event) -> int:
    """One stay, in a process of its own, which ends when this one does."""
    command = [sys.executable, "-m", "harness.hosting.keeper"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True) as keeper:
        assert keeper.stdin is not None
        try:
            keeper.stdin.write(json.dumps(encode(options)) + "\n")
            keeper.stdin.flush()
            while keeper.poll() is None and not stopped.wait(_LOOK_S):
                pass
            if keeper.poll() is None:
                keeper.terminate()
            return keeper.wait(STOP_S)
        except subprocess.TimeoutExpired:
            return LOST
        except BrokenPipeError:  # it ended before it was told
            return LOST
        finally:
            if keeper.poll() is None:
                os.killpg(keeper.pid, signal.SIGKILL)


@contextmanager
def _only_one(name: str) -> Iterator[None]:
    """While the body runs, `kvfarm leave` finds this process. Raises HostTaken."""
    path = _folder() / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HostTaken(
                f"this machine has joined as {name} already; `kvfarm leave {name}`, or give --name"
            ) from None
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid()}))
        file.flush()
        yield


def _folder() -> Path:
    return cache_folder() / "hosts"
