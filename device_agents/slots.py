"""One device at a lab agent: what its lease has opened there, and that all of it ends with the lease."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

from device_agents import logs
from device_agents.api import Device, DeviceIdentity
from device_agents.config import DeviceConfig
from device_agents.deadline import Deadline
from device_agents.errors import InfrastructureError, LeaseError
from device_agents.lab_types import AgentBudgets
from device_agents.leases import protocol
from device_agents.leases.ledger import Ledger
from device_agents.recording.record import Recording
from kvengine.session import EngineSession

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class Slot:
    """``lock`` guards what follows it and is never held over device work.

    key: the device's name in the ledger. agent: whose slot it is.
    """

    config: DeviceConfig
    key: str
    agent: str
    device: Device
    ledger: Ledger
    budgets: AgentBudgets
    freeing: threading.Lock = dataclasses.field(default_factory=threading.Lock)  # while sessions are closed
    asking: threading.Lock = dataclasses.field(default_factory=threading.Lock)  # while it says who it is
    identity: DeviceIdentity | None = None
    lock: threading.RLock = dataclasses.field(default_factory=threading.RLock)
    token: int | None = None  # of the lease that all that follows belongs to
    run: str = ""  # that the lease is for
    sessions: dict[str, EngineSession] = dataclasses.field(default_factory=dict)
    deployed: dict[str, str] = dataclasses.field(default_factory=dict)  # artifact id to folder on the device
    settings: dict[str, str] = dataclasses.field(default_factory=dict)  # what was changed on the device
    recording: Recording | None = None
    last: tuple[int, str] = (0, "")  # token of the last lease, and why it ended
    busy: int = 0  # deploys and opens under way, maybe of a lease that has ended meanwhile

    def follow(self) -> None:
        """Stop what a lease that has ended left running; the device is free only then."""
        state, now = self.ledger.state()
        if protocol.due(state, now):
            state = self.ledger.act()
        held = state.held.get(self.key)
        with self.lock:
            stale = self.token is not None and (held is None or held.token != self.token or bool(held.ended))
        if stale or (held is not None and held.ended and held.request.agent == self.agent):
            self._free()

    def close(self) -> None:
        """Stop everything, whatever the ledger says."""
        try:
            self._free()
        except InfrastructureError as error:
            _log.warning("%s: the ledger does not know that it is free: %s", self.config.name, error)

    def check(self, token: int) -> None:
        """Every call that touches the device shows its token. Raises LeaseError: not the current one."""
        self.follow()
        state, now = self.ledger.state()
        try:
            held = protocol.current(state, self.key, token, now)
        except LeaseError as error:
            last, why = self.last
            raise LeaseError(f"{error} (it ended: {why})") if last == token else error from None
        if held.request.agent != self.agent:
            raise LeaseError(
                f"{self.config.name}: token {token} was given by another lab agent; ask that one"
            )
        with self.lock:
            if self.token not in (None, token):
                raise LeaseError(f"{self.config.name} still finishes work of an ended lease; try again")
            self.token, self.run = token, held.request.run

    def about(self, token: int) -> AbstractContextManager[None]:
        """What is logged meanwhile is about this device, the lease of ``token`` and the run it is for."""
        return logs.about(device=self.config.name, lease=token, run=self.run if token == self.token else "")

    @contextmanager
    def working(self, token: int) -> Iterator[None]:
        """While the body runs the device is not lent anew, even if the lease ends meanwhile.

        Raises:
            LeaseError: ``token`` is not the current one.
        """
        self.check(token)
        with self.lock:
            if not self.is_current(token):
                raise LeaseError(f"{self.config.name}: the lease of token {token} has just ended")
            self.busy += 1
        try:
            with self.about(token):
                yield
        finally:
            with self.lock:
                self.busy -= 1

    def is_current(self, token: int) -> bool:
        """Whether what is opened for ``token`` may stay."""
        with self.lock:
            if self.token != token:
                return False
            state, now = self.ledger.state()
            with suppress(LeaseError):
                protocol.current(state, self.key, token, now)
                return True
            return False

    def _free(self) -> None:
        """Sessions first, then the lease."""
        with self.freeing:
            with self.lock:
                sessions, self.sessions = self.sessions, {}
                recording, self.recording = self.recording, None
                self.deployed.clear()  # another lease may make room for its own
            for engine in sessions.values():
                engine.close()
            if recording is not None:
                # One that cannot be stopped ends by itself, and the next one ends it.
                with suppress(InfrastructureError):
                    recording.stop(Deadline(self.budgets.recording_s))
            self._put_back()
            with self.lock:
                if self.busy:
                    return  # the next look at it finds it done
                self.token = None
            held = self.ledger.state()[0].held.get(self.key)
            if held is not None and held.ended and held.request.agent == self.agent:
                self.last = held.token, held.ended
                with logs.about(device=self.config.name, lease=held.token, run=held.request.run):
                    _log.info("free again: %s", held.ended)
                self.ledger.act(protocol.freed(self.key, held.token))

    def _put_back(self) -> None:
        """Only where something was changed: a device that does not answer should delay nobody else."""
        changed, self.settings = self.settings, {}
        if changed:
            try:
                self.device.release(Deadline(self.budgets.release_s))
            except InfrastructureError as error:
                _log.warning("%s stays changed until its next claim: %s", self.config.name, error)
