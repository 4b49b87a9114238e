"""Which phones the adb server of this machine knows now, followed as they come and go.

The server tells each change at once (host:track-devices; AOSP packages/modules/adb, SERVICES.TXT). A server
that is away is looked for again every second, and none is started: who has no phones needs none.
"""

from __future__ import annotations

import select
import threading

from device_agents.adb.connection import AdbServer, AdbSocket
from device_agents.deadline import Deadline
from device_agents.errors import DeviceUnreachable, InfrastructureError

_ANSWER_S = 3.0
_AGAIN_S = 1.0
_MOST_PHONES = 256


class Plugged:
    """Follows the server from ``start`` to ``stop``, in a thread of its own."""

    def __init__(self, server: AdbServer) -> None:
        self._server = AdbServer(server.port, start=False)
        self._lock = threading.Lock()
        self._states: dict[str, str] = {}
        self._error = "not asked yet"
        self._line: AdbSocket | None = None
        self._stopped = threading.Event()
        self._changed = threading.Condition(self._lock)
        self._thread = threading.Thread(target=self._follow, name="adb phones", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Never raises; a second time does nothing."""
        self._stopped.set()
        with self._lock:
            line = self._line
        if line is not None:
            line.close()
        if self._thread.is_alive():
            self._thread.join(2 * _ANSWER_S)

    def now(self) -> tuple[dict[str, str], str]:
        """State by serial number, as adb names it; and what is wrong with the server, "" if nothing."""
        with self._lock:
            return dict(self._states), self._error

    def wait(self, seen: dict[str, str], deadline: Deadline) -> dict[str, str]:
        """The states when they are others than ``seen``, or the deadline is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._states != seen, deadline.remaining)
            return dict(self._states)

    # -- inside ---------------------------------------------------------------------------

    def _follow(self) -> None:
        while not self._stopped.is_set():
            try:
                self._track()
            except InfrastructureError as error:
                self._set({}, str(error))
            self._stopped.wait(_AGAIN_S)

    def _track(self) -> None:
        """Until the server goes away. Raises InfrastructureError."""
        deadline = Deadline(_ANSWER_S)
        with self._server.open("host:track-devices", deadline) as line:
            line.command("host:track-devices", deadline)
            with self._lock:
                self._line = line
            try:
                while not self._stopped.is_set():
                    # Between two changes nothing comes, for days.
                    if select.select([line.socket], [], [], _AGAIN_S)[0]:
                        self._set(parse_devices(line.block(Deadline(_ANSWER_S))), "")
            except (OSError, ValueError) as error:  # closed under us, by stop
                if not self._stopped.is_set():
                    raise DeviceUnreachable(f"adb server: {error}") from error
            finally:
                with self._lock:
                    self._line = None

    def _set(self, states: dict[str, str], error: str) -> None:
        with self._changed:
            self._states, self._error = states, error
            self._changed.notify_all()


def parse_devices(text: str) -> dict[str, str]:
    """State by serial number, of the server's answer: a serial number, a tab and a state in each line."""
    lines = (line.partition("\t") for line in text.splitlines()[:_MOST_PHONES])
    return {serial.strip(): state.strip() for serial, tab, state in lines if tab and serial.strip()}
