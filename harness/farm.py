"""The farm: devices anywhere in a Ray cluster, used from this process as EngineSessions.

One lab agent (a Ray actor) on each lab host owns the devices there. This side leases devices,
brings artifacts to the lab hosts and keeps leases alive. Every wait ends; whatever goes wrong
between here and the engine is an InfrastructureError, what the engine refuses is its own error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from device_agents.api import DeviceIdentity, Finding, Vitals
from device_agents.config import DeviceConfig
from device_agents.errors import InfrastructureError, LeaseError, NoSuchDevice
from device_agents.lab_types import AgentBudgets, DeviceStatus, Lease
from device_agents.recording.record import Plan, Record
from device_agents.remote_session import Budgets
from harness.cluster import RayConnection, ensure_ray
from harness.inventory import LOCAL_LAB, Inventory
from harness.lab import Lab, find_node, here
from kvengine.artifact import Artifact
from kvengine.program import Measurement, Observation, Program, Workload
from kvengine.recipe import SessionRecipe
from kvengine.session import SessionInfo

LEASE_TTL_S = 30.0  # a device is free again this long after its client died
RENEW_EVERY_S = LEASE_TTL_S / 3
CHUNK_BYTES = 8 << 20
# The agent's own deadlines are inside: they know the reason. Ours only catches a dead agent.
GRACE_S = 30.0
LOCAL_ROOT = Path(".kvfarm") / "lab"

Progress = Callable[[str, int, int], None]
_log = logging.getLogger(__name__)


class DeviceSession:
    """An EngineSession on a device. Made by ``Farm.open``."""

    def __init__(self, lab: Lab, device: str, token: int, session_id: str, info: SessionInfo) -> None:
        self.device = device
        self._lab = lab
        self._token = token
        self._id = session_id
        self._info = info
        self._closed = False

    @property
    def info(self) -> SessionInfo:
        return self._info

    @property
    def closed(self) -> bool:
        """Closed from our side, or broken: after an infrastructure error a session is of no more use."""
        return self._closed

    def run_program(self, program: Program) -> tuple[Observation, ...]:
        """Raises KvEngineError: the program as a whole is refused. InfrastructureError: see Farm."""
        found = self._call("run_program", Budgets().program_s, program)
        return tuple(_own(observation) for observation in found)

    def run_workload(self, workload: Workload) -> Measurement:
        """Raises as ``run_program``."""
        measured: Measurement = self._call("run_workload", Budgets().workload_s, workload)
        return measured

    def start_recording(self, plan: Plan) -> None:
        """Let the device record what it does. A failure leaves the session as it was."""
        budget = AgentBudgets().recording_s + GRACE_S
        self._lab.call("start_recording", budget, self._id, self._token, plan)

    def stop_recording(self) -> Record:
        budget = AgentBudgets().recording_s + GRACE_S
        record: Record = self._lab.call("stop_recording", budget, self._id, self._token)
        return record

    def close(self) -> None:
        """End the runner. Never raises: a runner that cannot be closed ends with its lease."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(InfrastructureError):
            self._lab.call("close_session", Budgets().close_s + GRACE_S, self._id, self._token)

    def __enter__(self) -> DeviceSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, method: str, budget_s: float, *arguments: Any) -> Any:
        if self._closed:
            raise InfrastructureError(f"{self.device}: {method}: this session is closed; open another")
        try:
            return self._lab.call(method, budget_s + GRACE_S, self._id, self._token, *arguments)
        except InfrastructureError:
            self.close()
            raise


@dataclass
class _Device:
    """One selected device."""

    config: DeviceConfig
    lab: Lab
    lease: Lease | None = None
    identity: DeviceIdentity | None = None
    settings: dict[str, str] = field(default_factory=dict)


class Farm:
    """The selected devices; use it as a context manager.

    ``open`` leases a device on first use and keeps it until the farm is closed. A device that
    fails does so alone: the others, and the farm, go on. All methods raise InfrastructureError
    (a dead, hanging or missing lab host, agent, device or runner; a device somebody else has).

    names: of devices in ``inventory`` (see inventory.select). address: of the Ray cluster to
    join, HOST:PORT; None uses this process's Ray or starts one on this machine for as long as
    the farm is open. root: folder of the agent on this machine. guest: another process opened the same
    farm and called ``invite``; it ends the lab agents.
    """

    def __init__(
        self,
        inventory: Inventory,
        names: tuple[str, ...],
        address: str | None = None,
        *,
        root: Path | None = None,
        guest: bool = False,
    ) -> None:
        self._guest = guest
        self._inventory = inventory
        self._names = names
        self._address = address
        self._root = root
        self._ray: RayConnection | None = None
        self._devices: dict[str, _Device] = {}
        self._labs: dict[str, Lab] = {}
        self._lock = threading.Lock()  # guards leases
        self._stopped = threading.Event()
        self._heartbeat = threading.Thread(target=self._renew, name="leases", daemon=True)

    def __enter__(self) -> Farm:
        try:
            self._ray = ensure_ray(self._address)
            for name in self._names:
                entry = self._inventory.device(name)
                self._devices[name] = _Device(entry.config(name), self._lab_of(entry.lab))
            self._heartbeat.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the devices back and stop what the farm started; never raises, works from any state."""
        self._stopped.set()
        if self._heartbeat.is_alive():
            self._heartbeat.join(2 * GRACE_S)
        connection, self._ray = self._ray, None
        if connection is None:
            return
        try:
            for device in self._devices.values():
                self._release(device)
            for lab in self._labs.values():
                lab.close()
        finally:
            connection.close()

    def status(self) -> tuple[DeviceStatus, ...]:
        """Every selected device, with the reason where one or its lab host does not answer."""
        found: dict[str, DeviceStatus] = {}
        for lab in self._labs.values():
            try:
                answers = self._ready(lab).call("status", AgentBudgets().identity_s + GRACE_S)
                found |= {status.name: status for status in answers}
            except InfrastructureError as error:
                for device in self._devices.values():
                    if device.lab is lab:
                        kind = device.config.kind
                        found[device.config.name] = DeviceStatus(device.config.name, kind, None, str(error))
        return tuple(found[name] for name in self._names)

    def identity(self, name: str) -> DeviceIdentity:
        """Who the device is."""
        device = self._device(name)
        if device.identity is None:
            lab = self._ready(device.lab)
            if not any(other.identity for other in self._devices.values() if other.lab is lab):
                # The others get ready meanwhile; whether they do is seen when they are wanted.
                lab.begin("status")
            device.identity = lab.call("identity", AgentBudgets().identity_s + GRACE_S, name)
        return device.identity

    def vitals(self, name: str) -> Vitals:
        """The device's state now."""
        lab = self._ready(self._device(name).lab)
        vitals: Vitals = lab.call("vitals", AgentBudgets().vitals_s + GRACE_S, name)
        return vitals

    def settings(self, name: str) -> dict[str, str]:
        """What the device was put into for us, as it was read back; empty before its first ``open``."""
        return self._device(name).settings

    def diagnose(self, name: str) -> tuple[Finding, ...]:
        """What is wrong with the device; it is neither leased nor changed."""
        lab = self._ready(self._device(name).lab)
        found: tuple[Finding, ...] = lab.call("diagnose", AgentBudgets().diagnose_s + GRACE_S, name)
        return found

    def open(
        self, name: str, artifact: Artifact, recipe: SessionRecipe, progress: Progress | None = None
    ) -> DeviceSession:
        """Lease the device, bring it the artifact and open that in a fresh runner.

        progress: called as (stage, bytes done, bytes in all) while the artifact travels.

        Raises:
            KvEngineError: the engine refused the artifact or the recipe.
            InfrastructureError: see the class.
        """
        device = self._device(name)
        lab = device.lab
        try:
            token = self._lease(device)
        except InfrastructureError:
            if lab.running:
                raise
            token = self._lease(device)  # the agent had died, or its last other user had stopped it
        budgets = AgentBudgets()
        self._ship(lab, artifact, progress)
        text = artifact.manifest.to_json()
        artifact_id = lab.call("deploy", budgets.deploy_s + GRACE_S, name, token, text)
        opened = lab.call("open_session", budgets.open_s + GRACE_S, name, token, artifact_id, recipe)
        session_id, info = opened
        return DeviceSession(lab, name, token, session_id, info)

    def give_back(self, name: str) -> None:
        """Let others have the device; the next ``open`` leases it anew. Never raises."""
        self._release(self._device(name))

    def give_back_for(self, pid: int) -> None:
        """End the leases of a process of this machine that died, before their time is up. Never raises."""
        for lab in self._labs.values():
            with contextlib.suppress(InfrastructureError):
                for lease in lab.call("leases", GRACE_S) if lab.running or lab.find() else ():
                    if lease.holder == holder(pid):
                        lab.call("release", GRACE_S, lease.device, lease.token)

    def invite(self) -> RayConnection:
        """From now on other processes use the farm too, as guests; says which Ray they should join."""
        for lab in self._labs.values():
            lab.host = True
        return self.connection

    @property
    def connection(self) -> RayConnection:
        """The Ray that it uses. Raises InfrastructureError: it is not open."""
        if self._ray is None:
            raise InfrastructureError("the farm is not open; use `with Farm(...) as farm:`")
        return self._ray

    # -- inside ---------------------------------------------------------------------------

    def _device(self, name: str) -> _Device:
        _ = self.connection
        if name not in self._devices:
            raise NoSuchDevice(f"no device {name!r} in this farm; it has {', '.join(self._devices)}")
        return self._devices[name]

    def _lab_of(self, name: str) -> Lab:
        """The lab host ``name``, not yet started."""
        if name not in self._labs:
            assert self._ray is not None
            entry = self._inventory.labs.get(name)
            node = here() if name == LOCAL_LAB or entry is None else find_node(name, entry.node)
            root = self._root
            if root is None and name == LOCAL_LAB and not self._ray.joined:
                root = LOCAL_ROOT
            joined, shared = self._ray.joined, self._ray.shared
            self._labs[name] = Lab(
                name, node, root and root.absolute(), detached=joined, shared=shared, guest=self._guest
            )
        return self._labs[name]

    def _ready(self, lab: Lab) -> Lab:
        """``lab`` with its agent running; one that died is started again, and its leases are gone."""
        if not lab.running:
            mine = [d for d in self._devices.values() if d.lab is lab]
            with self._lock:
                for device in mine:
                    device.lease = None
            lab.start([d.config for d in mine])
        return lab

    def _lease(self, device: _Device) -> int:
        """The fencing token of our lease, acquired if we have none."""
        self._ready(device.lab)
        with self._lock:
            if device.lease is None:
                device.lease = self._claimed(device, holder(os.getpid()))
            return device.lease.token

    def _claimed(self, device: _Device, holder: str) -> Lease:
        """A lease of a device that is as its farm file wants it."""
        name, lab = device.config.name, device.lab
        lease: Lease = lab.call("acquire", GRACE_S, name, holder, LEASE_TTL_S)
        try:
            device.settings = lab.call("claim", AgentBudgets().claim_s + GRACE_S, name, lease.token)
        except BaseException:
            with contextlib.suppress(InfrastructureError):
                lab.call("release", GRACE_S, name, lease.token)
            raise
        return lease

    def _release(self, device: _Device) -> None:
        with self._lock:
            lease, device.lease = device.lease, None
        if lease is not None and device.lab.running:
            with contextlib.suppress(InfrastructureError):
                device.lab.call("release", GRACE_S, lease.device, lease.token)

    def _renew(self) -> None:
        while not self._stopped.wait(RENEW_EVERY_S):
            for device in list(self._devices.values()):
                lease = device.lease
                if lease is None:
                    continue
                try:
                    device.lab.call("renew", RENEW_EVERY_S, lease.device, lease.token, LEASE_TTL_S)
                except LeaseError as error:
                    _log.warning("the lease of %s is lost: %s", lease.device, error)
                    with self._lock:
                        if device.lease == lease:
                            device.lease = None  # the next ``open`` acquires the device anew
                except InfrastructureError as error:
                    _log.warning("the lease of %s was not renewed: %s", lease.device, error)

    def _ship(self, lab: Lab, artifact: Artifact, progress: Progress | None) -> None:
        """Send the blobs that the lab host lacks, in pieces, going on where an earlier try stopped."""
        report = progress or (lambda stage, done, total: None)
        names = {blob.sha256: blob.name for blob in artifact.manifest.blobs}
        missing = lab.call("missing_blobs", AgentBudgets().deploy_s, artifact.manifest.to_json())
        done, total = 0, sum(blob.size - blob.present for blob in missing)
        for blob in missing:
            offset = blob.present
            with (artifact.folder / names[blob.sha256]).open("rb") as file:
                file.seek(offset)
                # Also once for an empty rest: put_chunk is what makes the blob begin.
                while (piece := file.read(CHUNK_BYTES)) or offset == 0:
                    offset = lab.call("put_chunk", GRACE_S, blob.sha256, offset, piece)
                    done += len(piece)
                    report("sending", done, total)
                    if not piece:
                        break
            lab.call("commit_blob", GRACE_S + blob.size / 50e6, blob.sha256)


def holder(pid: int) -> str:
    """How a lease names a process of this machine."""
    return f"{os.environ.get('USER', 'somebody')}@{socket.gethostname()} pid {pid}"


def _own(observation: Observation) -> Observation:
    """Logits out of Ray's object store, which is small and lends its memory read-only."""
    return dataclasses.replace(observation, logits=np.array(observation.logits))
