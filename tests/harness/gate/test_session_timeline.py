"""When a gate's devices did what: every leg is in the timeline, with what it waited for and what failed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from device_agents.api import Vitals
from device_agents.errors import DeviceUnreachable, Unauthorized
from harness.gate.settings import EntrySettings
from harness.store import open_store
from harness.store.protocol import Flakes, Part, Span
from reports.results import RunResults
from tests.harness.gate.fake_farm import FakeDevice
from tests.harness.gate.gates import FIRST_LOOK, SETTINGS, WEIGHED, Gate

_ARMS = ("baseline", "candidate", "canary")


def spans(gate: Gate, results: RunResults) -> list[Span]:
    with open_store(gate.path) as store:
        return list(store.spans(results.run_id))


def parts(found: list[Span], kind: str) -> list[Part]:
    return [part for span in found for part in span.parts if part.kind == kind]


def test_every_leg_is_there_once_by_its_block_and_side(gate: Gate) -> None:
    found = spans(gate, gate.run(FakeDevice("phone")))
    what = SETTINGS.workloads[0].name
    legs = Counter({f"block {block} · {arm} · {what}": 2 for block in range(1, 5) for arm in _ARMS})
    weighed = Counter(f"weighing {pair} · {arm} · {what}" for pair in range(1, 5) for arm in _ARMS[:2])
    assert Counter(span.name for span in found) == legs + weighed
    assert (legs.total(), weighed.total()) == (FIRST_LOOK - WEIGHED, WEIGHED)
    assert {(span.device, span.kind, span.outcome) for span in found} == {("phone", "leg", "VALID")}
    assert all(span.ended is not None and span.began <= span.ended for span in found)


def test_what_was_tried_again_is_seen_and_counts_against_the_device(gate: Gate) -> None:
    failures = iter([DeviceUnreachable("a hiccup")])

    def hiccup(number: int) -> None:
        if number == 5 and (error := next(failures, None)):
            raise error

    found = spans(gate, gate.run(FakeDevice("phone", before_leg=hiccup)))
    assert [span.retries for span in found if span.retries] == [1]
    assert ["a hiccup" in part.name for part in parts(found, "retry")] == [True]
    with open_store(gate.path) as store:
        assert store.flakes() == {"phone": Flakes(FIRST_LOOK, 1)}


def test_what_it_waited_for_is_seen(gate: Gate) -> None:
    hot = Vitals(at=1.0, thermal_status=1)
    rules = replace(SETTINGS, entry=EntrySettings(wait_s=0.2, wait_total_s=0.6))
    found = parts(spans(gate, gate.run(FakeDevice("phone", vitals=lambda: hot), settings=rules)), "wait")
    assert {part.name for part in found} == {"until it is fit", "after a void block"}
    assert sum(part.ended - part.began for part in found) == pytest.approx(0.6, abs=0.3)


def test_a_leg_that_was_lost_and_its_devices_quarantine_are_seen(gate: Gate) -> None:
    def lost(number: int) -> None:
        raise Unauthorized("the cable fell out")

    found = spans(gate, gate.run(FakeDevice("phone", before_leg=lost)))
    assert [span.outcome for span in found if span.kind == "leg"][-1] == "infrastructure"
    (quarantine,) = [span for span in found if span.kind == "quarantine"]
    assert "the cable fell out" in quarantine.name
