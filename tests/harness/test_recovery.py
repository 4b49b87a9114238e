"""What infrastructure stops is tried again, within bounds; a device that stays away is set aside."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from device_agents.errors import DeviceUnreachable, InfrastructureError, RunnerDied, UnsupportedDevice
from harness.errors import ClusterLost, Quarantined, ReferenceFailed
from harness.recovery import Recovery, RecoveryPolicy

PATIENT = RecoveryPolicy(retries=2, answer_s=60.0, lost_in_a_row=2, pause_s=0.001)
HASTY = RecoveryPolicy(retries=2, answer_s=0.05, lost_in_a_row=2, pause_s=0.01)


class Device:
    """Fails as told, one entry a try; None is a success. probes: the same for signs of life."""

    def __init__(self) -> None:
        self.fails: list[Exception | None] = []
        self.probes: list[Exception | None] = []
        self.tries = 0

    def work(self) -> int:
        self.tries += 1
        if self.fails and (error := self.fails.pop(0)) is not None:
            raise error
        return self.tries

    def probe(self, _: str) -> None:
        if self.probes and (error := self.probes.pop(0)) is not None:
            raise error


@pytest.fixture
def device() -> Device:
    return Device()


def recovery_of(device: Device, policy: RecoveryPolicy = PATIENT) -> tuple[Recovery, list[tuple[str, str]]]:
    aside: list[tuple[str, str]] = []
    return Recovery(device.probe, policy, lambda *what: aside.append(what)), aside


def lose(recovery: Recovery, work: Callable[[], int], name: str = "one") -> list[str]:
    retries: list[str] = []
    with pytest.raises(InfrastructureError):
        recovery.attempt(name, work, retries)
    return retries


def test_a_success_is_not_repeated(device: Device) -> None:
    retries: list[str] = []
    assert recovery_of(device)[0].attempt("one", device.work, retries) == 1
    assert (retries, device.tries) == ([], 1)


def test_what_infrastructure_stopped_is_tried_again_and_says_why(device: Device) -> None:
    device.fails = [RunnerDied("killed by SIGKILL\nand a long tail"), DeviceUnreachable("gone"), None]
    retries: list[str] = []
    assert recovery_of(device)[0].attempt("one", device.work, retries) == 3
    assert [reason.partition(" (answered")[0] for reason in retries] == [
        "RunnerDied: killed by SIGKILL",
        "DeviceUnreachable: gone",
    ]


def test_it_is_not_tried_before_the_device_answers(device: Device) -> None:
    device.fails = [RunnerDied("dead"), None]
    device.probes = [DeviceUnreachable("booting"), DeviceUnreachable("booting"), None]
    assert recovery_of(device)[0].attempt("one", device.work, []) == 2
    assert device.probes == []


def test_tries_are_counted_and_the_last_error_is_the_outcome(device: Device) -> None:
    device.fails = [RunnerDied(str(n)) for n in range(9)]
    recovery, aside = recovery_of(device)
    with pytest.raises(RunnerDied, match=r"^2$"):
        recovery.attempt("one", device.work, [])
    assert (device.tries, aside) == (3, [])


def test_checks_lost_in_a_row_quarantine_the_device_with_evidence(device: Device) -> None:
    device.fails = [RunnerDied("signal 11")] * 9
    recovery, aside = recovery_of(device)
    lose(recovery, device.work)
    lose(recovery, device.work)
    (name, evidence), tries = aside[0], device.tries
    assert (name, len(aside)) == ("one", 1)
    assert "2 checks or legs lost in a row, the last by RunnerDied: signal 11" in evidence
    with pytest.raises(Quarantined, match=r"^quarantined: 2 checks .* signal 11"):
        recovery.attempt("one", device.work, [])
    assert device.tries == tries, "nothing is asked of a device in quarantine"


def test_a_check_that_passes_in_between_breaks_the_row(device: Device) -> None:
    recovery, aside = recovery_of(device)
    for _ in range(3):
        device.fails = [RunnerDied("x")] * 3
        lose(recovery, device.work)
        recovery.attempt("one", device.work, [])
    assert aside == []


def test_a_device_that_does_not_come_back_is_quarantined_at_once(device: Device) -> None:
    device.fails = [DeviceUnreachable("cable")]
    device.probes = [DeviceUnreachable("still away")] * 99
    recovery, aside = recovery_of(device, HASTY)
    assert lose(recovery, device.work) == []
    assert "DeviceUnreachable: cable; then it did not answer again within 0.05 s" in aside[0][1]
    assert "still away" in aside[0][1]


def test_a_device_that_can_never_do_it_is_not_asked_twice(device: Device) -> None:
    device.fails = [UnsupportedDevice("noexec")]
    recovery, aside = recovery_of(device)
    lose(recovery, device.work)
    assert (device.tries, aside) == (1, [("one", "UnsupportedDevice: noexec")])


def test_other_devices_do_not_pay(device: Device) -> None:
    device.fails = [UnsupportedDevice("noexec")]
    recovery, _ = recovery_of(device)
    lose(recovery, device.work)
    assert recovery.attempt("two", device.work, []) == 2
    assert list(recovery.quarantined) == ["one"]


def test_a_failing_reference_is_no_device_s_fault(device: Device) -> None:
    recovery, aside = recovery_of(device)
    for _ in range(5):
        device.fails = [ReferenceFailed("torch died")]
        lose(recovery, device.work)
    assert (device.tries, aside) == (5, [])


def test_an_answer_of_the_engine_is_final_and_counts_as_life(device: Device) -> None:
    recovery, aside = recovery_of(device)
    for _ in range(3):
        device.fails = [RunnerDied("x"), RunnerDied("x"), RunnerDied("x"), AssertionError("wrong logits")]
        lose(recovery, device.work)
        with pytest.raises(AssertionError, match="wrong logits"):
            recovery.attempt("one", device.work, [])
    assert (device.tries, aside) == (12, [])


def test_a_device_that_stays_silent_is_revived_before_it_is_set_aside(device: Device) -> None:
    revived: list[str] = []

    def revive(name: str, evidence: str) -> str:
        revived.append(f"{name}: {evidence}")
        device.probes = []
        return "power-cycled with hub"

    aside: list[tuple[str, str]] = []
    recovery = Recovery(device.probe, HASTY, lambda *what: aside.append(what), revive=revive)
    device.fails = [DeviceUnreachable("gone")]
    device.probes = [DeviceUnreachable("still gone")] * 100
    retries: list[str] = []
    assert recovery.attempt("one", device.work, retries) == 2
    assert aside == []
    assert "did not answer again within 0.05 s" in revived[0]
    assert retries[0].startswith("DeviceUnreachable: gone (power-cycled with hub, answered again after")


@pytest.mark.parametrize("works", [True, False])
def test_what_power_does_not_bring_back_is_set_aside_with_both_in_the_evidence(
    device: Device, works: bool
) -> None:
    def revive(name: str, evidence: str) -> str:
        if works:
            return "power-cycled with hub"
        raise InfrastructureError("its limit is 3")

    aside: list[tuple[str, str]] = []
    recovery = Recovery(device.probe, HASTY, lambda *what: aside.append(what), revive=revive)
    device.fails = [DeviceUnreachable("gone")]
    device.probes = [DeviceUnreachable("still gone")] * 100
    lose(recovery, device.work)
    after = "power-cycled with hub: DeviceUnreachable: still gone"
    without = "not revived: InfrastructureError: its limit is 3"
    assert aside[0][1].endswith(after if works else without)
    with pytest.raises(Quarantined):
        recovery.attempt("one", device.work, [])


@pytest.mark.parametrize("probed", [False, True])
def test_when_ray_is_gone_no_device_is_to_blame(device: Device, probed: bool) -> None:
    """Neither by the work itself nor by the question whether the device answers again."""
    gone = ClusterLost("Ray's head has died")
    device.fails = [RunnerDied("killed")] if probed else [gone]
    device.probes = [gone]
    recovery = Recovery(device.probe, PATIENT)
    with pytest.raises(ClusterLost):
        recovery.attempt("a", device.work, [])
    assert device.tries == 1
    assert recovery.quarantined == {}
