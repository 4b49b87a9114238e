"""Who did what in the farm: from the lease journals of lab hosts, and from the gates that the store has.

Nothing is written for it: a lease is in its lab host's journal, a waiver in its gate.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase

from device_agents.config import name_of
from device_agents.leases.audit import Event
from harness.errors import HarnessError
from harness.inventory import Inventory
from reports.results import RunResults


@dataclass(frozen=True)
class Deed:
    """One event at one lab host. at: UTC, ISO 8601, to the millisecond. what: see Event."""

    at: str
    what: str
    device: str
    who: str
    why: str
    run: str
    host: str


def at_host(host: str, events: Iterable[Event], known: Inventory) -> Iterator[Deed]:
    """known: names the devices, which a journal knows by serial number."""
    serials = known.serials()
    for event in events:
        name = name_of(event.device, serials)
        yield Deed(event.when, event.what, name, event.who, event.why, event.run, host)


def waived(runs: Iterable[RunResults]) -> Iterator[Deed]:
    """Losses that a gate let through; ``device`` is the waiver's glob over devices."""
    for run in runs:
        for waiver in run.gate.waivers if run.gate is not None else ():
            if waiver.state == "used":
                why = f"{waiver.cell}: up to {waiver.allowed:.1%} until {waiver.expires}: {waiver.reason}"
                why += f" ({waiver.issue})"
                device = waiver.cell.split("/")[0]
                at = datetime.fromisoformat(run.started_at).astimezone(UTC).isoformat(timespec="milliseconds")
                yield Deed(at, "waived", device, waiver.owner, why, run.run_id, "")


def chosen(
    deeds: Iterable[Deed], device: str | None = None, user: str | None = None, since: str | None = None
) -> list[Deed]:
    """Those of them, oldest first. device, user: ``*`` stands for anything. since: ISO 8601, UTC.

    Raises:
        HarnessError: ``since`` is none.
    """
    begin = None if since is None else _moment(since)

    def is_wanted(deed: Deed) -> bool:
        # One of the two is a glob; a waiver's device is one itself.
        of_device = device is None or fnmatchcase(deed.device, device) or fnmatchcase(device, deed.device)
        who = deed.who.split("@")[0].split(" pid ")[0]
        of_user = user is None or fnmatchcase(who, user)
        return of_device and of_user and (begin is None or _moment(deed.at) >= begin)

    return sorted(filter(is_wanted, deeds), key=lambda deed: deed.at)


def _moment(text: str) -> datetime:
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise HarnessError(
            f"sought a date like 2026-01-31 or a time like 2026-01-31T08:00, found {text!r}"
        ) from None
    return at if at.tzinfo else at.replace(tzinfo=UTC)
