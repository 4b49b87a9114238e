"""The health of a run's devices: cool and charged, golden jobs, quarantine for all runs, restarts."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from device_agents.errors import InfrastructureError
from device_agents.logs import about
from harness import golden, measuring
from harness.entry import Entry
from harness.errors import GoldenJobFailed, NotFit
from harness.fitness import UNTIL_FIT
from harness.leasing import holder
from harness.store.protocol import Span, Store
from kvengine.artifact import Artifact

if TYPE_CHECKING:
    from harness.farm import Farm
    from harness.run import DeviceRun

QUARANTINE_S = 900.0  # then the golden job before work decides
_log = logging.getLogger(__name__)


class Health:
    """Of the devices of ``run``; different devices may be used from different threads."""

    def __init__(
        self,
        run: DeviceRun,
        pause: Callable[[float], None] = measuring.wait,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run = run
        self._pause, self._clock = pause, clock
        self._sound: set[str] = set()
        self._fit: set[str] = set()
        self._entries: dict[str, Entry] = {}
        self.waited_s = 0.0  # until devices were fit, in all
        self._lock = threading.Lock()

    def until_fit(self, device: str, again: bool = False) -> None:
        """Waits while a phone is too hot or its battery too low; the phone is ours.

        again: also if it was fit before.

        Raises:
            NotFit: it is so for as long as we may wait. InfrastructureError: it does not tell.
        """
        run = self._run
        if run.inventory.device(device).kind != "android" or (device in self._fit and not again):
            return
        with self._lock:
            entry = self._entries.setdefault(device, self._entry(device))
        waited, now = entry.wait(), time.time()
        if waited.seconds:
            with self._lock:
                self.waited_s += waited.seconds
            run.recorder.part(device, "wait", f"{UNTIL_FIT}: {waited.why}", now - waited.seconds, now)
        if waited.given_up:
            raise NotFit(
                f"{device} was not fit to start within {waited.seconds:.0f} s: {waited.given_up}; let it "
                "cool down or charge it, or see [entry] in farm.toml"
            )
        with self._lock:
            self._fit.add(device)

    def _entry(self, device: str) -> Entry:
        return Entry(
            lambda: self._run.farm.vitals(device),
            self._run.inventory.entry,
            pause=self._pause,
            clock=self._clock,
            tell=lambda why: self._run.tell_wait(f"{device} waits {UNTIL_FIT}: {why}"),
        )

    def before_work(self, device: str) -> None:
        """The first time: a golden job. The device is ours.

        Raises:
            GoldenJobFailed: a wrong answer. InfrastructureError: none.
        """
        if self._wants(device) and device not in self._sound:
            self._prove(device)

    def answers(self, device: str) -> None:
        """After an infrastructure failure: it tells its vitals, and does the golden job. Raises as before."""
        with self._lock:
            self._sound.discard(device)
            self._fit.discard(device)
        self._run.farm.vitals(device)
        if self._wants(device):
            with self._run.working(device):
                self._prove(device)

    def sick(self, device: str, evidence: str) -> None:
        """No other run gets the device for a while. This machine, and virtual phones, which end with their
        run, are set aside for this run alone."""
        entry = self._run.inventory.device(device)
        if entry.kind == "android" and not entry.virtual:
            with suppress(InfrastructureError):
                self._run.farm.quarantine(device, evidence, self._by(), QUARANTINE_S)

    def reboot(self, device: str, why: str) -> str:
        """What was done about a device that does not answer, "" for nothing."""
        most = self._run.options.reboots
        if most > 0:
            try:
                self._run.farm.reboot(device, self._by(), why, most)
                return "rebooted"
            except InfrastructureError as error:
                _log.warning("%s is not rebooted: %s", device, error)
        return ""

    def _by(self) -> str:
        return f"{holder(os.getpid(), self._run.options.terms.user)} run {self._run.run_id}"

    def _wants(self, device: str) -> bool:
        wanted = self._run.options.golden
        return wanted == "all" or (
            wanted == "phones" and self._run.inventory.device(device).kind == "android"
        )

    def _prove(self, device: str) -> None:
        run, began, outcome = self._run, time.time(), "infrastructure"
        try:
            prove(run.farm, device, golden.artifact(run.options.cache))
            outcome = "passed"
        except GoldenJobFailed:
            outcome = "failed"
            raise
        finally:
            run.recorder.span(Span(device, "golden", "golden job", began, time.time(), outcome))
        with self._lock:
            self._sound.add(device)
        with about(device=device):
            _log.info("golden job done in %.2f s", time.time() - began)


def waits_until_fit(spans: Iterable[Span]) -> dict[str, tuple[float, str]]:
    """Seconds that a run waited until each device was fit, and what was wrong at first; by device."""
    found: dict[str, tuple[float, str]] = {}
    for span in spans:
        for part in span.parts:
            name, colon, why = part.name.partition(": ")
            if part.kind == "wait" and name == UNTIL_FIT and colon:
                before_s, first = found.get(span.device, (0.0, why))
                found[span.device] = before_s + part.ended - part.began, first
    return found


def tell_of_devices(store: Store, run_id: str) -> None:
    """Keep a run's devices as they are known now: how often infrastructure stopped them lately, and what this
    run waited for. Raises StoreError."""
    flakes, waits = store.flakes(), waits_until_fit(store.spans(run_id))
    for device in store.devices(run_id):
        told = device
        if (found := flakes.get(device.name)) is not None:
            told = replace(told, results=found.results, stopped=found.stopped)
        if (waited := waits.get(device.name)) is not None:
            told = replace(told, unfit_s=waited[0], unfit=waited[1])
        if told != device:
            store.add_device(run_id, told)


def prove(farm: Farm, device: str, artifact: Artifact) -> None:
    """One golden job. Raises GoldenJobFailed: a wrong answer. InfrastructureError: see Farm."""
    with farm.open(device, artifact, golden.SESSION) as session:
        golden.judge(device, session.run_program(golden.PROGRAM))
