"""The farm for Prometheus, in its text format: what the page shows, and what adds up over time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import get_args

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from device_agents.config import name_of
from device_agents.leases import audit
from device_agents.leases.ledger import Entry
from reports.farm_state import DeviceState, FarmState, State


class FarmCollector(Collector):
    """Asked anew with every scrape.

    outcomes: checks of all runs by device and outcome. entries: of the lease journals.
    """

    def __init__(
        self,
        state: Callable[[], FarmState],
        outcomes: Callable[[], dict[tuple[str, str], int]],
        entries: Callable[[], Sequence[Entry]],
    ) -> None:
        self._state, self._outcomes, self._entries = state, outcomes, entries

    def collect(self) -> Iterator[Metric]:
        state = self._state()
        yield from _of_devices(state.devices)
        waiting = GaugeMetricFamily("kvfarm_requests_waiting", "Requests for devices that stand in line.")
        waiting.add_metric([], len(state.waiting))
        yield waiting
        longest = GaugeMetricFamily(
            "kvfarm_longest_wait_seconds", "How long the request that waits longest has waited."
        )
        longest.add_metric([], max((state.at - each.since for each in state.waiting), default=0.0))
        yield longest
        problems = GaugeMetricFamily("kvfarm_sources_failing", "Sources that could not be read just now.")
        problems.add_metric([], len(state.problems))
        yield problems
        running = GaugeMetricFamily("kvfarm_runs_working", "Runs that have a device on lease.")
        running.add_metric([], sum(bool(run.holders) for run in state.runs))
        yield running
        yield from self._totals()

    def _totals(self) -> Iterator[Metric]:
        results = CounterMetricFamily(
            "kvfarm_check_results", "Checks in the store.", labels=["device", "outcome"]
        )
        lost = CounterMetricFamily(
            "kvfarm_infrastructure_failures",
            "Checks that infrastructure stopped.",
            labels=["device"],
        )
        outcomes = self._outcomes()
        for (device, outcome), count in sorted(outcomes.items()):
            results.add_metric([device, outcome], count)
            if outcome == "infrastructure":
                lost.add_metric([device], count)
        yield results
        yield lost
        events = CounterMetricFamily(
            "kvfarm_lease_events", "What the audit log tells, by kind and device.", labels=["event", "device"]
        )
        entries = self._entries()
        told = Counter((e.what, name_of(e.device)) for e in audit.events(entries))
        for (what, device), count in sorted(told.items()):
            events.add_metric([what, device], count)
        yield events
        waits = audit.waits(entries)
        yield SummaryMetricFamily(
            "kvfarm_lease_wait_seconds",
            "How long granted requests had waited.",
            count_value=len(waits),
            sum_value=sum(waits),
        )


def _of_devices(devices: Iterable[DeviceState]) -> Iterator[Metric]:
    devices = tuple(devices)
    states = GaugeMetricFamily("kvfarm_devices", "Devices by state.", labels=["state"])
    counts = Counter(device.state for device in devices)
    for word in get_args(State):
        states.add_metric([word], counts[word])
    yield states
    labels = ["device", "host"]
    leased = GaugeMetricFamily("kvfarm_device_leased", "1 while the device is on lease.", labels=labels)
    bad = GaugeMetricFamily("kvfarm_device_quarantined", "1 while nobody may get the device.", labels=labels)
    flaky = GaugeMetricFamily(
        "kvfarm_device_flake_ratio",
        "Share of the device's newest 100 results that infrastructure stopped, for good or until a retry.",
        labels=labels,
    )
    charge = GaugeMetricFamily(
        "kvfarm_device_battery_ratio", "Charge of its battery, 0 to 1, when it was last read.", labels=labels
    )
    warmth = GaugeMetricFamily(
        "kvfarm_device_temperature_celsius", "When it was last read.", labels=[*labels, "sensor"]
    )
    read = GaugeMetricFamily(
        "kvfarm_device_vitals_timestamp_seconds", "When battery and temperatures were read.", labels=labels
    )
    for device in devices:
        place = [device.name, device.host]
        leased.add_metric(place, float(device.lease is not None))
        bad.add_metric(place, float(device.quarantine is not None))
        if device.results:
            flaky.add_metric(place, device.stopped / device.results)
        if (vitals := device.vitals) is not None:
            read.add_metric(place, vitals.at)
            if vitals.battery_percent is not None:
                charge.add_metric(place, vitals.battery_percent / 100)
            for sensor, celsius in vitals.temperatures_c.items():
                warmth.add_metric([*place, sensor], celsius)
    yield from (leased, bad, flaky, charge, warmth, read)


def exposition(collector: FarmCollector) -> bytes:
    """Prometheus' text format; its type is ``prometheus_client.CONTENT_TYPE_LATEST``."""
    return generate_latest(collector)
