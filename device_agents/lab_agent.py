"""The lab agent: owns every device attached to one lab host and lends them out.

Plain Python and thread-safe; the harness wraps it in a Ray actor, so arguments and results
are plain, picklable data. Exclusive use is a lease with a time limit, a heartbeat and a fencing token
(Kleppmann, "How to do distributed locking"): whoever comes with an older token is refused, so a client
that slept through its lease cannot disturb the next one. See device_agents.leases.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from device_agents import power, restarting
from device_agents.api import Device, DeviceIdentity, Finding, Vitals
from device_agents.arrivals import Arrivals
from device_agents.blobs import BlobStore, MissingBlob, parse_manifest
from device_agents.config import DeviceConfig
from device_agents.deadline import Deadline
from device_agents.errors import DeployFailed, InfrastructureError, LeaseError, NoSuchDevice
from device_agents.host import HostDevice
from device_agents.lab_types import AgentBudgets, DeviceStatus, Lease, Standing
from device_agents.leases import audit, protocol
from device_agents.leases.ledger import Entry, Ledger
from device_agents.leases.model import Held, Request
from device_agents.leases.process import this_process
from device_agents.observing import Observed, observe, status_of
from device_agents.recording.record import Plan, Record, Records
from device_agents.remote_session import RunnerSession
from device_agents.results import Kept, Key, ResultJournal
from device_agents.roots import lock_root
from device_agents.simulated import make_simulated
from device_agents.slots import Slot
from kvengine.program import Measurement, Observation, Program, Workload
from kvengine.recipe import SessionRecipe
from kvengine.session import EngineSession, SessionInfo

T = TypeVar("T")
MakeDevice = Callable[[DeviceConfig, BlobStore], Device]

_REAP_EVERY_S = 1.0

_log = logging.getLogger(__name__)


def make_device(config: DeviceConfig, store: BlobStore) -> Device:
    """The device of a config. A host device shares the agent's store, for its disk is the agent's disk."""
    if config.kind == "host":
        return HostDevice(config.name, store.root, store=store)
    if config.kind == "android":
        # Not before it is wanted: a lab host without phones needs no adbutils.
        from device_agents.adb.devices import make_android

        return make_android(config, store.root)
    if config.kind == "simulated":
        return make_simulated(config)
    raise NoSuchDevice(
        f"device {config.name!r}: unknown kind {config.kind!r}; this agent knows: host, android, simulated"
    )


class LabAgent:
    """Owns ``devices``; keeps artifacts in ``root``, which it locks, and leases in the journal of ``leases``.

    leases: the folder shared by all lab agents of this machine, for results on their way as well; None: one
    of its own, in ``root``.
    clock: monotonic seconds. store_limit_bytes: artifacts beyond it are evicted, longest unused first.
    reap_every_s: how often ended leases are looked for between calls; None: only in calls.

    Raises:
        RootTaken: another agent has ``root``. LeaseError: the journal cannot be read.
        NoSuchDevice: a config of unknown kind or a name used twice.
    """

    def __init__(
        self,
        root: Path,
        devices: Sequence[DeviceConfig],
        *,
        leases: Path | None = None,
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
        self._root_lock = lock_root(root)
        try:
            self._id = str(root.absolute())
            self._store = BlobStore(root)
            self._budgets = budgets or AgentBudgets()
            self._clock = clock
            shared = leases or root / "leases"
            self._ledger = Ledger(shared, clock=clock)
            self._results = ResultJournal(shared / "results")
            self._make = make
            self._slots: dict[str, Slot] = {}
            self.add(devices)
            self._arrivals = Arrivals(
                self._store, store_limit_bytes, self._in_use, clock, self._budgets.deploy_s
            )
            # What an agent that was killed here had lent stays lent; what ran for it died with it.
            self._ledger.act(protocol.start(self._id, this_process()))
        except BaseException:
            self._root_lock.close()
            raise
        self._stopped = threading.Event()
        self._reaper: threading.Thread | None = None
        if reap_every_s is not None:
            self._reaper = threading.Thread(
                target=self._reap, args=(reap_every_s,), name="leases", daemon=True
            )
            self._reaper.start()

    def add(self, devices: Sequence[DeviceConfig]) -> None:
        """Own these too from now on; one that it has already is left alone."""
        new = {
            c.name: Slot(
                c, c.key(self._id), self._id, self._make(c, self._store), self._ledger, self._budgets
            )
            for c in devices
            if c.name not in self._slots
        }
        self._slots = {**self._slots, **new}  # others read it meanwhile

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
        """Who has what now, through whichever agent; asks no device."""
        self._check_running()
        return tuple(lease for slot in self._slots.values() if (lease := self._lease(slot)) is not None)

    def observe(self) -> Observed:
        """Devices and leases as they are known here; asks no device."""
        self._check_running()
        return observe(self._slots.values(), self._ledger)

    def journal(self) -> tuple[Entry, ...]:
        """Who did what to the devices of this machine, oldest first; see leases.audit."""
        return tuple(audit.entries(self._ledger.path.parent))

    @property
    def in_use(self) -> bool:
        """Whether somebody has a device through this agent, or waits for one."""
        state = self._ledger.act()
        requests = [each.request for table in (state.held, state.waiting) for each in table.values()]
        return any(request.agent == self._id for request in requests)

    def vitals(self, device: str) -> Vitals:
        return self._slot(device).device.vitals(Deadline(self._budgets.vitals_s))

    def diagnose(self, device: str) -> tuple[Finding, ...]:
        """What is wrong with the device, and who has it."""
        slot = self._slot(device)
        found = slot.device.diagnose(Deadline(self._budgets.diagnose_s))
        slot.follow()
        state, now = self._ledger.state()
        held, bad = state.held.get(slot.key), state.quarantined.get(slot.key)
        lease = Finding("lease", "ok", "free")
        if bad is not None:
            lease = Finding(
                "lease", "fix", f"quarantined by {bad.by}: {bad.evidence}", "see to it and lift it"
            )
        elif held is not None:
            text = protocol.describe(held, now)
            lease = Finding("lease", "note", text, "wait for it, or take another device")
        return (*found, lease)

    # -- leases ---------------------------------------------------------------------------

    def ask(self, request: Request, wait: bool = True) -> Standing:
        """Get in line, and a sign of life of who is; the same request again asks how it stands.

        request: with the names of devices; ``agent`` is filled in.

        Raises:
            LeaseNotGranted: it cannot be granted at once, and is not to ``wait``.
            LeaseError: it can never be granted. NoSuchDevice.
        """
        slots = [self._slot(device) for device in request.devices]
        for slot in slots:
            slot.follow()
        keyed = dataclasses.replace(request, devices=tuple(slot.key for slot in slots), agent=self._id)
        rules = self._ledger.rules
        state = self._ledger.act(protocol.ask(keyed, rules, wait=wait))
        now = self._clock()
        names = {slot.key: slot.config.name for slot in slots}
        leases = tuple(self._as_lease(held, names[held.device]) for held in state.of(request.id))
        ahead = tuple(each.request.holder for each in protocol.ahead(state, request.id, now, rules))
        return Standing(leases, ahead, protocol.why_not(state, request.id, now, rules))

    def withdraw(self, id_: str) -> None:
        """Wait no more, or give back all that was granted."""
        state = self._ledger.act(protocol.withdraw(id_, "given back"))
        self._follow_all(held.device for held in state.held.values() if held.request.id == id_)

    def acquire(self, device: str, holder: str, ttl_s: float) -> Lease:
        """One device, at once, for as long as it is renewed every ``ttl_s``.

        Raises:
            LeaseNotGranted: somebody has it. LeaseError: a time limit that cannot be. NoSuchDevice.
        """
        request = Request(uuid.uuid4().hex, holder, holder, (device,), beat_s=ttl_s)
        (lease,) = self.ask(request, wait=False).granted
        return lease

    def claim(self, device: str, token: int) -> dict[str, str]:
        """First thing with a new lease: undo what the last user left, apply the device's settings.

        Returns each setting and what it was read back as. Raises SettingFailed, AdbFailure.
        """
        with self._working(device, token) as slot:
            found = slot.device.claim(Deadline(self._budgets.claim_s))
            with slot.lock:
                slot.settings = found
            _log.info("claimed")
        return found

    def renew(self, device: str, token: int, ttl_s: float) -> Lease:
        """A heartbeat; the next is due within ``ttl_s``. Raises LeaseError when the lease has ended."""
        slot = self._leased(device, token)
        state, now = self._ledger.state()
        held = protocol.current(state, slot.key, token, now)
        # One beat is for all devices of a request, whose client renews each.
        if ttl_s != held.request.beat_s or now - held.beat >= ttl_s / 10:
            state = self._ledger.act(protocol.beat(held.request.id, self._ledger.rules, ttl_s))
        return self._as_lease(protocol.current(state, slot.key, token, now), device)

    def renew_all(self, leases: Sequence[tuple[str, int]], ttl_s: float) -> dict[str, str]:
        """A heartbeat for each (device, token); says of those leases that have ended why."""
        ended = {}
        for device, token in leases:
            try:
                self.renew(device, token, ttl_s)
            except (LeaseError, NoSuchDevice) as error:
                ended[device] = str(error)
        return ended

    def release(self, device: str, token: int) -> None:
        """Close what is open on the device and free it."""
        slot = self._leased(device, token)
        self._ledger.act(protocol.end(slot.key, token, "given back"))
        slot.follow()

    def revoke(self, device: str, by: str, reason: str) -> None:
        """Take the device from whoever has it."""
        slot = self._slot(device)
        held = self._ledger.state()[0].held.get(slot.key)
        if held is not None:
            self._ledger.act(protocol.end(slot.key, held.token, f"revoked by {by}: {reason}"))
            slot.follow()

    def quarantine(self, device: str, evidence: str, by: str, seconds: float | None) -> None:
        """Lend the device to nobody for so long, or until ``lift``; whoever has it loses it."""
        slot = self._slot(device)
        self._ledger.act(protocol.quarantine(slot.key, evidence, by, seconds))
        slot.follow()

    def lift(self, device: str, by: str) -> None:
        """End a quarantine."""
        self._ledger.act(protocol.lift(self._slot(device).key, by))

    def reboot(self, device: str, token: int, by: str, why: str, most: int) -> None:
        """Start the device anew, ``most`` times a day. Raises LeaseError: they are used up; it is not yours.

        InfrastructureError: it cannot be, or does not take it.
        """
        with self._working(device, token) as slot:
            able = restarting.check(slot.device)
            self._ledger.act(protocol.restart(slot.key, "reboot", by, why, most))
            able.reboot(Deadline(self._budgets.reboot_s))

    def power_cycle(self, device: str, token: int, reason: str) -> str:
        """Says what was done. Raises PowerCycleFailed: nothing was, or it did not help. LeaseError."""
        with self._working(device, token) as slot:
            lease = self._lease(slot)
            by = lease.holder if lease is not None else ""
            return power.cycle(
                slot.config, slot.key, by, reason, self._ledger, Deadline(self._budgets.power_s)
            )

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
            _log.info("deployed artifact %s", manifest.id)
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
                if slot.is_current(token):
                    session_id = f"{device}/{uuid.uuid4().hex}"
                    slot.sessions[session_id] = engine
                    _log.info("opened session %s", session_id)
                    return session_id, engine.info
            engine.close()
            raise LeaseError(f"{device}: the lease expired while the session was being opened")

    def open_artifact(
        self, device: str, token: int, manifest_json: str, recipe: SessionRecipe
    ) -> tuple[str, SessionInfo]:
        """``deploy``, then ``open_session``. Raises BlobsMissing besides: some are yet to be sent."""
        return self.open_session(device, token, self.deploy(device, token, manifest_json), recipe)

    def run_program(self, session_id: str, token: int, program: Program) -> tuple[Observation, ...]:
        return self._in_session(session_id, token, lambda engine: engine.run_program(program))

    def run_workload(self, session_id: str, token: int, workload: Workload) -> Measurement:
        return self._in_session(session_id, token, lambda engine: engine.run_workload(workload))

    def measure(
        self,
        session_id: str,
        token: int,
        workload: Workload,
        plan: Plan,
        key: Key | None = None,
        note: str = "",
    ) -> Kept:
        """``run_workload``, recorded where the device can; once for all with ``key``: see ResultJournal."""

        def work() -> Kept:
            record = None
            try:
                self.start_recording(session_id, token, plan)
            except InfrastructureError as error:
                record = Record(note=f"not recorded: {error}")
            try:
                measurement = self.run_workload(session_id, token, workload)
            finally:
                if record is None:
                    record = self._recorded(session_id, token)
            after: Vitals | None = None
            with suppress(InfrastructureError):
                after = self.vitals(_device_of(session_id))
            return Kept(measurement, record, after, note)

        return self._results.once(key, work)

    def kept(self, key: Key) -> Kept | None:
        """The result of ``measure`` that nobody has acknowledged yet."""
        return self._results.get(key)

    def acknowledge(self, leg: str) -> None:
        """The client has stored the leg: its results need not be kept any more."""
        self._results.acknowledge(leg)

    def close_session(self, session_id: str, token: int) -> None:
        """Closing one that is closed does nothing."""
        slot = self._leased(_device_of(session_id), token)
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
                if slot.is_current(token):
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
        try:
            self._ledger.act(protocol.stop(self._id))
        except InfrastructureError as error:
            _log.warning("leases are left to end by themselves: %s", error)
        for slot in self._slots.values():
            slot.close()
        for slot in self._slots.values():
            try:
                slot.device.close()
            except InfrastructureError as error:
                _log.warning("closing %s: %s", slot.config.name, error)
        self._root_lock.close()

    # -- inside ---------------------------------------------------------------------------

    def _status(self, slot: Slot) -> DeviceStatus:
        error = ""
        try:
            self._identity(slot)
        except InfrastructureError as problem:
            error = str(problem)
        return status_of(slot, error, self._lease(slot), self._ledger)

    def _lease(self, slot: Slot) -> Lease | None:
        slot.follow()
        held = self._ledger.state()[0].held.get(slot.key)
        return None if held is None else self._as_lease(held, slot.config.name)

    def _as_lease(self, held: Held, name: str) -> Lease:
        past = time.time() - self._clock()  # from our clock to that of people
        request = held.request
        since, until, beat = (past + each for each in (held.since, held.until, held.beat))
        return Lease(name, request.holder, held.token, request.id, request.user, since, until, beat)

    def _identity(self, slot: Slot) -> DeviceIdentity:
        """Asked once; two that ask at the same time share the answer."""
        with slot.asking:
            if slot.identity is None:
                slot.identity = slot.device.identity(Deadline(self._budgets.identity_s))
            return slot.identity

    def _slot(self, device: str) -> Slot:
        self._check_running()
        try:
            return self._slots[device]
        except KeyError:
            raise NoSuchDevice(
                f"no device {device!r} at this lab host; it has {sorted(self._slots)}"
            ) from None

    def _in_use(self) -> set[str]:
        """Artifacts that a lease has deployed."""
        return {id_ for slot in self._slots.values() for id_ in tuple(slot.deployed)}

    def _leased(self, device: str, token: int) -> Slot:
        slot = self._slot(device)
        slot.check(token)
        return slot

    @contextmanager
    def _working(self, device: str, token: int) -> Iterator[Slot]:
        slot = self._slot(device)
        with slot.working(token):
            yield slot

    def _in_session(self, session_id: str, token: int, work: Callable[[EngineSession], T]) -> T:
        slot = self._leased(_device_of(session_id), token)
        with slot.lock:
            engine = slot.sessions.get(session_id)
        if engine is None:
            raise LeaseError(f"no session {session_id!r} is open; open one")
        with slot.about(token):
            try:
                return work(engine)
            except InfrastructureError as error:
                _log.warning("session %s broke: %s: %s", session_id, type(error).__name__, error)
                if not slot.is_current(token):
                    raise LeaseError(f"{session_id}: the lease ended during the call: {error}") from error
                raise

    def _recorded(self, session_id: str, token: int) -> Record:
        try:
            return self.stop_recording(session_id, token)
        except InfrastructureError as error:
            return Record(note=f"the recording is lost: {error}")

    def _follow_all(self, keys: Iterable[str]) -> None:
        wanted = set(keys)
        for slot in self._slots.values():
            if slot.key in wanted:
                slot.follow()

    def _reap(self, every_s: float) -> None:
        while not self._stopped.wait(every_s):
            try:
                self._ledger.act()
            except Exception:
                _log.exception("looking after leases failed")
            for slot in self._slots.values():
                try:
                    slot.follow()
                except Exception:
                    _log.exception("freeing %s failed", slot.config.name)

    def _check_running(self) -> None:
        if self._stopped.is_set():
            raise InfrastructureError("this lab agent has been shut down; start another")


def _device_of(session_id: str) -> str:
    return session_id.rpartition("/")[0]
