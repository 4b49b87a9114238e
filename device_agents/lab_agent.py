"""The lab agent: owns every device attached to one lab host and lends them out.

Plain Python and thread-safe; the harness wraps it in a Ray actor, so arguments and results
are plain, picklable data. Exclusive use is a lease with a time limit and a fencing token
(Kleppmann, "How to do distributed locking"): whoever comes with an older token is refused,
so a client that slept through its lease cannot disturb the next one.
"""

from __future__ import annotations

import dataclasses
import fcntl
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TypeVar

from device_agents.api import Device, DeviceIdentity, Finding, Vitals
from device_agents.arrivals import Arrivals
from device_agents.blobs import BlobStore, MissingBlob, parse_manifest
from device_agents.config import DeviceConfig
from device_agents.deadline import Deadline
from device_agents.errors import DeployFailed, InfrastructureError, LeaseError, NoSuchDevice
from device_agents.host import HostDevice
from device_agents.lab_types import AgentBudgets, DeviceStatus, Lease
from device_agents.recording.record import Plan, Record, Recording, Records
from device_agents.remote_session import RunnerSession
from kvengine.program import Measurement, Observation, Program, Workload
from kvengine.recipe import SessionRecipe
from kvengine.session import EngineSession, SessionInfo

T = TypeVar("T")
MakeDevice = Callable[[DeviceConfig, BlobStore], Device]

MAX_TTL_S = 24 * 3600.0
_REAP_EVERY_S = 1.0

_log = logging.getLogger(__name__)


@dataclass
class _Slot:
    """One device and all that is known of it; ``lock`` guards the rest and is never held over device work."""

    config: DeviceConfig
    device: Device
    lock: threading.RLock = field(default_factory=threading.RLock)
    freeing: threading.Lock = field(default_factory=threading.Lock)  # held while sessions are closed
    asking: threading.Lock = field(default_factory=threading.Lock)  # held while it says who it is
    identity: DeviceIdentity | None = None
    lease: Lease | None = None
    expires: float = 0.0  # on the agent's clock
    sessions: dict[str, EngineSession] = field(default_factory=dict)
    deployed: dict[str, str] = field(default_factory=dict)  # artifact id to the folder on the device
    settings: dict[str, str] = field(default_factory=dict)  # what the lease has changed on the device
    recording: Recording | None = None
    busy: int = 0  # deploys and opens under way, maybe of a lease that has expired meanwhile


def make_device(config: DeviceConfig, store: BlobStore) -> Device:
    """The device of a config. A host device shares the agent's store, for its disk is the agent's disk."""
    if config.kind == "host":
        return HostDevice(config.name, store.root, store=store)
    if config.kind == "android":
        # Not before it is wanted: a lab host without phones needs no adbutils.
        from device_agents.adb.devices import make_android

        return make_android(config, store.root)
    raise NoSuchDevice(
        f"device {config.name!r}: unknown kind {config.kind!r}; this agent knows: host, android"
    )


class LabAgent:
    """Owns ``devices``; keeps artifacts and its fencing counter in ``root``, which it locks.

    clock: monotonic seconds. store_limit_bytes: artifacts beyond it are evicted, longest unused first.
    reap_every_s: how often expired leases are looked for between calls; None: only in calls.

    Raises:
        LeaseError: another agent has ``root``. NoSuchDevice: a config of unknown kind or a name used twice.
    """

    def __init__(
        self,
        root: Path,
        devices: Sequence[DeviceConfig],
        *,
        make: MakeDevice = make_device,
        clock: Callable[[], float] = time.monotonic,
        budgets: AgentBudgets | None = None,
        store_limit_bytes: int = 64 << 30,
        reap_every_s: float | None = _REAP_EVERY_S,
    ) -> None:
        names = [config.name for config in devices]
        if len(set(names)) != len(names):
            raise NoSuchDevice(f"each device needs a name of its own, found {names}")
        root.mkdir(parents=True, exist_ok=True)
        self._store = BlobStore(root)
        self._budgets = budgets or AgentBudgets()
        self._clock = clock
        self._slots = {c.name: _Slot(c, make(c, self._store)) for c in devices}
        self._arrivals = Arrivals(self._store, store_limit_bytes, self._in_use, clock, self._budgets.deploy_s)
        self._root_lock = _lock_root(root)
        try:
            self._fencing = _FencingCounter(root / "fencing-token")
        except InfrastructureError:
            self._root_lock.close()
            raise
        self._stopped = threading.Event()
        self._reaper: threading.Thread | None = None
        if reap_every_s is not None:
            self._reaper = threading.Thread(
                target=self._reap, args=(reap_every_s,), name="leases", daemon=True
            )
            self._reaper.start()

    # -- who is there ---------------------------------------------------------------------

    def status(self) -> tuple[DeviceStatus, ...]:
        """Every device; those not asked before are asked side by side, so a dead one delays nobody."""
        self._check_running()
        if not self._slots:
            return ()
        with ThreadPoolExecutor(len(self._slots)) as pool:
            return tuple(pool.map(self._status, self._slots.values()))

    def devices(self) -> tuple[DeviceIdentity, ...]:
        """Identities of the devices that answer; ``status`` says what is wrong with the others."""
        return tuple(s.identity for s in self.status() if s.identity is not None)

    def identity(self, device: str) -> DeviceIdentity:
        """Who the device is. Asks no other one, for that may hang."""
        return self._identity(self._slot(device))

    def leases(self) -> tuple[Lease, ...]:
        """Who has what now; asks no device."""
        self._check_running()
        for slot in self._slots.values():
            self._expire(slot)
        return tuple(slot.lease for slot in self._slots.values() if slot.lease is not None)

    def vitals(self, device: str) -> Vitals:
        return self._slot(device).device.vitals(Deadline(self._budgets.vitals_s))

    def diagnose(self, device: str) -> tuple[Finding, ...]:
        """What is wrong with the device, and who has it."""
        slot = self._slot(device)
        found = slot.device.diagnose(Deadline(self._budgets.diagnose_s))
        self._expire(slot)
        with slot.lock:
            lease, left = slot.lease, slot.expires - self._clock()
        held = Finding("lease", "ok", "free")
        if lease is not None:
            text = f"leased to {lease.holder}, for {left:.0f} s more unless renewed"
            held = Finding("lease", "note", text, "wait for it, or take another device")
        return (*found, held)

    # -- leases ---------------------------------------------------------------------------

    def acquire(self, device: str, holder: str, ttl_s: float) -> Lease:
        """Raises LeaseError when somebody has the device, NoSuchDevice."""
        slot = self._slot(device)
        _check_ttl(ttl_s)
        self._expire(slot)
        with slot.lock:
            if slot.lease is not None:
                left = slot.expires - self._clock()
                raise LeaseError(
                    f"{device} is leased to {slot.lease.holder!r} for {left:.0f} s more; wait or take another"
                )
            if slot.busy:
                raise LeaseError(f"{device} still finishes work of an expired lease; try again")
            return self._grant(slot, holder, self._fencing.next(), ttl_s)

    def claim(self, device: str, token: int) -> dict[str, str]:
        """First thing with a new lease: undo what the last user left, apply the device's settings.

        Returns each setting and what it was read back as. Raises SettingFailed, AdbFailure.
        """
        with self._working(device, token) as slot:
            found = slot.device.claim(Deadline(self._budgets.claim_s))
            with slot.lock:
                slot.settings = found
        return found

    def renew(self, device: str, token: int, ttl_s: float) -> Lease:
        """The same lease for ``ttl_s`` from now. Raises LeaseError when it has expired."""
        _check_ttl(ttl_s)
        slot, lease = self._leased(device, token)
        with slot.lock:
            self._check_current(slot, token)
            return self._grant(slot, lease.holder, token, ttl_s)

    def release(self, device: str, token: int) -> None:
        """Close what is open on the device and free it."""
        slot, lease = self._leased(device, token)
        self._free(slot, lease)

    # -- artifacts ------------------------------------------------------------------------

    def missing_blobs(self, manifest_json: str) -> tuple[MissingBlob, ...]:
        """What to send with put_chunk and commit_blob before ``deploy``; makes room for it first."""
        self._check_running()
        return self._arrivals.missing(parse_manifest(manifest_json))

    def put_chunk(self, sha256: str, offset: int, data: bytes) -> int:
        """Returns how many bytes of the blob are here now. Raises DeployFailed."""
        self._check_running()
        return self._store.write(sha256, offset, data)

    def commit_blob(self, sha256: str) -> None:
        """Raises DeployFailed when what was sent has another sha256."""
        self._check_running()
        self._store.commit(sha256)

    def deploy(self, device: str, token: int, manifest_json: str) -> str:
        """Bring an artifact, whose blobs are all here, to the device. Returns the artifact's id."""
        manifest = parse_manifest(manifest_json)
        with self._working(device, token) as slot, self._arrivals.deploying(manifest) as folder:
            remote = slot.device.deploy(folder, Deadline(self._budgets.deploy_s))
            with slot.lock:
                slot.deployed[manifest.id] = remote
        return manifest.id

    # -- sessions -------------------------------------------------------------------------

    def open_session(
        self, device: str, token: int, artifact_id: str, recipe: SessionRecipe
    ) -> tuple[str, SessionInfo]:
        """Open a deployed artifact in a fresh runner. ``threads=None`` becomes the device's.

        Raises:
            KvEngineError: the engine refused the artifact or the recipe.
            DeployFailed: not deployed here. LeaseError. Any other InfrastructureError.
        """
        with self._working(device, token) as slot:
            with slot.lock:
                folder = slot.deployed.get(artifact_id)
            if folder is None:
                raise DeployFailed(f"{device} has no artifact {artifact_id[:16]}…; deploy it first")
            if recipe.threads is None:
                recipe = dataclasses.replace(recipe, threads=slot.config.threads)
            engine = slot.device.open_session(folder, recipe, Deadline(self._budgets.open_s))
            with slot.lock:
                if self._is_current(slot, token):
                    session_id = f"{device}/{uuid.uuid4().hex}"
                    slot.sessions[session_id] = engine
                    return session_id, engine.info
            engine.close()
            raise LeaseError(f"{device}: the lease expired while the session was being opened")

    def run_program(self, session_id: str, token: int, program: Program) -> tuple[Observation, ...]:
        return self._in_session(session_id, token, lambda engine: engine.run_program(program))

    def run_workload(self, session_id: str, token: int, workload: Workload) -> Measurement:
        return self._in_session(session_id, token, lambda engine: engine.run_workload(workload))

    def close_session(self, session_id: str, token: int) -> None:
        """Closing one that is closed does nothing."""
        slot, _ = self._leased(_device_of(session_id), token)
        with slot.lock:
            engine = slot.sessions.pop(session_id, None)
        if engine is not None:
            engine.close()

    # -- recordings -----------------------------------------------------------------------

    def start_recording(self, session_id: str, token: int, plan: Plan) -> None:
        """Record on the device until ``stop_recording``, or until the lease ends."""
        device = _device_of(session_id)
        with self._working(device, token) as slot:
            with slot.lock:
                engine = slot.sessions.get(session_id)
            runner = engine.pid if isinstance(engine, RunnerSession) else None
            if not isinstance(slot.device, Records):
                raise InfrastructureError(f"{device} cannot record what it does")
            recording = slot.device.start_recording(plan, runner, Deadline(self._budgets.recording_s))
            with slot.lock:
                if self._is_current(slot, token):
                    slot.recording = recording
                    return
            recording.stop(Deadline(self._budgets.recording_s))
            raise LeaseError(f"{device}: the lease expired while a recording was being started")

    def stop_recording(self, session_id: str, token: int) -> Record:
        """What was recorded. Raises LeaseError; InfrastructureError when nothing records."""
        device = _device_of(session_id)
        with self._working(device, token) as slot:
            with slot.lock:
                recording, slot.recording = slot.recording, None
            if recording is None:
                raise InfrastructureError(f"{device}: nothing is being recorded; start a recording first")
            return recording.stop(Deadline(self._budgets.recording_s))

    def shutdown(self) -> None:
        """End every session and give up the root; the agent answers nothing afterwards."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        if self._reaper is not None:
            self._reaper.join()
        for slot in self._slots.values():
            with slot.lock:
                lease = slot.lease
            if lease is not None:
                self._free(slot, lease)
        for slot in self._slots.values():
            try:
                slot.device.close()
            except InfrastructureError as error:
                _log.warning("closing %s: %s", slot.config.name, error)
        self._root_lock.close()

    # -- inside ---------------------------------------------------------------------------

    def _status(self, slot: _Slot) -> DeviceStatus:
        error = ""
        try:
            self._identity(slot)
        except InfrastructureError as problem:
            error = str(problem)
        self._expire(slot)
        return DeviceStatus(slot.config.name, slot.config.kind, slot.identity, error, slot.lease)

    def _identity(self, slot: _Slot) -> DeviceIdentity:
        """Asked once; two that ask at the same time share the answer."""
        with slot.asking:
            if slot.identity is None:
                slot.identity = slot.device.identity(Deadline(self._budgets.identity_s))
            return slot.identity

    def _slot(self, device: str) -> _Slot:
        self._check_running()
        try:
            return self._slots[device]
        except KeyError:
            raise NoSuchDevice(
                f"no device {device!r} at this lab host; it has {sorted(self._slots)}"
            ) from None

    def _in_use(self) -> set[str]:
        """Artifacts that a lease has deployed."""
        return {id_ for slot in self._slots.values() if slot.lease is not None for id_ in slot.deployed}

    def _leased(self, device: str, token: int) -> tuple[_Slot, Lease]:
        slot = self._slot(device)
        self._expire(slot)
        with slot.lock:
            if slot.lease is None:
                raise LeaseError(f"{device}: token {token} has no lease any more; acquire the device again")
            if slot.lease.token != token:
                raise LeaseError(
                    f"{device}: token {token} is not the current one; it is leased to {slot.lease.holder!r}"
                )
            return slot, slot.lease

    @contextmanager
    def _working(self, device: str, token: int) -> Iterator[_Slot]:
        """While the body runs the device is not lent anew, even if the lease expires meanwhile."""
        slot, _ = self._leased(device, token)
        with slot.lock:
            self._check_current(slot, token)
            slot.busy += 1
        try:
            yield slot
        finally:
            with slot.lock:
                slot.busy -= 1

    def _in_session(self, session_id: str, token: int, work: Callable[[EngineSession], T]) -> T:
        slot, _ = self._leased(_device_of(session_id), token)
        with slot.lock:
            engine = slot.sessions.get(session_id)
        if engine is None:
            raise LeaseError(f"no session {session_id!r} is open; open one")
        try:
            return work(engine)
        except InfrastructureError as error:
            with slot.lock:
                if not self._is_current(slot, token):
                    raise LeaseError(f"{session_id}: the lease ended during the call: {error}") from error
            raise

    def _check_current(self, slot: _Slot, token: int) -> None:
        if not self._is_current(slot, token):
            raise LeaseError(f"{slot.config.name}: the lease of token {token} has just ended")

    def _is_current(self, slot: _Slot, token: int) -> bool:
        return slot.lease is not None and slot.lease.token == token and self._clock() < slot.expires

    def _grant(self, slot: _Slot, holder: str, token: int, ttl_s: float) -> Lease:
        slot.lease = Lease(slot.config.name, holder, token, ttl_s, time.time() + ttl_s)
        slot.expires = self._clock() + ttl_s
        return slot.lease

    def _expire(self, slot: _Slot) -> None:
        with slot.lock:
            lease = slot.lease
            if lease is None or self._clock() < slot.expires:
                return
        _log.warning("lease %d of %s on %s expired", lease.token, lease.holder, lease.device)
        self._free(slot, lease)

    def _free(self, slot: _Slot, lease: Lease) -> None:
        """Sessions first, then the lease: the device is free only when nothing runs on it any more."""
        with slot.freeing:
            with slot.lock:
                if slot.lease is None or slot.lease.token != lease.token:
                    return
                slot.expires = self._clock()  # from now on the token is refused
                sessions, slot.sessions = slot.sessions, {}
                recording, slot.recording = slot.recording, None
                slot.deployed.clear()  # another lease may make room for its own
            for engine in sessions.values():
                engine.close()
            if recording is not None:
                # One that cannot be stopped ends by itself, and the next one ends it.
                with suppress(InfrastructureError):
                    recording.stop(Deadline(self._budgets.recording_s))
            self._put_back(slot)
            with slot.lock:
                slot.lease = None

    def _put_back(self, slot: _Slot) -> None:
        """Only where something was changed: a device that does not answer should delay nobody else."""
        changed, slot.settings = slot.settings, {}
        if changed:
            try:
                slot.device.release(Deadline(self._budgets.release_s))
            except InfrastructureError as error:
                _log.warning("%s stays changed until its next claim: %s", slot.config.name, error)

    def _reap(self, every_s: float) -> None:
        while not self._stopped.wait(every_s):
            for slot in self._slots.values():
                try:
                    self._expire(slot)
                except Exception:
                    _log.exception("freeing %s failed", slot.config.name)

    def _check_running(self) -> None:
        if self._stopped.is_set():
            raise InfrastructureError("this lab agent has been shut down; start another")


class _FencingCounter:
    """Strictly increasing, also over restarts: a number is on the disk before it is given out."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            self._last = int(path.read_text())
        except FileNotFoundError:
            self._last = 0
        except ValueError as error:
            raise LeaseError(
                f"{path} holds no fencing token: {error}; put a larger one than ever given"
            ) from error

    def next(self) -> int:
        with self._lock:
            self._last += 1
            part = self._path.with_suffix(".part")
            with part.open("w") as file:
                file.write(str(self._last))
                file.flush()
                os.fsync(file.fileno())
            part.replace(self._path)
            return self._last


def _lock_root(root: Path) -> IO[str]:
    """An flock, which the kernel takes back when the agent's process dies."""
    file = (root / "agent.lock").open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise LeaseError(
            f"another lab agent runs on {root}; join it, stop it, or give this one another folder"
        ) from None
    return file


def _check_ttl(ttl_s: float) -> None:
    if not 0 < ttl_s <= MAX_TTL_S:
        raise LeaseError(f"sought a time limit in (0, {MAX_TTL_S:g}] s, found {ttl_s:g}")


def _device_of(session_id: str) -> str:
    return session_id.rpartition("/")[0]
