"""The farm: devices anywhere in a Ray cluster, used from this process as EngineSessions.

One lab agent (a Ray actor) on each lab host owns the devices there. This side leases devices,
brings artifacts to the lab hosts and keeps leases alive. Every wait ends; whatever goes wrong
between here and the engine is an InfrastructureError, what the engine refuses is its own error.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from device_agents.api import DeviceIdentity, Finding, Vitals
from device_agents.config import DeviceConfig
from device_agents.deadline import Deadline
from device_agents.errors import BlobsMissing, InfrastructureError, LeaseError, NoSuchDevice
from device_agents.lab_types import AgentBudgets, DeviceStatus, Lease
from device_agents.logs import about
from device_agents.results import Kept, Key
from harness import leasing
from harness.cluster import RayConnection, ensure_ray
from harness.device_session import GRACE_S, DeviceSession
from harness.inventory import LOCAL_LAB, Inventory
from harness.lab import Lab, Node, find_node, here
from harness.leasing import CALL_S, Terms, holder
from harness.spans import SHORT_S, Recorder, recording_nothing
from kvengine.artifact import Artifact
from kvengine.recipe import SessionRecipe

CHUNK_BYTES = 8 << 20
LOCAL_ROOT = Path(".kvfarm") / "lab"

Progress = Callable[[str, int, int], None]
_log = logging.getLogger(__name__)


@dataclass
class _Device:
    """One selected device."""

    config: DeviceConfig
    lab: Lab
    lease: Lease | None = None
    claimed: bool = False  # as its farm file wants it, since the lease or the agent began
    leased_at: float = 0.0  # Unix time, s
    patience: Deadline | None = None  # for the lease that is wanted now
    identity: DeviceIdentity | None = None
    settings: dict[str, str] = field(default_factory=dict)
    unheard: list[str] = field(default_factory=list)  # stored legs that its lab host still keeps


class Farm:
    """The selected devices; use it as a context manager.

    The first ``open`` leases all devices, those of a lab host at once, and waits in line for them; a guest
    leases each on first use. What cannot be had together in time is had one by one. Leases are kept until the
    farm is closed. A device that fails does so alone: the others, and the farm, go on. All methods raise
    InfrastructureError (a dead, hanging or missing lab host, agent, device or runner), LeaseNotGranted where
    somebody else has a device for longer than we wait.

    names: of devices in ``inventory`` (see inventory.select). address: of the Ray cluster to
    join, HOST:PORT; None uses this process's Ray or starts one on this machine for as long as
    the farm is open. root: folder of the agent on this machine. guest: another process opened the same
    farm and called ``invite``; it ends the lab agents. terms: of leases. on_wait: told why we wait for one.
    recorder: told when what begins and ends; whoever opens a run later may set their own.
    """

    def __init__(
        self,
        inventory: Inventory,
        names: tuple[str, ...],
        address: str | None = None,
        *,
        root: Path | None = None,
        guest: bool = False,
        terms: Terms | None = None,
        on_wait: Callable[[str], None] = lambda reason: None,
        recorder: Recorder | None = None,
    ) -> None:
        self.recorder = recorder or recording_nothing()
        self._guest = guest
        self._terms = terms or Terms()
        self._on_wait = on_wait
        self.waited_s = 0.0  # in line for leases, in all
        self._inventory = inventory
        self._names = names
        self._address = address
        self._root = root
        self._ray: RayConnection | None = None
        self._devices: dict[str, _Device] = {}
        self._labs: dict[str, Lab] = {}
        self._lock = threading.Lock()  # guards leases
        self._taking = threading.Lock()  # held while we are in line for one
        self._starting = threading.Lock()  # held while a lab agent is started
        self._stopped = threading.Event()
        self._heartbeat = threading.Thread(target=self._renew, name="leases", daemon=True)
        self._warming: threading.Thread | None = None

    def __enter__(self) -> Farm:
        try:
            self._ray = ensure_ray(self._address)
            for name in self._names:
                entry = self._inventory.device(name)
                self._devices[name] = _Device(self._inventory.config(name), self._lab_of(entry.lab))
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
        if self._warming is not None:
            self._warming.join(2 * GRACE_S)  # an agent that it starts is closed below
        for device in self._devices.values():
            self._acknowledge_again(device)
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

    def get_ready(self, name: str) -> None:
        """Start the device's lab agent and, unless others have it, let it say who it is: in the background.

        Bringing its bundle and trying it takes seconds; whether it works is seen when it is wanted.
        """

        def warm_up() -> None:
            with contextlib.suppress(InfrastructureError):
                device = self._device(name)
                lab = self._ready(device.lab)
                if not any(lease.device == name for lease in lab.call("leases", GRACE_S)):
                    lab.begin("identity", name)

        self._warming = threading.Thread(target=warm_up, name="get ready", daemon=True)
        self._warming.start()

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
        self.lease(name)
        device = self._device(name)
        lab, token = device.lab, self._lease(device)
        seconds = AgentBudgets().deploy_s + AgentBudgets().open_s + GRACE_S
        asked = (name, token, artifact.manifest.to_json(), recipe)
        try:
            with self.recorder.doing(name, "open", artifact.id[:12]):
                try:
                    opened = lab.call("open_artifact", seconds, *asked)
                except BlobsMissing:  # as the first time, or since it was evicted there
                    # What all its devices want travels once.
                    with self.recorder.doing(name, "deploy", artifact.id[:12]), lab.shipping:
                        self._ship(lab, artifact, progress)
                    opened = lab.call("open_artifact", seconds, *asked)
        except LeaseError:
            self._forget(device, token)
            raise
        session_id, info = opened
        return DeviceSession(lab, name, token, session_id, info, self.recorder)

    def kept(self, name: str, key: Key) -> Kept | None:
        """What the device's lab host has measured under ``key`` and nobody has acknowledged."""
        found: Kept | None = self._ready(self._device(name).lab).call("kept", CALL_S, key)
        return found

    def acknowledge(self, name: str, leg: str) -> None:
        """The leg is stored: its lab host may forget it. Never raises; a host that does not hear it is told
        once more when the farm is closed, and evicts what it was never told."""
        device = self._device(name)
        try:
            self._ready(device.lab).call("acknowledge", CALL_S, leg)
        except InfrastructureError:
            device.unheard.append(leg)

    def holding(self, names: Sequence[str]) -> tuple[str, ...]:
        """Those of the devices that we have on lease."""
        return tuple(name for name in names if self._device(name).lease is not None)

    def hold(self, count: int, names: Sequence[str], wait_s: float | None = None) -> tuple[Lease, ...]:
        """Lease ``count`` of the devices, all at once, without opening anything.

        wait_s: in line at most; None: as the terms say.

        Devices of several lab hosts: as many of each host as are free there, the rest from the first ones;
        then host by host in the order of their names.

        Raises:
            LeaseNotGranted, InfrastructureError: see the class.
        """
        patience, taken = Deadline(self._terms.wait_s if wait_s is None else wait_s), list[Lease]()
        try:
            for lab, share in self._shares(count, [self._device(name) for name in names]):
                there = [self._devices[name] for name in names if self._devices[name].lab is lab]
                if share:
                    taken += self._take_at(lab, there, patience, share)
        except BaseException:
            for lease in taken:
                self._release(self._devices[lease.device])
            raise
        return tuple(taken)

    def _shares(self, count: int, devices: Sequence[_Device]) -> list[tuple[Lab, int]]:
        """How many of ``count`` of the devices to take at each lab host."""
        if not 1 <= count <= len(devices):
            names = ", ".join(each.config.name for each in devices)
            raise LeaseError(f"sought {count} of {len(devices)} devices: {names}; ask for fewer")
        labs = [lab for _, lab in sorted({each.lab.name: each.lab for each in devices}.items())]
        have = {lab.name: sum(each.lab is lab for each in devices) for lab in labs}
        wanted = {each.config.name for each in devices}
        leased = {
            lab.name: sum(lease.device in wanted for lease in self._ready(lab).call("leases", GRACE_S))
            for lab in labs
        }
        shares = dict.fromkeys(have, 0)
        for most in ({name: have[name] - leased[name] for name in have}, have):
            for name in shares:
                more = min(most[name] - shares[name], count - sum(shares.values()))
                shares[name] += max(0, more)
        return [(lab, shares[lab.name]) for lab in labs]

    def lease(self, name: str) -> None:
        """Have the device to ourselves from now on, as ``open`` does it; nothing where we have it.

        Raises:
            LeaseNotGranted, InfrastructureError: see the class.
        """
        device = self._device(name)
        try:
            self._lease(device)
        except InfrastructureError:
            if device.lab.running:
                raise
            self._lease(device)  # the agent had died, or its last other user had stopped it

    def has(self, lease: Lease) -> bool:
        """Whether the lease is still ours, as far as its last heartbeat told."""
        ours = self._device(lease.device).lease
        return ours is not None and ours.token == lease.token

    def quarantine(self, name: str, evidence: str, by: str, seconds: float | None) -> None:
        """Lend the device to nobody for so long, None: until ``lift``; whoever has it loses it."""
        lab = self._ready(self._device(name).lab)
        lab.call("quarantine", CALL_S, name, evidence, by, seconds)

    def reboot(self, name: str, by: str, why: str, most: int) -> None:
        """See LabAgent.reboot; only of a device that we have."""
        device = self._device(name)
        if device.lease is None:
            raise LeaseError(f"{name} is not ours any more; whoever has it may reboot it")
        seconds = AgentBudgets().reboot_s + GRACE_S
        device.lab.call("reboot", seconds, name, device.lease.token, by, why, most)

    def lift(self, name: str, by: str) -> None:
        """End the device's quarantine."""
        self._ready(self._device(name).lab).call("lift", CALL_S, name, by)

    def power_cycle(self, name: str, reason: str) -> str:
        """Take the device's power away and give it back; says what was done. It stays ours meanwhile.

        Raises:
            InfrastructureError: it has no program for that, its limit is reached, or the program failed.
        """
        device = self._device(name)
        lab = self._ready(device.lab)
        with self._taking:
            if device.lease is None:
                self._take(device)
            lease = device.lease
        if lease is None:
            raise LeaseError(f"{name}: it is not ours, so it is not power-cycled")
        done: str = lab.call("power_cycle", AgentBudgets().power_s + GRACE_S, name, lease.token, reason)
        return done

    def give_back(self, name: str) -> None:
        """Let others have the device; the next ``open`` leases it anew. Never raises."""
        self._release(self._device(name))

    def give_back_for(self, pid: int) -> None:
        """End the leases of a process of this machine that died, before their time is up. Never raises."""
        for lab in self._labs.values():
            with contextlib.suppress(InfrastructureError):
                for lease in lab.call("leases", GRACE_S) if lab.running or lab.find() else ():
                    if lease.holder == holder(pid, self._terms.user):
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
            root = self._root
            if root is None and name == LOCAL_LAB and not self._ray.joined:
                root = LOCAL_ROOT
            joined, shared = self._ray.joined, self._ray.shared
            self._labs[name] = Lab(
                name,
                self._node_of(name),
                root and root.absolute(),
                detached=joined,
                shared=shared,
                guest=self._guest,
            )
        return self._labs[name]

    def _node_of(self, lab: str) -> Node:
        entry = self._inventory.labs.get(lab)
        return here() if lab == LOCAL_LAB or entry is None else find_node(lab, entry.node)

    def _ready(self, lab: Lab) -> Lab:
        """``lab`` with its agent running; one that died is started again, and knows our leases."""
        with self._starting:
            if not lab.running:
                self.connection.check_alive()
                lab.node = self._node_of(lab.name)  # a host that was cut off has joined anew, as another one
                mine = [d for d in self._devices.values() if d.lab is lab]
                for device in mine:
                    device.claimed = False
                lab.start([d.config for d in mine])
        return lab

    def _lease(self, device: _Device) -> int:
        """The fencing token of our lease, acquired if we have none."""
        self._ready(device.lab)
        with self._taking:
            if device.lease is None:
                self._take(device)
            lease = device.lease
            if lease is None:
                raise LeaseError(
                    f"{device.config.name}: the lease was lost as soon as it was granted; try again"
                )
            if not device.claimed:
                self._claim(device, lease)
            return lease.token

    def _take(self, device: _Device) -> None:
        """A lease of the device; the first time of all."""
        patience = device.patience
        if patience is None:
            first = not self._guest and all(each.patience is None for each in self._devices.values())
            patience = Deadline(self._terms.wait_s)
            free = [each for each in self._devices.values() if each.lease is None]  # the rest is ours
            wanted = free if first else [device]
            for each in wanted:
                each.patience = patience
            # Always in this order: of two that want the same hosts none waits for the other's.
            for _, lab in sorted({each.lab.name: each.lab for each in wanted}.items()):
                with contextlib.suppress(InfrastructureError):
                    self._ready(lab)
                    self._take_at(lab, [each for each in wanted if each.lab is lab], patience)
        if device.lease is None:
            self._take_at(device.lab, [device], patience)

    def _take_at(
        self, lab: Lab, devices: list[_Device], patience: Deadline, count: int | None = None
    ) -> tuple[Lease, ...]:
        """All of the devices of one lab host at once, or ``count`` of them."""
        began, began_at = time.monotonic(), time.time()
        names = tuple(each.config.name for each in devices)
        try:
            leases = leasing.lease(
                lab,
                names,
                count or len(names),
                self._terms,
                patience,
                self._on_wait,
                lambda: self._ready(lab),
            )
        finally:
            self.waited_s += time.monotonic() - began
        with self._lock:
            for lease in leases:
                device = self._devices[lease.device]
                device.lease, device.claimed, device.patience = lease, False, None
                device.leased_at = time.time()
        for lease in leases:
            if time.time() - began_at > SHORT_S:
                self.recorder.part(lease.device, "wait", "in line for a lease", began_at, time.time())
            self.recorder.lease(lease.device, lease.token, self._devices[lease.device].leased_at, None)
            with about(device=lease.device, lease=lease.token):
                _log.info("leased")
        return leases

    def _claim(self, device: _Device, lease: Lease) -> None:
        """A leased device is as its farm file wants it, or given back."""
        try:
            seconds = AgentBudgets().claim_s + GRACE_S
            device.settings = device.lab.call("claim", seconds, lease.device, lease.token)
        except BaseException:
            # A dead agent cannot be told, and its successor knows the lease: we would wait for ourselves, for
            # heartbeats of what was leased with it keep it.
            if device.lab.running:
                self._release(device)
            raise
        device.claimed = True

    def _forget(self, device: _Device, token: int) -> None:
        """The next ``open`` acquires the device anew."""
        with self._lock:
            lease = device.lease
            if lease is None or lease.token != token:
                return
            device.lease, device.claimed = None, False
        self.recorder.lease(lease.device, token, device.leased_at, time.time())

    def _release(self, device: _Device) -> None:
        with self._lock:
            lease, device.lease, device.claimed = device.lease, None, False
        if lease is None:
            return
        if device.lab.running:
            with contextlib.suppress(InfrastructureError):
                device.lab.call("release", GRACE_S, lease.device, lease.token)
        self.recorder.lease(lease.device, lease.token, device.leased_at, time.time())

    def _acknowledge_again(self, device: _Device) -> None:
        with contextlib.suppress(InfrastructureError):
            while device.unheard:
                self._ready(device.lab).call("acknowledge", GRACE_S, device.unheard[-1])
                device.unheard.pop()

    def _renew(self) -> None:
        """Heartbeats, whatever the test does meanwhile."""
        every_s = self._terms.beat_s / 3
        while not self._stopped.wait(every_s):
            for lab in list(self._labs.values()):
                self._renew_at(lab, every_s)

    def _renew_at(self, lab: Lab, seconds: float) -> None:
        """In one call for all devices there: a farm of a thousand has no time for one each."""
        devices = [each for each in self._devices.values() if each.lab is lab]
        ours = [(each, lease) for each in devices if (lease := each.lease) is not None]
        if not ours:
            return
        pairs = [(lease.device, lease.token) for _, lease in ours]
        try:
            ended = lab.call("renew_all", seconds, pairs, self._terms.beat_s)
        except InfrastructureError as error:
            _log.warning("leases at lab host %s were not renewed: %s", lab.name, error)
            if not lab.running:
                with contextlib.suppress(InfrastructureError):
                    self._ready(lab)
            return
        for device, lease in ours:
            if lease.device in ended:
                _log.warning("the lease of %s is lost: %s", lease.device, ended[lease.device])
                self._forget(device, lease.token)

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
