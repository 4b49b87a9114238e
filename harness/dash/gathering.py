"""What is known of the farm now: from lease journals, lab agents and the store. Nothing is changed."""

from __future__ import annotations

import logging
import math
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from device_agents.api import Vitals
from device_agents.config import name_of
from device_agents.errors import InfrastructureError
from device_agents.leases.ledger import Journal
from device_agents.leases.model import Held, Request
from device_agents.observing import Observed
from harness.errors import StoreError
from harness.inventory import Inventory
from harness.store.protocol import Flakes, RunSummary, Store
from reports.farm_state import (
    DeviceState,
    FarmState,
    LeaseState,
    QuarantineState,
    RunState,
    State,
    VitalsState,
    WaitingState,
)
from reports.results import DeviceInfo, RunResults, VitalsInfo

RUNS_SHOWN = 50
_log = logging.getLogger(__name__)


class Source(Protocol):
    """Lab hosts that can be seen. Raises InfrastructureError: one cannot."""

    name: str

    def observed(self) -> Sequence[Observed]: ...

    def vitals(self, host: str, device: str) -> Vitals | None:
        """None: nobody here can tell."""
        ...


class LocalJournal:
    """This machine's leases; it needs no agent, and knows no vitals."""

    def __init__(self, journal: Journal, known: Inventory) -> None:
        self.name = f"lease journal {journal.path}"
        self._journal = journal
        self._serials = known.serials()
        self._listed = {name: e.options.get("serial", name) for name, e in known.devices.items()}

    def observed(self) -> Sequence[Observed]:
        state, now = self._journal.state()
        keys = [*state.held, *state.quarantined]
        keys += [device for each in state.waiting.values() for device in each.request.devices]
        found = {name_of(key, self._serials): key for key in keys}
        return (Observed(socket.gethostname(), state, now, time.time(), {**self._listed, **found}, {}),)

    def vitals(self, host: str, device: str) -> Vitals | None:
        return None


@dataclass(frozen=True)
class _Stored:
    """What the store says. devices, vitals, flakes: by device."""

    runs: tuple[RunState, ...] = ()
    devices: dict[str, DeviceInfo] = field(default_factory=dict)
    vitals: dict[str, VitalsInfo] = field(default_factory=dict)
    flakes: dict[str, Flakes] = field(default_factory=dict)


class Gatherer:
    """Gathers on demand, for many readers at once: leases at most every ``fresh_s``, the store every
    ``store_s``. Vitals are asked of free devices alone, every ``vitals_s``: to ask disturbs a measurement."""

    def __init__(
        self,
        sources: Sequence[Source],
        store: Store | None,
        *,
        fresh_s: float = 1.0,
        store_s: float = 3.0,
        vitals_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sources = sources
        self._store = store
        self._fresh_s, self._store_s, self._vitals_s, self._clock = fresh_s, store_s, vitals_s, clock
        self._lock = threading.Lock()
        self._last: tuple[float, FarmState] | None = None
        self._stored: tuple[float, _Stored, tuple[str, ...]] | None = None
        self._vitals: dict[tuple[str, str], tuple[float, VitalsState]] = {}  # when asked, and the answer

    def state(self) -> FarmState:
        """What is known; what cannot be read is a problem in it, no error."""
        with self._lock:
            now = self._clock()
            if self._last is None or now - self._last[0] >= self._fresh_s:
                self._last = now, self._gather()
            return self._last[1]

    def _gather(self) -> FarmState:
        problems = list[str]()
        seen = list[tuple[Source, Observed]]()
        for source in self._sources:
            try:
                seen += [(source, each) for each in source.observed()]
            except InfrastructureError as error:
                problems.append(f"{source.name}: {error}")
        stored, wrong = self._from_store()
        devices = [
            self._with_vitals(source, device, stored)
            for source, observed in seen
            for device in devices_of(observed, stored.devices, stored.flakes)
        ]
        waiting = [each for _, observed in seen for each in waiting_at(observed)]
        names = [source.name for source in self._sources] + (["store"] if self._store is not None else [])
        return FarmState(
            time.time(),
            tuple(names),
            (*problems, *wrong),
            tuple(sorted(devices, key=lambda d: (d.host, d.name))),
            tuple(sorted(waiting, key=lambda w: w.since)),
            tuple(_worked_on(run, devices) for run in stored.runs),
        )

    def _from_store(self) -> tuple[_Stored, tuple[str, ...]]:
        """And what is wrong with it."""
        store, now = self._store, self._clock()
        if store is None:
            return _Stored(), ()
        if self._stored is None or now - self._stored[0] >= self._store_s:
            try:
                found = _Stored(_runs(store), store.newest_devices(), store.vitals(), store.flakes())
                self._stored = now, found, ()
            except StoreError as error:
                before = self._stored[1] if self._stored else _Stored()
                self._stored = now, before, (str(error),)
        return self._stored[1:]

    def _with_vitals(self, source: Source, device: DeviceState, stored: _Stored) -> DeviceState:
        place = device.host, device.name
        asked, now = self._vitals.get(place), self._clock()
        if device.state == "free" and (asked is None or now - asked[0] >= self._vitals_s):
            try:
                vitals = source.vitals(device.host, device.name)
            except InfrastructureError as error:
                _log.info("%s does not tell its vitals: %s", device.name, error)
                vitals = None
            if vitals is not None:
                asked = self._vitals[place] = now, vitals_state(vitals)
        known = [vitals_state(stored.vitals[device.name])] if device.name in stored.vitals else []
        known += [asked[1]] if asked is not None else []
        return replace(device, vitals=max(known, key=lambda v: v.at)) if known else device


def devices_of(
    observed: Observed, stored: dict[str, DeviceInfo], flakes: dict[str, Flakes]
) -> Iterable[DeviceState]:
    """Every device that the lab host tells of. stored: what devices were when a run last used them."""
    past = observed.at - observed.now  # from the journal's clock to Unix time
    state = observed.state
    for name, key in sorted(observed.keys.items()):
        held, bad = state.held.get(key), state.quarantined.get(key)
        identity, info = observed.identities.get(name), stored.get(name)
        flaky = flakes.get(name, Flakes(0, 0))
        word: State = "free"
        if bad is not None:
            word = "quarantined"
        elif held is not None:
            word = "finishing" if held.ended else "leased"
        quarantine = None
        if bad is not None:
            until = None if bad.until is None else past + bad.until
            quarantine = QuarantineState(bad.evidence, bad.by, until)
        who = identity or info
        yield DeviceState(
            name,
            observed.host,
            key,
            word,
            model=who.model if who else "",
            os=who.os if who else "",
            simulated=who.simulated if who else "",
            lease=_lease_state(held, past) if held is not None else None,
            quarantine=quarantine,
            waiting=sum(key in each.request.devices for each in state.waiting.values()),
            results=flaky.results,
            stopped=flaky.stopped,
        )


def waiting_at(observed: Observed) -> Iterable[WaitingState]:
    names = {key: name for name, key in observed.keys.items()}
    past = observed.at - observed.now
    for each in observed.state.waiting.values():
        request: Request = each.request
        devices = tuple(names.get(key, key) for key in request.devices)
        yield WaitingState(
            request.holder, devices, request.count, request.priority, past + each.since, request.run
        )


def vitals_state(vitals: Vitals | VitalsInfo) -> VitalsState:
    return VitalsState(
        vitals.at,
        vitals.battery_percent,
        vitals.battery_charging,
        {name: each for name, each in vitals.temperatures_c.items() if math.isfinite(each)},
        vitals.thermal_status,
    )


def _lease_state(held: Held, past: float) -> LeaseState:
    request = held.request
    since, until, beat = (past + each for each in (held.since, held.until, held.beat))
    return LeaseState(request.holder, request.user, held.token, request.run, since, until, beat, held.ended)


def _runs(store: Store) -> tuple[RunState, ...]:
    headers = {run.run_id: run for run in store.headers(limit=RUNS_SHOWN)}
    found = []
    for summary in store.runs()[:RUNS_SHOWN]:
        state = _run_state(summary, headers.get(summary.run_id))
        if summary.finished_at is None:
            spans = [s for s in store.spans(summary.run_id) if s.kind in ("check", "leg")]
            ended = max(spans, key=lambda s: s.ended or 0.0, default=None)
            if ended is not None:
                state = replace(state, last=f"{ended.device} · {ended.name}", last_at=ended.ended)
        found.append(state)
    return tuple(found)


def _run_state(summary: RunSummary, header: RunResults | None) -> RunState:
    return RunState(
        summary.run_id,
        summary.started_at,
        summary.finished_at,
        summary.model,
        summary.command,
        summary.devices,
        summary.checks,
        summary.failed,
        summary.legs,
        planned=header.planned_checks + header.planned_legs if header is not None else 0,
        verdict=summary.verdict or "",
        tags=summary.tags,
        drill=summary.drill,
    )


def _worked_on(run: RunState, devices: Iterable[DeviceState]) -> RunState:
    """With the devices that are on lease for it now."""
    names = (
        d.name for d in devices if d.lease is not None and not d.lease.ended and d.lease.run == run.run_id
    )
    return replace(run, holders=tuple(names))
