"""Was there ever a device with two holders? By the journal alone, and by other code than wrote it."""

from __future__ import annotations

from collections.abc import Iterable

from device_agents.leases.ledger import Entry
from device_agents.leases.model import (
    Asked,
    Beat,
    Booted,
    Drained,
    Ended,
    Freed,
    Granted,
    Lifted,
    Quarantined,
    Request,
    Restarted,
    Snapshot,
    Started,
    Withdrawn,
)


def violations(entries: Iterable[Entry]) -> list[str]:
    """A line for each fact that may not follow those before it; none for a journal as it should be.

    Checked: a device is granted only when it is free, sound, asked for and clean of its last lease, and
    its lab host not drained; tokens grow; a request is granted once, and as many devices as it wants;
    only who waits or has a device gives signs of life; time does not go back.
    """
    wrong: list[str] = []
    asked: dict[str, Request] = {}
    holder: dict[str, tuple[int, str]] = {}  # device: token and request, until it is clean
    ended: set[str] = set()
    bad: set[str] = set()
    drained = False
    last_token, last_at, boot = 0, float("-inf"), ""

    for number, entry in enumerate(entries, 1):
        fact = entry.fact

        def sought(true: bool, what: str, number: int = number) -> None:
            if not true:
                wrong.append(f"line {number}: {what}")

        same_boot = not isinstance(fact, Booted)
        sought(not same_boot or entry.at >= last_at, f"time goes back from {last_at:g} to {entry.at:g}")
        last_at = entry.at
        match fact:
            case Booted():
                sought(fact.boot != boot, "the same boot twice")
                boot, last_token = fact.boot, max(last_token, fact.token)
                asked, holder, ended = {}, {}, set()
            case Snapshot(state):
                asked = {id_: waiting.request for id_, waiting in state.waiting.items()}
                holder = {device: (held.token, held.request.id) for device, held in state.held.items()}
                ended = {device for device, held in state.held.items() if held.ended}
                bad, boot, last_token = set(state.quarantined), state.boot, state.token
                drained = bool(state.drained)
            case Asked(request):
                sought(request.id not in asked, f"{request.id} asks twice")
                asked[request.id] = request
            case Granted(id_, token, devices):
                request = asked.pop(id_, Request("", "", "", ()))
                sought(bool(request.id), f"{id_} is granted and had not asked")
                sought(not drained, f"{id_} is granted while the lab host is drained")
                sought(token > last_token, f"token {token} after {last_token}")
                last_token = max(last_token, token)
                sought(len(set(devices)) == request.count, f"{len(devices)} devices of {request.count}")
                for device in devices:
                    sought(device in request.devices, f"{device} was not asked for by {id_}")
                    sought(device not in holder, f"{device} has two holders: {holder.get(device)} and {id_}")
                    sought(device not in bad or request.repair, f"{device} is granted in quarantine")
                    holder[device] = (token, id_)
                    ended.discard(device)
            case Ended(device, token):
                sought(
                    holder.get(device, (0, ""))[0] == token, f"{device}: token {token} ends and has it not"
                )
                sought(device not in ended, f"{device} ends twice")
                ended.add(device)
            case Freed(device, token):
                sought(
                    holder.get(device, (0, ""))[0] == token, f"{device}: token {token} frees and has it not"
                )
                sought(device in ended, f"{device} is freed in the middle of its lease")
                holder.pop(device, None)
                ended.discard(device)
            case Beat(id_):
                has = any(id_ == other and device not in ended for device, (_, other) in holder.items())
                sought(has or id_ in asked, f"{id_} beats and neither waits nor has a device")
            case Withdrawn(id_):
                sought(id_ in asked, f"{id_} withdraws and does not wait")
                asked.pop(id_, None)
            case Quarantined(device):
                bad.add(device)
            case Lifted(device):
                bad.discard(device)
            case Drained():
                drained = bool(fact.why)
            case Started() | Restarted():
                pass
    return wrong
