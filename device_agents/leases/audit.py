"""Who had which device, quarantined, lifted, restarted it, when and why: told by the journal itself.

Nothing is written for it. A journal that begins anew leaves such lines behind in ARCHIVE, to which lines
are only ever added.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from device_agents.errors import LeaseError
from device_agents.leases.ledger import ARCHIVE, JOURNAL, Entry, parse
from device_agents.leases.model import (
    Asked,
    Booted,
    Drained,
    Ended,
    Granted,
    Lifted,
    Quarantined,
    Request,
    Restarted,
    Snapshot,
)


@dataclass(frozen=True)
class Event:
    """One thing that somebody did to a device, or that befell their lease.

    when: UTC, ISO 8601. what: leased, released, quarantined, lifted, reboot, power-cycle. device: as the
    journal names it, see DeviceConfig.key. who: user, host and process, where known. run: for which.
    """

    when: str
    what: str
    device: str
    who: str
    why: str = ""
    run: str = ""


def entries(folder: Path) -> list[Entry]:
    """What the journal in ``folder`` says and what it said before it began anew, oldest first.

    Raises:
        LeaseError: a line is none of a journal.
    """
    lines: dict[bytes, str] = {}  # each once; where it was found
    for name in (ARCHIVE, JOURNAL):
        path = folder / name
        text = path.read_bytes() if path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1].splitlines()
        lines |= {line: f"{path}, line {n}" for n, line in enumerate(whole, 1) if line}
    found = []
    for line, where in lines.items():
        try:
            found.append(parse(line, where))
        except LeaseError:
            if ARCHIVE not in where:
                raise  # of the archive: a line whose writer died in the middle of it, and which came again
    return found


def events(entries: Iterable[Entry]) -> list[Event]:
    """What ``entries`` mean to people, oldest first."""
    asked: dict[str, Request] = {}
    held: dict[tuple[str, int], Request] = {}  # by device and token
    told = list[Event]()
    for entry in entries:
        match entry.fact:
            case Snapshot(state):
                asked |= {id_: waiting.request for id_, waiting in state.waiting.items()}
                held |= {(device, each.token): each.request for device, each in state.held.items()}
            case Booted():
                told += [
                    _of(r, "released", device, entry, "the machine restarted")
                    for (device, _), r in held.items()
                ]
                asked, held = {}, {}
            case Asked(request):
                asked[request.id] = request
            case Granted(id_, token, devices):
                request = asked.pop(id_, Request(id_, "", "somebody", devices))
                held |= dict.fromkeys(((device, token) for device in devices), request)
                told += [_of(request, "leased", device, entry, "") for device in devices]
            case Ended(device, token, why):
                request = held.pop((device, token), Request("", "", "somebody", (device,)))
                told.append(_of(request, "released", device, entry, why))
            case Quarantined(device, evidence, by, seconds):
                limit = "until lifted" if seconds is None else f"for {seconds:.0f} s"
                told.append(Event(entry.when, "quarantined", device, by, f"{evidence} ({limit})"))
            case Lifted(device, by):
                told.append(Event(entry.when, "lifted", device, by))
            case Drained(by, why):
                told.append(Event(entry.when, "drained" if why else "undrained", "*", by, why))
            case Restarted(device, how, by, why):
                told.append(Event(entry.when, how, device, by, why))
            case _:
                pass
    return told


def waits(entries: Iterable[Entry]) -> list[float]:
    """Seconds that each granted request had waited."""
    asked, found = dict[str, float](), list[float]()
    for entry in entries:
        match entry.fact:
            case Booted():
                asked.clear()  # the clock began anew
            case Asked(request):
                asked[request.id] = entry.at
            case Granted(id_) if id_ in asked:
                found.append(max(0.0, entry.at - asked.pop(id_)))
            case _:
                pass
    return found


def _of(request: Request, what: str, device: str, entry: Entry, why: str) -> Event:
    return Event(entry.when, what, device, request.holder, why, request.run)
