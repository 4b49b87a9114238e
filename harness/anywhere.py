"""Tests for any device of a kind, ``@pytest.mark.device("model~'Pixel 8'", any=True)``: one device each.

Which one is decided when the test runs: the one that this process has, else the first that is free. What
infrastructure stops goes on on another one where one is free, and says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from device_agents.errors import InfrastructureError, LeaseNotGranted
from harness.errors import ClusterLost, Quarantined, ReferenceFailed
from harness.recovery import one_line

if TYPE_CHECKING:
    from harness.run import DeviceRun

T = TypeVar("T")


@dataclass(frozen=True)
class AnyOf:
    """In the place of a test's device: it is to run on one of these."""

    devices: tuple[str, ...]


def run_anywhere(
    run: DeviceRun,
    place: AnyOf,
    work: Callable[[str], T],
    retries: list[str],
    on_device: Callable[[str], None],
) -> T:
    """``work(device)`` on one of the devices; ``retries`` gets the reason of each further try.

    on_device: told where, before each try.

    Raises:
        Quarantined: all of them have been set aside. LeaseNotGranted: others have them all.
        What Recovery.attempt raises.
    """
    device = _first(run, place)
    while True:
        on_device(device)
        may_move = len(place.devices) > 1 and len(retries) < run.options.recovery.retries
        try:
            return run.recovery.attempt(device, partial(work, device), retries, once=may_move)
        except (ReferenceFailed, ClusterLost, LeaseNotGranted):
            raise
        except InfrastructureError as error:
            if not may_move:
                raise
            other = _other(run, place, device)
            where = f"tried again on {other}" if other else "no other device of its kind was free"
            retries.append(f"on {device}: {one_line(error)}; {where}")
            run.recovery.on_retry(device, retries[-1])
            if other:
                run.give_back(device)
                device = other
            elif device in run.recovery.quarantined:
                raise


def _first(run: DeviceRun, place: AnyOf) -> str:
    evidence = run.recovery.quarantined
    sound = [device for device in place.devices if device not in evidence]
    if not sound:
        why = "; ".join(f"{device}: {evidence[device]}" for device in place.devices)
        raise Quarantined(f"all devices of its kind are quarantined: {why}")
    ours = run.farm.holding(sound)
    return ours[0] if ours else run.farm.hold(1, sound)[0].device


def _other(run: DeviceRun, place: AnyOf, device: str) -> str:
    """ "" if none is free now."""
    sound = [each for each in place.devices if each != device and each not in run.recovery.quarantined]
    if ours := run.farm.holding(sound):
        return ours[0]
    try:
        return run.farm.hold(1, sound, wait_s=0.0)[0].device if sound else ""
    except InfrastructureError:
        return ""
